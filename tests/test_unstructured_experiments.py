"""The experiments on unstructured weights, on a CPU: all but the time itself."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import opt, opt_decode_pruned, opt_peers, peers, unstructured_spmm
from experiments.__main__ import main
from experiments.runs import Run
from models import OPT, OPTConfig, load_opt, save_opt
from sparsellm.unstructured import compress, compressed_layers

SPMM = unstructured_spmm.Config.smoke()
DECODE = opt_decode_pruned.Config.smoke()


def timer(function, arguments: list[Any], iterations: int):
    """Runs the function; every call of it took 12 us."""
    return function(*arguments), [12.0] * iterations


def small_opt() -> OPT:
    return OPT(OPTConfig(vocab_size=64, layers=1, d_model=32, heads=2, d_ff=32, max_length=64), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> Path:
    """A small OPT with 30% of its weights left."""
    model = small_opt()
    rng = np.random.default_rng(0)
    for _, module in nnx.iter_modules(model):
        if type(module) is nnx.Linear:
            kernel = module.kernel[...]
            module.kernel[...] = jnp.where(rng.random(kernel.shape) < 0.3, kernel, 0)
    folder = tmp_path_factory.mktemp("models") / "pruned"
    save_opt(model, folder)
    return folder


# unstructured_spmm


def test_spmm_gives_a_checked_row_for_each_product_and_goes_on_after_a_kill(tmp_path, monkeypatch):
    config = dataclasses.replace(SPMM, sparsities=(0.5, 0.8))
    made, matrix = [], unstructured_spmm.measure_matrix

    def counted(config, problem, timer):
        if len(made) == 1:
            made.append("killed")
            raise KeyboardInterrupt
        made.append(problem.named["sparsity"])
        return matrix(config, problem, timer)

    monkeypatch.setattr(unstructured_spmm, "measure_matrix", counted)
    with pytest.raises(KeyboardInterrupt), Run.start("unstructured_spmm", config, root=tmp_path) as run:
        unstructured_spmm.measure(config, run, timer)
    with Run.start("unstructured_spmm", config, root=tmp_path) as run:
        rows = unstructured_spmm.measure(config, run, timer)
    assert made == [0.5, "killed", 0.8]
    kinds = [(sparsity, "bfloat16", stored) for sparsity in (0.5, 0.8) for stored in ("single", "paired")]
    assert [(row["sparsity"], row["values"], row["layout"]) for row in rows] == kinds
    for row in rows:
        assert (row["m"], row["k"], row["n"], row["mask"]) == (48, 96, 8, "random")
        assert row["dense_us"] == row["time_us"] == 12 and row["error"] < 5e-3 and row["bound_us"] is None
        assert row["speedup"] == row["over_xla"] == 1 and row["xla_us"] == 12 and row["gbps"] > 0
    assert rows[0]["roof"] < rows[2]["roof"] and rows[2]["roof"] > rows[3]["roof"]
    text, figures = unstructured_spmm.readme({"rows": rows})
    assert "48x96 | bfloat16         |   80% | 1.00x / 1.00x |" in text
    assert "48x96 | bfloat16, paired |   80% | 1.00x / 1.00x |" in text
    assert figures["unstructured_spmm.png"].startswith(b"\x89PNG")


def test_spmm_stores_weights_as_models_would(tmp_path):
    config = dataclasses.replace(SPMM, sparsities=(0.5, 0.9), layouts=("chosen",), value_dtypes=("dtype", "int8"))
    with Run.start("spmm", config, root=tmp_path) as run:
        rows = unstructured_spmm.measure(config, run, timer)
    found = [(row["sparsity"], row["values"], row["layout"]) for row in rows]
    assert found[:2] == [(0.5, "bfloat16", "single"), (0.5, "int8", "paired")]
    assert found[2:] == [(0.9, "bfloat16", "paired"), (0.9, "int8", "paired")]


def test_spmm_keeps_no_row_that_is_wrong(tmp_path):
    def broken(function, arguments, iterations):
        out, times = timer(function, arguments, iterations)
        return [x * jnp.asarray(1.01, x.dtype) for x in out], times

    with Run.start("spmm", SPMM, root=tmp_path) as run, pytest.raises(RuntimeError, match="error .* is above 0.005"):
        unstructured_spmm.measure(SPMM, run, broken)


def test_spmm_takes_the_layers_of_pruned_models_and_random_ones_like_them(pruned):
    config = dataclasses.replace(SPMM, source=(str(pruned),) * 2, value_dtypes=("dtype", "int8"), layouts=("single",))
    found = list(unstructured_spmm.problems(config))
    layers = [problem for problem in found if problem.named["mask"] == "pruned"]
    problems = {problem.named["layer"]: problem for problem in layers}
    assert len(layers) == 2 * len(problems) == 12 and {problem.named["model"] for problem in layers} == {"pruned"}
    alike = [(problem.named["mask"], problem.named["sparsity"]) for problem in found[len(layers) :]]
    assert sorted(alike) == sorted({("random", round(problem.named["sparsity"], 2)) for problem in layers})
    w = problems["layers.0.fc1"].make()
    assert w.shape == (32, 32) and w.dtype == jnp.bfloat16
    rows = unstructured_spmm.measure_matrix(config, problems["layers.0.fc1"], timer)
    assert rows[0]["sparsity"] == pytest.approx(0.7, abs=0.05) and rows[0]["mask"] == "pruned"
    assert [row["values"] for row in rows] == ["bfloat16", "int8"] and rows[1]["roof"] > rows[0]["roof"]
    text, _ = unstructured_spmm.readme({"rows": rows})
    assert "| pruned, layers.0.fc1, 32x32 | bfloat16 |" in text


def test_spmm_says_from_which_n_on_dense_wins():
    row = {"m": 48, "k": 96, "mask": "random", "sparsity": 0.5, "dtype": "bfloat16", "values": "bfloat16", "roof": 1.7}

    def column(*speedups: float) -> str:
        found = [row | {"n": n, "speedup": s, "error": 0.0} for n, s in zip((8, 16, 32), speedups, strict=True)]
        return unstructured_spmm.readme({"rows": found})[0].splitlines()[-1].split("|")[-3].strip()

    assert column(1.5, 1.2, 1.0) == "above 32" and column(0.9, 0.8, 0.7) == "0" and column(1.5, 1.2, 0.8) == "24"
    assert column(0.97, 0.95, 1.01) == "here and there"


def test_break_even_is_where_the_lines_cross():
    def rows(*speedups: float) -> list[dict[str, Any]]:
        return [{"n": n, "speedup": s} for n, s in zip((8, 16, 32), speedups, strict=True)]

    assert unstructured_spmm.break_even(rows(1.5, 1.2, 1.0)) is None
    assert unstructured_spmm.break_even(rows(1.5, 1.2, 0.8)) == pytest.approx(24)
    assert unstructured_spmm.break_even(rows(0.9, 1.2, 0.8)) == pytest.approx(24)
    assert unstructured_spmm.break_even(rows(0.9, 0.8, 0.7)) == 0
    of_xla = [row | {"over_xla": s} for row, s in zip(rows(1.5, 1.2, 1.0), (1.5, 1.2, 0.8), strict=True)]
    assert unstructured_spmm.break_even(of_xla) == pytest.approx(24)


def test_weights_are_copied_until_they_do_not_fit_into_l2():
    w, four = jnp.ones((250, 250, 4)), list(jnp.arange(4))  # w is a megabyte
    assert [len(unstructured_spmm._cold(w, mb)) for mb in (0, 1, 2, 3, 90)] == [1, 1, 2, 3, 32]
    calls = {"time_us": (lambda copies, x: copies, four[1:]), "dense_us": (lambda copies, x: copies, four[:1])}
    outputs, us = unstructured_spmm._interleaved(calls, w, timer)  # 12 us a call, whatever is in it
    assert outputs == {"time_us": 1, "dense_us": 0} and us == {"time_us": 4, "dense_us": 12}


def test_flash_llm_has_twelve_shapes():
    assert len(set(unstructured_spmm.FLASH_LLM)) == 12
    assert {"21504x7168", "7168x28672", "36864x9216", "12288x12288"} < set(unstructured_spmm.FLASH_LLM)


# opt_decode_pruned


def test_decoding_is_measured_dense_and_compressed(tmp_path, capsys):
    assert main(["opt_decode_pruned", "--smoke", "--runs", str(tmp_path)]) == 0
    folder = next((tmp_path / "opt_decode_pruned").iterdir())
    dense, sparse = (json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines())
    assert (dense["variant"], dense["sparsity"]) == ("dense", 0) and dense["error"] is None
    assert (sparse["variant"], sparse["sparsity"]) == ("unstructured", 0.7) and sparse["error"] < 1e-5
    for row in (dense, sparse):
        assert row["model"] == "opt-tiny" and row["batch"] == 2 and row["weights"] == "random"
        assert row["tokens_per_second"] == pytest.approx(2e3 / row["time_ms"], rel=0.01)
        assert row["transformers_time_ms"] is None and row["memory_gib"] >= row["weights_gib"]
    assert (folder / "opt_decode_pruned.png").exists() and "| opt-tiny | 70%   |" in capsys.readouterr().out


def test_a_random_model_is_never_dense_as_a_whole(monkeypatch):
    config = OPTConfig(vocab_size=64, layers=3, d_model=32, heads=2, d_ff=32, max_length=64)
    alive, convert = [], opt_decode_pruned.UnstructuredLinear.from_linear

    def counted(linear, **how):
        layer = convert(linear, **how)
        kernels = [x for x in jax.live_arrays() if x.shape == (32, 32)]
        alive.append(len(kernels))
        return layer

    before = sum(x.shape == (32, 32) for x in jax.live_arrays())
    monkeypatch.setattr(opt_decode_pruned.UnstructuredLinear, "from_linear", counted)
    model, kernels = opt_decode_pruned.random_opt(config, 0.7, jax.random.key(0), paired=True)
    layers = dict(compressed_layers(model))
    assert all(layer.paired for layer in layers.values())
    assert len(layers) == len(alive) == 18 and max(alive) <= before + 1 + len(kernels)
    assert set(kernels) == set(opt_decode_pruned.LINEARS)  # of the middle block, for the check
    for name, kernel in kernels.items():
        np.testing.assert_array_equal(layers[f"layers.1.{name}"].to_dense(), kernel)
    share = [np.mean(np.asarray(layer.weights.to_dense()) == 0) for layer in layers.values()]
    assert np.mean(share) == pytest.approx(0.7, abs=0.02)
    dense, kernels = opt_decode_pruned.random_opt(config, 0.0, jax.random.key(0))
    assert not kernels and not list(compressed_layers(dense))
    assert (np.asarray(dense.layers[0].fc1.kernel[...]) != 0).all()


@pytest.mark.parametrize("name", ["self_attn.k_proj", "fc2"])
def test_weights_that_were_lost_on_the_way_are_found(name):
    """Also where what is compressed is sound in itself, and in each batch that is timed."""
    config = dataclasses.replace(DECODE, batches=(2, 17))
    model, kernels = opt_decode_pruned.random_opt(opt.config_of("tiny", "float32"), 0.7, jax.random.key(0))
    assert set(opt_decode_pruned.check_block(model, kernels, config)) == {2, 17}
    values = opt_decode_pruned._linears(model.layers[len(model.layers) // 2])[name].parts.values
    values.set_value(jnp.full_like(values[...], 0.07))
    with pytest.raises(RuntimeError, match="must have an error of 1e-05 at most; got .* for 2 tokens"):
        opt_decode_pruned.check_block(model, kernels, config)


@pytest.mark.parametrize("values", ["int8", "float8_e4m3fn"])
def test_values_of_8_bits_may_have_their_rounding_and_no_more(values):
    config = opt.config_of("tiny", "float32")
    model, kernels = opt_decode_pruned.random_opt(config, 0.7, jax.random.key(0), value_dtype=values)
    (error,) = opt_decode_pruned.check_block(model, kernels, DECODE, values).values()
    assert 0.2 * opt_decode_pruned.ROUNDING[values] < error < opt_decode_pruned.ROUNDING[values]
    with pytest.raises(RuntimeError, match="must have an error of 1e-05 at most"):
        opt_decode_pruned.check_block(model, kernels, DECODE)
    scales = opt_decode_pruned._linears(model.layers[len(model.layers) // 2])["fc2"].parts.scales
    scales.set_value(1.05 * scales[...])
    with pytest.raises(RuntimeError, match="must have an error of"):
        opt_decode_pruned.check_block(model, kernels, DECODE, values)


def test_each_kind_of_values_is_measured_and_the_dense_model_once(pruned, monkeypatch, tmp_path):
    monkeypatch.setattr(opt, "time_decode", lambda *arguments, **options: (1.0, None))
    random = dataclasses.replace(DECODE, value_dtypes=("int8", "dtype"), dtype="bfloat16")
    for config in random, dataclasses.replace(random, source=str(pruned)):
        with Run.start("opt_decode_pruned", config, root=tmp_path) as run:
            rows = opt_decode_pruned.run(config, run)
        assert [row["variant"] for row in rows] == ["dense", "paired", "unstructured"]
        assert [row.get("values") for row in rows] == [None, "int8", "dtype"]
        assert rows[1]["error"] > 2 * rows[2]["error"] > 0
        text, _ = opt_decode_pruned.readme({"rows": rows})
        assert [line.split("|")[2].strip() for line in text.splitlines()[-3:]] == ["dense", "70%, int8, paired", "70%"]


def test_a_pruned_model_is_measured_as_it_is_and_compressed(pruned, monkeypatch):
    monkeypatch.setattr(opt, "time_decode", lambda *arguments, **options: (1.0, None))
    config = dataclasses.replace(DECODE, source=str(pruned))
    dense, sparse = opt_decode_pruned.measure_model(config, str(pruned), None)
    paired = opt_decode_pruned.measure_model(dataclasses.replace(config, paired=True), str(pruned), None)[1]
    assert [row["variant"] for row in (dense, sparse, paired)] == ["dense", "unstructured", "paired"]
    assert sparse["sparsity"] == pytest.approx(0.7, abs=0.05) and sparse["error"] < 1e-5
    assert dense["model"] == sparse["model"] == "pruned" and dense["weights"] == "pruned"


def test_a_source_that_is_not_pruned_is_refused(tmp_path):
    save_opt(small_opt(), tmp_path / "whole")
    with pytest.raises(ValueError, match="at most 60% non-zeros are compressed; those of .*whole have 100% and more"):
        opt_decode_pruned.measure_model(DECODE, str(tmp_path / "whole"), None)


def test_zeros_alone_are_right():
    """Nothing is divided by what is expected where that is zero."""
    model, kernels = opt_decode_pruned.random_opt(opt.config_of("tiny", "float32"), 1.0, jax.random.key(0))
    assert opt_decode_pruned.check_block(model, kernels, DECODE) == {2: 0}


def test_a_source_that_is_compressed_already_is_refused(pruned, tmp_path):
    save_opt(compress(load_opt(pruned)), tmp_path / "a")
    with pytest.raises(ValueError, match="source must be a pruned model that is not compressed, .*; got .*/a"):
        opt_decode_pruned.measure_model(DECODE, str(tmp_path / "a"), None)


def test_what_does_not_fit_is_said_and_not_made(monkeypatch, capsys):
    monkeypatch.setattr(opt_decode_pruned.memory, "capacity", lambda: 2 * 2**30)
    monkeypatch.setattr(opt_decode_pruned, "random_opt", None)
    config = dataclasses.replace(DECODE, dtype="bfloat16")
    (row,) = opt_decode_pruned.measure_model(config, "1.3b", 0.0)
    assert row["memory_gib"] == pytest.approx(2 * 1.316e9 / 2**30, rel=0.01) and "time_ms" not in row
    assert "1.3b at 0% needs 2 of 2 GiB: left out" in capsys.readouterr().out
    blocks = 24 * 12 * 2048**2  # all other parameters stay dense
    for how, element in (({}, 0.6 + 1 / 8), ({"value_dtype": "int8", "paired": True}, 0.51 + 1 / 16)):
        pruned = opt_decode_pruned.bytes_needed(opt.config_of("1.3b", "bfloat16"), 0.7, **how)
        assert pruned == pytest.approx(2 * (1.316e9 - blocks) + 1.1 * element * blocks, rel=0.01)
    text, _ = opt_decode_pruned.readme({"rows": [row]})
    assert "| opt-1.3b | dense |     2 |          – |" in text


def test_the_largest_batch_is_reckoned_from_bytes(monkeypatch):
    model, _ = opt_decode_pruned.random_opt(opt.config_of("tiny", "float32"), 0.0, jax.random.key(0))
    monkeypatch.setattr(opt, "time_decode", lambda *arguments, **options: (1.0, None))
    rows = []
    for batch in (2, 4):
        monkeypatch.setattr(opt_decode_pruned.memory, "capacity", lambda: 2**28)
        rows.append(opt_decode_pruned._measure(DECODE, model, {"model": "m", "variant": "dense"}, batch, {}))
    per_row = 2 * 20 * 32 * 4  # keys and values of 20 slots of 32 float32
    parameters = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))
    for row in rows:
        assert 0.1 * (2**28 - parameters) / per_row < row["largest_batch"] < (2**28 - parameters) / per_row


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("unstructured_spmm", ["--shapes", "28672"], 'a shape is "MxK"'),
        ("unstructured_spmm", ["--sparsities", "1.5"], "sparsities must be 0 to 1"),
        ("unstructured_spmm", ["--ns", "0"], "ns must be at least 1"),
        ("unstructured_spmm", ["--dtype", "float64"], "dtype must be one of bfloat16, float16; got 'float64'"),
        ("unstructured_spmm", ["--value-dtypes", "int4"], "value_dtypes must be some of dtype, int8"),
        ("opt_decode_pruned", ["--models", "14b"], "size must be one of tiny, 125m"),
        ("opt_decode_pruned", ["--sparsities", "70"], "sparsities must be 0 to 1"),
        ("opt_decode_pruned", ["--batches", "0"], "batches must be at least 1"),
        ("opt_decode_pruned", ["--value-dtypes", "int4"], "value_dtypes must be some of dtype, int8"),
        ("opt_decode_pruned", ["--context", "253"], "context and steps must fit into the 256 positions of tiny"),
    ],
)
def test_what_cannot_be_asked_is_refused_at_once(name, options, message, tmp_path, capsys):
    assert main([name, "--smoke", "--runs", str(tmp_path), *options]) == 1
    assert message in capsys.readouterr().err
    assert not list((tmp_path / name).iterdir())


# transformers

TINY = opt.config_of("tiny", "float32")
ASKED = {"context": 4, "steps": 2, "repeats": 1}


def test_without_torch_the_columns_of_transformers_stay_empty(monkeypatch, capsys):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert opt_peers.measure_decode(TINY, [2, 3], **ASKED) == [{}, {}]
    assert opt_peers.measure_prefill(TINY, [[3, 4], [5]], 1) == [{}, {}]
    assert "torch is not installed: the columns of transformers stay empty" in capsys.readouterr().out


def test_the_peer_s_process_answers(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("class cuda:\n    is_available = staticmethod(lambda: False)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert opt_peers.measure_decode(TINY, [2], **ASKED) == [{}]


def test_transformers_is_put_next_to_each_batch(tmp_path, monkeypatch):
    asked = []

    def measure(config, batches, **options):
        asked.append((config.d_model, batches, options))
        return [{"time_ms": 2.0 * batch, "memory_gib": 3.0} for batch in batches[:1]] + [{}] * len(batches[1:])

    monkeypatch.setattr(opt_peers, "measure_decode", measure)
    config = dataclasses.replace(DECODE, no_peers=False, batches=(4, 8))
    with Run.start("opt_decode_pruned", config, root=tmp_path) as run:
        found = opt.measure_peers(config, "tiny", run)
        assert opt.measure_peers(config, "tiny", run) == found
        without = opt.measure_peers(dataclasses.replace(config, no_peers=True), "tiny", run)
        assert without[4]["transformers_time_ms"] is None
    assert asked == [(TINY.d_model, (4, 8), {"context": 16, "steps": 4, "repeats": 1})]
    assert found[4] == {"transformers_time_ms": 8.0, "transformers_memory_gib": 3.0}
    assert found[8] == {"transformers_time_ms": None, "transformers_memory_gib": None}


@pytest.mark.gpu
def test_transformers_reads_and_decodes():
    pytest.importorskip("transformers")
    for row in opt_peers.measure_decode(TINY, [2], **ASKED) + opt_peers.measure_prefill(TINY, [[3, 4], [5]], 1):
        assert math.isfinite(row["time_ms"]) and row["memory_gib"] >= 0
