"""The reference of `layer_norm` and its xla path, in plain jnp."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Result = tuple[Float[Array, "rows d"], Float[Array, "rows d"]]


def reference(x, scale, bias, addend=None, epsilon: float = 1e-5) -> Result:
    """The definition: standardise each row by its deviation, then scale and shift."""
    total = x if addend is None else x + addend
    rows = total.astype(jnp.float32)
    deviation = jnp.sqrt(jnp.var(rows, axis=1, keepdims=True) + epsilon)
    standard = (rows - jnp.mean(rows, axis=1, keepdims=True)) / deviation
    return total, (standard * scale.astype(jnp.float32)[None] + bias.astype(jnp.float32)[None]).astype(x.dtype)


def xla(x, scale, bias, addend, epsilon: float) -> Result:
    """The xla path: operation by operation what `flax.nnx.LayerNorm` does, without its fast variance."""
    total = x if addend is None else x + addend
    rows = total.astype(jnp.float32)
    centred = rows - rows.mean(axis=1, keepdims=True)
    variance = lax.square(centred).mean(axis=1, keepdims=True)
    factor = lax.rsqrt(variance + epsilon) * scale.astype(jnp.float32)[None]
    return total, (centred * factor + bias.astype(jnp.float32)[None]).astype(x.dtype)
