import dataclasses
import json
import math
import re
from typing import Any

import pytest
from flax import nnx
from rich.console import Console

from experiments import language_models, pretrain, quickstart, relufication
from experiments.__main__ import main
from experiments.runs import Run
from models import OPT, load_opt, save_opt

CONFIG = dataclasses.replace(relufication.Config.smoke(), windows=8)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Run, list[dict]]:
    """A run without a source, killed once, after the training that follows; it went on."""
    root = tmp_path_factory.mktemp("runs")

    def pretrained(config, run):
        """What `pretrain` leaves, but for the training: that has tests of its own."""
        data = language_models.prepare(
            run, Console(), corpus=config.corpus, tokenizer=320, length=config.length, held_out=0.05, seed=0
        )
        model = OPT(pretrain.model_config(config, data.tokenizer.vocab_size), rngs=nnx.Rngs(0))
        save_opt(model, run.folder / "model")

    def compared(model, data, tokens, sparse_rows, config):
        return [{"variant": "dense"}, {"variant": "sparse"}] if sparse_rows else [{"variant": "dense"}]

    def killed(*arguments):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "TINY", pretrain.TINY | {"layers": 1})
        patch.setattr(pretrain, "run", pretrained)
        patch.setattr(quickstart, "compare", compared)
        with patch.context() as inner, pytest.raises(KeyboardInterrupt):
            inner.setattr(relufication, "with_thresholds", killed)
            with Run.start("relufication", CONFIG, root=root) as run:
                relufication.run(CONFIG, run)
        with Run.start("relufication", CONFIG, root=root) as run:
            rows = relufication.run(CONFIG, run)
            run.finish(rows)
    return run, rows


def stage(rows: list[dict], name: str) -> dict:
    (row,) = (row for row in rows if row.get("stage") == name and "perplexity" in row)
    return row


def test_training_makes_up_for_the_new_activation(finished):
    run, rows = finished
    assert run.continued
    source, replaced, tuned, cut = (stage(rows, n) for n in ("source", "replaced", "fine-tuned", "thresholds"))
    assert source["density"] == 1
    assert 0.3 < replaced["density"] < 0.7
    assert tuned["perplexity"] < replaced["perplexity"] and tuned["density"] < replaced["density"]
    assert cut["density"] <= tuned["density"] and cut["threshold"] > 0
    assert cut["perplexity"] < tuned["perplexity"] * 1.1
    assert all(math.isfinite(row["perplexity"]) for row in (source, replaced, tuned, cut))
    assert {row.get("method") for row in rows[3:]} == {"relu + l1"}
    timed = [(row["stage"], row["variant"]) for row in rows if "variant" in row]
    assert timed[0] == ("source", "dense")  # of a GELU nothing is zero
    stages = ("replaced", "fine-tuned", "thresholds")
    assert timed[1:] == [(name, path) for name in stages for path in ("dense", "sparse")]


def test_the_way_there(finished):
    _, rows = finished
    way = [row for row in rows if row.get("stage") == "on the way"]
    assert [row["step"] for row in way] == list(range(1, 21))
    assert way[-1]["density"] < way[0]["density"] and way[-1]["held_out_loss"] < way[0]["held_out_loss"]
    weights = [row["l1_weight"] for row in way]
    assert weights[:5] == pytest.approx([1e-3] * 5) and weights[14:] == pytest.approx([1e-2] * 6)
    assert all(a <= b for a, b in zip(weights, weights[1:], strict=False))
    assert sum("layer" in row for row in rows) == 4  # one layer, four stages


def test_what_a_run_leaves(finished):
    run, rows = finished
    folder = run.folder / "relu_l1"
    assert not (folder / "checkpoints").exists() and not (run.folder / "compiled").exists()
    model = load_opt(folder / "model")
    assert model.config.activation == "relu" and model.config.thresholds is not None
    assert (folder / "model" / "vocab.json").exists()
    assert {"relufication_perplexity.png", "relufication_density.png"} <= {path.name for path in run.folder.iterdir()}
    assert len((run.folder / "rows.jsonl").read_text().splitlines()) == len(rows)


def test_a_run_of_pretrain_is_a_source(finished, tmp_path):
    """Its model, text and training; perplexity may be measured on another text, by the recipe."""
    earlier, rows = finished
    source = tmp_path / "source"
    source.mkdir()
    trained = dataclasses.replace(pretrain.Config.smoke(), activation="gelu", steps=70, l1=())
    described = {"experiment": "pretrain", "config": dataclasses.asdict(trained)}
    (source / "config.json").write_text(json.dumps(described, default=str))
    for name in ("tokens.npz", "tokenizer", "model"):
        (source / name).symlink_to(earlier.folder / name)
    (tmp_path / "wikitext.txt").write_text("A row of text.\n" * 90)
    config = dataclasses.replace(CONFIG, source=source, wikitext=tmp_path / "wikitext.txt")
    subject = relufication.prepare(config, earlier)
    assert (subject.training.steps, subject.training.batch, subject.training.accumulate) == (70, 4, 2)
    assert subject.name == "opt-tiny"
    assert subject.data.train.shape[1] == 33 and subject.test.shape[1] == 32
    decoded = subject.data.tokenizer.decode(subject.test[0].tolist())
    assert decoded.startswith("A row of text.\n\n\nA row")
    with pytest.raises(ValueError, match="leave out drelu for a model without a gate"):
        relufication.prepare(dataclasses.replace(config, methods=("drelu",)), earlier)
    (source / "config.json").write_text(json.dumps({"experiment": "quickstart", "config": {}}))
    with pytest.raises(ValueError, match="source must be a run of pretrain; .* is of quickstart"):
        relufication.prepare(config, earlier)


def test_readme_shows_perplexity_at_density():
    common: dict[str, Any] = {"model": "opt-125m", "method": "relu"}
    rows = [
        {"model": "opt-125m", "stage": "source", "perplexity": 30.0, "density": 1.0},
        {"model": "opt-125m", "stage": "source", "layer": 0, "density": 1.0},
        common | {"stage": "replaced", "perplexity": 812.345, "density": 0.493},
        common | {"stage": "fine-tuned", "perplexity": 30.5, "density": 0.4},
        *(common | {"stage": "on the way", "step": s, "held_out_loss": 5.0 - s, "density": 0.5 / s} for s in (1, 2)),
        {"model": "opt-125m", "method": "unchanged", "stage": "fine-tuned", "perplexity": 29.5, "density": 1.0},
        {"model": "opt-125m", "stage": "source", "variant": "dense", "time_ms": 11.5, "decode_ms": 1.2},
        common | {"stage": "fine-tuned", "variant": "dense", "time_ms": 12.0, "decode_ms": 1.3},
        common | {"variant": "sparse", "time_ms": 10.0, "decode_ms": 3.3},  # as rows were before they had a stage
    ]
    table, images = relufication.readme({"rows": rows})
    assert table.splitlines() == [
        "opt-125m, perplexity 30.00 at 100.0% density. Perplexity at density:",
        "",
        "| method    |        replaced |      fine-tuned | thresholds |",
        "|-----------|----------------:|----------------:|-----------:|",
        "| relu      | 812.35 at 49.3% |  30.50 at 40.0% |          – |",
        "| unchanged |               – | 29.50 at 100.0% |          – |",
        "",
        "| method | stage      | path   | forward (ms) | a token (ms) |",
        "|--------|------------|--------|-------------:|-------------:|",
        "| source | source     | dense  |         11.5 |          1.2 |",
        "| relu   | fine-tuned | dense  |           12 |          1.3 |",
        "| relu   | at the end | sparse |           10 |          3.3 |",
    ]
    assert all(len(image) > 1000 for image in images.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "rely"], "methods must be some of unchanged, relu, .*; got rely"),
        (["--methods", "drelu"], "methods must leave out drelu for a model without a gate; got gated=False"),
        (["--steps", "0"], "steps must be at least 1; got steps=0"),
        (["--calibration", "0"], "calibration must be at least 1"),
        (["--increase", "-0.1"], "increase must be at least 0"),
        (["--l1", "nan"], "l1 must be at least 0; got l1=nan"),
        (["--source", "nowhere"], "source must be the folder of a run of pretrain, .*; got nowhere"),
        (["--wikitext", "nowhere"], "there is no nowhere"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_trained(options, message, tmp_path, capsys):
    assert main(["relufication", "--smoke", "--runs", str(tmp_path), *options]) == 1

    assert re.search(message, capsys.readouterr().err)
    assert not list((tmp_path / "relufication").iterdir())
