"""`micro_tile_index` and `compact` against plain numpy loops."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import lanes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import micro_tile_index
from pallas_kernels.micro_tile_index import ROWS, Config, candidates, compact, device
from pallas_kernels.workbench.interpreter import run_interpreted


def expected(a_t: np.ndarray, rows: int, cols: int = 1) -> list[list[int]]:
    """One list of micro-tiles a block of rows."""
    return [
        [
            entry
            for entry in range(-(-a_t.shape[0] // cols))
            if (a_t[entry * cols : (entry + 1) * cols, start : start + rows] != 0).any()
        ]
        for start in range(0, a_t.shape[1], rows)
    ]


def assert_lists(indices, counts, lists: list[list[int]], length: int):
    """Equal to `lists`, with zeros behind each, as documented."""
    assert np.asarray(counts).tolist() == [len(block) for block in lists]
    padded = [block + [0] * (length - len(block)) for block in lists]
    np.testing.assert_array_equal(np.asarray(indices), np.asarray(padded, np.int32).reshape(len(lists), length))


def assert_compacted(out, mask: np.ndarray):
    indices, counts = out
    assert_lists(indices, counts, [np.flatnonzero(row).tolist() for row in mask], mask.shape[1])


@settings(max_examples=12)
@given(
    seed=st.integers(0, 2**16),
    k=st.integers(1, 70),
    m=st.integers(1, 300),
    rows=st.sampled_from(ROWS),
    cols=st.sampled_from((1, 3, 64)),
    density=st.sampled_from((0.0, 0.003, 0.2, 1.0)),
    kind=st.sampled_from((bool, np.float32, jnp.bfloat16)),
)
def test_lists_are_the_non_zero_micro_tiles(seed, k, m, rows, cols, density, kind):
    rng = np.random.default_rng(seed)
    values = np.where(rng.random((k, m)) < density, rng.normal(size=(k, m)), 0)
    a_t = jnp.asarray(values != 0 if kind is bool else values, kind)
    index = micro_tile_index(a_t, rows, cols)
    lists = expected(np.asarray(a_t, np.float64), rows, cols)
    assert_lists(index.indices, index.counts, lists, -(-k // cols))
    assert [np.flatnonzero(row).tolist() for row in np.asarray(index.mask())] == lists


def test_nan_and_negative_zero():
    a_t = jnp.zeros((4, 8)).at[1, 0].set(jnp.nan).at[2, 3].set(-0.0).at[3, 7].set(jnp.inf)
    index = micro_tile_index(a_t, 8)
    assert np.asarray(index.indices)[0, : int(index.counts[0])].tolist() == [1, 3]


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
@pytest.mark.parametrize("shape", [(0, 10), (10, 0)])
def test_empty_matrix(shape, implementation):
    index = micro_tile_index(jnp.ones(shape), 8, implementation=implementation)
    assert index.indices.shape == (-(-shape[1] // 8), shape[0])
    assert not np.asarray(index.counts).any()


def test_granularity_is_static_and_the_pattern_is_not():
    traces = []

    @jax.jit
    def find(a_t):
        traces.append(None)
        return micro_tile_index(a_t, 16)

    first, second = find(jnp.ones((5, 32))), find(jnp.zeros((5, 32)))
    assert len(traces) == 1 and first.rows == second.rows == 16
    assert np.asarray(first.counts).tolist() == [5, 5] and np.asarray(second.counts).tolist() == [0, 0]


@pytest.mark.parametrize("lists, length", [(1, 1), (5, 31), (3, 32), (2, 129), (6, 40)])
@pytest.mark.parametrize("density, team", [(0.0, 1), (0.3, 8), (1.0, 2)])
def test_interpreted_kernel_shares_the_lists_out_among_warps(lists, length, density, team):
    mask = np.random.default_rng(length).random((lists, length)) < density
    config = Config(entries=32, team=team)
    out = run_interpreted(lambda: compact(jnp.asarray(mask), config=config, implementation="interpret"))
    assert_compacted(out, mask)


def test_interpreted_kernel_takes_a_batch_and_ragged_micro_tiles():
    batch = np.random.default_rng(0).random((2, 3, 50)) < 0.2
    kernel = jax.vmap(functools.partial(compact, config=Config(entries=32), implementation="interpret"))
    indices, counts = run_interpreted(lambda: kernel(jnp.asarray(batch)))
    for i, mask in enumerate(batch):
        assert_compacted((indices[i], counts[i]), mask)
    a_t = np.where(np.random.default_rng(1).random((100, 20)) < 0.01, 1.0, 0.0).astype(np.float32)
    index = run_interpreted(lambda: micro_tile_index(jnp.asarray(a_t), 8, 3, implementation="interpret"))
    assert_lists(index.indices, index.counts, expected(a_t, 8, 3), 34)


@dataclasses.dataclass(frozen=True)
class Row:
    """`device.row` on numpy: indices are of the row, and none is outside of it."""

    array: lanes.Array
    number: lanes.Int
    size: int

    def _inside(self, index: lanes.Int) -> lanes.Int:
        own = lanes.number(index)[lanes.BLOCK.active[-1]]
        assert ((own >= 0) & (own < self.size)).all(), "out of the row's bounds"
        return self.number * self.size + index

    def load(self, index: lanes.Int) -> lanes.Int:
        return self.array.load(self._inside(index))

    def store(self, index: lanes.Int, value: lanes.Int) -> None:
        self.array.store(self._inside(index), value)


def load_words(row: Row, index: lanes.Int) -> list[lanes.Int]:
    """Of a mask that nothing writes: 16 bytes for each lane."""
    assert not (lanes.unsigned(index) % 16).any() and not row.size % 16
    bytes_of = lanes.number(index)[:, None] + np.arange(16)
    assert ((bytes_of >= 0) & (bytes_of < row.size)).all(), "out of the row's bounds"
    loaded = row.array.data[lanes.number(row.number)[:, None] * row.size + bytes_of]
    return [lanes.Int(word) for word in loaded.view("<i4").T]


def run_on_lanes(monkeypatch, mask: np.ndarray, garbage: int, **config) -> tuple[np.ndarray, np.ndarray]:
    """The device code; behind the lists are bytes that nobody may count."""
    for stand_in in (Row, load_words):
        monkeypatch.setattr(device, stand_in.__name__.lower(), stand_in)
    lists, length = mask.shape
    padded = np.pad(mask.astype(np.int8), ((0, 0), (0, -length % 16)), constant_values=garbage)
    work = device.Work(lists=lists, length=length, padded=padded.shape[1], **config)
    outputs = [(lists, length), (lists,)]
    indices, counts = lanes.run(device.place, work, [padded], outputs, device.shared_memory(work))
    return indices, counts


@pytest.mark.parametrize("entries, team", [(32, 1), (64, 1), (32, 2), (64, 4), (32, 8), (64, 16), (32, 32)])
@pytest.mark.parametrize("lists, length", [(1, 1), (5, 31), (3, 32), (2, 129), (3, 1500)])
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_device_code_on_numpy_lanes(lists, length, density, entries, team, monkeypatch, unchecked):
    mask = np.random.default_rng(length).random((lists, length)) < density
    assert_compacted(run_on_lanes(monkeypatch, mask, garbage=1, entries=entries, team=team), mask)


@pytest.mark.parametrize(
    "length, entries, team, rounds", [(9300, 1024, 1, 3), (12000, 1024, 2, 2), (5000, 512, 4, 1), (28672, 32, 16, 1)]
)
def test_device_code_on_numpy_lanes_counts_long_lists(length, entries, team, rounds, monkeypatch, unchecked):
    """All bytes that can be are ones, so that no sum of a round may overflow."""
    work = device.Work(lists=1, length=length, padded=length + -length % 16, entries=entries, team=team)
    assert work.rounds == rounds and work.loads <= device.LOADS
    mask = np.ones((1, length), bool)
    assert_compacted(run_on_lanes(monkeypatch, mask, garbage=1, entries=entries, team=team), mask)


def test_batched_and_not_differentiated():
    batch = jnp.asarray(np.random.default_rng(2).normal(size=(2, 40, 16)) * (np.arange(40) % 3 == 0)[:, None])

    def scaled_sum(a_t):
        return jnp.sum(a_t) * micro_tile_index(a_t, 8).counts[0].astype(a_t.dtype)

    grads = jax.vmap(jax.grad(scaled_sum))(batch)
    np.testing.assert_array_equal(np.asarray(grads), np.full(batch.shape, 14.0))  # k of 40 that 3 divides


def lowered(function, *shapes, mesh: AbstractMesh) -> str:
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def test_on_a_gpu_the_kernel_is_chosen_under_every_transformation():
    device = AbstractDevice("NVIDIA H200", 132, "gpu")
    mesh = AbstractMesh((2,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    batch = jax.ShapeDtypeStruct((2, 256, 100), jnp.bfloat16)

    def scaled_sum(a_t):
        return jnp.sum(a_t) * micro_tile_index(a_t, 64).counts[0].astype(a_t.dtype)

    def add_counts(sums, a_t):
        return sums + micro_tile_index(a_t, 64).counts, None

    def sharded(batch):  # the carry of a scan must vary over the mesh as what is added to it does
        sums = lambda x: jax.lax.scan(add_counts, micro_tile_index(x[0], 64).counts, x)[0]  # noqa: E731
        return jax.shard_map(sums, mesh=mesh, in_specs=P(None, "x"), out_specs=P("x"))(batch)

    for function in (jax.vmap(jax.grad(scaled_sum)), sharded):
        assert "mosaic_gpu" in lowered(function, batch, mesh=mesh)
    with jax.enable_x64(True):
        for shape in ((3, 77), (1, 28672)):
            assert "mosaic_gpu" in lowered(compact, jax.ShapeDtypeStruct(shape, bool), mesh=mesh)


@pytest.mark.gpu
@pytest.mark.parametrize("density", [0.0, 0.01, 0.5, 1.0])
@pytest.mark.parametrize(
    "lists, length", [(1, 1), (7, 31), (5, 33), (4096, 64), (33, 4097), (65537, 3), (32, 28672), (2, 100_001)]
)
def test_compiled_kernel_against_numpy(lists, length, density):
    mask = np.random.default_rng(length).random((lists, length)) < density
    for config in (None, Config(entries=32), Config(entries=1024), Config(entries=32, team=16), Config(team=2)):
        indices, counts = compact(jnp.asarray(mask), config=config, implementation="mosaic_gpu")
        np.testing.assert_array_equal(np.asarray(counts), mask.sum(axis=1))
        order = np.argsort(~mask, axis=1, kind="stable")
        np.testing.assert_array_equal(np.asarray(indices), np.where(np.take_along_axis(mask, order, 1), order, 0))


def test_every_candidate_is_a_valid_config():
    for shape in ((1, 1), (4096, 64), (28672, 4224), (64, 65536)):
        configs = candidates(jax.ShapeDtypeStruct(shape, jnp.bfloat16), 64)
        assert len(set(configs)) == len(configs) >= 1
        for config in configs:
            compact(jnp.ones((1, 4), bool), config=config)


@pytest.mark.parametrize("k, m, is_together", [(28672, 64, True), (7168, 8 * 64, True), (4096, 4096, False)])
def test_warps_count_together_where_lists_are_few(k, m, is_together):
    first = candidates(jax.ShapeDtypeStruct((k, m), jnp.bfloat16), 64)[0]
    assert (first.team > 1) == is_together


def test_errors(unchecked):
    with pytest.raises(ValueError, match=r"rows and cols must be at least 1; got rows=0, cols=1"):
        micro_tile_index(jnp.ones((4, 4)), 0)
    with pytest.raises(ValueError, match=r"matrix \[K, M\]; got shape \(4,\)"):
        micro_tile_index(jnp.ones(4), 8)
    with pytest.raises(NotImplementedError, match="runs on NVIDIA H100, NVIDIA H200; got cpu"):
        micro_tile_index(jnp.ones((4, 4)), 8, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="implementation must be None, .*; got 'triton'"):
        compact(jnp.ones((4, 4), bool), implementation="triton")
    for entries in (0, 48):
        with pytest.raises(ValueError, match=f"entries must be a multiple of 32, .*; got entries={entries}"):
            micro_tile_index(jnp.ones((4, 4)), 8, config=Config(entries=entries))
    for team in (0, 3, 64):
        with pytest.raises(ValueError, match=rf"team must be one of \(1, 2, 4, 8, 16, 32\); got team={team}"):
            micro_tile_index(jnp.ones((4, 4)), 8, config=Config(team=team))
