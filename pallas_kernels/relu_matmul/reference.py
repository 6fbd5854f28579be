"""The reference of `relu_matmul` and its xla path, in plain jnp."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels.micro_tile_index import MicroTileIndex, micro_tile_index
from pallas_kernels.micro_tile_index import reference as index_reference

Result = tuple[Float[Array, "d_ff tokens"], MicroTileIndex]


def activation(
    x: Float[Array, "tokens d_model"],
    w: Float[Array, "d_model d_ff"],
    bias: Float[Array, " d_ff"] | None,
    mask: Bool[Array, " tokens"] | None,
) -> Float[Array, "d_ff tokens"]:
    """H.T, summed in float32 and rounded once."""
    h_t = jnp.einsum("td,df->ft", x, w, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    h_t = h_t if bias is None else h_t + bias.astype(jnp.float32)[:, None]
    h_t = jax.nn.relu(h_t.astype(x.dtype))
    return h_t if mask is None else jnp.where(mask[None], h_t, 0)


def reference(x, w, bias, rows: int, mask=None) -> Result:
    """The layer, and the reference of `micro_tile_index` on what it gives."""
    h_t = activation(x, w, bias, mask)
    return h_t, index_reference(h_t, rows)


def xla(x, w, bias, rows: int, mask) -> Result:
    """The xla path: the layer, and a second pass over what it gives."""
    h_t = activation(x, w, bias, mask)
    return h_t, micro_tile_index(h_t, rows)
