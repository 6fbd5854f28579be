"""Training Deja Vu's predictors on a collection of activations: all layers at once, a scan over an epoch's steps.

Layers have nothing in common but the program: their losses are summed and AdamW works by element, so each learns as it
would alone, and stops by itself. The data lie on the device: tokens * (d_model * size of a dtype + neurons / 8) bytes a
layer, and the weights with two moments and the best so far: 16 * rank * (d_model + neurons).
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt8

from sparsellm.activations import Activations
from sparsellm.checkpoint import is_checkpoint, load_checkpoint, load_config, save_checkpoint
from sparsellm.predictors.predictor import UNIFORM, LowRankPredictor, low_rank_product
from sparsellm.predictors.targets import Heads, Neurons, Target

type Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictorConfig:
    """The published recipe; but of all epochs the one of the least held-out loss is kept, not of the highest recall.

    A predictor can always recall more by predicting more, and is slower for it.

    Attributes:
        rank: of each predictor; the paper serves 1000 for neurons.
        look_ahead: predict from what enters the layer, or, for heads, the layer before it.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        batch: tokens a step.
        epochs: at most.
        patience: epochs without a lower held-out loss after which a layer is done.
        enough_recall: held-out recall, at the threshold trained for, above which a layer is done.
        held_out: share of the tokens, the last ones, to stop by.
        negatives: weight of the loss of what does not fire, beyond the batch's density; what fires has weight 1.
        seed: of weights and order.

    Source: Liu et al., "Deja Vu" (ICML 2023), appendix, and the code published with it.
    """

    rank: int = 1000
    look_ahead: bool = False
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    batch: int = 1024
    epochs: int = 20
    patience: int = 5
    enough_recall: float = 0.99
    held_out: float = 0.05
    negatives: float = 0.005
    seed: int = 0

    def __post_init__(self):
        for name in ("rank", "batch", "epochs", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {name}={getattr(self, name)}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must lie between 0 and 1; got held_out={self.held_out}")

    @classmethod
    def preset(cls, target: Target, **overrides: Any) -> "PredictorConfig":
        """The paper's for neurons (rank 1000) or heads (rank 512, a lower learning rate), with fields replaced."""
        of_heads = {"rank": 512, "learning_rate": 1e-4, "look_ahead": True}
        return cls(**((of_heads if isinstance(target, Heads) else {}) | overrides))


class State(NamedTuple):
    """Of all layers; scores are x @ down @ up (+ bias).

    Attributes:
        params: down [layers, d_model, rank] and up [layers, rank, bits]; bias [layers, bits], if they began with one.
        opt_state: AdamW's.
        best: the params of the least held-out loss.
        best_loss: that loss.
        waited: epochs since then.
        done: layers that have stopped.
    """

    params: dict[str, Array]
    opt_state: optax.OptState
    best: dict[str, Array]
    best_loss: Float[Array, " layers"]
    waited: Int[Array, " layers"]
    done: Bool[Array, " layers"]


class Samples(NamedTuple):
    """Of all layers what predictors see, the bits of what fires, and which bits count: layers differ in width."""

    inputs: Float[Array, "layers tokens d_model"]
    fires: UInt8[Array, "layers tokens bytes"]
    real: Bool[Array, "layers bits"]


def train_predictors(
    activations: Activations,
    config: PredictorConfig | None = None,
    *,
    target: Target = Neurons(),  # noqa: B008 - frozen
    start: Sequence[LowRankPredictor] | None = None,
    folder: str | Path | None = None,
    report: Callable[[Row], None] | None = None,
) -> list[LowRankPredictor]:
    """Trains a predictor for each layer; its threshold is 0, to be set by `calibrate`.

    Args:
        activations: of tokens that nothing else is chosen or measured on.
        config: how; None for the target's preset.
        target: what to predict.
        start: predictors to begin with, of the config's rank, such as `LowRankPredictor.from_svd`'s: their biases are
            trained too, if they have some. None for random ones without, as published.
        folder: where to leave a checkpoint after each epoch, so that the same call goes on after a kill; None: nowhere.
        report: called with a row after each epoch: `epoch`, and of each layer the held-out `loss`, `recall`,
            `precision`, and whether it is `done`.

    Returns:
        A predictor of each layer, in the dtype of its inputs: what is measured and served is one and the same.

    Raises:
        ValueError: there are too few tokens to hold some out, `start` is of another model or rank, or the folder is of
            another training.
        FloatingPointError: a layer's held-out loss was never finite.
    """
    config = config or PredictorConfig.preset(target)
    tokens, held_out = activations.tokens, round(activations.tokens * config.held_out)
    if not 1 <= held_out < tokens:
        raise ValueError(f"held_out must leave tokens on both sides; got {config.held_out} of {tokens} tokens")
    trained_on, batch = tokens - held_out, min(config.batch, tokens - held_out)
    samples = _load(activations, config, target)
    params = _random(config, samples) if start is None else _given(config, samples, start, target.widths(activations))
    state = _begin(config, params)
    described = {"config": dataclasses.asdict(config), "target": repr(target), "model": activations.model}
    described = json.loads(json.dumps(described | {"tokens": tokens, "start": start is not None}))
    epoch, state = (0, state) if folder is None else _resume(folder, described, state)
    while epoch < config.epochs and not bool(state.done.all()):
        order = jax.random.permutation(jax.random.fold_in(jax.random.key(config.seed), epoch), trained_on)
        steps = order[: trained_on // batch * batch].reshape(-1, batch)  # what is left over is another next time
        state, measured = _epoch(config, state, samples, steps, _in_batches(trained_on, tokens, batch))
        epoch += 1
        if folder is not None:
            save_checkpoint(folder, described | {"epoch": epoch}, _named(state), overwrite=True)
        if report:
            report({"epoch": epoch} | {name: np.asarray(values).tolist() for name, values in measured.items()})
    if never := np.flatnonzero(~np.isfinite(state.best_loss)).tolist():
        raise FloatingPointError(f"the held-out loss must be finite; that of layer {never[0]} never was")
    return [
        LowRankPredictor.from_arrays(
            state.best["down"][layer].astype(samples.inputs.dtype),
            state.best["up"][layer, :, :width].astype(samples.inputs.dtype),
            state.best["bias"][layer, :width] if "bias" in state.best else None,
            look_ahead=config.look_ahead,
        )
        for layer, width in enumerate(target.widths(activations))
    ]


def _load(activations: Activations, config: PredictorConfig, target: Target) -> Samples:
    layers, widths = range(activations.layers), target.widths(activations)
    bits = -(-max(widths) // 8) * 8
    inputs = np.stack([target.inputs(activations, layer, config.look_ahead) for layer in layers])
    fires = np.zeros((len(layers), activations.tokens, bits // 8), np.uint8)
    for layer, width in enumerate(widths):
        fires[layer, :, : -(-width // 8)] = target.bits(activations, layer)
    real = np.arange(bits)[None, :] < np.array(widths)[:, None]
    return Samples(*map(jnp.asarray, (inputs, fires, real)))


def _random(config: PredictorConfig, samples: Samples) -> dict[str, Array]:
    (layers, bits), d_model = samples.real.shape, samples.inputs.shape[-1]
    keys, init = jax.random.split(jax.random.key(config.seed)), UNIFORM(batch_axis=(0,))
    shapes = {"down": (layers, d_model, config.rank), "up": (layers, config.rank, bits)}
    return {name: init(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}


def _given(
    config: PredictorConfig, samples: Samples, start: Sequence[LowRankPredictor], widths: Sequence[int]
) -> dict[str, Array]:
    """The parameters of predictors; zeros for bits that none has."""
    (layers, bits), d_model = samples.real.shape, samples.inputs.shape[-1]
    found = [(predictor.down.shape, predictor.up.shape) for predictor in start]
    wanted = [((d_model, config.rank), (config.rank, width)) for width in widths]
    if found != wanted:
        raise ValueError(f"start must have down and up of the shapes {wanted} for {layers} layers; got {found}")
    params = {"down": jnp.stack([predictor.down[...].astype(jnp.float32) for predictor in start])}
    widened = [jnp.pad(p.up[...].astype(jnp.float32), ((0, 0), (0, bits - p.neurons))) for p in start]
    params["up"] = jnp.stack(widened)
    biases = [jnp.zeros(p.neurons) if p.bias is None else p.bias[...] for p in start]
    if any(predictor.bias is not None for predictor in start):
        params["bias"] = jnp.stack([jnp.pad(bias, (0, bits - len(bias))) for bias in biases])
    return params


def _begin(config: PredictorConfig, params: dict[str, Array]) -> State:
    """Moments of zero, and no best so far."""
    layers = len(params["down"])
    return State(
        params=params,
        opt_state=_optimizer(config).init(params),
        best=jax.tree.map(jnp.zeros_like, params),
        best_loss=jnp.full(layers, jnp.inf),
        waited=jnp.zeros(layers, jnp.int32),
        done=jnp.zeros(layers, bool),
    )


def _optimizer(config: PredictorConfig) -> optax.GradientTransformation:
    return optax.adamw(config.learning_rate, weight_decay=config.weight_decay)


def _in_batches(start: int, stop: int, batch: int) -> Int[np.ndarray, "batches batch"]:
    """The numbers from start to stop, in whole batches; -1 where there are no more."""
    numbers = np.arange(start, stop, dtype=np.int32)
    return np.pad(numbers, (0, -len(numbers) % batch), constant_values=-1).reshape(-1, batch)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _epoch(
    config: PredictorConfig,
    state: State,
    samples: Samples,
    steps: Int[Array, "steps batch"],
    held_out: Int[Array, "batches batch"],
) -> tuple[State, dict[str, Array]]:
    """Trains on the tokens of every step, then measures on those held out; each layer on its own."""
    measure = jax.vmap(functools.partial(_measure, config), in_axes=(0, 0, None))

    def step(carry, tokens):
        def loss(params):
            return measure(params, samples, tokens)["loss"].sum()  # no layer's gradient depends on another

        params, opt_state = carry
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to the power of its int32 count
            updates, opt_state = _optimizer(config).update(jax.grad(loss)(params), opt_state, params)
        updated = jax.tree.map(jnp.add, params, updates)
        return (_choose(state.done, params, updated), opt_state), None

    (params, opt_state), _ = lax.scan(step, (state.params, state.opt_state), steps)
    batches = lax.map(lambda tokens: measure(params, samples, tokens), held_out)
    sums = {name: values.sum(axis=0) for name, values in batches.items()}
    tokens = jnp.sum(held_out >= 0, axis=1).astype(jnp.float32)
    loss = jnp.sum(batches["loss"] * tokens[:, None], axis=0) / tokens.sum()
    recall = sums["found"] / jnp.maximum(sums["fires"], 1)
    better = ~state.done & (loss < state.best_loss)
    waited = jnp.where(better, 0, state.waited + 1)
    done = state.done | (waited >= config.patience) | (recall > config.enough_recall)
    best, best_loss = _choose(better, params, state.best), jnp.where(better, loss, state.best_loss)
    precision = sums["found"] / jnp.maximum(sums["predicted"], 1)
    measured = {"loss": loss, "recall": recall, "precision": precision, "done": done}
    return State(params, opt_state, best, best_loss, waited, done), measured


def _choose(layers: Bool[Array, " layers"], these: dict[str, Array], others: dict[str, Array]) -> dict[str, Array]:
    return jax.tree.map(lambda a, b: jnp.where(jnp.expand_dims(layers, range(1, a.ndim)), a, b), these, others)


def _measure(
    config: PredictorConfig, params: dict[str, Array], layer: Samples, tokens: Int[Array, " batch"]
) -> dict[str, Float[Array, ""]]:
    """One layer's loss on a batch of tokens (-1 is none), and how many neurons fire, are predicted, are both.

    Positives have weight 1, negatives the batch's density and a little more: Deja Vu's code, trainer_mlp.py.
    """
    scores = low_rank_product(layer.inputs[tokens], params["down"], params["up"])
    if "bias" in params:
        scores += params["bias"][None]
    fires = jnp.unpackbits(layer.fires[tokens], axis=1).astype(bool)
    counts = (tokens >= 0)[:, None] & layer.real[None, :]
    fires, predicted = fires & counts, (scores > 0) & counts
    total = lambda x: jnp.sum(x, dtype=jnp.int32).astype(jnp.float32)  # noqa: E731
    weight = jnp.where(fires, 1.0, total(fires) / total(counts) + config.negatives)
    nats = optax.sigmoid_binary_cross_entropy(scores, fires.astype(jnp.float32))
    loss = jnp.sum(jnp.where(counts, weight * nats, 0.0)) / total(counts)
    found = total(fires & predicted)
    return {"loss": loss, "fires": total(fires), "predicted": total(predicted), "found": found}


def _named(state: State) -> dict[str, Array]:
    """The arrays by their path: what a checkpoint holds."""
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in jax.tree.leaves_with_path(state)}


def _resume(folder: str | Path, described: Row, state: State) -> tuple[int, State]:
    """The epoch and state of the checkpoint, if there is one."""
    if not is_checkpoint(folder):
        return 0, state
    there = load_config(folder)
    epoch = there.pop("epoch", None)
    if there != described:
        different = [name for name in described if there.get(name) != described[name]]
        raise ValueError(f"the folder must be of the same training; {folder} differs in {', '.join(different)}")
    arrays = load_checkpoint(folder, _named(state))
    return epoch, jax.tree.unflatten(jax.tree.structure(state), [arrays[name] for name in _named(state)])
