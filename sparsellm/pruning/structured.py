"""Structured pruning: whole heads and feed-forward neurons go, and a smaller dense model comes out.

Parameters that make no sense without each other are one structure: a head's columns of q, k and v and its rows of the
output projection; a neuron's column of fc1 and its row of fc2. It is worth what the loss would change, to first or
second order, if its parameters were zero:

    first order |w g|, second order |w g - w^2 F / 2|, summed over the structure;   F: mean of squared gradients

Source: Ma et al., "LLM-Pruner: On the Structural Pruning of Large Language Models" (NeurIPS'23), equations 3 to 5,
element-wise, summed over a group. Which couplings a model of OPT's names has is written down here, not discovered. With
a loss that is a mean over tokens, g is so small that the second order hardly changes the ranking.
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
from sparsellm.pruning.walk import check_uncompressed
from sparsellm.text import check_tokens

# Parameters of a layer -> the dimension that is divided among its heads, or its neurons.
HEADS = {
    **{f"self_attn.{name}_proj.{part}": axis for name in "qkv" for part, axis in (("kernel", 1), ("bias", 0))},
    "self_attn.out_proj.kernel": 0,
}
NEURONS = {"fc1.kernel": 1, "fc1.bias": 0, "fc2.kernel": 0}
NEURONS |= {"fc1.weight": 0, "fc1_up.kernel": 1, "fc1_up.bias": 0}  # of a model that is neuron-major, or gated


def prune_structures[M: nnx.Module](
    model: M,
    windows: Int32[np.ndarray, "windows length_plus_1"],
    *,
    heads: float = 0.0,
    neurons: float = 0.0,
    order: Literal[1, 2] = 1,
    layers: Sequence[int] | None = None,
    multiple: int = 1,
) -> M:
    """A smaller model, without the heads and neurons that matter least; `model` is not changed.

    Args:
        model: an OPT.
        windows: tokens to measure the loss on, each window's gradient by itself.
        heads: share of the heads of each layer that go; one stays at least.
        neurons: share of the neurons of each layer that go.
        order: of the Taylor expansion.
        layers: which layers to prune; None for all but the first and the last.
        multiple: kept neurons are rounded up to a multiple of it; 128 suits tensor cores.

    Returns:
        A model of the same class. Its config says the new `d_ff`, or, where layers came to differ or lost heads, the
        `layer_sizes`.

    Raises:
        ValueError: arguments are out of range.
    """
    config = cast(Any, model).config
    pruned = range(1, config.layers - 1) if layers is None else layers
    for name, share in (("heads", heads), ("neurons", neurons)):
        if not 0 <= share < 1:
            raise ValueError(f"{name} must be a share from 0 to less than 1; got {name}={share}")
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2; got order={order}")
    if multiple < 1 or not set(pruned) <= set(range(config.layers)):
        raise ValueError(
            f"multiple must be at least 1, layers 0 to {config.layers - 1}; got multiple={multiple}, layers={layers}"
        )
    if not len(pruned):
        raise ValueError(f"layers must name one at least: None leaves none of {config.layers}; got layers={layers}")
    check_uncompressed(model)
    params = _flat(nnx.state(model, nnx.Param))
    importance = parameter_importance(model, windows, order=order)
    sizes = [config.sizes(i) for i in range(config.layers)]
    for i in pruned:
        layer_heads, d_ff = sizes[i]
        kept_heads = max(layer_heads - int(heads * layer_heads), 1)
        kept_neurons = min(math.ceil((d_ff - int(neurons * d_ff)) / multiple) * multiple, d_ff)
        sizes[i] = (kept_heads, kept_neurons)
        for parts, count, kept in ((HEADS, layer_heads, kept_heads), (NEURONS, d_ff, kept_neurons)):
            named = {path: axis for name, axis in parts.items() if (path := f"layers.{i}.{name}") in params}
            keep = best(importance, named, count, kept)
            for name, axis in named.items():
                params[name] = take(params[name], axis, count, keep)
    if all(size == (config.heads, sizes[0][1]) for size in sizes):
        config = dataclasses.replace(config, d_ff=sizes[0][1], layer_sizes=None)
    else:
        config = dataclasses.replace(config, layer_sizes=tuple(sizes))
    smaller = nnx.eval_shape(lambda: type(model)(config, rngs=nnx.Rngs(0)))  # pyright: ignore[reportCallIssue]
    graphdef, abstract = nnx.split(smaller)
    state = [(path, variable.replace(params[_dotted(path)])) for path, variable in nnx.to_flat_state(abstract)]
    return nnx.merge(graphdef, nnx.from_flat_state(state))


def parameter_importance(
    model: nnx.Module, windows: Int32[np.ndarray, "windows length_plus_1"], *, order: int
) -> dict[str, Float[Array, "..."]]:
    """|w g| or |w g - w^2 F / 2| of every parameter by its path, g and F means over windows; float32."""
    if not len(windows):
        raise ValueError("windows must hold at least one window; got none")
    check_tokens(windows, model)
    graphdef, params = nnx.split(model, nnx.Param)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    sums = (zeros, jax.tree.map(jnp.copy, zeros) if order == 2 else None)
    for window in windows:
        sums = _add_gradients(graphdef, params, sums, jnp.asarray(window[None]))
    return _flat(_salience(params, sums, jnp.float32(len(windows))))


@jax.jit
def _salience(params: nnx.State, sums: tuple[Any, Any], count: Float[Array, ""]) -> nnx.State:
    """Of each parameter, from the sums over `count` windows."""
    wide = jax.tree.map(lambda w: w.astype(jnp.float32), params)
    first = jax.tree.map(lambda w, g: w * g / count, wide, sums[0])
    if sums[1] is None:
        return jax.tree.map(jnp.abs, first)
    return jax.tree.map(lambda first, w, g: jnp.abs(first - 0.5 * w * w * g / count), first, wide, sums[1])


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _add_gradients(
    graphdef: nnx.GraphDef, params: nnx.State, sums: tuple[Any, Any], windows: Int32[Array, "batch length_plus_1"]
) -> tuple[Any, Any]:
    """Adds the gradient of the mean loss, and where wanted its square."""

    def loss(params: nnx.State) -> Float[Array, ""]:
        return next_token_loss(nnx.merge(graphdef, params)(windows[:, :-1]), windows[:, 1:])

    gradient = jax.tree.map(lambda g: g.astype(jnp.float32), jax.grad(loss)(params))
    first, second = sums
    first = jax.tree.map(jnp.add, first, gradient)
    return first, None if second is None else jax.tree.map(lambda total, g: total + g * g, second, gradient)


def best(importance: dict[str, Array], parts: dict[str, int], count: int, kept: int) -> Int[np.ndarray, " kept"]:
    """The `kept` of `count` structures that matter most, in their order."""
    total = sum(
        np.moveaxis(np.asarray(importance[name], np.float64), axis, 0).reshape(count, -1).sum(axis=1)
        for name, axis in parts.items()
    )
    return np.sort(np.argsort(-total, kind="stable")[:kept])  # of equals the first ones stay


def take(x: Float[Array, "..."], axis: int, count: int, keep: Int[np.ndarray, " kept"]) -> Float[Array, "..."]:
    """The kept ones of the `count` equal slices of a dimension."""
    width = x.shape[axis] // count
    return jnp.take(x, (keep[:, None] * width + np.arange(width)).reshape(-1), axis=axis)


def _flat(state: Any) -> dict[str, Array]:
    return {_dotted(path): variable[...] for path, variable in nnx.to_flat_state(state)}


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
