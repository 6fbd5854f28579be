"""Finds a kernel by its name in KERNELS, or by the path of its file, and says what it lacks."""

import dataclasses
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

import pallas_kernels
from pallas_kernels.case import Case

PARTS = ("Config", "reference", "candidates", "work", "peers", "CASES", "DEVICES")


class KernelError(Exception):
    """A kernel that is not there, or is not written as the workbench needs it. The message is for its author."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel module, seen through what every kernel file provides.

    Attributes:
        name: of the module and of its public function.
        module: provides the function and the names in PARTS.
        origin: how the command line named it.
    """

    name: str
    module: ModuleType
    origin: str

    @property
    def function(self) -> Callable[..., Any]:
        """The public function: `function(*args, config=None, implementation=None)`."""
        return getattr(self.module, self.name)

    @property
    def operation(self) -> str:
        """The one line that says what it computes."""
        return (self.module.__doc__ or "").strip().split("\n")[0]

    @property
    def cases(self) -> tuple[Case, ...]:
        return self.module.CASES

    @property
    def devices(self) -> tuple[str, ...]:
        """GPUs that its Mosaic kernel runs on; empty where it has none."""
        return self.module.DEVICES

    @property
    def dtypes(self) -> tuple[str, ...]:
        """What its cases are made in."""
        return tuple(dict.fromkeys(np.dtype(dtype).name for case in self.cases for dtype in case.dtypes))


def load_kernel(name: str) -> Kernel:
    """Imports a kernel and checks that all its parts are there.

    Args:
        name: one of KERNELS, or the path of a kernel file (a prototype that lives elsewhere).

    Raises:
        KernelError: there is no such kernel, or a part of it is missing.
    """
    if name.endswith(".py"):
        kernel = _load_file(Path(name))
    elif name in pallas_kernels.KERNELS:
        kernel = Kernel(name=name, module=importlib.import_module(f"pallas_kernels.{name}"), origin=name)
    else:
        close = difflib.get_close_matches(name, pallas_kernels.KERNELS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise KernelError(f"kernel must be one of {', '.join(pallas_kernels.KERNELS)}, or a .py file; got {name}{hint}")
    missing = [part for part in (kernel.name, *PARTS) if not hasattr(kernel.module, part)]
    if missing:
        raise KernelError(
            f"{kernel.module.__file__} must define {', '.join(missing)} (`new` writes an example of each)"
        )
    if not kernel.operation:
        raise KernelError(f"{kernel.module.__file__} must start with a docstring: the operation in its first line")
    names = [case.name for case in kernel.cases]
    if not names or len(set(names)) < len(names):
        raise KernelError(f"CASES of {kernel.name} must have distinct names, one at least; got {names}")
    return kernel


def _load_file(path: Path) -> Kernel:
    if not path.is_file():
        raise KernelError(f"kernel file must exist; got {path}")
    module_name = f"kernel_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None  # true of every .py file
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up here
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a prototype raises is a finding
        raise KernelError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return Kernel(name=path.stem, module=module, origin=str(path))
