"""What a training minimises: the loss of the next token, alone or with the activations' L1 norm for sparsity."""

import functools
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int32

type Objective = Callable[
    [nnx.Module, Int32[Array, "batch length_plus_1"], Int[Array, ""]], tuple[Array, dict[str, Array]]
]
"""Of the model, the windows and the steps before this one: what to minimise, a mean over windows, and metrics."""

FFN_ACTIVATION = "ffn_activation"  # the name under which models capture what a feed-forward block's last product reads


def next_token_loss(
    logits: Float[Array, "batch length vocab"],
    targets: Int[Array, "batch length"],
    mask: Bool[Array, "batch length"] | None = None,
) -> Float[Array, ""]:
    """Mean cross-entropy in nats a token, over the targets that `mask` keeps (0 where it keeps none)."""
    nats = _nats(logits.astype(jnp.float32), targets)
    if mask is None:
        return nats.mean()
    return jnp.where(mask, nats, 0.0).sum() / jnp.maximum(mask.sum(dtype=jnp.int32), 1).astype(jnp.float32)


@jax.custom_vjp
def _nats(logits: Float[Array, "batch length vocab"], targets: Int[Array, "batch length"]):
    """Cross-entropy of each token.

    The target's logit is gathered; JAX's gradient of that would be a scatter, which XLA, told to be deterministic, does
    one token after the other.
    """
    return _nats_forward(logits, targets)[0]


def _nats_forward(logits, targets):
    log_z = logsumexp(logits)
    of_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return log_z - of_target, (logits, targets, log_z)


def _nats_backward(residuals, gradient):
    logits, targets, log_z = residuals
    is_target = jnp.arange(logits.shape[-1], dtype=targets.dtype)[None, None] == targets[..., None]
    to_logits = jnp.exp(logits - log_z[..., None]) - is_target.astype(logits.dtype)
    return gradient[..., None] * to_logits, np.zeros(targets.shape, jax.dtypes.float0)


_nats.defvjp(_nats_forward, _nats_backward)


def logsumexp(x: Float[Array, "*rows n"]) -> Float[Array, "*rows"]:
    """Of the last axis, in one pass: `jax.nn.logsumexp` reads all of it for the maximum first.

    A pair is the maximum m of some values and the sum of exp(x - m); one exponential joins two.
    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), section 3.1.
    """

    def join(left, right):
        (most_left, sum_left), (most_right, sum_right) = left, right
        above = most_left - most_right
        factor = jnp.exp(-jnp.abs(above))
        total = jnp.where(above > 0, sum_left + sum_right * factor, sum_left * factor + sum_right)
        return jnp.maximum(most_left, most_right), total

    nothing = jnp.finfo(x.dtype).min, jnp.zeros((), x.dtype)  # not -inf, which less itself is NaN
    most, total = lax.reduce((x, jnp.ones_like(x)), nothing, join, (x.ndim - 1,))
    return most + jnp.log(total)


def next_token_objective(
    model: nnx.Module, windows: Int32[Array, "batch length_plus_1"], step: Int[Array, ""] | int
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """What a training minimises unless told otherwise: the mean cross-entropy, and the same as the metric "loss"."""
    del step
    loss = next_token_loss(model(windows[:, :-1]), windows[:, 1:])  # pyright: ignore[reportCallIssue]
    return loss, {"loss": loss}


@functools.cache  # jit knows an objective by identity: the same weight compiles one step
def l1_objective(weight: optax.Schedule | None, dropout_seed: int | None = None) -> Objective:
    """The mean cross-entropy + weight(step) * the L1 norm of the feed-forward activations, which makes them sparse.

    The norm is that of a token in a layer, summed over neurons, averaged over tokens and layers: it does not change
    with the batch or the depth. Metrics are "loss" (the cross-entropy), "l1" (the norm), "l1_weight", and "density":
    the share of activations that are not zero.

    Args:
        weight: of the steps before this one; `optax.constant_schedule(2e-5)` is TwELL's, `sine_stages` ProSparse's.
            None adds nothing, and measures all the same: cheaper than a weight of 0, whose gradient is computed.
        dropout_seed: for a model that is called with `rngs`, to train it with its dropout (see `dropout_rngs`), which
            the metrics then show too; None for a model as it is.

    Source: Cetin et al., "Sparser, Faster, Lighter Transformer Language Models" (TwELL, ICML'26), section 2.2, as their
    code has it, with the weight of 2e-5; their equation 2 also divides by the number of neurons. Song et al.,
    "ProSparse" (COLING'25), equation 2, sums over layers: its weights, times the number of layers, are those here.
    """

    def objective(model: nnx.Module, windows: Int32[Array, "batch length_plus_1"], step: Int[Array, ""]):
        options = {} if dropout_seed is None else {"rngs": dropout_rngs(dropout_seed, windows, step)}
        logits, captured = nnx.capture(model, nnx.Intermediate)(windows[:, :-1], **options)
        loss = next_token_loss(logits, windows[:, 1:])
        activations = ffn_activations(captured)
        l1 = _mean(jnp.abs(h).astype(jnp.float32).sum(axis=-1).mean() for h in activations)
        density = _mean((h != 0).mean(dtype=jnp.float32) for h in activations)
        metrics = {"loss": loss, "l1": l1, "l1_weight": jnp.float32(0), "density": density}
        if weight is None:
            return loss, metrics
        with jax.numpy_dtype_promotion("standard"):  # optax's schedules multiply floats with their int32 step
            factor = jnp.asarray(weight(step), jnp.float32)
        return loss + factor * l1, metrics | {"l1_weight": factor}

    return objective


def dropout_rngs(seed: int, windows: Int32[Array, "batch length_plus_1"], step: Int[Array, ""] | int) -> nnx.Rngs:
    """What to drop in a step: a function of the seed, the step and the windows alone.

    So a training that is continued drops the same. The micro-batches of a step do not, but for chance: the sum of their
    tokens tells them apart.
    """
    key = jax.random.fold_in(jax.random.key(seed), step)
    return nnx.Rngs(dropout=jax.random.fold_in(key, windows.sum(dtype=jnp.int32)))


def ffn_activations(captured: Any) -> list[Float[Array, "tokens d_ff"]]:
    """The feed-forward activations in what `nnx.capture` gives, in the order of the layers.

    Raises:
        ValueError: there is none in it.
    """
    leaves = jax.tree.leaves_with_path(captured)
    found = [x for path, x in leaves if any(getattr(key, "key", None) == FFN_ACTIVATION for key in path)]
    if not found:
        raise ValueError(f"the model must capture its feed-forward activations as {FFN_ACTIVATION}; it captured none")
    return found


def sine_stages(peaks: Sequence[float], ends: Sequence[int]) -> optax.Schedule:
    """ProSparse's weight of the L1 norm: constant in a first stage, then up from peak to peak, each along a sine.

    In step t = 1, 2, ... of stage i, which goes from step ends[i-1] to ends[i]:
    weight = peaks[i-1] + (peaks[i] - peaks[i-1]) * (sin(-pi/2 + pi * (t - ends[i-1]) / (ends[i] - ends[i-1])) + 1) / 2;
    the first stage has peaks[0] throughout, and what comes after the last one the last peak.

    Args:
        peaks: the weight at the end of each stage; none may be less than the one before.
        ends: the last step of each stage.

    Returns:
        The weight as a function of the steps before this one, t - 1, as optax counts.

    Raises:
        ValueError: there is no stage, or peaks or ends are not as many or not in order.

    Source: Song et al., "ProSparse" (COLING'25), appendix B, algorithm 1.
    """
    if not peaks or len(peaks) != len(ends):
        raise ValueError(f"peaks and ends must be as many, at least one; got {len(peaks)} and {len(ends)}")
    if not 0 <= peaks[0] < np.inf or not all(low <= high < np.inf for low, high in pairwise(peaks)):
        raise ValueError(f"peaks must be finite, at least 0, and none less than the one before; got {tuple(peaks)}")
    starts, troughs = (0, *ends[:-1]), (peaks[0], *peaks[:-1])
    if not all(start < end for start, end in zip(starts, ends, strict=True)):
        raise ValueError(f"ends must rise from 1 on; got {tuple(ends)}")

    def weight(step) -> Float[Array, ""]:
        t = jnp.asarray(step, jnp.int32) + 1
        stage = jnp.minimum(jnp.searchsorted(jnp.asarray(ends, jnp.int32), t), len(ends) - 1)
        start, end, trough, peak = (jnp.asarray(x, jnp.float32)[stage] for x in (starts, ends, troughs, peaks))
        share = jnp.clip((t.astype(jnp.float32) - start) / (end - start), 0, 1)
        return trough + (peak - trough) * (jnp.sin(jnp.pi * (share - 0.5)) + 1) / 2

    return weight


def _mean(values) -> Float[Array, ""]:
    return jnp.stack(list(values)).mean()
