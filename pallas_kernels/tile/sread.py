"""SRead: rows of matrices in global memory, named by an index, packed into a stage of shared memory.

`gather_rows` is the device form (16-byte cp.async, inline MLIR, since TMA on Hopper cannot gather);
`gather_rows_interpreted` does the same with plain reads and writes, for the interpreter and its race detector. So what
the interpreter checks is the pipeline; addresses and the completion of copies are checked by the tests on a GPU.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, nvvm

from pallas_kernels.tile.pipeline import swizzled

LANES = 8  # threads that share a row: 8 x 16 bytes is a line of 128 in global memory
ROWS_A_PASS = 128 // LANES
ATOM_BYTES = 8 * 128  # 8 rows x 128 bytes: the swizzle repeats


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Rows to gather: `gmem[first_row + index, first_col : first_col + cols]` -> `smem`, panel by panel.

    Attributes:
        gmem: matrix of 16-bit elements; its rows are a multiple of 16 bytes.
        smem: one stage, [panels, rows, panel width], laid out as `pipeline.swizzled`.
        first_row: static offset added to every index.
        first_col: scalar, a multiple of 8.
        cols: a multiple of 64; fills the first panels.
    """

    gmem: Any
    smem: Any
    first_row: int
    first_col: jax.Array
    cols: int


def gather_rows(sources: tuple[Source, ...], index_smem, count: jax.Array, first: jax.Array) -> None:
    """Starts the copies of one stage: row r of it is row `index_smem[first + r]` of each source.

    Rows from `count` on and columns past a source's width are filled with zeros, whatever the index holds there.
    The copies form one group: `wait_copies` waits for it.

    Args:
        sources: what to gather by this index.
        index_smem: staged indices, int32 [entries].
        count: valid rows of this stage; all of them or more means all.
        first: where this stage's entries start in `index_smem`.
    """
    rows = sources[0].smem.shape[1]
    scalar = plgpu.Layout.WG_SPLAT
    source_types = tuple((plgpu.RefType(), plgpu.RefType(swizzled(jnp.bfloat16)), scalar) for _ in sources)

    @plgpu.inline_mgpu(arg_types=(source_types, plgpu.RefType(), scalar, scalar))
    def start_copies(ctx, refs, index_smem, count, first):
        del ctx
        i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
        i8, index_type = ir.IntegerType.get_signless(8), ir.IndexType.get()

        def const(value):
            return arith.constant(i32, value)

        less = functools.partial(arith.cmpi, arith.CmpIPredicate.slt)
        count, first = count.registers.item(), first.registers.item()
        thread = arith.remui(utils.thread_idx(), const(128))
        lane, row0 = arith.andi(thread, const(LANES - 1)), arith.shrui(thread, const(3))
        row_in_atom = arith.andi(row0, const(7))
        swizzled_lane = arith.muli(arith.xori(lane, row_in_atom), const(16))

        # A thread keeps its lane of 16 bytes and its row within the atom, so everything but the gathered row itself
        # is a constant offset: two wide multiply-adds a row, none a copy.
        destinations, origins = [], []
        for source, (gmem, smem, first_col) in zip(sources, refs, strict=True):
            offset = arith.addi(arith.muli(row_in_atom, const(128)), swizzled_lane)
            atom_row = arith.muli(arith.shrui(row0, const(3)), const(source.smem.shape[2] // 64 * ATOM_BYTES))
            destinations.append(utils.getelementptr(utils.memref_ptr(smem), [arith.addi(offset, atom_row)], i8))
            column = arith.addi(first_col.registers.item(), arith.muli(lane, const(8)))
            base = llvm.addrspacecast(ir.Type.parse("!llvm.ptr<1>"), utils.memref_ptr(gmem))
            base = utils.getelementptr(base, [arith.muli(arith.extui(i64, column), arith.constant(i64, 2))], i8)
            width = source.gmem.shape[1]
            inside = [  # static where the tile divides the width
                None if width % source.cols == 0 else less(arith.addi(column, const(64 * c)), const(width))
                for c in range(source.cols // 64)
            ]
            origins.append((base, inside))

        # All entries first: a load from shared memory does not move above a copy to it, and each would be waited for.
        gathered = []
        for p in range(rows // ROWS_A_PASS):
            row = arith.addi(row0, const(p * ROWS_A_PASS))
            listed = less(row, count)
            entry = memref.load(index_smem, [arith.index_castui(index_type, arith.addi(first, row))])
            gathered.append((listed, arith.extui(i64, arith.select(listed, entry, const(0)))))
        for p, (listed, entry) in enumerate(gathered):
            for source, destination, (base, inside) in zip(sources, destinations, origins, strict=True):
                row_bytes = source.gmem.shape[1] * 2
                source_row = arith.addi(entry, arith.constant(i64, source.first_row))
                from_row = utils.getelementptr(base, [arith.muli(source_row, arith.constant(i64, row_bytes))], i8)
                for c, in_width in enumerate(inside):
                    valid = listed if in_width is None else arith.andi(listed, in_width)
                    size = arith.select(valid, const(16), const(0))
                    panel, column = divmod(c * 64, source.smem.shape[2])
                    atom = (panel * rows + p * ROWS_A_PASS) // 8
                    atom = atom * (source.smem.shape[2] // 64) + column // 64
                    nvvm.cp_async_shared_global(
                        utils.getelementptr(destination, [const(atom * ATOM_BYTES)], i8),
                        utils.getelementptr(from_row, [arith.constant(i64, c * 128)], i8),
                        16,
                        nvvm.LoadCacheModifierKind.CG,
                        cp_size=size,
                    )

    refs = tuple((s.gmem, s.smem, s.first_col) for s in sources)
    start_copies(refs, index_smem, count, first)  # pyright: ignore[reportCallIssue]


def gather_rows_interpreted(sources: tuple[Source, ...], index_smem, count: jax.Array, first: jax.Array) -> None:
    """`gather_rows` by plain reads and writes, complete on return."""
    length = sources[0].smem.shape[1]
    listed = jnp.arange(length) < count
    entries = jnp.where(listed, index_smem[pl.ds(first, length)], 0)
    for source in sources:
        matrix = jnp.pad(source.gmem[...], ((0, 0), (0, -source.gmem.shape[1] % source.cols)))
        columns = lax.dynamic_slice_in_dim(matrix, source.first_col, source.cols, axis=1)
        rows = jnp.where(listed[:, None], columns[source.first_row + entries], 0)
        width = source.smem.shape[2]
        for panel in range(source.cols // width):
            source.smem[panel] = rows[:, panel * width : (panel + 1) * width]
