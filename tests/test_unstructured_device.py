"""Device code of `unstructured_matmul`, run on numpy: every thread, ring and barrier of it."""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import lanes
import numpy as np
import pytest
from lanes import Int, number
from numpy_machine import Machine, copies_of, on_numpy, run_on_numpy, sums_on_numpy
from unstructured_matrices import compress_all, matrix

from pallas_kernels.case import relative_error
from pallas_kernels.unstructured_matmul import Config, UnstructuredWeights, device, layout, pipelines
from pallas_kernels.unstructured_matmul.config import QUAD
from pallas_kernels.unstructured_matmul.mosaic import by_column, divide


@pytest.fixture(scope="module")
def compressed():
    return compress_all(paired=False)


@pytest.fixture(scope="module")
def in_pairs():
    return compress_all(paired=True)


@pytest.mark.parametrize("paired", [False, True])
def test_device_code_of_an_odd_number_of_blocks_on_numpy_lanes(paired, unchecked, getkey):
    w, config = matrix("half", (64, 1100 - 64)), Config(warpgroups=1, pieces=4)
    x = jax.random.normal(getkey(), (w.shape[1], 8), jnp.bfloat16)
    weights = UnstructuredWeights.from_dense(jnp.asarray(w), paired=paired)
    assert weights.blocks == 17
    sums = sums_on_numpy([weights], x, config, 2, True)
    assert relative_error(sums[0], w.astype(np.float64) @ np.asarray(x, np.float64)) < 1e-5


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


@pytest.mark.parametrize("pattern", ["half", "tenth", "full", "empty", "one row", "clustered"])
@pytest.mark.parametrize(
    ("values", "dtype", "n", "pieces"), [("int8", "bfloat16", 8, 5), ("float8_e4m3fn", "float16", 24, 4)]
)
def test_device_code_of_eight_bits_on_numpy_lanes(pattern, values, dtype, n, pieces, unchecked, getkey):
    """In pairs: rows of half the bytes, in pieces of twice as many. Scales are not the kernel's."""
    weights = UnstructuredWeights.from_dense(jnp.asarray(matrix(pattern, dtype=dtype)), values, paired=True)
    exact = {"values": weights.values.astype(jnp.float32), "dtype": jnp.dtype("float32"), "scales": None}
    w = np.asarray(dataclasses.replace(weights, **exact).to_dense(), np.float64)
    x = jax.random.normal(getkey(), (w.shape[1], n), jnp.dtype(dtype))
    sums = sums_on_numpy([weights], x, Config(warpgroups=1, pieces=pieces), 3, pieces == 4)
    assert relative_error(sums[0], w @ np.asarray(x, np.float64)) < 1e-5


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
