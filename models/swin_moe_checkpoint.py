"""Swin-MoE from and to disk: the original's zip files, one a rank, and this project's own Orbax checkpoints.

The original trains one expert, or a slice of one, on each GPU. It saves what each rank has for itself as
`NAME.pth.rank0`, `NAME.pth.rank1`, ..., and what all share as `NAME.pth.master` (while it trains, once more in each
rank's file; or all together as `NAME.pth.global`). The pieces of an expert parameter, rank by rank, lie one after the
other along its first axes. Sources: microsoft/Swin-Transformer, `utils_moe.py`; Tutel, `checkpoint/gather.py`.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from models.checkpoint import dotted
from models.swin_moe import SwinMoE, SwinMoEConfig, relative_coordinates
from sparsellm.checkpoint import check_tensors, is_checkpoint, load_checkpoint, load_config, save_checkpoint
from sparsellm.sharding import abstract_model
from sparsellm.torch_zip import TorchTensor, open_state_dict

MODEL_TYPE = "swin_moe"
_PART = re.compile(r"\.(rank\d+|master|global)$")
# our name -> the original's, one replacement after the other
RENAMED = (
    ("cpb_mlp.layers.", "cpb_mlp."),
    ("mlp.router.kernel", "mlp._moe_layer.gates.0.wg.weight"),
    ("mlp.router.", "mlp._moe_layer.gates.0."),
    ("mlp.wi_bias", "mlp._moe_layer.experts.batched_fc1_bias"),
    ("mlp.wi", "mlp._moe_layer.experts.batched_fc1_w"),
    ("mlp.wo", "mlp._moe_layer.experts.batched_fc2_w"),
    (".kernel", ".weight"),
    (".scale", ".weight"),
)
EXPERTS = "._moe_layer.experts."
OUTPUT_BIAS = "._moe_layer.experts.batched_fc2_bias"  # Tutel has one always; here it is zero and never trained
TABLE = "attn.relative_coords_table"
PATCHES, LINEAR_GATE, COSINE_GATE = "patch_embed.proj.weight", "gates.0.wg.weight", "gates.0.sim_matrix"
BUFFERS = (TABLE, "attn.relative_position_index", "attn_mask", "_moe_layer._num_global_experts")

type State = Mapping[str, TorchTensor]
type Wanted = Mapping[str, jax.ShapeDtypeStruct]


class _Files(NamedTuple):
    """The original's files, open.

    Attributes:
        stem: their common name, before ".rank0" and ".master".
        shared: the tensors that all ranks share.
        ranks: the tensors of each rank's file, by rank; one file that holds everything is rank 0's.
    """

    stem: str
    shared: State
    ranks: Mapping[int, State]


def load_swin_moe(
    path: str | Path | Iterable[str | Path],
    *,
    dtype: str | None = None,
    param_dtype: str | None = None,
    **overrides: Any,
) -> SwinMoE:
    """Loads a Swin-MoE onto the default device, one parameter at a time. No pickle is run (see `sparsellm.torch_zip`).

    Example:
        model = load_swin_moe("swin_moe_small_patch4_window12_192_32expert_32gpu_22k", capacity_factor=None)
        save_swin_moe(model, "swin_moe_small_32")  # 32 ranks' files as one checkpoint

    Args:
        path: the folder that a published zip unpacks to, its files one by one, one file that holds everything, or a
            checkpoint by `save_swin_moe`.
        dtype: what to compute in; None for `param_dtype`.
        param_dtype: what to keep parameters in; None for `dtype` or, without that either, what the checkpoint says.
        overrides: fields of `SwinMoEConfig` to replace. The original's files say all but `top_k` and `capacity_factor`,
            which are 1 and 1.25 as published; capacity_factor=None drops no token.

    Raises:
        FileNotFoundError: there is no such folder or file, or the file of a rank is missing.
        ValueError: damaged files, pickles of more than tensors, another model, or tensors that do not fit (all named).
    """
    if isinstance(path, str | Path) and is_checkpoint(path):
        folder = Path(path)
        config = _config(_native_fields(folder), dtype, param_dtype, overrides)
        return _build(config, lambda wanted: load_checkpoint(folder, wanted))
    files = _open(path)
    config = _config(_infer_fields(files), dtype, param_dtype, overrides)
    return _build(config, lambda wanted: _read(files, config, wanted))


def _config(fields: dict[str, Any], dtype: str | None, param_dtype: str | None, overrides: Any) -> SwinMoEConfig:
    kept = param_dtype or dtype or fields["param_dtype"]
    return SwinMoEConfig(**{**fields, **overrides, "dtype": dtype or kept, "param_dtype": kept})


def _build(config: SwinMoEConfig, read: Callable[[Wanted], Mapping[str, jax.Array]]) -> SwinMoE:
    """The model with the arrays that `read` returns."""
    graphdef, abstract = abstract_model(lambda: SwinMoE(config, rngs=nnx.Rngs(0)))
    parameters = nnx.to_flat_state(abstract)
    arrays = read({dotted(path): variable.get_value() for path, variable in parameters})
    state = nnx.from_flat_state([(path, variable.replace(arrays[dotted(path)])) for path, variable in parameters])
    return nnx.merge(graphdef, state)


def save_swin_moe(model: SwinMoE, folder: str | Path, *, overwrite: bool = False) -> None:
    """Writes a native checkpoint (Orbax), which `load_swin_moe` reads; arguments and errors of `save_checkpoint`."""
    config = {"model_type": MODEL_TYPE, **dataclasses.asdict(model.config)}
    state = {dotted(path): variable[...] for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    save_checkpoint(folder, config, state, overwrite=overwrite)


def _native_fields(folder: Path) -> dict[str, Any]:
    """`SwinMoEConfig`'s fields out of a checkpoint by `save_swin_moe`."""
    fields = load_config(folder)
    if fields.pop("model_type", None) != MODEL_TYPE:
        raise ValueError(
            f"the checkpoint {folder} is not of a Swin-MoE: its config.json says no model_type {MODEL_TYPE}"
        )
    names = {field.name for field in dataclasses.fields(SwinMoEConfig)}
    if fields.keys() != names:
        differs = sorted(fields.keys() ^ names)
        raise ValueError(f"config.json of {folder} must hold SwinMoEConfig's fields; differs in {differs}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def _open(path: str | Path | Iterable[str | Path]) -> _Files:
    """Opens the files of one model.

    Raises:
        FileNotFoundError: there are none, or the master's is missing.
        ValueError: they are of several models.
    """
    paths = [Path(path)] if isinstance(path, str | Path) else list(map(Path, path))
    if len(paths) == 1 and paths[0].is_dir():
        paths = [file for file in sorted(paths[0].iterdir()) if _PART.search(file.name)]
    if not paths:
        raise FileNotFoundError(f"no NAME.pth.rank0, NAME.pth.master or NAME.pth.global in {path}")
    stems = sorted({_PART.sub("", str(file)) for file in paths})
    if len(stems) > 1:
        raise ValueError(f"the files must be of one model; got {', '.join(stems)}")
    states = {(part[1] if (part := _PART.search(file.name)) else "global"): open_state_dict(file) for file in paths}
    ranks = {int(part[4:]): state for part, state in sorted(states.items()) if part.startswith("rank")}
    shared = states.get("global") or states.get("master") or next(iter(ranks.values()))
    if PATCHES not in shared:
        raise FileNotFoundError(f"what all ranks share is missing: {stems[0]}.master (it holds {PATCHES})")
    return _Files(stems[0], shared, {rank: ranks[rank] for rank in sorted(ranks)} or {0: shared})


def _infer_fields(files: _Files) -> dict[str, Any]:
    """`SwinMoEConfig`'s fields out of names and shapes: the original's files hold no configuration."""
    shapes = {name: tensor.shape for name, tensor in files.shared.items()}
    found = [re.fullmatch(r"layers\.(\d+)\.blocks\.(\d+)\.norm1\.weight", name) for name in shapes]
    blocks = [(int(match[1]), int(match[2])) for match in found if match]
    gates = {name: shape for name, shape in shapes.items() if name.endswith((LINEAR_GATE, COSINE_GATE))}
    try:
        embed_dim, channels, patch_size, _ = shapes[PATCHES]
        window = (shapes["layers.0.blocks.0." + TABLE][1] + 1) // 2
        windows = math.isqrt(shapes.get("layers.0.blocks.1.attn_mask", (1,))[0])
        stages = range(1 + max(stage for stage, _ in blocks))
        return {
            "image_size": windows * window * patch_size,
            "patch_size": patch_size,
            "channels": channels,
            "classes": shapes["head.weight"][0],
            "embed_dim": embed_dim,
            "depths": tuple(sum(stage == of for of, _ in blocks) for stage in stages),
            "heads": tuple(shapes[f"layers.{stage}.blocks.0.attn.cpb_mlp.2.weight"][0] for stage in stages),
            "window": window,
            "mlp_ratio": shapes["layers.0.blocks.0.mlp.fc1.weight"][0] // embed_dim,
            "experts": next((shape[name.endswith(COSINE_GATE)] for name, shape in gates.items()), None),
            "moe_stages": tuple(sorted({int(name.split(".")[1]) for name in gates})),
            "router": "cosine" if any(name.endswith(COSINE_GATE) for name in gates) else "linear",
            "param_dtype": str(files.shared[PATCHES].dtype),
        }
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"{files.stem} must be of a Swin-MoE, with its buffers; it lacks {error}") from error


def _read(files: _Files, config: SwinMoEConfig, wanted: Wanted) -> dict[str, jax.Array]:
    """Reads every parameter, after all shapes were compared."""
    names = {name: _original_name(name) for name in wanted}
    axes = {name: _axes(name, len(target.shape)) for name, target in wanted.items()}
    expected = {names[name]: _original_shape(target.shape, axes[name]) for name, target in wanted.items()}
    found = {name: t.shape for name, t in files.shared.items() if EXPERTS not in name and not name.endswith(BUFFERS)}
    found |= {name: _merged_shape(files, name, shape) for name, shape in expected.items() if EXPERTS in name}
    check_tensors(files.stem, expected=expected, found=found)
    _check_values(files, config)

    def read(name: str) -> jax.Array:
        values = _merge(files, names[name], expected[names[name]]).transpose(axes[name])
        return jax.device_put(values.astype(wanted[name].dtype), wanted[name].sharding)

    return {name: read(name) for name in wanted}


def _merged_shape(files: _Files, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of an expert parameter, put together from all ranks.

    Raises:
        FileNotFoundError: a rank is missing.
        ValueError: a rank lacks its piece, the pieces differ in shape, or there are too many.
    """
    pieces = {rank: state[name].shape for rank, state in files.ranks.items() if name in state}
    shapes = sorted(set(pieces.values()))
    if len(shapes) != 1:
        raise ValueError(f"{name} must have one shape in every file of {files.stem}; got {shapes or 'none'}")
    count = max(math.prod(shape) // max(math.prod(shapes[0]), 1), 1)
    for rank in range(count):
        if rank not in files.ranks:
            raise FileNotFoundError(f"rank {rank} of {count} is missing: {files.stem}.rank{rank}")
        if rank not in pieces:
            raise ValueError(f"{files.stem}.rank{rank} lacks {name}, of which every rank must have a piece")
    if len(pieces) > count:
        raise ValueError(f"{files.stem} must be of {count} ranks, by the shape of {name}; got {len(pieces)}")
    local, hidden, *rest = shapes[0]
    return (shape[0], count * local * hidden // shape[0], *rest)


def _merge(files: _Files, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of the original: every rank's experts or slices of them in the order of ranks, or what all share."""
    if EXPERTS not in name:
        return files.shared[name][...]
    return np.concatenate([state[name][...] for state in files.ranks.values()]).reshape(shape)


def _check_values(files: _Files, config: SwinMoEConfig) -> None:
    """Raises ValueError where values say that it is another model, or that ranks do not belong together."""
    for state in (files.shared, *files.ranks.values()):
        for name, tensor in state.items():
            if name.endswith(OUTPUT_BIAS) and tensor[...].any():
                raise ValueError(f"{name} of {files.stem} must be zero, as in every published Swin-MoE; it is not")
            if EXPERTS in name or name.endswith(BUFFERS) or state is files.shared or name not in files.shared:
                continue
            if not np.array_equal(tensor[...], files.shared[name][...]):
                raise ValueError(f"{name} must be the same in every file of {files.stem}; it differs")
    for stage in range(len(config.depths)):
        name = f"layers.{stage}.blocks.0.{TABLE}"
        table, ours = files.shared[name][...].reshape(-1, 2), relative_coordinates(config.stage_window(stage))
        if table.shape != ours.shape or not np.allclose(table, ours, atol=1e-5):
            rule = f"must be that of windows of {config.stage_window(stage)} tokens, trained at that size"
            raise ValueError(f"{name} of {files.stem} {rule}; it differs (another pretrained_window_size?)")


def _original_name(name: str) -> str:
    for ours, theirs in RENAMED:
        name = name.replace(ours, theirs)
    return name


def _axes(name: str, dimensions: int) -> tuple[int, ...]:
    """The original's axes in our order: it stores linear weights [out, in] and patches [out, in, height, width]."""
    if name.endswith("kernel"):
        return (2, 3, 1, 0) if dimensions == 4 else (1, 0)
    return (0, 2, 1) if name.endswith(".wi") else tuple(range(dimensions))


def _original_shape(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what, transposed by `axes`, has ours."""
    return tuple(shape[axes.index(i)] for i in range(len(shape)))
