"""A block of one warpgroup for each (row, part of it): the whole row in registers for its statistics, its part out.

Blocks of a row find the same mean and variance, each for itself, rather than wait for each other. All loads (of the
row, of scale and bias, and of the part again, which are lines that the block has asked for already) are under way
before the first reduction waits for any. The part is loaded again since no block's number can index registers.

Budget of a block at d 7168 in bfloat16 with addend. Seven parts: 29 kB of row and 4 kB of scale and bias from L2 at 64
bytes a cycle, 500 cycles; 10 instructions for each of a thread's 56 values of the row, and as many again for 8 of them,
640 cycles of its scheduler; two reductions over the warpgroup, each of five shuffles and a barrier, and one latency of
memory. A single part: 57 kB, 900 cycles, and 1120. Registers of a thread: 56 for the row in float32, and as many while
the operands arrive.

On an H200 with addend, in bfloat16, 1, 8 and 32 rows: 1.5, 1.6 and 2.0 us of 7168 columns, where XLA's launches take
3.6, 2.9 and 3.8 and the time between them; of 12288 1.7, 1.9 and 2.5 for 4.4, 3.3 and 3.6.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.layer_norm.config import Config, vector
from pallas_kernels.layer_norm.reference import Result
from pallas_kernels.tile.launch import lowered_once


def _kernel(*args, names: tuple[str, ...], epsilon: float, of_row: Any, of_part: Any):
    refs = dict(zip(names, args, strict=True))
    d, dtype = refs["x"].shape[1], refs["x"].dtype
    row, parts = lax.axis_index("row"), lax.axis_size("part")
    whole, own = pl.ds(0, d), pl.ds(lax.axis_index("part") * (d // parts), d // parts)

    def load(ref, layout):
        return plgpu.load(ref, layout=layout, optimized=False)

    def load_terms(columns, layout):
        return [load(refs[name].at[row, columns], layout) for name in ("x", "addend") if name in refs]

    def add(terms) -> jax.Array:
        """Rounded as the sum is, and in float32."""
        total = functools.reduce(jnp.add, [term.astype(jnp.float32) for term in terms])
        return total.astype(dtype).astype(jnp.float32)

    row_terms = load_terms(whole, of_row)
    part_terms = row_terms if parts == 1 else load_terms(own, of_part)
    scale, bias = (load(refs[name].at[own], of_part) for name in ("scale", "bias"))
    total = add(row_terms)
    mean = jnp.sum(total) / d
    centred = total - mean
    factor = lax.rsqrt(jnp.sum(centred * centred) / d + epsilon)
    total = add(part_terms)
    if "total" in refs:
        refs["total"][row, own] = total.astype(dtype)
    normed = (total - mean) * (factor * scale.astype(jnp.float32)) + bias.astype(jnp.float32)
    refs["normed"][row, own] = normed.astype(dtype)


@lowered_once("epsilon")
def mosaic(
    x: Float[Array, "rows d"],
    scale: Float[Array, " d"],
    bias: Float[Array, " d"],
    addend: Float[Array, "rows d"] | None,
    epsilon: float,
    config: Config,
    interpret: bool,
) -> Result:
    """Launches the kernel; `interpret` runs it on CPU under the race detector."""
    rows, d = x.shape
    inputs = {"x": x, "scale": scale, "bias": bias} | ({} if addend is None else {"addend": addend})
    outputs = ("normed",) if addend is None else ("total", "normed")
    itemsize = max(array.dtype.itemsize for array in inputs.values())
    of_row, of_part = (
        plgpu.Layout.WG_STRIDED((columns,), vec_size=vector(columns, itemsize)) for columns in (d, d // config.parts)
    )
    kernel = plgpu.kernel(
        functools.partial(_kernel, names=(*inputs, *outputs), epsilon=epsilon, of_row=of_row, of_part=of_part),
        out_type=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for _ in outputs),
        grid=(rows, config.parts),
        grid_names=("row", "part"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
        kernel_name="layer_norm",
    )
    *total, normed = kernel(*inputs.values())
    return total[0] if total else x, normed
