"""Device code written with `pallas_kernels.tile.lane`, computed on numpy: an element for each thread of a block.

The interpreter cannot run inline MLIR; here the same code runs, statement by statement, in all threads at once. What is
found: indices out of bounds, shifts by too much, barriers and warp operations that only some threads reach, elements of
an output not written once, and races (one thread writes an element, another touches it, and no barrier is between).
"""

import contextlib
import math

import numpy as np
import pytest

from pallas_kernels.tile import lane

WARP = 32
UNWRITTEN = -(2**31)


class Block:
    """The threads of a block: how many, which of them are active, and all arrays they touch."""

    def __init__(self, threads: int):
        self.active = [np.ones(threads, bool)]
        self.arrays: list[Array] = []

    @property
    def threads(self) -> np.ndarray:
        return np.arange(self.active[0].size)

    def by_warp(self, x: np.ndarray) -> np.ndarray:
        active = self.active[-1].reshape(-1, WARP)
        assert (active.all(1) == active.any(1)).all(), "only some lanes of a warp take part"
        return x.reshape(-1, WARP)


BLOCK = Block(WARP)


def number(x) -> np.ndarray:
    """In each thread."""
    return x.value if isinstance(x, Int) else np.full(BLOCK.threads.shape, x, np.int64)


def unsigned(x) -> np.ndarray:
    return number(x) & 0xFFFFFFFF


def _operator(function):
    return lambda a, b: Int(function(number(a), number(b)))


def _unsigned_operator(function):
    return lambda a, b: Int(function(unsigned(a), unsigned(b)))


def _shift(function):
    def shift(a, b):
        assert (unsigned(b)[BLOCK.active[-1]] < 32).all(), "a shift by 32 or more"
        return Int(function(unsigned(a), unsigned(b) & 31))

    return shift


class Int:
    """`lane.Int`; truth values are 0 and 1."""

    def __init__(self, value):
        bits = np.broadcast_to(np.asarray(value, np.int64), BLOCK.threads.shape) & 0xFFFFFFFF
        self.value = np.where(bits >> 31, bits - 2**32, bits)

    __add__, __sub__, __mul__ = (_operator(f) for f in (np.add, np.subtract, np.multiply))
    __and__, __or__, __xor__ = (_operator(f) for f in (np.bitwise_and, np.bitwise_or, np.bitwise_xor))
    __lt__, __gt__, equals = (_operator(f) for f in (np.less, np.greater, np.equal))
    __floordiv__, __mod__ = (_unsigned_operator(f) for f in (np.floor_divide, np.mod))
    __lshift__, __rshift__ = (_shift(f) for f in (np.left_shift, np.right_shift))


class Array:
    """`lane.Array`, with who wrote and read each element since the last barrier: a thread, `NOBODY` or `SEVERAL`."""

    NOBODY, SEVERAL = -1, -2

    def __init__(self, data: np.ndarray):
        self.data = data.flatten()
        self.times_written = np.zeros(self.data.size, int)
        self.forget()

    def forget(self) -> None:
        self.writer, self.reader = (np.full(self.data.size, self.NOBODY) for _ in range(2))

    def _elements(self, index: Int, touched: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
        """The active threads and their elements, which no other thread has touched."""
        threads = BLOCK.threads[BLOCK.active[-1]]
        elements = number(index)[threads]
        assert ((elements >= 0) & (elements < self.data.size)).all(), "out of bounds"
        for by in touched:
            assert ((by[elements] == self.NOBODY) | (by[elements] == threads)).all(), "a race"
        return threads, elements

    def load(self, index: Int) -> Int:
        threads, elements = self._elements(index, (self.writer,))
        for thread, element in zip(threads, elements, strict=True):
            self.reader[element] = thread if self.reader[element] in (self.NOBODY, thread) else self.SEVERAL
        loaded = self.data[elements]
        values = np.zeros(BLOCK.threads.shape, np.int64)
        values[threads] = loaded if loaded.dtype.kind == "i" else loaded.astype(np.float32).view(np.int32)
        return Int(values)

    def store(self, index: Int, value: Int | int) -> None:
        threads, elements = self._elements(index, (self.writer, self.reader))
        assert len(set(elements)) == len(elements), "a race"
        self.data[elements] = number(value)[threads]
        self.writer[elements] = threads
        self.times_written[elements] += 1


def select(condition: Int, a: Int | int, b: Int | int) -> Int:
    return Int(np.where(number(condition) != 0, number(a), number(b)))


def over_warp(function):
    """A function of the 32 values of each warp, given to all its lanes."""
    return lambda x: Int(np.repeat(function(BLOCK.by_warp(number(x))), WARP))


@contextlib.contextmanager
def when(condition: Int):
    BLOCK.active.append(BLOCK.active[-1] & (number(condition) != 0))
    yield
    BLOCK.active.pop()


def loop(steps, carry, body):
    """Each thread as often as it asks for."""
    active = BLOCK.active[-1]
    most = steps if isinstance(steps, int) else max(number(steps)[active], default=0)
    carry = list(carry)
    for step in range(most):
        if isinstance(steps, int):
            carry = body(Int(step), carry)
        else:
            with when(steps > step):
                new = body(Int(step), list(carry))
            carry = [select(steps > step, after, before) for after, before in zip(new, carry, strict=True)]
    return carry


def block_barrier() -> None:
    assert BLOCK.active[-1].all(), "only some threads reach a barrier"
    for array in BLOCK.arrays:
        array.forget()


def from_lane(x: Int, source: Int) -> Int:
    values = BLOCK.by_warp(number(x))
    return Int(values[BLOCK.threads // WARP, number(source) % WARP])


STAND_INS = {
    "Int": Int,
    "constant": Int,
    "select": select,
    "maximum": lambda a, b: Int(np.maximum(number(a), number(b))),
    "minimum": lambda a, b: Int(np.minimum(number(a), number(b))),
    "popcount": lambda x: Int(np.bitwise_count(unsigned(x))),
    "thread": lambda: Int(BLOCK.threads),
    "warp": lambda: Int(BLOCK.threads // WARP),
    "ballot": over_warp(lambda x: (x << np.arange(WARP)).sum(axis=1)),
    "warp_max": over_warp(lambda x: x.max(axis=1)),
    "warp_min": over_warp(lambda x: x.min(axis=1)),
    "warp_sum": over_warp(lambda x: x.sum(axis=1)),
    "from_lane": from_lane,
    "block_barrier": block_barrier,
    "when": when,
    "loop": loop,
}


def run(kernel, work, inputs, outputs, smem: dict[str, int], *, partial: tuple[int, ...] = ()) -> list[np.ndarray]:
    """Runs `kernel(work, block, inputs, outputs, smem)` block by block.

    Args:
        kernel: device code.
        work: has `threads` and `blocks`.
        inputs: arrays.
        outputs: shapes, int32.
        smem: how many integers of shared memory, by name.
        partial: which outputs may have elements that nobody writes: these come as UNWRITTEN.
    """
    global BLOCK
    gmem_in = [Array(np.asarray(x)) for x in inputs]
    gmem_out = [Array(np.full(math.prod(shape), UNWRITTEN, np.int32)) for shape in outputs]
    with pytest.MonkeyPatch.context() as patch:
        for name, stand_in in STAND_INS.items():
            patch.setattr(lane, name, stand_in)
        for number_of_block in range(work.blocks):
            shared = {name: Array(np.full(size, UNWRITTEN, np.int32)) for name, size in smem.items()}
            BLOCK = Block(work.threads)
            BLOCK.arrays = [*shared.values(), *gmem_in, *gmem_out]
            block_barrier()
            kernel(work, Int(number_of_block), gmem_in, gmem_out, shared)
    for i, x in enumerate(gmem_out):
        least = 0 if i in partial else 1
        assert ((x.times_written >= least) & (x.times_written <= 1)).all(), "an element is not written once"
    return [x.data.reshape(shape) for x, shape in zip(gmem_out, outputs, strict=True)]
