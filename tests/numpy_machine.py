"""What device code of `unstructured_matmul` asks of a GPU, on numpy: memory, barriers, the tensor core; for `lanes`."""

import contextlib
import dataclasses
import functools

import jax.numpy as jnp
import lanes
import numpy as np
import pytest
from lanes import Int, number, unsigned

from pallas_kernels.tile import lane
from pallas_kernels.unstructured_matmul import Config, device, layout, pipelines, warp
from pallas_kernels.unstructured_matmul.mosaic import by_column, divide

MACHINE_OPERATIONS = (
    "begin_barriers", "expect", "arrive", "copy", "wait", "load_half", "load_word", "load_stored_half",
    "load_matrices", "multiply_tile", "multiply_blocks"
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

    def load_stored_half(self, address, bits, mask):
        places = unsigned(address)
        assert (places % 2 == 0).all()
        banks = np.sort(lanes.BLOCK.by_warp(places // 4 % 32), axis=1)
        assert (banks[:, 2:] != banks[:, :-2]).all(), "three lanes meet in a bank"
        half = self.bytes[places].astype(np.int64) | self.bytes[places + 1].astype(np.int64) << 8
        return Int(np.where(unsigned(bits) & mask, half, 0))

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

    def multiply_blocks(self, acc, a, x, tiles, dtype):
        """By the PTX manual's fragments of wgmma.m64nNk16: a warp has 16 rows, each a quarter of a warpgroup's."""

        def pairs(register):
            halves = np.stack([unsigned(register) & 0xFFFF, unsigned(register) >> 16], 1)
            return halves.astype(np.uint16).view(jnp.dtype(dtype))

        assert np.unique(number(x)).size == 1, "a warpgroup has one x"
        start, own, n, blocks = int(number(x)[0]), np.arange(32), 8 * tiles, len(a) // 16
        assert start % 1024 == 0
        size = blocks * 128 * n
        for warp_number in np.unique(self.active() // 32):
            self.read_by(warp_number, np.arange(start, start + size, self.GRANULE) // self.GRANULE)
        swizzled = self.bytes[start : start + size].view(jnp.dtype(dtype)).reshape(blocks, n, 8, 8)
        chunks = np.arange(8) ^ np.arange(n)[:, None] % 8
        columns = np.take_along_axis(swizzled, chunks[None, :, :, None], axis=2).reshape(blocks, n, 64)
        columns = columns.astype(np.float32).swapaxes(1, 2).reshape(blocks * 64, n)
        out = np.stack([number(r).astype(np.int32).view(np.float32) for r in acc])
        for first in range(0, lanes.BLOCK.threads.size, 32):
            in_warp = slice(first, first + 32)
            rows = np.zeros((16, blocks * 64), np.float32)
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


def widen(pair, values, dtype):
    two = unsigned(pair).astype(np.uint16).view(np.uint8).view(jnp.dtype(values)).astype(np.float32)
    return Int(two.astype(jnp.dtype(dtype)).view(np.uint32).astype(np.int64))


def rotate_right(x, bits):
    return Int(unsigned(x) >> bits | unsigned(x) << (32 - bits))


@contextlib.contextmanager
def on_numpy(machine: Machine):
    stand_ins = {
        **{name: getattr(machine, name) for name in MACHINE_OPERATIONS},
        **{f.__name__: f for f in (dot_bytes, permute_bytes, rotate_right, widen)},
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


def copies_of(machine, division, x):
    """What begins the copies of a block of x."""
    return functools.partial(machine.copy_tile, Gmem(x), 8 * division.tiles)


def sums_on_numpy(weights, x, config: Config, blocks: int, lands_late: bool) -> np.ndarray:
    """W x of each matrix."""
    division = divide(weights, x.shape[1], config, blocks)
    shape = (division.slots, len(weights), division.tiles * 8, division.strips * layout.STRIP)
    slots = run_on_numpy(
        device.multiply, division, weights, [by_column(x)], np.full(shape, np.nan, np.float32), lands_late
    )
    return slots.sum(axis=0)[:, : x.shape[1], : weights[0].shape[0]].swapaxes(1, 2)


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
