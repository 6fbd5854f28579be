"""Checks that experiments make of their options before anything else: each raises ValueError, and names the option."""

from collections.abc import Sequence
from typing import Any


def check_filled(config: Any, *names: str) -> None:
    """These options hold something each."""
    for name in names:
        if not getattr(config, name):
            raise ValueError(f"{name} must hold something; got none")


def check_least(config: Any, least: int, *names: str) -> None:
    """These options, or all that they hold, are at least this; None is left alone."""
    for name in names:
        value = getattr(config, name)
        if not all(one is None or one >= least for one in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{name} must be at least {least}; got {name}={value}")


def check_known(config: Any, name: str, known: Sequence[str]) -> None:
    """This option, or all that it holds, is known."""
    value = getattr(config, name)
    if isinstance(value, str):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
    elif unknown := sorted(set(value) - set(known)):
        raise ValueError(f"{name} must be some of {', '.join(known)}; got {', '.join(unknown)}")


def check_shares(config: Any, *names: str, ends: bool = True) -> None:
    """These options, or all that they hold, are shares: 0 to 1, with the ends or without."""
    for name in names:
        value = getattr(config, name)
        shares = value if isinstance(value, tuple) else (value,)
        if not all(0 <= share <= 1 if ends else 0 < share < 1 for share in shares):
            raise ValueError(f"{name} must {'be 0 to 1' if ends else 'lie between 0 and 1'}; got {name}={value}")
