"""What every model's configuration makes sure of."""

import dataclasses
from typing import Any

DTYPES = ("bfloat16", "float16", "float32")


def normalise(config: Any) -> None:
    """Turns numbers and arrays of numpy and JAX among the fields into Python's: what config.json can hold."""
    for field in dataclasses.fields(config):
        object.__setattr__(config, field.name, _python(getattr(config, field.name)))


def _python(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(map(_python, value))
    return value.tolist() if hasattr(value, "tolist") else value


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
