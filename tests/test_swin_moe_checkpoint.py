"""Swin-MoE from the original's files, whose logits PyTorch computed (golden/make_swin_moe.py), and from its own."""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from torch_zips import write_tensors

from models.swin_moe import SwinMoE, SwinMoEConfig
from models.swin_moe_checkpoint import load_swin_moe, save_swin_moe
from sparsellm.mixture_of_experts import RouterOutput
from sparsellm.torch_zip import open_torch_zip

GOLDEN = Path(__file__).parent / "golden" / "swin_moe"
SPARSE = "layers.1.blocks.1.mlp._moe_layer."
NAMES = ("dense", "linear", "cosine")


def files_of(name: str) -> list[Path]:
    return sorted(GOLDEN.glob(f"{name}.pth.*"))


def tensors_of(file: Path) -> dict[str, np.ndarray]:
    return {name: tensor[...] for name, tensor in open_torch_zip(file)["model"].items()}


def merged(name: str) -> dict[str, np.ndarray]:
    """All of a model's tensors as one, experts put together by hand: 2 ranks an expert, or 2 experts a rank."""
    ranks = [tensors_of(file) for file in files_of(name) if ".rank" in file.name]
    whole = tensors_of(GOLDEN / f"{name}.pth.master")
    for key in ranks[0]:
        if len(ranks) == 8:
            pairs = zip(ranks[::2], ranks[1::2], strict=True)
            whole[key] = np.stack([np.concatenate([a[key][0], b[key][0]]) for a, b in pairs])
        else:
            whole[key] = np.stack([rank[key][expert] for rank in ranks for expert in (0, 1)])
    whole[SPARSE + "experts.batched_fc2_bias"] = np.zeros((4, 16), np.float32)
    return whole


def state_of(model: SwinMoE) -> dict:
    return {path: np.asarray(variable[...]) for path, variable in nnx.to_flat_state(nnx.state(model))}


def assert_same(model: SwinMoE, other: SwinMoE) -> None:
    assert state_of(model).keys() == state_of(other).keys()
    for path, values in state_of(model).items():
        np.testing.assert_array_equal(values, state_of(other)[path], err_msg=str(path))


def run(model: SwinMoE, golden) -> tuple[jax.Array, list[np.ndarray]]:
    """Logits, and how many tokens each expert took."""
    images = jnp.asarray(golden["images"].transpose(0, 2, 3, 1))
    captured_run = jax.jit(
        lambda model, images: nnx.capture(model, nnx.Intermediate)(images),
        compiler_options={"xla_backend_optimization_level": 0},  # most of the time here is the compiler's
    )
    with jax.default_matmul_precision("highest"):  # a GPU would take TF32
        logits, captured = captured_run(model, images)
    routers = jax.tree.leaves(captured, is_leaf=lambda leaf: isinstance(leaf, RouterOutput))
    return logits, [np.asarray(router.counts) for router in routers]


CASES = [
    ("dense", "", {}),
    ("linear", "", {}),
    ("linear", "dropless_", {"capacity_factor": None}),
    ("cosine", "", {}),
]


def check_golden(name: str, prefix: str, choices: dict, atol: float) -> None:
    golden = np.load(GOLDEN / f"{name}.npz")
    logits, counts = run(load_swin_moe(files_of(name), **choices), golden)
    np.testing.assert_allclose(logits, golden[f"{prefix}logits"], atol=atol, rtol=0)
    np.testing.assert_array_equal(counts, [golden[f"{prefix}counts"]] if name != "dense" else [])


@pytest.mark.parametrize(("name", "prefix", "choices"), CASES)
def test_logits(name, prefix, choices):
    check_golden(name, prefix, choices, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "prefix", "choices"), CASES)
def test_logits_on_a_gpu(name, prefix, choices):
    check_golden(name, prefix, choices, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_configuration_is_found(name):
    assert load_swin_moe(files_of(name)).config == SwinMoEConfig(
        image_size=16,
        patch_size=2,
        classes=7,
        embed_dim=8,
        depths=(2, 2),
        heads=(2, 4),
        window=4,
        experts=None if name == "dense" else 4,
        moe_stages=() if name == "dense" else (1,),
        router="cosine" if name == "cosine" else "linear",
    )


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_one_file_of_all_ranks_is_the_same(tmp_path, name):
    """Also without the word "model", and where it is the only one of a folder."""
    from_ranks, whole = load_swin_moe(files_of(name)), merged(name)
    assert_same(load_swin_moe(write_tensors(tmp_path / "x.pth.global", whole)), from_ranks)
    assert_same(load_swin_moe(tmp_path), from_ranks)


def test_files_that_repeat_what_is_shared(tmp_path):
    """As the original saves while it trains."""
    shared = tensors_of(GOLDEN / "cosine.pth.master")
    paths = []
    for rank in (0, 1):
        tensors = shared | tensors_of(GOLDEN / f"cosine.pth.rank{rank}")
        paths.append(write_tensors(tmp_path / f"x.pth.rank{rank}", tensors))
    assert_same(load_swin_moe(tmp_path), load_swin_moe(files_of("cosine")))
    write_tensors(paths[1], tensors | {"norm.bias": shared["norm.bias"] + 1})
    with pytest.raises(ValueError, match=r"norm.bias must be the same in every file of .*x\.pth; it differs"):
        load_swin_moe(tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_native_checkpoints(tmp_path, dtype):
    model = load_swin_moe(files_of("linear"), param_dtype=dtype, capacity_factor=None)
    save_swin_moe(model, tmp_path / "native")
    loaded = load_swin_moe(tmp_path / "native")
    assert loaded.config == model.config and loaded.config.dtype == loaded.config.param_dtype == dtype
    assert_same(loaded, model)
    again = load_swin_moe(tmp_path / "native", dtype="float32", capacity_factor=2.0)
    assert (again.config.param_dtype, again.config.capacity_factor) == ("float32", 2.0)
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    (tmp_path / "native" / "config.json").write_text(json.dumps(config | {"model_type": "opt"}))
    with pytest.raises(ValueError, match="is not of a Swin-MoE: its config.json says no model_type swin_moe"):
        load_swin_moe(tmp_path / "native")
    (tmp_path / "native" / "config.json").write_text(json.dumps(config | {"more": 1}))
    with pytest.raises(ValueError, match=r"must hold SwinMoEConfig's fields; differs in \['more'\]"):
        load_swin_moe(tmp_path / "native")


@pytest.fixture
def folder(tmp_path):
    """A copy of the files of eight ranks."""
    for file in files_of("linear"):
        shutil.copy(file, tmp_path)
    return tmp_path


@pytest.mark.parametrize("rank", [0, 3, 7])
def test_a_missing_rank_is_named(folder, rank):
    (folder / f"linear.pth.rank{rank}").unlink()
    with pytest.raises(FileNotFoundError, match=rf"rank {rank} of 8 is missing: .*linear\.pth\.rank{rank}$"):
        load_swin_moe(folder)


@pytest.mark.parametrize("tensor", ["batched_fc1_w", "batched_fc1_bias", "batched_fc2_w"])
def test_a_rank_that_lacks_a_tensor_is_named(folder, tensor):
    tensors = tensors_of(folder / "linear.pth.rank3")
    name = SPARSE + "experts." + tensor
    del tensors[name]
    write_tensors(folder / "linear.pth.rank3", tensors)
    with pytest.raises(ValueError, match=rf"linear\.pth\.rank3 lacks {re.escape(name)}, of which every rank must have"):
        load_swin_moe(folder)


def test_missing_and_superfluous_files(folder, tmp_path_factory):
    shutil.copy(folder / "linear.pth.rank0", folder / "linear.pth.rank8")
    with pytest.raises(ValueError, match="must be of 8 ranks, by the shape of .*; got 9"):
        load_swin_moe(folder)
    (folder / "linear.pth.rank8").unlink()
    shutil.copy(GOLDEN / "dense.pth.global", folder)
    with pytest.raises(ValueError, match=r"must be of one model; got .*dense\.pth, .*linear\.pth"):
        load_swin_moe(folder)
    (folder / "dense.pth.global").unlink()
    (folder / "linear.pth.master").unlink()
    with pytest.raises(FileNotFoundError, match=r"what all ranks share is missing: .*linear\.pth\.master"):
        load_swin_moe(folder)
    for path in (tmp_path_factory.mktemp("empty"), []):
        with pytest.raises(FileNotFoundError, match="no NAME.pth.rank0, NAME.pth.master or NAME.pth.global in"):
            load_swin_moe(path)
    with pytest.raises(FileNotFoundError, match="no file"):
        load_swin_moe(folder / "missing.pth.global")


def test_ranks_of_another_shape(folder):
    tensors = tensors_of(folder / "linear.pth.rank2")
    name = SPARSE + "experts.batched_fc1_w"
    write_tensors(folder / "linear.pth.rank2", tensors | {name: tensors[name][:, :5]})
    with pytest.raises(ValueError, match=f"{re.escape(name)} must have one shape in every file of"):
        load_swin_moe(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head.bias": np.zeros(8, np.float32)}, r"misshapen head.bias: expected \(7,\), found \(8,\)"),
        ({"absolute_pos_embed": np.zeros(3, np.float32)}, r"extra absolute_pos_embed \(3,\)"),
        ({"layers.0.blocks.0.attn.qkv.bias": None}, r"missing layers.0.blocks.0.attn.qkv.bias \(24,\)"),
        ({"layers.0.blocks.0.mlp.fc2.bias": np.zeros(8, np.float32)}, r"extra layers.0.blocks.0.mlp.fc2.bias \(8,\)"),
        ({"patch_embed.proj.weight": None}, "what all ranks share is missing"),
        ({"head.weight": None}, "must be of a Swin-MoE, with its buffers; it lacks 'head.weight'"),
        ({"layers.0.blocks.0.attn.relative_coords_table": None}, "it lacks 'layers.0.blocks.0.attn.relative_coords"),
        (
            {"layers.1.blocks.0.attn.relative_coords_table": np.zeros((1, 7, 7, 2), np.float32)},
            "must be that of windows of 4 tokens, trained at that size; it differs",
        ),
        ({SPARSE + "experts.batched_fc2_bias": np.ones((4, 16), np.float32)}, "fc2_bias of .* must be zero"),
        ({SPARSE + "experts.batched_fc2_w": None}, "fc2_w must have one shape in every file of .*; got none"),
    ],
)
def test_another_model(tmp_path, change, message):
    tensors = {name: values for name, values in (merged("linear") | change).items() if values is not None}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_swin_moe(write_tensors(tmp_path / "x.pth.global", tensors))


def test_files_of_something_else(tmp_path):
    with pytest.raises(ValueError, match="must hold tensors by name, maybe under 'model'"):
        load_swin_moe(GOLDEN / "types.pt")
    (tmp_path / "x.pth.global").write_bytes(b"PK")
    with pytest.raises(ValueError, match="must be a zip file"):
        load_swin_moe(tmp_path)
