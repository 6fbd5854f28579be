import dataclasses
import gc
import json
import math
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import opt, programs, pruning, pruning_time, quickstart
from experiments.__main__ import main
from experiments.runs import Run
from models import OPTConfig
from models.attention import place_tokens
from sparsellm.pruning import METHODS, NM, Blocks, Unstructured, memory, prune, walk
from sparsellm.text import load_tokenizer

CONFIG = dataclasses.replace(
    pruning.Config.smoke(),
    methods=("magnitude", "wanda owl"),
    patterns=("unstructured", "4:8"),
    recovery_steps=1,
    save=True,
)
COLUMNS = {"model", "method", "pattern", "density", "sparsity", "perplexity", "dense_perplexity", "time_s"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Run, list[dict]]:
    """A run that was killed once, before its second model, and went on."""
    root, tiny = tmp_path_factory.mktemp("runs"), quickstart.SIZES["tiny"]
    model = dataclasses.replace(tiny.model, layers=1, d_ff=32)  # one shape for all kernels
    training = dataclasses.replace(tiny.training, steps=5, warmup_steps=1)

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(quickstart.SIZES, "tiny", dataclasses.replace(tiny, model=model, training=training))
        with patch.context() as inner, pytest.raises(KeyboardInterrupt):
            inner.setattr(pruning.pruning, "owl_sparsities", killed)
            with Run.start("pruning", CONFIG, root=root) as run:
                pruning.run(CONFIG, run)
        with Run.start("pruning", CONFIG, root=root) as run:
            rows = pruning.run(CONFIG, run)
            run.finish(rows)
    return run, rows


def test_a_row_for_every_pruned_model(finished):
    run, rows = finished
    labels = [(row["method"], row["pattern"], row["sparsity"]) for row in rows]
    assert run.continued
    structured = [f"taylor {order}{recovery}" for order in (1, 2) for recovery in ("", " + lora")]
    assert labels == [
        ("magnitude", "unstructured", 0.5),
        ("wanda owl", "unstructured", 0.5),
        ("magnitude", "4:8", 0.5),
        ("wanda owl", "4:8", 0.5),
        *((method, pruning.STRUCTURES, 0.5) for method in structured),
    ]
    for row in rows:
        assert row.keys() - {"error"} == COLUMNS
        assert math.isfinite(row["perplexity"]) and row["dense_perplexity"] == rows[0]["dense_perplexity"]
        assert row["density"] == pytest.approx(0.5, abs=0.02)
        assert ("error" in row) == (row["pattern"] != pruning.STRUCTURES)
        assert 0 < row.get("error", 0.5) < 1
    assert (run.folder / "pruning.png").stat().st_size > 1000
    assert len((run.folder / "rows.jsonl").read_text().splitlines()) == len(rows)


def test_the_pruned_models_are_left_to_go_on_with(finished):
    run, rows = finished
    names = [pruning.saved_name(row["method"], row["pattern"], row["sparsity"]) for row in rows]
    assert names[:2] == ["magnitude_unstructured_50", "wanda_owl_unstructured_50"]
    assert {path.name for path in (run.folder / "models").iterdir()} == set(names)
    for name, row in zip(names, rows, strict=True):
        model, kind, folder = pruning.load_model(str(run.folder / "models" / name))
        assert kind == "opt" and load_tokenizer(folder).vocab_size <= model.config.vocab_size
        kernels = [kernel for block in walk(model) for kernel in block.kernels.values()]
        if row["pattern"] == pruning.STRUCTURES:
            assert model.config.layer_sizes is not None
        else:
            zeros = sum(int((kernel[...] == 0).sum()) for kernel in kernels) / sum(kernel.size for kernel in kernels)
            assert 1 - zeros == pytest.approx(row["density"], abs=1e-3)


def test_the_run_of_quickstart_is_taken_as_it_is(finished, tmp_path, monkeypatch):
    """Its folder holds the tokens and the model; nothing is trained again."""
    run, rows = finished
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    for name in ("tokens.npz", "tokenizer"):
        (earlier / name).symlink_to(run.folder / name)
    monkeypatch.setattr(pruning, "load_opt", None)
    seen = {}

    class Model:
        config = OPTConfig(layers=1, d_model=2, heads=1, d_ff=2, max_length=64)

    def load(folder):
        seen["folder"] = folder
        return Model

    monkeypatch.setitem(pruning.LOADERS, "opt", load)
    folder = earlier / "model" / "huggingface"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "opt"}))
    for file in (run.folder / "tokenizer").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = dataclasses.replace(CONFIG, source=str(earlier), corpus=None)
    subject = pruning.prepare(config, run)
    assert seen["folder"] == folder and subject.model is Model and subject.name == "opt-1x2"
    Model.config = OPTConfig.preset("350m")
    assert pruning.prepare(config, run).name == "opt-350m"
    assert subject.train.shape[1] == subject.held_out.shape[1] == 33  # the tiny size's window, and a target
    corpus = tmp_path / "calibration.jsonl"
    corpus.write_text(json.dumps({"text": "calibrate on this " * 50}))
    other = pruning.prepare(dataclasses.replace(config, corpus=corpus), run)  # measured on the run's own text
    assert np.array_equal(other.held_out, subject.held_out)
    tokens = other.train[:, :-1].ravel().tolist()
    assert "calibrate on this calibrate on this" in load_tokenizer(folder).decode(tokens)
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(ValueError, match="source must be a model of opt or mixtral; .* is of t5"):
        pruning.prepare(config, run)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json must hold JSON; "):
        pruning.prepare(config, run)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="a checkpoint folder must hold config.json; .* does not"):
        pruning.prepare(config, run)


def test_every_method_meets_every_pattern_it_knows():
    config = pruning.Config(patterns=("unstructured", "2:4", "3:8", "64x64"), methods=("wanda", "wanda owl"))
    cells = list(pruning.cells(config, None))
    assert cells == [
        ("wanda", Unstructured(), 0.5),
        ("wanda owl", Unstructured(), 0.5),
        ("wanda", Unstructured(), 0.7),
        ("wanda owl", Unstructured(), 0.7),
        ("wanda", NM(2, 4), 0.5),  # in which OWL changes nothing
        ("wanda", NM(3, 8), 0.625),
        ("wanda owl", NM(3, 8), 0.625),
        ("wanda", Blocks(64, 64), 0.5),
        ("wanda", Blocks(64, 64), 0.7),
    ]


def test_readme_shows_a_column_a_method():
    common: dict[str, Any] = {"model": "opt-small", "dense_perplexity": 27.66, "sparsity": 0.5, "density": 0.5}
    rows = [
        common | {"method": "magnitude", "pattern": "unstructured", "perplexity": 193.0},
        common | {"method": "wanda owl", "pattern": "unstructured", "perplexity": 39.25},
        common | {"method": "magnitude", "pattern": "2:4", "perplexity": 12345.6},
        common | {"method": "taylor 1", "pattern": pruning.STRUCTURES, "perplexity": 50.0, "density": 0.75},
    ]
    table, figures = pruning.readme({"rows": rows})
    assert table.splitlines() == [
        "opt-small, dense perplexity 27.66.",
        "",
        "| pattern      | sparsity | magnitude | wanda owl |",
        "|--------------|---------:|----------:|----------:|",
        "| unstructured |      50% |    193.00 |     39.25 |",
        "| 2:4          |      50% |  1.23e+04 |         – |",
        "",
        "| heads and neurons | parameters gone | perplexity |",
        "|-------------------|----------------:|-----------:|",
        "| taylor 1          |             25% |      50.00 |",
    ]
    assert figures.keys() == {"pruning.png"}


@pytest.mark.parametrize(
    "options,message",
    [
        (["--methods", "wonda"], "methods must be some of"),
        (["--patterns", "4:2"], "n:m must keep n of m"),
        (["--sparsities", "1.0"], "sparsities must lie between 0 and 1"),
        (["--structures", "0"], "structures must lie between 0 and 1"),
        (["--batch", "0"], "batch must be at least 1; got batch=0"),
        (["--recovery-steps", "-1"], "recovery_steps must be at least 0"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_trained(options, message, tmp_path, capsys):
    assert main(["pruning", "--smoke", "--runs", str(tmp_path), *options]) == 1
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "pruning").iterdir())


def test_the_time_of_a_layer_is_given_with_what_became_of_it(tmp_path, capsys):
    config = dataclasses.replace(pruning_time.Config.smoke(), methods=("magnitude", "sparsegpt"))
    with Run.start("pruning_time", config, root=tmp_path) as run:
        magnitude, sparsegpt = pruning_time.run(config, run)
    assert magnitude["weights"] == 4 * 16**2 + 2 * 16 * 64 and magnitude["kernels"] == 6 and magnitude["tokens"] == 64
    assert 0 < sparsegpt["error"] < magnitude["error"] < 1
    assert all(row["zeros"] == pytest.approx(0.5, abs=0.01) and row["time_s"] > 0 for row in (magnitude, sparsegpt))
    assert "| opt-tiny, a layer | sparsegpt" in capsys.readouterr().out
    with pytest.raises(ValueError, match="sparsity must lie between 0 and 1"):
        pruning_time.run(dataclasses.replace(config, sparsity=1.0), run)


WHOLE = dataclasses.replace(pruning_time.Config.smoke(), whole=True, methods=("wanda", "sparsegpt"))


def test_a_whole_model_is_pruned_block_by_block(tmp_path, monkeypatch, capsys):
    """Each method starts from the same weights; none of an earlier model's are there any more."""
    made, peaks = [], iter([1.0, 2.0, 2.0, 2.0])

    def create(make, mesh):
        assert not [kernel for kernel in made if kernel() is not None]
        model = make()
        made.extend(weakref.ref(layer.fc1.kernel[...]) for layer in model.layers)
        return model

    monkeypatch.setitem(opt.TINY, "layers", 3)
    monkeypatch.setattr(pruning_time, "create_model", create)
    monkeypatch.setattr(programs, "peak_memory_gib", lambda: next(peaks))
    gc.disable()  # what is in no cycle goes at once
    try:
        with Run.start("pruning_time", WHOLE, root=tmp_path) as run:
            rows = pruning_time.run(WHOLE, run)
    finally:
        gc.enable()
    assert len(made) == 6 and [row["method"] for row in rows] == ["wanda", "sparsegpt"]
    assert [row["memory_gib"] for row in rows] == [2.0, None]  # the second one held no more
    for row in rows:
        assert row["model"] == "opt-tiny" and row["kernels"] == 18 and row["tokens"] == 64
        assert row["weights"] == 3 * (4 * 16**2 + 2 * 16 * 64) and row["zeros"] == pytest.approx(0.5, abs=0.01)
        assert 0 < row["block_s"] < row["time_s"] and abs(row["compiling_s"]) < row["time_s"]
    assert 0 < rows[1]["error"] < rows[0]["error"] < 1
    shown = capsys.readouterr().out
    assert "| model    | method    | pattern      | tokens |" in shown and "| s a block | GiB | zeros |" in shown
    assert len((run.folder / "checkpoints" / "tiny_wanda.json").read_text()) > 100  # where a killed run goes on


def test_the_error_of_a_whole_model_is_that_of_its_last_hidden_states(monkeypatch):
    monkeypatch.setitem(opt.TINY, "layers", 2)
    row = pruning_time.measure_whole(WHOLE, "tiny", "magnitude")
    dense, pruned = (pruning_time.make(WHOLE, "tiny") for _ in range(2))
    prune(pruned, METHODS["magnitude"], sparsity=0.5)
    tokens = jnp.asarray(pruning_time.random_windows(WHOLE, dense)[:1])

    @jax.jit
    def run_layers(model):
        x = model.embed_tokens(tokens) + model.embed_positions(jnp.arange(2, 18)[None])
        for layer in model.layers:
            x, _ = layer(x, place_tokens(tokens), None)
        return x[0]

    before, after = (np.asarray(run_layers(model), np.float64) for model in (dense, pruned))
    expected = np.median(np.linalg.norm(after - before, axis=1) / np.linalg.norm(before, axis=1))
    assert row["error"] == pytest.approx(expected, rel=1e-4) and row["tokens"] == 0


def test_a_model_that_does_not_fit_is_refused_before_it_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "capacity", lambda: 80 * 2**30)
    monkeypatch.setattr(pruning_time, "create_model", None)
    config = dataclasses.replace(pruning_time.Config(), whole=True, sizes=("30b",), methods=("wanda", "sparsegpt"))
    with (
        Run.start("pruning_time", config, root=tmp_path) as run,
        pytest.raises(ValueError, match=r"pruning needs about 81.83 GiB .*parameters 55.17.*; it has 80.00: fewer"),
    ):
        pruning_time.run(config, run)
