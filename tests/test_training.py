import errno
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsellm import text, training

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


def train(folder: Path, report=None, **changes) -> tuple[Bigram, list[dict[str, float]]]:
    model = bigram()
    return model, training.train(model, batches(), config(**changes), folder, report=report)


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
    loss = training.next_token_loss(jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(mask))
    assert float(loss) == pytest.approx(reference_loss(logits, targets, mask), rel=1e-5)


def test_what_a_mask_leaves_out_may_hold_anything():
    logits = jnp.zeros((1, 2, VOCAB)).at[0, 1].set(jnp.nan)
    targets = jnp.zeros((1, 2), jnp.int32)
    assert training.next_token_loss(logits, targets, jnp.array([[True, False]])) == pytest.approx(math.log(VOCAB))


def test_the_first_steps_are_adamw_by_hand(tmp_path):
    """Two steps of clipped AdamW in float64 numpy, with the gradient of a bigram worked out on paper."""
    model, _ = train(tmp_path, steps=2, warmup_steps=1, learning_rate=0.1, clip_norm=0.5)
    initial = bigram()
    assert initial.out.bias is not None and model.out.bias is not None
    values = {
        "embed": np.asarray(initial.embed.embedding[...], np.float64),
        "kernel": np.asarray(initial.out.kernel[...], np.float64),
        "bias": np.asarray(initial.out.bias[...], np.float64),
    }
    mean, square = ({name: np.zeros_like(x) for name, x in values.items()} for _ in range(2))
    for step, rate in enumerate((0.0, 0.1), start=1):  # the warm-up starts at 0
        window = batches()[step - 1]
        inputs, targets = window[:, :-1].ravel(), window[:, 1:].ravel()
        h = values["embed"][inputs]
        logits = h @ values["kernel"] + values["bias"]
        p = np.exp(logits - logits.max(-1, keepdims=True))
        d_logits = (p / p.sum(-1, keepdims=True) - np.eye(VOCAB)[targets]) / len(inputs)
        d_embed = np.zeros_like(values["embed"])
        np.add.at(d_embed, inputs, d_logits @ values["kernel"].T)
        gradient = {"embed": d_embed, "kernel": h.T @ d_logits, "bias": d_logits.sum(0)}
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
        assert training.evaluate(model, windows, batch=batch) == pytest.approx(expected, rel=1e-4)


def test_metrics_are_lines_of_json(tmp_path):
    _, metrics = train(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == metrics
    assert [row["step"] for row in lines] == list(range(1, 13))
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"10", "12"}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"))


class Stop(Exception):
    pass


@pytest.mark.parametrize("last", [1, 5, 8, 12])
def test_a_training_that_stopped_anywhere_ends_the_same(tmp_path, uninterrupted, last):
    whole, expected = uninterrupted

    def stop(row):
        if row["step"] == last:
            raise Stop

    with pytest.raises(Stop):
        train(tmp_path / "stopped", report=stop)
    reported = []
    model, metrics = train(tmp_path / "stopped", report=lambda row: reported.append(row["step"]))
    assert [row["loss"] for row in metrics] == [row["loss"] for row in expected]
    np.testing.assert_array_equal(model.out.kernel[...], whole.out.kernel[...])
    assert reported[0] == max(last // 5 * 5, 1) if last < 12 else reported == [12]


KILLED = """
import sys
import test_training as t
t.train(t.Path(sys.argv[1]), report=lambda row: print(row["step"], flush=True), steps=200, checkpoint_steps=3)
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
    _, expected = train(tmp_path / "whole", steps=200, checkpoint_steps=100)
    _, metrics = train(tmp_path / "killed", steps=200, checkpoint_steps=100)
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
    model = bigram()
    assert model.out.bias is not None
    model.out.bias[...] = jnp.full((VOCAB,), jnp.nan)
    with pytest.raises(FloatingPointError, match="must be finite; got nan at step 1"):
        training.train(model, batches(), config(), tmp_path)


def test_an_objective_decides_what_is_minimised(tmp_path):
    def twice(model, windows):
        loss, metrics = training.next_token_objective(model, windows)
        return 2 * loss, metrics | {"twice": 2 * loss}

    metrics = training.train(bigram(), batches(), config(steps=3), tmp_path / "twice", objective=twice)
    plain = training.train(bigram(), batches(), config(steps=3), tmp_path / "plain")
    assert metrics[0]["twice"] == 2 * metrics[0]["loss"] == 2 * plain[0]["loss"]
    assert metrics[0]["gradient_norm"] == pytest.approx(2 * plain[0]["gradient_norm"], rel=1e-5)
