import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from experiments import language_models, pretrain
from experiments.__main__ import main
from models import OPT, OPTConfig, load_opt
from sparsellm import evaluation, text
from sparsellm.objectives import l1_objective

SENTENCES = ["a good film", "a bad film", "it was good", "it was bad"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A corpus, rows to measure on, and a table of sentiments."""
    folder = tmp_path_factory.mktemp("files")
    words = " ".join(f"{SENTENCES[i % 4]}, said {i % 7} of {i % 11}." for i in range(2500))
    (folder / "corpus.txt").write_text(words)
    (folder / "wiki.txt").write_text("\n".join(f" {sentence} , said {i} . " for i, sentence in enumerate(SENTENCES)))
    rows = [f"{sentence}\t{i % 2}" for i, sentence in enumerate(SENTENCES)]
    (folder / "sst2.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    return folder


def arguments(files: Path, runs: Path, *more: str) -> list[str]:
    options = {"--corpus": "corpus.txt", "--wikitext": "wiki.txt", "--sst2": "sst2.tsv"}
    paths = [word for option, name in options.items() for word in (option, str(files / name))]
    return ["pretrain", "--smoke", *paths, "--runs", str(runs), *more]


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory) -> Path:
    """The folder of a smoke run, which was interrupted between two checkpoints, and went on."""
    runs, get = tmp_path_factory.mktemp("runs"), text.ShuffledBatches.__getitem__
    programs = jax.config.jax_compilation_cache_dir

    def interrupted(self, step: int):
        if step == 17:
            raise KeyboardInterrupt
        return get(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text.ShuffledBatches, "__getitem__", interrupted)
        assert main(arguments(files, runs)) == 130
    (run,) = (runs / "pretrain").iterdir()
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"10"} and list((run / "compiled").iterdir())
    assert jax.config.jax_compilation_cache_dir == programs
    assert main(arguments(files, runs)) == 0
    assert list((runs / "pretrain").iterdir()) == [run]
    return run


def read_rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rows.jsonl").read_text().splitlines()]


def test_the_model_learns_gets_sparser_and_is_left_with_its_tokenizer(finished, files):
    summary, *steps = read_rows(finished)
    metrics = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == len(metrics) == 30
    for step, row in zip(steps, metrics, strict=True):
        assert step == {name: row[name] for name in step} and {"l1", "gradient_norm", "seconds"} <= row.keys()
    assert steps[0]["loss"] == pytest.approx(math.log(320), rel=0.05)
    assert steps[-1]["loss"] < steps[0]["loss"] - 1
    assert [steps[i]["l1_weight"] for i in (0, 14, 29)] == pytest.approx([1e-3, 1e-3, 1e-2])
    assert 0 < steps[-1]["density"] < steps[0]["density"] < 1
    left = {path.name for path in finished.iterdir()} - {".lock"}
    assert left == {
        "config.json",
        "pretrain_density.png",
        "pretrain_loss.png",
        "metrics.jsonl",
        "model",
        "rows.jsonl",
        "tokenizer",
    } | {"tokens.npz"}
    model, tokenizer = load_opt(finished / "model"), text.load_tokenizer(finished / "model")
    assert language_models.model_folder(str(finished)) == finished / "model"
    held_out = evaluation.perplexity(model, language_models.load(finished).held_out)
    assert held_out.loss == pytest.approx(summary["held_out_loss"], rel=1e-5)
    assert summary["perplexity"] == pytest.approx(math.exp(held_out.loss), rel=1e-4)
    rows = (files / "wiki.txt").read_text().split("\n")
    joined = "\n\n".join([row + "\n" for row in rows[:-1]] + rows[-1:])
    windows = evaluation.recipe_windows(joined, tokenizer, length=32)
    assert summary["wikitext_perplexity"] == pytest.approx(evaluation.perplexity(model, windows).perplexity, rel=1e-4)
    assert summary["sst2_accuracy"] in (0, 0.25, 0.5, 0.75, 1)


def test_an_interrupted_run_ends_the_same_to_the_bit(finished, tmp_path):
    """As a training that was not; `test_training` kills processes."""
    config, data = pretrain.Config.smoke(), language_models.load(finished)
    model = OPT(pretrain.model_config(config, 320), rngs=nnx.Rngs(0))
    objective = l1_objective(pretrain.l1_weight(config), dropout_seed=0)
    recipe = pretrain.training_config(config)
    expected = language_models.train(model, data.train, recipe, 0, tmp_path, Console(quiet=True), objective=objective)
    _, *steps = read_rows(finished)
    assert steps == pretrain.step_rows(expected)
    trained, tree = load_opt(finished / "model"), jax.tree
    for ours, theirs in zip(tree.leaves(nnx.state(trained)), tree.leaves(nnx.state(model)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


SIZES = {"vocab_size": 96, "layers": 3, "d_model": 16, "heads": 2, "d_ff": 40, "max_length": 64}


@pytest.mark.parametrize(
    "changes", [{}, {"gated": True, "activation": "silu"}, {"embed_dim": 8, "layer_sizes": [(2, 40), (1, 24), (1, 8)]}]
)
def test_flops_are_those_of_the_kernels_and_of_causal_attention(changes):
    config = OPTConfig(**SIZES | changes)
    params = nnx.state(nnx.eval_shape(lambda: OPT(config, rngs=nnx.Rngs(0))), nnx.Param)
    leaves = {jax.tree_util.keystr(path, simple=True): x for path, x in jax.tree.leaves_with_path(params)}
    matrices = sum(x.size for name, x in leaves.items() if x.ndim == 2 and "embed_positions" not in name)
    heads = sum(config.sizes(layer)[0] for layer in range(3))
    attention = 2 * 2 * (8 * heads) * 64 / 2  # two products, 2 FLOPs an element, half of the tokens
    assert pretrain.training_flops(config, 64) == pytest.approx(6 * matrices + 3 * attention)


def test_flops_are_as_the_docstring_reckons():
    assert pretrain.training_flops(OPTConfig.preset("125m"), 1024) == pytest.approx(0.80e9, rel=0.01)
    assert pretrain.training_flops(OPTConfig.preset("125m", vocab_size=8192), 1024) == pytest.approx(0.60e9, rel=0.01)


def test_the_speed_leaves_out_the_steps_that_compile():
    metrics: list = [{"seconds": seconds} for seconds in (30.0, 5.0, 5.0, 0.1, 0.2, 0.3)]
    row = pretrain.step_speed(metrics, 1000, 2e9, 1e14)
    assert row == {"tokens": 1000, "step_ms": 200, "train_s": 40.6, "tokens_per_s": 5000, "tflops": 10, "mfu": 0.1}
    assert pretrain.step_speed(metrics[:1], 1000, 2e9, None)["mfu"] is None


def test_one_weight_is_constant_and_several_are_stages_of_equal_length():
    def weights(*l1: float) -> list[float]:
        schedule: Any = pretrain.l1_weight(pretrain.Config(steps=9, l1=l1))
        return np.asarray(jax.vmap(schedule)(np.arange(9, dtype=np.int32))).tolist()

    assert pretrain.l1_weight(pretrain.Config(steps=9)) is None
    assert weights(0.5) == [0.5] * 9
    rising = weights(1.0, 2.0, 4.0)
    assert [rising[i] for i in (0, 2, 5, 8)] == pytest.approx([1, 1, 2, 4]) and rising == sorted(rising)


def test_a_run_is_compared_with_a_finished_one_only(finished, tmp_path):
    other = pretrain.compared(pretrain.Config(against=finished))
    assert other == {"against_perplexity": read_rows(finished)[0]["perplexity"]}
    assert pretrain.compared(pretrain.Config()) == {}
    with pytest.raises(FileNotFoundError, match="finished"):
        pretrain.compared(pretrain.Config(against=tmp_path))


def test_the_vocabulary_is_padded_as_opts_is():
    config = pretrain.Config(size="125m", gated=True, activation="silu")
    model = pretrain.model_config(config, 50265)
    assert (model.vocab_size, model.gated, model.activation, model.layers) == (50272, True, "silu", 12)
    assert pretrain.model_config(config, 8192).vocab_size == 8192


def test_the_report_leaves_out_what_was_not_measured(finished):
    rows = read_rows(finished)
    shown, drawn = pretrain.readme({"rows": [rows[0] | {"mfu": 0.415}, *rows[1:]]})
    assert "42% of what its matrix products reach" in shown
    assert set(drawn) == {"pretrain_loss.png", "pretrain_density.png"}
    for name in ("wikitext_perplexity", "sst2_accuracy"):
        del rows[0][name]
    shown, _ = pretrain.readme({"rows": rows})
    assert "peak" not in shown and "nan" not in shown and shown.splitlines()[-1].count(" – ") == 3


@pytest.mark.parametrize(
    "options,message",
    [
        (["--corpus", "missing"], "there is no missing"),
        (["--wikitext", "missing.txt"], "a text to evaluate on must be a file; there is no missing.txt"),
        (["--sst2", "wiki.txt"], "must have the columns sentence and label"),
        (["--wikitext", "picture.png"], "picture.png"),
        (["--tokenizer", "."], "a tokenizer is vocab.json with merges.txt"),
        (["--size", "126m"], "size must be one of tiny, 125m"),
        (["--size", "175b"], "parameters need about"),
        (["--accumulate", "3"], "accumulate must divide batch; got accumulate=3, batch=4"),
        (["--warmup-steps", "30"], "warmup_steps must be less than steps"),
        (["--l1", "2", "1"], "none less than the one before"),
        (["--length", "100000"], "a window of length=100000 needs 100001 tokens"),
    ],
)
def test_wrong_input_is_answered_in_a_sentence(files, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(language_models, "train", None)  # it shows before
    (tmp_path / "wiki.txt").write_text("no table")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    assert main(arguments(files, tmp_path / "runs", *options)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
