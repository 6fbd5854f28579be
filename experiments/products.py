"""One product with zeros in A, ready to be timed: operands, the functions of a plan, the bound and the check."""

import functools
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from experiments.masks import Mask
from pallas_kernels import gather_matmul, micro_tile_index
from pallas_kernels.case import Work, tolerance
from pallas_kernels.scatter_matmul import scatter_matmul
from pallas_kernels.workbench.gpus import find_gpu
from pallas_kernels.workbench.timing import Timer
from sparsellm.plan import Plan

ITERATIONS = 10
TF32_TOLERANCE = 1e-3  # relative RMS error of a product whose operands keep 10 bits of their mantissa

type Functions = Mapping[str, Callable[..., Any]]


def require_gpu(experiment: str) -> None:
    """Raises ValueError where there is none to time kernels on."""
    if jax.default_backend() != "gpu":
        raise ValueError(f"{experiment} times kernels on a GPU; this machine has {jax.default_backend()} only")


def operands(mask: Mask, n: int, dtype: str) -> tuple[Float[Array, "M K"], Float[Array, "K N"]]:
    """A, normal where the mask is live and zero elsewhere, and B, normal; made on the device."""
    return _operands(mask.micro_tiles(), jax.random.key(mask.seed), (mask.rows, mask.cols), (mask.m, mask.k, n), dtype)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _operands(tiles: Bool[Any, "blocks_m blocks_k"], key, tile: tuple[int, int], size: tuple[int, int, int], dtype):
    m, k, n = size
    key_a, key_b = jax.random.split(key)
    live = jnp.repeat(jnp.repeat(tiles, tile[0], axis=0), tile[1], axis=1)[:m, :k]
    a = jnp.where(live, jax.random.normal(key_a, (m, k), dtype), 0)
    return a, jax.random.normal(key_b, (k, n), dtype)


def as_read(plan: Plan, a: Float[Array, "M K"]) -> Array:
    """A in the layout that the plan's kernel reads: k-major for the k axis."""
    return a.T.copy() if plan.axis == "k" else a


@functools.cache
def functions(plan: Plan) -> Functions:
    """What is timed of a plan: functions of (a, b, x, index), with x = `as_read(plan, a)`, compiled once for a shape.

    Returns:
        "index" finds the index in x's values, "product" multiplies by a given one, "with_index" does both, and "dense"
        is the library's product: float32 in TF32, as fast as it goes. A dense plan has no "index".
    """

    def dense(a, b, x, index):
        del x, index
        return jnp.dot(a, b)

    def find(a, b, x, index):
        del a, b, index
        assert plan.micro_tile is not None
        rows, cols = plan.micro_tile.rows, plan.micro_tile.cols
        return micro_tile_index(x, rows, cols) if plan.axis == "k" else micro_tile_index(x, min(cols, x.shape[1]))

    def multiply(a, b, x, index):
        del a
        # A is zero wherever it is not listed: the kernel may read dense tiles as they lie.
        return gather_matmul(x, b, index, zero_elsewhere=True) if plan.axis == "k" else scatter_matmul(x, b, index)

    def both(a, b, x, index):
        return multiply(a, b, x, find(a, b, x, index))

    if plan.axis == "dense":
        return {"product": jax.jit(dense), "with_index": jax.jit(dense), "dense": jax.jit(dense)}
    return {"index": jax.jit(find), "product": jax.jit(multiply), "with_index": jax.jit(both), "dense": jax.jit(dense)}


def prepare(plan: Plan, a: Float[Array, "M K"], b: Float[Array, "K N"]) -> list[Any]:
    """The arguments of `functions(plan)`, the index found."""
    x = as_read(plan, a)
    find = functions(plan).get("index")
    return [a, b, x, None if find is None else find(a, b, x, None)]


def time_us(function: Callable[..., Any], arguments: list[Any], timer: Timer) -> tuple[Any, float]:
    """Its output and its median time in microseconds."""
    out, times = timer(function, arguments, ITERATIONS)
    return out, statistics.median(times)


@jax.jit
def relative_error(out: Float[Array, "M N"], expected: Float[Array, "M N"]) -> Float[Array, ""]:
    """RMS of the difference over that of what is expected, in float32; 0 where there is no difference."""
    difference = jnp.linalg.norm(out.astype(jnp.float32) - expected)
    return jnp.where(difference == 0, 0, difference / jnp.linalg.norm(expected))


@jax.jit
def product_error(out: Float[Array, "M N"], a: Float[Array, "M K"], b: Float[Array, "K N"]) -> Float[Array, ""]:
    """Of `out` against `a @ b`, in float32 on the device: on the host it takes longer."""
    reference = jnp.dot(a.astype(jnp.float32), b.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    return relative_error(out, reference)


def checked_error(plan: Plan, out: Array, a: Array, b: Array, what: str) -> float:
    """The relative error of a product.

    Raises:
        RuntimeError: it is above what counts as right in this dtype (in TF32, where a float32 plan is dense), or NaN.
    """
    error = float(product_error(out, a, b))
    tf32 = plan.axis == "dense" and out.dtype == jnp.float32
    limit = TF32_TOLERANCE if tf32 else tolerance(out.dtype)
    if not error <= limit:
        raise RuntimeError(f"{what} by {plan}: error {error:.1e} is above {limit}")
    return error


def bound_us(mask: Mask, n: int, dtype: str) -> float | None:
    """The least time for the mask's own zeros, however covered; None on a device whose rates are unknown.

    The larger of FLOPs over the rate of the tensor core (float32: TF32, half of bfloat16's) and bytes over the
    bandwidth: what is live of A, the rows of B that it needs, and C.
    """
    gpu = find_gpu(jax.devices()[0].device_kind)
    if gpu is None:
        return None
    live, b_rows = mask.live_elements()
    size = jnp.dtype(dtype).itemsize
    flops = 2 * n * live * (2 if dtype == "float32" else 1)
    return gpu.bound_us(Work(flops=flops, bytes=size * (live + b_rows * n + mask.m * n)))
