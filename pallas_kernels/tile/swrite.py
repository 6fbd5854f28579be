"""SWrite: a consumer's accumulator to global memory, through shared memory, 64 columns at a time.

`store` copies it to where it belongs by TMA; `store_scattered` writes row by row to where a list says, by
`scatter_rows` (inline MLIR) or its plain twin for the interpreter.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, scf

from pallas_kernels.tile.pipeline import CONSUMERS, DenseTile, swizzled

COLUMNS = 64
SCATTER_SLOTS = 2  # buffers of a consumer: one is written while slower threads still read the other
LANES = 8  # threads that share a row: 8 x 16 bytes
ROWS_A_PASS = 128 // LANES


def scratch(tile: DenseTile, dtype: jnp.dtype) -> Any:
    """The buffers of both consumers."""
    shape = (CONSUMERS, tile.out_slots, tile.consumer_shape[0], COLUMNS)
    return plgpu.SMEM(shape, dtype, transforms=swizzled(dtype))


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


def store_scattered(acc: jax.Array, out_smem, n0, columns: int, scatter: Callable[..., None]) -> None:
    """Stores `acc` (float32 in registers) from column n0 on, by `scatter(buffer, first column)`.

    Args:
        acc: [64, cols] of one consumer.
        out_smem: this consumer's buffers, [SCATTER_SLOTS, 64, COLUMNS], of the result's dtype.
        n0: first column.
        columns: of the result; what lies past them is dropped.
        scatter: `scatter_rows` of this tile's list.
    """
    acc = acc.astype(out_smem.dtype)
    for c in range(acc.shape[1] // COLUMNS):
        buffer = out_smem.at[c % SCATTER_SLOTS]

        @pl.when(n0 + c * COLUMNS < columns)
        def _(buffer=buffer, c=c):
            buffer[...] = acc[:, c * COLUMNS : (c + 1) * COLUMNS]
            plgpu.commit_smem()  # also: every thread has read the buffer before this one
            scatter(buffer, n0 + c * COLUMNS)


def scatter_rows(indices_gmem, list_number, first, count, out_gmem, buffer, n0) -> None:
    """Row r of `buffer` to row `indices_gmem[list_number, first + r]` of `out_gmem`, from column n0 on.

    Rows from `count` on stay where they are, whatever the index holds there.

    Args:
        indices_gmem: int32 [lists, entries].
        list_number, first: where the entries are.
        count: valid rows; the buffer's or more means all, none or less means none.
        out_gmem: matrix of 16-bit elements; its rows are a multiple of 16 bytes.
        buffer: [64, COLUMNS] in shared memory, laid out as `pipeline.swizzled`.
        n0: scalar, a multiple of 8.
    """
    scalar = plgpu.Layout.WG_SPLAT
    rows, out_columns = buffer.shape[0], out_gmem.shape[1]
    refs = (plgpu.RefType(), plgpu.RefType(), plgpu.RefType(swizzled(jnp.bfloat16)))

    @plgpu.inline_mgpu(arg_types=(refs, (scalar,) * 4))
    def store_rows(ctx, refs, scalars):
        del ctx
        indices_gmem, out_gmem, buffer = refs
        list_number, first, count, n0 = (x.registers.item() for x in scalars)
        i32, i64, i8 = (ir.IntegerType.get_signless(bits) for bits in (32, 64, 8))
        index_type, line = ir.IndexType.get(), ir.VectorType.get((4,), i32)
        const = functools.partial(arith.constant, i32)
        thread = arith.remui(utils.thread_idx(), const(128))
        lane, row0 = arith.andi(thread, const(LANES - 1)), arith.shrui(thread, const(3))
        chunk = arith.muli(arith.xori(lane, arith.andi(row0, const(7))), const(16))
        source = utils.getelementptr(utils.memref_ptr(buffer), [arith.addi(arith.muli(row0, const(128)), chunk)], i8)
        column = arith.extui(i64, arith.addi(n0, arith.muli(lane, const(8))))
        out = llvm.addrspacecast(ir.Type.parse("!llvm.ptr<1>"), utils.memref_ptr(out_gmem))
        out = utils.getelementptr(out, [arith.muli(column, arith.constant(i64, 2))], i8)
        for p in range(rows // ROWS_A_PASS):
            row = arith.addi(row0, const(p * ROWS_A_PASS))
            when_listed = scf.IfOp(arith.cmpi(arith.CmpIPredicate.slt, row, count))
            with ir.InsertionPoint(when_listed.then_block):
                place = [arith.index_castui(index_type, x) for x in (list_number, arith.addi(first, row))]
                entry = arith.extui(i64, memref.load(indices_gmem, place))
                values = llvm.load(line, utils.getelementptr(source, [const(p * ROWS_A_PASS * 128)], i8))
                offset = arith.muli(entry, arith.constant(i64, out_columns * 2))
                llvm.store(values, utils.getelementptr(out, [offset], i8))
                scf.yield_([])

    store_rows((indices_gmem, out_gmem, buffer), (list_number, first, count, n0))  # pyright: ignore[reportCallIssue]


def scatter_rows_interpreted(indices_gmem, list_number, first, count, out_gmem, buffer, n0) -> None:
    """`scatter_rows` by plain reads and writes."""

    def store_row(r, _):
        out_gmem[indices_gmem[list_number, first + r], pl.ds(n0, COLUMNS)] = buffer[r]

    lax.fori_loop(0, jnp.clip(count, 0, buffer.shape[0]), store_row, None)
