"""Unstructured weights and their products: round trips, sizes, refusals, every path."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from unstructured_matrices import PATTERNS, SHAPE, compress_all, matrix

from pallas_kernels.case import relative_error
from pallas_kernels.unstructured_matmul import (
    EXPAND_N,
    Config,
    UnstructuredWeights,
    candidates,
    expand,
    layout,
    peers,
    reference,
    unstructured_matmul,
    unstructured_matmuls,
    work,
)
from pallas_kernels.unstructured_matmul.mosaic import divide
from pallas_kernels.unstructured_matmul.mosaic import expand as mosaic_expand
from pallas_kernels.workbench.gpus import GPUS, lower


@pytest.fixture(scope="module")
def compressed():
    return compress_all(paired=False)


@pytest.fixture(scope="module")
def in_pairs():
    return compress_all(paired=True)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pairs_round_trip_exactly(in_pairs, pattern):
    weights = in_pairs[pattern]
    weights.check()
    np.testing.assert_array_equal(np.asarray(weights.to_dense()), matrix(pattern))
    kept = matrix(pattern).reshape(100, 550, 2).any(axis=2)
    assert weights.blocks == 18 and weights.masks.shape == (8, 9, 32)
    stored = np.bitwise_count(np.asarray(weights.masks)).sum()
    assert kept.sum() <= stored  # those that lag store zeros
    if pattern == "tenth":
        assert stored < 1.02 * kept.sum()


def test_a_mask_word_of_pairs_serves_two_blocks():
    """Each element's bit, one at a time, of three blocks: the third word's second half is empty."""
    for block, t in ((0, 0), (1, 3), (2, 15)):
        present = np.zeros((3, 64, 16), bool)
        present[block, 2 * 5 : 2 * 5 + 2, t] = True
        words = np.asarray(layout.to_words(jnp.asarray(present), paired=True))
        expected = np.zeros((2, 32), np.uint32)
        expected[block // 2, 5] = 1 << layout.bit(block % 2, t)
        np.testing.assert_array_equal(words, expected)
        np.testing.assert_array_equal(layout.to_bits(jnp.asarray(words), 3, paired=True), present)
        counts = np.asarray(layout.counts(jnp.asarray(words), 3, paired=True))
        np.testing.assert_array_equal(counts, present.sum(axis=-1))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_round_trip_is_exact_and_sound(compressed, pattern):
    weights = compressed[pattern]
    weights.check()
    np.testing.assert_array_equal(np.asarray(weights.to_dense()), matrix(pattern))
    assert weights.shape == SHAPE and weights.dtype == jnp.bfloat16


@pytest.mark.parametrize(("shape", "dtype"), [((1, 65), "float16"), ((0, 5), "bfloat16"), ((5, 0), "bfloat16")])
def test_round_trip_of_odd_shapes_and_dtypes(shape, dtype):
    w = matrix("half", shape, dtype)
    weights = UnstructuredWeights.from_dense(jnp.asarray(w))
    weights.check()
    np.testing.assert_array_equal(np.asarray(weights.to_dense()), w)


def test_layout_is_that_of_the_mma_fragments():
    """Against the PTX manual's formulas for mma.m16n8k16: each element, one at a time."""
    rows, columns = np.meshgrid(np.arange(16), np.arange(64), indexing="ij")
    numbers = np.arange(16 * 64).reshape(16, 64)
    streams = np.asarray(layout.to_streams(jnp.asarray(numbers)))[0, 0]
    lane_of, register, half = rows % 8 * 4 + columns % 8 // 2, rows // 8 + columns % 16 // 8 * 2, columns % 2
    expected = np.zeros((64, 16), int)
    expected[2 * lane_of + half, columns // 16 * 4 + register] = numbers
    np.testing.assert_array_equal(streams, expected)
    np.testing.assert_array_equal(layout.from_streams(jnp.asarray(expected)[None, None]), numbers)
    assert sorted(layout.bit(half, t) for half in range(2) for t in range(16)) == list(range(32))


def test_special_values_are_kept_but_for_the_sign_of_zero():
    w = np.zeros((70, 130), np.float32)
    w[3, 7], w[4, 8], w[5, 9], w[6, 10] = np.nan, np.inf, -0.0, 1e-45
    dense = np.asarray(UnstructuredWeights.from_dense(jnp.asarray(w)).to_dense())
    w[5, 9] = 0.0
    np.testing.assert_array_equal(dense.view(np.int32), w.view(np.int32))


@pytest.mark.parametrize(("density", "paired"), [(0.1, False), (0.5, False), (0.2, True)])
def test_size_and_drift_of_random_masks(density, paired):
    rng = np.random.default_rng(1)
    w = (rng.random((64, 4096)) < density).astype(np.float32)
    weights = UnstructuredWeights.from_dense(jnp.asarray(w, jnp.bfloat16), paired=paired)
    weights.check()
    assert weights.nbytes == sum(x.nbytes for x in jax.tree.leaves(weights))
    expected = 2 * (1 - (1 - density) ** 2) + 1 / 16 if paired else 2 * density + 1 / 8
    assert weights.nbytes / w.size <= 1.1 * expected


def test_streams_that_lag_store_zeros(compressed):
    """One dense row: the lanes that have it may not run ahead by more than the format allows."""
    weights = compressed["one row"]
    counts = np.bitwise_count(np.asarray(weights.masks)).sum()
    assert counts > 1100 and counts < 64 * 1152 // 2
    starts = np.asarray(weights.rows)[:, None] + np.asarray(weights.lags)
    assert np.ptp(starts, axis=1).max() == layout.MAX_LAG


def test_only_what_is_needed_is_allocated_except_under_jit(compressed):
    rows = int(compressed["half"].rows[-1])
    assert rows < compressed["half"].values.shape[0] <= rows * (1 + 1 / 64) + 8
    assert compressed["tenth"].values.shape[0] == compressed["full"].values.shape[0] > compressed["full"].rows[-1]


@pytest.mark.parametrize(("value_dtype", "bound"), [("int8", 0.015), ("float8_e4m3fn", 0.04)])
def test_eight_bit_values_have_a_scale_a_row(value_dtype, bound):
    w = matrix("half", (70, 130)).astype(np.float32) * 10.0 ** np.arange(-35, 35)[:, None]
    w[7] = 0
    weights = UnstructuredWeights.from_dense(jnp.asarray(w), value_dtype)
    weights.check()
    dense = np.asarray(weights.to_dense(), np.float64)
    np.testing.assert_array_equal(dense[7], 0)
    for row in np.delete(np.arange(70), 7):  # within half a step of the largest, or of the value
        error, scale = np.abs(dense[row] - w[row]), np.abs(w[row]).max()
        assert (error <= (scale / 253 if value_dtype == "int8" else np.abs(w[row]) / 15 + scale / 400000)).all()
    assert np.linalg.norm((dense - w)[-1]) < bound * np.linalg.norm(w[-1].astype(np.float64))


def test_eight_bit_nan():
    w = np.ones((70, 130), np.float32)
    w[1, 2] = np.nan
    for value_dtype, kept in (("int8", 0), ("float8_e4m3fn", 129)):
        dense = np.asarray(UnstructuredWeights.from_dense(jnp.asarray(w), value_dtype).to_dense())
        assert (
            np.isnan(dense[1, 2])
            and np.isfinite(np.delete(dense, 1, axis=0)).all()
            and np.isfinite(dense[1]).sum() == kept
        )


@pytest.mark.parametrize("implementation", ["xla", "interpret", pytest.param("mosaic_gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("value_dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize(("dtype", "paired"), [("bfloat16", False), ("bfloat16", True), ("float16", True)])
def test_eight_bit_products(dtype, paired, value_dtype, implementation):
    weights = UnstructuredWeights.from_dense(jnp.asarray(matrix("half", (70, 130), dtype)), value_dtype, paired)
    w = np.asarray(dataclasses.replace(weights, dtype=np.dtype("float32")).to_dense(), np.float64)
    for n in (3, 30, EXPAND_N + 1):  # the last from a dense matrix
        x = jax.random.normal(jax.random.key(n), (130, n), jnp.dtype(dtype))
        y = unstructured_matmul(weights, x, implementation=implementation)
        assert relative_error(y, w @ np.asarray(x, np.float64)) < 5e-3
    np.testing.assert_array_equal(expand(weights, implementation=implementation), weights.to_dense())


CORRUPTIONS = {
    "values": (lambda v: v[: v.shape[0] // 2], "end within values"),
    "masks": (lambda m: m.at[0, 0, 0].set(m[0, 0, 0] ^ 1), "sections of masks"),
    "rows": (lambda r: r.at[1].add(1), "sections of masks"),
    "lags": (lambda x: x.at[1, 5].add(1), "sections of masks"),
}


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corrupted_weights_are_refused_by_name(compressed, in_pairs, name, paired):
    corrupt, message = CORRUPTIONS[name]
    weights = (in_pairs if paired else compressed)["half"]
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(weights, **{name: corrupt(getattr(weights, name))}).check()


@pytest.mark.parametrize("by", [-150, -7])
def test_rows_and_lags_that_agree_and_are_not_the_last_stream_s_are_refused(compressed, by):
    """The kernel copies from a section's row on, and waits for as many rows as its lags say."""
    weights = compressed["tenth"]
    rows, lags = weights.rows.at[1].add(by), weights.lags.at[1].add(jnp.asarray(-by, jnp.uint8))
    with pytest.raises(ValueError, match="rows must be those of the stream furthest back"):
        dataclasses.replace(weights, rows=rows, lags=lags).check()


def test_tiny_weights_have_a_scale():
    """2^-120 over 448 is no normal float32."""
    w = jnp.full((2, 4), 2.0**-120, jnp.bfloat16)
    for value_dtype in ("int8", "float8_e4m3fn"):
        dense = UnstructuredWeights.from_dense(w, value_dtype).to_dense()
        np.testing.assert_allclose(np.asarray(dense, np.float64), 2.0**-120, rtol=0.1)


def test_bits_behind_the_last_block_are_refused():
    """Of pairs an odd number of blocks leaves half a word, in which the kernel would believe a bit."""
    weights = UnstructuredWeights.from_dense(jnp.asarray(matrix("half", (64, 192))), paired=True)
    weights.check()
    behind = weights.masks.at[2, 1, 7].add(jnp.uint32(1 << layout.bit(1, 4)))
    with pytest.raises(ValueError, match="masks must be 0 behind a strip's last block"):
        dataclasses.replace(weights, masks=behind).check()


def test_truncated_weights_are_refused_by_name(compressed):
    weights = compressed["half"]
    for name, rule in (
        ("masks", "masks must be uint32"),
        ("rows", "rows must be int32"),
        ("lags", "lags must be uint8"),
    ):
        with pytest.raises(ValueError, match=rule):
            dataclasses.replace(weights, **{name: getattr(weights, name)[:-1]}).check()
    with pytest.raises(ValueError, match="values must be bfloat16"):
        dataclasses.replace(weights, values=weights.values.astype(jnp.float16)).check()
    with pytest.raises(ValueError, match=r"masks must be uint32\[8, 9, 32\]; got uint32\[8, 18, 32\]"):
        dataclasses.replace(weights, paired=True).check()


@pytest.mark.parametrize(("pattern", "n"), [("full", 13), ("tenth", 1)])
def test_product_by_xla(compressed, pattern, n, getkey):
    x, bias = (jax.random.normal(getkey(), shape, jnp.bfloat16) for shape in ((1100, n), (100,)))
    out = unstructured_matmul(compressed[pattern], x, bias, "relu", implementation="xla")
    y = matrix(pattern).astype(np.float64) @ np.asarray(x, np.float64) + np.asarray(bias, np.float64)[:, None]
    assert relative_error(out, np.maximum(y, 0)) < 5e-3


def test_nan_weights_and_nothing_to_multiply(compressed):
    w = matrix("half")
    w[3, 7] = np.nan
    weights = UnstructuredWeights.from_dense(jnp.asarray(w))
    out = unstructured_matmul(weights, jnp.ones((1100, 2), jnp.bfloat16), implementation="xla")
    np.testing.assert_array_equal(np.isnan(np.asarray(out)).any(axis=1), np.arange(100) == 3)
    assert unstructured_matmul(weights, jnp.ones((1100, 0), jnp.bfloat16)).shape == (100, 0)
    nothing = UnstructuredWeights.from_dense(jnp.zeros((5, 0), jnp.bfloat16))
    out = unstructured_matmul(nothing, jnp.ones((0, 3), jnp.bfloat16), jnp.arange(5, dtype=jnp.bfloat16))
    np.testing.assert_array_equal(np.asarray(out, np.float32), np.arange(5.0)[:, None].repeat(3, 1))


@pytest.mark.parametrize(
    ("shape", "matrices", "warpgroups"),
    [
        ((20480, 5120), 1, 4),  # OPT-13B: 115 multiprocessors with 7 units of 16 strips, or 128 with 25 of 4
        ((5120, 5120), 1, 4),
        ((5120, 5120), 3, 4),
        ((28672, 7168), 1, 4),
        ((768, 768), 1, 1),  # OPT-125M: 6 units of 16 strips, or 24 of 4
    ],
)
def test_few_warps_only_where_they_keep_many_more_multiprocessors_busy(shape, matrices, warpgroups):
    values = jax.ShapeDtypeStruct((shape[0] * shape[1] * 3 // 10 // 64, 64), jnp.bfloat16)
    kept = {"masks": None, "rows": None, "lags": None, "scales": None, "dtype": jnp.dtype("bfloat16"), "paired": False}
    weights = UnstructuredWeights(values=values, shape=shape, **kept)
    x = jax.ShapeDtypeStruct((shape[1], 16), jnp.bfloat16)
    found = candidates((weights,) * matrices if matrices > 1 else weights, x)
    assert found[0].warpgroups == warpgroups and len(found) == len(set(found)) == 5


def test_bad_arguments_are_refused(compressed, unchecked):
    weights, x = compressed["half"], jnp.ones((1100, 4), jnp.bfloat16)
    for wrong, message in (
        ({"x": x[:-1]}, r"x must be bfloat16\[1100, n\]; got bfloat16\[1099, 4\]"),
        ({"x": x.astype(jnp.float16)}, r"got float16\[1100, 4\]"),
        ({"bias": x[:3, 0]}, r"bias must be bfloat16\[100\]"),
        ({"activation": "tanh"}, "got 'tanh'"),
        ({"weights": x}, "weights must be UnstructuredWeights"),
        ({"config": Config(warpgroups=4, pieces=8)}, "bytes of shared memory"),
        ({"implementation": "cuda"}, "implementation must be"),
    ):
        with pytest.raises(ValueError, match=message):
            unstructured_matmul(**({"weights": weights, "x": x} | wrong))  # pyright: ignore[reportArgumentType]
    eight_bit = dataclasses.replace(weights, values=weights.values.astype(jnp.int8), scales=jnp.ones(100))
    for other, got in (
        (eight_bit, r"of bfloat16, .* of int8"),
        (dataclasses.replace(weights, shape=(99, 1100)), "99"),
        (dataclasses.replace(weights, paired=True), r"of bfloat16, .* of paired bfloat16"),
    ):
        with pytest.raises(ValueError, match=f"weights must be of one shape, dtype and kind of values; got .*{got}"):
            unstructured_matmuls([weights, other], x)
    with pytest.raises(ValueError, match="weights must be one at least, with a bias or None each; got 1, 2"):
        unstructured_matmuls([weights], x, [None, None])
    with pytest.raises(ValueError, match="value_dtype must be"):
        UnstructuredWeights.from_dense(x, "int4")
    with pytest.raises(ValueError, match="w must be a matrix"):
        UnstructuredWeights.from_dense(x[0])
    with pytest.raises(NotImplementedError, match="runs on NVIDIA H100"):
        unstructured_matmul(weights, x, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="no gradient"):
        jax.grad(lambda x: unstructured_matmul(weights, x).sum(dtype=jnp.float32))(x)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [Config(), Config(pieces=4), Config(warpgroups=3, pieces=7)])
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_on_a_gpu(compressed, in_pairs, pattern, paired, config, getkey):
    x, weights = jax.random.normal(getkey(), (1100, 24), jnp.bfloat16), (in_pairs if paired else compressed)[pattern]
    out = unstructured_matmul(weights, x, config=config, implementation="mosaic_gpu")
    assert (mosaic_expand(weights, config, interpret=False) == matrix(pattern)).all()
    assert relative_error(out, matrix(pattern).astype(np.float64) @ np.asarray(x, np.float64)) < 5e-3


@pytest.mark.parametrize(
    ("n", "implementation"),
    [(7, "xla"), (7, "interpret"), *(pytest.param(n, "mosaic_gpu", marks=pytest.mark.gpu) for n in (7, 70))],
)
def test_several_matrices_at_once(compressed, n, implementation, getkey):
    """As each by itself, with and without a bias: the last group of strips of each is not full."""
    patterns = ("half", "empty", "full")
    x, bias = (jax.random.normal(getkey(), shape, jnp.bfloat16) for shape in ((1100, n), (100,)))
    options = {"activation": "relu", "implementation": implementation}
    out = unstructured_matmuls([compressed[p] for p in patterns], x, [None, bias, bias], **options)
    for pattern, y, own in zip(patterns, out, (None, bias, bias), strict=True):
        expected = matrix(pattern).astype(np.float64) @ np.asarray(x, np.float64)
        expected += 0 if own is None else np.asarray(own, np.float64)[:, None]
        assert relative_error(y, np.maximum(expected, 0)) < 5e-3
        alone = unstructured_matmul(compressed[pattern], x, own, **options)
        assert relative_error(y, alone) < 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("n", "config"),
    [(16, Config()), (61, Config(pieces=4)), (16, Config(warpgroups=1, pieces=8)), (5, Config(warpgroups=3, pieces=7))],
)
def test_blocks_that_go_on_to_other_strips_and_matrices(config, n, getkey):
    """Two parts a block, some of two matrices, and several stages of x, whose last one is not full."""
    rng, shape, densities = np.random.default_rng(0), (2100, 3576), (0.3, 0.0, 1.0)
    dense = [rng.standard_normal(shape, np.float32) * (rng.random(shape) < density) for density in densities]
    weights = [UnstructuredWeights.from_dense(jnp.asarray(w, jnp.bfloat16)) for w in dense]
    division = divide(weights, n, config, 132)
    assert division.sections > division.units and division.sections % division.units
    x = jax.random.normal(getkey(), (shape[1], n), jnp.bfloat16)
    out, again = (unstructured_matmuls(weights, x, config=config, implementation="mosaic_gpu") for _ in range(2))
    for w, y, same in zip(dense, out, again, strict=True):
        rounded = np.asarray(jnp.asarray(w, jnp.bfloat16), np.float64)
        assert relative_error(y, rounded @ np.asarray(x, np.float64)) < 5e-3
        np.testing.assert_array_equal(y, same)


@pytest.mark.gpu
def test_several_matrices_equal_each_alone_to_the_bit(compressed, getkey):
    """With less sections than multiprocessors each is one block's, joined or not."""
    x = jax.random.normal(getkey(), (1100, 16), jnp.bfloat16)
    weights, config = [compressed[p] for p in ("half", "one row", "clustered")], Config(warpgroups=1, pieces=8)
    options = {"config": config, "implementation": "mosaic_gpu"}
    out = unstructured_matmuls(weights, x, **options)
    for matrix_weights, y in zip(weights, out, strict=True):
        np.testing.assert_array_equal(y, unstructured_matmul(matrix_weights, x, **options))


@pytest.mark.parametrize("of_weights", [False, True])
def test_vmap_equals_a_loop(of_weights, getkey):
    """Over columns, which are side by side then, and over matrices; on a GPU too, where TMA takes no mapped array."""
    w = jnp.where(jax.random.bernoulli(getkey(), 0.4, (1, 70, 130)), jax.random.normal(getkey(), (2, 70, 130)), 0)
    matrices = [UnstructuredWeights.from_dense(one.astype(jnp.bfloat16)) for one in w]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *matrices) if of_weights else matrices[0]
    x = jax.random.normal(getkey(), (2, 130, 72 if of_weights else 40), jnp.bfloat16)
    bias = jax.random.normal(getkey(), (70,), jnp.bfloat16)

    def mapped(implementation=None):
        def one(weights, x):
            return unstructured_matmul(weights, x, bias, "relu", implementation=implementation)

        return jax.vmap(one, in_axes=(0 if of_weights else None, 0))

    y = jax.jit(mapped("interpret"))(stack, x)
    for i in range(2):
        dense = np.asarray(w[i if of_weights else 0].astype(jnp.bfloat16), np.float64)
        expected = dense @ np.asarray(x[i], np.float64) + np.asarray(bias, np.float64)[:, None]
        assert relative_error(y[i], np.maximum(expected, 0)) < 5e-3
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    assert "mosaic_gpu" in lower(lambda x: mapped()(stack, x), [shape], GPUS[0])


def test_peer_and_work(compressed):
    weights, x = compressed["tenth"], jnp.ones((1100, 3), jnp.bfloat16)
    bias = jnp.ones(100, jnp.bfloat16)
    out = peers(weights, x, bias, "relu")["xla"](weights, x, bias, "relu")
    assert relative_error(out, reference(weights, x, bias, "relu").astype(jnp.float32)) < 1e-2
    cost = work(weights, x, bias, "relu")
    assert cost.flops == 2 * 100 * 1100 * 3
    of_x_and_y = 2 * (1100 * 3 + 100 * 3 + 100)
    format_bytes = 128 * int(weights.rows[-1]) + 4 * 128 * 1152 // 32 + (4 + 64) * (8 * 3 + 1)
    assert cost.bytes == format_bytes + of_x_and_y
