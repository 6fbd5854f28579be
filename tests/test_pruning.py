"""Pruning, against float64 numpy versions of the published listings, whose weights are [out, in]."""

import dataclasses
import functools
import subprocess
import sys
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from models import OPT, OPTConfig, load_opt, save_hf, save_opt
from models.opt import with_layout
from sparsellm import pruning, training
from sparsellm.explain import explain
from sparsellm.mixture_of_experts import LinearRouter, MixtureOfExperts, RouterRule
from sparsellm.objectives import next_token_loss
from sparsellm.pruning import MAGNITUDE, METHODS, NM, RIA, WANDA, Blocks, SparseGPT, Unstructured, memory, prune
from sparsellm.pruning.calibrate import sum_inputs
from sparsellm.pruning.gradual import GradualConfig, cubic_sparsity, gradually_pruned
from sparsellm.pruning.owl import layer_sparsities, outlier_ratio
from sparsellm.pruning.sparsegpt import inverse_factor
from sparsellm.pruning.structured import parameter_importance
from sparsellm.pruning.walk import prune_kernel
from sparsellm.sparse_dot import sparse_dot
from sparsellm.sparsify import Rule, sparsify

LENGTH, VOCAB = 8, 19


def tiny_opt(**changes) -> OPT:
    return nnx.clone(_initial(**changes))


@functools.cache
def _initial(**changes) -> OPT:
    sizes: dict[str, Any] = {"layers": 3, "d_model": 16, "heads": 4, "d_ff": 16, "init_std": 0.3}  # one kernel shape
    return OPT(OPTConfig(vocab_size=VOCAB, max_length=16, **(sizes | changes)), rngs=nnx.Rngs(0))


def windows(count: int = 4, length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(1).integers(4, VOCAB, (count, length)).astype(np.int32)


def kernels(model: nnx.Module) -> dict[str, np.ndarray]:
    """Of linear layers, by path; numpy's own copies."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.array(v[...]) for path, v in flat if path[-1] in ("kernel", "wi", "wo")}


def calibration(tokens: int, d_in: int, *, seed: int = 0) -> np.ndarray:
    """Correlated inputs, one of them always zero, some far larger than others."""
    generator = np.random.default_rng(seed)
    x = (
        generator.normal(size=(tokens, d_in))
        @ generator.normal(size=(d_in, d_in))
        * np.exp(generator.normal(size=d_in))
    )
    x[:, 3] = 0
    return x


def inputs_of(x: np.ndarray) -> pruning.Inputs:
    x = x.astype(np.float64)
    sums = {"tokens": len(x), "squares": (x**2).sum(0), "gram": x.T @ x}
    return pruning.Inputs(**{name: jnp.asarray(value, jnp.float32) for name, value in sums.items()})


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


# The walk


@pytest.fixture(scope="module")
def pruned_first() -> OPT:
    """Its first block pruned, the others not."""
    model = tiny_opt()
    prune(model, WANDA, sparsity=0.5, windows=windows(), batch=2, select=r"^layers\.0\.")
    return model


@functools.partial(jax.jit, static_argnums=0)
def _captured(graphdef, state, tokens):
    return nnx.capture(nnx.merge(graphdef, state), nnx.Intermediate)(tokens)


def test_a_block_is_fed_by_the_pruned_ones_before_it(pruned_first):
    assert all((w == 0).any() == name.startswith("layers.0.") for name, w in kernels(pruned_first).items())
    _, captured = _captured(*nnx.split(pruned_first), jnp.asarray(windows()))
    model = tiny_opt()
    seen = {}
    for block in pruning.walk(model, windows(), batch=2):
        seen |= block.inputs("gram")
        if block.name == "layers.0":  # what the walk goes on with
            nnx.update(block.module, nnx.state(pruned_first.layers[0]))
    for layer in (1, 2):
        x = np.asarray(captured["layers"][layer]["ffn_activation"][0], np.float64)  # what fc2 reads
        sums = seen[f"layers.{layer}.fc2.kernel"]
        np.testing.assert_allclose(sums.gram, x.T @ x, atol=1e-4 * np.linalg.norm(x) ** 2)
        np.testing.assert_allclose(sums.squares, (x**2).sum(0), atol=1e-4 * np.linalg.norm(x) ** 2)
        assert float(sums.tokens) == 4 * LENGTH


class Experts(nnx.Module):
    """Blocks that are mixtures of experts, on inputs one can see."""

    def __init__(self, router: LinearRouter, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCAB, 8, rngs=rngs)
        self.layers = nnx.List([MixtureOfExperts(8, 12, router, activation="silu", gated=True, bias=True, rngs=rngs)])

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return x


def test_each_expert_is_calibrated_on_its_own_tokens():
    rngs = nnx.Rngs(0)
    model = Experts(LinearRouter(8, 3, RouterRule(top_k=2), rngs=rngs), rngs)
    layer: Any = model.layers[0]
    layer.router.bias = None
    layer.router.kernel[...] = layer.router.kernel[...].at[:, 2].set(0.0) * 10.0
    layer.wi_bias[...] = jnp.linspace(-1.0, 1.0, layer.wi_bias.size).reshape(layer.wi_bias.shape)
    x = np.asarray(model.embed(jnp.asarray(windows())), np.float64).reshape(-1, 8)
    logits = x @ np.asarray(layer.router.kernel[...], np.float64)
    chosen = np.argsort(-logits, axis=1, kind="stable")[:, :2]
    (block,) = pruning.walk(model, windows(), batch=2)
    assert set(block.kernels) == {"layers.0.wi", "layers.0.wo"}
    by_gram, by_squares = block.inputs("gram"), block.inputs("squares")
    for e in range(3):
        rows = x[(chosen == e).any(axis=1)]
        pre = rows @ np.asarray(layer.wi[e], np.float64) + np.asarray(layer.wi_bias[e], np.float64)
        hidden = pre[:, :12] / (1 + np.exp(-pre[:, :12])) * pre[:, 12:]
        for name, seen in (("wi", rows), ("wo", hidden)):
            for found in (by_gram[f"layers.0.{name}"], by_squares[f"layers.0.{name}"]):
                assert float(found.tokens[e]) == len(rows)
                np.testing.assert_allclose(found.squares[e], (seen**2).sum(0), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(by_gram[f"layers.0.{name}"].gram[e], seen.T @ seen, rtol=1e-4, atol=1e-4)


def test_an_expert_that_saw_no_token_is_pruned_by_magnitude():
    inputs = pruning.Inputs(tokens=jnp.zeros(2), squares=jnp.zeros((2, 8)), gram=jnp.zeros((2, 8, 8))).or_ones()
    w = np.random.default_rng(0).normal(size=(2, 8, 4)).astype(np.float32)
    for method in (WANDA, SparseGPT()):
        found = prune_kernel(method, NM(2, 4), False, jnp.asarray(w), inputs, jnp.float32(0.5))[0]
        lower = np.sort(np.abs(w).reshape(2, 2, 4, 4), axis=2)[:, :, 1:2]
        expected = np.where(np.abs(w).reshape(lower.shape[:2] + (4, 4)) > lower, w.reshape(2, 2, 4, 4), 0)
        np.testing.assert_allclose(found, expected.reshape(w.shape), rtol=1e-5)


@pytest.fixture(scope="module")
def sparsegpt_pruned() -> tuple[OPT, list[dict]]:
    model = tiny_opt()
    rows = prune(model, METHODS["sparsegpt"], pattern=NM(2, 4), windows=windows(), batch=2, errors=True)
    return model, rows


def test_every_kernel_is_pruned_and_reported(sparsegpt_pruned):
    model, rows = sparsegpt_pruned
    assert [row["layer"] for row in rows] == [
        name for i in range(3) for name in kernels(model) if f"layers.{i}" in name
    ]
    assert all(row["sparsity"] >= 0.5 and 0 < row["error"] < 1 for row in rows)
    for w in kernels(model).values():
        assert ((w != 0).reshape(-1, 4, w.shape[1]).sum(axis=1) <= 2).all()


def test_blocks_and_sparsities_share_what_is_compiled():
    compiled: list[Any] = [prune_kernel, sum_inputs]
    before = [function._cache_size() for function in compiled]
    shares = {name: 0.3 + 0.02 * i for i, name in enumerate(sorted(kernels(tiny_opt()))) if name.startswith("layers")}
    rows = prune(tiny_opt(), RIA, sparsity=shares, windows=windows(), batch=1)
    assert [function._cache_size() for function in compiled] == [before[0] + 1, before[1] + 1]
    for row in rows:
        assert row["sparsity"] == round(shares[row["layer"]] * 256) / 256


MIXED = {  # of 4:8: zeros of every 8 inputs
    "layers.0.self_attn.q_proj.kernel": (0.42, 3),
    "layers.0.fc1.kernel": (0.40, 3),
    "layers.1.self_attn.q_proj.kernel": (0.55, 5),  # 4.4: the second of the largest remainders
    "layers.1.fc1.kernel": (0.48, 4),  # 3.84: the largest
    "layers.2.fc1.kernel": (0.63, 5),
}


@pytest.mark.parametrize("method", METHODS)
def test_each_kernel_has_its_own_n_of_m(method):
    model, asked = tiny_opt(), {name: share for name, (share, _) in MIXED.items()}
    before = kernels(model)
    rows = prune(model, METHODS[method], pattern=NM(4, 8), sparsity=asked, windows=windows(), batch=2)
    assert {row["layer"]: row["sparsity"] for row in rows} == {name: zeros / 8 for name, (_, zeros) in MIXED.items()}
    for name, w in kernels(model).items():
        zeros = (w == 0).reshape(-1, 8, w.shape[1]).sum(axis=1)
        assert (zeros == (MIXED[name][1] if name in MIXED else 0)).all()
        if method == "magnitude" and name in MIXED:
            order = np.abs(before[name]).reshape(-1, 8, w.shape[1]).argsort(axis=1).argsort(axis=1)
            kept = (order >= MIXED[name][1]).reshape(w.shape)
            np.testing.assert_array_equal(w, np.where(kept, before[name], 0))
    assert abs(np.mean([row["sparsity"] for row in rows]) - np.mean(list(asked.values()))) <= 0.5 / 8 / len(MIXED)


def test_owl_gives_each_block_its_own_n():
    model, select = tiny_opt(), "fc1|q_proj"  # both without an input that is always zero
    shares = pruning.owl_sparsities(model, windows(), 0.5, batch=2, select=select, outlier=2.0)
    rows = prune(model, WANDA, pattern=NM(4, 8), sparsity=shares, windows=windows(), batch=2, select=select)
    assert [row["sparsity"] for row in rows] == [NM(4, 8).mixed(shares, dict.fromkeys(shares, 256))[n] for n in shares]
    by_block = np.reshape([8 * row["sparsity"] for row in rows], (3, 2))
    assert len(np.unique(by_block)) > 1 and by_block.mean() == 4
    order = np.argsort([shares[f"layers.{i}.fc1.kernel"] for i in range(3)])
    assert (np.diff(by_block[order], axis=0) >= 0).all()


def test_a_sparsity_for_each_kernel_may_be_the_patterns_own(sparsegpt_pruned):
    model, options = tiny_opt(), {"windows": windows(), "batch": 2, "errors": True}
    shares = {row["layer"]: 0.5 for row in sparsegpt_pruned[1]}
    assert prune(model, METHODS["sparsegpt"], pattern=NM(2, 4), sparsity=shares, **options) == sparsegpt_pruned[1]
    for name, w in kernels(sparsegpt_pruned[0]).items():
        np.testing.assert_array_equal(kernels(model)[name], w)


def test_the_error_is_that_of_the_output():
    x, w = calibration(60, 8), np.random.default_rng(1).normal(size=(8, 4))
    pruned, error = prune_kernel(
        MAGNITUDE, Unstructured(), True, jnp.asarray(w, jnp.float32), inputs_of(x), jnp.float32(0.5)
    )
    expected = np.linalg.norm(x @ (w - np.asarray(pruned))) / np.linalg.norm(x @ w)
    assert float(error) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("shape", [(28672, 7168), (7168, 28672)])
@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_the_work_space_is_about_what_xla_asks_for(method, pattern, shape):
    """Of OPT-30B's largest kernels."""
    model = nnx.eval_shape(lambda: nnx.Dict(layers=nnx.List([nnx.Linear(*shape, rngs=nnx.Rngs(0))])))
    work = memory.estimate(model, METHODS[method], windows=None).work
    kernel, squares, scalar = (jax.ShapeDtypeStruct(size, jnp.float32) for size in (shape, shape[:1], ()))
    gram = jax.ShapeDtypeStruct((shape[0], shape[0]), jnp.float32) if METHODS[method].needs == "gram" else None
    inputs = pruning.Inputs(tokens=scalar, squares=squares, gram=gram)
    kernel = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    lowered: Any = prune_kernel
    found = lowered.lower(METHODS[method], pattern, False, kernel, inputs, scalar).compile().memory_analysis()
    assert 0.3 * work < found.temp_size_in_bytes + found.output_size_in_bytes < work


def test_what_a_walk_holds_is_what_was_estimated():
    model, hidden, sums = tiny_opt(d_ff=32), [], []
    for block in pruning.walk(model, windows(), batch=2):
        assert block.stream is not None
        hidden.append(sum(x.nbytes for x in block.stream))
        sums.append(sum(total.gram.nbytes for total in block.inputs("gram").values()))
    found = memory.estimate(model, SparseGPT(), windows=windows().shape, batch=2)
    assert found.hidden_states == max(hidden) and found.sums == max(sums)
    assert found.parameters == sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))
    assert found.total > found.parameters + max(hidden) + max(sums)
    assert memory.estimate(model, WANDA, windows=windows().shape, batch=2, errors=True) == found
    assert memory.estimate(model, MAGNITUDE, windows=None).hidden_states == 0


def test_no_weight_is_there_twice():
    """Once a block is pruned nothing holds what it was, or a model would take the memory of two."""
    model, before, reported = _initial.__wrapped__(), {}, []
    for block in pruning.walk(model):
        before |= {name: weakref.ref(kernel[...]) for name, kernel in block.kernels.items()}

    def report(row):
        reported.append(row["layer"])
        left = {name for name, array in before.items() if array() is not None}
        assert left == {name for name in before if name.split(".")[1] > row["layer"].split(".")[1]}

    prune(model, SparseGPT(), sparsity=0.5, windows=windows(), batch=2, report=report)
    assert reported == list(before)


def test_masks_survive_both_formats(sparsegpt_pruned, tmp_path):
    model, _ = sparsegpt_pruned
    save_opt(model, tmp_path / "native")
    save_hf(model, tmp_path / "hf")
    for folder in ("native", "hf"):
        loaded = kernels(load_opt(tmp_path / folder))
        for name, w in kernels(model).items():
            np.testing.assert_array_equal(loaded[name], w)


def test_a_killed_pruning_goes_on_where_it_was(tmp_path):
    whole = tiny_opt()
    options: dict[str, Any] = {"sparsity": 0.5, "windows": windows(), "batch": 2}
    rows = prune(whole, WANDA, **options)
    killed, seen = tiny_opt(), []

    def kill(row):
        seen.append(row)
        if len(seen) == 8:  # in the second block
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(killed, WANDA, **options, folder=tmp_path, report=kill)
    again = tiny_opt()
    assert prune(again, WANDA, **options, folder=tmp_path) == rows
    for name, w in kernels(whole).items():
        np.testing.assert_array_equal(kernels(again)[name], w)
    other = tiny_opt()
    other.layers[2].fc1.kernel[...] = other.layers[2].fc1.kernel[...] * 2
    changes: list[dict[str, Any]] = [{"sparsity": 0.6}, {"windows": windows() + 1}, {"batch": 4}]
    for model, change in [(other, {}), *((tiny_opt(), change) for change in changes)]:
        with pytest.raises(ValueError, match="folder must be of the same pruning"):
            prune(model, WANDA, **options | change, folder=tmp_path)


def test_a_method_has_one_name_in_every_process():
    script = "from sparsellm.pruning import METHODS; print(METHODS)"
    elsewhere = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert elsewhere.strip() == repr(METHODS)
    assert len(set(map(repr, METHODS.values()))) == len(METHODS)


@pytest.mark.parametrize("method", [WANDA, SparseGPT()])
def test_activations_that_are_not_finite_are_refused(method):
    model = tiny_opt()
    bias: Any = model.layers[0].fc2.bias
    bias[...] = bias[...].at[3].set(jnp.nan)
    before = kernels(model)
    with pytest.raises(ValueError, match=r"inputs must be finite; those of layers\.1\..* are not"):
        prune(model, method, sparsity=0.5, windows=windows())
    after = kernels(model)
    assert all((after[name] == w).all() for name, w in before.items() if not name.startswith("layers.0."))


@pytest.mark.parametrize(
    "options,message",
    [
        ({"method": WANDA, "sparsity": 0.5}, "windows must be given"),
        ({"sparsity": 0.5, "errors": True}, "windows must be given"),
        ({}, "sparsity must be given for the pattern unstructured"),
        ({"sparsity": 1.0}, "sparsity must be at least 0 and less than 1; got sparsity=1.0"),
        ({"sparsity": -0.1}, "got sparsity=-0.1"),
        ({"sparsity": float("nan")}, "got sparsity=nan"),
        ({"sparsity": {"layers.0.fc1.kernel": 1.5}}, "sparsity must be 0 to 1; got 1.5 for layers.0.fc1.kernel"),
        ({"sparsity": 0.5, "windows": windows(), "batch": 0}, "got batch=0"),
        ({"sparsity": {"layers.9.fc1.kernel": 0.5}}, "layers.9.fc1.kernel are none"),
        ({"sparsity": 0.6, "pattern": NM(2, 4)}, "sparsity must be None for 2:4, which is 0.5, or one for each kernel"),
        (
            {"sparsity": {"layers.0.fc1.kernel": 0.7, "layers.0.fc2.kernel": 0.6}, "pattern": NM(2, 4)},
            "sparsity must be 0.5 on average for 2:4, but for half a weight of 4; got 0.650",
        ),
        ({"pattern": NM(2, 5)}, "m must divide the inputs of a kernel; got 2:5 for a kernel of"),
        ({"sparsity": 0.5, "select": "fc3"}, "select must be found in the path of some kernel"),
        ({"sparsity": 0.5, "windows": windows(3), "batch": 2}, "batch must divide the number of windows; got batch=2"),
        ({"method": SparseGPT(), "sparsity": 0.5, "pattern": Blocks(48, 1)}, "rows of the pattern must divide block"),
    ],
)
def test_what_cannot_be_pruned_is_refused(options: dict[str, Any], message):
    model, options = tiny_opt(layers=1), dict(options)
    before = kernels(model)
    with pytest.raises(ValueError, match=message):
        prune(model, options.pop("method", MAGNITUDE), **options)
    assert all((w == before[name]).all() for name, w in kernels(model).items())


def test_a_path_past_the_modules_cannot_be_calibrated():
    with pytest.raises(ValueError, match=r"must be applied by its own module.*fc1.kernel, fc2.kernel"):
        prune(tiny_opt(layers=1, sparse_rows=8), WANDA, sparsity=0.5, windows=windows())


PLANS = {  # inputs x outputs -> outputs x inputs
    Blocks(64, 64): "k 64x64",
    Blocks(32, 64): "k 64x1",
    Blocks(32, 128): "k 128x1",
    Blocks(128, 128): "k 128x128",
    Blocks(32, 1): "m 1x32",
    Blocks(64, 1): "m 1x64",
    Blocks(24, 40): "k 40x24",  # by the xla path alone
}
ODD = Blocks(24, 40)


@pytest.mark.parametrize("pattern", PLANS, ids=str)
def test_pruned_blocks_run_on_the_sparse_kernel(pattern):
    """A linear layer of a model, dense with zeros and through `sparse_dot`, which skips the blocks."""
    model = nnx.Dict(layers=nnx.List([nnx.Linear(256, 256, rngs=nnx.Rngs(0))]))
    prune(model, MAGNITUDE, pattern=pattern, sparsity=0.75)
    layer, x = model.layers[0], jax.random.normal(jax.random.key(0), (70, 256))
    kernel = layer.kernel[...]
    assert (np.asarray(kernel) == 0).mean() == pytest.approx(0.75, abs=0.03 if pattern == ODD else 0)
    sparse = sparse_dot(x, kernel, mask=kernel != 0, sparse="b", plan=pattern.plan)
    expected = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    np.testing.assert_allclose(sparse, expected, atol=1e-4)
    np.testing.assert_allclose(layer(x), expected, atol=1e-4)
    assert str(pattern.plan) == PLANS[pattern]
    reason = "multiples of 64" if pattern == ODD else "runs on NVIDIA H100"  # the device alone, but for that one
    with pytest.raises(NotImplementedError, match=reason):
        sparse_dot(x, kernel, mask=kernel != 0, sparse="b", plan=pattern.plan, implementation="mosaic_gpu")


def test_a_model_of_pruned_blocks_runs_on_the_sparse_kernels():
    """By a rule of `sparsify`: both products of a feed-forward block skip zero blocks, and the logits are equal."""
    model, pattern = tiny_opt(layers=1, d_model=64, d_ff=128), Blocks(32, 64)
    prune(model, MAGNITUDE, pattern=pattern, sparsity=0.5, select="fc[12]")
    expected = logits(model)
    rules = [Rule("fc[12]", pattern.plan, sparse="b")]
    tokens = jnp.asarray(windows())
    np.testing.assert_allclose(sparsify(model, rules=rules)(tokens), expected, atol=1e-4)
    rows = [row for row in explain(model, tokens, rules=rules).rows if "fc" in row.product.path]
    assert [(row.product.sparse, row.plan) for row in rows] == [("b", pattern.plan)] * 2


# Structures


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef, state, tokens):
    return nnx.merge(graphdef, state)(tokens)


def logits(model: OPT) -> np.ndarray:
    return np.asarray(_logits(*nnx.split(model), jnp.asarray(windows())))


class Table(nnx.Module):
    """Logits are rows of a table, so that gradients are known."""

    def __init__(self):
        self.table = nnx.Param(jax.random.normal(jax.random.key(0), (VOCAB, VOCAB)))

    def __call__(self, tokens):
        return self.table[...][tokens]


@pytest.mark.parametrize("order", [1, 2])
def test_importance_is_the_taylor_expansion(order):
    model, gradient, fisher = Table(), 0.0, 0.0
    table = np.asarray(model.table[...], np.float64)
    for window in windows(3):
        g = np.zeros_like(table)
        for token, target in zip(window[:-1], window[1:], strict=True):
            p = np.exp(table[token])
            p /= p.sum()
            p[target] -= 1
            g[token] += p / (len(window) - 1)
        gradient, fisher = gradient + g / 3, fisher + g**2 / 3
    expected = np.abs(table * gradient - (0.5 * table**2 * fisher if order == 2 else 0))
    np.testing.assert_allclose(parameter_importance(model, windows(3), order=order)["table"], expected, atol=1e-6)


def test_a_model_without_some_heads_and_neurons_is_the_one_where_they_are_silent(tmp_path):
    model = tiny_opt(layers=2, d_ff=24)
    smaller = pruning.prune_structures(model, windows(), heads=0.5, neurons=0.3, multiple=3, layers=[1])
    assert smaller.config.layer_sizes == ((4, 24), (2, 18))
    assert kernels(smaller)["layers.1.self_attn.q_proj.kernel"].shape == (16, 8)
    assert kernels(smaller)["layers.1.fc2.kernel"].shape == (18, 16)
    scores = parameter_importance(model, windows(), order=1)
    names = [f"self_attn.{p}_proj.{part}" for p in "qkv" for part in ("kernel", "bias")]
    columns = [np.asarray(scores[f"layers.1.{name}"]).reshape(-1, 4, 4).sum(axis=(0, 2)) for name in names]
    rows = np.asarray(scores["layers.1.self_attn.out_proj.kernel"]).reshape(4, 4, 16).sum(axis=(1, 2))
    silent = np.argsort(sum(columns) + rows)[:2]
    out: Any = model.layers[1].self_attn.out_proj.kernel
    out[...] = out[...].reshape(4, 4, 16).at[silent].set(0.0).reshape(16, 16)
    fc1, bias, fc2 = (np.asarray(scores[f"layers.1.{name}"]) for name in ("fc1.kernel", "fc1.bias", "fc2.kernel"))
    silent = np.argsort(fc1.sum(0) + bias + fc2.sum(1))[:6]
    out = model.layers[1].fc2.kernel
    out[...] = out[...].at[silent].set(0.0)
    np.testing.assert_allclose(logits(smaller), logits(model), atol=1e-4)
    save_opt(smaller, tmp_path / "native")
    loaded = load_opt(tmp_path / "native")
    assert loaded.config == smaller.config
    np.testing.assert_array_equal(logits(loaded), logits(smaller))
    with pytest.raises(ValueError, match="transformers knows no OPT whose layers differ"):
        save_hf(smaller, tmp_path / "hf")
    assert [x.shape[2] for x in smaller.init_cache(1, LENGTH).keys] == [4, 2]


def test_neuron_major_layers_are_not_passed_over():
    model = tiny_opt(layers=1, neuron_major=True)
    with pytest.raises(ValueError, match=r"must be \[in, out\] here.*; layers.0.fc1 keeps its own neuron-major"):
        prune(model, MAGNITUDE, sparsity=0.5)
    smaller = pruning.prune_structures(tiny_opt(layers=2, d_ff=24), windows(), neurons=0.5, layers=[1])
    by_neuron = with_layout(tiny_opt(layers=2, d_ff=24), neuron_major=True)
    other = pruning.prune_structures(by_neuron, windows(), neurons=0.5, layers=[1])
    np.testing.assert_allclose(logits(other), logits(smaller), atol=1e-5)


def test_equal_layers_are_an_ordinary_model(tmp_path):
    smaller = pruning.prune_structures(tiny_opt(layers=2, d_ff=24), windows(), neurons=0.5, layers=range(2))
    assert smaller.config == dataclasses.replace(smaller.config, d_ff=12, layer_sizes=None)
    save_hf(smaller, tmp_path / "hf")
    assert load_opt(tmp_path / "hf").config.d_ff == 12


@pytest.mark.parametrize(
    "options,message",
    [
        ({"heads": 1.0}, "heads must be a share"),
        ({"neurons": -0.1}, "neurons must be a share"),
        ({"order": 3}, "order must be 1 or 2; got order=3"),
        ({"layers": [3]}, "layers 0 to 2"),
        ({"layers": []}, "layers must name one at least"),
        ({"multiple": 0}, "multiple must be at least 1"),
    ],
)
def test_structures_that_cannot_go_are_refused(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        pruning.prune_structures(tiny_opt(), windows(), **options)


def compilations() -> int:
    """Of the training step, in this process."""
    step: Any = training.train_step
    return step._cache_size()


class Repeated:
    """The same batch at every step."""

    def __getitem__(self, step: int) -> np.ndarray:
        return windows(4, LENGTH + 1)


def test_recovery_learns_in_the_linear_layers_only():
    model = tiny_opt(layers=1)
    before = {path: np.array(v[...]) for path, v in nnx.to_flat_state(nnx.state(model))}
    config = training.TrainConfig(steps=8, batch=4, learning_rate=0.03, warmup_steps=1)
    losses = pruning.recover(model, Repeated(), config, rank=2, select="fc[12]$", rngs=nnx.Rngs(0))
    after = {path: np.array(v[...]) for path, v in nnx.to_flat_state(nnx.state(model))}
    assert before.keys() == after.keys()
    changed = {".".join(map(str, path)) for path in before if (before[path] != after[path]).any()}
    assert changed == {"layers.0.fc1.kernel", "layers.0.fc2.kernel"}
    assert np.linalg.matrix_rank(after["layers", 0, "fc1", "kernel"] - before["layers", 0, "fc1", "kernel"], 1e-4) == 2
    batch = jnp.asarray(Repeated()[0])
    logits: Any = model(batch[:, :-1])
    loss = float(next_token_loss(logits, batch[:, 1:]))
    assert loss < losses[-1] < losses[0]


def test_an_interrupted_recovery_leaves_the_model_as_it_was():
    class Interrupted(Repeated):
        def __getitem__(self, step: int) -> np.ndarray:
            if step:
                raise KeyboardInterrupt
            return super().__getitem__(step)

    model = tiny_opt(layers=1)
    config = training.TrainConfig(steps=8, batch=4, learning_rate=0.03, warmup_steps=1)
    with pytest.raises(KeyboardInterrupt):
        pruning.recover(model, Interrupted(), config, rank=2, select="fc[12]$", rngs=nnx.Rngs(0))
    assert nnx.graphdef(model) == nnx.graphdef(tiny_opt(layers=1))
    for name, w in kernels(tiny_opt(layers=1)).items():
        np.testing.assert_array_equal(kernels(model)[name], w)


@pytest.mark.parametrize("options", [{"rank": 0}, {"select": "fc3"}])
def test_a_recovery_of_nothing_is_refused(options):
    config = training.TrainConfig(steps=1, batch=4, learning_rate=0.03, warmup_steps=0)
    with pytest.raises(ValueError, match="got (rank|select)="):
        pruning.recover(tiny_opt(layers=1), Repeated(), config, **options, rngs=nnx.Rngs(0))


# While training


def test_masks_change_while_training_and_nothing_compiles_again():
    """Against a loop in numpy: SGD on a table, a new mask every second step from the third on."""
    config = GradualConfig(sparsity=0.8, begin=2, end=10, every=2, select="table")
    transformation = gradually_pruned(optax.sgd(0.5), config)
    graphdef, params = nnx.split(Table(), nnx.Param)
    table, mask, masks = np.asarray(params["table"][...], np.float64), np.ones((VOCAB, VOCAB), bool), []
    state = training.TrainState(params, transformation.init(params))
    compiled = compilations()
    for step in range(1, 13):
        batch = windows(4, LENGTH + 1)
        state, _ = training.train_step(graphdef, transformation, state, jnp.asarray(batch))
        g = np.zeros_like(table)
        for token, target in zip(batch[:, :-1].flatten(), batch[:, 1:].flatten(), strict=True):
            p = np.exp(table[token])
            p /= p.sum()
            p[target] -= 1
            g[token] += p / batch[:, 1:].size
        trained = table - 0.5 * g
        if step >= 2 and step % 2 == 0:
            t = min((step - 2) / 8, 1)
            count = round(0.8 * (1 - (1 - t) ** 3) * table.size)
            mask = np.ones(table.size, bool)
            mask[np.argsort(np.abs(trained.flatten()), kind="stable")[:count]] = False
            mask = mask.reshape(table.shape)
        table = np.where(mask, trained, 0)
        found = np.asarray(state.params["table"][...])
        np.testing.assert_array_equal(found != 0, mask)
        np.testing.assert_allclose(found, table, atol=1e-5)
        masks.append(mask)
    assert compilations() == compiled + 1
    assert [round(float(1 - m.mean()), 2) for m in masks[::3]] == [0.0, 0.46, 0.7, 0.8]
    assert float(cubic_sparsity(config, jnp.int32(0))) == 0


@pytest.mark.parametrize(
    "options,message",
    [
        ({"sparsity": 2.0}, "sparsity must be at least 0 and less than 1; got sparsity=2.0"),
        ({"end": 0}, "begin must be less than end; got begin=0, end=0"),
        ({"every": 0}, "every must be at least 1; got every=0"),
        ({"pattern": NM(2, 4)}, "pattern must not be n:m"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GradualConfig(**({"sparsity": 0.5, "end": 4} | options))
