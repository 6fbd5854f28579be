"""Matrices of many patterns of zeros, dense and compressed."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.unstructured_matmul import UnstructuredWeights

SHAPE = (100, 1100)  # no multiple of a strip, a run, a block or a section; two runs, and three sections a strip


def matrix(pattern: str, shape: tuple[int, int] = SHAPE, dtype: str = "bfloat16") -> np.ndarray:
    """Zeros by pattern; values that a 16-bit type holds."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal(shape).astype(jnp.dtype(dtype))
    rows, columns = (np.arange(size) for size in shape)
    kept = {
        "empty": np.zeros(shape, bool),
        "full": np.ones(shape, bool),
        "tenth": rng.random(shape) < 0.1,
        "half": rng.random(shape) < 0.5,
        "one row": np.broadcast_to(rows[:, None] == 5, shape),  # two of its lanes would run ahead of all others
        "even columns": np.broadcast_to(columns % 2 == 0, shape),
        "clustered": (rows[:, None] % 32 < 9) & (columns[None] % 300 < 170),
        "one value": (rows[:, None] == shape[0] - 1) & (columns[None] == shape[1] - 1),
    }[pattern]
    w = np.where(kept, w, np.zeros((), w.dtype))
    return w


PATTERNS = ("empty", "full", "tenth", "half", "one row", "even columns", "clustered", "one value")


def compress_all(paired: bool) -> dict[str, UnstructuredWeights]:
    """Each pattern; under jit but for one, so that all have the same shapes, and little is compiled."""
    compress = jax.jit(UnstructuredWeights.from_dense, static_argnames="paired")
    traced = {pattern: compress(jnp.asarray(matrix(pattern)), paired=paired) for pattern in PATTERNS}
    return traced | {"half": UnstructuredWeights.from_dense(jnp.asarray(matrix("half")), paired=paired)}
