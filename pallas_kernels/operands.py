"""What the products over a `MicroTileIndex` share: checks of their operands, and what an index lists of X [L, W].

X is the matrix that has micro-tiles: `cols` along L, which the lists name, and `rows` along W, one block a list.
"""

import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Int32

from pallas_kernels.micro_tile_index import MicroTileIndex, compact

XLA_CHUNK = 256  # l a step of the xla loops
IMPLEMENTATIONS = (None, "mosaic_gpu", "xla", "interpret")


def check_operands(dimensions: str, **operands) -> None:
    """Raises ValueError unless two matrices, by name, are of one dtype and agree where they share a dimension.

    Args:
        dimensions: of each, as in an einsum: "mk,kn".
        **operands: the two, in that order.
    """
    names, (a, b), (a_dims, b_dims) = " and ".join(operands), operands.values(), dimensions.upper().split(",")
    if a.ndim != 2 or b.ndim != 2:
        layouts = " and ".join(f"[{', '.join(dims)}]" for dims in (a_dims, b_dims))
        raise ValueError(f"{names} must be matrices {layouts}; got shapes {a.shape} and {b.shape}")
    if a.dtype != b.dtype:
        raise ValueError(f"{names} must have one dtype; got {a.dtype} and {b.dtype}")
    if a.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"dtype must be bfloat16, float16 or float32; got {a.dtype}")
    for shared in set(a_dims) & set(b_dims):
        a_size, b_size = a.shape[a_dims.index(shared)], b.shape[b_dims.index(shared)]
        if a_size != b_size:
            raise ValueError(f"{shared} of {names} must agree; got {shared}={a_size} and {b_size}")


def check_index(index: MicroTileIndex, *, columns: int | None = None, **dimensions: int) -> None:
    """Raises ValueError unless the index is one of X; whether it names what there is, only where its values are known.

    Args:
        index: the index.
        columns: of the result, where each block of `index.out_cols` of them may have lists of its own.
        **dimensions: X's two by name and size, as in `M=m, K=k`.
    """
    for name, rank in (("indices", 2), ("counts", 1)):
        array = getattr(index, name)
        if array.ndim != rank or array.dtype != jnp.int32:
            raise ValueError(f"index.{name} must be int32 of rank {rank}; got {array.dtype}{list(array.shape)}")
    for name in ("rows", "cols", "out_cols"):
        if (value := getattr(index, name)) is not None and value < 1:
            raise ValueError(f"index.{name} must be at least 1; got {name}={value}")
    if index.out_cols is not None and columns is None:
        raise ValueError(f"index.out_cols must be None (gather_matmul alone takes one); got out_cols={index.out_cols}")
    (l_name, length), (w_name, width) = dimensions.items()
    (lists, entries), counts = index.indices.shape, index.counts.shape[0]
    if entries != -(-length // index.cols):
        rule = f"index must have ceil({l_name} / cols) entries a list"
        raise ValueError(f"{rule}; got {entries}, {l_name}={length}, cols={index.cols}")
    across = -(-columns // index.out_cols) if index.out_cols and columns is not None else 1
    if (lists, counts) != (-(-width // index.rows) * across,) * 2:
        rule = f"index must have ceil({w_name} / rows)" + f" * ceil({columns} / out_cols)" * (across > 1)
        got = f"{w_name}={width}, rows={index.rows}, out_cols={index.out_cols}"
        raise ValueError(f"{rule} lists and counts; got {lists} and {counts}, {got}")
    _check_entries(index)


def _check_entries(index: MicroTileIndex) -> None:
    """Raises ValueError where a list names a micro-tile that there is not; under a trace nothing is known of that."""
    if isinstance(index.indices, Tracer) or isinstance(index.counts, Tracer):
        return
    is_wrong = _names_what_is_not(index.indices, index.counts)
    if isinstance(is_wrong, Tracer):  # of a traced function's constants
        return
    found = np.flatnonzero(jax.device_get(is_wrong))
    if found.size:
        i, entries = found[0], index.indices.shape[1]
        count = int(index.counts[i])
        listed = np.asarray(index.indices[i])[: max(count, 0)]
        rule = f"index must have counts of 0 to {entries}, and entries of 0 to {entries - 1} before them"
        got = listed[(listed < 0) | (listed >= entries)].tolist()[:4]
        raise ValueError(f"{rule}; got {got} in list {i}, counts[{i}]={count}")


@jax.jit
def _names_what_is_not(indices: Int32[Array, "lists entries"], counts: Int32[Array, " lists"]) -> Bool[Array, " lists"]:
    entries = indices.shape[1]
    listed = jnp.arange(entries, dtype=jnp.int32)[None] < counts[:, None]
    outside = (indices < 0) | (indices >= entries)
    return (listed & outside).any(axis=1) | (counts < 0) | (counts > entries)


def result_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Of a product of operands of this dtype: the same, and bfloat16 of float8."""
    dtype = jnp.dtype(dtype)
    return jnp.dtype(jnp.bfloat16) if dtype.itemsize == 1 else dtype


def check_implementation(implementation: str | None) -> None:
    """Raises ValueError unless it is the name of one, or None."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f'implementation must be None, "mosaic_gpu", "xla" or "interpret"; got {implementation!r}')


def same_path(product: Callable[..., Array], *args, implementation: str | None) -> Array:
    """A product by the implementation that was asked for, where it takes these arguments; else by its own choice.

    A gradient of an interpreted kernel is not interpreted: it has cases of its own.
    """
    if implementation == "interpret":
        return product(*args)
    try:
        return product(*args, implementation=implementation)
    except NotImplementedError:
        return product(*args)


@jax.jit  # eagerly, ones_like would copy an operand's sharding, whose rank is not 0
def vary_together[*Operands](*operands: *Operands) -> tuple[*Operands]:
    """The operands, each varying over all the mesh axes of a shard_map that any of them varies over; else as they are.

    Loops can then start from zeros like any operand, and shard_map adds up the gradient of one that was replicated.
    """
    ones = [jnp.ones_like(x, shape=(), dtype=jnp.int32) for x in jax.tree.leaves(operands)]
    one = functools.reduce(operator.mul, ones)
    return jax.tree.map(lambda x: x * one.astype(x.dtype), operands)  # which XLA drops


def listed_mask(index: MicroTileIndex, length: int, width: int) -> Bool[Array, "L W"]:
    """True where the micro-tile of an element of X is listed."""
    mask = jnp.repeat(index.mask().T, min(index.rows, width), axis=1)[:, :width]
    return jnp.repeat(mask, min(index.cols, length), axis=0)[:length]


def transposed(index: MicroTileIndex) -> MicroTileIndex:
    """The same micro-tiles, listed for each block of `cols` l: of X transposed."""
    indices, counts = compact(index.mask().T)
    return MicroTileIndex(indices=indices, counts=counts, rows=index.cols, cols=index.rows)


def in_pairs(index: MicroTileIndex) -> MicroTileIndex:
    """Each two blocks as one, which lists what either of them does."""
    mask = index.mask()
    mask = jnp.pad(mask, ((0, mask.shape[0] % 2), (0, 0))).reshape((mask.shape[0] + 1) // 2, 2, mask.shape[1])
    indices, counts = compact(mask.any(axis=1))
    return MicroTileIndex(indices=indices, counts=counts, rows=2 * index.rows, cols=index.cols)


def one_by_one(index: MicroTileIndex, length: int) -> MicroTileIndex:
    """The same l of each block, listed one by one."""
    if index.cols == 1:
        return index
    indices, counts = compact(jnp.repeat(index.mask(), index.cols, axis=1)[:, :length])
    return MicroTileIndex(indices=indices, counts=counts, rows=index.rows)


def by_block(x: Float[Array, "L W"], index: MicroTileIndex) -> Float[Array, "L blocks rows"]:
    """X with its columns grouped, the last block padded with zeros."""
    length, width = x.shape
    rows = min(index.rows, width)  # a single short block is not padded
    return jnp.pad(x, ((0, 0), (0, -width % rows))).reshape(length, -1, rows)


def list_steps(index: MicroTileIndex, block, length: int) -> Int[Array, ""]:
    """How many chunks a list has."""
    count = jnp.minimum(index.counts[block], index.indices.shape[1])  # no list ends past its end
    return -(-count * index.cols // min(XLA_CHUNK, length))


def listed_chunk(index: MicroTileIndex, block, step, length: int) -> Int[Array, " chunk"]:
    """The l of one chunk of a list, distinct; those that are out of range are not listed."""
    chunk = min(XLA_CHUNK, length)
    position = step * chunk + jnp.arange(chunk, dtype=jnp.int32)
    entry, offset = position // index.cols, position % index.cols
    tile, entries = index.indices[block].at[entry].get(mode="clip"), index.indices.shape[1]
    named = tile * index.cols + offset
    exists = (tile >= 0) & (tile < entries) & (named < length)  # else it would be read from the end
    return jnp.where((entry < jnp.minimum(index.counts[block], entries)) & exists, named, length + position)
