"""What to check and time `sampled_matmul` on: real shapes, their work, and what a user would run instead."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.case import Case, Work
from pallas_kernels.micro_tile_index import MicroTileIndex
from pallas_kernels.operands import listed_mask
from pallas_kernels.scatter_matmul.cases import random_index


def work(a, b, index: MicroTileIndex) -> Work:
    """FLOPs and bytes of these very arguments (their counts are read)."""
    (length, n), width, size = a.shape, b.shape[0], a.dtype.itemsize
    mask = listed_mask(index, length, width)
    operand_rows = int(mask.any(axis=1).sum()) + int(mask.any(axis=0).sum())
    written = length * width
    return Work(flops=2 * n * int(mask.sum()), bytes=size * (operand_rows * n + written) + 4 * int(index.counts.sum()))


def peers(a, b, index: MicroTileIndex):
    """What a user would run instead: the dense product, for float32 at the same precision, and as TF32."""
    del b, index
    dense = {"dense": lambda a, b, index: jnp.dot(a, b.T, precision=lax.Precision.HIGHEST)}
    if a.dtype == jnp.float32:
        dense["tf32"] = lambda a, b, index: jnp.dot(a, b.T, precision="tensorfloat32")
    return dense


ALL = ("bfloat16", "float16", "float32")
HALF = ("bfloat16", "float16")  # float32, six products for one, is interpreted where a case is tiny


def _case(
    name: str,
    *,
    length: int,
    width: int,
    n: int,
    rows: int,
    densities: tuple[float, ...],
    cols: int = 1,
    dtypes=ALL,
    **flags: bool,
) -> Case:
    def make(key: jax.Array, dtype: jnp.dtype):
        key_a, key_b, key_index = jax.random.split(key, 3)
        index = random_index(key_index, length, width, rows=rows, cols=cols, densities=densities)
        return jax.random.normal(key_a, (length, n), dtype), jax.random.normal(key_b, (width, n), dtype), index

    return Case(name=name, make=make, dtypes=dtypes, **flags)


def _cube(rows: int, density: float) -> Case:
    name = f"4096 cubed, 1x{rows}, {100 - 100 * density:g}% sparse"
    dtypes = ("bfloat16", "float32")
    return _case(name, length=4096, width=4096, n=4096, rows=rows, densities=(density,), dtypes=dtypes, bench=True)


CASES = (
    _case("one tile", length=64, width=64, n=128, rows=64, densities=(0.5,), small=True),
    _case(
        "ragged, empty and full lists",
        length=150,
        width=200,
        n=140,
        rows=64,
        densities=(0.3, 0.0, 1.0),
        dtypes=HALF,
        small=True,
    ),
    _case(
        "two chunks of list", length=300, width=256, n=72, rows=128, densities=(0.95,), dtypes=HALF
    ),  # of the xla path
    _case("rows 32", length=40, width=96, n=72, rows=32, densities=(0.7,), small=True),
    _case("whole rows", length=100, width=192, n=136, rows=192, densities=(0.5,), dtypes=HALF, small=True),
    _case("nothing listed", length=64, width=128, n=64, rows=64, densities=(0.0,), dtypes=HALF, small=True),
    _case("rows 1", length=61, width=37, n=53, rows=1, densities=(0.0, 0.1, 1.0)),
    _case("rows 100", length=530, width=250, n=72, rows=100, densities=(0.6, 0.02, 1.0)),
    _case("32 l an entry, the last ones fewer", length=330, width=128, n=72, rows=64, cols=32, densities=(0.3,)),
    _case("opt-125m, gradient of fc2, 5% dense", length=3072, width=256, n=768, rows=128, densities=(0.05,)),
    *(_cube(128, density) for density in (0.5, 0.1, 0.01)),
    _cube(64, 0.1),
)
