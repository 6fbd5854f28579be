"""Switch Transformers from and to disk.

In Hugging Face's files a block is a list of sublayers, each a norm and what it is the norm of, and every expert's two
weights are tensors of their own; linear weights are stored [out, in] there, [in, out] here.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from models import checkpoint
from models.checkpoint import Architecture, ParameterPath, read_fields
from models.switch_config import SwitchConfig
from models.switch_transformer import SwitchTransformer
from sparsellm.checkpoint import load_config
from sparsellm.huggingface import equal_tensors
from sparsellm.sharding import TENSOR_PARALLEL, Rules
from sparsellm.stored import Stored

# our field -> Hugging Face's
FIELDS = {
    "vocab_size": "vocab_size",
    "encoder_layers": "num_layers",
    "decoder_layers": "num_decoder_layers",
    "d_model": "d_model",
    "heads": "num_heads",
    "head_dim": "d_kv",
    "d_ff": "d_ff",
    "experts": "num_experts",
    "encoder_sparse_step": "encoder_sparse_step",
    "decoder_sparse_step": "decoder_sparse_step",
    "expert_capacity": "expert_capacity",
    "position_buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
    "tied": "tie_word_embeddings",
    "norm_epsilon": "layer_norm_epsilon",
    "start_id": "decoder_start_token_id",
}
REQUIRED = ("encoder_layers", "decoder_layers", "d_model", "heads", "d_ff", "experts")
FIXED = {"dense_act_fn": "relu", "router_bias": False, "router_dtype": "float32", "is_encoder_decoder": True}
OTHERS = {"eos_token_id": 1, "pad_token_id": 0, "dropout_rate": 0.0, "router_jitter_noise": 0.0}

SUBLAYERS = {
    "encoder": {
        "self_attn_layer_norm": "layer.0.layer_norm",
        "self_attn": "layer.0.SelfAttention",
        "mlp_layer_norm": "layer.1.layer_norm",
        "mlp": "layer.1.mlp",
    },
    "decoder": {
        "self_attn_layer_norm": "layer.0.layer_norm",
        "self_attn": "layer.0.SelfAttention",
        "cross_attn_layer_norm": "layer.1.layer_norm",
        "cross_attn": "layer.1.EncDecAttention",
        "mlp_layer_norm": "layer.2.layer_norm",
        "mlp": "layer.2.mlp",
    },
}
POSITION_BIAS = "block.0.layer.0.SelfAttention.relative_attention_bias"
EMBEDDING, HEAD = "shared.weight", "lm_head.weight"
EMBEDDING_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def load_switch(
    path_or_hub_id: str | Path,
    *,
    dtype: str | None = None,
    param_dtype: str | None = None,
    mesh: Mesh | None = None,
    rules: Rules = TENSOR_PARALLEL,
    capacity: str | None = None,
    revision: str | None = None,
) -> SwitchTransformer:
    """Loads a Switch Transformer from a Hugging Face folder, a checkpoint by `save_switch`, or the hub.

    Arguments and errors of `checkpoint.load`; `capacity` as in `SwitchConfig`, None for what the checkpoint says, and
    "none" where that is Hugging Face's.
    """
    return checkpoint.load(
        ARCHITECTURE,
        path_or_hub_id,
        dtype=dtype,
        param_dtype=param_dtype,
        mesh=mesh,
        rules=rules,
        revision=revision,
        **({} if capacity is None else {"capacity": capacity}),
    )


def save_switch(model: SwitchTransformer, folder: str | Path, *, overwrite: bool = False) -> None:
    """Writes a native checkpoint (Orbax), which `load_switch` reads; arguments and errors of `save_checkpoint`."""
    checkpoint.save(ARCHITECTURE, model, folder, overwrite=overwrite)


def _read_config(config: dict[str, Any]) -> dict[str, Any]:
    fields = read_fields(config, FIELDS, required=REQUIRED, fixed=FIXED)
    for stack, layers in (("encoder", "num_layers"), ("decoder", "num_decoder_layers")):
        # transformers' own rule: with no sparse layers asked for there is still one, the second.
        sparse = config.get(f"num_sparse_{stack}_layers", 3)
        step = config[layers] // sparse if sparse > 0 else config[layers]
        fields.setdefault(f"{stack}_sparse_step", step)
    return fields


def _write_config(config: SwitchConfig) -> dict[str, Any]:
    fields = {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()}
    for stack, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        step = fields[f"{stack}_sparse_step"]
        fields[f"num_sparse_{stack}_layers"] = layers // step if step else 0
    return fields | FIXED | OTHERS


def _stored(path: ParameterPath, array: Any, found: Collection[str]) -> Stored:
    *modules, last = map(str, path)
    if modules[-1] == "relative_attention_bias":
        modules[-1] = POSITION_BIAS
    elif len(modules) > 2:
        modules[3] = SUBLAYERS[modules[0]][modules[3]]
    name = ".".join(modules)
    if modules[-1] == "router":
        name += ".classifier"
    if last in ("wi", "wo"):
        experts = range(array.shape[0])
        return Stored(array, [[f"{name}.experts.expert_{e}.{last}.weight"] for e in experts], transposed=True)
    return Stored(array, f"{name}.weight", transposed=last == "kernel")


def _drop_copies(folder: Path, tensors: dict[str, Any]) -> None:
    """Leaves one of the names under which files hold the token embedding, the output projection's too if it is tied."""
    tied = load_config(folder).get("tie_word_embeddings", True)
    names = [name for name in (EMBEDDING, *EMBEDDING_COPIES, *((HEAD,) if tied else ())) if name in tensors]
    if not names:
        return
    embedding = tensors.pop(names[0])
    for name in names[1:]:
        if not equal_tensors(tensors.pop(name), embedding):
            raise ValueError(f"{name} in {folder} must equal {names[0]}: they are one parameter of this model")
    tensors[EMBEDDING] = embedding


ARCHITECTURE = Architecture(
    name="SwitchTransformersForConditionalGeneration",
    model_type="switch_transformers",
    model=SwitchTransformer,
    config=SwitchConfig,
    read_config=_read_config,
    write_config=_write_config,
    stored=_stored,
    short_name=str,
    full_name=str,
    prepare=_drop_copies,
    copies=lambda config: {} if config.tied else dict.fromkeys(EMBEDDING_COPIES, EMBEDDING),
)
