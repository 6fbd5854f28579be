"""Where zeros may lie: anywhere, n of every m, or whole blocks. A pattern turns scores into a mask of what is kept.

Kernels are [in, out] here; the papers' weights are [out, in]. So the inputs of an output, among which Wanda and n:m
compare, are a column.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sparsellm.micro_tiles import MicroTile
from sparsellm.plan import Plan

type Sparsity = float | Float[Array, ""]
type Compare = Literal["kernel", "output"]
"""Among which scores the lowest are found: all of the kernel's, or those of each output's inputs."""


@dataclasses.dataclass(frozen=True)
class Unstructured:
    """Any weight may be zero."""

    def __str__(self) -> str:
        return "unstructured"

    def check(self, shape: tuple[int, ...]) -> None:
        """Any kernel will do."""

    def keep(self, scores: Float[Array, "d_in d_out"], sparsity: Sparsity, compare: Compare) -> Bool[Array, "i o"]:
        """False for the share `sparsity` of lowest scores, rounded to whole weights."""
        if compare == "output":
            return ~lowest(scores, _count(sparsity, scores.shape[0]))
        return ~lowest(scores.reshape(-1, 1), _count(sparsity, scores.size)).reshape(scores.shape)


@dataclasses.dataclass(frozen=True)
class NM:
    """Of every m inputs in a row, an output keeps n: "2:4". Where kernels differ in their n, it is the mean one."""

    n: int
    m: int

    def __post_init__(self):
        if not 1 <= self.n <= self.m:
            raise ValueError(f"n:m must keep n of m, 1 <= n <= m; got {self}")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        """Of a kernel that keeps n of m."""
        return 1 - self.n / self.m

    def mixed(self, sparsities: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, float]:
        """Each kernel's sparsity as whole weights of m, so that together they have as many zeros as before.

        By largest remainder: all are rounded down, then those with the largest remainders up, while that brings the
        number of zeros nearer to what was asked. So a kernel is less than one weight of m off, and all of them together
        are off by at most half of that in one kernel.

        Args:
            sparsities: by the kernels' paths.
            sizes: weights of each kernel.

        Raises:
            ValueError: their mean is not this pattern's sparsity, rounded to whole weights of m.
        """
        weights = np.array([sizes[name] for name in sparsities], np.float64)
        wanted = self.m * np.array(list(sparsities.values()), np.float64)
        excess = float(weights @ wanted) - self.m * self.sparsity * weights.sum()
        if abs(excess) > (0.5 + 1e-6) * weights.sum():
            mean = self.sparsity + excess / self.m / weights.sum()
            rule = f"sparsity must be {self.sparsity} on average for {self}, but for half a weight of {self.m}"
            raise ValueError(f"{rule}; got {mean:.3f}")
        zeros = np.floor(wanted)
        remainders = wanted - zeros
        order = np.argsort(-remainders, kind="stable")
        middle = np.cumsum(weights[order]) - weights[order] / 2
        zeros[order[middle < weights @ remainders]] += 1
        return {name: float(count) / self.m for name, count in zip(sparsities, zeros, strict=True)}

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError unless a kernel of this shape has whole groups."""
        if shape[-2] % self.m:
            raise ValueError(f"m must divide the inputs of a kernel; got {self} for a kernel of {list(shape)}")

    def keep(self, scores: Float[Array, "d_in d_out"], sparsity: Sparsity, compare: Compare) -> Bool[Array, "i o"]:
        """False for the share `sparsity` of lowest scores of every m, whatever `compare` says."""
        groups = scores.reshape(-1, self.m, scores.shape[1])
        return ~lowest(groups, _count(sparsity, self.m)).reshape(scores.shape)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Blocks of `rows` inputs x `cols` outputs are kept or zero as one: "64x64"; those at the edge are cut."""

    rows: int
    cols: int

    def __post_init__(self):
        MicroTile(self.rows, self.cols)  # raises unless both are at least 1

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols}"

    @property
    def plan(self) -> Plan:
        """By which `sparse_dot(x, kernel, sparse="b")` skips them: in terms of the transposed problem, [out, in].

        In micro-tiles that the kernels take, where some make up a block: of 128 or 64 outputs by as many inputs, or by
        one input at a time; or of one output by 64 or 32 inputs.
        """
        across, down = (next((n for n in (128, 64) if size % n == 0), 0) for size in (self.cols, self.rows))
        if across:
            return Plan("k", MicroTile(across, down or 1))
        if self.cols == 1 and self.rows % 32 == 0:
            return Plan("m", MicroTile(1, 64 if down else 32))
        return Plan("k", MicroTile(self.cols, self.rows))

    def check(self, shape: tuple[int, ...]) -> None:
        """Any kernel will do."""

    def keep(self, scores: Float[Array, "d_in d_out"], sparsity: Sparsity, compare: Compare) -> Bool[Array, "i o"]:
        """False for the share `sparsity` of blocks whose mean score is lowest.

        They are compared over the whole kernel whatever `compare` says: a column has few of them.
        """
        rows, cols = scores.shape
        down, across = -(-rows // self.rows), -(-cols // self.cols)
        padded = jnp.pad(scores, ((0, down * self.rows - rows), (0, across * self.cols - cols)))
        sums = padded.reshape(down, self.rows, across, self.cols).sum(axis=(1, 3))
        heights = jnp.minimum(self.rows, rows - self.rows * jnp.arange(down))
        widths = jnp.minimum(self.cols, cols - self.cols * jnp.arange(across))
        means = sums / (heights[:, None] * widths[None]).astype(jnp.float32)
        keep = ~lowest(means.reshape(-1, 1), _count(sparsity, means.size)).reshape(means.shape)
        return jnp.repeat(jnp.repeat(keep, self.rows, axis=0), self.cols, axis=1)[:rows, :cols]


type Pattern = Unstructured | NM | Blocks


def parse_pattern(text: str) -> Pattern:
    """The pattern that `text` names: "unstructured", "2:4", "64x64".

    Raises:
        ValueError: it names none.
    """
    if text == "unstructured":
        return Unstructured()
    for separator, pattern in ((":", NM), ("x", Blocks)):
        first, found, second = text.partition(separator)
        if found and first.isdecimal() and second.isdecimal():
            return pattern(int(first), int(second))
    raise ValueError(f'a pattern is "unstructured", N:M or ROWSxCOLS; got "{text}"')


def lowest(scores: Float[Array, "*groups members others"], count: Array) -> Bool[Array, "*groups members others"]:
    """True for exactly `count` members of each group: the lowest; of equals the first ones, and NaN last."""
    by_group = scores.swapaxes(-1, -2)  # members last, as XLA's quicker sort has them
    order = jnp.argsort(by_group, axis=-1, stable=True)
    chosen = (jnp.arange(order.shape[-1]) < count).reshape((1,) * (order.ndim - 1) + (-1,))
    places = (*jnp.indices(order.shape, sparse=True)[:-1], order)
    # Known to be distinct: else XLA, told to be deterministic as while training, sets one after the other.
    lows = jnp.zeros(order.shape, bool).at[places].set(jnp.broadcast_to(chosen, order.shape), unique_indices=True)
    return lows.swapaxes(-1, -2)


def _count(sparsity: Sparsity, size: int) -> Array:
    """How many of `size` a share is; traced, so that another share compiles nothing."""
    return jnp.round(jnp.asarray(sparsity, jnp.float32) * size).astype(jnp.int32)
