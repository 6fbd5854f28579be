"""How a kernel is launched: Mosaic takes 0.1 to 0.5 s to lower one, and a model calls it in every layer."""

import functools
from collections.abc import Callable

import jax


def lowered_once[**P, T](*static: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """For the function that launches a kernel: calls of a program that are alike share one trace and one lowering.

    Args:
        *static: names of its arguments that are no arrays, besides `config` and `interpret`.
    """
    return functools.partial(jax.jit, static_argnames=("config", "interpret", *static))
