"""OPT: a decoder-only transformer with ReLU feed-forward blocks. Kept short on purpose; checkpoints: opt_checkpoint.py.

Parameters carry Hugging Face's names (`layers.0.self_attn.q_proj`), so a checkpoint needs no table of names. There is
no dropout. Source: Zhang et al., "OPT: Open Pre-trained Transformer Language Models" (2022), section 2 and table 1.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core.spmd import get_logical_axis_rules
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import gather_matmul, micro_tile_index
from pallas_kernels.micro_tile_index import ROWS

ACTIVATIONS = {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu}
DTYPES = ("bfloat16", "float16", "float32")
POSITION_OFFSET = 2  # the first two rows of the position table are padding's


@dataclasses.dataclass(frozen=True, kw_only=True)
class OPTConfig:
    """Sizes and choices of one OPT.

    Attributes:
        vocab_size: rows of the token embedding (50,265 tokens, padded).
        layers: decoder layers.
        d_model: width of the residual stream.
        heads: attention heads; must divide d_model.
        d_ff: neurons of a feed-forward block.
        embed_dim: width of the token embedding; None for d_model. Where it differs, two projections join them (350M).
        max_length: positions that were learned.
        pre_norm: layer norm before each block and a last one at the end; False (350M): after each block.
        activation: "relu", or "gelu" or "silu" for models that are to be ReLUfied.
        dtype: what is computed in: "bfloat16", "float16" or "float32". Logits are float32 always.
        param_dtype: what parameters are kept in.
        sparse_rows: tokens in a micro-tile of the feed-forward activation (1, 8, 16, 32, 64 or 128), to skip the
            neurons that no token of such a block activates; None multiplies densely.
        init_std: standard deviation of the initial weights; 0.006 is the paper's (section 2.2).
    """

    vocab_size: int = 50272
    layers: int
    d_model: int
    heads: int
    d_ff: int
    embed_dim: int | None = None
    max_length: int = 2048
    pre_norm: bool = True
    activation: str = "relu"
    dtype: str = "float32"
    param_dtype: str = "float32"
    sparse_rows: int | None = None
    init_std: float = 0.006

    def __post_init__(self):
        for name in ("vocab_size", "layers", "d_model", "heads", "d_ff", "max_length", "embed_dim"):
            size = getattr(self, name)
            if not (isinstance(size, int) and size >= 1) and (name, size) != ("embed_dim", None):
                raise ValueError(f"{name} must be an integer of at least 1; got {name}={size!r}")
        if self.d_model % self.heads:
            raise ValueError(f"heads must divide d_model; got heads={self.heads}, d_model={self.d_model}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {self.activation!r}")
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(f"{name} must be one of {', '.join(DTYPES)}; got {getattr(self, name)!r}")
        if self.sparse_rows is not None and self.sparse_rows not in ROWS:
            raise ValueError(f"sparse_rows must be None or one of {ROWS}; got sparse_rows={self.sparse_rows}")
        if self.sparse_rows is not None and self.activation != "relu":
            raise ValueError(f"sparse_rows needs exact zeros, so activation 'relu'; got {self.activation!r}")

    @classmethod
    def preset(cls, size: str, **overrides: Any) -> "OPTConfig":
        """The published configuration of a size ("125m", ..., "175b"), with fields replaced.

        Raises:
            ValueError: there is no such size.
        """
        if size not in PRESETS:
            raise ValueError(f"size must be one of {', '.join(PRESETS)}; got {size!r}")
        return cls(**(PRESETS[size] | overrides))


PRESETS: dict[str, dict[str, Any]] = {
    "125m": {"layers": 12, "d_model": 768, "heads": 12, "d_ff": 3072},
    "350m": {"layers": 24, "d_model": 1024, "heads": 16, "d_ff": 4096, "embed_dim": 512, "pre_norm": False},
    "1.3b": {"layers": 24, "d_model": 2048, "heads": 32, "d_ff": 8192},
    "2.7b": {"layers": 32, "d_model": 2560, "heads": 32, "d_ff": 10240},
    "6.7b": {"layers": 32, "d_model": 4096, "heads": 32, "d_ff": 16384},
    "13b": {"layers": 40, "d_model": 5120, "heads": 40, "d_ff": 20480},
    "30b": {"layers": 48, "d_model": 7168, "heads": 56, "d_ff": 28672},
    "66b": {"layers": 64, "d_model": 9216, "heads": 72, "d_ff": 36864},
    "175b": {"layers": 96, "d_model": 12288, "heads": 96, "d_ff": 49152},
}


class KVCache(NamedTuple):
    """Keys and values of the tokens so far, one array a layer, and which of its slots hold real tokens."""

    keys: tuple[Float[Array, "batch slots heads head_dim"], ...]
    values: tuple[Float[Array, "batch slots heads head_dim"], ...]
    mask: Bool[Array, "batch slots"]
    filled: Int[Array, ""]  # slots in use, the same for the whole batch


def _sharded(*axes: str) -> dict[str, Any]:
    # Inside sparsellm.sharding.create_model each parameter is cut as it is made; elsewhere its names only wait.
    return {"out_sharding": axes, "eager_sharding": bool(get_logical_axis_rules())}


def _linear(config: OPTConfig, in_out: tuple[int, int], axes: tuple[str, str], *, rngs, std=None, bias=True):
    return nnx.Linear(
        *in_out,
        use_bias=bias,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        kernel_init=nnx.initializers.normal(std or config.init_std),
        kernel_metadata=_sharded(*axes),
        bias_metadata=_sharded(axes[1]) if bias else {},
        rngs=rngs,
    )


def _output_std(config: OPTConfig) -> float:
    """Layers that write to the residual stream start smaller, by 1/sqrt(2 L) (the paper, section 2.2)."""
    return config.init_std / (2 * config.layers) ** 0.5


def _embed(config: OPTConfig, rows: int, features: int, axes: tuple[str, str], *, rngs):
    # Rows are looked up in the parameters' dtype and cast after: casting first would copy the whole table.
    return nnx.Embed(
        rows,
        features,
        dtype=jnp.dtype(config.param_dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        embedding_init=nnx.initializers.normal(config.init_std),
        embedding_metadata=_sharded(*axes),
        rngs=rngs,
    )


class LayerNorm(nnx.LayerNorm):
    """Layer norm in float32, whatever it is given and gives back."""

    def __init__(self, config: OPTConfig, *, rngs: nnx.Rngs):
        super().__init__(
            config.d_model,
            epsilon=1e-5,
            dtype=jnp.float32,
            param_dtype=jnp.dtype(config.param_dtype),
            use_fast_variance=False,
            scale_metadata=_sharded("embed"),
            bias_metadata=_sharded("embed"),
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "*tokens d_model"]) -> Float[Array, "*tokens d_model"]:
        return super().__call__(x).astype(x.dtype)


def _attend(q, k, v, visible):
    def library(q, k, v, visible):
        with jax.numpy_dtype_promotion("standard"):  # it promotes bfloat16 scores without saying so
            return jax.nn.dot_product_attention(q, k, v, mask=visible)

    def in_float32(q, k, v, visible):
        wide = [x.astype(jnp.float32) for x in (q, k, v)]
        return library(wide[0], wide[1], wide[2], visible).astype(q.dtype)

    if q.dtype == jnp.float16:  # of which XLA has no product on a CPU that accumulates in float32
        return lax.platform_dependent(q, k, v, visible, cpu=in_float32, default=library)
    return library(q, k, v, visible)


class Attention(nnx.Module):
    """Causal self-attention."""

    def __init__(self, config: OPTConfig, *, rngs: nnx.Rngs):
        square = (config.d_model, config.d_model)
        self.heads = config.heads
        self.q_proj = _linear(config, square, ("embed", "heads"), rngs=rngs)
        self.k_proj = _linear(config, square, ("embed", "heads"), rngs=rngs)
        self.v_proj = _linear(config, square, ("embed", "heads"), rngs=rngs)
        self.out_proj = _linear(config, square, ("heads", "embed"), std=_output_std(config), rngs=rngs)

    def __call__(self, x: Float[Array, "batch length d_model"], visible, slots, first_slot):
        """Attends from each token to the visible slots.

        Args:
            x: the tokens.
            visible: True where a token may look at a slot, [batch, 1, length, slots].
            slots: keys and values of a cache to write into, or None.
            first_slot: the slot of the first token.

        Returns:
            The output, and the keys and values of all slots.
        """
        q, k, v = (proj(x).reshape(*x.shape[:2], self.heads, -1) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if slots is not None:
            k = lax.dynamic_update_slice_in_dim(slots[0], k, first_slot, axis=1)
            v = lax.dynamic_update_slice_in_dim(slots[1], v, first_slot, axis=1)
        return self.out_proj(_attend(q, k, v, visible).reshape(x.shape)), (k, v)


class DecoderLayer(nnx.Module):
    """Attention, then a feed-forward block, each around a residual."""

    def __init__(self, config: OPTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.self_attn = Attention(config, rngs=rngs)
        self.self_attn_layer_norm = LayerNorm(config, rngs=rngs)
        self.fc1 = _linear(config, (config.d_model, config.d_ff), ("embed", "ffn"), rngs=rngs)
        self.fc2 = _linear(config, (config.d_ff, config.d_model), ("ffn", "embed"), std=_output_std(config), rngs=rngs)
        self.final_layer_norm = LayerNorm(config, rngs=rngs)

    def __call__(self, x: Float[Array, "batch length d_model"], mask, visible, slots, first_slot):
        """Returns the layer's output, and the keys and values of all slots."""
        pre_norm = self.config.pre_norm
        y, slots = self.self_attn(self.self_attn_layer_norm(x) if pre_norm else x, visible, slots, first_slot)
        x = x + y if pre_norm else self.self_attn_layer_norm(x + y)
        y = self.feed_forward(self.final_layer_norm(x) if pre_norm else x, mask)
        x = x + y if pre_norm else self.final_layer_norm(x + y)
        return x, slots

    def feed_forward(self, x: Float[Array, "batch length d_model"], mask: Bool[Array, "batch length"]):
        """fc2(activation(fc1(x))). Padding activates no neuron, so that it makes no micro-tile live."""
        activate = ACTIVATIONS[self.config.activation]
        rows = self.config.sparse_rows
        if rows is None:
            h = jnp.where(mask[..., None], activate(self.fc1(x)), 0)
            self._capture(h.reshape(-1, h.shape[-1]))
            return self.fc2(h)
        w1, b1, w2, b2 = (
            jnp.asarray(w, x.dtype) for w in (self.fc1.kernel, self.fc1.bias, self.fc2.kernel, self.fc2.bias)
        )
        # fc1 straight into k-major, [d_ff, tokens]: a neuron's values for the tokens of a micro-tile lie together.
        h_t = activate(jnp.einsum("td,df->ft", x.reshape(-1, x.shape[-1]), w1) + b1[:, None])
        h_t = jnp.where(mask.reshape(1, -1), h_t, 0)
        self._capture(h_t.T)
        out = gather_matmul(h_t, w2, micro_tile_index(lax.stop_gradient(h_t), rows=rows), zero_elsewhere=True)
        return out.reshape(x.shape) + b2[None, None]

    def _capture(self, activation: Float[Array, "tokens d_ff"]) -> None:
        if hasattr(self, "__captures__"):  # inside nnx.capture; elsewhere `sow` warns and would change the module
            self.sow(nnx.Intermediate, "ffn_activation", activation)


class OPT(nnx.Module):
    """The language model.

    The feed-forward activations of layer i, [tokens, d_ff], zero at padding, are captured as
    `captured["layers"][i]["ffn_activation"][0]` by
    `logits, captured = nnx.capture(model, nnx.Intermediate)(tokens)`.
    """

    def __init__(self, config: OPTConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.embed_dim or config.d_model
        self.embed_tokens = _embed(config, config.vocab_size, width, ("vocab", "embed"), rngs=rngs)
        positions = config.max_length + POSITION_OFFSET
        self.embed_positions = _embed(config, positions, config.d_model, ("positions", "embed"), rngs=rngs)
        self.layers = nnx.List([DecoderLayer(config, rngs=rngs) for _ in range(config.layers)])
        if config.pre_norm:
            self.final_layer_norm = LayerNorm(config, rngs=rngs)
        if width != config.d_model:
            self.project_in = _linear(config, (width, config.d_model), ("embed", "embed_out"), bias=False, rngs=rngs)
            self.project_out = _linear(config, (config.d_model, width), ("embed", "embed_out"), bias=False, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        *,
        mask: Bool[Array, "batch length"] | None = None,
        cache: KVCache | None = None,
    ):
        """Logits of the token after each token.

        Args:
            tokens: token ids; one outside the vocabulary gives NaN.
            mask: True for real tokens, False for padding on either side; None if all are real. Logits at padding mean
                nothing. A row with more real tokens than `max_length` gives NaN: the mask is data, so no error.
            cache: what `init_cache` or the last call returned; `tokens` go into its next slots. Slots past its end
                are not checked: the caller keeps count.

        Returns:
            Logits, float32 [batch, length, vocab]; with a cache, the pair of logits and the new cache.

        Raises:
            ValueError: there are more tokens than positions, and no mask.
        """
        hidden, new_cache = self.hidden_states(tokens, mask=mask, cache=cache)
        logits = self.logits(hidden)
        return logits if cache is None else (logits, new_cache)

    def hidden_states(
        self,
        tokens: Int[Array, "batch length"],
        *,
        mask: Bool[Array, "batch length"] | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "batch length d_model"], KVCache | None]:
        """What `logits` turns into logits, and the new cache; arguments as of a call."""
        if mask is None:
            if tokens.shape[1] > self.config.max_length:
                raise ValueError(f"length must be at most max_length={self.config.max_length}; got {tokens.shape[1]}")
            mask = jnp.ones(tokens.shape, bool)
        earlier, first_slot, slot_mask = 0, 0, mask
        if cache is not None:
            earlier, first_slot = cache.mask.sum(axis=1, keepdims=True), cache.filled
            slot_mask = lax.dynamic_update_slice_in_dim(cache.mask, mask, first_slot, axis=1)
        # Positions count real tokens, so padding on the left shifts nothing.
        positions = jnp.where(mask, earlier + jnp.cumsum(mask, axis=1) - 1 + POSITION_OFFSET, 0)
        token_slots = first_slot + jnp.arange(tokens.shape[1])
        causal = jnp.arange(slot_mask.shape[1])[None] <= token_slots[:, None]
        visible = slot_mask[:, None, None] & causal[None, None]

        dtype = jnp.dtype(self.config.dtype)
        x = self.embed_tokens(tokens).astype(dtype)
        x = self.project_in(x) if hasattr(self, "project_in") else x
        x = x + self.embed_positions(positions).astype(dtype)
        keys_values = []
        for i, layer in enumerate(self.layers):
            slots = None if cache is None else (cache.keys[i], cache.values[i])
            x, slots = layer(x, mask, visible, slots, first_slot)
            keys_values.append(slots)
        x = self.final_layer_norm(x) if self.config.pre_norm else x
        if cache is None:
            return x, None
        keys, values = zip(*keys_values, strict=True)
        return x, KVCache(keys, values, slot_mask, cache.filled + tokens.shape[1])

    def logits(self, hidden: Float[Array, "*tokens d_model"]) -> Float[Array, "*tokens vocab"]:
        """Hidden states times the (tied) token embedding, in float32."""
        hidden = self.project_out(hidden) if hasattr(self, "project_out") else hidden
        embedding = self.embed_tokens.embedding[...].astype(hidden.dtype)
        return jnp.einsum("...d,vd->...v", hidden, embedding, preferred_element_type=jnp.float32)

    def init_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache of `length` slots for each of `batch` sequences."""
        config = self.config
        shape = (batch, length, config.heads, config.d_model // config.heads)
        keys, values = (tuple(jnp.zeros(shape, config.dtype) for _ in range(config.layers)) for _ in range(2))
        return KVCache(keys, values, jnp.zeros((batch, length), bool), jnp.int32(0))
