"""Mixtral from and to disk: Hugging Face's folders both ways, and this project's own Orbax checkpoints.

Files hold an expert's w1, w3 and w2 as tensors of their own, or (transformers 5, where it is asked not to convert
them back) all experts' in one; a layer here holds wi [experts, d_model, w1 then w3] and wo [experts, d_ff, d_model].
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from models import checkpoint
from models.checkpoint import Architecture, ParameterPath, dotted, read_fields, tensor_name
from models.mixtral import Mixtral, MixtralConfig
from sparsellm.sharding import TENSOR_PARALLEL, Rules
from sparsellm.stored import Stored

# our field -> Hugging Face's
FIELDS = {
    "vocab_size": "vocab_size",
    "layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "d_ff": "intermediate_size",
    "experts": "num_local_experts",
    "top_k": "num_experts_per_tok",
    "max_length": "max_position_embeddings",
    "sliding_window": "sliding_window",
    "rope_theta": "rope_theta",
    "norm_epsilon": "rms_norm_eps",
}
REQUIRED = ("layers", "d_model", "heads", "kv_heads", "d_ff", "max_length")
# What this Mixtral is; a checkpoint that says otherwise is of another model.
FIXED = {"hidden_act": "silu", "tie_word_embeddings": False, "rope_scaling": None}
SPECIAL_TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
# ours -> all experts' in one tensor, or each expert's side by side
EXPERTS = {"wi": ("gate_up_proj", ("w1", "w3")), "wo": ("down_proj", ("w2",))}


def load_mixtral(
    path_or_hub_id: str | Path,
    *,
    dtype: str | None = None,
    param_dtype: str | None = None,
    mesh: Mesh | None = None,
    rules: Rules = TENSOR_PARALLEL,
    implementation: str | None = None,
    revision: str | None = None,
) -> Mixtral:
    """Loads a Mixtral from a Hugging Face folder, a checkpoint by `save_mixtral`, or the hub.

    Example:
        load_mixtral("mistralai/Mixtral-8x7B-v0.1", mesh=mesh, rules={"expert": "model"})

    Arguments and errors of `checkpoint.load`; `implementation` as in `MixtralConfig`.
    """
    return checkpoint.load(
        ARCHITECTURE,
        path_or_hub_id,
        dtype=dtype,
        param_dtype=param_dtype,
        mesh=mesh,
        rules=rules,
        revision=revision,
        implementation=implementation,
    )


def save_mixtral(model: Mixtral, folder: str | Path, *, overwrite: bool = False) -> None:
    """Writes a native checkpoint (Orbax), which `load_mixtral` reads; arguments and errors of `save_checkpoint`."""
    checkpoint.save(ARCHITECTURE, model, folder, overwrite=overwrite)


def _read_config(config: dict[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters") or {}  # where transformers 5 keeps what was rope_theta and rope_scaling
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type must be default in config.json; got {rope['rope_type']}")
    theta = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    return read_fields(config | theta, FIELDS, required=REQUIRED, fixed=FIXED)


def _write_config(config: MixtralConfig) -> dict[str, Any]:
    fields = {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()} | {"head_dim": config.head_width}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}}
    return fields | FIXED | rope | SPECIAL_TOKENS | {"initializer_range": config.init_std}


def _stored(path: ParameterPath, array: Any, found: Collection[str]) -> Stored:
    if path[-1] not in EXPERTS:
        name = tensor_name(path).replace(".router.", ".gate.")
        return Stored(array, name, transposed=path[-1] == "kernel")
    prefix = dotted((*path[:-1], "experts", ""))
    packed, parts = EXPERTS[path[-1]]
    if prefix + packed in found:
        return Stored(array, prefix + packed, transposed=True)
    names = [[f"{prefix}{expert}.{part}.weight" for part in parts] for expert in range(array.shape[0])]
    return Stored(array, names, transposed=True)


def _short_name(name: str) -> str:
    return name.removeprefix("model.").replace(".mlp.", ".block_sparse_moe.")  # the first is transformers 5's own name


def _full_name(name: str) -> str:
    return name if name.startswith("lm_head.") else f"model.{name}"


ARCHITECTURE = Architecture(
    name="MixtralForCausalLM",
    model_type="mixtral",
    model=Mixtral,
    config=MixtralConfig,
    read_config=_read_config,
    write_config=_write_config,
    stored=_stored,
    short_name=_short_name,
    full_name=_full_name,
)
