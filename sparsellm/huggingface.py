"""Hugging Face model folders: config.json, and tensors in one file or in shards with an index.

Safetensors are read and written by the `safetensors` library: it maps files into memory, hands out one tensor (or the
slice of it that a device needs) at a time, knows bfloat16, and checks headers against file sizes. Orbax reads the
layout too, but casts and assembles on the host and cannot write it. Where a folder has only pytorch_model.bin, as many
on the hub do, `torch_zip` reads the tensors out of it; no pickle is ever run.
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sparsellm.checkpoint import CONFIG, check_tensors, load_config, restore_interrupted, whole_folder
from sparsellm.stored import Stored, dtype_code, read_parameter
from sparsellm.torch_zip import open_state_dict

INDEX = "model.safetensors.index.json"
INDICES = {INDEX: ".safetensors", "pytorch_model.bin.index.json": ".bin"}  # the first that a folder has counts
SINGLE = ("*.safetensors", "pytorch_model.bin")
DTYPES = ("BF16", "F16", "F32")
INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def find_folder(path_or_hub_id: str | Path, *, revision: str | None = None) -> Path:
    """A local folder as it is, or a hub repository's tensors, JSON and text files, downloaded and cached.

    Of a repository that has both, safetensors and not pytorch_model.bin.

    Args:
        path_or_hub_id: a folder, "owner/name", or "owner/name@revision".
        revision: branch, tag or commit on the hub, or a pull request ("refs/pr/3").

    Raises:
        FileNotFoundError: there is no such folder, or the hub has no such repository or cannot be reached.
        ModuleNotFoundError: a hub id without huggingface_hub installed.
        ValueError: a file instead of a folder, or two revisions.
    """
    path = Path(path_or_hub_id).expanduser()
    restore_interrupted(path)
    if path.is_file():
        raise ValueError(f"give the folder that holds config.json and *.safetensors, not a file; got {path}")
    hub_id = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", str(path_or_hub_id))
    if path.is_dir() or hub_id is None:
        if not path.is_dir():
            raise FileNotFoundError(f"no folder {path}, and it is no hub id (owner/name) either")
        return path
    if revision is not None and hub_id[2] is not None:
        raise ValueError(f"give one revision; got {path_or_hub_id} and {revision}")
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"no folder {path} here; to get it from the Hugging Face hub: pip install huggingface-hub"
        ) from error

    def download(*patterns: str) -> Path:
        return Path(
            huggingface_hub.snapshot_download(hub_id[1], revision=revision or hub_id[2], allow_patterns=[*patterns])
        )

    try:
        folder = download("*.safetensors", "*.json", "*.txt")
        return folder if any(folder.glob("*.safetensors")) else download("pytorch_model*.bin", "*.json", "*.txt")
    except OSError as error:  # every network and repository error of huggingface_hub is one
        raise FileNotFoundError(
            f"no folder {path} here, and the Hugging Face hub gave no {path_or_hub_id}: {error}"
        ) from error


def read_config(folder: Path, *, architecture: str) -> dict[str, Any]:
    """config.json of a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it describes another architecture, or is not JSON.
    """
    config = load_config(folder)
    found = config.get("architectures") or [config.get("model_type", "nothing")]
    if architecture not in found:
        raise ValueError(f"{folder / CONFIG} must be of architecture {architecture}; got {', '.join(map(str, found))}")
    return config


def open_tensors(folder: Path, rename: Callable[[str], str], *, dtypes: Collection[str] = DTYPES) -> dict[str, Any]:
    """Every tensor of a folder, unread: slices of memory-mapped files, by their renamed names.

    Args:
        folder: where they are.
        rename: gives a tensor's name by that in the file.
        dtypes: those that a tensor may have.

    Raises:
        FileNotFoundError: no tensors, or a shard that the index names is missing.
        ValueError: only pickles that are not torch's zip files, a damaged or truncated file, or an index that is none.
    """
    tensors: dict[str, Any] = {}
    for path in _files(folder):
        if not path.is_file():
            raise FileNotFoundError(f"the index in {folder} names {path.name}, which is missing")
        for name, tensor in open_state_dict(path).items() if path.suffix == ".bin" else _slices(path):
            if tensor.get_dtype() not in dtypes:
                raise ValueError(f"dtype of a tensor must be one of {dtypes}; {name} in {path} is {tensor.get_dtype()}")
            if rename(name) in tensors:
                raise ValueError(f"a tensor must be stored once; {folder} holds {rename(name)} twice")
            tensors[rename(name)] = tensor
    return tensors


def _slices(path: Path) -> Iterator[tuple[str, Any]]:
    """The tensors of a safetensors file by name, unread."""
    try:
        file = safe_open(path, framework="np")
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged ({error}): download or copy it again") from error
    for name in file.keys():  # noqa: SIM118 (not a mapping)
        yield name, file.get_slice(name)


def load_tensors[K](
    folder: Path, tensors: Mapping[str, Any], wanted: Mapping[K, Stored[jax.ShapeDtypeStruct]]
) -> dict[K, jax.Array]:
    """Reads tensors one at a time, each device its own slices, and casts, transposes and joins them on the devices.

    The host never holds more than one tensor, the devices never more than the model and one tensor.

    Args:
        folder: for messages.
        tensors: what `open_tensors` returned.
        wanted: shape, dtype and sharding of each parameter, and its tensors.

    Raises:
        ValueError: tensors are missing, extra, misshapen or, where that counts, of another dtype; raised before
            anything is read.
    """
    check_tensors(
        folder,
        expected={part.name: part.shape for stored in wanted.values() for part in stored.parts()},
        found={name: tuple(tensor.get_shape()) for name, tensor in tensors.items()},
    )
    for stored in wanted.values():
        for part in stored.parts() if stored.exact else ():
            dtype, found = dtype_code(stored.array.dtype), tensors[part.name].get_dtype()
            if found != dtype:
                raise ValueError(f"{part.name} in {folder} must be of dtype {dtype}; got {found}: it is damaged")
    return {key: read_parameter(stored, tensors) for key, stored in wanted.items()}


def equal_tensors(a: Any, b: Any) -> bool:
    """Whether two unread tensors of `open_tensors` hold the same; a few rows of each are read at a time."""
    rows, step = a.get_shape()[0], 4096
    return a.get_shape() == b.get_shape() and all(
        np.array_equal(a[i : min(i + step, rows)], b[i : min(i + step, rows)]) for i in range(0, rows, step)
    )


def _files(folder: Path) -> list[Path]:
    """The files whose tensors make up the model: safetensors, or else torch's."""
    for (name, suffix), single in zip(INDICES.items(), SINGLE, strict=True):
        if (folder / name).is_file():
            return [folder / shard for shard in _shards_of(folder / name, suffix)]
        files = sorted(folder.glob(single))
        if len(files) > 1:
            raise FileNotFoundError(f"{folder} holds {len(files)} files {single} but no {name}: download it too")
        if files:
            return files
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"{folder} holds no *.safetensors and no pytorch_model.bin but {', '.join(pickles)}. Running a pickle can "
            "run any code that its author put there, so none is; where transformers is installed, convert a file you "
            "trust: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    raise FileNotFoundError(f"{folder} holds no *.safetensors, and no pytorch_model.bin either")


def _shards_of(index: Path, suffix: str) -> list[str]:
    """The names of files in an index.

    Raises:
        ValueError: it is none, or names files elsewhere or of another kind.
    """
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} must be JSON with a weight_map; {error!r}") from error
    for name in names:
        if Path(name).name != name or not name.endswith(suffix):
            raise ValueError(f"a shard must be a {suffix} file beside {index.name}; it names {name!r}")
    return names


def save_folder(
    folder: str | Path,
    config: Mapping[str, Any],
    parameters: Iterable[Stored[jax.Array]],
    *,
    rename: Callable[[str], str] = str,
    tokenizer_folder: str | Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> None:
    """Writes a folder that transformers can load, whole or not at all. The host holds one shard at a time.

    Args:
        folder: where to.
        config: the contents of config.json.
        parameters: each with the tensors to store it in.
        rename: gives the name in the file.
        tokenizer_folder: whose tokenizer files to copy along.
        max_shard_bytes: the most tensor bytes in a file; a larger tensor gets a file of its own.
        overwrite: replace the folder if it holds a model.

    Raises:
        FileExistsError: the folder holds something, and `overwrite` is False or it holds no config.json.
        FileNotFoundError: `tokenizer_folder` holds no tokenizer files.
        ValueError: `max_shard_bytes` is below 1.
        OSError: no space is left; what was there is unchanged.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be at least 1; got {max_shard_bytes}")
    tokenizer = [Path(tokenizer_folder) / name for name in TOKENIZER_FILES] if tokenizer_folder else []
    tokenizer = [path for path in tokenizer if path.is_file()]
    if tokenizer_folder and not tokenizer:
        raise FileNotFoundError(f"no tokenizer files ({', '.join(TOKENIZER_FILES)}) in {tokenizer_folder}")
    tensors = {rename(part.name): (stored.array, part) for stored in parameters for part in stored.parts()}
    sizes = {name: math.prod(part.shape) * array.dtype.itemsize for name, (array, part) in tensors.items()}
    with whole_folder(folder, overwrite=overwrite) as temporary:
        (temporary / CONFIG).write_text(json.dumps(dict(config), indent=2) + "\n")
        for path in tokenizer:
            shutil.copy(path, temporary)
        shards = _shards(sizes, max_shard_bytes)
        weight_map = {}
        for i, names in enumerate(shards, start=1):
            file = f"model-{i:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
            # transformers asks for this metadata; the arrays are plain all the same
            values = {name: part.to_host(array) for name in names for array, part in [tensors[name]]}
            save_file(values, temporary / file, metadata={"format": "pt"})
            shutil.copymode(temporary / CONFIG, temporary / file)  # safetensors lets nobody else read it
            weight_map |= dict.fromkeys(names, file)
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            (temporary / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Names in order, a new shard wherever the next tensor would not fit."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
