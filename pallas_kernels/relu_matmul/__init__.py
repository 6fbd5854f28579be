"""The ReLU layer that says what it left: H.T = relu(W.T @ X.T + b), and the index of the micro-tiles of H.T.

Layouts: X is [tokens, d_model], W [d_model, d_ff], and H.T comes out k-major for the product that follows, [d_ff,
tokens], with micro-tiles of `rows` tokens x 1 neuron: what `gather_matmul` takes. Work: 2 * tokens * d_model * d_ff
FLOPs. Bytes: X, W, b and H.T once, and 4 an index entry; that no second pass reads H.T again to find its micro-tiles
is what the kernel is for.

Measured on an H200, 4096 cubed in bfloat16, in us: 166 with the lists at 128x1, 168 at 32x1, where cuBLAS takes 164 to
168 for the product and the ReLU alone, and 188 with `micro_tile_index` after it.

Source: PIT (SOSP'23), section 3.3, online detection of micro-tiles; here in the epilogue of the product.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels import tuning
from pallas_kernels.micro_tile_index import MicroTileIndex, compact
from pallas_kernels.operands import check_implementation, check_operands, vary_together
from pallas_kernels.relu_matmul.cases import CASES, peers, work
from pallas_kernels.relu_matmul.config import Config, candidates, check_config, check_support
from pallas_kernels.relu_matmul.mosaic import mosaic
from pallas_kernels.relu_matmul.reference import Result, reference, xla

DEVICES = ("NVIDIA H100", "NVIDIA H200")

__all__ = ["CASES", "DEVICES", "Config", "candidates", "peers", "reference", "relu_matmul", "work"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _relu_matmul(x, w, bias, mask, rows: int, config: Config | None, implementation: str | None) -> Result:
    """The layer by the Mosaic kernel, or by xla where there is no config."""
    with jax.enable_x64(False):  # under which a Python integer meets an int32 as one of its kind
        if config is None or 0 in (*x.shape, w.shape[1]):
            return xla(x, w, bias, rows, mask)
        outputs = mosaic(x, w, bias, rows, mask, config, interpret=implementation == "interpret")
        _, (h_t, live) = vary_together(x, outputs)  # a kernel's outputs do not say so by themselves
        indices, counts = compact(live, w.shape[1], implementation=implementation)
        return h_t, MicroTileIndex(indices=indices, counts=counts, rows=rows)


def _forward(x, w, bias, mask, rows, config, implementation):
    out = _relu_matmul(x, w, bias, mask, rows, config, implementation)
    return out, (x, w, bias, mask, out)


def _backward(rows, config, implementation, residuals, cotangents):
    """The gradient of a dense layer: where a ReLU gave zero there is none, and the mask is part of that."""
    del rows, config, implementation
    x, w, bias, mask, (h_t, _) = residuals
    grad_h = jnp.where(h_t > 0, cotangents[0], 0)
    grad_x = jnp.einsum("ft,df->td", grad_h, w, precision=lax.Precision.HIGHEST)
    x = x if mask is None else jnp.where(mask[:, None], x, 0)  # which may hold anything there, and 0 * NaN is NaN
    grad_w = jnp.einsum("td,ft->df", x, grad_h, precision=lax.Precision.HIGHEST)
    grad_bias = None if bias is None else grad_h.sum(axis=1, dtype=jnp.float32).astype(bias.dtype)
    return grad_x, grad_w, grad_bias, None if mask is None else jnp.zeros(mask.shape, jax.dtypes.float0)


_relu_matmul.defvjp(_forward, _backward)


def relu_matmul(
    x: Float[Array, "tokens d_model"],
    w: Float[Array, "d_model d_ff"],
    bias: Float[Array, " d_ff"] | None,
    rows: int,
    mask: Bool[Array, " tokens"] | None = None,
    *,
    config: Config | None = None,
    implementation: str | None = None,
) -> Result:
    """relu(x @ w + bias).T, and the index of its micro-tiles of `rows` tokens x 1 neuron that are not all zero.

    The index is that of the values as rounded to the result's dtype, as `micro_tile_index(h_t, rows)` makes it; NaN
    counts as live. Differentiable in `x`, `w` and `bias` (reverse mode, any order): where the result is zero (or NaN)
    nothing flows back, so that a cotangent from a product over the index is complete. Accumulates in float32; float32
    operands keep full float32 precision.

    Args:
        x: the layer's input, [tokens, d_model]; bfloat16, float16 or float32.
        w: its weights, [d_model, d_ff], of the same dtype, as all that follow.
        bias: of each neuron, [d_ff], or None.
        rows: tokens in a micro-tile.
        mask: False for padding, [tokens]: it activates no neuron, whatever it holds. None if all tokens are real.
        config: tiling of the Mosaic kernel; None takes the tuned one, or a heuristic.
        implementation: "mosaic_gpu" (Hopper), "xla" (anywhere), "interpret" (the Mosaic kernel on CPU under the race
            detector, slow), or None: the Mosaic kernel where it can run, else xla.

    Returns:
        The activations, k-major, [d_ff, tokens], and the index of their micro-tiles.

    Raises:
        ValueError: shapes, dtypes, `rows` or config do not fit together.
        NotImplementedError: the asked implementation cannot take these arguments or this device.

    Source: PIT (SOSP'23), section 3.3.
    """
    x, w = jnp.asarray(x), jnp.asarray(w)
    bias, mask = (None if a is None else jnp.asarray(a) for a in (bias, mask))
    _check_arguments(x, w, bias, rows, mask)
    check_implementation(implementation)
    if config is not None:
        check_config(config)

    def check(config: Config | None) -> None:
        devices = None if implementation == "interpret" else DEVICES
        check_support(x, rows, devices)

    config = tuning.choose_config(
        "relu_matmul", Config, (x, w, bias, rows, mask), config, implementation, check=check, candidates=candidates
    )
    return _relu_matmul(*vary_together(x, w, bias, mask), rows, config, implementation)


def _check_arguments(x, w, bias, rows: int, mask) -> None:
    check_operands("td,df", x=x, w=w)
    if rows < 1:
        raise ValueError(f"rows must be at least 1; got rows={rows}")
    if bias is not None and (bias.shape != w.shape[1:] or bias.dtype != x.dtype):
        raise ValueError(f"bias must be {x.dtype}[{w.shape[1]}]; got {bias.dtype}{list(bias.shape)}")
    if mask is not None and (mask.shape != x.shape[:1] or mask.dtype != bool):
        raise ValueError(f"mask must be bool[{x.shape[0]}]; got {mask.dtype}{list(mask.shape)}")
