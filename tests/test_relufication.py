import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import OPT, OPTConfig, load_opt, save_hf, save_opt
from sparsellm.relufication import (
    fatrelu_thresholds,
    gate_activations,
    relufy,
    thresholds_for_perplexity,
    with_config,
)
from sparsellm.training import next_token_objective

CONFIG = OPTConfig(vocab_size=61, layers=2, d_model=12, heads=2, d_ff=20, max_length=16, activation="silu", gated=True)


def make(**changes) -> OPT:
    """Random parameters by numpy, which takes less long than to compile the initialiser; biases too."""
    config, rng = dataclasses.replace(CONFIG, **changes), np.random.default_rng(0)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: OPT(config, rngs=nnx.Rngs(0))))
    model = nnx.merge(graphdef, jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), state))
    for layer in model.layers:
        layer.fc2.kernel[...] = 3 * layer.fc2.kernel[...]  # a network whose feed-forward blocks matter
    return model


@pytest.fixture(scope="module")
def model():
    return relufy(make())


@pytest.fixture(scope="module")
def windows(model):
    """What the model itself would write, so that it is good at it, and worse with anything missing."""
    tokens = np.random.default_rng(1).integers(3, 61, (4, 9)).astype(np.int32)
    for last in range(8):
        tokens[:, last + 1] = run(model, tokens[:, :-1])[0][:, last].argmax(-1)
    return tokens


@pytest.fixture(scope="module")
def gates(model, windows):
    return gate_activations(model, windows[:, :-1], batch=2)


@functools.partial(jax.jit, static_argnums=0)
def _run(graphdef, params, tokens):
    logits, captured = nnx.capture(nnx.merge(graphdef, params), nnx.Intermediate)(tokens)
    layers = captured["layers"]
    names = ("ffn_gate", "ffn_activation")
    return logits, [{name: layers[i][name][0] for name in names if name in layers[i]} for i in sorted(layers)]


def run(model, tokens) -> tuple[np.ndarray, list[dict]]:
    """Logits, and what each layer captures, in float64."""
    found = _run(*nnx.split(model), jnp.asarray(tokens))
    return jax.tree.map(lambda x: np.asarray(x, np.float64), found)


def cross_entropy(model, windows) -> float:
    """In float64 numpy, of the model's logits."""
    logits, _ = run(model, windows[:, :-1])
    nats = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, windows[:, 1:, None], -1)[..., 0]
    return float(nats.mean())


def test_the_parameters_stay_and_the_activation_goes(windows):
    source = make()
    model = relufy(source, activation="drelu", norm_relu=True)
    assert model.config == dataclasses.replace(CONFIG, activation="drelu", norm_relu=True)
    before, after = (nnx.to_flat_state(nnx.state(m)) for m in (source, model))
    assert all(a[...] is b[...] for (_, a), (_, b) in zip(before, after, strict=True))
    assert source.config == CONFIG
    assert relufy(source, thresholds=0.25).config.thresholds == (0.25, 0.25)
    assert relufy(source, thresholds=[0.25, 0.0]).config.thresholds == (0.25, 0.0)


def test_a_model_without_negative_inputs_does_not_change(windows):
    """Far above zero, SiLU and FATReLU are the identity."""
    source = make(gated=False, layers=1)
    for layer in source.layers:
        layer.fc1.bias[...] = layer.fc1.bias[...] + 40
    expected, _ = run(source, windows)
    np.testing.assert_allclose(run(relufy(source, thresholds=10.0), windows)[0], expected, rtol=1e-4, atol=1e-4)
    for changed in (relufy(source, activation="shifted_relu"), relufy(source, norm_relu=True)):
        assert not np.allclose(run(changed, windows)[0], expected, rtol=1e-4, atol=1e-4)


def test_a_relufied_model_learns(windows):
    graphdef, params = nnx.split(relufy(make(layers=1), activation="drelu", norm_relu=True), nnx.Param)

    @jax.jit
    @jax.grad
    def gradient_of(params):
        return next_token_objective(nnx.merge(graphdef, params), jnp.asarray(windows), 0)[0]

    gradient = gradient_of(params)
    for path, g in nnx.to_flat_state(gradient):
        assert np.isfinite(g[...]).all() and (np.any(g[...]) or "k_proj" in path), path  # a softmax sees no key's bias


def test_gates_are_the_relu_outputs(model, gates, windows):
    """In the order of size, of every layer, before they are multiplied."""
    for found, layer in zip(gates, run(model, windows[:, :-1])[1], strict=True):
        np.testing.assert_allclose(found, np.sort(layer["ffn_gate"].ravel()), rtol=1e-5, atol=1e-5)
        assert not np.allclose(found, np.sort(layer["ffn_activation"].ravel()))


def test_a_model_without_a_gate_and_one_that_runs_sparse(windows):
    source = relufy(make(gated=False, layers=1))
    expected = gate_activations(source, windows, batch=4)[0]
    np.testing.assert_allclose(expected, np.sort(run(source, windows)[1][0]["ffn_activation"].ravel()))
    found = gate_activations(with_config(source, sparse_rows=8), windows, batch=4)[0]
    np.testing.assert_array_equal(found, expected)


def gate(*values: float) -> jax.Array:
    return jnp.asarray(np.sort(np.array(values, np.float32)))


@pytest.mark.parametrize("density", [0.0, 0.001, 0.1, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("kind", ["distinct", "ties", "half zeros", "all zeros", "all equal", "one"])
def test_thresholds_are_quantiles(kind, density):
    """The lowest value that at most this share is above: numpy's quantile of all values, where zero is not reached."""
    rng = np.random.default_rng(3)
    values = {
        "distinct": rng.permutation(1 + np.arange(40.0)),
        "ties": rng.integers(1, 4, 40).astype(float),
        "half zeros": np.maximum(rng.normal(size=40), 0),
        "all zeros": np.zeros(40),
        "all equal": np.full(40, 2.5),
        "one": np.array([0.75]),
    }[kind]
    (threshold,) = fatrelu_thresholds([gate(*values)], density)
    wide = np.array(values, np.float32).astype(np.float64)
    candidates = [t for t in (0.0, *wide) if (wide > t).mean() <= density]
    assert threshold == min(candidates)
    if density not in (0.001, 1.0):
        assert threshold == np.quantile(wide, 1 - density, method="inverted_cdf")


def test_one_threshold_for_all_layers(model, gates, windows):
    """That of all layers' activations together; otherwise layers know nothing of each other."""
    assert fatrelu_thresholds([gate(0, 1, 2, 3), gate(0, 0, 7, 8, 9, 10)], 0.5) == (1, 7)
    together = gate_activations(model, windows[:, :-1], batch=4, per_layer=False)
    threshold, other = fatrelu_thresholds(together, 0.2)
    pooled = np.concatenate([np.asarray(layer, np.float64) for layer in gates])
    assert threshold == other == pytest.approx(np.quantile(pooled, 0.8, method="inverted_cdf"), rel=1e-5)


def test_thresholds_give_the_density_in_the_first_layer(model, gates, windows):
    """In later ones about: what they get has changed."""
    density = 0.2
    _, found = run(relufy(model, thresholds=fatrelu_thresholds(gates, density)), windows[:, :-1])
    share = [(layer["ffn_gate"] > 0).mean() for layer in found]
    assert share[0] == int(density * gates[0].size) / gates[0].size
    assert share[1] == pytest.approx(density, abs=0.1)


def test_thresholds_for_a_perplexity(model, gates, windows):
    """It rises by no more than allowed, and at the next lower density that was tried by more."""
    allowed = cross_entropy(model, windows) + math.log(1.4)
    found = thresholds_for_perplexity(model, gates, windows, 0.4, batch=2, halvings=6)
    assert all(t > 0 for t in found)
    assert cross_entropy(relufy(model, thresholds=found), windows) <= allowed
    step = max(float((gate > 0).mean()) for gate in gates) / 2**6
    (density,) = (k * step for k in range(65) if fatrelu_thresholds(gates, k * step) == found)
    lower = fatrelu_thresholds(gates, density - step)
    assert cross_entropy(relufy(model, thresholds=lower), windows) > allowed


def test_any_perplexity_allowed_cuts_everything_and_none_cuts_nothing(model, gates, windows):
    largest = tuple(float(gate[-1]) for gate in gates)
    assert thresholds_for_perplexity(model, gates, windows, 1e9, batch=2, halvings=12) == largest
    assert thresholds_for_perplexity(model, gates, windows, 0.0, batch=2, halvings=2) == (0.0, 0.0)


def test_native_checkpoints_keep_every_choice(tmp_path):
    model = relufy(make(layer_sizes=((2, 20), (1, 13))), thresholds=(0.125, 0.1), norm_relu=True)
    save_opt(model, tmp_path / "native")
    loaded = load_opt(tmp_path / "native")
    assert loaded.config == model.config
    for (path, a), (other, b) in zip(*(nnx.to_flat_state(nnx.state(m)) for m in (loaded, model)), strict=True):
        assert path == other
        np.testing.assert_array_equal(a[...], b[...])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gated": True}, "gated=True"),
        ({"activation": "shifted_relu"}, "activation=shifted_relu"),
        ({"thresholds": (0.1, 0.0)}, r"thresholds=\(0.1, 0.0\)"),
        ({"norm_relu": True}, "norm_relu=True"),
    ],
)
def test_hugging_face_has_no_such_models(tmp_path, changes, said):
    model = make(**{"gated": False, "activation": "relu"} | changes)
    with pytest.raises(ValueError, match=f"transformers' OPT has no gate.* save_opt keeps it; got {said}"):
        save_hf(model, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_what_cannot_be_relufied(unchecked, model, gates, windows):
    def refused(message, function, *arguments, error: type[Exception] = ValueError, **options):
        with pytest.raises(error, match=message):
            function(*arguments, **options)

    refused("'drelu' .* needs gated=True", relufy, make(gated=False), activation="drelu")
    refused("thresholds must be 2 finite numbers of at least 0", relufy, make(), thresholds=-1.0)
    refused("thresholds must be 2 finite numbers", relufy, make(), thresholds=(1.0, math.inf))
    refused("need activation 'relu'; got 'shifted_relu'", relufy, make(), activation="shifted_relu", thresholds=1.0)
    refused("density must be 0 to 1; got density=1.5", fatrelu_thresholds, gates, 1.5)
    refused("density must be 0 to 1; got density=nan", fatrelu_thresholds, gates, math.nan)
    refused("with activation 'relu' .* got activation='silu'", gate_activations, make(), windows, batch=1)
    refused("none yet; got .* thresholds=", gate_activations, relufy(model, thresholds=1.0), windows, batch=1)
    refused("batch must divide .* got batch=3, 4 windows", gate_activations, model, windows, batch=3)
    refused("batch must divide .* got batch=1, 0 windows", gate_activations, model, windows[:0], batch=1)
    for increase in (-0.1, math.nan):
        refused("increase must be at least 0", thresholds_for_perplexity, model, gates, windows, increase, batch=2)
    refused("the model's 2 layers; got 1", thresholds_for_perplexity, model, gates[:1], windows, 0.1, batch=2)
    broken = relufy(make())
    broken.layers[1].fc1.bias[...] = broken.layers[1].fc1.bias[...].at[3].set(jnp.nan)
    refused("finite; got nan in layer 1", gate_activations, broken, windows, batch=2, error=FloatingPointError)
