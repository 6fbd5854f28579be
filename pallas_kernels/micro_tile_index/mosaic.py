"""The Mosaic GPU kernel of `micro_tile_index`: a mask -> the positions of its true entries, one list a row.

A warp places `entries` consecutive entries of a list, 32 at a time: a ballot shows every lane which of them are true,
so population counts rank them. Where they start it counts itself, from the mask's bytes before its own, so warps
neither wait for each other nor share memory. Entries that are false write the zeros behind the count, from the list's
end backwards: each position is written once.
Bytes: the mask (again for each warp of a list, from L2), 4 an entry. Operations: about 12 an entry.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm
from jaxtyping import Array, Bool, Int8, Int32

from pallas_kernels.tile.launch import lowered_once

WARP = 32
WARPS = 4  # a block is one warpgroup
ALIGNMENT = LOAD = 16  # bytes of mask a lane loads at once to count them: lists start on a multiple
LOADS = 8  # in flight while counting: 14 take longer, 8.9 us for 28672 entries of a list where these take 6.9
MANY_WARPS = 512  # about one for each scheduler of an H200


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tiling of the Mosaic kernel.

    Attributes:
        entries: of a list that a warp places, a multiple of 32.
    """

    entries: int = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Work:
    """How the entries are divided among warps, numbered list by list.

    Attributes:
        lists: rows of the mask.
        length: entries of each; the mask's rows may be longer.
        entries: of a list that a warp places.
    """

    lists: int
    length: int
    entries: int

    @property
    def warps_a_list(self) -> int:
        return pl.cdiv(self.length, self.entries)

    @property
    def warps(self) -> int:
        return self.lists * self.warps_a_list


def _place(work: _Work, mask_gmem, indices_gmem, counts_gmem, block: jax.Array) -> None:
    """What the four warps of a block write."""
    ref = plgpu.RefType()

    @plgpu.inline_mgpu(arg_types=(ref, ref, ref, plgpu.Layout.WG_SPLAT))
    def place(ctx, mask, indices, counts, block):
        del ctx
        i8, i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (8, 32, 64))
        const = functools.partial(arith.constant, i32)
        less = functools.partial(arith.cmpi, arith.CmpIPredicate.slt)
        equal = functools.partial(arith.cmpi, arith.CmpIPredicate.eq)
        every_lane = const(-1)

        def row(memref, number, row_bytes):
            """Address of a row in global memory."""
            base = llvm.addrspacecast(ir.Type.parse("!llvm.ptr<1>"), utils.memref_ptr(memref))
            offset = arith.muli(arith.extui(i64, number), arith.constant(i64, row_bytes))
            return utils.getelementptr(base, [offset], i8)

        def count_bytes(mask_row, lane, end):
            """This lane's share of the ones before `end`."""
            loads = min(LOADS, pl.cdiv(work.length, WARP * LOAD))
            span = WARP * LOAD * loads

            @utils.fori(arith.divui(arith.addi(end, const(span - 1)), const(span)), const(0))
            def counted(i, count):
                byte_sums = const(0)  # four at a time, each at most LOAD // 4 * LOADS
                for load in range(loads):
                    offset = arith.addi(arith.muli(i, const(span)), const(load * WARP * LOAD))
                    offset = arith.addi(offset, arith.muli(lane, const(LOAD)))
                    inside = less(offset, end)
                    address = utils.getelementptr(mask_row, [arith.select(inside, offset, const(0))], i8)
                    words = llvm.load(ir.VectorType.get((LOAD // 4,), i32), address, alignment=LOAD)
                    words = [llvm.extractelement(words, const(word)) for word in range(LOAD // 4)]
                    four_sums = functools.reduce(arith.addi, words)
                    byte_sums = arith.addi(byte_sums, arith.select(inside, four_sums, const(0)))
                return arith.addi(count, arith.shrui(arith.muli(byte_sums, const(0x01010101)), const(24)))

            return counted.result

        lane = arith.andi(utils.thread_idx(), const(WARP - 1))
        warp = arith.addi(arith.muli(block.registers.item(), const(WARPS)), utils.warp_idx())
        with utils.when(less(warp, const(work.warps))):
            number, part = (op(warp, const(work.warps_a_list)) for op in (arith.divui, arith.remui))
            mask_row = row(mask, number, mask.type.shape[1])
            indices_row = row(indices, number, 4 * work.length)
            start = arith.muli(part, const(work.entries))
            entries, own = [], []  # the loads first: all of them, and those of the count, are under way together
            for first in range(0, work.entries, WARP):
                entry = arith.addi(arith.addi(start, const(first)), lane)
                address = utils.getelementptr(mask_row, [arith.minsi(entry, const(work.length - 1))], i8)
                entries.append(entry)
                own.append(llvm.load(i8, address))
            rank = const(0)  # of the first entry
            if work.warps_a_list > 1:
                rank = utils.redux(count_bytes(mask_row, lane, start), every_lane, utils.ReductionKind.ADD)
            lanes_below = arith.subi(arith.shli(const(1), lane), const(1))
            for entry, byte in zip(entries, own, strict=True):
                inside = less(entry, const(work.length))
                is_listed = arith.andi(inside, arith.cmpi(arith.CmpIPredicate.ne, byte, arith.constant(i8, 0)))
                listed = nvvm.vote_sync(every_lane, is_listed, nvvm.VoteSyncKind.ballot, results=[i32])
                own_rank = arith.addi(rank, llvm.intr_ctpop(arith.andi(listed, lanes_below)))
                from_end = arith.subi(const(work.length - 1), arith.subi(entry, own_rank))
                with utils.when(inside):
                    position = arith.select(is_listed, own_rank, from_end)
                    address = utils.getelementptr(indices_row, [position], i32)
                    llvm.store(arith.select(is_listed, entry, const(0)), address)
                rank = arith.addi(rank, llvm.intr_ctpop(listed))
            is_last = equal(part, const(work.warps_a_list - 1))
            with utils.when(arith.andi(is_last, equal(lane, const(0)))):
                llvm.store(rank, row(counts, number, 4))

    place(mask_gmem, indices_gmem, counts_gmem, block)  # pyright: ignore[reportCallIssue]


def _place_interpreted(work: _Work, mask_gmem, indices_gmem, counts_gmem, block: jax.Array) -> None:
    """`_place` entry by entry, with plain reads and writes: that each is written once is for the race detector."""

    def place_part(number):
        row, part = lax.div(number, work.warps_a_list), lax.rem(number, work.warps_a_list)
        is_listed = mask_gmem[row][: work.length] != 0
        entries = jnp.arange(work.length, dtype=jnp.int32)
        ranks = jnp.cumsum(is_listed, dtype=jnp.int32) - is_listed.astype(jnp.int32)
        positions = jnp.where(is_listed, ranks, work.length - 1 - (entries - ranks))
        values = jnp.where(is_listed, entries, 0)
        start = part * work.entries

        @functools.partial(lax.fori_loop, start, jnp.minimum(start + work.entries, work.length), init_val=None)
        def _write(entry, _):
            indices_gmem[row, positions[entry]] = values[entry]

        @pl.when(part == work.warps_a_list - 1)
        def _write_count():
            counts_gmem[row] = jnp.sum(is_listed, dtype=jnp.int32)

    for warp in range(WARPS):
        number = block * WARPS + warp
        pl.when(number < work.warps)(functools.partial(place_part, number))


@lowered_once("length")
def mosaic(
    mask: Bool[Array, "lists padded"] | Int8[Array, "lists padded"], length: int, config: Config, interpret: bool
) -> tuple[Int32[Array, "lists {length}"], Int32[Array, " lists"]]:
    """Launches the kernel; `interpret` runs it on CPU under the race detector.

    Args:
        mask: its rows a multiple of LOAD; bytes are 0 or 1; what is past `length` does not matter.
        length: entries of a list, at least 1.
        config: tiling.
        interpret: on CPU.
    """
    work = _Work(lists=mask.shape[0], length=length, entries=min(config.entries, pl.cdiv(length, WARP) * WARP))
    place = _place_interpreted if interpret else _place

    def body(mask_gmem, indices_gmem, counts_gmem):
        place(work, mask_gmem, indices_gmem, counts_gmem, lax.axis_index("block"))

    kernel = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((work.lists, length), jnp.int32),
            jax.ShapeDtypeStruct((work.lists,), jnp.int32),
        ),
        grid=(pl.cdiv(work.warps, WARPS),),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
        kernel_name="micro_tile_index",
    )
    indices, counts = kernel(mask.astype(jnp.int8))
    return indices, counts


def configs(lists: int, length: int) -> list[Config]:
    """Configs worth timing. The heuristic's choice comes first: the most entries that still give every SM its warps."""
    sizes = (1024, 512, 256, 128)
    best = next((x for x in sizes if lists * pl.cdiv(length, x) >= MANY_WARPS), sizes[-1])
    return [Config(entries=x) for x in (best, *(x for x in sizes if x != best))]


def check_config(config: Config) -> None:
    """Raises ValueError where the kernel does not take this config."""
    if config.entries < WARP or config.entries % WARP:
        raise ValueError(f"entries must be a multiple of {WARP}, at least that; got entries={config.entries}")
