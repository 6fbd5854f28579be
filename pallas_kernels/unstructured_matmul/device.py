"""The kernels of `unstructured_matmul` on the device, in inline MLIR: what a thread does.

Units of work are a section of a group of strips, one a warp; a block takes a run of them, so that all warps walk
along the same columns and share x in shared memory. Where the run goes on with the next group, the sums of this one are
written: those of the blocks that share a group lie in different slots, and XLA adds them in order.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

from pallas_kernels.tile import lane as ln
from pallas_kernels.tile.lane import Array, Int
from pallas_kernels.unstructured_matmul import layout, mask_words, warp
from pallas_kernels.unstructured_matmul.config import MMA_TILES, PIECE_BYTES, QUAD, TILE_N, X_TILE_BYTES
from pallas_kernels.unstructured_matmul.decoding import EVEN_ONES, decode, decode_pairs
from pallas_kernels.unstructured_matmul.division import Part, Work
from pallas_kernels.unstructured_matmul.pipelines import Ring, Source, Steps

REGISTERS = 4  # of an accumulator of 16 x 8


def multiply(work: Work, block: Int, inputs, outputs, smem: dict[str, Array], copy: Callable) -> None:
    """What a thread does; inputs are those of `Matrix`, and `copy` begins that of a block of x, as in `Steps`."""
    parts = Parts.of(work, block, inputs, smem)
    loaded = parts.load()
    steps = Steps.of(work, block, copy, *(warp.address_of(smem[name]) for name in ("x", "x_barriers")))
    steps.prepare()
    ln.block_barrier()
    steps.begin()

    def multiply_part(strip, state, carry):
        state, sums = _multiply_strip(strip, state, steps, *carry)
        _store_sums(work, block, strip.part, outputs[0], sums)
        return state, [*(before + strip.part.steps for before in carry)]

    parts.for_each(loaded, [ln.constant(0)], multiply_part)


def expand(work: Work, block: Int, inputs, outputs, smem: dict[str, Array]) -> None:
    """What a thread does to write a dense matrix, two elements a word; inputs are those of `Matrix`."""

    def expand_part(strip, state, carry):
        part = strip.part

        def expand_quad(quad, state):
            def store(offset, registers):
                number = quad * QUAD + offset
                with ln.when((number < part.blocks) & (part.strip(ln.warp()) < work.strips)):
                    _store_block(work, part, number, outputs[0], registers)

            return strip.decode_quad(state, quad * QUAD, store)

        return ln.loop(part.quads, state, expand_quad), carry

    parts = Parts.of(work, block, inputs, smem)
    parts.for_each(parts.load(), [], expand_part)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matrix:
    """The arrays of one matrix of those that are multiplied."""

    values: Array
    masks: Array
    rows: Array
    lags: Array

    @classmethod
    def of(cls, part: Part, inputs: Sequence[Array]) -> "Matrix":
        """A part's: of the inputs, which begin with all matrices' values, then masks, rows and lags."""
        count, names = part.work.matrices, ("values", "masks", "rows", "lags")
        return cls(**{k: warp.choose(inputs[i * count : (i + 1) * count], part.matrix) for i, k in enumerate(names)})

    def load_extent(self, part: Part) -> list[Int]:
        """The row of a part's first section, in odd lanes of that behind its last, and the lags there; for `extent`.

        With an address for each lane, as ptxas waits at once for what it has in a register that all lanes share.
        """
        section = ln.select((ln.thread() % 2).equals(0), part.first, part.last)
        return [self.rows.load(part.own(ln.warp()) * part.work.sections + section), *self._load_lags(part, part.last)]

    def load_start(self, part: Part) -> list[Int]:
        """The lags of the lane's streams where a part begins, and its words of the first quad."""
        words = mask_words.load(part, self.masks, mask_words.origin(part), ln.constant(0))
        return [*self._load_lags(part, part.first), *words]

    def _load_lags(self, part: Part, section: Int) -> list[Int]:
        row = part.own(ln.warp()) * part.work.sections + section
        first = row * layout.STREAMS + ln.thread() % ln.WARP * 2
        return [self.lags.load(first + half) for half in range(part.work.places)]


def extent(loaded: list[Int]) -> list[Int]:
    """A part's first row of values, and how many it has: one at least, so that there is a piece to wait for."""
    rows, *lags = loaded
    first, last = (ln.from_lane(rows, ln.constant(lane)) for lane in range(2))
    return [first, ln.maximum(last - first + _furthest(lags), 1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of a block, and a warp's ring, which goes on from one to the next.

    What a part begins with is loaded during the one before, as is the extent of the part that follows it: whose values
    are copied while some of its own are still to be decoded.

    Attributes:
        work: the whole.
        block: number of the block.
        inputs: those of `Matrix`, and more.
        address: of the ring.
        barriers: address of the ring's.
    """

    work: Work
    block: Int
    inputs: Sequence[Array]
    address: Int
    barriers: Int

    @classmethod
    def of(cls, work: Work, block: Int, inputs: Sequence[Array], smem: dict[str, Array]) -> "Parts":
        """With barriers that are ready: no other warp uses them."""
        config, number = work.config, ln.warp()
        barriers = warp.address_of(smem["barriers"]) + number * (config.pieces * warp.BARRIER_BYTES)
        with ln.when((ln.thread() % ln.WARP).equals(0)):
            warp.begin_barriers(barriers, config.pieces)
        warp.warp_barrier()
        address = warp.address_of(smem["rings"]) + number * config.ring_bytes
        return cls(work=work, block=block, inputs=inputs, address=address, barriers=barriers)

    @property
    def count(self) -> Int:
        return Part.count(self.work, self.block)

    def load(self) -> list[Int]:
        """What `for_each` has to know of the first parts, all at once, as each load takes its time."""
        part, matrix = self._place(ln.constant(0))
        return [*matrix.load_extent(part), *self._load_for(ln.constant(0))]

    def for_each(self, loaded: list[Int], carry: list[Int], do: Callable) -> None:
        """`do(strip, state, carry)` for each part, given its strip's state; what both are behind it.

        Args:
            loaded: by `load`.
            carry: what the first one gets.
            do: what is to be done.
        """
        places = self.work.places
        own, rest = loaded[: 1 + places], loaded[1 + places :]

        def do_part(number, carried):
            begin, issued, *own = carried[:4]
            loaded, carry = carried[4 : 4 + len(rest)], carried[4 + len(rest) :]
            following, start = extent(loaded[: 1 + places]), loaded[1 + places :]
            strip = self._strip(number, begin, own, following, start)
            issued = strip.fill(issued)
            ahead = self._load_for(number + 1)  # not waited for before the part ends
            strip.wait()
            state, carry = do(strip, strip.state(issued), carry)
            return [strip.ring.own.end, state[-1], *following, *ahead, *carry]

        ln.loop(self.count, [ln.constant(0)] * 2 + [*extent(own), *rest, *carry], do_part)

    def _place(self, number: Int) -> tuple[Part, Matrix]:
        """The part of this number, or the last one."""
        part = Part.of(self.work, self.block, ln.minimum(number, self.count - 1))
        return part, Matrix.of(part, self.inputs)

    def _load_for(self, number: Int) -> list[Int]:
        """The extent of the part that follows the one of this number, and what this one begins with."""
        (part, matrix), (following, its_matrix) = self._place(number), self._place(number + 1)
        return [*its_matrix.load_extent(following), *matrix.load_start(part)]

    def _strip(self, number: Int, begin: Int, own: list[Int], following: list[Int], start: list[Int]) -> "Strip":
        """A part's, given the number of its first piece, its extent and the following one's, and `load_start`."""
        (part, matrix), (_, its_matrix) = self._place(number), self._place(number + 1)
        row_bytes = self.work.row_bytes
        source = Source(values=matrix.values, row_bytes=row_bytes, begin=begin, first=own[0], rows=own[1])
        first, rows = following
        rows = ln.select(number + 1 < self.count, rows, 0)
        ring = Ring(
            address=self.address,
            barriers=self.barriers,
            pieces=self.work.config.pieces,
            own=source,
            following=Source(values=its_matrix.values, row_bytes=row_bytes, begin=source.end, first=first, rows=rows),
        )
        lags, words = start[: self.work.places], start[self.work.places :]
        behind = begin * PIECE_BYTES + ln.thread() % ln.WARP * (row_bytes // ln.WARP)
        streams = [behind + lag * row_bytes for lag in lags]
        origin = mask_words.origin(part)
        return Strip(part=part, masks=matrix.masks, origin=origin, ring=ring, streams=streams, words=words)


def _furthest(streams: Sequence[Int]) -> Int:
    """Of all lanes'."""
    return ln.warp_max(functools.reduce(ln.maximum, streams))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strip:
    """A warp's strip during a part.

    Attributes:
        part: the part.
        masks: of its matrix.
        ring: its values.
        streams: where the lane's streams start, in bytes that have gone through the ring: the even and the odd one, or
            that of words.
        words: the lane's mask words of the first quad.
        origin: where they begin, of the part.
    """

    part: Part
    masks: Array
    origin: Int
    ring: Ring
    streams: list[Int]
    words: list[Int]

    @property
    def top(self) -> Int:
        """Where the stream furthest ahead starts."""
        return _furthest(self.streams)

    def fill(self, issued: Int) -> Int:
        """Begins the copies that may be under way when the part starts, of which `issued` are; how many are then."""
        ready = self.ring.ready_for(self.top)
        warp.warp_barrier()  # every lane has read what is overwritten now
        with ln.when(warp.is_elected()):
            ln.loop(ready - issued, [], lambda piece, _: self.ring.copy(issued + piece) or [])
        return ready

    def wait(self) -> None:
        """Waits for what lies before the first block."""
        needed = self.ring.needed_before(self.top)
        for piece in (self.ring.own.begin + i for i in range(self.ring.lag_pieces)):
            with ln.when(piece < needed + 1):
                self.ring.wait(piece)

    def state(self, issued: Int) -> list[Int]:
        """What changes from quad to quad: its words, the streams, the furthest one, pieces whose copies have begun."""
        return [*self.words, *self.streams, self.top, issued]

    def decode_quad(self, state: list[Int], first: Int, consume: Callable[[int, list[Int]], None]) -> list[Int]:
        """Four blocks from block `first` on, each decoded and consumed before the next; the state after them.

        Their mask words were loaded one quad before: a load that is carried on is waited for.
        """
        count = len(self.words)
        words, (*before, issued) = mask_words.stored(self.part, state[:count], first), state[count:]
        following = mask_words.load(self.part, self.masks, self.origin, first + QUAD)
        places = self.places(words, before)
        for block in range(QUAD):
            registers, issued = self.decode(block, words, places[block], places[block + 1][-1], issued)
            consume(block, registers)
        return [*following, *places[-1], issued]

    def places(self, words: Sequence[Int], before: list[Int]) -> list[list[Int]]:
        """The streams and the furthest one before each block of a quad, and after the last."""
        places = [before]
        for block in range(QUAD):
            *streams, _ = places[-1]
            shifts = [block % 2] if self.part.work.paired else [0, 1]
            stored = [words[block // self.part.work.blocks_a_word] >> shift for shift in shifts]
            counts = [ln.popcount(bits & EVEN_ONES) for bits in stored]
            streams = [x + count * self.part.work.row_bytes for x, count in zip(streams, counts, strict=True)]
            places.append([*streams, _furthest(streams)])
        return places

    def decode(
        self, block: int, words: Sequence[Int], before: list[Int], end: Int, issued: Int
    ) -> tuple[list[Int], Int]:
        """A block's registers, and the pieces under way or there: one more may be, what the block needs is waited for.

        Args:
            block: which one of the quad.
            words: the lane's mask words of the quad.
            before: the streams and the furthest one.
            end: the furthest one after it.
            issued: pieces whose copies have begun.
        """
        *streams, top = before
        ready = self.ring.ready_for(top)
        warp.warp_barrier()  # every lane has read what is overwritten now
        with ln.when(issued < ready), ln.when(warp.is_elected()):
            self.ring.copy(issued)
        self.ring.wait(self.ring.needed_before(end))
        places = [self.ring.place(stream) for stream in streams]
        if self.part.work.paired:
            (place,), work = places, self.part.work
            return decode_pairs(words[block // 2], block % 2 == 1, place, work.values, work.dtype), ready
        return decode(words[block], *places), ready


def _multiply_strip(strip: Strip, state: list[Int], steps: Steps, before: Int) -> tuple[list[Int], list[Int]]:
    """The strip's state behind a part, and its sums over the part's sections, 4 registers a tile, quad by quad.

    `before` is the number of the part's first step of x.
    """
    work = strip.part.work
    block_bytes = work.tiles * X_TILE_BYTES

    def multiply_quad(quad, carry):
        sums, place, decoded = carry[len(state) :], ln.constant(0), []

        def multiply(block, registers):
            nonlocal place
            decoded.extend(registers)
            if (block + 1) % work.blocks_at_once:
                return
            number, within = divmod(block + 1 - work.blocks_at_once, work.step_blocks)
            step = before + quad * (QUAD // work.step_blocks) + number
            place = place if within else steps.next(step)
            sums[:] = _multiply_blocks(work, sums, decoded, place + within * block_bytes)
            decoded.clear()
            if within == work.step_blocks - work.blocks_at_once:
                steps.release(step)

        return strip.decode_quad(carry[: len(state)], quad * QUAD, multiply) + sums

    carry = ln.loop(strip.part.quads, [*state, *[ln.constant(0)] * (REGISTERS * work.tiles)], multiply_quad)
    return carry[: len(state)], carry[len(state) :]


def _multiply_blocks(work: Work, sums: list[Int], registers: list[Int], x: Int) -> list[Int]:
    """`sums`, and the registers of `blocks_at_once` times their x in shared memory, at address `x`."""
    tiles = work.tiles
    if tiles > MMA_TILES:
        return warp.multiply_blocks(sums, registers, x, tiles, work.dtype)
    lane = ln.thread() % ln.WARP
    column = (lane % TILE_N) * warp.SWIZZLE
    chunks = [column + (lane // TILE_N + 4 * half ^ lane % TILE_N) * warp.CHUNK_BYTES for half in range(2)]
    sums = list(sums)
    for half, chunk in enumerate(chunks):  # 32 rows of x
        for tile in range(tiles):
            own = slice(REGISTERS * tile, REGISTERS * (tile + 1))
            cores = warp.load_matrices(x + chunk, tile * X_TILE_BYTES)
            for q in range(2):
                a = registers[REGISTERS * (2 * half + q) :][:REGISTERS]
                sums[own] = warp.multiply_tile(sums[own], a, cores[2 * q : 2 * q + 2], work.dtype)
    return sums


def _store_sums(work: Work, block: Int, part: Part, out: Array, sums: list[Int]) -> None:
    """Writes a strip's sums to the block's slot, and zeros to those that no block has where these are its last.

    A slot is [matrices, columns, rows]: as models have activations, and a store of a warp fills whole sectors.
    """
    lane, columns, strip = ln.thread() % ln.WARP, work.tiles * TILE_N, part.strip(ln.warp())
    rows = work.strips * layout.STRIP
    slot = block - (part.group * work.sections) // work.units

    def write(slot, values):
        first = (slot * work.matrices + part.matrix) * columns + (lane % 4) * 2
        origin = first * rows + strip * layout.STRIP + lane // 4
        for tile in range(work.tiles):
            for i in range(REGISTERS):
                out.store(origin + ((tile * TILE_N + i % 2) * rows + i // 2 * 8), values[REGISTERS * tile + i])

    def write_zeros(step, carry):
        write(slot + 1 + step, [ln.constant(0)] * len(sums))
        return carry

    left = ln.select(part.last.equals(work.sections), ln.constant(work.slots - 1) - slot, 0)
    with ln.when(strip < work.strips):
        write(slot, sums)
        ln.loop(left, [], write_zeros)


def _store_block(work: Work, part: Part, number: Int, out: Array, registers: list[Int]) -> None:
    """Writes a block of the part, by its number: 16 bytes of a row by the four lanes that have them."""
    lane, words = ln.thread() % ln.WARP, layout.BLOCK // 2
    row, word = part.strip(ln.warp()) * layout.STRIP + lane // 4, (part.first_block + number) * words + lane % 4
    for t, register in enumerate(registers):
        out.store((row + t % 2 * 8) * (work.blocks * words) + word + t // 2 * 4, register)
