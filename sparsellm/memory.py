"""What generation takes of a device's memory, from shapes alone: said before anything is compiled."""

import dataclasses
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from pallas_kernels.unstructured_matmul import EXPAND_N, UnstructuredWeights

GIB = 2**30
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


class OutOfMemory(RuntimeError):
    """The device is out of memory; the message says how much was needed, and what would fit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device, and what they are for.

    Attributes:
        rows: sequences at once.
        slots: of the cache, for each row.
        parameters: the model's.
        cache: keys and values of all slots.
        activations: about what the widest layer and the logits hold at once, and what is made dense for many tokens.
    """

    rows: int
    slots: int
    parameters: int
    cache: int
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.parameters + self.cache + self.activations

    def check(self) -> None:
        """Raises ValueError where the device has not as much; does nothing where it does not say what it has."""
        has = capacity()
        if has is not None and self.total > has:
            raise ValueError(self._sentence(has))

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Turns XLA's out of memory into one that says how much was needed, and what would fit."""
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise OutOfMemory(f"out of memory: {self._sentence(capacity())}") from error

    def _sentence(self, has: int | None) -> str:
        parts = {"parameters": self.parameters, "cache": self.cache, "activations": self.activations}
        needed = ", ".join(f"{name} {bytes / GIB:.2f}" for name, bytes in parts.items())
        said = f"{self.rows} rows of {self.slots} slots need about {self.total / GIB:.2f} GiB of a device ({needed})"
        if has is None:
            return said
        room = has - self.parameters - self.activations
        slots = max(room, 0) * self.rows * self.slots // max(self.cache, 1)
        fits = f"{slots // self.slots} rows of {self.slots} slots, or {self.rows} rows of {slots // self.rows}"
        return (
            f"{said}; it has {has / GIB:.2f}: {fits if slots >= self.rows else 'no cache beside the model'} would fit"
        )


def estimate(model: Any, *, rows: int, slots: int, tokens: int) -> Memory:
    """The memory that a model takes with a cache of so many rows and slots.

    Args:
        model: an `nnx.Module` with `init_cache`; cut over several devices it takes its part of each, and so its cache.
        rows: sequences at once.
        slots: of the cache, for each row.
        tokens: that are read at once, padding included.
    """
    arrays = [array for array in jax.tree.leaves(nnx.state(model)) if isinstance(array, jax.Array)]
    devices = max((len(array.sharding.device_set) for array in arrays), default=1)
    parameters = sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in arrays)
    cache = jax.eval_shape(lambda: model.init_cache(rows, slots))
    vocab = model.config.vocab_size
    itemsize = np.dtype(getattr(model.config, "dtype", "float32")).itemsize
    compressed = _compressed(model)
    sizes = {size for a in jax.tree.leaves(nnx.state(model, nnx.Param)) for size in a.shape}
    sizes |= {size for layer in compressed.values() for size in (layer.in_features, layer.out_features)}
    widest = max((size for size in sizes if size != vocab), default=1)
    expanded = 0 if tokens <= EXPAND_N else _largest_dense(compressed) * itemsize
    return Memory(
        rows=rows,
        slots=slots,
        parameters=parameters,
        cache=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)) // devices,
        # Two of the feed-forward block's width are as much as attention's queries, keys, values and output.
        activations=2 * tokens * widest * itemsize // devices + 2 * rows * vocab * 4 + expanded,
    )


def _compressed(model: Any) -> dict[tuple[Any, ...], Any]:
    """The compressed layers by their paths."""
    is_compressed = lambda module: isinstance(getattr(module, "weights", None), UnstructuredWeights)  # noqa: E731
    return {path: module for path, module in nnx.iter_modules(model) if is_compressed(module)}


def _largest_dense(compressed: dict[tuple[Any, ...], Any]) -> int:
    """The most elements that are made dense at once on a device: of a layer, or of a mixture's two stacks."""
    sizes: dict[tuple[Any, ...], int] = {}
    for path, layer in compressed.items():
        together = path[:-1] if path[-1] in ("wi", "wo") else path
        sizes[together] = sizes.get(together, 0) + math.prod(layer.shape)
    return max(sizes.values(), default=0)


def check_parameters(abstract: Any) -> None:
    """Raises ValueError where a device has not as much as its part of the parameters takes.

    Args:
        abstract: their shapes, dtypes and shardings, as of `sparsellm.sharding.abstract_model`.
    """
    has, leaves = capacity(), jax.tree.leaves(abstract)
    needed = sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in leaves)
    if has is not None and needed > has:
        fits = -(-sum(math.prod(a.shape) * a.dtype.itemsize for a in leaves) // has)
        said = f"parameters need about {needed / GIB:.2f} GiB of a device; it has {has / GIB:.2f}"
        raise ValueError(f"{said}: cut over {fits} such devices or more (mesh=...) they would fit")


def capacity() -> int | None:
    """Bytes that JAX may use of the smallest device; None where they do not say. CPUs share what the host has."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        return _host_memory() // len(devices)
    stats = [device.memory_stats() for device in devices]
    return min((int(limit) for s in stats if s and (limit := s.get("bytes_limit"))), default=None)  # 0: cuda_async's


def _host_memory() -> int:
    """Bytes of memory that this process may have, by the machine and by its control group (Linux)."""
    has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.is_file() else "max"
    return min(has, int(limit)) if limit.isdigit() else has
