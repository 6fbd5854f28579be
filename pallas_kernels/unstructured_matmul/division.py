"""How a product is divided, and what of it a warp of a block has to do next."""

import dataclasses

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.tile import lane as ln
from pallas_kernels.tile.lane import Int
from pallas_kernels.unstructured_matmul import layout
from pallas_kernels.unstructured_matmul.config import MMA_TILES, QUAD, WGMMA_BLOCKS, Config, step_blocks, tiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """How the products of some matrices with one x are divided.

    Attributes:
        matrices: how many there are, all alike.
        strips, blocks: of each; blocks of a strip.
        columns: of the matrices, in whole chunks of x.
        n: columns of x; 0 where there is none.
        config: the tiling.
        units: that a block takes, of sections * groups.
        values: dtype of the values; of 8 bits only where they are paired.
        dtype: what they are multiplied as, "bfloat16" or "float16".
        paired: whether a lane's two streams store the same places, so that one serves for both.
    """

    matrices: int
    strips: int
    blocks: int
    columns: int
    n: int
    config: Config
    units: int
    values: str
    dtype: str
    paired: bool

    @property
    def row_bytes(self) -> int:
        """Of a row of values."""
        return layout.STREAMS * jnp.dtype(self.values).itemsize

    @property
    def places(self) -> int:
        """That a lane keeps: of each of its streams, or of both."""
        return 1 if self.paired else 2

    @property
    def blocks_a_word(self) -> int:
        """Of a lane's mask words."""
        return 2 if self.paired else 1

    @property
    def sections(self) -> int:
        return layout.sections(self.blocks)

    @property
    def tiles(self) -> int:
        """Of 8 columns of x."""
        return tiles(self.n)

    @property
    def own_groups(self) -> int:
        """Of each matrix: none has strips of two."""
        return pl.cdiv(self.strips, self.config.warps)

    @property
    def groups(self) -> int:
        """Of all matrices, one after the other."""
        return self.matrices * self.own_groups

    @property
    def grid(self) -> int:
        return pl.cdiv(self.sections * self.groups, self.units)

    @property
    def slots(self) -> int:
        """Blocks that share a group, at most."""
        ends = (
            (g * self.sections // self.units, ((g + 1) * self.sections - 1) // self.units) for g in range(self.groups)
        )
        return max(last - first for first, last in ends) + 1

    @property
    def step_blocks(self) -> int:
        """Of x, that are copied together."""
        return step_blocks(self.config, self.tiles)

    @property
    def blocks_at_once(self) -> int:
        """Of a step, that are multiplied together."""
        return 1 if self.tiles <= MMA_TILES else min(WGMMA_BLOCKS, self.step_blocks)

    @property
    def padded_blocks(self) -> int:
        """Of x: whole quads."""
        return self.blocks + -self.blocks % QUAD

    @property
    def whole_quads(self) -> bool:
        """Whether all parts are."""
        return self.blocks % QUAD == 0

    @property
    def steps(self) -> int:
        """Of all of x."""
        return self.padded_blocks // self.step_blocks

    @property
    def threads(self) -> int:
        return self.config.warps * ln.WARP


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Consecutive sections of one group of strips.

    Attributes:
        work: the whole.
        group: number of the group.
        first, last: sections, the last one not included.
    """

    work: Work
    group: Int
    first: Int
    last: Int

    @classmethod
    def of(cls, work: Work, block: Int, number: Int) -> "Part":
        """A block's part of this number."""
        start, end = _run(work, block)
        group = start // work.sections + number
        first = ln.select(number.equals(0), start % work.sections, 0)
        last = ln.select(group.equals(end // work.sections), end % work.sections + 1, work.sections)
        return cls(work=work, group=group, first=first, last=last)

    @staticmethod
    def count(work: Work, block: Int) -> Int:
        """How many a block has."""
        start, end = _run(work, block)
        return end // work.sections - start // work.sections + 1

    @property
    def first_block(self) -> Int:
        return self.first * layout.SECTION

    @property
    def blocks(self) -> Int:
        return ln.minimum(self.last * layout.SECTION, self.work.blocks) - self.first_block

    @property
    def quads(self) -> Int:
        return (self.blocks + (QUAD - 1)) // QUAD

    @property
    def steps(self) -> Int:
        """Of x."""
        return self.quads * (QUAD // self.work.step_blocks)

    @property
    def matrix(self) -> Int:
        return self.group // self.work.own_groups

    def strip(self, ring: Int) -> Int:
        """The matrix' strip of a ring of the block. In its last group there may be none of this number."""
        return (self.group % self.work.own_groups) * self.work.config.warps + ring

    def own(self, ring: Int) -> Int:
        """The strip that a ring computes: another one where there is none of its number."""
        return ln.minimum(self.strip(ring), self.work.strips - 1)


def _run(work: Work, block: Int) -> tuple[Int, Int]:
    """The first and the last unit of a block."""
    start = block * work.units
    return start, ln.minimum(start + work.units, work.sections * work.groups) - 1
