"""What `device` asks of a lane beyond `pallas_kernels.tile.lane`: bytes and halves, copies, the tensor core.

Addresses are bytes of shared memory, 32-bit integers.
"""

from collections.abc import Sequence
from typing import Any

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm

from pallas_kernels.tile.lane import Array, Bool, Int, constant

BARRIER_BYTES = 8
CHUNK_BYTES, SWIZZLE = 16, 128  # of a column of x: what stays together, and where it is swapped

# Upper half of a wgmma descriptor: a swizzle of 128 bytes, and 8 columns of so many each, in units of 16 bytes.
SWIZZLED = 1 << 30 | 8 * SWIZZLE // 16


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _pointer(address: Int) -> ir.Value:
    return llvm.inttoptr(ir.Type.parse("!llvm.ptr<3>"), address.value)


def _ptx(code: str, *args: Int) -> Int:
    return Int(utils.inline_ptx(code, *(x.value for x in args), result_types=_i32()))


def _address(source: Array, unit: int, number: Int) -> ir.Value:
    """In global memory: of the unit of this number, of `unit` bytes."""
    i64, i8 = ir.IntegerType.get_signless(64), ir.IntegerType.get_signless(8)
    offset = arith.muli(arith.extui(i64, number.value), arith.constant(i64, unit))
    return llvm.ptrtoint(i64, utils.getelementptr(source.pointer, [offset], i8))


def address_of(array: Array) -> Int:
    """Where an array in shared memory starts."""
    return Int(llvm.ptrtoint(_i32(), array.pointer))


def choose(arrays: Sequence[Array], number: Int) -> Array:
    """The array of this number."""
    first, *others = arrays
    pointer = first.pointer
    for i, array in enumerate(others, start=1):
        pointer = llvm.select(number.equals(constant(i)).value, array.pointer, pointer)
    return Array(pointer, first.dtype)


def load_half(address: Int, offset: int) -> Int:
    """16 bits of shared memory, zeros above them; one instruction, whatever the constant offset."""
    i8, i16 = ir.IntegerType.get_signless(8), ir.IntegerType.get_signless(16)
    return Int(arith.extui(_i32(), llvm.load(i16, utils.getelementptr(_pointer(address), [offset], i8))))


def load_word(address: Int, bits: Int, mask: int) -> Int:
    """32 bits of shared memory where `bits` has one of the mask, zeros elsewhere."""
    signed = mask - (mask >> 31 << 32)
    code = "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.shared.b32 $0, [$1]; }"
    own = (bits & signed).value
    return Int(utils.inline_ptx(code, address.value, own, result_types=_i32(), has_side_effects=True))


def load_stored_half(address: Int, bits: Int, mask: int) -> Int:
    """16 bits of shared memory where `bits` has one of the mask, zeros elsewhere and above them."""
    code = "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.shared.u16 $0, [$1]; }"
    own = (bits & (mask - (mask >> 31 << 32))).value
    return Int(utils.inline_ptx(code, address.value, own, result_types=_i32(), has_side_effects=True))


def widen(pair: Int, values: str, dtype: str) -> Int:
    """Two 8-bit values, "int8" or "float8_e4m3fn", as two of "bfloat16" or "float16": exactly.

    An int8 v by arithmetic: of bfloat16, 0x4300 | v & 127 is 128 + v, or 256 + v where v is negative, and 0x4300 |
    v & 128 is what of that is too much; of float16, 0x6400 | u is 1024 + u, for u = v ^ 128 = v + 128.
    """
    code = {
        ("int8", "bfloat16"): ".reg .b32 w, sum, more; prmt.b32 w, $1, 0, 0x4140; "
        "lop3.b32 sum, w, 0x007f007f, 0x43004300, 0xea; lop3.b32 more, w, 0x00800080, 0x43004300, 0xea; "
        "sub.rn.bf16x2 $0, sum, more;",
        ("int8", "float16"): ".reg .b32 w, h; xor.b32 w, $1, 0x8080; prmt.b32 w, w, 0x64646464, 0x4140; "
        "mov.b32 h, 0x64806480; sub.rn.f16x2 $0, w, h;",
        ("float8_e4m3fn", "bfloat16"): ".reg .b16 h, low, high; .reg .b32 w; .reg .f32 a, b; cvt.u16.u32 h, $1; "
        "cvt.rn.f16x2.e4m3x2 w, h; mov.b32 {low, high}, w; cvt.f32.f16 a, low; cvt.f32.f16 b, high; "
        "cvt.rn.bf16x2.f32 $0, b, a;",
        ("float8_e4m3fn", "float16"): ".reg .b16 h; cvt.u16.u32 h, $1; cvt.rn.f16x2.e4m3x2 $0, h;",
    }[values, dtype]
    return _ptx("{ " + code + " }", pair)


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


def multiply_blocks(acc: Sequence[Int], a: Sequence[Int], x: Int, tiles: int, dtype: str) -> list[Int]:
    """acc + a x, of blocks: wgmma by the four warps of a warpgroup, of which each has 16 rows of its own.

    Args:
        acc: bits of float32, 4 registers a tile.
        a: 16 registers a block, 4 for each 16 columns.
        x: address of the first block's x in shared memory, as `pipelines.Steps` has it; the others' follow.
        tiles: of 8 columns of x.
        dtype: of a and x.
    """
    kind, n, f32 = {"bfloat16": "bf16", "float16": "f16"}[dtype], 8 * tiles, ir.F32Type.get()
    products = len(a) // 4
    own, rest = range(len(acc)), range(len(acc), 2 * len(acc) + len(a) + products)
    before, registers, starts = rest[: len(acc)], rest[len(acc) : -products], rest[-products:]
    code = [".reg .b64 d;", *(f"mov.b32 ${i}, ${j};" for i, j in zip(own, before, strict=True))]
    code.append("wgmma.fence.sync.aligned;")
    for q, start in enumerate(starts):
        code.append(f"mov.b64 d, {{${start}, {SWIZZLED}}};")
        sums, of_a = (", ".join(f"${i}" for i in group) for group in (own, registers[4 * q : 4 * q + 4]))
        product = f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind}"
        code.append(f"{product} {{{sums}}}, {{{of_a}}}, d, 1, 1, 1, 0;")
    # Waited for at once: the registers of `a` are free again, and other warpgroups have work meanwhile.
    code += ["wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"]
    low, block = (x & 0x3FFFF) >> 4, n * SWIZZLE // 16  # in units of 16 bytes
    of_starts = [low + (q // 4 * block + q % 4 * 2) for q in range(products)]
    operands = [*(arith.bitcast(f32, r.value) for r in acc), *(r.value for r in (*a, *of_starts))]
    out: Any = utils.inline_ptx(
        "{ " + " ".join(code) + " }", *operands, result_types=[f32] * len(acc), has_side_effects=True, convergent=True
    )
    return [Int(arith.bitcast(_i32(), r)) for r in out]


def load_matrices(address: Int, offset: int) -> list[Int]:
    """Four 8 x 8 matrices of shared memory, of which lane i names row i % 8 of matrix i // 8, 16 bytes.

    Lane i gets elements 2 (i % 4) and one more of row i // 4 of each.
    """
    code = f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{$0, $1, $2, $3}}, [$4+{offset}];"
    types = [_i32()] * 4
    out: Any = utils.inline_ptx(code, address.value, result_types=types, has_side_effects=True, convergent=True)
    return [Int(word) for word in out]


def multiply_tile(acc: Sequence[Int], a: Sequence[Int], b: Sequence[Int], dtype: str) -> list[Int]:
    """acc + a b by mma.m16n8k16: of 4 registers of float32, 4 and 2."""
    kind, f32 = {"bfloat16": "bf16", "float16": "f16"}[dtype], ir.F32Type.get()
    sums, of_a, of_b, before = (", ".join(f"${i}" for i in g) for g in (range(4), range(4, 8), (8, 9), range(10, 14)))
    code = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{{sums}}}, {{{of_a}}}, {{{of_b}}}, {{{before}}};"
    operands = [*(x.value for x in (*a, *b)), *(arith.bitcast(f32, x.value) for x in acc)]
    out: Any = utils.inline_ptx(code, *operands, result_types=[f32] * 4, convergent=True)
    return [Int(arith.bitcast(_i32(), r)) for r in out]


def begin_barriers(address: Int, count: int, arrivals: int = 1) -> None:
    """Makes barriers ready, each for so many arrivals; called by one thread."""
    for i in range(count):
        nvvm.mbarrier_init(_pointer(address + i * BARRIER_BYTES), constant(arrivals).value)
    utils.inline_ptx("fence.mbarrier_init.release.cluster;", has_side_effects=True)


def expect(barrier: Int, size: Int) -> None:
    """Arrives; the barrier's phase is over when that many bytes have been copied."""
    utils.inline_ptx("mbarrier.arrive.expect_tx.shared.b64 _, [$0], $1;", barrier.value, size.value)


def arrive(barrier: Int) -> None:
    """One of the barrier's arrivals, after all that this thread has done."""
    utils.inline_ptx("mbarrier.arrive.shared.b64 _, [$0];", barrier.value, has_side_effects=True)


def wait(barrier: Int, phase: Int) -> None:
    """Waits until the phase of this number is over, of which the barrier must not be two ahead."""
    ticks = arith.constant(_i32(), 10000000)
    nvvm.mbarrier_try_wait_parity(_pointer(barrier), (phase & 1).value, ticks)


def copy(source: Array, unit: int, first: Int, to: Int, size: Int, barrier: Int) -> None:
    """Begins a copy of `size` bytes (a multiple of 16) to shared memory, from unit number `first` of `unit` bytes."""
    utils.inline_ptx(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];",
        to.value,
        _address(source, unit, first),
        size.value,
        barrier.value,
    )


def copy_tile(ctx, source: ir.Value, rows: int, number: Int, to: Int, barrier: Int) -> None:
    """Begins the copy of so many rows by 64 columns of a matrix of 16-bit elements, zeros behind its end; swizzled.

    Args:
        ctx: the launch, which has the tensor map.
        source: memref of the matrix.
        rows: its first ones.
        number: of the tile of 64 columns.
        to: address, a multiple of 1024.
        barrier: that is told of the bytes.
    """
    index, width = ir.IndexType.get(), SWIZZLE // 2
    unphased: Any = None  # nobody waits by this handle
    smem = ir.Attribute.parse("#gpu.address_space<workgroup>")
    tile = ir.MemRefType.get((rows, width), ir.MemRefType(source.type).element_type, memory_space=smem)
    at = utils.DynamicSlice(arith.index_castui(index, (number * width).value), width)
    ctx.async_copy(
        src_ref=source,
        dst_ref=utils.ptr_as_memref(_pointer(to), tile),
        gmem_slice=(utils.DynamicSlice(arith.constant(index, 0), rows), at),
        swizzle=SWIZZLE,
        barrier=utils.BarrierRef(_pointer(barrier), constant(0).value, unphased, 1),
        arrive=False,
        predicate=None,
    )


def is_elected() -> Bool:
    """Of one lane; as ptxas knows that it is one, it begins copies without a loop over those that take part."""
    return Bool(nvvm.elect_sync())


def warp_barrier() -> None:
    """Waits for all lanes of the warp."""
    nvvm.bar_warp_sync(constant(-1).value)
