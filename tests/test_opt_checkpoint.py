"""OPT to and from folders: sparsellm/huggingface.py and models/opt_checkpoint.py."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from host_memory import traced_reads
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch_zips import write_state_dict

from models import OPT, OPTConfig, load_opt, save_hf, save_opt
from sparsellm import huggingface
from sparsellm.checkpoint import load_config, save_checkpoint
from sparsellm.predictors import with_input_thresholds

CONFIG = OPTConfig(vocab_size=61, layers=1, d_model=10, heads=2, d_ff=17, max_length=13)


def make(config: OPTConfig) -> OPT:
    rng = np.random.default_rng(0)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: OPT(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), state))


def assert_same_parameters(a: OPT, b: OPT):
    for (path, x), (_, y) in zip(*(nnx.to_flat_state(nnx.state(m)) for m in (a, b)), strict=True):
        assert x[...].dtype == y[...].dtype, path
        np.testing.assert_array_equal(x[...], y[...], err_msg=str(path))


@pytest.fixture
def hf(tmp_path):
    """A Hugging Face folder, one file."""
    save_hf(make(CONFIG), tmp_path / "hf")
    return tmp_path / "hf"


def edit(folder: Path, change, file="model.safetensors") -> None:
    """Rewrites a folder's tensors."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def test_native_model_comes_back_sparse_and_in_bfloat16(tmp_path):
    model = make(CONFIG)
    save_opt(model, tmp_path / "a")
    assert_same_parameters(load_opt(tmp_path / "a"), model)
    loaded = load_opt(tmp_path / "a", dtype="bfloat16", sparse_rows=8)
    assert loaded.config.sparse_rows == 8 and loaded.config.param_dtype == loaded.config.dtype == "bfloat16"
    fc1 = model.layers[0].fc1.kernel[...].astype(jnp.bfloat16)
    np.testing.assert_array_equal(loaded.layers[0].fc1.kernel[...], fc1)


def test_dropout_is_kept_in_both_formats(tmp_path):
    """As transformers calls it, whose OPT drops the same outputs; a config.json that says nothing of it drops none."""
    model = make(dataclasses.replace(CONFIG, dropout=0.1))
    save_opt(model, tmp_path / "native")
    save_hf(model, tmp_path / "hf")
    assert load_opt(tmp_path / "native").config.dropout == load_opt(tmp_path / "hf").config.dropout == 0.1
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert [config.pop(name) for name in ("dropout", "attention_dropout", "layerdrop")] == [0.1, 0, 0]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    assert load_opt(tmp_path / "hf").config.dropout == 0


def test_a_checkpoint_of_something_else(tmp_path):
    save_checkpoint(tmp_path / "a", {"model_type": "resnet"}, {"w": jnp.ones(3)})
    with pytest.raises(ValueError, match="not of an OPT"):
        load_opt(tmp_path / "a")


@pytest.mark.parametrize("prefix", ["", "decoder.", "model.decoder."])
def test_any_of_the_hub_s_prefixes(hf, prefix):
    def rename(tensors):
        for name in list(tensors):
            tensors[prefix + name.removeprefix("model.decoder.")] = tensors.pop(name)

    edit(hf, rename)
    assert_same_parameters(load_opt(hf), make(CONFIG))


def test_an_output_projection_must_be_the_embedding(hf):
    edit(hf, lambda t: t.update({"lm_head.weight": t["model.decoder.embed_tokens.weight"].copy()}))
    assert_same_parameters(load_opt(hf), make(CONFIG))
    edit(hf, lambda t: t["lm_head.weight"].__setitem__((3, 4), 7.5))
    with pytest.raises(ValueError, match="lm_head.weight in .* must equal embed_tokens.weight"):
        load_opt(hf)


def test_every_wrong_tensor_is_named(hf):
    def damage(tensors):
        prefix = "model.decoder.layers.0."
        del tensors[prefix + "fc1.bias"]
        tensors[prefix + "fc3.bias"] = np.zeros(3, np.float32)
        tensors[prefix + "fc2.weight"] = np.zeros((10, 18), np.float32)

    edit(hf, damage)
    with pytest.raises(ValueError) as error:
        load_opt(hf)
    lines = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert lines == [
        "missing layers.0.fc1.bias (17,)",
        "extra layers.0.fc3.bias (3,)",
        "misshapen layers.0.fc2.weight: expected (10, 17), found (10, 18)",
    ]


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float32])
def test_any_dtype_in_the_file(hf, dtype):
    def cast(tensors):
        for name in tensors:
            tensors[name] = tensors[name].astype(dtype)

    edit(hf, cast)
    loaded = load_opt(hf, param_dtype="float32").layers[0].fc1.kernel[...]
    expected = make(CONFIG).layers[0].fc1.kernel[...].astype(dtype).astype(jnp.float32)
    np.testing.assert_array_equal(loaded, expected)


def test_a_dtype_that_is_no_parameter_s(hf):
    edit(hf, lambda t: t.update({"model.decoder.layers.0.fc1.bias": np.zeros(17, np.int8)}))
    with pytest.raises(ValueError, match=r"dtype of a tensor must be one of .*fc1.bias in .* is I8"):
        load_opt(hf)


def test_dtypes_that_do_not_exist(hf):
    with pytest.raises(ValueError, match="dtype must be one of .*; got 'float13'"):
        load_opt(hf, dtype="float13")
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"torch_dtype": "int4"}))
    with pytest.raises(ValueError, match="dtype must be one of .*; got 'int4'"):
        load_opt(hf)
    assert load_opt(hf, dtype="bfloat16").config.param_dtype == "bfloat16"


@pytest.mark.parametrize("keep", [0, 7, 100, 3000])
def test_a_truncated_file(hf, keep):
    os.truncate(hf / "model.safetensors", keep)
    with pytest.raises(ValueError, match="model.safetensors is truncated or damaged"):
        load_opt(hf)


def test_a_missing_shard(tmp_path):
    save_hf(make(CONFIG), tmp_path / "hf", max_shard_bytes=2000)
    shard = next((tmp_path / "hf").glob("*-of-*.safetensors"))
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"names {shard.name}, which is missing"):
        load_opt(tmp_path / "hf")


def test_shards_without_an_index(tmp_path):
    save_hf(make(CONFIG), tmp_path / "hf", max_shard_bytes=2000)
    (tmp_path / "hf" / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="but no model.safetensors.index.json"):
        load_opt(tmp_path / "hf")


def as_torch_files(hf, shards, dtype=np.float32, prefix="model."):
    """The folder's tensors as torch saves them, as most of the hub's OPTs are."""
    tensors = {
        prefix + name.removeprefix("model."): values.astype(dtype)
        for name, values in load_file(hf / "model.safetensors").items()
    }
    (hf / "model.safetensors").unlink()
    if shards == 1:
        write_state_dict(hf / "pytorch_model.bin", tensors)
        return
    files = [f"pytorch_model-{i + 1:05}-of-{shards:05}.bin" for i in range(shards)]
    for i, file in enumerate(files):
        write_state_dict(hf / file, dict(list(tensors.items())[i::shards]))
    weight_map = {name: files[i % shards] for i, name in enumerate(tensors)}
    (hf / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(("dtype", "prefix"), [(np.float32, "model."), (np.float16, ""), (jnp.bfloat16, "model.")])
def test_torch_s_own_files_without_a_pickle_run(hf, shards, dtype, prefix):
    expected = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), nnx.state(make(CONFIG)))
    as_torch_files(hf, shards, dtype, prefix)
    found = nnx.state(load_opt(hf, param_dtype="float32"))
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(found), nnx.to_pure_dict(expected))


def test_torch_s_own_files_for_a_mesh(hf):
    as_torch_files(hf, 2)
    mesh = jax.make_mesh((1,), ("model",), (jax.sharding.AxisType.Auto,))
    assert_same_parameters(load_opt(hf, mesh=mesh), make(CONFIG))


def test_safetensors_are_preferred(hf):
    (hf / "pytorch_model.bin").write_bytes(b"never opened")
    assert_same_parameters(load_opt(hf), make(CONFIG))


def test_damaged_torch_files_are_refused(hf):
    as_torch_files(hf, 2)
    shard = hf / "pytorch_model-00002-of-00002.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="00002-of-00002.bin must be a zip file as torch.save writes it; it is trunc"):
        load_opt(hf)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"names {shard.name}, which is missing"):
        load_opt(hf)
    (hf / "pytorch_model.bin.index.json").write_text('{"weight_map": {"x": "../pytorch_model.bin"}}')
    with pytest.raises(ValueError, match="a shard must be a .bin file beside pytorch_model.bin.index.json"):
        load_opt(hf)


@pytest.mark.parametrize("name", ["pytorch_model-00001-of-00002.bin", "opt.pt"])
def test_pickles_are_refused(hf, name):
    (hf / "model.safetensors").rename(hf / name)
    with pytest.raises(ValueError, match=rf"no pytorch_model.bin but {name}.*any code.*save_pretrained"):
        load_opt(hf)


def test_a_folder_without_weights(hf):
    (hf / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="holds no .*safetensors"):
        load_opt(hf)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "must be of architecture OPTForCausalLM; got LlamaForCausalLM"),
        ({"architectures": None, "model_type": "llama"}, "must be of architecture OPTForCausalLM; got llama"),
        ({"enable_bias": False}, "enable_bias must be True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings must be True"),
        ({"activation_function": "tanh"}, "activation must be one of"),
        ({"num_hidden_layers": 2}, "missing layers.1.self_attn.q_proj.weight"),
        ({"vocab_size": 67}, r"misshapen embed_tokens.weight: expected \(67, 10\), found \(61, 10\)"),
    ],
)
def test_another_model(hf, changes, message):
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        load_opt(hf)


def test_a_config_without_sizes(hf):
    (hf / "config.json").write_text('{"architectures": ["OPTForCausalLM"], "hidden_size": 10}')
    with pytest.raises(ValueError, match="must say num_hidden_layers, num_attention_heads, ffn_dim"):
        load_opt(hf)


def test_a_file_or_nothing_instead_of_a_folder(hf, tmp_path):
    with pytest.raises(ValueError, match="not a file; got .*model.safetensors"):
        load_opt(hf / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        load_opt(tmp_path / "nowhere")


def test_what_the_hub_is_asked_for(hf, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked: list[tuple] = []

    def snapshot_download(name, *, revision, allow_patterns):
        asked.append((name, revision, *allow_patterns))
        return str(hf)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert_same_parameters(load_opt("facebook/opt-125m", revision="refs/pr/3"), make(CONFIG))
    assert_same_parameters(load_opt("facebook/opt-125m@refs/pr/3"), make(CONFIG))
    safetensors = ("facebook/opt-125m", "refs/pr/3", "*.safetensors", "*.json", "*.txt")
    assert asked == [safetensors, safetensors]
    with pytest.raises(ValueError, match="give one revision; got facebook/opt-125m@main and refs/pr/3"):
        load_opt("facebook/opt-125m@main", revision="refs/pr/3")

    as_torch_files(hf, 1)
    assert_same_parameters(load_opt("facebook/opt-125m"), make(CONFIG))
    assert asked[2:] == [
        ("facebook/opt-125m", None, "*.safetensors", "*.json", "*.txt"),
        ("facebook/opt-125m", None, "pytorch_model*.bin", "*.json", "*.txt"),
    ]

    def no_network(name, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("check your connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    with pytest.raises(FileNotFoundError, match="hub gave no facebook/opt-125m: check your connection"):
        load_opt("facebook/opt-125m")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match="no folder facebook/opt-125m here; .* pip install huggingface-hub"):
        load_opt("facebook/opt-125m")


@pytest.mark.parametrize("max_shard_bytes", [10**9, 3 * 10**6])
def test_the_host_holds_one_tensor_at_a_time(tmp_path, monkeypatch, max_shard_bytes):
    config = OPTConfig(vocab_size=499, layers=4, d_model=128, heads=2, d_ff=5003, max_length=13)
    save_hf(make(config), tmp_path / "hf", max_shard_bytes=max_shard_bytes)
    load_opt(tmp_path / "hf", dtype="bfloat16")  # compiles
    with traced_reads(monkeypatch) as peak:
        model = load_opt(tmp_path / "hf", dtype="bfloat16")
    total, largest = 4 * sum(x.size for x in jax.tree.leaves(nnx.state(model))), 4 * 5003 * 128
    assert total > 8 * largest
    assert largest < peak[0] < 2.5 * largest  # one, and the bytes of the file that it is made from


def test_a_config_of_numpys_numbers_is_saved(tmp_path, unchecked):
    numbers = {"dropout": np.float32(0.25), "init_std": jnp.float32(0.5), "pre_norm": np.bool_(True)}
    numbers |= {"layers": np.int64(1), "sparse_rows": np.array([8]), "thresholds": np.array([0.5])}
    config = dataclasses.replace(CONFIG, **numbers)
    assert config == dataclasses.replace(CONFIG, dropout=0.25, init_std=0.5, sparse_rows=(8,), thresholds=(0.5,))
    save_opt(make(config), tmp_path / "a")
    assert load_opt(tmp_path / "a", sparse_rows=config.sparse_rows).config == config


@pytest.mark.parametrize("save", [save_opt, save_hf])
def test_a_model_that_could_not_be_loaded_is_not_saved(save, tmp_path):
    wrapped = with_input_thresholds(make(CONFIG), np.arange(12).reshape(2, 6), 0.5, select="fc2")
    with pytest.raises(ValueError, match=r"differs in layers.0.fc2.bias, layers.0.fc2.kernel, layers.0.fc2.linear.b"):
        save(wrapped, tmp_path / "a")
    assert not os.listdir(tmp_path)


def test_saved_folder(tmp_path):
    """Shards as full as they may be, an index that fits them, tokenizer files, and OPT's entries in config.json."""
    (tmp_path / "tokenizer").mkdir()
    for name in ("vocab.json", "merges.txt", "notes.txt"):
        (tmp_path / "tokenizer" / name).write_text(name)
    model = make(CONFIG)
    save_hf(model, tmp_path / "hf", tokenizer_folder=tmp_path / "tokenizer", max_shard_bytes=2500)
    assert (tmp_path / "hf" / "merges.txt").read_text() == "merges.txt" and not (tmp_path / "hf" / "notes.txt").exists()
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = {path.name: load_file(path) for path in (tmp_path / "hf").glob("*.safetensors")}
    assert index["weight_map"] == {name: file for file, tensors in files.items() for name in tensors}
    sizes = {file: sum(t.nbytes for t in tensors.values()) for file, tensors in files.items()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert all(size <= 2500 for size in sizes.values()) and len(files) < 2 + sum(sizes.values()) / 1250
    weight = files[index["weight_map"]["model.decoder.layers.0.fc1.weight"]]["model.decoder.layers.0.fc1.weight"]
    np.testing.assert_array_equal(weight, np.asarray(model.layers[0].fc1.kernel[...]).T)
    config = load_config(tmp_path / "hf")
    expected = {"model_type": "opt", "hidden_size": 10, "word_embed_proj_dim": 10, "ffn_dim": 17, "vocab_size": 61}
    assert expected.items() <= config.items()


def test_saving_with_wrong_arguments(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer files"):
        save_hf(make(CONFIG), tmp_path / "hf", tokenizer_folder=tmp_path)
    with pytest.raises(ValueError, match="max_shard_bytes must be at least 1; got 0"):
        save_hf(make(CONFIG), tmp_path / "hf", max_shard_bytes=0)
    assert not os.listdir(tmp_path)


def test_a_full_disk_leaves_no_half_model(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(huggingface, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        save_hf(make(CONFIG), tmp_path / "a")
    assert not os.listdir(tmp_path)
