"""Finds the best config for the bench cases of a kernel, and keeps it in the table of this device."""

import dataclasses
import functools
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.case import Case, relative_error, tolerance
from pallas_kernels.tuning import describe, read_table, table_path
from pallas_kernels.workbench.arguments import on_shapes, refusal, split_static
from pallas_kernels.workbench.kernels import Kernel
from pallas_kernels.workbench.timing import ITERATIONS, Timer, cupti, jitted, reference_output


def tune(
    kernel: Kernel,
    device_kind: str,
    *,
    folder: Path | None = None,
    again: bool = False,
    limit_s: float = math.inf,
    timer: Timer = cupti,
    report: Callable[[str], None] = print,
) -> bool:
    """Times every candidate on every bench case, checks its result, and keeps the best for each set of arguments.

    Cases that differ in values only (density) share an entry: its config has the least geometric mean of their times.
    An entry is written as soon as it is known, so an interrupted run goes on where it stopped.

    Args:
        kernel: the kernel.
        device_kind: the device of this machine.
        folder: of the tables; None means that of the package.
        again: redo entries that are there.
        limit_s: seconds after which no further config is started.
        timer: measures a jitted function.
        report: takes a line of progress.

    Returns:
        Whether every candidate was right. A wrong or failing one is reported and never chosen.
    """
    path = table_path(device_kind, folder)
    deadline = time.monotonic() + limit_s
    all_right = True
    for key, cases in _cases_by_key(kernel).items():
        if not again and key in read_table(path).get(kernel.name, {}):
            report(f"{key}: tuned already")
            continue
        first, dtype = cases[0]
        if reason := refusal(functools.partial(kernel.function, implementation="mosaic_gpu"), first, dtype):
            report(f"{key}: left to xla ({reason})")
            continue
        entry, right = _tune_entry(kernel, key, cases, deadline, timer, report)
        all_right &= right
        if time.monotonic() > deadline:
            report(f"{key}: time is up, not finished; run `tune` again to go on from here")
            break
        if entry is not None:
            _write_entry(path, kernel.name, key, entry)
            report(f"{key}: {entry['config']} -> {path}")
    return all_right


def _cases_by_key(kernel: Kernel) -> dict[str, list[tuple[Case, Any]]]:
    groups: dict[str, list[tuple[Case, Any]]] = {}
    for case in kernel.cases:
        for dtype in case.dtypes if case.bench else ():
            groups.setdefault(on_shapes(describe, case, dtype), []).append((case, jnp.dtype(dtype)))
    return groups


def _tune_entry(kernel: Kernel, key: str, cases, deadline: float, timer: Timer, report) -> tuple[dict | None, bool]:
    """The table entry of these cases, None if no config is right in all of them; and whether all configs were."""
    measured: dict[Any, dict[str, dict[str, float]]] = {}
    functions: dict[Any, Callable[..., Any]] = {}
    wrong = set()
    for case, dtype in cases:
        args = case.make(jax.random.key(0), dtype)
        arrays, _ = split_static(args)
        ref = reference_output(kernel, args)
        configs = kernel.module.candidates(*args)
        for i, config in enumerate(configs):
            if config in wrong or time.monotonic() > deadline:
                continue
            name = f"{key} {case.name} {i + 1}/{len(configs)} {config}"
            if config not in functions:  # cases of one key share the compiled function
                functions[config] = jitted(kernel.function, args, config=config, implementation="mosaic_gpu")
            measurement, found = _measure(functions[config], arrays, ref, dtype, timer)
            report(f"{name}: {found}")
            if measurement is None:
                wrong.add(config)
            else:
                measured.setdefault(config, {})[case.name] = measurement
    complete = {c: m for c, m in measured.items() if c not in wrong and len(m) == len(cases)}
    if not complete:
        return None, not wrong
    best = min(complete, key=lambda c: statistics.geometric_mean(x["time_us"] for x in complete[c].values()))
    return {"config": dataclasses.asdict(best), "cases": complete[best]}, not wrong


def _measure(function, arrays, ref, dtype, timer: Timer) -> tuple[dict[str, float] | None, str]:
    """Time and error of a config, None if it is no good; and the same in words."""
    try:
        out, times = timer(function, arrays, ITERATIONS)
        error = relative_error(out, ref)
    except Exception as problem:  # a config that does not compile or crashes is a finding, not the end
        return None, f"FAILED, {type(problem).__name__}: {problem}"
    if not error < tolerance(dtype):
        return None, f"WRONG, error {error:.1e} where {tolerance(dtype):g} is allowed"
    time_us = round(statistics.median(times), 2)
    return {"time_us": time_us, "error": error}, f"{time_us} us"


def _write_entry(path: Path, kernel: str, key: str, entry: dict[str, Any]) -> None:
    """Merges an entry into the table: whole or not at all, whenever it is interrupted."""
    table = read_table(path)
    table.setdefault(kernel, {})[key] = entry
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
        json.dump(table, file, indent=2, sort_keys=True)
        file.write("\n")
    os.chmod(file.name, 0o644)  # a temporary file is its owner's alone
    os.replace(file.name, path)
