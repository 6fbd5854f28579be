"""The experiments on mixtures of experts, on a CPU: all but the time itself, and what needs torch."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import moe, moe_inference, moe_layer, moe_peers, moe_training, programs, swin_peer
from experiments.__main__ import main
from experiments.runs import Run
from sparsellm.mixture_of_experts import LinearRouter, MixtureOfExperts, RouterOutput, RouterRule


def timer(function, arguments: list[Any], iterations: int):
    """Runs the function; every call of it took 12 us."""
    return function(*arguments), [12.0] * iterations


def start(tmp_path, name: str, config: Any) -> Run:
    return Run.start(name, config, root=tmp_path)


def read_rows(tmp_path, name: str) -> list[dict[str, Any]]:
    (run,) = (tmp_path / name).iterdir()
    assert not (run / "checkpoints").exists()
    return [json.loads(line) for line in (run / "rows.jsonl").read_text().splitlines()]


def smoke(tmp_path, name: str) -> list[dict[str, Any]]:
    assert main([name, "--smoke", "--runs", str(tmp_path)]) == 0
    return read_rows(tmp_path, name)


# The layer in plain JAX


def layer(rule: RouterRule, **options) -> MixtureOfExperts:
    """With weights made in numpy, which compiles nothing."""
    zeros, random = nnx.initializers.zeros, np.random.default_rng(3)
    router = LinearRouter(12, 5, rule, rngs=nnx.Rngs(0))
    made = MixtureOfExperts(12, 20, router, activation="silu", kernel_init=zeros, rngs=nnx.Rngs(0), **options)
    for parameter in jax.tree.leaves(nnx.state(made), is_leaf=lambda x: isinstance(x, nnx.Variable)):
        parameter[...] = jnp.asarray(random.normal(size=parameter.shape), jnp.float32) / 4
    nnx.update(made, nnx.state(made))
    return made


@jax.jit
def routed(made: MixtureOfExperts, x: jax.Array) -> RouterOutput:
    return made.route(x)


def float64(layer: MixtureOfExperts) -> list[Any]:
    return [None if w is None else np.asarray(w, np.float64) for w in moe.weights(layer)]


def by_token(layer: MixtureOfExperts, x: jax.Array) -> np.ndarray:
    """Token by token in float64, from what the router decided."""
    router = routed(layer, x)
    ids, weights, kept = map(np.asarray, (router.ids, router.weights, router.kept))
    wi, wo, wi_bias, wo_bias = float64(layer)
    tokens = np.asarray(x, np.float64)
    out = np.zeros_like(tokens)
    for t, j in np.argwhere(kept):
        e = ids[t, j]
        h = tokens[t] @ wi[e] + (0 if wi_bias is None else wi_bias[e])
        gate, up = np.split(h, 2) if layer.gated else (h, 1)
        y = gate / (1 + np.exp(-gate)) * up @ wo[e] + (0 if wo_bias is None else wo_bias[e])
        out[t] += float(weights[t, j]) * y
    return out


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (RouterRule(top_k=2, renormalise=True), {"gated": True}),
        (RouterRule(top_k=2, capacity_factor=0.5, drop="priority"), {"bias": True}),
    ],
    ids=["gated", "half dropped"],
)
def test_plain_jax_computes_what_the_layer_does(rule, options, getkey):
    made, x = layer(rule, **options), jax.random.normal(getkey(), (33, 12))
    expected = by_token(made, x)
    assert bool(routed(made, x).kept.all()) == (rule.capacity_factor is None)

    @jax.jit
    def ways(x):
        router = made.route(x)
        return moe.one_hot(made, x, router), moe.ragged_dot(made, x, router), moe.OneHot(made)(x)

    for out in ways(x):
        np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_the_balanced_products_are_the_layers(gated, getkey):
    made, x = layer(RouterRule(top_k=1), gated=gated), jax.random.normal(getkey(), (5, 4, 12))
    wi, wo, _, _ = float64(made)
    h = np.asarray(x, np.float64) @ wi
    gate, up = np.split(h, 2, axis=-1) if gated else (h, 1)
    np.testing.assert_allclose(moe.balanced(made, x), (gate / (1 + np.exp(-gate)) * up) @ wo, atol=1e-5)


def test_a_models_experts_are_computed_another_way_on_the_same_weights(getkey):
    model, x = nnx.Sequential(layer(RouterRule(top_k=1)), jnp.sin), jax.random.normal(getkey(), (33, 12))
    kinds: dict[str, Any] = {variant: moe.with_experts(model, variant) for variant in moe.VARIANTS}
    call = jax.jit(lambda model, x: model(x))
    for variant, changed in kinds.items():
        assert isinstance(changed, nnx.Sequential)
        np.testing.assert_allclose(call(changed, x), call(model, x), atol=1e-5)
        kind = moe.OneHot if variant == "one_hot" else MixtureOfExperts
        assert isinstance(changed.layers[0], kind), variant
        assert len(jax.tree.leaves(nnx.state(changed))) == len(jax.tree.leaves(nnx.state(model)))
    assert kinds["xla"].layers[0].implementation == "xla"
    assert isinstance(model.layers[0], MixtureOfExperts) and model.layers[0].implementation is None
    with pytest.raises(ValueError, match="variant must be one of sparse, xla, one_hot; got 'dense'"):
        moe.with_experts(model, "dense")


def test_what_a_run_has_computed_is_not_computed_again(tmp_path):
    with start(tmp_path, "some", moe_layer.Config()) as run:
        assert run.remembered("a", lambda: {"x": 1.5}) == {"x": 1.5}
        assert run.remembered("b", lambda: [{}]) == [{}]
    with start(tmp_path, "some", moe_layer.Config()) as again:
        assert again.remembered("a", lambda: pytest.fail("computed anew")) == {"x": 1.5}
        again.finish([])
    assert not (again.folder / "checkpoints").exists()


def test_the_wall_clock_waits_for_results():
    out, times = programs.wall_clock(jax.jit(lambda x: x + 1), [jnp.arange(3)], 4)
    assert out.tolist() == [1, 2, 3] and len(times) == 4 and min(times) > 0


# moe_layer

TINY = moe_layer.Config.smoke()


def described(**changes) -> moe_peers.Layer:
    sizes = {"model": "some", "tokens": 64, "d_model": 32, "d_ff": 64, "experts": 4}
    return moe_peers.Layer(**(sizes | {"activation": "silu", "gated": True} | changes))


def test_moe_layer_runs_on_a_cpu(tmp_path):
    rows = smoke(tmp_path, "moe_layer")
    assert [row["routing"] for row in rows] == ["uniform", "zipf"]
    for row, ways in zip(rows, ({"ragged_dot", "one_hot"}, set()), strict=True):  # XLA's under the first routing only
        assert row["error"] < 1e-2 and row["deterministic"] and row["bound_us"] is None
        assert {name for name in moe_layer.PEERS if row.get(f"{name}_us", 0) > 0} == ways | {"bmm"}
        assert row["time_us"] > 0


@pytest.mark.parametrize("top_k", [1, 3])
def test_moe_layers_reference_is_the_layer(top_k):
    module, x = moe_layer.make(described(top_k=top_k, bias=True))
    module.dtype = jnp.dtype("float32")
    x = x.astype(jnp.float32)
    np.testing.assert_allclose(moe.reference(module, x), by_token(module, x), atol=1e-5)


def test_moe_layer_keeps_no_row_that_is_wrong_and_no_peer_that_is(capsys):
    def broken(wrong: int):
        calls = []

        def timed(function, arguments, iterations):
            calls.append(function)
            out, times = timer(function, arguments, iterations)
            return (out + out if len(calls) == wrong else out), times

        return timed

    row = moe_layer.measure_layer(described(top_k=2), broken(2))
    assert "ragged_dot_us" not in row and row["one_hot_us"] == row["time_us"] == 12
    assert "ragged_dot, Layer(" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="Layer.*: error .* is above 0.01"):
        moe_layer.measure_layer(described(top_k=2), broken(1))


def test_moe_layer_measures_a_grouped_product_by_itself():
    product = described(activation=None, gated=False, routing="zipf")
    row = moe_layer.measure_product(product, timer)
    assert row["error"] < 1e-2 and row["deterministic"]
    assert row["time_us"] == row["ragged_dot_us"] == row["bmm_us"] == 12
    assert row["tflops"] == round(2 * 64 * 32 * 64 / 12 / 1e6, 1)


@pytest.mark.parametrize("routing", moe_peers.ROUTINGS)
def test_tokens_go_where_the_routing_says(routing):
    share = np.asarray(routed(*moe_layer.make(described(tokens=8192, routing=routing))).counts) / 8192
    rank = np.arange(1, 5.0)
    expected = rank**-1.2 / (rank**-1.2).sum() if routing == "zipf" else np.full(4, 1 / 4)
    np.testing.assert_allclose(share, expected, atol=0.08)
    assert routing == "uniform" or share[0] > 4 * share[-1]


def test_flops_and_bytes_are_those_of_live_experts(monkeypatch):
    class Device:
        device_kind = "NVIDIA H200"

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    layer = described(tokens=1024, d_model=768, d_ff=3072, experts=64, gated=False)
    row = moe_layer._row(layer, np.array([1000, 24] + [0] * 62), {"time_us": 10.0})
    size = 2 * (2 * 1024 * 768 + 2 * 2 * 768 * 3072)
    assert (row["live_experts"], row["busiest"]) == (2, 0.9766)
    assert row["gbps"] == round(size / 10 / 1e3, 1)
    flops = 2 * 1024 * 768 * 2 * 3072
    assert row["tflops"] == round(flops / 10 / 1e6, 1)
    assert row["bound_us"] == round(max(flops / 797e12, size / 4.3e12) * 1e6, 2)


def test_dense_ways_are_left_out_where_they_would_not_end():
    qwen3 = {"d_model": 2048, "d_ff": 768, "experts": 128, "top_k": 8}
    assert moe_layer._affordable(described(tokens=4096, **qwen3)) == ["ragged_dot", "one_hot"]
    assert moe_layer._affordable(described(tokens=16384, **qwen3)) == ["one_hot"]
    assert moe_layer._affordable(described(tokens=65536, **qwen3)) == []
    assert moe_layer._affordable(described()) == ["ragged_dot", "one_hot"]


def test_moe_layer_measures_each_combination_and_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(moe_peers, "measure_layers", lambda jobs: [{"torch_us": float(i)} for i in range(len(jobs))])
    config = dataclasses.replace(TINY, no_peers=False)
    with start(tmp_path, "moe_layer", config) as run:
        rows = moe_layer.measure(config, run, timer)
        assert [row["torch_us"] for row in rows] == [0, 1]
        monkeypatch.setattr(moe_layer, "measure_layer", lambda *_, **options: pytest.fail("measured again"))
        assert moe_layer.measure(config, run, timer) == rows
    jobs = moe_layer.layers(moe_layer.Config())
    assert len(jobs) == 2 * (3 + 2 + 6 + 3 + 3 + 1) == len(set(jobs))
    assert {job.experts for job in jobs if job.model == "switch"} == {64, 128, 256}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ("mixtrall",)}, "models must be some of mixtral, .*; got mixtrall"),
        ({"models": ()}, "models must hold something; got none"),
        ({"routings": ("random",)}, "routings must be some of uniform, zipf; got random"),
    ],
)
def test_moe_layer_refuses_what_it_does_not_know(changes, message):
    with pytest.raises(ValueError, match=message):
        moe_layer.layers(moe_layer.Config(**changes))


def layer_row(**changes) -> dict[str, Any]:
    row = {"model": "mixtral", "experts": 8, "tokens": 1024, "routing": "uniform", "dtype": "bfloat16"}
    row |= {"time_us": 100.0, "ragged_dot_us": 800.0, "bmm_us": 90.0, "bound_us": 50.0, "tflops": 500.0, "gbps": 12.5}
    return row | {"error": 3e-3, "deterministic": True} | changes


def test_moe_layers_table_shows_peers_over_ours():
    rows = [layer_row(), layer_row(tokens=4096, torch_us=150.0, deterministic=False), layer_row(routing="zipf")]
    text, figures = moe_layer.readme({"rows": rows})
    header, _, first, second, _ = [line.split() for line in text.splitlines() if line.startswith("|")]
    assert "torch," in header and "one-hot" not in header
    assert first[1::2] == ["mixtral", "8", "1024", "uniform", "100.0", "500.0", "12.5", "50%", "–", "8.00x", "0.90x", "3e-03"]  # fmt: skip  # noqa: E501
    assert "1.50x" in second
    assert "Not every row is the same to the bit" in text
    assert figures["moe_layer.png"].startswith(b"\x89PNG")
    assert "Not every row" not in moe_layer.readme({"rows": rows[:1]})[0]


# moe_inference


def test_moe_inference_runs_on_a_cpu(tmp_path):
    (row,) = smoke(tmp_path, "moe_inference")
    assert (row["model"], row["experts"], row["batch"]) == ("switch-tiny", 4, 2)
    assert row["error"] < 1e-3 and row["time_ms"] > 0 and row["xla_time_ms"] > 0
    assert "transformers_time_ms" not in row


def test_swin_moe_is_given_images():
    sizes = moe_inference.model_config("swin-tiny", "bfloat16")

    def forward():
        model, arrays = moe_inference.make(sizes, 0), moe_inference.inputs(sizes, 3, moe_inference.Config())
        assert moe_inference._experts(model) == 4
        return model(*arrays)

    assert jax.eval_shape(forward).shape == (3, 10)


def test_moe_inference_finds_a_wrong_layer(monkeypatch, getkey):
    config = dataclasses.replace(moe_inference.Config.smoke(), baselines=("one_hot",))
    model, arrays = nnx.Sequential(layer(RouterRule(top_k=1))), [jax.random.normal(getkey(), (33, 12))]
    right = moe.one_hot
    monkeypatch.setattr(moe, "one_hot", lambda layer, x, router: 1.01 * right(layer, x, router))
    with pytest.raises(RuntimeError, match="some in float32: logits differ by 9.9e-03, above 0.001"):
        moe_inference._measure(config, "some", "float32", model, arrays, timer)


def test_moe_inference_compares_in_full_precision_what_tf32_has_sent_to_other_experts(monkeypatch, getkey):
    config = dataclasses.replace(moe_inference.Config.smoke(), baselines=("one_hot",))
    model, arrays = nnx.Sequential(layer(RouterRule(top_k=1))), [jax.random.normal(getkey(), (33, 12))]
    measure, noise = programs.measure, iter([1.0, 1.01])

    def rounded(*args):
        assert jax.config.jax_default_matmul_precision is None
        out, *rest = measure(*args)
        return out * next(noise), *rest

    compile_model, precisions = programs.compile_model, []

    def recorded(*args):
        precisions.append(jax.config.jax_default_matmul_precision)
        return compile_model(*args)

    monkeypatch.setattr(programs, "measure", rounded)
    monkeypatch.setattr(programs, "compile_model", recorded)
    row = moe_inference._measure(config, "some", "float32", model, arrays, timer)
    assert row["error"] < 1e-5 and precisions == [None, None, "float32", "float32"]


def test_memory_is_that_of_weights_inputs_and_outputs(getkey):
    model, x = nnx.Linear(64, 256, rngs=nnx.Rngs(0)), jax.random.normal(getkey(), (32, 64))
    _, compiled = programs.compile_model(lambda model, x: model(x), model, x)
    needed = 4 * (64 * 256 + 256 + 32 * 64 + 32 * 256) / 2**30
    assert needed - 1e-3 <= programs.memory_gib(compiled) < 2 * needed + 1e-3


def test_routers_are_sure_and_experts_show():
    sizes = dataclasses.replace(
        moe_inference.model_config("switch-tiny", "float32"), encoder_layers=2, decoder_layers=1
    )
    model: Any = moe_inference.make(sizes, 0)
    forward = jax.jit(lambda model, *arrays: nnx.capture(model, nnx.Intermediate)(*arrays))
    arrays = moe_inference.inputs(sizes, 2, moe_inference.Config.smoke())
    before, captured = forward(model, *arrays)
    (router,) = (x for x in jax.tree.leaves(captured, is_leaf=_is_router) if _is_router(x))
    assert float(jnp.median(router.weights)) > 0.5
    wo = model.encoder.block[1].mlp.wo
    wo[...] = jnp.roll(wo[...], 1, axis=0)
    assert float(programs.median_error(forward(model, *arrays)[0], before)) > 0.05


def _is_router(x: Any) -> bool:
    return isinstance(x, RouterOutput)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ("opt-125m",)}, "models must start with switch- or swin-; got 'opt-125m'"),
        ({"models": ("switch-huge",)}, "size must be one of .*; got 'huge'"),
        ({"baselines": ("sparse",)}, "baselines must be some of xla, one_hot; got sparse"),
        ({"dtypes": ()}, "dtypes must hold something; got none"),
        ({"dtypes": ("int8",)}, "dtypes must be some of bfloat16, .*; got int8"),
        ({"batches": ()}, "batches must hold something; got none"),
    ],
)
def test_moe_inference_refuses_what_it_does_not_know(changes, message, tmp_path):
    config = moe_inference.Config(**changes)
    with start(tmp_path, "moe_inference", config) as run, pytest.raises(ValueError, match=message):
        moe_inference.measure(config, run)


def test_moe_inference_puts_torchs_models_next_to_ours(tmp_path, monkeypatch):
    asked = []

    def measure_model(job):
        asked.append(job)
        return {"2_time_ms": 5.0, "2_memory_gib": 1.5, "32_time_ms": 9.0}

    monkeypatch.setattr(moe_peers, "measure_model", measure_model)
    monkeypatch.setattr(swin_peer, "measure_model", measure_model)
    monkeypatch.setattr(moe_inference, "measure_model", lambda config, model, dtype, timer: [
        {"model": model, "experts": 4, "batch": 2, "dtype": dtype, "time_ms": 1.0, "memory_gib": 1.0,
         "xla_time_ms": 2.0, "xla_memory_gib": 0.25, "error": 1e-3}
    ])  # fmt: skip
    config = dataclasses.replace(moe_inference.Config.smoke(), models=("switch-tiny", "swin-tiny"), no_peers=False)
    with start(tmp_path, "moe_inference", config) as run:
        switch, swin = moe_inference.measure(config, run)
    job, of_swin = asked
    assert (of_swin.config["experts"], of_swin.config["dtype"], of_swin.batches) == (4, "float32", [2])
    assert (of_swin.router_std, of_swin.repeats) == (moe_inference.SURE, 2)
    assert job.config["num_experts"] == 4 and job.config["num_sparse_encoder_layers"] == 1 and job.batches == [2]
    assert (switch["transformers_time_ms"], switch["transformers_memory_gib"]) == (5.0, 1.5)
    assert (swin["torch_time_ms"], swin["torch_memory_gib"]) == (5.0, 1.5)
    assert "torch_time_ms" not in switch and "transformers_time_ms" not in swin
    text, figures = moe_inference.readme({"rows": [switch, swin]})
    assert [line.split()[1::2] for line in text.splitlines()[2:]] == [
        ["switch-tiny", "2", "float32", "1.0", "2.0", "5.0", "–", "1.00", "0.25", "1.50", "–", "1e-03"],
        ["swin-tiny", "2", "float32", "1.0", "2.0", "–", "5.0", "1.00", "0.25", "–", "1.50", "1e-03"],
    ]
    assert figures["moe_inference.png"].startswith(b"\x89PNG")


# Peers


def test_without_torch_its_columns_stay_empty(monkeypatch, capsys):
    monkeypatch.setattr(moe_peers.peers.importlib.util, "find_spec", lambda name: None)
    assert moe_peers.measure_layers([described(), described()]) == [{}, {}]
    assert capsys.readouterr().out == "torch is not installed: the columns of torch's layer stay empty\n"


def test_the_peers_process_reads_both_kinds_of_jobs(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("class cuda:\n    is_available = staticmethod(lambda: False)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    jobs = [described(), moe_peers.Model(config={}, dtype="bfloat16", batches=[2], length=8)]
    assert moe_peers.peers.ask("experiments.moe_peers", jobs, "both") == [{}, {}]


def test_a_layer_of_no_known_routing_is_refused():
    with pytest.raises(ValueError, match="routing must be one of uniform, zipf; got routing='even'"):
        described(routing="even")


@pytest.mark.gpu
def test_torchs_layer_runs_and_is_right():
    pytest.importorskip("torch")
    jobs = [
        described(tokens=256, d_model=128, d_ff=256, **changes)
        for changes in (
            {"top_k": 2},
            {"gated": False, "bias": True, "activation": "gelu", "routing": "zipf"},
            {"gated": False, "activation": None},
        )
    ]
    for row in moe_peers.measure_layers(jobs):
        assert row["torch_us"] > 0 and row["torch_error"] < 1e-2


# moe_training


def test_moe_training_learns_the_same_both_ways(tmp_path):
    summary, *steps = smoke(tmp_path, "moe_training")
    assert summary["experts"] == 4 and summary["steps"] == len(steps) == 20
    assert summary["error"] < 1e-3 and summary["gradient_error"] < 1e-4 and summary["step_ms"] > 0
    assert (summary["loss"], summary["reference_loss"]) == (steps[-1]["loss"], steps[-1]["reference_loss"])
    assert [row["step"] for row in steps] == list(range(1, 21))
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.3
    assert all(row["balance"] >= 2 for row in steps)  # top_k where experts are chosen evenly


def test_moe_training_refuses_losses_that_do_not_agree(tmp_path, monkeypatch):
    config, losses = moe_training.Config.smoke(), {"sparse": [4.0, 3.0], "one_hot": [4.0, 3.2]}
    norms = {"sparse": 1.1, "one_hot": 1.0}

    def train(model, windows, config, seed, run, variant):
        norm = norms[variant]
        return {"losses": losses[variant], "balances": [1.0, 1.0], "gradient_norm": norm, "step_ms": 2.0}

    monkeypatch.setattr(moe_training, "train", train)
    monkeypatch.setattr(moe_training, "prepare", lambda *_: np.zeros((8, 33), np.int32))
    with start(tmp_path, "moe_training", config) as run:
        with pytest.raises(RuntimeError, match="gradient_error of 0.02 at most is right; got 1.0e-01"):
            moe_training.run(config, run)
        norms["sparse"] = 1.01
        with pytest.raises(RuntimeError, match="error of 0.02 at most is right; got 3.1e-02"):
            moe_training.run(config, run)
        losses["one_hot"] = [4.0, 3.01]
        assert len(moe_training.run(config, run)) == 3


def test_moe_trainings_table_shows_both_losses():
    found = {"losses": [4.0, 3.0], "balances": [1.0, 1.5], "gradient_norm": 2.0, "step_ms": 2.0}
    reference = {"losses": [4.0, 2.0], "balances": [1.0, 9.0], "gradient_norm": 4.0, "step_ms": 8.0}
    summary, *steps = moe_training.make_rows(found, reference)
    assert summary["error"] == 0.25 and summary["gradient_error"] == 0.5 and summary["reference_step_ms"] == 8.0
    assert steps[1] == {"step": 2, "loss": 3.0, "reference_loss": 2.0, "balance": 1.5, "error": 0.5}
    summary |= {"model": "mixtral-some", "parameters": 1234, "experts": 8, "dtype": "bfloat16", "tokens": 4096}
    text, figures = moe_training.readme({"rows": [summary, *steps]})
    assert "1,234 parameters" in text and "2.0 ms a step, 8.0 by one-hot dispatch" in text
    assert [cell.strip() for cell in text.splitlines()[-1].split("|")[1:-1]] == [
        "2",
        "3.0000",
        "2.0000",
        "5.0e-01",
        "1.500",
    ]
    assert figures["moe_training.png"].startswith(b"\x89PNG")
