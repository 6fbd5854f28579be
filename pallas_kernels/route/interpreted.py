"""What the kernels of `route` do, with plain reads and writes, for the interpreter and its race detector.

Each warpgroup writes what it writes in `device`, so that each element is written once is checked; what happens between
the threads of a block is not.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.route.device import Work
from pallas_kernels.route.xla import top_experts

WARPS = 4  # of a warpgroup


def _tokens(work: Work, block: jax.Array, first_warp: jax.Array | int, warps: int) -> tuple[jax.Array, jax.Array]:
    """The tokens of some warps, and which of them there are."""
    group, part = lax.div(block, work.blocks_a_group), lax.rem(block, work.blocks_a_group)
    first = (part * work.warps + first_warp) * work.warp_tokens
    in_group = first + jnp.arange(warps * work.warp_tokens, dtype=jnp.int32)
    tokens = group * work.group_tokens + in_group
    return jnp.minimum(tokens, work.tokens - 1), in_group < work.group_tokens


def _named(work: Work, inputs, tokens: jax.Array, exist: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The experts of these tokens, and whether each expert is one of them: [tokens, experts]."""
    scores, *masks = (x[...] for x in inputs)
    ids = top_experts(scores[tokens], work.top_k)
    takes = exist & (masks[0][tokens] != 0) if masks else exist
    named = jax.nn.one_hot(ids, work.experts, dtype=jnp.bool_).any(axis=1)
    return ids, named & takes[:, None]


def choose(work: Work, block: jax.Array, warpgroup: jax.Array, inputs, outputs) -> None:
    """What a warpgroup of `device.choose` writes."""
    ids_gmem, words_gmem, counts_gmem = outputs
    tokens, exist = _tokens(work, block, warpgroup * WARPS, WARPS)
    ids, named = _named(work, inputs, tokens, exist)
    bits = named.reshape(WARPS, work.warp_tokens, -1).astype(jnp.uint32) << _offsets(work).astype(jnp.uint32)
    words = lax.bitcast_convert_type(bits.sum(axis=1, dtype=jnp.uint32), jnp.int32)
    words_gmem[pl.ds(block * work.warps + warpgroup * WARPS, WARPS)] = words

    @functools.partial(lax.fori_loop, 0, tokens.size, init_val=None)
    def _write(i, _):
        @pl.when(exist[i])
        def _write_token():
            ids_gmem[tokens[i]] = ids[i]

    @pl.when(warpgroup == 0)
    def _count():
        _, named = _named(work, inputs, *_tokens(work, block, 0, work.warps))
        counts_gmem[block] = named.sum(axis=0, dtype=jnp.int32)


def place(work: Work, block: jax.Array, warpgroup: jax.Array, inputs, outputs) -> None:
    """What a warpgroup of `device.place` writes."""
    (ids, words, counts), (order_gmem, totals_gmem) = (x[...] for x in inputs), outputs
    total = functools.partial(jnp.sum, axis=0, keepdims=True, dtype=jnp.int32)  # of each expert, [1, experts]
    of_runs = counts.reshape(-1, work.run, work.experts)
    run, block_in_run = lax.div(block, work.run), lax.rem(block, work.run)
    capacity = work.tokens if work.capacity is None else work.capacity
    taken = jnp.minimum(of_runs.sum(axis=1, dtype=jnp.int32), capacity)
    totals = total(taken)
    starts = jnp.cumsum(totals, axis=1) - totals
    first_slots = starts + total(jnp.where(jnp.arange(taken.shape[0])[:, None] < run, taken, 0))
    limits = first_slots + capacity
    before_block = total(jnp.where(jnp.arange(work.run)[:, None] < block_in_run, of_runs[run], 0))

    words = lax.dynamic_slice_in_dim(words, block * work.warps, work.warps)
    bits = ((words[:, None] >> _offsets(work)) & 1).reshape(-1, work.experts)
    slots = first_slots + before_block + jnp.cumsum(bits, axis=0) - bits  # if the expert takes them
    is_taken = (bits != 0) & (slots < limits)
    taken_before_block = jnp.sum(jnp.minimum(first_slots + before_block, limits) - starts, dtype=jnp.int32)

    tokens, exist = _tokens(work, block, 0, work.warps)
    own = functools.partial(jnp.take_along_axis, indices=ids[tokens], axis=1)
    positions = (tokens[:, None] * work.top_k + jnp.arange(work.top_k, dtype=jnp.int32)[None]).ravel()
    own_taken = own(is_taken).ravel()
    taken_before = taken_before_block + jnp.cumsum(own_taken, dtype=jnp.int32) - own_taken.astype(jnp.int32)
    slots = jnp.where(own_taken, own(slots).ravel(), totals.sum(dtype=jnp.int32) + positions - taken_before)
    size = WARPS * work.warp_tokens * work.top_k

    @functools.partial(lax.fori_loop, warpgroup * size, (warpgroup + 1) * size, init_val=None)
    def _write(i, _):
        @pl.when(exist[lax.div(i, work.top_k)])
        def _write_position():
            order_gmem[slots[i]] = positions[i]

    @pl.when((block == 0) & (warpgroup == 0))
    def _write_totals():
        totals_gmem[...] = totals[0]


def choose_and_place(work: Work, block: jax.Array, warpgroup: jax.Array, inputs, outputs) -> None:
    """Both, by one warpgroup: the others' barrier is not modelled."""

    @pl.when(warpgroup == 0)
    def _do_all():
        for part, refs, results in ((choose, inputs, outputs[:3]), (place, outputs[:3], outputs[3:])):
            for other in range(work.warps // WARPS):
                part(work, block, jnp.int32(other), refs, results)


def _offsets(work: Work) -> jax.Array:
    """The bit of each token in its warp's words, [1, warp_tokens, 1]."""
    return jnp.arange(work.warp_tokens, dtype=jnp.int32)[None, :, None]
