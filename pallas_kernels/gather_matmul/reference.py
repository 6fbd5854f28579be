"""The reference of `gather_matmul` and its xla path, in plain jnp."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float

from pallas_kernels.micro_tile_index import MicroTileIndex

XLA_CHUNK = 256  # k a step of the xla loop


def listed_mask(index: MicroTileIndex, m: int) -> Bool[Array, "K M"]:
    """True where the micro-tile of an element of A is listed."""
    return jnp.repeat(index.mask().T, index.rows, axis=1)[:, :m]


def _by_block(a_t: Float[Array, "K M"], rows: int) -> Float[Array, "blocks K rows"]:
    k, m = a_t.shape
    rows = min(rows, m)  # a single short block, as when decoding one token, is not padded
    return jnp.pad(a_t, ((0, 0), (0, -m % rows))).reshape(k, -1, rows).transpose(1, 0, 2)


def _rounded(out: Float[Array, "blocks rows N"], m: int, dtype: jnp.dtype) -> Float[Array, "M N"]:
    return out.reshape(-1, out.shape[-1])[:m].astype(dtype)


def reference(a_t: Float[Array, "K M"], b: Float[Array, "K N"], index: MicroTileIndex) -> Float[Array, "M N"]:
    """The masked dense product of each block in float32; what is not listed counts as zero on both sides."""

    def block(args):
        a, listed = args
        a, b_listed = (jnp.where(listed[:, None], x, 0).astype(jnp.float32) for x in (a, b))
        return jnp.dot(a.T, b_listed, precision=lax.Precision.HIGHEST)

    return _rounded(lax.map(block, (_by_block(a_t, index.rows), index.mask())), a_t.shape[1], a_t.dtype)


def _xla_loop(a_t: Float[Array, "K M"], b: Float[Array, "K N"], index: MicroTileIndex) -> Float[Array, "M N"]:
    """Gathers and multiplies XLA_CHUNK listed k at a time, so that what is not listed costs nothing."""
    chunk = min(XLA_CHUNK, a_t.shape[0])
    a_blocks = _by_block(a_t, index.rows)
    indices = jnp.pad(index.indices, ((0, 0), (0, -a_t.shape[0] % chunk)))

    def block(args):
        a, entries, count = args

        def step(s, acc):
            listed = s * chunk + jnp.arange(chunk) < count
            k = jnp.where(listed, lax.dynamic_slice(entries, (s * chunk,), (chunk,)), 0)
            a_k, b_k = (jnp.where(listed[:, None], x[k], 0) for x in (a, b))
            product = jnp.dot(a_k.T, b_k, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
            return acc + product

        zeros = jnp.zeros((a.shape[1], b.shape[1]), jnp.float32) * (0 * count).astype(
            jnp.float32
        )  # varies as count does
        return lax.fori_loop(0, pl.cdiv(count, chunk), step, zeros)

    return _rounded(lax.map(block, (a_blocks, indices, index.counts)), a_t.shape[1], a_t.dtype)


def _xla_masked(a_t: Float[Array, "K M"], b: Float[Array, "K N"], index: MicroTileIndex) -> Float[Array, "M N"]:
    """One dense product of the masked A; rows of B that nothing lists are masked too.

    An infinity in a row of B that some other block lists makes NaN here, as in any masked product.
    """
    a = jnp.where(listed_mask(index, a_t.shape[1]), a_t, 0)
    b = jnp.where(index.mask().any(axis=0)[:, None], b, 0)
    return jnp.dot(a.T, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32).astype(a_t.dtype)


def xla(a_t: Float[Array, "K M"], b: Float[Array, "K N"], index: MicroTileIndex) -> Float[Array, "M N"]:
    """The xla path: the loop on a CPU, the masked product elsewhere."""
    # On a GPU each step of a loop whose length lives on the device costs a host round trip, more than it saves.
    return lax.platform_dependent(a_t, b, index, cpu=_xla_loop, default=_xla_masked)
