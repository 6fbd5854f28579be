"""ReLUfication: a model's activation becomes a ReLU, its parameters stay, and a short training makes up for it.

Stage 1 puts a ReLU in the place of GELU or SiLU, or of a gate's; stage 2 puts one after the norms that precede the
blocks as well. Once the model is trained further (`sparsellm.training`, with an L1 term if it is to be sparser still),
FATReLU raises the zero of each ReLU to a threshold that is found on calibration text: one for every layer, or one for
all, for the density that is asked for or for the perplexity that may be paid.

Sources: Mirzadeh et al., "ReLU Strikes Back" (2023), section 4, stages and shifted ReLU; Song et al., "ProSparse"
(2024), section 3, progressive L1 and FATReLU; Song et al., "Turbo Sparse" (2024), section 3, dReLU.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from sparsellm.objectives import next_token_loss


def with_config[M: nnx.Module](model: M, **changes: Any) -> M:
    """The same parameters under a changed config."""
    config = dataclasses.replace(cast(Any, model).config, **changes)
    make = cast(Any, type(model))
    return nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: make(config, rngs=nnx.Rngs(0)))), nnx.state(model, nnx.Param))


def relufy[M: nnx.Module](
    model: M,
    *,
    activation: Literal["relu", "shifted_relu", "drelu"] = "relu",
    thresholds: float | Sequence[float] | None = None,
    norm_relu: bool | None = None,
) -> M:
    """The same parameters with another activation: a model that wants to be trained further.

    It shares them with the one it is made of; `training.train` gives their buffers away, so copy first what is to stay.

    Example:
        model = relufy(load_opt(folder))                      # stage 1
        model = relufy(load_opt(folder), norm_relu=True)      # and 2
        model = relufy(model, thresholds=fatrelu_thresholds(gate_activations(model, windows, batch=8), density=0.1))

    Args:
        model: an OPT.
        activation: instead of its own; "drelu" needs a gated model, of which it is relu(gate) * relu(up).
        thresholds: FATReLU's, of each layer or of all; None for 0, where it is the ReLU.
        norm_relu: ReLU after the norms too, stage 2; None leaves them as they are.

    Raises:
        ValueError: the choices do not go together, or do not fit the model.
    """
    config = cast(Any, model).config
    if isinstance(thresholds, int | float):
        thresholds = (thresholds,) * config.layers
    norm_relu = config.norm_relu if norm_relu is None else norm_relu
    return with_config(model, activation=activation, thresholds=thresholds, norm_relu=norm_relu)


def gate_activations(
    model: nnx.Module, windows: Int32[np.ndarray, "windows length"], *, batch: int, per_layer: bool = True
) -> list[Float[Array, " _"]]:
    """What each layer's threshold meets: the outputs of its ReLU over calibration text, in ascending order.

    A gate's, before they are multiplied. They stay on the device: layers * tokens * d_ff values of the model's dtype.

    Args:
        model: an OPT with activation "relu", without thresholds.
        windows: whole windows of tokens, without padding.
        batch: windows at once, a divisor of their number.
        per_layer: False: those of all layers together, for every layer, so that they come to have one threshold.

    Raises:
        ValueError: another model, no windows, or a batch that does not divide them.
        FloatingPointError: an activation is not finite.
    """
    _check_calibration(model, windows, batch)
    graphdef, params = nnx.split(with_config(model, sparse_rows=None), nnx.Param)
    batches = [_gates(graphdef, params, jnp.asarray(part)) for part in np.split(windows, len(windows) // batch)]
    gates = [jnp.sort(jnp.concatenate([gate.ravel() for gate in layer])) for layer in zip(*batches, strict=True)]
    for layer, gate in enumerate(gates):
        if not math.isfinite(gate[-1]):  # NaN comes last
            raise FloatingPointError(f"activations must be finite; got {gate[-1]} in layer {layer}")
    return gates if per_layer else [jnp.sort(jnp.concatenate(gates))] * len(gates)


def fatrelu_thresholds(gates: Sequence[Float[Array, " _"]], density: float) -> tuple[float, ...]:
    """For each layer the lowest threshold that at most this share of its activations is above.

    The share is that of calibration without thresholds; with them, what later layers get has changed a little.

    Args:
        gates: of each layer, of `gate_activations`.
        density: the share, from 0 to 1.

    Raises:
        ValueError: the density is no share.
    """
    if not 0 <= density <= 1:
        raise ValueError(f"density must be 0 to 1; got density={density}")
    kept = [int(density * gate.size) for gate in gates]
    return tuple(float(gate[-1 - k]) if k < gate.size else 0.0 for gate, k in zip(gates, kept, strict=True))


def thresholds_for_perplexity(
    model: nnx.Module,
    gates: Sequence[Float[Array, " _"]],
    windows: Int32[np.ndarray, "windows length_plus_1"],
    increase: float,
    *,
    batch: int,
    halvings: int = 8,
) -> tuple[float, ...]:
    """The thresholds of the lowest density, found by bisection, that raises the perplexity by at most a given share.

    Args:
        model: the one that `gates` are of.
        gates: of each layer.
        windows: text to measure the perplexity on: tokens, and one more for the last target.
        increase: of the perplexity; 0.01 for 1%.
        batch: windows at once, a divisor of their number.
        halvings: of the interval from density 0 to the model's own.

    Raises:
        ValueError: arguments are out of range, or do not fit the model.
    """
    if not increase >= 0:
        raise ValueError(f"increase must be at least 0; got increase={increase}")
    _check_calibration(model, windows, batch)
    if len(gates) != cast(Any, model).config.layers:
        raise ValueError(f"gates must be of the model's {cast(Any, model).config.layers} layers; got {len(gates)}")
    graphdef, params = nnx.split(relufy(with_config(model, sparse_rows=None), thresholds=0.0), nnx.Param)
    batches = np.split(windows, len(windows) // batch)

    def loss(thresholds: Sequence[float]) -> float:
        values = jnp.asarray(thresholds, jnp.float32)
        return float(np.mean([_loss(graphdef, params, values, jnp.asarray(part)) for part in batches]))

    best = (0.0,) * len(gates)
    allowed = loss(best) + math.log1p(increase)
    low, high = 0.0, max(float((gate > 0).mean()) for gate in gates)
    for _ in range(halvings):
        density = (low + high) / 2
        thresholds = fatrelu_thresholds(gates, density)
        if loss(thresholds) <= allowed:
            best, high = thresholds, density
        else:
            low = density
    return best


def _check_calibration(model: Any, windows: np.ndarray, batch: int) -> None:
    config = model.config
    if config.activation != "relu" or config.thresholds is not None:
        rule = "thresholds are chosen for a model with activation 'relu' that has none yet"
        raise ValueError(f"{rule}; got activation={config.activation!r}, thresholds={config.thresholds}")
    if batch < 1 or not len(windows) or len(windows) % batch:
        raise ValueError(f"batch must divide the windows, at least one; got batch={batch}, {len(windows)} windows")


@functools.partial(jax.jit, static_argnums=0)
def _gates(
    graphdef: nnx.GraphDef, params: nnx.State, tokens: Int[Array, "batch length"]
) -> list[Float[Array, "tokens d_ff"]]:
    _, captured = nnx.capture(nnx.merge(graphdef, params), nnx.Intermediate)(tokens)
    layers = [captured["layers"][i] for i in sorted(captured["layers"])]
    return [layer["ffn_gate" if "ffn_gate" in layer else "ffn_activation"][0] for layer in layers]


@functools.partial(jax.jit, static_argnums=0)
def _loss(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    thresholds: Float[Array, " layers"],
    windows: Int32[Array, "batch length_plus_1"],
) -> Float[Array, ""]:
    """With thresholds that are data, so that a search compiles once."""
    model: Any = nnx.merge(graphdef, params)
    for layer, threshold in zip(model.layers, thresholds, strict=True):
        layer.threshold = threshold
    return next_token_loss(model(windows[:, :-1]), windows[:, 1:])
