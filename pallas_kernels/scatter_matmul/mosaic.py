"""The Mosaic GPU kernel of `scatter_matmul` for Hopper: one list of whole rows."""

import dataclasses

from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.micro_tile_index import MicroTileIndex
from pallas_kernels.tile import device, listed_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tiling of the Mosaic kernel.

    Attributes:
        block_n: columns of the result a tile, 64, 128 or 256.
        stages: stages of shared memory in the pipeline, at least 2.
    """

    block_n: int
    stages: int


def mosaic(
    a: Float[Array, "M K"], b: Float[Array, "K N"], index: MicroTileIndex, config: Config, interpret: bool
) -> Float[Array, "M N"]:
    """Launches the kernel; `interpret` runs it on CPU under the race detector."""
    geometry = listed_rows.Geometry(
        lists=1,
        depth=a.shape[1],
        width=b.shape[1],
        columns=b.shape[1],
        b_is_transposed=False,
        block_n=config.block_n,
        stages=config.stages,
    )
    return listed_rows.listed_rows_matmul("scatter_matmul", a, b, index.indices, index.counts, geometry, interpret)


def candidates(a, b, index: MicroTileIndex) -> list[Config]:
    """Configs worth timing for these arguments (shapes are enough); the heuristic's choice comes first."""
    del index
    block_ns = [x for x in (256, 128, 64) if x <= max(64, b.shape[1])]
    if 2 * pl.cdiv(a.shape[0], listed_rows.BLOCK_ROWS) * pl.cdiv(b.shape[1], block_ns[0]) < 132:
        block_ns.reverse()  # narrow tiles first where wide ones would leave half of the SMs idle
    return [Config(block_n=block_n, stages=listed_rows.stages(block_n)) for block_n in block_ns]


def check_support(a, index: MicroTileIndex, devices: tuple[str, ...] | None) -> None:
    """Raises NotImplementedError where the kernel cannot take these arguments, or the device is none of `devices`."""
    if a.dtype.itemsize != 2:
        raise NotImplementedError(f"the Mosaic kernel takes bfloat16 and float16; got {a.dtype}")
    if index.cols != 1:
        raise NotImplementedError(f"the Mosaic kernel takes lists of single rows; got cols={index.cols}")
    if index.rows < a.shape[1]:
        rule = "the Mosaic kernel takes one list of whole rows"
        raise NotImplementedError(f"{rule}; got lists for {index.rows} of {a.shape[1]} columns each")
    if devices is not None:
        device.require_device("scatter_matmul", devices)


def check_config(config: Config, index: MicroTileIndex) -> None:
    """Raises ValueError where a config does not fit the kernel or these arguments."""
    if config.block_n not in (64, 128, 256):
        raise ValueError(f"block_n must be 64, 128 or 256; got block_n={config.block_n}")
    if not 2 <= config.stages <= listed_rows.stages(config.block_n):
        most = listed_rows.stages(config.block_n)
        raise ValueError(f"stages must be 2 to {most} for this tile; got stages={config.stages}")
