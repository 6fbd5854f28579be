"""What to check and time `grouped_outer` on: real shapes, their work, and what a user would run instead."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.case import Case, Work
from pallas_kernels.grouped_matmul.cases import ALL, BF16, RAGGED_DOT_VALUES, equal, random_routing, zipf
from pallas_kernels.routing import Routing


def work(x, y, routing: Routing, gather_x=False, gather_y=False) -> Work:
    """FLOPs and bytes of these very arguments (their counts are read)."""
    k, n = x.shape[1], y.shape[1]
    taken = int(routing.counts.sum())
    order = np.asarray(routing.order)[:taken]
    read = sum(
        operand.shape[1] * (len(np.unique(order // (routing.slots // len(operand)))) if gather else taken)
        for operand, gather in ((x, gather_x), (y, gather_y))
    )
    written = len(routing.counts) * k * n
    words = taken * (gather_x or gather_y)
    return Work(flops=2 * k * n * taken, bytes=x.dtype.itemsize * (read + written) + 4 * words)


def peers(x, y, routing: Routing, gather_x=False, gather_y=False):
    """What a user would run instead, and a dense product of equal FLOPs: all slots as one expert's.

    For float32 that is at the same precision, and as TF32. XLA's ragged product is left out where a GPU's memory does
    not hold what it makes of it.
    """

    def rows(operand, routing, gather):
        return operand[routing.order // (routing.slots // len(operand))] if gather else operand

    slots = routing.slots
    x_rows = jnp.repeat(x, slots // len(x), axis=0)  # a constant: its copy is not timed

    def dense(precision):
        return lambda x, y, *_: jnp.dot(x_rows.T, jnp.repeat(y, slots // len(y), axis=0), precision=precision)

    found = {"dense": dense(lax.Precision.HIGHEST)}
    if x.dtype == jnp.float32:
        found["tf32"] = dense("tensorfloat32")

    def ragged_dot(x, y, routing, *_):
        numbers = lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
        )
        out = lax.ragged_dot_general(
            rows(x, routing, gather_x),
            rows(y, routing, gather_y),
            routing.counts,
            numbers,
            precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        return out.astype(x.dtype)

    if len(routing.counts) * slots * (x.shape[1] + y.shape[1]) <= RAGGED_DOT_VALUES:
        found["ragged_dot"] = ragged_dot
    return found


def _case(
    name: str,
    *,
    tokens: int,
    k: int,
    n: int,
    popularity: Sequence[float | int],
    top_k: int = 1,
    kept: float = 1.0,
    x_rows: str = "slots",
    y_rows: str = "slots",
    dtypes=ALL,
    **flags: bool,
) -> Case:
    """Rows of x and y are "slots", in their order, or gathered: "positions" or "tokens"."""

    def make(key: jax.Array, dtype: jnp.dtype):
        key_routing, *keys = jax.random.split(key, 3)
        x, y = (
            jax.random.normal(key, (tokens if rows == "tokens" else tokens * top_k, width), dtype)
            for key, rows, width in zip(keys, (x_rows, y_rows), (k, n), strict=True)
        )
        routing = random_routing(key_routing, tokens, top_k, popularity, kept)
        return x, y, routing, x_rows != "slots", y_rows != "slots"

    return Case(name=name, make=make, dtypes=dtypes, **flags)


def _layer(model: str, tokens: int, *, experts: int, d_model: int, d_ff: int, top_k: int = 1, gated=False):
    """Gradients of both weights of a mixture-of-experts layer."""
    shared = {"tokens": tokens, "popularity": equal(experts), "top_k": top_k, "dtypes": BF16, "bench": True}
    name = f"{model}, {experts} experts, {tokens} tokens"
    width = 2 * d_ff if gated else d_ff
    return (
        _case(f"{name}, up", k=d_model, n=width, x_rows="tokens", **shared),
        _case(f"{name}, down", k=d_ff, n=d_model, y_rows="positions", **shared),
    )


CASES = (
    _case("one expert", tokens=64, k=64, n=128, popularity=(1,), small=True),
    _case("uneven, one expert empty", tokens=130, k=72, n=136, popularity=(3, 0, 1), small=True),
    _case("one expert has all", tokens=100, k=64, n=64, popularity=(0, 1, 0), y_rows="positions", small=True),
    _case(
        "tokens by slots, half dropped",
        tokens=70,
        k=128,
        n=256,
        popularity=(4, 1, 0, 2, 1),
        top_k=2,
        kept=0.5,
        x_rows="tokens",
        dtypes=("bfloat16", "float32"),
        small=True,
    ),
    _case(
        "positions by tokens",
        tokens=60,
        k=96,
        n=72,
        popularity=equal(4),
        top_k=2,
        kept=0.9,
        x_rows="positions",
        y_rows="tokens",
        dtypes=("bfloat16", "float32"),
        small=True,
    ),
    _case("all dropped", tokens=40, k=64, n=64, popularity=(1, 1), kept=0.0, dtypes=BF16, small=True),
    _case(
        "odd sizes",
        tokens=201,
        k=53,
        n=37,
        popularity=zipf(5),
        top_k=3,
        x_rows="tokens",
        y_rows="positions",
        dtypes=("bfloat16", "float32"),
    ),  # fmt: skip
    _case("16 groups, 2048x8192 of 16384", tokens=16384, k=2048, n=8192, popularity=equal(16), dtypes=BF16, bench=True),
    *_layer("mixtral", 4096, experts=8, d_model=4096, d_ff=14336, top_k=2, gated=True),
    *_layer("qwen3", 4096, experts=128, d_model=2048, d_ff=768, top_k=8, gated=True),
    *_layer("switch", 4096, experts=128, d_model=768, d_ff=3072),
    *_layer("swin", 4608, experts=16, d_model=512, d_ff=2048),
)
