"""Heads and neurons that are taken out of a model, and its recovery."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pruned_models import (
    LENGTH,
    Table,
    kernels,
    logits,
    tiny_opt,
    windows,
)

from models import load_opt, save_hf, save_opt
from models.opt import with_layout
from sparsellm import pruning, training
from sparsellm.objectives import next_token_loss
from sparsellm.pruning import MAGNITUDE, prune
from sparsellm.pruning.structured import parameter_importance
from sparsellm.unstructured import Treatment, compress


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


def test_structures_of_compressed_layers_cannot_go():
    with pytest.raises(ValueError, match="pruned before it is compressed; got layers.0.fc1, which is compressed"):
        pruning.prune_structures(compress(tiny_opt(), [("0.fc1", Treatment(max_density=1.0))]), windows(), neurons=0.5)


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
