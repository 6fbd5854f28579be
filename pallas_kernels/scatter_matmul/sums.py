"""One launch before the products of several lists: which to make, and which of their results make each row of C.

What its threads do is in `device`. Bytes: each block of rows reads all entries of the lists, from L2; 4 written for
each entry, and for each row of C; past the capacity 4 for each list and row.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int32

from pallas_kernels.micro_tile_index import MicroTileIndex
from pallas_kernels.scatter_matmul import device
from pallas_kernels.scatter_matmul.device import WARPS, Work
from pallas_kernels.tile import lane, row_groups


def _find_sums(work: Work, block: jax.Array, refs) -> None:
    """Runs `device.find_sums`: `refs` are its inputs, its outputs and then shared memory."""

    @plgpu.inline_mgpu(arg_types=(tuple(plgpu.RefType() for _ in refs), plgpu.Layout.WG_SPLAT))
    def run(ctx, refs, block):
        del ctx
        names = device.shared_memory(work)
        split = len(refs) - len(names)
        gmem = [lane.Array.of(ref, jnp.int32, lane.GMEM) for ref in refs[:split]]
        smem = {name: lane.Array.of(ref, jnp.int32, lane.SMEM) for name, ref in zip(names, refs[split:], strict=True)}
        device.find_sums(work, lane.Int(block.registers.item()), gmem[:2], gmem[2:], smem)

    run(refs, block)  # pyright: ignore[reportCallIssue]


def _find_sums_interpreted(work: Work, block: jax.Array, refs) -> None:
    """What a block writes, with plain reads and writes: that each is written once is for the race detector."""
    indices, counts = (x[...] for x in refs[:2])
    starts_gmem, counts_gmem, write_starts_gmem, ends_gmem, reads_gmem, numbers_gmem, row_counts_gmem = refs[2:]
    lists, m = indices.shape
    position, number = (lax.broadcasted_iota(jnp.int32, (lists, m), axis) for axis in (1, 0))
    target = jnp.where(position < counts[:, None], indices, m)  # out of range, so dropped
    positions = jnp.full((lists, m), -1, jnp.int32).at[number, target].set(position, mode="drop")
    through = jnp.cumsum(counts, dtype=jnp.int32)
    first, fits, in_order = through - counts, through[-1] <= work.capacity, jnp.arange(lists, dtype=jnp.int32)

    @pl.when(block == 0)
    def _write_groups():
        group_counts = jnp.append(jnp.where(fits, counts, 0), jnp.where(fits, 0, m))
        counts_gmem[...] = group_counts
        starts_gmem[...] = jnp.arange(lists + 1, dtype=jnp.int32) * m
        write_starts_gmem[...] = jnp.append(first, 0)
        ends = jnp.cumsum(pl.cdiv(group_counts, work.block_m), dtype=jnp.int32)
        ends_gmem[...] = jnp.where(fits | (jnp.arange(lists + 1) == lists), ends, 0)

    def write_row(row, _):
        listed = positions[:, row] >= 0
        order = jnp.argsort(~listed, stable=True)
        count = jnp.sum(listed, dtype=jnp.int32)
        numbers = jnp.where(in_order < count, (first + positions[:, row])[order], -1)
        numbers_gmem[row] = jnp.where(fits, numbers, row)
        row_counts_gmem[row] = jnp.where(fits, count, 1)

        def write_list(i, _):
            own = row * lists + i

            @pl.when(listed[i])
            def _write_entry():
                reads_gmem[i, positions[i, row]] = own

            @pl.when(~fits)
            def _write_masked():
                reads_gmem[lists + i, row] = jnp.where(listed[i], own, -1)

        lax.fori_loop(0, lists, write_list, None)

    lax.fori_loop(block * work.rows, jnp.minimum((block + 1) * work.rows, m), write_row, None)


def find_sums(
    index: MicroTileIndex, capacity: int, block_m: int, interpret: bool
) -> tuple[row_groups.Groups, Int32[Array, "M lists"], Int32[Array, " M"]]:
    """Launches the kernel.

    A group for each list, which stores its results after those before it. And one of all rows, which sums over the
    lists itself, for when they have more than `capacity` entries: then it alone has any slots.

    Args:
        index: the lists, of single rows.
        capacity: results that there is room for.
        block_m: of the products' tiles.
        interpret: runs it on CPU under the race detector.

    Returns:
        The products to make, and the results that make each row of C: their numbers, and how many of these count.
    """
    lists, m = index.indices.shape
    work = Work(lists=lists, length=m, capacity=capacity, block_m=block_m)

    def body(*refs):
        find = _find_sums_interpreted if interpret else _find_sums
        find(work, lax.axis_index("block"), refs)

    shapes = *((lists + 1,),) * 4, (2 * lists, m), (m, lists), (m,)
    kernel = plgpu.kernel(
        body,
        out_type=tuple(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes),
        scratch_types=() if interpret else [plgpu.SMEM((x,), jnp.int32) for x in device.shared_memory(work).values()],
        grid=(work.blocks,),
        grid_names=("block",),
        num_threads=1 if interpret else WARPS // 4,  # warpgroups; what happens between them is not interpreted
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
        kernel_name="scatter_matmul_find_sums",
    )
    starts, counts, write_starts, ends, reads, numbers, row_counts = kernel(index.indices, index.counts)
    groups = row_groups.Groups(
        starts=starts,
        counts=counts,
        reads=reads.reshape(-1),
        writes=None,
        write_starts=write_starts,
        ends=ends,
    )
    return groups, numbers, row_counts
