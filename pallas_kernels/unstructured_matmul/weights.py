"""`UnstructuredWeights`: a matrix whose zeros follow no structure, as a bitmap and the values that are left.

Values lie in the order in which the lanes of a warp need them (`layout`): row p of `values` is value p of each of a
run's 64 streams. When a block starts, no stream is more than `MAX_LAG` rows behind the one furthest ahead, whatever the
mask: one that would be stores some of its zeros. So a decoder's window of rows has a fixed size. The lags at the first
block of a section let a decoder start there.

Bytes an element, random masks of bfloat16: 1.03 to 1.09 times 2 * density + 1/8 at 4096 columns or more.

Paired (`layout`), an element is stored where it or its neighbour is not zero: about 2 * (1 - zeros ** 2) + 1/16 bytes,
1.08 and 0.78 where single ones take 0.72 and 0.52, at 70% and 80% zeros; but half as many places to find.

Sources: SpInfer (EuroSys'25), bitmaps in the order of the mma fragments; Flash-LLM (VLDB'24), sections 3 and 4.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, UInt32

from pallas_kernels.unstructured_matmul import layout, pack

DTYPES = ("bfloat16", "float16", "float32")
VALUE_DTYPES = ("int8", "float8_e4m3fn")  # that a scale for each row goes with


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "masks", "rows", "lags", "scales"),
    meta_fields=("shape", "dtype", "paired"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class UnstructuredWeights:
    """A matrix [out, in] as bitmap and values. Made by `from_dense`; `check` tells whether a loaded one is sound.

    Attributes:
        values: row p is value p of every stream, [rows, 64]; what lies behind a stream's end may be anything.
        masks: which elements are stored, a word for each lane and block, uint32 [strips, blocks, 32]; paired, for
            each lane and two blocks, [strips, (blocks + 1) // 2, 32].
        rows: of `values`, where each section starts: that of the stream furthest back; the last entry is the end of
            all. int32 [sections + 1].
        lags: how many rows further on each stream is there, uint8 [sections + 1, 64].
        scales: of each row where values are 8 bits, float32 [out]; else None.
        shape: (out, in). Static under jit, as what follows.
        dtype: of the matrix.
        paired: whether the elements of columns 2 i and 2 i + 1 are stored together.
    """

    values: Any  # not typed as arrays: as a pytree it also carries shapes and shardings
    masks: Any
    rows: Any
    lags: Any
    scales: Any
    shape: tuple[int, int]
    dtype: np.dtype
    paired: bool = False

    @classmethod
    def from_dense(
        cls, w: Float[Array, "out in"], value_dtype: DTypeLike | None = None, paired: bool = False
    ) -> "UnstructuredWeights":
        """Compresses a matrix on the device where it lies.

        Zeros are dropped, and so is the sign of -0.0; NaN and infinities are kept. The number of values is read on the
        host, once; under jit, where it cannot be known, the result has room for a matrix without zeros. Room is
        rounded up by less than 1/64, so that layers of one shape and density share what is compiled for them.

        Args:
            w: bfloat16, float16 or float32.
            value_dtype: "int8" or "float8_e4m3fn" stores values in 8 bits with a scale for each row, the nearest that
                there are; an int8 row with a NaN or an infinity is NaN, float8 makes an infinity NaN. None keeps them
                as they are.
            paired: whether elements are stored two by two: more bytes, and fewer instructions for the Mosaic kernel.

        Raises:
            ValueError: `w` is not such a matrix, has 2**31 elements or more, or `value_dtype` is not one of these.
        """
        w = jnp.asarray(w)
        _check_dense(w, value_dtype)
        with jax.enable_x64(False):
            scales = None if value_dtype is None else pack.scales_of(w, jnp.dtype(value_dtype))
            masks, starts, run_rows = pack.index(w, paired)
            padded_rows, padded_columns = layout.padded(w.shape)
            blocks = padded_columns // layout.BLOCK
            rows = padded_rows // layout.STRIP * blocks * layout.DEPTH + 1
            if not isinstance(run_rows, Tracer):
                rows = pack.room(int(run_rows[-1]))
            values = pack.gather_values(w, masks, starts, scales, rows, jnp.dtype(value_dtype or w.dtype), paired)
            lags, section_rows = pack.sections(starts, run_rows[-1:], blocks)
        shape = (w.shape[0], w.shape[1])
        return cls(
            values=values,
            masks=masks,
            rows=section_rows,
            lags=lags,
            scales=scales,
            shape=shape,
            dtype=w.dtype,
            paired=paired,
        )

    @property
    def strips(self) -> int:
        """Of 16 rows."""
        return layout.padded(self.shape)[0] // layout.STRIP

    @property
    def blocks(self) -> int:
        """Of 64 columns, of a strip."""
        return layout.padded(self.shape)[1] // layout.BLOCK

    @property
    def nbytes(self) -> int:
        """Of all its arrays."""
        return sum(int(x.size) * x.dtype.itemsize for x in jax.tree.leaves(self))

    def to_dense(self) -> Float[Array, "out in"]:
        """The matrix again: exactly, but for the rounding of 8-bit values and the sign of zeros."""
        with jax.enable_x64(False):
            return _to_dense(self)

    def check(self) -> None:
        """Reads all counts and offsets, once, so that no kernel reads what it should not. Not under jit.

        Raises:
            ValueError: names the array that is not what `from_dense` would have made.
        """
        _check_arrays(self)
        with jax.enable_x64(False):
            for rule, holds in _soundness(self).items():
                if not bool(holds):
                    raise ValueError(f"{rule}; the weights {list(self.shape)} are corrupted")


def _check_dense(w, value_dtype) -> None:
    if w.ndim != 2 or w.dtype not in DTYPES:
        raise ValueError(f"w must be a matrix of {', '.join(DTYPES)}; got {w.dtype}{list(w.shape)}")
    rows, columns = layout.padded(w.shape)
    if rows * columns >= 2**31:
        raise ValueError(f"w must have less than 2**31 elements; got {w.dtype}{list(w.shape)}")
    if value_dtype is not None and jnp.dtype(value_dtype) not in VALUE_DTYPES:
        raise ValueError(f"value_dtype must be None or one of {', '.join(VALUE_DTYPES)}; got {value_dtype}")


def block_starts(weights: UnstructuredWeights) -> Int32[Array, "strips blocks streams"]:
    """The row at which each stream starts in each block: those of its section, and what is stored since."""
    strips, blocks = weights.strips, weights.blocks
    n_sections = layout.sections(blocks)
    firsts = weights.rows[:-1, None] + weights.lags[:-1].astype(jnp.int32)
    counts = layout.counts(weights.masks, blocks, weights.paired)
    counts = jnp.pad(counts, ((0, 0), (0, n_sections * layout.SECTION - blocks), (0, 0)))
    counts = counts.reshape(strips, n_sections, layout.SECTION, layout.STREAMS)
    starts = firsts.reshape(strips, n_sections, 1, layout.STREAMS) + jnp.cumsum(counts, axis=2) - counts
    return starts.reshape(strips, -1, layout.STREAMS)[:, :blocks]


def decode(
    weights: UnstructuredWeights,
    masks: UInt32[Array, "strips words lanes"],
    starts: Int32[Array, "strips blocks streams"],
) -> Array:
    """Some strips as dense rows, without their scales: their part of `masks`, and of what `block_starts` gives."""
    bits = layout.to_bits(masks, starts.shape[1], weights.paired)
    places = starts[..., None] + layout.ranks(bits).astype(jnp.int32)
    streams = jnp.arange(layout.STREAMS, dtype=jnp.int32).reshape(1, 1, -1, 1)
    found = weights.values.at[places, jnp.broadcast_to(streams, places.shape)].get(mode="clip")
    return layout.from_streams(jnp.where(bits > 0, found, jnp.zeros((), found.dtype)))


def map_strips(function, weights: UnstructuredWeights):
    """`function(dense rows of a strip)` for every strip, some at a time; results are stacked by strip."""

    def one(strip):
        return function(decode(weights, strip[0][None], strip[1][None]))

    columns = weights.blocks * layout.BLOCK
    together = layout.STRIPS * layout.runs_at_once(max(columns, 1))
    return lax.map(one, (weights.masks, block_starts(weights)), batch_size=together)


@jax.jit
def _to_dense(weights: UnstructuredWeights) -> Array:
    rows, columns = weights.shape
    if not rows or not columns:
        return jnp.zeros(weights.shape, weights.dtype)
    w = map_strips(lambda strip: strip, weights)
    w = w.reshape(-1, w.shape[-1])[:rows, :columns]
    if weights.scales is not None:
        w = w.astype(jnp.float32) * weights.scales[:, None]
    return w.astype(weights.dtype)


def _check_arrays(weights: UnstructuredWeights) -> None:
    """Raises ValueError unless all arrays have the shapes and dtypes that the matrix' shape asks for."""
    strips, blocks = weights.strips, weights.blocks
    n_sections = strips * layout.sections(blocks) + 1
    value_dtypes = (weights.dtype,) if weights.scales is None else tuple(map(jnp.dtype, VALUE_DTYPES))
    for name in ("values", "masks", "rows", "lags"):
        if getattr(weights, name) is None:
            raise ValueError(f"{name} must be there; got None")
    expected = {
        "values": ((*weights.values.shape[:1], layout.STREAMS), value_dtypes),
        "masks": ((strips, layout.mask_blocks(blocks, weights.paired), layout.LANES), (jnp.dtype("uint32"),)),
        "rows": ((n_sections,), (jnp.dtype("int32"),)),
        "lags": ((n_sections, layout.STREAMS), (jnp.dtype("uint8"),)),
    }
    if weights.scales is not None:
        expected["scales"] = (weights.shape[:1], (jnp.dtype("float32"),))
    for name, (shape, dtypes) in expected.items():
        array = getattr(weights, name)
        if array.shape != shape or array.dtype not in dtypes:
            one_of = " or ".join(str(dtype) for dtype in dtypes)
            raise ValueError(f"{name} must be {one_of}{list(shape)}; got {array.dtype}{list(array.shape)}")


@jax.jit
def _soundness(weights: UnstructuredWeights) -> dict[str, jax.Array]:
    """What has to hold, as rule and truth."""
    if not weights.masks.size:
        return {"rows must be 0": weights.rows[0] == 0}
    blocks, in_words = weights.blocks, weights.masks.shape[1] * (2 if weights.paired else 1)
    firsts = weights.rows[:, None] + weights.lags.astype(jnp.int32)
    by_run = layout.STRIPS * layout.sections(blocks)
    starts, counts = block_starts(weights), layout.counts(weights.masks, blocks, weights.paired)
    behind = starts.max(axis=-1) - starts.min(axis=-1)
    n_sections = layout.sections(blocks)
    last = jnp.asarray(np.append(np.arange(1, n_sections) * layout.SECTION, blocks)[:n_sections] - 1)
    ends = (starts + counts)[:, last].reshape(-1, layout.STREAMS)  # where each section's streams end
    aligned = (jnp.arange(ends.shape[0]) + 1) % by_run == 0  # where a run ends, only the longest stream does
    ends = jnp.where(aligned[:, None], ends.max(axis=1, keepdims=True), ends)
    return {
        "rows must start at 0 and end within values": (weights.rows[0] == 0)
        & (weights.rows[-1] < weights.values.shape[0]),
        "rows and lags must say where the sections of masks start": (firsts[1:] == ends).all(),
        "rows must be those of the stream furthest back": (weights.lags.min(axis=1) == 0).all(),
        f"lags must be {layout.MAX_LAG} at most in every block": (behind <= layout.MAX_LAG).all(),
        "lags must be 0 where a run starts": (weights.lags[::by_run] == 0).all(),
        "masks must be 0 behind a strip's last block": (
            layout.counts(weights.masks, in_words, weights.paired)[:, blocks:] == 0
        ).all(),
    }
