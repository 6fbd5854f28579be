"""What to check and time `gather_matmul` on: real shapes, their work, and what a user would run instead."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.case import Case, Work
from pallas_kernels.micro_tile_index import MicroTileIndex, micro_tile_index


def work(a_t, b, index: MicroTileIndex, zero_elsewhere: bool = False) -> Work:
    """FLOPs and bytes of these very arguments (their counts are read)."""
    del zero_elsewhere
    (k, m), n, size = a_t.shape, b.shape[1], a_t.dtype.itemsize
    out_cols = index.out_cols or n
    mask = jnp.repeat(index.mask(), index.cols, axis=1)[:, :k].reshape(-(-m // index.rows), -1, k)
    rows = jnp.minimum(index.rows, m - jnp.arange(mask.shape[0]) * index.rows).astype(jnp.float32)
    columns = jnp.minimum(out_cols, n - jnp.arange(mask.shape[1]) * out_cols).astype(jnp.float32)
    listed = jnp.einsum("ijk,i,j->", mask.astype(jnp.float32), rows, columns)
    read_a = jnp.einsum("ik,i->", mask.any(axis=1).astype(jnp.float32), rows)
    read_b = jnp.einsum("jk,j->", mask.any(axis=0).astype(jnp.float32), columns)
    entries = float(index.counts.sum())
    return Work(flops=2 * float(listed), bytes=size * (float(read_a) + float(read_b) + m * n) + 4 * entries)


def peers(a_t, b, index: MicroTileIndex, zero_elsewhere: bool = False):
    """What a user would run instead: the dense product, for float32 at the same precision, and as TF32."""
    del b, index, zero_elsewhere
    dense = {"dense": lambda a_t, b, *_: jnp.dot(a_t.T, b, precision=lax.Precision.HIGHEST)}
    if a_t.dtype == jnp.float32:
        dense["tf32"] = lambda a_t, b, *_: jnp.dot(a_t.T, b, precision="tensorfloat32")
    return dense


ALL = ("bfloat16", "float16", "float32")


def _case(
    name: str,
    *,
    m: int,
    n: int,
    k: int,
    rows: int,
    densities: tuple[float, ...],
    cols: int = 1,
    out_cols: int | None = None,
    zero_elsewhere: bool = False,
    dtypes=ALL,
    **flags: bool,
) -> Case:
    """A random mask whose lists take the densities in turn; entries after each count are poisoned."""

    def make(key: jax.Array, dtype: jnp.dtype):
        key_a, key_b, key_mask, key_poison = jax.random.split(key, 4)
        blocks, across, length = -(-m // rows), -(-n // out_cols) if out_cols else 1, -(-k // cols)
        density = jnp.resize(jnp.asarray(densities, jnp.float32), (blocks * across,))
        mask = jax.random.uniform(key_mask, (length, blocks * across)) < density[None]
        listed = mask.reshape(length, blocks, across).any(axis=2)
        listed = jnp.repeat(jnp.repeat(listed, cols, axis=0)[:k], rows, axis=1)[:, :m]
        index = micro_tile_index(mask, 1)
        poison = jax.random.randint(key_poison, (blocks * across, length), -(2**31), 2**31 - 1)
        valid = jnp.arange(length)[None] < index.counts[:, None]
        indices = jnp.where(valid, index.indices, poison)
        index = dataclasses.replace(index, indices=indices, rows=rows, cols=cols, out_cols=out_cols)
        a_t = jnp.where(listed, jax.random.normal(key_a, (k, m), dtype), 0)
        return a_t, jax.random.normal(key_b, (k, n), dtype), index, zero_elsewhere

    return Case(name=name, make=make, dtypes=dtypes, **flags)


def _cube(rows: int, density: float, cols: int = 1) -> Case:
    name = f"4096 cubed, {rows}x{cols}, {100 - 100 * density:g}% sparse"
    dtypes = ("bfloat16", "float32") if cols == 1 else ("bfloat16",)
    return _case(
        name, m=4096, n=4096, k=4096, rows=rows, cols=cols, densities=(density,), zero_elsewhere=True, dtypes=dtypes,
        bench=True,
    )  # fmt: skip


CASES = (
    _case("one tile", m=64, n=128, k=64, rows=64, densities=(0.5,), small=True),
    _case("ragged, empty and full blocks", m=200, n=140, k=150, rows=64, densities=(0.3, 0.0, 1.0), small=True),
    _case("two chunks of index", m=128, n=264, k=300, rows=128, densities=(0.95,), small=True),
    _case(
        "dense, mixed and sparse tiles",
        m=300,
        n=140,
        k=150,
        rows=64,
        densities=(1.0, 1.0, 0.3, 1.0, 0.0),
        zero_elsewhere=True,
        small=True,
    ),
    _case("64x64", m=200, n=264, k=200, rows=64, cols=64, densities=(0.5, 0.0, 1.0), small=True),
    _case(
        "128x128, dense or sparse",
        m=300,
        n=140,
        k=300,
        rows=128,
        cols=128,
        densities=(0.5, 1.0, 0.0),
        zero_elsewhere=True,
        small=True,
    ),
    _case(
        "a list for each block of C",
        m=200,
        n=300,
        k=300,
        rows=128,
        cols=128,
        out_cols=128,
        densities=(0.5, 0.0, 1.0),
        small=True,
    ),
    _case("few columns", m=136, n=40, k=150, rows=128, densities=(0.5, 1.0), zero_elsewhere=True),
    _case("rows 1", m=37, n=61, k=101, rows=1, densities=(0.0, 0.1, 1.0)),
    _case("rows 32", m=100, n=72, k=530, rows=32, densities=(0.5, 0.02, 1.0)),
    _case("32x32, lists for 24 columns", m=100, n=72, k=530, rows=32, cols=32, out_cols=24, densities=(0.5, 0.02, 1.0)),
    _case("opt-125m fc2, 5% dense", m=256, n=768, k=3072, rows=128, densities=(0.05,)),
    *(_cube(rows, density) for rows in (128, 64) for density in (1.0, 0.5, 0.1, 0.01)),
    *(_cube(rows, density, rows) for rows in (128, 64) for density in (1.0, 0.5, 0.1, 0.01)),
    _case("opt-1.3b fc2, 10% dense", m=2048, n=2048, k=8192, rows=128, densities=(0.1,), bench=True),
    _case(
        "opt-30b fc2, 10% dense", m=4096, n=7168, k=28672, rows=128, densities=(0.1,), dtypes=("bfloat16",), bench=True
    ),
)
