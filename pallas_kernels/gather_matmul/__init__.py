"""Matrix product over gathered k: C[block] = A[block][:, idx] @ B[idx, :], one index list a block of rows.

Layouts: A is given k-major (`a_t` [K, M]) and B as [K, N], so what one k selects is a contiguous row of each; C is
[M, N]. Work: 2 * N * sum_i rows_i * counts_i FLOPs, with rows_i the rows of block i. Bytes: what is listed of A (each
value once), every row of B that some block lists (once), C once, and 4 an index entry.

The Mosaic kernel is the dense tile with a gathering SRead: a persistent block walks tiles of C; its producer warpgroup
stages 256 index entries at a time (the next ones are under way while these are used, across tiles too) and copies the
rows they name into swizzled shared memory; two consumer warpgroups run wgmma. Float32 runs as six bfloat16 products
of three-term splits (BF16x6), since the tensor core's own TF32 keeps 10 bits and takes no k-major A.

Source: PIT (SOSP'23), sections 3.1-3.2 (k is a PIT axis of `mk,kn->mn`; SRead). Splits: Henry, Tang, Heinecke,
"Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations" (2019).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import tuning
from pallas_kernels.gather_matmul.cases import CASES, peers, work
from pallas_kernels.gather_matmul.mosaic import Config, candidates, check_config, check_support, mosaic
from pallas_kernels.gather_matmul.reference import listed_mask, reference, xla
from pallas_kernels.micro_tile_index import MicroTileIndex

DEVICES = ("NVIDIA H100", "NVIDIA H200")

__all__ = ["CASES", "DEVICES", "Config", "candidates", "gather_matmul", "peers", "reference", "work"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _gather_matmul(a_t, b, index: MicroTileIndex, config: Config | None, implementation: str):
    if 0 in (*a_t.shape, b.shape[1]):
        return jnp.zeros((a_t.shape[1], b.shape[1]), a_t.dtype)
    with jax.enable_x64(False):  # under which a Python integer meets an int32 as one of its kind
        if implementation == "xla":
            return xla(a_t, b, index)
        assert config is not None  # the public function has chosen one
        return mosaic(a_t, b, index, config, interpret=implementation == "interpret")


def _forward(a_t, b, index, config, implementation):
    return _gather_matmul(a_t, b, index, config, implementation), (a_t, b, index)


def _backward(config, implementation, residuals, g):
    """Dense products under the mask: what is not listed has no gradient."""
    del config, implementation
    a_t, b, index = residuals
    listed = listed_mask(index, a_t.shape[1])
    precision = lax.Precision.HIGHEST
    grad_a_t = jnp.where(listed, jnp.dot(b, g.T, precision=precision), 0)
    grad_b = jnp.dot(jnp.where(listed, a_t, 0), g, precision=precision)
    no_grad = jax.tree.map(lambda x: jnp.zeros(x.shape, jax.dtypes.float0), index)
    return grad_a_t, grad_b, no_grad


_gather_matmul.defvjp(_forward, _backward)


def gather_matmul(
    a_t: Float[Array, "K M"],
    b: Float[Array, "K N"],
    index: MicroTileIndex,
    *,
    config: Config | None = None,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """C = A @ B, multiplying for each block of rows only the k that its index list names.

    Equal to the dense product where A is zero at every micro-tile that is not listed. Differentiable in `a_t` and `b`
    (reverse mode); the gradient is that of the function computed, so micro-tiles that are not listed get none (as
    behind a ReLU). Accumulates in float32; float32 operands keep full float32 precision on every path.

    What is not finite: NaN stays NaN. The Mosaic kernel turns an infinite float32 into NaN, and loses float32 digits
    below 2**-102. On a GPU's xla path, and in gradients, what is not finite may reach blocks that do not list it.

    Args:
        a_t: A, k-major, [K, M]; bfloat16, float16 or float32.
        b: [K, N], of the same dtype.
        index: which k each block of `index.rows` rows takes, as `micro_tile_index` makes it: distinct, in [0, K).
            Entries after a block's count may hold anything.
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
    _check(a_t, b, index, implementation)
    if config is not None and index.rows % 64 == 0:
        check_config(config, a_t, index)
    if implementation is None:
        try:
            check_support(index, DEVICES)
            implementation = "mosaic_gpu"
        except NotImplementedError:
            implementation = "xla"
    elif implementation != "xla":
        check_support(index, DEVICES if implementation == "mosaic_gpu" else None)
    if implementation != "xla" and a_t.size and b.size:
        config = config or tuning.tuned_config("gather_matmul", Config, a_t, b, index) or candidates(a_t, b, index)[0]
    return _gather_matmul(a_t, b, index, config, implementation)


def _check(a_t, b, index: MicroTileIndex, implementation: str | None) -> None:
    if a_t.ndim != 2 or b.ndim != 2:
        raise ValueError(f"a_t and b must be matrices [K, M] and [K, N]; got shapes {a_t.shape} and {b.shape}")
    k, m = a_t.shape
    for name, rank in (("indices", 2), ("counts", 1)):
        array = getattr(index, name)
        if array.ndim != rank or array.dtype != jnp.int32:
            raise ValueError(f"index.{name} must be int32 of rank {rank}; got {array.dtype}{list(array.shape)}")
    if index.rows < 1:
        raise ValueError(f"index.rows must be at least 1; got rows={index.rows}")
    if b.shape[0] != k or index.indices.shape[1] != k:
        raise ValueError(f"K of a_t, b and index must agree; got K={k}, {b.shape[0]} and {index.indices.shape[1]}")
    if a_t.dtype != b.dtype:
        raise ValueError(f"a_t and b must have one dtype; got {a_t.dtype} and {b.dtype}")
    if a_t.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"dtype must be bfloat16, float16 or float32; got {a_t.dtype}")
    lists = (index.indices.shape[0], index.counts.shape[0])
    if lists != (-(-m // index.rows),) * 2:
        raise ValueError(
            f"index must have ceil(M / rows) lists and counts; got {lists[0]} and {lists[1]}, M={m}, rows={index.rows}"
        )
    if implementation not in (None, "mosaic_gpu", "xla", "interpret"):
        raise ValueError(f'implementation must be None, "mosaic_gpu", "xla" or "interpret"; got {implementation!r}')
