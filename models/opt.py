"""OPT: a decoder-only transformer with ReLU feed-forward blocks. Kept short on purpose; checkpoints: opt_checkpoint.py.

Parameters carry Hugging Face's names (`layers.0.self_attn.q_proj`), so a checkpoint needs no table of names.
Source: Zhang et al., "OPT: Open Pre-trained Transformer Language Models" (2022), section 2 and table 1.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from models.attention import KVCache, Places, attend, attend_by_heads, place_tokens, run_layers, write_slots
from models.feed_forward import LISTED, PREDICTIONS, FeedForward, NeuronMajorLinear, Prediction, output_init
from models.layer_norm import LayerNorm
from models.layers import embed, linear, vocabulary_logits
from models.opt_config import OPTConfig
from sparsellm.packing import Packing
from sparsellm.predictors import Predictor
from sparsellm.unstructured import apply_all

POSITION_OFFSET = 2  # the first two rows of the position table are padding's


class Attention(nnx.Module):
    """Causal self-attention, while decoding by the heads that a predictor names, if there is one.

    Of the others no keys and values are read, and their output is zero. What no row of the batch needs of the
    projections of queries and of the output is not read either, if they are large enough for that to pay (from OPT-13B
    on: see `listed_matmul`). Keys and values are computed of all heads: a later token may need them.
    """

    def __init__(self, config: OPTConfig, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        width = heads * (config.d_model // config.heads)
        into, out = (config.d_model, width), (width, config.d_model)
        self.q_proj = linear(config, into, ("embed", "heads"), bias=True, rngs=rngs)
        self.k_proj = linear(config, into, ("embed", "heads"), bias=True, rngs=rngs)
        self.v_proj = linear(config, into, ("embed", "heads"), bias=True, rngs=rngs)
        self.out_proj = linear(config, out, ("heads", "embed"), init=output_init(config), bias=True, rngs=rngs)
        self.predictor: Predictor | None = nnx.data(None)
        self.prediction: Prediction = "lists"

    def __call__(self, x: Float[Array, "batch length d_model"], places: Places, slots, entered=(None, None)):
        """Attends from each token to the visible slots.

        Args:
            x: the tokens.
            places: where they stand.
            slots: keys and values of a cache to write into, or None.
            entered: what entered the layer before, which a predictor that looks ahead reads, and this one.

        Returns:
            The output, and the keys and values of all slots.
        """
        needed = self._predicted(places, *entered)
        listed = needed[:, 0] if needed is not None and self.prediction == "lists" else None
        if listed is not None and type(self.q_proj) is type(self.out_proj) is nnx.Linear:
            return self._by_heads(x, places, slots, listed)
        q, k, v = map(self._split, apply_all((self.q_proj, self.k_proj, self.v_proj), x))
        (k, v), slots = write_slots(slots, k, v, places)
        out = attend(q, k, v, places, listed=listed)
        if needed is not None and listed is None:
            out = jnp.where(needed[..., None], out, 0)
        return self.out_proj(out.reshape(*x.shape[:2], -1)), slots

    def _by_heads(self, x: Float[Array, "batch 1 d_model"], places: Places, slots, listed: Bool[Array, "batch heads"]):
        """A call by the heads that each row lists, of projections that are neither compressed nor wrapped."""
        k, v = map(self._split, apply_all((self.k_proj, self.v_proj), x))
        (k, v), slots = write_slots(slots, k, v, places)
        parameters = self.q_proj.kernel, self.q_proj.bias, self.out_proj.kernel, self.out_proj.bias
        w_q, b_q, w_out, b_out = (jnp.asarray(w, x.dtype) for w in parameters)
        out = attend_by_heads(x[:, 0], w_q, b_q, w_out, k, v, places, listed) + b_out[None]
        return out[:, None], slots

    def _split(self, y: Float[Array, "batch length width"]) -> Float[Array, "batch length heads head_dim"]:
        return y.reshape(*y.shape[:2], self.heads, -1)

    def _predicted(self, places: Places, before, entering) -> Bool[Array, "batch length heads"] | None:
        """Which heads each token needs, or None for all."""
        if self.predictor is None or not (places.decoding or self.prediction == "mask_everywhere"):
            return None
        return self.predictor(before if self.predictor.look_ahead else entering) & places.mask[..., None]


class DecoderLayer(FeedForward):
    """Attention, then a feed-forward block, each around a residual."""

    def __init__(self, config: OPTConfig, layer: int, *, rngs: nnx.Rngs):
        self.self_attn = Attention(config, config.sizes(layer)[0], rngs=rngs)
        self.self_attn_layer_norm = LayerNorm(config, relu=config.norm_relu, rngs=rngs)
        super().__init__(config, layer, rngs=rngs)
        self.final_layer_norm = LayerNorm(config, relu=config.norm_relu, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch length d_model"],
        places: Places,
        slots,
        before=None,
        rngs: nnx.Rngs | None = None,
    ):
        """Returns the layer's output, and the keys and values of all slots; `before` entered the layer before."""
        pre_norm, entering = self.config.pre_norm, x
        entered = x if before is None else before, x
        y, slots = self.self_attn(self.self_attn_layer_norm(x) if pre_norm else x, places, slots, entered)
        y = self._dropped(y, rngs)
        x, normed = (self.final_layer_norm if pre_norm else self.self_attn_layer_norm).of_sum(x, y)
        y = self._dropped(self.feed_forward(normed, places, entering), rngs)
        x = x + y if pre_norm else self.final_layer_norm.of_sum(normed, y)[1]
        return x, slots

    def _dropped(self, y: Float[Array, "batch length d_model"], rngs: nnx.Rngs | None):
        """A block's output, with dropout where there are `rngs`."""
        return y if rngs is None else nnx.Dropout(self.config.dropout)(y, deterministic=False, rngs=rngs)


class OPT(nnx.Module):
    """The language model.

    The feed-forward activations of layer i, [tokens, d_ff], zero at padding, are captured as
    `captured["layers"][i]["ffn_activation"][0]` by
    `logits, captured = nnx.capture(model, nnx.Intermediate)(tokens)`; those of the gate alone, of a gated model that
    runs dense, as "ffn_gate" beside them. So are each block's "ffn_input" and "ffn_output", [batch, length, d_model],
    and where neurons are predicted, which ones are computed: "ffn_predicted".
    """

    def __init__(self, config: OPTConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.embed_dim or config.d_model
        self.embed_tokens = embed(config, config.vocab_size, width, ("vocab", "embed"), rngs=rngs)
        positions = config.max_length + POSITION_OFFSET
        self.embed_positions = embed(config, positions, config.d_model, ("positions", "embed"), rngs=rngs)
        self.layers = nnx.List([DecoderLayer(config, i, rngs=rngs) for i in range(config.layers)])
        if config.pre_norm:
            self.final_layer_norm = LayerNorm(config, rngs=rngs)
        if width != config.d_model:
            self.project_in = linear(config, (width, config.d_model), ("embed", "embed_out"), rngs=rngs)
            self.project_out = linear(config, (config.d_model, width), ("embed", "embed_out"), rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        *,
        mask: Bool[Array, "batch length"] | None = None,
        packing: Packing | None = None,
        cache: KVCache | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        """Logits of the token after each token.

        Args:
            tokens: token ids; one outside the vocabulary gives NaN.
            mask: True for real tokens, False for padding on either side; None if all are real. Logits at padding mean
                nothing. A row with more real tokens than `max_length` gives NaN: the mask is data, so no error.
            packing: where `tokens` belong if they are a packed batch, [1, packed], as logits then are: see
                `sparsellm.packing.pack`. A sequence of more than `max_length` tokens gives NaN likewise.
            cache: what `init_cache` or the last call returned; `tokens` go into its next slots. Slots past its end
                are not checked: the caller keeps count.
            rngs: whose stream "dropout" says what `config.dropout` drops, while training; None drops nothing.

        Returns:
            Logits, float32 [batch, length, vocab]; with a cache, the pair of logits and the new cache.

        Raises:
            ValueError: there are more tokens than positions, and no mask; or a mask and a packing.
        """
        hidden, new_cache = self.hidden_states(tokens, mask=mask, packing=packing, cache=cache, rngs=rngs)
        logits = self.logits(hidden)
        return logits if cache is None else (logits, new_cache)

    def hidden_states(
        self,
        tokens: Int[Array, "batch length"],
        *,
        mask: Bool[Array, "batch length"] | None = None,
        packing: Packing | None = None,
        cache: KVCache | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "batch length d_model"], KVCache | None]:
        """What `logits` turns into logits, and the new cache; arguments as of a call."""
        if mask is None and packing is None and tokens.shape[1] > self.config.max_length:
            raise ValueError(f"length must be at most max_length={self.config.max_length}; got {tokens.shape[1]}")
        places = place_tokens(tokens, mask, packing, cache)
        positions = jnp.where(places.mask, places.positions + POSITION_OFFSET, 0)
        x = self.embed_tokens(tokens)
        x = self.project_in(x) if hasattr(self, "project_in") else x
        x = x + self.embed_positions(positions)
        entered = []

        def layer(i, x, slots):
            entered.append(x)
            return self.layers[i](x, places, slots, entered[max(i - 1, 0)], rngs)

        x, new_cache = run_layers(layer, len(self.layers), x, places, cache)
        x = self.final_layer_norm(x) if self.config.pre_norm else x
        return x, None if cache is None else new_cache

    def logits(self, hidden: Float[Array, "*tokens d_model"]) -> Float[Array, "*tokens vocab"]:
        """Hidden states times the (tied) token embedding, in float32."""
        hidden = self.project_out(hidden) if hasattr(self, "project_out") else hidden
        embedding = self.embed_tokens.embedding[...].astype(hidden.dtype)
        return vocabulary_logits(hidden, embedding)

    def init_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache of `length` slots for each of `batch` sequences."""
        config = self.config
        return KVCache.empty(
            batch,
            length,
            layers=config.layers,
            heads=[config.sizes(i)[0] for i in range(config.layers)],
            head_dim=config.d_model // config.heads,
            dtype=config.dtype,
        )


def with_predictors(
    model: OPT,
    predictors: Sequence[Predictor | None] | None,
    prediction: Prediction = "lists",
    *,
    head_predictors: Sequence[Predictor | None] | None = None,
    per_sequence: bool = False,
) -> OPT:
    """The same parameters, of which predicted neurons and heads alone are computed while decoding.

    Args:
        model: the model; what it has learned is shared, not copied. "lists" reads rows of fc1: if the model is not
            `neuron_major`, all of fc1 is transposed for them at every step.
        predictors: of each layer's neurons; None computes all.
        prediction: "lists": calls with one token a row behind a cache, and at most 32 rows, read only the neurons that
            are predicted for any of these tokens. "mask": such calls compute all, and leave out what "lists" would: a
            simulation. "mask_everywhere": every call leaves out what is not predicted for each token itself, to measure
            quality.
        head_predictors: likewise of heads, of any number of rows: of each row its own keys and values, of all rows
            together the projections of queries and of the output. They see what enters the layer or, with
            `look_ahead`, the one before.
        per_sequence: with "lists" and "mask", each row computes only the neurons that are predicted for its own token,
            so that what comes of it does not depend, but for rounding, on the rows beside it, up to 32 of them. The
            weights of the others are read all the same, once for all rows. False: each computes what is predicted for
            any.

    Raises:
        ValueError: the predictors are of another model, `prediction` is unknown, or lists of neurons are asked for of
            an activation that `neuron_ffn` does not know, or of layers that are not dense.
    """
    config = model.config
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}; got {prediction!r}")
    of_neurons = predictors is not None
    listed = config.activation in LISTED and not config.gated and config.thresholds is None
    if prediction == "lists" and of_neurons and not listed:
        got = f"activation={config.activation!r}, gated={config.gated}, thresholds={config.thresholds}"
        raise ValueError(f'prediction "lists" takes {", ".join(LISTED)}, without gate and thresholds; got {got}')
    heads, neurons = zip(*(config.sizes(i) for i in range(config.layers)), strict=True)
    predictors = _fitting(config, "predictor", predictors, neurons, "neurons")
    head_predictors = _fitting(config, "head_predictor", head_predictors, heads, "heads")
    predicted = nnx.merge(*nnx.split(model))
    for i, (layer, predictor, head_predictor) in enumerate(
        zip(predicted.layers, predictors, head_predictors, strict=True)
    ):
        if prediction == "lists" and predictor is not None:
            _check_dense(layer, f"layers.{i}", 'prediction "lists" takes dense layers (of others, "mask" simulates it)')
        layer.predictor, layer.prediction, layer.per_sequence = nnx.data(predictor), prediction, per_sequence
        layer.self_attn.predictor, layer.self_attn.prediction = nnx.data(head_predictor), prediction
    return predicted


def _check_dense(layer: DecoderLayer, name: str, rule: str) -> None:
    """Raises ValueError, with this rule, where fc1 or fc2 is compressed or wrapped."""
    for part, module in (("fc1", layer.fc1), ("fc2", layer.fc2)):
        if not isinstance(module, nnx.Linear | NeuronMajorLinear):
            raise ValueError(f"{rule}; {name}.{part} is a {type(module).__name__}")


def _fitting(
    config: OPTConfig, name: str, predictors: Sequence[Predictor | None] | None, widths: Sequence[int], things: str
) -> Sequence[Predictor | None]:
    """The predictors of a model's layers, if that is what they are."""
    predictors = [None] * config.layers if predictors is None else predictors
    if len(predictors) != config.layers:
        rule = f"{name}s must be one, or None, for each of {config.layers} layers"
        raise ValueError(f"{rule}; got {len(predictors)}: those of another model")
    for i, (predictor, width) in enumerate(zip(predictors, widths, strict=True)):
        if predictor is not None and (predictor.d_model, predictor.neurons) != (config.d_model, width):
            got = f"{predictor.d_model} and {predictor.neurons}: a predictor of another model"
            raise ValueError(f"{name} {i} must be of d_model={config.d_model} and {width} {things}; got {got}")
    return predictors


def with_sparse_rows(model: OPT, sparse_rows: int | None | Sequence[int | None]) -> OPT:
    """The same parameters, shared, under another `OPTConfig.sparse_rows`.

    Raises:
        ValueError: a layer that is to run so is compressed or wrapped.
    """
    changed = nnx.merge(*nnx.split(model))
    changed.config = dataclasses.replace(model.config, sparse_rows=sparse_rows)
    for i, layer in enumerate(changed.layers):
        if changed.config.rows(i) is not None:
            _check_dense(layer, f"layers.{i}", "sparse_rows takes dense layers")
        layer.config, layer.sparse_rows = changed.config, changed.config.rows(i)
    return changed


def with_layout(model: OPT, *, neuron_major: bool) -> OPT:
    """The same parameters, without predictors, and with fc1 neuron-major or not: a copy where it was not so before.

    Raises:
        ValueError: a linear layer is compressed or wrapped.
    """
    if model.config.neuron_major == neuron_major:
        return with_predictors(model, None)
    config = dataclasses.replace(model.config, neuron_major=neuron_major)
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: OPT(config, rngs=nnx.Rngs(0))))
    arrays = {path: variable[...] for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    theirs, ours = ("kernel", "weight") if neuron_major else ("weight", "kernel")

    def found(path: tuple) -> Array:
        there = (*path[:-1], theirs if path[-1] == ours else ours)
        if path not in arrays and there not in arrays:
            name = ".".join(map(str, path[:-1]))
            raise ValueError(f"the layout of a dense model can be changed, not of one whose {name} is not nnx's")
        return arrays[path] if path in arrays else arrays[there].T

    flat = [(path, variable.replace(found(path))) for path, variable in nnx.to_flat_state(abstract)]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))
