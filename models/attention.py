"""Causal attention over a cache: which slots a token sees, and what it reads from them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


class KVCache(NamedTuple):
    """Keys and values of the tokens so far, one array a layer, and which of its slots hold real tokens."""

    keys: tuple[Float[Array, "batch slots heads head_dim"], ...]
    values: tuple[Float[Array, "batch slots heads head_dim"], ...]
    mask: Bool[Array, "batch slots"]
    filled: Int[Array, ""]  # slots in use, the same for the whole batch

    @classmethod
    def empty(cls, batch: int, slots: int, *, layers: int, heads: int, head_dim: int, dtype: str) -> "KVCache":
        """Room for `slots` tokens of each of `batch` sequences."""
        shape = (batch, slots, heads, head_dim)
        keys, values = (tuple(jnp.zeros(shape, dtype) for _ in range(layers)) for _ in range(2))
        return cls(keys, values, jnp.zeros((batch, slots), bool), jnp.int32(0))


class Places(NamedTuple):
    """Where new tokens stand among those of the cache.

    Attributes:
        positions: how many real tokens of its sequence come before each token, so that padding shifts nothing.
        visible: True where a token may look at a slot.
        slot_mask: which slots hold real tokens, with the new ones.
        first_slot: the slot of the first new token.
    """

    positions: Int[Array, "batch length"]
    visible: Bool[Array, "batch 1 length slots"]
    slot_mask: Bool[Array, "batch slots"]
    first_slot: Int[Array, ""] | int


def place_tokens(mask: Bool[Array, "batch length"], cache: KVCache | None, *, window: int | None = None) -> Places:
    """Puts new tokens, real where `mask`, into the next slots of a cache, or into slots of their own without one.

    Args:
        mask: True for real tokens, False for padding.
        cache: the tokens so far.
        window: a token sees itself and the `window` - 1 real tokens before it; None for all before it.
    """
    earlier, first_slot, slot_mask = 0, 0, mask
    if cache is not None:
        earlier, first_slot = cache.mask.sum(axis=1, keepdims=True), cache.filled
        slot_mask = lax.dynamic_update_slice_in_dim(cache.mask, mask, first_slot, axis=1)
    positions = earlier + jnp.cumsum(mask, axis=1) - 1
    token_slots = first_slot + jnp.arange(mask.shape[1])
    visible = slot_mask[:, None] & (jnp.arange(slot_mask.shape[1])[None] <= token_slots[:, None])[None]
    if window is not None:
        slot_positions = jnp.cumsum(slot_mask, axis=1) - 1
        visible &= positions[:, :, None] - slot_positions[:, None] < window
    return Places(positions, visible[:, None], slot_mask, first_slot)


def write_slots(slots, keys, values, first_slot):
    """Keys and values of all slots once the new ones are among them; just the new ones if `slots` is None."""
    if slots is None:
        return keys, values
    old_keys, old_values = slots
    return (
        lax.dynamic_update_slice_in_dim(old_keys, keys, first_slot, axis=1),
        lax.dynamic_update_slice_in_dim(old_values, values, first_slot, axis=1),
    )


def attend(
    q: Float[Array, "batch length heads head_dim"],
    k: Float[Array, "batch slots kv_heads head_dim"],
    v: Float[Array, "batch slots kv_heads head_dim"],
    visible: Bool[Array, "batch 1 length slots"],
) -> Float[Array, "batch length heads head_dim"]:
    """Softmax attention to the visible slots, scores over sqrt(head_dim). Heads share keys where there are fewer."""

    def library(q, k, v, visible):
        with jax.numpy_dtype_promotion("standard"):  # it promotes bfloat16 scores without saying so
            return jax.nn.dot_product_attention(q, k, v, mask=visible)

    def in_float32(q, k, v, visible):
        wide = [x.astype(jnp.float32) for x in (q, k, v)]
        return library(wide[0], wide[1], wide[2], visible).astype(q.dtype)

    if q.dtype == jnp.float16:  # of which XLA has no product on a CPU that accumulates in float32
        return lax.platform_dependent(q, k, v, visible, cpu=in_float32, default=library)
    return library(q, k, v, visible)
