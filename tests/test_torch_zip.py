"""The reader of torch's zip files, against files by PyTorch (golden/make_swin_moe.py) and against hostile ones."""

import os
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_zips import pickled, pickled_tensor, write_state_dict, write_tensors, write_zip

from sparsellm.torch_zip import TorchTensor, open_state_dict, open_torch_zip

GOLDEN = Path(__file__).parent / "golden" / "swin_moe"
TYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
CODES = {"float32": "F32", "float64": "F64", "int64": "I64"}
NUMBERS = np.arange(24).reshape(2, 3, 4)
FOUR_FLOATS = {"data/0": np.arange(4, dtype=np.float32).tobytes()}


@pytest.fixture(scope="module")
def saved():
    return open_torch_zip(GOLDEN / "types.pt")


@pytest.mark.parametrize("name", TYPES)
def test_types(saved, name):
    tensor = saved["types"][name]
    values = tensor[...]
    assert values.dtype.name == tensor.dtype.name == name and tensor.shape == (2, 3, 4)
    np.testing.assert_array_equal(values.astype(np.float64), NUMBERS != 0 if name == "bool" else NUMBERS)


def test_views(saved):
    """Tensors that share a storage, in any order of its elements."""
    expected = {
        "whole": NUMBERS,
        "transposed": NUMBERS.transpose(2, 0, 1),
        "column": NUMBERS[:, 1, 2],
        "last": NUMBERS[1],
        "expanded": np.repeat(np.arange(3.0)[:, None], 4, axis=1),
        "scalar": np.array(7),
        "empty": np.zeros((0, 3)),
    }
    assert saved["views"].keys() == expected.keys()
    for name, values in expected.items():
        read = saved["views"][name][...]
        assert read.flags.c_contiguous and read.shape == values.shape
        np.testing.assert_array_equal(read, values, err_msg=name)


def test_containers_and_scalars(saved):
    assert saved["numbers"] == [1, -2, 300, 70000, 2**40, -(2**70), 0.5]
    assert saved["plain"] == ["text", None, True, False, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], {}, [[1], [2]]]
    assert saved["size"] == (2, 3)


def test_parameters_and_state_dicts(saved):
    np.testing.assert_array_equal(saved["parameter"][...], [1, 1])
    assert {name: tensor[...].tolist() for name, tensor in saved["state_dict"].items()} == {
        "weight": [[0, 1, 2], [3, 4, 5]],
        "bias": [0, 1],
    }


def test_what_is_written_here_is_read(tmp_path):
    """The writer that other tests use."""
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array(3), "c": np.zeros((2, 0), np.float32)}
    read = open_torch_zip(write_tensors(tmp_path / "x.pt", tensors))["model"]
    assert read.keys() == tensors.keys()
    for name, values in tensors.items():
        np.testing.assert_array_equal(read[name][...], values)


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_runs_a_command_does_not_run(tmp_path, protocol):
    victim = tmp_path / "victim"
    with zipfile.ZipFile(tmp_path / "evil.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"model": Evil(victim)}, protocol))
    with pytest.raises(ValueError, match="posix.system" if protocol >= 2 else "opcode|posix.system"):
        open_torch_zip(tmp_path / "evil.pt")
    assert not victim.exists()
    pickle.loads(pickle.dumps(Evil(victim), protocol))  # which it would
    assert victim.exists()


CALL = b"(" + pickled("touch victim") + b"tR"
EVIL_MODULE = "sparsellm_evil_module"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"cos\nsystem\n" + CALL, "asks for os.system"),
        (b"cbuiltins\neval\n" + CALL, "asks for builtins.eval"),
        (f"c{EVIL_MODULE}\nrun\n".encode() + CALL, f"asks for {EVIL_MODULE}.run"),
        (pickled(EVIL_MODULE) + pickled("run") + b"\x93" + CALL, f"asks for {EVIL_MODULE}.run"),
        (b"(" + pickled("x") + b"ios\nsystem\n", "opcode INST"),
        (b"(cos\nsystem\n" + pickled("x") + b"o", "asks for os.system"),
        (b"ccollections\nOrderedDict\n)\x81", "opcode NEWOBJ"),
        (b"\x82\x01", "opcode EXT1"),
        (pickled("x") + b"Q", "damaged"),
        (pickled("x") + CALL, "calls x"),
        (b"ctorch\nFloatStorage\n" + CALL, "calls torch.FloatStorage"),
        (b"ctorch.storage\n_load_from_bytes\n" + CALL, "asks for torch.storage._load_from_bytes"),
        (b"ctorch\nSize\n}b", "changes a _Name"),
        (pickled_tensor(0, "FloatStorage", 4, 0, (4,), (1,)) + b"}b", "changes a TorchTensor"),
        (b"(ctorch\nSize\nctorch\nSize\nctorch\nSize\nctorch\nSize\nctorch\nSize\ntQ", "a storage must be one of"),
    ],
)
def test_nothing_is_imported_or_called(tmp_path, monkeypatch, data, message):
    (tmp_path / f"{EVIL_MODULE}.py").write_text("def run(*_): raise SystemExit\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_torch_zip(write_zip(tmp_path / "evil.pt", data, FOUR_FLOATS))
    assert EVIL_MODULE not in sys.modules and not (tmp_path / "victim").exists()


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((1, "FloatStorage", 4, 0, (4,), (1,)), "record archive/data/1 is missing"),
        ((0, "FloatStorage", 5, 0, (5,), (1,)), "must hold 5 elements of float32"),
        ((0, "DoubleStorage", 4, 0, (4,), (1,)), "must hold 4 elements of float64"),
        ((0, "ComplexStorage", 4, 0, (4,), (1,)), "asks for torch.ComplexStorage"),
        ((0, "FloatStorage", 4, 0, (5,), (1,)), "within its 4 elements"),
        ((0, "FloatStorage", 4, 1, (4,), (1,)), "within its 4 elements"),
        ((0, "FloatStorage", 4, 0, (2, 2), (3, 1)), "within its 4 elements"),
        ((0, "FloatStorage", 4, 4, (), ()), "within its 4 elements"),
        ((0, "FloatStorage", 4, -1, (2,), (1,)), "whole numbers"),
        ((0, "FloatStorage", 4, 3, (4,), (-1,)), "whole numbers"),
        ((0, "FloatStorage", 4, 0, (-4,), (1,)), "whole numbers"),
        ((0, "FloatStorage", 4, 0, ("4",), (1,)), "whole numbers"),
        ((0, "FloatStorage", 4, 0, (4,), (1, 1)), "a stride for each dimension"),
        ((0, "FloatStorage", 4, 0, 4, 1), "damaged"),
    ],
)
def test_no_tensor_reaches_outside_its_record(tmp_path, numbers, message):
    with pytest.raises(ValueError, match=message):
        open_torch_zip(write_zip(tmp_path / "x.pt", pickled_tensor(*numbers), FOUR_FLOATS))


def test_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        open_torch_zip(tmp_path / "missing.pt")
    path = tmp_path / "x.pt"
    whole = (GOLDEN / "types.pt").read_bytes()
    for content in (b"", pickle.dumps({"a": 1}, 2), whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match="must be a zip file as torch.save writes it; it is truncated, or a bare pickle"
        ):
            open_torch_zip(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("swin/x.pth.rank0", whole)
    with pytest.raises(ValueError, match="must hold one data.pkl; it holds swin/x.pth.rank0, ...: must it be unzipped"):
        open_torch_zip(path)
    with pytest.raises(ValueError, match="byte order must be little; got b'big'"):
        open_torch_zip(write_zip(path, b"}", {"byteorder": b"big"}))


def test_a_damaged_record_is_found_when_it_is_read(tmp_path):
    path = write_tensors(tmp_path / "x.pt", {"good": np.ones(3, np.float32), "bad": np.full(5, 7, np.float32)})
    content = bytearray(path.read_bytes())
    content[content.index(np.full(5, 7, np.float32).tobytes())] ^= 1
    path.write_bytes(content)
    tensors = open_torch_zip(path)["model"]
    np.testing.assert_array_equal(tensors["good"][...], np.ones(3))
    with pytest.raises(ValueError, match="is damaged .*: download or copy it again"):
        tensors["bad"][...]


def test_slices_are_those_of_the_whole(saved):
    for name, tensor in saved["views"].items():
        whole = tensor[...]
        assert tensor.get_shape() == list(whole.shape) and tensor.get_dtype() == CODES[whole.dtype.name]
        index = tuple(slice(size // 3, size - size // 4) for size in whole.shape)
        np.testing.assert_array_equal(tensor[index], whole[index], err_msg=name)


def test_what_was_read_is_not_the_file_s(tmp_path):
    path = write_tensors(tmp_path / "x.pt", {"a": np.ones(3, np.float32)})
    values = open_torch_zip(path)["model"]["a"][...]
    assert values.flags.owndata and values.flags.writeable and type(values) is np.ndarray


def test_state_dicts(tmp_path):
    values = np.arange(6, dtype=np.float16).reshape(2, 3)
    for write in (write_tensors, write_state_dict):
        state = open_state_dict(write(tmp_path / "x.pt", {"a": values}))
        assert state.keys() == {"a"} and state["a"].get_dtype() == "F16"
        np.testing.assert_array_equal(state["a"][...], values)
    with pytest.raises(ValueError, match="must hold tensors by name, maybe under 'model'"):
        open_state_dict(GOLDEN / "types.pt")


def test_compressed_and_misplaced_records(tmp_path):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\x80\x02" + pickled_tensor(0, "FloatStorage", 4, 0, (4,), (1,)) + b".")
        archive.writestr("x/data/0", FOUR_FLOATS["data/0"])
    with pytest.raises(ValueError, match="record x/data/0 must not be compressed"):
        open_torch_zip(path)
    tensor = open_torch_zip(write_zip(path, pickled_tensor(0, "FloatStorage", 4, 0, (4,), (1,)), FOUR_FLOATS))
    content = bytearray(path.read_bytes())
    at = content.index(b"archive/data/0") - 30  # its local header, which the central directory points to
    content[at : at + 4] = b"none"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="x.pt is damaged .record archive/data/0.: download or copy it again"):
        tensor[...]


with zipfile.ZipFile(GOLDEN / "types.pt") as _archive:
    PICKLE, RECORDS = (
        _archive.read("types/data.pkl"),
        {name.removeprefix("types/"): _archive.read(name) for name in _archive.namelist() if "/data/" in name},
    )


@pytest.mark.filterwarnings("ignore:invalid")  # escape sequences, in texts of a kind that is refused
@settings(max_examples=150)
@given(at=st.integers(2, len(PICKLE) - 2), by=st.binary(max_size=3), cut=st.integers(0, 3))
def test_any_damage_to_the_pickle_is_an_error_or_data(tmp_path_factory, at, by, cut):
    """Whatever bytes stand there."""
    path = tmp_path_factory.mktemp("fuzz") / "x.pt"
    write_zip(path, PICKLE[2:at] + by + PICKLE[at + cut : -1], RECORDS)
    try:
        saved = open_torch_zip(path)
    except ValueError:
        return
    assert isinstance(saved, dict | list | tuple | str | int | float | None | TorchTensor)
