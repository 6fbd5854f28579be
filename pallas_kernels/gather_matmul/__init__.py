"""Matrix product over gathered k: C[block] = A[block][:, idx] @ B[idx, :], one index list a block of rows.

Layouts: A is given k-major (`a_t` [K, M]) and B as [K, N], so what one k selects is a contiguous row of each; C is
[M, N]. Work: 2 * N * sum_i rows_i * counts_i FLOPs, with rows_i the rows of block i. Bytes: what is listed of A (each
value once), every row of B that some block lists (once), C once, and 4 an index entry.

The Mosaic kernel is the dense tile with a gathering SRead: a persistent block walks tiles of C; its producer warpgroup
stages 256 index entries at a time (the next ones are under way while these are used, across tiles too) and copies the
rows they name into swizzled shared memory, single ones by 16-byte copies, blocks by TMA, or all of them as they lie
where the lists of a tile are nearly full; two consumer warpgroups run wgmma. Float32 runs as six bfloat16 products
of three-term splits (BF16x6), since the tensor core's own TF32 keeps 10 bits and takes no k-major A.

Source: PIT (SOSP'23), sections 3.1-3.2 (k is a PIT axis of `mk,kn->mn`; SRead). Splits: Henry, Tang, Heinecke,
"Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations" (2019).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import tuning
from pallas_kernels.gather_matmul.cases import CASES, peers, work
from pallas_kernels.gather_matmul.config import Config, candidates, check_config, check_support
from pallas_kernels.gather_matmul.mosaic import mosaic
from pallas_kernels.gather_matmul.reference import reference, xla
from pallas_kernels.micro_tile_index import MicroTileIndex
from pallas_kernels.operands import (
    check_implementation,
    check_index,
    check_operands,
    one_by_one,
    same_path,
    transposed,
    vary_together,
)

DEVICES = ("NVIDIA H100", "NVIDIA H200")

__all__ = ["CASES", "DEVICES", "Config", "candidates", "gather_matmul", "peers", "reference", "work"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _gather_matmul(a_t, b, index, zero_elsewhere: bool, config: Config | None, implementation: str | None):
    """The product by the Mosaic kernel, or by xla where there is no config. The gradients make their own choice."""
    if 0 in (*a_t.shape, b.shape[1]):
        return jnp.zeros_like(a_t, shape=(a_t.shape[1], b.shape[1]))
    with jax.enable_x64(False):  # under which a Python integer meets an int32 as one of its kind
        if config is None:
            return xla(a_t, b, index)
        out = mosaic(a_t, b, index, zero_elsewhere, config, interpret=implementation == "interpret")
        return vary_together(a_t, out)[1]  # under shard_map a kernel's output does not say that it varies


def _forward(a_t, b, index, zero_elsewhere, config, implementation):
    return _gather_matmul(a_t, b, index, zero_elsewhere, config, implementation), (a_t, b, index)


def _backward(zero_elsewhere, config, implementation, residuals, g):
    """The products of the same index along the other two dimensions: what is not listed has no gradient."""
    from pallas_kernels.sampled_matmul import sampled_matmul  # here, since the three are each other's gradients
    from pallas_kernels.scatter_matmul import scatter_matmul

    del config
    a_t, b, index = residuals
    no_grad = jax.tree.map(lambda x: jnp.zeros(x.shape, jax.dtypes.float0), index)

    def columns_gradients(b, g, index, zero_elsewhere=False):
        single = one_by_one(index, a_t.shape[0])  # what the kernel of `sampled_matmul` takes
        grad_a_t = same_path(sampled_matmul, b, g, single, implementation=implementation)
        if index.cols > 1:  # blocks are blocks of A transposed too: no row of the result is a sum of stored parts
            lists = transposed(index)
            return grad_a_t, same_path(gather_matmul, a_t.T, g, lists, zero_elsewhere, implementation=implementation)
        return grad_a_t, same_path(scatter_matmul, a_t, g, index, implementation=implementation)

    if 0 in (*a_t.shape, b.shape[1]):
        return jnp.zeros_like(a_t), jnp.zeros_like(b), no_grad
    if index.out_cols is None:
        return *columns_gradients(b, g, index, zero_elsewhere), no_grad

    n, width = b.shape[1], index.out_cols
    across = -(-n // width)
    b, g = (jnp.pad(x, ((0, 0), (0, -n % width))).reshape(-1, across, width).transpose(1, 0, 2) for x in (b, g))
    lists, entries = index.indices.shape
    indices = index.indices.reshape(lists // across, across, entries).transpose(1, 0, 2)

    def add_columns(grad_a_t, block):
        b, g, indices, counts = block
        own = dataclasses.replace(index, indices=indices, counts=counts, out_cols=None)
        grad, grad_b = columns_gradients(b, g, own)
        return grad_a_t + grad.astype(jnp.float32), grad_b

    zeros = jnp.zeros_like(a_t, jnp.float32)
    counts = index.counts.reshape(-1, across).T
    grad_a_t, grad_b = lax.scan(add_columns, zeros, (b, g, indices, counts))
    return grad_a_t.astype(a_t.dtype), grad_b.transpose(1, 0, 2).reshape(-1, across * width)[:, :n], no_grad


_gather_matmul.defvjp(_forward, _backward)


def gather_matmul(
    a_t: Float[Array, "K M"],
    b: Float[Array, "K N"],
    index: MicroTileIndex,
    zero_elsewhere: bool = False,
    *,
    config: Config | None = None,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """C = A @ B, multiplying for each block of rows only the k that its index list names.

    Equal to the dense product where A is zero at every micro-tile that is not listed. Differentiable in `a_t` and `b`
    (reverse mode); the gradient is that of the function computed, so micro-tiles that are not listed get none (as
    behind a ReLU). Accumulates in float32; float32 operands keep full float32 precision on every path.

    What is not finite: NaN stays NaN. The Mosaic kernel turns an infinite float32 into NaN, and loses float32 digits
    below 2**-102. On a GPU's xla path, in gradients, and with `zero_elsewhere` where most is listed, what is not finite
    may reach blocks that do not list it.

    Args:
        a_t: A, k-major, [K, M]; bfloat16, float16 or float32.
        b: [K, N], of the same dtype.
        index: which micro-tiles each block of `index.rows` rows takes, as `micro_tile_index` makes it: distinct, in
            [0, ceil(K / cols)). Entries after a block's count may hold anything.
        zero_elsewhere: a promise that A is zero wherever it is not listed. Then the kernel itself reads contiguous
            tiles where the live count makes that the quicker way.
        config: tiling of the Mosaic kernel; None takes the tuned one, or a heuristic.
        implementation: "mosaic_gpu" (Hopper), "xla" (anywhere), "interpret" (the Mosaic kernel on CPU under the race
            detector, slow), or None: the Mosaic kernel where it can run, else xla.

    Returns:
        C, [M, N], in the operands' dtype.

    Raises:
        ValueError: shapes, dtypes, index or config do not fit together.
        NotImplementedError: the asked implementation cannot take these arguments or this device.

    Source: PIT (SOSP'23), section 3.1.
    """
    a_t, b = jnp.asarray(a_t), jnp.asarray(b)
    check_operands("km,kn", a_t=a_t, b=b)
    check_index(index, columns=b.shape[1], K=a_t.shape[0], M=a_t.shape[1])
    check_implementation(implementation)
    if config is not None and index.rows % 64 == 0:
        check_config(config, a_t, index)

    def check(config: Config | None) -> None:
        devices = None if implementation == "interpret" else DEVICES
        check_support(index, devices)

    arguments = a_t, b, index, zero_elsewhere
    config = tuning.choose_config(
        "gather_matmul", Config, arguments, config, implementation, check=check, candidates=candidates
    )
    return _gather_matmul(*vary_together(a_t, b, index), zero_elsewhere, config, implementation)
