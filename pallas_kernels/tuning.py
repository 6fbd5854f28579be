"""The table of tuned configs: what `python -m pallas_kernels tune` found, looked up by device, kernel and arguments.

A kernel chooses its config in this order: the caller's, the tuned one, its heuristic. One human-readable file a device,
`tuned/nvidia_h200.json`: {kernel: {arguments: {"config": {...}, "cases": {case: {"time_us", "error"}}}}}.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pallas_kernels.tile.device import device_kind

TUNED = Path(__file__).parent / "tuned"


def table_path(kind: str, folder: Path | None = None) -> Path:
    """The file of a device: "NVIDIA H200" -> tuned/nvidia_h200.json."""
    return (folder or TUNED) / (re.sub(r"[^a-z0-9]+", "_", kind.lower()).strip("_") + ".json")


def describe(*args: Any) -> str:
    """The key of these arguments: dtype and shape of every array (tracers and shapes will do), statics by value.

    Static fields of a dataclass among the arguments count too: `.rows64`.
    """
    names = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(args)[0]:
        field = jax.tree_util.keystr(path[1:])  # ".indices" of a dataclass; empty for an argument that is an array
        static = not hasattr(leaf, "shape")
        names.append(
            field + (repr(leaf) if static else f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}".replace(" ", ""))
        )
    for arg in filter(dataclasses.is_dataclass, args):
        fields = {field.name: getattr(arg, field.name) for field in dataclasses.fields(arg)}
        names += [f".{name}{value!r}" for name, value in fields.items() if isinstance(value, int | float | str)]
    return " ".join(names)


def read_table(path: Path) -> dict[str, Any]:
    """The tuned configs of one device; empty where it has none.

    Raises:
        ValueError: the file is not JSON.
    """
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} must be JSON; {error}. Delete it and run `tune` again") from error


_read_once = functools.cache(read_table)


def tuned_config[C](kernel: str, config_class: type[C], *args: Any) -> C | None:
    """The tuned config for these arguments on the device that is traced for; None where nobody tuned them.

    Args:
        kernel: its name.
        config_class: the kernel's `Config`.
        *args: the kernel's arguments; only shapes, dtypes and static values are read.

    Raises:
        ValueError: the table's fields are no longer those of `config_class`.
    """
    path = table_path(device_kind())
    entry = _read_once(path).get(kernel, {}).get(describe(*args))
    return None if entry is None else load_config(config_class, entry["config"], f"{path.name}, {kernel}")


def choose_config[C](
    kernel: str,
    config_class: type[C],
    arguments: tuple[Any, ...],
    config: C | None,
    implementation: str | None,
    *,
    check: Callable[[C | None], None],
    candidates: Callable[..., list[C]],
) -> C | None:
    """The config that a kernel runs with: the caller's, the tuned one, its heuristic's; None for the xla path.

    Args:
        kernel: its name.
        config_class: its `Config`.
        arguments: the kernel's; only shapes, dtypes and static values are read.
        config: the caller's, or None.
        implementation: as of the kernel.
        check: raises NotImplementedError where the kernel cannot take these arguments or this device, and ValueError
            where the caller's config does not fit them.
        candidates: the kernel's.

    Raises:
        NotImplementedError: what `check` raised, where an implementation was asked for.
        ValueError: the caller's config, or the table's, does not fit.
    """
    if implementation == "xla":
        return None
    try:
        check(config)
        config = config or tuned_config(kernel, config_class, *arguments)
        return config or next(iter(candidates(*arguments)), None)
    except NotImplementedError:
        if implementation is not None:
            raise
        return None


def load_config[C](config_class: type[C], values: dict[str, Any], origin: str) -> C:
    """A config from its values in a table; `origin` says where they come from if they do not fit."""
    fields = {field.name for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    if set(values) != fields:
        raise ValueError(f"{origin}: fields must be {sorted(fields)}; got {sorted(values)}. Run `tune` again")
    return config_class(**values)
