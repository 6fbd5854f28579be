"""Pruning a whole model, block by block: what it is fed, what it holds, what it refuses, and kernels for its blocks."""

import functools
import subprocess
import sys
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pruned_models import LENGTH, VOCAB, calibration, initial_opt, inputs_of, kernels, logits, tiny_opt, windows

from models import OPT, load_opt, save_hf, save_opt, with_predictors
from sparsellm import pruning
from sparsellm.explain import explain
from sparsellm.mixture_of_experts import LinearRouter, MixtureOfExperts, RouterRule
from sparsellm.predictors import LowRankPredictor
from sparsellm.pruning import MAGNITUDE, METHODS, NM, RIA, WANDA, Blocks, SparseGPT, Unstructured, memory, prune
from sparsellm.pruning.calibrate import sum_inputs
from sparsellm.pruning.walk import _sparsities, prune_kernel
from sparsellm.sparse_dot import sparse_dot
from sparsellm.sparsify import Rule, sparsify


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
    model, before, reported = initial_opt.__wrapped__(), {}, []
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
    changes: list[dict[str, Any]] = [{"sparsity": 0.6}, {"windows": windows()[::-1]}, {"batch": 4}]
    for model, change in [(other, {}), *((tiny_opt(), change) for change in changes)]:
        with pytest.raises(ValueError, match="folder must be of the same pruning"):
            prune(model, WANDA, **options | change, folder=tmp_path)


def test_numbers_of_numpy_go_into_the_folder_too(tmp_path, unchecked):
    model, other = tiny_opt(), tiny_opt()
    numbers: dict[str, Any] = {"sparsity": np.float32(0.5), "batch": np.int64(2)}
    rows = prune(model, WANDA, windows=windows(), folder=tmp_path, **numbers)
    assert prune(other, WANDA, sparsity=0.5, windows=windows(), batch=2, folder=tmp_path) == rows
    by_path: Any = dict.fromkeys(kernels(model), np.float32(0.5))
    assert len(prune(tiny_opt(), MAGNITUDE, sparsity=by_path, folder=tmp_path / "by path")) == len(rows)


def test_under_x64():
    plain, wide = tiny_opt(), tiny_opt()
    prune(plain, SparseGPT(), sparsity=0.5, windows=windows())
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        prune(wide, SparseGPT(), sparsity=0.5, windows=windows())
    for name, w in kernels(plain).items():
        np.testing.assert_allclose(kernels(wide)[name], w, atol=1e-5, err_msg=name)


def test_predictors_that_read_what_came_before_the_block_are_refused():
    predictor = LowRankPredictor(16, 2, 4, look_ahead=True, rngs=nnx.Rngs(0))
    model = with_predictors(tiny_opt(), None, "mask_everywhere", head_predictors=[predictor] * 3)
    with pytest.raises(ValueError, match=r"calibrated without predictors that look ahead .* layers.0.self_attn"):
        prune(model, WANDA, sparsity=0.5, windows=windows())


def test_a_name_is_no_method():
    with pytest.raises(ValueError, match="method must be a pruning method, such as METHODS.*; got 'wanda'"):
        _sparsities(tiny_opt(), "wanda", Unstructured(), 0.5, windows(), False, "")


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
