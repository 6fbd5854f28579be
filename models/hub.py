"""Saving any model for transformers."""

from pathlib import Path

from flax import nnx

from models import checkpoint, mixtral_checkpoint, opt_checkpoint, switch_checkpoint

ARCHITECTURES = (opt_checkpoint.ARCHITECTURE, mixtral_checkpoint.ARCHITECTURE, switch_checkpoint.ARCHITECTURE)


def save_hf(
    model: nnx.Module,
    folder: str | Path,
    *,
    tokenizer_folder: str | Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> None:
    """Writes a folder that transformers can load; arguments and errors of `huggingface.save_folder`.

    Raises:
        TypeError: transformers knows no such model.
    """
    for architecture in ARCHITECTURES:
        if isinstance(model, architecture.model):
            options = {"tokenizer_folder": tokenizer_folder, "max_shard_bytes": max_shard_bytes}
            return checkpoint.save_hf(architecture, model, folder, overwrite=overwrite, **options)
    known = ", ".join(architecture.model.__name__ for architecture in ARCHITECTURES)
    raise TypeError(f"model must be one of {known}; got {type(model).__name__}")
