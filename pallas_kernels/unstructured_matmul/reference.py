"""The reference of `unstructured_matmul` and its xla path, in plain jnp."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from pallas_kernels.neuron_ffn.reference import ACTIVATIONS
from pallas_kernels.unstructured_matmul import layout
from pallas_kernels.unstructured_matmul.weights import UnstructuredWeights, map_strips


def finish(
    y: Float32[Array, "out n"],
    scales: Float32[Array, " out"] | None,
    bias: Array | None = None,
    activation: str | None = None,
) -> Float32[Array, "out n"]:
    """act(scales * y + bias)."""
    y = y if scales is None else y * scales[:, None]
    y = y if bias is None else y + bias.astype(jnp.float32)[:, None]
    return y if activation is None else ACTIVATIONS[activation](y)


def product(w: Array, x: Array) -> Float32[Array, "rows n"]:
    """Accumulated in float32; 8-bit values are multiplied as what they are in the dtype of x, exactly."""
    return jnp.dot(w.astype(x.dtype), x, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def reference(
    weights: UnstructuredWeights, x: Float[Array, "in n"], bias: Array | None = None, activation: str | None = None
) -> Float[Array, "out n"]:
    """The dense product in float32."""
    y = product(weights.to_dense().astype(jnp.float32), x.astype(jnp.float32))
    return finish(y, None, bias, activation).astype(x.dtype)


@jax.jit
def xla(weights: UnstructuredWeights, x: Float[Array, "in n"]) -> Float32[Array, "out n"]:
    """The product without scales, some strips at a time, so that the dense matrix is never there as a whole."""
    rows, columns = weights.shape
    padded = jnp.pad(x, ((0, weights.blocks * layout.BLOCK - columns), (0, 0)))
    y = map_strips(lambda strip: product(strip, padded), weights)
    return y.reshape(-1, x.shape[1])[:rows]
