"""A kernel's value and gradients, for comparison with those of its reference."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.workbench.arguments import Args, Static, is_float, split_static


def value_and_gradients(function: Callable[..., Any], args: Args, *, gradient: bool = True) -> dict[str, Any]:
    """Value, and the gradients of every floating-point array, for one fixed cotangent.

    Args:
        function: of `args`.
        args: traced or not.
        gradient: False leaves the gradients out, as does a value without floating-point arrays.

    Returns:
        "value", and "gradient i" for the i-th array among the arguments.
    """
    arrays, static = split_static(args)
    wanted = [i for i, x in enumerate(arrays) if is_float(x)]
    if not gradient:
        return {"value": function(*args)}

    def of_floats(*floats):
        merged = list(arrays)
        for i, x in zip(wanted, floats, strict=True):
            merged[i] = x
        return function(*static.join(merged))

    value, pull_back = jax.vjp(of_floats, *(arrays[i] for i in wanted))
    leaves, tree = jax.tree.flatten(value)
    if not any(is_float(leaf) for leaf in leaves):
        return {"value": value}
    gradients = pull_back(tree.unflatten([_cotangent(leaf) for leaf in leaves]))
    return {"value": value} | {f"gradient {i}": x for i, x in zip(wanted, gradients, strict=True)}


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames=("gradient",))
def compiled_value_and_gradients(function, static: Static, arrays: list[Any], *, gradient: bool) -> dict[str, Any]:
    """`value_and_gradients` under jit, which keeps what it compiled for a function and a shape."""
    return value_and_gradients(function, static.join(arrays), gradient=gradient)


def _cotangent(value: Any) -> Any:
    """Eighths from -1 to 1, scattered by a multiplicative hash: the same in every precision, and quick to compile."""
    if not is_float(value):
        return np.zeros(value.shape, jax.dtypes.float0)
    hashed = jnp.arange(value.size, dtype=jnp.uint32) * np.uint32(2654435761) >> 16
    eighths = (hashed % 17).astype(jnp.int32) - 8
    return eighths.reshape(value.shape).astype(value.dtype) / 8
