"""Switch Transformers to and from folders: models/switch_checkpoint.py."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from models import save_hf
from models.switch_checkpoint import ARCHITECTURE, load_switch, save_switch
from sparsellm.checkpoint import save_checkpoint

GOLDEN = Path(__file__).parent / "golden"
EXPERT = "encoder.block.1.layer.1.mlp.experts.expert_3.wi.weight"
EMBEDDING, HEAD = "shared.weight", "lm_head.weight"
EMBEDDING_COPIES = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}


def assert_same_parameters(a, b):
    for (path, x), (_, y) in zip(*(nnx.to_flat_state(nnx.state(m)) for m in (a, b)), strict=True):
        assert x[...].dtype == y[...].dtype, path
        np.testing.assert_array_equal(x[...], y[...], err_msg=str(path))


@pytest.fixture
def hf(tmp_path):
    """A Hugging Face folder, one file."""
    shutil.copytree(GOLDEN / "switch", tmp_path / "hf")
    return tmp_path / "hf"


def edit(folder: Path, change) -> None:
    """Rewrites a folder's tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))


@pytest.mark.parametrize("name", ["switch", "switch_untied"])
def test_round_trips(name, tmp_path):
    """Saved in both formats (one file, shards, Orbax) and loaded again, every bit and every choice is the same."""
    model = load_switch(GOLDEN / name, capacity="per_sequence")
    save_hf(model, tmp_path / "one")
    save_hf(model, tmp_path / "shards", max_shard_bytes=20_000)
    save_switch(model, tmp_path / "native")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    for folder, capacity in (("one", "per_sequence"), ("shards", "per_sequence"), ("native", None)):
        again = load_switch(tmp_path / folder, capacity=capacity)
        assert again.config == model.config
        assert_same_parameters(again, model)
    original = {k: v for path in (GOLDEN / name).glob("*.safetensors") for k, v in load_file(path).items()}
    saved = load_file(tmp_path / "one" / "model.safetensors")
    assert saved.keys() | EMBEDDING_COPIES == original.keys() | EMBEDDING_COPIES
    for key, value in saved.items():
        np.testing.assert_array_equal(value, original[key], err_msg=key)


def test_experts_lie_side_by_side(hf):
    mlp: Any = load_switch(hf).encoder.block[1].mlp
    file = load_file(hf / "model.safetensors")
    assert mlp.wi.shape == (4, 20, 28) and mlp.wo.shape == (4, 28, 20)
    for e in range(4):
        name = f"encoder.block.1.layer.1.mlp.experts.expert_{e}"
        np.testing.assert_array_equal(mlp.wi[...][e], file[f"{name}.wi.weight"].T)
        np.testing.assert_array_equal(mlp.wo[...][e], file[f"{name}.wo.weight"].T)


def test_every_wrong_tensor_is_named(hf):
    def damage(tensors):
        tensors["encoder.block.1.layer.1.mlp.experts.expert_4.wi.weight"] = tensors.pop(EXPERT)
        tensors["decoder.block.0.layer.2.mlp.wo.weight"] = np.zeros((20, 29), np.float32)

    edit(hf, damage)
    with pytest.raises(ValueError) as error:
        load_switch(hf)
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        f"missing {EXPERT} (28, 20)",
        "extra encoder.block.1.layer.1.mlp.experts.expert_4.wi.weight (28, 20)",
        "misshapen decoder.block.0.layer.2.mlp.wo.weight: expected (20, 28), found (20, 29)",
    ]


def test_copies_of_the_embedding(hf):
    """Files may hold it under any of its names, or several."""
    model = load_switch(hf)
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", HEAD)
    edit(hf, lambda t: t.update({name: t[EMBEDDING].copy() for name in copies}))
    assert_same_parameters(load_switch(hf), model)
    edit(hf, lambda t: [t.pop(name) for name in (EMBEDDING, *copies[1:])])
    assert_same_parameters(load_switch(hf), model)
    edit(hf, lambda t: t.update({HEAD: t[copies[0]] + 1}))
    with pytest.raises(ValueError, match=r"lm_head.weight in .* must equal encoder.embed_tokens.weight"):
        load_switch(hf)
    edit(hf, lambda t: [t.pop(name) for name in (copies[0], HEAD)])
    with pytest.raises(ValueError, match=r"missing shared.weight \(61, 20\)"):
        load_switch(hf)


def test_bfloat16(hf):
    model = load_switch(hf, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("bfloat16")}
    golden = np.load(hf / "golden.npz")
    mask = golden["mask"]
    encoded = jax.jit(lambda model, *args: model.encode(args[0], mask=args[1]))(model, golden["tokens"], mask)
    error = (encoded.astype(jnp.float32) - golden["encoded"])[mask]
    # A rounded logit may send a token to another expert: most of the output stays near.
    assert np.median(np.abs(error)) < 0.05 * np.sqrt(np.mean(np.square(golden["encoded"])))


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"encoder_sparse_step": "absent", "decoder_sparse_step": "absent"}, (2, 2)),
        ({"encoder_sparse_step": "absent", "num_sparse_encoder_layers": 2, "decoder_sparse_step": 0}, (1, 0)),
        ({"encoder_sparse_step": "absent", "num_sparse_encoder_layers": 0}, (2, 2)),
    ],
)
def test_which_layers_are_sparse(hf, changes, steps):
    """Files say it in one of two ways."""
    configure(hf, **changes)
    fields = ARCHITECTURE.read_config(json.loads((hf / "config.json").read_text()))
    assert (fields["encoder_sparse_step"], fields["decoder_sparse_step"]) == steps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["T5ForConditionalGeneration"]}, "must be of architecture SwitchTransformers.*; got T5"),
        ({"dense_act_fn": "gelu_new"}, "dense_act_fn must be relu"),
        ({"router_bias": True}, "router_bias must be False"),
        ({"num_experts": "absent", "d_ff": "absent"}, "must say d_ff, num_experts"),
        ({"num_experts": 5}, "missing .*expert_4.wi.weight"),
        ({"encoder_sparse_step": 1}, "missing encoder.block.0.layer.1.mlp.experts.expert_0.wi.weight"),
        ({"tie_word_embeddings": False}, "missing lm_head.weight"),
        ({"vocab_size": 67}, r"misshapen shared.weight: expected \(67, 20\), found \(61, 20\)"),
        ({"dtype": "float16"}, "dtype must be one of bfloat16, float32; got 'float16'"),
    ],
)
def test_another_model(hf, changes, message):
    configure(hf, **changes)
    with pytest.raises(ValueError, match=message):
        load_switch(hf)


def test_a_native_checkpoint_of_something_else(tmp_path):
    save_checkpoint(tmp_path / "a", {"model_type": "opt"}, {"w": jnp.ones(3)})
    with pytest.raises(ValueError, match="not of a SwitchTransformer"):
        load_switch(tmp_path / "a")
