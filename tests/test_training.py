import errno
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import OPT, OPTConfig
from sparsellm import determinism, evaluation, text, training
from sparsellm.objectives import next_token_loss

VOCAB, LENGTH = 13, 8


class Bigram(nnx.Module):
    """The smallest language model: logits of the next token from this one."""

    def __init__(self, vocab: int, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(vocab, 16, rngs=rngs)
        self.out = nnx.Linear(16, vocab, rngs=rngs)

    def __call__(self, tokens):
        return self.out(self.embed(tokens))


def bigram() -> Bigram:
    return Bigram(VOCAB, rngs=nnx.Rngs(0))


def counting_windows() -> np.ndarray:
    """Text in which every token is followed by the next number: a bigram can learn it to a loss of 0."""
    return text.token_windows((np.arange(400) % VOCAB).astype(np.int32), length=LENGTH)


def config(**changes) -> training.TrainConfig:
    settings = {"steps": 12, "batch": 4, "learning_rate": 0.03, "warmup_steps": 2, "checkpoint_steps": 5}
    return training.TrainConfig(**(settings | changes))


def batches():
    return text.ShuffledBatches(counting_windows(), batch=4, seed=0)


def train(folder: Path, report=None, objective=training.next_token_objective, **changes):
    """The model, and the metrics of every step."""
    model = bigram()
    return model, training.train(model, batches(), config(**changes), folder, objective=objective, report=report)


def scheduled(model, windows, step):
    """Its weight depends on the step."""
    loss, metrics = training.next_token_objective(model, windows, step)
    weight = 1 + jnp.asarray(step % 7).astype(jnp.float32)
    return weight * loss, metrics | {"weight": weight}


def reference_loss(logits: np.ndarray, targets: np.ndarray, mask: np.ndarray) -> float:
    logits = logits.astype(np.float64)
    log_z = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    nats = log_z - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return (nats * mask).sum() / max(mask.sum(), 1)


@pytest.mark.parametrize("kept", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_loss_is_the_mean_over_kept_targets(kept, scale):
    generator = np.random.default_rng(0)
    logits = (scale * generator.normal(size=(3, 5, VOCAB))).astype(np.float32)
    targets = generator.integers(0, VOCAB, (3, 5))
    mask = generator.random((3, 5)) < kept
    loss = next_token_loss(jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(mask))
    assert float(loss) == pytest.approx(reference_loss(logits, targets, mask), rel=1e-5)


def test_what_a_mask_leaves_out_may_hold_anything():
    logits = jnp.zeros((1, 2, VOCAB)).at[0, 1].set(jnp.nan)
    targets = jnp.zeros((1, 2), jnp.int32)
    assert next_token_loss(logits, targets, jnp.array([[True, False]])) == pytest.approx(math.log(VOCAB))


def float64(state) -> dict[str, np.ndarray]:
    """A bigram's parameters, or their gradient."""
    arrays = {"embed": state["embed"]["embedding"], "kernel": state["out"]["kernel"], "bias": state["out"]["bias"]}
    return {name: np.asarray(x[...], np.float64) for name, x in arrays.items()}


def bigram_gradient(values: dict[str, np.ndarray], window: np.ndarray) -> dict[str, np.ndarray]:
    """Of the mean cross-entropy, worked out on paper, in float64."""
    inputs, targets = window[:, :-1].ravel(), window[:, 1:].ravel()
    h = values["embed"][inputs]
    logits = h @ values["kernel"] + values["bias"]
    p = np.exp(logits - logits.max(-1, keepdims=True))
    d_logits = (p / p.sum(-1, keepdims=True) - np.eye(VOCAB)[targets]) / len(inputs)
    d_embed = np.zeros_like(values["embed"])
    np.add.at(d_embed, inputs, d_logits @ values["kernel"].T)
    return {"embed": d_embed, "kernel": h.T @ d_logits, "bias": d_logits.sum(0)}


@pytest.mark.parametrize("accumulate", [1, 2, 6])
def test_micro_batches_add_up_to_the_batchs_gradient(accumulate):
    graphdef, params = nnx.split(bigram())
    batch = counting_windows()[:6]
    options: tuple[Any, ...] = (training.next_token_objective, jnp.int32(0), accumulate)
    gradient, metrics = jax.jit(training.accumulated_gradient, static_argnums=(0, 3, 5))(
        graphdef, params, jnp.asarray(batch), *options
    )
    for name, expected in bigram_gradient(float64(params), batch).items():
        np.testing.assert_allclose(float64(gradient)[name], expected, rtol=1e-5, atol=1e-7)
    logits = np.asarray(bigram()(jnp.asarray(batch[:, :-1])))
    expected = reference_loss(logits, batch[:, 1:], np.ones((6, LENGTH)))
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)


def test_gradients_are_added_up_in_float32():
    """256 + 1 is 256 in bfloat16."""
    model = nnx.Dict(w=nnx.Param(jnp.bfloat16(1)))

    def objective(model, windows, step):
        loss = model.w[...] * windows[0, 0].astype(jnp.bfloat16)
        return loss, {"loss": loss}

    graphdef, params = nnx.split(model)
    batch = jnp.asarray([[256], *[[1]] * 31], jnp.int32)
    gradient: Any = training.accumulated_gradient(graphdef, params, batch, objective, jnp.int32(0), 32)[0]
    assert gradient["w"][...].dtype == jnp.bfloat16
    assert float(gradient["w"][...]) == pytest.approx((256 + 31) / 32, rel=2**-8)


def test_the_first_steps_are_adamw_by_hand(tmp_path):
    """Two steps of clipped AdamW in float64 numpy, with the gradient of a bigram worked out on paper."""
    model, _ = train(tmp_path, steps=2, warmup_steps=1, learning_rate=0.1, clip_norm=0.5)
    initial = bigram()
    assert model.out.bias is not None
    values = float64(nnx.state(initial))
    mean, square = ({name: np.zeros_like(x) for name, x in values.items()} for _ in range(2))
    for step, rate in enumerate((0.0, 0.1), start=1):  # the warm-up starts at 0
        window = batches()[step - 1]
        gradient = bigram_gradient(values, window)
        norm = math.sqrt(sum((g**2).sum() for g in gradient.values()))
        for name, g in gradient.items():
            g = g * min(1, 0.5 / norm)
            mean[name] = 0.9 * mean[name] + 0.1 * g
            square[name] = 0.98 * square[name] + 0.02 * g**2
            update = mean[name] / (1 - 0.9**step) / (np.sqrt(square[name] / (1 - 0.98**step)) + 1e-8)
            values[name] -= rate * (update + (0.1 * values[name] if values[name].ndim > 1 else 0))
    np.testing.assert_allclose(model.embed.embedding[...], values["embed"], atol=2e-5)
    np.testing.assert_allclose(model.out.kernel[...], values["kernel"], atol=2e-5)
    np.testing.assert_allclose(model.out.bias[...], values["bias"], atol=2e-5)


def test_the_learning_rate_warms_up_and_decays_to_a_tenth():
    rate = training.learning_rate(config(steps=100, warmup_steps=10, learning_rate=1.0))
    expected = {0: 0.0, 5: 0.5, 10: 1.0, 55: 0.55, 100: 0.1}
    assert {step: float(jnp.asarray(rate(step))) for step in expected} == pytest.approx(expected, abs=1e-6)


def test_training_learns_and_evaluation_agrees(tmp_path):
    model, metrics = train(tmp_path, steps=80)
    assert metrics[0]["loss"] == pytest.approx(math.log(VOCAB), abs=0.7)
    assert metrics[-1]["loss"] < 0.1
    windows = counting_windows()
    logits = np.asarray(model(jnp.asarray(windows[:, :-1])))
    expected = reference_loss(logits, windows[:, 1:], np.ones((len(windows), LENGTH)))
    for batch in (1, 4, 7, 100):  # dividing the windows or not
        assert evaluation.perplexity(model, windows, batch=batch).loss == pytest.approx(expected, rel=1e-4)


def test_metrics_are_lines_of_json(tmp_path):
    _, metrics = train(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == metrics
    assert [row["step"] for row in lines] == list(range(1, 13))
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"10", "12"}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"), objective=scheduled, accumulate=2)


class Stop(Exception):
    pass


@pytest.mark.parametrize("last", [1, 5, 8, 12])
def test_a_training_that_stopped_anywhere_ends_the_same(tmp_path, uninterrupted, last):
    whole, expected = uninterrupted

    def stop(row):
        if row["step"] == last:
            raise Stop

    with pytest.raises(Stop):
        train(tmp_path / "stopped", report=stop, objective=scheduled, accumulate=2)
    reported = []
    options: dict[str, Any] = {"objective": scheduled, "accumulate": 2}
    model, metrics = train(tmp_path / "stopped", report=lambda row: reported.append(row["step"]), **options)
    assert [row["loss"] for row in metrics] == [row["loss"] for row in expected]
    assert [row["weight"] for row in metrics] == [1 + i % 7 for i in range(12)]
    np.testing.assert_array_equal(model.out.kernel[...], whole.out.kernel[...])
    assert reported[0] == max(last // 5 * 5, 1) if last < 12 else reported == [12]


def damage(checkpoint: Path) -> None:
    """Truncates what holds the arrays."""
    files = [path for path in checkpoint.rglob("*") if path.is_file() and "ocdbt" in str(path)]
    assert files
    for path in files:
        os.truncate(path, path.stat().st_size // 2)


def test_a_damaged_checkpoint_is_said_and_the_one_before_continued(tmp_path, uninterrupted, capfd, abandoned_reads):
    whole, expected = uninterrupted
    options: dict[str, Any] = {"objective": scheduled, "accumulate": 2}
    train(tmp_path, **options)
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [10, 12]
    damage(tmp_path / "checkpoints" / "12")
    reported = []
    model, metrics = train(tmp_path, report=lambda row: reported.append(row["step"]), **options)
    assert "the checkpoint of step 12 cannot be read" in capfd.readouterr().err and reported == [10, 11, 12]
    assert [row["loss"] for row in metrics] == [row["loss"] for row in expected]
    np.testing.assert_array_equal(model.out.kernel[...], whole.out.kernel[...])
    for step in (10, 12):
        damage(tmp_path / "checkpoints" / str(step))
    with pytest.raises(ValueError, match="no checkpoint in .* can be read, that of step 12 for"):
        train(tmp_path, **options)
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [10, 12]  # nothing is removed


KILLED = """
import sys
import test_training as t
options = {"objective": t.scheduled, "accumulate": 2, "steps": 200, "checkpoint_steps": 3}
t.train(t.Path(sys.argv[1]), report=lambda row: print(row["step"], flush=True), **options)
"""


def test_an_interrupted_and_a_killed_process_leave_whole_checkpoints(tmp_path):
    """With a checkpoint every third step, a signal is likely to come while one is being saved."""
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    for number, last in ((signal.SIGINT, 4), (signal.SIGKILL, 9)):
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        with process:
            assert process.stdout is not None
            for line in process.stdout:
                if int(line) >= last:
                    process.send_signal(number)
                    break
        assert process.returncode != 0
        if number == signal.SIGINT:
            assert all(path.name.isdecimal() for path in (tmp_path / "killed" / "checkpoints").iterdir())
    options: dict[str, Any] = {"objective": scheduled, "accumulate": 2, "steps": 200, "checkpoint_steps": 100}
    _, expected = train(tmp_path / "whole", **options)
    _, metrics = train(tmp_path / "killed", **options)
    assert [row["loss"] for row in metrics] == [row["loss"] for row in expected]


def test_a_full_disk_is_said_in_a_sentence_and_the_last_checkpoint_kept(tmp_path, monkeypatch):
    """TensorStore reports a full disk as the text of a ValueError; it is not to be had here for the asking."""
    from orbax.checkpoint import v1 as ocp

    save = ocp.training.Checkpointer.save

    def full_at_10(self, step, state):
        if step == 10:
            (self.directory / "10.orbax-checkpoint-tmp").mkdir()
            raise ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device [os_error_code='28']")
        return save(self, step, state)

    monkeypatch.setattr(ocp.training.Checkpointer, "save", full_at_10)
    with pytest.raises(OSError, match=r"no disk space is left .*the one of step 5 is kept.*free some") as caught:
        train(tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["5"]
    monkeypatch.undo()
    assert train(tmp_path)[1][-1]["step"] == 12


def test_wrong_configs_and_losses_are_refused(tmp_path):
    with pytest.raises(ValueError, match="steps must be at least 1; got steps=0"):
        config(steps=0)
    with pytest.raises(ValueError, match="warmup_steps must be less than steps; got warmup_steps=12, steps=12"):
        config(warmup_steps=12)
    with pytest.raises(ValueError, match="accumulate must be at least 1; got accumulate=0"):
        config(accumulate=0)
    with pytest.raises(ValueError, match="accumulate must divide batch; got accumulate=3, batch=4"):
        config(accumulate=3)
    model = bigram()
    assert model.out.bias is not None
    model.out.bias[...] = jnp.full((VOCAB,), jnp.nan)
    with pytest.raises(FloatingPointError, match="must be finite; got nan at step 1"):
        training.train(model, batches(), config(), tmp_path)


def test_an_interrupted_training_leaves_the_model_as_the_last_step_did(tmp_path):
    def interrupt(row):
        if row["step"] == 2:  # the third step is under way, and there is no checkpoint yet
            raise KeyboardInterrupt

    model = bigram()
    with pytest.raises(KeyboardInterrupt):
        training.train(model, batches(), config(), tmp_path / "a", report=interrupt)
    transformation = training.optimizer(config())
    graphdef, params = nnx.split(bigram(), nnx.Param)
    state = training.TrainState(params, transformation.init(params))
    for step in range(3):
        windows = jnp.asarray(batches()[step])
        state, _ = training.train_step(graphdef, transformation, state, windows, step=jnp.int32(step))
    for found, expected in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert len(training.train(model, batches(), config(), tmp_path / "a")) == 12


def test_an_objective_decides_what_is_minimised(tmp_path):
    def twice(model, windows, step):
        loss, metrics = training.next_token_objective(model, windows, step)
        return 2 * loss, metrics | {"twice": 2 * loss}

    metrics = training.train(bigram(), batches(), config(steps=3), tmp_path / "twice", objective=twice)
    plain = training.train(bigram(), batches(), config(steps=3), tmp_path / "plain")
    assert metrics[0]["twice"] == 2 * metrics[0]["loss"] == 2 * plain[0]["loss"]
    assert metrics[0]["gradient_norm"] == pytest.approx(2 * plain[0]["gradient_norm"], rel=1e-5)


def test_calls_that_must_be_distinct_are_equal_as_float32():
    with determinism.distinct_calls():
        scales = [determinism.distinct_call(0.125) for _ in range(96)]
    assert len(set(scales)) == 96 and {np.float32(scale) for scale in scales} == {np.float32(0.125)}
    assert determinism.distinct_call(0.125) == determinism.distinct_call(0.125) == 0.125


@pytest.mark.gpu
def test_steps_on_a_gpu_give_the_same_bits():
    """Two layers of cuDNN's attention: one compiles where several do not, and its gradient adds up by atomics."""
    windows = jax.random.randint(jax.random.key(0), (8, 257), 4, 256)
    model = OPT(OPTConfig.preset("125m", layers=2, vocab_size=256, max_length=256, dtype="bfloat16"), rngs=nnx.Rngs(0))
    transformation = training.optimizer(config())
    found = []
    for _ in range(2):
        graphdef, params = nnx.split(jax.tree.map(jnp.copy, model), nnx.Param)
        state = training.TrainState(params, transformation.init(params))
        for step in range(4):
            state, _ = training.train_step(graphdef, transformation, state, windows, step=step)
        found.append(jax.tree.leaves(state.params))
    assert all((a == b).all() for a, b in zip(*found, strict=True))
