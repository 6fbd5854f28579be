"""The two pipelines of the kernel: a ring of values for each warp, and two stages of x for the block.

Streams are behind the furthest by `MAX_LAG` rows at most and advance by `DEPTH` a block at most. So piece k can be
overwritten before a block that finds the furthest stream at row m, if 16 (k + 1) + MAX_LAG <= m; a block lets at most
one more piece be copied, and waits for one more at most. Which pieces are under way follows from m alone.
"""

import dataclasses

from pallas_kernels.tile import lane as ln
from pallas_kernels.tile.lane import Array, Int
from pallas_kernels.unstructured_matmul import layout, warp
from pallas_kernels.unstructured_matmul.config import QUAD, ROW_BYTES, X_TILE_BYTES
from pallas_kernels.unstructured_matmul.division import Part, Work

PIECE_BYTES = layout.DEPTH * ROW_BYTES
LAG_PIECES = layout.MAX_LAG // layout.DEPTH


def shared_memory(work: Work) -> dict[str, int]:
    """How many words there are in a block, by name."""
    rings, more = {"rings": work.config.warps * work.config.ring_bytes // 4}, 0
    if work.tiles:
        rings["x"], more = 2 * work.stage_blocks * work.tiles * X_TILE_BYTES // 4, 2
    return {**rings, "barriers": (work.config.warps * work.config.pieces + more) * warp.BARRIER_BYTES // 4}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring:
    """A strip's pieces of the values of one part, from row `first` on.

    Attributes:
        values: all values.
        address: of the ring.
        barriers: address of one a piece.
        pieces: how many it holds.
        before: pieces that went through it before.
        first: row of values.
        rows: how many there are to copy.
    """

    values: Array
    address: Int
    barriers: Int
    pieces: int
    before: Int
    first: Int
    rows: Int

    @property
    def count(self) -> Int:
        """Pieces to copy."""
        return (self.rows + (layout.DEPTH - 1)) // layout.DEPTH

    def ready_for(self, top: Int) -> Int:
        """How many pieces may have been copied when `top` is the byte that the furthest stream is at."""
        return ln.minimum(self.count, (top // PIECE_BYTES) - self.before + (self.pieces - LAG_PIECES))

    def needed_before(self, top: Int) -> Int:
        """The last piece that has to be there when `top` is the byte that the furthest stream goes on to."""
        return ln.maximum((top + (PIECE_BYTES - ROW_BYTES)) // PIECE_BYTES - self.before - 1, 0)

    def copy(self, piece: Int) -> None:
        """Begins the copy of a piece, the ring's first one a second time behind its end; by one lane."""
        slot = (self.before + piece) % self.pieces
        row = piece * layout.DEPTH
        size = ln.minimum(self.rows - row, layout.DEPTH) * ROW_BYTES
        barrier = self.barriers + slot * warp.BARRIER_BYTES
        is_first = slot.equals(0)
        warp.expect(barrier, ln.select(is_first, size + size, size))
        place = self.address + slot * PIECE_BYTES
        warp.copy(self.values, ROW_BYTES, self.first + row, place, size, barrier)
        with ln.when(is_first):
            behind = self.address + self.pieces * PIECE_BYTES
            warp.copy(self.values, ROW_BYTES, self.first + row, behind, size, barrier)

    def wait(self, piece: Int) -> None:
        number = self.before + piece
        warp.wait(self.barriers + (number % self.pieces) * warp.BARRIER_BYTES, number // self.pieces)

    def place(self, stream: Int) -> Int:
        """Address of what a stream is at."""
        return self.address + stream % (self.pieces * PIECE_BYTES)


@dataclasses.dataclass(frozen=True)
class Stages:
    """The two stages of shared memory that x goes through; `count` of them in a part."""

    work: Work
    part: Part
    x: Array
    address: Int
    barriers: Int
    before: Int

    @property
    def count(self) -> Int:
        return (self.part.blocks + (self.work.stage_blocks - 1)) // self.work.stage_blocks

    def quads_of(self, stage: Int) -> Int:
        left = (self.part.blocks + (QUAD - 1)) // QUAD - stage * (self.work.stage_blocks // QUAD)
        return ln.minimum(left, self.work.stage_blocks // QUAD)

    def place(self, stage: Int) -> Int:
        size = self.work.stage_blocks * self.work.tiles * X_TILE_BYTES
        return self.address + ((self.before + stage) % 2) * size

    def copy(self, stage: Int) -> None:
        """Begins the copy of a stage; by one thread of the block."""
        block_bytes = self.work.tiles * X_TILE_BYTES
        first, size = (
            self.part.first_block + stage * self.work.stage_blocks,
            self.quads_of(stage) * (QUAD * block_bytes),
        )
        barrier = self.barriers + ((self.before + stage) % 2) * warp.BARRIER_BYTES
        warp.expect(barrier, size)
        warp.copy(self.x, block_bytes, first, self.place(stage), size, barrier)

    def wait(self, stage: Int) -> None:
        number = self.before + stage
        warp.wait(self.barriers + (number % 2) * warp.BARRIER_BYTES, number // 2)
