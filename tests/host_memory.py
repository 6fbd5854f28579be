"""How much the host holds while a checkpoint is read, whenever the runtime gets round to letting go."""

import contextlib
import gc
import time
import tracemalloc
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from sparsellm import huggingface

PATIENCE = 60  # seconds that the runtime may take to let go of what it has copied to a device


class _Watched:
    """A stored tensor that is read only when whatever was read before, of any of them, is gone."""

    def __init__(self, tensor: Any, earlier: list[weakref.ref]):
        self.tensor, self.earlier = tensor, earlier

    def __getitem__(self, index: Any) -> Any:
        deadline = time.monotonic() + PATIENCE
        while any(values() is not None for values in self.earlier):
            assert time.monotonic() < deadline, "the host still holds a tensor that it read before"
            gc.collect()  # jax drops there what its other threads have released
            time.sleep(0.001)
        values = owner = self.tensor[index]
        while isinstance(owner.base, np.ndarray):  # what a copy that is under way holds may be another view of it
            owner = owner.base
        self.earlier[:] = [weakref.ref(values), weakref.ref(owner)]
        return values


@contextlib.contextmanager
def traced_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Gives a list that ends up holding the most bytes of numpy and Python at once: JAX's own buffers do not count."""
    peak, earlier, read_parameter = [], [], huggingface.read_parameter

    def read(stored, tensors):
        return read_parameter(stored, {name: _Watched(tensor, earlier) for name, tensor in tensors.items()})

    gc.collect()
    gc.freeze()  # what is there by now need not be looked through at every read
    with monkeypatch.context() as patch:
        patch.setattr(huggingface, "read_parameter", read)
        tracemalloc.start()
        try:
            yield peak
            peak.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
