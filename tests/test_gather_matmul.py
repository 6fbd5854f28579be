"""`gather_matmul` against numpy in float64: patterns that break gathers, wrong arguments, traces that stay."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import MicroTileIndex, gather_matmul, micro_tile_index
from pallas_kernels.gather_matmul import CASES, Config, candidates, work
from pallas_kernels.gather_matmul.config import check_config
from pallas_kernels.tile import schedule
from pallas_kernels.tuning import describe
from pallas_kernels.workbench.arguments import on_shapes


def expected(a_t, b, index: MicroTileIndex) -> np.ndarray:
    """C by plain loops over blocks, float64."""
    a_t, b = (np.asarray(x, np.float64) for x in (a_t, b))
    out = np.zeros((a_t.shape[1], b.shape[1]))
    for i, (entries, count) in enumerate(zip(np.asarray(index.indices), np.asarray(index.counts), strict=True)):
        rows = slice(i * index.rows, min((i + 1) * index.rows, a_t.shape[1]))
        listed = entries[:count]
        out[rows] = a_t[listed, rows].T @ b[listed]
    return out


def problem(seed: int, *, m: int, n: int, k: int, rows: int, density: float, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    mask = rng.random((k, -(-m // rows))) < density
    listed = jnp.asarray(np.repeat(mask, rows, axis=1)[:, :m])
    a_t, b = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((k, m), (k, n)))
    return a_t, b, micro_tile_index(listed, rows)


def assert_close(out, ref, bound):
    out = np.asarray(out, np.float64)
    assert np.linalg.norm(out - ref) <= bound * max(np.linalg.norm(ref), 1e-30)


@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**16),
    m=st.integers(1, 150),
    n=st.integers(1, 40),
    k=st.integers(1, 300),
    rows=st.sampled_from((1, 8, 16, 32, 64, 128)),
    density=st.sampled_from((0.0, 0.02, 0.5, 1.0)),
)
def test_xla_path_on_any_shape_and_pattern(seed, m, n, k, rows, density):
    a_t, b, index = problem(seed, m=m, n=n, k=k, rows=rows, density=density)
    assert_close(gather_matmul(a_t, b, index, implementation="xla"), expected(a_t, b, index), 1e-6)


@settings(max_examples=4)
@given(
    seed=st.integers(0, 2**16),
    m=st.integers(1, 140),
    n=st.integers(1, 200),
    k=st.integers(1, 330),
    rows=st.sampled_from((64, 128)),
    density=st.sampled_from((0.0, 0.1, 1.0)),
)
def test_interpreted_kernel_on_any_shape_and_pattern(seed, m, n, k, rows, density):
    a_t, b, index = problem(seed, m=m, n=n, k=k, rows=rows, density=density, dtype=jnp.bfloat16)
    assert_close(gather_matmul(a_t, b, index, implementation="interpret"), expected(a_t, b, index), 1e-2)


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_what_is_not_listed_does_not_matter(implementation):
    """NaN in unlisted k of A and B, and any integers after the counts, change nothing."""
    a_t, b, index = problem(1, m=128, n=128, k=100, rows=64, density=0.3)
    ref = expected(a_t, b, index)
    listed = jnp.repeat(index.mask().T, 64, axis=1)
    a_t = jnp.where(listed, a_t, jnp.nan)
    b = jnp.where(index.mask().any(axis=0)[:, None], b, jnp.nan)
    valid = jnp.arange(100)[None] < index.counts[:, None]
    for poison in (-1, 2**31 - 1):
        poisoned = dataclasses.replace(index, indices=jnp.where(valid, index.indices, poison))
        assert_close(gather_matmul(a_t, b, poisoned, implementation=implementation), ref, 1e-5)


def test_a_row_of_b_listed_by_one_block_does_not_leak_into_another():
    a_t, b, index = problem(2, m=128, n=16, k=20, rows=64, density=1.0)
    mask = jnp.ones((20, 128), bool).at[7, 64:].set(False)
    index = micro_tile_index(mask, 64)
    b = b.at[7].set(jnp.inf)
    out = gather_matmul(a_t, b, index, implementation="xla")
    assert not np.isfinite(np.asarray(out[:64])).any()
    assert np.isfinite(np.asarray(out[64:])).all()


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001])  # the second one's payload is in the lowest bit alone
def test_nan_in_a_listed_entry_is_seen(implementation, bits):
    a_t, b, index = problem(3, m=64, n=16, k=20, rows=64, density=1.0)
    nan = jax.lax.bitcast_convert_type(jnp.uint32(bits), jnp.float32)
    out = gather_matmul(a_t.at[3, 5].set(nan), b, index, implementation=implementation)
    assert np.isnan(np.asarray(out[5])).all() and np.isfinite(np.asarray(out[6])).all()


def test_entries_of_a_list_may_come_in_any_order():
    a_t, b, index = problem(4, m=64, n=16, k=20, rows=32, density=0.5)
    shuffled = np.array(index.indices)
    for row, count in zip(shuffled, np.asarray(index.counts), strict=True):
        row[:count] = np.random.default_rng(0).permutation(row[:count])
    index = dataclasses.replace(index, indices=jnp.asarray(shuffled))
    assert_close(gather_matmul(a_t, b, index), expected(a_t, b, index), 1e-6)


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (64, 1), (16, 8), (64, 64)])
def test_gradients_are_those_of_the_masked_product(rows, cols):
    rng = np.random.default_rng(5)
    tiles = rng.random((-(-50 // cols), -(-70 // rows))) < 0.4
    mask = np.repeat(np.repeat(tiles, rows, axis=1), cols, axis=0)[:50, :70]  # [K, M]
    a_t, b, weight = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((50, 70), (50, 30), (70, 30)))
    index = micro_tile_index(jnp.asarray(mask), rows, cols)
    grads = jax.grad(lambda a_t, b: jnp.sum(weight * gather_matmul(a_t, b, index)), argnums=(0, 1))(a_t, b)
    a, w, bb = (np.asarray(x, np.float64) for x in (a_t, weight, b))
    assert_close(grads[0], np.where(mask, bb @ w.T, 0), 1e-6)
    assert_close(grads[1], np.where(mask, a, 0) @ w, 1e-6)


def test_a_new_pattern_compiles_nothing_and_asks_the_host_nothing():
    traces = []

    @jax.jit
    def product(a_t, b):
        traces.append(None)
        return gather_matmul(a_t, b, micro_tile_index(a_t, 16))

    a_t, b, _ = problem(7, m=48, n=8, k=40, rows=16, density=1.0)
    variants = [
        jnp.where(jax.random.uniform(jax.random.key(s), (40, 48)) < d, a_t, 0) for s, d in enumerate((0, 0.1, 1))
    ]
    with jax.transfer_guard("disallow"):
        outputs = [product(x, b) for x in variants]
    assert len(traces) == 1
    for x, out in zip(variants, outputs, strict=True):
        assert_close(out, np.asarray(x, np.float64).T @ np.asarray(b, np.float64), 1e-6)


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_under_x64_and_from_numpy(unchecked, implementation):
    a_t, b, index = problem(10, m=130, n=20, k=70, rows=64, density=0.4)
    with jax.enable_x64(True):
        arrays: list = [np.asarray(a_t), np.asarray(b)]
        out = gather_matmul(arrays[0], arrays[1], index, implementation=implementation)
    assert out.dtype == jnp.float32
    assert_close(out, expected(a_t, b, index), 1e-5)


def test_an_index_knows_its_rows_in_the_tuned_table():
    a_t, b, index = problem(11, m=64, n=8, k=10, rows=64, density=0.5)
    assert describe(a_t, b, index) != describe(a_t, b, dataclasses.replace(index, rows=128))


def test_vmap_over_a_leading_batch():
    a_t, b, _ = problem(8, m=32, n=8, k=24, rows=8, density=1.0)
    batch = jnp.stack([a_t, jnp.zeros_like(a_t), jnp.where(a_t > 0, a_t, 0)])
    out = jax.vmap(lambda a_t: gather_matmul(a_t, b, micro_tile_index(a_t, 8)))(batch)
    ref = np.einsum("bkm,kn->bmn", np.asarray(batch, np.float64), np.asarray(b, np.float64))
    assert_close(out, ref, 1e-6)


@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 0, 5), (3, 4, 0)])
def test_nothing_to_do(shape):
    k, m, n = shape
    a_t, b = jnp.ones((k, m)), jnp.ones((k, n))
    out = gather_matmul(a_t, b, micro_tile_index(a_t, 8))
    np.testing.assert_array_equal(np.asarray(out), np.full((m, n), float(k)))


def _index(**changes):
    index = MicroTileIndex(indices=jnp.zeros((2, 10), jnp.int32), counts=jnp.zeros(2, jnp.int32), rows=64)
    return dataclasses.replace(index, **changes)


@pytest.mark.parametrize(
    ("a_t", "b", "index", "message"),
    [
        (jnp.ones((10, 128)), jnp.ones((11, 8)), _index(), "K of a_t and b must agree; got K=10 and 11"),
        (jnp.ones((12, 128)), jnp.ones((12, 8)), _index(), "ceil.K / cols. entries a list; got 10, K=12, cols=1"),
        (jnp.ones((10, 128)), jnp.ones((10, 8), jnp.bfloat16), _index(), "one dtype; got float32 and bfloat16"),
        (jnp.ones((10, 128), jnp.int32), jnp.ones((10, 8), jnp.int32), _index(), "dtype must be .* got int32"),
        (jnp.ones((10, 300)), jnp.ones((10, 8)), _index(), "got 2 and 2, M=300, rows=64"),
        (jnp.ones((10, 128)), jnp.ones((10, 8)), _index(counts=jnp.zeros(1, jnp.int32)), "got 2 and 1, M=128"),
        (jnp.ones((10, 128)), jnp.ones((10, 8)), _index(counts=jnp.zeros(2)), r"counts must be int32.*float32\[2\]"),
        (jnp.ones((10, 128)), jnp.ones((10, 8)), _index(rows=0), "rows must be at least 1; got rows=0"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_compiled(unchecked, a_t, b, index, message):
    with pytest.raises(ValueError, match=message):
        gather_matmul(a_t, b, index)


def test_wrong_implementation_and_config():
    a_t, b, index = problem(9, m=64, n=8, k=10, rows=64, density=1.0)
    with pytest.raises(ValueError, match="implementation must be"):
        gather_matmul(a_t, b, index, implementation="triton")
    with pytest.raises(NotImplementedError, match="runs on NVIDIA H100, NVIDIA H200; got cpu"):
        gather_matmul(a_t, b, index, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="multiples of 64; got rows=32"):
        gather_matmul(a_t, b, micro_tile_index(a_t, 32), implementation="interpret")
    for wrong in (
        {"block_m": 96},
        {"dense_from": 2.0},
        {"block_n": 96},
        {"stages": 1},
        {"stages": 9},
        {"out_slots": 3},
        {"group": 0},
    ):
        config = dataclasses.replace(Config(block_m=64), **wrong)
        with pytest.raises(ValueError, match=rf"\b{next(iter(wrong))}\b"):
            gather_matmul(a_t, b, index, config=config, implementation="interpret")


def test_every_candidate_is_a_valid_config():
    def check(a_t, b, index, zero_elsewhere):
        configs = candidates(a_t, b, index, zero_elsewhere)
        assert configs
        for config in configs:
            check_config(config, a_t, index)

    for case in CASES:
        for dtype in case.dtypes:
            if "rows 1" not in case.name and "32" not in case.name:
                on_shapes(check, case, dtype)


def test_work_counts_what_the_pattern_needs():
    mask = np.zeros((10, 100), bool)
    mask[2, :64], mask[3, :], mask[9, 64:] = True, True, True
    index = micro_tile_index(jnp.asarray(mask), 64)
    counted = work(jnp.ones((10, 100), jnp.bfloat16), jnp.ones((10, 8), jnp.bfloat16), index)
    listed = 2 * 64 + 2 * 36  # values of A
    assert counted.flops == 2 * 8 * listed
    assert counted.bytes == 2 * (listed + 3 * 8 + 100 * 8) + 4 * 4


def block_problem(seed, *, m, n, k, rows, cols, out_cols, density):
    """Operands, lists for blocks of C, and the product that they name, by numpy in float64."""
    rng = np.random.default_rng(seed)
    across = -(-n // out_cols) if out_cols else 1
    mask = rng.random((-(-m // rows), across, -(-k // cols))) < density
    index = micro_tile_index(jnp.asarray(mask.reshape(-1, mask.shape[2]).T), 1)
    index = dataclasses.replace(index, rows=rows, cols=cols, out_cols=out_cols)
    a_t, b = rng.standard_normal((k, m)).astype(np.float32), rng.standard_normal((k, n)).astype(np.float32)
    out = np.zeros((m, n))
    for i, j in np.ndindex(*mask.shape[:2]):
        listed = np.repeat(mask[i, j], cols)[:k]
        i_rows, j_cols = slice(i * rows, (i + 1) * rows), slice(j * (out_cols or n), (j + 1) * (out_cols or n))
        out[i_rows, j_cols] = (a_t[listed][:, i_rows].T.astype(np.float64)) @ b[listed][:, j_cols].astype(np.float64)
    return jnp.asarray(a_t), jnp.asarray(b), index, out


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("rows", "cols", "out_cols"), [(8, 16, None), (8, 1, 32), (32, 64, 24), (128, 128, 128)])
def test_blocks_of_a_and_lists_for_blocks_of_c(rows, cols, out_cols, density):
    a_t, b, index, ref = block_problem(0, m=150, n=70, k=200, rows=rows, cols=cols, out_cols=out_cols, density=density)
    assert_close(gather_matmul(a_t, b, index), ref, 1e-6)


@pytest.mark.parametrize("out_cols", [None, 24])
def test_gradients_of_blocks(out_cols):
    a_t, b, index, _ = block_problem(1, m=50, n=70, k=90, rows=16, cols=8, out_cols=out_cols, density=0.4)
    mask = np.asarray(index.mask()).reshape(4, -1, index.indices.shape[1])
    listed = np.repeat(np.repeat(np.repeat(mask, 16, 0)[:50], out_cols or 70, 1)[:, :70], 8, 2)[:, :, :90]
    weights = np.random.default_rng(2).standard_normal((50, 70)).astype(np.float32)

    def masked(a_t, b):
        return jnp.einsum("km,kn,mnk,mn->", a_t, b, jnp.asarray(listed, jnp.float32), weights, precision="highest")

    grads = jax.grad(lambda a_t, b: jnp.sum(gather_matmul(a_t, b, index) * weights), argnums=(0, 1))(a_t, b)
    for grad, ref in zip(grads, jax.grad(masked, argnums=(0, 1))(a_t, b), strict=True):
        assert_close(grad, np.asarray(ref, np.float64), 1e-5)


@pytest.mark.parametrize(("rows", "columns", "group"), [(32, 16, 32), (5, 7, 2), (200, 3, 32), (1, 1, 1)])
@pytest.mark.parametrize("sms", [1, 3, 128, 132])
def test_every_tile_is_walked_once(rows, columns, group, sms):
    sms = schedule.blocks(rows, columns, sms)

    def walk(_):
        waves = -(-rows * columns // sms)
        numbers = jnp.stack([schedule.tile_number(jnp.int32(t)) for t in range(waves)])
        i, j = schedule.row_and_column(numbers, rows, columns, group)
        return jnp.where(jnp.arange(waves) < schedule.own_tiles(rows * columns), i * columns + j, -1)

    with jax.enable_x64(False):
        tiles = np.asarray(jax.vmap(walk, axis_name="sm")(jnp.zeros(sms)))
    assert sorted(tiles[tiles >= 0]) == list(range(rows * columns))
    # What the cost model takes for the kernel's walk.
    own = [(block, tile // columns) for block, walked in enumerate(tiles) for tile in walked if tile >= 0]
    assert sorted(own) == sorted(zip(*schedule.dealt(rows, columns, group, sms), strict=True))
