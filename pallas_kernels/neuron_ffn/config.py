"""Tilings of `neuron_ffn`'s Mosaic kernels: which there are, which fit, and which arguments they take at all."""

import dataclasses

from jax.experimental import pallas as pl

from pallas_kernels.tile import device
from pallas_kernels.tile.pipeline import SMEM_BYTES

ROWS = 64  # listed rows of a stage where several tokens share them: a side of wgmma
TMA_BOX = 256  # elements that TMA copies along a dimension, at most
MAX_BATCH = 32
MAX_D_MODEL = 12288  # of which a warpgroup holds two rows in registers
RESERVED = 2048  # bytes of shared memory for barriers and sums
MAX_SPLITS = 32  # of a sum, each 4 bytes a result
HOPPER_SMS = 132  # what the heuristic counts with


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tiling of the Mosaic kernels. Stages are as many as shared memory holds.

    Attributes:
        consumers: of one token: warpgroups of a block that compute, 1 to 3.
        up_columns: of several tokens: columns of w1 a stage, 128 or 256.
        up_splits: of several tokens: blocks that share the sum over d_model of a listed neuron.
        down_columns: of several tokens: columns of w2 a stage, 128, 256 or 512.
        down_splits: of several tokens: blocks that share the sum over the list of a column.
    """

    consumers: int = 2
    up_columns: int = 256
    up_splits: int = 4
    down_columns: int = 512
    down_splits: int = 9

    def fused_stages(self, d_model: int) -> int:
        """Of a row of w1 and one of w2, each always a certain consumer's: a multiple of their number."""
        row = 2 * d_model
        left = SMEM_BYTES - RESERVED - (self.consumers - 1) * 2 * row  # what the y of other warpgroups leave
        return min(24, left // (2 * row)) // self.consumers * self.consumers

    def up_stages(self, batch: int) -> int:
        return min(8, (SMEM_BYTES - RESERVED) // (2 * self.up_columns * (ROWS + _padded(batch))))

    def down_stages(self, batch: int) -> int:
        return min(8, (SMEM_BYTES - RESERVED) // (2 * ROWS * (self.down_columns + _padded(batch))))


def _padded(batch: int) -> int:
    """Tokens of a wgmma."""
    return batch + -batch % 8


def candidates(x, w1, b1, w2, neurons, count, activation: str = "relu", own=None) -> list[Config]:
    """Configs worth timing for these arguments (shapes are enough); the heuristic's choice comes first."""
    del w1, b1, w2, count, activation, own
    batch, d_model = x.shape
    if batch == 1:
        consumers = (2, 1, 3) if d_model <= 8192 else (1, 2)
        return [Config(consumers=c) for c in consumers if Config(consumers=c).fused_stages(d_model) > 1]
    steps = {columns: pl.cdiv(d_model, columns) for columns in (128, 256, 512)}
    up_columns = 256 if d_model >= 256 else 128
    found = []
    for up_splits, most_columns in ((4, 512), (4, 256), (2, 512), (1, 512), (4, 128)):
        down_columns = max((c for c in steps if c <= min(most_columns, d_model)), default=128)
        down_splits = min(max(HOPPER_SMS // steps[down_columns], 1), pl.cdiv(max(neurons.shape[0], 1), ROWS))
        config = Config(
            up_columns=up_columns,
            up_splits=min(up_splits, steps[up_columns]),
            down_columns=down_columns,
            down_splits=min(down_splits, MAX_SPLITS),
        )
        found.append(config)
    return list(dict.fromkeys(found))


def check_support(x, devices: tuple[str, ...] | None) -> None:
    """Raises NotImplementedError where the kernels cannot take these arguments, or the device is none of `devices`."""
    batch, d_model = x.shape
    if x.dtype.itemsize != 2:
        raise NotImplementedError(f"the Mosaic kernel takes bfloat16 and float16; got {x.dtype}")
    if batch > MAX_BATCH:
        raise NotImplementedError(f"the Mosaic kernel takes {MAX_BATCH} tokens at most; got batch={batch}")
    if d_model % 128 or d_model > MAX_D_MODEL:
        rule = f"the Mosaic kernel takes a d_model that is a multiple of 128, {MAX_D_MODEL} at most"
        raise NotImplementedError(f"{rule}; got d_model={d_model}")
    if devices is not None:
        device.require_device("neuron_ffn", devices)


def check_config(config: Config) -> None:
    """Raises ValueError where a config does not fit the kernels."""
    if config.consumers not in (1, 2, 3):
        raise ValueError(f"consumers must be 1, 2 or 3; got consumers={config.consumers}")
    if config.up_columns not in (128, 256) or config.down_columns not in (128, 256, 512):
        got = f"up_columns={config.up_columns}, down_columns={config.down_columns}"
        raise ValueError(f"up_columns must be 128 or 256, and down_columns 128, 256 or 512; got {got}")
    if not 1 <= config.up_splits <= MAX_SPLITS or not 1 <= config.down_splits <= MAX_SPLITS:
        got = f"up_splits={config.up_splits}, down_splits={config.down_splits}"
        raise ValueError(f"up_splits and down_splits must be 1 to {MAX_SPLITS}; got {got}")


def check_fits(config: Config, batch: int, d_model: int) -> None:
    """Raises ValueError where a config does not fit arguments that `check_support` lets pass."""
    if batch == 1 and config.fused_stages(d_model) < 2:
        got = f"consumers={config.consumers}, d_model={d_model}"
        raise ValueError(f"consumers must leave room for two stages; got {got}")
    if batch > 1 and config.up_columns > d_model:
        raise ValueError(f"up_columns must be d_model at most; got up_columns={config.up_columns}, d_model={d_model}")
