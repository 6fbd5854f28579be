"""What to check and time `unstructured_matmul` on: shapes of Flash-LLM's, its work, and XLA alone."""

import jax
import jax.numpy as jnp

from pallas_kernels.case import Case, Work
from pallas_kernels.unstructured_matmul import layout
from pallas_kernels.unstructured_matmul.reference import finish, xla
from pallas_kernels.unstructured_matmul.weights import UnstructuredWeights


def work(weights, x, bias=None, activation: str | None = None) -> Work:
    """FLOPs of the dense product; bytes of these very weights (how many rows of values they have is read)."""
    del activation
    (rows, columns), n = weights.shape, x.shape[1]
    read = (
        weights.nbytes - weights.values.nbytes + int(weights.rows[-1]) * layout.STREAMS * weights.values.dtype.itemsize
    )
    return Work(
        flops=2 * rows * columns * n,
        bytes=read + x.dtype.itemsize * (x.size + rows * n + (0 if bias is None else rows)),
    )


def peers(weights, x, bias=None, activation: str | None = None):
    """XLA alone. The dense product, whose matrix is not among the arguments, is an experiment's to compare with."""
    del weights, x, bias
    return {"xla": lambda weights, x, bias=None, *_: finish(xla(weights, x), weights.scales, bias, activation)}


_compress = jax.jit(UnstructuredWeights.from_dense, static_argnums=(1, 2))


def _case(
    name: str,
    *,
    shape: tuple[int, int],
    n: int,
    density: float,
    bias: bool = False,
    activation: str | None = None,
    value_dtype: str | None = None,
    paired: bool = False,
    clustered: bool = False,
    dtypes: tuple[str, ...] = ("bfloat16",),
    **flags: bool,
) -> Case:
    """A random mask, or one whose non-zeros are together in one corner of each 256 x 256."""

    def make(key: jax.Array, dtype: jnp.dtype):
        key_w, key_mask, key_x, key_bias = jax.random.split(key, 4)
        places = [jnp.arange(size, dtype=jnp.int32) % 256 < int(256 * density**0.5) for size in shape]
        mask = jax.random.uniform(key_mask, shape, jnp.float32) < density
        mask = places[0][:, None] & places[1][None] if clustered else mask
        w = jnp.where(mask, jax.random.normal(key_w, shape, dtype), jnp.zeros((), dtype))
        x = jax.random.normal(key_x, (shape[1], n), dtype)
        b = shape[1] ** 0.5 * jax.random.normal(key_bias, shape[:1], dtype) if bias else None
        # Timed as it is used; where it is only checked, under jit: all that have a shape in common then share code.
        compress = UnstructuredWeights.from_dense if flags.get("bench") else _compress
        return compress(w, value_dtype, paired), x, b, activation

    return Case(name=name, make=make, dtypes=dtypes, gradient=False, **flags)


BENCH_SHAPES = ((28672, 7168), (7168, 28672), (36864, 9216))

CASES = (
    _case("random 50%", shape=(100, 1100), n=8, density=0.5, bias=True, activation="relu", small=True),
    _case(
        "clustered, 13 tokens", shape=(100, 1100), n=13, density=0.2, clustered=True, dtypes=("float16",), small=True
    ),
    _case("paired", shape=(100, 1100), n=8, density=0.2, bias=True, paired=True, small=True),
    _case("dense", shape=(96, 130), n=3, density=1.0, activation="gelu"),
    _case("all zero", shape=(96, 130), n=1, density=0.0, bias=True),
    _case("int8 values", shape=(96, 130), n=16, density=0.4, value_dtype="int8"),
    _case("float8 values", shape=(96, 130), n=16, density=0.4, value_dtype="float8_e4m3fn", bias=True),
    *(
        _case(
            f"{value_dtype} values, paired, {n} tokens",
            shape=(96, 130),
            n=n,
            density=0.4,
            value_dtype=value_dtype,
            bias=True,
            paired=True,
            dtypes=("bfloat16", "float16"),
            small=n == 9,
        )
        for value_dtype in ("int8", "float8_e4m3fn")
        for n in (9, 200)
    ),
    _case("80 tokens", shape=(96, 130), n=80, density=0.3, activation="silu", dtypes=("bfloat16", "float32")),
    _case("200 tokens", shape=(96, 130), n=200, density=0.3),
    _case("paired, 200 tokens", shape=(96, 130), n=200, density=0.3, paired=True),
    *(
        _case(
            f"{m}x{k}, n {n}, {zeros}%{', paired' * paired}",
            shape=(m, k),
            n=n,
            density=1 - zeros / 100,
            paired=paired,
            bench=True,
        )
        for m, k in BENCH_SHAPES
        for zeros in (50, 60, 70, 80)
        for paired in ((False, True) if zeros > 60 else (False,))
        for n in (8, 16, 32)
    ),
)
