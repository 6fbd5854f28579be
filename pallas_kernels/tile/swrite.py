"""SWrite: a consumer's accumulator to global memory, through shared memory, 64 columns at a time."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.tile.pipeline import CONSUMERS, DenseTile, swizzled

COLUMNS = 64


def scratch(tile: DenseTile, dtype: jnp.dtype) -> Any:
    """The buffers of both consumers."""
    shape = (CONSUMERS, tile.out_slots, tile.consumer_shape[0], COLUMNS)
    return plgpu.SMEM(shape, dtype, transforms=swizzled(dtype))


def store(acc: jax.Array, out_gmem, out_smem, m0, n0) -> None:
    """Stores `acc` (float32 in registers) at rows m0, columns n0; the copies overlap whatever comes next.

    Args:
        acc: [rows, cols] of one consumer.
        out_gmem: [M, N].
        out_smem: this consumer's buffers, [slots, rows, COLUMNS].
        m0, n0: position in `out_gmem`.
    """
    rows, cols = acc.shape
    slots = out_smem.shape[0]
    acc = acc.astype(out_gmem.dtype)
    for c in range(cols // COLUMNS):
        slot = c % slots
        plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)  # the copy that last read this slot has done so
        out_smem[slot] = acc[:, c * COLUMNS : (c + 1) * COLUMNS]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem.at[slot], out_gmem.at[pl.ds(m0, rows), pl.ds(n0 + c * COLUMNS, COLUMNS)])
