"""OPT without its weights: random ones, whose neurons fire as often as a profile says that the real ones do.

What sparse decoding costs follows from how many neurons fire, for one token and for some token of a batch. A profile
counts them by layer and batch; `synthetic_opt` draws random weights and fits each neuron's bias, so that a batch of
tokens finds about as many. The text is noise: results on such a model are of its speed, and must say so.

A neuron that is to fire with probability p (`models.firing`) gets the bias Phi^-1(p) * std - mean, where mean and
standard deviation of its product with its input are measured on random tokens: sums of thousands of random terms are
close to normal.
"""

import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from models.firing import Profile, firing_probabilities
from models.opt import OPT, with_predictors
from models.opt_config import OPTConfig
from sparsellm.predictors import LowRankPredictor, Predictor
from sparsellm.pruning.walk import walk
from sparsellm.sharding import create_model

FIRST_TOKEN = 4  # after OPT's special tokens
POSITIONS = 0.1  # what they weigh: else they make the tokens of a decoding batch, all at one position, alike
SAMPLE = (32, 64)  # rows and length of the tokens that biases are fitted on


def synthetic_opt(size: str | OPTConfig, profile: Profile, *, key: Array, mesh: Mesh | None = None) -> OPT:
    """An OPT with random weights, whose neurons fire as often as the profile's.

    Parameters are made one by one where they stay. The last norm's scale has random signs, and its bias takes away what
    all tokens have in common: else, embeddings being tied, the model would repeat one token for ever.

    Args:
        size: a published one, in bfloat16 and neuron-major; or a configuration with ReLU.
        profile: of any number of layers.
        key: of weights and sample tokens.
        mesh: devices to spread the parameters over; None for the default device.

    Raises:
        ValueError: there is no such size, or neurons of its activation do not fire or rest.
    """
    dtypes = {"dtype": "bfloat16", "param_dtype": "bfloat16"}
    config = OPTConfig.preset(size, neuron_major=True, **dtypes) if isinstance(size, str) else size
    if config.activation != "relu" or config.thresholds is not None or config.sparse_rows is not None:
        got = f"activation={config.activation!r}, thresholds={config.thresholds}, sparse_rows={config.sparse_rows}"
        raise ValueError(f"a synthetic model must have activation 'relu' at 0, and run dense to be fitted; got {got}")
    model = create_model(lambda: OPT(config, rngs=nnx.Rngs(key)), mesh)
    token_key, sign_key, *layer_keys = jax.random.split(jax.random.fold_in(key, 0), 2 + config.layers)
    positions = model.embed_positions.embedding
    positions[...] = positions[...] * POSITIONS
    if config.pre_norm:
        norm: Any = model.final_layer_norm
        norm.scale[...] = jax.random.rademacher(sign_key, norm.scale.shape, norm.scale.dtype)
    tokens = random_tokens(config, SAMPLE, token_key)
    shares = profile.stretched(config.layers).shares
    for block, layer_key, own in zip(_walk(model, tokens), layer_keys, shares, strict=True):
        probabilities = firing_probabilities(profile.batches, own, block.module.fc1.bias.shape[0])
        normal = np.vectorize(statistics.NormalDist().inv_cdf)(probabilities)
        quantiles = jax.random.permutation(layer_key, jnp.asarray(normal, jnp.float32))
        block.module.fc1.bias[...] = _fitted_bias(*nnx.split(block.module), *_given(block), quantiles)
    if config.pre_norm:
        hidden = norm(_output(block)).astype(jnp.float32)
        norm.bias[...] = -jnp.mean(hidden, axis=(0, 1)).astype(norm.bias.dtype)
    return model


def random_tokens(config: OPTConfig, shape: tuple[int, int], key: Array) -> Int[Array, "batch length"]:
    """Tokens of any kind but OPT's special ones."""
    batch, length = shape
    return jax.random.randint(key, (batch, min(length, config.max_length)), FIRST_TOKEN, config.vocab_size)


def _walk(model: OPT, tokens: Int[Array, "batch length"]) -> Iterator[Any]:
    """The layers one after the other, so that one small program serves them all."""
    return walk(model, np.asarray(tokens), batch=len(tokens))


def _given(block: Any) -> tuple[Array, tuple[Any, ...]]:
    """What a layer is called with: the hidden states of the only batch, and the rest."""
    return block.stream[0], block.arguments


def _output(block: Any) -> Array:
    return block.forward()[0]


@partial(jax.jit, static_argnums=0)
def _fitted_bias(graphdef, state, x: Float[Array, "batch length d_model"], arguments, quantiles: Float[Array, " d_ff"]):
    """The bias of a layer's fc1, which is zero so far."""
    layer: Any = nnx.merge(graphdef, state)
    _, captured = nnx.capture(layer, nnx.Intermediate)(x, *arguments)
    products = layer.fc1(captured["ffn_input"][0]).reshape(-1, len(quantiles)).astype(jnp.float32)
    bias = quantiles * jnp.std(products, axis=0) - jnp.mean(products, axis=0)
    return bias.astype(layer.fc1.bias.dtype)


def fit_table(
    model: OPT, profile: Profile, *, batches: Sequence[int] = (1, 8, 16, 32, 64, 256), key: Array
) -> list[dict[str, Any]]:
    """What the fit was to reach and what it does, on random tokens it has not seen: a row for each layer and batch.

    A batch is made of tokens at the same position of as many sequences, as while decoding.
    """
    profile = profile.stretched(model.config.layers)
    tokens = random_tokens(model.config, (max(batches), SAMPLE[1] // 2), key)
    rows = []
    for layer, block in enumerate(_walk(model, tokens)):
        reached = _firing(*nnx.split(block.module), *_given(block), tuple(batches))
        for batch, found in zip(batches, reached, strict=True):
            target = round(profile.share(layer, batch), 4)
            rows.append({"layer": layer, "batch": batch, "target": target, "reached": round(float(found), 4)})
    return rows


@partial(jax.jit, static_argnames=("graphdef", "batches"))
def _firing(
    graphdef, state, x: Float[Array, "rows length d_model"], arguments, batches: tuple[int, ...]
) -> list[Array]:
    """Share of a layer's neurons that fire for some token of a batch, in the second half of the sequences."""
    rows, length, _ = x.shape
    layer: Any = nnx.merge(graphdef, state)
    _, captured = nnx.capture(layer, nnx.Intermediate)(x, *arguments)
    fires = captured["ffn_activation"][0].reshape(rows, length, -1)[:, length // 2 :] != 0
    groups = [fires[: rows // b * b].reshape(rows // b, b, *fires.shape[1:]).any(axis=1) for b in batches]
    return [jnp.mean(group.astype(jnp.float32)) for group in groups]


def synthetic_predictors(
    model: OPT,
    profile: Profile,
    *,
    batch: int,
    rank: int,
    key: Array,
    look_ahead: bool = True,
    in_8_bits: bool = False,
    head_predictors: Sequence[Predictor] | None = None,
) -> list[Predictor]:
    """Random predictors that name, for a batch of random tokens, as many neurons as fire by the profile.

    What they cost is real; which neurons they name is not. Thresholds are set from layer to layer, on what comes out
    of layers that compute the named neurons and heads only, as while decoding.

    Args:
        model: a synthetic one.
        profile: the same.
        batch: tokens whose neurons are named together.
        rank: of the predictors.
        key: of their weights and of sample tokens.
        look_ahead: whether they read what enters the layer.
        in_8_bits: whether their weights are kept in a byte each.
        head_predictors: of the heads that each layer will compute; None for all. What comes of others is something
            else, of which these predictors would name another number of neurons.

    Raises:
        ValueError: the profile does not reach to such a batch, or heads are predicted by the layer before.
    """
    if any(getattr(predictor, "look_ahead", False) for predictor in head_predictors or ()):
        raise ValueError("head_predictors must not look ahead: layers are fitted one by one, which see no layer before")
    config, profile = model.config, profile.stretched(model.config.layers)
    shares = [profile.share(layer, batch) for layer in range(config.layers)]
    options: dict[str, Any] = {"look_ahead": look_ahead, "dtype": config.dtype, "param_dtype": config.dtype}
    sizes = [(config.d_model, rank, config.sizes(layer)[1]) for layer in range(config.layers)]
    rngs = nnx.Rngs(key)
    low_rank = (LowRankPredictor(*size, **options, rngs=rngs) for size in sizes)  # one at a time is there twice
    predictors: list[Predictor] = [predictor.in_8_bits() if in_8_bits else predictor for predictor in low_rank]
    tokens = (max(1, SAMPLE[0] // batch) * batch, SAMPLE[1] // 2)
    tokens = random_tokens(config, tokens, jax.random.fold_in(key, 0))
    predicted = with_predictors(model, predictors, head_predictors=head_predictors)
    for block, predictor, share in zip(_walk(predicted, tokens), predictors, shares, strict=True):
        block.module.self_attn.prediction = "mask_everywhere"
        predictor.threshold[...] = _threshold(_scores(*nnx.split(block.module), *_given(block)), share, batch)
        block.module.predictor, block.module.prediction = _Together(predictor, batch), "mask_everywhere"
    return predictors


def synthetic_head_predictors(
    model: OPT, share: float, *, rank: int, key: Array, in_8_bits: bool = False
) -> list[Predictor]:
    """Random predictors that name this share of each layer's heads for a token, as `synthetic_predictors` do neurons.

    Args:
        model: a synthetic one.
        share: of the heads, above 0 and at most 1, on the average over random tokens.
        rank: of the predictors, which read what enters the layer.
        key: of their weights and of sample tokens.
        in_8_bits: whether their weights are kept in a byte each.

    Raises:
        ValueError: the share is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1; got share={share}")
    config, rngs = model.config, nnx.Rngs(key)
    dtypes: dict[str, Any] = {"dtype": config.dtype, "param_dtype": config.dtype}
    widths = [config.sizes(layer)[0] for layer in range(config.layers)]
    low_rank = (LowRankPredictor(config.d_model, rank, heads, **dtypes, rngs=rngs) for heads in widths)
    predictors: list[Predictor] = [predictor.in_8_bits() if in_8_bits else predictor for predictor in low_rank]
    tokens = random_tokens(config, (SAMPLE[0], SAMPLE[1] // 2), jax.random.fold_in(key, 0))
    predicted = with_predictors(model, None, head_predictors=predictors)
    for block, predictor in zip(_walk(predicted, tokens), predictors, strict=True):
        block.module.self_attn.prediction = "mask_everywhere"
        predictor.threshold[...] = _threshold(predictor.scores(_given(block)[0]), share, batch=1)
    return predictors


class _Together(Predictor):
    """Names for each token what is named for any of those at its position in a batch."""

    def __init__(self, predictor: Predictor, batch: int):
        self.predictor, self.batch, self.look_ahead = predictor, batch, predictor.look_ahead

    def __call__(self, x: Float[Array, "rows length d_model"]) -> Bool[Array, "rows length neurons"]:
        fires = self.predictor(x)
        return jnp.repeat(fires.reshape(-1, self.batch, *fires.shape[1:]).any(axis=1), self.batch, axis=0)


@partial(jax.jit, static_argnums=0)
def _scores(graphdef, state, x: Float[Array, "rows length d_model"], arguments) -> Float[Array, "rows length neurons"]:
    """What a layer's predictor finds of its neurons."""
    layer: Any = nnx.merge(graphdef, state)
    _, captured = nnx.capture(layer, nnx.Intermediate)(x, *arguments)  # dense: these are no calls of one token a row
    return layer.predictor.scores(x if layer.predictor.look_ahead else captured["ffn_input"][0])


@partial(jax.jit, static_argnames="batch")
def _threshold(scores: Float[Array, "rows length named"], share: float | Array, batch: int) -> Float[Array, ""]:
    """The threshold by which this share is named for a batch at one position."""
    ascending = jnp.sort(scores.reshape(-1, batch, *scores.shape[1:]).max(axis=1).reshape(-1))
    silent = ascending.size - jnp.round(share * ascending.size).astype(jnp.int32)
    return jnp.where(silent > 0, ascending[silent - 1], -jnp.inf)
