"""Torch's Swin-MoE: what is asked of it, and, where torch is installed, its logits next to the JAX model's."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import swin_peer
from models.checkpoint import dotted
from models.swin_moe import SwinMoE, SwinMoEConfig
from sparsellm.routers import RouterRule

# Four windows that are shifted, one window, and one that is smaller than `window`; experts that drop choices.
CONFIG = SwinMoEConfig(
    image_size=24,
    patch_size=2,
    classes=7,
    embed_dim=16,
    depths=(2, 2, 2),
    heads=(1, 2, 4),
    window=6,
    experts=3,
    moe_stages=(0, 2),
    top_k=2,
    capacity_factor=0.9,
    init_std=0.3,
)


def random_parameters(model: swin_peer.Model) -> dict[str, np.ndarray]:
    """Every one of which matters."""
    random = np.random.default_rng(0)
    noise = {name: random.normal(size=shape) for name, shape in model.shapes.items()}
    return {
        name: (value * 0.3 + name.endswith("scale") if value.ndim == 1 else value / value.shape[-2] ** 0.5)
        for name, value in noise.items()
    }


def our_logits(config: SwinMoEConfig, parameters: dict[str, np.ndarray], images: np.ndarray) -> np.ndarray:
    graphdef, state = nnx.split(nnx.eval_shape(lambda: SwinMoE(config, rngs=nnx.Rngs(0))))
    ours = [(path, v.replace(jnp.asarray(parameters[dotted(path)], v.dtype))) for path, v in nnx.to_flat_state(state)]
    model: Any = nnx.merge(graphdef, nnx.from_flat_state(ours))
    return np.asarray(jax.jit(lambda model, images: model(images))(model, jnp.asarray(images)))


def test_what_is_asked_are_the_models_parameters():
    model = swin_peer.describe(SwinMoEConfig.preset("base-32"), [8], router_std=4.0)
    assert round(sum(np.prod(shape) for shape in model.shapes.values()) / 1e6, 1) == 955.3
    assert model.shapes["layers.2.blocks.17.mlp.wi"] == (32, 512, 2048)
    assert (model.config["dtype"], model.batches, model.router_std, model.repeats) == ("float32", [8], 4.0, 10)
    assert "shapes" not in repr(model)


@pytest.mark.parametrize(("experts", "top_k", "factor"), [(8, 1, 1.25), (3, 2, 0.9), (500, 1, 0.1), (4, 1, None)])
def test_experts_take_as_many_tokens_as_ours(experts, top_k, factor):
    config = {"experts": experts, "top_k": top_k, "capacity_factor": factor}
    rule = RouterRule(top_k=top_k, capacity_factor=factor)
    for tokens in (1, 7, 288, 1152):
        assert swin_peer.capacity(config, tokens) == (rule.capacity(tokens, experts) or tokens)


def test_without_torch_or_a_gpu_the_columns_stay_empty(tmp_path, monkeypatch, capsys):
    model = swin_peer.describe(CONFIG, [2])
    with monkeypatch.context() as patch:
        patch.setattr(swin_peer.peers.importlib.util, "find_spec", lambda name: None)
        assert swin_peer.measure_model(model) == {}
    assert capsys.readouterr().out == "torch is not installed: the columns of torch's Swin-MoE stay empty\n"
    (tmp_path / "torch.py").write_text("class cuda:\n    is_available = staticmethod(lambda: False)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert swin_peer.measure_model(model) == {}


def test_another_router_is_refused():
    config = dataclasses.asdict(dataclasses.replace(CONFIG, router="cosine"))
    with pytest.raises(NotImplementedError, match="router must be linear; got router='cosine'"):
        swin_peer.Swin(None, config, {})


@pytest.mark.parametrize(
    "changes", [{}, {"top_k": 1}, {"capacity_factor": None}, {"experts": None}], ids=["top-2", "top-1", "all", "dense"]
)
def test_torch_gives_our_logits(changes, monkeypatch):
    """By both products of experts."""
    torch = pytest.importorskip("torch", minversion="2.10")  # whose grouped product takes float32, and runs on a CPU
    config = dataclasses.replace(CONFIG, **changes)
    job = swin_peer.describe(config, [3])
    parameters = random_parameters(job)
    images = np.random.default_rng(1).normal(size=(3, 24, 24, 3)).astype(np.float32)
    expected = our_logits(config, parameters, images)
    for product in (swin_peer.Swin._batched, swin_peer.Swin._grouped):
        monkeypatch.setattr(swin_peer.Swin, "_batched", product)
        with torch.inference_mode():
            tensors = {name: torch.tensor(value, dtype=torch.float32) for name, value in parameters.items()}
            logits = swin_peer.Swin(torch, job.config, tensors)(torch.from_numpy(images))
        np.testing.assert_allclose(logits.numpy(), expected, atol=1e-4, rtol=0)


def test_each_batch_is_measured_with_random_weights(monkeypatch):
    torch = pytest.importorskip("torch", minversion="2.10")
    given = []

    def timed(torch, function, repeats):
        given.append((function(), repeats))
        return {"time_ms": 1.5, "memory_gib": 0.5}

    monkeypatch.setattr(swin_peer.peers, "wall_clock", timed)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    config = dataclasses.replace(CONFIG, dtype="bfloat16", param_dtype="bfloat16")
    job = swin_peer.describe(config, [2, 3], router_std=4.0, repeats=5)
    row, read = {}, swin_peer.Model(**json.loads(json.dumps(dataclasses.asdict(job))))
    with torch.inference_mode():
        swin_peer._measure(torch, read, row, device="cpu")
    assert row == {"2_time_ms": 1.5, "2_memory_gib": 0.5, "3_time_ms": 1.5, "3_memory_gib": 0.5}
    for (logits, repeats), batch in zip(given, (2, 3), strict=True):
        assert logits.shape == (batch, 7) and logits.dtype == torch.float32 and repeats == 5
        assert bool(logits.isfinite().all())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_published_size_runs_and_no_value_is_asked_for(dtype):
    """On tensors that have none: where the host asks for one, torch raises."""
    torch = pytest.importorskip("torch", minversion="2.10")
    job = swin_peer.describe(SwinMoEConfig.preset("base-32", dtype=dtype, param_dtype=dtype), [8])
    with torch.inference_mode():
        images = torch.empty(8, 192, 192, 3, dtype=getattr(torch, dtype), device="meta")
        assert swin_peer.make(torch, job, "meta")(images).shape == (8, 21841)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_torchs_swin_moe_runs(dtype):
    pytest.importorskip("torch")
    config = dataclasses.replace(CONFIG, dtype=dtype, param_dtype=dtype)
    row = swin_peer.measure_model(swin_peer.describe(config, [2, 3], repeats=2))
    assert row.keys() == {f"{batch}_{name}" for batch in (2, 3) for name in ("time_ms", "memory_gib")}
    assert min(row.values()) > 0
