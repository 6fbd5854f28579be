"""What to test and time `route` on, and what to compare it with."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.case import Case, Work
from pallas_kernels.route.reference import reference


def work(scores, top_k: int, capacity=None, priority=None, mask=None, groups: int = 1) -> Work:
    """A comparison of every score a choice; everything read or written once."""
    del capacity, groups
    (tokens, experts), size = scores.shape, scores.dtype.itemsize
    read = tokens * (experts * size + 4 * (priority is not None) + (mask is not None))
    return Work(flops=tokens * experts * top_k, bytes=read + 4 * (2 * tokens * top_k + experts))


def peers(scores, top_k: int, capacity=None, priority=None, mask=None, groups: int = 1):
    """The sorts of the reference, and XLA alone."""
    del scores, top_k, capacity, priority, mask, groups
    from pallas_kernels.route import route  # which takes its cases from here

    return {"sort": reference, "xla": functools.partial(route, implementation="xla")}


ALL = ("bfloat16", "float16", "float32")


def _case(
    name: str,
    *,
    tokens: int,
    experts: int,
    top_k: int,
    capacity: int | None = None,
    prioritised: bool = False,
    masked: float = 0.0,
    groups: int = 1,
    steps: int | None = None,
    dtypes: tuple[str, ...] = ("float32",),
    **flags: bool,
) -> Case:
    """Normal scores; rounded to `steps` a unit, so that many are equal; `masked`, the share of tokens that are."""

    def make(key: jax.Array, dtype: jnp.dtype):
        key_scores, key_priority, key_mask = jax.random.split(key, 3)
        scores = jax.random.normal(key_scores, (tokens, experts), jnp.float32)
        scores = scores if steps is None else jnp.round(scores * steps) / steps
        priority = jnp.round(8 * jax.random.normal(key_priority, (tokens,), jnp.float32)) if prioritised else None
        mask = jax.random.uniform(key_mask, (tokens,)) >= masked if masked else None
        return scores.astype(dtype), top_k, capacity, priority, mask, groups

    return Case(name=name, make=make, dtypes=dtypes, gradient=False, **flags)


CASES = (
    _case("top-2 of 40, many equal", tokens=50, experts=40, top_k=2, steps=1, small=True),
    _case("groups, room for 3, masked", tokens=90, experts=4, top_k=1, capacity=3, masked=0.2, groups=3, small=True),
    _case("top-2, room for 20, by priority", tokens=300, experts=16, top_k=2, capacity=20, prioritised=True, groups=2),
    _case("blocks and more, masked", tokens=1100, experts=33, top_k=3, masked=0.1, dtypes=ALL),
    _case("switch-base-8, 8 x 128 tokens", tokens=1024, experts=8, top_k=1, bench=True),
    _case("switch-base-64, room for 64", tokens=4096, experts=64, top_k=1, capacity=64, groups=32, bench=True),
    _case("switch-base-64", tokens=4096, experts=64, top_k=1, bench=True),
    _case("switch-base-256", tokens=4096, experts=256, top_k=1, bench=True),
    _case("swin-moe stage 3", tokens=64 * 144, experts=32, top_k=1, capacity=360, prioritised=True, bench=True),
    _case("mixtral-8x7b decode", tokens=32, experts=8, top_k=2, bench=True),
    _case("mixtral-8x7b prefill", tokens=8192, experts=8, top_k=2, bench=True),
    _case("qwen3-30b-a3b prefill", tokens=16384, experts=128, top_k=8, dtypes=("bfloat16", "float32"), bench=True),
)
