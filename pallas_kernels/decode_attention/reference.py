"""The reference of `decode_attention` and its xla path, in plain jnp."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32


def _attend(
    q: Float[Array, "batch kv_heads group head_dim"],
    keys: Float[Array, "batch slots kv_heads head_dim"],
    values: Float[Array, "batch slots kv_heads head_dim"],
    lengths: Int32[Array, " batch"],
    scale: float,
) -> Float32[Array, "batch kv_heads group head_dim"]:
    """All slots in float32, of which those past the length count as nothing, whatever they hold."""
    product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    in_use = (jnp.arange(keys.shape[1], dtype=jnp.int32)[None] < lengths[:, None])[:, None, None]
    scores = product("bhgd,bshd->bhgs", q.astype(jnp.float32), keys.astype(jnp.float32)) * scale
    weights = jax.nn.softmax(jnp.where(in_use, scores, -jnp.inf), axis=-1)
    weights = jnp.where(in_use, weights, 0)  # of a row without slots, the softmax is NaN
    values = jnp.where(in_use[:, 0, 0, :, None, None], values.astype(jnp.float32), 0)
    return product("bhgs,bshd->bhgd", weights, values)


def listed_mask(
    heads: Int32[Array, "batch capacity"], counts: Int32[Array, " batch"], kv_heads: int
) -> Bool[Array, "batch kv_heads"]:
    """Which heads a row lists."""
    counted = jnp.arange(heads.shape[1], dtype=jnp.int32)[None] < counts[:, None]
    same = heads[:, None] == jnp.arange(kv_heads, dtype=jnp.int32)[None, :, None]
    return jnp.any(same & counted[:, None], axis=-1)


def reference(q, keys, values, lengths, heads=None, counts=None) -> Float[Array, "batch heads head_dim"]:
    """Every head in float32; those that are not listed are left out."""
    (_, slots, kv_heads, head_dim), group = keys.shape, q.shape[1] // keys.shape[2]
    q, keys, values = (x.astype(jnp.float32) for x in (q, *(jnp.repeat(x, group, axis=2) for x in (keys, values))))
    scores = jnp.einsum("bhd,bshd->bhs", q, keys, precision=lax.Precision.HIGHEST) / head_dim**0.5
    in_use = jnp.arange(slots, dtype=jnp.int32)[None, None] < lengths[:, None, None]
    weights = jnp.where(in_use, jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True)), 0)
    weights /= jnp.maximum(weights.sum(axis=-1, keepdims=True), 1e-30)
    out = jnp.einsum("bhs,bshd->bhd", weights, values, precision=lax.Precision.HIGHEST)
    if heads is not None and counts is not None:
        out = jnp.where(jnp.repeat(listed_mask(heads, counts, kv_heads), group, axis=1)[..., None], out, 0)
    return out


def xla(q, keys, values, lengths, heads, counts, scale: float) -> Float32[Array, "batch heads head_dim"]:
    """The xla path: as many heads of each row as its list has room for, gathered; all slots of those."""
    batch, slots, kv_heads, head_dim = keys.shape
    grouped = q.reshape(batch, kv_heads, -1, head_dim)
    if heads is None:
        return _attend(grouped, keys, values, lengths, scale).reshape(q.shape)
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
    listed = jnp.arange(heads.shape[1], dtype=jnp.int32)[None] < counts[:, None]
    inside = jnp.where(listed, heads, 0)  # what follows the count may be anything
    keys, values = (jnp.take_along_axis(x, inside[:, None, :, None], axis=2) for x in (keys, values))
    found = _attend(grouped[rows, inside], keys, values, lengths, scale)
    out = jnp.zeros(grouped.shape, jnp.float32)
    return out.at[rows, jnp.where(listed, heads, kv_heads)].set(found, mode="drop").reshape(q.shape)
