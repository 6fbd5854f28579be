"""What a lane of a warp computes with in inline MLIR: 32-bit integers with Python's operators, and arrays of them."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, nvvm

WARP = 32
GMEM, SMEM = 1, 3  # LLVM's address spaces


def _i32(value: Any) -> Any:
    i32 = ir.IntegerType.get_signless(32)
    return arith.constant(i32, value) if isinstance(value, int) else value.value


def _integer(operation: Callable[..., Any]) -> Callable[..., "Int"]:
    return lambda a, b: Int(operation(_i32(a), _i32(b)))


def _comparison(predicate: arith.CmpIPredicate) -> Callable[..., "Bool"]:
    return lambda a, b: Bool(arith.cmpi(predicate, _i32(a), _i32(b)))


@dataclasses.dataclass(frozen=True, eq=False)
class Bool:
    """A truth value of this lane."""

    value: Any

    def __and__(self, other: "Bool") -> "Bool":
        return Bool(arith.andi(self.value, other.value))


@dataclasses.dataclass(frozen=True, eq=False)
class Int:
    """A 32-bit integer of this lane. Comparisons are signed; division, remainder and right shift are not."""

    value: Any

    __add__, __sub__, __mul__ = map(_integer, (arith.addi, arith.subi, arith.muli))
    __floordiv__, __mod__ = map(_integer, (arith.divui, arith.remui))
    __and__, __or__, __xor__ = map(_integer, (arith.andi, arith.ori, arith.xori))
    __lshift__, __rshift__ = map(_integer, (arith.shli, arith.shrui))
    __lt__, __gt__ = _comparison(arith.CmpIPredicate.slt), _comparison(arith.CmpIPredicate.sgt)
    equals = _comparison(arith.CmpIPredicate.eq)


@dataclasses.dataclass(frozen=True)
class Array:
    """An array in global or shared memory, indexed as if it were flat."""

    pointer: Any
    dtype: Any

    @classmethod
    def of(cls, ref: ir.Value, dtype: Any, space: int) -> "Array":
        """The array that a memref names."""
        pointer = utils.memref_ptr(ref)
        if space == GMEM:
            pointer = llvm.addrspacecast(ir.Type.parse("!llvm.ptr<1>"), pointer)
        return cls(pointer, dtype)

    def _address(self, index: Int) -> tuple[Any, Any]:
        element = utils.dtype_to_ir_type(self.dtype)
        index_i64 = arith.extui(ir.IntegerType.get_signless(64), _i32(index))
        return element, utils.getelementptr(self.pointer, [index_i64], element)

    def load(self, index: Int) -> Int:
        """An element: an integer extended, or the bits of a floating-point value as a float32."""
        element, address = self._address(index)
        value = llvm.load(element, address)
        i32 = ir.IntegerType.get_signless(32)
        if not jnp.issubdtype(self.dtype, jnp.floating):
            return Int(value if element == i32 else arith.extui(i32, value))
        if element != ir.F32Type.get():
            value = arith.extf(ir.F32Type.get(), value)
        return Int(arith.bitcast(i32, value))

    def store(self, index: Int, value: Int | int) -> None:
        """Writes a 32-bit element."""
        llvm.store(_i32(value), self._address(index)[1])


def constant(value: int) -> Int:
    """The same in every lane."""
    return Int(_i32(value))


def select(condition: Bool, a: Int | int, b: Int | int) -> Int:
    """`a` where the condition holds, else `b`."""
    return Int(arith.select(condition.value, _i32(a), _i32(b)))


def maximum(a: Int | int, b: Int | int) -> Int:
    """The larger, as signed integers."""
    return Int(arith.maxsi(_i32(a), _i32(b)))


def minimum(a: Int | int, b: Int | int) -> Int:
    """The smaller, as signed integers."""
    return Int(arith.minsi(_i32(a), _i32(b)))


def total(values: Sequence[Int]) -> Int:
    """The sum of one at least."""
    first, *rest = values
    return sum(rest, start=first)


def popcount(x: Int) -> Int:
    """How many bits are set."""
    return Int(llvm.intr_ctpop(x.value))


def thread() -> Int:
    """The number of this thread in its block."""
    return Int(utils.thread_idx())


def warp() -> Int:
    """The number of this warp in its block, known to be the same in all its lanes."""
    return Int(utils.warp_idx())


def ballot(condition: Bool) -> Int:
    """A bit for each lane of the warp."""
    i32 = ir.IntegerType.get_signless(32)
    return Int(nvvm.vote_sync(_i32(-1), condition.value, nvvm.VoteSyncKind.ballot, results=[i32]))


def warp_max(x: Int) -> Int:
    """The largest of the warp, in every lane."""
    return Int(utils.redux(x.value, _i32(-1), utils.ReductionKind.MAX))


def warp_min(x: Int) -> Int:
    """The smallest of the warp, in every lane."""
    return Int(utils.redux(x.value, _i32(-1), utils.ReductionKind.MIN))


def warp_sum(x: Int) -> Int:
    """The sum over the warp, in every lane."""
    return Int(utils.redux(x.value, _i32(-1), utils.ReductionKind.ADD))


def from_lane(x: Int, lane: Int) -> Int:
    """What another lane of the warp holds."""
    return Int(nvvm.shfl_sync(_i32(-1), x.value, lane.value, _i32(WARP - 1), nvvm.ShflKind.idx))


def block_barrier() -> None:
    """Waits for every thread of the block; what they wrote to shared memory is then seen."""
    gpu.barrier()


def when(condition: Bool) -> contextlib.AbstractContextManager[None]:
    """What follows is done where the condition holds."""
    return utils.when(condition.value)


def loop(steps: "int | Int", carry: Sequence[Int], body: Callable[[Int, list[Int]], list[Int]]) -> list[Int]:
    """`body(step, carry)` for each step; its result is carried to the next one.

    Args:
        steps: how many; a value of the device must be the same in all lanes of the warp.
        carry: what the first step gets.
        body: of a step.
    """
    if isinstance(steps, int) and steps == 1:
        return body(constant(0), list(carry))

    @utils.fori(_i32(steps), [x.value for x in carry])
    def done(step, carry):
        return [x.value for x in body(Int(step), [Int(x) for x in carry])]

    return [Int(x) for x in done.results]
