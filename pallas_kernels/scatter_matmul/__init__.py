"""Matrix product over scattered rows: C[m] = sum of A[m, block] @ B[block] over the blocks whose list names row m.

Layouts: A is [M, K], B [K, N] and C [M, N], so a listed row of a block is contiguous in A, and its result in C. Work:
2 * N * sum_i width_i * counts_i FLOPs, with width_i the columns of A in block i. Bytes: what is listed of A (each value
once), every row of B whose block lists anything (once), C once (rows listed nowhere are written too: zeros), and 4 an
index entry.

With one block as wide as K this is the m axis: whole rows are gathered, multiplied and scattered back. With narrower
blocks, a row is the sum of what each block that lists it gives, in the order of the blocks; the Mosaic kernel stores
these first, at most 8 * M * N of them: 4 * N bytes more are moved for each listed row of a block (float32: 8 * N).

Source: PIT (SOSP'23), sections 3.1-3.2 (m is a PIT axis of `mk,kn->mn`; SRead and SWrite).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import tuning
from pallas_kernels.micro_tile_index import MicroTileIndex
from pallas_kernels.operands import (
    check_implementation,
    check_index,
    check_operands,
    in_pairs,
    listed_mask,
    same_path,
    vary_together,
)
from pallas_kernels.scatter_matmul.cases import CASES, peers, work
from pallas_kernels.scatter_matmul.mosaic import Config, candidates, check_config, check_support, mosaic
from pallas_kernels.scatter_matmul.reference import reference, xla

DEVICES = ("NVIDIA H100", "NVIDIA H200")

__all__ = ["CASES", "DEVICES", "Config", "candidates", "peers", "reference", "scatter_matmul", "work"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _scatter_matmul(a, b, index: MicroTileIndex, config: Config | None, implementation: str | None):
    """The product by the Mosaic kernel, or by xla where there is no config. The gradients make their own choice."""
    if 0 in (*a.shape, b.shape[1]):
        return jnp.zeros_like(a, shape=(a.shape[0], b.shape[1]))
    with jax.enable_x64(False):  # under which a Python integer meets an int32 as one of its kind
        if config is None:
            return xla(a, b, index)
        out = mosaic(a, b, index, config, interpret=implementation == "interpret")
        return vary_together(a, out)[1]  # under shard_map a kernel's output does not say that it varies


def _forward(a, b, index, config, implementation):
    return _scatter_matmul(a, b, index, config, implementation), (a, b, index)


def _backward(config, implementation, residuals, g):
    """The products of the same index along the other two dimensions: what is not listed has no gradient."""
    from pallas_kernels.gather_matmul import gather_matmul  # here, since the three are each other's gradients
    from pallas_kernels.sampled_matmul import sampled_matmul

    del config
    a, b, index = residuals
    grad_a = same_path(sampled_matmul, g, b, index, implementation=implementation)
    no_grad = jax.tree.map(lambda x: jnp.zeros(x.shape, jax.dtypes.float0), index)
    if index.rows % 64 == 32:  # the kernel of `gather_matmul` takes multiples of 64
        a, index = jnp.where(listed_mask(index, *a.shape), a, 0), in_pairs(index)
    grad_b = same_path(gather_matmul, a, g, index, implementation=implementation)
    return grad_a, grad_b, no_grad


_scatter_matmul.defvjp(_forward, _backward)


def scatter_matmul(
    a: Float[Array, "M K"],
    b: Float[Array, "K N"],
    index: MicroTileIndex,
    *,
    config: Config | None = None,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """C = A @ B, multiplying for each block of columns of A only the rows that its index list names.

    Equal to the dense product where A is zero at every micro-tile that is not listed; rows of C that no list names are
    zero. Differentiable in `a` and `b` (reverse mode, any order); the gradient is that of the function computed, so
    micro-tiles that are not listed get none. Accumulates in float32, what blocks give to a row block by block, so equal
    inputs give equal bits; float32 operands keep full float32 precision. On the Mosaic kernel what a block narrower
    than K gives is rounded to the operands' dtype before it is added: in bfloat16 that errs about as much as rounding
    the result does, in float16 it may overflow where the sum would not.

    What is not finite: NaN stays NaN. On a GPU, what is not finite in B may reach rows that do not need it; the Mosaic
    kernel turns an infinite float32 into NaN, and loses float32 digits below 2**-102.

    Args:
        a: A, [M, K]; bfloat16, float16 or float32.
        b: [K, N], of the same dtype.
        index: which rows of A (or runs of `index.cols` rows) each block of `index.rows` columns has, as
            `micro_tile_index(a, rows)` makes it: distinct, in [0, ceil(M / cols)). Entries after a block's count may
            hold anything.
        config: tiling of the Mosaic kernel; None takes the tuned one, or a heuristic.
        implementation: "mosaic_gpu" (Hopper), "xla" (anywhere), "interpret" (the Mosaic kernel on CPU under the race
            detector, slow), or None: the Mosaic kernel where it can run, else xla.

    Returns:
        C, [M, N], in the operands' dtype.

    Raises:
        ValueError: shapes, dtypes or index do not fit together.
        NotImplementedError: the asked implementation cannot take these arguments or this device.

    Source: PIT (SOSP'23), section 3.1.
    """
    a, b = jnp.asarray(a), jnp.asarray(b)
    check_operands("mk,kn", a=a, b=b)
    check_index(index, M=a.shape[0], K=a.shape[1])
    check_implementation(implementation)

    def check(config: Config | None) -> None:
        devices = None if implementation == "interpret" else DEVICES
        check_support(a, index, devices)
        if config is not None:
            check_config(config, a, b, index)

    config = tuning.choose_config(
        "scatter_matmul", Config, (a, b, index), config, implementation, check=check, candidates=candidates
    )
    return _scatter_matmul(*vary_together(a, b, index), config, implementation)
