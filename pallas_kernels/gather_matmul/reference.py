"""The reference of `gather_matmul` and its xla path, in plain jnp."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.micro_tile_index import MicroTileIndex
from pallas_kernels.operands import XLA_CHUNK


def _by_block(x: Float[Array, "K cols"], width: int) -> Float[Array, "blocks K width"]:
    k, cols = x.shape
    width = min(width, cols)  # a single short block, as when decoding one token, is not padded
    return jnp.pad(x, ((0, 0), (0, -cols % width))).reshape(k, -1, width).transpose(1, 0, 2)


def _blocks(a_t, b, index: MicroTileIndex):
    """Blocks of A, and of B: all of it, or its columns that a list of their own serves."""
    return _by_block(a_t, index.rows), _by_block(b, index.out_cols or b.shape[1])


def _assembled(blocks: Float[Array, "lists rows cols"], m: int, n: int, dtype: jnp.dtype) -> Float[Array, "M N"]:
    """C from its blocks, row by row of them."""
    lists, rows, cols = blocks.shape
    across = -(-n // cols)
    out = blocks.reshape(lists // across, across, rows, cols).transpose(0, 2, 1, 3)
    return out.reshape(-1, across * cols)[:m, :n].astype(dtype)


def reference(
    a_t: Float[Array, "K M"], b: Float[Array, "K N"], index: MicroTileIndex, zero_elsewhere: bool = False
) -> Float[Array, "M N"]:
    """The masked dense product of each block in float32; what is not listed counts as zero on both sides."""
    del zero_elsewhere
    a_blocks, b_blocks = _blocks(a_t, b, index)
    listed = jnp.repeat(index.mask(), index.cols, axis=1)[:, : a_t.shape[0]]

    def block(args):
        i, listed = args
        a, b_listed = (
            jnp.where(listed[:, None], x, 0).astype(jnp.float32)
            for x in (a_blocks[i // len(b_blocks)], b_blocks[i % len(b_blocks)])
        )
        return jnp.dot(a.T, b_listed, precision=lax.Precision.HIGHEST)

    out = lax.map(block, (jnp.arange(listed.shape[0]), listed))
    return _assembled(out, a_t.shape[1], b.shape[1], a_t.dtype)


def _xla_loop(a_t: Float[Array, "K M"], b: Float[Array, "K N"], index: MicroTileIndex) -> Float[Array, "M N"]:
    """Gathers and multiplies about XLA_CHUNK listed k at a time, so that what is not listed costs nothing."""
    k, cols = a_t.shape[0], index.cols
    a_blocks, b_blocks = _blocks(a_t, b, index)
    length = index.indices.shape[1]
    chunk = min(max(XLA_CHUNK // cols, 1), length)  # entries
    indices = jnp.pad(index.indices, ((0, 0), (0, -length % chunk)))

    def block(args):
        i, entries, count = args
        a, b = a_blocks[i // len(b_blocks)], b_blocks[i % len(b_blocks)]

        def step(s, acc):
            entry = lax.dynamic_slice(entries, (s * chunk,), (chunk,))
            exists = (entry >= 0) & (entry < length)  # else it would be read from the end
            listed = (s * chunk + jnp.arange(chunk) < count) & exists
            entry = jnp.where(listed, entry, 0)
            ks = (entry[:, None] * cols + jnp.arange(cols, dtype=jnp.int32)[None]).reshape(-1)
            listed = jnp.repeat(listed, cols) & (ks < k)
            a_k, b_k = (jnp.where(listed[:, None], x[jnp.minimum(ks, k - 1)], 0) for x in (a, b))
            product = jnp.dot(a_k.T, b_k, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
            return acc + product

        zeros = jnp.zeros_like(a, jnp.float32, shape=(a.shape[1], b.shape[1]))
        return lax.fori_loop(0, pl.cdiv(count, chunk), step, zeros)

    counts = jnp.minimum(index.counts, length)  # no list ends past its end
    out = lax.map(block, (jnp.arange(len(indices)), indices, counts))
    return _assembled(out, a_t.shape[1], b.shape[1], a_t.dtype)


def _xla_masked(a_t: Float[Array, "K M"], b: Float[Array, "K N"], index: MicroTileIndex) -> Float[Array, "M N"]:
    """Dense products of the masked A; rows of B that nothing lists are masked too.

    An infinity in a row of B that some other block lists makes NaN here, as in any masked product.
    """
    k, m = a_t.shape
    b_blocks = _by_block(b, index.out_cols or b.shape[1])

    def columns(args):
        b, mask = args
        listed = jnp.repeat(jnp.repeat(mask, index.cols, axis=1)[:, :k].T, index.rows, axis=1)[:, :m]
        b = jnp.where(listed.any(axis=1)[:, None], b, 0)
        return jnp.dot(
            jnp.where(listed, a_t, 0).T, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
        )

    masks = index.mask().reshape(-1, len(b_blocks), index.indices.shape[1]).transpose(1, 0, 2)
    out = lax.map(columns, (b_blocks, masks))
    return out.transpose(1, 0, 2).reshape(m, -1)[:, : b.shape[1]].astype(a_t.dtype)


@jax.jit
def xla(a_t: Float[Array, "K M"], b: Float[Array, "K N"], index: MicroTileIndex) -> Float[Array, "M N"]:
    """The xla path: the loop on a CPU, the masked product elsewhere."""
    # On a GPU each step of a loop whose length lives on the device costs a host round trip, more than it saves.
    return lax.platform_dependent(a_t, b, index, cpu=_xla_loop, default=_xla_masked)
