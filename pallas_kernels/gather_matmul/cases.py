"""What to check and time `gather_matmul` on: real shapes, their work, and what a user would run instead."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.case import Case, Work
from pallas_kernels.micro_tile_index import MicroTileIndex, micro_tile_index


def work(a_t, b, index: MicroTileIndex) -> Work:
    """FLOPs and bytes of these very arguments (their counts are read)."""
    m, n, size = a_t.shape[1], b.shape[1], a_t.dtype.itemsize
    mask = index.mask()
    rows = jnp.minimum(index.rows, m - jnp.arange(mask.shape[0]) * index.rows)
    listed = float(jnp.sum(index.counts.astype(jnp.float32) * rows.astype(jnp.float32)))
    b_rows = float(mask.any(axis=0).sum())
    return Work(flops=2 * n * listed, bytes=size * (listed + b_rows * n + m * n) + 4 * float(index.counts.sum()))


def peers(a_t, b, index: MicroTileIndex):
    """What a user would run instead: the dense product, for float32 at the same precision, and as TF32."""
    del b, index
    dense = {"dense": lambda a_t, b, index: jnp.dot(a_t.T, b, precision=lax.Precision.HIGHEST)}
    if a_t.dtype == jnp.float32:
        dense["tf32"] = lambda a_t, b, index: jnp.dot(a_t.T, b, precision="tensorfloat32")
    return dense


ALL = ("bfloat16", "float16", "float32")


def _case(
    name: str, *, m: int, n: int, k: int, rows: int, densities: tuple[float, ...], dtypes=ALL, **flags: bool
) -> Case:
    """A random mask whose blocks take the densities in turn; entries after each count are poisoned."""

    def make(key: jax.Array, dtype: jnp.dtype):
        key_a, key_b, key_mask, key_poison = jax.random.split(key, 4)
        blocks = -(-m // rows)
        density = jnp.resize(jnp.asarray(densities, jnp.float32), (blocks,))
        mask = jax.random.uniform(key_mask, (k, blocks)) < density[None]
        listed = jnp.repeat(mask, rows, axis=1)[:, :m]
        index = micro_tile_index(listed, rows)
        poison = jax.random.randint(key_poison, (blocks, k), -(2**31), 2**31 - 1)
        valid = jnp.arange(k)[None] < index.counts[:, None]
        index = dataclasses.replace(index, indices=jnp.where(valid, index.indices, poison))
        a_t = jnp.where(listed, jax.random.normal(key_a, (k, m), dtype), 0)
        return a_t, jax.random.normal(key_b, (k, n), dtype), index

    return Case(name=name, make=make, dtypes=dtypes, **flags)


def _cube(rows: int, density: float) -> Case:
    name = f"4096 cubed, {rows}x1, {100 - 100 * density:g}% sparse"
    dtypes = ("bfloat16", "float32")
    return _case(name, m=4096, n=4096, k=4096, rows=rows, densities=(density,), dtypes=dtypes, bench=True)


CASES = (
    _case("one tile", m=64, n=128, k=64, rows=64, densities=(0.5,), small=True),
    _case("ragged, empty and full blocks", m=200, n=140, k=150, rows=64, densities=(0.3, 0.0, 1.0), small=True),
    _case("two chunks of index", m=128, n=264, k=300, rows=128, densities=(0.95,), small=True),
    _case("rows 1", m=37, n=61, k=101, rows=1, densities=(0.0, 0.1, 1.0)),
    _case("rows 32", m=100, n=72, k=530, rows=32, densities=(0.5, 0.02, 1.0)),
    _case("opt-125m fc2, 5% dense", m=256, n=768, k=3072, rows=128, densities=(0.05,)),
    *(_cube(rows, density) for rows in (128, 64) for density in (1.0, 0.5, 0.1, 0.01)),
    _case("opt-1.3b fc2, 10% dense", m=2048, n=2048, k=8192, rows=128, densities=(0.1,), bench=True),
    _case(
        "opt-30b fc2, 10% dense", m=4096, n=7168, k=28672, rows=128, densities=(0.1,), dtypes=("bfloat16",), bench=True
    ),
)
