"""Mixtral: a decoder-only transformer whose every feed-forward block is a mixture of gated experts.

Parameters carry Hugging Face's names, but for the experts' (`layers.0.block_sparse_moe.wi` holds all of w1 and w3);
checkpoints: mixtral_checkpoint.py. Source: Jiang et al., "Mixtral of Experts" (2024), section 2 and table 1.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from models.attention import KVCache, Places, attend, place_tokens, run_layers, write_slots
from models.config import check_dtypes, check_sizes, normalise
from models.layers import RMSNorm, embed, linear, vocabulary_logits
from sparsellm.mixture_of_experts import LinearRouter, MixtureOfExperts, RouterRule
from sparsellm.packing import Packing
from sparsellm.unstructured import apply_all


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtralConfig:
    """Sizes and choices of one Mixtral.

    Attributes:
        vocab_size: rows of the token embedding.
        layers: decoder layers.
        d_model: width of the residual stream.
        heads: attention heads.
        kv_heads: heads of keys and values, each shared by heads / kv_heads heads.
        head_dim: width of a head, even; None for d_model / heads.
        d_ff: neurons of an expert.
        experts: experts of a layer.
        top_k: experts that a token goes to.
        max_length: positions it was trained on.
        sliding_window: a token attends to so many tokens, itself and the last ones before it; None for all.
        rope_theta: base of the rotary embedding's wavelengths.
        norm_epsilon: added to the mean square in RMS norm.
        dtype: what is computed in: "bfloat16", "float16" or "float32". Logits are float32 always, as are norms, rotary
            embeddings and routers.
        param_dtype: what parameters are kept in.
        implementation: of the experts' kernels, as for `MixtureOfExperts`.
        init_std: standard deviation of the initial weights.
    """

    vocab_size: int = 32000
    layers: int
    d_model: int
    heads: int
    kv_heads: int
    head_dim: int | None = None
    d_ff: int
    experts: int = 8
    top_k: int = 2
    max_length: int = 32768
    sliding_window: int | None = None
    rope_theta: float = 1e6
    norm_epsilon: float = 1e-5
    dtype: str = "float32"
    param_dtype: str = "float32"
    implementation: str | None = None
    init_std: float = 0.02

    def __post_init__(self):
        normalise(self)
        sizes = ("vocab_size", "layers", "d_model", "heads", "kv_heads", "d_ff", "experts", "top_k", "max_length")
        optional = [name for name in ("head_dim", "sliding_window") if getattr(self, name) is not None]
        check_sizes(self, *sizes, *optional)
        check_dtypes(self)
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads; got kv_heads={self.kv_heads}, heads={self.heads}")
        if self.head_dim is None and self.d_model % self.heads:
            raise ValueError(f"heads must divide d_model; got heads={self.heads}, d_model={self.d_model}")
        if self.head_width % 2:
            raise ValueError(f"head_dim must be even, as rotations are of pairs; got head_dim={self.head_width}")
        if self.top_k > self.experts:
            raise ValueError(f"top_k must be at most experts; got top_k={self.top_k}, experts={self.experts}")
        for name in ("rope_theta", "norm_epsilon"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive and finite; got {name}={getattr(self, name)}")

    @property
    def head_width(self) -> int:
        """`head_dim`, or what follows from the other sizes."""
        return self.head_dim or self.d_model // self.heads

    @classmethod
    def preset(cls, size: str, **overrides: Any) -> "MixtralConfig":
        """The published configuration of a size ("8x7b", "8x22b"; "tiny" for trying out), with fields replaced.

        Raises:
            ValueError: there is no such size.
        """
        if size not in PRESETS:
            raise ValueError(f"size must be one of {', '.join(PRESETS)}; got {size!r}")
        return cls(**(PRESETS[size] | overrides))


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 512, "layers": 2, "d_model": 64, "heads": 4, "kv_heads": 2, "d_ff": 128, "max_length": 256},
    "8x7b": {"layers": 32, "d_model": 4096, "heads": 32, "kv_heads": 8, "d_ff": 14336},
    "8x22b": {"layers": 56, "d_model": 6144, "heads": 48, "kv_heads": 8, "d_ff": 16384, "max_length": 65536},
}


def rotate(
    x: Float[Array, "batch length heads head_dim"], positions: Int[Array, "batch length"], theta: float
) -> Float[Array, "batch length heads head_dim"]:
    """Rotary position embedding: turns the pair (x[i], x[i + head_dim/2]) by position * theta^(-2 i / head_dim).

    Source: Su et al., "RoFormer" (2021), section 3.2.2; the halves as Hugging Face's checkpoints have them.
    """
    half = x.shape[-1] // 2
    frequency = jnp.asarray(theta ** (-np.arange(half) / half), jnp.float32)
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Causal self-attention with grouped queries and rotary positions."""

    def __init__(self, config: MixtralConfig, *, rngs: nnx.Rngs):
        self.config = config
        q, kv = config.heads * config.head_width, config.kv_heads * config.head_width
        self.q_proj = linear(config, (config.d_model, q), ("embed", "heads"), rngs=rngs)
        self.k_proj = linear(config, (config.d_model, kv), ("embed", "heads"), rngs=rngs)
        self.v_proj = linear(config, (config.d_model, kv), ("embed", "heads"), rngs=rngs)
        self.o_proj = linear(config, (q, config.d_model), ("heads", "embed"), rngs=rngs)

    def __call__(self, x: Float[Array, "batch length d_model"], places: Places, slots):
        """Attends from each token to the visible slots; returns the output, and keys and values of all slots."""
        q, k, v = (
            y.reshape(*x.shape[:2], -1, self.config.head_width)
            for y in apply_all((self.q_proj, self.k_proj, self.v_proj), x)
        )
        q, k = (rotate(x, places.positions, self.config.rope_theta) for x in (q, k))
        (k, v), slots = write_slots(slots, k, v, places)
        return self.o_proj(attend(q, k, v, places).reshape(*x.shape[:2], -1)), slots


class DecoderLayer(nnx.Module):
    """Attention, then the experts, each around a residual."""

    def __init__(self, config: MixtralConfig, *, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config, epsilon=config.norm_epsilon, rngs=rngs)
        self.self_attn = Attention(config, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config, epsilon=config.norm_epsilon, rngs=rngs)
        rule = RouterRule(top_k=config.top_k, weights="softmax", renormalise=True)
        param_dtype = jnp.dtype(config.param_dtype)
        self.block_sparse_moe = MixtureOfExperts(
            config.d_model,
            config.d_ff,
            LinearRouter(config.d_model, config.experts, rule, param_dtype=param_dtype, rngs=rngs),
            activation="silu",
            gated=True,
            dtype=jnp.dtype(config.dtype),
            param_dtype=param_dtype,
            kernel_init=nnx.initializers.normal(config.init_std),
            implementation=config.implementation,
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "batch length d_model"], places: Places, slots):
        """Returns the layer's output, and the keys and values of all slots."""
        y, slots = self.self_attn(self.input_layernorm(x), places, slots)
        x = x + y
        return x + self.block_sparse_moe(self.post_attention_layernorm(x), places.mask), slots


class Mixtral(nnx.Module):
    """The language model.

    What the router of layer i decided is captured: `captured["layers"][i]["block_sparse_moe"]["router"][0]` by
    `logits, captured = nnx.capture(model, nnx.Intermediate)(tokens)`, and `load_balance_loss(captured)` finds them all.
    """

    def __init__(self, config: MixtralConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = embed(config, config.vocab_size, config.d_model, ("vocab", "embed"), rngs=rngs)
        self.layers = nnx.List([DecoderLayer(config, rngs=rngs) for _ in range(config.layers)])
        self.norm = RMSNorm(config, epsilon=config.norm_epsilon, rngs=rngs)
        self.lm_head = linear(config, (config.d_model, config.vocab_size), ("embed", "vocab"), rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        *,
        mask: Bool[Array, "batch length"] | None = None,
        packing: Packing | None = None,
        cache: KVCache | None = None,
    ):
        """Logits of the token after each token.

        Args:
            tokens: token ids; one outside the vocabulary gives NaN, or, under no trace, the first router's error.
            mask: True for real tokens, False for padding on either side, which goes to no expert; None if all are
                real. Logits at padding mean nothing.
            packing: where `tokens` belong if they are a packed batch, [1, packed], as logits then are: see
                `sparsellm.packing.pack`.
            cache: what `init_cache` or the last call returned; `tokens` go into its next slots. Slots past its end
                are not checked: the caller keeps count.

        Returns:
            Logits, float32 [batch, length, vocab]; with a cache, the pair of logits and the new cache.

        Raises:
            ValueError: there are more tokens than positions, and no mask; a mask and a packing; or, under no trace, NaN
                router logits.
        """
        hidden, new_cache = self.hidden_states(tokens, mask=mask, packing=packing, cache=cache)
        logits = self.logits(hidden)
        return logits if cache is None else (logits, new_cache)

    def hidden_states(
        self,
        tokens: Int[Array, "batch length"],
        *,
        mask: Bool[Array, "batch length"] | None = None,
        packing: Packing | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "batch length d_model"], KVCache | None]:
        """What `logits` turns into logits, and the new cache; arguments as of a call."""
        if mask is None and packing is None and tokens.shape[1] > self.config.max_length:
            raise ValueError(f"length must be at most max_length={self.config.max_length}; got {tokens.shape[1]}")
        places = place_tokens(tokens, mask, packing, cache, window=self.config.sliding_window)
        x = self.embed_tokens(tokens)
        layer = lambda i, x, slots: self.layers[i](x, places, slots)  # noqa: E731
        x, new_cache = run_layers(layer, len(self.layers), x, places, cache)
        x = self.norm(x)
        return x, None if cache is None else new_cache

    def logits(self, hidden: Float[Array, "*tokens d_model"]) -> Float[Array, "*tokens vocab"]:
        """Hidden states times the output projection, in float32."""
        kernel = self.lm_head.kernel[...].astype(hidden.dtype)
        return vocabulary_logits(hidden, kernel.T)

    def init_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache of `length` slots for each of `batch` sequences."""
        config = self.config
        return KVCache.empty(
            batch,
            length,
            layers=config.layers,
            heads=config.kv_heads,
            head_dim=config.head_width,
            dtype=config.dtype,
        )
