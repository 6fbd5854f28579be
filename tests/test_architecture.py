"""The house: imports point downwards only, and the library opens quickly on a machine without a GPU."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("experiments", "models", "sparsellm", "pallas_kernels")  # from the top down
OPTIONAL = {"grain", "tokenizers", "huggingface_hub", "matplotlib", "rich", "tyro"}
MODULES = [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]


def imported_packages(path: Path, *, nested: bool) -> set[str]:
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree) if nested else _at_import(tree.body):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written from the package down, not relative"
            found.add((node.module or "").partition(".")[0])
    return found


def _at_import(body: list[ast.stmt]):
    """The statements that run on import: not those in functions, nor those for type checkers only."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            yield from _at_import(node.body + node.orelse)
        elif isinstance(node, ast.Try | ast.With | ast.ClassDef):
            yield from _at_import(node.body)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards_only(path):
    floor = FLOORS.index(path.relative_to(ROOT).parts[0])
    above = imported_packages(path, nested=True) & set(FLOORS[:floor])
    assert not above, f"{FLOORS[floor]} knows nothing of {above}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_lower_floors_need_core_dependencies_only(path):
    if path.relative_to(ROOT).parts[0] != "experiments":
        assert not imported_packages(path, nested=False) & OPTIONAL


def test_importing_sparsellm_is_quick_and_touches_no_device():
    script = f"""
import sys, time
start = time.perf_counter()
import sparsellm
assert time.perf_counter() - start < 1.0, time.perf_counter() - start
import sparsellm.text, sparsellm.micro_tiles, sparsellm.training, sparsellm.generation, sparsellm.checkpoint
import jax
assert not jax._src.xla_bridge._backends, "a device was initialised"
print(*({OPTIONAL - {"rich"}!r} & set(sys.modules)))  # flax imports rich by itself where it is installed
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.split()


def test_every_module_can_be_the_first_that_is_imported():
    """A circle of imports shows only where it is entered."""
    script = """
import importlib, pkgutil, sys
import models, sparsellm
for package in (models, sparsellm):
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        for name in [name for name in sys.modules if name.partition(".")[0] in ("models", "sparsellm")]:
            del sys.modules[name]
        if module.name != "sparsellm.lm_eval_adapter":  # an extra's
            importlib.import_module(module.name)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
