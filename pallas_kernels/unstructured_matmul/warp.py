"""What `device` asks of a lane beyond `pallas_kernels.tile.lane`: bytes and halves, bulk copies, the tensor core.

Addresses are bytes of shared memory, 32-bit integers.
"""

from collections.abc import Callable, Sequence
from typing import Any

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm

from pallas_kernels.tile.lane import Array, Int, constant

BARRIER_BYTES = 8


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _pointer(address: Int) -> ir.Value:
    return llvm.inttoptr(ir.Type.parse("!llvm.ptr<3>"), address.value)


def _ptx(code: str, *args: Int) -> Int:
    return Int(utils.inline_ptx(code, *(x.value for x in args), result_types=_i32()))


def address_of(array: Array) -> Int:
    """Where an array in shared memory starts."""
    return Int(llvm.ptrtoint(_i32(), array.pointer))


def load_half(address: Int, offset: int) -> Int:
    """16 bits of shared memory, zeros above them; one instruction, whatever the constant offset."""
    i8, i16 = ir.IntegerType.get_signless(8), ir.IntegerType.get_signless(16)
    return Int(arith.extui(_i32(), llvm.load(i16, utils.getelementptr(_pointer(address), [offset], i8))))


def load_words(address: Int) -> list[Int]:
    """Four words of shared memory, from a multiple of 16 on."""
    vector = llvm.load(ir.VectorType.get((4,), _i32()), _pointer(address), alignment=16)
    return [Int(llvm.extractelement(vector, constant(i).value)) for i in range(4)]


def dot_bytes(a: Int, factors: int, c: Int) -> Int:
    """c + the sum of the four bytes of a, each times that byte of `factors`, unsigned."""
    signed = factors - (factors >> 31 << 32)
    return _ptx("dp4a.u32.u32 $0, $1, $2, $3;", a, constant(signed), c)


def permute_bytes(low: Int, high: Int, selector: Int) -> Int:
    """Bytes of low (0 to 3) and high (4 to 7) that four nibbles of `selector` name; 8 + i is the sign of byte i."""
    return _ptx("prmt.b32 $0, $1, $2, $3;", low, high, selector)


def rotate_right(x: Int, bits: int) -> Int:
    """By a constant."""
    return Int(llvm.intr_fshr(x.value, x.value, constant(bits).value)) if bits else x


def multiply_tile(acc: Sequence[Int], a: Sequence[Int], b: Sequence[Int], dtype: str) -> list[Int]:
    """acc + a b of an mma.m16n8k16; the accumulators are the bits of float32."""
    kind = {"bfloat16": "bf16", "float16": "f16"}[dtype]
    f32 = ir.F32Type.get()
    floats = [arith.bitcast(f32, x.value) for x in acc]
    code = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )
    operands = [*(x.value for x in a), *(x.value for x in b), *floats]
    # A side effect to the compiler, so that what it reads of a ring has been read when the ring is written next.
    out: Any = utils.inline_ptx(code, *operands, result_types=[f32] * 4, has_side_effects=True, convergent=True)
    return [Int(arith.bitcast(_i32(), x)) for x in out]


def begin_barriers(address: Int, count: int) -> None:
    """Makes barriers ready on which one thread arrives; called by that thread."""
    for i in range(count):
        nvvm.mbarrier_init(_pointer(address + i * BARRIER_BYTES), constant(1).value)
    utils.inline_ptx("fence.mbarrier_init.release.cluster;", has_side_effects=True)


def expect(barrier: Int, size: Int) -> None:
    """Arrives; the barrier's phase is over when that many bytes have been copied."""
    utils.inline_ptx("mbarrier.arrive.expect_tx.shared.b64 _, [$0], $1;", barrier.value, size.value)


def wait(barrier: Int, phase: Int) -> None:
    """Waits until the phase of this number is over, of which the barrier must not be two ahead."""
    ticks = arith.constant(_i32(), 10000000)
    nvvm.mbarrier_try_wait_parity(_pointer(barrier), (phase & 1).value, ticks)


def copy(source: Array, unit: int, first: Int, to: Int, size: Int, barrier: Int) -> None:
    """Begins a copy of `size` bytes (a multiple of 16) to shared memory, from unit number `first` of `unit` bytes."""
    i64, i8 = ir.IntegerType.get_signless(64), ir.IntegerType.get_signless(8)
    offset = arith.muli(arith.extui(i64, first.value), arith.constant(i64, unit))
    pointer = llvm.ptrtoint(i64, utils.getelementptr(source.pointer, [offset], i8))
    utils.inline_ptx(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];",
        to.value,
        pointer,
        size.value,
        barrier.value,
    )


def warp_barrier() -> None:
    """Waits for all lanes of the warp."""
    nvvm.bar_warp_sync(constant(-1).value)


def repeat(steps: Int, carry: Sequence[Int], body: Callable[[Int, list[Int]], list[Int]]) -> list[Int]:
    """`lane.loop` as many times as a value says that is the same in all threads of the block."""

    @utils.fori(steps.value, [x.value for x in carry])
    def done(step, carry):
        return [x.value for x in body(Int(step), [Int(x) for x in carry])]

    return [Int(x) for x in done.results]
