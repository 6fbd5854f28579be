"""Synthetic OPT: models/firing.py and models/synthetic.py, against counts made here."""

import dataclasses
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import OPTConfig, synthetic
from models.firing import Profile, firing_probabilities
from models.synthetic import fit_table, random_tokens, synthetic_head_predictors, synthetic_opt, synthetic_predictors
from sparsellm.predictors import LowRankPredictor

CONFIG = OPTConfig(vocab_size=499, layers=3, d_model=64, heads=2, d_ff=256, max_length=64, init_std=0.06)
BATCHES, ROWS = (1, 4, 16, 64), ((0.1, 0.25, 0.5, 0.8), (0.05, 0.1, 0.2, 0.4))


def csv(rows: dict[str, tuple[int, tuple[tuple[float, ...], ...]]]) -> str:
    """A profile file: model -> (neurons, shares by layer and batch)."""
    lines = ["model,layer,batch,active_neurons,total_neurons"]
    for model, (total, shares) in rows.items():
        for layer, of_layer in enumerate(shares):
            lines += [f"{model},{layer},{b},{round(s * total)},{total}" for b, s in zip(BATCHES, of_layer, strict=True)]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def profile(tmp_path_factory) -> Profile:
    path = tmp_path_factory.mktemp("profile") / "active.csv"
    path.write_text(csv({"large": (5000, ((0.9,) * 4,)), "near": (300, ROWS), "small": (20, ((0.9,) * 4,))}))
    return Profile.read(path, 256)


@pytest.fixture(scope="module")
def model(profile):
    return synthetic_opt(CONFIG, profile, key=jax.random.key(0))


def test_a_profile_is_of_the_nearest_width_and_stretches_to_any_depth(profile):
    assert profile.batches == BATCHES
    np.testing.assert_allclose(profile.shares, ROWS, atol=2e-3)
    np.testing.assert_allclose(profile.stretched(5).shares, np.array(ROWS)[[0, 0, 0, 1, 1]], atol=2e-3)
    assert profile.share(0, 4) == pytest.approx(0.25, abs=2e-3)
    assert profile.share(0, 8) == pytest.approx((0.25 * 0.5) ** 0.5, abs=2e-3)
    with pytest.raises(ValueError, match="batch must be 1 to 64, as profiled; got batch=65"):
        profile.share(0, 65)


@pytest.mark.parametrize(
    "text,message",
    [
        ("", "must have the columns"),
        ("model,layer,batch,active_neurons\n", "it lacks total_neurons"),
        ("model,layer,batch,active_neurons,total_neurons\n", "it has none"),
        ("model,layer,batch,active_neurons,total_neurons\na,0,1,many,9\n", "must hold whole numbers"),
        (
            "model,layer,batch,active_neurons,total_neurons\na,0,1,3,9\na,1,2,3,9\n",
            "for each layer of a model the same",
        ),
        ("model,layer,batch,active_neurons,total_neurons\na,0,1,0,9\n", "shares must lie above 0"),
        ("model,layer,batch,active_neurons,total_neurons\na,0,1,3,0\n", "total_neurons must be at least 1"),
    ],
)
def test_files_that_are_no_profile(tmp_path, text, message):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        Profile.read(tmp_path / "bad.csv", 256)


def test_probabilities_find_what_the_profile_counts():
    """By drawing neurons at random, against a heavy tail as OPT's."""
    batches, shares = (1, 2, 8, 32, 128), np.array([0.05, 0.08, 0.2, 0.45, 0.8])
    p = firing_probabilities(batches, shares, 4096)
    assert p.shape == (4096,) and np.all(np.diff(p) >= 0) and 0 < p[0] < 1e-3 and 0.2 < p[-1] < 1
    fires = np.random.default_rng(0).random((8, 128, 4096)) < p
    found = [fires[:, :batch].any(axis=1).mean() for batch in batches]
    np.testing.assert_allclose(found, shares, rtol=0.05)


def test_neurons_fire_as_often_as_the_profile_says(model, profile):
    """By the activations of tokens that the fit has not seen, counted in numpy; within a tenth at this size."""
    tokens = random_tokens(CONFIG, (64, 32), jax.random.key(5))

    @jax.jit
    def activations(state):
        network: Any = nnx.merge(nnx.graphdef(model), state)
        _, captured = nnx.capture(network, nnx.Intermediate)(tokens)
        return [captured["layers"][i]["ffn_activation"][0] for i in range(CONFIG.layers)]

    expected = np.array(ROWS)[[0, 0, 1]]  # numpy rounds the middle, 0.5, to even
    rows = fit_table(model, profile, batches=BATCHES, key=jax.random.key(6))
    assert [(row["layer"], row["batch"]) for row in rows] == [(i, b) for i in range(3) for b in BATCHES]
    table = np.array([row["reached"] for row in rows]).reshape(3, 4)
    for layer, h in enumerate(activations(nnx.state(model))):
        fires = np.asarray(h).reshape(64, 32, 256)[:, 16:] > 0
        found = [fires.reshape(64 // b, b, 16, 256).any(axis=1).mean() for b in BATCHES]
        np.testing.assert_allclose(found, expected[layer], rtol=0.12)
        np.testing.assert_allclose(found, table[layer], rtol=0.1)
    np.testing.assert_allclose([row["target"] for row in rows], expected.reshape(-1), atol=2e-3)


def test_random_predictors_name_as_many_neurons_as_the_profile(model, profile):
    """Of layer 0, whose input is plain, in numpy; 4 tokens at a position share a list."""
    predictors = synthetic_predictors(model, profile, batch=4, rank=8, key=jax.random.key(2))
    assert len(predictors) == 3 and predictors[0].look_ahead
    tokens = random_tokens(CONFIG, (64, 32), jax.random.key(7))
    entering = np.asarray(model.embed_tokens.embedding[...])[tokens]
    entering = entering + np.asarray(model.embed_positions.embedding[...])[2:34]
    first = predictors[0]
    assert isinstance(first, LowRankPredictor)
    down, up = (np.asarray(w[...], np.float64) for w in (first.down, first.up))
    named = entering @ down @ up > float(first.threshold[...])
    assert named.reshape(16, 4, 32, 256).any(axis=1).mean() == pytest.approx(0.25, rel=0.1)


def test_random_predictors_name_a_share_of_the_heads(model):
    predictors = synthetic_head_predictors(model, 0.25, rank=8, key=jax.random.key(2))
    assert len(predictors) == 3 and predictors[0].neurons == model.config.heads and not predictors[0].look_ahead
    tokens = random_tokens(model.config, (64, 32), jax.random.key(4))
    positions = model.embed_positions.embedding[2 : 2 + tokens.shape[1]]
    entering = model.embed_tokens.embedding[tokens] + positions[None]
    assert float(jnp.mean(predictors[0](entering))) == pytest.approx(0.25, abs=0.05)
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match="share must be above 0 and at most 1"):
            synthetic_head_predictors(model, share, rank=8, key=jax.random.key(2))


def test_predictors_of_heads_that_read_the_layer_before_are_refused(model, profile):
    heads = [LowRankPredictor(CONFIG.d_model, 2, CONFIG.heads, look_ahead=i > 0, rngs=nnx.Rngs(0)) for i in range(3)]
    with pytest.raises(ValueError, match="head_predictors must not look ahead"):
        synthetic_predictors(model, profile, batch=4, rank=8, key=jax.random.key(2), head_predictors=heads)


def test_of_predictors_in_8_bits_one_at_a_time_is_there_in_more(model, profile, monkeypatch):
    """Beside a model that fills the device, there is no room for all of them."""
    wide: list[weakref.ref] = []
    alive: list[int] = []

    class Counted(LowRankPredictor):
        def __init__(self, *sizes, **options):
            alive.append(sum(weight() is not None for weight in wide))
            super().__init__(*sizes, **options)
            wide.append(weakref.ref(self.up[...]))

    monkeypatch.setattr(synthetic, "LowRankPredictor", Counted)
    synthetic_predictors(model, profile, batch=4, rank=8, key=jax.random.key(2), in_8_bits=True)
    assert len(alive) == 3 and max(alive) <= 1


@pytest.mark.parametrize("changes", [{"activation": "gelu"}, {"thresholds": (0.1,) * 3}, {"sparse_rows": 8}])
def test_what_cannot_be_fitted_is_refused(profile, changes):
    with pytest.raises(ValueError, match="must have activation 'relu' at 0, and run dense to be fitted"):
        synthetic_opt(dataclasses.replace(CONFIG, **changes), profile, key=jax.random.key(0))


def test_sizes_are_those_published(profile):
    with pytest.raises(ValueError, match="size must be one of"):
        synthetic_opt("31b", profile, key=jax.random.key(0))


@pytest.mark.parametrize(
    "batches,shares,message",
    [
        ((1, 1), [[0.1, 0.2]], "batches must be ascending"),
        ((), [[]], "batches must be ascending"),
        ((1, 2), [[0.1]], "shares must be"),
        ((1,), [[1.1]], "shares must lie above 0 and be at most 1"),
        ((1,), [[np.nan]], "shares must lie above 0 and be at most 1"),
    ],
)
def test_shares_are_shares(batches, shares, message):
    with pytest.raises(ValueError, match=message):
        Profile(batches=batches, shares=np.array(shares))
    assert jnp.all(jnp.asarray(Profile.power().shares) <= 0.99)
