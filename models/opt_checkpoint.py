"""OPT from and to disk: Hugging Face's folders both ways, and this project's own Orbax checkpoints.

A parameter's path is its Hugging Face name but for the last word (`checkpoint.TENSOR_NAMES`), and linear weights are
stored [out, in] there, [in, out] here.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from models import checkpoint
from models.checkpoint import Architecture, ParameterPath, dotted, read_fields, tensor_name
from models.opt import OPT, with_layout
from models.opt_config import OPTConfig
from sparsellm.checkpoint import is_checkpoint
from sparsellm.huggingface import equal_tensors
from sparsellm.sharding import TENSOR_PARALLEL, Rules
from sparsellm.stored import Stored

PREFIX = "model.decoder."
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
    "dropout": "dropout",
}
# What this OPT is; a checkpoint that says otherwise (Galactica has no biases) is another model.
FIXED = {
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "_remove_final_layer_norm": False,
    "tie_word_embeddings": True,
}
SPECIAL_TOKENS = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
NO_OTHER_DROPOUT = {"attention_dropout": 0.0, "layerdrop": 0.0}
REQUIRED = ("layers", "d_model", "heads", "d_ff")


def load_opt(
    path_or_hub_id: str | Path,
    *,
    dtype: str | None = None,
    param_dtype: str | None = None,
    mesh: Mesh | None = None,
    rules: Rules = TENSOR_PARALLEL,
    sparse_rows: int | None | Sequence[int | None] = None,
    neuron_major: bool = False,
    revision: str | None = None,
) -> OPT:
    """Loads an OPT from a Hugging Face folder, a checkpoint by `save_opt`, or the hub ("facebook/opt-125m").

    Arguments and errors of `checkpoint.load`; `sparse_rows` and `neuron_major` as in `OPTConfig`. A native checkpoint
    in the other layout is loaded as it is, and for a moment there are two copies of fc1.
    """
    native = is_checkpoint(Path(path_or_hub_id).expanduser())
    layout = {} if native else {"neuron_major": neuron_major}
    model = checkpoint.load(
        ARCHITECTURE,
        path_or_hub_id,
        dtype=dtype,
        param_dtype=param_dtype,
        mesh=mesh,
        rules=rules,
        revision=revision,
        sparse_rows=sparse_rows,
        **layout,
    )
    return with_layout(model, neuron_major=neuron_major)


def save_opt(model: OPT, folder: str | Path, *, overwrite: bool = False) -> None:
    """Writes a native checkpoint (Orbax), which `load_opt` reads; arguments and errors of `save_checkpoint`."""
    checkpoint.save(ARCHITECTURE, model, folder, overwrite=overwrite)


def _write_config(config: OPTConfig) -> dict[str, Any]:
    if config.layer_sizes is not None:
        raise ValueError(
            f"transformers knows no OPT whose layers differ: save_opt keeps it; got layer_sizes={config.layer_sizes}"
        )
    ours = {name: getattr(config, name) for name in ("gated", "thresholds", "norm_relu") if getattr(config, name)}
    if config.activation in ("shifted_relu", "drelu"):
        ours["activation"] = config.activation
    if ours:
        said = ", ".join(f"{name}={value}" for name, value in ours.items())
        raise ValueError(
            f"transformers' OPT has no gate, FATReLU, shifted ReLU or norm_relu: save_opt keeps it; got {said}"
        )
    fields = {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()}
    fields["word_embed_proj_dim"] = config.embed_dim or config.d_model
    return fields | FIXED | SPECIAL_TOKENS | NO_OTHER_DROPOUT | {"init_std": config.init_std}


def _read_config(config: dict[str, Any]) -> dict[str, Any]:
    return read_fields(config, FIELDS, required=REQUIRED, fixed=FIXED)


def _stored(path: ParameterPath, array: Any, found: Collection[str]) -> Stored:
    name = dotted(path) if path[-1] == "weight" else tensor_name(path)  # neuron-major: as it is there
    return Stored(array, name, transposed=path[-1] == "kernel")


def _short_name(name: str) -> str:
    """Hub files differ in what they put before the name."""
    return name.removeprefix("model.").removeprefix("decoder.")


def _drop_tied_head(folder: Path, tensors: dict[str, Any]) -> None:
    """Removes an output projection that repeats the embedding."""
    head, embedding = tensors.pop("lm_head.weight", None), tensors.get("embed_tokens.weight")
    if head is None or embedding is None:
        return
    if not equal_tensors(head, embedding):
        raise ValueError(
            f"lm_head.weight in {folder} must equal embed_tokens.weight: OPT ties the two; this checkpoint does not"
        )


ARCHITECTURE = Architecture(
    name="OPTForCausalLM",
    model_type="opt",
    model=OPT,
    config=OPTConfig,
    read_config=_read_config,
    write_config=_write_config,
    stored=_stored,
    short_name=_short_name,
    full_name=lambda name: PREFIX + name,
    prepare=_drop_tied_head,
)
