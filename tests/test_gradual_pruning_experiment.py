"""The experiment gradual_pruning: its sparse step against a masked dense training loop in numpy, and its checks."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import gradual_pruning, opt
from experiments.__main__ import main
from experiments.runs import Run
from models import OPT, attention
from pallas_kernels.workbench.gpus import GPUS, lower

CONFIG = gradual_pruning.Config.smoke()
VOCABULARY = 50
TOTAL = 0.9  # the last of the smoke form's sparsities


def batch(step: int) -> np.ndarray:
    """Some tokens follow others often, so that there is something to learn."""
    rng = np.random.default_rng(step)
    start = rng.integers(0, VOCABULARY, (CONFIG.batch, 1))
    return ((start + np.arange(CONFIG.length + 1) * 7) % VOCABULARY).astype(np.int32)


def block_mask(kernel: np.ndarray, rows: int, cols: int, sparsity: np.float32) -> np.ndarray:
    """False in the blocks of least mean magnitude; no block is cut."""
    down, across = kernel.shape[0] // rows, kernel.shape[1] // cols
    means = np.abs(kernel).reshape(down, rows, across, cols).mean(axis=(1, 3)).reshape(-1)
    keep = np.ones(means.size, bool)
    keep[np.argsort(means, kind="stable")[: int(np.round(sparsity * np.float32(means.size)))]] = False
    return np.repeat(np.repeat(keep.reshape(down, across), rows, axis=0), cols, axis=1)


def masked_training(rows: int, cols: int):
    """Each step's loss, kernels and masks: the dense model's gradient by jax, all else in numpy."""
    graphdef, params = nnx.split(
        OPT(gradual_pruning.model_config(CONFIG, VOCABULARY), rngs=nnx.Rngs(CONFIG.seed)), nnx.Param
    )

    @jax.jit
    def gradient(params, windows):
        def loss(params):
            logits: Any = nnx.merge(graphdef, params)(windows[:, :-1])
            picked = jnp.take_along_axis(logits, windows[:, 1:, None], axis=-1)[..., 0]
            return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)

        return jax.value_and_grad(loss)(params)

    leaves, tree = jax.tree.flatten(params)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
    pruned = ["layers" in name and "kernel" in name for name in names]
    weights = [np.asarray(x, np.float64) for x in leaves]
    masks = [np.ones(x.shape, bool) for x in weights]
    m, v = ([np.zeros(x.shape) for x in weights] for _ in range(2))
    for step in range(1, CONFIG.steps + 1):
        loss, grads = gradient(tree.unflatten([jnp.asarray(x, jnp.float32) for x in weights]), batch(step - 1))
        g = [np.asarray(x, np.float64) * mask for x, mask in zip(jax.tree.leaves(grads), masks, strict=True)]
        norm = np.sqrt(sum((x**2).sum() for x in g))
        g = [x / max(norm, 1) for x in g]
        done, warmup = step - 1, CONFIG.warmup_steps
        progress = (done - warmup) / (CONFIG.steps - warmup)
        cosine = 0.1 + 0.9 * (1 + np.cos(np.pi * progress)) / 2
        rate = CONFIG.learning_rate * (done / warmup if done < warmup else cosine)
        sparsity = np.float32(TOTAL) * (1 - (1 - np.float32(max(step - warmup, 0) / (CONFIG.steps - warmup))) ** 3)
        for i, x in enumerate(weights):
            m[i], v[i] = 0.9 * m[i] + 0.1 * g[i], 0.98 * v[i] + 0.02 * g[i] ** 2
            direction = m[i] / (1 - 0.9**step) / (np.sqrt(v[i] / (1 - 0.98**step)) + 1e-8)
            weights[i] = x - rate * (direction + (0.1 * x if x.ndim > 1 else 0))
            if pruned[i] and step >= warmup:
                masks[i] = block_mask(weights[i].astype(np.float32), rows, cols, sparsity)
                weights[i] = np.where(masks[i], weights[i], 0)
        kernels = [(x, mask) for x, mask, one in zip(weights, masks, pruned, strict=True) if one]
        yield float(loss), kernels


@pytest.mark.parametrize(("rows", "cols"), [(8, 8), (4, 1)])
def test_the_sparse_step_trains_and_prunes_as_a_masked_dense_loop(rows, cols):
    leaves, state, steps = gradual_pruning.prepare(CONFIG, f"{rows}x{cols}", VOCABULARY)
    step: Any = jax.jit(steps["sparse"])
    losses = []
    for number, (loss, kernels) in enumerate(masked_training(rows, cols)):
        leaves, found = step(leaves, jnp.asarray(batch(number)))
        assert float(found) == pytest.approx(loss, rel=1e-4)
        for ours, (weights, mask) in zip(gradual_pruning._kernels(state(leaves).params), kernels, strict=True):
            np.testing.assert_array_equal(np.asarray(ours) != 0, mask)
            assert np.linalg.norm(ours - weights) <= 1e-3 * np.linalg.norm(weights)
        losses.append(loss)
    assert step._cache_size() == 1
    assert losses[-1] < losses[0] - 0.1
    every = np.concatenate([mask.ravel() for _, mask in kernels])
    assert every.mean() == pytest.approx(1 - TOTAL, abs=0.02)  # of the smallest kernels, 4 blocks, none is left


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Run, list[dict]]:
    with Run.start("gradual_pruning", CONFIG, root=tmp_path_factory.mktemp("runs")) as run:
        return run, gradual_pruning.run(CONFIG, run)


def test_a_row_for_every_sparsity(finished):
    run, rows = finished
    assert [(row["sparsity"], row["step"]) for row in rows] == [(0.0, 2), (0.5, 4), (0.9, 12)]
    for row in rows:
        assert row["zeros"] == pytest.approx(TOTAL * (1 - (1 - (row["step"] - 2) / 10) ** 3), abs=0.03)
        assert row["loss"] == pytest.approx(row["dense_loss"], rel=1e-5) and row["error"] < 1e-5
        assert row["time_ms"] > 0 and row["dense_time_ms"] > 0 and row["memory_gib"] >= 0 and row["compiled"] == 0
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1
    assert (run.folder / "gradual_pruning.png").stat().st_size > 1000


def test_a_killed_run_goes_on_with_the_next_pattern(finished, tmp_path, monkeypatch):
    _, rows = finished
    config, asked = dataclasses.replace(CONFIG, patterns=("8x8", "4x1")), []

    def train(config, pattern, windows, vocabulary):
        asked.append(pattern)
        if asked == ["8x8", "4x1"]:
            raise KeyboardInterrupt
        return [row | {"pattern": pattern} for row in rows]

    monkeypatch.setattr(gradual_pruning, "train", train)
    with pytest.raises(KeyboardInterrupt), Run.start("gradual_pruning", config, root=tmp_path) as run:
        gradual_pruning.run(config, run)
    with Run.start("gradual_pruning", config, root=tmp_path) as run:
        found = gradual_pruning.run(config, run)
    assert asked == ["8x8", "4x1", "4x1"]
    assert [row["pattern"] for row in found] == ["8x8"] * 3 + ["4x1"] * 3


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (2.01, 0.0, "losses of the dense and the sparse step differ by 5.0e-03, above 0.001"),
        (2.0, 0.1, "gradients of the dense and the sparse step differ by 1.0e-01, above 0.005"),
        (2.0, float("nan"), "gradients .* differ by nan"),
        (float("nan"), 0.0, "losses .* differ by nan"),
    ],
)
def test_variants_that_differ_are_an_error(loss, error, message):
    steps = {"dense": lambda *_: ([], 2.0), "sparse": lambda *_: ([], loss)}
    with pytest.raises(RuntimeError, match=message):
        gradual_pruning.measure(CONFIG, steps, lambda *_: {"zeros": 0.5, "error": error}, [[], None])


def test_the_difference_of_gradients_is_that_of_the_gradients():
    """Of steps from the same state, one of which saw other windows."""
    leaves, state, steps = gradual_pruning.prepare(CONFIG, "8x8", VOCABULARY)
    windows = [jnp.asarray(batch(i)) for i in range(3)]
    leaves, _ = jax.jit(steps["dense"])(leaves, windows[0])  # so that there is a moment before
    step = jax.jit(steps["dense"])
    one, other = (step(leaves, x)[0] for x in windows[1:])
    found = gradual_pruning.compare(*map(state, (leaves, one, other)))
    graphdef, params = nnx.split(OPT(gradual_pruning.model_config(CONFIG, VOCABULARY), rngs=nnx.Rngs(0)), nnx.Param)

    def loss(params, windows):
        return gradual_pruning.next_token_objective(nnx.merge(graphdef, params), windows, 0)[0]

    def gradient(windows) -> np.ndarray:
        every = jax.jit(jax.grad(loss))(state(leaves).params, windows)
        norm = np.sqrt(sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(every)))
        return np.concatenate([np.ravel(x) for x in gradual_pruning._kernels(every)]) / max(norm, 1)

    a, b = gradient(windows[1]), gradient(windows[2])
    assert float(found["error"]) == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-3)
    assert float(found["zeros"]) == 0
    assert float(gradual_pruning.compare(*map(state, (leaves, one, one)))["error"]) == 0


def test_a_program_compiled_on_the_way_is_an_error(monkeypatch):
    def step(leaves, windows):
        return leaves, jnp.float32(0)

    def measure(config, steps, comparison, arguments):
        jax.jit(lambda x: x + 1.5)(arguments[0][0])
        return dict.fromkeys(("zeros", "loss", "time_ms", "dense_time_ms"), 0.0)

    monkeypatch.setattr(gradual_pruning, "measure", measure)
    monkeypatch.setattr(gradual_pruning, "prepare", lambda *_: ([jnp.zeros(3)], list, {"dense": step, "sparse": step}))
    monkeypatch.setattr(gradual_pruning, "compare", lambda *_: {})
    with pytest.raises(RuntimeError, match="new masks must compile nothing; with 8x8 they compiled 3 programs"):
        gradual_pruning.train(CONFIG, "8x8", np.zeros((8, 17), np.int32), VOCABULARY)


def test_every_product_of_a_kernel_runs_on_the_kernels_of_an_h200(monkeypatch):
    """Six linear layers, forward and both gradients; attention, by XLA here, and the vocabulary's products are left."""
    monkeypatch.setattr(attention, "CUDNN_DEVICES", ("none",))  # cuDNN is not there to be asked
    for name, size in {"d_model": 128, "d_ff": 256}.items():
        monkeypatch.setitem(opt.TINY, name, size)
    config = dataclasses.replace(CONFIG, dtype="bfloat16", batch=2, length=64)
    leaves, _, steps = gradual_pruning.prepare(config, "64x64", VOCABULARY)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves] + [jax.ShapeDtypeStruct((2, 65), jnp.int32)]

    def lowered(step) -> str:
        return lower(lambda *arrays: step(list(arrays[:-1]), arrays[-1]), shapes, GPUS[0])

    with jax.numpy_dtype_promotion("standard"):  # of the float32 and bfloat16 that attention multiplies there
        dense, sparse = map(lowered, steps.values())
    assert dense.count("stablehlo.dot") - sparse.count("stablehlo.dot") == 6 * 3
    assert dense.count("custom_call @mosaic_gpu") == 0 and sparse.count("custom_call @mosaic_gpu") >= 9
    # XLA, told to be deterministic, would do such a scatter one by one.
    assert not re.search("unique_indices = false", dense + sparse)


def test_readme_shows_both_variants_and_what_was_compiled():
    row: dict[str, Any] = {"model": "opt-1.3b, 2 layers", "dtype": "bfloat16", "tokens": 4096, "pattern": "64x64"}
    row |= {"step": 90, "zeros": 0.899, "loss": 5.1, "dense_loss": 5.1004, "error": 0.01, "compiled": 0}
    row |= {"time_ms": 5.0, "dense_time_ms": 10.0, "speedup": 2.0, "memory_gib": 4.0, "dense_memory_gib": 3.5}
    text, figures = gradual_pruning.readme({"rows": [row]})
    assert text.splitlines() == [
        "opt-1.3b, 2 layers, bfloat16, 4,096 tokens a step. Programs compiled after the first step: 0.",
        "",
        "| pattern | zeros | step |   loss |  dense | gradients differ by | ms a step | dense (ms) | speedup |  GiB "
        "| dense (GiB) |",
        "|--------:|------:|-----:|-------:|-------:|--------------------:|----------:|-----------:|--------:|-----:"
        "|------------:|",
        "|   64x64 | 89.9% |   90 | 5.1000 | 5.1004 |               1e-02 |      5.00 |      10.00 |   2.00x | 4.00 "
        "|        3.50 |",
    ]
    assert figures.keys() == {"gradual_pruning.png"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--patterns", "unstructured"], "patterns must be ROWSxCOLS, blocks that have a plan; got unstructured"),
        (["--patterns", "2:4"], "patterns must be ROWSxCOLS, blocks that have a plan; got 2:4"),
        (["--patterns", "wide"], 'a pattern is "unstructured", N:M or ROWSxCOLS; got "wide"'),
        (["--sparsities", "0.5", "0.4"], "sparsities must rise, to less than 1 and more than 0; got"),
        (["--sparsities", "0.5", "1.0"], "sparsities must rise, to less than 1 and more than 0; got"),
        (["--sparsities", "0.88", "0.89", "0.9"], "steps must be enough to tell sparsities apart; got steps=12"),
        (["--dtype", "int8"], "dtype must be one of bfloat16, float32; got 'int8'"),
        (["--size", "9b"], "size must be one of tiny, 125m"),
        (["--steps", "2"], "warmup_steps must be less than steps; got warmup_steps=2, steps=2"),
        (["--batch", "0"], "batch must be at least 1; got batch=0"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_read(options, message, tmp_path, capsys):
    assert main(["gradual_pruning", "--smoke", "--runs", str(tmp_path), *options]) == 1
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "gradual_pruning").iterdir())
