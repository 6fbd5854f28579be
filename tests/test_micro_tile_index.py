"""`micro_tile_index` against plain numpy loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import micro_tile_index
from pallas_kernels.micro_tile_index import ROWS


def expected(a_t: np.ndarray, rows: int) -> list[list[int]]:
    """One list of k a block of rows."""
    return [
        [k for k in range(a_t.shape[0]) if (a_t[k, start : start + rows] != 0).any()]
        for start in range(0, a_t.shape[1], rows)
    ]


@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**16),
    k=st.integers(1, 70),
    m=st.integers(1, 300),
    rows=st.sampled_from(ROWS),
    density=st.sampled_from((0.0, 0.003, 0.2, 1.0)),
    kind=st.sampled_from((bool, np.float32, jnp.bfloat16)),
)
def test_lists_are_the_non_zero_micro_tiles(seed, k, m, rows, density, kind):
    rng = np.random.default_rng(seed)
    values = np.where(rng.random((k, m)) < density, rng.normal(size=(k, m)), 0)
    a_t = jnp.asarray(values != 0 if kind is bool else values, kind)
    index = micro_tile_index(a_t, rows)
    lists = expected(np.asarray(a_t, np.float64), rows)
    assert np.asarray(index.counts).tolist() == [len(block) for block in lists]
    for entries, block in zip(np.asarray(index.indices), lists, strict=True):
        assert entries[: len(block)].tolist() == block
        assert not entries[len(block) :].any()  # documented: zeros after the count
    mask = np.asarray(index.mask())
    assert [np.flatnonzero(row).tolist() for row in mask] == lists


def test_nan_and_negative_zero():
    a_t = jnp.zeros((4, 8)).at[1, 0].set(jnp.nan).at[2, 3].set(-0.0).at[3, 7].set(jnp.inf)
    index = micro_tile_index(a_t, 8)
    assert np.asarray(index.indices)[0, : int(index.counts[0])].tolist() == [1, 3]


@pytest.mark.parametrize("shape", [(0, 10), (10, 0)])
def test_empty_matrix(shape):
    index = micro_tile_index(jnp.ones(shape), 8)
    assert index.indices.shape == (-(-shape[1] // 8), shape[0])
    assert not np.asarray(index.counts).any()


def test_granularity_is_static_and_the_pattern_is_not():
    traces = []

    @jax.jit
    def find(a_t):
        traces.append(None)
        return micro_tile_index(a_t, 16)

    first, second = find(jnp.ones((5, 32))), find(jnp.zeros((5, 32)))
    assert len(traces) == 1 and first.rows == second.rows == 16
    assert np.asarray(first.counts).tolist() == [5, 5] and np.asarray(second.counts).tolist() == [0, 0]


def test_errors(unchecked):
    with pytest.raises(ValueError, match=r"rows must be one of .*; got rows=7"):
        micro_tile_index(jnp.ones((4, 4)), 7)
    with pytest.raises(ValueError, match=r"matrix \[K, M\]; got shape \(4,\)"):
        micro_tile_index(jnp.ones(4), 8)
    with pytest.raises(NotImplementedError, match='"xla" only'):
        micro_tile_index(jnp.ones((4, 4)), 8, implementation="mosaic_gpu")
