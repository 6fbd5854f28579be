"""Checkpoints, written whole or not at all: a folder with config.json and the arrays in Orbax's format.

Nothing appears under the folder's name before all of it is on disk, and a full disk or a kill at any point leaves the
checkpoint that was there before. Hugging Face's format is in huggingface.py.
"""

import contextlib
import errno
import json
import logging
import shutil
from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

CONFIG = "config.json"
STATE = "orbax"
CHECKPOINT_FILES = (CONFIG, STATE, "*.json", "*.safetensors", "merges.txt")  # what either format may consist of


def save_checkpoint(folder: str | Path, config: Mapping[str, Any], state: Any, *, overwrite: bool = False) -> None:
    """Writes a checkpoint.

    Args:
        folder: where to; it appears when everything is written.
        config: what is needed to rebuild the structure of `state`, as JSON.
        state: a pytree of arrays and numbers.
        overwrite: replace the checkpoint that is there.

    Raises:
        FileExistsError: the folder holds something already, and `overwrite` is False or it is no checkpoint.
        OSError: no space is left (`errno.ENOSPC`); an earlier checkpoint is unchanged.
    """
    with whole_folder(folder, overwrite=overwrite) as temporary:
        (temporary / CONFIG).write_text(json.dumps(dict(config), indent=2) + "\n")
        with quiet():
            ocp.save(str(temporary / STATE), state)


def load_checkpoint(folder: str | Path, abstract_state: Any, *, exact: Collection[str] = ()) -> Any:
    """Reads the arrays of a checkpoint straight into the dtypes and shardings asked for.

    Args:
        folder: what `save_checkpoint` wrote.
        abstract_state: the pytree to fill: arrays or `jax.ShapeDtypeStruct`s, on the default device where they name
            no sharding.
        exact: paths of arrays, joined by dots, that must have been saved in the dtype asked for.

    Returns:
        The pytree with the checkpoint's values.

    Raises:
        FileNotFoundError: the folder is missing.
        ValueError: it is no checkpoint, is damaged, or holds other arrays (all of them named) or dtypes than asked for.
    """
    state_folder = str(_checkpoint_folder(folder) / STATE)
    if not ocp.is_orbax_checkpoint(state_folder):
        raise ValueError(f"a checkpoint must hold {CONFIG} and {STATE}/ as save_checkpoint writes them; got {folder}")
    with _naming_damage(folder):
        metadata = ocp.metadata(state_folder).metadata
    if metadata is None:
        raise ValueError(f"the checkpoint {folder} is damaged or incomplete: its arrays cannot be listed")
    wanted, found = _leaves(abstract_state), _leaves(metadata)
    check_tensors(folder, expected=_shapes(wanted), found=_shapes(found))
    for name in exact:
        if found[name].dtype != wanted[name].dtype:
            got = f"{found[name].dtype}: it is damaged"
            raise ValueError(f"{name} in {folder} must be of dtype {wanted[name].dtype}; got {got}")

    def place(leaf: Any) -> Any:
        if not hasattr(leaf, "dtype"):
            return leaf
        sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.devices()[0])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    with _naming_damage(folder):
        return ocp.load(state_folder, jax.tree.map(place, abstract_state))


@contextlib.contextmanager
def _naming_damage(folder: str | Path) -> Iterator[None]:
    """Makes a ValueError of what Orbax raises for a file that it cannot read: no class of its own."""
    try:
        with quiet():
            yield
    except (jax.errors.JaxRuntimeError, MemoryError):  # the device's, the host's
        raise
    except Exception as error:
        raise ValueError(f"the checkpoint {folder} is damaged or incomplete: {str(error)[:500]}") from error


def load_config(folder: str | Path) -> dict[str, Any]:
    """The configuration beside a checkpoint's arrays.

    Raises:
        FileNotFoundError: the folder or its config.json is missing.
        ValueError: config.json is not a JSON object.
    """
    path = _checkpoint_folder(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"a checkpoint folder must hold {CONFIG}; {folder} does not")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} must hold JSON; {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object; got {type(config).__name__}")
    return config


def is_checkpoint(folder: str | Path) -> bool:
    """Whether the folder holds what `save_checkpoint` writes (and not, say, Hugging Face's files)."""
    restore_interrupted(Path(folder))
    return (Path(folder) / STATE).is_dir() and (Path(folder) / CONFIG).is_file()


def check_tensors(where: str | Path, *, expected: Mapping[str, tuple], found: Mapping[str, tuple]) -> None:
    """Compares the shapes a checkpoint holds with those a model needs.

    Raises:
        ValueError: they differ; names every missing, extra and misshapen tensor.
    """
    problems = [f"missing {name} {shape}" for name, shape in expected.items() if name not in found]
    problems += [f"extra {name} {shape}" for name, shape in found.items() if name not in expected]
    problems += [
        f"misshapen {name}: expected {shape}, found {found[name]}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        raise ValueError(f"tensors in {where} do not fit the model:\n  " + "\n  ".join(problems))


@contextlib.contextmanager
def whole_folder(folder: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Gives an empty folder to write into, which becomes `folder` if the block ends well and vanishes if it does not.

    Raises:
        FileExistsError: `folder` holds something already, and `overwrite` is False or it is not just a checkpoint.
        OSError: no space is left (`errno.ENOSPC`).
    """
    folder = Path(folder).expanduser().absolute()
    restore_interrupted(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not overwrite:
            raise FileExistsError(f"the folder must be new or empty; {folder} is not (overwrite=True replaces it)")
        if not (folder / CONFIG).is_file():
            raise FileExistsError(f"only a checkpoint is overwritten, and {folder} holds no {CONFIG}")
        names = sorted(path.name for path in folder.iterdir())
        foreign = [name for name in names if not any(fnmatch(name, pattern) for pattern in CHECKPOINT_FILES)]
        if foreign:
            raise FileExistsError(f"only a checkpoint is overwritten, and {folder} also holds {', '.join(foreign)}")
    temporary, replaced = folder.with_name(f".{folder.name}.writing"), _replaced(folder)
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # what a killed run left
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        if folder.exists():
            folder.rename(replaced)
        temporary.rename(folder)
        if replaced.exists():  # under a name that nothing brings back, should removing it be killed
            replaced.rename(temporary)
        shutil.rmtree(temporary, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        restore_interrupted(folder)
        if no_space(error):
            raise OSError(
                errno.ENOSPC,
                f"no space left on the device for {folder}; nothing was written there and what was there is "
                "unchanged. Free some space or choose a folder on another disk",
            ) from error
        raise


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps Orbax from logging, once a thread, the exception that it raises anyway."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")


def restore_interrupted(folder: Path) -> None:
    """Undoes a replacement that was killed between its two renames."""
    replaced = _replaced(folder.absolute())
    if replaced.exists() and not folder.exists():
        replaced.rename(folder)


def no_space(error: BaseException) -> bool:
    """Whether an error of Orbax, of safetensors or of the system says that the disk is full."""
    # Orbax and safetensors report a full disk in the text of a ValueError and of an error class of their own.
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)


def _checkpoint_folder(folder: str | Path) -> Path:
    restore_interrupted(Path(folder))
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"no checkpoint folder {folder}")
    return Path(folder).absolute()


def _leaves(tree: Any) -> dict[str, Any]:
    """By their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _shapes(leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(getattr(leaf, "shape", ())) for name, leaf in leaves.items()}
