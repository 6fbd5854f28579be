"""Runs interpreted Mosaic GPU kernels and brings home what goes wrong in them: races, broken protocols, deadlocks.

A kernel is interpreted where it is launched with `interpret=plgpu.InterpretGPUParams(detect_races=True)`. The
interpreter prints every race it finds and goes on; it raises where the protocol of a barrier is broken; and it waits
for ever where a barrier is never arrived at. Not modelled: a wgmma counts as done when it is issued, so nothing is said
about a missing `wgmma_wait`.

All private API of jax that checking needs is in this file, written against 0.11.2
(jax/_src/pallas/mosaic_gpu/interpret); tests/test_workbench_checks.py breaks a kernel in each of these ways.
"""

import contextlib
import functools
import io
import logging
import re
import threading
from collections.abc import Callable, Iterator

import jax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

TIMEOUT_S = 120.0
# XLA's own variable, read when it starts. Interpreted warpgroups wait for each other within its threads: with one a
# core, those of a small machine may all be waiting.
XLA_THREADS = "64"
RACE = "RACE DETECTED"
ACCESS = r"(read|write) of .*, (.+)\n  clock: .*\n"  # how the interpreter prints each side of a race


class InterpreterError(Exception):
    """A race, a broken barrier protocol, a deadlock, or any other exception inside of an interpreted kernel."""


def run_interpreted[T](function: Callable[[], T], *, timeout_s: float = TIMEOUT_S) -> T:
    """Calls `function`, which launches interpreted kernels, and waits for its result.

    The interpreter keeps the state of the running kernel in globals of its module, so only one call runs at a time, and
    they are reset before (another's exception may have left them) and after.

    Args:
        function: launches any number of kernels.
        timeout_s: seconds after which it counts as deadlocked.

    Raises:
        InterpreterError: says what went wrong, and where.
    """
    printed = io.StringIO()
    watchdog = threading.Timer(timeout_s, _fail_running_kernel, [timeout_s])
    watchdog.daemon = True  # an interrupted process does not wait for it
    gpu_callbacks.reset_gpu_interpret_mode_state()
    watchdog.start()
    try:
        # Of several kernels only the last one's `races_found` survives, but each prints what it finds.
        with contextlib.redirect_stdout(printed), _quiet_callbacks(), _wgmma_reads_checked():
            out = jax.block_until_ready(function())
    except Exception as error:
        if not (causes := re.findall(r"^(?:\w+\.)*(\w*(?:Error|Exception): .+)$", str(error), re.MULTILINE)):
            raise
        raise InterpreterError(" ".join([causes[-1], *_describe_races(printed.getvalue())])) from error
    finally:
        watchdog.cancel()
        gpu_callbacks.reset_gpu_interpret_mode_state()
    if races := _describe_races(printed.getvalue()):
        raise InterpreterError(*races)
    return out


def _fail_running_kernel(timeout_s: float) -> None:
    """Makes every thread that waits at a barrier raise; the interpreter does the same when one of them fails."""
    if (memory := gpu_callbacks._shared_memory) is not None:
        message = f"still running after {timeout_s:g} s: a barrier_wait without its barrier_arrive, or a case too large"
        memory.set_failed(TimeoutError(message), top_level=False)


@contextlib.contextmanager
def _quiet_callbacks() -> Iterator[None]:
    """Every thread of a failed kernel logs its own traceback; the exception that comes home says it once."""
    logger = logging.getLogger("jax._src.callback")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _wgmma_reads_checked() -> Iterator[None]:
    """Shows the race detector what wgmma reads, which jax 0.11.2 leaves out ("TODO: Vector clocks")."""
    wgmma = gpu_callbacks.wgmma

    @gpu_callbacks.fail_on_exception
    @functools.wraps(wgmma)
    def checked_wgmma(*, thread, source_info=None, **operands):
        memory = gpu_callbacks._get_shared_memory()
        if memory.detect_races:
            # As for a TMA copy: the read is an event of its own in the clock of the async proxy. The thread knows of it
            # at once, so a barrier that it arrives at later carries it, and one that it arrived at before does not.
            event = memory.get_next_tma_thread_id()
            with memory.lock:
                clock = memory.clocks[thread].copy()
                clock.inc(event)
                memory.clocks[thread].update(clock)
            for name in ("a", "b"):
                key = gpu_callbacks.HostAllocationKey.from_array(operands[f"{name}_allocation_key_as_array"])
                transforms = gpu_callbacks._remove_noop_transforms(operands[f"{name}_transforms"])
                access = memory.access(key, jax.tree.map(int, transforms))
                gpu_callbacks.get_races().check_read(thread, clock.async_smem_clock, key, access, source_info)
        return wgmma(thread=thread, source_info=source_info, **operands)

    gpu_callbacks.wgmma = checked_wgmma
    try:
        yield
    finally:
        gpu_callbacks.wgmma = wgmma


def _describe_races(printed: str) -> list[str]:
    """A sentence with each distinct pair of source positions, three at most; nothing where there was no race."""
    if RACE not in printed:
        return []
    accesses = re.findall(f"{RACE}\n  {ACCESS} +{ACCESS}", printed)
    pairs = sorted({" and ".join(sorted((f"{a} at {at}", f"{b} at {bt}"))) for a, at, b, bt in accesses})
    more = f"; and {len(pairs) - 3} more pairs" if len(pairs) > 3 else ""
    places = "; ".join(pairs[:3])
    return [f"{printed.count(RACE)} races: {places}{more}. A barrier or a commit_smem is missing between them"]
