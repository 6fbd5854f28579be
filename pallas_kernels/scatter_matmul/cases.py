"""What to check and time `scatter_matmul` on: real shapes, their work, and what a user would run instead."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.case import Case, Work
from pallas_kernels.micro_tile_index import MicroTileIndex, micro_tile_index
from pallas_kernels.operands import listed_mask


def work(a, b, index: MicroTileIndex) -> Work:
    """FLOPs and bytes of these very arguments (their counts are read)."""
    (m, _), n, size = a.shape, b.shape[1], a.dtype.itemsize
    mask = listed_mask(index, *a.shape)
    listed, b_rows = int(mask.sum()), int(mask.any(axis=0).sum())
    return Work(flops=2 * n * listed, bytes=size * (listed + b_rows * n + m * n) + 4 * int(index.counts.sum()))


def peers(a, b, index: MicroTileIndex):
    """What a user would run instead: the dense product, for float32 at the same precision, and as TF32."""
    del b, index
    dense = {"dense": lambda a, b, index: jnp.dot(a, b, precision=lax.Precision.HIGHEST)}
    if a.dtype == jnp.float32:
        dense["tf32"] = lambda a, b, index: jnp.dot(a, b, precision="tensorfloat32")
    return dense


def random_index(
    key: jax.Array, length: int, width: int, *, rows: int, cols: int, densities: tuple[float, ...]
) -> MicroTileIndex:
    """An index of X [length, width] whose blocks take the densities in turn; entries after each count are poisoned."""
    key_mask, key_poison = jax.random.split(key)
    entries, blocks = -(-length // cols), -(-width // rows)
    density = jnp.resize(jnp.asarray(densities, jnp.float32), (blocks,))
    mask = jax.random.uniform(key_mask, (entries, blocks)) < density[None]
    index = micro_tile_index(mask, rows=1)  # an element of the mask is a micro-tile of X
    poison = jax.random.randint(key_poison, (blocks, entries), -(2**31), 2**31 - 1)
    valid = jnp.arange(entries)[None] < index.counts[:, None]
    return dataclasses.replace(index, indices=jnp.where(valid, index.indices, poison), rows=rows, cols=cols)


ALL = ("bfloat16", "float16", "float32")
HALF = ("bfloat16", "float16")  # float32, six products for one, is interpreted where a case is tiny


def _case(
    name: str, *, m: int, n: int, k: int, width: int, densities: tuple[float, ...], cols=1, dtypes=ALL, **flags: bool
) -> Case:
    """A matrix A that is zero where it is not listed."""

    def make(key: jax.Array, dtype: jnp.dtype):
        key_a, key_b, key_index = jax.random.split(key, 3)
        index = random_index(key_index, m, k, rows=width, cols=cols, densities=densities)
        a = jnp.where(listed_mask(index, m, k), jax.random.normal(key_a, (m, k), dtype), 0)
        return a, jax.random.normal(key_b, (k, n), dtype), index

    return Case(name=name, make=make, dtypes=dtypes, **flags)


def _cube(width: int, density: float) -> Case:
    name = f"4096 cubed, 1x{width if width < 4096 else 'K'}, {100 - 100 * density:g}% sparse"
    dtypes = ("bfloat16", "float32")
    return _case(name, m=4096, n=4096, k=4096, width=width, densities=(density,), dtypes=dtypes, bench=True)


CASES = (
    _case("one tile", m=64, n=128, k=64, width=64, densities=(0.5,), small=True),
    _case("ragged lists", m=150, n=140, k=200, width=64, densities=(0.1, 0.0, 0.3), dtypes=HALF, small=True),
    _case("more listed than is stored", m=80, n=72, k=96, width=32, densities=(1.0, 0.5), dtypes=HALF, small=True),
    _case("a row in many lists, width 32", m=40, n=72, k=96, width=32, densities=(0.3,), small=True),
    _case("whole rows", m=200, n=136, k=192, width=192, densities=(0.5,), dtypes=HALF, small=True),
    _case("nothing listed", m=20, n=64, k=128, width=64, densities=(0.0,), dtypes=HALF, small=True),
    _case("width 1", m=61, n=37, k=53, width=1, densities=(0.0, 0.1, 1.0)),
    _case("width 100, two chunks of list", m=530, n=72, k=250, width=100, densities=(0.6, 0.02, 1.0)),
    _case("32 rows a list entry, the last ones fewer", m=330, n=72, k=128, width=64, cols=32, densities=(0.3,)),
    _case("opt-125m fc1, 5% of the tokens", m=1024, n=3072, k=768, width=768, densities=(0.05,)),
    *(_cube(4096, density) for density in (0.5, 0.1, 0.01)),
    *(_cube(64, density) for density in (0.1, 0.05, 0.01)),
    _cube(32, 0.01),
    _cube(128, 0.05),
)
