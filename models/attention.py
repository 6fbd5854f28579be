"""Attention over tokens that are padded, packed or follow those of a cache: what each one sees, and what it reads."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from pallas_kernels.tile.device import device_kind
from sparsellm.packing import Packing

CUDNN_DEVICES = ("NVIDIA A100", "NVIDIA H100", "NVIDIA H200", "NVIDIA GH200", "NVIDIA B200")


class KVCache(NamedTuple):
    """Keys and values of the tokens so far, one array a layer, and which of its slots hold real tokens."""

    keys: tuple[Float[Array, "batch slots heads head_dim"], ...]
    values: tuple[Float[Array, "batch slots heads head_dim"], ...]
    mask: Bool[Array, "batch slots"]
    filled: Int[Array, ""]  # slots in use, the same for the whole batch

    @classmethod
    def empty(
        cls, batch: int, slots: int, *, layers: int, heads: int | Sequence[int], head_dim: int, dtype: str
    ) -> "KVCache":
        """Room for `slots` tokens of each of `batch` sequences; `heads` of every layer, or of each."""
        by_layer = [heads] * layers if isinstance(heads, int) else heads
        keys, values = (tuple(jnp.zeros((batch, slots, h, head_dim), dtype) for h in by_layer) for _ in range(2))
        return cls(keys, values, jnp.zeros((batch, slots), bool), jnp.int32(0))


def run_layers(layer: Callable[..., Any], layers: int, x: Array, places: "Places", cache: KVCache | None):
    """Runs `layer(i, x, slots) -> (x, slots)` for each i; the last x, and the cache with these tokens in it.

    Args:
        layer: a layer by its number, with its keys and values in the cache, or None.
        layers: how many there are.
        x: what the first one takes.
        places: where its tokens are.
        cache: before these tokens; None for none, and then the result's is full.
    """
    keys_values = []
    for i in range(layers):
        x, slots = layer(i, x, None if cache is None else (cache.keys[i], cache.values[i]))
        keys_values.append(slots)
    keys, values = zip(*keys_values, strict=True)
    return x, KVCache(keys, values, places.slot_mask, jnp.asarray(places.next_slot, jnp.int32))


class Places(NamedTuple):
    """Where new tokens stand, be they a padded batch, [batch, length], or packed, [1, packed].

    Attributes:
        mask: which tokens are real.
        positions: how many real tokens of its sequence come before each token, so that padding shifts nothing.
        visible: True where a token of the padded batch may look at a slot.
        lengths: real tokens of each row, if all that `visible` hides is what comes later or after them; else None.
        slot_mask: which slots hold real tokens, with the new ones.
        first_slot: the slot of the first new token.
        next_slot: the slot after the last one.
        packing: where packed tokens belong; None for a padded batch.
    """

    mask: Bool[Array, "rows columns"]
    positions: Int[Array, "rows columns"]
    visible: Bool[Array, "batch 1 #length slots"]
    lengths: Int[Array, " batch"] | None
    slot_mask: Bool[Array, "batch slots"]
    first_slot: Int[Array, ""] | int
    next_slot: Int[Array, ""] | int
    packing: Packing | None


def place_tokens(
    tokens: Int[Array, "rows columns"],
    mask: Bool[Array, "rows columns"] | None = None,
    packing: Packing | None = None,
    cache: KVCache | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
) -> Places:
    """Puts new tokens into the next slots of a cache, or into slots of their own without one.

    Args:
        tokens: a padded batch, or the packed tokens of one.
        mask: of a padded batch: True for real tokens, False for padding; None if all are real.
        packing: where packed tokens belong.
        cache: the tokens so far.
        causal: whether a token sees none that come after it.
        window: a token sees itself and the `window` - 1 real tokens before it; None for all before it.

    Raises:
        ValueError: there are both a mask and a packing, or the tokens are not the packing's.
    """
    rows, lengths = _rows(tokens, mask, packing)
    earlier, first_slot, slot_mask = 0, 0, rows
    if cache is not None:
        earlier, first_slot = cache.mask.sum(axis=1, keepdims=True), cache.filled
        slot_mask = lax.dynamic_update_slice_in_dim(cache.mask, rows, first_slot, axis=1)
    positions = earlier + jnp.cumsum(rows, axis=1) - 1
    visible = slot_mask[:, None]
    if causal:
        token_slots = first_slot + jnp.arange(rows.shape[1])
        visible &= (jnp.arange(slot_mask.shape[1])[None] <= token_slots[:, None])[None]
    if window is not None:
        slot_positions = jnp.cumsum(slot_mask, axis=1) - 1
        visible &= positions[:, :, None] - slot_positions[:, None] < window
    return Places(
        mask=rows if packing is None else packing.mask,
        positions=positions if packing is None else packing.pack(positions),
        visible=visible[:, None],
        lengths=lengths if causal and cache is None and window is None else None,
        slot_mask=slot_mask,
        first_slot=first_slot,
        next_slot=first_slot + rows.shape[1],
        packing=packing,
    )


def _rows(tokens: Int[Array, "rows columns"], mask, packing: Packing | None):
    """Which tokens of the padded batch are real; and how many of each row, unless padding may be anywhere."""
    if mask is not None and packing is not None:
        raise ValueError("at most one of mask and packing must be given; got both")
    if packing is not None:
        packing.check_tokens(tokens)
        return packing.padded_mask, packing.lengths
    if mask is not None:
        return mask, None
    batch, length = tokens.shape
    return jnp.ones((batch, length), bool), jnp.full(batch, length, jnp.int32)


def padded(x: Shaped[Array, "rows columns *features"], packing: Packing | None):
    """The padded batch that `x` is, or is packed of."""
    return x if packing is None else packing.unpack(x)


def write_slots(slots, keys, values, places: Places):
    """Keys and values of all slots once the new ones are among them; just the new ones if `slots` is None."""
    keys, values = (padded(x, places.packing) for x in (keys, values))
    if slots is None:
        return keys, values
    old_keys, old_values = slots
    return (
        lax.dynamic_update_slice_in_dim(old_keys, keys, places.first_slot, axis=1),
        lax.dynamic_update_slice_in_dim(old_values, values, places.first_slot, axis=1),
    )


def attend(
    q: Float[Array, "rows columns heads head_dim"],
    k: Float[Array, "batch slots kv_heads head_dim"],
    v: Float[Array, "batch slots kv_heads head_dim"],
    places: Places,
    *,
    bias: Float[Array, "1 heads length slots"] | None = None,
    scale: float | None = None,
) -> Float[Array, "rows columns heads head_dim"]:
    """Softmax attention to the visible slots: by cuDNN where lengths say which those are, else by XLA.

    Args:
        q: queries of the new tokens, padded or packed.
        k: keys of all slots; heads share them where there are fewer.
        v: values of all slots.
        places: of the new tokens.
        bias: added to the scores of the padded batch, in float32.
        scale: what scores are multiplied by; None for 1 / sqrt(head_dim).
    """
    q = padded(q, places.packing)
    if places.lengths is not None and bias is None and _cudnn_takes(q):
        out = jax.nn.dot_product_attention(
            q,
            k,
            v,
            scale=scale,
            is_causal=True,
            query_seq_lengths=places.lengths,
            key_value_seq_lengths=places.lengths,
            implementation="cudnn",
        )
    else:
        out = _masked_attention(q, k, v, places.visible, bias, scale)
    return out if places.packing is None else places.packing.pack(out)


def _cudnn_takes(q: Float[Array, "batch length heads head_dim"]) -> bool:
    """Whether cuDNN's flash attention is there for these queries."""
    head_dim = q.shape[-1]
    return q.dtype.itemsize == 2 and head_dim % 8 == 0 and head_dim <= 128 and device_kind().startswith(CUDNN_DEVICES)


def _masked_attention(q, k, v, visible, bias, scale: float | None):
    def library(q, k, v, visible, bias):
        with jax.numpy_dtype_promotion("standard"):  # it promotes bfloat16 scores without saying so
            return jax.nn.dot_product_attention(q, k, v, bias=bias, mask=visible, scale=scale)

    def in_float32(q, k, v, visible, bias):
        wide = [x.astype(jnp.float32) for x in (q, k, v)]
        return library(wide[0], wide[1], wide[2], visible, bias).astype(q.dtype)

    if q.dtype == jnp.float16:  # of which XLA has no product on a CPU that accumulates in float32
        return lax.platform_dependent(q, k, v, visible, bias, cpu=in_float32, default=library)
    return library(q, k, v, visible, bias)
