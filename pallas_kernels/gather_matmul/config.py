"""Tilings of `gather_matmul`'s Mosaic kernel: which there are, which fit, and which arguments it takes at all."""

import dataclasses

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.micro_tile_index import MicroTileIndex
from pallas_kernels.tile import device, pipeline, swrite
from pallas_kernels.tile.pipeline import BLOCK_K

HOPPER_SMS = 132


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tiling of the Mosaic kernel.

    Attributes:
        block_m: rows of C a dense tile, 64 or 128. Where the index's `rows` are 64, one of 128 takes two lists, one
            after the other unless both are dense.
        block_n: columns of C a tile, 128 or 256.
        stages: stages of shared memory in the pipeline, at least 2.
        out_slots: 64-column output buffers of a consumer; with all of its columns buffered it never waits for one.
        group: how many rows of tiles are walked together before the next columns, so that B's part stays in L2.
        longest_first: rows of tiles go by falling length of their lists (where they are at most 128).
        dense_from: share of listed micro-tiles from which on a tile is read as it lies (given `zero_elsewhere`).
    """

    block_m: int = 128
    block_n: int = 256
    stages: int = 4
    out_slots: int = 2
    group: int = 32
    longest_first: bool = False
    dense_from: float = 0.92


def dense_tile(config: Config, block_m: int | None = None) -> pipeline.DenseTile:
    """A tile of C, or as many rows of it as `block_m` says."""
    sizes = {name: getattr(config, name) for name in ("block_n", "stages", "out_slots")}
    return pipeline.DenseTile(block_m=block_m or config.block_m, **sizes)


def _stages(block_m: int, block_n: int, out_slots: int, dtype: jnp.dtype) -> int:
    """As many stages as shared memory holds beside the output buffers and the index, up to 8."""
    tile = pipeline.DenseTile(block_m=block_m, block_n=block_n, stages=1, out_slots=out_slots)
    out_bytes = pipeline.CONSUMERS * out_slots * tile.consumer_shape[0] * swrite.COLUMNS * jnp.dtype(dtype).itemsize
    left = pipeline.SMEM_BYTES - out_bytes - 2048 - 256  # entries and order; barriers
    return min(8, left // (BLOCK_K * (block_m + block_n) * 2))


def _block_ns(block_m: int, dtype: jnp.dtype) -> tuple[int, ...]:
    """Widths of a tile whose accumulators fit the registers; float32 keeps two of them."""
    return (128,) if dtype == jnp.float32 and block_m == 128 else (256, 128)


def _fits(block_m: int, index: MicroTileIndex) -> bool:
    return block_m in (64, 128) and (index.rows % block_m == 0 or index.rows == 64)


def candidates(a_t, b, index: MicroTileIndex, zero_elsewhere: bool = False) -> list[Config]:
    """Configs worth timing for these arguments (shapes are enough); the heuristic's choice comes first."""
    configs = []
    for block_m in (x for x in (128, 64) if _fits(x, index)):
        block_ns = [x for x in _block_ns(block_m, a_t.dtype) if x <= max(128, b.shape[1])]
        block_ns = [x for x in block_ns if index.out_cols is None or index.out_cols % x == 0]
        if 2 * pl.cdiv(a_t.shape[1], block_m) * pl.cdiv(b.shape[1], block_ns[0]) < HOPPER_SMS:
            block_ns.reverse()  # narrow tiles first where wide ones would leave half of the SMs idle
        for block_n in block_ns:
            columns = pipeline.DenseTile(block_m=block_m, block_n=block_n, stages=1, out_slots=1).consumer_shape[1]
            for out_slots in sorted({min(2, columns // swrite.COLUMNS), columns // swrite.COLUMNS}):
                stages = _stages(block_m, block_n, out_slots, a_t.dtype)
                shape = {"block_m": block_m, "block_n": block_n, "out_slots": out_slots}
                if stages >= 3:
                    blocks = {"longest_first": True, "group": 8} if index.cols > 1 else {}
                    configs.append(Config(**shape, stages=stages, **blocks))
    return configs


def check_support(index: MicroTileIndex, devices: tuple[str, ...] | None) -> None:
    """Raises NotImplementedError where the kernel cannot take this granularity, or the device is none of `devices`."""
    if index.rows % 64 != 0:
        raise NotImplementedError(f"the Mosaic kernel needs rows in multiples of 64; got rows={index.rows}")
    if index.cols > 1 and index.cols % 64 != 0:
        raise NotImplementedError(f"the Mosaic kernel needs cols to be 1 or a multiple of 64; got cols={index.cols}")
    if index.out_cols is not None and index.out_cols % 128 != 0:
        raise NotImplementedError(
            f"the Mosaic kernel needs out_cols in multiples of 128; got out_cols={index.out_cols}"
        )
    if devices is not None:
        device.require_device("gather_matmul", devices)


def check_config(config: Config, a_t, index: MicroTileIndex) -> None:
    """Raises ValueError where a config does not fit the kernel or these arguments."""
    if not _fits(config.block_m, index):
        rule = "block_m must be 64 or 128 and divide rows (or rows be 64)"
        raise ValueError(f"{rule}; got block_m={config.block_m}, rows={index.rows}")
    if config.block_n not in _block_ns(config.block_m, a_t.dtype) or (index.out_cols or 256) % config.block_n:
        rule = f"block_n must be in {_block_ns(config.block_m, a_t.dtype)} for {a_t.dtype}, block_m={config.block_m}"
        raise ValueError(f"{rule} and divide out_cols={index.out_cols}; got block_n={config.block_n}")
    copies = dense_tile(config).consumer_shape[1] // swrite.COLUMNS
    if config.out_slots < 1 or copies % config.out_slots:
        raise ValueError(f"out_slots must divide the {copies} copies of a consumer; got out_slots={config.out_slots}")
    most = _stages(config.block_m, config.block_n, config.out_slots, a_t.dtype)
    if not 2 <= config.stages <= most:
        raise ValueError(f"stages must be 2 to {most} for this tile; got stages={config.stages}")
    if config.group < 1:
        raise ValueError(f"group must be at least 1; got group={config.group}")
    if not 0 <= config.dense_from <= 1:
        raise ValueError(f"dense_from must be in [0, 1]; got dense_from={config.dense_from}")
