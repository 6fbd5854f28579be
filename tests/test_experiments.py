import dataclasses
import importlib
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from experiments import language_models, quickstart, report, runs
from experiments.__main__ import main, questions
from experiments.headlines import headline
from models import OPT, load_opt
from sparsellm import text, training
from sparsellm.generation import generate

EXPERIMENTS = sorted(questions())


def test_the_list_shows_every_experiment_with_its_question(capsys):
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert {"quickstart", "generate", "report"} <= set(EXPERIMENTS)
    for name, question in questions().items():
        assert question.endswith("?"), f"{name}.py must open with a question in one line"
        assert any(line.split() == [name, *question.split()] for line in listed.splitlines())


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_help_shows_every_option(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    module = importlib.import_module(f"experiments.{name}")
    options = [field.name for field in dataclasses.fields(module.Config)]
    options += ["smoke", "fresh", "keep", "variant", "runs"] if hasattr(module, "run") else []
    for option in options:
        assert f"--{option.replace('_', '-')}" in shown


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_has_what_the_list_relies_on(name):
    module: Any = importlib.import_module(f"experiments.{name}")
    assert dataclasses.fields(module.Config)
    assert hasattr(module, "run") != hasattr(module, "main")
    if hasattr(module, "run"):
        assert type(module.Config.smoke()) is module.Config


def test_an_unknown_name_is_answered_with_the_nearest(capsys):
    assert main(["quickstrat"]) == 2
    assert capsys.readouterr().err == 'no experiment is called "quickstrat": did you mean quickstart?\n'
    assert main(["xyz"]) == 2
    assert "there are " in capsys.readouterr().err


# Runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class SomeConfig:
    size: int = 1
    corpus: Path = Path("somewhere")


def test_an_unfinished_run_is_continued_and_a_finished_one_is_not(tmp_path):
    def start(size: int = 1, **options) -> runs.Run:
        return runs.Run.start("some", SomeConfig(size=size), root=tmp_path, **options)

    with start() as first:
        assert not first.continued
        with start() as while_it_runs:
            assert while_it_runs.folder != first.folder
            while_it_runs.finish([])
    with start(size=2) as other:
        assert not other.continued
    with start(fresh=True) as fresh:
        assert not fresh.continued
        fresh.finish([])
    with start() as again:
        assert again.continued and again.folder == first.folder
        again.finish([{"a": 1}, {"a": 2.5}])
    assert (first.folder / "rows.jsonl").read_text() == '{"a": 1}\n{"a": 2.5}\n'
    with start() as new:
        assert not new.continued


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "\xff"])
def test_a_damaged_run_or_result_is_passed_over_or_named(tmp_path, content):
    with runs.Run.start("some", SomeConfig(), root=tmp_path) as damaged:
        damaged.write("something", "")
    (damaged.folder / "config.json").write_text(content, encoding="latin-1")
    with runs.Run.start("some", SomeConfig(), root=tmp_path) as run:
        assert not run.continued
    damaged.finish([])
    with pytest.raises(FileNotFoundError, match=r"a finished run is a folder .*; .* is none"):
        runs.keep(damaged.folder, results=tmp_path / "results")
    runs.write_atomically(tmp_path / "results" / "cpu" / "some.json", content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"a kept result is a file that --keep has written; .*some.json is none"):
        runs.read_results(tmp_path / "results")


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = runs.write_atomically(tmp_path / "sub" / "file", "before")

    def half(self, content):
        with open(self, "wb") as file:
            file.write(content[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space left"):
        runs.write_atomically(path, "after")
    assert path.read_text() == "before"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_kept_result_says_where_it_comes_from(tmp_path):
    rows = [{"granularity": "128x1", "time_us": 1.5}, {"granularity": "64x1", "time_us": 2.5, "mask": None}]
    with runs.Run.start("some", SomeConfig(), root=tmp_path, command="python -m experiments some") as run:
        with pytest.raises(FileNotFoundError, match=r"a finished run is a folder .*; .* is none"):
            runs.keep(run.folder, results=tmp_path / "results")
        run.finish(rows)
    path = runs.keep(run.folder, results=tmp_path / "results")
    assert path == tmp_path / "results" / "cpu" / "some.json"
    result = json.loads(path.read_text())
    assert list(result) == ["experiment", "device", "versions", "commit", "date", "command", "rows"]
    assert result["rows"] == rows
    assert result["versions"]["jax"] == jax.__version__
    assert runs.read_results(tmp_path / "results") == {("cpu", "some"): result}


def test_a_result_of_other_options_is_kept_and_shown_beside_it(tmp_path):
    with runs.Run.start("some", SomeConfig(), root=tmp_path) as run:
        for variant, time in (("", 1.5), ("long", 2.5)):
            run.finish([{"time_us": time}])
            runs.keep(run.folder, variant=variant, results=tmp_path / "results")
    assert {path.name for path in (tmp_path / "results" / "cpu").iterdir()} == {"some.json", "some.long.json"}
    readme, _ = report.render("<!-- report:some -->\n<!-- /report:some -->", tmp_path / "results", tmp_path)
    assert readme.index("1.5") < readme.index("2.5")


def test_a_result_says_at_which_commits_it_was_measured_not_kept(tmp_path, monkeypatch, capsys):
    results = tmp_path / "results"
    for commit in ("a" * 40, "b" * 40):
        monkeypatch.setenv("SPARSELLM_COMMIT", commit)
        with runs.Run.start("some", SomeConfig(), root=tmp_path, command="it") as run:
            pass
    run.finish([{"time_us": 1.5}])
    monkeypatch.setenv("SPARSELLM_COMMIT", "c" * 40)
    assert main(["keep", "--source", str(run.folder), "--variant", "late", "--results", str(results)]) == 0
    assert capsys.readouterr().out == f"kept {results / 'cpu' / 'some.late.json'}\n"
    (result,) = runs.read_results(results).values()
    assert (result["begun_at"], result["commit"], result["command"]) == ("a" * 40, "b" * 40, "it")
    readme, _ = report.render("<!-- report:some -->\n<!-- /report:some -->", results, tmp_path)
    assert "commit bbbbbbbb, begun at aaaaaaaa: `it`" in readme
    assert main(["keep", "--source", str(run.folder), "--variant", "two words"]) == 1
    assert "error: --variant takes a word; got 'two words'" in capsys.readouterr().err


def test_a_smoke_run_is_not_kept(tmp_path):
    with runs.Run.start("some", SomeConfig(), root=tmp_path, command="python -m experiments some --smoke") as run:
        run.finish([])
    with pytest.raises(ValueError, match="a kept result is worth quoting, which --smoke is not"):
        runs.keep(run.folder, results=tmp_path / "results")


def test_a_markdown_table_is_aligned_and_puts_numbers_to_the_right():
    table = runs.markdown_table([["a", 1.5, "–"], ["long", -10, 3]], ["name", "time", "n"])
    assert table.splitlines() == [
        "| name | time | n |",
        "|------|-----:|--:|",
        "| a    |  1.5 | – |",
        "| long |  -10 | 3 |",
    ]


# Report


def write_result(results: Path, rows: list[dict]) -> None:
    result = {"experiment": "some", "device": "NVIDIA H200", "versions": {"python": "3.12.1", "jax": "0.11.2"}}
    result |= {"commit": "0123456789", "date": "2026-11-21", "command": "python -m experiments some", "rows": rows}
    runs.write_atomically(results / "nvidia_h200" / "some.json", json.dumps(result))


def test_report_writes_the_blocks_and_check_finds_them_stale(tmp_path, capsys):
    readme, results = tmp_path / "README.md", tmp_path / "results"
    readme.write_text("before\n<!-- report:some -->\nold\n<!-- /report:some -->\nafter\n")
    options = ["--readme", str(readme), "--results", str(results)]
    assert main(["report", *options]) == 1
    assert "README has a block for some" in capsys.readouterr().err
    write_result(results, [{"granularity": "128x1", "time_us": 35.25}, {"granularity": "64x1", "speedup": 3}])
    assert main(["report", "--check", *options]) == 1
    assert "is stale; `python -m experiments report` writes it anew" in capsys.readouterr().err
    assert main(["report", *options]) == 0
    assert readme.read_text() == (
        "before\n<!-- report:some -->\n"
        "NVIDIA H200, jax 0.11.2, 2026-11-21, commit 01234567: `python -m experiments some`\n\n"
        "| granularity | time_us | speedup |\n"
        "|------------:|--------:|--------:|\n"
        "|       128x1 |   35.25 |       – |\n"
        "|        64x1 |       – |       3 |\n"
        "<!-- /report:some -->\nafter\n"
    )
    assert main(["report", "--check", *options]) == 0
    write_result(results, [{"granularity": "128x1", "time_us": 34.0}])
    assert main(["report", "--check", *options]) == 1


def test_a_line_of_the_summary_names_the_quickest_other_system():
    line = headline("a product", 20.0, "µs", 50.0, {"slow": 90.0, "absent": None, "quick": 30.0})
    assert line == ["a product", "20 µs", "50 µs (2.50x)", "quick: 30 µs (1.50x)"]
    assert headline("alone", 1234.5, "ms", others={"absent": None}) == ["alone", "1234 ms", "–", "–"]


def test_the_summary_has_each_line_of_an_experiment_once_without_variant_first():
    about = {"model": "m", "requests": 9, "batch": 4}
    rows = [about | {"variant": "dense", "seconds": 3.0}, about | {"variant": "sparse", "seconds": 2.0}]
    slower = [row | {"seconds": 7.0} for row in rows]
    results = {"opt_serving": rows, "opt_serving.again": slower, "opt_decode_pruned": [], "some": [{"a": 1}]}
    kept = {("nvidia_h200", name): {"device": "NVIDIA H200", "rows": own} for name, own in results.items()}
    experiments = ["summary", "some", "opt_serving"]  # of README's blocks: not every result has one
    assert report._summary(kept, experiments).splitlines() == [
        "NVIDIA H200:",
        "",
        "|                                     | sparse | dense, here | the quickest other system |",
        "|-------------------------------------|-------:|------------:|--------------------------:|",
        "| m, a stream of 9 requests on 4 rows |    2 s | 3 s (1.50x) |                         – |",
    ]


def test_readme_is_up_to_date():
    assert report.main(report.Config(check=True)) == 0, "run `make report`"


# Quickstart


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(12):
        lines = [f"def function_{j}(x):\n    return x + {i * j}\n" for j in range(40)]
        (folder / f"module_{i}.py").write_text("\n".join(lines))
    return folder


def quickstart_arguments(corpus: Path, folder: Path) -> list[str]:
    return ["quickstart", "--smoke", "--corpus", str(corpus), "--runs", str(folder)]


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory) -> Path:
    """The folder of a smoke run, which was interrupted between two checkpoints, and went on."""
    folder, get = tmp_path_factory.mktemp("runs"), text.ShuffledBatches.__getitem__

    def interrupted(self, step: int):
        if step == 17:
            raise KeyboardInterrupt
        return get(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text.ShuffledBatches, "__getitem__", interrupted)
        assert main(quickstart_arguments(corpus, folder)) == 130
    (run,) = (folder / "quickstart").iterdir()
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"10"}
    assert main(quickstart_arguments(corpus, folder)) == 0
    assert list((folder / "quickstart").iterdir()) == [run] and not (run / "checkpoints").exists()
    return run


def read_rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "rows.jsonl").read_text().splitlines()]


def test_quickstart_learns_and_its_paths_and_formats_agree(finished):
    summary, *rows = read_rows(finished)
    losses = [json.loads(line)["loss"] for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] == pytest.approx(math.log(320), rel=0.05)  # it knows nothing
    assert summary["loss"] == losses[-1] < losses[0] - 1
    assert summary["perplexity"] == pytest.approx(math.exp(summary["held_out_loss"]))
    densities = {(row["layer"], row["granularity"]): row["density"] for row in rows if "density" in row}
    assert len(densities) == 2 * 6
    for layer in range(2):
        by_size = [densities[layer, f"{rows}x1"] for rows in (1, 8, 16, 32, 64, 128)]
        assert by_size == sorted(by_size) and 0 < by_size[0] < 1
    (sparse,) = (row for row in rows if row.get("variant") == "sparse")
    assert sparse["error"] < 1e-5
    assert sparse["same_greedy_tokens"] == sparse["greedy_tokens"] > 0
    assert [row["largest_logit_difference"] for row in rows if "format" in row] == [0.0, 0.0]
    left = {path.name for path in finished.iterdir()}
    assert {"config.json", "rows.jsonl", "density.png", "loss.png", "report.txt", "model"} <= left


def test_the_densities_are_those_of_the_activations_recomputed_by_hand(finished):
    """The first layer's feed-forward activation in numpy float64, from the saved weights."""
    model = load_opt(finished / "model" / "orbax")
    with np.load(finished / "tokens.npz") as arrays:
        tokens = arrays["held_out"][: 32 * 4].reshape(4, 32)
    rows = quickstart.measure_density(model, tokens)

    def float64(parameter) -> np.ndarray:
        return np.asarray(parameter[...], np.float64)

    layer = model.layers[0]
    x = float64(model.embed_tokens.embedding)[tokens] + float64(model.embed_positions.embedding)[2:34]

    def linear(part, x):
        return x @ float64(part.kernel) + float64(part.bias)

    def norm(part, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * float64(part.scale) + float64(part.bias)

    y, attention = norm(layer.self_attn_layer_norm, x), layer.self_attn
    q, k, v = (linear(p, y).reshape(4, 32, 2, 16) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    scores = np.where(np.tri(32, dtype=bool), np.einsum("bqhd,bkhd->bhqk", q, k) / 4, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v).reshape(4, 32, 32)
    x = x + linear(attention.out_proj, mixed)
    live = (linear(layer.fc1, norm(layer.final_layer_norm, x)) > 0).reshape(128, 128)
    expected = {f"{r}x1": live.reshape(-1, r, 128).any(axis=1).mean() for r in (1, 8, 16, 32, 64, 128)}
    measured = {row["granularity"]: row["density"] for row in rows if row["layer"] == 0}
    assert measured == pytest.approx(expected, abs=2e-3)  # a value within rounding of 0 may fall on either side


def test_an_interrupted_quickstart_has_learned_the_same(finished, tmp_path):
    """As a training that was not; `test_training` kills processes."""
    size, data = quickstart.SIZES["tiny"], language_models.load(finished)
    model = OPT(size.model, rngs=nnx.Rngs(0))
    expected = language_models.train(model, data.train, size.training, 0, tmp_path, Console(quiet=True))
    metrics = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in metrics] == [row["loss"] for row in expected]
    trained = load_opt(finished / "model" / "orbax")
    for (path, ours), theirs in zip(
        jax.tree.leaves_with_path(nnx.state(trained)), jax.tree.leaves(nnx.state(model)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs, err_msg=jax.tree_util.keystr(path))


def test_generate_streams_what_generation_returns(finished, capsys):
    folder = finished / "model" / "huggingface"
    tokenizer = text.load_tokenizer(folder)
    expected = generate(load_opt(folder), [tokenizer.encode("def ")], max_new_tokens=20)[0]
    for source in (finished, folder, finished / "model" / "orbax"):
        assert main(["generate", "--source", str(source), "--prompt", "def ", "--max-new-tokens", "20"]) == 0
        assert capsys.readouterr().out == "def " + tokenizer.decode(expected) + "\n"


def test_streamed_text_waits_for_whole_characters(capsys):
    from experiments.generate import Printer

    tokenizer = text.train_bpe(["a"], 260)
    printer = Printer(tokenizer)
    shown = []
    for token in tokenizer.encode("é🙂\ufffd!"):
        printer(0, token)
        shown.append(capsys.readouterr().out)
    printer.end()
    assert all("\ufffd" not in piece or "!" in piece for piece in shown)
    assert "".join(shown) + capsys.readouterr().out == "é🙂\ufffd!\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--corpus", "missing"], "there is no"),
        (["--corpus", "empty.txt"], "a corpus must hold text"),
        (["--corpus", "binary.bin"], "holds a NUL byte at character 3"),
        (["--corpus", "short.txt"], "at least 2 documents"),
        (["--corpus", "two"], "a window of length=32 needs 33 tokens"),
        (["--corpus", "two", "--prompt-tokens", "60", "--new-tokens", "8"], "prompt_tokens must be 1 to 32"),
        (["--corpus", "two", "--new-tokens", "100"], "must fit into the model's 64 positions"),
        (["--corpus", "two", "--steps", "0"], "steps must be at least 1; got steps=0"),
    ],
)
def test_wrong_input_is_answered_in_a_sentence(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("")
    Path("binary.bin").write_bytes(b"ELF\0\1")
    Path("short.txt").write_text("too short")
    Path("two").mkdir()
    Path("two/a.txt").write_text("one")
    Path("two/b.txt").write_text("two")
    assert main(["quickstart", "--smoke", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_prompt_longer_than_the_context_is_answered_in_a_sentence(finished, capsys):
    assert main(["generate", "--source", str(finished), "--prompt", "x y " * 100]) == 1
    assert "must fit into max_length=64 positions" in capsys.readouterr().err


def test_a_full_disk_at_a_checkpoint_is_answered_in_a_sentence(corpus, tmp_path, monkeypatch, capsys):
    from orbax.checkpoint import v1 as ocp

    def full(self, step, state):
        raise ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device")

    monkeypatch.setattr(ocp.training.Checkpointer, "save", full)
    assert main(quickstart_arguments(corpus, tmp_path)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: no disk space is left for a checkpoint") and "there is none yet" in error


def test_a_bug_is_not_dressed_up_as_wrong_input(corpus, tmp_path, monkeypatch):
    """An error from inside another library keeps its traceback."""
    monkeypatch.setattr(training, "train", lambda *args, **kwargs: json.loads("{"))
    with pytest.raises(ValueError, match="Expecting property name"):
        main(quickstart_arguments(corpus, tmp_path))


def test_long_tables_are_folded():
    rows = [[i, i * i] for i in range(18)]
    short, long = (runs.markdown_table(some, ["n", "square"]) for some in (rows[:16], rows))
    folded = report._folded(f"Before:\n\n{short}\n\nBetween:\n\n{long}\n")
    assert folded.startswith(f"Before:\n\n{short}\n\nBetween:\n\n<details><summary>All 18 rows</summary>\n\n| ")
    assert folded.endswith("|\n\n</details>\n") and long in folded
