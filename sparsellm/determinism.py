"""What makes a compiled training step give the same bits every time, so that one that is continued ends the same."""

import contextlib
import contextvars
import itertools
from collections.abc import Iterator

# Sums by atomics come out another way every time.
COMPILER_OPTIONS = {"xla_gpu_exclude_nondeterministic_ops": True}
STEP = 2.0**-40  # of a scale; float32 rounds it away

_calls: contextvars.ContextVar[Iterator[int] | None] = contextvars.ContextVar("calls", default=None)


@contextlib.contextmanager
def distinct_calls():
    """Numbers the calls of cuDNN's attention that are traced inside.

    Told to be deterministic, XLA (jaxlib 0.11) marks the first of several equal calls as such when it compiles it, then
    looks for the others as if they were marked too, and fails: `raw_hash_map<>::at`. So no two may be equal.
    """
    token = _calls.set(itertools.count())
    try:
        yield
    finally:
        _calls.reset(token)


def distinct_call(scale: float) -> float:
    """The scale of an attention's scores, for each call inside `distinct_calls` another one: equal as a float32."""
    calls = _calls.get()
    return scale if calls is None else scale * (1 + next(calls) * STEP)
