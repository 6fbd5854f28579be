"""Residual sum s = x + addend of few rows, and its layer norm (s - mean) / sqrt(var + epsilon) * scale + bias.

Layouts: x, addend and both results [rows, d]; scale and bias [d]. Statistics are those of a row of s, in float32 and
in two passes: the mean, then the mean square of what differs from it. Work: 10 * d FLOPs a row; bytes: 4 * itemsize * d
a row (x, addend, s and the norm), and scale and bias once: of one row of 7168 in bfloat16 86 kB, 0.02 us of an H200. So
what counts is launches, of which this is one, and within it the way from the first load to the last store.

Source: Ba et al., "Layer Normalization" (2016), section 3.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import tuning
from pallas_kernels.layer_norm.cases import CASES, peers, work
from pallas_kernels.layer_norm.config import Config, candidates, check_fits, check_support
from pallas_kernels.layer_norm.mosaic import mosaic
from pallas_kernels.layer_norm.reference import Result, reference, xla
from pallas_kernels.operands import check_implementation, vary_together

DEVICES = ("NVIDIA H100", "NVIDIA H200")

__all__ = ["CASES", "DEVICES", "Config", "candidates", "layer_norm", "peers", "reference", "work"]


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5, 6))
def _layer_norm(x, scale, bias, addend, epsilon: float, config: Config, implementation: str | None) -> Result:
    """By the Mosaic kernel."""
    with jax.enable_x64(False):  # under which a Python integer meets an int32 as one of its kind
        total, normed = mosaic(x, scale, bias, addend, epsilon, config, interpret=implementation == "interpret")
    _, total, normed = vary_together(x, total, normed)  # under shard_map a kernel's outputs do not say so themselves
    return total, normed


@_layer_norm.defjvp
def _derivative(epsilon, config, implementation, primals, tangents):
    """Of the xla path."""
    _, out_tangents = jax.jvp(functools.partial(xla, epsilon=epsilon), primals, tangents)
    return _layer_norm(*primals, epsilon, config, implementation), out_tangents


def layer_norm(
    x: Float[Array, "rows d"],
    scale: Float[Array, " d"],
    bias: Float[Array, " d"],
    addend: Float[Array, "rows d"] | None = None,
    *,
    epsilon: float = 1e-5,
    config: Config | None = None,
    implementation: str | None = None,
) -> Result:
    """The sum x + addend, and its layer norm.

    The norm is that of the sum as rounded to its dtype. NaN and infinity make their row of the norm NaN. Differentiable
    in all arrays, forwards and backwards, by the derivative of the xla path.

    Args:
        x: bfloat16, float16 or float32.
        scale: what the normalised values are multiplied with; of any of these dtypes, as `bias`.
        bias: what is then added.
        addend: of the dtype of x; None for none.
        epsilon: added to the variance.
        config: tiling of the Mosaic kernel; None takes the tuned one, or a heuristic.
        implementation: "mosaic_gpu" (Hopper, up to 64 rows), "xla" (anywhere), "interpret" (the Mosaic kernel on CPU
            under the race detector, slow), or None: the Mosaic kernel where it can run, else xla.

    Returns:
        The sum, which is x where there is no addend, and its norm, both of the dtype of x.

    Raises:
        ValueError: shapes, dtypes, `epsilon` or config do not fit together.
        NotImplementedError: the asked implementation cannot take these arguments or this device.

    Source: Ba et al. (2016), section 3.
    """
    x, scale, bias = (jnp.asarray(a) for a in (x, scale, bias))
    addend = None if addend is None else jnp.asarray(addend)
    _check_arguments(x, scale, bias, addend, epsilon)
    check_implementation(implementation)

    def check(config: Config | None) -> None:
        check_support(x, None if implementation == "interpret" else DEVICES)
        if config is not None:
            check_fits(config, x)

    arguments = x, scale, bias, addend
    config = tuning.choose_config(
        "layer_norm", Config, arguments, config, implementation, check=check, candidates=candidates
    )
    if config is None:
        return xla(*arguments, epsilon)
    return _layer_norm(*vary_together(*arguments), float(epsilon), config, implementation)


def _check_arguments(x, scale, bias, addend, epsilon: float) -> None:
    if x.ndim != 2 or x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"x must be bfloat16, float16 or float32 [rows, d]; got {x.dtype}{list(x.shape)}")
    for name, array in (("scale", scale), ("bias", bias)):
        if array.shape != x.shape[1:] or not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating-point [{x.shape[1]}]; got {array.dtype}{list(array.shape)}")
    if addend is not None and (addend.shape != x.shape or addend.dtype != x.dtype):
        got = f"{addend.dtype}{list(addend.shape)}"
        raise ValueError(f"addend must be as x, {x.dtype}{list(x.shape)}; got {got}")
    if not epsilon >= 0:
        raise ValueError(f"epsilon must be at least 0; got epsilon={epsilon}")
