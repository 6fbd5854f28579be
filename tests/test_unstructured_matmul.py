import contextlib
import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import lanes
import numpy as np
import pytest
from lanes import Int, number, unsigned

from pallas_kernels.case import relative_error
from pallas_kernels.tile import lane
from pallas_kernels.unstructured_matmul import (
    EXPAND_N,
    Config,
    UnstructuredWeights,
    device,
    expand,
    layout,
    peers,
    pipelines,
    reference,
    unstructured_matmul,
    unstructured_matmuls,
    warp,
    work,
)
from pallas_kernels.unstructured_matmul.config import QUAD
from pallas_kernels.unstructured_matmul.mosaic import by_column, divide
from pallas_kernels.unstructured_matmul.mosaic import expand as mosaic_expand

SHAPE = (100, 1100)  # no multiple of a strip, a run, a block or a section; two runs, and three sections a strip


def matrix(pattern: str, shape: tuple[int, int] = SHAPE, dtype: str = "bfloat16") -> np.ndarray:
    """Zeros by pattern; values that a 16-bit type holds."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal(shape).astype(jnp.dtype(dtype))
    rows, columns = (np.arange(size) for size in shape)
    kept = {
        "empty": np.zeros(shape, bool),
        "full": np.ones(shape, bool),
        "tenth": rng.random(shape) < 0.1,
        "half": rng.random(shape) < 0.5,
        "one row": np.broadcast_to(rows[:, None] == 5, shape),  # two of its lanes would run ahead of all others
        "even columns": np.broadcast_to(columns % 2 == 0, shape),
        "clustered": (rows[:, None] % 32 < 9) & (columns[None] % 300 < 170),
        "one value": (rows[:, None] == shape[0] - 1) & (columns[None] == shape[1] - 1),
    }[pattern]
    w = np.where(kept, w, np.zeros((), w.dtype))
    return w


PATTERNS = ("empty", "full", "tenth", "half", "one row", "even columns", "clustered", "one value")


def compress_all(paired: bool) -> dict[str, UnstructuredWeights]:
    """Each pattern; under jit but for one, so that all have the same shapes, and little is compiled."""
    compress = jax.jit(UnstructuredWeights.from_dense, static_argnames="paired")
    traced = {pattern: compress(jnp.asarray(matrix(pattern)), paired=paired) for pattern in PATTERNS}
    return traced | {"half": UnstructuredWeights.from_dense(jnp.asarray(matrix("half")), paired=paired)}


@pytest.fixture(scope="module")
def compressed():
    return compress_all(paired=False)


@pytest.fixture(scope="module")
def in_pairs():
    return compress_all(paired=True)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pairs_round_trip_exactly(in_pairs, pattern):
    weights = in_pairs[pattern]
    weights.check()
    np.testing.assert_array_equal(np.asarray(weights.to_dense()), matrix(pattern))
    kept = matrix(pattern).reshape(100, 550, 2).any(axis=2)
    assert weights.blocks == 18 and weights.masks.shape == (8, 9, 32)
    stored = np.bitwise_count(np.asarray(weights.masks)).sum()
    assert kept.sum() <= stored  # those that lag store zeros
    if pattern == "tenth":
        assert stored < 1.02 * kept.sum()


def test_a_mask_word_of_pairs_serves_two_blocks():
    """Each element's bit, one at a time, of three blocks: the third word's second half is empty."""
    for block, t in ((0, 0), (1, 3), (2, 15)):
        present = np.zeros((3, 64, 16), bool)
        present[block, 2 * 5 : 2 * 5 + 2, t] = True
        words = np.asarray(layout.to_words(jnp.asarray(present), paired=True))
        expected = np.zeros((2, 32), np.uint32)
        expected[block // 2, 5] = 1 << layout.bit(block % 2, t)
        np.testing.assert_array_equal(words, expected)
        np.testing.assert_array_equal(layout.to_bits(jnp.asarray(words), 3, paired=True), present)
        counts = np.asarray(layout.counts(jnp.asarray(words), 3, paired=True))
        np.testing.assert_array_equal(counts, present.sum(axis=-1))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_round_trip_is_exact_and_sound(compressed, pattern):
    weights = compressed[pattern]
    weights.check()
    np.testing.assert_array_equal(np.asarray(weights.to_dense()), matrix(pattern))
    assert weights.shape == SHAPE and weights.dtype == jnp.bfloat16


@pytest.mark.parametrize(("shape", "dtype"), [((1, 65), "float16"), ((0, 5), "bfloat16"), ((5, 0), "bfloat16")])
def test_round_trip_of_odd_shapes_and_dtypes(shape, dtype):
    w = matrix("half", shape, dtype)
    weights = UnstructuredWeights.from_dense(jnp.asarray(w))
    weights.check()
    np.testing.assert_array_equal(np.asarray(weights.to_dense()), w)


def test_layout_is_that_of_the_mma_fragments():
    """Against the PTX manual's formulas for mma.m16n8k16: each element, one at a time."""
    rows, columns = np.meshgrid(np.arange(16), np.arange(64), indexing="ij")
    numbers = np.arange(16 * 64).reshape(16, 64)
    streams = np.asarray(layout.to_streams(jnp.asarray(numbers)))[0, 0]
    lane_of, register, half = rows % 8 * 4 + columns % 8 // 2, rows // 8 + columns % 16 // 8 * 2, columns % 2
    expected = np.zeros((64, 16), int)
    expected[2 * lane_of + half, columns // 16 * 4 + register] = numbers
    np.testing.assert_array_equal(streams, expected)
    np.testing.assert_array_equal(layout.from_streams(jnp.asarray(expected)[None, None]), numbers)
    assert sorted(layout.bit(half, t) for half in range(2) for t in range(16)) == list(range(32))


def test_special_values_are_kept_but_for_the_sign_of_zero():
    w = np.zeros((70, 130), np.float32)
    w[3, 7], w[4, 8], w[5, 9], w[6, 10] = np.nan, np.inf, -0.0, 1e-45
    dense = np.asarray(UnstructuredWeights.from_dense(jnp.asarray(w)).to_dense())
    w[5, 9] = 0.0
    np.testing.assert_array_equal(dense.view(np.int32), w.view(np.int32))


@pytest.mark.parametrize(("density", "paired"), [(0.1, False), (0.5, False), (0.2, True)])
def test_size_and_drift_of_random_masks(density, paired):
    rng = np.random.default_rng(1)
    w = (rng.random((64, 4096)) < density).astype(np.float32)
    weights = UnstructuredWeights.from_dense(jnp.asarray(w, jnp.bfloat16), paired=paired)
    weights.check()
    assert weights.nbytes == sum(x.nbytes for x in jax.tree.leaves(weights))
    expected = 2 * (1 - (1 - density) ** 2) + 1 / 16 if paired else 2 * density + 1 / 8
    assert weights.nbytes / w.size <= 1.1 * expected


def test_streams_that_lag_store_zeros(compressed):
    """One dense row: the lanes that have it may not run ahead by more than the format allows."""
    weights = compressed["one row"]
    counts = np.bitwise_count(np.asarray(weights.masks)).sum()
    assert counts > 1100 and counts < 64 * 1152 // 2
    starts = np.asarray(weights.rows)[:, None] + np.asarray(weights.lags)
    assert np.ptp(starts, axis=1).max() == layout.MAX_LAG


def test_only_what_is_needed_is_allocated_except_under_jit(compressed):
    rows = int(compressed["half"].rows[-1])
    assert rows < compressed["half"].values.shape[0] <= rows * (1 + 1 / 64) + 8
    assert compressed["tenth"].values.shape[0] == compressed["full"].values.shape[0] > compressed["full"].rows[-1]


@pytest.mark.parametrize(("value_dtype", "bound"), [("int8", 0.015), ("float8_e4m3fn", 0.04)])
def test_eight_bit_values_have_a_scale_a_row(value_dtype, bound):
    w = matrix("half", (70, 130)).astype(np.float32) * 10.0 ** np.arange(-35, 35)[:, None]
    w[7] = 0
    weights = UnstructuredWeights.from_dense(jnp.asarray(w), value_dtype)
    weights.check()
    dense = np.asarray(weights.to_dense(), np.float64)
    np.testing.assert_array_equal(dense[7], 0)
    for row in np.delete(np.arange(70), 7):  # within half a step of the largest, or of the value
        error, scale = np.abs(dense[row] - w[row]), np.abs(w[row]).max()
        assert (error <= (scale / 253 if value_dtype == "int8" else np.abs(w[row]) / 15 + scale / 400000)).all()
    assert np.linalg.norm((dense - w)[-1]) < bound * np.linalg.norm(w[-1].astype(np.float64))


def test_eight_bit_nan():
    w = np.ones((70, 130), np.float32)
    w[1, 2] = np.nan
    for value_dtype, kept in (("int8", 0), ("float8_e4m3fn", 129)):
        dense = np.asarray(UnstructuredWeights.from_dense(jnp.asarray(w), value_dtype).to_dense())
        assert (
            np.isnan(dense[1, 2])
            and np.isfinite(np.delete(dense, 1, axis=0)).all()
            and np.isfinite(dense[1]).sum() == kept
        )


@pytest.mark.parametrize("implementation", ["xla", "interpret", pytest.param("mosaic_gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("value_dtype", ["int8", "float8_e4m3fn"])
def test_eight_bit_products(value_dtype, implementation):
    weights = UnstructuredWeights.from_dense(jnp.asarray(matrix("half", (70, 130))), value_dtype)
    w = np.asarray(dataclasses.replace(weights, dtype=np.dtype("float32")).to_dense(), np.float64)
    for n in (3, EXPAND_N + 1):  # the latter from a dense matrix
        x = jax.random.normal(jax.random.key(n), (130, n), jnp.bfloat16)
        y = unstructured_matmul(weights, x, implementation=implementation)
        assert relative_error(y, w @ np.asarray(x, np.float64)) < 5e-3
    np.testing.assert_array_equal(expand(weights, implementation=implementation), weights.to_dense())


CORRUPTIONS = {
    "values": (lambda v: v[: v.shape[0] // 2], "end within values"),
    "masks": (lambda m: m.at[0, 0, 0].set(m[0, 0, 0] ^ 1), "sections of masks"),
    "rows": (lambda r: r.at[1].add(1), "sections of masks"),
    "lags": (lambda x: x.at[1, 5].add(1), "sections of masks"),
}


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corrupted_weights_are_refused_by_name(compressed, in_pairs, name, paired):
    corrupt, message = CORRUPTIONS[name]
    weights = (in_pairs if paired else compressed)["half"]
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(weights, **{name: corrupt(getattr(weights, name))}).check()


def test_bits_behind_the_last_block_are_refused():
    """Of pairs an odd number of blocks leaves half a word, in which the kernel would believe a bit."""
    weights = UnstructuredWeights.from_dense(jnp.asarray(matrix("half", (64, 192))), paired=True)
    weights.check()
    behind = weights.masks.at[2, 1, 7].add(jnp.uint32(1 << layout.bit(1, 4)))
    with pytest.raises(ValueError, match="masks must be 0 behind a strip's last block"):
        dataclasses.replace(weights, masks=behind).check()


@pytest.mark.parametrize("paired", [False, True])
def test_device_code_of_an_odd_number_of_blocks_on_numpy_lanes(paired, unchecked, getkey):
    w, config = matrix("half", (64, 1100 - 64)), Config(warpgroups=1, pieces=4)
    x = jax.random.normal(getkey(), (w.shape[1], 8), jnp.bfloat16)
    weights = UnstructuredWeights.from_dense(jnp.asarray(w), paired=paired)
    assert weights.blocks == 17
    sums = sums_on_numpy([weights], x, config, 2, True)
    assert relative_error(sums[0], w.astype(np.float64) @ np.asarray(x, np.float64)) < 1e-5


def test_truncated_weights_are_refused_by_name(compressed):
    weights = compressed["half"]
    for name, rule in (
        ("masks", "masks must be uint32"),
        ("rows", "rows must be int32"),
        ("lags", "lags must be uint8"),
    ):
        with pytest.raises(ValueError, match=rule):
            dataclasses.replace(weights, **{name: getattr(weights, name)[:-1]}).check()
    with pytest.raises(ValueError, match="values must be bfloat16"):
        dataclasses.replace(weights, values=weights.values.astype(jnp.float16)).check()
    with pytest.raises(ValueError, match=r"masks must be uint32\[8, 9, 32\]; got uint32\[8, 18, 32\]"):
        dataclasses.replace(weights, paired=True).check()


@pytest.mark.parametrize(("pattern", "n"), [("full", 13), ("tenth", 1)])
def test_product_by_xla(compressed, pattern, n, getkey):
    x, bias = (jax.random.normal(getkey(), shape, jnp.bfloat16) for shape in ((1100, n), (100,)))
    out = unstructured_matmul(compressed[pattern], x, bias, "relu", implementation="xla")
    y = matrix(pattern).astype(np.float64) @ np.asarray(x, np.float64) + np.asarray(bias, np.float64)[:, None]
    assert relative_error(out, np.maximum(y, 0)) < 5e-3


def test_nan_weights_and_nothing_to_multiply(compressed):
    w = matrix("half")
    w[3, 7] = np.nan
    weights = UnstructuredWeights.from_dense(jnp.asarray(w))
    out = unstructured_matmul(weights, jnp.ones((1100, 2), jnp.bfloat16), implementation="xla")
    np.testing.assert_array_equal(np.isnan(np.asarray(out)).any(axis=1), np.arange(100) == 3)
    assert unstructured_matmul(weights, jnp.ones((1100, 0), jnp.bfloat16)).shape == (100, 0)
    nothing = UnstructuredWeights.from_dense(jnp.zeros((5, 0), jnp.bfloat16))
    out = unstructured_matmul(nothing, jnp.ones((0, 3), jnp.bfloat16), jnp.arange(5, dtype=jnp.bfloat16))
    np.testing.assert_array_equal(np.asarray(out, np.float32), np.arange(5.0)[:, None].repeat(3, 1))


def test_bad_arguments_are_refused(compressed, unchecked):
    weights, x = compressed["half"], jnp.ones((1100, 4), jnp.bfloat16)
    for wrong, message in (
        ({"x": x[:-1]}, r"x must be bfloat16\[1100, n\]; got bfloat16\[1099, 4\]"),
        ({"x": x.astype(jnp.float16)}, r"got float16\[1100, 4\]"),
        ({"bias": x[:3, 0]}, r"bias must be bfloat16\[100\]"),
        ({"activation": "tanh"}, "got 'tanh'"),
        ({"weights": x}, "weights must be UnstructuredWeights"),
        ({"config": Config(warpgroups=4, pieces=8)}, "bytes of shared memory"),
        ({"implementation": "cuda"}, "implementation must be"),
    ):
        with pytest.raises(ValueError, match=message):
            unstructured_matmul(**({"weights": weights, "x": x} | wrong))  # pyright: ignore[reportArgumentType]
    eight_bit = dataclasses.replace(weights, values=weights.values.astype(jnp.int8), scales=jnp.ones(100))
    for other, got in (
        (eight_bit, r"of bfloat16, .* of int8"),
        (dataclasses.replace(weights, shape=(99, 1100)), "99"),
        (dataclasses.replace(weights, paired=True), r"of bfloat16, .* of paired bfloat16"),
    ):
        with pytest.raises(ValueError, match=f"weights must be of one shape, dtype and kind of values; got .*{got}"):
            unstructured_matmuls([weights, other], x)
    with pytest.raises(ValueError, match="weights must be one at least, with a bias or None each; got 1, 2"):
        unstructured_matmuls([weights], x, [None, None])
    with pytest.raises(ValueError, match="value_dtype must be"):
        UnstructuredWeights.from_dense(x, "int4")
    with pytest.raises(ValueError, match="w must be a matrix"):
        UnstructuredWeights.from_dense(x[0])
    with pytest.raises(NotImplementedError, match="runs on NVIDIA H100"):
        unstructured_matmul(weights, x, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="no gradient"):
        jax.grad(lambda x: unstructured_matmul(weights, x).sum(dtype=jnp.float32))(x)


MACHINE_OPERATIONS = (
    "begin_barriers", "expect", "arrive", "copy", "wait", "load_half", "load_word", "load_matrices",
    "multiply_tile", "multiply_block"
)  # fmt: skip


@dataclasses.dataclass
class Barrier:
    """An mbarrier, and what is known to whoever has waited for it."""

    arrivals: int
    missing: int
    known: np.ndarray  # by the warps that have arrived in this phase
    tx: int = 0  # bytes that are expected, and not there
    phase: int = 0
    pending: list = dataclasses.field(default_factory=list)
    released: np.ndarray | int = 0  # what was known at the end of the last phase

    def end_phase(self) -> None:
        """If all have arrived, and all bytes."""
        if not self.missing and not self.tx:
            self.phase, self.missing, self.released = self.phase + 1, self.arrivals, self.known.copy()


class Machine:
    """Shared memory of one block and its copies, which land when they begin, or not before they are waited for.

    All threads go in step here, so a barrier that is not waited for would not be missed. Therefore each warp has a
    clock, of its own arrivals and those of others that it knows of by a barrier, one after the other: what a copy
    overwrites, the warp that begins it has to know to be read. And what a copy brings is read by those only that have
    waited for its barrier.
    """

    GRANULE = 16

    def __init__(self, lands_late: bool):
        self.lands_late = lands_late
        self.bytes = np.full(2**18, 0x7F, np.uint8)
        self.size = 1024
        self.barriers: dict[int, Barrier] = {}
        warps, granules = lanes.BLOCK.threads.size // 32, self.bytes.size // self.GRANULE
        self.clocks = np.zeros((warps, warps), int)
        self.waited_for: dict[tuple[int, int], int] = {}  # the last phase, by warp and barrier
        self.read = np.full((warps, granules), -1)  # when by each warp, by its clock
        self.copied = np.zeros(granules, int)  # by which of:
        self.copies: list[tuple[int, int]] = [(0, 0)]  # their barriers and phases

    def allocate(self, words: int) -> int:
        start, self.size = self.size, self.size + 4 * words + -4 * words % 1024
        assert start % 16 == 0
        return start

    def active(self):
        return lanes.BLOCK.threads[lanes.BLOCK.active[-1]]

    def granules(self, place: int, size: int) -> slice:
        return slice(place // self.GRANULE, (place + size - 1) // self.GRANULE + 1)

    def begin_barriers(self, address, count, arrivals=1):
        for thread in self.active():
            for i in range(count):
                own = int(number(address)[thread]) + 8 * i
                assert own not in self.barriers and own + 8 <= self.size
                self.barriers[own] = Barrier(arrivals, arrivals, np.zeros(len(self.clocks), int))

    def arrive(self, barrier):
        for thread in self.active():
            own, warp_number = self.barriers[int(number(barrier)[thread])], thread // 32
            assert own.missing, "a phase begins before the last is over"
            own.known = np.maximum(own.known, self.clocks[warp_number])
            self.clocks[warp_number, warp_number] += 1
            own.known[warp_number] = self.clocks[warp_number, warp_number]
            own.missing -= 1
            own.end_phase()

    def expect(self, barrier, size):
        for thread in self.active():
            self.barriers[int(number(barrier)[thread])].tx += int(number(size)[thread])
        self.arrive(barrier)

    def copy(self, source, unit, first, to, size, barrier):
        for thread in self.active():
            start, length = int(number(first)[thread]) * unit, int(number(size)[thread])
            own, place = int(number(barrier)[thread]), int(number(to)[thread])
            assert length > 0 and length % 16 == 0 and place % 16 == 0 and start % 16 == 0
            data = source.of(thread).bytes[start : start + length]
            assert data.size == length, "read past the end"
            self.overwrite(thread // 32, self.granules(place, length), own)
            self.barriers[own].pending.append((place, data))
            if not self.lands_late:
                self.land(own)

    def copy_tile(self, source, rows, tile, to, barrier):
        """By the PTX manual's figure of a swizzle of 128 bytes, of places that are multiples of 1024."""
        for thread in self.active():
            own, place, first = (int(number(a)[thread]) for a in (barrier, to, tile))
            assert place % 1024 == 0
            data = np.zeros((rows, 64), np.uint16)
            there = source.data.view(np.uint16)[:rows, 64 * first : 64 * (first + 1)]
            data[: there.shape[0], : there.shape[1]] = there
            chunks = np.arange(8) ^ np.arange(rows)[:, None] % 8
            data = np.take_along_axis(data.reshape(rows, 8, 8), chunks[:, :, None], axis=1).reshape(-1).view(np.uint8)
            self.overwrite(thread // 32, self.granules(place, data.size), own)
            self.barriers[own].pending.append((place, data))
            if not self.lands_late:
                self.land(own)

    def overwrite(self, by: int, granules: slice, barrier: int) -> None:
        others = np.arange(len(self.clocks)) != by
        known = self.clocks[by, others, None]
        assert (self.read[others, granules] < known).all(), "overwritten before all have read it"
        self.copies.append((barrier, self.barriers[barrier].phase))
        self.copied[granules] = len(self.copies) - 1

    def land(self, barrier):
        own = self.barriers[barrier]
        for place, data in own.pending:
            self.bytes[place : place + data.size] = data
            own.tx -= data.size
        assert own.tx >= 0, "more was copied than expected"
        if own.pending:
            own.pending = []
            own.end_phase()

    def wait(self, barrier, phase):
        for thread in self.active():
            address, awaited, warp_number = int(number(barrier)[thread]), int(number(phase)[thread]), thread // 32
            own = self.barriers[address]
            self.land(address)
            assert own.phase == awaited + 1, "a wait for ever, or for a phase long over"
            self.waited_for[warp_number, address] = awaited
            self.clocks[warp_number] = np.maximum(self.clocks[warp_number], own.released)

    def read_by(self, warp_number: int, granules: np.ndarray) -> None:
        """Of what was copied there, and is known to be there."""
        copies = self.copied[granules]
        assert (copies > 0).all(), "nothing was ever written there"
        for barrier, phase in (self.copies[i] for i in np.unique(copies)):
            assert self.waited_for.get((warp_number, barrier), -1) >= phase, "not waited for"
        self.read[warp_number, granules] = self.clocks[warp_number, warp_number]

    def load_half(self, address, offset):
        places = unsigned(address) + offset
        banks = np.sort(lanes.BLOCK.by_warp(places // 4 % 32), axis=1)
        assert (banks == np.arange(32)).all(), "a bank conflict"
        return Int(self.bytes[places].astype(np.int64) | self.bytes[places + 1].astype(np.int64) << 8)

    def load_word(self, address, bits, mask):
        word = sum(self.load_half(address, 2 * half).value << 16 * half for half in (0, 1))
        return Int(np.where(unsigned(bits) & mask, word, 0))

    def load_matrices(self, address, offset):
        """By the PTX manual's figure of ldmatrix."""
        rows = lanes.BLOCK.by_warp(unsigned(address) + offset).reshape(-1, 4, 8)  # warp, matrix, row
        assert (rows % 16 == 0).all()
        assert (np.sort(rows // 16 % 8, axis=-1) == np.arange(8)).all(), "a bank conflict"
        for warp_number in np.unique(self.active() // 32):
            self.read_by(warp_number, rows[warp_number].reshape(-1) // self.GRANULE)
        elements = self.bytes[rows[..., None] + np.arange(16)].view(np.uint32)  # pairs of a row
        return [Int(elements[:, m].reshape(-1).astype(np.int64)) for m in range(4)]

    def multiply_tile(self, acc, a, b, dtype):
        """By the PTX manual's fragments of mma.m16n8k16."""
        own, kind = np.arange(32), jnp.dtype(dtype)
        left, right = ([unsigned(r).astype(np.uint32) for r in rs] for rs in (a, b))
        out = np.stack([number(r).astype(np.int32).view(np.float32) for r in acc])
        for first in range(0, lanes.BLOCK.threads.size, 32):
            rows, columns = np.zeros((16, 16), np.float32), np.zeros((16, 8), np.float32)
            for half in range(2):
                for i in range(4):
                    pair = left[i][first : first + 32].view(np.uint16).view(kind)[half::2]
                    rows[own // 4 + 8 * (i % 2), own % 4 * 2 + half + 8 * (i // 2)] = pair
                for i in range(2):
                    pair = right[i][first : first + 32].view(np.uint16).view(kind)[half::2]
                    columns[own % 4 * 2 + half + 8 * i, own // 4] = pair
            product = rows @ columns
            for i in range(4):
                out[i, first : first + 32] += product[own // 4 + 8 * (i // 2), own % 4 * 2 + i % 2]
        return [Int(r.view(np.int32)) for r in out]

    def multiply_block(self, acc, a, x, tiles, dtype):
        """By the PTX manual's fragments of wgmma.m64nNk16: a warp has 16 rows, each a quarter of a warpgroup's."""

        def pairs(register):
            halves = np.stack([unsigned(register) & 0xFFFF, unsigned(register) >> 16], 1)
            return halves.astype(np.uint16).view(jnp.dtype(dtype))

        assert np.unique(number(x)).size == 1, "a warpgroup has one x"
        start, own, n = int(number(x)[0]), np.arange(32), 8 * tiles
        assert start % 1024 == 0
        for warp_number in np.unique(self.active() // 32):
            self.read_by(warp_number, np.arange(start, start + 128 * n, self.GRANULE) // self.GRANULE)
        swizzled = self.bytes[start : start + 128 * n].view(jnp.dtype(dtype)).reshape(n, 8, 8)
        chunks = np.arange(8) ^ np.arange(n)[:, None] % 8
        columns = np.take_along_axis(swizzled, chunks[:, :, None], axis=1).reshape(n, 64).astype(np.float32).T
        out = np.stack([number(r).astype(np.int32).view(np.float32) for r in acc])
        for first in range(0, lanes.BLOCK.threads.size, 32):
            in_warp = slice(first, first + 32)
            rows = np.zeros((16, 64), np.float32)
            for t, register in enumerate(a):
                for pair in range(2):
                    column = t // 4 * 16 + t // 2 % 2 * 8 + own % 4 * 2 + pair
                    rows[own // 4 + t % 2 * 8, column] = pairs(register)[in_warp, pair]
            product = rows @ columns
            for i in range(4 * tiles):
                out[i, in_warp] += product[own // 4 + i // 2 % 2 * 8, i // 4 * 8 + own % 4 * 2 + i % 2]
        return [Int(r.view(np.int32)) for r in out]


@dataclasses.dataclass
class Gmem:
    """An array in global memory."""

    data: np.ndarray

    def __post_init__(self):
        self.bytes = np.ascontiguousarray(self.data).reshape(-1).view(np.uint8)
        self.flat = np.ascontiguousarray(self.data).reshape(-1)
        self.times_written = np.zeros(self.flat.size, int)

    def of(self, thread) -> "Gmem":
        """What `thread` has of it: all."""
        return self

    def load(self, index):
        return Int(self.flat[number(index)].astype(np.int64))

    def store(self, index, value):
        threads = lanes.BLOCK.threads[lanes.BLOCK.active[-1]]
        places = number(index)[threads]
        self.flat[places] = number(value).astype(np.int32).view(self.flat.dtype)[threads]
        self.times_written[places] += 1


class Chosen:
    """One of some arrays, for each thread."""

    def __init__(self, arrays, chosen):
        self.arrays, self.chosen = arrays, number(chosen)

    def of(self, thread) -> Gmem:
        return self.arrays[self.chosen[thread]].of(thread)

    def load(self, index):
        loaded = [array.load(index).value if (self.chosen == i).any() else 0 for i, array in enumerate(self.arrays)]
        return Int(np.select([self.chosen == i for i in range(len(self.arrays))], loaded))


def _bytes(x) -> np.ndarray:
    return unsigned(x)[:, None] >> 8 * np.arange(4) & 0xFF


def dot_bytes(a, factors, c):
    return Int((_bytes(a) * _bytes(factors)).sum(axis=1) + unsigned(c))


def permute_bytes(low, high, selector):
    source = np.concatenate([_bytes(low), _bytes(high)], axis=1)
    nibbles = unsigned(selector)[:, None] >> 4 * np.arange(4) & 0xF
    chosen = np.take_along_axis(source, nibbles & 7, axis=1)
    chosen = np.where(nibbles & 8, (chosen >> 7) * 0xFF, chosen)
    return Int((chosen << 8 * np.arange(4)).sum(axis=1))


def rotate_right(x, bits):
    return Int(unsigned(x) >> bits | unsigned(x) << (32 - bits))


@contextlib.contextmanager
def on_numpy(machine: Machine):
    stand_ins = {
        **{name: getattr(machine, name) for name in MACHINE_OPERATIONS},
        **{f.__name__: f for f in (dot_bytes, permute_bytes, rotate_right)},
        "address_of": lambda address: Int(address),
        "choose": Chosen,
        "warp_barrier": lambda: None,
        "is_elected": lambda: lane.thread() % 32 < 1,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, stand_in in lanes.STAND_INS.items():
            patch.setattr(lane, name, stand_in)
        for name, stand_in in stand_ins.items():
            patch.setattr(warp, name, stand_in)
        yield


@pytest.mark.parametrize(
    ("pattern", "paired", "n", "blocks", "warpgroups", "lands_late"),
    [
        ("half", False, 13, 3, 1, True),
        ("one row", False, 8, 1, 1, False),
        ("half", False, 24, 2, 2, True),
        ("clustered", True, 31, 3, 1, False),
        ("tenth", False, 64, 2, 1, True),
        ("full", False, 8, 2, 2, True),
        ("full", False, 8, 2, 1, False),
        ("empty", False, 8, 5, 1, True),
        ("tenth", True, 13, 3, 1, True),
        ("one row", True, 8, 1, 1, False),
        ("full", True, 8, 2, 2, True),
        ("empty", True, 8, 5, 1, True),
    ],
)
def test_device_code_on_numpy_lanes(
    compressed, in_pairs, pattern, paired, n, blocks, warpgroups, lands_late, unchecked, getkey
):
    """Every thread's code, with its ring, its barriers and its bits: sums as of the dense product."""
    config = Config(warpgroups=warpgroups, pieces=4 + blocks % 3)
    x = jax.random.normal(getkey(), (1100, n), jnp.bfloat16)
    sums = sums_on_numpy([(in_pairs if paired else compressed)[pattern]], x, config, blocks, lands_late)
    assert relative_error(sums[0], matrix(pattern).astype(np.float64) @ np.asarray(x, np.float64)) < 1e-5


def sums_on_numpy(weights, x, config: Config, blocks: int, lands_late: bool) -> np.ndarray:
    """W x of each matrix."""
    division = divide(weights, x.shape[1], config, blocks)
    shape = (division.slots, len(weights), division.tiles * 8, division.strips * layout.STRIP)
    slots = run_on_numpy(
        device.multiply, division, weights, [by_column(x)], np.full(shape, np.nan, np.float32), lands_late
    )
    return slots.sum(axis=0)[:, : x.shape[1], : weights[0].shape[0]].swapaxes(1, 2)


@pytest.mark.parametrize(("blocks", "warpgroups", "lands_late"), [(2, 3, True), (5, 1, False)])
def test_device_code_of_several_matrices_on_numpy_lanes(compressed, blocks, warpgroups, lands_late, unchecked, getkey):
    """Of different densities, empty and full among them; a block goes on from one to the next."""
    patterns = ("half", "empty", "full")
    x = jax.random.normal(getkey(), (1100, 5), jnp.bfloat16)
    weights = [compressed[pattern] for pattern in patterns]
    assert len({matrix.values.shape for matrix in weights}) > 1
    config = Config(warpgroups=warpgroups, pieces=4)
    division = divide(weights, 5, config, blocks)
    assert division.units % (division.own_groups * division.sections)
    sums = sums_on_numpy(weights, x, config, blocks, lands_late)
    for pattern, y in zip(patterns, sums, strict=True):
        assert relative_error(y, matrix(pattern).astype(np.float64) @ np.asarray(x, np.float64)) < 1e-5


@pytest.mark.parametrize("pieces", [4, 5])
def test_rings_go_on_from_part_to_part(pieces, compressed, unchecked, monkeypatch, getkey):
    """First pieces of all parts but the block's first are under way before they begin; one has just one to copy."""
    fill, ahead = device.Strip.fill, []

    def spied(strip, issued):
        ahead.append((number(issued) - number(strip.ring.own.begin))[lanes.BLOCK.active[-1]])
        return fill(strip, issued)

    monkeypatch.setattr(device.Strip, "fill", spied)
    patterns, config = ("half", "empty", "full"), Config(warpgroups=1, pieces=pieces)
    x = jax.random.normal(getkey(), (1100, 5), jnp.bfloat16)
    sums = sums_on_numpy([compressed[pattern] for pattern in patterns], x, config, 1, True)
    for pattern, y in zip(patterns, sums, strict=True):
        assert relative_error(y, matrix(pattern).astype(np.float64) @ np.asarray(x, np.float64)) < 1e-5
    assert len(ahead) == 6 and (ahead[0] == 0).all()
    assert np.concatenate(ahead[1:]).min() >= 1 and np.concatenate(ahead).max() <= pieces - 2


@pytest.mark.parametrize(("n", "warpgroups", "pieces"), [(13, 1, 5), (8, 3, 5), (40, 4, 5), (61, 4, 5), (64, 4, 4)])
def test_steps_of_x(n, warpgroups, pieces, compressed, unchecked):
    """As a tensor map lays them out, of a block that begins with x's third section and then goes through all of it."""
    x = np.arange(1100 * n).reshape(1100, n).astype(np.uint16)
    division = divide([compressed["half"]], n, Config(warpgroups=warpgroups, pieces=pieces), 1)
    division = dataclasses.replace(division, matrices=4, units=2)
    lanes.BLOCK = lanes.Block(division.threads)
    machine, steps_of = Machine(lands_late=True), cast(Any, pipelines.Steps.of)
    with on_numpy(machine):
        smem = {name: machine.allocate(words) for name, words in pipelines.shared_memory(division).items()}
        assert machine.size - 1024 <= 227 * 1024
        copy = copies_of(machine, division, np.asarray(by_column(jnp.asarray(x))))
        steps = steps_of(division, Int(1), copy, Int(smem["x"]), Int(smem["x_barriers"]))
        in_quad = QUAD // division.step_blocks
        assert (number(steps.first) == 4 * in_quad).all() and (number(steps.count) == (1 + 2) * in_quad).all()
        steps.prepare()
        steps.begin()
        found, size = [], division.step_blocks * division.tiles * 1024
        for step in range(3 * in_quad):
            own = int(number(steps.next(Int(step)))[0])
            blocks = machine.bytes[own:][:size].copy().view(np.uint16).reshape(-1, 8 * division.tiles, 8, 8)
            chunks = (np.arange(8) ^ np.arange(8 * division.tiles)[:, None] % 8)[None, :, :, None]
            rows = np.take_along_axis(blocks, chunks, axis=2).reshape(-1, 8 * division.tiles, 64)
            found.append(rows.transpose(1, 0, 2).reshape(8 * division.tiles, -1))
            steps.release(Int(step))
    expected = np.pad(x, ((0, 1280 - 1100), (0, 8 * division.tiles - n)))
    np.testing.assert_array_equal(np.concatenate(found, axis=1), np.concatenate([expected[1024:], expected[:512]]).T)


@pytest.mark.parametrize(
    ("left_out", "message"),
    [("release", "a wait for ever"), ("_copy", "a wait for ever"), ("begin", "a wait for ever")],
)
def test_numpy_lanes_miss_what_is_left_out(left_out, message, compressed, unchecked, monkeypatch):
    monkeypatch.setattr(pipelines.Steps, left_out, lambda *_: None)
    with pytest.raises(AssertionError, match=message):
        sums_on_numpy([compressed["tenth"]], jnp.ones((1100, 5), jnp.bfloat16), Config(), 1, True)


def copies_of(machine, division, x):
    """What begins the copies of a block of x."""
    return functools.partial(machine.copy_tile, Gmem(x), 8 * division.tiles)


@pytest.mark.parametrize(
    ("pattern", "paired", "blocks", "lands_late"),
    [("half", False, 3, True), ("one row", False, 2, False), ("full", False, 1, True), ("tenth", True, 3, True)],
)
def test_device_code_that_expands_on_numpy_lanes(compressed, in_pairs, pattern, paired, blocks, lands_late, unchecked):
    """The dense matrix, to the bit; each word of it is written once."""
    weights = (in_pairs if paired else compressed)[pattern]
    division = divide([weights], 0, Config(warpgroups=1, pieces=4 + blocks % 2), blocks)
    out = np.zeros((division.strips * layout.STRIP, division.blocks * layout.BLOCK // 2), np.uint32)
    dense = run_on_numpy(device.expand, division, [weights], [], out, lands_late)
    np.testing.assert_array_equal(dense.view(jnp.bfloat16)[:100, :1100], matrix(pattern))


def run_on_numpy(kernel, division, weights, more, out: np.ndarray, lands_late: bool) -> np.ndarray:
    """What all blocks of a kernel write."""
    arrays = [*(getattr(w, name) for name in ("values", "masks", "rows", "lags") for w in weights), *more]
    inputs, written = [Gmem(np.asarray(a)) for a in arrays], Gmem(out)
    for block in range(division.grid):
        lanes.BLOCK = lanes.Block(division.threads)
        machine = Machine(lands_late)
        with on_numpy(machine):
            smem = {name: machine.allocate(words) for name, words in pipelines.shared_memory(division).items()}
            kernel(division, Int(block), inputs, [written], smem, *(copies_of(machine, division, x) for x in more))
        assert not any(barrier.pending for barrier in machine.barriers.values()), "a copy that nobody waited for"
    assert (written.times_written == 1).all()
    return written.flat.reshape(out.shape)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [Config(), Config(pieces=4), Config(warpgroups=3, pieces=7)])
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_on_a_gpu(compressed, in_pairs, pattern, paired, config, getkey):
    x, weights = jax.random.normal(getkey(), (1100, 24), jnp.bfloat16), (in_pairs if paired else compressed)[pattern]
    out = unstructured_matmul(weights, x, config=config, implementation="mosaic_gpu")
    assert (mosaic_expand(weights, config, interpret=False) == matrix(pattern)).all()
    assert relative_error(out, matrix(pattern).astype(np.float64) @ np.asarray(x, np.float64)) < 5e-3


@pytest.mark.parametrize(
    ("n", "implementation"),
    [(7, "xla"), (7, "interpret"), *(pytest.param(n, "mosaic_gpu", marks=pytest.mark.gpu) for n in (7, 70))],
)
def test_several_matrices_at_once(compressed, n, implementation, getkey):
    """As each by itself, with and without a bias: the last group of strips of each is not full."""
    patterns = ("half", "empty", "full")
    x, bias = (jax.random.normal(getkey(), shape, jnp.bfloat16) for shape in ((1100, n), (100,)))
    options = {"activation": "relu", "implementation": implementation}
    out = unstructured_matmuls([compressed[p] for p in patterns], x, [None, bias, bias], **options)
    for pattern, y, own in zip(patterns, out, (None, bias, bias), strict=True):
        expected = matrix(pattern).astype(np.float64) @ np.asarray(x, np.float64)
        expected += 0 if own is None else np.asarray(own, np.float64)[:, None]
        assert relative_error(y, np.maximum(expected, 0)) < 5e-3
        alone = unstructured_matmul(compressed[pattern], x, own, **options)
        assert relative_error(y, alone) < 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("n", "config"),
    [(16, Config()), (61, Config(pieces=4)), (16, Config(warpgroups=1, pieces=8)), (5, Config(warpgroups=3, pieces=7))],
)
def test_blocks_that_go_on_to_other_strips_and_matrices(config, n, getkey):
    """Two parts a block, some of two matrices, and several stages of x, whose last one is not full."""
    rng, shape, densities = np.random.default_rng(0), (2100, 3576), (0.3, 0.0, 1.0)
    dense = [rng.standard_normal(shape, np.float32) * (rng.random(shape) < density) for density in densities]
    weights = [UnstructuredWeights.from_dense(jnp.asarray(w, jnp.bfloat16)) for w in dense]
    division = divide(weights, n, config, 132)
    assert division.sections > division.units and division.sections % division.units
    x = jax.random.normal(getkey(), (shape[1], n), jnp.bfloat16)
    out, again = (unstructured_matmuls(weights, x, config=config, implementation="mosaic_gpu") for _ in range(2))
    for w, y, same in zip(dense, out, again, strict=True):
        rounded = np.asarray(jnp.asarray(w, jnp.bfloat16), np.float64)
        assert relative_error(y, rounded @ np.asarray(x, np.float64)) < 5e-3
        np.testing.assert_array_equal(y, same)


@pytest.mark.gpu
def test_several_matrices_equal_each_alone_to_the_bit(compressed, getkey):
    """With less sections than multiprocessors each is one block's, joined or not."""
    x = jax.random.normal(getkey(), (1100, 16), jnp.bfloat16)
    weights, config = [compressed[p] for p in ("half", "one row", "clustered")], Config(warpgroups=1, pieces=8)
    options = {"config": config, "implementation": "mosaic_gpu"}
    out = unstructured_matmuls(weights, x, **options)
    for matrix_weights, y in zip(weights, out, strict=True):
        np.testing.assert_array_equal(y, unstructured_matmul(matrix_weights, x, **options))


def test_peer_and_work(compressed):
    weights, x = compressed["tenth"], jnp.ones((1100, 3), jnp.bfloat16)
    bias = jnp.ones(100, jnp.bfloat16)
    out = peers(weights, x, bias, "relu")["xla"](weights, x, bias, "relu")
    assert relative_error(out, reference(weights, x, bias, "relu").astype(jnp.float32)) < 1e-2
    cost = work(weights, x, bias, "relu")
    assert cost.flops == 2 * 100 * 1100 * 3
    of_x_and_y = 2 * (1100 * 3 + 100 * 3 + 100)
    format_bytes = 128 * int(weights.rows[-1]) + 4 * 128 * 1152 // 32 + (4 + 64) * (8 * 3 + 1)
    assert cost.bytes == format_bytes + of_x_and_y
