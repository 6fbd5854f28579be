"""The experiment opt_decode, in its smoke form."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import opt_decode
from experiments.__main__ import main
from experiments.runs import Run
from models import OPT, OPTConfig, feed_forward, with_predictors
from sparsellm.predictors import LowRankPredictor

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
    assert "target" in (run.folder / "fit_tiny.md").read_text()


@pytest.mark.parametrize("lost", [0, 8])
def test_neurons_that_a_list_loses_are_found(lost, monkeypatch):
    rng = np.random.default_rng(0)
    config = OPTConfig(vocab_size=31, layers=1, d_model=8, heads=2, d_ff=16, max_length=8, neuron_major=True)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: OPT(config, rngs=nnx.Rngs(0))))
    model = nnx.merge(graphdef, jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), state))
    predictor = LowRankPredictor(8, 2, 16, threshold=-np.inf, rngs=nnx.Rngs(0))
    compact = feed_forward.compact
    monkeypatch.setattr(feed_forward, "compact", lambda mask: (compact(mask)[0], compact(mask)[1] - lost))
    lists, tokens = with_predictors(model, [predictor]), jnp.array([[3], [9]])
    checked: Any = opt_decode._checked
    checked.clear_cache()  # the patch is no part of its key
    error, shares = opt_decode.check_lists(lists, tokens, model.init_cache(2, 4))
    assert shares == [1] and (error > 1e-2) == bool(lost)


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
        (["--steps", "200"], "steps * (repeats + 1) must fit into 256 positions of tiny; got 400"),
        (["--sizes", "31b"], "size must be one of"),
        (["--dtype", "int8"], "dtype must be one of"),
        (["--source", "somewhere"], "source and predictors go together"),
        (["--profile", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_what_cannot_be_asked_is_refused(options, message, tmp_path, capsys):
    assert main(["opt_decode", "--smoke", "--runs", str(tmp_path), *options]) == 1
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "opt_decode").iterdir())
