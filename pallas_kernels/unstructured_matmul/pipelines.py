"""The two pipelines of the kernel: a ring of values for each warp, and steps of x for the block.

A ring's copies are bulk ones, which a warp's own barriers wait for. x is copied by all threads, 16 bytes at a time, as
its columns have to be laid out anew: a thread waits for its own copies, and a step's barrier for all of them.

Neither stops where a block goes on to another part: the last blocks of a part let the first pieces and steps of the
following one be copied. Of pieces that is one part ahead at most, so all that a ring has to know is two parts.

Streams are behind the furthest by `MAX_LAG` rows at most and advance by `DEPTH` a block at most. So piece k can be
overwritten before a block that finds the furthest stream at row m, if 16 (k + 1) + MAX_LAG <= m; a block lets at most
one more piece be copied, and waits for one more at most. Which pieces are under way follows from m alone. A part starts
with a piece of its own, so m goes on by up to 15 + MAX_LAG rows there, and up to three pieces are begun at once.
"""

import dataclasses

from pallas_kernels.tile import lane as ln
from pallas_kernels.tile.lane import Array, Int
from pallas_kernels.unstructured_matmul import layout, warp
from pallas_kernels.unstructured_matmul.config import CHUNK, MMA_TILES, ROW_BYTES, STEPS, TILE_N, X_TILE_BYTES
from pallas_kernels.unstructured_matmul.division import Part, Work

PIECE_BYTES = layout.DEPTH * ROW_BYTES
LAG_PIECES = layout.MAX_LAG // layout.DEPTH
AHEAD = STEPS - 2  # steps that are copied before they are waited for
CORES = ln.WARP // TILE_N  # core matrices that a warp copies at a time


def shared_memory(work: Work) -> dict[str, int]:
    """How many words there are in a block, by name."""
    config, x = work.config, {}
    if work.tiles:
        x["x"] = STEPS * work.step_blocks * work.tiles * X_TILE_BYTES // 4
        x["x_barriers"] = STEPS * warp.BARRIER_BYTES // 4
    barriers = config.warps * config.pieces * warp.BARRIER_BYTES // 4
    return {"rings": config.warps * config.ring_bytes // 4, **x, "barriers": barriers}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """What a ring holds of a part: a piece for each 16 rows.

    Attributes:
        values: all values of its matrix.
        begin: number of its first piece, of all that go through the ring.
        first: row of values.
        rows: how many there are to copy.
    """

    values: Array
    begin: Int
    first: Int
    rows: Int

    @property
    def end(self) -> Int:
        """Number of the piece behind its last."""
        return self.begin + (self.rows + (layout.DEPTH - 1)) // layout.DEPTH


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

    def ready_for(self, top: Int) -> Int:
        """How many pieces may have been copied when `top` is the byte that the furthest stream is at."""
        return ln.minimum(self.following.end, top // PIECE_BYTES + (self.pieces - LAG_PIECES))

    def needed_before(self, top: Int) -> Int:
        """The last piece that has to be there when `top` is the byte that the furthest stream goes on to."""
        return ln.maximum((top + (PIECE_BYTES - ROW_BYTES)) // PIECE_BYTES - 1, self.own.begin)

    def copy(self, piece: Int) -> None:
        """Begins the copy of a piece, the ring's first one a second time behind its end; by one lane."""
        slot, is_own = piece % self.pieces, piece < self.own.end
        begin, first, rows = (
            ln.select(is_own, getattr(self.own, name), getattr(self.following, name))
            for name in ("begin", "first", "rows")
        )
        values = warp.choose([self.following.values, self.own.values], ln.select(is_own, 1, 0))
        row = (piece - begin) * layout.DEPTH
        size = ln.minimum(rows - row, layout.DEPTH) * ROW_BYTES
        barrier = self.barriers + slot * warp.BARRIER_BYTES
        is_first = slot.equals(0)
        warp.expect(barrier, ln.select(is_first, size + size, size))
        place = self.address + slot * PIECE_BYTES
        warp.copy(values, ROW_BYTES, first + row, place, size, barrier)
        with ln.when(is_first):
            behind = self.address + self.pieces * PIECE_BYTES
            warp.copy(values, ROW_BYTES, first + row, behind, size, barrier)

    def wait(self, piece: Int) -> None:
        warp.wait(self.barriers + (piece % self.pieces) * warp.BARRIER_BYTES, piece // self.pieces)

    def place(self, stream: Int) -> Int:
        """Address of what a stream is at."""
        return self.address + stream % (self.pieces * PIECE_BYTES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps:
    """The steps of x that a block goes through, in `STEPS` places, numbered from its first part on.

    All parts but the last go on to the end of x, and all but the first begin with it. So steps go round and round.

    A step is wgmma's B without a swizzle: [blocks, 8, tiles] core matrices of 8 columns by 8 rows of x, each column's
    rows side by side, as they are in x [n, in] too.

    Each place has a barrier, on which every warp arrives when its own copies of the step are there. It does so as it
    begins the step before. So who may read a step knows that all warps have begun the last one, and overwrites the one
    before that: no warp waits for those that are less than a step behind.

    Attributes:
        work: the whole.
        x: [n, columns].
        address: of the places.
        barriers: address of theirs.
        first: which step of x the block starts with.
        count: how many it goes through.
    """

    work: Work
    x: Array
    address: Int
    barriers: Int
    first: Int
    count: Int

    @classmethod
    def of(cls, work: Work, block: Int, x: Array, address: Int, barriers: Int) -> "Steps":
        """Those of a block."""
        parts, zero = Part.count(work, block), ln.constant(0)
        first, last = Part.of(work, block, zero), Part.of(work, block, parts - 1)
        begin, end = first.first_block // work.step_blocks, last.first_block // work.step_blocks + last.steps
        count = (parts - 1) * work.steps + end - begin
        return cls(work=work, x=x, address=address, barriers=barriers, first=begin, count=count)

    def begin(self) -> None:
        """Begins the first copies, and arrives for the first of all."""
        for step in range(AHEAD):
            self._copy(ln.constant(step))
        self._arrive(ln.constant(0))

    def next(self, step: Int) -> Int:
        """Waits for a step; its address. The one `AHEAD` of it is begun, the next one is said to be there."""
        place, turn = step % STEPS, step // STEPS
        warp.wait(self.barriers + place * warp.BARRIER_BYTES, turn)
        self._copy(step + AHEAD)
        self._arrive(step + 1)
        return self.address + place * self._bytes

    @property
    def _bytes(self) -> int:
        return self.work.step_blocks * self.work.tiles * X_TILE_BYTES

    def _arrive(self, step: Int) -> None:
        """Says that this warp's copies of a step are there, if there is such a step; those behind it may not be."""
        warp.wait_for_chunks(AHEAD - 1, for_wgmma=self.work.tiles > MMA_TILES)
        warp.warp_barrier()
        with ln.when((ln.thread() % ln.WARP).equals(0) & (step < self.count)):
            warp.arrive(self.barriers + (step % STEPS) * warp.BARRIER_BYTES)

    def _copy(self, step: Int) -> None:
        """Begins the copies of a step, if there is one of this number; by all threads.

        A warp copies half of a block's rows at a time: eight lanes a core matrix, which is in all banks, and four of
        them side by side 64 bytes of a column. All addresses are constants ahead of the first.
        """
        work, number, lane = self.work, ln.warp(), ln.thread() % ln.WARP
        core, column = lane // TILE_N, lane % TILE_N
        row = ((self.first + step) % work.steps) * (work.step_blocks * layout.BLOCK) + (number * CORES + core) * CHUNK
        source, core_bytes = column * work.columns + row, work.tiles * warp.CORE_BYTES
        place = self.address + (step % STEPS) * self._bytes
        place = place + (number * CORES + core) * core_bytes + column * (2 * CHUNK)
        halves = work.step_blocks * layout.BLOCK // (CORES * CHUNK)
        for ahead in range(0, halves, work.config.warps):
            with ln.when((number < halves - ahead) & (step < self.count)):
                for tile in range(work.tiles):
                    there = self._within(row + ahead * (CORES * CHUNK), column + tile * TILE_N, tile)
                    elements = tile * TILE_N * work.columns + ahead * (CORES * CHUNK)
                    bytes_on = tile * warp.CORE_BYTES + ahead * CORES * core_bytes
                    warp.copy_chunk(self.x, source, elements, place, bytes_on, there)
        warp.end_chunks()

    def _within(self, row: Int, column: Int, tile: int) -> ln.Bool | None:
        """Whether x has this row and column; None if it has all that are copied."""
        work = self.work
        rows = row < work.columns if work.columns < work.padded_blocks * layout.BLOCK else None
        columns = column < work.n if work.n < (tile + 1) * TILE_N else None
        return columns if rows is None else rows if columns is None else rows & columns
