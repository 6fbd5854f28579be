"""Device times of kernels on the GPU of this machine."""

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax

from pallas_kernels.workbench.arguments import as_float32, split_static
from pallas_kernels.workbench.kernels import Kernel, KernelError

ITERATIONS = 10
ROUNDS = 3

# (jitted function of arrays, arrays, iterations) -> its output, and one device time in microseconds an iteration.
type Timer = Callable[[Callable[..., Any], list[Any], int], tuple[Any, list[float]]]


def cupti(function: Callable[..., Any], arrays: list[Any], iterations: int) -> tuple[Any, list[float]]:
    """Times the kernels that a jitted function launches, by CUPTI: dispatch from Python does not count.

    Raises:
        RuntimeError: it launches none.
    """
    from jax.experimental.mosaic.gpu import profiler

    out, times_ms = profiler.measure(function, iterations=iterations)(*arrays)
    if times_ms is None:
        raise RuntimeError("CUPTI saw no kernel: another profiler may hold it, or nothing ran on the GPU")
    return out, [1e3 * ms for ms in (times_ms if isinstance(times_ms, list) else [times_ms])]


def jitted(function: Callable[..., Any], args: tuple[Any, ...], **static: Any) -> Callable[..., Any]:
    """`function` of the arrays in `args` alone, compiled."""
    _, rest = split_static(args)
    return jax.jit(lambda *arrays: function(*rest.join(arrays), **static))


def reference_output(kernel: Kernel, args: tuple[Any, ...]) -> Any:
    """What the reference gives for these arguments in float32."""
    wide = as_float32(args)
    with jax.default_matmul_precision("highest"):
        return jitted(kernel.module.reference, wide)(*split_static(wide)[0])


def interleaved_us(
    functions: Mapping[str, Callable[..., Any]], arrays: list[Any], timer: Timer
) -> tuple[dict[str, Any], dict[str, float]]:
    """Median time of each function, taken in turns so that clocks and heat are the same for all.

    Returns:
        Outputs and microseconds, by the functions' names.
    """
    outputs, times = {}, {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            outputs[name], measured = timer(function, arrays, ITERATIONS)
            times[name] += measured
    return outputs, {name: statistics.median(measured) for name, measured in times.items()}


def require_gpu(kernel: Kernel, device_kind: str, command: str) -> None:
    """Raises KernelError where `command` cannot time this kernel."""
    if not device_kind.startswith("NVIDIA"):
        raise KernelError(f"{command} needs an NVIDIA GPU that jax can use; this machine has {device_kind} only")
    if kernel.devices and not device_kind.startswith(kernel.devices):
        raise KernelError(f"{kernel.name} runs on {', '.join(kernel.devices)}; this machine has {device_kind}")
