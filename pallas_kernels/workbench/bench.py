"""Times a kernel beside its peers and its bound, and checks the result in the same run."""

import datetime
import json
import platform
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib

from pallas_kernels.case import Case, relative_error, tolerance
from pallas_kernels.tuning import tuned_config
from pallas_kernels.workbench.arguments import split_static
from pallas_kernels.workbench.gpus import find_gpu
from pallas_kernels.workbench.kernels import Kernel
from pallas_kernels.workbench.timing import Timer, cupti, interleaved_us, jitted, reference_output


def bench_case(kernel: Kernel, case: Case, dtype: Any, device_kind: str, timer: Timer = cupti) -> dict[str, Any]:
    """One row: the kernel as a user gets it (`config` and `implementation` None), and its peers.

    Args:
        kernel: the kernel.
        case: one of its cases.
        dtype: one of the case's dtypes.
        device_kind: the device of this machine.
        timer: measures a jitted function.

    Returns:
        Flat: kernel, case, dtype, tuned, time_us, <peer>_us, speedup over the peer "dense", bound_us (None for a GPU
        of unknown rates), tflops, gbps, error, and ok: whether the error is within the tolerance.
    """
    args = case.make(jax.random.key(0), jnp.dtype(dtype))
    arrays, _ = split_static(args)
    ref = reference_output(kernel, args)
    peers = {name: jitted(peer, args) for name, peer in kernel.module.peers(*args).items()}
    outputs, times = interleaved_us({kernel.name: jitted(kernel.function, args)} | peers, arrays, timer)
    time_us, error = times.pop(kernel.name), relative_error(outputs[kernel.name], ref)
    work, gpu = kernel.module.work(*args), find_gpu(device_kind)
    row = {
        "kernel": kernel.name,
        "case": case.name,
        "dtype": jnp.dtype(dtype).name,
        "tuned": tuned_config(kernel.name, kernel.module.Config, *args) is not None,
        "time_us": round(time_us, 2),
        **{f"{peer}_us": round(us, 2) for peer, us in times.items()},
        "bound_us": None if gpu is None else round(gpu.bound_us(work), 2),
        "tflops": round(work.flops / time_us / 1e6, 2),
        "gbps": round(work.bytes / time_us / 1e3, 1),
        "error": error,
        "ok": error < tolerance(dtype),
    }
    return row | ({"speedup": round(times["dense"] / time_us, 3)} if "dense" in times else {})


def write_rows(path: Path, kernel: Kernel, device_kind: str, rows: list[dict[str, Any]]) -> None:
    """Keeps the rows with all that is needed to know what they are."""
    record = {
        "experiment": f"bench_{kernel.name}",
        "device": device_kind,
        "versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "python": platform.python_version()},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m pallas_kernels", *sys.argv[1:]]),
        "rows": rows,
    }
    path.write_text(json.dumps(record, indent=2) + "\n")
