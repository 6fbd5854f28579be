"""What must hold for every kernel. Each check returns a `Result`: the command line prints it, the tests assert it."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.case import Case, relative_error, tolerance
from pallas_kernels.tile.device import device_kind
from pallas_kernels.tuning import describe
from pallas_kernels.workbench.arguments import Args, as_float32, made, on_shapes, refusal, split_static
from pallas_kernels.workbench.differentiate import compiled_value_and_gradients, value_and_gradients
from pallas_kernels.workbench.gpus import GPUS, Gpu, lower
from pallas_kernels.workbench.interpreter import TIMEOUT_S, run_interpreted
from pallas_kernels.workbench.kernels import Kernel

type Implementation = Literal["xla", "interpret", "mosaic_gpu"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What one check found.

    Attributes:
        check: the implementation that was compared with the reference, or "lower".
        case: name of the case; the GPU for "lower".
        dtype: of the case.
        status: "skipped" where the kernel says that it does not take this, or where this machine cannot run it.
        error: largest relative RMS error of value and gradients, where there is one.
        detail: what is wrong and what to do, why it was skipped, or what was covered.
        seconds: what it took.
    """

    check: str
    case: str
    dtype: str
    status: Literal["ok", "failed", "skipped"]
    error: float | None = None
    detail: str = ""
    seconds: float = 0.0


def has_gpu(kernel: Kernel) -> bool:
    """Whether the Mosaic kernel runs on this machine."""
    return bool(kernel.devices) and device_kind().startswith(kernel.devices)


def sized_for_gpu(case: Case, platform: str) -> bool:
    """Whether a case is too large for this platform ("cpu", "gpu")."""
    return case.bench and not case.small and platform == "cpu"


def check_kernel(kernel: Kernel, *, only: str | None = None, timeout_s: float = TIMEOUT_S) -> Iterator[Result]:
    """Every check of a kernel that this machine can run, one at a time; `only` one case, and then no lowering."""
    interpreted = []
    for case in (case for case in kernel.cases if only in (None, case.name)):
        if sized_for_gpu(case, jax.default_backend()):
            yield Result(check="xla", case=case.name, dtype="all", status="skipped", detail="sized for a GPU")
            continue
        for dtype in case.dtypes:
            yield check_path(kernel, case, dtype, "xla")
            if has_gpu(kernel):
                yield check_path(kernel, case, dtype, "mosaic_gpu")
            if kernel.devices and case.small:
                interpreted.append(check_path(kernel, case, dtype, "interpret", timeout_s=timeout_s))
                yield interpreted[-1]
    if not kernel.devices or only is not None:
        return
    if all(result.status == "skipped" for result in interpreted):
        detail = "no small case reaches the Mosaic kernel, so no race can be found; add one that it takes to CASES"
        yield Result(check="interpret", case="-", dtype="all", status="failed", detail=detail)
    for gpu in GPUS:
        for dtype in kernel.dtypes if claims(kernel, gpu) else kernel.dtypes[:1]:
            yield check_lowering(kernel, gpu, dtype)


def check_path(
    kernel: Kernel, case: Case, dtype: DTypeLike, implementation: Implementation, *, timeout_s: float = TIMEOUT_S
) -> Result:
    """Value and gradients of one implementation against those of the reference at float32.

    Interpreted, the value alone: the gradient of an interpreted kernel is not interpreted.

    Args:
        kernel: the kernel.
        case: one of its cases.
        dtype: one of the case's dtypes.
        implementation: "xla", "interpret" (on CPU, with race detection), or "mosaic_gpu" (compiled, on a GPU).
        timeout_s: seconds until an interpreted kernel counts as deadlocked.
    """
    start = time.perf_counter()
    try:
        function = functools.partial(kernel.function, implementation=implementation)
        if reason := refusal(function, case, dtype):
            if implementation == "xla":
                return _result("xla", case.name, dtype, "failed", detail=f"the xla path must take every case: {reason}")
            return _result(implementation, case.name, dtype, "skipped", detail=reason)
        errors = path_errors(kernel, case, dtype, implementation, timeout_s)
    except Exception as problem:  # whatever a prototype raises is a finding
        return _result(implementation, case.name, dtype, "failed", detail=_in_a_line(problem), start=start)
    wrong = [f"{part} off by {error:.1e}" for part, error in errors.items() if not error < tolerance(dtype)]
    detail = f"{', '.join(wrong)} from the reference; at most {tolerance(dtype):g} is right" if wrong else ""
    status = "failed" if wrong else "ok"
    return _result(implementation, case.name, dtype, status, error=max(errors.values()), detail=detail, start=start)


def path_errors(
    kernel: Kernel, case: Case, dtype: DTypeLike, implementation: Implementation, timeout_s: float = TIMEOUT_S
) -> dict[str, float]:
    """Relative RMS error of the value and of each gradient. Raises whatever the kernel or the interpreter raises."""
    elsewhere = implementation == "interpret" and jax.default_backend() != "cpu"
    device = jax.default_device(jax.devices("cpu")[0]) if elsewhere else contextlib.nullcontext()
    with device, jax.default_matmul_precision("highest"):
        args = made(case, dtype)
        function = functools.partial(kernel.function, implementation=implementation)
        gradient = case.gradient and implementation != "interpret"
        if implementation == "interpret":
            out = run_interpreted(lambda: _compiled(function, args, False), timeout_s=timeout_s)
        else:
            out = _compiled(function, args, gradient)
        ref = _compiled(kernel.module.reference, as_float32(args), gradient)
        return {part: relative_error(out[part], ref[part]) for part in ref}


def _compiled(function: Callable[..., Any], args: Args, gradient: bool) -> dict[str, Any]:
    arrays, static = split_static(args)
    return compiled_value_and_gradients(function, static, arrays, gradient=gradient)


def claims(kernel: Kernel, gpu: Gpu) -> bool:
    """Whether DEVICES names this GPU."""
    return bool(kernel.devices) and gpu.kind.startswith(kernel.devices)


def check_lowering(kernel: Kernel, gpu: Gpu, dtype: DTypeLike) -> Result:
    """Lowers every candidate config for `gpu`, and the gradients with the first one of each case; needs no GPU.

    A GPU that DEVICES does not name is tried with one config, only to report the reason.
    """
    start = time.perf_counter()
    lowered, problems, reason = 0, [], "the Mosaic kernel takes none of its cases"
    for case, config, gradient in _lowerings(kernel, dtype):
        try:
            with _claiming(kernel, gpu):
                _lower_one(kernel, case, dtype, config, gpu, gradient)
            lowered += 1
        except NotImplementedError as unsupported:  # the kernel leaves this case to xla
            reason = str(unsupported)
            continue
        except Exception as problem:  # whatever a prototype raises is a finding
            problems.append((f"{config} on case {case.name}", _in_a_line(problem)))
        if not claims(kernel, gpu):
            break
    result = functools.partial(_result, "lower", gpu.kind, dtype, start=start)
    if not claims(kernel, gpu):
        why = problems[0][1] if problems else "DEVICES does not name it, though it lowers" if lowered else reason
        return result("skipped", detail=f"not supported: {why}")
    if problems:
        detail = f"{len(problems)} of {len(problems) + lowered} configs fail, the first: {': '.join(problems[0])}"
        return result("failed", detail=detail)
    return result("ok", detail=f"{lowered} lowered") if lowered else result("skipped", detail=reason)


def _lowerings(kernel: Kernel, dtype: DTypeLike) -> Iterator[tuple[Case, Any, bool]]:
    """What to lower: each config with the first shape it fits, and the first of each shape, with the gradient.

    Shapes that are only timed need the former alone.
    """
    seen_shapes, seen_configs = set(), set()
    for case in kernel.cases:
        if jnp.dtype(dtype) not in [jnp.dtype(d) for d in case.dtypes]:
            continue
        if (shape := on_shapes(describe, case, dtype)) in seen_shapes:
            continue
        seen_shapes.add(shape)
        for i, config in enumerate(on_shapes(kernel.module.candidates, case, dtype)):
            if (i == 0 and not case.bench) or config not in seen_configs:
                yield case, config, case.gradient and i == 0 and not case.bench
            seen_configs.add(config)


def _lower_one(kernel: Kernel, case: Case, dtype: DTypeLike, config: Any, gpu: Gpu, gradient: bool) -> None:
    tracers, static = on_shapes(lambda *args: split_static(args), case, dtype)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in tracers]
    function = functools.partial(kernel.function, config=config, implementation="mosaic_gpu")
    lower(lambda *arrays: value_and_gradients(function, static.join(arrays), gradient=gradient), shapes, gpu)


@contextlib.contextmanager
def _claiming(kernel: Kernel, gpu: Gpu) -> Iterator[None]:
    """Lets a kernel be traced for a GPU that it does not claim: its own refusal would hide the reason."""
    module: Any = kernel.module
    named, module.DEVICES = module.DEVICES, (gpu.kind,)
    try:
        yield
    finally:
        module.DEVICES = named


def _in_a_line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:600]}"


def _result(check: str, case: str, dtype: DTypeLike, status, *, error=None, detail="", start=None) -> Result:
    seconds = 0.0 if start is None else time.perf_counter() - start
    name = jnp.dtype(dtype).name
    return Result(check=check, case=case, dtype=name, status=status, error=error, detail=detail, seconds=seconds)
