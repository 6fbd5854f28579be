"""Compressed linear layers in models, on one device and on several: sparsellm/unstructured."""

import dataclasses
import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compressed_models import MIXTRAL_TINY, OPT_TINY, SAVE, TOKENS, linear, make, outputs, token_logits, zero_some
from flax import nnx

from models import OPT, OPTConfig, load_mixtral
from sparsellm.generation import generate
from sparsellm.memory import estimate
from sparsellm.mixture_of_experts import LinearRouter, MixtureOfExperts, RouterRule
from sparsellm.pruning import METHODS, prune
from sparsellm.unstructured import Treatment, UnstructuredLinear, apply_all, compress, compressed_layers
from sparsellm.unstructured import linear as linear_module

ROOT = Path(__file__).parents[1]
LINEARS = [f"layers.{i}.{name}" for i in range(2)
           for name in ("fc1", "fc2", *(f"self_attn.{x}_proj" for x in ("k", "out", "q", "v")))]  # fmt: skip


@pytest.fixture(scope="module")
def compressed() -> OPT:
    return compress(zero_some(make(OPT_TINY)))


# The layer


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_the_layer_is_the_product(density):
    shape, bias = (19, 33), density != 0.5
    rng = np.random.default_rng(0)
    w = rng.normal(size=shape).astype(np.float32) * (rng.random(shape) < density)
    dense, x = linear(w, bias), rng.normal(size=(2, 3, shape[0])).astype(np.float32)
    expected = x.astype(np.float64) @ w + (np.linspace(-1, 1, shape[1]) if bias else 0)
    layer = UnstructuredLinear.from_linear(dense)
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, atol=2e-5)
    np.testing.assert_array_equal(layer.weights.to_dense(), w.T)
    assert (layer.in_features, layer.out_features) == (dense.in_features, dense.out_features) == shape
    assert layer(jnp.zeros((0, shape[0]))).shape == (0, shape[1])
    assert layer(jnp.asarray(x[0, 0])).shape == shape[1:]


def test_the_layer_computes_in_its_dtype():
    w = np.random.default_rng(0).normal(size=(48, 32)) * (np.arange(32) % 3 == 0)
    layer = UnstructuredLinear.from_linear(linear(w, dtype="bfloat16"))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 48)), jnp.float32)
    y = layer(x)
    rounded = [np.asarray(np.asarray(a, jnp.bfloat16), np.float64) for a in (x, w, np.linspace(-1, 1, 32))]
    expected = rounded[0] @ rounded[1] + rounded[2]
    assert y.dtype == layer.weights.dtype == jnp.bfloat16 and layer.bias is not None and layer.bias.dtype == jnp.float32
    assert np.linalg.norm(np.asarray(y, np.float64) - expected) < 5e-3 * np.linalg.norm(expected)


def test_nan_among_the_weights_is_kept():
    w = np.zeros((16, 16))
    w[3, 5] = np.nan
    y = UnstructuredLinear.from_linear(linear(w))(jnp.ones((1, 16)))
    assert np.isnan(y[0, 5]) and np.isfinite(np.delete(y[0], 5)).all()


def test_code_that_multiplies_by_the_kernel_itself_is_told(compressed):
    with pytest.raises(TypeError, match="a compressed layer has no dense kernel: call the layer"):
        print(compressed.layers[0].fc1.kernel)


def test_alike_layers_of_one_x_are_multiplied_at_once(monkeypatch):
    """Dense ones, and those that differ in shape or in how values are stored, are called one by one, in any order."""
    rng, x, together = np.random.default_rng(0), np.random.default_rng(1).normal(size=(2, 3, 24)), []
    widths = (16, 16, 24, 16, 16)
    kernels = [rng.normal(size=(24, n)).astype(np.float32) * (rng.random((24, n)) < 0.3) for n in widths]
    layers: list[Any] = [linear(w, bias=i != 3) for i, w in enumerate(kernels)]
    biases = [0 if layer.bias is None else np.asarray(layer.bias[...]) for layer in layers]
    layers[1:4] = [UnstructuredLinear.from_linear(layer) for layer in layers[1:4]]
    layers[0] = UnstructuredLinear.from_linear(layers[0])
    layers += [UnstructuredLinear.from_linear(linear(kernels[0], bias=False), value_dtype="int8")]
    layers += [UnstructuredLinear.from_linear(linear(kernels[0], bias=False), paired=True)]
    multiply = linear_module.unstructured_matmuls
    monkeypatch.setattr(linear_module, "unstructured_matmuls", lambda *a: (together.append(len(a[0])), multiply(*a))[1])
    outputs = apply_all(layers, jnp.asarray(x, jnp.float32))
    assert sorted(together) == [1, 1, 1, 3]
    for y, w, bias in zip(outputs[:5], kernels, biases, strict=True):
        np.testing.assert_allclose(y, x @ w + bias, atol=1e-5)
    np.testing.assert_allclose(outputs[5], x @ kernels[0], atol=0.1)
    np.testing.assert_allclose(outputs[6], x @ kernels[0], atol=1e-5)
    assert apply_all([], jnp.ones((1, 24))) == []


# Rules


def test_the_first_rule_that_fits_counts():
    model, rows = zero_some(make(OPT_TINY)), []
    kept = [model.layers[0].fc1, model.layers[1].fc1, model.layers[1].fc2]
    compress(
        model, [(r"^layers\.0\.fc1$", None), ("layers.0", Treatment()), ("k_proj", Treatment())], report=rows.append
    )
    assert kept == [model.layers[0].fc1, model.layers[1].fc1, model.layers[1].fc2]
    expected = [name for name in LINEARS if name.startswith("layers.0") or "k_proj" in name]
    assert [name for name, _ in compressed_layers(model)] == [row["layer"] for row in rows] == expected[1:]


def test_what_is_too_dense_stays():
    model, rows = zero_some(make(OPT_TINY), 0.4), []
    model.layers[1].fc2.kernel[...] = jnp.ones((24, 24))
    compress(model, report=rows.append)
    by_name = {row["layer"]: row for row in rows}
    assert sorted(by_name) == LINEARS
    assert [name for name, _ in compressed_layers(model)] == [name for name in LINEARS if name != "layers.1.fc2"]
    assert by_name["layers.1.fc2"] == {
        "layer": "layers.1.fc2", "density": 1.0, "bytes": 4 * 576, "dense_bytes": 4 * 576
    }  # fmt: skip
    layer = model.layers[0].fc1
    assert by_name["layers.0.fc1"]["bytes"] == sum(x.nbytes for x in jax.tree.leaves(layer.weights))
    assert by_name["layers.0.fc1"]["density"] == np.count_nonzero(layer.weights.to_dense()) / 576


def test_dense_kernels_are_freed_on_the_way():
    model = zero_some(make(OPT_TINY))
    gc.collect()  # making a model leaves cycles behind that hold its parameters
    kernels = [weakref.ref(layer.fc1.kernel[...]) for layer in model.layers]
    alive = []
    compress(model, report=lambda row: alive.append(sum(kernel() is not None for kernel in kernels)))
    assert alive == [1] * 6 + [0] * 6  # the first layer that is compressed is layers.0.fc1


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("fc3", r"must be found in the path of some linear layer \(layers.0.fc1, .*\); got 'fc3'"),
        ("[", "a rule must be a regular expression and a treatment or None; got"),
        ("embed_tokens", "must be found in the path of some linear layer"),
    ],
)
def test_rules_that_cannot_be(rule, message):
    model = make(OPT_TINY)
    with pytest.raises(ValueError, match=message):
        compress(model, [("", Treatment(max_density=1.0)), (rule, Treatment())])
    assert not list(compressed_layers(model))
    with pytest.raises(ValueError, match="max_density must be 0 to 1; got max_density=1.5"):
        Treatment(max_density=1.5)


def test_heads_are_left_alone_and_so_are_layers_of_other_kinds():
    model = zero_some(make(MIXTRAL_TINY))  # its output projection too
    compress(model)
    assert {name.split(".")[0] for name, _ in compressed_layers(model)} == {"layers"}
    plain = nnx.Sequential(linear(np.eye(16)), nnx.relu, linear(np.eye(16), bias=False))
    compress(plain)
    assert len(list(compressed_layers(plain))) == 2
    np.testing.assert_allclose(
        plain(jnp.ones((2, 16))), np.maximum(1 + np.linspace(-1, 1, 16), 0)[None].repeat(2, 0), rtol=1e-6
    )


def test_experts_are_compressed_only_if_asked_for():
    with pytest.raises(ValueError, match="experts stay dense unless.*for layers.0.block_sparse_moe.wi"):
        compress(make(MIXTRAL_TINY), [("block_sparse_moe", Treatment())])


def experts(activation: str, gated: bool, bias: bool, **rule: Any) -> MixtureOfExperts:
    """Some of whose weights are zero, whatever their router's."""
    router = LinearRouter(12, 5, RouterRule(**{"top_k": 2, "weights": "softmax"} | rule), rngs=nnx.Rngs(0))
    layer = MixtureOfExperts(12, 10, router, activation=activation, gated=gated, bias=bias, rngs=nnx.Rngs(1))
    rng = np.random.default_rng(2)
    for name in ("wi", "wo"):
        stack = getattr(layer, name)[...]
        getattr(layer, name)[...] = jnp.where(rng.random(stack.shape) < 0.4, stack, 0)
    for name in ("wi_bias", "wo_bias") if bias else ():
        getattr(layer, name)[...] = jnp.asarray(rng.normal(size=getattr(layer, name).shape), jnp.float32)
    return layer


@pytest.mark.parametrize("tokens", [9, 130])
@pytest.mark.parametrize(
    ("activation", "gated", "bias", "rule"),
    [("silu", True, False, {}), ("gelu", False, True, {"top_k": 1}), ("relu", True, True, {"capacity_factor": 0.5})],
)
def test_compressed_experts_give_what_the_stacks_give(activation, gated, bias, rule, tokens):
    """Few tokens through all experts at once, many through their own; padding and dropped choices too."""
    layer = experts(activation, gated, bias, **rule)
    x = jax.random.normal(jax.random.key(3), (tokens, 12))
    mask = jnp.arange(tokens) != 4
    expected, rows = layer(x, mask), []
    compress(layer, experts=True, report=rows.append)
    assert isinstance(layer.wi, UnstructuredLinear) and isinstance(layer.wo, UnstructuredLinear)
    assert rows[-1]["layer"] == "" and rows[-1]["density"] == pytest.approx(0.4, abs=0.05)
    np.testing.assert_allclose(layer(x, mask), expected, atol=1e-5)


@pytest.mark.parametrize("tokens", [12, 130])
def test_nan_stays_with_the_tokens_of_its_compressed_expert(tokens):
    layer = experts("silu", True, False)
    stack = layer.wi[...]
    layer.wi[...] = stack.at[3, 0, 0].set(jnp.nan)
    x = jax.random.normal(jax.random.key(3), (tokens, 12))
    expected = layer(x)
    compress(layer, experts=True)
    assert 0 < np.isnan(expected).any(axis=1).sum() < tokens
    np.testing.assert_array_equal(np.isnan(layer(x)).any(axis=1), np.isnan(expected).any(axis=1))


def test_nan_of_a_second_stack_reaches_few_tokens_all_and_many_by_their_expert():
    layer = experts("silu", True, False)
    layer.wo[...] = layer.wo[...].at[3, 0, 0].set(jnp.nan)
    x = jax.random.normal(jax.random.key(3), (130, 12))
    expected = layer(x)
    compress(layer, experts=True)
    np.testing.assert_array_equal(np.isnan(layer(x)).any(axis=1), np.isnan(expected).any(axis=1))
    assert 0 < np.isnan(expected).any(axis=1).sum() < 130 and np.isnan(layer(x[:12])).any(axis=1).all()


@pytest.mark.parametrize("form", ["orbax", "safetensors"])
def test_a_mixtral_with_compressed_experts_comes_back(form, tmp_path):
    model = zero_some(make(MIXTRAL_TINY))
    for layer in model.layers:
        for name in ("wi", "wo"):
            stack = getattr(layer.block_sparse_moe, name)
            stack[...] = jnp.where(np.random.default_rng(0).random(stack.shape) < 0.4, stack[...], 0)
    expected = outputs(model)
    compress(model, experts=True)
    assert len(list(compressed_layers(model))) == 2 * (4 + 2)
    np.testing.assert_allclose(outputs(model), expected, atol=1e-5 * np.abs(expected).max())
    SAVE[form]["mixtral"](model, tmp_path / "a")
    loaded = load_mixtral(tmp_path / "a")
    np.testing.assert_array_equal(outputs(loaded), outputs(model))
    with pytest.raises(ValueError, match="is pruned before it is compressed; got layers.0"):
        prune(loaded, METHODS["magnitude"], sparsity=0.5)


def test_memory_of_a_compressed_mixture_is_estimated():
    """Without biases nothing else has its width; and for many tokens both stacks are made dense."""
    sizes = dataclasses.replace(MIXTRAL_TINY, d_ff=256)
    dense, model = (zero_some(make(sizes)) for _ in range(2))
    compress(model, [("", Treatment(max_density=1.0))], experts=True)
    few, many = ([estimate(m, rows=1, slots=8, tokens=t).activations for m in (dense, model)] for t in (64, 1024))
    hidden, itemsize = 2 * 256, 4
    stacks = sizes.experts * 3 * 256 * sizes.d_model
    assert few[1] == few[0] + 2 * 64 * (sizes.experts - 1) * hidden * itemsize  # every expert takes every token
    assert many[1] >= many[0] + stacks * itemsize


def test_kernels_that_the_sparse_feed_forward_block_reads_are_refused():
    model = zero_some(make(dataclasses.replace(OPT_TINY, sparse_rows=8)))
    with pytest.raises(ValueError, match="with sparse_rows multiplies by its kernels itself.* got layers.0.fc1"):
        compress(model)
    compress(model, [("fc[12]$", None), ("", Treatment())])
    assert len(list(compressed_layers(model))) == 8


# Pruned models


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("config", [OPT_TINY, MIXTRAL_TINY], ids=["opt", "mixtral"])
def test_a_pruned_model_gives_the_masked_model_s_logits(config, method):
    model = make(dataclasses.replace(config, layers=1))
    prune(model, METHODS[method], sparsity=0.6, windows=TOKENS, select="proj|fc")
    masked = outputs(model)
    compress(model)
    layers = dict(compressed_layers(model))
    assert len(layers) == (6 if isinstance(config, OPTConfig) else 4)
    for layer in layers.values():
        assert np.count_nonzero(layer.weights.to_dense()) == pytest.approx(0.4 * 576, abs=15)
    np.testing.assert_allclose(outputs(model), masked, atol=1e-5 * np.abs(masked).max())
    if (method, config) == ("wanda", OPT_TINY):  # it generates what its logits say
        prompt = TOKENS[0, :8].tolist()
        (text,) = generate(model, [prompt], max_new_tokens=4, eos_id=-1)
        tokens = jnp.asarray([prompt + text] * len(TOKENS), jnp.int32)
        assert np.argmax(token_logits(*nnx.split(model), tokens)[0, 7:-1], axis=-1).tolist() == text


# Over several devices

SHARDED = """
import jax, numpy as np
from flax import nnx
from models import OPT, OPTConfig, save_opt
from sparsellm.generation import generate
from sparsellm.mixture_of_experts import LinearRouter, MixtureOfExperts, RouterRule
from sparsellm.sharding import abstract_model
from sparsellm.unstructured import Treatment, apply_all, compress, compressed_layers

config = OPTConfig(vocab_size=64, layers=1, d_model=32, heads=4, d_ff=32, max_length=64, init_std=0.3)
mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
make = lambda: OPT(config, rngs=nnx.Rngs(0))

def masked(model):
    rng = np.random.default_rng(0)
    for _, module in list(nnx.iter_modules(model)):
        if type(module) is nnx.Linear:
            kernel = module.kernel[...]
            mask = rng.random(kernel.shape) < 0.3 * np.linspace(0, 2, kernel.shape[1])  # some parts hold more
            module.kernel[...] = jax.device_put(np.where(mask, kernel, 0), kernel.sharding)
    return model

dense = masked(make())
graphdef, abstract = abstract_model(make, mesh)
shardings = jax.tree.map(lambda x: x.sharding, abstract)
model = nnx.merge(graphdef, jax.device_put(nnx.state(dense), shardings))
compress(model, [("(q_proj|fc2)$", Treatment(max_density=1.0, paired=True)), ("", Treatment(max_density=1.0))])
cuts = {name.split(".")[-1]: layer.cut.dimension for name, layer in compressed_layers(model)}
assert cuts == {"fc1": "out", "fc2": "in", "out_proj": "in", "q_proj": "out", "k_proj": "out", "v_proj": "out"}, cuts
for name, layer in compressed_layers(model):
    own = [x for x in (dense.layers[0], dense.layers[0].self_attn) if hasattr(x, name.split(".")[-1])]
    kernel = getattr(own[0], name.split(".")[-1]).kernel[...]
    np.testing.assert_array_equal(layer.to_dense(), kernel)
    assert (layer.in_features, layer.out_features) == kernel.shape
    for array in jax.tree.leaves(layer.weights):
        assert array.addressable_shards[0].data.shape[0] == 1 and array.shape[0] == 4, array.sharding
alike = [(m.layers[0].fc2, m.layers[0].self_attn.out_proj) for m in (model, dense)]  # cut along their inputs
x = jax.random.normal(jax.random.key(0), (2, 32))
for y, layer in zip(apply_all(alike[0], x), alike[1], strict=True):
    np.testing.assert_allclose(y, layer(x), atol=1e-5)
(text,) = generate(model, [[2, 3]], max_new_tokens=4, eos_id=-1)
tokens = np.asarray([[2, 3, *text]] * 2, np.int32)
expected, out = (nnx.jit(lambda model: model(tokens))(m) for m in (dense, model))
np.testing.assert_allclose(out, expected, atol=1e-5 * np.abs(expected).max())
assert np.argmax(expected[0, 1:-1], axis=-1).tolist() == text
try:
    save_opt(model, folder + "/a")
except ValueError as error:
    assert "must be saved before it is compressed; got layers.0.fc1 cut over 4" in str(error), error
else:
    raise AssertionError("saved")
print("sharded")
"""


def test_each_of_eight_devices_multiplies_its_own_part(tmp_path):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    script = f"folder = {str(tmp_path)!r}\n" + SHARDED
    env = os.environ | flags | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "sharded", done.stderr
    assert not list(tmp_path.iterdir())


def test_neuron_major_layers_are_not_passed_over():
    config = OPTConfig(vocab_size=16, layers=1, d_model=8, heads=2, d_ff=16, max_length=8, neuron_major=True)
    with pytest.raises(ValueError, match="layers.0.fc1 keeps its own neuron-major"):
        compress(OPT(config, rngs=nnx.Rngs(0)))
