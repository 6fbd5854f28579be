"""`relu_matmul` against numpy in float64: what is live and what only seems so, padding, gradients, wrong arguments."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from pallas_kernels import gather_matmul
from pallas_kernels.relu_matmul import Config, candidates, peers, relu_matmul, work
from pallas_kernels.relu_matmul.config import check_config
from pallas_kernels.relu_matmul.mosaic import mosaic
from pallas_kernels.workbench.interpreter import run_interpreted


def problem(seed: int, *, tokens: int, d_model: int, d_ff: int, shift: float = -3.0, dtype=jnp.float32):
    """Multiples of 1/8, of which sums are exact: x, w and a bias around `shift`, and a mask of the tokens."""
    rng = np.random.default_rng(seed)
    x, w, bias = (rng.integers(-8, 9, shape) / 8 for shape in ((tokens, d_model), (d_model, d_ff), (d_ff,)))
    mask = jnp.asarray(rng.random(tokens) < 0.7)
    return *(jnp.asarray(a, dtype) for a in (x, w, bias + shift)), mask


def expected(x, w, bias, mask) -> np.ndarray:
    h = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    h = np.maximum(h if bias is None else h + np.asarray(bias, np.float64), 0)
    return (h if mask is None else np.where(np.asarray(mask)[:, None], h, 0)).T


def assert_lists_what_is_live(index, h_t, rows):
    """Its lists name the neurons that have a non-zero among a block's tokens, ascending, and then zeros."""
    h_t = np.asarray(h_t, np.float64)
    blocks = [np.flatnonzero((h_t[:, i : i + rows] != 0).any(axis=1)) for i in range(0, h_t.shape[1], rows)]
    assert (index.rows, index.cols, index.out_cols) == (rows, 1, None)
    assert index.indices.shape == (len(blocks), h_t.shape[0])
    np.testing.assert_array_equal(index.counts, [len(live) for live in blocks])
    for row, live in zip(np.asarray(index.indices), blocks, strict=True):
        np.testing.assert_array_equal(row, np.pad(live, (0, len(row) - len(live))))


def assert_close(out, ref, bound):
    assert np.linalg.norm(np.asarray(out, np.float64) - ref) <= bound * max(np.linalg.norm(ref), 1e-30)


def interpreted(*args, **static):
    return run_interpreted(lambda: relu_matmul(*args, implementation="interpret", **static))


@settings(max_examples=12)
@given(
    seed=st.integers(0, 2**16),
    tokens=st.integers(1, 150),
    d_model=st.integers(1, 60),
    d_ff=st.integers(1, 90),
    rows=st.sampled_from((1, 8, 32, 100, 512)),
    shift=st.sampled_from((-100.0, -6.0, 0.0, 100.0)),
    masked=st.booleans(),
)
def test_any_shape_and_pattern(seed, tokens, d_model, d_ff, rows, shift, masked):
    x, w, bias, mask = problem(seed, tokens=tokens, d_model=d_model, d_ff=d_ff, shift=shift)
    mask = mask if masked else None
    h_t, index = jax.jit(relu_matmul, static_argnums=3)(x, w, bias, rows, mask)
    ref = expected(x, w, bias, mask)
    np.testing.assert_array_equal(h_t, ref)  # exact sums leave no doubt about what is live
    assert_lists_what_is_live(index, ref, rows)


@pytest.mark.parametrize(("dtype", "with_bias"), [("bfloat16", True), ("float16", False), ("float32", False)])
def test_every_dtype(dtype, with_bias):
    x, w, bias, mask = problem(1, tokens=70, d_model=40, d_ff=50, dtype=dtype)
    bias = bias if with_bias else None
    h_t, index = jax.jit(relu_matmul, static_argnums=3)(x, w, bias, 16, mask)
    assert h_t.dtype == dtype
    assert_close(h_t, expected(x, w, bias, mask), 1e-2 if dtype == "bfloat16" else 1e-3)
    assert_lists_what_is_live(index, expected(x, w, bias, mask), 16)


@pytest.mark.parametrize("rows", [8, 128])
def test_interpreted_over_several_tiles_of_a_block(rows):
    """Two blocks of the grid walk 2 x 3 tiles in groups; the last tile has a list for some of its tokens only."""
    x, w, bias, mask = problem(2, tokens=260, d_model=40, d_ff=136, shift=-9.0, dtype="bfloat16")
    config = Config(block_n=128, stages=2, out_slots=1, group=1)
    h_t, live = run_interpreted(lambda: mosaic(x, w, bias, rows, mask, config, interpret=True))
    ref = expected(x, w, bias, mask)
    assert_close(h_t, ref, 1e-2)
    blocks = np.pad(ref, ((0, 0), (0, -260 % rows))).reshape(136, -1, rows)
    np.testing.assert_array_equal(np.asarray(live)[:, :136], (blocks != 0).any(axis=2).T)


@pytest.mark.parametrize(
    ("dtype", "run"), [("bfloat16", relu_matmul), ("float16", relu_matmul), ("float16", interpreted)]
)
def test_live_is_what_is_not_zero_once_rounded_and_nan_is_live(dtype, run):
    x, w = np.zeros((40, 8)), np.zeros((8, 6))  # a feature a neuron; the last 16 tokens are padding
    x[:, 1], w[1, 1] = 1, 1e-7  # the smallest that float16 has
    x[:, 2], w[2, 2] = 1e-5, 1e-5  # a product that float16 rounds to zero, and bfloat16 does not
    x[12, 3], w[3, 3], w[3, 4] = 300, 300, -300  # infinite in float16
    x[[5, 30]] = np.nan  # a real token and padding
    x, w = jnp.asarray(x, dtype), jnp.asarray(w, dtype)
    h_t, index = run(x, w, None, 8, jnp.arange(40) < 24)
    h_t, tiny = np.asarray(h_t, np.float64), dtype == "bfloat16"
    assert np.isnan(h_t[:, 5]).all() and np.isfinite(h_t[3, 12]) == tiny and h_t[3, 12] > 6e4
    np.testing.assert_array_equal(index.counts, [6, 2 + tiny, 1 + tiny, 0, 0])
    assert_lists_what_is_live(index, h_t, 8)


def test_tokens_that_are_not_there_are_not_live():
    """A tile has more tokens and neurons than there are, and by their bias alone they would be."""
    x, w, bias = (jnp.full(shape, value, jnp.bfloat16) for shape, value in (((20, 8), -1), ((8, 10), 10), ((10,), 50)))
    h_t, index = interpreted(x, w, bias, 32)
    np.testing.assert_array_equal(np.asarray(h_t, float), np.zeros((10, 20)))
    assert_lists_what_is_live(index, h_t, 32)


@pytest.mark.parametrize(("rows", "implementation"), [(8, None), (32, "xla")])
def test_gradients_are_those_of_the_dense_layer(rows, implementation):
    x, w, bias, mask = problem(4, tokens=50, d_model=30, d_ff=40, shift=-1.0)
    weight = jnp.asarray(np.random.default_rng(5).normal(size=(40, 50)), jnp.float32)

    def loss(x, w, bias):
        return jnp.sum(weight * relu_matmul(x, w, bias, rows, mask, implementation=implementation)[0])

    grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, w, bias)
    passed = np.where(expected(x, w, bias, mask) > 0, np.asarray(weight, np.float64), 0)
    assert_close(grads[0], passed.T @ np.asarray(w, np.float64).T, 1e-6)
    assert_close(grads[1], (passed @ np.asarray(x, np.float64)).T, 1e-6)
    assert_close(grads[2], passed.sum(axis=1), 1e-6)


def test_what_a_token_that_is_not_there_holds_reaches_no_gradient():
    x = jnp.ones((4, 8)).at[3].set(jnp.nan)
    w, mask = jnp.ones((8, 6)), jnp.array([True, True, True, False])
    grads = jax.grad(lambda x, w, bias: relu_matmul(x, w, bias, 8, mask)[0].sum(), (0, 1, 2))(x, w, jnp.zeros(6))
    for grad, value in zip(grads, (np.array([6, 6, 6, 0])[:, None], 3, 3), strict=True):
        np.testing.assert_array_equal(grad, np.broadcast_to(value, grad.shape))


def test_a_feed_forward_block_over_the_index_has_the_gradients_of_the_dense_one_of_any_order():
    x, w, bias, mask = problem(6, tokens=24, d_model=10, d_ff=16, shift=0.0)
    w2 = jnp.asarray(np.random.default_rng(7).normal(size=(16, 10)), jnp.float32)

    def sparse(x, w, bias, w2):
        h_t, index = relu_matmul(x, w, bias, 8, mask)
        return gather_matmul(h_t, w2, index)

    def dense(x, w, bias, w2):
        h = jax.nn.relu(jnp.dot(x, w, precision="highest") + bias[None])
        return jnp.dot(jnp.where(mask[:, None], h, 0), w2, precision="highest")

    def gradients(block):
        def loss(*args):
            return jnp.sum(jnp.sin(block(*args)))

        def gradient_norm(*args):
            return sum(jnp.sum(g**2) for g in jax.grad(loss, argnums=(0, 1, 2, 3))(*args))

        return jax.jit(jax.grad(gradient_norm, argnums=(0, 1, 2, 3)))(x, w, bias, w2)

    with jax.default_matmul_precision("highest"):
        for out, ref in zip(gradients(sparse), gradients(dense), strict=True):
            assert_close(out, np.asarray(ref, np.float64), 1e-5)


def test_a_new_pattern_compiles_nothing_and_asks_the_host_nothing():
    traces = []

    @jax.jit
    def layer(x, w, bias):
        traces.append(None)
        return relu_matmul(x, w, bias, 16)

    variants = [problem(8, tokens=40, d_model=12, d_ff=20, shift=shift)[:3] for shift in (-100.0, -4.0, 100.0)]
    with jax.transfer_guard("disallow"):
        outputs = [layer(x, w, bias) for x, w, bias in variants]
    assert len(traces) == 1
    for (x, w, bias), (h_t, index) in zip(variants, outputs, strict=True):
        np.testing.assert_array_equal(h_t, expected(x, w, bias, None))
        assert_lists_what_is_live(index, h_t, 16)


def test_vmap_over_a_leading_batch_equals_a_loop():
    x, w, bias, mask = problem(9, tokens=24, d_model=10, d_ff=16, shift=-1.0)
    batch, masks = jnp.stack([x, 2 * x, jnp.zeros_like(x)]), jnp.stack([mask, ~mask, mask])
    h_t, index = jax.jit(jax.vmap(lambda x, mask: relu_matmul(x, w, bias, 8, mask)))(batch, masks)
    for i in range(3):
        np.testing.assert_array_equal(h_t[i], expected(batch[i], w, bias, masks[i]))
        assert_lists_what_is_live(jax.tree.map(lambda a, i=i: a[i], index), h_t[i], 8)


@pytest.mark.parametrize("spec", [P("x"), P()])
def test_value_and_gradients_under_shard_map(spec):
    """Tokens vary over a mesh axis, the weights over another or none: the types must fit, on one device too."""
    x, w, bias, mask = problem(10, tokens=24, d_model=10, d_ff=16, shift=-1.0)
    mesh = jax.make_mesh((1, 1), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def layer(x, w, bias, mask):
        h_t, index = relu_matmul(x, w, bias, 8, mask)
        return h_t, index.counts[None]

    specs = {"in_specs": (spec, P(None, "y"), P("y"), spec), "out_specs": (P("y", *spec), P("y", *spec))}
    layer = jax.jit(jax.shard_map(layer, mesh=mesh, **specs))
    (h_t, counts), pull_back = jax.vjp(lambda x, w, bias: layer(x, w, bias, mask), x, w, bias)
    ref = expected(x, w, bias, mask)
    np.testing.assert_array_equal(h_t, ref)
    np.testing.assert_array_equal(counts[0], [(ref[:, i : i + 8] != 0).any(axis=1).sum() for i in (0, 8, 16)])
    grads = pull_back((h_t, np.zeros(counts.shape, jax.dtypes.float0)))
    assert_close(grads[0], ref.T @ np.asarray(w, np.float64).T, 1e-6)
    assert_close(grads[2], ref.sum(axis=1), 1e-6)


def test_under_x64_and_from_numpy(unchecked):
    arrays: list[Any] = [np.asarray(a) for a in problem(11, tokens=30, d_model=8, d_ff=12)]
    x, w, bias, mask = arrays
    with jax.enable_x64(True):
        (h_t, index), pull_back = jax.vjp(lambda x, w, bias: relu_matmul(x, w, bias, 8, mask), x, w, bias)
        zeros = jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), index)
        grads = pull_back((h_t, zeros))
    assert h_t.dtype == grads[0].dtype == jnp.float32 and index.indices.dtype == jnp.int32
    np.testing.assert_array_equal(h_t, expected(x, w, bias, mask))
    assert_close(grads[2], np.asarray(h_t, np.float64).sum(axis=1), 1e-6)


@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 0, 5), (3, 4, 0)])
def test_nothing_to_do(shape):
    tokens, d_model, d_ff = shape
    x, w, bias = jnp.ones((tokens, d_model)), jnp.ones((d_model, d_ff)), jnp.ones(d_ff)
    h_t, index = relu_matmul(x, w, bias, 2)
    np.testing.assert_array_equal(h_t, np.full((d_ff, tokens), d_model + 1.0))
    np.testing.assert_array_equal(index.counts, np.full(-(-tokens // 2), d_ff))
    grads = jax.grad(lambda x, w, bias: relu_matmul(x, w, bias, 2)[0].sum(), argnums=(0, 1, 2))(x, w, bias)
    assert [g.shape for g in grads] == [x.shape, w.shape, bias.shape]


X, W, B = jnp.ones((10, 8)), jnp.ones((8, 6)), jnp.ones(6)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((X[None], W, B, 8), r"x and w must be matrices \[T, D\] and \[D, F\]; got shapes \(1, 10, 8\)"),
        ((X, W[:7], B, 8), "D of x and w must agree; got D=8 and 7"),
        ((X, W.astype(jnp.bfloat16), B, 8), "one dtype; got float32 and bfloat16"),
        ((X.astype(int), W.astype(int), B, 8), "dtype must be .* got int32"),
        ((X, W, B[:5], 8), r"bias must be float32\[6\]; got float32\[5\]"),
        ((X, W, B.astype(jnp.float16), 8), r"bias must be float32\[6\]; got float16\[6\]"),
        ((X, W, B, 0), "rows must be at least 1; got rows=0"),
        ((X, W, B, 8, jnp.ones(9, bool)), r"mask must be bool\[10\]; got bool\[9\]"),
        ((X, W, B, 8, jnp.ones(10)), r"mask must be bool\[10\]; got float32\[10\]"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_compiled(unchecked, args, message):
    with pytest.raises(ValueError, match=message):
        relu_matmul(*args)


def test_wrong_implementation_or_config():
    x, w, bias = (a.astype(jnp.bfloat16) for a in (X, W, B))
    with pytest.raises(ValueError, match="implementation must be .*; got 'triton'"):
        relu_matmul(x, w, bias, 8, implementation="triton")
    with pytest.raises(NotImplementedError, match="takes bfloat16 and float16; got float32"):
        relu_matmul(X, W, B, 8, implementation="interpret")
    with pytest.raises(NotImplementedError, match="rows in .8, 16, 32, 64, 128.; got rows=1"):
        relu_matmul(x, w, bias, 1, implementation="interpret")
    with pytest.raises(NotImplementedError, match="runs on NVIDIA H100, NVIDIA H200; got cpu"):
        relu_matmul(x, w, bias, 8, implementation="mosaic_gpu")
    for wrong in ({"block_n": 64}, {"stages": 5}, {"stages": 1}, {"out_slots": 3}, {"group": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must"):
            relu_matmul(x, w, bias, 8, config=Config(**wrong))


def test_work_candidates_and_peers():
    x, w, bias, mask = problem(12, tokens=20, d_model=8, d_ff=10, dtype="bfloat16")
    counted = work(x, w, bias, 8, mask)
    assert counted.flops == 2 * 20 * 8 * 10
    assert counted.bytes == 2 * (160 + 80 + 10) + 20 + 2 * 200 + 4 * (3 * 10 + 3)
    for config in candidates(x, w, bias, 8, mask):
        check_config(config)
    ref = expected(x, w, bias, mask)
    ways = peers(x, w, bias, 8, mask)
    assert_close(ways["dense"](x, w, bias, 8, mask), ref.T, 1e-2)
    h_t, index = ways["two_passes"](x, w, bias, 8, mask)
    assert_close(h_t, ref, 1e-2)
    assert_lists_what_is_live(index, np.asarray(h_t, np.float64), 8)
