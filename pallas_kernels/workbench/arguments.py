"""The arguments of a case: arrays apart from what is static, shapes alone, and whether a kernel takes them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.case import Case

type Args = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Static:
    """What is left of some arguments without their arrays; hashable, so that it can be static under jit."""

    tree: Any
    leaves: tuple[Any, ...]  # None in the place of an array

    def join(self, arrays: Sequence[Any]) -> Args:
        """The arguments with these arrays."""
        left = iter(arrays)
        return self.tree.unflatten([next(left) if leaf is None else leaf for leaf in self.leaves])


def split_static(args: Args) -> tuple[list[Any], Static]:
    """The arrays in `args`, and the rest."""
    leaves, tree = jax.tree.flatten(args)
    arrays = [leaf for leaf in leaves if hasattr(leaf, "dtype")]
    return arrays, Static(tree, tuple(None if hasattr(leaf, "dtype") else leaf for leaf in leaves))


def on_shapes[T](function: Callable[..., T], case: Case, dtype: Any) -> T:
    """What `function` gives for the traced arguments of a case: shapes and dtypes are known, nothing is computed."""
    results = []

    def trace(key):
        results.append(function(*case.make(key, jnp.dtype(dtype))))

    jax.eval_shape(trace, jax.random.key(0))
    return results[0]


def made(case: Case, dtype: Any, seed: int = 0) -> Args:
    """The arguments of a case, by one compiled program: operation by operation they would be ten small ones."""
    static = on_shapes(lambda *args: split_static(args)[1], case, dtype)
    make = jax.jit(lambda key: split_static(case.make(key, jnp.dtype(dtype)))[0])
    return static.join(make(jax.random.key(seed)))


def as_float32(args: Args) -> Args:
    """The same arguments with every floating-point array in float32."""
    arrays, static = split_static(args)
    return static.join([x.astype(jnp.float32) if is_float(x) else x for x in arrays])


def refusal(function: Callable[..., Any], case: Case, dtype: Any) -> str | None:
    """Why a kernel does not take the arguments of a case (its own NotImplementedError); None if it takes them.

    Only tracing is the kernel's word: a NotImplementedError from lowering or interpreting it later is a defect.
    """
    try:
        on_shapes(function, case, dtype)
    except NotImplementedError as reason:
        return str(reason) or "no reason given"
    return None


def is_float(x: Any) -> bool:
    """Whether an array holds floating-point values."""
    return jnp.issubdtype(x.dtype, jnp.floating)
