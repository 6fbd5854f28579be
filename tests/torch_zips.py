"""Writes zip files as torch.save does, and as it does not: what tests of their reader read."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage", "int64": "LongStorage"}
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"


def pickled(value: Any) -> bytes:
    """Opcodes that push a text, a small integer, or a tuple of these."""
    if isinstance(value, tuple):
        return b"(" + b"".join(map(pickled, value)) + b"t"
    if isinstance(value, str):
        return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()
    return b"J" + value.to_bytes(4, "little", signed=True)


def pickled_tensor(record: int, storage: str, size: int, offset: Any, shape: Any, strides: Any) -> bytes:
    """Opcodes that push a tensor, of which any number may be wrong."""
    persistent_id = b"(" + pickled("storage") + f"ctorch\n{storage}\n".encode()
    persistent_id += pickled(str(record)) + pickled("cpu") + pickled(size) + b"tQ"
    gradients = b"\x89" + b"ccollections\nOrderedDict\n)R"
    return TENSOR + b"(" + persistent_id + pickled(offset) + pickled(shape) + pickled(strides) + gradients + b"tR"


def write_zip(path: Path, data: bytes, records: Mapping[str, bytes] | None = None) -> Path:
    """A zip file with these opcodes for a pickle, and further records."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + data + b".")
        archive.writestr("archive/version", "3\n")
        for name, content in (records or {}).items():
            archive.writestr(f"archive/{name}", content)
    return path


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    """What torch.save({"model": tensors}, path) writes."""
    data, records = _state_dict(tensors)
    return write_zip(path, b"}" + pickled("model") + data + b"s", records)


def write_state_dict(path: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    """What torch.save(tensors, path) writes, as for the hub's pytorch_model.bin."""
    return write_zip(path, *_state_dict(tensors))


def _state_dict(tensors: Mapping[str, np.ndarray]) -> tuple[bytes, dict[str, bytes]]:
    data, records = b"ccollections\nOrderedDict\n)R", {}
    for i, (name, values) in enumerate(tensors.items()):
        strides = tuple(stride // values.itemsize for stride in values.strides)
        tensor = pickled_tensor(i, STORAGES[values.dtype.name], values.size, 0, values.shape, strides)
        data += pickled(name) + tensor + b"s"
        records[f"data/{i}"] = values.tobytes()
    return data, records
