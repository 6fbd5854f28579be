"""The two pipelines of the kernel: a ring of values for each warp, and steps of x for the block.

Both are copied by TMA: a ring's pieces as they lie, x by a tensor map, whose swizzle lays its columns out as the tensor
core reads them. A warp's own barriers say what is there of its ring, the block's what is there of x.

Neither stops where a block goes on to another part: the last blocks of a part let the first pieces and steps of the
following one be copied. Of pieces that is one part ahead at most, so all that a ring has to know is two parts.

Streams are behind the furthest by `MAX_LAG` rows at most and advance by `DEPTH` a block at most. So piece k can be
overwritten before a block that finds the furthest stream at row m, if r (k + 1) + MAX_LAG <= m with r rows a piece; a
block lets at most one more piece be copied, and waits for one more at most. Which pieces are under way follows from m
alone. A part starts with a piece of its own, so m goes on by up to r - 1 + MAX_LAG rows there, and up to three pieces
are begun at once.
"""

import dataclasses
from collections.abc import Callable

from pallas_kernels.tile import lane as ln
from pallas_kernels.tile.lane import Array, Int
from pallas_kernels.unstructured_matmul import layout, warp
from pallas_kernels.unstructured_matmul.config import PIECE_BYTES, STEPS, X_TILE_BYTES
from pallas_kernels.unstructured_matmul.division import Part, Work

AHEAD = STEPS - 2  # steps that are copied before they are waited for


def shared_memory(work: Work) -> dict[str, int]:
    """How many words there are in a block, by name."""
    config, x = work.config, {}
    if work.tiles:
        x["x"] = STEPS * work.step_blocks * work.tiles * X_TILE_BYTES // 4
        x["x_barriers"] = 2 * STEPS * warp.BARRIER_BYTES // 4
    barriers = config.warps * config.pieces * warp.BARRIER_BYTES // 4
    return {"rings": config.warps * config.ring_bytes // 4, **x, "barriers": barriers}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """What a ring holds of a part, piece by piece.

    Attributes:
        values: all values of its matrix.
        row_bytes: of a row of them.
        begin: number of its first piece, of all that go through the ring.
        first: row of values.
        rows: how many there are to copy.
    """

    values: Array
    row_bytes: int
    begin: Int
    first: Int
    rows: Int

    @property
    def piece_rows(self) -> int:
        """Of values, in a piece."""
        return PIECE_BYTES // self.row_bytes

    @property
    def end(self) -> Int:
        """Number of the piece behind its last."""
        return self.begin + (self.rows + (self.piece_rows - 1)) // self.piece_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring:
    """A strip's pieces of the values of one part, and those of the part that follows.

    Pieces are numbered, and the bytes that streams are at counted, from the block's first part on.

    Attributes:
        address: of the ring.
        barriers: address of one a piece.
        pieces: how many it holds.
        own: the part's values.
        following: those of the next one; without rows if there is none.
    """

    address: Int
    barriers: Int
    pieces: int
    own: Source
    following: Source

    @property
    def lag_pieces(self) -> int:
        """That a stream may be behind the furthest one, at most."""
        return layout.MAX_LAG // self.own.piece_rows

    def ready_for(self, top: Int) -> Int:
        """How many pieces may have been copied when `top` is the byte that the furthest stream is at."""
        return ln.minimum(self.following.end, top // PIECE_BYTES + (self.pieces - self.lag_pieces))

    def needed_before(self, top: Int) -> Int:
        """The last piece that has to be there when `top` is the byte that the furthest stream goes on to."""
        return ln.maximum((top + (PIECE_BYTES - self.own.row_bytes)) // PIECE_BYTES - 1, self.own.begin)

    def copy(self, piece: Int) -> None:
        """Begins the copy of a piece, the ring's first one a second time behind its end; by one lane."""
        slot, is_own = piece % self.pieces, piece < self.own.end
        begin, first, rows = (
            ln.select(is_own, getattr(self.own, name), getattr(self.following, name))
            for name in ("begin", "first", "rows")
        )
        values = warp.choose([self.following.values, self.own.values], ln.select(is_own, 1, 0))
        row_bytes, piece_rows = self.own.row_bytes, self.own.piece_rows
        row = (piece - begin) * piece_rows
        size = ln.minimum(rows - row, piece_rows) * row_bytes
        barrier = self.barriers + slot * warp.BARRIER_BYTES
        is_first = slot.equals(0)
        warp.expect(barrier, ln.select(is_first, size + size, size))
        place = self.address + slot * PIECE_BYTES
        warp.copy(values, row_bytes, first + row, place, size, barrier)
        with ln.when(is_first):
            behind = self.address + self.pieces * PIECE_BYTES
            warp.copy(values, row_bytes, first + row, behind, size, barrier)

    def wait(self, piece: Int) -> None:
        warp.wait(self.barriers + (piece % self.pieces) * warp.BARRIER_BYTES, piece // self.pieces)

    def place(self, stream: Int) -> Int:
        """Address of what a stream is at."""
        return self.address + stream % (self.pieces * PIECE_BYTES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps:
    """The steps of x that a block goes through, in `STEPS` places, numbered from its first part on.

    All parts but the last go on to the end of x, and all but the first begin with it. So steps go round and round.

    A step is the B operand of wgmma, K-major with a swizzle of 128 bytes: of each block 64 elements of every column,
    one after the other, in which chunk c of 16 bytes of column i lies as chunk c ^ i % 8.

    Each place has two barriers: the step is there; all warps have read it. One warp begins a step's copies, each in
    its turn, `AHEAD` steps before it needs them: when the step before the last has to have been read. So it waits for
    warps that are more than a step behind; the others wait for none.

    Attributes:
        work: the whole.
        copy: begins the copy of a block of x, given its number, where to and the barrier.
        address: of the places.
        barriers: address of theirs: first those that say what is there.
        first: which step of x the block starts with.
        count: how many it goes through.
        warp: number of this one.
    """

    work: Work
    copy: Callable[[Int, Int, Int], None]
    address: Int
    barriers: Int
    first: Int
    count: Int
    warp: Int

    @classmethod
    def of(cls, work: Work, block: Int, copy: Callable[[Int, Int, Int], None], address: Int, barriers: Int) -> "Steps":
        """Those of a block."""
        parts, zero = Part.count(work, block), ln.constant(0)
        first, last = Part.of(work, block, zero), Part.of(work, block, parts - 1)
        begin, end = first.first_block // work.step_blocks, last.first_block // work.step_blocks + last.steps
        count = (parts - 1) * work.steps + end - begin
        return cls(work=work, copy=copy, address=address, barriers=barriers, first=begin, count=count, warp=ln.warp())

    def prepare(self) -> None:
        """What has to be done before the block's threads meet for the first time."""
        with ln.when(ln.thread().equals(0)):
            warp.begin_barriers(self.barriers, STEPS)
            warp.begin_barriers(self._read_barrier(ln.constant(0)), STEPS, self.work.config.warps)

    def begin(self) -> None:
        """Begins the first copies; after the block's threads have met."""
        for step in range(AHEAD):
            self._copy(ln.constant(step))

    def next(self, step: Int) -> Int:
        """Waits for a step; its address. The one `AHEAD` of it is begun."""
        self._copy(step + AHEAD)
        warp.wait(self._barrier(step), step // STEPS)
        return self._place(step)

    def release(self, step: Int) -> None:
        """Says that this warp has read a step."""
        warp.warp_barrier()
        with ln.when((ln.thread() % ln.WARP).equals(0)):
            warp.arrive(self._read_barrier(step))

    @property
    def _block_bytes(self) -> int:
        return self.work.tiles * X_TILE_BYTES

    def _place(self, step: Int) -> Int:
        return self.address + (step % STEPS) * (self.work.step_blocks * self._block_bytes)

    def _barrier(self, step: Int) -> Int:
        return self.barriers + (step % STEPS) * warp.BARRIER_BYTES

    def _read_barrier(self, step: Int) -> Int:
        return self._barrier(step) + STEPS * warp.BARRIER_BYTES

    def _copy(self, step: Int) -> None:
        """Begins the copies of a step, if there is one of this number; by the warp whose turn it is.

        All of its lanes wait, as ptxas takes what follows a loop of one lane for divergent.
        """
        work, barrier = self.work, self._barrier(step)
        with ln.when(self.warp.equals(step % work.config.warps) & (step < self.count)):
            warp.wait(self._read_barrier(step), step // STEPS - 1)
            with ln.when(warp.is_elected()):
                warp.expect(barrier, ln.constant(work.step_blocks * self._block_bytes))
                first = ((self.first + step) % work.steps) * work.step_blocks
                for block in range(work.step_blocks):
                    self.copy(first + block, self._place(step) + block * self._block_bytes, barrier)
