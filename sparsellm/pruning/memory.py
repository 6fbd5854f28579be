"""What pruning takes of a device's memory, from shapes alone: said before anything is compiled.

Weights stay where they are, and one block at a time is worked on. On top of them are, in bytes,

    hidden states   tokens * d_model * size of a dtype, twice while a block makes new ones of the old
    sums            4 * (sum of d_in^2 over the block's kernels), twice while a batch's are added
    a batch         about 3 * (its tokens) * d_ff * size of a dtype: what a block holds at once of it
    work space      about 4 * 5 * (d_in^2 + d_in * d_out) for the largest kernel

the d_in^2 terms for methods that need X^T X only. OPT-30B in bfloat16 with 128 windows of 2048 tokens, 8 at once, by
SparseGPT: 59.3 GB of weights and at most 28.7: 3.8 + 4.3 + 20.6 while fc2 is pruned. That is one H200.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparsellm.memory import GIB, capacity
from sparsellm.pruning.method import Method
from sparsellm.pruning.walk import first_call, walk


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruningMemory:
    """Bytes of the device, and what they are for.

    Attributes:
        parameters: the model's.
        hidden_states: of the calibration set, once.
        sums: over the inputs of a block's kernels, once.
        batch: what a block holds at once of a batch of the calibration set.
        work: what it takes to prune one kernel.
    """

    parameters: int
    hidden_states: int
    sums: int
    batch: int
    work: int

    @property
    def total(self) -> int:
        """The most of them that are there at once: while a block's inputs are summed, it is pruned, or it is run."""
        summing = self.hidden_states + 2 * self.sums + self.batch
        pruning = self.hidden_states + self.sums + self.work
        running = 2 * self.hidden_states + self.batch
        return self.parameters + max(summing, pruning, running)

    def check(self) -> None:
        """Raises ValueError where the device has not as much; does nothing where it does not say what it has."""
        has = capacity()
        if has is not None and self.total > has:
            parts = {field.name.replace("_", " "): getattr(self, field.name) for field in dataclasses.fields(self)}
            needed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
            said = f"pruning needs about {self.total / GIB:.2f} GiB of a device ({needed}); it has {has / GIB:.2f}"
            raise ValueError(f"{said}: fewer windows, and fewer of them at once, need less")


def estimate(
    model: Any, method: Method, *, windows: tuple[int, int] | None, batch: int = 1, errors: bool = False
) -> PruningMemory:
    """The memory that `prune` takes for a model on one device, whose attention keeps no scores (cuDNN's).

    Args:
        model: as for `prune`; shapes will do, as of `nnx.eval_shape(make)`.
        method: as for `prune`.
        windows: how many, and how long; None for none.
        batch: windows at once.
        errors: as for `prune`.
    """
    graphdef, state = nnx.split(model)
    gram = errors or method.needs == "gram"
    blocks = [[kernel.shape for kernel in block.kernels.values()] for block in walk(model)]
    shapes = [shape for block in blocks for shape in block]
    hidden_states = activations = 0
    if windows is not None:
        tokens = jax.ShapeDtypeStruct((batch, windows[1]), jnp.int32)
        x, *_ = jax.eval_shape(functools.partial(first_call, graphdef), state, tokens)
        hidden_states = x.size * x.dtype.itemsize * windows[0] // batch
        activations = 3 * tokens.size * max(max(shape[-2:]) for shape in shapes) * x.dtype.itemsize

    def squared(shape: tuple[int, ...]) -> int:
        return shape[-2] ** 2 if gram else 0

    return PruningMemory(
        parameters=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
        hidden_states=hidden_states,
        sums=max(sum(4 * math.prod(shape[:-2]) * squared(shape) for shape in block) for block in blocks),
        batch=activations,
        work=max(4 * 5 * (squared(shape) + shape[-2] * shape[-1]) for shape in shapes),
    )
