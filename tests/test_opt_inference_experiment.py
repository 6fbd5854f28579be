"""The experiments opt_inference and opt_serving: their smoke forms, what they refuse, what they would not let pass."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import opt, opt_decode, opt_inference, opt_peers, opt_serving, programs
from experiments.__main__ import main
from experiments.records import LONGEST, choose_records, made_up_records, read_records
from experiments.runs import Run
from models import OPT
from sparsellm import serving
from sparsellm.serving import Answer, Request
from sparsellm.text import train_bpe


@pytest.fixture(scope="module")
def model() -> OPT:
    """Of the tiny size; numpy makes it, which compiles nothing. `test_opt_decode_experiment` makes synthetic ones."""
    config, rng = opt.config_of("tiny", "float32", neuron_major=True), np.random.default_rng(0)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: OPT(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), state))


def smoke(tmp_path, name: str, model: OPT, monkeypatch) -> list[dict[str, Any]]:
    monkeypatch.setattr(opt, "make_model", lambda *arguments, **options: (model, "random"))
    assert main([name, "--smoke", "--runs", str(tmp_path)]) == 0
    (folder,) = (tmp_path / name).glob("*/")
    assert (folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_opt_inference_runs_on_a_cpu(tmp_path, capsys, model, monkeypatch):
    rows = smoke(tmp_path, "opt_inference", model, monkeypatch)
    assert [row["variant"] for row in rows] == ["padded", "packed", "packed+sparse", "packed by token+sparse"]
    assert rows[0]["error"] == 0 and all(row["error"] < 1e-4 and row["time_ms"] > 0 for row in rows)
    assert "| opt-tiny | ".replace(" ", "") in capsys.readouterr().out.replace(" ", "")


def test_opt_serving_runs_on_a_cpu(tmp_path, model, monkeypatch):
    dense, sparse = smoke(tmp_path, "opt_serving", model, monkeypatch)
    assert (dense["variant"], sparse["variant"]) == ("dense", "sparse")
    for row in (dense, sparse):
        assert row["error"] < 1e-3 and row["tokens_per_s"] > 0 and len(row["latencies_s"]) == row["requests"] == 6
        assert 0 < row["first_token_s_p50"] <= row["first_token_s_p99"] <= row["latency_s_p99"]


@jax.jit
def _logits(model, tokens):
    return model(tokens)[0]


def logits_of(model, text) -> np.ndarray:
    """Of one sequence, padded behind, where no token looks."""
    tokens = np.zeros((1, 16), np.int32)
    tokens[0, : len(text)] = text
    return np.asarray(_logits(model, tokens))[: len(text)]


def test_the_logits_are_those_after_each_record(model):
    """Against the model on one record at a time."""
    batch = [(5, 6, 7), (8,), (9, 10, 11, 12)]
    expected = [logits_of(model, tokens)[-1] for tokens in batch]
    for arrays in (opt_inference._padded(batch), opt_inference._packed(batch)):
        got = jax.jit(opt_inference.next_logits)(model, *arrays)
        np.testing.assert_allclose(got, np.stack(expected), atol=1e-4)


def test_the_middle_layer_is_given_what_comes_out_of_those_before_it(model):
    """Of all layers, that is what the last norm takes."""
    tokens, ends, packing = opt_inference._packed([(5, 6, 7), (8,)])
    places = opt_inference._places(tokens, packing=packing)
    x = opt_inference.entering(model, len(model.layers), tokens, places)
    logits = model.logits(model.final_layer_norm(x))[0, ends]
    np.testing.assert_allclose(logits[0], logits_of(model, (5, 6, 7))[-1], atol=1e-4)


@pytest.mark.parametrize("pre_norm", [True, False])
def test_the_parts_that_are_timed_are_those_of_the_model(model, pre_norm):
    """Of its middle layer the output of the feed-forward block, on what attention and the layers before gave."""
    config = dataclasses.replace(model.config, pre_norm=pre_norm)
    whole = nnx.eval_shape(lambda: OPT(config, rngs=nnx.Rngs(0)))
    ours = nnx.state(whole)
    nnx.update(whole, {name: found for name, found in nnx.state(model).items() if name in ours})  # no last norm
    tokens, _, packing = opt_inference._packed([(5, 6, 7), (8,)])
    middle, places = len(whole.layers) // 2, opt_inference._places(tokens, packing=packing)
    captured: Any = nnx.capture(whole, nnx.Intermediate)(tokens, packing=packing)[1]
    x = opt_inference.entering(whole, middle, tokens, places)
    y = opt_inference._attention(whole.layers[middle], x, places, pre_norm=pre_norm)
    out = opt_inference._feed_forward(whole.layers[middle], x, y, places, pre_norm=pre_norm)
    np.testing.assert_allclose(out, captured["layers"][middle]["ffn_output"][0], atol=1e-5)


def test_a_wrong_variant_is_not_let_pass(model, monkeypatch):
    def wrong(batch, by_token):
        tokens, ends, packing = opt_inference.pack(batch)[0], *(lambda p: (p.last - 1, p))(opt_inference.pack(batch)[1])
        return [tokens, ends, packing]

    monkeypatch.setattr(opt_inference, "_packed", wrong)
    monkeypatch.setattr(opt_inference, "parts_ms", lambda *_: {})
    with pytest.raises(RuntimeError, match="packed: logits differ by"):
        opt_inference._measure_batch(opt_inference.Config.smoke(), model, [(5, 6, 7), (8, 9)], programs.wall_clock)


def test_a_wrong_answer_is_not_let_pass(model):
    """Each of its tokens counts, those after it do not."""
    request = Request(prompt=[5, 6, 7], max_new_tokens=4)
    text = [5, 6, 7]
    for _ in range(4):
        text.append(int(np.argmax(logits_of(model, text)[-1])))
    right = text[3:]
    assert opt_serving.largest_gap(model, request, Answer(tokens=right), 48) == 0
    for i in range(4):
        wrong = [*right[:i], (right[i] + 1) % 512, *right[i + 1 :]]
        assert opt_serving.largest_gap(model, request, Answer(tokens=wrong), 48) > opt_serving.LISTED_TOLERANCE
    assert opt_serving.largest_gap(model, request, Answer(tokens=right[:2]), 48) == 0


@pytest.mark.parametrize("variant", ["dense", "sparse"])
def test_a_refill_that_spoils_the_cache_is_not_let_pass(model, variant, monkeypatch):
    """Of the rows beside it; and where those are shared, of its own."""
    config = dataclasses.replace(opt_serving.Config.smoke(), requests=6, per_sequence=False)
    graphdef, state = nnx.split(model)  # whose text is one token over and over; so that it depends on what it holds:
    own = nnx.merge(graphdef, jax.tree.map(lambda x: 4 * x if x.ndim == 2 else 1 + 0.1 * x, state))
    served, reference = opt_serving.variant_of(own, variant, config)
    records = made_up_records(6, vocab_size=512, longest=40, seed=0)
    requests, prefill, refills = opt_serving.stream(records, 0.0, 0), serving.decoding.prefill, []

    def spoilt(rows):
        return rows._replace(cache=rows.cache._replace(values=tuple(9 - 9 * v for v in rows.cache.values)))

    def spoiling(graphdef, state, rows, *arguments, **options):
        if rows is not None:
            refills.append(rows)
            rows = spoilt(rows) if variant == "dense" else rows
        found = prefill(graphdef, state, rows, *arguments, **options)
        return spoilt(found) if rows is not None and variant == "sparse" else found

    monkeypatch.setattr(opt_serving, "_serve_compiled", lambda serve_all: [])
    monkeypatch.setattr(opt_serving, "statistics", lambda answers: {})
    assert opt_serving._measure(config, served, reference, requests)["error"] < 1e-3
    monkeypatch.setattr(serving.decoding, "prefill", spoiling)
    with pytest.raises(RuntimeError, match="standard deviations below the likeliest: not the model's"):
        opt_serving._measure(config, served, reference, requests)
    assert refills


def test_texts_that_are_drawn_do_not_run_in_circles(model):
    hidden = jax.random.normal(jax.random.key(0), (64, model.config.d_model))
    own, drawn, other = (
        jax.jit(lambda m, x: m.logits(x))(opt_serving.Drawn(model, evenly), x)
        for evenly, x in ((0.0, hidden), (1.0, hidden), (1.0, hidden * np.float32(1.0001)))
    )
    np.testing.assert_array_equal(own, model.logits(hidden))
    tokens = np.argmax(np.asarray(drawn), axis=1)
    assert len(set(tokens)) > 55 and np.mean(tokens) == pytest.approx(256, abs=60)  # 64 draws of 512
    assert np.mean(tokens == np.argmax(np.asarray(other), axis=1)) < 0.1


@pytest.mark.parametrize(
    ("experiment", "changes", "message"),
    [
        (opt_inference, {"models": ()}, "models must hold something; got none"),
        (opt_inference, {"models": ("1b",)}, "size must be one of tiny, 125m, .*; got '1b'"),
        (opt_inference, {"truncate": (-1,)}, "truncate must be at least 0"),
        (opt_inference, {"batch": 0}, "batch must be at least 1; got batch=0"),
        (opt_inference, {"dtype": "int8"}, "dtype must be one of bfloat16, float16, float32; got 'int8'"),
        (opt_inference, {"sparse_rows": 3}, "sparse_rows must be None or one of"),
        (opt_serving, {"rows": 0}, "rows must be at least 1; got rows=0"),
        (opt_serving, {"rows": 33}, "rows must be at most 32, which share a list of neurons; got rows=33"),
        (opt_serving, {"rate": -1.0}, "rate must be at least 0; got rate=-1.0"),
    ],
)
def test_what_is_refused(tmp_path, experiment, changes, message):
    config = dataclasses.replace(experiment.Config.smoke(), **changes)
    with Run.start("opt", config, root=tmp_path) as run, pytest.raises(ValueError, match=message):
        experiment.run(config, run)


@pytest.mark.parametrize("experiment", [opt_inference, opt_decode])
def test_a_profile_is_looked_for_before_anything_is_measured(tmp_path, monkeypatch, experiment):
    monkeypatch.setattr(opt_peers, "measure_prefill", None)
    monkeypatch.setattr(opt_peers, "measure_decode", None)
    config = dataclasses.replace(experiment.Config.smoke(), profile=tmp_path / "nowhere.csv", no_peers=False)
    with Run.start("opt", config, root=tmp_path) as run, pytest.raises(FileNotFoundError, match="nowhere.csv"):
        experiment.run(config, run)


def test_transformers_is_put_next_to_ours(tmp_path, monkeypatch, model):
    asked = []
    monkeypatch.setattr(opt, "make_model", lambda *arguments, **options: (model, "random"))

    def measure(config, batches, repeats):
        asked.append((config.d_model, batches, repeats))
        return [{"time_ms": 7.0, "memory_gib": 2.0} for _ in batches]

    monkeypatch.setattr(opt_peers, "measure_prefill", measure)
    monkeypatch.setattr(
        opt_inference, "_measure_batch", lambda *_: [{"variant": v, "time_ms": 1.0} for v in opt_inference.VARIANTS]
    )
    config = dataclasses.replace(opt_inference.Config.smoke(), no_peers=False, truncate=(0, 9))
    with Run.start("opt_inference", config, root=tmp_path) as run:
        rows = opt_inference.measure(config, run)
    assert [row["transformers_time_ms"] for row in rows] == [7.0] * 8
    ((width, (whole, cut), repeats),) = asked
    assert (width, repeats) == (16, 2) and max(whole) > 9 and cut == [min(length, 9) for length in whole]
    assert [row["tokens"] for row in rows] == [sum(whole)] * 4 + [sum(cut)] * 4


# Records.


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(["Name a colour. Blue and green"] * 3, 280).save(folder)
    return folder


@pytest.fixture
def file(tmp_path):
    records = [
        {"instruction": "Name a colour.", "input": "", "output": "Blue"},
        {"instruction": "Name", "input": "green", "output": ""},
        {"instruction": "Name a colour.", "input": "and", "output": "green"},
    ]
    path = tmp_path / "records.json"
    path.write_text(json.dumps(records))
    return path


def test_records_are_read_as_prompts_and_answers(file, tokenizer):
    from sparsellm.text import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    records = read_records(file, loaded)
    texts = [(loaded.decode(r.prompt), loaded.decode(r.answer)) for r in records]
    assert texts == [("Name a colour.\n", "Blue"), ("Name\ngreen\n", ""), ("Name a colour.\nand\n", "green")]
    assert all(r.tokens[0] == 2 and 2 not in r.tokens[1:] for r in records)


def test_records_that_have_an_answer_and_fit_are_chosen(file, tokenizer):
    chosen = choose_records(file, tokenizer, 2, vocab_size=300, longest=100, seed=0)
    assert len({r.tokens for r in chosen}) == 2 and all(r.answer for r in chosen)
    with pytest.raises(ValueError, match="3 records of at most 100 tokens are needed; .* has 2"):
        choose_records(file, tokenizer, 3, vocab_size=300, longest=100, seed=0)
    with pytest.raises(ValueError, match="tokenizer must be of at most the model's 200 tokens; got 2"):
        choose_records(file, tokenizer, 1, vocab_size=200, longest=100, seed=0)
    with pytest.raises(ValueError, match="tokenizer must be the folder of one that reads the records; got None"):
        choose_records(file, None, 1, vocab_size=300, longest=100, seed=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nothing", "records must be JSON; .* is not"),
        ("[]", "records must be a list of at least one; .* holds list"),
        ('{"a": 1}', "records must be a list of at least one; .* holds dict"),
        (
            '[{"instruction": "x", "output": 3}]',
            "must have the texts instruction, input and output; record 0 of .* has not",
        ),
        ('[{"output": "x"}]', "must have the texts instruction"),
    ],
)
def test_files_that_hold_no_records(file, tokenizer, content, message):
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        choose_records(file, tokenizer, 1, vocab_size=300, longest=100, seed=0)


def test_made_up_records_are_about_as_long_as_real_ones():
    made = made_up_records(2000, vocab_size=50272)
    lengths = [len(record.tokens) for record in made]
    assert 110 < np.mean(lengths) < 150 and max(lengths) == LONGEST and min(lengths) >= 8
    assert all(record.prompt and record.answer and max(record.tokens) < 50272 for record in made)
    assert made == made_up_records(2000, vocab_size=50272) != made_up_records(2000, vocab_size=50272, seed=1)


@pytest.mark.parametrize(("compiling", "calls"), [(0, 1), (2, 3), (99, 5)])
def test_serving_is_timed_when_nothing_is_compiled(compiling, calls):
    served = []

    def serve() -> list[Answer]:
        served.append(len(served) + 1)
        if len(served) <= compiling:
            jax.jit(lambda x: x + 1)(0)
        return [Answer(tokens=[served[-1]])]

    if compiling < 99:
        assert opt_serving._serve_compiled(serve)[0].tokens == [calls]
    else:
        with pytest.raises(RuntimeError, match="must compile nothing after 5 times"):
            opt_serving._serve_compiled(serve)
    assert len(served) == calls
