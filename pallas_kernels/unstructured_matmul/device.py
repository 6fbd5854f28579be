"""The kernel of `unstructured_matmul` on the device, in inline MLIR: what a thread does.

Units of work are a section of a group of strips, one or two a warp; a block takes a run of them, so that all warps walk
along the same columns and share x in shared memory. Where the run goes on with the next group, the sums of this one are
written: those of the blocks that share a group lie in different slots, and XLA adds them in order.
"""

import dataclasses

from pallas_kernels.tile import lane as ln
from pallas_kernels.tile.lane import Array, Int
from pallas_kernels.unstructured_matmul import layout, warp
from pallas_kernels.unstructured_matmul.config import ROW_BYTES, TILE_N
from pallas_kernels.unstructured_matmul.division import Part, Work
from pallas_kernels.unstructured_matmul.pipelines import LAG_PIECES, PIECE_BYTES, X_TILE_BYTES, Ring, Stages

MASKS_AHEAD = 2  # blocks whose mask words are in registers
LINES_AHEAD = 10  # and on their way to L2
STATE = MASKS_AHEAD + 4  # values that a strip carries from block to block
REGISTERS = 4  # of an accumulator

# permute_bytes(odd, even, NOTHING + e * EVEN + o * ODD) is {even or 0, odd or 0}: nibbles 3 and 2 name zeros of the odd
# half's register and F the sign of the even one's upper bytes, 0; 5 and 4 are the even half, 1 and 0 the odd one.
NOTHING, EVEN = 0xFF32, 0x22  # and ODD is 0x1100 = 0x80 * EVEN: one product of bytes adds both
EVEN_ONES = 0x55555555  # the even stream's bits, all of them
EVEN_BITS, ODD_BITS = 0x01010101, -0x7F7F7F80  # as signed: 0x80808080


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


def multiply(work: Work, block: Int, inputs, outputs, smem: dict[str, Array]) -> None:
    """What a thread does; inputs are values, masks, rows, lags and x as `mosaic.for_lanes` arranges it."""
    config = work.config
    barriers = warp.address_of(smem["barriers"])
    x_barriers = barriers + config.rings * config.pieces * warp.BARRIER_BYTES
    with ln.when(ln.thread().equals(0)):
        warp.begin_barriers(barriers, config.rings * config.pieces + 2)
    ln.block_barrier()

    def multiply_part(number, carry):
        *pieces_before, stages_before = carry
        part = Part.of(work, block, number)
        strips = []
        for i, before in enumerate(pieces_before):
            ring = ln.warp() * config.strips + i
            strips.append(Strip.begin(part, ring, inputs, warp.address_of(smem["rings"]), barriers, before))
        stages = Stages(work, part, inputs[4], warp.address_of(smem["x"]), x_barriers, stages_before)
        for strip, sums in zip(strips, _multiply_strips(work, strips, stages), strict=True):
            _store(work, block, part, part.strip(strip.number), outputs[0], sums)
        return [
            *(before + s.ring.count for before, s in zip(pieces_before, strips, strict=True)),
            stages_before + stages.count,
        ]

    warp.repeat(Part.count(work, block), [ln.constant(0)] * (config.strips + 1), multiply_part)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strip:
    """A strip of a warp during a part.

    Attributes:
        number: of its ring in the block.
        ring: its values.
        masks: all mask words.
        first_word: index of the lane's word of the part's first block.
        even, odd: where the lane's streams start, in bytes from the ring's beginning on.
    """

    number: Int
    ring: Ring
    masks: Array
    first_word: Int
    even: Int
    odd: Int

    @classmethod
    def begin(cls, part: Part, number: Int, inputs, rings: Int, barriers: Int, before: Int) -> "Strip":
        """With its first pieces under way; `before` have gone through the ring already."""
        values, masks, rows, lags, _ = inputs
        work, config, lane = part.work, part.work.config, ln.thread() % ln.WARP
        own = part.own(number)
        first, last = own * work.sections + part.first, own * work.sections + part.last

        def lag(section, half):
            return lags.load(section * layout.STREAMS + lane * 2 + half)

        start = rows.load(first)
        end = rows.load(last) + ln.warp_max(ln.maximum(lag(last, 0), lag(last, 1)))
        ring = Ring(
            values=values,
            address=rings + number * config.ring_bytes,
            barriers=barriers + number * (config.pieces * warp.BARRIER_BYTES),
            pieces=config.pieces,
            before=before,
            first=start,
            rows=ln.maximum(end - start, 1),  # there is always one more, and a piece to wait for
        )
        origin = before * PIECE_BYTES + lane * 4
        even, odd = (origin + lag(first, half) * ROW_BYTES for half in (0, 1))
        first_word = (own * work.blocks + part.first * layout.SECTION) * ln.WARP + lane
        strip = cls(number=number, ring=ring, masks=masks, first_word=first_word, even=even, odd=odd)
        strip._fill()
        return strip

    @property
    def top(self) -> Int:
        """Where the stream furthest ahead starts."""
        return ln.warp_max(ln.maximum(self.even, self.odd))

    def _fill(self) -> None:
        """Begins the first copies, and waits for what lies before the first block."""
        ready, needed = self.ring.ready_for(self.top), self.ring.needed_before(self.top)
        warp.warp_barrier()
        for piece in map(ln.constant, range(self.ring.pieces)):
            with ln.when((ln.thread() % ln.WARP).equals(0) & (piece < ready)):
                self.ring.copy(piece)
        for piece in map(ln.constant, range(LAG_PIECES)):
            with ln.when(piece < needed + 1):
                self.ring.wait(piece)

    def word(self, block: Int) -> Int:
        """The lane's mask word of a block of the part."""
        return self.masks.load(self.first_word + block * ln.WARP)

    def state(self, blocks: Int) -> list[Int]:
        """What changes from block to block: the next words, both streams, the furthest one, pieces copied."""
        words = [self.word(ln.minimum(ln.constant(i), blocks - 1)) for i in range(MASKS_AHEAD)]
        return [*words, self.even, self.odd, self.top, self.ring.ready_for(self.top)]

    def decode(self, state: list[Int], block: Int, last: Int) -> tuple[list[Int], list[Int]]:
        """The registers of a block, and the state after it; has another piece copied, and waits for what it needs.

        Args:
            state: before it.
            block: its number in the part.
            last: that of the part's last block.
        """
        *words, even, odd, top, issued = state
        word, halves = words[0], (words[0], words[0] >> 1)
        ends = [x + ln.popcount(bits & EVEN_ONES) * ROW_BYTES for x, bits in zip((even, odd), halves, strict=True)]
        end, ready = ln.warp_max(ln.maximum(*ends)), self.ring.ready_for(top)
        warp.warp_barrier()  # every lane has read what is overwritten now
        with ln.when((ln.thread() % ln.WARP).equals(0) & (issued < ready)):
            self.ring.copy(issued)
        self.ring.wait(self.ring.needed_before(end))
        # Not earlier: the compiler moves what is carried on to its register where the wait begins, and would wait for
        # the load there. (Seen in the SASS of the same loop in CUDA C++.)
        words.append(self.word(ln.minimum(block + MASKS_AHEAD, last)))
        self.masks.prefetch(self.first_word + ln.minimum(block + LINES_AHEAD, last) * ln.WARP)
        registers = decode(word, self.ring.place(even), self.ring.place(odd))
        return registers, [*words[1:], *ends, end, ready]


def _multiply_strips(work: Work, strips: list[Strip], stages: Stages) -> list[list[Int]]:
    """The sums of each strip over a part's sections, 4 registers a tile: stage by stage of x, block by block."""
    lane, is_first = ln.thread() % ln.WARP, ln.thread().equals(0)
    states, sums = (STATE * len(strips), REGISTERS * work.tiles)

    def multiply_block(number, place, carry):
        last = stages.blocks - 1
        decoded = [strip.decode(carry[STATE * i : STATE * (i + 1)], number, last) for i, strip in enumerate(strips)]
        accs = list(carry[states:])
        for tile in range(work.tiles):
            of_tile = place + (tile * X_TILE_BYTES) + lane * 16
            b = warp.load_words(of_tile) + warp.load_words(of_tile + X_TILE_BYTES // 2)
            for i, (a, _) in enumerate(decoded):
                own = slice(sums * i + REGISTERS * tile, sums * i + REGISTERS * (tile + 1))
                for q in range(4):
                    accs[own] = warp.multiply_tile(accs[own], a[4 * q : 4 * q + 4], b[2 * q : 2 * q + 2], work.dtype)
        return [*(x for _, state in decoded for x in state), *accs]

    def multiply_stage(stage, carry):
        ln.block_barrier()  # nobody reads the other stage any more
        with ln.when(is_first & (stage + 1 < stages.count)):
            stages.copy(stage + 1)
        stages.wait(stage)
        first, place = stage * work.stage_blocks, stages.place(stage)

        def next_block(i, carry):
            return multiply_block(first + i, place + i * (work.tiles * X_TILE_BYTES), carry)

        return warp.repeat(stages.blocks_of(stage), carry, next_block)

    with ln.when(is_first):
        stages.copy(ln.constant(0))
    carry = [x for strip in strips for x in strip.state(stages.blocks)] + [ln.constant(0)] * (sums * len(strips))
    out = warp.repeat(stages.count, carry, multiply_stage)[states:]
    return [out[sums * i : sums * (i + 1)] for i in range(len(strips))]


def _store(work: Work, block: Int, part: Part, strip: Int, out: Array, sums: list[Int]) -> None:
    """Writes a strip's sums to the block's slot, and zeros to those that no block has where these are its last."""
    lane, columns = ln.thread() % ln.WARP, work.tiles * TILE_N
    slot = block - (part.group * work.sections) // work.units

    def write(slot, values):
        origin = (slot * work.strips + strip) * layout.STRIP + lane // 4
        for tile in range(work.tiles):
            for i in range(REGISTERS):
                row, column = origin + i // 2 * 8, lane % 4 * 2 + (tile * TILE_N + i % 2)
                out.store(row * columns + column, values[REGISTERS * tile + i])

    def write_zeros(step, carry):
        write(slot + 1 + step, [ln.constant(0)] * len(sums))
        return carry

    left = ln.select(part.last.equals(work.sections), ln.constant(work.slots - 1) - slot, 0)
    with ln.when(strip < work.strips):
        write(slot, sums)
        warp.repeat(left, [], write_zeros)
