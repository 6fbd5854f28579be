"""Magnitude pruning while a model is trained: masks that are made anew every so many steps, ever sparser.

An optax transformation around any other: what it masks stays zero to the bit, and masks are part of its state, so a
new pattern compiles nothing. Source: Zhu and Gupta, "To prune, or not to prune" (2017), equation 1; PIT (SOSP'23),
section 5.2, trains with it at several granularities.
"""

import dataclasses
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from sparsellm.pruning.magnitude import MAGNITUDE
from sparsellm.pruning.method import Scored, check_sparsity
from sparsellm.pruning.patterns import NM, Pattern, Unstructured


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradualConfig:
    """When to prune how much.

    Attributes:
        sparsity: at the end.
        begin: optimizer steps before the first mask.
        end: the step by which the last sparsity is reached; masks are still renewed after it.
        every: steps from one mask to the next.
        pattern: where zeros may lie; not n:m, which says its sparsity itself.
        select: a regular expression that is found in the paths of the kernels to prune, "layers.0.fc1.kernel".
    """

    sparsity: float
    begin: int = 0
    end: int
    every: int = 1
    pattern: Pattern = Unstructured()
    select: str = r"^layers\.(?!.*\brouter\b).*\.(kernel|wi|wo)$"

    def __post_init__(self):
        check_sparsity(self.sparsity)
        if not 0 <= self.begin < self.end:
            raise ValueError(f"begin must be less than end; got begin={self.begin}, end={self.end}")
        if self.every < 1:
            raise ValueError(f"every must be at least 1; got every={self.every}")
        if isinstance(self.pattern, NM):
            raise ValueError(f"pattern must not be n:m, whose sparsity cannot grow; got {self.pattern}")


def cubic_sparsity(config: GradualConfig, step: Int[Array, ""]) -> Float[Array, ""]:
    """sparsity * (1 - (1 - t)^3), t going from 0 at `begin` to 1 at `end`."""
    t = (step - config.begin).astype(jnp.float32) / (config.end - config.begin)
    return config.sparsity * (1 - (1 - jnp.clip(t, 0, 1)) ** 3)


class GradualState(NamedTuple):
    """State of the transformation: the inner one's, the masks by path, and the steps so far."""

    inner: optax.OptState
    masks: dict[str, Array]
    step: Array


def gradually_pruned(inner: optax.GradientTransformation, config: GradualConfig) -> optax.GradientTransformation:
    """`inner`, with the selected kernels ever sparser. Make it once: jit knows a transformation by identity.

    Example:
        transformation = gradually_pruned(training.optimizer(train_config), GradualConfig(sparsity=0.9, end=1000))
        state = TrainState(params, transformation.init(params))
        state, metrics = train_step(graphdef, transformation, state, windows)

    Raises:
        ValueError: (by `init`) no kernel is selected.
    """

    def init(params: Any) -> GradualState:
        masks = {name: jnp.ones(x.shape, bool) for name, x in _named(params).items() if re.search(config.select, name)}
        if not masks:
            raise ValueError(f"select must be found in the path of a parameter; got select={config.select!r}")
        return GradualState(inner.init(params), masks, jnp.int32(0))

    def update(updates: Any, state: GradualState, params: Any = None) -> tuple[Any, GradualState]:
        if params is None:
            raise ValueError("params must be given, as masks are made of them; got None")
        updates, inner_state = inner.update(updates, state.inner, params)
        step, before, steps = state.step + 1, _named(params), _named(updates)
        trained = {name: (before[name] + steps[name]).astype(before[name].dtype) for name in state.masks}
        sparsity = cubic_sparsity(config, step)
        due = (step >= config.begin) & ((step - config.begin) % config.every == 0)
        masks = lax.cond(
            due,
            lambda: {name: _mask(x, config.pattern, sparsity) for name, x in trained.items()},
            lambda: state.masks,
        )
        # x + -x is zero to the bit.
        steps |= {name: jnp.where(mask, steps[name], -before[name]) for name, mask in masks.items()}
        updates = jax.tree.unflatten(jax.tree.structure(updates), list(steps.values()))
        return updates, GradualState(inner_state, masks, step)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType] - of any state


def _mask(kernel: Array, pattern: Pattern, sparsity: Float[Array, ""], method: Scored = MAGNITUDE) -> Array:
    def one(kernel):
        return pattern.keep(method.score(kernel.astype(jnp.float32), None), sparsity, method.compare)

    return one(kernel) if kernel.ndim == 2 else lax.map(one, kernel)  # experts


def _named(tree: Any) -> dict[str, Array]:
    """Leaves by their dotted path, in the tree's order."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): x for path, x in leaves}
