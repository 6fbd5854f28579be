"""`scatter_matmul` against numpy in float64: patterns that break scatters, gradients, wrong arguments."""

import dataclasses

import jax
import jax.numpy as jnp
import lanes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from pallas_kernels import MicroTileIndex, micro_tile_index
from pallas_kernels.scatter_matmul import Config, candidates, device, peers, scatter_matmul, work
from pallas_kernels.scatter_matmul.mosaic import check_config
from pallas_kernels.scatter_matmul.reference import _xla_loop, _xla_masked
from pallas_kernels.workbench.interpreter import run_interpreted


def index_of(mask: np.ndarray, rows: int, cols: int = 1) -> MicroTileIndex:
    """The lists of a mask of micro-tiles [entries, blocks], written out by hand; what follows them is out of range."""
    entries, blocks = mask.shape
    indices = np.full((blocks, entries), -7, np.int32)
    for block in range(blocks):
        listed = np.flatnonzero(mask[:, block])
        indices[block, : len(listed)] = listed
    counts = mask.sum(axis=0).astype(np.int32)
    return MicroTileIndex(indices=jnp.asarray(indices), counts=jnp.asarray(counts), rows=rows, cols=cols)


def problem(seed: int, *, m: int, n: int, k: int, width: int, density: float, cols: int = 1, dtype=jnp.float32):
    """A, B, their index, and the mask of A [M, K]."""
    rng = np.random.default_rng(seed)
    tiles = rng.random((-(-m // cols), -(-k // width))) < density
    listed = np.repeat(np.repeat(tiles, cols, axis=0)[:m], width, axis=1)[:, :k]
    a, b = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((m, k), (k, n)))
    return a, b, index_of(tiles, width, cols), listed


def expected(a, b, listed) -> np.ndarray:
    return np.where(listed, np.asarray(a, np.float64), 0) @ np.asarray(b, np.float64)


def assert_close(out, ref, bound):
    out = np.asarray(out, np.float64)
    assert np.linalg.norm(out - ref) <= bound * max(np.linalg.norm(ref), 1e-30)


@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**16),
    m=st.integers(1, 300),
    n=st.integers(1, 40),
    k=st.integers(1, 150),
    width=st.sampled_from((1, 8, 32, 64, 100, 512)),
    cols=st.sampled_from((1, 3, 64)),
    density=st.sampled_from((0.0, 0.02, 0.5, 1.0)),
)
def test_any_shape_and_pattern(seed, m, n, k, width, cols, density):
    a, b, index, listed = problem(seed, m=m, n=n, k=k, width=width, cols=cols, density=density)
    assert_close(scatter_matmul(a, b, index), expected(a, b, listed), 1e-6)


@pytest.mark.parametrize("path", [_xla_loop, _xla_masked])  # a CPU runs the first, a GPU the second
@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 1e-2), ("float16", 1e-3), ("float32", 1e-6)])
def test_both_ways_to_compute_it_in_every_dtype(path, dtype, bound):
    a, b, index, listed = problem(1, m=270, n=20, k=100, width=32, cols=4, density=0.4, dtype=dtype)
    out = path(a, b, index)
    assert out.dtype == dtype
    assert_close(out, expected(a, b, listed), bound)


@pytest.mark.parametrize("path", [_xla_loop, _xla_masked])
def test_what_is_not_listed_does_not_matter(path):
    """NaN in unlisted micro-tiles of A and in rows of B that nothing lists, and any integers after the counts."""
    a, b, index, listed = problem(2, m=100, n=16, k=128, width=32, density=0.3)
    listed[:, 32:64] = False
    index = dataclasses.replace(index, counts=index.counts.at[1].set(0))
    ref = expected(a, b, listed)
    a, b = jnp.where(listed, a, jnp.nan), b.at[32:64].set(jnp.nan)
    valid = jnp.arange(100)[None] < index.counts[:, None]
    for poison in (-1, 99, 2**31 - 1, -(2**31)):
        poisoned = dataclasses.replace(index, indices=jnp.where(valid, index.indices, poison))
        assert_close(path(a, b, poisoned), ref, 1e-6)


@pytest.mark.parametrize("density", [0.2, 0.8])  # what is listed is multiplied alone; or with the rest of its rows
def test_the_kernel_reads_nothing_that_is_not_listed(density):
    """NaN in unlisted micro-tiles of A, any integers after the counts, in lists out of order."""
    a, b, index, listed = problem(16, m=40, n=20, k=96, width=32, density=density, dtype=jnp.bfloat16)
    ref = expected(a, b, listed)
    shuffled = np.asarray(index.indices).copy()
    for row, count in zip(shuffled, np.asarray(index.counts), strict=True):
        row[:count] = row[:count][::-1]
        row[count:] = np.resize([-1, 39, 2**31 - 1, -(2**31)], 40 - count)
    index = dataclasses.replace(index, indices=jnp.asarray(shuffled))
    a = jnp.where(listed, a, jnp.nan)
    out = run_interpreted(lambda: scatter_matmul(a, b, index, implementation="interpret"))
    assert_close(out, ref, 1e-2)
    assert not np.asarray(out)[~listed.any(axis=1)].any()


def test_the_kernel_adds_up_what_many_lists_give_one_row():
    """Twelve sums of one row, and of no other: just what is stored at most."""
    tiles = np.zeros((12, 12), bool)
    tiles[7] = True
    a, b, *_ = problem(17, m=12, n=20, k=384, width=32, density=1.0, dtype=jnp.bfloat16)
    out = run_interpreted(lambda: scatter_matmul(a, b, index_of(tiles, 32), implementation="interpret"))
    assert_close(out, expected(a, b, np.repeat(tiles, 32, axis=1)), 1e-2)
    assert not np.delete(np.asarray(out), 7, axis=0).any()


def shuffled_lists(seed: int, lists: int, m: int, density: float) -> tuple[np.ndarray, np.ndarray]:
    """Lists out of order, the second one empty, with any integers after the counts."""
    rng = np.random.default_rng(seed)
    indices, counts = rng.integers(-(2**31), 2**31, (lists, m)).astype(np.int32), np.zeros(lists, np.int32)
    for i in set(range(lists)) - {1}:
        listed = rng.permutation(np.flatnonzero(rng.random(m) < density))
        counts[i] = len(listed)
        indices[i, : len(listed)] = listed
    return indices, counts


@pytest.mark.parametrize(
    ("lists", "m", "density", "capacity"),
    [
        (2, 45, 0.5, 100),  # sixteen warps share a list
        (3, 300, 1.0, 599),  # all but fits
        (3, 300, 1.0, 600),  # just fits
        (5, 700, 0.9, 0),
        (64, 33, 0.03, 264),
        (100, 40, 0.4, 4000),
        (700, 60, 0.1, 480),  # past the capacity; more lists than a warp reads together, fewer rows than warps
        (600, 35, 0.0, 280),  # nothing listed
    ],
)
def test_the_device_code_that_finds_sums(lists, m, density, capacity, unchecked):
    indices, counts = shuffled_lists(lists, lists, m, density)
    work = device.Work(lists=lists, length=m, capacity=capacity, block_m=64)
    shapes = *[(lists + 1,)] * 4, (2 * lists, m), (m, lists), (m,)
    out = lanes.run(device.find_sums, work, [indices, counts], shapes, device.shared_memory(work), partial=(4, 5))
    starts, group_counts, write_starts, ends, reads, numbers, row_counts = out
    fits, first = counts.sum() <= capacity, np.cumsum(counts) - counts
    np.testing.assert_array_equal(group_counts, [*counts, 0] if fits else [0] * lists + [m])
    np.testing.assert_array_equal(ends, np.cumsum(-(-group_counts // 64)))
    np.testing.assert_array_equal(starts, m * np.arange(lists + 1))
    np.testing.assert_array_equal(write_starts, [*first, 0])
    makes = [[] for _ in range(m)]
    for i, (entries, count) in enumerate(zip(indices, counts, strict=True)):
        np.testing.assert_array_equal(reads[i, :count], entries[:count] * lists + i)
        assert (reads[i, count:] == lanes.UNWRITTEN).all()
        masked = np.full(m, -1)
        masked[entries[:count]] = entries[:count] * lists + i
        np.testing.assert_array_equal(reads[lists + i], np.full(m, lanes.UNWRITTEN) if fits else masked)
        for position, row in enumerate(entries[:count]):
            makes[row].append(first[i] + position)
    for row, made in enumerate(makes):
        assert numbers[row, : row_counts[row]].tolist() == (made if fits else [row])


def test_rows_listed_nowhere_are_exact_zeros():
    a, b, index, listed = problem(3, m=90, n=16, k=64, width=32, density=0.2)
    out = np.asarray(scatter_matmul(a, b, index))
    nowhere = ~listed.any(axis=1)
    assert nowhere.any() and not out[nowhere].any() and out[~nowhere].all()


def test_a_block_of_b_does_not_leak_into_rows_that_do_not_list_it():
    tiles = np.ones((80, 2), bool)
    tiles[40:, 1] = False
    a, b, *_ = problem(4, m=80, n=16, k=64, width=32, density=1.0)
    out = np.asarray(scatter_matmul(a, b.at[40].set(jnp.inf), index_of(tiles, 32)))
    assert not np.isfinite(out[:40]).any() and np.isfinite(out[40:]).all()


def test_nan_in_a_listed_entry_is_seen():
    a, b, index, _ = problem(5, m=20, n=16, k=64, width=32, density=1.0)
    out = np.asarray(scatter_matmul(a.at[3, 40].set(jnp.nan), b, index))
    assert np.isnan(out[3]).all() and np.isfinite(np.delete(out, 3, axis=0)).all()


def test_blocks_add_up_in_float32():
    """One row that 512 blocks list: in bfloat16 a sum of ones stops at 256."""
    a, b = jnp.ones((1, 512), jnp.bfloat16), jnp.ones((512, 4), jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(scatter_matmul(a, b, index_of(np.ones((1, 512), bool), 1)), float), 512)


def test_entries_of_a_list_may_come_in_any_order():
    a, b, index, listed = problem(6, m=300, n=16, k=64, width=32, density=0.9)
    shuffled = np.array(index.indices)
    for row, count in zip(shuffled, np.asarray(index.counts), strict=True):
        row[:count] = np.random.default_rng(0).permutation(row[:count])
    index = dataclasses.replace(index, indices=jnp.asarray(shuffled))
    assert_close(scatter_matmul(a, b, index), expected(a, b, listed), 1e-6)


@pytest.mark.parametrize(
    ("width", "cols", "implementation"), [(1, 1, None), (32, 1, "xla"), (32, 16, None), (70, 1, None)]
)
def test_gradients_are_those_of_the_masked_product(width, cols, implementation):
    a, b, index, listed = problem(7, m=50, n=30, k=70, width=width, cols=cols, density=0.4)
    weight = jnp.asarray(np.random.default_rng(8).normal(size=(50, 30)), jnp.float32)

    def loss(a, b):
        return jnp.sum(weight * scatter_matmul(a, b, index, implementation=implementation))

    grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(a, b)
    w, a64, b64 = (np.asarray(x, np.float64) for x in (weight, a, b))
    assert_close(grads[0], np.where(listed, w @ b64.T, 0), 1e-6)
    assert_close(grads[1], np.where(listed, a64, 0).T @ w, 1e-6)


@pytest.mark.parametrize("width", [1, 32, 64])
def test_gradients_of_no_rows_are_zero(width):
    a, b = jnp.zeros((0, 70)), jnp.ones((70, 3))
    grads = jax.grad(lambda a, b: scatter_matmul(a, b, micro_tile_index(a, width)).sum(), (0, 1))(a, b)
    assert grads[0].shape == (0, 70) and not grads[1].any() and grads[1].shape == (70, 3)


def test_gradients_of_gradients_are_those_of_the_masked_product():
    a, b, index, listed = problem(9, m=40, n=24, k=48, width=16, density=0.5)

    def gradient_norm(product):
        def loss(a, b):
            return jnp.sum(jnp.sin(product(a, b)))

        return lambda a, b: sum(jnp.sum(x**2) for x in jax.grad(loss, argnums=(0, 1))(a, b))

    def plain(a, b):
        return jnp.dot(jnp.where(listed, a, 0), b, precision="highest")

    ours = jax.jit(jax.grad(gradient_norm(lambda a, b: scatter_matmul(a, b, index)), argnums=(0, 1)))(a, b)
    with jax.default_matmul_precision("highest"):
        theirs = jax.jit(jax.grad(gradient_norm(plain), argnums=(0, 1)))(a, b)
    for out, ref in zip(ours, theirs, strict=True):
        assert_close(out, np.asarray(ref, np.float64), 1e-5)


def test_a_new_pattern_compiles_nothing_and_asks_the_host_nothing():
    traces = []

    @jax.jit
    def product(a, b):
        traces.append(None)
        return scatter_matmul(a, b, micro_tile_index(a, 16))

    a, b, *_ = problem(10, m=40, n=8, k=48, width=16, density=1.0)
    variants = [
        jnp.where(jax.random.uniform(jax.random.key(s), (40, 48)) < d, a, 0) for s, d in enumerate((0, 0.02, 1))
    ]
    with jax.transfer_guard("disallow"):
        outputs = [product(x, b) for x in variants]
    assert len(traces) == 1
    for x, out in zip(variants, outputs, strict=True):
        assert_close(out, np.asarray(x, np.float64) @ np.asarray(b, np.float64), 1e-6)


def test_vmap_over_a_leading_batch_equals_a_loop():
    a, b, *_ = problem(11, m=32, n=8, k=24, width=8, density=1.0)
    batch = jnp.stack([a, jnp.zeros_like(a), jnp.where(a > 1.5, a, 0)])

    def loss(a, b):
        return jnp.sum(jnp.cos(scatter_matmul(a, b, micro_tile_index(a, 8))))

    one = jax.value_and_grad(loss, argnums=(0, 1))
    values, grads = jax.jit(jax.vmap(one, in_axes=(0, None)))(batch, b)
    one = jax.jit(one)
    for i, x in enumerate(batch):
        value, grad = one(x, b)
        np.testing.assert_allclose(values[i], value, rtol=1e-5)
        for out, ref in zip(grads, grad, strict=True):
            assert_close(out[i], np.asarray(ref, np.float64), 1e-5)


@pytest.mark.parametrize("specs", [(P("x"), P(None, "y")), (P("x"), P()), (P(), P(None, "y"))])
def test_value_and_gradients_under_shard_map(specs):
    """Operands vary over different mesh axes, the index over none: the types must fit, on one device too."""
    a, b, index, listed = problem(12, m=32, n=8, k=24, width=8, density=0.5)
    mesh = jax.make_mesh((1, 1), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows, columns = specs[0] or (None,), specs[1] or (None, None)
    out_spec = P(rows[0], columns[1])
    product = jax.shard_map(scatter_matmul, mesh=mesh, in_specs=(*specs, P()), out_specs=out_spec)
    out, pull_back = jax.vjp(jax.jit(lambda a, b: product(a, b, index)), a, b)
    ref = expected(a, b, listed)
    assert_close(out, ref, 1e-6)
    grads = pull_back(out)
    assert_close(grads[0], np.where(listed, ref @ np.asarray(b, np.float64).T, 0), 1e-5)
    assert_close(grads[1], np.where(listed, a, 0).T.astype(np.float64) @ ref, 1e-5)


def test_under_x64_and_from_numpy(unchecked):
    a, b, index, listed = problem(13, m=70, n=20, k=130, width=64, density=0.4)
    with jax.enable_x64(True):
        out, pull_back = jax.vjp(lambda a, b: scatter_matmul(a, b, index), np.asarray(a), np.asarray(b))
        grads = pull_back(out)
    assert out.dtype == grads[0].dtype == jnp.float32
    assert_close(out, expected(a, b, listed), 1e-6)
    assert_close(grads[1], np.where(listed, a, 0).T.astype(np.float64) @ np.asarray(out, np.float64), 1e-6)


@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 0, 5), (3, 4, 0)])
def test_nothing_to_do(shape):
    m, n, k = shape
    a, b = jnp.ones((m, k)), jnp.ones((k, n))
    index = micro_tile_index(a, 8)
    np.testing.assert_array_equal(np.asarray(scatter_matmul(a, b, index)), np.full((m, n), float(k)))
    grads = jax.grad(lambda a, b: scatter_matmul(a, b, index).sum(), argnums=(0, 1))(a, b)
    assert [x.shape for x in grads] == [(m, k), (k, n)]


def _index(**changes):
    index = MicroTileIndex(indices=jnp.zeros((2, 10), jnp.int32), counts=jnp.zeros(2, jnp.int32), rows=64)
    return dataclasses.replace(index, **changes)


@pytest.mark.parametrize(
    ("a", "b", "index", "message"),
    [
        (jnp.ones((1, 10, 128)), jnp.ones((128, 8)), _index(), r"a and b must be matrices \[M, K\] and \[K, N\]; got"),
        (jnp.ones((10, 128)), jnp.ones((129, 8)), _index(), "K of a and b must agree; got K=128 and 129"),
        (jnp.ones((10, 128)), jnp.ones((128, 8), jnp.bfloat16), _index(), "one dtype; got float32 and bfloat16"),
        (jnp.ones((10, 128), jnp.int32), jnp.ones((128, 8), jnp.int32), _index(), "dtype must be .* got int32"),
        (jnp.ones((12, 128)), jnp.ones((128, 8)), _index(), r"ceil\(M / cols\) entries a list; got 10, M=12, cols=1"),
        (jnp.ones((10, 128)), jnp.ones((128, 8)), _index(cols=2), "got 10, M=10, cols=2"),
        (jnp.ones((10, 300)), jnp.ones((300, 8)), _index(), "got 2 and 2, K=300, rows=64"),
        (jnp.ones((10, 128)), jnp.ones((128, 8)), _index(counts=jnp.zeros(1, jnp.int32)), "got 2 and 1, K=128"),
        (jnp.ones((10, 128)), jnp.ones((128, 8)), _index(counts=jnp.zeros(2)), r"counts must be int32.*float32\[2\]"),
        (jnp.ones((10, 128)), jnp.ones((128, 8)), _index(rows=0), "rows must be at least 1; got rows=0"),
        (jnp.ones((10, 128)), jnp.ones((128, 8)), _index(cols=0), "cols must be at least 1; got cols=0"),
        (jnp.ones((10, 128)), jnp.ones((128, 8)), _index(out_cols=8), "out_cols must be None .*; got out_cols=8"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_compiled(unchecked, a, b, index, message):
    with pytest.raises(ValueError, match=message):
        scatter_matmul(a, b, index)


def test_wrong_implementation():
    a, b, index, _ = problem(14, m=10, n=8, k=64, width=64, density=1.0)
    with pytest.raises(ValueError, match="implementation must be .*; got 'triton'"):
        scatter_matmul(a, b, index, implementation="triton")
    with pytest.raises(NotImplementedError, match="runs on NVIDIA H100, NVIDIA H200; got cpu"):
        scatter_matmul(a, b, index, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="lists of single rows; got cols=2"):
        scatter_matmul(a, b, micro_tile_index(a, 64, 2), implementation="interpret")
    narrow = micro_tile_index(a, 16)
    with pytest.raises(NotImplementedError, match="multiples of 32, or one list of whole rows; got rows=16, K=64"):
        scatter_matmul(a, b, narrow, implementation="interpret")
    k = 32 * device.MOST_LISTS + 1
    many = MicroTileIndex(indices=jnp.zeros((24576, 1), jnp.int32), counts=jnp.zeros(24576, jnp.int32), rows=32)
    with pytest.raises(NotImplementedError, match="24575 lists at most; got K=786401, rows=32"):
        scatter_matmul(jnp.ones((1, k)), jnp.ones((k, 8)), many, implementation="interpret")
    for wrong in ({"block_n": 96, "stages": 2}, {"block_n": 64, "stages": 1}, {"block_n": 256}, {"block_m": 32}):
        with pytest.raises(ValueError, match="block_n must be|stages must be|block_m must be"):
            scatter_matmul(a, b, index, config=Config(**wrong), implementation="interpret")


def test_work_counts_what_the_pattern_needs():
    tiles = np.zeros((10, 2), bool)
    tiles[2, 0], tiles[3, :] = True, True
    a, b = jnp.ones((10, 100), jnp.bfloat16), jnp.ones((100, 8), jnp.bfloat16)
    listed = 2 * 64 + 36  # values of A
    counted = work(a, b, index_of(tiles, 64))
    assert counted.flops == 2 * 8 * listed
    assert counted.bytes == 2 * (listed + 100 * 8 + 10 * 8) + 4 * 3
    tiles[3, 1] = False
    assert work(a, b, index_of(tiles, 64)).bytes == 2 * (2 * 64 + 64 * 8 + 10 * 8) + 4 * 2


def test_peers_and_candidates():
    a, b, index, _ = problem(15, m=10, n=8, k=64, width=64, density=1.0)
    for config in candidates(a, b, index):
        check_config(config, a, b, index)
    for peer in peers(a, b, index).values():
        assert_close(peer(a, b, index), np.asarray(a, np.float64) @ np.asarray(b, np.float64), 1e-2)
