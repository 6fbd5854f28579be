"""Tilings of `row_groups`: what is multiplied and how it is cut, which cuts fit, and which should be the quickest."""

import dataclasses
import functools
import math

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from pallas_kernels.tile import pipeline, swrite
from pallas_kernels.tile.split import PRODUCTS

SMS = 132  # of an H200: what the heuristic counts with
STEP_BYTES = 128  # of a row of an operand, a step: what a swizzled row holds
FLOAT8 = jnp.dtype("float8_e4m3fn")


def block_k(dtype: DTypeLike) -> int:
    """Columns of A a step. Float32 comes as bfloat16."""
    return STEP_BYTES if jnp.dtype(dtype) == FLOAT8 else STEP_BYTES // 2


def is_promoted(dtype: DTypeLike) -> bool:
    """Whether the tensor core's own sums are added up outside it, since it cuts digits off that this dtype has.

    It truncates each time it adds to its accumulator: to about 22 bits, and of float8 products to about 14.
    """
    return jnp.dtype(dtype) in (jnp.float32, FLOAT8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tiling of the Mosaic kernel.

    Attributes:
        block_m: rows of a tile, 64 or 128.
        block_n: columns of B a tile, 64 (where block_m is 128), 128 or 256 (in float32 and float8 where block_m is 64).
        stages: stages of shared memory in the pipeline, at least 2.
        group: how many rows of tiles are walked together before the next columns.
    """

    block_m: int = 128
    block_n: int = 256
    stages: int = 4
    group: int = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """What is multiplied, and how it is tiled.

    Attributes:
        config: the tiling.
        matrices: how many groups have a matrix of B; slots of further ones give zeros.
        depth: columns of A: what is summed over.
        width: columns of a matrix of B.
        transposed: B is given as [matrices, width, depth].
        side_by_side: group e's results lie in columns e * width on, instead of all in the same.
        gated: the first half of the columns of B are the gate's.
        activation: one of `epilogue.ACTIVATIONS`.
        dtype: of the operands: 16 bits, float32 (given as three bfloat16 terms each), or float8_e4m3fn (transposed, as
            wgmma takes that k-minor only).
        summed: slots of a further group sum over all matrices instead, unless this is 0. Each has a row of A for every
            matrix: matrix i's are named `summed` entries of `Groups.reads` after those of matrix i - 1.
    """

    config: Config
    matrices: int
    depth: int
    width: int
    transposed: bool
    side_by_side: bool = False
    gated: bool = False
    activation: str | None = None
    dtype: DTypeLike = jnp.bfloat16
    summed: int = 0

    @property
    def columns(self) -> int:
        """Of a group's results."""
        return self.width // 2 if self.gated else self.width

    @property
    def block_columns(self) -> int:
        """Of a tile's results."""
        return self.config.block_n // 2 if self.gated else self.config.block_n

    @property
    def tiles_across(self) -> int:
        return pl.cdiv(self.columns, self.block_columns)

    @property
    def steps(self) -> int:
        """Of a tile along the depth, for each matrix."""
        return pl.cdiv(self.depth, self.block_k)

    @property
    def block_k(self) -> int:
        return block_k(self.dtype)

    @property
    def split(self) -> bool:
        """Whether the operands are given as terms."""
        return jnp.dtype(self.dtype) == jnp.float32

    @property
    def products(self) -> tuple[tuple[int, int], ...]:
        """Stages of a step: which term of A is multiplied by which of B."""
        return PRODUCTS if self.split else ((0, 0),)

    @property
    def consumer_columns(self) -> int:
        """Of a consumer's part of a tile's results: both have all of them, or each its half where block_m is 64."""
        return self.block_columns if self.config.block_m == 128 else self.block_columns // 2

    @property
    def parts(self) -> list[int]:
        """A tile's columns of B as consumers multiply them: the first of each part, `consumer_columns` wide.

        For each consumer that has columns of its own: the gate's, and then those that it gates.
        """
        halves = range(0, self.block_columns, self.consumer_columns)
        return [first + up for first in halves for up in ((0, self.columns) if self.gated else (0,))]

    @property
    def bias_shape(self) -> tuple[int, int]:
        """Of a consumer's part of the bias: a row for each product, loaded by 128 threads."""
        return 2 if self.gated else 1, max(self.consumer_columns, 128)


def most_stages(block_m: int, block_n: int, *, gated: bool = False, dtype: DTypeLike = jnp.bfloat16) -> int:
    """As many as shared memory holds beside the output buffers, up to 8."""
    result_size = max(2, jnp.dtype(dtype).itemsize)
    out_bytes = pipeline.CONSUMERS * swrite.SCATTER_SLOTS * 64 * swrite.COLUMNS * result_size
    others = 3072 + 1024 * (gated and result_size == 4)  # a bias for each consumer, and barriers
    return min(8, (pipeline.SMEM_BYTES - out_bytes - others) // (STEP_BYTES * (block_m + block_n)))


def _block_ns(block_m: int, *, gated: bool, dtype: DTypeLike) -> tuple[int, ...]:
    """Widths of a tile: 64 columns of results for each consumer, and no more than its registers hold.

    Sums that are promoted take two accumulators.
    """
    least = 64 * (256 // (block_m * (1 if gated else 2)))
    most = 128 if is_promoted(dtype) and block_m == 128 else 256
    return tuple(block_n for block_n in (64, 128, 256) if least <= block_n <= most)


def tilings(
    slots: int, groups: int, depth: int, width: int, *, gated: bool = False, dtype: DTypeLike = jnp.bfloat16
) -> list[Config]:
    """Configs worth timing, the one that the model expects to be the quickest first.

    Args:
        slots: rows in all, at most.
        groups: how many share them.
        depth, width: of a matrix of B.
        gated, dtype: as in `Geometry`.
    """
    configs = []
    for block_m in (128, 64):
        block_ns = _block_ns(block_m, gated=gated, dtype=dtype)
        for block_n in reversed(block_ns):
            if block_n <= max(block_ns[0], width):
                stages = most_stages(block_m, block_n, gated=gated, dtype=dtype)
                configs.append(Config(block_m=block_m, block_n=block_n, stages=stages))
    expected = functools.partial(_expected_us, slots=slots, groups=groups, depth=depth, width=width, dtype=dtype)
    return sorted(configs, key=expected)


def _expected_us(config: Config, *, slots: int, groups: int, depth: int, width: int, dtype: DTypeLike) -> float:
    """Time of groups of about one size on an H200: waves of tiles, each held by its products, its copies or by HBM."""
    rows = min(slots, groups * pl.cdiv(slots, groups))
    busy = min(groups, rows)
    # Sizes are not multiples of a tile: on average half a tile more than they fill.
    tiles = math.ceil(busy * max(rows / busy / config.block_m + 0.5, 1) * pl.cdiv(width, config.block_n))
    step = max(
        0.56 * config.block_m * config.block_n / (128 * 256),
        0.50 * (config.block_m + config.block_n) / 384,
        config.block_n * STEP_BYTES / 4.3e6 * min(tiles, SMS) / pl.cdiv(pl.cdiv(rows, busy), config.block_m),
    )
    stages = pl.cdiv(depth, block_k(dtype)) * (len(PRODUCTS) if jnp.dtype(dtype) == jnp.float32 else 1)
    return pl.cdiv(tiles, SMS) * (stages * step + 1.5)


def check_config(config: Config, *, gated: bool = False, dtype: DTypeLike = jnp.bfloat16) -> None:
    """Raises ValueError where a config does not fit the kernel or these arguments; arguments as of `tilings`."""
    if config.block_m not in (64, 128):
        raise ValueError(f"block_m must be 64 or 128; got block_m={config.block_m}")
    block_ns = _block_ns(config.block_m, gated=gated, dtype=dtype)
    if config.block_n not in block_ns:
        kind = f"block_m={config.block_m}{', gated weights' * gated}, {jnp.dtype(dtype).name}"
        raise ValueError(f"block_n must be one of {block_ns} for {kind}; got block_n={config.block_n}")
    most = most_stages(config.block_m, config.block_n, gated=gated, dtype=dtype)
    if not 2 <= config.stages <= most:
        raise ValueError(f"stages must be 2 to {most} for this tile; got stages={config.stages}")
    if config.group < 1:
        raise ValueError(f"group must be at least 1; got group={config.group}")
