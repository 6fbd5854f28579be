"""What to check and time `grouped_matmul` on: real shapes, their work, and what a user would run instead."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.case import Case, Work
from pallas_kernels.grouped_matmul.reference import finish
from pallas_kernels.operands import result_dtype
from pallas_kernels.routing import Routing

RAGGED_DOT_VALUES = 2**33  # of rows masked for each expert, as which XLA on a GPU computes it


def work(
    x, w, routing: Routing, bias=None, scale=None, gather=False, scatter=False, activation=None, gated=False,
    transposed=False,
) -> Work:  # fmt: skip
    """FLOPs and bytes of these very arguments (their counts are read)."""
    del activation
    k, n, size = x.shape[1], w.shape[1 if transposed else 2], x.dtype.itemsize
    taken, live = int(routing.counts.sum()), int((routing.counts > 0).sum())
    rows = len(np.unique(np.asarray(routing.order)[:taken] // routing.top_k)) if gather else taken
    written = routing.slots * (n // 2 if gated else n) + (0 if bias is None else live * n)
    words = taken * ((gather or scatter) + (scale is not None))
    read = size * (rows * k + live * n * k) + 4 * words
    return Work(flops=2 * k * n * taken, bytes=read + result_dtype(x.dtype).itemsize * written)


def peers(
    x, w, routing: Routing, bias=None, scale=None, gather=False, scatter=False, activation=None, gated=False,
    transposed=False,
):  # fmt: skip
    """What a user would run instead, and a dense product of equal FLOPs: all rows by the same experts.

    For float32 that is at the same precision, and as TF32; for float8 it is bfloat16's. XLA's ragged product is left
    out where a GPU's memory does not hold what it makes of it.
    """
    wide = result_dtype(x.dtype)
    experts = w.astype(wide).swapaxes(1, 2)[: routing.top_k] if transposed else w.astype(wide)[: routing.top_k]
    columns = jnp.concatenate(experts if gather else experts[:1], axis=1)  # a constant: its copy is not timed
    found = {"dense": lambda x, *_: jnp.dot(x.astype(wide), columns, precision=lax.Precision.HIGHEST)}
    if x.dtype == jnp.float32:
        found["tf32"] = lambda x, *_: jnp.dot(x, columns, precision="tensorfloat32")

    def ragged_dot(x, w, routing, bias, scale, *_):
        rows = x[routing.order // routing.top_k] if gather else x
        product = lax.ragged_dot(
            rows, w, routing.counts, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
        )
        bias_rows = None if bias is None else bias.at[routing.slot_experts()].get(mode="fill", fill_value=0)
        out = finish(product, bias_rows, scale, activation, gated).astype(x.dtype)
        return jnp.zeros_like(out).at[routing.order].set(out, unique_indices=True) if scatter else out

    if not transposed and len(w) * routing.slots * x.shape[1] <= RAGGED_DOT_VALUES:
        found["ragged_dot"] = ragged_dot
    return found


def random_routing(
    key: jax.Array, tokens: int, top_k: int, popularity: Sequence[float | int], kept: float = 1.0
) -> Routing:
    """Each token chooses top_k different experts by their popularity; a choice is kept with this probability."""
    key_choice, key_kept = jax.random.split(key)
    experts = len(popularity)
    scores = jnp.log(jnp.asarray(popularity, jnp.float32))[None] + jax.random.gumbel(key_choice, (tokens, experts))
    chosen = lax.top_k(scores, top_k)[1].reshape(-1)
    is_kept = jax.random.uniform(key_kept, chosen.shape) < kept
    chosen = jnp.where(is_kept, chosen, experts)
    counts = jnp.zeros(experts, jnp.int32).at[chosen].add(1, mode="drop")
    return Routing(counts=counts, order=jnp.argsort(chosen, stable=True).astype(jnp.int32), top_k=top_k)


def equal(experts: int) -> tuple[float, ...]:
    """Experts that are equally popular: counts are multinomial."""
    return (1.0,) * experts


def zipf(experts: int, exponent: float = 1.2) -> tuple[float, ...]:
    """Popularity that falls with a power of the expert's rank."""
    return tuple(float(rank) ** -exponent for rank in range(1, experts + 1))


ALL = ("bfloat16", "float16", "float32")
BF16 = ("bfloat16",)
FLOAT8 = {"dtypes": ("float8_e4m3fn",), "transposed": True, "gradient": False}  # whose gradients are rounded to 3 bits
SIXTEEN = ("bfloat16", "float16")  # float32 is interpreted in two cases: each takes its six products


def _case(
    name: str,
    *,
    tokens: int,
    k: int,
    n: int,
    popularity: Sequence[float | int],
    top_k: int = 1,
    kept: float = 1.0,
    biased: bool = False,
    scaled: bool = False,
    gather: bool = False,
    scatter: bool = False,
    activation: str | None = None,
    gated: bool = False,
    transposed: bool = False,
    dtypes: tuple[str, ...] = ALL,
    **flags: bool,
) -> Case:
    def make(key: jax.Array, dtype: jnp.dtype):
        key_routing, key_x, key_w, key_bias, key_scale = jax.random.split(key, 5)
        experts, slots = len(popularity), tokens * top_k
        wide = result_dtype(dtype)
        x = jax.random.normal(key_x, (tokens if gather else slots, k), wide).astype(dtype)
        w = jax.random.normal(key_w, (experts, n, k) if transposed else (experts, k, n), wide) / k**0.5
        w = w.astype(dtype)
        bias = jax.random.normal(key_bias, (experts, n), wide) if biased else None
        scale = jax.random.uniform(key_scale, (slots,)) if scaled else None
        routing = random_routing(key_routing, tokens, top_k, popularity, kept)
        return x, w, routing, bias, scale, gather, scatter, activation, gated, transposed

    return Case(name=name, make=make, dtypes=dtypes, **flags)


def _layer(
    model: str, tokens: int, *, experts: int, d_model: int, d_ff: int, activation: str, top_k=1, gated=False,
    biased=False, popularity=None, parts=("up", "down"),
) -> list[Case]:  # fmt: skip
    """Both products of a mixture-of-experts layer: tokens gathered by expert, and back to their positions."""
    shared = {"tokens": tokens, "top_k": top_k, "biased": biased, "popularity": popularity or equal(experts)}
    shared |= {"dtypes": BF16, "bench": True}
    name = f"{model}, {experts} experts, {tokens} tokens"
    width = 2 * d_ff if gated else d_ff
    cases = {
        "up": _case(f"{name}, up", k=d_model, n=width, gather=True, activation=activation, gated=gated, **shared),
        "down": _case(f"{name}, down", k=d_ff, n=d_model, scatter=True, **shared),
    }
    return [cases[part] for part in parts]


MIXTRAL = {"experts": 8, "top_k": 2, "d_model": 4096, "d_ff": 14336, "activation": "silu", "gated": True}
QWEN3 = {"experts": 128, "top_k": 8, "d_model": 2048, "d_ff": 768, "activation": "silu", "gated": True}
SWITCH = {"d_model": 768, "d_ff": 3072, "activation": "relu"}
SWIN = {"activation": "gelu", "biased": True}

CASES = (
    _case("one expert", tokens=64, k=64, n=128, popularity=(1,), small=True),
    _case("uneven, one expert empty", tokens=130, k=72, n=136, popularity=(3, 0, 1), dtypes=SIXTEEN, small=True),
    _case(
        "one expert has all, scattered",
        tokens=100,
        k=64,
        n=64,
        popularity=(0, 1, 0),
        scatter=True,
        dtypes=SIXTEEN,
        small=True,
    ),
    _case(
        "gathered, gated, half dropped",
        tokens=70,
        k=128,
        n=256,
        popularity=(4, 1, 0, 2, 1),
        top_k=2,
        kept=0.5,
        gather=True,
        activation="silu",
        gated=True,
        dtypes=BF16,
        small=True,
    ),
    _case(
        "gathered and scattered, bias, scale, gelu",
        tokens=60,
        k=96,
        n=72,
        popularity=equal(4),
        top_k=2,
        kept=0.9,
        biased=True,
        scaled=True,
        gather=True,
        scatter=True,
        activation="gelu",
        dtypes=("bfloat16", "float32"),
        small=True,
    ),
    _case(
        "transposed, gated gelu_tanh, bias",
        tokens=90,
        k=192,
        n=128,
        popularity=(1, 2),
        biased=True,
        gather=True,
        activation="gelu_tanh",
        gated=True,
        transposed=True,
        dtypes=BF16,
        small=True,
    ),
    _case("float8", tokens=70, k=208, n=136, popularity=(2, 0, 1), biased=True, scatter=True, small=True, **FLOAT8),
    _case(
        "float8, gathered, gated",
        tokens=50,
        k=256,
        n=256,
        popularity=(1, 2),
        top_k=2,
        gather=True,
        activation="silu",
        gated=True,
        small=True,
        **FLOAT8,
    ),
    _case("all dropped", tokens=40, k=64, n=64, popularity=(1, 1), kept=0.0, biased=True, dtypes=BF16, small=True),
    _case(
        "odd sizes, relu",
        tokens=201,
        k=53,
        n=37,
        popularity=zipf(5),
        top_k=3,
        gather=True,
        activation="relu",
        scaled=True,
        dtypes=("bfloat16", "float32"),
    ),  # fmt: skip
    _case("16 groups, 16384x2048x8192", tokens=16384, k=2048, n=8192, popularity=equal(16), dtypes=BF16, bench=True),
    _case(
        "float8, 16 groups, 16384x2048x8192", tokens=16384, k=2048, n=8192, popularity=equal(16), bench=True, **FLOAT8
    ),
    _case("float8, 128 groups, 1024x768x3072", tokens=1024, k=768, n=3072, popularity=equal(128), bench=True, **FLOAT8),
    *(case for tokens in (1024, 4096, 16384) for case in _layer("mixtral", tokens, **MIXTRAL)),
    *(case for tokens in (4096, 16384) for case in _layer("qwen3", tokens, **QWEN3)),
    *_layer("qwen3, zipf", 4096, popularity=zipf(128), **QWEN3),
    *(
        case
        for tokens, parts in ((1024, ("up",)), (4096, ("up", "down")))
        for experts in (64, 128, 256)
        for case in _layer("switch", tokens, experts=experts, parts=parts, **SWITCH)
    ),
    *(
        case
        for d_model, tokens, parts in ((512, 4608, ("up", "down")), (1024, 1152, ("up",)))
        for experts in (8, 16, 32)
        for case in _layer("swin", tokens, experts=experts, d_model=d_model, d_ff=4 * d_model, parts=parts, **SWIN)
    ),
)
