"""A block of one warpgroup for each (row, listed head of the keys, split of its slots): TMA in, multiply-adds, out.

A stage is `block_slots` slots of keys and of values of one head, two TMA copies whose rows are a head's 2 * head_dim
bytes. Arithmetic intensity is that of a dot product, so CUDA cores do. A warp reads whole slots, 16 bytes a thread, and
slot r of every `slots_at_once` (8 of head_dim 128) has its own online softmax: a running maximum, a sum of weights and
a weighted sum of values. So nothing is reduced over the warpgroup until the block ends; a score alone is reduced over
the 16 threads that hold its slot. All queries of a group meet a slot's keys in registers.

A block that has all slots of its head writes the result. Else what it found (the largest score, the sum of weights, the
weighted values) goes to global memory, float32, and XLA combines the splits in a fixed order: a launch more, 1.6 us.
Blocks past a row's count end at once; splits divide a row's own length.

Budget of a stage of 64 slots, head_dim 128, on an H200 (18.5 bytes a cycle and SM): 32 kB are 1770 cycles of memory;
each warp issues about 16 loads, 128 conversions and, for each query of the group, 230 multiply-adds, shuffles and
exponentials: 370 cycles of its scheduler for one query, 1060 for four. Two blocks an SM with 96 kB in flight each hide
the rest. Combination: 4 * (head_dim + 2) bytes for each split and query, read and written through L2.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.decode_attention.config import VECTOR, WARPS, Config, slots_at_once
from pallas_kernels.decode_attention.reference import listed_mask
from pallas_kernels.tile.launch import lowered_once

LOWEST = float(jnp.finfo(jnp.float32).min)  # the maximum of no scores: finite, so that its differences are


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tile:
    """Slots that the warpgroup has in registers at once, float32 [at_once, head_dim].

    Attributes:
        head_dim: values of a slot.
        slots: of the cache.
        group: queries of a head of the keys.
        scale: what scores are multiplied by.
        config: the kernel's.
    """

    head_dim: int
    slots: int
    group: int
    scale: float
    config: Config

    @property
    def at_once(self) -> int:
        return slots_at_once(self.head_dim)

    @property
    def layout(self) -> Any:
        """A warp has whole slots, 16 bytes of 16-bit values a thread."""
        tiles = (self.at_once, self.head_dim), (self.at_once // WARPS, self.head_dim), (VECTOR,)
        return plgpu.Layout.TILED(Tiling(tiles), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)

    def for_each_value(self, x: Float32[Array, " at_once"]) -> Float32[Array, "at_once head_dim"]:
        """A slot's number, for all of its values."""
        return plgpu.layout_cast(lax.broadcast_in_dim(x, (self.at_once, self.head_dim), (0,)), self.layout)

    def for_each_slot(self, x: Float32[Array, " head_dim"]) -> Float32[Array, "at_once head_dim"]:
        """The same values for every slot."""
        return plgpu.layout_cast(lax.broadcast_in_dim(x, (self.at_once, self.head_dim), (1,)), self.layout)

    def start(self) -> "_Sums":
        """Of no slots."""
        none, nothing = (jnp.full(self.at_once, value, jnp.float32) for value in (LOWEST, 0.0))
        top, total = (plgpu.layout_cast(x, self.layout.reduce(1)) for x in (none, nothing))
        return _Sums(top, total, plgpu.layout_cast(jnp.zeros((self.at_once, self.head_dim), jnp.float32), self.layout))

    def load(self, stage_smem, part: int) -> Float32[Array, "at_once head_dim"]:
        """One of the parts of a stage."""
        part_smem = stage_smem.at[pl.ds(part * self.at_once, self.at_once)]
        return plgpu.load(part_smem, layout=self.layout).astype(jnp.float32)

    def seen(self, at, first, length, part: int) -> Bool[Array, " at_once"]:
        """Which slots of a part of the stage at slot `at` lie in [first, length)."""
        own = plgpu.broadcasted_iota(jnp.int32, (self.at_once,), 0, layout=self.layout.reduce(1))
        slot = own + (at + part * self.at_once)
        return (slot >= first) & (slot < length)


class _Sums(NamedTuple):
    """Online softmax of one query, for each of the slots that are computed at once: `top` is the largest score.

    `total` is the sum of 2 ** (score - top), and `weighted` that of the values times as much.
    """

    top: Float32[Array, " at_once"]
    total: Float32[Array, " at_once"]
    weighted: Float32[Array, "at_once head_dim"]


def _add_stage(
    tile: _Tile, queries: list[jax.Array], sums: tuple[_Sums, ...], k_smem, v_smem, seen: list[jax.Array] | None
) -> tuple[_Sums, ...]:
    """The sums of all queries with a stage of slots in them; `seen` says which of each part count, None that all do."""
    parts = range(tile.config.block_slots // tile.at_once)
    keys = [tile.load(k_smem, part) for part in parts]
    scores = [[jnp.sum(k * q, axis=1) for k in keys] for q in queries]
    if seen is not None:
        scores = [[jnp.where(s, x, -jnp.inf) for s, x in zip(seen, row, strict=True)] for row in scores]
    tops = [functools.reduce(jnp.maximum, row, old.top) for row, old in zip(scores, sums, strict=True)]
    weights = [[jnp.exp2(x - top) for x in row] for row, top in zip(scores, tops, strict=True)]
    faded = [jnp.exp2(old.top - top) for old, top in zip(sums, tops, strict=True)]
    totals = [sum(row, start=old.total * f) for row, old, f in zip(weights, sums, faded, strict=True)]
    weighted = [old.weighted * tile.for_each_value(f) for old, f in zip(sums, faded, strict=True)]
    for part in parts:
        v = tile.load(v_smem, part)
        if seen is not None:  # what is not seen may be NaN
            v = jnp.where(tile.for_each_value(seen[part].astype(jnp.float32)) > 0, v, 0.0)
        weighted = [y + tile.for_each_value(row[part]) * v for y, row in zip(weighted, weights, strict=True)]
    return tuple(map(_Sums, tops, totals, weighted))


def _attend(tile: _Tile, row, head, split, length, refs, smem, arrived) -> None:
    """One head of a row: this split's slots of it."""
    k_smem, v_smem, weighted_smem = smem
    stages, block = tile.config.stages, tile.config.block_slots
    blocks = pl.cdiv(length, block)
    first, last = (lax.div((split + i) * blocks, tile.config.splits) for i in (0, 1))

    def origin(number):
        """First slot of a stage: the last one may not leave the cache."""
        return jnp.minimum(number * block, tile.slots - block)

    def copy(number):
        slot = lax.rem(number - first, stages)
        for name, ring in (("keys", k_smem), ("values", v_smem)):
            source = refs[name].at[row, pl.ds(origin(number), block), head]
            plgpu.copy_gmem_to_smem(source, ring.at[slot], arrived.at[slot])

    def add(masked: bool, number, sums):
        slot, at = lax.rem(number - first, stages), origin(number)
        parts = range(block // tile.at_once)
        seen = [tile.seen(at, number * block, length, part) for part in parts] if masked else None
        plgpu.barrier_wait(arrived.at[slot])
        sums = _add_stage(tile, queries, sums, k_smem.at[slot], v_smem.at[slot], seen)
        plgpu.commit_smem()  # every thread has read what the next copy overwrites
        pl.when(number + stages < last)(lambda: copy(number + stages))
        return sums

    for i in range(stages):
        pl.when(first + i < last)(functools.partial(copy, first + i))
    queries = [_query(tile, refs["q"].at[row, head * tile.group + i]) for i in range(tile.group)]
    whole = jnp.clip(lax.div(length, block), first, last)  # whose slots are all in use
    sums = tuple(tile.start() for _ in queries)
    sums = lax.fori_loop(first, whole, functools.partial(add, False), sums)
    sums = lax.fori_loop(whole, last, functools.partial(add, True), sums)
    for i, found in enumerate(sums):
        query = head * tile.group + i
        if "out" in refs:
            total, weighted = _add_slots(tile, found, weighted_smem)[1:]
            refs["out"][row, query] = (weighted / jnp.where(total == 0, 1, total)).astype(refs["out"].dtype)
        else:
            place = row, split, query
            refs["tops"][place], refs["totals"][place], refs["weighted"][place] = _add_slots(tile, found, weighted_smem)


def _query(tile: _Tile, q_gmem) -> Float32[Array, "at_once head_dim"]:
    """A query, scaled so that the scores are powers of two."""
    q = plgpu.load(q_gmem, layout=tile.layout.reduce(0), optimized=False).astype(jnp.float32)
    return tile.for_each_slot(q * (tile.scale * math.log2(math.e)))


def _add_slots(tile: _Tile, sums: _Sums, weighted_smem) -> tuple[jax.Array, jax.Array, Float32[Array, " head_dim"]]:
    """Adds up the sums of all slots: their largest score, of weights, and of values, through shared memory in order."""
    top = jnp.max(sums.top, axis=0)
    scaled = jnp.exp2(sums.top - top)
    total = jnp.sum(sums.total * scaled, axis=0)
    plgpu.commit_smem()  # every thread has read the query's before
    weighted_smem[...] = sums.weighted * tile.for_each_value(scaled)
    plgpu.commit_smem()
    load = functools.partial(plgpu.load, layout=tile.layout.reduce(0), optimized=False)
    return top, total, functools.reduce(jnp.add, [load(weighted_smem.at[i]) for i in range(tile.at_once)])


def _kernel(*args, names: tuple[str, ...], k_smem, v_smem, weighted_smem, arrived, tile: _Tile):
    refs = dict(zip(names, args, strict=True))
    row, entry, split = (lax.axis_index(name) for name in ("row", "entry", "split"))
    length = jnp.clip(refs["lengths"][row], 0, tile.slots)

    def attend(head):
        _attend(tile, row, head, split, length, refs, (k_smem, v_smem, weighted_smem), arrived)

    if "heads" not in refs:
        attend(entry)
    else:
        pl.when(entry < refs["counts"][row])(lambda: attend(refs["heads"][row, entry]))


@lowered_once("scale")
def mosaic(
    q: Float[Array, "batch heads head_dim"],
    keys: Float[Array, "batch slots kv_heads head_dim"],
    values: Float[Array, "batch slots kv_heads head_dim"],
    lengths: Int32[Array, " batch"],
    heads: Int32[Array, "batch capacity"] | None,
    counts: Int32[Array, " batch"] | None,
    scale: float,
    config: Config,
    interpret: bool,
) -> Float[Array, "batch heads head_dim"]:
    """Launches the kernel and combines what splits found; `interpret` runs it on CPU under the race detector."""
    batch, slots, kv_heads, head_dim = keys.shape
    group = q.shape[1] // kv_heads
    inputs = {"q": q, "keys": keys, "values": values, "lengths": lengths, "heads": heads, "counts": counts}
    inputs = {name: value for name, value in inputs.items() if value is not None}
    outputs = {"out": jax.ShapeDtypeStruct(q.shape, q.dtype)}
    if config.splits > 1:
        sums = batch, config.splits, q.shape[1]
        outputs = {name: jax.ShapeDtypeStruct(sums, jnp.float32) for name in ("tops", "totals")}
        outputs["weighted"] = jax.ShapeDtypeStruct((*sums, head_dim), jnp.float32)
    tile = _Tile(head_dim=head_dim, slots=slots, group=group, scale=scale, config=config)
    ring = plgpu.SMEM((config.stages, config.block_slots, head_dim), q.dtype)
    kernel = plgpu.kernel(
        functools.partial(_kernel, names=(*inputs, *outputs), tile=tile),
        out_type=tuple(outputs.values()),
        grid=(batch, kv_heads if heads is None else heads.shape[1], config.splits),
        grid_names=("row", "entry", "split"),
        scratch_types={
            "k_smem": ring,
            "v_smem": ring,
            "weighted_smem": plgpu.SMEM((tile.at_once, head_dim), jnp.float32),
            "arrived": plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
        },
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane, approx_math=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
        kernel_name="decode_attention",
    )
    found = kernel(*inputs.values())
    if heads is None or counts is None:
        return found[0] if config.splits == 1 else _combine(*found)
    written = jnp.repeat(listed_mask(heads, counts, kv_heads), group, axis=1)  # of the other heads nothing was
    if config.splits == 1:
        return jnp.where(written[..., None], found[0], 0)
    tops, totals, weighted = found
    written = written[:, None]
    tops, totals = jnp.where(written, tops, LOWEST), jnp.where(written, totals, 0)
    return _combine(tops, totals, jnp.where(written[..., None], weighted, 0))


def _combine(
    tops: Float32[Array, "batch splits heads"],
    totals: Float32[Array, "batch splits heads"],
    weighted: Float32[Array, "batch splits heads head_dim"],
) -> Float32[Array, "batch heads head_dim"]:
    """The softmax of all splits; zeros where there was no slot."""
    scaled = jnp.exp2(tops - jnp.max(tops, axis=1, keepdims=True))
    total = jnp.sum(totals * scaled, axis=1)
    out = jnp.sum(weighted * scaled[..., None], axis=1)
    return out / jnp.where(total == 0, 1, total)[..., None]
