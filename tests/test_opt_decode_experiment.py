"""The experiment opt_decode, in its smoke form."""

import dataclasses
import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import opt, opt_decode, opt_decode_pruned, opt_serving
from experiments.__main__ import main
from experiments.runs import Run
from models import OPT, OPTConfig, attention, feed_forward, save_opt, with_predictors
from sparsellm.predictors import LowRankPredictor, save_predictors
from sparsellm.unstructured import Treatment, compress

CONFIG = dataclasses.replace(opt_decode.Config.smoke(), batches=(2,))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Run, list[dict]]:
    with Run.start("opt_decode", CONFIG, root=tmp_path_factory.mktemp("runs")) as run:
        return run, opt_decode.run(CONFIG, run)


def test_a_row_dense_and_a_row_sparse(finished):
    run, (dense, sparse) = finished
    assert (dense["variant"], sparse["variant"]) == ("dense", "sparse")
    for row in (dense, sparse):
        assert row["model"] == "opt-tiny (synthetic)" and row["weights"] == "synthetic, power law"
        assert row["batch"] == 2 and row["time_ms"] > 0
    assert sparse["error"] < 1e-3
    assert 0 < sparse["density"] < 0.3
    assert (run.folder / "opt_decode.png").stat().st_size > 1000
    lines = (run.folder / "fit_tiny.md").read_text().splitlines()
    assert "target" in lines[0]
    assert [int(line.split("|")[3]) for line in lines[2:]] == [1, 8, 16, 32, 64, 256]


def random_model(config: OPTConfig) -> OPT:
    """Numpy makes it, which compiles nothing."""
    rng = np.random.default_rng(0)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: OPT(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), state))


@pytest.mark.parametrize("lost", [0, 8])
def test_neurons_that_a_list_loses_are_found(lost, monkeypatch):
    config = OPTConfig(vocab_size=31, layers=1, d_model=8, heads=2, d_ff=16, max_length=8, neuron_major=True)
    model = random_model(config)
    predictor = LowRankPredictor(8, 2, 16, threshold=-np.inf, rngs=nnx.Rngs(0))
    compact = feed_forward.compact
    monkeypatch.setattr(feed_forward, "compact", lambda mask: (compact(mask)[0], compact(mask)[1] - lost))
    lists, tokens = with_predictors(model, [predictor]), jnp.array([[3], [9]])
    checked: Any = opt_decode._checked
    checked.clear_cache()  # the patch is no part of its key
    error, shares = opt_decode.check_lists(lists, tokens, model.init_cache(2, 4))
    assert shares == [1] and (error > 1e-2) == bool(lost)


def test_what_is_not_finite_has_an_error():
    """No neuron is predicted of NaN, and a sum over none equals a sum over none."""
    config = OPTConfig(vocab_size=31, layers=2, d_model=8, heads=2, d_ff=16, max_length=8, neuron_major=True)
    predictor = LowRankPredictor(8, 2, 16, threshold=0.3, rngs=nnx.Rngs(0))
    lists, tokens = with_predictors(random_model(config), [predictor, predictor]), jnp.array([[3], [9]])
    cache = lists.init_cache(2, 4)
    values = (cache.values[0].at[0, 0].set(jnp.nan), cache.values[1])
    error, _ = opt_decode.check_lists(lists, tokens, cache._replace(values=values, filled=jnp.array([1, 0])))
    assert np.isnan(error)


@pytest.mark.parametrize("per_sequence", [False, True])
def test_blocks_are_checked_by_the_neurons_of_each_row_and_the_share_read_for_all(per_sequence):
    config = OPTConfig(vocab_size=31, layers=1, d_model=8, heads=2, d_ff=16, max_length=8, neuron_major=True)
    model = random_model(config)
    predictor = LowRankPredictor(8, 2, 16, threshold=0.3, look_ahead=True, rngs=nnx.Rngs(0))
    lists, tokens = with_predictors(model, [predictor], per_sequence=per_sequence), jnp.array([[3], [9], [20]])
    error, shares = opt_decode.check_lists(lists, tokens, model.init_cache(3, 4))
    entering = model.embed_tokens.embedding[...][tokens[:, 0]] + model.embed_positions.embedding[2][None]
    fires = np.asarray(predictor(entering))
    assert fires[0].mean() < fires.any(axis=0).mean() < 1
    assert error < 1e-5 and shares == [pytest.approx(fires.any(axis=0).mean())]


def test_heads_are_read_as_asked_and_have_rows_and_columns_of_their_own(tmp_path):
    config = dataclasses.replace(CONFIG, heads=0.5)
    with Run.start("opt_decode", config, root=tmp_path) as run:
        dense, sparse, by_heads = opt_decode.run(config, run)
    assert by_heads["variant"] == "sparse, by heads" and by_heads["time_ms"] > 0
    assert by_heads["heads_error"] < 1e-5 and "heads_density" not in sparse
    # Two heads, two texts: of all that is read at least what one of them lists, and at most what both do.
    assert 0.25 <= by_heads["heads_density_own"] <= by_heads["heads_density"] <= 2 * by_heads["heads_density_own"]
    assert dense["bytes_gb"] > sparse["bytes_gb"]
    table, _ = opt_decode.readme({"rows": [dense, sparse, by_heads]})
    assert "heads of a text" in table and f"{by_heads['heads_density_own']:.0%}" in table
    assert table.count("| opt-tiny") == 2 and "heads" not in opt_decode.readme({"rows": [dense, sparse]})[0]
    assert 0.5 < by_heads["density"] / sparse["density"] < 2  # neurons are named of what those heads leave


@pytest.mark.parametrize("lost", [0, 1])
def test_heads_that_attention_leaves_out_are_found(lost, monkeypatch):
    """One of three that are listed; and the bytes of what is read."""
    config = OPTConfig(vocab_size=31, layers=2, d_model=16, heads=4, d_ff=16, max_length=8, neuron_major=True)
    model, tokens = random_model(config), jnp.array([[3], [9]])
    biases = jnp.array([[1.0, 1, 1, 0], [0, 1, 1, 1]])
    down, up = jnp.zeros((16, 1)), jnp.zeros((1, 4))
    of_heads = [LowRankPredictor.from_arrays(down, up, bias, threshold=0.5, look_ahead=True) for bias in biases]
    lists, compact = with_predictors(model, None, head_predictors=of_heads), attention.compact
    monkeypatch.setattr(attention, "compact", lambda mask: (compact(mask)[0], compact(mask)[1] - lost))
    checked: Any = opt_decode._checked_heads
    checked.clear_cache()  # the patch is no part of its key
    cache = model.init_cache(2, 4)
    error, shares = opt_decode.check_heads(lists, tokens, cache)
    assert shares == 2 * [[0.75, 0.75]] and (error > 1e-2 if lost else error < 1e-5)
    rows = opt_decode.Rows(tokens[:, 0], tokens[:, 0], jnp.int32(0), cache)
    bytes_gb = [opt_decode.bound(lists, rows, None, shares)["bytes_gb"] for shares in (None, 2 * [[0.0, 1.0]])]
    assert bytes_gb[0] - bytes_gb[1] == pytest.approx(2 * 2 * 16 * 16 * 4 / 1e9, abs=2e-7)


def test_a_checkpoint_decodes_with_its_own_predictors(tmp_path, monkeypatch):
    model = random_model(opt.config_of("tiny", "float32"))
    made = [LowRankPredictor(16, 2, 64, threshold=threshold, rngs=nnx.Rngs(0)) for threshold in (-np.inf, np.inf)]
    save_opt(model, tmp_path / "source" / "model")  # as pretrain leaves it
    save_predictors(made[:1], tmp_path / "predictors", model)
    token = jnp.zeros(2, jnp.int32)
    begin = opt_decode.Rows(token, token, jnp.int32(0), model.init_cache(2, 12))
    asked = []
    monkeypatch.setattr(opt, "time_decode", lambda model, batch, **options: (asked.append(options) or 2.0, begin))
    folders: dict[str, Any] = {"source": str(tmp_path / "source"), "predictors": tmp_path / "predictors"}
    config = dataclasses.replace(CONFIG, **folders)
    with Run.start("opt_decode", config, root=tmp_path) as run:
        dense, sparse = opt_decode.measure(config, run)
    assert dense["model"] == "source" and dense["weights"] == folders["source"]
    assert (dense["time_ms"], sparse["time_ms"], sparse["density"]) == (2, 2, 1) and sparse["error"] < 1e-5
    assert asked == 2 * [{"context": 8, "steps": 4, "repeats": 1, "seed": 0, "sampling": opt_decode.GREEDY}]
    of_heads = [LowRankPredictor(16, 2, 2, threshold=-np.inf, look_ahead=True, rngs=nnx.Rngs(0))]
    save_predictors(of_heads, tmp_path / "heads", model)
    by_heads = dataclasses.replace(config, head_predictors=tmp_path / "heads")
    with Run.start("opt_decode", by_heads, root=tmp_path) as run:
        *_, found = opt_decode.measure(by_heads, run)
    assert (found["variant"], found["heads_density"]) == (opt_decode.BY_HEADS, 1) and found["heads_error"] < 1e-5
    for experiment in (opt_decode, opt_decode_pruned):  # of a source, its own positions
        options = {"source": folders["source"], "context": 250, "steps": 7}
        options |= {"predictors": folders["predictors"]} if experiment is opt_decode else {}
        long = dataclasses.replace(experiment.Config.smoke(), **options)
        with Run.start("long", long, root=tmp_path) as run, pytest.raises(ValueError, match="fit into the 256 pos"):
            experiment.run(long, run)
    served = []
    monkeypatch.setattr(opt_serving, "_measure", lambda config, *models: served.append(models) or {})
    serve = dataclasses.replace(opt_serving.Config.smoke(), predictor_bits=16, per_sequence=True, **folders)
    assert [row["variant"] for row in opt_serving.measure(serve)] == ["dense", opt_serving.BY_TEXT]
    serving, reference, _ = served[1]
    assert (serving.layers[0].prediction, reference.layers[0].prediction) == ("lists", "mask")
    assert serving.layers[0].per_sequence and reference.layers[0].per_sequence
    np.testing.assert_array_equal(serving.layers[0].predictor.down[...], made[0].down[...])
    save_opt(compress(model, [("", Treatment(max_density=1.0))]), tmp_path / "compressed")
    serve = dataclasses.replace(serve, source=str(tmp_path / "compressed"), predictors=None)
    assert [row["variant"] for row in opt_serving.measure(serve)] == ["compressed"]
    serve = dataclasses.replace(serve, predictors=folders["predictors"])
    with pytest.raises(ValueError, match="predictors must be a source's; got predictors=.* and no source"):
        opt_serving.measure(dataclasses.replace(serve, source=None))


def test_a_step_is_timed_when_nothing_compiles(monkeypatch):
    """Two chunks are left out; each begins with the context, and ends behind its steps."""
    model = random_model(opt.config_of("tiny", "float32"))
    clock, seen = iter([0.0, 9.0, 0.0, 9.0, 0.0, 0.004, 0.0, 0.008, 0.0, 0.1]), []

    def decode(graphdef, state, rows, key, sampling, eos_id, reader, *, steps):
        seen.append((rows.cache.filled.tolist(), rows.left.tolist(), rows.cache.keys[0].shape))
        return rows._replace(cache=rows.cache._replace(filled=rows.cache.filled + steps)), jnp.zeros((steps, 2))

    monkeypatch.setattr(opt, "decode_program", lambda: decode)
    monkeypatch.setattr(opt.time, "perf_counter", lambda: next(clock))
    ms, rows = opt.time_decode(model, 2, context=5, steps=4, repeats=3)
    assert ms == 2 and rows.cache.filled.tolist() == [5, 5]
    assert seen == [([filled] * 2, [5, 5], (2, 9, 2, 8)) for filled in (0, 4, 5, 5, 5)]


def test_a_batch_that_does_not_fit_is_left_out(tmp_path, monkeypatch, capsys):
    """The others are kept; where none fits, that is said."""
    measure_batch, too_large = opt_decode.measure_batch, {2}

    def limited(config, model, name, batch):
        if batch in too_large:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
        return measure_batch(config, model, name, batch)

    monkeypatch.setattr(opt_decode, "measure_batch", limited)
    assert main(["opt_decode", "--smoke", "--runs", str(tmp_path)]) == 0
    assert "batch 2: out of memory: 2 rows of 12 slots need about" in (said := capsys.readouterr().out)
    assert "batch 2: left out" in said
    (rows,) = tmp_path.glob("opt_decode/*/rows.jsonl")
    assert [json.loads(line)["batch"] for line in rows.read_text().splitlines()] == [1, 1]
    too_large.add(1)
    assert main(["opt_decode", "--smoke", "--runs", str(tmp_path)]) == 1
    assert "no batch fits into the device" in capsys.readouterr().err


def test_a_model_leaves_its_memory_to_the_next():
    """Also where it is part of a cycle, and nothing else collects."""
    gc.collect()
    gc.disable()
    try:
        model, _ = opt.make_model("tiny", "float32", source=None)
        cycle: list[Any] = [nnx.state(model)]
        cycle.append(cycle)
        parameter = weakref.ref(model.layers[0].fc1.bias[...])
        del model, cycle
        assert parameter() is not None
        opt.make_model("tiny", "float32", source=None)
        assert parameter() is None
    finally:
        gc.enable()


def test_readme_shows_both_next_to_transformers():
    common: dict[str, Any] = {"model": "opt-30b (synthetic)", "batch": 1, "transformers_time_ms": 19.1}
    rows = [
        common | {"variant": "dense", "time_ms": 16.0, "bound_ms": 14.0},
        common | {"variant": "sparse", "time_ms": 8.0, "bound_ms": 6.5, "density": 0.07, "error": 0.012},
    ]
    table, figures = opt_decode.readme({"rows": rows})
    assert [cell.strip() for cell in table.splitlines()[2].split("|")[1:-1]] == [
        *("opt-30b (synthetic)", "1", "19.10", "16.00", "14.00", "8.00", "6.50", "2.00x", "7%", "1e-02")
    ]
    assert figures.keys() == {"opt_decode.png"}


@pytest.mark.parametrize(
    "options,message",
    [
        (["--batches", "33"], "batches must be 1 to 32, which share a list; got batches=(33,)"),
        (["--batches", "0"], "batches must be 1 to 32"),
        (["--steps", "0"], "steps must be at least 1; got steps=0"),
        (["--steps", "249"], "context and steps must fit into the 256 positions of tiny; got context=8, steps=249"),
        (["--sizes", "31b"], "size must be one of"),
        (["--dtype", "int8"], "dtype must be one of"),
        (["--devices", "99"], "there are; got 99"),
        (["--source", "somewhere"], "source and predictors go together"),
        (["--heads", "0"], "heads must be a share above 0 and at most 1; got heads=0.0"),
        (["--head-predictors", "p"], "head_predictors for a checkpoint; got source=None, head_predictors=p"),
        (["--source", "s", "--predictors", "p", "--heads", "0.5"], "heads are for a synthetic model"),
        (["--profile", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_what_cannot_be_asked_is_refused(options, message, tmp_path, capsys):
    assert main(["opt_decode", "--smoke", "--runs", str(tmp_path), *options]) == 1
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "opt_decode").iterdir())


def test_a_model_is_cut_over_two_devices(tmp_path):
    """In a process that sees two CPU devices; each reads half of the weights and of the cache, and the predictors."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-m", "experiments", "opt_decode", "--smoke", "--batches", "2", "--devices", "2"]
    env = os.environ | flags | {"JAX_PLATFORMS": "cpu"}
    root = Path(__file__).parents[1]
    subprocess.run([*command, "--runs", str(tmp_path)], env=env, cwd=root, check=True, capture_output=True, timeout=120)
    (rows,) = (tmp_path / "opt_decode").glob("*/rows.jsonl")
    dense, sparse = map(json.loads, rows.read_text().splitlines())
    assert dense["devices"] == sparse["devices"] == 2 and sparse["error"] < 1e-3
    assert dense["model"] == "opt-tiny (synthetic), 2 devices"


WRONG_OVER_DEVICES = """
import sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from experiments import opt, opt_decode
from models import OPT, OPTConfig, attention, feed_forward, with_predictors
from sparsellm.predictors import LowRankPredictor
from sparsellm.sharding import create_model, sum_over_shards

def wrong(function, *given, **options):
    here = bool(int(sys.argv[1])) and not jax.sharding.get_abstract_mesh().empty
    return jax.tree.map(lambda y: 2 * y if here else y, sum_over_shards(function, *given, **options))

config = OPTConfig(vocab_size=32, layers=2, d_model=16, heads=4, d_ff=16, max_length=8, neuron_major=True)
model = create_model(lambda: OPT(config, rngs=nnx.Rngs(0)), opt.mesh_over(2))
neurons, heads = ([LowRankPredictor(16, 2, n, threshold=-np.inf, rngs=nnx.Rngs(0))] * 2 for n in (16, 4))
lists, tokens = with_predictors(model, neurons, head_predictors=heads), jnp.array([[3], [9]])
feed_forward.sum_over_shards = attention.sum_over_shards = wrong
for check in opt_decode.check_lists, opt_decode.check_heads:
    print(check(lists, tokens, model.init_cache(2, 4))[0])
"""


@pytest.mark.parametrize("wrong", [0, 1])
def test_what_only_devices_together_get_wrong_is_found(wrong):
    """The check is of what is timed: lists under a mesh, each device over its own part."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    options: dict[str, Any] = {"check": True, "capture_output": True, "text": True, "timeout": 120}
    command = [sys.executable, "-c", WRONG_OVER_DEVICES, str(wrong)]
    found = subprocess.run(command, env=os.environ | flags, cwd=Path(__file__).parents[1], **options).stdout
    errors = [float(line) for line in found.splitlines()]
    assert len(errors) == 2 and all(error > 0.1 if wrong else error < 1e-5 for error in errors)
