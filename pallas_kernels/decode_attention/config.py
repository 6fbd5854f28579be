"""Tilings of `decode_attention`'s Mosaic kernel: which there are, which fit, and which arguments it takes at all."""

import dataclasses

from jax.experimental import pallas as pl

from pallas_kernels.tile import device

THREADS, WARPS = 128, 4  # of a block: a warpgroup
VECTOR = 8  # 16-bit values that a thread loads at once
HEAD_DIMS = (32, 64, 128)  # of which a warp loads whole slots
MAX_GROUP = 8  # queries of a head of the keys, each with sums of its own in registers
MAX_SPLITS = 64
SMEM_BYTES = 113 * 1024 - 4096  # of a block, two of which share an SM; less what reductions and barriers take
RESIDENT = 2 * 132  # blocks that an H200 runs at once: what the heuristic counts with
SHORT = 256  # slots of a cache at most for which the heuristic takes small stages and no more blocks than fill the GPU


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tiling of the Mosaic kernel.

    Attributes:
        block_slots: slots of a stage, 32 or 64.
        stages: stages of shared memory, each of keys and of values.
        splits: blocks that share the slots of a head.
    """

    block_slots: int = 64
    stages: int = 3
    splits: int = 1


def slots_at_once(head_dim: int) -> int:
    """Slots that a warpgroup loads with one instruction: each has sums of its own."""
    return THREADS * VECTOR // head_dim


def candidates(q, keys, values, lengths, heads=None, counts=None) -> list[Config]:
    """Configs worth timing for these arguments (shapes are enough); the heuristic's choice comes first.

    That has the splits, a power of two, which leave the last wave of blocks the fullest, and the fewest of those. Where
    a row has few stages, their last one is read mostly in vain, and what a block does before its first slots arrive is
    hidden by other blocks on its SM: so stages are small there, and heads are not split where there are enough. Of 56
    heads and 144 of 160 slots, batch 4 and 16, on an H200: 7.2 and 20.8 us, with stages of 64 slots 8.0 and 24.7
    (bytes: 3.8, 15.4); batch 32 38.3, in a model and with stages of 64 slots 41.9 (bytes: 30.7).
    """
    del values, lengths, counts
    batch, slots, kv_heads, head_dim = keys.shape
    blocks = batch * (kv_heads if heads is None else heads.shape[1])

    def fullness(splits: int) -> float:
        waves = blocks * splits / RESIDENT
        return waves / -(-waves // 1)

    found, short = [], slots <= SHORT
    for block_slots, stages, times in ((32, 3, 1),) * short + ((64, 3, 1), (64, 3, 2), (32, 6, 1)):
        most = min(pl.cdiv(slots, 2 * block_slots), MAX_SPLITS)  # two stages a block at least
        most = 1 if short and blocks >= RESIDENT else most
        best = max((2**i for i in range(most.bit_length())), key=lambda splits: (round(fullness(splits), 1), -splits))
        found.append(Config(block_slots=block_slots, stages=stages, splits=min(times * best, MAX_SPLITS)))
    return [config for config in dict.fromkeys(found) if _fits(config, head_dim, q.dtype.itemsize)]


def _fits(config: Config, head_dim: int, itemsize: int) -> bool:
    return 2 * config.stages * config.block_slots * head_dim * itemsize <= SMEM_BYTES


def check_support(q, keys, devices: tuple[str, ...] | None) -> None:
    """Raises NotImplementedError where the kernel cannot take these arguments, or the device is none of `devices`."""
    (_, heads, head_dim), (_, slots, kv_heads, _) = q.shape, keys.shape
    if q.dtype.itemsize != 2:
        raise NotImplementedError(f"the Mosaic kernel takes bfloat16 and float16; got {q.dtype}")
    if head_dim not in HEAD_DIMS:
        rule = f"the Mosaic kernel takes a head_dim of {', '.join(map(str, HEAD_DIMS))}"
        raise NotImplementedError(f"{rule}; got head_dim={head_dim}")
    if heads // kv_heads > MAX_GROUP:
        rule = f"the Mosaic kernel takes {MAX_GROUP} queries of a head of the keys at most"
        raise NotImplementedError(f"{rule}; got heads={heads}, kv_heads={kv_heads}")
    if slots < 64:
        raise NotImplementedError(f"the Mosaic kernel takes caches of at least 64 slots; got slots={slots}")
    if devices is not None:
        device.require_device("decode_attention", devices)


def check_config(config: Config) -> None:
    """Raises ValueError where a config does not fit the kernel."""
    if config.block_slots not in (32, 64):
        raise ValueError(f"block_slots must be 32 or 64; got block_slots={config.block_slots}")
    if config.stages < 1:
        raise ValueError(f"stages must be at least 1; got stages={config.stages}")
    if not 1 <= config.splits <= MAX_SPLITS:
        raise ValueError(f"splits must be 1 to {MAX_SPLITS}; got splits={config.splits}")


def check_fits(config: Config, keys) -> None:
    """Raises ValueError where a config does not fit arguments that `check_support` lets pass."""
    if not _fits(config, keys.shape[3], keys.dtype.itemsize):
        got = f"block_slots={config.block_slots}, stages={config.stages}"
        raise ValueError(f"stages must leave room for two blocks an SM, {SMEM_BYTES} bytes each; got {got}")
