"""Conversion to the format of `UnstructuredWeights` on the device, some runs of strips at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32, Shaped, UInt32

from pallas_kernels.unstructured_matmul import layout


def room(rows: int) -> int:
    """Rows to allocate: seven significant bits. There is one behind the last, which a warp without values may read."""
    unit = max(8, 1 << max(0, rows.bit_length() - 7))
    return -(-(rows + 1) // unit) * unit


def _pad(w: Shaped[Array, "rows columns"]) -> jax.Array:
    rows, columns = layout.padded(w.shape)
    return jnp.pad(w, ((0, rows - w.shape[0]), (0, columns - w.shape[1])))


def _by_run(w: jax.Array) -> jax.Array:
    """Padded rows, [runs, rows of a run, columns]."""
    return _pad(w).reshape(-1, layout.RUN, layout.padded(w.shape)[1])


def _run_streams(w: jax.Array) -> jax.Array:
    """The elements of a run, [blocks of its strips, streams, depth]."""
    return layout.to_streams(w).reshape(-1, layout.STREAMS, layout.DEPTH)


def _is_kept(elements: Shaped[Array, "blocks streams depth"], paired: bool) -> jax.Array:
    """What is not zero, or paired with it: by its bits, as a comparison may take subnormal numbers for zeros."""
    unsigned = jnp.dtype(f"uint{8 * elements.dtype.itemsize}")
    kept = lax.bitcast_convert_type(elements, unsigned) << 1 != 0
    if not paired:
        return kept
    pairs = kept.reshape(-1, layout.LANES, 2, layout.DEPTH)
    return jnp.broadcast_to(pairs.any(axis=2, keepdims=True), pairs.shape).reshape(kept.shape)


def _map_runs(function, *arrays):
    """`function` of each run, some at a time."""
    return lax.map(lambda run: function(*run), arrays, batch_size=layout.runs_at_once(arrays[0].shape[-1]))


@functools.partial(jax.jit, static_argnames="paired")
def index(
    w: jax.Array, paired: bool
) -> tuple[UInt32[Array, "strips words lanes"], Int32[Array, "strips_blocks streams"], jax.Array]:
    """Masks, the row at which each stream starts in each block, and the row at which each run starts (and the end)."""

    def count(run):
        return _is_kept(_run_streams(run), paired).sum(axis=-1, dtype=jnp.uint8)

    def advance(places, counts):
        ahead = places + counts.astype(jnp.int32)
        ahead = jnp.maximum(ahead, ahead.max(axis=1, keepdims=True) - layout.MAX_LAG)
        return ahead, places

    def mask(run, stored):
        present = _is_kept(_run_streams(run), paired)
        missing = stored - present.sum(axis=-1, dtype=jnp.uint8)  # what a stream that lags stores of its zeros
        zeros_so_far = jnp.cumsum(~present, axis=-1, dtype=jnp.uint8)
        present |= zeros_so_far <= missing[..., None]
        return layout.to_words(present.reshape(layout.STRIPS, -1, *present.shape[1:]), paired)

    rows, columns = layout.padded(w.shape)
    strips, blocks = rows // layout.STRIP, columns // layout.BLOCK
    if not w.size:
        nowhere = jnp.zeros((0, layout.STREAMS), jnp.int32)
        words = jnp.zeros((strips, layout.mask_blocks(blocks, paired), layout.LANES), jnp.uint32)
        return words, nowhere, jnp.zeros(1, jnp.int32)
    runs = _by_run(w)
    counts = _map_runs(count, runs)  # [runs, blocks, streams]
    places = jnp.zeros((runs.shape[0], layout.STREAMS), jnp.int32)
    ends, starts = lax.scan(advance, places, counts.swapaxes(0, 1))
    starts = starts.swapaxes(0, 1)
    stored = jnp.diff(starts, axis=1, append=ends[:, None]).astype(jnp.uint8)
    masks = _map_runs(mask, runs, stored).reshape(strips, -1, layout.LANES)
    lengths = ends.max(axis=1)
    run_rows = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(lengths, dtype=jnp.int32)])
    return masks, (starts + run_rows[:-1, None, None]).reshape(-1, layout.STREAMS), run_rows


@functools.partial(jax.jit, static_argnames=("rows", "value_dtype", "paired"))
def gather_values(w, masks, starts, scales, rows: int, value_dtype: np.dtype, paired: bool) -> Array:
    """The rows of `values`: each element where its stream has it. Runs are taken some at a time, in place."""
    if not w.size:
        return jnp.zeros((rows, layout.STREAMS), value_dtype)
    w_runs, n_runs = _by_run(w), masks.shape[0] // layout.STRIPS
    together = min(layout.runs_at_once(w_runs.shape[2]), n_runs)
    scales = jnp.ones(w.shape[0], jnp.float32) if scales is None else scales
    scales = jnp.pad(scales, (0, -w.shape[0] % layout.RUN), constant_values=1).reshape(n_runs, layout.RUN, 1)
    words, starts = masks.reshape(n_runs, layout.STRIPS, *masks.shape[1:]), starts.reshape(n_runs, -1, layout.STREAMS)

    def store(step, values):
        # The last step starts earlier where `together` does not divide the runs, and stores some once more.
        first = jnp.minimum(step * together, n_runs - together)
        own_w, own_scales, own_words, own_starts = (
            lax.dynamic_slice_in_dim(x, first, together) for x in (w_runs, scales, words, starts)
        )
        elements = jax.vmap(_run_streams)(_quantize(own_w, own_scales, value_dtype))
        bits = layout.to_bits(own_words, own_starts.shape[1] // layout.STRIPS, paired)
        bits = bits.reshape(*own_starts.shape, layout.DEPTH)
        places = own_starts[..., None] + layout.ranks(bits).astype(jnp.int32)
        nowhere = rows + jnp.arange(places.size, dtype=jnp.int32).reshape(places.shape)  # distinct, and dropped
        streams = jnp.broadcast_to(jnp.arange(layout.STREAMS, dtype=jnp.int32)[:, None], places.shape)
        places = jnp.where(bits > 0, places, nowhere)
        return values.at[places, streams].set(elements, mode="drop", unique_indices=True)

    values = jnp.zeros((rows, layout.STREAMS), value_dtype)
    return lax.fori_loop(0, -(-n_runs // together), store, values)


def scales_of(w: jax.Array, value_dtype: np.dtype) -> jax.Array:
    """Of each row: what an 8-bit value of 1 stands for; 1 where all is zero."""
    finite = jnp.isfinite(w)
    largest = jnp.abs(jnp.where(finite, w, 0).astype(jnp.float32)).max(axis=1, initial=0)
    smallest = jnp.finfo(jnp.float32).tiny  # a scale below is flushed to zero, and what is divided by it is infinite
    scales = jnp.where(largest == 0, 1, jnp.maximum(largest / _largest(value_dtype), smallest))
    # float8 has a NaN of its own, and so keeps the other values of a row that has one.
    return scales if value_dtype != jnp.int8 else jnp.where(finite.all(axis=1), scales, jnp.nan)


def _largest(value_dtype: np.dtype) -> float:
    return float((jnp.iinfo if value_dtype == jnp.int8 else jnp.finfo)(value_dtype).max)


def _quantize(w: jax.Array, scales: jax.Array, value_dtype: np.dtype) -> jax.Array:
    if value_dtype == w.dtype:
        return w
    scaled = w.astype(jnp.float32) / scales
    if value_dtype == jnp.int8:
        return jnp.where(jnp.isfinite(scaled), jnp.round(scaled), 0).astype(jnp.int8)
    return scaled.astype(value_dtype)


@functools.partial(jax.jit, static_argnames="blocks")
def sections(starts: Int32[Array, "strips_blocks streams"], end: jax.Array, blocks: int) -> tuple[jax.Array, jax.Array]:
    """Lags and rows of the sections, given where each block starts and the end of all; `blocks` are a strip's."""
    firsts = layout.first_blocks(starts.shape[0] // blocks if blocks else 0, blocks)[:-1]
    chosen = jnp.concatenate([starts[jnp.asarray(firsts)], jnp.broadcast_to(end[:, None], (1, layout.STREAMS))])
    rows = chosen.min(axis=1)
    return (chosen - rows[:, None]).astype(jnp.uint8), rows
