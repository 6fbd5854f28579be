"""The workbench: lists, checks, tunes and times the kernels, and starts new ones.

python -m pallas_kernels list
python -m pallas_kernels check gather_matmul
"""

import argparse
import functools
import math
import os
import shlex
import sys
from collections import Counter
from pathlib import Path

import pallas_kernels
from pallas_kernels.tile.device import device_kind
from pallas_kernels.tuning import describe, read_table, table_path
from pallas_kernels.workbench.arguments import on_shapes
from pallas_kernels.workbench.bench import bench_case, write_rows
from pallas_kernels.workbench.checks import check_kernel
from pallas_kernels.workbench.interpreter import TIMEOUT_S, XLA_THREADS
from pallas_kernels.workbench.kernels import Kernel, KernelError, load_kernel
from pallas_kernels.workbench.new import new_kernel
from pallas_kernels.workbench.timing import require_gpu
from pallas_kernels.workbench.tune import tune

OK, FAILED, MISUSED = 0, 1, 2
CHECK_ROW = "{:<10} {:<{width}} {:<9} {:>8} {:>7}  {}"
BENCH_ROW = "{:<{width}} {:<9} {:>9} {:>9} {:>7} {:>9} {:>8}  {}"


def _seconds(text: str) -> float:
    seconds = float(text)
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"must be above 0; got {text}")
    return seconds


def parser() -> argparse.ArgumentParser:
    """The command line."""
    main = argparse.ArgumentParser(prog="python -m pallas_kernels", description="A workbench for GPU kernels.")
    commands = main.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the kernels: what they compute, on which GPUs, in which dtypes")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.add_argument("kernel", metavar="KERNEL", help="one of `list`, or a kernel file (.py) anywhere")
        return added

    check = command("check", "against the reference, under the race detector, and lowered for each GPU; needs none")
    check.add_argument("--case", metavar="CASE", help="this case alone (and no lowering)")
    check.add_argument(
        "--timeout", type=_seconds, default=TIMEOUT_S, metavar="SECONDS", help="until a kernel is deadlocked"
    )
    tuning = command("tune", "time every candidate config and keep the best (on a GPU)")
    tuning.add_argument("--minutes", type=float, default=math.inf, help="start no further config after these")
    tuning.add_argument("--again", action="store_true", help="redo what is tuned already")
    bench = command("bench", "device times beside the peers and the bound (on a GPU)")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    new = commands.add_parser("new", help="start a kernel: a small working file that explains its parts")
    new.add_argument("name", metavar="NAME", help="in snake_case")
    new.add_argument("--folder", type=Path, help="write it there, and leave the list as it is")
    return main


def main() -> int:
    """Runs the command; returns the exit code: 0 all is well, 1 something failed, 2 it was asked wrongly."""
    args = parser().parse_args()
    try:
        match args.command:
            case "list":
                return list_kernels()
            case "check":
                os.environ.setdefault("NPROC", XLA_THREADS)
                return check(load_kernel(args.kernel), args.case, args.timeout)
            case "tune":
                kernel = load_kernel(args.kernel)
                require_gpu(kernel, device_kind(), "tune")
                return OK if tune(kernel, device_kind(), again=args.again, limit_s=60 * args.minutes) else FAILED
            case "bench":
                return bench(load_kernel(args.kernel), args.json)
            case _:
                return new(args.name, args.folder)
    except KernelError as error:
        print(error, file=sys.stderr)
        return MISUSED


def list_kernels() -> int:
    """Prints the kernels of KERNELS."""
    code = OK
    for name in pallas_kernels.KERNELS:
        print(name)
        try:
            kernel = load_kernel(name)
        except KernelError as error:
            print(f"    NOT A KERNEL: {error}")
            code = FAILED
            continue
        print(f"    {kernel.operation}")
        gpus = ", ".join(kernel.devices) or "any (no Mosaic kernel)"
        print(f"    GPUs {gpus} | dtypes {', '.join(kernel.dtypes)} | {len(kernel.cases)} cases | {_tuned(kernel)}")
    return code


def _tuned(kernel: Kernel) -> str:
    if not device_kind().startswith("NVIDIA"):
        return "tuned: no GPU here"
    entries = read_table(table_path(device_kind())).get(kernel.name, {})
    keys = {on_shapes(describe, case, dtype) for case in kernel.cases if case.bench for dtype in case.dtypes}
    return f"tuned for this {device_kind()}: {len(keys & set(entries))} of {len(keys)} bench shapes"


def check(kernel: Kernel, only: str | None, timeout_s: float) -> int:
    """Prints every check of a kernel as it ends, what failed in full, and a summary."""
    names = [case.name for case in kernel.cases]
    if only is not None and only not in names:
        raise KernelError(f"case must be one of {', '.join(names)}; got {only}")
    table = functools.partial(CHECK_ROW.format, width=max(len(name) for name in [*names, "NVIDIA H200"]))
    print(table("check", "case", "dtype", "error", "seconds", "result"), flush=True)
    results = []
    for result in check_kernel(kernel, only=only, timeout_s=timeout_s):
        results.append(result)
        error = "-" if result.error is None else f"{result.error:.1e}"
        text = f"{result.status.upper() if result.status == 'failed' else result.status} {result.detail}".strip()
        row = (result.check, result.case, result.dtype, error, f"{result.seconds:.1f}", text)
        print(table(*row), flush=True)
    failed = [result for result in results if result.status == "failed"]
    counts = Counter(result.status for result in results)
    print(f"\n{kernel.name}: {counts['ok']} ok, {counts['skipped']} skipped, {counts['failed']} failed")
    if only is None and kernel.devices:
        good = {r.case for r in results if r.check == "lower" and r.status == "ok"} - {r.case for r in failed}
        print(f"lowers for: {', '.join(sorted(good)) or 'no GPU'}")
    for case in dict.fromkeys(result.case for result in failed if result.case in names):
        print(f"to look into it alone: python -m pallas_kernels check {kernel.origin} --case {shlex.quote(case)}")
    return FAILED if failed else OK


def bench(kernel: Kernel, json_file: Path | None) -> int:
    """Prints a row for each bench case; % is the share of the bound that the kernel reaches."""
    kind = device_kind()
    require_gpu(kernel, kind, "bench")
    if json_file is not None and not json_file.parent.is_dir():
        raise KernelError(f"--json must name a file in a folder that exists; got {json_file}")
    rows = []
    table = functools.partial(BENCH_ROW.format, width=max(len(case.name) for case in kernel.cases))
    print(table("case", "dtype", "time_us", "bound_us", "%", "tflops", "error", "peers"), flush=True)
    for case in kernel.cases:
        for dtype in case.dtypes if case.bench else ():
            row = bench_case(kernel, case, dtype, kind)
            rows.append(row)
            bound, time_us = row["bound_us"], row["time_us"]
            share = "-" if bound is None else f"{100 * bound / time_us:.0f}"
            peers = {
                name[:-3]: us
                for name, us in row.items()
                if name.endswith("_us") and name not in ("time_us", "bound_us")
            }
            beside = ", ".join(f"{name} {us:.1f} us (x{us / time_us:.2f})" for name, us in peers.items())
            text = beside if row["ok"] else f"WRONG  {beside}"
            numbers = (f"{time_us:.1f}", "-" if bound is None else f"{bound:.1f}", share, f"{row['tflops']:.1f}")
            print(table(case.name, row["dtype"], *numbers, f"{row['error']:.1e}", text), flush=True)
    if json_file is not None:
        write_rows(json_file, kernel, kind, rows)
    return OK if all(row["ok"] for row in rows) else FAILED


def new(name: str, folder: Path | None) -> int:
    """Writes a new kernel file and says what comes next."""
    path = new_kernel(name, folder)
    kernel = name if folder is None else path
    print(f"{path} is a small working kernel; its comments say what each part is for.")
    if folder is None:
        print(f"{name} is in KERNELS now: the tests, `list`, `check`, `tune` and `bench` know it.")
    print(f"next: python -m pallas_kernels check {kernel}")
    return OK


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
