"""Index of the non-zero micro-tiles: for every block of rows of A, the k at which any of its rows is non-zero.

    indices[i, :counts[i]] = { k : any(a_t[k, i*rows : (i+1)*rows] != 0) },  ascending

Layout: `a_t` is k-major ([K, M]), as `gather_matmul` reads it, so the `rows` values of a micro-tile lie together.
Work: K*M comparisons; bytes: the K*M values once, 4*K*ceil(M/rows) of index written.
Source: PIT (SOSP'23), section 3.3, online detection of micro-tiles. PIT appends coordinates in any order; here they
come out ascending, so that equal inputs give equal bits and neighbouring k share cache lines in the gather.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Shaped

from pallas_kernels.case import Case, Work

ROWS = (1, 8, 16, 32, 64, 128)
DEVICES: tuple[str, ...] = ()  # plain XLA: every device


@functools.partial(jax.tree_util.register_dataclass, data_fields=("indices", "counts"), meta_fields=("rows",))
@dataclasses.dataclass(frozen=True, kw_only=True)
class MicroTileIndex:
    """Which k matter to each block of rows: `indices[i, :counts[i]]`, distinct. What follows them may be anything.

    Attributes:
        indices: k positions, one list a block of rows, int32 [blocks, K].
        counts: how many entries of each list count, int32 [blocks].
        rows: rows in a block (the granularity is `rows` x 1); static under jit.
    """

    indices: Any  # not typed as arrays: as a pytree it also carries shapes, shardings and cotangents
    counts: Any
    rows: int

    def mask(self) -> Bool[Array, "blocks K"]:
        """True where a micro-tile is listed."""
        blocks, k = self.indices.shape
        listed = jnp.arange(k, dtype=jnp.int32)[None] < self.counts[:, None]
        target = jnp.where(listed, self.indices, k)  # k is out of range: dropped
        return jnp.zeros((blocks, k), bool).at[jnp.arange(blocks)[:, None], target].set(True, mode="drop")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Nothing to tune: XLA fuses the reduction and the prefix sum itself."""


def micro_tile_mask(a_t: Shaped[Array, "K M"], rows: int) -> Bool[Array, "blocks K"]:
    """True where any of the `rows` values of a micro-tile is non-zero (NaN counts as non-zero)."""
    k, m = a_t.shape
    active = jnp.pad(a_t.astype(bool), ((0, 0), (0, -m % rows)))
    return active.reshape(k, -(-m // rows), rows).any(axis=2).T


def reference(a_t: Shaped[Array, "K M"], rows: int) -> MicroTileIndex:
    """The same lists by a stable sort of each block's mask: listed k first, in order."""
    mask = micro_tile_mask(a_t, rows)
    counts = mask.sum(axis=1, dtype=jnp.int32)
    order = jnp.argsort(~mask, axis=1, stable=True).astype(jnp.int32)
    listed = jnp.arange(mask.shape[1])[None] < counts[:, None]
    return MicroTileIndex(indices=jnp.where(listed, order, 0), counts=counts, rows=rows)


def candidates(a_t, rows: int) -> list[Config]:
    """One config: there is nothing to tune."""
    del a_t, rows
    return [Config()]


def work(a_t, rows: int) -> Work:
    """A comparison a value; the values read once, the lists written in full."""
    k, m = a_t.shape
    blocks = -(-m // rows)
    return Work(flops=k * m, bytes=k * m * a_t.dtype.itemsize + 4 * blocks * (k + 1))


def peers(a_t, rows: int):
    """The stable sort of the reference."""
    del a_t, rows
    return {"argsort": reference}


def _case(name: str, *, m: int, k: int, rows: int, density: float, **flags) -> Case:
    def make(key: jax.Array, dtype: jnp.dtype):
        key_values, key_mask = jax.random.split(key)
        mask = jax.random.uniform(key_mask, (k, m)) < density
        return jnp.where(mask, jax.random.normal(key_values, (k, m), jnp.float32), 0).astype(dtype), rows

    return Case(name=name, make=make, dtypes=("bfloat16", "float16", "float32"), gradient=False, **flags)


CASES = (
    _case("empty", m=64, k=33, rows=16, density=0.0, small=True),
    _case("full", m=64, k=33, rows=16, density=1.0, small=True),
    _case("ragged", m=131, k=257, rows=64, density=0.01, small=True),
    *(_case(f"rows {rows}", m=300, k=129, rows=rows, density=0.02, small=True) for rows in ROWS),
    _case("opt-1.3b fc1 output", m=2048, k=8192, rows=128, density=0.001, bench=True),
    _case("4096 squared", m=4096, k=4096, rows=128, density=0.001, bench=True),
)


def micro_tile_index(
    a_t: Shaped[Array, "K M"],
    rows: int,
    *,
    config: Config | None = None,
    implementation: str | None = None,
) -> MicroTileIndex:
    """Finds the non-zero micro-tiles (`rows` x 1) of A, given k-major, from its values or from a boolean mask.

    Traced like any other function: the counts stay on the device, and a new pattern compiles nothing. The last block
    is short where `rows` does not divide M. Entries after a block's count are 0.

    Args:
        a_t: values (non-zero means active) or a boolean mask, [K, M].
        rows: rows in a block: 1, 8, 16, 32, 64 or 128.
        config: has no fields; there for symmetry with the other kernels.
        implementation: None or "xla".

    Returns:
        A `MicroTileIndex` with ceil(M / rows) lists.

    Raises:
        ValueError: `rows` or the rank of `a_t` is not one of the above.
        NotImplementedError: `implementation` is not "xla".

    Source: PIT (SOSP'23), section 3.3.
    """
    del config
    if rows not in ROWS:
        raise ValueError(f"rows must be one of {ROWS}; got rows={rows}")
    if a_t.ndim != 2:
        raise ValueError(f"a_t must be a matrix [K, M]; got shape {a_t.shape}")
    if implementation not in (None, "xla"):
        raise NotImplementedError(f'micro_tile_index has the implementation "xla" only; got {implementation!r}')
    mask = micro_tile_mask(a_t, rows)
    blocks, k = mask.shape
    position = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
    ks = jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32), mask.shape)
    target = jnp.where(mask, position, k + ks)  # out of range, so dropped, and still distinct
    empty = jnp.zeros((blocks, k), jnp.int32)
    indices = empty.at[jnp.arange(blocks)[:, None], target].set(ks, mode="drop", unique_indices=True)
    counts = position[:, -1] + 1 if k else jnp.zeros(blocks, jnp.int32)  # a sum of its own costs 2 us on an H200
    return MicroTileIndex(indices=indices, counts=counts, rows=rows)
