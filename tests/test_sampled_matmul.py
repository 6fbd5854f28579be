"""`sampled_matmul` against numpy in float64: patterns, what is not finite, gradients, wrong arguments."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from pallas_kernels import MicroTileIndex, micro_tile_index
from pallas_kernels.sampled_matmul import Config, candidates, peers, sampled_matmul, work
from pallas_kernels.sampled_matmul.mosaic import check_config
from pallas_kernels.sampled_matmul.reference import _xla_loop, _xla_masked


def index_of(mask: np.ndarray, rows: int, cols: int = 1) -> MicroTileIndex:
    """The lists of a mask of micro-tiles [entries, blocks], written out by hand; what follows them is out of range."""
    entries, blocks = mask.shape
    indices = np.full((blocks, entries), -7, np.int32)
    for block in range(blocks):
        listed = np.flatnonzero(mask[:, block])
        indices[block, : len(listed)] = listed
    counts = mask.sum(axis=0).astype(np.int32)
    return MicroTileIndex(indices=jnp.asarray(indices), counts=jnp.asarray(counts), rows=rows, cols=cols)


def problem(seed: int, *, length: int, width: int, n: int, rows: int, density: float, cols: int = 1, dtype=jnp.float32):
    """A [L, N], B [W, N], the index, and the mask of the result [L, W]."""
    rng = np.random.default_rng(seed)
    tiles = rng.random((-(-length // cols), -(-width // rows))) < density
    listed = np.repeat(np.repeat(tiles, cols, axis=0)[:length], rows, axis=1)[:, :width]
    a, b = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((length, n), (width, n)))
    return a, b, index_of(tiles, rows, cols), listed


def expected(a, b, listed) -> np.ndarray:
    return np.where(listed, np.asarray(a, np.float64) @ np.asarray(b, np.float64).T, 0)


def assert_close(out, ref, bound):
    out = np.asarray(out, np.float64)
    assert np.linalg.norm(out - ref) <= bound * max(np.linalg.norm(ref), 1e-30)


@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**16),
    length=st.integers(1, 300),
    width=st.integers(1, 150),
    n=st.integers(1, 40),
    rows=st.sampled_from((1, 8, 32, 64, 100, 512)),
    cols=st.sampled_from((1, 3, 64)),
    density=st.sampled_from((0.0, 0.02, 0.5, 1.0)),
)
def test_any_shape_and_pattern(seed, length, width, n, rows, cols, density):
    a, b, index, listed = problem(seed, length=length, width=width, n=n, rows=rows, cols=cols, density=density)
    out = sampled_matmul(a, b, index)
    assert_close(out, expected(a, b, listed), 1e-6)
    assert not np.asarray(out)[~listed].any()


@pytest.mark.parametrize("path", [_xla_loop, _xla_masked])  # a CPU runs the first, a GPU the second
@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 1e-2), ("float16", 1e-3), ("float32", 1e-6)])
def test_both_ways_to_compute_it_in_every_dtype(path, dtype, bound):
    a, b, index, listed = problem(1, length=270, width=100, n=20, rows=32, cols=4, density=0.4, dtype=dtype)
    out = path(a, b, index)
    assert out.dtype == dtype
    assert_close(out, expected(a, b, listed), bound)


@pytest.mark.parametrize("path", [_xla_loop, _xla_masked])
def test_what_is_not_listed_is_zero_whatever_the_operands_hold(path):
    """NaN and infinities in rows that nothing lists, and any integers after the counts."""
    a, b, index, listed = problem(2, length=100, width=128, n=16, rows=32, density=0.3)
    listed[:, 32:64] = False
    index = dataclasses.replace(index, counts=index.counts.at[1].set(0))
    ref = expected(a, b, listed)
    nowhere = ~listed.any(axis=1)
    assert nowhere.any()
    a, b = jnp.where(nowhere[:, None], jnp.nan, a), b.at[32:64].set(jnp.inf)
    valid = jnp.arange(100)[None] < index.counts[:, None]
    for poison in (-1, 99, 2**31 - 1, -(2**31)):
        poisoned = dataclasses.replace(index, indices=jnp.where(valid, index.indices, poison))
        assert_close(path(a, b, poisoned), ref, 1e-6)


@pytest.mark.parametrize("path", [_xla_loop, _xla_masked])
def test_what_is_not_finite_reaches_its_own_products_alone(path):
    a, b, index, listed = problem(3, length=60, width=64, n=16, rows=32, density=0.5)
    out = np.asarray(path(a.at[3, 5].set(jnp.nan), b.at[40, 7].set(jnp.inf), index))
    touched = np.zeros_like(listed)
    touched[3], touched[:, 40] = True, True
    np.testing.assert_array_equal(np.isfinite(out), ~(touched & listed))


def test_sums_are_in_float32():
    """In bfloat16 a sum of ones stops at 256."""
    a, b = jnp.ones((3, 512), jnp.bfloat16), jnp.ones((2, 512), jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(sampled_matmul(a, b, index_of(np.ones((3, 1), bool), 2)), float), 512)


def test_entries_of_a_list_may_come_in_any_order():
    a, b, index, listed = problem(4, length=300, width=64, n=16, rows=32, density=0.9)
    shuffled = np.array(index.indices)
    for row, count in zip(shuffled, np.asarray(index.counts), strict=True):
        row[:count] = np.random.default_rng(0).permutation(row[:count])
    index = dataclasses.replace(index, indices=jnp.asarray(shuffled))
    assert_close(sampled_matmul(a, b, index), expected(a, b, listed), 1e-6)


@pytest.mark.parametrize(
    ("rows", "cols", "implementation"), [(1, 1, None), (32, 1, "xla"), (32, 16, None), (70, 1, None)]
)
def test_gradients_are_those_of_the_masked_product(rows, cols, implementation):
    a, b, index, listed = problem(5, length=50, width=70, n=30, rows=rows, cols=cols, density=0.4)
    weight = jnp.asarray(np.random.default_rng(6).normal(size=(50, 70)), jnp.float32)

    def loss(a, b):
        return jnp.sum(weight * sampled_matmul(a, b, index, implementation=implementation))

    grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(a, b)
    w, a64, b64 = np.where(listed, weight, 0).astype(np.float64), np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert_close(grads[0], w @ b64, 1e-6)
    assert_close(grads[1], w.T @ a64, 1e-6)


def test_gradients_of_gradients_are_those_of_the_masked_product():
    a, b, index, listed = problem(7, length=40, width=48, n=24, rows=16, density=0.5)

    def gradient_norm(product):
        def loss(a, b):
            return jnp.sum(jnp.sin(product(a, b)))

        return lambda a, b: sum(jnp.sum(x**2) for x in jax.grad(loss, argnums=(0, 1))(a, b))

    def plain(a, b):
        return jnp.where(listed, jnp.dot(a, b.T, precision="highest"), 0)

    ours = jax.jit(jax.grad(gradient_norm(lambda a, b: sampled_matmul(a, b, index)), argnums=(0, 1)))(a, b)
    with jax.default_matmul_precision("highest"):
        theirs = jax.jit(jax.grad(gradient_norm(plain), argnums=(0, 1)))(a, b)
    for out, ref in zip(ours, theirs, strict=True):
        assert_close(out, np.asarray(ref, np.float64), 1e-5)


def test_a_new_pattern_compiles_nothing_and_asks_the_host_nothing():
    traces = []

    @jax.jit
    def product(a, b, mask):
        traces.append(None)
        return sampled_matmul(a, b, micro_tile_index(mask, 16))

    a, b, *_ = problem(8, length=40, width=48, n=8, rows=16, density=1.0)
    masks = [jax.random.uniform(jax.random.key(s), (40, 3)) < d for s, d in enumerate((0, 0.3, 1))]
    masks = [jnp.repeat(mask, 16, axis=1) for mask in masks]
    with jax.transfer_guard("disallow"):
        outputs = [product(a, b, mask) for mask in masks]
    assert len(traces) == 1
    for mask, out in zip(masks, outputs, strict=True):
        assert_close(out, expected(a, b, np.asarray(mask)), 1e-6)


def test_vmap_over_a_leading_batch_equals_a_loop():
    a, b, *_ = problem(9, length=32, width=24, n=8, rows=8, density=1.0)
    batch = jnp.stack([a, 2 * a, a[::-1]])
    masks = jax.random.uniform(jax.random.key(0), (3, 32, 24)) < jnp.asarray([0.0, 0.05, 1.0])[:, None, None]

    def loss(a, b, mask):
        return jnp.sum(jnp.cos(sampled_matmul(a, b, micro_tile_index(mask, 8))))

    one = jax.value_and_grad(loss, argnums=(0, 1))
    values, grads = jax.jit(jax.vmap(one, in_axes=(0, None, 0)))(batch, b, masks)
    one = jax.jit(one)
    for i, (x, mask) in enumerate(zip(batch, masks, strict=True)):
        value, grad = one(x, b, mask)
        np.testing.assert_allclose(values[i], value, rtol=1e-5)
        for out, ref in zip(grads, grad, strict=True):
            assert_close(out[i], np.asarray(ref, np.float64), 1e-5)


@pytest.mark.parametrize("specs", [(P("x"), P("y")), (P("x"), P()), (P(), P("y")), (P(None, "x"), P(None, "x"))])
def test_value_and_gradients_under_shard_map(specs):
    """Operands vary over different mesh axes, the index over none: the types must fit, on one device too."""
    a, b, index, listed = problem(10, length=32, width=24, n=8, rows=8, density=0.5)
    mesh = jax.make_mesh((1, 1), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    contracted = len(specs[0]) == 2

    def product(a, b):
        out = sampled_matmul(a, b, index)
        return jax.lax.psum(out, "x") if contracted else out

    out_spec = P() if contracted else P(*(spec[0] if spec else None for spec in specs))
    out, pull_back = jax.vjp(jax.jit(jax.shard_map(product, mesh=mesh, in_specs=specs, out_specs=out_spec)), a, b)
    ref = expected(a, b, listed)
    assert_close(out, ref, 1e-6)
    grads = pull_back(out)
    assert_close(grads[0], ref @ np.asarray(b, np.float64), 1e-5)
    assert_close(grads[1], ref.T @ np.asarray(a, np.float64), 1e-5)


def test_under_x64_and_from_numpy(unchecked):
    a, b, index, listed = problem(11, length=70, width=130, n=20, rows=64, density=0.4)
    with jax.enable_x64(True):
        out, pull_back = jax.vjp(lambda a, b: sampled_matmul(a, b, index), np.asarray(a), np.asarray(b))
        grads = pull_back(out)
    assert out.dtype == grads[0].dtype == jnp.float32
    assert_close(out, expected(a, b, listed), 1e-6)
    assert_close(grads[0], np.asarray(out, np.float64) @ np.asarray(b, np.float64), 1e-6)


@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 0, 5), (3, 4, 0)])
def test_nothing_to_do(shape):
    length, width, n = shape
    a, b, index = jnp.ones((length, n)), jnp.ones((width, n)), micro_tile_index(jnp.ones((length, width)), 8)
    np.testing.assert_array_equal(np.asarray(sampled_matmul(a, b, index)), np.full((length, width), float(n)))
    grads = jax.grad(lambda a, b: sampled_matmul(a, b, index).sum(), argnums=(0, 1))(a, b)
    assert [x.shape for x in grads] == [(length, n), (width, n)]


def _index(**changes):
    index = MicroTileIndex(indices=jnp.zeros((2, 10), jnp.int32), counts=jnp.zeros(2, jnp.int32), rows=64)
    return dataclasses.replace(index, **changes)


@pytest.mark.parametrize(
    ("a", "b", "index", "message"),
    [
        (jnp.ones((10, 8)), jnp.ones((1, 128, 8)), _index(), r"a and b must be matrices \[L, N\] and \[W, N\]; got"),
        (jnp.ones((10, 8)), jnp.ones((128, 9)), _index(), "N of a and b must agree; got N=8 and 9"),
        (jnp.ones((10, 8)), jnp.ones((128, 8), jnp.bfloat16), _index(), "one dtype; got float32 and bfloat16"),
        (jnp.ones((10, 8), jnp.int32), jnp.ones((128, 8), jnp.int32), _index(), "dtype must be .* got int32"),
        (jnp.ones((12, 8)), jnp.ones((128, 8)), _index(), r"ceil\(L / cols\) entries a list; got 10, L=12, cols=1"),
        (jnp.ones((10, 8)), jnp.ones((300, 8)), _index(), r"ceil\(W / rows\) lists.*; got 2 and 2, W=300, rows=64"),
        (jnp.ones((10, 8)), jnp.ones((128, 8)), _index(counts=jnp.zeros(2)), r"counts must be int32.*float32\[2\]"),
        (jnp.ones((10, 8)), jnp.ones((128, 8)), _index(rows=0), "rows must be at least 1; got rows=0"),
        (jnp.ones((10, 8)), jnp.ones((128, 8)), _index(out_cols=8), "out_cols must be None .*; got out_cols=8"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_compiled(unchecked, a, b, index, message):
    with pytest.raises(ValueError, match=message):
        sampled_matmul(a, b, index)


def test_wrong_implementation():
    a, b, index, _ = problem(12, length=10, width=64, n=8, rows=64, density=1.0)
    with pytest.raises(ValueError, match="implementation must be .*; got 'triton'"):
        sampled_matmul(a, b, index, implementation="triton")
    a16 = a.astype(jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="runs on NVIDIA H100, NVIDIA H200; got cpu"):
        sampled_matmul(a16, b.astype(jnp.bfloat16), index, implementation="mosaic_gpu")
    narrow = micro_tile_index(jnp.ones((10, 64), bool), 16)
    with pytest.raises(NotImplementedError, match="multiples of 32; got rows=16"):
        sampled_matmul(a16, b.astype(jnp.bfloat16), narrow, implementation="interpret")
    for wrong in ({"block_n": 96, "stages": 2}, {"block_n": 64, "stages": 1}):
        with pytest.raises(ValueError, match="block_n must be|stages must be"):
            sampled_matmul(a16, b.astype(jnp.bfloat16), index, config=Config(**wrong), implementation="interpret")


def test_work_counts_what_the_pattern_needs():
    tiles = np.zeros((10, 2), bool)
    tiles[2, 0], tiles[3, :] = True, True
    a, b = jnp.ones((10, 8), jnp.bfloat16), jnp.ones((100, 8), jnp.bfloat16)
    counted = work(a, b, index_of(tiles, 64))
    assert counted.flops == 2 * 8 * (2 * 64 + 36)
    assert counted.bytes == 2 * (2 * 8 + 100 * 8 + 10 * 100) + 4 * 3
    tiles[3, 1] = False
    assert work(a, b, index_of(tiles, 64)).bytes == 2 * (2 * 8 + 64 * 8 + 10 * 100) + 4 * 2


def test_peers_and_candidates():
    a, b, index, _ = problem(13, length=10, width=64, n=8, rows=64, density=1.0)
    for config in candidates(a, b, index):
        check_config(config, a, b, index)
    for peer in peers(a, b, index).values():
        assert_close(peer(a, b, index), np.asarray(a, np.float64) @ np.asarray(b, np.float64).T, 1e-2)
