"""Attention over tokens that are padded, packed or follow those of a cache: what each one sees, and what it reads."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

from pallas_kernels.decode_attention import DEVICES, decode_attention
from pallas_kernels.decode_attention.config import check_support
from pallas_kernels.listed_matmul import listed_matmul
from pallas_kernels.micro_tile_index import compact
from pallas_kernels.tile.device import device_kind
from sparsellm.determinism import distinct_call
from sparsellm.packing import Packing
from sparsellm.sharding import TENSOR_PARALLEL, sum_over_shards

CUDNN_DEVICES = ("NVIDIA A100", "NVIDIA H100", "NVIDIA H200", "NVIDIA GH200", "NVIDIA B200")
LISTED_ELSEWHERE = "heads can be listed only for one token a row behind a cache, without a bias or a window"


class KVCache(NamedTuple):
    """Keys and values of the tokens so far, one array a layer: a token's slot is its position in its sequence.

    Rows are filled each for itself; what a row holds behind its tokens is seen by nobody.
    """

    keys: tuple[Float[Array, "batch slots heads head_dim"], ...]
    values: tuple[Float[Array, "batch slots heads head_dim"], ...]
    filled: Int[Array, " batch"]  # slots in use

    @classmethod
    def empty(
        cls, batch: int, slots: int, *, layers: int, heads: int | Sequence[int], head_dim: int, dtype: str
    ) -> "KVCache":
        """Room for `slots` tokens of each of `batch` sequences; `heads` of every layer, or of each."""
        by_layer = [heads] * layers if isinstance(heads, int) else heads
        keys, values = (tuple(jnp.zeros((batch, slots, h, head_dim), dtype) for h in by_layer) for _ in range(2))
        return cls(keys, values, jnp.zeros(batch, jnp.int32))


def run_layers(layer: Callable[..., Any], layers: int, x: Array, places: "Places", cache: KVCache | None):
    """Runs `layer(i, x, slots) -> (x, slots)` for each i; the last x, and the cache with these tokens in it.

    Args:
        layer: a layer by its number, with its keys and values in the cache, or None.
        layers: how many there are.
        x: what the first one takes.
        places: where its tokens are.
        cache: before these tokens; None for none, then and after.
    """
    keys_values = []
    for i in range(layers):
        x, slots = layer(i, x, None if cache is None else (cache.keys[i], cache.values[i]))
        keys_values.append(slots)
    if cache is None or places.filled is None:
        return x, None
    keys, values = zip(*keys_values, strict=True)
    return x, KVCache(keys, values, places.filled)


class Places(NamedTuple):
    """Where new tokens stand, be they a padded batch, [batch, length], or packed, [1, packed].

    Attributes:
        mask: which tokens are real.
        positions: how many real tokens of its sequence come before each token, so that padding shifts nothing.
        visible: True where a token of the padded batch may look at a key: at a slot of the cache, or at a token of the
            batch if nothing precedes them.
        lengths: tokens of each row, or slots in use with the new ones, if all that `visible` hides is what comes later
            or after them; else None.
        filled: slots of each row in use, with the new ones; None without a cache.
        packing: where packed tokens belong; None for a padded batch.
    """

    mask: Bool[Array, "rows columns"]
    positions: Int[Array, "rows columns"]
    visible: Bool[Array, "batch 1 #length keys"]
    lengths: Int[Array, " batch"] | None
    filled: Int[Array, " batch"] | None
    packing: Packing | None

    @property
    def decoding(self) -> bool:
        """Whether there is one new token a row, behind those of a cache."""
        return self.filled is not None and self.packing is None and self.positions.shape[1] == 1


def place_tokens(
    tokens: Int[Array, "rows columns"],
    mask: Bool[Array, "rows columns"] | None = None,
    packing: Packing | None = None,
    cache: KVCache | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
) -> Places:
    """Puts new tokens behind those of a cache, or at the beginning of their sequences if they are packed.

    Args:
        tokens: a padded batch, or the packed tokens of one.
        mask: of a padded batch: True for real tokens, False for padding, which takes no slot; None if all are real.
        packing: where packed tokens belong. A packed sequence takes a row of the cache over, from its first slot on;
            one without tokens leaves the row as it is.
        cache: the tokens so far.
        causal: whether a token sees none that come after it.
        window: a token sees itself and the `window` - 1 real tokens before it; None for all before it.

    Raises:
        ValueError: there are both a mask and a packing, the tokens are not the packing's, or there are not as many
            sequences as rows of the cache.
    """
    real, lengths = _real_tokens(tokens, mask, packing)
    if cache is not None and len(real) != len(cache.filled):
        raise ValueError(f"there must be a sequence for each of the cache's {len(cache.filled)} rows; got {len(real)}")
    positions = jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
    counts = jnp.sum(real, axis=1, dtype=jnp.int32)
    key_positions, visible, filled = positions, real[:, None], None  # nothing precedes them: they see each other
    if cache is not None and packing is not None:
        filled = jnp.where(counts > 0, counts, cache.filled)
    elif cache is not None:
        lengths = filled = cache.filled + counts
        positions = cache.filled[:, None] + positions
        key_positions = jnp.arange(cache.keys[0].shape[1], dtype=jnp.int32)[None]
        visible = jnp.ones((len(real), 1, key_positions.shape[1]), bool)
    if causal:
        visible &= key_positions[:, None] <= positions[:, :, None]
    if window is not None:
        visible &= positions[:, :, None] - key_positions[:, None] < window
    return Places(
        mask=real if packing is None else packing.mask,
        positions=positions if packing is None else packing.pack(positions),
        visible=visible[:, None],
        lengths=lengths if causal and window is None else None,
        filled=filled,
        packing=packing,
    )


def _real_tokens(tokens: Int[Array, "rows columns"], mask, packing: Packing | None):
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
    """Writes the new keys and values into the slots of a cache, if there are any.

    Returns:
        The keys and values that the new tokens look at, and all slots (None if there are none).
    """
    if slots is not None:
        slots = tuple(_write(old, new, places) for old, new in zip(slots, (keys, values), strict=True))
        if places.packing is None:
            return slots, slots
    return tuple(padded(x, places.packing) for x in (keys, values)), slots


def _write(
    old: Float[Array, "batch slots heads head_dim"], new: Float[Array, "rows columns heads head_dim"], places: Places
) -> Float[Array, "batch slots heads head_dim"]:
    """SWrite. Padding is written nowhere, and neither is what comes behind the last slot.

    But a token of one row alone is always written: as padding to the slot behind the row's tokens (the last one, if
    the row is full), which nobody sees. XLA does that in one launch with what computes the token; where it may have to
    keep what is there, it takes two.
    """
    batch, slots = old.shape[:2]
    if batch == 1 and places.decoding and places.filled is not None:
        column = places.filled[0] - places.mask[0, 0].astype(jnp.int32)
        return lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), column, axis=1)
    nowhere = slots + jnp.arange(places.mask.size, dtype=jnp.int32).reshape(places.mask.shape)  # distinct there too
    column = jnp.where(places.mask, places.positions, nowhere)
    packing = places.packing
    row = jnp.arange(batch)[:, None] if packing is None else jnp.maximum(packing.segment_ids, 0)[None]
    return old.at[row, column].set(new, mode="drop", unique_indices=True)


def attend(
    q: Float[Array, "rows columns heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    places: Places,
    *,
    bias: Float[Array, "#batch heads length keys"] | None = None,
    scale: float | None = None,
    listed: Bool[Array, "batch kv_heads"] | None = None,
) -> Float[Array, "rows columns heads head_dim"]:
    """Softmax attention to the visible keys: by `decode_attention`, by cuDNN where lengths say which are, or by XLA.

    Args:
        q: queries of the new tokens, padded or packed.
        k: keys, of the padded batch or of all slots; heads share them where there are fewer.
        v: their values.
        places: of the new tokens.
        bias: added to the scores of the padded batch, in float32.
        scale: what scores are multiplied by; None for 1 / sqrt(head_dim).
        listed: while decoding, without a bias or a window: the heads whose keys and values are read, for each row; the
            others give zeros. None for all.

    Raises:
        ValueError: heads are listed elsewhere.
    """
    lengths = places.lengths if bias is None else None
    can_decode = places.decoding and lengths is not None
    if listed is not None and not can_decode:
        raise ValueError(LISTED_ELSEWHERE)
    if can_decode and (listed is not None or _kernel_takes(q, k)):
        return _decode(q, k, v, lengths, listed, scale)
    q = padded(q, places.packing)
    follow = places.filled is not None and places.packing is None  # what a cache holds
    if lengths is not None and not follow and _cudnn_takes(q):
        lengths = jnp.maximum(lengths, 1)  # of a sequence without tokens, one that nobody reads
        out = jax.nn.dot_product_attention(
            q,
            k,
            v,
            scale=distinct_call(q.shape[-1] ** -0.5 if scale is None else scale),
            is_causal=True,
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
            implementation="cudnn",
        )
    else:
        if follow:  # what nobody sees may be another text's, and not finite: of no weight is not enough
            seen = places.visible.any(axis=(1, 2))
            v = jnp.where(seen[:, :, None, None], v, 0)
        out = _masked_attention(q, k, v, places.visible, bias, scale)
    return out if places.packing is None else places.packing.pack(out)


def _cudnn_takes(q: Float[Array, "batch length heads head_dim"]) -> bool:
    """Whether cuDNN's flash attention is there for these queries."""
    head_dim = q.shape[-1]
    return q.dtype.itemsize == 2 and head_dim % 8 == 0 and head_dim <= 128 and device_kind().startswith(CUDNN_DEVICES)


def _kernel_takes(q: Float[Array, "batch 1 heads head_dim"], k: Float[Array, "batch slots kv_heads head_dim"]) -> bool:
    """Whether `decode_attention` has a kernel for these arguments on this device."""
    try:
        check_support(q[:, 0], k, DEVICES)
    except NotImplementedError:
        return False
    return True


def _decode(q, k, v, lengths, listed, scale: float | None) -> Float[Array, "batch 1 heads head_dim"]:
    """`decode_attention`, of listed heads or of all; where heads are cut over devices, each computes its own."""

    def of_heads(q, k, v, lengths, listed=None):
        lists = (None, None) if listed is None else compact(listed)
        return decode_attention(q[:, 0], k, v, lengths, *lists, scale=scale)[:, None]

    arguments = [q, k, v, lengths, *([] if listed is None else [listed])]
    mesh, axis = jax.sharding.get_abstract_mesh(), TENSOR_PARALLEL["heads"]
    if axis in mesh.axis_names and mesh.shape[axis] > 1 and k.shape[2] % mesh.shape[axis] == 0:
        cut, whole = PartitionSpec(None, None, axis), PartitionSpec()
        in_specs = (cut, cut, cut, whole, PartitionSpec(None, axis))[: len(arguments)]
        of_heads = jax.shard_map(of_heads, mesh=mesh, in_specs=in_specs, out_specs=cut)
    return of_heads(*arguments)


def attend_by_heads(
    x: Float[Array, "batch d_model"],
    w_q: Float[Array, "d_model width"],
    b_q: Float[Array, " width"],
    w_out: Float[Array, "width d_model"],
    k: Float[Array, "batch slots heads head_dim"],
    v: Float[Array, "batch slots heads head_dim"],
    places: Places,
    listed: Bool[Array, "batch heads"],
) -> Float[Array, "batch d_model"]:
    """Attention of one token a row by listed heads, from its input to its output without the bias: `attend` between.

    Of the projections of queries and of the output, the heads are read that any row lists. Those of keys and values
    are not among them: later tokens may list a head whose slots this one has to fill.

    Args:
        x: the block's input.
        w_q, b_q: projection of queries.
        w_out: projection of what the heads give.
        k: keys of all slots, the new ones too.
        v: their values.
        places: of the new tokens.
        listed: the heads of each row.

    Raises:
        ValueError: the tokens are not one a row behind a cache.
    """
    if not places.decoding or places.lengths is None:
        raise ValueError(LISTED_ELSEWHERE)

    def of_heads(x, w_q, b_q, w_out, k, v, lengths, listed):
        by_any = listed.any(axis=0)
        q = listed_matmul(x, w_q, by_any, "columns") + b_q[None]
        out = decode_attention(q.reshape(len(x), *k.shape[2:]), k, v, lengths, *compact(listed))
        return listed_matmul(out.reshape(len(x), -1), w_out, by_any, "rows")

    arrays = x, w_q, b_q, w_out, k, v, places.lengths, listed
    return sum_over_shards(of_heads, "heads", (None, 1, 0, 0, 2, 2, None, 1), *arrays)


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
