"""Patterns and scores of pruning, against float64 numpy versions of the published listings (weights are [out, in])."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pruned_models import calibration, inputs_of, kernels, tiny_opt

from sparsellm import pruning
from sparsellm.pruning import MAGNITUDE, NM, RIA, WANDA, Blocks, SparseGPT, Unstructured, prune
from sparsellm.pruning.owl import layer_sparsities, outlier_ratio
from sparsellm.pruning.sparsegpt import inverse_factor
from sparsellm.pruning.walk import prune_kernel


def run(method, pattern, w: np.ndarray, x: np.ndarray, sparsity: float) -> np.ndarray:
    """The method on a kernel [in, out]."""
    w32 = jnp.asarray(w, jnp.float32)
    return np.asarray(prune_kernel(method, pattern, False, w32, inputs_of(x), jnp.float32(sparsity))[0])


def keep_of(pattern, scores: np.ndarray, sparsity: float, compare: str = "kernel") -> np.ndarray:
    return np.asarray(jax.jit(pattern.keep, static_argnums=2)(jnp.asarray(scores), sparsity, compare))


# Patterns


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("compare", ["kernel", "output"])
def test_unstructured_prunes_exactly_the_lowest_even_among_equals(sparsity, compare):
    scores = np.random.default_rng(0).integers(0, 4, (10, 7)).astype(np.float32)
    keep = keep_of(Unstructured(), scores, sparsity, compare)
    columns = scores.T if compare == "output" else scores.reshape(1, -1)
    kept = keep.T if compare == "output" else keep.reshape(1, -1)
    for column, mask in zip(columns, kept, strict=True):
        assert (~mask).sum() == round(sparsity * len(column))
        if 0 < mask.sum() < len(mask):
            assert column[~mask].max() <= column[mask].min()


def test_n_of_every_m_inputs_are_kept():
    scores = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
    keep = keep_of(NM(1, 4), scores, NM(1, 4).sparsity)
    expected = np.zeros_like(keep)
    for start in range(0, 12, 4):
        for column in range(5):
            expected[start + scores[start : start + 4, column].argmax(), column] = True
    np.testing.assert_array_equal(keep, expected)


@pytest.mark.parametrize("rows,cols", [(4, 3), (32, 1), (64, 64), (1, 5)])
def test_blocks_go_by_their_mean_and_edges_are_cut(rows, cols):
    scores = np.random.default_rng(0).random((10, 7)).astype(np.float32)
    keep = keep_of(Blocks(rows, cols), scores, 0.5, "output")
    means = {}
    for i in range(0, 10, rows):
        for j in range(0, 7, cols):
            assert len(np.unique(keep[i : i + rows, j : j + cols])) == 1
            means[i, j] = scores[i : i + rows, j : j + cols].mean()
    gone = {block for block in means if not keep[block]}
    assert gone == set(sorted(means, key=lambda block: means[block])[: round(0.5 * len(means))])


@pytest.mark.parametrize("text", ["unstructured", "2:4", "4:8", "32x64", "32x1"])
def test_a_pattern_is_written_as_it_is_read(text):
    assert str(pruning.parse_pattern(text)) == text


@pytest.mark.parametrize("text", ["", "2:", "4x", "5:4", "0:4", "0x4", "-1x2", "block"])
def test_what_is_no_pattern_is_refused(text):
    with pytest.raises(ValueError, match="got"):
        pruning.parse_pattern(text)


@pytest.mark.parametrize("n,m", [(1, 3), (2, 4), (3, 10), (7, 8), (8, 8)])
def test_kernels_of_the_same_sparsity_have_the_patterns_n(n, m):
    pattern, sizes = NM(n, m), {"a": 10**9, "b": 3, "c": 70}
    mixed = pattern.mixed(dict.fromkeys(sizes, pattern.sparsity), sizes)
    assert mixed.keys() == sizes.keys() and set(mixed.values()) == {(m - n) / m}
    assert pattern.mixed({}, sizes) == {}


@pytest.mark.parametrize("seed", range(20))
def test_sparsities_are_rounded_by_largest_remainder(seed):
    generator = np.random.default_rng(seed)
    m, sizes = int(generator.integers(4, 17)), generator.integers(1, 6, generator.integers(1, 9))
    wanted = generator.uniform(0, m, len(sizes))  # zeros of m
    wanted[generator.random(len(sizes)) < 0.3] = 0.5 * m  # equal ones
    zeros, missing = wanted.astype(int), (sizes * (wanted % 1)).sum()
    for i in sorted(range(len(sizes)), key=lambda i: zeros[i] - wanted[i]):
        if abs(missing - sizes[i]) >= missing:
            break
        zeros[i], missing = zeros[i] + 1, missing - sizes[i]
    pattern = NM(max(m - round((sizes * wanted).sum() / sizes.sum()), 1), m)
    names = [f"kernel {i}" for i in range(len(sizes))]
    shares = dict(zip(names, wanted / m, strict=True))
    found = pattern.mixed(shares, dict(zip(names, sizes.tolist(), strict=True)))
    np.testing.assert_allclose(list(found.values()), zeros / m)
    assert abs((sizes * (m * np.array(list(found.values())) - wanted)).sum()) <= sizes.max() / 2 + 1e-9


# Scores and SparseGPT


def published_sparsegpt(w, x, sparsity, nm=None, block=128, damping=0.01):
    """`fasterprune` of the published code in float64, w [out, in]; a block loses int(share) weights, not one more."""
    w, columns = w.copy(), w.shape[1]
    h = 2 / len(x) * x.T @ x
    dead = np.diag(h) == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    h[np.diag_indices(columns)] += damping * np.mean(np.diag(h))
    hinv = np.linalg.cholesky(np.linalg.inv(h)).T  # upper
    for i1 in range(0, columns, block):
        i2 = min(i1 + block, columns)
        w1, h1 = w[:, i1:i2].copy(), hinv[i1:i2, i1:i2]
        q1, err1, mask = np.zeros_like(w1), np.zeros_like(w1), np.zeros(w1.shape, bool)
        if nm is None:
            scores = w1**2 / np.diag(h1)[None] ** 2
            mask = scores < np.append(np.sort(scores.flatten()), np.inf)[int(scores.size * sparsity)]
        for i in range(i2 - i1):
            column, d = w1[:, i], h1[i, i]
            if nm is not None and i % nm[1] == 0:
                scores = w1[:, i : i + nm[1]] ** 2 / np.diag(h1)[None, i : i + nm[1]] ** 2
                lowest = np.argsort(scores, axis=1)[:, : nm[1] - nm[0]]
                np.put_along_axis(mask[:, i : i + nm[1]], lowest, True, axis=1)
            q = np.where(mask[:, i], 0, column)
            q1[:, i] = q
            error = (column - q) / d
            w1[:, i:] -= np.outer(error, h1[i, i:])
            err1[:, i] = error
        w[:, i1:i2] = q1
        w[:, i2:] -= err1 @ hinv[i1:i2, i2:]
    return w


@pytest.mark.parametrize("d_in,block,nm", [(64, 16, None), (40, 16, None), (24, 128, None), (40, 16, (2, 4))])
def test_sparsegpt_is_the_published_listing(d_in, block, nm):
    x, w = calibration(200, d_in), np.random.default_rng(1).normal(size=(d_in, 12))
    expected = published_sparsegpt(w.T, x, 0.5, nm, block).T
    found = run(SparseGPT(block_size=block), NM(*nm) if nm else Unstructured(), w, x, 0.5)
    np.testing.assert_array_equal(found == 0, expected == 0)
    np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())
    masked = np.where(expected != 0, w, 0)  # the update is what it is for
    assert np.linalg.norm(x @ (found - w)) < 0.9 * np.linalg.norm(x @ (masked - w))


def test_sparsegpt_dampens_more_where_float32_has_no_cholesky_factor():
    """Nearly parallel inputs: what 1e-9 means of the diagonal add is rounded away, as is 0.01 of 28,672 inputs."""
    random = np.random.default_rng(0)
    x = 1 + 1e-5 * random.normal(size=(300, 64))
    w = random.normal(size=(64, 12))
    gram = jnp.asarray(x.T @ x, jnp.float32)
    unit = jnp.mean(jnp.diag(gram)) * jnp.eye(64)
    ladder = 10.0 ** np.arange(-9, 1)
    enough = next(damping for damping in ladder if np.isfinite(inverse_factor(gram + damping * unit)).all())
    assert enough > 1e-9
    found = run(SparseGPT(block_size=16, damping=1e-9), Unstructured(), w, x, 0.5)
    np.testing.assert_allclose(
        found, run(SparseGPT(block_size=16, damping=enough), Unstructured(), w, x, 0.5), atol=1e-3
    )
    assert (found == 0).mean() == 0.5
    assert np.linalg.norm(x @ (found - w)) < 0.1 * np.linalg.norm(x @ (np.where(found != 0, w, 0) - w))


def test_weights_that_would_not_be_finite_are_refused():
    model = tiny_opt()
    broken: Any = model.layers[1].fc1.kernel
    broken[...] = broken[...].at[3, 2].set(jnp.nan)
    before = kernels(model)
    with pytest.raises(
        ValueError, match=r"weights must be finite, those of layers\.1\.fc1\.kernel pruned by .* are not"
    ):
        prune(model, MAGNITUDE, sparsity=0.5)
    np.testing.assert_array_equal(kernels(model)["layers.1.fc1.kernel"], before["layers.1.fc1.kernel"])


@pytest.mark.parametrize("nm", [None, (2, 4)])
def test_wanda_is_the_published_listing(nm):
    x, w = calibration(50, 16), np.random.default_rng(1).normal(size=(16, 10))
    scores = np.abs(w.T) * np.sqrt((x**2).sum(0))[None]  # [out, in]
    mask = np.zeros(scores.shape, bool)
    if nm is None:
        np.put_along_axis(mask, np.argsort(scores, axis=1, kind="stable")[:, : int(16 * 0.5)], True, axis=1)
    else:
        for i in range(0, 16, 4):
            np.put_along_axis(mask[:, i : i + 4], np.argsort(scores[:, i : i + 4], axis=1)[:, :2], True, axis=1)
    found = run(WANDA, NM(*nm) if nm else Unstructured(), w, x, 0.5)
    np.testing.assert_array_equal(found, np.where(mask.T, 0, w).astype(np.float32))


@pytest.mark.parametrize("n", [3, 5])
def test_a_kernel_keeps_the_n_that_its_sparsity_says(n):
    """Of 4:8, as the mean: against the published listings of n:8."""
    x, w = calibration(200, 40), np.random.default_rng(1).normal(size=(40, 12))
    scores = (np.abs(w) * np.sqrt((x**2).sum(0))[:, None]).reshape(5, 8, 12)
    highest = np.sort(scores, axis=1)[:, 8 - n : 8 - n + 1]
    expected = np.where((scores >= highest).reshape(w.shape), w, 0).astype(np.float32)
    expected[:8] = run(WANDA, NM(n, 8), w, x, NM(n, 8).sparsity)[:8]  # of equal scores, input 3's, the first ones go
    np.testing.assert_array_equal(run(WANDA, NM(4, 8), w, x, 1 - n / 8), expected)
    expected = published_sparsegpt(w.T, x, 0.5, (n, 8), 16).T
    found = run(SparseGPT(block_size=16), NM(4, 8), w, x, 1 - n / 8)
    np.testing.assert_array_equal(found == 0, expected == 0)
    np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())


def test_ria_is_the_published_formula():
    x, w = calibration(50, 16), np.random.default_rng(1).normal(size=(16, 10))
    w[:, 4] = 0  # a channel of zeros divides by nothing
    a = np.abs(w.T)
    with np.errstate(invalid="ignore"):
        relative = np.nan_to_num(a / a.sum(0, keepdims=True)) + np.nan_to_num(a / a.sum(1, keepdims=True))
    scores = relative * np.sqrt(np.sqrt((x**2).sum(0)))[None]
    np.testing.assert_allclose(RIA.score(jnp.asarray(w, jnp.float32), inputs_of(x)), scores.T, rtol=1e-5)
    keep = np.sort(scores.flatten())[80] <= scores.T
    np.testing.assert_array_equal(run(RIA, Unstructured(), w, x, 0.5) != 0, keep & (w != 0))


def test_owl_is_the_published_formula():
    x, generator = calibration(50, 16), np.random.default_rng(2)
    scored = [(generator.normal(size=(16, n)) ** 3, n) for n in (10, 6)]
    scores = np.concatenate([(np.abs(w) * np.sqrt((x**2).sum(0))[:, None]).flatten() for w, _ in scored])
    found = outlier_ratio([(jnp.asarray(w, jnp.float32), inputs_of(x)) for w, _ in scored], jnp.float32(5))
    assert float(found) == pytest.approx((scores > 5 * scores.mean()).mean()) and float(found) > 0
    ratios = np.array([2.0, 5.0, 3.0, 10.0])
    shifted = (ratios - ratios.min()) * (1 / (ratios.max() - ratios.min()) * 0.08 * 2)
    density = shifted - shifted.mean() + (1 - 0.7)
    np.testing.assert_allclose(layer_sparsities(ratios, 0.7, 0.08), 1 - density)
    np.testing.assert_array_equal(layer_sparsities(np.full(3, 2.0), 0.7, 0.08), np.full(3, 0.7))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_threshold_for_the_whole_model(dtype):
    model = tiny_opt(param_dtype=dtype, layers=1)
    before = {name: np.abs(w.astype(np.float32)) for name, w in kernels(model).items()}
    shares = pruning.global_sparsities(model, 0.6, select="fc[12]|out_proj")
    assert all("fc" in name or "out_proj" in name for name in shares)
    chosen = np.sort(np.concatenate([before[name].flatten() for name in shares]))
    threshold = chosen[round(0.6 * len(chosen))]
    for name, share in shares.items():
        assert (before[name] < threshold).mean() <= share + 1e-9 and share <= (before[name] <= threshold).mean() + 1e-9
    prune(model, MAGNITUDE, sparsity=shares)
    zeros = sum((w == 0).sum() for name, w in kernels(model).items() if name in shares)
    assert abs(zeros - 0.6 * len(chosen)) <= len(shares)
