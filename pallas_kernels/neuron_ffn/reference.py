"""The reference of `neuron_ffn` and its xla path, in plain jnp."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.operands import XLA_CHUNK

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
}


def dense(x, w1, b1, w2, activation: str, times: Array | float = 1.0) -> Float32[Array, "batch d_model"]:
    """Every neuron, or `times` as often, in float32."""
    product = functools.partial(jnp.dot, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    h = product(x, w1.T)
    h = h if b1 is None else h + b1.astype(jnp.float32)[None]
    return product((ACTIVATIONS[activation](h) * times), w2.astype(jnp.float32))


def reference(x, w1, b1, w2, neurons, count, activation: str = "relu", own=None) -> Float[Array, "batch d_model"]:
    """Every neuron in float32, as often as it is listed, for the tokens whose own it is."""
    listed = jnp.arange(len(neurons), dtype=jnp.int32) < count
    times = jnp.zeros(len(w1), jnp.float32).at[jnp.where(listed, neurons, len(w1))].add(1, mode="drop")[None]
    times = times if own is None else jnp.where(own, times, 0)
    return dense(x, w1, b1, w2, activation, times).astype(x.dtype)


def _add_listed(
    x: Float[Array, "batch d_model"],
    w1: Float[Array, "d_ff d_model"],
    b1: Float[Array, " d_ff"] | None,
    w2: Float[Array, "d_ff d_model"],
    neurons: Int32[Array, " chunk"],
    own: Bool[Array, "batch d_ff"] | None,
    listed: Bool[Array, " chunk"],
    activation: str,
) -> Float32[Array, "batch d_model"]:
    """What some neurons add, of which those that are not listed count as zeros whatever they are."""

    def rows(w):
        return jnp.where(listed.reshape(-1, *(1,) * (w.ndim - 1)), w.at[neurons].get(mode="clip"), 0)

    product = functools.partial(lax.dot_general, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    h = product(x, rows(w1), (((1,), (1,)), ((), ())))
    h = h if b1 is None else h + rows(b1).astype(jnp.float32)[None]
    h = jnp.where(computed(neurons, own, listed), ACTIVATIONS[activation](h), 0).astype(x.dtype)
    return product(h, rows(w2), (((1,), (0,)), ((), ())))


def computed(
    neurons: Int32[Array, " entries"], own: Bool[Array, "batch d_ff"] | None, listed: Bool[Array, " entries"]
) -> Bool[Array, "#batch entries"]:
    """Which entries of the list each token computes."""
    listed = listed[None]
    return listed if own is None else listed & own.at[:, neurons].get(mode="clip")


def _chunks(x, w1, b1, w2, neurons, count, own=None, *, activation: str) -> Float32[Array, "batch d_model"]:
    """A loop over as many chunks of the list as there are."""
    chunk = min(XLA_CHUNK, len(neurons))
    count = jnp.clip(count, 0, len(neurons))
    offset = jnp.arange(chunk, dtype=jnp.int32)

    def add_chunk(step, y):
        position = step * chunk + offset
        listed = position < count
        return y + _add_listed(x, w1, b1, w2, neurons.at[position].get(mode="clip"), own, listed, activation)

    y = jnp.zeros_like(x, jnp.float32)
    return lax.fori_loop(0, -(-count // chunk), add_chunk, y)


def _at_once(x, w1, b1, w2, neurons, count, own=None, *, activation: str) -> Float32[Array, "batch d_model"]:
    """All that the list has room for."""
    listed = jnp.arange(len(neurons), dtype=jnp.int32) < count
    return _add_listed(x, w1, b1, w2, neurons, own, listed, activation)


@functools.partial(jax.jit, static_argnames="activation")
def xla(x, w1, b1, w2, neurons, count, own, activation: str) -> Float32[Array, "batch d_model"]:
    """The xla path: only listed rows, as many as there are; on a GPU as many as the list has room for.

    There each step of a loop whose length lives on the device costs a host round trip, more than it saves.
    """
    return lax.platform_dependent(
        x, w1, b1, w2, neurons, count, own,
        cpu=functools.partial(_chunks, activation=activation),
        default=functools.partial(_at_once, activation=activation),
    )  # fmt: skip
