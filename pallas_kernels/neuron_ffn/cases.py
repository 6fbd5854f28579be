"""What to check and time `neuron_ffn` on: decode of real models, its work, and the dense block."""

import jax
import jax.numpy as jnp

from pallas_kernels.case import Case, Work
from pallas_kernels.neuron_ffn.reference import ACTIVATIONS

ANYTHING = 2**30  # what entries behind the count hold


def work(x, w1, b1, w2, neurons, count, activation: str = "relu", own=None) -> Work:
    """FLOPs and bytes of these very arguments (the count is read): listed rows once, and of `own` a byte an entry."""
    del w1, w2, neurons, activation
    (batch, d_model), size, listed = x.shape, x.dtype.itemsize, int(count)
    values = 2 * listed * d_model + 2 * batch * d_model + (0 if b1 is None else listed)
    entries = 4 * (listed + 1) + (0 if own is None else batch * listed)
    return Work(flops=4 * batch * listed * d_model, bytes=size * values + entries)


def peers(x, w1, b1, w2, neurons, count, activation: str = "relu", own=None):
    """The dense block: two products with the activation between."""
    del x, w1, b1, w2, neurons, count, own

    def dense(x, w1, b1, w2, *_):
        h = jnp.dot(x, w1.T)
        return jnp.dot(ACTIVATIONS[activation](h if b1 is None else h + b1[None]), w2)

    return {"dense": dense}


SIXTEEN_BIT = ("bfloat16", "float16")
ALL_DTYPES = (*SIXTEEN_BIT, "float32")


def _case(
    name: str,
    *,
    batch: int,
    d_model: int,
    d_ff: int,
    listed: int,
    capacity: int | None = None,
    bias: bool = True,
    activation: str = "relu",
    own: float | None = None,
    dtypes: tuple[str, ...] = ("bfloat16",),
    **flags: bool,
) -> Case:
    """Distinct neurons in any order; as many entries as neurons unless there is a `capacity`.

    With `own`, this share of the neurons is each token's own, and of every third token none.
    """

    def make(key: jax.Array, dtype: jnp.dtype):
        key_x, key_w1, key_b1, key_w2, key_list = jax.random.split(key, 5)
        x = jax.random.normal(key_x, (batch, d_model), dtype)
        w1, w2 = (jax.random.normal(k, (d_ff, d_model), dtype) for k in (key_w1, key_w2))
        b1 = d_model**0.5 * jax.random.normal(key_b1, (d_ff,), dtype) if bias else None
        neurons = jax.random.permutation(key_list, d_ff)[: capacity or d_ff].astype(jnp.int32)
        neurons = jnp.where(jnp.arange(len(neurons)) < listed, neurons, ANYTHING)
        arguments = x, w1, b1, w2, neurons, jnp.int32(listed), activation
        if own is None:
            return arguments
        by_row = jax.random.bernoulli(jax.random.fold_in(key_list, 1), own, (batch, d_ff))
        return *arguments, by_row & (jnp.arange(batch)[:, None] % 3 != 1)

    return Case(name=name, make=make, dtypes=dtypes, gradient=False, **flags)


def _bench(name: str, batch: int, d_model: int, percent: int, own: float | None = None) -> Case:
    listed, name = 4 * d_model * percent // 100, f"{name}, batch {batch}, {percent}%" + ("" if own is None else ", own")
    return _case(name, batch=batch, d_model=d_model, d_ff=4 * d_model, listed=listed, own=own, bench=True)


CASES = (
    _case("one token", batch=1, d_model=256, d_ff=40, listed=13, capacity=20, dtypes=SIXTEEN_BIT, small=True),
    _case("one token, nothing listed", batch=1, d_model=128, d_ff=9, listed=0, bias=False, small=True),
    _case("one token, one neuron", batch=1, d_model=384, d_ff=9, listed=1, capacity=1, activation="silu", small=True),
    _case("8 tokens", batch=8, d_model=128, d_ff=90, listed=70, dtypes=SIXTEEN_BIT, small=True),
    _case("3 tokens, no bias", batch=3, d_model=384, d_ff=90, listed=79, bias=False, activation="gelu", small=True),
    _case("one token, its own", batch=1, d_model=256, d_ff=40, listed=13, capacity=20, own=0.5, small=True),
    _case("9 tokens, their own", batch=9, d_model=128, d_ff=90, listed=70, activation="gelu", own=0.5, small=True),
    _case("32 tokens, their own", batch=32, d_model=1024, d_ff=500, listed=333, own=0.1, dtypes=ALL_DTYPES),
    _case("one token, all listed", batch=1, d_model=768, d_ff=300, listed=300, dtypes=ALL_DTYPES),
    _case("32 tokens", batch=32, d_model=1024, d_ff=500, listed=333, capacity=400, dtypes=ALL_DTYPES),
    _case("40 tokens", batch=40, d_model=100, d_ff=300, listed=37, activation="gelu_tanh"),
    *(_bench("opt-30b", batch, 7168, percent) for batch in (1, 8, 32) for percent in (5, 10, 20, 50)),
    *(_bench("opt-30b", batch, 7168, 10, own=0.3) for batch in (8, 32)),
    *(_bench("opt-6.7b", batch, 4096, percent) for batch in (1, 8, 32) for percent in (5, 10, 20, 50)),
)
