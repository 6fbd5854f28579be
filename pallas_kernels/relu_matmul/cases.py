"""What to check and time `relu_matmul` on: real shapes, their work, and what a user would run instead."""

import math
import statistics

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.case import Case, Work
from pallas_kernels.micro_tile_index import micro_tile_index


def work(x, w, bias, rows: int, mask=None) -> Work:
    """One product; every operand read once, H.T and the lists written in full."""
    (tokens, d_model), d_ff, size = x.shape, w.shape[1], x.dtype.itemsize
    read = size * (x.size + w.size) + sum(a.size * a.dtype.itemsize for a in (bias, mask) if a is not None)
    written = size * d_ff * tokens + 4 * -(-tokens // rows) * (d_ff + 1)
    return Work(flops=2 * tokens * d_model * d_ff, bytes=read + written)


def peers(x, w, bias, rows: int, mask=None):
    """What a user would run instead: the layer without any index, and the k-major layer with a second pass for it."""
    del x, w, bias, rows, mask

    def dense(x, w, bias, rows, mask=None):
        h = jnp.dot(x, w, precision=lax.Precision.HIGHEST)
        h = jax.nn.relu(h if bias is None else h + bias[None])
        return h if mask is None else jnp.where(mask[:, None], h, 0)

    def two_passes(x, w, bias, rows, mask=None):
        h_t = jnp.einsum("td,df->ft", x, w, precision=lax.Precision.HIGHEST)
        h_t = jax.nn.relu(h_t if bias is None else h_t + bias[:, None])
        h_t = h_t if mask is None else jnp.where(mask[None], h_t, 0)
        return h_t, micro_tile_index(h_t, rows)

    return {"dense": dense, "two_passes": two_passes}


ALL = ("bfloat16", "float16", "float32")


def _threshold(density: float, rows: int, d_model: int) -> float:
    """The bias that leaves so many micro-tiles live: x @ w has about the deviation sqrt(d_model) / 3."""
    if density in (0, 1):
        return d_model * (2 * density - 1)  # more than any product
    all_dead = (1 - density) ** (1 / rows)
    return -math.sqrt(d_model) / 3 * statistics.NormalDist().inv_cdf(all_dead)


def _case(
    name: str,
    *,
    tokens: int,
    d_model: int,
    d_ff: int,
    rows: int,
    densities: tuple[float, ...],
    bias: bool = True,
    masked: bool = False,
    dtypes=ALL,
    **flags: bool,
) -> Case:
    """Neurons take the densities in turn. Values are multiples of 1/128, so that a sum is exact in any order: what is
    live does not depend on rounding."""

    def values(key, shape, dtype):
        return (jax.random.randint(key, shape, -127, 128) / 128).astype(dtype)

    def make(key: jax.Array, dtype: jnp.dtype):
        key_x, key_w, key_mask = jax.random.split(key, 3)
        x, w = values(key_x, (tokens, d_model), dtype), values(key_w, (d_model, d_ff), dtype)
        thresholds = [round(64 * _threshold(density, rows, d_model)) / 64 for density in densities]
        biases = jnp.resize(jnp.asarray(thresholds, dtype), (d_ff,)) if bias else None
        real = jax.random.uniform(key_mask, (tokens,)) < 0.8
        return x, w, biases, rows, real.at[: 2 * rows].set(False) if masked else None

    return Case(name=name, make=make, dtypes=dtypes, **flags)


def _cube(rows: int) -> Case:
    return _case(
        f"4096 cubed, {rows}x1, 90% sparse", tokens=4096, d_model=4096, d_ff=4096, rows=rows, densities=(0.1,),
        dtypes=("bfloat16",), bench=True,
    )  # fmt: skip


CASES = (
    _case("one tile", tokens=64, d_model=64, d_ff=128, rows=64, densities=(0.5,), bias=False, small=True),
    _case("ragged", tokens=136, d_model=150, d_ff=140, rows=64, densities=(0.3, 0.0, 1.0), small=True),
    _case("padding", tokens=150, d_model=72, d_ff=72, rows=32, densities=(0.3, 0.0, 1.0), masked=True, small=True),
    _case("rows 8", tokens=100, d_model=72, d_ff=40, rows=8, densities=(0.3, 0.0, 1.0)),
    _case("rows 1", tokens=37, d_model=61, d_ff=53, rows=1, densities=(0.1, 0.0, 1.0)),
    _case("opt-125m fc1, 95% sparse", tokens=512, d_model=768, d_ff=3072, rows=32, densities=(0.05,), masked=True),
    *(_cube(rows) for rows in (128, 64, 32)),
    _case("opt-1.3b fc1, 90% sparse", tokens=2048, d_model=2048, d_ff=8192, rows=128, densities=(0.1,), bench=True),
    _case(
        "opt-30b fc1, 90% sparse", tokens=4096, d_model=7168, d_ff=28672, rows=128, densities=(0.1,),
        dtypes=("bfloat16",), bench=True,
    ),
)  # fmt: skip
