"""The experiments on sparse products, on a CPU: all but the time itself, which a stand-in for CUPTI makes up."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import index_construction, matmul_sparsity, peers, plan_choice, products, sread_cost
from experiments.__main__ import main
from experiments.masks import KINDS, Mask
from experiments.runs import Run
from sparsellm.micro_tiles import MicroTile
from sparsellm.plan import Plan

KEPT = Path(matmul_sparsity.__file__).parent / "results" / "nvidia_h200" / "matmul_sparsity.json"


def timer(function, arguments: list[Any], iterations: int):
    """Runs the function; every call of it took 12 us."""
    return function(*arguments), [12.0] * iterations


@pytest.fixture
def run(tmp_path):
    with Run.start("matmul_sparsity", SMALL, root=tmp_path) as run:
        yield run


def mask(**fields) -> Mask:
    return Mask(**({"kind": "random", "rows": 16, "cols": 1, "sparsity": 0.9, "m": 64, "k": 50} | fields))


# Masks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
def test_a_mask_has_the_sparsity_asked_for(kind, sparsity):
    live = mask(kind=kind, rows=1, m=256, k=256, sparsity=sparsity).micro_tiles()
    assert live.dtype == bool and live.shape == (256, 256)
    exact = kind in ("clustered", "banded") or sparsity in (0.0, 1.0)
    assert live.mean() == pytest.approx(1 - sparsity, abs=1e-5 if exact else 0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_decided_by_their_seed_and_nested(kind):
    sparse, dense = mask(kind=kind, sparsity=0.9), mask(kind=kind, sparsity=0.5)
    assert np.array_equal(sparse.micro_tiles(), sparse.micro_tiles())
    assert not (sparse.micro_tiles() & ~dense.micro_tiles()).any()
    if kind != "banded":
        assert not np.array_equal(sparse.micro_tiles(), dataclasses.replace(sparse, seed=1).micro_tiles())


def test_each_kind_lies_as_it_says():
    def live(kind: str) -> np.ndarray:
        return mask(kind=kind, rows=1, m=200, k=200, sparsity=0.8).micro_tiles()

    def neighbours(live: np.ndarray) -> float:
        return (live[:, 1:] & live[:, :-1]).sum() / live.sum()  # live ones whose right neighbour is live

    assert neighbours(live("random")) == pytest.approx(0.2, abs=0.02)
    assert neighbours(live("clustered")) > 0.7
    distance = np.abs(np.subtract.outer(np.arange(200), np.arange(200)))
    band = live("banded")
    assert distance[band].max() <= distance[~band].min()
    fame = np.sort(live("power_law").mean(axis=0))[::-1]
    assert fame[0] == 1 and fame[-1] < 0.1
    assert fame[100:].mean() == pytest.approx(fame[50:].mean() * np.mean(1 / np.arange(101, 201)) / np.mean(1 / np.arange(51, 201)), rel=0.1)  # fmt: skip  # noqa: E501


def test_elements_follow_the_micro_tiles_up_to_a_ragged_edge():
    ragged = mask(rows=16, cols=7, m=50, k=45, sparsity=0.6)
    tiles, elements = ragged.micro_tiles(), ragged.elements()
    assert tiles.shape == (4, 7) and elements.shape == (50, 45)
    for i in range(50):
        for j in range(45):
            assert elements[i, j] == tiles[i // 16, j // 7]
    assert ragged.live_elements() == (elements.sum(), elements.any(axis=0).sum())
    assert ragged.granularity == "16x7"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "striped"}, "mask must be one of random, clustered, banded, power_law; got 'striped'"),
        ({"sparsity": 1.5}, "sparsity must be 0 to 1; got 1.5"),
        ({"rows": 0}, "rows, cols, m and k must be at least 1"),
    ],
)
def test_a_mask_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        mask(**fields)


# Products


@pytest.mark.parametrize("plan", [Plan("dense"), Plan("k", MicroTile(16, 1)), Plan("k", MicroTile(16, 8)),
                                  Plan("m", MicroTile(1, 8)), Plan("m", MicroTile(1, 64))], ids=str)  # fmt: skip
@pytest.mark.parametrize("sparsity", [0.0, 0.8, 1.0])
def test_every_function_of_a_plan_is_the_product(plan, sparsity):
    a, b = products.operands(mask(m=60, sparsity=sparsity), 24, "float32")
    live = mask(m=60, sparsity=sparsity).elements()
    assert np.array_equal(np.asarray(a) != 0, live)
    arguments = products.prepare(plan, a, b)
    expected = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    for name, function in products.functions(plan).items():
        if name != "index":
            out = function(*arguments)
            np.testing.assert_allclose(out, expected, atol=1e-4)
            assert products.checked_error(plan, out, a, b, name) < 1e-5


def test_a_wrong_product_is_found():
    plan = Plan("k", MicroTile(16, 1))
    a, b = products.operands(mask(sparsity=0.5), 24, "bfloat16")
    right = jnp.dot(a, b)
    for wrong in (right * 1.02, right.at[0, 0].set(jnp.nan), jnp.zeros_like(right)):
        with pytest.raises(RuntimeError, match="it by k 16x1: error .* is above 0.01"):
            products.checked_error(plan, wrong, a, b, "it")
    a, b = products.operands(mask(sparsity=1.0), 24, "bfloat16")
    assert products.checked_error(plan, jnp.zeros_like(right), a, b, "it") == 0
    with pytest.raises(RuntimeError):
        products.checked_error(plan, right, a, b, "it")


def test_the_bound_is_that_of_what_is_live(monkeypatch):
    class Device:
        device_kind = "NVIDIA H200"

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    full = mask(rows=128, m=4096, k=4096, sparsity=0.0)
    assert products.bound_us(full, 4096, "bfloat16") == pytest.approx(2 * 4096**3 / 797e12 * 1e6)
    assert products.bound_us(full, 4096, "float32") == pytest.approx(4 * 4096**3 / 797e12 * 1e6)
    empty = dataclasses.replace(full, sparsity=1.0)
    assert products.bound_us(empty, 4096, "bfloat16") == pytest.approx(2 * 4096**2 / 4.3e12 * 1e6)


# matmul_sparsity

SMALL = dataclasses.replace(matmul_sparsity.Config.smoke(), m=128, n=64, k=128, no_peers=True)


def test_matmul_sparsity_gives_a_checked_row_for_each_product(run):
    granularities = ("128x1", "32x1", "1x64", "32x64")
    config = dataclasses.replace(
        SMALL, dtypes=("float32",), granularities=granularities, masks=("clustered",), sparsities=(0.0, 0.9)
    )
    rows = matmul_sparsity.measure(config, run, timer)
    assert [(row["granularity"], row["sparsity"]) for row in rows] == [(g, s) for g in granularities for s in (0, 0.9)]
    for row in rows:
        assert row["time_us"] == row["with_index_us"] == row["dense_us"] == 12
        assert row["error"] < 1e-5 and row["speedup"] == 1
        assert (row["index_us"] is None) == (row["plan"] == "dense")
    assert {row["plan"] for row in rows if row["granularity"] == "128x1"} == {"k 128x1"}
    text, figures = matmul_sparsity.readme({"rows": rows})
    assert "cuBLAS, dense" in text and figures["matmul_sparsity.png"].startswith(b"\x89PNG")


def test_matmul_sparsity_keeps_no_row_that_is_wrong(run):
    def broken(function, arguments, iterations):
        out, times = timer(function, arguments, iterations)
        return jax.tree.map(lambda x: x + jnp.ones_like(x), out), times

    with pytest.raises(RuntimeError, match="128x1 random at 90% by k 128x1: error .* is above"):
        matmul_sparsity.measure(SMALL, run, broken)


@pytest.mark.parametrize("name", ["dtypes", "granularities", "masks", "sparsities"])
def test_matmul_sparsity_refuses_to_measure_nothing(name, run):
    with pytest.raises(ValueError, match=f"{name} must hold something; got none"):
        matmul_sparsity.measure(dataclasses.replace(SMALL, **{name: ()}), run, timer)


def rows_at(times: dict[float, float], **fields) -> list[dict[str, Any]]:
    shared = {"granularity": "128x1", "mask": "random", "dtype": "bfloat16", "error": 0.0, "bound_us": 1.0}
    shared |= {"m": 1, "n": 1, "k": 1, "index_us": 4.0} | fields
    return [
        shared | {"sparsity": s, "time_us": t, "with_index_us": t + 4, "dense_us": 10.0, "speedup": 10 / t}
        for s, t in times.items()
    ]


def test_break_even_is_where_the_lines_cross():
    rows = rows_at({0.0: 12.0, 0.5: 8.0, 0.9: 2.0})
    assert matmul_sparsity.break_even(rows, "time_us") == pytest.approx(0.25)
    assert matmul_sparsity.break_even(reversed(rows), "with_index_us") == pytest.approx(0.5 + 0.4 * 2 / 6)
    assert matmul_sparsity.break_even(rows_at({0.0: 9.0, 0.9: 2.0}), "time_us") == 0
    assert matmul_sparsity.break_even(rows_at({0.5: 2.0, 0.9: 11.0}), "time_us") is None
    dipping = rows_at({0.0: 8.0, 0.5: 12.0, 0.9: 8.0})  # quicker at 0, and then not: only what lasts counts
    assert matmul_sparsity.break_even(dipping, "time_us") == pytest.approx(0.7)
    covered = rows_at({0.5: 9.9}, plan="dense") + rows_at({0.9: 2.0}, plan="k 64x1")
    assert matmul_sparsity.break_even(covered, "time_us") == 0.9


def test_margins_count_the_peers_format_as_ours_counts_the_index():
    rows = rows_at({0.0: 100.0, 0.5: 4.0, 0.9: 2.0}, cusparse_us=200.0, cusparse_index_us=100.0)
    dense, cusparse = matmul_sparsity.margins(rows)
    np.testing.assert_allclose(dense["given"], [10 / 4, 10 / 2])
    np.testing.assert_allclose(dense["with_index"], [10 / 8, 10 / 6])
    np.testing.assert_allclose(cusparse["given"], [50, 100])  # without the row that has no zeros
    np.testing.assert_allclose(cusparse["with_index"], [300 / 8, 300 / 6])
    text, _ = matmul_sparsity.readme({"rows": rows})
    assert "| cuSPARSE, CSR | bfloat16 | 50.00 – 70.71 – 100.0 | 37.50 – 43.30 – 50.0 |        88.7x |" in text
    assert "BSR" not in text


def test_the_kept_result_can_be_shown():
    text, figures = matmul_sparsity.readme(json.loads(KEPT.read_text()))
    assert "128x1" in text and list(figures) == ["matmul_sparsity.png"]


# Peers

JOBS = [peers.Job(mask=mask(), n=16, dtype=dtype) for dtype in ("bfloat16", "float32")]


def test_without_torch_the_peers_columns_stay_empty(monkeypatch, capsys):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert peers.measure(JOBS) == [{}, {}]
    assert "torch is not installed" in capsys.readouterr().out


def fake_torch(folder: Path, monkeypatch, code: str) -> None:
    (folder / "torch.py").write_text(code)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_the_peers_process_answers_every_job(tmp_path, monkeypatch):
    fake_torch(tmp_path, monkeypatch, "class cuda:\n    is_available = staticmethod(lambda: False)\n")
    assert peers.measure(JOBS) == [{}, {}]


def test_a_peers_process_that_fails_is_not_taken_for_a_missing_peer(tmp_path, monkeypatch):
    fake_torch(tmp_path, monkeypatch, "raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="experiments.peers ended with 3 after 0 of 2 jobs"):
        peers.measure(JOBS)


@pytest.mark.gpu
def test_the_peers_run_and_are_right():
    pytest.importorskip("torch")
    jobs = [
        peers.Job(mask=mask(rows=rows, cols=cols, m=512, k=512), n=256, dtype=dtype)
        for rows, cols in ((128, 1), (32, 64))
        for dtype in ("bfloat16", "float32")
    ]
    for job, row in zip(jobs, peers.measure(jobs), strict=True):
        expected = {"cusparse"} if job.mask.cols == 1 else set(peers.NAMES)
        assert {name for name in peers.NAMES if f"{name}_us" in row} == expected
        assert all(row[f"{name}_us"] > 0 and row[f"{name}_error"] < 1e-2 for name in expected)


# sread_cost, index_construction


def test_sread_cost_reads_the_same_columns_three_ways(run):
    given = []

    def watched(function, arguments, iterations):
        given.append(arguments)
        return function(*arguments), [{0: 30.0, 1: 25.0, 2: 20.0}[(len(given) - 1) % 3]]

    config = dataclasses.replace(sread_cost.Config.smoke(), m=160, n=32, k=64, rows=(128, 64), sparsities=(0.0, 0.75))
    rows = sread_cost.measure(config, run, watched)
    assert sread_cost.measure(config, run, watched) == rows and len(given) == 12  # those of the first time
    assert [(row["granularity"], row["listed"]) for row in rows] == [
        ("128x1", 64), ("128x1", 16), ("64x1", 64), ("64x1", 16)
    ]  # fmt: skip
    for row in rows:
        assert (row["time_us"], row["consecutive_us"], row["contiguous_us"]) == (30, 25, 20)
        assert row["overhead"] == 0.5 and row["error"] < 1e-2
    a_t, _, at_random = given[3]
    assert a_t.shape == (64, 160) and at_random.mask().sum(axis=1).tolist() == [16, 16]
    assert not np.array_equal(*at_random.mask())  # each block its own
    assert given[4][2].mask()[:, :16].all()
    assert given[5][0].shape == (16, 160) and given[5][2].mask().all()
    assert "50%" in sread_cost.readme({"rows": rows})[0]


def test_index_construction_checks_what_it_times(tmp_path):
    config = dataclasses.replace(
        index_construction.Config.smoke(),
        m=130, k=70, dtypes=("float32",), granularities=("16x1", "1x16", "16x8"), sparsities=(0.7,),
        no_peers=True,
    )  # fmt: skip
    empty = dataclasses.replace(config, granularities=("16x1",), sparsities=(1.0,))

    def measure(config, timer=timer):
        with Run.start("index_construction", config, root=tmp_path, fresh=True) as run:
            return index_construction.measure(config, run, timer)

    rows = measure(config) + measure(empty)
    assert [row["granularity"] for row in rows] == ["16x1", "1x16", "16x8", "16x1"]
    assert all(row["index_us"] == row["nonzero_us"] == row["cusparse_us"] == 12 for row in rows)
    assert "to_sparse_csr" in index_construction.readme({"rows": rows})[0]

    def one_too_few(function, arguments, iterations):
        out, times = timer(function, arguments, iterations)
        return dataclasses.replace(out, counts=out.counts - 1), times

    with pytest.raises(RuntimeError, match="16x1 at 70%: the index does not list what is live"):
        measure(config, one_too_few)


# plan_choice


def test_plan_choice_compares_the_choice_with_every_plan():
    times = {}

    def slower_each_time(function, arguments, iterations):
        times[function] = 10.0 + len(times)
        return function(*arguments), [times[function]]

    config = dataclasses.replace(plan_choice.Config.smoke(), m=192, n=32, k=192, masks=tuple(KINDS))
    products.functions.cache_clear()
    rows = plan_choice.measure(config, None, slower_each_time)
    assert [row["mask"] for row in rows] == list(KINDS)
    first = rows[0]
    assert first["best_plan"] == "dense" and first["best_us"] == first["dense_us"] == 10
    assert first["time_us"] == (10 if first["plan"] == "dense" else first[f"{first['plan']}_us"])
    assert first["over_best"] == pytest.approx(first["time_us"] / 10) and first["error"] < 1e-2
    assert first["speedup"] == pytest.approx(10 / first["time_us"], abs=1e-3)
    text, figures = plan_choice.readme({"rows": rows})
    assert "| all " in text and list(figures) == ["plan_choice.png"]


def test_the_activations_are_those_of_the_saved_model(tmp_path):
    from flax import nnx

    from models import OPT, OPTConfig, save_opt
    from models.attention import place_tokens

    config = OPTConfig(vocab_size=320, layers=2, d_model=32, heads=2, d_ff=48, max_length=16)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: OPT(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    model = nnx.merge(graphdef, jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), state))
    save_opt(model, tmp_path / "model" / "orbax")
    held_out = np.random.default_rng(0).integers(0, 320, 100).astype(np.int32)
    np.savez(tmp_path / "tokens.npz", held_out=held_out)
    asked = dataclasses.replace(plan_choice.Config.smoke(), m=20, dtype="float32")
    found = list(plan_choice.activations(asked, tmp_path))
    assert [problem.named["layer"] for problem in found] == [0, 1]

    @jax.jit
    def first_layer(model, tokens):
        embedded = model.embed_tokens(tokens) + model.embed_positions(jnp.broadcast_to(jnp.arange(2, 10), (3, 8)))
        layer = model.layers[0]
        y, _ = layer.self_attn(layer.self_attn_layer_norm(embedded), place_tokens(tokens), None)
        return jax.nn.relu(layer.fc1(layer.final_layer_norm(embedded + y))).reshape(24, 48)[:20]

    expected = first_layer(model, jnp.asarray(held_out[:24].reshape(3, 8)))
    np.testing.assert_allclose(found[0].a, expected, atol=1e-5)
    np.testing.assert_array_equal(found[1].b, model.layers[1].fc2.kernel[...])
    assert found[0].named["sparsity"] == pytest.approx(np.mean(np.asarray(expected) == 0), abs=0.02)
    with pytest.raises(FileNotFoundError, match="model must be the folder of a finished run of quickstart"):
        list(plan_choice.activations(asked, tmp_path / "model"))


def test_the_latest_finished_quickstart_is_taken(tmp_path):
    assert plan_choice.latest_quickstart(tmp_path) is None
    for name, finished in (("2026-01-01", True), ("2026-01-02", True), ("2026-01-03", False)):
        (tmp_path / "quickstart" / name).mkdir(parents=True)
        if finished:
            (tmp_path / "quickstart" / name / "rows.jsonl").write_text("")
    assert plan_choice.latest_quickstart(tmp_path) == tmp_path / "quickstart" / "2026-01-02"


@pytest.mark.parametrize("name", ["matmul_sparsity", "sread_cost", "index_construction", "plan_choice"])
def test_what_times_kernels_says_that_it_needs_a_gpu(name, tmp_path, capsys):
    assert main([name, "--smoke", "--runs", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"error: {name} times kernels on a GPU; this machine has cpu only\n"
    assert not list((tmp_path / name).iterdir())
