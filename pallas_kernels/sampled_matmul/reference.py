"""The reference of `sampled_matmul` and its xla path, in plain jnp."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.micro_tile_index import MicroTileIndex
from pallas_kernels.operands import by_block, list_steps, listed_chunk, listed_mask


def reference(a: Float[Array, "L N"], b: Float[Array, "W N"], index: MicroTileIndex) -> Float[Array, "L W"]:
    """The dense product in float32, and zeros where it is not listed."""
    out = jnp.dot(a.astype(jnp.float32), b.T.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    return jnp.where(listed_mask(index, *out.shape), out, 0).astype(a.dtype)


def _xla_loop(a: Float[Array, "L N"], b: Float[Array, "W N"], index: MicroTileIndex) -> Float[Array, "L W"]:
    """Block by block, a chunk of its list at a time: gathers rows of A, multiplies, sets what it names."""
    length, width = a.shape[0], b.shape[0]
    b_blocks = by_block(b.T, index)

    def set_block(i, out):
        def set_chunk(s, out):
            rows = listed_chunk(index, i, s, length)
            a_rows = a.at[rows].get(mode="clip")
            product = jnp.dot(
                a_rows, b_blocks[:, i], precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
            )
            return out.at[rows, i].set(product.astype(a.dtype), mode="drop", unique_indices=True)

        return lax.fori_loop(0, list_steps(index, i, length), set_chunk, out)

    zeros = jnp.zeros_like(a, shape=(length, *b_blocks.shape[1:]))
    out = lax.fori_loop(0, b_blocks.shape[1], set_block, zeros)
    return out.reshape(length, -1)[:, :width]


def _xla_masked(a: Float[Array, "L N"], b: Float[Array, "W N"], index: MicroTileIndex) -> Float[Array, "L W"]:
    """One dense product, and zeros where it is not listed."""
    out = jnp.dot(a, b.T, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32).astype(a.dtype)
    return jnp.where(listed_mask(index, *out.shape), out, 0)


@jax.jit
def xla(a: Float[Array, "L N"], b: Float[Array, "W N"], index: MicroTileIndex) -> Float[Array, "L W"]:
    """The xla path: the loop on a CPU, the masked product elsewhere."""
    # On a GPU each step of a loop whose length lives on the device costs a host round trip, more than it saves.
    return lax.platform_dependent(a, b, index, cpu=_xla_loop, default=_xla_masked)
