"""Tilings of `relu_matmul`'s Mosaic kernel: which there are, which fit, and which arguments it takes at all."""

import dataclasses

from jax.experimental import pallas as pl

from pallas_kernels.tile import device, pipeline, swrite
from pallas_kernels.tile.pipeline import BLOCK_K

NEURONS = 128  # of a tile: 64 for each consumer
ROWS = (8, 16, 32, 64, 128)  # tokens in a micro-tile: each divides a tile, and is whole registers of an accumulator
HOPPER_SMS = 132


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tiling of the Mosaic kernel.

    Attributes:
        block_n: tokens of a tile, 128 or 256.
        stages: stages of shared memory in the pipeline, at least 2.
        out_slots: 64-column output buffers of a consumer; with all of its columns buffered it never waits for one.
        group: how many rows of tiles (128 neurons each) are walked together before the next tokens, so that their part
            of W stays in L2.
    """

    block_n: int = 256
    stages: int = 4
    out_slots: int = 2
    group: int = 32

    @property
    def tile(self) -> pipeline.DenseTile:
        return pipeline.DenseTile(block_m=NEURONS, block_n=self.block_n, stages=self.stages, out_slots=self.out_slots)


def _stages(block_n: int, out_slots: int) -> int:
    """As many stages of 2-byte values as shared memory holds beside the output buffers, up to 8."""
    left = pipeline.SMEM_BYTES - pipeline.CONSUMERS * out_slots * 64 * swrite.COLUMNS * 2 - 1024  # barriers
    return min(8, left // (BLOCK_K * (NEURONS + block_n) * 2))


def candidates(x, w, bias, rows: int, mask=None) -> list[Config]:
    """Configs worth timing for these arguments (shapes are enough); the heuristic's choice comes first."""
    del bias, rows, mask
    wide_tiles = pl.cdiv(w.shape[1], NEURONS) * pl.cdiv(x.shape[0], 256)
    shapes = [(256, 2, 32), (256, 2, 16), (256, 4, 32), (128, 2, 32)]
    if 2 * wide_tiles < HOPPER_SMS:  # narrow tiles first where wide ones would leave half of the SMs idle
        shapes.reverse()
    return [Config(block_n=n, stages=_stages(n, slots), out_slots=slots, group=group) for n, slots, group in shapes]


def check_support(x, rows: int, devices: tuple[str, ...] | None) -> None:
    """Raises NotImplementedError where the kernel cannot take these arguments, or the device is none of `devices`."""
    if x.dtype.itemsize != 2:
        raise NotImplementedError(f"the Mosaic kernel takes bfloat16 and float16; got {x.dtype}")
    if rows not in ROWS:
        raise NotImplementedError(f"the Mosaic kernel takes rows in {ROWS}; got rows={rows}")
    if devices is not None:
        device.require_device("relu_matmul", devices)


def check_config(config: Config) -> None:
    """Raises ValueError where a config does not fit the kernel."""
    if config.block_n not in (128, 256):
        raise ValueError(f"block_n must be 128 or 256; got block_n={config.block_n}")
    copies = config.block_n // swrite.COLUMNS
    if config.out_slots < 1 or copies % config.out_slots:
        raise ValueError(f"out_slots must divide the {copies} copies of a consumer; got out_slots={config.out_slots}")
    most = _stages(config.block_n, config.out_slots)
    if not 2 <= config.stages <= most:
        raise ValueError(f"stages must be 2 to {most} for this tile; got stages={config.stages}")
    if config.group < 1:
        raise ValueError(f"group must be at least 1; got group={config.group}")
