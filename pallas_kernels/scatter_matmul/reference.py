"""The reference of `scatter_matmul` and its xla path, in plain jnp."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.micro_tile_index import MicroTileIndex
from pallas_kernels.operands import by_block, list_steps, listed_chunk, listed_mask


def reference(a: Float[Array, "M K"], b: Float[Array, "K N"], index: MicroTileIndex) -> Float[Array, "M N"]:
    """The masked dense product in float32."""
    listed = listed_mask(index, *a.shape)
    masked = jnp.where(listed, a, 0).astype(jnp.float32)
    return jnp.dot(masked, b.astype(jnp.float32), precision=lax.Precision.HIGHEST).astype(a.dtype)


def _xla_loop(a: Float[Array, "M K"], b: Float[Array, "K N"], index: MicroTileIndex) -> Float[Array, "M N"]:
    """Block by block, a chunk of its list at a time: gathers rows of A, multiplies, adds to rows of C."""
    (m, _), n = a.shape, b.shape[1]
    a_blocks, b_blocks = by_block(a, index), by_block(b.T, index)

    def add_block(i, out):
        def add_chunk(s, out):
            rows = listed_chunk(index, i, s, m)
            a_rows = a_blocks.at[rows, i].get(mode="clip")
            product = jnp.dot(
                a_rows, b_blocks[:, i].T, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
            )
            return out.at[rows].add(product, mode="drop", unique_indices=True)

        return lax.fori_loop(0, list_steps(index, i, m), add_chunk, out)

    zeros = jnp.zeros_like(a, jnp.float32, shape=(m, n))
    return lax.fori_loop(0, a_blocks.shape[1], add_block, zeros).astype(a.dtype)


def _xla_masked(a: Float[Array, "M K"], b: Float[Array, "K N"], index: MicroTileIndex) -> Float[Array, "M N"]:
    """One dense product of the masked A; what no row of A needs of B is masked too.

    An infinity in a row of B that some other row of A needs makes NaN here, as in any masked product.
    """
    listed = listed_mask(index, *a.shape)
    a, b = jnp.where(listed, a, 0), jnp.where(listed.any(axis=0)[:, None], b, 0)
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32).astype(a.dtype)


@jax.jit
def xla(a: Float[Array, "M K"], b: Float[Array, "K N"], index: MicroTileIndex) -> Float[Array, "M N"]:
    """The xla path: the loop on a CPU, the masked product elsewhere."""
    # On a GPU each step of a loop whose length lives on the device costs a host round trip, more than it saves.
    return lax.platform_dependent(a, b, index, cpu=_xla_loop, default=_xla_masked)
