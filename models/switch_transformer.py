"""Switch Transformer: T5 with a mixture of experts in every second block. Sizes: switch_config.py.

There is no dropout and no router jitter. Sources: Fedus et al., "Switch Transformers: Scaling to Trillion Parameter
Models with Simple and Efficient Sparsity" (2021), section 2; Raffel et al., "Exploring the Limits of Transfer Learning
with a Unified Text-to-Text Transformer" (2020), section 2.1, for everything but the experts.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from models.attention import KVCache, Places, attend, padded, place_tokens, run_layers, write_slots
from models.layers import RMSNorm, embed, linear, vocabulary_logits
from models.switch_config import SwitchConfig
from sparsellm.mixture_of_experts import LinearRouter, MixtureOfExperts, RouterRule
from sparsellm.packing import Packing


class Memory(NamedTuple):
    """What the decoder reads of the encoder's output: keys and values, one array a decoder layer."""

    keys: tuple[Float[Array, "batch length heads head_dim"], ...]
    values: tuple[Float[Array, "batch length heads head_dim"], ...]
    mask: Bool[Array, "batch length"]


class Generation(NamedTuple):
    """What is kept between the tokens of a text."""

    memory: Memory
    cache: KVCache


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Unread:
    """The cache before a prompt: room for so many tokens, prompt included."""

    length: int


def _initializer(scale: float, **axes: Any) -> nnx.Initializer:
    return nnx.initializers.variance_scaling(scale, "fan_in", "truncated_normal", **axes)


def relative_position_buckets(
    distance: Int[Array, "*batch queries keys"], *, buckets: int, max_distance: int, bidirectional: bool
) -> Int[Array, "*batch queries keys"]:
    """The bucket of each distance (key's position minus query's): one a token nearby, then logarithmically wider ones.

    Source: Raffel et al. (2020), section 2.1, as in mesh_tensorflow's transformer_layers.py.
    """
    one_way = buckets // 2 if bidirectional else buckets
    exact = one_way // 2
    # The table is made on the host: a logarithm that is one bit off on some device would change a bucket.
    lengths = np.arange(max_distance + 1)
    octaves = np.log(np.maximum(lengths, exact) / exact) / np.log(max_distance / exact)
    wide = np.minimum(exact + (octaves * (one_way - exact)).astype(np.int32), one_way - 1)
    table = jnp.asarray(np.where(lengths < exact, lengths, wide), jnp.int32)
    length = jnp.abs(distance) if bidirectional else jnp.maximum(-distance, 0)
    bucket = table[jnp.minimum(length, max_distance)]
    return jnp.where(distance > 0, bucket + one_way, bucket) if bidirectional else bucket


class Attention(nnx.Module):
    """Attention without biases or a scale of its scores (the initial queries are small instead)."""

    def __init__(self, config: SwitchConfig, *, rngs: nnx.Rngs):
        self.heads = config.heads
        width, init = config.heads * config.head_dim, _initializer(config.init_scale)
        small = _initializer(config.init_scale / config.head_dim)
        self.q = linear(config, (config.d_model, width), ("embed", "heads"), init=small, rngs=rngs)
        self.k = linear(config, (config.d_model, width), ("embed", "heads"), init=init, rngs=rngs)
        self.v = linear(config, (config.d_model, width), ("embed", "heads"), init=init, rngs=rngs)
        self.o = linear(config, (width, config.d_model), ("heads", "embed"), init=init, rngs=rngs)

    def keys_values(self, x: Float[Array, "batch length d_model"]):
        """The keys and the values of tokens, each [batch, length, heads, head_dim]."""
        return self._split(self.k(x)), self._split(self.v(x))

    def __call__(self, x: Float[Array, "batch length d_model"], keys, values, places: Places, bias=None):
        """Attends from each token to the visible keys; `bias`, [1, heads, length, keys], is added to the scores."""
        out = attend(self._split(self.q(x)), keys, values, places, bias=bias, scale=1.0)
        return self.o(out.reshape(*x.shape[:2], -1))

    def _split(self, x):
        return x.reshape(*x.shape[:2], self.heads, -1)


class FeedForward(nnx.Module):
    """wo(relu(wi(x)))."""

    def __init__(self, config: SwitchConfig, *, rngs: nnx.Rngs):
        init = _initializer(config.init_scale)
        self.wi = linear(config, (config.d_model, config.d_ff), ("embed", "ffn"), init=init, rngs=rngs)
        self.wo = linear(config, (config.d_ff, config.d_model), ("ffn", "embed"), init=init, rngs=rngs)

    def __call__(self, x: Float[Array, "batch length d_model"], places: Places):
        """Padding is fed forward too: what becomes of it is read by nobody."""
        return self.wo(jax.nn.relu(self.wi(x)))


class Experts(MixtureOfExperts):
    """One such block for each expert, of which a token goes to one; weighted by its router probability."""

    def __init__(self, config: SwitchConfig, *, rngs: nnx.Rngs):
        limited = config.capacity == "per_sequence"
        rule = RouterRule(top_k=1, expert_capacity=config.expert_capacity if limited else None, per_sequence=limited)
        param_dtype = jnp.dtype(config.param_dtype)
        super().__init__(
            config.d_model,
            config.d_ff,
            LinearRouter(config.d_model, config.experts, rule, param_dtype=param_dtype, rngs=rngs),
            activation="relu",
            dtype=jnp.dtype(config.dtype),
            param_dtype=param_dtype,
            kernel_init=_initializer(config.init_scale, batch_axis=0),
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "batch length d_model"], places: Places):
        """Tokens that find their expert full pass it by, weighted all the same."""
        if self.router.rule.expert_capacity is None:
            return super().__call__(x, places.mask)
        # The capacity is that of a sequence, and so of a row of the padded batch.
        rows = padded(x, places.packing)
        router = self.route(rows, padded(places.mask, places.packing))
        y = self.apply_experts(rows, router)
        weights = jnp.where(router.mask[:, None] & ~router.kept, router.weights, 0).reshape(*rows.shape[:2], 1)
        y += (weights * rows.astype(jnp.float32)).astype(y.dtype)
        return y if places.packing is None else places.packing.pack(y)


class Block(nnx.Module):
    """Self-attention, in the decoder cross-attention, and a feed-forward block, each around a residual."""

    def __init__(self, config: SwitchConfig, *, decoder: bool, sparse: bool, rngs: nnx.Rngs):
        self.self_attn = Attention(config, rngs=rngs)
        self.self_attn_layer_norm = RMSNorm(config, epsilon=config.norm_epsilon, rngs=rngs)
        if decoder:
            self.cross_attn = Attention(config, rngs=rngs)
            self.cross_attn_layer_norm = RMSNorm(config, epsilon=config.norm_epsilon, rngs=rngs)
        self.mlp = (Experts if sparse else FeedForward)(config, rngs=rngs)
        self.mlp_layer_norm = RMSNorm(config, epsilon=config.norm_epsilon, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch length d_model"],
        places: Places,
        bias,
        *,
        slots=None,
        memory=None,
    ):
        """One block.

        Args:
            x: the tokens.
            places: where they stand.
            bias: of the scores of self-attention, [#batch, heads, length, keys].
            slots: keys and values of a cache to write into, or None.
            memory: the encoder's keys, values and mask, in the decoder.

        Returns:
            The output, and the keys and values of all slots.
        """
        normed = self.self_attn_layer_norm(x)
        (keys, values), slots = write_slots(slots, *self.self_attn.keys_values(normed), places)
        x = x + self.self_attn(normed, keys, values, places, bias)
        if memory is not None:
            keys, values, encoder_mask = memory
            read = places._replace(visible=encoder_mask[:, None, None], lengths=None)
            x = x + self.cross_attn(self.cross_attn_layer_norm(x), keys, values, read)
        return x + self.mlp(self.mlp_layer_norm(x), places), slots


class Stack(nnx.Module):
    """The blocks of the encoder or the decoder, and what they share."""

    def __init__(self, config: SwitchConfig, *, decoder: bool, rngs: nnx.Rngs):
        self.config, self.decoder = config, decoder
        layers = config.decoder_layers if decoder else config.encoder_layers
        step = config.decoder_sparse_step if decoder else config.encoder_sparse_step
        init = nnx.initializers.normal(config.d_model**-0.5)
        table = (config.position_buckets, config.heads)
        self.relative_attention_bias = embed(
            config, *table, ("buckets", "bias_heads"), init=init, dtype=config.param_dtype, rngs=rngs
        )
        self.block = nnx.List(
            [Block(config, decoder=decoder, sparse=step > 0 and i % step == 1 % step, rngs=rngs) for i in range(layers)]
        )
        self.final_layer_norm = RMSNorm(config, epsilon=config.norm_epsilon, rngs=rngs)

    def position_bias(self, queries: Int[Array, "#batch length"], keys: Int[Array, " keys"]):
        """What the distance between two positions adds to the scores, float32 [#batch, heads, length, keys]."""
        buckets = relative_position_buckets(
            keys[None, None] - queries[:, :, None],
            buckets=self.config.position_buckets,
            max_distance=self.config.max_distance,
            bidirectional=not self.decoder,
        )
        return jnp.moveaxis(self.relative_attention_bias(buckets).astype(jnp.float32), -1, 1)


class SwitchTransformer(nnx.Module):
    """The encoder-decoder.

    `sparsellm.generation.generate(model, prompts, max_new_tokens=..., eos_id=1)` encodes the prompts and decodes
    from the start token on.

    What the routers decided is captured; both auxiliary losses are made of it:
        logits, captured = nnx.capture(model, nnx.Intermediate)(tokens, decoder_tokens)
        loss = cross_entropy(logits) + 0.01 * load_balance_loss(captured) + 0.001 * z_loss(captured)
    """

    def __init__(self, config: SwitchConfig, *, rngs: nnx.Rngs):
        self.config = config
        init = nnx.initializers.normal(1.0)
        self.shared = embed(config, config.vocab_size, config.d_model, ("vocab", "embed"), init=init, rngs=rngs)
        self.encoder = Stack(config, decoder=False, rngs=rngs)
        self.decoder = Stack(config, decoder=True, rngs=rngs)
        if not config.tied:
            size, init = (config.d_model, config.vocab_size), _initializer(config.init_scale)
            self.lm_head = linear(config, size, ("embed", "vocab"), init=init, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        decoder_tokens: Int[Array, "rows decoder_length"],
        *,
        mask: Bool[Array, "batch length"] | None = None,
        decoder_mask: Bool[Array, "rows decoder_length"] | None = None,
        packing: Packing | None = None,
        decoder_packing: Packing | None = None,
    ) -> Float[Array, "rows decoder_length vocab"]:
        """Logits of the token after each of the decoder's tokens, float32.

        Args:
            tokens: what the encoder reads; a token outside the vocabulary gives NaN, or, under no trace, the first
                router's error.
            decoder_tokens: the text so far, `config.start_id` first.
            mask: True for real tokens, False for padding on either side; None if all are real.
            decoder_mask: the same for the decoder. Logits at padding mean nothing.
            packing: where `tokens` belong if they are a packed batch, [1, packed]: see `sparsellm.packing.pack`.
            decoder_packing: the same for the decoder, of as many sequences.

        Raises:
            ValueError: there are both a mask and a packing, tokens are not the packing's, or, under no trace, router
                logits are NaN.
        """
        memory = self.memory(self.encode(tokens, mask=mask, packing=packing), mask=mask, packing=packing)
        return self.logits(self.decode(decoder_tokens, memory, mask=decoder_mask, packing=decoder_packing)[0])

    def encode(
        self,
        tokens: Int[Array, "batch length"],
        *,
        mask: Bool[Array, "batch length"] | None = None,
        packing: Packing | None = None,
    ) -> Float[Array, "batch length d_model"]:
        """The encoder's output; arguments as of a call."""
        places = place_tokens(tokens, mask, packing, causal=False)
        columns = jnp.arange(places.visible.shape[-1])
        bias = self.encoder.position_bias(columns[None], columns)
        x = self.shared(tokens)
        for block in self.encoder.block:
            x, _ = block(x, places, bias)
        return self.encoder.final_layer_norm(x)

    def memory(
        self,
        encoded: Float[Array, "rows columns d_model"],
        *,
        mask: Bool[Array, "rows columns"] | None = None,
        packing: Packing | None = None,
    ) -> Memory:
        """The keys and values that every layer of the decoder makes of the encoder's output, once for a whole text."""
        if packing is not None:
            mask = packing.padded_mask
        elif mask is None:
            mask = jnp.ones(encoded.shape[:2], bool)
        made = (block.cross_attn.keys_values(encoded) for block in self.decoder.block)
        keys, values = zip(*(tuple(padded(x, packing) for x in layer) for layer in made), strict=True)
        return Memory(keys, values, mask)

    def decode(
        self,
        tokens: Int[Array, "batch length"],
        memory: Memory,
        *,
        mask: Bool[Array, "batch length"] | None = None,
        packing: Packing | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "batch length d_model"], Any]:
        """What `logits` turns into logits, and the cache with these tokens in it, if there is one.

        Args:
            tokens: the decoder's tokens.
            memory: what `memory` returned.
            mask: as `decoder_mask` of a call.
            packing: as `decoder_packing` of a call.
            cache: what `init_decoder_cache` or the last call returned; `tokens` go into its next slots. Slots past its
                end are not checked: the caller keeps count.
        """
        places = place_tokens(tokens, mask, packing, cache)
        length, keys = places.visible.shape[2:]
        follow = cache is not None and packing is None  # else they see each other, by their columns
        queries = places.positions if follow else jnp.arange(length)[None]
        bias = self.decoder.position_bias(queries, jnp.arange(keys))
        x = self.shared(tokens)

        def layer(i, x, slots):
            read = (memory.keys[i], memory.values[i], memory.mask)
            return self.decoder.block[i](x, places, bias, slots=slots, memory=read)

        x, new_cache = run_layers(layer, len(self.decoder.block), x, places, cache)
        return self.decoder.final_layer_norm(x), new_cache

    def logits(self, hidden: Float[Array, "*tokens d_model"]) -> Float[Array, "*tokens vocab"]:
        """Hidden states times the output projection, in float32."""
        if self.config.tied:
            hidden = hidden * jnp.asarray(self.config.d_model**-0.5, hidden.dtype)
            weight = self.shared.embedding[...].astype(hidden.dtype).T
        else:
            weight = self.lm_head.kernel[...].astype(hidden.dtype)
        return vocabulary_logits(hidden, weight.T)

    def init_decoder_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache of `length` slots for each of `batch` sequences of the decoder."""
        c = self.config
        return KVCache.empty(batch, length, layers=c.decoder_layers, heads=c.heads, head_dim=c.head_dim, dtype=c.dtype)

    def init_cache(self, batch: int, length: int) -> Unread:
        """For `generate`: a cache for `length` tokens, prompt included."""
        return Unread(length)

    def hidden_states(
        self,
        tokens: Int[Array, "batch length"],
        *,
        mask: Bool[Array, "batch length"] | None = None,
        packing: Packing | None = None,
        cache: Unread | Generation | None = None,
    ) -> tuple[Float[Array, "batch decoder_length d_model"], Generation]:
        """For `generate`: the first call reads the prompts, and gives for each of their tokens what follows the start
        token; others decode."""
        if isinstance(cache, Generation):
            hidden, decoder_cache = self.decode(tokens, cache.memory, mask=mask, cache=cache.cache)
            return hidden, Generation(cache.memory, decoder_cache)
        batch, length = (packing.batch, packing.length) if packing is not None else tokens.shape
        memory = self.memory(self.encode(tokens, mask=mask, packing=packing), mask=mask, packing=packing)
        # The prompt is the encoder's: the decoder needs a slot for the start token instead.
        decoder_cache = self.init_decoder_cache(batch, 1 + (cache.length - length if cache else 0))
        start = jnp.full((batch, 1), self.config.start_id, jnp.int32)
        hidden, decoder_cache = self.decode(start, memory, cache=decoder_cache)
        if packing is not None:
            hidden = packing.pack(jnp.broadcast_to(hidden, (batch, length, hidden.shape[-1])))
        return hidden, Generation(memory, decoder_cache)
