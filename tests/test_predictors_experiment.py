import dataclasses
import json
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import predicted_decoding, predictors, quickstart
from experiments.__main__ import main
from experiments.runs import Run
from models import OPT, Mixtral, MixtralConfig, OPTConfig
from models.opt import with_predictors
from sparsellm.evaluation import perplexity
from sparsellm.predictors import LowRankPredictor

CONFIG = dataclasses.replace(
    predictors.Config.smoke(), methods=("trained", "8-bit", "teal"), training=8, epochs=2, budgets=(1.5,), batches=(2,)
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Run, list[dict]]:
    """A run that was killed once, after its first method, and went on."""
    root, tiny = tmp_path_factory.mktemp("runs"), quickstart.SIZES["tiny"]
    model = dataclasses.replace(tiny.model, layers=1, d_ff=32)
    training = dataclasses.replace(tiny.training, steps=5, warmup_steps=1)

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(quickstart.SIZES, "tiny", dataclasses.replace(tiny, model=model, training=training))
        with patch.context() as inner, pytest.raises(KeyboardInterrupt):
            inner.setattr(predictors, "teal", killed)
            with Run.start("predictors", CONFIG, root=root) as run:
                predictors.run(CONFIG, run)
        with Run.start("predictors", CONFIG, root=root) as run:
            patch.setattr(predictors, "train_predictors", killed)  # they are there
            rows = predictors.run(CONFIG, run)
            run.finish(rows)
    return run, rows


def test_every_wish_is_a_row_and_the_chosen_predictor_decodes_as_simulated(finished):
    run, rows = finished
    assert run.continued and rows[0]["method"] == "dense"
    wishes = [(row["method"], row.get("budget"), row.get("recall_wanted")) for row in rows if "perplexity" in row]
    assert wishes[1:6] == [
        *((method, *wish) for method in ("trained", "8-bit") for wish in ((1.5, None), (None, 0.95))),
        ("teal", None, None),
    ]
    for row in rows:
        if "perplexity" in row:
            assert 0 < row.get("density", 1.0) <= 1 and math.isfinite(row["perplexity"])
    decoded = rows[-1]
    assert decoded["same_tokens"] == decoded["new_tokens"] == 2 * CONFIG.new_tokens
    assert decoded["perplexity"] < 1.2 * decoded["dense_perplexity"] and decoded["batch"] == 2
    assert min(decoded[name] for name in ("time_ms", "dense_ms", "predictor_ms")) > 0
    assert decoded["predictor_share"] == pytest.approx((16 * (32 + 32) + 1) / (2 * 32 * 32))


def test_a_model_whose_neurons_cannot_be_left_out_is_refused(unchecked):
    config = MixtralConfig(vocab_size=61, layers=1, d_model=16, heads=4, kv_heads=2, d_ff=24, experts=2)
    model: Any = nnx.eval_shape(lambda: Mixtral(config, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="source must be an OPT, .*; got Mixtral"):
        predictors._check_model(CONFIG, model, 1, np.zeros((2, 9), np.int32))


def test_a_model_loses_what_heads_it_leaves_out():
    """Read a token at a time: as the model at once if all heads are listed, and otherwise not."""
    config = OPTConfig(vocab_size=64, layers=1, d_model=16, heads=2, d_ff=32, max_length=16, init_std=0.3)
    model, windows = OPT(config, rngs=nnx.Rngs(0)), np.arange(52, dtype=np.int32).reshape(4, 13)
    expected = perplexity(model, windows).perplexity
    for threshold, same in ((-math.inf, True), (math.inf, False)):
        heads = LowRankPredictor(16, 4, 2, threshold=threshold, rngs=nnx.Rngs(0))
        listed = with_predictors(model, None, head_predictors=[heads])
        found = predicted_decoding.decoded_perplexity(listed, windows, batch=2)
        assert (found == pytest.approx(expected, rel=1e-4)) == same


SMALL = OPTConfig(vocab_size=64, layers=2, d_model=16, heads=2, d_ff=32, max_length=16, init_std=0.3)


def guesses(threshold: float = 0.2) -> list[LowRankPredictor]:
    """Random predictors that name about a third of the neurons, others for each token."""
    return [LowRankPredictor(16, 4, 32, threshold=threshold, rngs=nnx.Rngs(i)) for i in range(2)]


def test_decoding_by_sequence_has_the_perplexity_that_is_measured_where_each_token_has_its_own_neurons():
    """Windows together, a token at a time over lists; with the union of their neurons it is another."""
    model, windows = OPT(SMALL, rngs=nnx.Rngs(0)), np.arange(52, dtype=np.int32).reshape(4, 13)
    expected = perplexity(with_predictors(model, guesses(), "mask_everywhere"), windows).perplexity
    for per_sequence in (True, False):
        lists = with_predictors(model, guesses(), per_sequence=per_sequence)
        found = predicted_decoding.decoded_perplexity(lists, windows, batch=4)
        assert (found == pytest.approx(expected, rel=1e-5)) == per_sequence


def test_decoding_by_sequence_is_simulated_by_sequence(monkeypatch):
    asked = []

    def recorded(model, predictors, prediction, **options):
        asked.append((prediction, options))
        return with_predictors(model, predictors, prediction, **options)

    monkeypatch.setattr(predicted_decoding, "with_predictors", recorded)
    monkeypatch.setattr(predicted_decoding, "wall_clock", lambda *_: (None, [1.0]))
    prompts = np.array([[2, 9, 31], [2, 40, 3], [5, 6, 7]], np.int32)
    row = predicted_decoding.measure_decoding(OPT(SMALL, rngs=nnx.Rngs(0)), guesses(), prompts, 4, per_sequence=True)
    assert row["same_tokens"] == row["new_tokens"] == 12
    assert asked == [("lists", {"per_sequence": True}), ("mask", {"per_sequence": True})]


def test_a_text_that_the_model_did_not_write_is_found():
    config = OPTConfig(vocab_size=64, layers=1, d_model=16, heads=2, d_ff=32, max_length=16, init_std=0.3)
    model, tokens = OPT(config, rngs=nnx.Rngs(0)), np.arange(24, dtype=np.int32).reshape(2, 12)
    logits = np.array(model(jnp.asarray(tokens[:, :-1])))[:, 3:]  # of the whole texts at once, without a cache
    same, margin = predicted_decoding.agreement(model, tokens[:, :4], tokens[:, 4:])
    behind = logits.max(axis=2) - np.take_along_axis(logits, tokens[:, 4:, None], axis=2)[..., 0]
    assert same == np.sum(behind == 0) < 16
    assert margin == pytest.approx(behind.max() / np.abs(logits).max(), rel=1e-5) and margin > 0.1


def test_densities_and_hot_neurons_of_every_layer(finished):
    _, rows = finished
    densities = [row["density"] for row in rows if "granularity" in row]
    assert len(densities) == 4 and densities == sorted(densities)  # 1, 8, 16 and 32 tokens
    (hot,) = [row for row in rows if "hot" in row]
    assert 0.1 <= hot["hot"] <= 1 and hot["fires"] == sorted(hot["fires"], reverse=True)


def test_the_run_keeps_its_predictors_and_figures(finished):
    run, rows = finished
    assert {path.name for path in (run.folder / "predictors").iterdir()} == {"trained", "chosen"}
    names = ("predictors_density.png", "predictors_hot.png", "predictors_recall.png", "predictors_perplexity.png")
    assert all((run.folder / name).stat().st_size > 1000 for name in names)
    assert [json.loads(line) for line in (run.folder / "rows.jsonl").read_text().splitlines()] == rows
    assert not (run.folder / "checkpoints").exists()


def test_readme_shows_a_line_a_wish_and_a_line_a_batch():
    dense = {"model": "opt-small", "method": "dense", "perplexity": 27.66}
    common: dict[str, Any] = {"method": "trained", "rank": 16, "recall": 0.9, "precision": 0.5, "density": 0.09}
    common |= {"true_density": 0.05, "perplexity": 27.9, "dense_perplexity": 27.66}
    decoded = {"loss": 0.01, "recall_wanted": 0.9, "batch": 1, "time_ms": 0.5, "dense_ms": 1.0, "predictor_ms": 0.1}
    rows = [
        dense,
        {"layer": 0, "granularity": "1x1", "density": 0.05},
        {"layer": 0, "hot": 0.5, "dead": 0.0, "fires": [0.9, 0.1]},
        common | {"budget": 1.5},
        {"method": "teal", "sparsity": 0.4, "density": 0.6, "perplexity": 28.0, "dense_perplexity": 27.66},
        common | decoded | {"same_tokens": 64, "new_tokens": 64},
    ]
    shown, drawn = predictors.readme({"rows": rows})
    assert shown.splitlines() == [
        "opt-small, dense perplexity 27.66.",
        "",
        "| method  | rank | neurons for  | recall | precision | density | true density | perplexity |",
        "|---------|-----:|--------------|-------:|----------:|--------:|-------------:|-----------:|",
        "| trained |   16 | budget 1.5   |  90.0% |     50.0% |    9.0% |         5.0% |      27.90 |",
        "| teal    |    – | sparsity 0.4 |      – |         – |   60.0% |            – |      28.00 |",
        "",
        "Decoding with a recall of 0.9 wanted, perplexity +0.9%:",
        "",
        "| batch | dense ms | ms a token | of it predictors | density | as simulated |",
        "|------:|---------:|-----------:|-----------------:|--------:|-------------:|",
        "|     1 |        1 |        0.5 |              0.1 |    9.0% |        64/64 |",
    ]
    assert len(drawn) == 4


@pytest.mark.parametrize(
    "options,message",
    [
        (["--methods", "oracle"], "methods must be some of"),
        (["--batch", "0"], "batch must be at least 1; got batch=0"),
        (["--rank", "0"], "rank must be at least 1; got rank=0"),
        (["--training", "12"], "batch must divide training; got batch=8, training=12"),
        (["--recalls", "1.5"], "recalls must lie between 0 and 1"),
        (["--budgets", "0"], "budgets must be above 0"),
        (["--loss", "0"], "loss must be above 0; got loss=0"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_trained(options, message, tmp_path, capsys):
    assert main(["predictors", "--smoke", "--runs", str(tmp_path), *options]) == 1
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "predictors").iterdir())
