"""Whole programs: their time by the clock on the wall, their memory by XLA's own account, and what is compiled."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.workbench.timing import Timer

GIB = 2**30


def wall_clock(function: Callable[..., Any], arrays: list[Any], iterations: int) -> tuple[Any, list[float]]:
    """A `Timer` for anywhere: time until the result is there, dispatch included."""
    out, times = jax.block_until_ready(function(*arrays)), []
    for _ in range(iterations):
        start = time.perf_counter()
        jax.block_until_ready(function(*arrays))
        times.append(1e6 * (time.perf_counter() - start))
    return out, times


def compile_model(
    function: Callable[..., Any], model: nnx.Module, *arrays: Any
) -> tuple[list[Array], Callable[..., Any]]:
    """The model's leaves, and `function(model, *arrays)` compiled, to be called with them in the model's place."""
    graphdef, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)  # a list is handed over quickly, a state in milliseconds
    call = jax.jit(lambda leaves, *arrays: function(nnx.merge(graphdef, jax.tree.unflatten(tree, leaves)), *arrays))
    return leaves, call.lower(leaves, *arrays).compile()


@contextlib.contextmanager
def compilations() -> Iterator[list[float]]:
    """The seconds of every compilation inside of the block, as they come."""
    compiled: list[float] = []

    def count(event: str, duration_secs: float, **_) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


def memory_gib(compiled: Any) -> float:
    """GiB that a compiled program holds at once, its arguments among them."""
    found = compiled.memory_analysis()
    buffers = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    return round((buffers - found.alias_size_in_bytes) / GIB, 3)


def peak_memory_gib() -> float | None:
    """GiB that this process has held of its device at most, so far; None where the device does not say."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return round(stats["peak_bytes_in_use"] / GIB, 3) if "peak_bytes_in_use" in stats else None


def measure(
    function: Callable[..., Any], model: nnx.Module, arrays: list[Any], repeats: int, timer: Timer = wall_clock
) -> tuple[Any, float, float]:
    """Compiles `function(model, *arrays)`, and runs it.

    Returns:
        Its output; the median time in milliseconds; and GiB that the program holds at once, the weights among them.
    """
    leaves, compiled = compile_model(function, model, *arrays)
    out, times = timer(compiled, [leaves, *arrays], repeats)
    return out, round(statistics.median(times) / 1e3, 3), memory_gib(compiled)


@jax.jit
def median_error(out: Float[Array, "*rows logits"], expected: Float[Array, "*rows logits"]) -> Float[Array, ""]:
    """The median over rows of the relative error of a row's logits; NaN where anything is."""
    error = jnp.linalg.norm(out - expected, axis=-1) / jnp.linalg.norm(expected, axis=-1)
    return jnp.median(error)
