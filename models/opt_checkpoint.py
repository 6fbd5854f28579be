"""OPT from and to disk: Hugging Face's folders both ways, and this project's own Orbax checkpoints.

A parameter's path is its Hugging Face name but for the last word (`PARAMETER_NAMES`), and linear weights are stored
[out, in] there, [in, out] here.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from models.opt import OPT, OPTConfig
from sparsellm import huggingface
from sparsellm.checkpoint import is_checkpoint, load_checkpoint, load_config, save_checkpoint
from sparsellm.sharding import TENSOR_PARALLEL, Rules, abstract_model

ARCHITECTURE = "OPTForCausalLM"
PREFIX = "model.decoder."
PARAMETER_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
# our field -> Hugging Face's
FIELDS = {
    "vocab_size": "vocab_size",
    "layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "heads": "num_attention_heads",
    "d_ff": "ffn_dim",
    "embed_dim": "word_embed_proj_dim",
    "max_length": "max_position_embeddings",
    "pre_norm": "do_layer_norm_before",
    "activation": "activation_function",
}
# What this OPT is; a checkpoint that says otherwise (Galactica has no biases) is another model.
FIXED = {
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "_remove_final_layer_norm": False,
    "tie_word_embeddings": True,
}
SPECIAL_TOKENS = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0}
REQUIRED = ("layers", "d_model", "heads", "d_ff")


def load_opt(
    path_or_hub_id: str | Path,
    *,
    dtype: str | None = None,
    param_dtype: str | None = None,
    mesh: Mesh | None = None,
    rules: Rules = TENSOR_PARALLEL,
    sparse_rows: int | None = None,
    revision: str | None = None,
) -> OPT:
    """Loads an OPT, each tensor straight into its dtype and place on the devices.

    Args:
        path_or_hub_id: a Hugging Face folder (config.json, one or several safetensors), a checkpoint by `save_opt`, or
            a hub id ("facebook/opt-125m").
        dtype: what to compute in; None for `param_dtype`.
        param_dtype: what to keep parameters in; None for `dtype` or, without that either, what the checkpoint says.
        mesh: devices to spread the parameters over; None for the default device.
        rules: mesh axis for each axis name (see `sparsellm.sharding`).
        sparse_rows: as in `OPTConfig`.
        revision: as in `huggingface.find_folder`.

    Raises:
        FileNotFoundError: there is no such folder, or files are missing from it.
        ValueError: another architecture, pickles only, a damaged file, tensors that do not fit (all named), or an
            unknown dtype.
    """
    folder = huggingface.find_folder(path_or_hub_id, revision=revision)
    native = is_checkpoint(folder)
    fields = _native_fields(folder) if native else _hf_fields(folder)
    param_dtype = param_dtype or dtype or fields["param_dtype"]
    overrides = {"dtype": dtype or param_dtype, "param_dtype": param_dtype, "sparse_rows": sparse_rows}
    config = OPTConfig(**(fields | overrides))
    graphdef, abstract = abstract_model(lambda: OPT(config, rngs=nnx.Rngs(0)), mesh, rules)
    parameters = nnx.to_flat_state(abstract)
    if native:
        arrays = load_checkpoint(folder, {_dotted(path): variable.get_value() for path, variable in parameters})
    else:
        wanted = {
            _hf_name(path): huggingface.Wanted(variable.get_value(), transposed=path[-1] == "kernel")
            for path, variable in parameters
        }
        tensors = huggingface.open_tensors(folder, _short_name)
        _drop_tied_head(folder, tensors)
        arrays = huggingface.load_tensors(folder, tensors, wanted)
    name = _dotted if native else _hf_name
    state = nnx.from_flat_state([(path, variable.replace(arrays[name(path)])) for path, variable in parameters])
    return nnx.merge(graphdef, state)


def save_opt(model: OPT, folder: str | Path, *, overwrite: bool = False) -> None:
    """Writes a native checkpoint (Orbax), which `load_opt` reads; arguments and errors of `save_checkpoint`."""
    config = {"model_type": "opt", **dataclasses.asdict(model.config)}
    state = {_dotted(path): variable[...] for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    save_checkpoint(folder, config, state, overwrite=overwrite)


def save_hf(
    model: OPT,
    folder: str | Path,
    *,
    tokenizer_folder: str | Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> None:
    """Writes a folder that transformers can load; arguments and errors of `huggingface.save_folder`."""
    parameters = nnx.to_flat_state(nnx.state(model, nnx.Param))
    huggingface.save_folder(
        folder,
        _hf_config(model.config),
        {PREFIX + _hf_name(path): (variable[...], path[-1] == "kernel") for path, variable in parameters},
        tokenizer_folder=tokenizer_folder,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
    )


def _hf_config(config: OPTConfig) -> dict[str, Any]:
    """The config.json that transformers reads."""
    fields = {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()}
    fields["word_embed_proj_dim"] = config.embed_dim or config.d_model
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "opt",
        "torch_dtype": config.param_dtype,
        **fields,
        **FIXED,
        **SPECIAL_TOKENS,
        **NO_DROPOUT,
        "init_std": config.init_std,
    }


def _hf_fields(folder: Path) -> dict[str, Any]:
    """`OPTConfig`'s fields out of a Hugging Face folder."""
    config = huggingface.read_config(folder, architecture=ARCHITECTURE)
    missing = [FIELDS[name] for name in REQUIRED if FIELDS[name] not in config]
    if missing:
        raise ValueError(f"config.json must say {', '.join(missing)}; {folder / 'config.json'} does not")
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name} must be {value} in config.json, as in every OPT; got {config[name]}")
    fields = {ours: config[theirs] for ours, theirs in FIELDS.items() if config.get(theirs) is not None}
    return fields | {"param_dtype": config.get("dtype") or config.get("torch_dtype") or "float32"}


def _native_fields(folder: Path) -> dict[str, Any]:
    """`OPTConfig`'s fields out of a checkpoint by `save_opt`."""
    fields = load_config(folder)
    if fields.pop("model_type", None) != "opt":
        raise ValueError(f"the checkpoint {folder} is not of an OPT: its config.json says no model_type opt")
    names = {field.name for field in dataclasses.fields(OPTConfig)}
    if fields.keys() != names:
        raise ValueError(
            f"config.json of {folder} must hold OPTConfig's fields; differs in {sorted(fields.keys() ^ names)}"
        )
    return fields


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def _hf_name(path: tuple[Any, ...]) -> str:
    return _dotted((*path[:-1], PARAMETER_NAMES[str(path[-1])]))


def _short_name(name: str) -> str:
    """Hub files differ in what they put before the name."""
    return name.removeprefix("model.").removeprefix("decoder.")


def _drop_tied_head(folder: Path, tensors: dict[str, Any]) -> None:
    """Removes an output projection that repeats the embedding."""
    head, embedding = tensors.pop("lm_head.weight", None), tensors.get("embed_tokens.weight")
    if head is None or embedding is None:
        return
    rows, step = head.get_shape()[0], 4096  # a few rows at a time: the whole is the model's largest tensor
    if head.get_shape() != embedding.get_shape() or not all(
        np.array_equal(head[i : min(i + step, rows)], embedding[i : min(i + step, rows)]) for i in range(0, rows, step)
    ):
        raise ValueError(
            f"lm_head.weight in {folder} must equal embed_tokens.weight: OPT ties the two; this checkpoint does not"
        )
