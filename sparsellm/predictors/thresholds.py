"""A predictor's threshold, set for a recall, for a number of neurons, or for what the model may lose.

Choose on tokens that nothing was trained on: on those it was trained on, a predictor looks better than it is. All
scores of a layer are on the device at once, 9 bytes for each token and neuron while they are sorted.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int32

from sparsellm.activations import Activations, unpack_bits
from sparsellm.predictors.predictor import Predictor
from sparsellm.predictors.targets import Neurons, Target

RECALLS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999, 1.0)
TINY = float(np.finfo(np.float32).tiny)


def thresholds_for_recalls(
    scores: Float32[Array, "tokens neurons"], fires: Bool[Array, "tokens neurons"], recalls: Sequence[float]
) -> list[float]:
    """For each recall the highest threshold above which there is at least this share of what fires.

    Infinite where nothing fires, or nothing need be found: then nothing is predicted.

    Raises:
        ValueError: a recall is not 0 to 1, or a score is NaN.
    """
    if not all(0 <= recall <= 1 for recall in recalls):
        raise ValueError(f"recall must be 0 to 1; got recall={', '.join(map(str, recalls))}")
    descending, count, wrong = _descending(scores, fires)
    _check(wrong)
    needed = [math.ceil(recall * int(count) - 1e-6) for recall in recalls]
    last = np.asarray(_pick(descending, jnp.array([max(rank - 1, 0) for rank in needed], jnp.int32)))
    return [_just_below(score) if rank > 0 else math.inf for rank, score in zip(needed, last, strict=True)]


def threshold_for_neurons(scores: Float32[Array, "tokens neurons"], neurons: float) -> float:
    """The lowest threshold above which there are at most `neurons` a token, on average.

    Scores that are equal stand or fall together. Infinite, down or up, where all are to be predicted or none.

    Raises:
        ValueError: `neurons` is not 0 to the number there is, or a score is NaN.
    """
    if not 0 <= neurons <= scores.shape[1]:
        raise ValueError(f"neurons must be 0 to {scores.shape[1]}; got neurons={neurons}")
    descending, _, wrong = _descending(scores, jnp.ones_like(scores, bool))
    _check(wrong)
    most = math.floor(neurons * len(scores) + 1e-6)
    if most in (0, scores.size):
        return -math.inf if most else math.inf
    return float(_pick(descending, jnp.array([most], jnp.int32))[0])


def calibrate(
    predictors: Sequence[Predictor],
    activations: Activations,
    *,
    recall: float | None = None,
    neurons: float | Sequence[float] | Float[np.ndarray, " layers"] | None = None,
    target: Target = Neurons(),  # noqa: B008 - frozen
) -> None:
    """Sets the threshold of every predictor, in place.

    Args:
        predictors: of each layer.
        activations: of tokens that they were not trained on.
        recall: the share of what fires in each layer that is to be predicted; or
        neurons: how many are to be predicted for a token, on average: in each layer, or of each.
        target: what they predict.

    Raises:
        ValueError: not one of `recall` and `neurons` is given, or they are out of range.
    """
    if (recall is None) == (neurons is None):
        raise ValueError(f"either recall or neurons must be given; got recall={recall}, neurons={neurons}")
    budgets = list(neurons) if isinstance(neurons, Sequence | np.ndarray) else [neurons] * len(predictors)
    if len(budgets) != len(predictors):
        raise ValueError(f"neurons must be one number, or one for each of {len(predictors)} layers; got {len(budgets)}")
    thresholds = []
    for (_, scores, fires), budget in zip(scored(predictors, activations, target), budgets, strict=True):
        if budget is not None:
            thresholds.append(threshold_for_neurons(scores, budget))
        else:
            thresholds += thresholds_for_recalls(scores, fires, [recall or 0.0])
    for predictor, threshold in zip(predictors, thresholds, strict=True):  # all of them, or none where one is wrong
        predictor.threshold[...] = jnp.float32(threshold)


def calibrate_for_quality(
    predictors: Sequence[Predictor],
    activations: Activations,
    quality: Callable[[], float],
    limit: float,
    *,
    recalls: Sequence[float] = RECALLS,
    target: Target = Neurons(),  # noqa: B008 - frozen
) -> float:
    """Sets every threshold for the lowest recall, the same in all layers, with which the model is still good enough.

    Finds it by bisection, as if quality never fell with recall.

    Args:
        predictors: of each layer; their thresholds are changed before every call of `quality`.
        activations: of tokens that they were not trained on.
        quality: the model's with the predictors as they are, the lower the better: its perplexity.
        limit: the highest that is good enough, 1.01 times that of the dense model.
        recalls: to choose from, ascending.
        target: what they predict.

    Returns:
        The recall.

    Raises:
        ValueError: even the highest recall is not good enough.
    """
    layers = scored(predictors, activations, target)
    by_layer = [thresholds_for_recalls(scores, fires, recalls) for _, scores, fires in layers]

    def choose(i: int) -> None:
        for predictor, thresholds in zip(predictors, by_layer, strict=True):
            predictor.threshold[...] = jnp.float32(thresholds[i])

    def good(i: int) -> bool:
        choose(i)
        return quality() <= limit

    low, high = 0, len(recalls) - 1
    if not good(high):
        raise ValueError(f"limit must be reached at the highest recall, {recalls[high]}; got limit={limit}")
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if good(middle) else (middle + 1, high)
    choose(low)
    return recalls[low]


def scored(
    predictors: Sequence[Predictor], activations: Activations, target: Target
) -> Iterator[tuple[Predictor, Float32[Array, "tokens width"], Bool[Array, "tokens width"]]]:
    """Each layer's predictor, its scores, and what they should tell: one layer at a time is in memory.

    Raises:
        ValueError: the predictors are not of this model, or there are too many tokens for one array.
    """
    found, widths = [predictor.neurons for predictor in predictors], list(target.widths(activations))
    if found != widths:
        raise ValueError(f"predictors must be of the model that was collected from, {widths} wide; got {found}")
    if activations.tokens * max(widths) >= 2**31:
        raise ValueError(f"tokens must be fewer than 2^31 / {max(widths)} here; got tokens={activations.tokens}")
    for layer, predictor in enumerate(predictors):
        inputs = target.inputs(activations, layer, predictor.look_ahead)
        if inputs.shape[1] != predictor.d_model:
            raise ValueError(f"predictors must be of d_model={inputs.shape[1]}; got d_model={predictor.d_model}")
        scores = _scores(*nnx.split(predictor), jnp.asarray(inputs))
        # Unpacked on the device: on the host that takes longer than all else here.
        yield predictor, scores, unpack_bits(jnp.asarray(target.bits(activations, layer)), predictor.neurons)


@functools.partial(jax.jit, static_argnums=0)
def _scores(graphdef: nnx.GraphDef, state: nnx.State, x: Float[Array, "tokens d_model"]):
    return nnx.merge(graphdef, state).scores(x)


@jax.jit
def _descending(scores: Float32[Array, "tokens neurons"], among: Bool[Array, "tokens neurons"]):
    """The scores among which to choose, from the highest down, then -inf; how many they are; whether some are NaN."""
    ascending = jnp.sort(jnp.where(among, -scores, jnp.inf).ravel())
    return -ascending, jnp.sum(among, dtype=jnp.int32), jnp.isnan(scores).any()


@jax.jit
def _pick(values: Float32[Array, " values"], places: Int32[Array, " places"]) -> Float32[Array, " places"]:
    return values[places]


def _just_below(score: np.float32) -> float:
    """So that the score is above it. Devices take the smallest numbers for 0."""
    below = float(np.nextafter(score, np.float32(-np.inf)))
    return -TINY if abs(below) < TINY else below


def _check(wrong: Bool[Array, ""]) -> None:
    if wrong:
        raise ValueError("scores must be numbers; some are NaN")
