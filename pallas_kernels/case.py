"""What a kernel file says about itself for others to check and time it: named cases, work, and the error metric."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

TOLERANCES = {"bfloat16": 1e-2, "float16": 1e-2, "float32": 1e-5, "float8_e4m3fn": 1e-2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A named set of arguments, real enough to test and to time.

    Attributes:
        name: says what is special about it ("ragged", "4096_s90").
        make: `make(key, dtype)` gives the arguments; those that are not arrays are static. Traceable, so that a kernel
            can be lowered for a case without making it.
        dtypes: what it is made in.
        small: quick enough for the interpreter with race detection on a CPU (seconds).
        bench: worth tuning for and timing on a GPU. Where it is not small as well, it is left out on a CPU.
        gradient: differentiated, if the kernel gives floating-point values.
    """

    name: str
    make: Callable[[jax.Array, Any], tuple[Any, ...]]
    dtypes: tuple[DTypeLike, ...] = ("bfloat16", "float16", "float32")
    small: bool = False
    bench: bool = False
    gradient: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What an operation costs at least: each input read once, each output written once.

    Attributes:
        flops: floating-point operations.
        bytes: bytes of device memory moved.
    """

    flops: int | float
    bytes: int | float


def tolerance(dtype: DTypeLike) -> float:
    """The largest relative RMS error that counts as right in this dtype.

    Raises:
        ValueError: nothing is agreed for this dtype.
    """
    name = np.dtype(dtype).name
    if name not in TOLERANCES:
        raise ValueError(f"dtype must be one of {', '.join(TOLERANCES)}; got {name}")
    return TOLERANCES[name]


def relative_error(out: Any, ref: Any) -> float:
    """The RMS of `out - ref` over the RMS of `ref`, in float64: the largest over the arrays of a pytree.

    Integers and booleans have to be equal. Anything not finite in either, or any difference from a `ref` that is all
    zero, is infinitely wrong.

    Raises:
        ValueError: the trees or the shapes differ.
    """
    out_leaves, out_tree = jax.tree.flatten(out)
    ref_leaves, ref_tree = jax.tree.flatten(ref)
    if out_tree != ref_tree:
        raise ValueError(f"out must have the structure of ref, {ref_tree}; got {out_tree}")
    return max((_leaf_error(o, r) for o, r in zip(out_leaves, ref_leaves, strict=True)), default=0.0)


def _leaf_error(out: Any, ref: Any) -> float:
    out, ref = np.asarray(out), np.asarray(ref)
    if out.shape != ref.shape:
        raise ValueError(f"out must have the shape of ref, {ref.shape}; got {out.shape}")
    if not jax.dtypes.issubdtype(ref.dtype, np.inexact):
        return 0.0 if np.array_equal(out, ref) else math.inf
    out, ref = out.astype(np.float64), ref.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):  # inf - inf: a NaN, and so a failure, without a warning
        difference, scale = float(np.linalg.norm(out - ref)), float(np.linalg.norm(ref))
    if difference == 0:
        return 0.0
    error = difference / scale if scale > 0 else math.inf
    return error if math.isfinite(error) else math.inf
