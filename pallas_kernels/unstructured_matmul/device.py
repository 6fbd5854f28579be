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
from pallas_kernels.unstructured_matmul import layout, warp
from pallas_kernels.unstructured_matmul.config import CHUNK, MMA_TILES, QUAD, ROW_BYTES, STEPS, TILE_N
from pallas_kernels.unstructured_matmul.division import Part, Work
from pallas_kernels.unstructured_matmul.pipelines import LAG_PIECES, PIECE_BYTES, X_TILE_BYTES, Ring, Steps

LAST_QUADS = 4  # before the end, when what follows is asked for
REGISTERS = 4  # of an accumulator of 16 x 8

# permute_bytes(odd, even, NOTHING + e * EVEN + o * ODD) is {even or 0, odd or 0}: nibbles 3 and 2 name zeros of the odd
# half's register and F the sign of the even one's upper bytes, 0; 5 and 4 are the even half, 1 and 0 the odd one.
NOTHING, EVEN = 0xFF32, 0x22  # and ODD is 0x1100 = 0x80 * EVEN: one product of bytes adds both
EVEN_ONES = 0x55555555  # the even stream's bits, all of them
EVEN_BITS, ODD_BITS = 0x01010101, -0x7F7F7F80  # as signed: 0x80808080
SIGNS, EVERY_NIBBLE = 0x8888, 0x1111  # permute_bytes' selector of the sign of byte 0, four times; and one byte on


def decode(word: Int, even: Int, odd: Int) -> list[Int]:
    """A lane's 16 registers of a block, given the addresses of its streams."""
    registers = []
    for g in range(4):
        turned = warp.rotate_right(word, 2 * g)
        evens, odds, both = turned & EVEN_BITS, turned & ODD_BITS, turned & (EVEN_BITS | ODD_BITS)
        for j in range(4):
            before = EVEN_BITS & ((1 << 8 * j) - 1)  # the elements before this one
            even_place = warp.dot_bytes(evens, ROW_BYTES * before, even) if j else even
            odd_place = warp.dot_bytes(odds, before, odd) if j else odd  # an odd bit is ROW_BYTES already
            selector = warp.dot_bytes(both, EVEN << 8 * j, ln.constant(NOTHING))
            halves = warp.load_half(odd_place, 2), warp.load_half(even_place, 0)
            registers.append(warp.permute_bytes(*halves, selector))
        even, odd = warp.dot_bytes(evens, ROW_BYTES * EVEN_BITS, even), warp.dot_bytes(odds, EVEN_BITS, odd)
    return registers


def decode_pairs(word: Int, second: bool, place: Int) -> list[Int]:
    """The same of a paired lane, at `place`; the word serves two blocks, of which this is the second or the first."""
    registers = []
    for g in range(4):
        bits = warp.rotate_right(word, (2 * g + (0 if second else 25)) % 32) & ODD_BITS  # a bit is ROW_BYTES
        for j in range(4):
            before = EVEN_BITS & ((1 << 8 * j) - 1)
            own = warp.dot_bytes(bits, before, place) if j else place
            stored = warp.permute_bytes(bits, bits, ln.constant(SIGNS + j * EVERY_NIBBLE))
            registers.append(warp.load_word(own) & stored)
        place = warp.dot_bytes(bits, EVEN_BITS, place)
    return registers


def multiply(work: Work, block: Int, inputs, outputs, smem: dict[str, Array]) -> None:
    """What a thread does; inputs are those of `Matrix`, and x [n, columns]."""
    rings, barriers = _begin(work, smem)
    x, x_barriers = (warp.address_of(smem[name]) for name in ("x", "x_barriers"))
    with ln.when(ln.thread().equals(0)):
        warp.begin_barriers(x_barriers, STEPS, work.config.warps)
    ln.block_barrier()
    count = Part.count(work, block)

    def place(number):
        part = Part.of(work, block, number)
        return part, Matrix.of(part, inputs)

    def multiply_part(number, carry):
        (pieces_before, steps_before), loaded = carry[:2], carry[2:]
        start = Start(*place(number), loaded)
        steps = Steps(work, start.part, inputs[-1], x, x_barriers, steps_before)
        steps.begin()
        strip = Strip.begin(start, rings, barriers, pieces_before)
        following = Start.load(*place(ln.minimum(number + 1, count - 1)))  # there as soon as the first values
        strip.wait()
        sums = _multiply_strip(work, strip, steps, following.prefetch)
        _store_sums(work, block, start.part, outputs[0], sums)
        return [pieces_before + strip.ring.count, steps_before + steps.count, *following.loaded]

    ln.loop(count, [ln.constant(0)] * 2 + Start.load(*place(ln.constant(0))).loaded, multiply_part)


def expand(work: Work, block: Int, inputs, outputs, smem: dict[str, Array]) -> None:
    """What a thread does to write a dense matrix, two elements a word; inputs are those of `Matrix`."""
    rings, barriers = _begin(work, smem)

    def expand_part(number, carry):
        part = Part.of(work, block, number)
        strip = Strip.begin(Start.load(part, Matrix.of(part, inputs)), rings, barriers, carry[0])
        strip.wait()

        def expand_quad(quad, state):
            def store(offset, registers):
                number = quad * QUAD + offset
                with ln.when((number < part.blocks) & (part.strip(ln.warp()) < work.strips)):
                    _store_block(work, part, number, outputs[0], registers)

            return strip.decode_quad(state, quad * QUAD, store)

        ln.loop((part.blocks + (QUAD - 1)) // QUAD, strip.state(), expand_quad)
        return [carry[0] + strip.ring.count]

    ln.loop(Part.count(work, block), [ln.constant(0)], expand_part)


def _begin(work: Work, smem: dict[str, Array]) -> tuple[Int, Int]:
    """Addresses of this warp's ring and of its barriers, which are ready: no other warp uses them."""
    config, number = work.config, ln.warp()
    barriers = warp.address_of(smem["barriers"]) + number * (config.pieces * warp.BARRIER_BYTES)
    with ln.when((ln.thread() % ln.WARP).equals(0)):
        warp.begin_barriers(barriers, config.pieces)
    warp.warp_barrier()
    return warp.address_of(smem["rings"]) + number * config.ring_bytes, barriers


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


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a warp begins a part.

    Attributes:
        part: the part.
        matrix: which it is of.
        loaded: what it loads before, all at once, as each load takes its time: the rows of the first and the last
            section (of the stream furthest back), the lags of the lane's streams here and there, and its words of
            the first quad.
    """

    part: Part
    matrix: Matrix
    loaded: list[Int]

    @classmethod
    def load(cls, part: Part, matrix: Matrix) -> "Start":
        lane, own = ln.thread() % ln.WARP, part.own(ln.warp())
        ends = [own * part.work.sections + section for section in (part.first, part.last)]
        halves = range(part.work.places)
        lags = [matrix.lags.load(end * layout.STREAMS + lane * 2 + half) for end in ends for half in halves]
        words = load_words(part, matrix.masks, _first_word(part), ln.constant(0))
        return cls(part, matrix, [*(matrix.rows.load(end) for end in ends), *lags, *words])

    @property
    def first(self) -> Int:
        return self.loaded[0]

    @property
    def rows(self) -> Int:
        """Of values; there is always one more, and a piece to wait for."""
        count = self.part.work.places
        return ln.maximum(self.loaded[1] - self.first + _furthest(self.loaded[2 + count : 2 + 2 * count]), 1)

    @property
    def lags(self) -> list[Int]:
        return self.loaded[2 : 2 + self.part.work.places]

    @property
    def words(self) -> list[Int]:
        return self.loaded[2 + 2 * self.part.work.places :]

    @property
    def first_word(self) -> Int:
        """Index of the lane's mask word of the part's first block."""
        return _first_word(self.part)

    def prefetch(self) -> None:
        """Asks for the first values to be brought nearer."""
        rows = ln.minimum(self.rows, self.part.work.config.pieces * layout.DEPTH)
        with ln.when((ln.thread() % ln.WARP).equals(0)):
            warp.prefetch(self.matrix.values, ROW_BYTES, self.first, rows * ROW_BYTES)


def _furthest(streams: Sequence[Int]) -> Int:
    """Of all lanes'."""
    return ln.warp_max(functools.reduce(ln.maximum, streams))


def _first_word(part: Part) -> Int:
    per = part.work.blocks_a_word
    in_strip = layout.mask_blocks(part.work.blocks, part.work.paired)
    return (part.own(ln.warp()) * in_strip + part.first_block // per) * ln.WARP + ln.thread() % ln.WARP


def load_words(part: Part, masks: Array, first_word: Int, first: Int) -> list[Int]:
    """The lane's mask words of the quad from block `first` on; zeros behind the part's last block."""
    per, words = part.work.blocks_a_word, []
    count = (part.blocks + (per - 1)) // per
    for number in (first // per + i for i in range(QUAD // per)):
        word = masks.load(first_word + ln.minimum(number, count - 1) * ln.WARP)
        words.append(ln.select(number < count, word, 0))
    return words


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strip:
    """A warp's strip during a part.

    Attributes:
        start: where it begins.
        ring: its values.
        streams: where the lane's streams start, in bytes from the ring's beginning on: the even and the odd one, or
            that of words.
    """

    start: Start
    ring: Ring
    streams: list[Int]

    @classmethod
    def begin(cls, start: Start, ring: Int, barriers: Int, before: Int) -> "Strip":
        """With its first pieces under way; `before` have gone through the ring already."""
        config = start.part.work.config
        pieces = Ring(
            values=start.matrix.values,
            address=ring,
            barriers=barriers,
            pieces=config.pieces,
            before=before,
            first=start.first,
            rows=start.rows,
        )
        origin = before * PIECE_BYTES + ln.thread() % ln.WARP * 4
        strip = cls(start=start, ring=pieces, streams=[origin + lag * ROW_BYTES for lag in start.lags])
        strip._fill()
        return strip

    @property
    def top(self) -> Int:
        """Where the stream furthest ahead starts."""
        return _furthest(self.streams)

    def _fill(self) -> None:
        """Begins the first copies."""
        ready = self.ring.ready_for(self.top)
        warp.warp_barrier()
        for piece in map(ln.constant, range(self.ring.pieces)):
            with ln.when((ln.thread() % ln.WARP).equals(0) & (piece < ready)):
                self.ring.copy(piece)

    def wait(self) -> None:
        """Waits for what lies before the first block."""
        needed = self.ring.needed_before(self.top)
        for piece in map(ln.constant, range(LAG_PIECES)):
            with ln.when(piece < needed + 1):
                self.ring.wait(piece)

    def state(self) -> list[Int]:
        """What changes from quad to quad: its words, the streams, the furthest one, pieces copied."""
        return [*self.start.words, *self.streams, self.top, self.ring.ready_for(self.top)]

    def decode_quad(self, state: list[Int], first: Int, consume: Callable[[int, list[Int]], None]) -> list[Int]:
        """Four blocks from block `first` on, each decoded and consumed before the next; the state after them.

        Their mask words were loaded one quad before: a load that is carried on is waited for.
        """
        start, count = self.start, QUAD // self.start.part.work.blocks_a_word
        words, (*before, issued) = state[:count], state[count:]
        following = load_words(start.part, start.matrix.masks, start.first_word, first + QUAD)
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
            if self.start.part.work.paired:
                stored = [words[block // 2] >> block % 2]
            else:
                stored = [words[block], words[block] >> 1]
            counts = [ln.popcount(bits & EVEN_ONES) for bits in stored]
            streams = [x + count * ROW_BYTES for x, count in zip(streams, counts, strict=True)]
            places.append([*streams, _furthest(streams)])
        return places

    def decode(
        self, block: int, words: Sequence[Int], before: list[Int], end: Int, issued: Int
    ) -> tuple[list[Int], Int]:
        """A block's registers, and the pieces copied so far: one more may be, and what the block needs is waited for.

        Args:
            block: which one of the quad.
            words: the lane's mask words of the quad.
            before: the streams and the furthest one.
            end: the furthest one after it.
            issued: pieces copied before.
        """
        *streams, top = before
        ready = self.ring.ready_for(top)
        warp.warp_barrier()  # every lane has read what is overwritten now
        with ln.when((ln.thread() % ln.WARP).equals(0) & (issued < ready)):
            self.ring.copy(issued)
        self.ring.wait(self.ring.needed_before(end))
        places = [self.ring.place(stream) for stream in streams]
        if self.start.part.work.paired:
            return decode_pairs(words[block // 2], block % 2 == 1, *places), ready
        return decode(words[block], *places), ready


def _multiply_strip(work: Work, strip: Strip, steps: Steps, ahead: Callable[[], None]) -> list[Int]:
    """The strip's sums over a part's sections, 4 registers a tile, quad by quad.

    The first steps of x are under way; `ahead` is done when few quads are left.
    """
    block_bytes, begin = work.tiles * X_TILE_BYTES, strip.state()

    def multiply_quad(quad, carry):
        sums, place = carry[len(begin) :], ln.constant(0)

        def multiply(block, registers):
            nonlocal place
            step, within = divmod(block, work.step_blocks)
            place = place if within else steps.next(quad * (QUAD // work.step_blocks) + step)
            sums[:] = _multiply_block(work, sums, registers, place + within * block_bytes)

        with ln.when(quad.equals(ln.maximum(steps.quads - LAST_QUADS, 0))):
            ahead()
        return strip.decode_quad(carry[: len(begin)], quad * QUAD, multiply) + sums

    carry = begin + [ln.constant(0)] * (REGISTERS * work.tiles)
    return ln.loop(steps.quads, carry, multiply_quad)[len(begin) :]


def _multiply_block(work: Work, sums: list[Int], registers: list[Int], x: Int) -> list[Int]:
    """`sums`, and a block's registers times its x in shared memory, at address `x`."""
    tiles = work.tiles
    if tiles > MMA_TILES:
        return warp.multiply_block(sums, registers, x, tiles, work.dtype)
    lane, core_bytes = ln.thread() % ln.WARP, tiles * warp.CORE_BYTES
    column = x + (lane // TILE_N) * core_bytes + (lane % TILE_N) * (2 * CHUNK)  # of 4 core matrices, 32 rows of x
    sums = list(sums)
    for half in range(2):
        for tile in range(tiles):
            own = slice(REGISTERS * tile, REGISTERS * (tile + 1))
            cores = warp.load_matrices(column, half * 4 * core_bytes + tile * warp.CORE_BYTES)
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
