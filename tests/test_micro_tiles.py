import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsellm.micro_tiles import MicroTile, density, live_micro_tiles, micro_tile_index


def counted_density(values: np.ndarray, rows: int, cols: int) -> float:
    """Walks the micro-tiles one by one."""
    tiles = [
        values[row : row + rows, col : col + cols]
        for row in range(0, values.shape[0], rows)
        for col in range(0, values.shape[1], cols)
    ]
    return sum(bool((tile != 0).any()) for tile in tiles) / max(len(tiles), 1)


@given(
    shape=st.sampled_from([(0, 4), (5, 0), (1, 1), (37, 9), (64, 10)]),
    rows=st.sampled_from([1, 3, 16, 64]),
    cols=st.sampled_from([1, 5]),
    live=st.sampled_from([0.0, 0.03, 0.5, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_density_counts_micro_tiles_with_a_non_zero(shape, rows, cols, live, seed):
    mask = np.random.default_rng(seed).random(shape) < live
    expected = counted_density(mask, rows, cols)
    assert density(jnp.asarray(mask), MicroTile(rows, cols)) == pytest.approx(expected, abs=1e-6)
    assert density(jnp.asarray(-2.0 * mask), MicroTile(rows, cols)) == pytest.approx(expected, abs=1e-6)


def test_nan_is_live_and_negative_zero_is_not():
    values = jnp.array([[jnp.nan, -0.0], [0.0, 0.0]])
    assert density(values, MicroTile(1, 1)) == 0.25
    assert density(values, MicroTile(2, 1)) == 0.5


def test_density_is_exact_for_more_elements_than_float32_counts():
    mask = jnp.ones((4097, 4099), jnp.bool).at[0, 0].set(False)
    assert density(mask, MicroTile(1, 1)) == pytest.approx(1 - 1 / (4097 * 4099), abs=1e-7)
    assert density(~mask, MicroTile(1, 1)) == pytest.approx(1 / (4097 * 4099), rel=1e-6)


@pytest.mark.parametrize("rows", [8, 128])
def test_density_agrees_with_the_index_that_the_kernel_walks(rows):
    a = np.random.default_rng(0).normal(size=(256, 50)) * (np.random.default_rng(1).random((256, 50)) < 0.02)
    index = micro_tile_index(jnp.asarray(a.T, jnp.float32), rows=rows)
    assert density(jnp.asarray(a), MicroTile(rows, 1)) == pytest.approx(float(index.counts.sum()) / (256 // rows * 50))


def test_live_micro_tiles_of_numpy_stay_on_the_host():
    """As a plan is chosen while something else is traced."""
    mask = np.random.default_rng(0).random((37, 9)) < 0.1

    @jax.jit
    def traced(x):
        live = live_micro_tiles(mask, MicroTile(16, 5))
        assert isinstance(live, np.ndarray)
        return x + live.sum()

    blocks = [[mask[i : i + 16, j : j + 5].any() for j in (0, 5)] for i in (0, 16, 32)]
    assert np.array_equal(live_micro_tiles(mask, MicroTile(16, 5)), blocks)
    assert np.array_equal(live_micro_tiles(jnp.asarray(mask), MicroTile(16, 5)), blocks)
    assert traced(0) == np.sum(blocks)


def test_micro_tiles_are_written_rows_x_cols():
    assert str(MicroTile(128, 1)) == "128x1"
    assert MicroTile.parse("128x1") == MicroTile(128, 1)
    for text in ("128", "x1", "ax1", "-1x1", "0x1", "1x1x1"):
        with pytest.raises(ValueError, match=r"micro-tile.*got"):
            MicroTile.parse(text)
