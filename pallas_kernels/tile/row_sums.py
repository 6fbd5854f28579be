"""Sums of listed rows: out[m] = sum of A[numbers[m, i]] over i < counts[m], in float32 and in their order.

A block takes a row of the result, or a part of it: what it reads are whole lines, and it writes each result once, also
where nothing is listed. So nobody has to write zeros first, and equal inputs give equal bits.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

THREADS = 128
COLUMNS = THREADS  # what the columns of A must be a multiple of
PART_BYTES = 8192  # of a row that a block takes: with 16 of them a multiprocessor hides the latency of its loads
AHEAD = 4  # numbers of a row loaded at a time, while those before them are added


def _parts(columns: int, itemsize: int) -> tuple[int, int]:
    """Columns that a block takes, and how many of them a thread loads at once: 16 bytes where that divides them."""
    vector = next(v for v in (16 // itemsize, 4, 2, 1) if columns % (THREADS * v) == 0)
    vectors = columns // (THREADS * vector)
    most = max(1, PART_BYTES // itemsize // (THREADS * vector))
    return THREADS * vector * max(v for v in range(1, most + 1) if vectors % v == 0), vector


def _row_sums_kernel(a_gmem, numbers_gmem, counts_gmem, out_gmem, *, part: int, layout: Any):
    entries, row, column = numbers_gmem.shape[1], lax.axis_index("row"), lax.axis_index("part") * part
    count = counts_gmem[row]

    def load(i):
        return [numbers_gmem[row, jnp.minimum(i * AHEAD + j, entries - 1)] for j in range(AHEAD)]

    def add_some(i, carry):
        total, numbers = carry
        following = load(i + 1)
        for j, number in enumerate(numbers):

            def add(number=number, total=total):
                a = plgpu.load(a_gmem.at[number, pl.ds(column, part)], layout=layout, optimized=False)
                return total + a.astype(jnp.float32)

            total = lax.cond(i * AHEAD + j < count, add, lambda total=total: total)
        return total, following

    zeros = plgpu.layout_cast(jnp.zeros(part, jnp.float32), layout)
    # The first numbers do not wait for the count. Once at least: behind a loop that may be skipped LLVM does not know
    # how addresses are aligned, and stores two bytes at a time (2,048 x 8,192, 655 listed: 75 us in place of 14).
    total, _ = lax.fori_loop(0, jnp.maximum(pl.cdiv(count, AHEAD), 1), add_some, (zeros, load(0)))
    out_gmem[row, pl.ds(column, part)] = total.astype(out_gmem.dtype)


def row_sums(
    name: str,
    a: Float[Array, "rows columns"],
    numbers: Int32[Array, "M entries"],
    counts: Int32[Array, " M"],
    *,
    interpret: bool,
) -> Float[Array, "M columns"]:
    """Launches the kernel.

    Args:
        name: of the kernel, for profiles.
        a: A; `columns` is a multiple of COLUMNS.
        numbers: rows of A; what is after a row's count may be anything.
        counts: how many of each row count.
        interpret: runs it on CPU under the race detector.
    """
    part, vector = _parts(a.shape[1], a.dtype.itemsize)
    layout = plgpu.Layout.WG_STRIDED((part,), vec_size=vector)
    shape = numbers.shape[0], a.shape[1]
    kernel = plgpu.kernel(
        functools.partial(_row_sums_kernel, part=part, layout=layout),
        out_type=jax.ShapeDtypeStruct(shape, a.dtype),
        grid=(shape[0], shape[1] // part),
        grid_names=("row", "part"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
        kernel_name=name,
    )
    return kernel(a, numbers, counts)
