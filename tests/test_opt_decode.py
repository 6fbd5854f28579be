"""Decoding over predicted neurons: models/feed_forward.py and `with_predictors`, against plain formulas."""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import OPT, OPTConfig, load_opt, save_hf, save_opt
from models.opt import with_layout, with_predictors
from pallas_kernels.workbench.gpus import GPUS, targeting
from sparsellm.generation import generate
from sparsellm.predictors import LowRankPredictor, with_input_thresholds
from sparsellm.serving import Request, serve
from sparsellm.unstructured import Treatment, compress

CONFIG = OPTConfig(vocab_size=61, layers=2, d_model=16, heads=2, d_ff=48, max_length=64, neuron_major=True)
PROMPTS = [[2, 9, 31], [2, 40], [2, 5, 17, 23, 8]]


def make(config: OPTConfig = CONFIG) -> OPT:
    """Random weights, biases and norms by numpy, which compiles nothing; negative biases, so that neurons rest."""
    rng = np.random.default_rng(0)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: OPT(config, rngs=nnx.Rngs(0))))
    model = nnx.merge(graphdef, jax.tree.map(lambda x: jnp.asarray(0.4 * rng.normal(size=x.shape), x.dtype), state))
    for layer in model.layers:
        layer.fc1.bias[...] = layer.fc1.bias[...] - 1
    return model


def predictors(model: OPT, kind: str, *, look_ahead: bool = False) -> list[LowRankPredictor]:
    """ "oracle": true firing, from fc1 itself; "all", "none": of every neuron; "random": about a third of them."""
    rng, found = np.random.default_rng(1), []
    for layer in model.layers:
        kernel, bias = layer.fc1.kernel[...], layer.fc1.bias[...]
        arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((kernel.shape[0], 3), (3, len(bias)))]
        if kind == "oracle":
            arrays = [kernel, jnp.eye(len(bias)), bias]
        threshold = {"oracle": 0.0, "all": -np.inf, "none": np.inf, "random": 3.0}[kind]
        found.append(LowRankPredictor.from_arrays(*arrays, threshold=threshold, look_ahead=look_ahead))
    return found


@pytest.fixture(scope="module")
def model():
    return make()


def head_predictors(model: OPT, kind: str) -> list[LowRankPredictor | None]:
    """Of "all" heads, of "none", or of a "random" half; layer 1's sees what enters layer 0, as layer 0's does."""
    rng = np.random.default_rng(3)
    shapes = (16, 3), (3, model.config.heads)
    arrays = [[jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes] for _ in model.layers]
    threshold = {"all": -np.inf, "none": np.inf, "random": 0.0}[kind]
    return [
        LowRankPredictor.from_arrays(*pair, threshold=threshold, look_ahead=i == 1) for i, pair in enumerate(arrays)
    ]


def numpy_logits(model: OPT, rows: list[list[int]], masks, heads=None) -> list[np.ndarray]:
    """Logits of the last token of each row by float64 numpy.

    For it, neurons outside of `masks[layer]` are silent, and so are heads outside of `heads[layer][row]`.
    """
    p = {path: np.asarray(v[...], np.float64) for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}

    def get(*path):
        return p[path]

    def norm(x, *path):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * get(*path, "scale") + get(*path, "bias")

    out = []
    for row, tokens in enumerate(rows):
        n = len(tokens)
        x = get("embed_tokens", "embedding")[tokens] + get("embed_positions", "embedding")[2 : 2 + n]
        for i in range(model.config.layers):
            at = ("layers", i)
            y = norm(x, *at, "self_attn_layer_norm")
            q, k, v = (
                (y @ get(*at, "self_attn", f"{c}_proj", "kernel") + get(*at, "self_attn", f"{c}_proj", "bias")).reshape(
                    n, model.config.heads, -1
                )
                for c in "qkv"
            )
            scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
            scores = np.where(np.tril(np.ones((n, n), bool)), scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            y = np.einsum("hqk,khd->qhd", weights, v)
            y[-1] *= 1 if heads is None else heads[i][row][:, None]
            x = (
                x
                + y.reshape(n, -1) @ get(*at, "self_attn", "out_proj", "kernel")
                + get(*at, "self_attn", "out_proj", "bias")
            )
            y = norm(x, *at, "final_layer_norm")
            h = np.maximum(y @ get(*at, "fc1", "weight").T + get(*at, "fc1", "bias"), 0)
            h[-1] *= masks[i]
            x = x + h @ get(*at, "fc2", "kernel") + get(*at, "fc2", "bias")
        out.append(norm(x, "final_layer_norm")[-1] @ get("embed_tokens", "embedding").T)
    return out


@jax.jit(static_argnums=0)
def decode_once(graphdef, state, prompts, last):
    """Prompts of one length, then one token a row: logits of that token."""
    model = nnx.merge(graphdef, state)
    _, cache = model(prompts, cache=model.init_cache(prompts.shape[0], prompts.shape[1] + 1))
    return model(last, cache=cache)[0][:, 0]


def test_lists_that_hold_every_firing_neuron_generate_the_tokens_of_dense_decoding(model):
    """By true firing, and by lists of all; which of both is data, so it compiles once."""
    dense = generate(model, PROMPTS, max_new_tokens=12, eos_id=-1)
    for threshold in (0.0, -np.inf):
        oracle = predictors(model, "oracle")
        for predictor in oracle:
            predictor.threshold.set_value(jnp.float32(threshold))
        assert dense == generate(with_predictors(model, oracle), PROMPTS, max_new_tokens=12, eos_id=-1)


@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("prediction", ["lists", "mask"])
@pytest.mark.parametrize("kind", ["random", "none"])
def test_a_batch_computes_the_union_of_what_its_rows_need_or_each_row_its_own(model, kind, prediction, per_sequence):
    """Against float64 numpy; a K of 0 leaves the bias of fc2."""
    rows = [[2, 9, 31, 7, 5], [2, 40, 3, 3, 19]]
    tokens = jnp.array(rows)
    chosen = predictors(model, kind, look_ahead=True)
    # What the predictor of layer 0 sees is plain; layer 1's takes all or nothing, whatever it sees.
    chosen[1].threshold.set_value(jnp.float32(-np.inf if kind == "random" else np.inf))
    predicted = with_predictors(model, chosen, prediction, per_sequence=per_sequence)
    logits = decode_once(*nnx.split(predicted), tokens[:, :-1], tokens[:, -1:])
    embedding, positions = (
        np.asarray(e.embedding[...], np.float64) for e in (model.embed_tokens, model.embed_positions)
    )
    entering = embedding[[row[-1] for row in rows]] + positions[2 + 4]
    scores = entering @ np.asarray(chosen[0].down[...], np.float64) @ np.asarray(chosen[0].up[...], np.float64)
    own = scores > float(chosen[0].threshold[...])
    union = own.any(axis=0)
    assert 0 < own[0].sum() < union.sum() < 48 if kind == "random" else not union.any()
    for row, tokens_of_row in enumerate(rows):
        masks = [own[row] if per_sequence else union, np.full(48, kind == "random")]
        np.testing.assert_allclose(logits[row], numpy_logits(model, [tokens_of_row], masks)[0], atol=2e-4)


def test_by_its_own_neurons_a_prompt_is_continued_as_if_alone(model):
    """By lists, served too, and by their simulation; by the union of a batch it is not."""
    continued: Any = functools.partial(generate, max_new_tokens=12, eos_id=-1)
    chosen = predictors(model, "random", look_ahead=True)
    union, lists = (with_predictors(model, chosen, per_sequence=per_sequence) for per_sequence in (False, True))
    mask = with_predictors(model, chosen, "mask", per_sequence=True)
    alone = [continued(union, [prompt])[0] for prompt in PROMPTS]
    assert alone == continued(lists, PROMPTS) == continued(mask, PROMPTS)
    requests = [Request(prompt=prompt, max_new_tokens=12, eos_id=-1) for prompt in PROMPTS]
    served = serve(lists, requests, rows=2, cache_length=24, steps=4, prefill_sizes=(24,))
    assert alone == [answer.tokens for answer in served]
    assert alone != continued(union, PROMPTS)


def test_a_row_that_has_ended_has_no_neurons_of_its_own(model):
    predicted = with_predictors(model, predictors(model, "random"), per_sequence=True)
    tokens, mask = jnp.array([[7], [9], [40]]), jnp.array([[True], [False], [True]])

    @jax.jit(static_argnums=0)
    def listed(graphdef, state):
        model = nnx.merge(graphdef, state)
        _, captured = nnx.capture(model, nnx.Intermediate)(tokens, mask=mask, cache=model.init_cache(3, 8))
        return captured["layers"][0]["ffn_predicted"][0]

    fires = np.asarray(listed(*nnx.split(predicted)))
    assert fires.shape == (3, 1, 48) and not fires[1].any() and fires[0].any() and (fires[0] != fires[2]).any()


@pytest.fixture(scope="module")
def four_heads():
    return make(dataclasses.replace(CONFIG, heads=4))


def head_lists(model: OPT, tokens, position: int) -> list[np.ndarray]:
    """Of each layer, which heads the "random" predictors name for these tokens, by numpy."""
    tables = model.embed_tokens.embedding[...][np.array(tokens)], model.embed_positions.embedding[2 + position]
    entering = np.asarray(tables[0], np.float64) + np.asarray(tables[1], np.float64)
    return [
        entering @ np.asarray(p.down[...], np.float64) @ np.asarray(p.up[...], np.float64) > 0
        for p in head_predictors(model, "random")
        if p is not None
    ]


@jax.jit(static_argnums=0)
def decode_twice(graphdef, state, prompts, last):
    """Prompts of one length, then two tokens a row: the cache."""
    model = nnx.merge(graphdef, state)
    _, cache = model(prompts, cache=model.init_cache(prompts.shape[0], prompts.shape[1] + 2))
    _, cache = model(last[:, :1], cache=cache)
    return model(last[:, 1:], cache=cache)[1]


def test_lists_of_all_heads_generate_the_tokens_of_dense_decoding(model):
    dense = generate(model, PROMPTS, max_new_tokens=12, eos_id=-1)
    listed = with_predictors(model, None, head_predictors=head_predictors(model, "all"))
    assert dense == generate(listed, PROMPTS, max_new_tokens=12, eos_id=-1)


@pytest.mark.parametrize("prediction", ["lists", "mask"])
def test_each_row_attends_by_its_own_heads(four_heads, prediction):
    """Against float64 numpy, whose other heads are silent for the last token."""
    rows = [[2, 9, 31, 7, 5], [2, 40, 3, 3, 19], [2, 8, 8, 1, 44]]
    lists = head_lists(four_heads, [row[-1] for row in rows], 4)
    assert all(0 < x.sum() < x.size for x in lists) and len(np.unique(np.concatenate(lists, axis=1), axis=0)) > 1
    predicted = with_predictors(four_heads, None, prediction, head_predictors=head_predictors(four_heads, "random"))
    tokens = jnp.array(rows)
    logits = decode_once(*nnx.split(predicted), tokens[:, :-1], tokens[:, -1:])
    np.testing.assert_allclose(logits, numpy_logits(four_heads, rows, [1, 1], lists), atol=2e-4)


def test_the_cache_of_heads_that_are_skipped_is_kept(four_heads):
    """A head that no token reads has the keys and values it always has, so that a later token may."""
    tokens = jnp.array([[2, 9, 31, 7, 5], [2, 40, 3, 3, 19]])
    chosen = head_predictors(four_heads, "none")
    chosen[1] = None
    lists = with_predictors(four_heads, None, head_predictors=chosen)
    expected, found = (decode_twice(*nnx.split(m), tokens[:, :3], tokens[:, 3:]) for m in (four_heads, lists))
    for name in ("keys", "values"):
        dense, listed = (getattr(cache, name) for cache in (expected, found))
        np.testing.assert_array_equal(listed[0], dense[0])  # layer 0 sees the same, and skips all its heads
        assert not np.allclose(listed[1], dense[1])


def test_projections_that_are_compressed_are_multiplied_whole(four_heads):
    """Those have no heads to read alone; attention between them still goes by lists."""
    compressed = compress(
        with_layout(four_heads, neuron_major=False), [("q_proj|out_proj", Treatment(max_density=1.0))]
    )
    assert type(compressed.layers[0].self_attn.q_proj) is not nnx.Linear
    tokens, found = jnp.array([[2, 9, 31, 7, 5], [2, 40, 3, 3, 19]]), []
    for model in (four_heads, compressed):
        listed = with_predictors(model, None, head_predictors=head_predictors(four_heads, "random"))
        found.append(decode_once(*nnx.split(listed), tokens[:, :-1], tokens[:, -1:]))
    np.testing.assert_allclose(*found, atol=2e-4)


def test_lists_are_of_dense_layers(four_heads):
    """Of others a simulation; and the layout is chosen before."""
    usual = with_layout(four_heads, neuron_major=False)
    cut = with_input_thresholds(usual, np.arange(12).reshape(2, 6), 0.5, select="fc2")
    compressed = compress(with_layout(four_heads, neuron_major=False), [("fc1", Treatment(max_density=1.0))])
    for model, name in ((cut, "fc2 is a ThresholdedLinear"), (compressed, "fc1 is a UnstructuredLinear")):
        with pytest.raises(ValueError, match=f'"lists" takes dense layers .*; layers.0.{name}'):
            with_predictors(model, predictors(usual, "all"))
        listed = with_predictors(model, predictors(usual, "all"), "mask")
        tokens = jnp.array([[2, 9, 31, 7, 5], [2, 40, 3, 3, 19]])
        found = [decode_once(*nnx.split(m), tokens[:, :-1], tokens[:, -1:]) for m in (model, listed)]
        np.testing.assert_allclose(*found, atol=1e-4)
        with pytest.raises(ValueError, match="of a dense model can be changed, not of one whose layers.0.fc"):
            with_layout(model, neuron_major=True)


@pytest.mark.parametrize("batch,listed", [(2, True), (32, True), (33, False)])
def test_projections_of_listed_heads_have_a_kernel_on_a_gpu(batch, listed):
    config = OPTConfig.preset("30b", layers=1, vocab_size=64, dtype="bfloat16", param_dtype="bfloat16")
    model = nnx.eval_shape(lambda: OPT(config, rngs=nnx.Rngs(0)))
    predictor = nnx.eval_shape(lambda: LowRankPredictor(config.d_model, 4, config.heads, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(with_predictors(model, None, head_predictors=[predictor]))
    cache = jax.eval_shape(lambda: model.init_cache(batch, 64))
    with targeting(GPUS[0]):
        run = jax.make_jaxpr(lambda state, tokens, cache: nnx.merge(graphdef, state)(tokens, cache=cache))
        program = str(run(state, jax.ShapeDtypeStruct((batch, 1), jnp.int32), cache))
    for axis in ("columns", "rows"):
        assert (f"listed_matmul_{axis}" in program) == listed


def test_everywhere_each_token_keeps_its_own_heads(four_heads):
    """All tokens at once, under masks, as one after the other by lists."""
    tokens = jnp.array([[2, 9, 31], [2, 40, 3]])
    everywhere, lists = (
        with_predictors(four_heads, None, p, head_predictors=head_predictors(four_heads, "random"))
        for p in ("mask_everywhere", "lists")
    )
    step = jax.jit(lambda graphdef, *args: nnx.merge(graphdef, args[0])(args[1], cache=args[2]), static_argnums=0)
    cache, one_by_one = four_heads.init_cache(2, 3), []
    for i in range(3):
        logits, cache = step(*nnx.split(lists), tokens[:, i : i + 1], cache)
        one_by_one.append(logits)
    run = jax.jit(lambda graphdef, state: nnx.merge(graphdef, state)(tokens), static_argnums=0)
    np.testing.assert_allclose(run(*nnx.split(everywhere)), jnp.concatenate(one_by_one, axis=1), atol=1e-4)


def test_predictors_of_heads_of_another_model_are_refused(four_heads):
    fitting = head_predictors(four_heads, "all")
    with pytest.raises(ValueError, match="head_predictors must be one, or None, for each of 2 layers; got 1"):
        with_predictors(four_heads, None, head_predictors=fitting[:1])
    other = make(dataclasses.replace(CONFIG, layers=1, heads=2))
    with pytest.raises(ValueError, match="head_predictor 0 must be of d_model=16 and 2 heads; got 16 and 4: a pred"):
        with_predictors(other, None, head_predictors=fitting[:1])


def test_everywhere_each_token_keeps_its_own_neurons(model):
    """By the captured activations: of every token of a prompt, what is not predicted for it alone is zero."""
    tokens = jnp.array([[2, 9, 31, 7], [2, 40, 3, 19]])
    predicted = with_predictors(model, predictors(model, "random", look_ahead=True), "mask_everywhere")

    @jax.jit(static_argnums=0)
    def activations(graphdef, state):
        _, captured = nnx.capture(nnx.merge(graphdef, state), nnx.Intermediate)(tokens)
        return captured["layers"][0]["ffn_activation"][0]

    dense, masked = (np.asarray(activations(*nnx.split(m))) for m in (model, predicted))
    entering = model.embed_tokens.embedding[...][tokens] + model.embed_positions.embedding[...][2:6][None]
    predictor: Any = predicted.layers[0].predictor
    scores = np.asarray(entering, np.float64) @ np.asarray(predictor.down[...]) @ np.asarray(predictor.up[...])
    fires = (scores > 3).reshape(dense.shape)
    assert 0.1 < fires.mean() < 0.6 and len(np.unique(fires, axis=0)) > 4
    np.testing.assert_allclose(masked, dense * fires, atol=1e-5)


@pytest.mark.parametrize("tokens", [[[2, 9, 31, 7], [2, 40, 3, 19]], [[7], [9]]])
def test_prompts_are_read_with_every_neuron(model, tokens):
    """Also where "lists" name none: only calls with one token a row, behind a cache, read them."""
    tokens = jnp.array(tokens)
    run = jax.jit(lambda graphdef, state: nnx.merge(graphdef, state)(tokens), static_argnums=0)
    dense, predicted = (run(*nnx.split(m)) for m in (model, with_predictors(model, predictors(model, "none"))))
    np.testing.assert_array_equal(dense, predicted)


@pytest.mark.parametrize("batch,listed", [(32, True), (33, False)])
def test_more_rows_than_a_list_serves_are_computed_densely(model, batch, listed):
    predicted = with_predictors(model, predictors(model, "none"))
    tokens = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    jaxpr = str(jax.make_jaxpr(lambda tokens: predicted(tokens, cache=predicted.init_cache(batch, 8)))(tokens))
    assert ("neuron_ffn" in jaxpr) == listed


@pytest.mark.parametrize("activation", ["gelu", "shifted_relu"])
def test_other_activations_are_the_same_by_lists(activation):
    model = make(dataclasses.replace(CONFIG, layers=1, activation=activation))
    predicted = with_predictors(model, predictors(model, "all"))
    run = jax.jit(lambda graphdef, state: nnx.merge(graphdef, state)(jnp.array([[2], [7]])), static_argnums=0)
    np.testing.assert_allclose(run(*nnx.split(predicted)), run(*nnx.split(model)), atol=2e-5)


def test_the_parameters_are_shared_and_the_model_is_left_as_it_was(model):
    predicted = with_predictors(model, predictors(model, "all"))
    assert predicted.layers[0].fc1.weight[...] is model.layers[0].fc1.weight[...]
    assert model.layers[0].predictor is None
    assert len(jax.tree.leaves(nnx.state(predicted, nnx.Param))) == len(jax.tree.leaves(nnx.state(model)))


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda found: found[:1], "one, or None, for each of 2 layers; got 1: those of another model"),
        (
            lambda found: [None, LowRankPredictor(16, 2, 47, rngs=nnx.Rngs(0))],
            "predictor 1 must be of d_model=16 and 48 neurons; got 16 and 47: a predictor of another model",
        ),
        (lambda found: [LowRankPredictor(8, 2, 48, rngs=nnx.Rngs(0)), None], "predictor 0 must be of d_model=16"),
    ],
)
def test_predictors_of_another_model_are_refused(model, change, message):
    with pytest.raises(ValueError, match=message):
        with_predictors(model, change(predictors(model, "all")))


def test_what_lists_cannot_do_is_refused(model, unchecked):
    with pytest.raises(ValueError, match="prediction must be one of lists, mask, mask_everywhere; got 'list'"):
        with_predictors(model, [None, None], "list")  # pyright: ignore[reportArgumentType]
    gated = nnx.eval_shape(lambda: OPT(dataclasses.replace(CONFIG, gated=True), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="without gate and thresholds; got activation='relu', gated=True"):
        with_predictors(gated, [None, None])
    assert with_predictors(gated, [None, None], "mask").config.gated


def test_layouts_hold_the_same(model, tmp_path):
    """Neuron-major or not: in memory, and through both formats, each saved in one layout and loaded in either."""
    usual = with_layout(model, neuron_major=False)
    kernel = usual.layers[1].fc1.kernel[...]
    np.testing.assert_array_equal(kernel, model.layers[1].fc1.weight[...].T)
    again = with_layout(with_predictors(model, predictors(model, "all")), neuron_major=True)
    assert again.layers[1].fc1.weight[...] is model.layers[1].fc1.weight[...]  # not copied
    assert again.layers[1].predictor is None is usual.layers[1].predictor
    save_hf(model, tmp_path / "hf")
    save_hf(usual, tmp_path / "usual")
    assert (tmp_path / "hf/model.safetensors").read_bytes() == (tmp_path / "usual/model.safetensors").read_bytes()
    save_opt(model, tmp_path / "native")
    for folder in ("hf", "native"):
        for neuron_major in (False, True):
            loaded = load_opt(tmp_path / folder, neuron_major=neuron_major)
            assert loaded.config.neuron_major == neuron_major
            expected = nnx.to_flat_state(nnx.state(model if neuron_major else usual))
            for (path, a), (other, b) in zip(nnx.to_flat_state(nnx.state(loaded)), expected, strict=True):
                assert path == other
                np.testing.assert_array_equal(a[...], b[...])
    tokens = jnp.array([[2, 9, 31, 7]])
    run = jax.jit(lambda graphdef, state: nnx.merge(graphdef, state)(tokens), static_argnums=0)
    lists = with_predictors(usual, predictors(usual, "all"))
    np.testing.assert_allclose(run(*nnx.split(lists))[:, -1], run(*nnx.split(model))[:, -1], atol=2e-5)


SHARDED = """
import jax, numpy as np
from flax import nnx
from models import OPT, OPTConfig, with_predictors
from sparsellm.predictors import LowRankPredictor
from sparsellm.sharding import create_model

mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
sizes = {"vocab_size": 64, "layers": 1, "d_model": 16, "heads": 2, "d_ff": 48, "max_length": 64}
config = OPTConfig(**sizes, neuron_major=True, init_std=0.3)
predictor = LowRankPredictor(16, 3, 48, threshold=0.2, look_ahead=True, rngs=nnx.Rngs(1))
heads = LowRankPredictor(16, 3, 2, rngs=nnx.Rngs(1))
results = []
for per_sequence in (False, True):
    whole, cut = (
        nnx.split(with_predictors(
            create_model(lambda: OPT(config, rngs=nnx.Rngs(0)), devices), [predictor], head_predictors=[heads],
            per_sequence=per_sequence,
        ))
        for devices in (None, mesh)
    )
    cache = nnx.merge(*whole).init_cache(2, 3)
    cache = cache._replace(keys=(cache.keys[0] + 1,), values=(cache.values[0] + 1,), filled=cache.filled + 1)
    run = jax.jit(lambda graphdef, state, tokens: nnx.merge(graphdef, state)(tokens, cache=cache)[0], static_argnums=0)
    tokens = np.array([[2], [40]])
    expected = run(*whole, tokens)
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(run(*cut, tokens), expected, atol=1e-5)
        program = run.lower(*cut, tokens).compile().as_text()
    for shape in ("48,16", "16,16"):
        assert f"f32[{shape}]" not in program, "the weights are gathered"
    results.append(expected)
assert not np.allclose(*results, atol=1e-3), "rows have no neurons of their own"
print("sharded")
"""


def test_each_of_two_devices_computes_its_own_neurons():
    """Of the lists, in a process that sees two CPU devices."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    env = os.environ | flags | {"JAX_PLATFORMS": "cpu"}
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", SHARDED]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "sharded", done.stderr
