"""Checks that every model's configuration makes."""

from typing import Any

DTYPES = ("bfloat16", "float16", "float32")


def check_sizes(config: Any, *names: str) -> None:
    """Raises ValueError unless these fields are integers of at least 1."""
    for name in names:
        size = getattr(config, name)
        if not (isinstance(size, int) and size >= 1):
            raise ValueError(f"{name} must be an integer of at least 1; got {name}={size!r}")


def check_dtypes(config: Any) -> None:
    """Raises ValueError unless `dtype` and `param_dtype` are known."""
    for name in ("dtype", "param_dtype"):
        if getattr(config, name) not in DTYPES:
            raise ValueError(f"{name} must be one of {', '.join(DTYPES)}; got {getattr(config, name)!r}")
