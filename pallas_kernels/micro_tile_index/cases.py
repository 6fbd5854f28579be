"""What to test and time `micro_tile_index` on, and what to compare it with."""

import jax
import jax.numpy as jnp

from pallas_kernels.case import Case, Work

ROWS = (1, 8, 16, 32, 64, 128)


def work(a_t, rows: int, cols: int = 1) -> Work:
    """A comparison a value; the values read once, the lists written in full."""
    k, m = a_t.shape
    lists = -(-m // rows)
    return Work(flops=k * m, bytes=k * m * a_t.dtype.itemsize + 4 * lists * (-(-k // cols) + 1))


def _case(name: str, *, m: int, k: int, rows: int, density: float, cols: int = 1, **flags) -> Case:
    def make(key: jax.Array, dtype: jnp.dtype):
        key_values, key_mask = jax.random.split(key)
        mask = jax.random.uniform(key_mask, (k, m)) < density
        return jnp.where(mask, jax.random.normal(key_values, (k, m), jnp.float32), 0).astype(dtype), rows, cols

    return Case(name=name, make=make, dtypes=("bfloat16", "float16", "float32"), gradient=False, **flags)


CASES = (
    _case("empty", m=64, k=33, rows=16, density=0.0, small=True),
    _case("full", m=64, k=33, rows=16, density=1.0, small=True),
    _case("ragged", m=131, k=257, rows=64, density=0.01, small=True),
    *(_case(f"rows {rows}", m=5 * rows - rows // 2, k=65, rows=rows, density=0.02, small=True) for rows in ROWS),
    *(_case(f"32x{cols}", m=300, k=129, rows=32, cols=cols, density=0.002, small=True) for cols in (32, 64, 128)),
    _case("opt-1.3b fc1 output", m=2048, k=8192, rows=128, density=0.001, bench=True),
    _case("opt-30b fc1 output", m=4224, k=28672, rows=128, density=0.001, bench=True),
    *(
        _case(f"4096 squared, {rows}x{cols}", m=4096, k=4096, rows=rows, cols=cols, density=0.001, bench=True)
        for rows, cols in ((128, 1), (64, 1), (32, 1), (1, 64), (32, 64), (128, 128))
    ),
)
