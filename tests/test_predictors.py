"""Predictors against numpy: their scores, one step of their training, thresholds by hand, and what they are worth."""

import dataclasses
import errno
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from models import OPT, OPTConfig
from sparsellm.activations import Activations
from sparsellm.predictors import (
    GatePredictor,
    Heads,
    LowRankPredictor,
    Neurons,
    PredictorConfig,
    PredictorParam,
    calibrate,
    calibrate_for_quality,
    files,
    load_predictors,
    measure_predictors,
    save_predictors,
    threshold_for_neurons,
    thresholds_for_recalls,
    train_predictors,
    with_input_thresholds,
)

WINDOWS, LENGTH, D_MODEL, WIDTHS = 8, 64, 16, (24, 19)
QUICK = PredictorConfig(rank=4, batch=64, learning_rate=0.1, patience=2, held_out=0.25, enough_recall=1.0)


def write_collection(folder: Path, layers: list[dict[str, np.ndarray]], length: int) -> Activations:
    """A collection as `collect` leaves it, in two shards, of values that no model has made."""
    folder.mkdir()
    tokens = len(layers[0]["hidden"])
    for shard, part in enumerate(np.split(np.arange(tokens), 2)):
        tensors = {}
        for i, layer in enumerate(layers):
            for kind, values in layer.items():
                kept = np.packbits(values, axis=1) if kind == "fires" else values.astype(np.float32)
                tensors[f"layers.{i}.{kind}"] = np.ascontiguousarray(kept[part])
        save_file(tensors, folder / f"shard_{shard:05d}.safetensors")
    described = {
        "model": {"made": "by hand"},
        "kinds": ["hidden", "ffn_inputs", "fires", "head_norms"],
        "neurons": [layer["fires"].shape[1] for layer in layers],
        "heads": [layer["head_norms"].shape[1] for layer in layers],
        "tokens": tokens,
        "length": length,
        "shards": 2,
    }
    (folder / "collection.json").write_text(json.dumps(described))
    return Activations.open(folder)


def kernel(layer: int) -> np.ndarray:
    """Of fc1: what tokens vary in, the last 4 directions, it passes on weakly; an SVD of rank 4 keeps the others."""
    random = np.random.default_rng(layer)
    return random.normal(size=(D_MODEL, WIDTHS[layer])) * np.where(np.arange(D_MODEL) < 12, 3.0, 1.0)[:, None]


@pytest.fixture(scope="module")
def layers() -> list[dict[str, np.ndarray]]:
    random, made = np.random.default_rng(5), []
    for layer, width in enumerate(WIDTHS):
        x = random.normal(size=(WINDOWS * LENGTH, D_MODEL)) * np.where(np.arange(D_MODEL) < 12, 0.03, 1.0)
        fires = x @ kernel(layer) > 1.5
        norms = np.abs(x[:, -3:])
        made.append({"hidden": x[::-1], "ffn_inputs": x, "fires": fires, "head_norms": norms})
        assert fires.shape[1] == width and 0.1 < fires.mean() < 0.4
    return made


@pytest.fixture(scope="module")
def activations(layers, tmp_path_factory) -> Activations:
    return write_collection(tmp_path_factory.mktemp("predictors") / "made", layers, LENGTH)


@pytest.fixture(scope="module")
def trained(activations) -> tuple[list[LowRankPredictor], list[dict]]:
    """And the row of every epoch."""
    rows = []
    return train_predictors(activations, QUICK, report=lambda row: rows.append(row)), rows


@pytest.fixture(scope="module")
def good(trained) -> list[LowRankPredictor]:
    return trained[0]


def test_scores_are_two_products():
    predictor = LowRankPredictor(6, 3, 10, threshold=0.25, bias=True, rngs=nnx.Rngs(0))
    predictor.bias = PredictorParam(jnp.arange(10.0))
    x = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
    expected = x.astype(np.float64) @ np.asarray(predictor.down[...]) @ np.asarray(predictor.up[...]) + np.arange(10)
    scores = predictor.scores(jnp.asarray(x))
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(predictor(jnp.asarray(x)), np.asarray(scores) > 0.25)
    assert not jnp.any(jnp.abs(predictor.down[...]) > 6**-0.5) and jnp.abs(predictor.up[...]).max() > 0.9 * 3**-0.5


def test_scores_of_16_bits_are_summed_in_float32():
    predictor = LowRankPredictor(300, 8, 9, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 300)), jnp.bfloat16)
    down, up = (np.asarray(w[...], np.float64) for w in (predictor.down, predictor.up))
    hidden = np.asarray(jnp.asarray(np.asarray(x, np.float64) @ down, jnp.bfloat16), np.float64)
    scores = predictor.scores(x)
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, hidden @ up, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("bias", [False, True])
def test_in_8_bits_each_weight_is_the_nearest_and_scores_are_those_of_these_weights(bias):
    rng = np.random.default_rng(3)
    down, up = rng.normal(size=(D_MODEL, 5)), 1e-3 * rng.normal(size=(5, 7))
    x, offset = rng.normal(size=(2, 3, D_MODEL)).astype(np.float32), rng.normal(size=7).astype(np.float32)
    arrays = (jnp.asarray(a, jnp.float32) for a in ((down, up, offset) if bias else (down, up)))
    predictor = LowRankPredictor.from_arrays(*arrays, threshold=0.25, look_ahead=True)
    narrow = predictor.in_8_bits()
    scales = np.abs(down).max() / 448, np.abs(up).max() / 448
    near = [
        (w / scale).astype(jnp.float8_e4m3fn).astype(np.float64) * scale
        for w, scale in zip((down, up), scales, strict=True)
    ]
    expected = x.astype(np.float64) @ near[0] @ near[1] + (offset if bias else 0)
    np.testing.assert_allclose(narrow.scores(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(narrow(jnp.asarray(x)), expected > 0.25)
    assert narrow.look_ahead and (narrow.d_model, narrow.neurons) == (D_MODEL, 7)
    assert {x.dtype.itemsize for x in (narrow.down[...], narrow.up[...])} == {1}


def test_in_8_bits_weights_of_zero_stay_zero_and_16_bits_do_not_overflow():
    nothing = LowRankPredictor.from_arrays(jnp.zeros((D_MODEL, 2)), jnp.zeros((2, 3))).in_8_bits()
    np.testing.assert_array_equal(nothing.scores(jnp.ones((1, D_MODEL))), np.zeros((1, 3)))
    half = LowRankPredictor.from_arrays(jnp.ones((D_MODEL, 2), jnp.float16), jnp.ones((2, 3), jnp.float16)).in_8_bits()
    scores = half.scores(jnp.full((1, D_MODEL), 100, jnp.float16))
    np.testing.assert_allclose(scores, np.full((1, 3), 200.0 * D_MODEL), rtol=1e-3)


def test_predictors_hold_no_parameters_of_the_model():
    predictor = LowRankPredictor(6, 3, 10, rngs=nnx.Rngs(0))
    assert not nnx.to_flat_state(nnx.state(predictor, nnx.Param))
    assert {path[-1] for path, _ in nnx.to_flat_state(nnx.state(predictor, PredictorParam))} == {
        "down",
        "up",
        "threshold",
    }
    with pytest.raises(ValueError, match="rank must be at least 1; got rank=0"):
        LowRankPredictor(6, 0, 10, rngs=nnx.Rngs(0))


def test_an_svd_is_the_closest_product_of_its_rank():
    w, b = kernel(0).astype(np.float32), np.linspace(-1, 1, WIDTHS[0]).astype(np.float32)
    x = np.random.default_rng(1).normal(size=(7, D_MODEL)).astype(np.float32)
    whole = LowRankPredictor.from_svd(jnp.asarray(w), jnp.asarray(b), rank=D_MODEL)
    np.testing.assert_allclose(whole.scores(jnp.asarray(x)), x @ w + b, rtol=1e-4, atol=1e-4)
    u, s, v = np.linalg.svd(w.astype(np.float64), full_matrices=False)
    s[5:] = 0
    part = LowRankPredictor.from_svd(jnp.asarray(w), rank=5)
    np.testing.assert_allclose(part.scores(jnp.asarray(x)), x @ (u * s @ v), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="rank must be 1 to 16; got rank=17"):
        LowRankPredictor.from_svd(jnp.asarray(w), rank=17)


def test_a_gate_is_measured_by_its_size():
    w, b = jnp.asarray(kernel(1), jnp.float32), jnp.linspace(-1, 1, WIDTHS[1])
    x = np.random.default_rng(1).normal(size=(7, D_MODEL)).astype(np.float32)
    gate = x @ np.asarray(w) + np.asarray(b)
    predictor = GatePredictor(w, b, nnx.silu, threshold=0.5)
    np.testing.assert_allclose(predictor.scores(jnp.asarray(x)), np.abs(gate / (1 + np.exp(-gate))), atol=1e-4)
    assert (predictor.neurons, predictor.d_model) == (WIDTHS[1], D_MODEL)


def test_a_step_of_training_is_adamw_on_weighted_cross_entropy(layers, activations):
    """All tokens trained on in one step; from the weights that a learning rate of 0 leaves as they are.

    It is the only one: the recall after it is enough.
    """
    tokens = WINDOWS * LENGTH * 3 // 4
    one = dataclasses.replace(QUICK, enough_recall=0.0, batch=tokens)
    start = train_predictors(activations, dataclasses.replace(one, learning_rate=0.0))
    after = train_predictors(activations, dataclasses.replace(one, learning_rate=0.01, weight_decay=0.1))
    for layer, before, new in zip(layers, start, after, strict=True):
        x, y = layer["ffn_inputs"][:tokens], layer["fires"][:tokens]
        down, up = (np.asarray(w[...], np.float64) for w in (before.down, before.up))
        weight = np.where(y, 1.0, y.mean() + 0.005)
        slope = weight * (1 / (1 + np.exp(-(x @ down @ up))) - y) / y.size
        for weights, gradient, found in ((down, x.T @ slope @ up.T, new.down), (up, (x @ down).T @ slope, new.up)):
            expected = weights - 0.01 * (gradient / (np.abs(gradient) + 1e-8) + 0.1 * weights)
            np.testing.assert_allclose(found[...], expected, atol=2e-5)


def test_a_step_of_training_from_given_predictors_moves_their_biases_too(layers, activations):
    """As above: an SVD, with the bias that its kernel's layer has."""
    tokens = WINDOWS * LENGTH * 3 // 4
    one = dataclasses.replace(QUICK, enough_recall=0.0, batch=tokens, learning_rate=0.01, weight_decay=0.1)
    biases = [np.linspace(-2, -1, width, dtype=np.float32) for width in WIDTHS]
    start = [LowRankPredictor.from_svd(jnp.float32(kernel(i)), jnp.asarray(biases[i]), rank=4) for i in range(2)]
    for layer, before, new in zip(layers, start, train_predictors(activations, one, start=start), strict=True):
        x, y = layer["ffn_inputs"][:tokens], layer["fires"][:tokens]
        down, up, bias = (np.asarray(getattr(before, name)[...], np.float64) for name in ("down", "up", "bias"))
        weight = np.where(y, 1.0, y.mean() + 0.005)
        slope = weight * (1 / (1 + np.exp(-(x @ down @ up + bias))) - y) / y.size
        gradients = {"down": x.T @ slope @ up.T, "up": (x @ down).T @ slope, "bias": slope.sum(axis=0)}
        for (name, gradient), weights in zip(gradients.items(), (down, up, bias), strict=True):
            expected = weights - 0.01 * (gradient / (np.abs(gradient) + 1e-8) + 0.1 * weights)
            np.testing.assert_allclose(getattr(new, name)[...], expected, atol=2e-5)


def test_training_begins_with_predictors_of_its_rank_and_model(activations):
    start = [LowRankPredictor.from_svd(jnp.float32(kernel(i)), rank=3) for i in range(2)]
    with pytest.raises(ValueError, match="start must have down and up of the shapes .* for 2 layers; got"):
        train_predictors(activations, QUICK, start=start)
    with pytest.raises(ValueError, match="for 2 layers; got"):
        train_predictors(activations, dataclasses.replace(QUICK, rank=3), start=start[:1])


def test_training_beats_an_svd_of_the_same_rank_at_equal_density(activations, good):
    svd = [LowRankPredictor.from_svd(jnp.asarray(kernel(i), jnp.float32), rank=QUICK.rank) for i in range(2)]
    recalls = []
    for predictors in (good, svd):
        calibrate(predictors, activations, neurons=[0.25 * width for width in WIDTHS])
        rows = measure_predictors(predictors, activations)
        assert all(row["density"] == pytest.approx(0.25, abs=0.01) for row in rows)
        recalls.append([row["recall"] for row in rows])
    assert min(recalls[0]) > 0.9 and max(recalls[1]) < 0.6


def test_a_killed_training_goes_on_to_the_same_bits(activations, trained, tmp_path):
    predictors, rows = trained
    folder, seen = tmp_path / "there", []

    def killed(row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_predictors(activations, QUICK, folder=folder, report=killed)
    again = train_predictors(activations, QUICK, folder=folder, report=lambda row: seen.append(row))
    assert seen[0]["epoch"] == 3 and seen == rows[2:]
    for one, other in zip(again, predictors, strict=True):
        np.testing.assert_array_equal(one.down[...], other.down[...])
        np.testing.assert_array_equal(one.up[...], other.up[...])
    with pytest.raises(ValueError, match="must be of the same training; .* differs in config"):
        train_predictors(activations, dataclasses.replace(QUICK, seed=1), folder=folder)


def test_layers_stop_each_by_its_own_recall_or_for_want_of_progress(trained):
    _, rows = trained
    for layer in range(2):
        losses, recalls = ([row[name][layer] for row in rows] for name in ("loss", "recall"))
        best, waited, done = math.inf, 0, False
        for epoch, (loss, recall) in enumerate(zip(losses, recalls, strict=True)):
            if done:
                assert loss == losses[epoch - 1]  # it learns no more
            best, waited = (loss, 0) if loss < best and not done else (best, waited + 1)
            done = done or waited >= QUICK.patience or recall > QUICK.enough_recall
            assert rows[epoch]["done"][layer] == done
    stops = [sum(not row["done"][layer] for row in rows) for layer in range(2)]
    assert stops[0] != stops[1] and len(rows) == max(stops) + 1 < QUICK.epochs


def test_heads_are_those_with_the_largest_outputs(layers, activations):
    target = Heads(share=0.34)
    norms = layers[1]["head_norms"]
    labels = np.unpackbits(target.bits(activations, 1), axis=1, count=3)
    np.testing.assert_array_equal(labels.argmax(axis=1), norms.argmax(axis=1))
    assert labels.sum(axis=1).tolist() == [1] * len(norms)
    np.testing.assert_allclose(target.inputs(activations, 1, True), layers[0]["hidden"], atol=1e-6)
    np.testing.assert_allclose(target.inputs(activations, 0, True), layers[0]["hidden"], atol=1e-6)
    np.testing.assert_allclose(target.inputs(activations, 1, False), layers[1]["hidden"], atol=1e-6)
    np.testing.assert_allclose(Neurons().inputs(activations, 1, True), layers[1]["hidden"], atol=1e-6)
    preset = PredictorConfig.preset(target)
    assert (preset.learning_rate, preset.rank, preset.look_ahead, preset.epochs) == (1e-4, 512, True, 20)
    assert target.widths(activations) == (3, 3) and Neurons().widths(activations) == WIDTHS
    with pytest.raises(ValueError, match="share must lie between 0 and 1; got share=1.0"):
        Heads(share=1.0)


SCORES = np.array([[5.0, 1.0, 1.0], [1.0, -2.0, 0.0], [3.0, 4.0, -1.0]], np.float32)
FIRES = np.array([[1, 1, 0], [1, 0, 0], [1, 0, 1]], bool)  # of scores 5, 3, 1, 1, -1


def above(scores: np.ndarray, threshold: float) -> list[float]:
    """By the device, which may know no subnormal numbers."""
    return sorted(scores[np.asarray(jnp.asarray(scores) > jnp.float32(threshold))].tolist(), reverse=True)


def test_the_threshold_for_a_recall():
    expected = {0.0: [], 0.2: [5], 0.21: [5, 4, 3], 0.4: [5, 4, 3], 0.6: [5, 4, 3, 1, 1, 1], 0.8: [5, 4, 3, 1, 1, 1]}
    expected[1.0] = [5, 4, 3, 1, 1, 1, 0, -1]
    found = thresholds_for_recalls(jnp.asarray(SCORES), jnp.asarray(FIRES), list(expected))
    assert [above(SCORES, threshold) for threshold in found] == list(expected.values())


def test_recalls_where_nothing_fires_or_all_does():
    scores = jnp.asarray(SCORES)
    assert thresholds_for_recalls(scores, jnp.zeros((3, 3), bool), [1.0, 0.5]) == [math.inf, math.inf]
    assert len(above(SCORES, thresholds_for_recalls(scores, jnp.ones((3, 3), bool), [1.0])[0])) == 9
    zeros = np.zeros((3, 3), np.float32)
    assert len(above(zeros, thresholds_for_recalls(jnp.asarray(zeros), jnp.ones((3, 3), bool), [0.5])[0])) == 9


def test_the_threshold_for_a_number_of_neurons():
    expected = {0.0: [], 0.3: [], 1 / 3: [5], 1.0: [5, 4, 3], 1.9: [5, 4, 3], 2.0: [5, 4, 3, 1, 1, 1]}
    for neurons, kept in expected.items():
        assert above(SCORES, threshold_for_neurons(jnp.asarray(SCORES), neurons)) == kept
    assert len(above(SCORES, threshold_for_neurons(jnp.asarray(SCORES), 3.0))) == 9


def test_what_no_threshold_can_be_for():
    scores, fires = jnp.asarray(SCORES), jnp.asarray(FIRES)
    with pytest.raises(ValueError, match="recall must be 0 to 1; got recall=0.5, 1.1"):
        thresholds_for_recalls(scores, fires, [0.5, 1.1])
    with pytest.raises(ValueError, match="neurons must be 0 to 3; got neurons=4.0"):
        threshold_for_neurons(scores, 4.0)
    with pytest.raises(ValueError, match="scores must be numbers"):
        thresholds_for_recalls(scores.at[1, 1].set(jnp.nan), fires, [0.5])


def test_calibration_takes_one_wish(activations, good):
    wishes: list[dict[str, Any]] = [{}, {"recall": 0.9, "neurons": 3.0}]
    for options in wishes:
        with pytest.raises(ValueError, match="either recall or neurons must be given"):
            calibrate(good, activations, **options)
    calibrate(good, activations, recall=0.95)
    for row in measure_predictors(good, activations):
        assert 0.95 <= row["recall"] < 0.953 and row["precision"] > 0.7
    with pytest.raises(ValueError, match="predictors must be of the model that was collected from"):
        calibrate(good[::-1], activations, recall=0.95)


def test_calibration_that_fails_changes_nothing(activations, good):
    calibrate(good, activations, neurons=np.array([3.0, 4.0]))
    before = [float(predictor.threshold[...]) for predictor in good]
    with pytest.raises(ValueError, match="neurons must be one number, or one for each of 2 layers; got 1"):
        calibrate(good, activations, neurons=[1.0])
    with pytest.raises(ValueError, match="neurons must be 0 to .*; got neurons=999"):
        calibrate(good, activations, neurons=[1.0, 999.0])
    assert [float(predictor.threshold[...]) for predictor in good] == before


def test_calibration_for_quality_finds_the_lowest_recall_that_will_do(activations, good):
    asked = []

    def lost() -> float:
        recall = min(row["recall"] for row in measure_predictors(good, activations))
        asked.append(recall)
        return 1 + (1 - recall)

    recalls = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    assert calibrate_for_quality(good, activations, lost, 1.25, recalls=recalls) == 0.8
    assert 0.8 <= min(row["recall"] for row in measure_predictors(good, activations)) < 0.81
    assert len(asked) <= 4
    with pytest.raises(ValueError, match="limit must be reached at the highest recall, 1.0; got limit=0.9"):
        calibrate_for_quality(good, activations, lost, 0.9, recalls=recalls)


def test_agreement_and_unions_are_counted(layers, activations, good):
    calibrate(good, activations, recall=0.9)
    rows = measure_predictors(good, activations, batches=(1, 3))
    assert [(row["layer"], row["batch"]) for row in rows] == [(0, 1), (0, 3), (1, 1), (1, 3)]
    for row in rows:
        x = jnp.asarray(layers[row["layer"]]["ffn_inputs"], jnp.float32)
        masks = [np.asarray(good[row["layer"]](x)), layers[row["layer"]]["fires"]]
        found = chosen = there = steps = 0
        for first in range(0, WINDOWS - row["batch"] + 1, row["batch"]):
            for place in range(LENGTH):
                tokens = [(first + i) * LENGTH + place for i in range(row["batch"])]
                predicted, fires = (mask[tokens].any(axis=0) for mask in masks)
                found, chosen, there = found + (predicted & fires).sum(), chosen + predicted.sum(), there + fires.sum()
                steps += 1
        assert row["recall"] == pytest.approx(found / there) and row["precision"] == pytest.approx(found / chosen)
        assert row["neurons"] == pytest.approx(chosen / steps)
        assert row["true_density"] == pytest.approx(there / steps / WIDTHS[row["layer"]])
    calibrate(good, activations, neurons=0.0)
    assert [(row["recall"], row["precision"], row["density"]) for row in measure_predictors(good, activations)] == [
        (0.0, 1.0, 0.0),
        (0.0, 1.0, 0.0),
    ]
    with pytest.raises(ValueError, match="batches must be 1 to 8, the windows collected"):
        measure_predictors(good, activations, batches=(9,))


class Model(nnx.Module):
    """As much of one as tells it from others."""

    def __init__(self, seed: int = 0, d_ff: int = 24):
        self.config = OPTConfig(vocab_size=64, layers=2, d_model=16, heads=2, d_ff=d_ff)
        self.embed_positions, self.embed_tokens = (nnx.Embed(64, 16, rngs=nnx.Rngs(key)) for key in (0, seed))


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


@pytest.fixture
def predictors() -> list[LowRankPredictor]:
    rngs = nnx.Rngs(0)
    options = {"bias": True, "dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    return [LowRankPredictor(16, 4, 24, threshold=t, look_ahead=t > 0, rngs=rngs, **options) for t in (0.5, -math.inf)]


def test_predictors_come_back_as_they_were(model, predictors, tmp_path):
    save_predictors(predictors, tmp_path / "kept", model)
    for old, new in zip(predictors, load_predictors(tmp_path / "kept", model), strict=True):
        assert new.look_ahead == old.look_ahead and new.dtype == jnp.bfloat16
        x = jnp.ones((3, 16), jnp.bfloat16)
        np.testing.assert_array_equal(new.scores(x), old.scores(x))
        np.testing.assert_array_equal(new(x), old(x))
    with pytest.raises(FileExistsError):
        save_predictors(predictors, tmp_path / "kept", model)
    save_predictors(predictors, tmp_path / "kept", model, overwrite=True)


def test_predictors_of_another_model_are_refused(model, predictors, tmp_path, unchecked):
    save_predictors(predictors, tmp_path / "kept", model)
    wider = Model(d_ff=32)
    small = [predictor.in_8_bits() for predictor in predictors]
    with pytest.raises(ValueError, match="saved as LowRankPredictor .*; got EightBitPredictor"):
        save_predictors(small, tmp_path / "small", model)  # pyright: ignore[reportArgumentType]
    assert not (tmp_path / "small").exists()
    with pytest.raises(ValueError, match="must be of the same model; .* is of one with d_ff 24, not 32"):
        load_predictors(tmp_path / "kept", wider)
    retrained = Model(seed=1)
    with pytest.raises(ValueError, match="is of one with embedding"):
        load_predictors(tmp_path / "kept", retrained)
    with pytest.raises(ValueError, match="a predictor for each of 2 layers; got 1"):
        save_predictors(predictors[:1], tmp_path / "few", model)
    assert not (tmp_path / "few").exists()


def test_damaged_and_foreign_folders_are_told(model, predictors, tmp_path):
    with pytest.raises(FileNotFoundError):
        load_predictors(tmp_path / "none", model)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="must describe them in config.json"):
        load_predictors(tmp_path, model)
    save_predictors(predictors, tmp_path / "kept", model)
    path = tmp_path / "kept" / "predictors.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="is damaged"):
        load_predictors(tmp_path / "kept", model)
    save_file({"0.down": np.zeros((16, 4), np.float32)}, path)
    with pytest.raises(ValueError, match="missing 0.up"):
        load_predictors(tmp_path / "kept", model)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="must hold predictors.safetensors"):
        load_predictors(tmp_path / "kept", model)


def test_a_full_disk_leaves_the_predictors_that_were_there(model, predictors, tmp_path, monkeypatch):
    save_predictors(predictors, tmp_path / "kept", model)

    def full(*_):
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left") as raised:
        patch.setattr(files, "save_file", full)
        save_predictors(predictors, tmp_path / "kept", model, overwrite=True)
    assert raised.value.errno == errno.ENOSPC
    assert len(load_predictors(tmp_path / "kept", model)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize(
    "options,message",
    [
        ({"rank": 0}, "rank must be at least 1; got rank=0"),
        ({"held_out": 1.0}, "held_out must lie between 0 and 1; got held_out=1.0"),
    ],
)
def test_what_cannot_be_trained_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PredictorConfig(**options)


def test_too_few_tokens_to_hold_some_out(activations):
    with pytest.raises(ValueError, match="held_out must leave tokens on both sides; got 0.0001 of 512 tokens"):
        train_predictors(activations, dataclasses.replace(QUICK, held_out=0.0001))


class Layers(nnx.Module):
    """Two linear layers behind an embedding, as a model has them in its blocks."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(32, 8, rngs=rngs)
        self.layers = nnx.List([nnx.Dict(fc1=nnx.Linear(8, 12, rngs=rngs), fc2=nnx.Linear(12, 8, rngs=rngs))])

    def __call__(self, tokens):
        (block,) = self.layers
        return block["fc2"](nnx.relu(block["fc1"](self.embed(tokens))))


def test_teal_cuts_a_share_of_every_input():
    model, tokens = Layers(), np.random.default_rng(0).integers(0, 32, (6, 5))
    x = np.asarray(model.embed(jnp.asarray(tokens)), np.float64)
    weights = (nnx.state(model.layers[0][name]) for name in ("fc1", "fc2"))
    (b1, w1), (b2, w2) = ([np.asarray(x, np.float64) for x in jax.tree.leaves(state)] for state in weights)
    hidden = np.maximum(x @ w1 + b1, 0)
    for sparsity in (0.0, 0.3, 0.8):
        sparse = with_input_thresholds(model, tokens, sparsity, batch=3)
        found = []
        for layer, inputs in (("fc1", x), ("fc2", hidden)):
            threshold = float(sparse.layers[0][layer].threshold[...])
            cut, exact = (
                np.mean(np.abs(inputs) <= threshold),
                np.quantile(np.abs(inputs), sparsity, method="inverted_cdf"),
            )
            assert cut >= sparsity and threshold <= exact * (1 + 2**-7) + 1e-37
            found.append(threshold)
        cut_x = np.where(np.abs(x) > found[0], x, 0)
        cut_hidden = np.maximum(cut_x @ w1 + b1, 0)
        expected = np.where(np.abs(cut_hidden) > found[1], cut_hidden, 0) @ w2 + b2
        np.testing.assert_allclose(sparse(jnp.asarray(tokens)), expected, atol=1e-5)
    only = with_input_thresholds(model, tokens, 0.5, select="fc2$")
    assert isinstance(only.layers[0]["fc1"], nnx.Linear) and not isinstance(only.layers[0]["fc2"], nnx.Linear)
    assert only.layers[0]["fc2"].linear.kernel[...] is model.layers[0]["fc2"].kernel[...]  # shared, and left alone


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_teal_does_not_hide_what_is_not_a_number(sparsity):
    layer = with_input_thresholds(Layers(), np.arange(30).reshape(6, 5), sparsity).layers[0]["fc1"]
    x = np.ones((2, layer.linear.kernel.shape[0]), np.float32)
    x[1, 0] = np.nan
    out = layer(jnp.asarray(x))
    assert np.isfinite(out[0]).all() and np.isnan(out[1]).all()


def test_what_teal_refuses():
    model, tokens = Layers(), np.zeros((3, 5), np.int64)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"sparsity": 1.5}, "sparsity must be 0 to 1; got sparsity=1.5"),
        ({"sparsity": 0.5, "batch": 2}, "batch must divide the number of windows; got batch=2, 3 windows"),
        ({"sparsity": 0.5, "select": "fc3"}, "select must be found in the path of some layer .*layers.0.fc1, layers.0"),
    ]
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            with_input_thresholds(model, tokens, **options)
    rows = OPT(OPTConfig(vocab_size=5, layers=1, d_model=8, heads=2, d_ff=8, sparse_rows=8), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="applied by its own module to be calibrated; layers.0.fc1, layers.0.fc2 are"):
        with_input_thresholds(rows, tokens, 0.5)
