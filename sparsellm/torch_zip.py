"""Tensors out of the zip files that `torch.save` writes, without torch and without running their pickle.

Such a file holds `data.pkl`, a pickle of the saved object in which every storage is only named, and one record
`data/0`, `data/1`, ... of raw bytes for each storage. Unpickling may call anything that can be imported, so it is not
done: the opcodes are read one by one (`pickletools.genops` only decodes them) by the little machine below, which knows
containers, scalars and the few names in `_CALLS` and `_STORAGES`. A name is a string to it: nothing is imported, no
attribute is set, and what it does not know is an error. Tensors stay on disk until they are indexed.

Source: torch/serialization.py and caffe2/serialize/inline_container.h (PyTorch 1.6 and later); APPNOTE.TXT of the zip
format, 4.3.7 (local file header).
"""

import dataclasses
import functools
import pickletools
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from sparsellm.stored import dtype_code

_HEADER, _SIGNATURE = 30, b"PK\x03\x04"  # of a record: so many bytes, then its name and an extra field


@dataclasses.dataclass(frozen=True)
class _Storage:
    """What a persistent id says: a record of `size` elements."""

    path: Path
    record: zipfile.ZipInfo
    dtype: np.dtype
    size: int

    @functools.cached_property
    def elements(self) -> np.ndarray:
        """Mapped into memory; the zip's checksum is checked, once.

        Raises:
            ValueError: the record is damaged.
        """
        file = np.memmap(self.path, np.uint8, "r")
        header = bytes(file[self.record.header_offset :][:_HEADER])
        names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        data = file[self.record.header_offset + _HEADER + names :][: self.size * self.dtype.itemsize]
        if header[:4] != _SIGNATURE or zlib.crc32(data) != self.record.CRC:
            raise ValueError(f"{self.path} is damaged (record {self.record.filename}): download or copy it again")
        return data.view(self.dtype)


@dataclasses.dataclass(frozen=True)
class TorchTensor:
    """A tensor on disk, with the methods of safetensors' slices: an index reads as much as it names.

    Attributes:
        shape: its shape.
        storage: the record that holds its elements, maybe together with other tensors'.
        offset: its first element there.
        strides: elements from one index to the next, for each dimension.
    """

    shape: tuple[int, ...]
    storage: _Storage = dataclasses.field(repr=False)
    offset: int = 0
    strides: tuple[int, ...] = ()

    @property
    def dtype(self) -> np.dtype:
        return self.storage.dtype

    def get_shape(self) -> list[int]:
        """The shape."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """The dtype as safetensors calls it."""
        return dtype_code(self.dtype)

    def __getitem__(self, index: Any) -> np.ndarray:
        """A copy of what numpy's basic index names; the zip's checksum is checked.

        Raises:
            ValueError: the record is damaged.
        """
        elements = self.storage.elements[self.offset :]
        strides = [stride * self.dtype.itemsize for stride in self.strides]
        whole = np.lib.stride_tricks.as_strided(elements, self.shape, strides, writeable=False)
        return np.array(whole[index], order="C", subok=False)


def open_state_dict(path: str | Path) -> dict[str, TorchTensor]:
    """The tensors of a state_dict by name, unread: of what was saved, or of its entry "model" if it has one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as of `open_torch_zip`; or it holds anything else.
    """
    saved = open_torch_zip(path)
    state = saved.get("model", saved) if isinstance(saved, dict) else None
    if not isinstance(state, dict) or not all(isinstance(tensor, TorchTensor) for tensor in state.values()):
        raise ValueError(f"{path} must hold tensors by name, maybe under 'model'")
    return state


def open_torch_zip(path: str | Path) -> Any:
    """The object that was saved, its tensors unread.

    Args:
        path: what `torch.save` of PyTorch 1.6 or later wrote.

    Returns:
        Dicts, lists, tuples and scalars as they were, with a `TorchTensor` in place of each tensor.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of another format, truncated or damaged, or its pickle names anything but containers,
            scalars and dense tensors (the message says what).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} must be a zip file as torch.save writes it; it is truncated, or a bare pickle of PyTorch before "
            "1.6, which is never opened: load it with weights_only=True and save it again with a newer PyTorch"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            return _Machine(path, archive, _folder(archive)).run()
    except (ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    except (IndexError, KeyError, TypeError) as error:
        raise ValueError(f"cannot read {path}: its pickle is damaged ({error!r})") from error


def _folder(archive: zipfile.ZipFile) -> str:
    """The one folder that every record lies in."""
    names = archive.namelist()
    pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise ValueError(f"it must hold one data.pkl; it holds {', '.join(names[:3])}, ...: must it be unzipped first?")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in names and (order := archive.read(f"{folder}byteorder")) != b"little":
        raise ValueError(f"its byte order must be little; got {order!r}")
    return folder


class _Name(NamedTuple):
    """A global that a pickle asks for. Only its name: it is never looked up in Python."""

    module: str
    attribute: str

    def __str__(self) -> str:
        return f"{self.module}.{self.attribute}"


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> TorchTensor:
    """torch._utils._rebuild_tensor_v2; what follows the strides concerns gradients."""
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or len(shape) != len(strides):
        raise ValueError(f"a tensor must have a storage, and a stride for each dimension; got {shape}, {strides}")
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"offset, shape and strides must be whole numbers; got {offset}, {shape}, {strides}")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if 0 not in shape and last >= storage.size:  # it would read memory that is not the file's
        raise ValueError(f"a tensor must lie within its {storage.size} elements; got {shape}, {strides} from {offset}")
    return TorchTensor(tuple(shape), storage, offset, tuple(strides))


_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda items=(): dict(items),
    "torch.Size": tuple,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda tensor, requires_grad, hooks: tensor,
}
_STORAGES = {
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": jnp.dtype(jnp.bfloat16),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
}
_CONSTANTS = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_LITERALS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE")
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """A pickle machine that only builds data. Each opcode that it knows is handled in `step`."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, folder: str):
        self.path, self.archive, self.folder = path, archive, folder
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        for opcode, argument, _ in pickletools.genops(self.archive.read(f"{self.folder}data.pkl")):
            self.step(opcode.name, argument)
        (value,) = self.stack  # genops has seen to the STOP
        return value

    def step(self, opcode: str, argument: Any) -> None:
        stack, memo = self.stack, self.memo
        match opcode:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case _ if opcode in _LITERALS:
                stack.append(argument)
            case _ if opcode in _CONSTANTS:
                stack.append(_CONSTANTS[opcode]())
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "MARK":
                self.marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(self.pop_marked()))
            case _ if opcode in _TUPLES:
                stack[-_TUPLES[opcode] :] = [tuple(stack[-_TUPLES[opcode] :])]
            case "APPEND" | "APPENDS":
                items = self.pop_marked() if opcode == "APPENDS" else [stack.pop()]
                self.top(list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = self.pop_marked() if opcode == "SETITEMS" else [stack.pop(-2), stack.pop()]
                self.top(dict).update(zip(items[::2], items[1::2], strict=True))
            case "GLOBAL":
                stack.append(_known(_Name(*argument.split(" "))))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(_known(_Name(module, attribute)))
            case "REDUCE":
                arguments, name = stack.pop(), stack.pop()
                stack.append(_call(name)(*arguments))
            case "BUILD":  # attributes of an object; of what is built here, only a state_dict's _metadata
                stack.pop()
                self.top(dict)
            case "BINPERSID":
                stack.append(self.storage(*stack.pop()))
            case _:
                raise ValueError(f"its pickle must hold plain containers and tensors only; it uses opcode {opcode}")

    def pop_marked(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise ValueError(f"its pickle must change containers only; it changes a {type(self.stack[-1]).__name__}")
        return self.stack[-1]

    def storage(self, tag: Any, name: Any, key: Any, device: Any, size: Any) -> _Storage:
        """What torch's persistent id names: ("storage", torch.FloatStorage, "0", "cpu", elements)."""
        if tag != "storage" or str(name) not in _STORAGES or not isinstance(size, int):
            raise ValueError(f"a storage must be one of {', '.join(_STORAGES)}; got {tag} {name} of {size} elements")
        dtype, record = _STORAGES[str(name)], f"{self.folder}data/{key}"
        if record not in self.archive.NameToInfo:
            raise ValueError(f"record {record} is missing")
        found = self.archive.getinfo(record)
        if found.file_size != size * dtype.itemsize:
            raise ValueError(f"record {record} must hold {size} elements of {dtype}; its size differs")
        if found.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"record {record} must not be compressed, as torch.save leaves it; it is")
        return _Storage(self.path, found, dtype, size)


def _known(name: _Name) -> _Name:
    if str(name) not in _CALLS and str(name) not in _STORAGES:
        raise ValueError(
            f"its pickle asks for {name}. Only tensors and plain containers are read; nothing was imported or run. If "
            "you trust the file: load it with torch and save only its tensors (a state_dict)"
        )
    return name


def _call(name: Any) -> Callable[..., Any]:
    if not isinstance(name, _Name) or str(name) not in _CALLS:
        raise ValueError(f"its pickle must call {', '.join(_CALLS)} only; it calls {name}")
    return _CALLS[str(name)]
