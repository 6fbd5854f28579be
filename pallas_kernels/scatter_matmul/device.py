"""What to multiply and what to add up, on the device: the code of `sums`, in inline MLIR.

A block has some rows of C. It reads all lists, and notes in a table in shared memory where in each list its rows are:
no two entries of a list name one row, so no two threads write one place. Where an entry is its own it also says which
row of A that is, so each is written by one block. Then a warp takes a row of the table at a time: a ballot shows which
lists name that row, and population counts rank them.
"""

import dataclasses
from collections.abc import Iterator, Sequence

from jax.experimental import pallas as pl

from pallas_kernels.tile import lane as ln
from pallas_kernels.tile.lane import WARP, Array, Int

WARPS = 32  # of a block
LOADS = 8  # in flight while reading lists
TABLE = 24 * 1024  # integers of shared memory for the table, and as many at most for each list's first result
MOST_LISTS = TABLE - 1  # of which a table has room for one row
MANY_BLOCKS = 128  # about one for each multiprocessor of an H200: each reads all lists
FEW_ROWS = 32  # of a block: whole lines of what is written


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """How rows are divided among blocks, and lists among a block's warps.

    Attributes:
        lists: how many.
        length: rows of C, and room for entries of a list.
        capacity: results that there is room for: with more entries the rows of A are multiplied as they are masked.
        block_m: slots of a row of tiles.
    """

    lists: int
    length: int
    capacity: int
    block_m: int

    @property
    def pitch(self) -> int:
        """Of a row of the table: odd, so that one list's places for many rows are in different banks."""
        return self.lists + 1 - self.lists % 2

    @property
    def rows(self) -> int:
        """Of a block."""
        return min(max(FEW_ROWS, pl.cdiv(self.length, MANY_BLOCKS)), TABLE // self.pitch)

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.length, self.rows)

    @property
    def threads(self) -> int:
        return WARPS * WARP

    @property
    def team(self) -> int:
        """Warps that share a list."""
        return max(WARPS // self.lists, 1)

    @property
    def at_once(self) -> int:
        """Lists that a warp reads together."""
        return min(pl.cdiv(self.lists * self.team, WARPS), LOADS)

    @property
    def span(self) -> int:
        """Entries of a list that a warp reads at once."""
        return LOADS // self.at_once * WARP


def shared_memory(work: Work) -> dict[str, int]:
    """How many integers the warps of a block share, by name."""
    return {
        "table": work.rows * work.pitch,  # where each list has each row, or -1
        "first": work.lists,  # where each list's results begin
        "total": 1,  # entries of all lists
    }


def find_sums(
    work: Work, block: Int, inputs: Sequence[Array], outputs: Sequence[Array], smem: dict[str, Array]
) -> None:
    """What a thread does.

    Args:
        work: how it is divided.
        block: number of this one.
        inputs: indices, [lists, length], and counts, [lists].
        outputs: starts, counts, write_starts and ends of the groups, [lists + 1]; reads, [2 * lists, length]; numbers,
            [length, lists], and how many of each row's count, [length].
        smem: by the names of `shared_memory`.
    """
    (indices, counts), (*groups, reads, numbers, row_counts) = inputs, outputs
    for entry in _each(work.rows * work.pitch):
        with ln.when(entry < work.rows * work.pitch):
            smem["table"].store(entry, -1)
    ln.block_barrier()
    _enter(work, block, indices, counts, reads, smem["table"])
    with ln.when(ln.warp().equals(0)):
        _group(work, block, counts, groups, smem)
    ln.block_barrier()
    total = smem["total"].load(ln.constant(0))
    with ln.when(total < work.capacity + 1):
        _number(work, block, numbers, row_counts, smem)
    with ln.when(total > work.capacity):
        _mask(work, block, reads, numbers, row_counts, smem["table"])


def _each(count: int) -> Iterator[Int]:
    """The numbers up to `count`, and some beyond, that this thread has of a block's."""
    for first in range(0, count, WARPS * WARP):
        yield ln.thread() + first


def _enter(work: Work, block: Int, indices: Array, counts: Array, reads: Array, table: Array) -> None:
    """Reads all lists: notes where this block's rows are, and which row of A each of these entries is."""
    lane, warp = ln.thread() % WARP, ln.warp()
    first_row, span, team = block * work.rows, work.span, work.team

    def enter_lists(some, carry):
        units = [warp + (some * work.at_once + u) * WARPS for u in range(work.at_once)]
        lists = [ln.minimum(unit // team, work.lists - 1) for unit in units]
        counted = [ln.select(u < work.lists * team, counts.load(i), 0) for u, i in zip(units, lists, strict=True)]
        starts = [unit % team * span for unit in units]
        steps = ln.constant(0)
        for count, start in zip(counted, starts, strict=True):
            steps = ln.maximum(steps, (ln.maximum(count - start, 0) + (team * span - 1)) // (team * span))

        def enter_entries(step, carry):
            loaded = []  # the loads first: all of them are under way together
            for i, count, start in zip(lists, counted, starts, strict=True):
                last = ln.maximum(count - 1, 0)  # from there on all lanes load one entry, not what nobody needs
                for first in range(0, span, WARP):
                    position = step * (team * span) + (start + (lane + first))
                    row = indices.load(i * work.length + ln.minimum(position, last))
                    loaded.append((i, position, row, position < count))
            for i, position, row, exists in loaded:
                offset = ln.select(exists, row - first_row, -1)  # after the count there may be anything
                with ln.when((offset > -1) & (offset < work.rows)):
                    table.store(offset * work.pitch + i, position)
                    reads.store(i * work.length + position, row * work.lists + i)
            return carry

        ln.loop(steps, [], enter_entries)
        return carry

    ln.loop(pl.cdiv(work.lists * team, WARPS * work.at_once), [], enter_lists)


def _group(work: Work, block: Int, counts: Array, groups: Sequence[Array], smem: dict[str, Array]) -> None:
    """One warp: where each list's results begin; and of the first block, what the product's groups are."""
    lane, rounds = ln.thread() % WARP, pl.cdiv(work.lists, WARP)

    def load(step):
        number = step * WARP + lane
        return number, ln.select(number < work.lists, counts.load(ln.minimum(number, work.lists - 1)), 0)

    [own] = ln.loop(rounds, [ln.constant(0)], lambda step, carry: [carry[0] + load(step)[1]])
    total = ln.warp_sum(own)
    fits = total < work.capacity + 1
    starts, group_counts, write_starts, ends = groups

    def add_lists(step, carry):
        before, tiles_before = carry
        number, count = load(step)
        tiles = (count + (work.block_m - 1)) // work.block_m
        through, tiles_through = count, tiles
        for distance in (1, 2, 4, 8, 16):
            below, tiles_below = (ln.from_lane(x, lane - distance) for x in (through, tiles_through))
            through = through + ln.select(lane < distance, 0, below)
            tiles_through = tiles_through + ln.select(lane < distance, 0, tiles_below)
        first = before + through - count
        with ln.when(number < work.lists):
            smem["first"].store(number, first)
        with ln.when((number < work.lists) & block.equals(0)):
            group_counts.store(number, ln.select(fits, count, 0))
            starts.store(number, number * work.length)
            write_starts.store(number, first)
            ends.store(number, ln.select(fits, tiles_before + tiles_through, 0))
        return [before + ln.warp_sum(count), tiles_before + ln.warp_sum(tiles)]

    _, tiles = ln.loop(rounds, [ln.constant(0)] * 2, add_lists)
    with ln.when(lane.equals(0)):
        smem["total"].store(ln.constant(0), total)
    with ln.when(lane.equals(0) & block.equals(0)):
        last = ln.constant(work.lists)
        group_counts.store(last, ln.select(fits, 0, work.length))
        starts.store(last, last * work.length)
        write_starts.store(last, 0)
        ends.store(last, ln.select(fits, tiles, pl.cdiv(work.length, work.block_m)))


def _number(work: Work, block: Int, numbers: Array, row_counts: Array, smem: dict[str, Array]) -> None:
    """The results that make each row of C, in the order of the lists. A warp has a row at a time."""
    lane, warp = ln.thread() % WARP, ln.warp()
    lanes_below = (ln.constant(1) << lane) - 1

    def number_row(step, carry):
        offset = step * WARPS + warp
        row, in_table = block * work.rows + offset, ln.minimum(offset, work.rows - 1) * work.pitch
        exists = (offset < work.rows) & (row < work.length)

        def number_some(step, carry):
            [rank] = carry
            i = step * WARP + lane
            inside = ln.minimum(i, work.lists - 1)
            position, first = smem["table"].load(in_table + inside), smem["first"].load(inside)
            is_listed = exists & (i < work.lists) & (position > -1)
            lanes = ln.ballot(is_listed)
            with ln.when(is_listed):
                numbers.store(row * work.lists + (rank + ln.popcount(lanes & lanes_below)), first + position)
            return [rank + ln.popcount(lanes)]

        [count] = ln.loop(pl.cdiv(work.lists, WARP), [ln.constant(0)], number_some)
        with ln.when(exists & lane.equals(0)):
            row_counts.store(row, count)
        return carry

    ln.loop(pl.cdiv(work.rows, WARPS), [], number_row)


def _mask(work: Work, block: Int, reads: Array, numbers: Array, row_counts: Array, table: Array) -> None:
    """Past the capacity: the rows of A as they are masked, and one result for each row of C."""
    for entry in _each(work.lists * work.rows):
        i, offset = entry // work.rows, entry % work.rows
        row = block * work.rows + offset
        exists = (i < work.lists) & (row < work.length)
        with ln.when(exists):
            is_listed = table.load(offset * work.pitch + i) > -1
            own = ln.select(is_listed, row * work.lists + i, -1)
            reads.store((i + work.lists) * work.length + row, own)
        with ln.when(exists & i.equals(0)):
            numbers.store(row * work.lists, row)
            row_counts.store(row, 1)
