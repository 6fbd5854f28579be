"""Mixtral to and from folders, and sparsellm/stored.py: parameters out of many tensors, on many devices."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from host_memory import traced_reads
from safetensors.numpy import load_file, save_file

from models import Mixtral, MixtralConfig, load_mixtral, load_opt, save_hf, save_mixtral
from sparsellm.checkpoint import load_config
from sparsellm.mixture_of_experts import LinearRouter
from sparsellm.stored import Stored

ROOT = Path(__file__).parents[1]
CONFIG = MixtralConfig(
    vocab_size=31,
    layers=1,
    d_model=6,
    heads=2,
    kv_heads=1,
    head_dim=4,
    d_ff=5,
    experts=3,
    max_length=20,
    sliding_window=7,
    rope_theta=123.0,
)
EXPERTS = "model.layers.0.block_sparse_moe.experts."


def make(config: MixtralConfig) -> Mixtral:
    rng = np.random.default_rng(0)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Mixtral(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), state))


def assert_same_parameters(a: Mixtral, b: Mixtral):
    for (path, x), (_, y) in zip(*(nnx.to_flat_state(nnx.state(m)) for m in (a, b)), strict=True):
        assert x[...].dtype == y[...].dtype, path
        np.testing.assert_array_equal(x[...], y[...], err_msg=str(path))


@pytest.fixture
def hf(tmp_path):
    """A Hugging Face folder, one file."""
    save_hf(make(CONFIG), tmp_path / "hf")
    return tmp_path / "hf"


def edit(folder: Path, change) -> None:
    """Rewrites a folder's tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, changes: dict) -> None:
    config = load_config(folder)
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_names_and_layouts_in_the_file(hf):
    """As transformers writes them, [out, in] for each expert: w1 is the gate, w3 its factor, w2 the way back."""
    layer, tensors = make(CONFIG).layers[0], load_file(hf / "model.safetensors")
    wi, wo = np.asarray(layer.block_sparse_moe.wi[...]), np.asarray(layer.block_sparse_moe.wo[...])
    for expert in range(3):
        np.testing.assert_array_equal(tensors[f"{EXPERTS}{expert}.w1.weight"], wi[expert, :, :5].T)
        np.testing.assert_array_equal(tensors[f"{EXPERTS}{expert}.w3.weight"], wi[expert, :, 5:].T)
        np.testing.assert_array_equal(tensors[f"{EXPERTS}{expert}.w2.weight"], wo[expert].T)
    router = layer.block_sparse_moe.router
    assert isinstance(router, LinearRouter)
    gate = np.asarray(router.kernel[...])
    np.testing.assert_array_equal(tensors["model.layers.0.block_sparse_moe.gate.weight"], gate.T)
    assert tensors["model.layers.0.self_attn.k_proj.weight"].shape == (4, 6)
    assert {"lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"} < tensors.keys()
    expected = {"model_type": "mixtral", "num_local_experts": 3, "num_key_value_heads": 1, "rope_theta": 123.0}
    assert expected.items() <= load_config(hf).items()


def test_native_checkpoint(tmp_path):
    save_mixtral(make(CONFIG), tmp_path / "a")
    again = load_mixtral(tmp_path / "a", implementation="xla")
    assert_same_parameters(again, make(CONFIG))
    assert again.config.implementation == "xla" and again.config.sliding_window == 7
    with pytest.raises(ValueError, match="is not of an OPT: its config.json says no model_type opt"):
        load_opt(tmp_path / "a")


def test_packed_experts(hf):
    """What transformers 5 computes with: one tensor for all experts' gate and up, one for their way back."""

    def pack(tensors):
        w1, w3, w2 = (
            np.stack([tensors.pop(f"{EXPERTS}{expert}.{w}.weight") for expert in range(3)]) for w in ("w1", "w3", "w2")
        )
        tensors["model.layers.0.mlp.experts.gate_up_proj"] = np.concatenate([w1, w3], axis=1)
        tensors["model.layers.0.mlp.experts.down_proj"] = w2
        tensors["model.layers.0.mlp.gate.weight"] = tensors.pop("model.layers.0.block_sparse_moe.gate.weight")

    edit(hf, pack)
    assert_same_parameters(load_mixtral(hf), make(CONFIG))

    def lose_an_expert(tensors):
        name = "model.layers.0.mlp.experts.down_proj"
        tensors[name] = tensors[name][:2].copy()

    edit(hf, lose_an_expert)
    with pytest.raises(ValueError, match=r"misshapen .*experts.down_proj: expected \(3, 6, 5\), found \(2, 6, 5\)"):
        load_mixtral(hf)


def test_every_wrong_tensor_is_named(hf):
    def damage(tensors):
        del tensors[f"{EXPERTS}2.w3.weight"]
        tensors[f"{EXPERTS}3.w2.weight"] = np.zeros((6, 5), np.float32)
        tensors[f"{EXPERTS}1.w2.weight"] = np.zeros((5, 6), np.float32)

    edit(hf, damage)
    with pytest.raises(ValueError) as error:
        load_mixtral(hf)
    lines = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert lines == [
        "missing layers.0.block_sparse_moe.experts.2.w3.weight (5, 6)",
        "extra layers.0.block_sparse_moe.experts.3.w2.weight (6, 5)",
        "misshapen layers.0.block_sparse_moe.experts.1.w2.weight: expected (6, 5), found (5, 6)",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["MistralForCausalLM"]},
            "architecture MixtralForCausalLM; got MistralForCausalLM",
        ),
        ({"hidden_act": "gelu"}, "hidden_act must be silu in config.json; got gelu"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings must be False"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type must be default in config.json; got yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling must be None"),
        ({"num_local_experts": 4}, r"missing layers.0.block_sparse_moe.experts.3.w1.weight \(5, 6\)"),
        ({"num_experts_per_tok": 9}, "top_k must be at most experts; got top_k=9, experts=3"),
        ({"num_key_value_heads": None}, "config.json must say num_key_value_heads; got only architectures"),
    ],
)
def test_another_model(hf, changes, message):
    edit_config(hf, changes)
    with pytest.raises(ValueError, match=message):
        load_mixtral(hf)


def test_a_config_as_transformers_4_wrote_it(tmp_path):
    """No head_dim, and rope_theta by itself."""
    hf, model = tmp_path / "hf", make(dataclasses.replace(CONFIG, d_model=8, head_dim=None))
    save_hf(model, hf)
    config = load_config(hf)
    for name in ("rope_parameters", "head_dim"):
        del config[name]
    (hf / "config.json").write_text(json.dumps(config | {"rope_theta": 77.0}))
    again = load_mixtral(hf)
    assert_same_parameters(again, model)
    assert again.config.rope_theta == 77 and again.config.head_width == 4


def test_a_truncated_file(hf):
    os.truncate(hf / "model.safetensors", 3000)
    with pytest.raises(ValueError, match="model.safetensors is truncated or damaged"):
        load_mixtral(hf)


def test_models_that_transformers_does_not_know(tmp_path):
    with pytest.raises(TypeError, match="model must be one of OPT, .*; got Linear"):
        save_hf(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), tmp_path / "a")


def test_the_host_holds_one_expert_s_tensor_at_a_time(tmp_path, monkeypatch):
    save_hf(make(dataclasses.replace(CONFIG, d_model=128, d_ff=1001, experts=5)), tmp_path / "hf")
    load_mixtral(tmp_path / "hf", dtype="bfloat16")  # compiles
    with traced_reads(monkeypatch) as peak:
        model = load_mixtral(tmp_path / "hf", dtype="bfloat16")
    total, largest = 4 * sum(x.size for x in jax.tree.leaves(nnx.state(model))), 4 * 1001 * 128
    assert total > 14 * largest
    assert largest < peak[0] < 2.5 * largest  # one, and the bytes of the file that it is made from


def test_names_that_do_not_fit_the_parameter():
    array = jax.ShapeDtypeStruct((2, 3, 4), jnp.float32)
    for names, came in (
        ([["a"]], "1 rows of 1"),
        ([["a", "b", "c"], ["d"]], "2 rows of 1, 3"),
        ([["a"], []], "of 0, 1"),
    ):
        with pytest.raises(ValueError, match=rf"must be 2 rows, each of a number of tensors that divides 4; .*{came}"):
            list(Stored(array, names).parts())


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from pathlib import Path
from jax.sharding import NamedSharding, PartitionSpec as P
from models import load_mixtral
from flax import nnx
from safetensors.numpy import load_file
from sparsellm.huggingface import load_tensors, open_tensors, save_folder
from sparsellm.stored import Stored

mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
rng = np.random.default_rng(0)
wi, bias, embedding = (rng.normal(size=size).astype(np.float32) for size in ((4, 6, 8), (4, 8), (10, 6)))
names = {
    "wi": (wi, [[f"{e}.w1", f"{e}.w3"] for e in range(4)], True),
    "bias": (bias, [[f"{e}.b1", f"{e}.b3"] for e in range(4)], False),
    "packed": (wi, "packed", True),
    "embedding": (embedding, "embedding", False),
}
for i, specs in enumerate([
    (P("x"), P("x"), P("x"), P()),  # by experts, replicated along y
    (P(None, None, "y"), P(None, "y"), P(None, None, "y"), P("y")),  # gate on one device, up on the other
    (P("y", "x"), P(("x", "y")), P(None, "x", "y"), P("x", "y")),
    (P(None, None, ("x", "y")), P(None, ("x", "y")), P("x", "y"), P(None, "x")),  # half of a tensor on each device
]):
    shardings = {name: NamedSharding(mesh, spec) for name, spec in zip(names, specs, strict=True)}
    path = Path(folder) / str(i)
    save_folder(path, {}, [Stored(jax.device_put(a, shardings[n]), *rest) for n, (a, *rest) in names.items()])
    file = load_file(path / "model.safetensors")
    np.testing.assert_array_equal(file["3.w3"], wi[3, :, 4:].T)
    np.testing.assert_array_equal(file["2.b1"], bias[2, :4])
    np.testing.assert_array_equal(file["packed"], wi.swapaxes(1, 2))

    class Counted:  # a tensor that knows how much was read of it
        read = 0
        def __init__(self, tensor):
            self.get_shape, self.tensor = tensor.get_shape, tensor
        def __getitem__(self, index):
            values = self.tensor[index]
            Counted.read += values.size
            return values

    tensors = {name: Counted(tensor) for name, tensor in open_tensors(path, str).items()}
    wanted = {
        n: Stored(jax.ShapeDtypeStruct(a.shape, jnp.bfloat16, sharding=shardings[n]), *rest)
        for n, (a, *rest) in names.items()
    }
    got = load_tensors(path, tensors, wanted)
    for name, (array, *_) in names.items():
        assert got[name].sharding == shardings[name] and got[name].dtype == jnp.bfloat16
        for shard in got[name].addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), array[shard.index].astype(jnp.bfloat16))
    assert Counted.read == sum(array.size for array, *_ in names.values()), Counted.read  # each number once

cut, whole = load_mixtral(folder + "/hf", mesh=mesh, rules={"expert": "y", "vocab": "x"}), load_mixtral(folder + "/hf")
assert {shard.data.shape for shard in cut.layers[0].block_sparse_moe.wi[...].addressable_shards} == {(2, 6, 10)}
for (path, a), (_, b) in zip(*(nnx.to_flat_state(nnx.state(m)) for m in (cut, whole)), strict=True):
    np.testing.assert_array_equal(np.asarray(a[...]), np.asarray(b[...]), err_msg=str(path))
print("sharded")
"""


def test_any_sharding(tmp_path):
    """Along experts, neurons, both or neither: each device gets its block, and the file is read once."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    env = os.environ | flags | {"JAX_PLATFORMS": "cpu"}
    save_hf(make(dataclasses.replace(CONFIG, experts=4, vocab_size=30)), tmp_path / "hf")
    script = f"folder = {str(tmp_path)!r}\n" + SHARDED
    done = subprocess.run([sys.executable, "-c", script], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "sharded", done.stderr
