"""Matrix product where it is listed: out[l, block] = A[l] @ B[block].T for the l in the list of a block, 0 elsewhere.

Layouts: A is [L, N], B [W, N] and the result [L, W], so what a list entry names is a contiguous row of A, and a
contiguous part of a row of the result. Work: 2 * N * sum_i rows_i * counts_i FLOPs, with rows_i the rows of B in block
i. Bytes: every row of A that some block lists and every row of B whose block lists anything (each once), the result in
full (its zeros too), and 4 an index entry.

Source: the gradient of a product whose operand has micro-tiles; SDD, a sampled dense-dense product, in Triton's
block-sparse matmul. PIT (SOSP'23), section 3.2: SRead of the rows of A, SWrite of the result.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import tuning
from pallas_kernels.micro_tile_index import MicroTileIndex
from pallas_kernels.operands import check_implementation, check_index, check_operands, same_path, vary_together
from pallas_kernels.sampled_matmul.cases import CASES, peers, work
from pallas_kernels.sampled_matmul.mosaic import Config, candidates, check_config, check_support, mosaic
from pallas_kernels.sampled_matmul.reference import reference, xla

DEVICES = ("NVIDIA H100", "NVIDIA H200")

__all__ = ["CASES", "DEVICES", "Config", "candidates", "peers", "reference", "sampled_matmul", "work"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _sampled_matmul(a, b, index: MicroTileIndex, config: Config | None, implementation: str | None):
    """The product by the Mosaic kernel, or by xla where there is no config. The gradients make their own choice."""
    if 0 in (*a.shape, b.shape[0]):
        return jnp.zeros_like(a, shape=(a.shape[0], b.shape[0]))
    with jax.enable_x64(False):  # under which a Python integer meets an int32 as one of its kind
        if config is None:
            return xla(a, b, index)
        out = mosaic(a, b, index, config, interpret=implementation == "interpret")
        return vary_together(a, out)[1]  # under shard_map a kernel's output does not say that it varies


def _forward(a, b, index, config, implementation):
    return _sampled_matmul(a, b, index, config, implementation), (a, b, index)


def _backward(config, implementation, residuals, g):
    """Products of the cotangent under the same index: what is not listed of it counts as zero."""
    from pallas_kernels.gather_matmul import gather_matmul  # here, since the three are each other's gradients
    from pallas_kernels.scatter_matmul import scatter_matmul

    del config
    a, b, index = residuals
    grad_a = same_path(scatter_matmul, g, b, index, implementation=implementation)
    grad_b = same_path(gather_matmul, g, a, index, implementation=implementation)
    no_grad = jax.tree.map(lambda x: jnp.zeros(x.shape, jax.dtypes.float0), index)
    return grad_a, grad_b, no_grad


_sampled_matmul.defvjp(_forward, _backward)


def sampled_matmul(
    a: Float[Array, "L N"],
    b: Float[Array, "W N"],
    index: MicroTileIndex,
    *,
    config: Config | None = None,
    implementation: str | None = None,
) -> Float[Array, "L W"]:
    """A @ B.T where the index lists it, multiplying nothing else; exact zeros elsewhere.

    Differentiable in `a` and `b` (reverse mode, any order). Accumulates in float32; equal inputs give equal bits;
    float32 operands keep full float32 precision.

    What is not finite: NaN and infinities in a row of A or of B reach what is listed of that row's products, never the
    zeros. The Mosaic kernel turns an infinite float32 into NaN, and loses float32 digits below 2**-102.

    Args:
        a: [L, N]; bfloat16, float16 or float32.
        b: [W, N], of the same dtype.
        index: which l (or runs of `index.cols` of them) each block of `index.rows` rows of B takes, as
            `micro_tile_index(mask, rows)` makes it of a mask [L, W]: distinct, in [0, ceil(L / cols)). Entries after a
            block's count may hold anything.
        config: tiling of the Mosaic kernel; None takes the tuned one, or a heuristic.
        implementation: "mosaic_gpu" (Hopper), "xla" (anywhere), "interpret" (the Mosaic kernel on CPU under the race
            detector, slow), or None: the Mosaic kernel where it can run, else xla.

    Returns:
        The product where it is listed, [L, W], in the operands' dtype.

    Raises:
        ValueError: shapes, dtypes or index do not fit together.
        NotImplementedError: the asked implementation cannot take these arguments or this device.

    Source: PIT (SOSP'23), section 3.2.
    """
    a, b = jnp.asarray(a), jnp.asarray(b)
    check_operands("ln,wn", a=a, b=b)
    check_index(index, L=a.shape[0], W=b.shape[0])
    check_implementation(implementation)

    def check(config: Config | None) -> None:
        devices = None if implementation == "interpret" else DEVICES
        check_support(index, devices)
        if config is not None:
            check_config(config, a, b, index)

    config = tuning.choose_config(
        "sampled_matmul", Config, (a, b, index), config, implementation, check=check, candidates=candidates
    )
    return _sampled_matmul(*vary_together(a, b, index), config, implementation)
