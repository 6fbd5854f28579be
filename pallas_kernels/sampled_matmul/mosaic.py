"""The Mosaic GPU kernel of `sampled_matmul` for Hopper: rows of A against the rows of B in a list's block."""

import dataclasses

from jaxtyping import Array, Float

from pallas_kernels.micro_tile_index import MicroTileIndex
from pallas_kernels.tile import device, listed_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tiling of the Mosaic kernel.

    Attributes:
        block_n: columns of the result a tile, 64, 128 or 256; divides the index's `rows`.
        stages: stages of shared memory in the pipeline, at least 2.
    """

    block_n: int
    stages: int


def mosaic(
    a: Float[Array, "L N"], b: Float[Array, "W N"], index: MicroTileIndex, config: Config, interpret: bool
) -> Float[Array, "L W"]:
    """Launches the kernel; `interpret` runs it on CPU under the race detector."""
    geometry = listed_rows.Geometry(
        lists=index.indices.shape[0],
        depth=a.shape[1],
        width=index.rows,
        columns=b.shape[0],
        b_is_transposed=True,
        block_n=config.block_n,
        stages=config.stages,
    )
    return listed_rows.listed_rows_matmul("sampled_matmul", a, b, index.indices, index.counts, geometry, interpret)


def candidates(a, b, index: MicroTileIndex) -> list[Config]:
    """Configs worth timing for these arguments (shapes are enough); the heuristic's choice comes first."""
    del a
    block_ns = [x for x in (256, 128, 64) if index.rows % x == 0]
    return [Config(block_n=block_n, stages=listed_rows.stages(block_n)) for block_n in block_ns]


def check_support(a, index: MicroTileIndex, devices: tuple[str, ...] | None) -> None:
    """Raises NotImplementedError where the kernel cannot take these arguments, or the device is none of `devices`."""
    if a.dtype.itemsize != 2:
        raise NotImplementedError(f"the Mosaic kernel takes bfloat16 and float16; got {a.dtype}")
    if index.cols != 1:
        raise NotImplementedError(f"the Mosaic kernel takes lists of single rows; got cols={index.cols}")
    if index.rows % 64 != 0:
        raise NotImplementedError(f"the Mosaic kernel needs rows in multiples of 64; got rows={index.rows}")
    if devices is not None:
        device.require_device("sampled_matmul", devices)


def check_config(config: Config, index: MicroTileIndex) -> None:
    """Raises ValueError where a config does not fit the kernel or these arguments."""
    if config.block_n not in (64, 128, 256) or index.rows % config.block_n:
        raise ValueError(
            f"block_n must be 64, 128 or 256 and divide rows; got block_n={config.block_n}, rows={index.rows}"
        )
    if not 2 <= config.stages <= listed_rows.stages(config.block_n):
        most = listed_rows.stages(config.block_n)
        raise ValueError(f"stages must be 2 to {most} for this tile; got stages={config.stages}")
