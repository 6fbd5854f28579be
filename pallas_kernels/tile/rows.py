"""Whole rows by a list: a tile's rows are loaded once, then gathered (SRead) stage by stage or scattered (SWrite).

Eight threads share a row and copy 16 bytes each, a line of 128. `load_rows` gives every thread the numbers of its rows
in registers, -1 where there is none, so that no step of a pipeline looks anything up. Each function has a plain twin
for the interpreter; addresses and the completion of copies are checked by the tests on a GPU.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, nvvm, scf

from pallas_kernels.tile.pipeline import swizzled

LANES = 8  # threads that share a row
ROWS_A_PASS = 128 // LANES
LINE_BYTES = 128  # that they copy of it
ATOM_BYTES = 8 * LINE_BYTES
SPLAT = plgpu.Layout.WG_SPLAT


def _layout(rows: int) -> tuple[tuple[int], Any]:
    """Shape and layout of the row numbers: a vector a thread, with a row for each pass."""
    passes = rows // ROWS_A_PASS
    return (128 * passes,), plgpu.Layout.WG_STRIDED((128 * passes,), vec_size=passes)


def load_rows(list_gmem, first: jax.Array, left: jax.Array, rows: int) -> jax.Array:
    """Row numbers of consecutive slots, for `gather_rows` and `scatter_rows`.

    Args:
        list_gmem: row of each slot, int32 [slots or more]; None: slot s's is s.
        first: the first slot.
        left: how many count; the others get -1, whatever the list holds there.
        rows: how many there are room for, a multiple of 16.
    """
    shape, layout = _layout(rows)
    refs = () if list_gmem is None else (list_gmem,)
    result = plgpu.ShapeDtypeStruct(shape, jnp.int32, layout=layout)

    @plgpu.inline_mgpu(arg_types=((plgpu.RefType(),) * len(refs), SPLAT, SPLAT), return_type=result)
    def load(ctx, refs, first, left):
        del ctx
        i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
        first, left = first.registers.item(), left.registers.item()
        vector = llvm.mlir_undef(ir.VectorType.get((rows // ROWS_A_PASS,), i32))
        row0 = arith.shrui(_thread(), _const(3))
        for p in range(rows // ROWS_A_PASS):
            row = arith.addi(row0, _const(p * ROWS_A_PASS))
            exists = arith.cmpi(arith.CmpIPredicate.slt, row, left)
            slot = arith.select(exists, arith.addi(first, row), _const(0))  # `first` may be past the end
            number = memref.load(refs[0], [arith.index_castui(index, slot)]) if refs else slot
            number = arith.select(exists, number, _const(-1))
            vector = llvm.insertelement(vector, number, _const(p))
        registers = np.array([vector], dtype=object)
        layout = mgpu.WGStridedFragLayout(shape, vec_size=rows // ROWS_A_PASS)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)

    return load(refs, first, left)  # pyright: ignore[reportCallIssue]


def gather_rows(matrix_gmem, stage_smem, numbers: jax.Array, first_col: jax.Array, first_row: int = 0) -> None:
    """Starts the copies of some columns of a tile's rows; absent rows and columns past the matrix become zeros.

    Args:
        matrix_gmem: its rows are a multiple of 16 bytes.
        stage_smem: [rows, columns] of the same dtype, a multiple of 128 bytes wide, laid out as `pipeline.swizzled`.
        numbers: by `load_rows`.
        first_col: scalar, a multiple of 16 bytes.
        first_row: what the numbers count from.
    """
    (rows, width), columns, dtype = stage_smem.shape, matrix_gmem.shape[1], jnp.dtype(stage_smem.dtype)
    size = dtype.itemsize
    types = plgpu.RefType(), plgpu.RefType(swizzled(dtype)), _layout(rows)[1], SPLAT

    @plgpu.inline_mgpu(arg_types=types)
    def start_copies(ctx, matrix, stage, numbers, first_col):
        del ctx
        column = _column_of_thread(first_col.registers.item(), size)
        source = _row(_line_of_row(matrix, column, size), _const(first_row), size * columns)
        to = _line_of_buffer(stage, size * width)
        lines = range(size * width // LINE_BYTES)
        inside = [  # static where the stage divides the matrix
            None if columns % width == 0 else _less(arith.addi(column, _const(c * LINE_BYTES // size)), columns)
            for c in lines
        ]
        for p in range(rows // ROWS_A_PASS):
            number = llvm.extractelement(numbers.registers.item(), _const(p))
            exists = arith.cmpi(arith.CmpIPredicate.sge, number, _const(0))
            from_row = _row(source, arith.select(exists, number, _const(0)), size * columns)
            for c in lines:
                valid = exists if inside[c] is None else arith.andi(exists, inside[c])
                nvvm.cp_async_shared_global(
                    utils.getelementptr(to, [_const(p * ROWS_A_PASS * size * width + c * ATOM_BYTES)], _i8()),
                    utils.getelementptr(from_row, [_const(c * LINE_BYTES)], _i8()),
                    16,
                    nvvm.LoadCacheModifierKind.CG,
                    cp_size=arith.select(valid, _const(16), _const(0)),
                )

    start_copies(matrix_gmem, stage_smem, numbers, first_col)  # pyright: ignore[reportCallIssue]


def scatter_rows(buffer_smem, out_gmem, numbers: jax.Array, first_col: jax.Array, end_col: jax.Array) -> None:
    """Stores 64 columns of a tile's rows; absent rows stay where they are.

    Args:
        buffer_smem: [rows, 64], 16 or 32 bits an element, laid out as `pipeline.swizzled`.
        out_gmem: of the same dtype; its rows are a multiple of 16 bytes.
        numbers: by `load_rows`.
        first_col: scalar, a multiple of 8.
        end_col: columns from there on stay as they are, 16 bytes at a time.
    """
    (rows, width), columns, dtype = buffer_smem.shape, out_gmem.shape[1], jnp.dtype(out_gmem.dtype)
    size = dtype.itemsize
    types = plgpu.RefType(swizzled(dtype)), plgpu.RefType(), _layout(rows)[1], SPLAT, SPLAT

    @plgpu.inline_mgpu(arg_types=types)
    def store(ctx, buffer, out, numbers, first_col, end_col):
        del ctx
        line = ir.VectorType.get((4,), _i32())
        column = _column_of_thread(first_col.registers.item(), size)
        to, source = _line_of_row(out, column, size), _line_of_buffer(buffer, size * width)
        for c in range(size * width // LINE_BYTES):
            line_column = arith.addi(column, _const(c * LINE_BYTES // size))
            inside = arith.cmpi(arith.CmpIPredicate.slt, line_column, end_col.registers.item())
            for p in range(rows // ROWS_A_PASS):
                number = llvm.extractelement(numbers.registers.item(), _const(p))
                exists = arith.cmpi(arith.CmpIPredicate.sge, number, _const(0))
                stores = scf.IfOp(arith.andi(exists, inside))
                with ir.InsertionPoint(stores.then_block):
                    offset = p * ROWS_A_PASS * size * width + c * ATOM_BYTES
                    values = llvm.load(line, utils.getelementptr(source, [_const(offset)], _i8()))
                    to_row = _row(to, number, size * columns)
                    llvm.store(values, utils.getelementptr(to_row, [_const(c * LINE_BYTES)], _i8()))
                    scf.yield_([])

    store(buffer_smem, out_gmem, numbers, first_col, end_col)  # pyright: ignore[reportCallIssue]


def _i8() -> ir.Type:
    return ir.IntegerType.get_signless(8)


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _const(value: int) -> ir.Value:
    return arith.constant(_i32(), value)


def _thread() -> ir.Value:
    return arith.remui(utils.thread_idx(), _const(128))


def _less(x: ir.Value, bound: int) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.slt, x, _const(bound))


def _line_of_buffer(buffer: ir.Value, row_bytes: int) -> ir.Value:
    """Address of this thread's 16 bytes in its first row of a swizzled buffer: all else is a constant offset."""
    lane, row0 = arith.andi(_thread(), _const(LANES - 1)), arith.shrui(_thread(), _const(3))
    in_atom = arith.andi(row0, _const(7))
    offset = arith.muli(arith.subi(row0, in_atom), _const(row_bytes))  # atoms of 8 rows x 128 bytes
    offset = arith.addi(offset, arith.muli(in_atom, _const(LINE_BYTES)))
    offset = arith.addi(offset, arith.muli(arith.xori(lane, in_atom), _const(16)))
    return utils.getelementptr(utils.memref_ptr(buffer), [offset], _i8())


def _column_of_thread(first_col: ir.Value, size: int) -> ir.Value:
    """The first of the columns that this thread copies, of `size` bytes each."""
    return arith.addi(first_col, arith.muli(arith.andi(_thread(), _const(LANES - 1)), _const(16 // size)))


def _line_of_row(matrix: ir.Value, column: ir.Value, size: int) -> ir.Value:
    """Address of a column in row 0 of a matrix in global memory."""
    base = llvm.addrspacecast(ir.Type.parse("!llvm.ptr<1>"), utils.memref_ptr(matrix))
    return utils.getelementptr(base, [_wide(arith.muli(column, _const(size)))], _i8())


def _row(line: ir.Value, number: ir.Value, row_bytes: int) -> ir.Value:
    offset = arith.muli(_wide(number), arith.constant(ir.IntegerType.get_signless(64), row_bytes))
    return utils.getelementptr(line, [offset], _i8())


def _wide(x: ir.Value) -> ir.Value:
    return arith.extui(ir.IntegerType.get_signless(64), x)


def load_rows_interpreted(list_gmem, first: jax.Array, left: jax.Array, rows: int) -> jax.Array:
    """`load_rows`, a row each."""
    row = jnp.arange(rows, dtype=jnp.int32)
    numbers = first + row if list_gmem is None else list_gmem[...].at[first + row].get(mode="clip")
    return jnp.where(row < left, numbers, -1)


def gather_rows_interpreted(
    matrix_gmem, stage_smem, numbers: jax.Array, first_col: jax.Array, first_row: int = 0
) -> None:
    """`gather_rows` by plain reads and writes, complete on return."""
    width = stage_smem.shape[1]
    matrix = jnp.pad(matrix_gmem[...], ((0, 0), (0, -matrix_gmem.shape[1] % width)))
    columns = lax.dynamic_slice_in_dim(matrix, first_col, width, axis=1)
    stage_smem[...] = jnp.where(numbers[:, None] >= 0, columns[first_row + jnp.maximum(numbers, 0)], 0)


def scatter_rows_interpreted(
    buffer_smem, out_gmem, numbers: jax.Array, first_col: jax.Array, end_col: jax.Array
) -> None:
    """`scatter_rows` by plain reads and writes."""
    line, width = 16 // jnp.dtype(out_gmem.dtype).itemsize, buffer_smem.shape[1]
    lines = jnp.clip(pl.cdiv(end_col - first_col, line), 0, width // line)

    def store_row(r, _):
        def store(first, count):
            out_gmem[numbers[r], pl.ds(first_col + first, count)] = buffer_smem[r, pl.ds(first, count)]

        whole, exists = lines == width // line, numbers[r] >= 0
        pl.when(exists & whole)(lambda: store(0, width))
        lax.fori_loop(0, jnp.where(exists & ~whole, lines, 0), lambda i, _: store(i * line, line), None)

    lax.fori_loop(0, buffer_smem.shape[0], store_row, None)


INTERPRETED = load_rows_interpreted, gather_rows_interpreted, scatter_rows_interpreted
COMPILED = load_rows, gather_rows, scatter_rows


def by_list(interpret: bool) -> tuple[Any, Any, Any]:
    """`load_rows`, `gather_rows` and `scatter_rows`, or their twins."""
    return INTERPRETED if interpret else COMPILED
