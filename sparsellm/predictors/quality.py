"""How well predictors predict: counted on activations that nothing was trained or chosen on."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from sparsellm.activations import Activations
from sparsellm.predictors.predictor import Predictor
from sparsellm.predictors.targets import Neurons, Target
from sparsellm.predictors.thresholds import scored

type Row = dict[str, Any]


def measure_predictors(
    predictors: Sequence[Predictor],
    activations: Activations,
    *,
    batches: Sequence[int] = (1,),
    target: Target = Neurons(),  # noqa: B008 - frozen
) -> list[Row]:
    """What each predictor finds of what fires, and how much it predicts for that.

    Args:
        predictors: of each layer.
        activations: of tokens that they were neither trained nor calibrated on.
        batches: numbers of sequences that decode together and share the union of what is predicted for any of them:
            tokens at the same place in as many windows, of which a rest is left out.
        target: what they predict.

    Returns:
        For each layer and batch: `recall` (1 where nothing fires) and `precision` (1 where nothing is predicted), the
        `density` that is predicted and the `true_density`, and the `neurons` that are predicted, on average.

    Raises:
        ValueError: a batch is larger than the number of windows.
    """
    windows = activations.tokens // activations.length
    if not all(1 <= batch <= windows for batch in batches):
        raise ValueError(f"batches must be 1 to {windows}, the windows collected; got batches={tuple(batches)}")
    rows = []
    for layer, (predictor, scores, fires) in enumerate(scored(predictors, activations, target)):
        for batch in batches:
            counts = _count(batch, activations.length, scores, fires, predictor.threshold[...])
            found, predicted, there = map(int, counts)
            steps = windows // batch * activations.length
            rows.append(
                {
                    "layer": layer,
                    "batch": batch,
                    "recall": found / there if there else 1.0,
                    "precision": found / predicted if predicted else 1.0,
                    "density": predicted / (steps * predictor.neurons),
                    "true_density": there / (steps * predictor.neurons),
                    "neurons": predicted / steps,
                }
            )
    return rows


@functools.partial(jax.jit, static_argnums=(0, 1))
def _count(
    batch: int,
    length: int,
    scores: Float32[Array, "tokens neurons"],
    fires: Bool[Array, "tokens neurons"],
    threshold: Float32[Array, ""],
) -> tuple[Int32[Array, ""], Int32[Array, ""], Int32[Array, ""]]:
    """How many neurons fire and are predicted, are predicted, fire; for any token of a batch."""

    def union(mask: Bool[Array, "tokens neurons"]) -> Bool[Array, "groups length neurons"]:
        windows = mask.reshape(-1, length, mask.shape[1])
        return windows[: len(windows) // batch * batch].reshape(-1, batch, *windows.shape[1:]).any(axis=1)

    predicted, fires = union(scores > threshold), union(fires)
    found, chosen, there = (jnp.sum(mask, dtype=jnp.int32) for mask in (predicted & fires, predicted, fires))
    return found, chosen, there
