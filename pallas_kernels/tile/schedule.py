"""Which tile comes when: rows of tiles from the longest to the shortest, dealt to persistent blocks there and back.

Lists differ in length, and a block that gets long ones in every wave is what everyone waits for at the end. Sorted and
dealt like this the sums of a block's tiles are nearly equal ("longest processing time first", Graham 1969).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, scf

MOST_SORTED = 128  # a thread ranks one row of tiles; where there are more, lengths average out


def own_tiles(tiles: int) -> jax.Array:
    """How many of `tiles` this block has."""
    sm, sms = lax.axis_index("sm"), lax.axis_size("sm")
    waves, left = tiles // sms, tiles % sms
    last = sm if waves % 2 == 0 else sms - 1 - sm  # this block's place in the last wave
    return waves + (last < left).astype(jnp.int32)


def tile_number(t) -> jax.Array:
    """The number of this block's t-th tile: waves go there and back."""
    sm, sms = lax.axis_index("sm"), lax.axis_size("sm")
    return t * sms + jnp.where(lax.rem(t, 2) == 0, sm, sms - 1 - sm)


def blocks(rows: int, columns: int, most: int) -> int:
    """How many persistent blocks to launch for so many tiles.

    Whole columns of tiles a wave where that takes no more waves: there and back then meets each row of tiles from its
    other end.
    """
    whole = most // rows * rows
    tiles = rows * columns
    return min(whole if whole and -(-tiles // whole) == -(-tiles // most) else most, tiles)


def row_and_column(number, rows: int, columns: int, group: int) -> tuple[jax.Array, jax.Array]:
    """The tile of a number: `group` rows of tiles at a time, within them column by column."""
    if rows <= group:
        return lax.rem(number, rows), lax.div(number, rows)
    first = lax.div(number, group * columns) * group
    width = jnp.minimum(group, rows - first)
    inner = number - first * columns
    return first + lax.rem(inner, width), lax.div(inner, width)


def dealt(rows: int, columns: int, group: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """On the host: of all tiles the block that computes it, of at most `most`, and its row of tiles."""
    number, count = np.arange(rows * columns), blocks(rows, columns, most)
    wave, place = np.divmod(number, count)
    block = np.where(wave % 2 == 0, place, count - 1 - place)
    first = number // (group * columns) * group
    return block, first + (number - first * columns) % np.minimum(group, rows - first)


def longest_first(counts_gmem, parts: int, order_smem, count_smem) -> None:
    """Writes to `order_smem` the rows of tiles by falling number of entries, equal ones in order.

    Args:
        counts_gmem: entries of each list, int32 [lists].
        parts: consecutive lists that a row of tiles takes.
        order_smem: int32 [MOST_SORTED].
        count_smem: int32 [MOST_SORTED or more], to work in.
    """
    lists, ref = counts_gmem.shape[0], plgpu.RefType()
    rows = -(-lists // parts)

    @plgpu.inline_mgpu(arg_types=(ref, ref))
    def load_counts(ctx, counts_gmem, count_smem):
        del ctx
        i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
        const = functools.partial(arith.constant, i32)
        thread = arith.remui(utils.thread_idx(), const(128))
        total = const(0)
        for part in range(parts):
            number = arith.addi(arith.muli(thread, const(parts)), const(part))
            inside = arith.cmpi(arith.CmpIPredicate.slt, number, const(lists))
            place = arith.index_castui(index, arith.select(inside, number, const(0)))
            total = arith.addi(total, arith.select(inside, memref.load(counts_gmem, [place]), const(0)))
        memref.store(total, count_smem, [arith.index_castui(index, thread)])

    @plgpu.inline_mgpu(arg_types=(ref, ref))
    def rank(ctx, order_smem, count_smem):
        del ctx
        i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
        const = functools.partial(arith.constant, i32)
        thread = arith.remui(utils.thread_idx(), const(128))
        mine = memref.load(count_smem, [arith.index_castui(index, thread)])
        place = const(0)
        for other in range(rows):
            theirs = memref.load(count_smem, [arith.constant(index, other)])
            longer = arith.cmpi(arith.CmpIPredicate.sgt, theirs, mine)
            equal = arith.cmpi(arith.CmpIPredicate.eq, theirs, mine)
            before = arith.cmpi(arith.CmpIPredicate.sgt, thread, const(other))
            ahead = arith.ori(longer, arith.andi(equal, before))
            place = arith.addi(place, arith.extui(i32, ahead))
        mine_counts = scf.IfOp(arith.cmpi(arith.CmpIPredicate.slt, thread, const(rows)))
        with ir.InsertionPoint(mine_counts.then_block):
            memref.store(thread, order_smem, [arith.index_castui(index, place)])
            scf.yield_([])

    load_counts(counts_gmem, count_smem)  # pyright: ignore[reportCallIssue]
    plgpu.commit_smem()
    rank(order_smem, count_smem)  # pyright: ignore[reportCallIssue]
    plgpu.commit_smem()


def longest_first_interpreted(counts_gmem, parts: int, order_smem, count_smem) -> None:
    """`longest_first` by a stable sort."""
    del count_smem
    counts = counts_gmem[...]
    totals = jnp.pad(counts, (0, -counts.shape[0] % parts)).reshape(-1, parts).sum(axis=1, dtype=jnp.int32)
    padded = jnp.pad(totals, (0, MOST_SORTED - totals.shape[0]), constant_values=-1)
    order_smem[...] = jnp.argsort(-padded, stable=True).astype(jnp.int32)
    plgpu.commit_smem()
