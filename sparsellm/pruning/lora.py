"""Recovery of a pruned model: low-rank updates of its linear layers are trained, then added to their kernels.

For models whose structures were pruned: an update is dense, and would fill the zeros of the other patterns.
Source: Hu et al., "LoRA" (2021), section 4.1; Ma et al., "LLM-Pruner" (NeurIPS'23), section 3.3: rank 8, 1e-4.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int32

from sparsellm.objectives import next_token_loss
from sparsellm.training import Batches, TrainConfig, TrainState, optimizer


def recover(
    model: Any,
    batches: Batches,
    config: TrainConfig,
    *,
    rank: int = 8,
    select: str = r"^layers\.",
    rngs: nnx.Rngs,
    report: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Trains rank-`rank` updates of the model's linear layers, and adds them to the model in place once they are done.

    Args:
        model: maps tokens [batch, length] to logits [batch, length, vocab].
        batches: the windows of each step.
        config: how; its `checkpoint_steps` is not used.
        rank: of the updates.
        select: a regular expression that is found in the paths of the layers to update, "layers.0.fc1".
        rngs: makes the updates' first factors; the second ones start at zero.
        report: called with the step, from 1, and its loss.

    Returns:
        The loss of every step, nats a token.

    Raises:
        ValueError: the rank is not positive, no layer is selected, or the model reads kernels past their layers.
        FloatingPointError: the loss is not finite.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1; got rank={rank}")
    if getattr(getattr(model, "config", None), "sparse_rows", None) is not None:
        raise ValueError(f"sparse_rows must be None while updates are trained; got {model.config.sparse_rows}")
    layers = {
        path: module
        for path, module in nnx.iter_modules(model)
        if type(module) is nnx.Linear and re.search(select, ".".join(map(str, path)))
    }
    if not layers:
        raise ValueError(f"select must be found in the path of a linear layer; got select={select!r}")
    updates = {path: _with_update(linear, rank, rngs) for path, linear in layers.items()}
    for path, update in updates.items():
        _replace(model, path, update)
    try:
        losses = _train(model, batches, config, report)
    finally:
        for path, linear in layers.items():
            _replace(model, path, linear)
    for path, linear in layers.items():
        linear.kernel[...] = _merged(linear.kernel[...], updates[path].lora_a[...], updates[path].lora_b[...])
    return losses


def _with_update(linear: nnx.Linear, rank: int, rngs: nnx.Rngs) -> nnx.LoRA:
    sizes = linear.in_features, rank, linear.out_features
    return nnx.LoRA(*sizes, base_module=linear, dtype=linear.dtype, rngs=rngs)


def _replace(model: Any, path: tuple[Any, ...], module: nnx.Module) -> None:
    for key in path[:-1]:
        model = model[key] if isinstance(key, int) else getattr(model, key)
    setattr(model, path[-1], module)


@jax.jit
def _merged(kernel: Array, a: Float[Array, "d_in rank"], b: Float[Array, "rank d_out"]) -> Array:
    return (kernel.astype(jnp.float32) + jnp.dot(a, b, precision=lax.Precision.HIGHEST)).astype(kernel.dtype)


def _train(
    model: Any, batches: Batches, config: TrainConfig, report: Callable[[int, float], None] | None
) -> list[float]:
    graphdef, updates, frozen = nnx.split(model, nnx.LoRAParam, ...)
    transformation = optimizer(config)
    state = TrainState(updates, transformation.init(updates))
    losses = []
    for step in range(1, config.steps + 1):
        state, loss = _step(graphdef, transformation, state, frozen, jnp.asarray(batches[step - 1]))
        losses.append(float(loss))
        if not jnp.isfinite(loss):
            raise FloatingPointError(f"the loss must be finite; got {losses[-1]} at step {step}")
        if report:
            report(step, losses[-1])
    nnx.update(model, state.params)
    return losses


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _step(
    graphdef: nnx.GraphDef,
    transformation: optax.GradientTransformation,
    state: TrainState,
    frozen: nnx.State,
    windows: Int32[Array, "batch length_plus_1"],
) -> tuple[TrainState, Float[Array, ""]]:
    """One step of the updates alone: nothing is differentiated in what is frozen."""

    def loss(updates: nnx.State) -> Float[Array, ""]:
        return next_token_loss(nnx.merge(graphdef, updates, frozen)(windows[:, :-1]), windows[:, 1:])

    value, gradient = jax.value_and_grad(loss)(state.params)
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to the power of its int32 count
        updates, opt_state = transformation.update(gradient, state.opt_state, state.params)
    return TrainState(optax.apply_updates(state.params, updates), opt_state), value  # pyright: ignore
