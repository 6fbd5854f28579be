"""Index of the non-zero micro-tiles: for every block of rows of A, the k at which any of its rows is non-zero.

    indices[i, :counts[i]] = { e : any(a_t[e*cols : (e+1)*cols, i*rows : (i+1)*rows] != 0) },  ascending

Layout: `a_t` is k-major ([K, M]), as `gather_matmul` reads it, so the `rows` values of a micro-tile lie together.
Work: K*M comparisons; bytes: the K*M values once, 4*K*ceil(M/rows) of index written, a byte of mask for each entry.
XLA reduces the values to the mask in one fusion; a small Mosaic kernel turns that into lists (`compact`), which XLA
alone does by a prefix sum and a scatter.

Source: PIT (SOSP'23), section 3.3, online detection of micro-tiles. PIT appends coordinates in any order; here they
come out ascending, so that equal inputs give equal bits and neighbouring k share cache lines in the gather.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int8, Int32, Shaped

from pallas_kernels.micro_tile_index.cases import CASES, ROWS, work
from pallas_kernels.micro_tile_index.device import ALIGNMENT
from pallas_kernels.micro_tile_index.mosaic import Config, check_config, configs, mosaic
from pallas_kernels.tile.device import require_device
from pallas_kernels.tuning import tuned_config

DEVICES = ("NVIDIA H100", "NVIDIA H200")

__all__ = [
    "CASES",
    "DEVICES",
    "ROWS",
    "Config",
    "MicroTileIndex",
    "candidates",
    "compact",
    "micro_tile_index",
    "micro_tile_mask",
    "peers",
    "reference",
    "work",
]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("indices", "counts"), meta_fields=("rows", "cols", "out_cols")
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class MicroTileIndex:
    """Which k matter to each block of rows: `indices[i, :counts[i]]`, distinct. What follows them may be anything.

    An entry that names no micro-tile is an error of the products that take an index, where its values are known; to see
    them waits for the device. Under a trace (jit, vmap) the xla path takes it as not listed, and the Mosaic kernels,
    which do not look, read or write what lies there.

    Attributes:
        indices: micro-tiles along k, one list a block of rows, int32 [lists, ceil(K / cols)].
        counts: how many entries of each list count, int32 [lists].
        rows: rows in a block: the granularity is `rows` x `cols`. Static under jit, as all that follow.
        cols: k in a micro-tile: an entry e names the k from e * cols on.
        out_cols: None where a list serves a block of rows of C. Else there is one for each `out_cols` columns of it
            too, block of rows by block of rows: what B lacks, or nobody wants of C, is skipped as well.
    """

    indices: Any  # not typed as arrays: as a pytree it also carries shapes, shardings and cotangents
    counts: Any
    rows: int
    cols: int = 1
    out_cols: int | None = None

    def mask(self) -> Bool[Array, "lists micro_tiles"]:
        """True where a micro-tile is listed."""
        lists, length = self.indices.shape
        entry = jnp.arange(length, dtype=jnp.int32)[None]
        # Out of range, so dropped, and still distinct: else XLA, told to be deterministic, sets one after the other.
        listed = (entry < self.counts[:, None]) & (self.indices >= 0)  # a negative one would count from the end
        target = jnp.where(listed, self.indices, length + entry)
        nowhere = jnp.zeros((lists, length), bool)
        return nowhere.at[jnp.arange(lists)[:, None], target].set(True, mode="drop", unique_indices=True)


@functools.partial(jax.jit, static_argnames=("rows", "cols"))
def micro_tile_mask(a_t: Shaped[Array, "K M"], rows: int, cols: int = 1) -> Bool[Array, "blocks micro_tiles"]:
    """True where any value of a micro-tile is non-zero (NaN counts as non-zero)."""
    k, m = a_t.shape
    active = jnp.pad(a_t.astype(bool), ((0, -k % cols), (0, -m % rows)))
    return active.reshape(-(-k // cols), cols, -(-m // rows), rows).any(axis=(1, 3)).T


def reference(a_t: Shaped[Array, "K M"], rows: int, cols: int = 1) -> MicroTileIndex:
    """The same lists by a stable sort of each block's mask: listed micro-tiles first, in order."""
    mask = micro_tile_mask(a_t, rows, cols)
    counts = mask.sum(axis=1, dtype=jnp.int32)
    order = jnp.argsort(~mask, axis=1, stable=True).astype(jnp.int32)
    listed = jnp.arange(mask.shape[1])[None] < counts[:, None]
    return MicroTileIndex(indices=jnp.where(listed, order, 0), counts=counts, rows=rows, cols=cols)


def candidates(a_t, rows: int, cols: int = 1) -> list[Config]:
    """Configs worth timing for these arguments (shapes are enough); the heuristic's choice comes first."""
    k, m = a_t.shape
    return configs(-(-m // rows), -(-k // cols))


def peers(a_t, rows: int, cols: int = 1):
    """The stable sort of the reference, and XLA alone."""
    del a_t, rows, cols
    return {"argsort": reference, "xla": functools.partial(micro_tile_index, implementation="xla")}


def micro_tile_index(
    a_t: Shaped[Array, "K M"],
    rows: int,
    cols: int = 1,
    *,
    config: Config | None = None,
    implementation: str | None = None,
) -> MicroTileIndex:
    """Finds the non-zero micro-tiles (`rows` x `cols`) of A, given k-major, from its values or from a boolean mask.

    Traced like any other function: the counts stay on the device, and a new pattern compiles nothing. The last block
    is short where `rows` does not divide M, the last micro-tile where `cols` does not divide K. Entries after a
    block's count are 0.

    Args:
        a_t: values (non-zero means active) or a boolean mask, [K, M].
        rows: rows of A in a micro-tile.
        cols: columns of A in a micro-tile.
        config: tiling of the Mosaic kernel; None takes the tuned one, or a heuristic.
        implementation: "mosaic_gpu" (Hopper), "xla" (anywhere), "interpret" (the Mosaic kernel on CPU under the race
            detector, slow), or None: the Mosaic kernel where it can run, else xla.

    Returns:
        A `MicroTileIndex` with ceil(M / rows) lists over ceil(K / cols) micro-tiles.

    Raises:
        ValueError: `rows`, `cols`, the rank of `a_t`, `config` or `implementation` is not one of the above.
        NotImplementedError: the asked implementation does not run on this device.

    Source: PIT (SOSP'23), section 3.3.
    """
    if rows < 1 or cols < 1:
        raise ValueError(f"rows and cols must be at least 1; got rows={rows}, cols={cols}")
    if a_t.ndim != 2:
        raise ValueError(f"a_t must be a matrix [K, M]; got shape {a_t.shape}")
    length = -(-a_t.shape[0] // cols)
    if (implementation := _choose(implementation)) != "xla":
        config = config or tuned_config("micro_tile_index", Config, a_t, rows, cols)
        # The kernel wants the mask's rows padded: here that is free, fused into the reduction.
        a_t = jnp.pad(a_t, ((0, (length + -length % ALIGNMENT) * cols - a_t.shape[0]), (0, 0)))
    indices, counts = _compact(micro_tile_mask(a_t, rows, cols), length, config, implementation)
    return MicroTileIndex(indices=indices, counts=counts, rows=rows, cols=cols)


def compact(
    mask: Bool[Array, "lists padded"] | Int8[Array, "lists padded"],
    length: int | None = None,
    *,
    config: Config | None = None,
    implementation: str | None = None,
) -> tuple[Int32[Array, "lists length"], Int32[Array, " lists"]]:
    """Positions of the true entries of each list, ascending and then zeros, and how many there are.

    Args:
        mask: what to list; bytes, 0 or 1, are what the kernel reads as they are.
        length: entries of each list, where rows of the mask are longer.
        config: as for `micro_tile_index`.
        implementation: as for `micro_tile_index`.

    Raises:
        ValueError: `config` or `implementation` is not one that there is.
        NotImplementedError: the asked implementation does not run on this device.
    """
    length = mask.shape[1] if length is None else length
    if (implementation := _choose(implementation)) != "xla":
        mask = jnp.pad(mask, ((0, 0), (0, -mask.shape[1] % ALIGNMENT)))
    return _compact(mask, length, config, implementation)


def _choose(implementation: str | None) -> str:
    """The implementation that runs: the one asked for, or the best for this device."""
    if implementation not in (None, "mosaic_gpu", "xla", "interpret"):
        raise ValueError(f'implementation must be None, "mosaic_gpu", "xla" or "interpret"; got {implementation!r}')
    if implementation in ("xla", "interpret"):
        return implementation
    try:
        require_device("micro_tile_index", DEVICES)
    except NotImplementedError:
        if implementation is not None:
            raise
        return "xla"
    return "mosaic_gpu"


def _compact(mask, length: int, config: Config | None, implementation: str):
    """`compact` of the first `length` entries."""
    if config is not None:
        check_config(config)
    if implementation == "xla" or not mask.size:
        return _xla(mask[:, :length].astype(bool))
    config = config or configs(mask.shape[0], length)[0]
    with jax.enable_x64(False):  # under which a Python integer meets an int32 as one of its kind
        indices, counts = mosaic(mask, length, config, interpret=implementation == "interpret")
    return _varying_as(mask, indices, counts)


@jax.jit  # eagerly, ones_like would copy the mask's sharding, whose rank is not 0
def _varying_as(mask: Shaped[Array, "lists padded"], *outputs: Int32[Array, "..."]) -> tuple[Int32[Array, "..."], ...]:
    """Inside of shard_map these vary as the mask does, but a kernel's outputs do not say so by themselves."""
    one = jnp.ones_like(mask, shape=(), dtype=jnp.int32)
    return tuple(output * one for output in outputs)  # which XLA drops


@jax.jit
def _xla(mask: Bool[Array, "lists length"]) -> tuple[Int32[Array, "lists length"], Int32[Array, " lists"]]:
    """A prefix sum and a scatter."""
    lists, length = mask.shape
    position = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
    entries = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), mask.shape)
    target = jnp.where(mask, position, length + entries)  # out of range, so dropped, and still distinct
    empty = jnp.zeros((lists, length), jnp.int32)
    indices = empty.at[jnp.arange(lists)[:, None], target].set(entries, mode="drop", unique_indices=True)
    counts = position[:, -1] + 1 if length else jnp.zeros(lists, jnp.int32)  # a sum of its own costs 2 us on an H200
    return indices, counts
