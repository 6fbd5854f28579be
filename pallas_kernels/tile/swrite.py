"""SWrite: a consumer's accumulator to global memory, through shared memory, 64 columns at a time.

`store` copies it to where it belongs by TMA; `store_scattered` writes row by row to where a list says. The few columns
of a product whose tokens are wgmma's narrow side are written as they are, by `store_transposed`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, scf

from pallas_kernels.tile.pipeline import CONSUMERS, DenseTile, swizzled

COLUMNS = 64
SCATTER_SLOTS = 2  # buffers of a consumer: one is written while slower threads still read the other


def scratch(tile: DenseTile, dtype: jnp.dtype) -> Any:
    """The buffers of both consumers."""
    shape = (CONSUMERS, tile.out_slots, tile.consumer_shape[0], COLUMNS)
    return plgpu.SMEM(shape, dtype, transforms=swizzled(dtype))


def stored_columns(columns: int) -> int:
    """Columns of a result as `store` needs them: whole swizzle atoms, at which TMA clips.

    Two of them at least: a dimension of one atom is folded away, and what lies past it would wrap into other rows.
    """
    return max(columns + -columns % COLUMNS, 2 * COLUMNS)


def store(acc: jax.Array, out_gmem, out_smem, m0, n0, first_slot: int = 0) -> None:
    """Stores `acc` (float32 in registers) at rows m0, columns n0; the copies overlap whatever comes next.

    Args:
        acc: [rows, cols] of one consumer.
        out_gmem: [M, N].
        out_smem: this consumer's buffers, [slots, rows, COLUMNS].
        m0, n0: position in `out_gmem`.
        first_slot: the first buffer to use, where not all of them are needed: 0, or as many as `acc` needs.
    """
    rows, cols = acc.shape
    slots, copies = out_smem.shape[0], cols // COLUMNS
    acc = acc.astype(out_gmem.dtype)
    together = copies if copies <= slots else 1  # copies begun at once: all of them where the buffers suffice
    for first in range(0, copies, together):
        plgpu.wait_smem_to_gmem(slots - together, wait_read_only=True)  # the copies that last read these slots
        group = range(first, first + together)
        for c in group:
            out_smem[(first_slot + c) % slots] = acc[:, c * COLUMNS : (c + 1) * COLUMNS]
        plgpu.commit_smem()
        for c in group:
            to = out_gmem.at[pl.ds(m0, rows), pl.ds(n0 + c * COLUMNS, COLUMNS)]
            plgpu.copy_smem_to_gmem(out_smem.at[(first_slot + c) % slots], to)


def store_scattered(columns: Callable[[int, int], jax.Array], count: int, out_smem, left, scatter) -> None:
    """Stores a consumer's part of a tile 64 columns at a time, by `scatter(buffer, first column of it)`.

    Args:
        columns: the values, float32 in registers, as `columns(first, how many)`.
        count: how many there are, a multiple of 64.
        out_smem: this consumer's buffers, [SCATTER_SLOTS, rows, COLUMNS], of the result's dtype.
        left: columns from the first one on that are the result's; what lies past them is dropped.
        scatter: writes a buffer's rows to where they belong.
    """
    for c in range(count // COLUMNS):
        buffer = out_smem.at[c % SCATTER_SLOTS]

        @pl.when(c * COLUMNS < left)
        def _(buffer=buffer, c=c):
            buffer[...] = columns(c * COLUMNS, COLUMNS).astype(out_smem.dtype)
            plgpu.commit_smem()  # also: every thread has read the buffer before this one
            scatter(buffer, c * COLUMNS)


def store_transposed(acc, out_gmem, split, first, left) -> None:
    """out[split, :, first + r] = acc[r] for the rows that are left of it, straight from registers.

    Args:
        acc: float32 [64, tokens], as wgmma leaves it.
        out_gmem: [splits, tokens, results].
        split, first, left: scalars; `left` may be negative.
    """
    scalar = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(), scalar, scalar, scalar))
    def store(ctx, acc, out, split, first, left):
        del ctx
        split, first, left = (arith.index_cast(ir.IndexType.get(), x.registers.item()) for x in (split, first, left))

        def store_value(value, index):
            row, token = index
            exists = scf.IfOp(arith.cmpi(arith.CmpIPredicate.slt, row, left))
            with ir.InsertionPoint(exists.then_block):
                memref.store(value, out, [split, token, arith.addi(first, row)])
                scf.yield_([])

        acc.foreach(store_value)

    store(acc, out_gmem, split, first, left)  # pyright: ignore[reportCallIssue]


def store_transposed_interpreted(acc, out_gmem, split, first, left) -> None:
    """`store_transposed` by plain writes, a power of two of rows each."""
    left, done = jnp.clip(left, 0, acc.shape[0]), jnp.int32(0)
    for size in (64, 32, 16, 8, 4, 2, 1):

        @pl.when(left & size)
        def _(size=size, done=done):
            part = lax.dynamic_slice_in_dim(acc, done, size)
            out_gmem[split, :, pl.ds(first + done, size)] = part.T

        done += left & size
