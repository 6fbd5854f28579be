"""What follows a product in registers: scale * act(product + bias), or scale * act(gate) * up."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def _reciprocal(x: jax.Array) -> jax.Array:
    return lax.rsqrt(x) * lax.rsqrt(x)  # two instructions; a division takes eight


def _gelu(x: jax.Array) -> jax.Array:
    """x * Phi(x) = max(x, 0) - |x| * Phi(-|x|), Phi by Abramowitz and Stegun, 7.1.26: off by 1e-7 at most."""
    size = jnp.minimum(jnp.abs(x), 1e4)  # an infinity would meet a zero
    z = 0.5**0.5 * size
    t = _reciprocal(1.0 + 0.3275911 * z)
    poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return jnp.maximum(x, 0.0) - 0.5 * size * poly * jnp.exp(-z * z)


def _gelu_tanh(x: jax.Array) -> jax.Array:
    """x * sigmoid(2 u), which is what half of 1 + tanh(u) is."""
    return _times_sigmoid(x, 1.5957691216057308 * (x + 0.044715 * x * x * x))


def _times_sigmoid(x: jax.Array, u: jax.Array) -> jax.Array:
    return x * _reciprocal(1.0 + jnp.exp(-u))


# Written out, since they cost more than the product where K is small: 128 results a thread and tile.
ACTIVATIONS: dict[str | None, Callable[[jax.Array], jax.Array]] = {
    None: lambda x: x,
    "relu": lambda x: jnp.maximum(x, 0.0),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": lambda x: _times_sigmoid(x, x),
}


def bias_layout(columns: int) -> Any:
    """Of a bias on its way to shared memory, a multiple of 128 columns."""
    return plgpu.Layout.WG_STRIDED((columns,), vec_size=columns // 128)


def finish(
    products: tuple[jax.Array, ...], activation: str | None, bias_smem: Any, scale_gmem: Any, slot: jax.Array
) -> Callable[[int, int], jax.Array]:
    """The finished columns of a consumer's tile, float32, as `columns(first, how many)`.

    Args:
        products: accumulators [rows, cols]: one, or the gate's and the one that it gates.
        activation: one of ACTIVATIONS.
        bias_smem: a row for each product, or None.
        scale_gmem: float32 [slots], or None.
        slot: the scale of the first row.
    """
    rows, (by_row, by_column) = products[0].shape[0], (plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0))
    scale = None
    if scale_gmem is not None:
        scale = plgpu.load(scale_gmem.at[pl.ds(slot, rows)], layout=by_row, optimized=False)

    def with_bias(i, first, count):
        part = products[i][:, first : first + count]
        if bias_smem is None:
            return part
        bias = plgpu.load(bias_smem.at[i, pl.ds(first, count)], layout=by_column, optimized=False)
        return part + lax.broadcast_in_dim(bias.astype(jnp.float32), part.shape, (1,))

    def columns(first, count):
        out = ACTIVATIONS[activation](with_bias(0, first, count))
        if len(products) == 2:
            out = out * with_bias(1, first, count)
        return out if scale is None else out * lax.broadcast_in_dim(scale, out.shape, (0,))

    return columns
