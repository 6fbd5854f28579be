"""Unstructured weights, loaded as sparse, computed as dense: y = act(W x + bias), W [out, in] mostly zeros.

Decode is bound by reading weights; `UnstructuredWeights` has 2 * density + 1/8 bytes an element of them where a dense
matrix has 2, 1.77 / 2.15 / 2.74 / 3.77 times fewer at 50 / 60 / 70 / 80% zeros. x is [in, n], y [out, n]: n tokens side
by side. Work: 2 * out * in * n FLOPs, as if dense, on the tensor core. Nothing is added atomically: equal inputs give
equal bits.

On an H200, weights read from memory: 1.4 times as quick as cuBLAS at 50% zeros for 8 and 16 tokens, 1.2 for 32, and 1.6
at 80%, 1.4 for 32 (28672 x 7168).

Sources: Flash-LLM (VLDB'24), section 3; SpInfer (EuroSys'25).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import tuning
from pallas_kernels.operands import check_implementation, vary_together
from pallas_kernels.unstructured_matmul.cases import CASES, peers, work
from pallas_kernels.unstructured_matmul.config import EXPAND_N, Config, candidates, check_config, check_support
from pallas_kernels.unstructured_matmul.mosaic import expand as mosaic_expand
from pallas_kernels.unstructured_matmul.mosaic import mosaic
from pallas_kernels.unstructured_matmul.reference import ACTIVATIONS, finish, reference, xla
from pallas_kernels.unstructured_matmul.weights import UnstructuredWeights

DEVICES = ("NVIDIA H100", "NVIDIA H200")

__all__ = [
    "CASES",
    "DEVICES",
    "EXPAND_N",
    "Config",
    "UnstructuredWeights",
    "candidates",
    "expand",
    "peers",
    "reference",
    "unstructured_matmul",
    "work",
]


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5))
def _unstructured_matmul(weights, x, bias, activation: str | None, config: Config | None, implementation: str | None):
    """The product by the Mosaic kernel, or by xla where there is no config."""
    with jax.enable_x64(False):  # under which a Python integer meets an int32 as one of its kind
        if not weights.masks.size or not x.size:
            y = jnp.zeros((weights.shape[0], x.shape[1]), jnp.float32)
        elif config is None:
            y = xla(weights, x)
        else:
            y = vary_together(x, mosaic(weights, x, config, interpret=implementation == "interpret"))[1]
        return finish(y, weights.scales, bias, activation).astype(x.dtype)


@_unstructured_matmul.defjvp
def _refuse(activation, config, implementation, primals, tangents):
    raise NotImplementedError(
        "unstructured_matmul has no gradient; differentiate the product with `to_dense()` instead"
    )


def unstructured_matmul(
    weights: UnstructuredWeights,
    x: Float[Array, "in n"],
    bias: Float[Array, " out"] | None = None,
    activation: str | None = None,
    *,
    config: Config | None = None,
    implementation: str | None = None,
) -> Float[Array, "out n"]:
    """act(weights @ x + bias), in the dtype of x, accumulated in float32.

    A NaN or an infinity in x meets the zeros of its column as in a dense product: 0 * inf is NaN there too.

    Args:
        weights: W [out, in]. Those from a file ask for their `check` first: here their offsets are believed.
        x: [in, n], of the dtype of W.
        bias: of each row of the result, of that dtype, or None.
        activation: None, "relu", "gelu", "gelu_tanh" or "silu".
        config: tiling of the Mosaic kernels; None takes the tuned one, or a heuristic.
        implementation: "mosaic_gpu" (Hopper, 16-bit values), "xla" (anywhere), "interpret" (the Mosaic kernels on CPU
            under the race detector, slow), or None: the Mosaic kernels where they can run, else xla.

    Raises:
        ValueError: shapes, dtypes, `activation` or config do not fit together.
        NotImplementedError: the asked implementation cannot take these arguments or this device; or a gradient is
            asked for.

    Sources: Flash-LLM (VLDB'24), section 3; SpInfer (EuroSys'25).
    """
    x = jnp.asarray(x)
    bias = None if bias is None else jnp.asarray(bias)
    _check_arguments(weights, x, bias, activation)
    check_implementation(implementation)
    if config is not None:
        check_config(config, x.shape[1])

    def check(config: Config | None) -> None:
        del config
        check_support(weights, x, None if implementation == "interpret" else DEVICES)

    arguments = weights, x, bias, activation
    config = tuning.choose_config(
        "unstructured_matmul", Config, arguments, config, implementation, check=check, candidates=candidates
    )
    x, bias, rows = vary_together(x, bias, weights.rows)
    weights = dataclasses.replace(weights, rows=rows)
    return _unstructured_matmul(weights, x, bias, activation, config, implementation)


def expand(weights: UnstructuredWeights, *, implementation: str | None = None) -> Float[Array, "out in"]:
    """The matrix again, as `weights.to_dense()`, but quickly on a GPU.

    Args:
        weights: W [out, in].
        implementation: as of `unstructured_matmul`.

    Raises:
        NotImplementedError: the asked implementation cannot take these weights or this device.
    """
    check_implementation(implementation)
    x = jax.ShapeDtypeStruct((weights.shape[1], EXPAND_N + 1), weights.dtype)  # what would have them expanded

    def check(config: Config | None) -> None:
        del config
        check_support(weights, x, None if implementation == "interpret" else DEVICES)

    config = tuning.choose_config(
        "unstructured_matmul",
        Config,
        (weights, x, None, None),
        None,
        implementation,
        check=check,
        candidates=candidates,
    )
    if config is None or not weights.masks.size:
        return weights.to_dense()
    with jax.enable_x64(False):  # as above
        return mosaic_expand(weights, config, interpret=implementation == "interpret")


def _check_arguments(weights, x, bias, activation: str | None) -> None:
    if not isinstance(weights, UnstructuredWeights):
        raise ValueError(f"weights must be UnstructuredWeights; got {type(weights).__name__}")
    rows, columns = weights.shape
    if x.ndim != 2 or x.shape[0] != columns or x.dtype != weights.dtype:
        raise ValueError(f"x must be {weights.dtype}[{columns}, n]; got {x.dtype}{list(x.shape)}")
    if bias is not None and (bias.shape != (rows,) or bias.dtype != x.dtype):
        raise ValueError(f"bias must be {x.dtype}[{rows}]; got {bias.dtype}{list(bias.shape)}")
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None or one of {', '.join(ACTIVATIONS)}; got {activation!r}")
