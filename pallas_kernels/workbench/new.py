"""Starts a new kernel: a small working one under its name, and its place in the list."""

import ast
import builtins
import keyword
import re
from pathlib import Path

import pallas_kernels
from pallas_kernels.workbench.kernels import KernelError

TEMPLATE = Path(__file__).parent / "template.py"
PLACEHOLDER = "kernel_name"
PACKAGE = Path(pallas_kernels.__file__).parent


def new_kernel(name: str, folder: Path | None = None) -> Path:
    """Writes NAME.py, a kernel that passes `check` as it is.

    Args:
        name: of the module and of its public function, in snake_case.
        folder: where to; None means into pallas_kernels itself, with NAME added to KERNELS.

    Returns:
        The path of the new file.

    Raises:
        KernelError: the name will not do, the file is there already, or the folder cannot be written.
    """
    source = TEMPLATE.read_text()
    _check_name(name, source)
    path = (folder or PACKAGE) / f"{name}.py"
    if path.exists() or path.with_suffix("").exists():
        raise KernelError(f"name must be new; {path} or a folder of that name exists")
    try:
        path.write_text(re.sub(rf"\b{PLACEHOLDER}\b", name, source))
        if folder is None:
            _add_to_list(PACKAGE / "__init__.py", name, path)
    except OSError as error:
        raise KernelError(
            f"{path.parent} must be a folder that can be written ({error}); give --folder FOLDER"
        ) from error
    return path


def _check_name(name: str, source: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise KernelError(f"name must be a Python name in snake_case, like grouped_matmul; got {name!r}")
    words = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    words |= {node.arg for node in ast.walk(ast.parse(source)) if isinstance(node, ast.arg)}
    words |= {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}
    if name in words - {PLACEHOLDER} or hasattr(builtins, name):
        raise KernelError(f"name must not be one that every kernel file uses itself, or Python does; got {name!r}")


def _add_to_list(init: Path, name: str, path: Path) -> None:
    try:
        init.write_text(with_kernel(init.read_text(), name))
    except (OSError, KernelError):
        path.unlink()
        raise


def with_kernel(source: str, name: str) -> str:
    """The text of __init__.py with `name` added to its KERNELS, which it must assign as a tuple of names.

    Raises:
        KernelError: it does not.
    """
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "KERNELS":
            names = [*ast.literal_eval(node.value), name]
            listed = f"KERNELS = ({', '.join(f'"{n}"' for n in names)}{',' if len(names) == 1 else ''})"
            if len(listed) > 120:
                listed = "\n".join(["KERNELS = (", *(f'    "{n}",' for n in names), ")"])
            lines = source.split("\n")
            assert node.end_lineno is not None  # ast.parse gives every statement its last line
            return "\n".join([*lines[: node.lineno - 1], listed, *lines[node.end_lineno :]])
    raise KernelError("pallas_kernels/__init__.py must assign KERNELS, a tuple of names")
