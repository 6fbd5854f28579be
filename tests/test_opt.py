import dataclasses
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import OPT, PRESETS, OPTConfig
from models.activations import relu
from models.attention import place_tokens
from models.layers import vocabulary_logits
from models.opt import DecoderLayer
from pallas_kernels import micro_tile_index
from sparsellm.relufication import with_config
from sparsellm.sharding import create_model

TINY = OPTConfig(vocab_size=97, layers=1, d_model=22, heads=2, d_ff=53, max_length=31, init_std=0.3)
POST_NORM = dataclasses.replace(TINY, embed_dim=14, pre_norm=False)  # as 350M

# Counted by transformers on its meta device (OPTForCausalLM, embeddings tied).
PARAMETERS = {
    "125m": 125_239_296,
    "350m": 331_196_416,
    "1.3b": 1_315_758_080,
    "2.7b": 2_651_596_800,
    "6.7b": 6_658_473_984,
    "13b": 12_853_473_280,
    "30b": 29_974_540_288,
    "66b": 65_719_701_504,
    "175b": 174_604_468_224,
}


@jax.jit(static_argnums=0)
def run(graphdef, state, tokens, mask):
    return nnx.merge(graphdef, state)(tokens, mask=mask)


@pytest.fixture(scope="module")
def batch():
    """Seven tokens a row: all real, left-padded, right-padded, one token."""
    tokens = jax.random.randint(jax.random.key(1), (4, 7), 3, TINY.vocab_size)
    first, last = jnp.array([0, 3, 0, 6])[:, None], jnp.array([7, 7, 4, 7])[:, None]
    slots = jnp.arange(7)[None]
    return tokens, (slots >= first) & (slots < last)


def make(config: OPTConfig) -> OPT:
    """A model with random biases and norms too; numpy makes them, since the initialiser takes longer to compile."""
    rng = np.random.default_rng(0)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: OPT(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), state))


@pytest.fixture(scope="module", params=[TINY, POST_NORM], ids=["pre_norm", "post_norm"])
def model(request):
    return make(request.param)


@pytest.mark.parametrize("size", PRESETS)
def test_presets_have_the_published_sizes(size):
    model = nnx.eval_shape(lambda: OPT(OPTConfig.preset(size), rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))) == PARAMETERS[size]


def test_padding_changes_nothing(model):
    """The same four tokens with padding to the left, to the right and on both sides, and alone."""
    alone = jax.random.randint(jax.random.key(2), (1, 4), 3, TINY.vocab_size)
    starts = (0, 3, 1)
    tokens, mask = jnp.ones((3, 7), jnp.int32), jnp.zeros((3, 7), bool)
    for row, start in enumerate(starts):
        tokens = tokens.at[row, start : start + 4].set(alone[0])
        mask = mask.at[row, start : start + 4].set(True)
    expected = run(*nnx.split(model), alone, jnp.ones((1, 4), bool))[0]
    logits = run(*nnx.split(model), tokens, mask)
    for row, start in enumerate(starts):
        np.testing.assert_allclose(logits[row, start : start + 4], expected, atol=2e-5)


def test_tokens_see_no_later_token(model, batch):
    tokens, mask = batch
    changed = tokens.at[:, 4:].set(5)
    before, after = (run(*nnx.split(model), t, jnp.ones_like(mask)) for t in (tokens, changed))
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert not np.allclose(before[:, 4:], after[:, 4:])


@pytest.mark.parametrize("rows", [1, 8, 128])
def test_sparse_feed_forward_equals_dense(model, batch, rows):
    dense = run(*nnx.split(model), *batch)
    sparse = run(*nnx.split(with_config(model, sparse_rows=rows)), *batch)
    np.testing.assert_allclose(sparse, dense, atol=2e-5)


def test_sparse_feed_forward_equals_dense_in_bfloat16(model, batch):
    dense, sparse = (
        run(*nnx.split(with_config(model, dtype="bfloat16", sparse_rows=rows)), *batch) for rows in (None, 8)
    )
    exact = run(*nnx.split(model), *batch)
    assert sparse.dtype == jnp.float32
    scale = np.sqrt(np.mean(np.square(exact)))
    assert np.sqrt(np.mean(np.square(sparse - dense))) < 1e-2 * scale
    assert np.sqrt(np.mean(np.square(sparse - exact))) < 3e-2 * scale


def test_sparse_gradients_equal_dense(model, batch):
    tokens, mask = batch

    def loss(state, graphdef):
        logits = nnx.merge(graphdef, state)(tokens, mask=mask)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(mask, picked, 0))

    grads = []
    for rows in (None, 8):
        graphdef, state = nnx.split(with_config(model, sparse_rows=rows))
        grads.append(jax.jit(jax.grad(loss), static_argnums=1)(state, graphdef))
    for (path, dense), (_, sparse) in zip(*map(nnx.to_flat_state, grads), strict=True):
        assert np.any(dense[...]), path
        np.testing.assert_allclose(sparse[...], dense[...], atol=2e-5 * float(jnp.abs(dense[...]).max() + 1))


def test_captured_activations(batch):
    """Both paths give the ReLU output, which padding leaves zero and which no micro-tile of padding makes live."""
    tokens, mask = batch
    model = make(TINY)
    activations = []
    for rows in (None, 8):
        graphdef, state = nnx.split(with_config(model, sparse_rows=rows))

        @jax.jit
        def captured(state, graphdef=graphdef):
            return nnx.capture(nnx.merge(graphdef, state), nnx.Intermediate)(tokens, mask=mask)[1]

        activations.append(captured(state)["layers"][0]["ffn_activation"][0])
    dense, sparse = map(np.asarray, activations)
    np.testing.assert_allclose(sparse, dense, atol=1e-5)
    assert dense.shape == (28, TINY.d_ff) and (dense >= 0).all() and 0.2 < (dense > 0)[mask.ravel()].mean() < 0.8
    assert not dense[~np.asarray(mask).ravel()].any()
    counts = micro_tile_index(jnp.asarray(dense.T), rows=1).counts
    assert (np.asarray(counts > 0) == np.asarray(mask).ravel()).all()


BLOCKS: dict[str, tuple[dict, Callable]] = {  # choices -> h of the two products, in numpy
    "gelu": ({"activation": "gelu"}, lambda g, u: g * (1 + np.vectorize(math.erf)(g / 2**0.5)) / 2),
    "silu": ({"activation": "silu"}, lambda g, u: g / (1 + np.exp(-g))),
    "swiglu": ({"activation": "silu", "gated": True}, lambda g, u: g / (1 + np.exp(-g)) * u),
    "shifted relu": ({"activation": "shifted_relu"}, lambda g, u: np.maximum(g - 1, 0)),
    "fatrelu": ({"thresholds": (0.7,)}, lambda g, u: np.where(g > 0.7, g, 0)),
    "gated fatrelu": ({"thresholds": (0.7,), "gated": True}, lambda g, u: np.where(g > 0.7, g, 0) * u),
    "drelu": ({"activation": "drelu", "gated": True}, lambda g, u: np.maximum(g, 0) * np.maximum(u, 0)),
}


@pytest.mark.parametrize("block", BLOCKS)
def test_feed_forward_by_its_formula(block):
    """In float64 numpy; dense and, where it has zeros, sparse, with its gradient; padding is zero and live nowhere."""
    choices, formula = BLOCKS[block]
    config = dataclasses.replace(TINY, d_model=12, d_ff=19, **choices)
    rng = np.random.default_rng(1)
    x, mask = rng.normal(size=(2, 5, 12)).astype(np.float32), np.arange(10).reshape(2, 5) % 4 != 3
    x[0, 0] = 0  # biases alone
    results, tokens = [], jnp.zeros(mask.shape, jnp.int32)
    for rows in (None, 8) if choices.get("activation") not in ("gelu", "silu") else (None,):
        layer = make(dataclasses.replace(config, sparse_rows=rows)).layers[0]
        graphdef, state = nnx.split(layer)

        @jax.jit
        def block_and_gradient(state, graphdef=graphdef):
            def loss(state):
                out, captured = nnx.capture(DecoderLayer.feed_forward, nnx.Intermediate)(
                    nnx.merge(graphdef, state), jnp.asarray(x), place_tokens(tokens, jnp.asarray(mask)), jnp.asarray(x)
                )
                return jnp.sum(jnp.sin(out)), (out, captured["ffn_activation"][0])

            (_, found), gradient = jax.value_and_grad(loss, has_aux=True)(state)
            return *found, gradient

        results.append((layer, *block_and_gradient(state)))
    layer, out, h, dense_gradient = results[0]
    wide = lambda linear: (np.asarray(linear.kernel[...], np.float64), np.asarray(linear.bias[...], np.float64))  # noqa: E731
    gate, up, down = (wide(getattr(layer, n)) if hasattr(layer, n) else None for n in ("fc1", "fc1_up", "fc2"))
    assert gate and down and (up is not None) == config.gated
    g = x.astype(np.float64) @ gate[0] + gate[1]
    u = 0.0 if up is None else x.astype(np.float64) @ up[0] + up[1]
    expected = np.where(mask[..., None], formula(g, u), 0)
    for _, out, h, gradient in results:
        np.testing.assert_allclose(h, expected.reshape(10, 19), atol=1e-5)
        np.testing.assert_array_equal(np.asarray(h) == 0, (expected == 0).reshape(10, 19))
        np.testing.assert_allclose(out, expected @ down[0] + down[1], atol=1e-4)
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(dense_gradient), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)
            assert np.isfinite(a).all()


def test_relu_after_the_norms():
    """Stage 2: only what is positive reaches attention and the feed-forward block; the last norm stays as it is."""
    config = dataclasses.replace(TINY, norm_relu=True)
    model, plain = make(config), make(TINY)
    x = jax.random.normal(jax.random.key(3), (1, 5, TINY.d_model))
    layer = plain.layers[0]
    norms = {name: np.maximum(getattr(layer, name)(x), 0) for name in ("self_attn_layer_norm", "final_layer_norm")}
    for name, expected in norms.items():
        np.testing.assert_array_equal(getattr(model.layers[0], name)(x), expected)
    np.testing.assert_array_equal(model.final_layer_norm(x), plain.final_layer_norm(x))
    assert (np.asarray(model.final_layer_norm(x)) < 0).any()
    _, captured = nnx.capture(model.layers[0].final_layer_norm, nnx.Intermediate)(x)
    np.testing.assert_array_equal(captured["norm_activation"][0], norms["final_layer_norm"])


def test_the_gradient_of_relu_is_that_of_its_output():
    x = jnp.array([-2.0, -0.0, 0.0, 1e-37, 3.0, jnp.inf, -jnp.inf])
    y, pull = jax.vjp(relu, x)
    np.testing.assert_array_equal(y, np.maximum(x, 0))
    np.testing.assert_array_equal(pull(jnp.full(7, 5.0))[0], np.where(np.asarray(x) > 0, 5, 0))


def test_nan_is_not_cut_off():
    """A threshold compares; NaN is not below it."""
    x = jnp.zeros((1, 2, TINY.d_model)).at[0, 1].set(jnp.nan)
    places = place_tokens(jnp.zeros((1, 2), jnp.int32))
    for rows in (None, 1):
        layer = make(dataclasses.replace(TINY, thresholds=(0.5,), sparse_rows=rows)).layers[0]
        out = jax.jit(lambda layer: layer.feed_forward(x, places, x))(layer)
        assert np.isnan(out[0, 1]).all() and np.isfinite(out[0, 0]).all()


def test_cache_gives_the_same_logits(model, batch):
    """Five tokens, then one and one, against all seven at once."""
    tokens, mask = batch
    graphdef, state = nnx.split(model)
    advance = jax.jit(lambda state, *args, cache: nnx.merge(graphdef, state)(args[0], mask=args[1], cache=cache))
    cache, parts = model.init_cache(4, 9), []
    for start, stop in ((0, 5), (5, 6), (6, 7)):
        logits, cache = advance(state, tokens[:, start:stop], mask[:, start:stop], cache=cache)
        parts.append(logits)
    full = np.asarray(run(graphdef, state, tokens, mask))
    np.testing.assert_allclose(np.concatenate(parts, axis=1)[mask], full[mask], atol=2e-5)
    assert cache.filled.tolist() == mask.sum(axis=1).tolist()


def test_initialisation_follows_the_paper():
    config = OPTConfig(vocab_size=211, layers=1, d_model=96, heads=2, d_ff=307, max_length=53)
    model = create_model(lambda: OPT(config, rngs=nnx.Rngs(0)))
    layer = model.layers[0]
    for weights, std in (
        (model.embed_tokens.embedding, 0.006),
        (layer.fc1.kernel, 0.006),
        (layer.self_attn.q_proj.kernel, 0.006),
        (layer.fc2.kernel, 0.006 / 2**0.5),
        (layer.self_attn.out_proj.kernel, 0.006 / 2**0.5),
    ):
        assert np.std(weights[...]) == pytest.approx(std, rel=0.05)
    assert not any(np.any(x) for path, x in nnx.to_flat_state(nnx.state(model)) if path[-1] == "bias")


@pytest.mark.parametrize("param_dtype", ["bfloat16", "float16"])
def test_parameters_in_any_dtype(param_dtype, batch):
    config = dataclasses.replace(TINY, param_dtype=param_dtype)
    model = make(config)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(param_dtype)}
    graphdef, state = nnx.split(model)
    in_float32 = jax.tree.map(lambda x: x.astype(jnp.float32), state)
    np.testing.assert_allclose(run(graphdef, state, *batch), run(graphdef, in_float32, *batch), atol=2e-5)


SHARDED = """
import dataclasses, jax, numpy as np
from flax import nnx
from models import OPT, OPTConfig, load_opt, save_hf, save_opt
from sparsellm.relufication import with_config
from sparsellm.sharding import create_model

config = OPTConfig(vocab_size=92, layers=1, d_model=24, heads=4, d_ff=52, max_length=31, init_std=0.3)
mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
make = lambda: OPT(config, rngs=nnx.Rngs(0))
sharded, whole = create_model(make, mesh), create_model(make)
tokens = np.arange(14).reshape(2, 7)
save_hf(sharded, folder + "/hf", max_shard_bytes=9000)
save_opt(sharded, folder + "/native")
models = [sharded, *(load_opt(folder + name, mesh=mesh) for name in ("/hf", "/native"))]
for model in models:
    kernel = model.layers[0].fc2.kernel[...]
    assert tuple(kernel.sharding.spec) == ("model", None), kernel.sharding
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(13, 24)}
    assert model.layers[0].fc1.bias[...].addressable_shards[0].data.shape == (13,)
    assert len(model.final_layer_norm.scale[...].sharding.device_set) == 4
    for (path, a), (_, b) in zip(*(nnx.to_flat_state(nnx.state(m)) for m in (model, whole)), strict=True):
        np.testing.assert_array_equal(np.asarray(a[...]), np.asarray(b[...]), err_msg=str(path))
    np.testing.assert_allclose(np.asarray(model(tokens)), np.asarray(whole(tokens)), atol=1e-5)

ids, table = np.array([[0, 22, 23], [91, -1, 92]]), np.asarray(whole.embed_tokens.embedding[...])
graphdef, state = nnx.split(sharded.embed_tokens)
look_up = lambda state: nnx.merge(graphdef, state)(ids)
with jax.set_mesh(mesh):  # each device looks up its own rows of the table, which a GPU's XLA would gather
    assert "psum" in str(jax.make_jaxpr(look_up)(state))
    rows, to_table = jax.jit(look_up)(state), jax.jit(jax.grad(lambda s: look_up(s)[0].sum()))(state)
np.testing.assert_array_equal(np.asarray(rows)[0], table[ids[0]])
np.testing.assert_array_equal(np.asarray(rows)[1], [table[91], np.full(24, np.nan), np.full(24, np.nan)])
expected = np.isin(np.arange(92), ids[0])[:, None] * np.ones(24)
np.testing.assert_array_equal(np.asarray(jax.tree.leaves(to_table)[0]), expected)

odd = lambda: OPT(dataclasses.replace(config, vocab_size=93), rngs=nnx.Rngs(0))
uncut = create_model(odd, mesh, {"heads": "model", "ffn": "model"})
with jax.set_mesh(mesh):
    np.testing.assert_allclose(np.asarray(uncut(tokens)), np.asarray(odd()(tokens)), atol=1e-5)
try:
    create_model(lambda: OPT(dataclasses.replace(config, d_ff=53), rngs=nnx.Rngs(0)), mesh)
except ValueError as error:
    assert "'model' must divide" in str(error) and "53" in str(error), error
else:
    raise AssertionError("53 neurons over 4 devices")
print("sharded")
"""


def test_sharded_over_four_devices(tmp_path):
    """Born sharded, saved, and loaded sharded, in a process that sees four CPU devices."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    env = os.environ | flags | {"JAX_PLATFORMS": "cpu"}
    script = f"folder = {str(tmp_path)!r}\n" + SHARDED
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "sharded", done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "heads must divide d_model; got heads=3, d_model=22"),
        ({"layers": 0}, "layers must be an integer of at least 1; got layers=0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and less than 1; got dropout=1.0"),
        ({"dropout": -0.1}, "dropout must be at least 0"),
        ({"dropout": math.nan}, "dropout must be at least 0"),
        ({"d_ff": "96"}, "d_ff must be an integer of at least 1; got d_ff='96'"),
        ({"embed_dim": -3}, "embed_dim must be an integer of at least 1; got embed_dim=-3"),
        ({"activation": "tanh"}, "activation must be one of relu, gelu, silu, shifted_relu, drelu; got 'tanh'"),
        ({"activation": "drelu"}, "'drelu' .* needs gated=True"),
        ({"norm_relu": True, "pre_norm": False}, "norm_relu .* needs pre_norm=True"),
        ({"thresholds": (0.1,), "activation": "shifted_relu"}, "need activation 'relu'; got 'shifted_relu'"),
        ({"thresholds": (0.1, 0.2)}, r"thresholds must be 1 finite numbers .*; got thresholds=\(0.1, 0.2\)"),
        ({"thresholds": (-0.1,)}, r"thresholds must be 1 finite numbers of at least 0, one a layer; got"),
        ({"thresholds": (float("nan"),)}, "thresholds must be 1 finite numbers"),
        ({"dtype": "float13"}, "dtype must be one of bfloat16, float16, float32; got 'float13'"),
        ({"param_dtype": "int8"}, "param_dtype must be one of"),
        ({"sparse_rows": 7}, "sparse_rows must be None or one of"),
        ({"sparse_rows": 8, "activation": "gelu"}, "sparse_rows needs exact zeros, so activation relu, .*; got 'gelu'"),
        ({"sparse_rows": 8, "activation": "silu", "gated": True}, "sparse_rows needs exact zeros"),
    ],
)
def test_wrong_configurations(unchecked, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_unknown_preset():
    with pytest.raises(ValueError, match="size must be one of 125m, .*; got '1b'"):
        OPTConfig.preset("1b")


def test_too_many_tokens():
    model = nnx.eval_shape(lambda: OPT(TINY, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="length must be at most max_length=31; got 32"):
        nnx.eval_shape(lambda m: m(jnp.zeros((1, 32), jnp.int32)), model)


def test_float16_once_jitted():
    """XLA has no float16 product on a CPU that accumulates in float32, which the library's attention asks for."""
    model = make(dataclasses.replace(TINY, dtype="float16", param_dtype="float16"))
    graphdef, state = nnx.split(model)
    tokens = jnp.arange(12).reshape(2, 6)
    logits = jax.jit(lambda state: nnx.merge(graphdef, state)(tokens))(state)
    wide = nnx.merge(nnx.graphdef(make(TINY)), jax.tree.map(lambda x: x.astype(jnp.float32), state))
    np.testing.assert_allclose(logits, wide(tokens), atol=2e-2)


@pytest.mark.parametrize("dtype,bound", [("float32", 1e-6), ("bfloat16", 2**-7), ("float16", 2**-11)])
def test_the_gradient_of_logits_is_that_of_a_product(dtype, bound):
    rng = np.random.default_rng(0)
    hidden, table = (rng.normal(size=size).astype(dtype) for size in ((2, 5, 24), (40, 24)))
    cotangent = 2.0**-14 * rng.normal(size=(2, 5, 40)).astype(np.float32)
    logits, backward = jax.vjp(vocabulary_logits, jnp.asarray(hidden), jnp.asarray(table))
    assert logits.dtype == jnp.float32
    wide_hidden, wide_table = hidden.astype(np.float64), table.astype(np.float64)
    np.testing.assert_allclose(logits, wide_hidden @ wide_table.T, rtol=1e-5, atol=1e-5)
    expected = cotangent @ wide_table, np.einsum("blv,bld->vd", cotangent, wide_hidden)
    for found, exact in zip(backward(jnp.asarray(cotangent)), expected, strict=True):
        assert found.dtype == dtype
        error = np.abs(np.asarray(found, np.float64) - exact).max() / np.abs(exact).max()
        assert error < bound


class Sum(nnx.Module):
    """In place of a norm: nothing but the sum before it."""

    def __call__(self, x):
        return x

    def of_sum(self, x, addend):
        return x + addend, x + addend


@pytest.mark.parametrize("pre_norm", [True, False])
def test_dropout_of_each_block_by_its_digits(pre_norm):
    """Where block i gives 4^i for every token, without norms, the digits of the hidden states are the masks."""
    model: Any = make(dataclasses.replace(TINY, layers=2, d_model=64, pre_norm=pre_norm, dropout=0.25))
    nnx.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model)))
    model.embed_tokens.embedding[...] += 0.125
    model.final_layer_norm = Sum()
    for i, layer in enumerate(model.layers):
        layer.self_attn_layer_norm, layer.final_layer_norm = Sum(), Sum()
        for block, linear in enumerate((layer.self_attn.out_proj, layer.fc2)):
            linear.bias[...] += 4.0 ** (2 * i + block)
    graphdef, state = nnx.split(model)
    tokens = jnp.ones((4, 25), jnp.int32)

    @jax.jit
    def hidden(state, key=None):
        rngs = None if key is None else nnx.Rngs(dropout=key)
        return nnx.merge(graphdef, state).hidden_states(tokens, rngs=rngs)[0]

    assert (hidden(state) == 0.125 + 1 + 4 + 16 + 64).all()
    found, again, other = (np.asarray(hidden(state, jax.random.key(seed)), np.float64) for seed in (0, 0, 1))
    np.testing.assert_array_equal(found, again)
    kept = (found - 0.125) * 0.75  # what is kept is divided by its share, so that the mean stays
    digits = np.stack([kept.round(3) // 4**i % 4 for i in range(4)])
    np.testing.assert_allclose(kept, np.einsum("i...,i->...", digits, 4.0 ** np.arange(4)), atol=1e-4)
    masks = np.stack([*digits, *(((other - 0.125) * 0.75).round(3) // 4**i % 4 for i in range(4))])
    assert set(masks.ravel()) == {0, 1}
    blocks, vectors = masks.reshape(8, -1), masks.reshape(-1, 64)
    np.testing.assert_allclose(blocks.mean(axis=1), 0.75, atol=5 * (0.25 * 0.75 / blocks.shape[1]) ** 0.5)
    np.testing.assert_allclose(np.corrcoef(blocks), np.eye(8), atol=0.07)  # no block's is another's, ...
    assert len(np.unique(vectors, axis=0)) == len(vectors)  # no token's, ...
    assert len(np.unique(vectors.T, axis=0)) == 64  # and no feature's


def test_dropout_of_nothing_or_without_rngs_changes_no_bit(model, batch):
    tokens, mask = batch
    dropping = with_config(model, dropout=0.5)

    @jax.jit(static_argnums=0)
    def with_rngs(graphdef, state):
        return nnx.merge(graphdef, state)(tokens, mask=mask, rngs=nnx.Rngs(0))

    expected = run(*nnx.split(model), tokens, mask)
    np.testing.assert_array_equal(run(*nnx.split(dropping), tokens, mask), expected)
    np.testing.assert_array_equal(with_rngs(*nnx.split(model)), expected)
    assert not np.allclose(with_rngs(*nnx.split(dropping))[mask], expected[mask], atol=0.1)
    assert all(type(variable) is nnx.Param for _, variable in nnx.to_flat_state(nnx.state(dropping)))


@pytest.mark.parametrize("filled", [1, 3])
def test_padding_behind_a_row_alone_is_seen_by_nobody(filled):
    """Between its tokens, and in a cache that has just room for them."""
    graphdef, state = nnx.split(make(TINY))
    step = jax.jit(lambda state, *args, **given: nnx.merge(graphdef, state)(*args, **given))
    tokens = jnp.array([[5, 6, 7, 8]])
    expected = step(state, tokens)
    cache = nnx.merge(graphdef, state).init_cache(1, 4)
    for i in range(4):
        logits, cache = step(state, tokens[:, i : i + 1], cache=cache)
        np.testing.assert_allclose(logits[0, 0], expected[0, i], atol=1e-5)
        if i + 1 == filled:
            _, cache = step(state, jnp.array([[9]]), mask=jnp.array([[False]]), cache=cache)
            assert cache.filled.tolist() == [filled]
