"""Kernels that tests put on the workbench: one that needs no GPU, and the one that `new` writes, broken by hand."""

from pathlib import Path

from pallas_kernels.workbench.gpus import GPUS
from pallas_kernels.workbench.kernels import Kernel, load_kernel
from pallas_kernels.workbench.new import new_kernel

H200, A100, B200 = (next(gpu for gpu in GPUS if gpu.kind.endswith(kind)) for kind in ("H200", "A100", "B200"))

# A kernel without a GPU: y = 2 x, by configs that are right, wrong, or crash.
DOUBLE = '''"""y = 2 * x."""
import dataclasses
import jax
from pallas_kernels.case import Case, Work

DEVICES = ()

@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    way: str

def reference(x):
    return 2 * x

def candidates(x):
    return [Config(way=way) for way in ("slow", "wrong", "crash", "fast")]

def work(x):
    return Work(flops=x.size, bytes=4 * x.size)

def peers(x):
    return {"dense": lambda x: x + x}

CASES = tuple(
    Case(name=name, make=lambda key, dtype, scale=scale: (scale * jax.random.normal(key, (8,), dtype),),
         dtypes=("float32",), bench=True)
    for name, scale in (("low", 1), ("high", 10))
)

def double(x, *, config=None, implementation=None):
    if config is not None and config.way == "crash":
        raise ValueError("no such way")
    return (3 if config is not None and config.way == "wrong" else 2) * x
'''


def write_double(folder: Path, edit: tuple[str, str] = ("", "")) -> Kernel:
    assert edit[0] in DOUBLE
    path = folder / "double.py"
    path.write_text(DOUBLE.replace(*edit))
    return load_kernel(str(path))


def broken_template(folder: Path, *edits: tuple[str, str]) -> Kernel:
    """The kernel that `new` writes, with something broken by hand."""
    path = new_kernel("broken", folder)
    source = path.read_text()
    for old, new in edits:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    path.write_text(source)
    return load_kernel(str(path))
