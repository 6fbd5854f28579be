"""What to check and time `layer_norm` on: rows of a decode step, their work, and XLA's launches."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.case import Case, Work
from pallas_kernels.layer_norm.reference import xla


def work(x, scale, bias, addend=None) -> Work:
    """Ten operations a value; x and addend read, sum and norm written, each once."""
    arrays = 2 if addend is None else 4
    parameters = sum(a.size * a.dtype.itemsize for a in (scale, bias))
    return Work(flops=10 * x.size, bytes=arrays * x.size * x.dtype.itemsize + parameters)


def peers(x, scale, bias, addend=None):
    """What XLA makes of it."""
    del x, scale, bias, addend
    return {"xla": lambda x, scale, bias, addend=None: xla(x, scale, bias, addend, epsilon=1e-5)}


def _case(
    name: str, *, rows: int, d: int, addend: bool = True, parameters: str | None = None, dtypes=("bfloat16",), **flags
) -> Case:
    """Scale and bias are of dtype `parameters`; None for that of x."""

    def make(key: jax.Array, dtype: jnp.dtype):
        keys = jax.random.split(key, 4)
        normal = functools.partial(jax.random.normal, dtype=dtype)
        of_d = functools.partial(jax.random.normal, shape=(d,), dtype=dtype if parameters is None else parameters)
        x, scale, bias = 3 * normal(keys[0], (rows, d)) + 1, of_d(keys[1]), of_d(keys[2])
        return (x, scale, bias, normal(keys[3], (rows, d))) if addend else (x, scale, bias)

    return Case(name=name, make=make, dtypes=dtypes, **flags)


CASES = (
    _case("narrow", rows=3, d=256, dtypes=("bfloat16", "float16", "float32"), small=True),
    _case("no addend", rows=2, d=384, addend=False, parameters="float32", small=True),
    _case("any width", rows=5, d=41, gradient=False),
    *(_case(f"opt-30b, {rows} rows", rows=rows, d=7168, bench=True) for rows in (1, 8, 32)),
    _case("opt-30b, 8 rows, no addend", rows=8, d=7168, addend=False, bench=True),
    *(_case(f"opt-175b, {rows} rows", rows=rows, d=12288, bench=True) for rows in (1, 32)),
)
