"""Which micro-tiles of A are live: the masks that experiments measure on.

In numpy alone and decided by the seed, so that another process (a peer's) makes the same ones without JAX.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float

BLOB = 8  # micro-tiles across a cluster


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
    """A mask of A [m, k] in micro-tiles of `rows` x `cols`.

    Attributes:
        kind: a name in `KINDS`.
        rows: rows of a micro-tile.
        cols: columns of a micro-tile.
        sparsity: share of micro-tiles that are zero (for random and power_law in expectation, else exactly).
        m: rows of A.
        k: columns of A.
        seed: of what is random in it. Masks that differ in sparsity alone are nested.
    """

    kind: str
    rows: int
    cols: int
    sparsity: float
    m: int
    k: int
    seed: int = 0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"mask must be one of {', '.join(KINDS)}; got {self.kind!r}")
        if not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity must be 0 to 1; got {self.sparsity}")
        if min(self.rows, self.cols, self.m, self.k) < 1:
            raise ValueError(f"rows, cols, m and k must be at least 1; got {self}")

    @property
    def granularity(self) -> str:
        """As it is written: "128x1"."""
        return f"{self.rows}x{self.cols}"

    def micro_tiles(self) -> Bool[np.ndarray, "blocks_m blocks_k"]:
        """True where a micro-tile is live."""
        shape = -(-self.m // self.rows), -(-self.k // self.cols)
        return KINDS[self.kind](np.random.default_rng(self.seed), shape, 1 - self.sparsity)

    def elements(self) -> Bool[np.ndarray, "m k"]:
        """True where A is not zero."""
        return self.micro_tiles().repeat(self.rows, axis=0).repeat(self.cols, axis=1)[: self.m, : self.k]

    def live_elements(self) -> tuple[int, int]:
        """How many elements of A are not zero, and how many of its columns (rows of B) hold one."""
        tiles = self.micro_tiles()
        rows = np.minimum(self.rows, self.m - np.arange(tiles.shape[0]) * self.rows)
        cols = np.minimum(self.cols, self.k - np.arange(tiles.shape[1]) * self.cols)
        return int(rows @ tiles @ cols), int(tiles.any(axis=0) @ cols)


def random(rng: np.random.Generator, shape: tuple[int, int], density: float) -> Bool[np.ndarray, "rows cols"]:
    """Each on its own, with probability `density`."""
    return rng.random(shape) < density


def clustered(rng: np.random.Generator, shape: tuple[int, int], density: float) -> Bool[np.ndarray, "rows cols"]:
    """Blobs some `BLOB` micro-tiles across: white noise, smoothed by a box that wraps round, cut at its quantile."""
    noise = rng.standard_normal(shape)
    for axis, size in enumerate(shape):
        noise = np.sum([np.roll(noise, shift, axis) for shift in range(min(BLOB, size))], axis=0)
    return _highest(noise, density)


def banded(rng: np.random.Generator, shape: tuple[int, int], density: float) -> Bool[np.ndarray, "rows cols"]:
    """A band round the diagonal, as wide as the density asks for: the tokens near each token. Nothing is random."""
    del rng
    row, col = ((np.arange(size) + 0.5) / size for size in shape)
    return _highest(-np.abs(row[:, None] - col[None]), density)


def power_law(rng: np.random.Generator, shape: tuple[int, int], density: float) -> Bool[np.ndarray, "rows cols"]:
    """Columns of unequal fame, as neurons are: the r-th, in random order, is live with probability min(1, c / r)."""
    rank = 1.0 + rng.permutation(shape[1])
    low, high = 0.0, rank.max()
    for _ in range(60):  # c by bisection: the mean probability grows with it
        middle = (low + high) / 2
        low, high = (low, middle) if np.minimum(1, middle / rank).mean() > density else (middle, high)
    return rng.random(shape) < np.minimum(1, high / rank) if density else np.zeros(shape, bool)


def _highest(score: Float[np.ndarray, "rows cols"], density: float) -> Bool[np.ndarray, "rows cols"]:
    """True at the highest scores, as many as make up the density; of equals, those that come first."""
    live = np.zeros(score.size, bool)
    live[np.argsort(-score, axis=None, kind="stable")[: round(density * score.size)]] = True
    return live.reshape(score.shape)


type Kind = Callable[[np.random.Generator, tuple[int, int], float], Bool[np.ndarray, "rows cols"]]

KINDS: dict[str, Kind] = {"random": random, "clustered": clustered, "banded": banded, "power_law": power_law}
