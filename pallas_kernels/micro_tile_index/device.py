"""The kernel of `micro_tile_index` on the device, in inline MLIR: where a warp's entries go.

A warp places `entries` consecutive entries of a list, 32 at a time: a ballot shows every lane which of them are true,
so population counts rank them. Entries that are false write the zeros behind the count, from the list's end backwards:
each position is written once.

Where they start is counted from the mask, so blocks do not wait for each other. The warps of a team follow each other
in a list: each counts a share of the bytes before the team's first entry, and learns from shared memory the shares of
the others and how many entries of the warps before it are true. A warp that is a team by itself shares nothing.
"""

import dataclasses
from collections.abc import Sequence

from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.tile import lane as ln
from pallas_kernels.tile.lane import WARP, Array, Int

WARPS = 4  # of a warpgroup
WORDS = 4  # that a lane loads at once to count their bytes
ALIGNMENT = 4 * WORDS  # of the start of a list, in bytes
LOADS = 8  # in flight while counting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """How the entries are divided: a list among teams, a team among its warps. No team has entries of two lists.

    Attributes:
        lists: rows of the mask.
        length: entries of each.
        padded: entries of a row of the mask, a multiple of ALIGNMENT.
        entries: of a list that a warp places.
        team: warps that count together, a power of two up to 32.
    """

    lists: int
    length: int
    padded: int
    entries: int
    team: int

    @property
    def warps_a_list(self) -> int:
        """Those that have entries."""
        return pl.cdiv(self.length, self.entries)

    @property
    def teams_a_list(self) -> int:
        return pl.cdiv(self.warps_a_list, self.team)

    @property
    def warps(self) -> int:
        """Of a block: whole warpgroups."""
        return max(self.team, WARPS)

    @property
    def threads(self) -> int:
        return self.warps * WARP

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.lists * self.teams_a_list * self.team, self.warps)

    @property
    def counted_at_once(self) -> int:
        """Bytes that a team counts with one load of each lane."""
        return self.team * WARP * ALIGNMENT

    @property
    def rounds(self) -> int:
        """Times that the last team of a list waits for loads."""
        return pl.cdiv(self._most_loads, LOADS)

    @property
    def loads(self) -> int:
        """That a lane has in flight in each round."""
        return pl.cdiv(self._most_loads, max(self.rounds, 1))

    @property
    def _most_loads(self) -> int:
        return pl.cdiv((self.teams_a_list - 1) * self.team * self.entries, self.counted_at_once)


def shared_memory(work: Work) -> dict[str, int]:
    """How many integers the warps of a block share, by name."""
    return {"before": work.warps, "own": work.warps} if work.team > 1 else {}


def row(array: Array, number: Int, size: int) -> Array:
    """A row of `size` elements, which may be 2**32 elements and more from the start."""
    i64, element = ir.IntegerType.get_signless(64), utils.dtype_to_ir_type(array.dtype)
    offset = arith.muli(arith.extui(i64, number.value), arith.constant(i64, size))
    return dataclasses.replace(array, pointer=utils.getelementptr(array.pointer, [offset], element))


def load_words(array: Array, index: Int) -> list[Int]:
    """The 16 bytes from `index` on, a multiple of 16, as four integers."""
    i32, i64, i8 = (ir.IntegerType.get_signless(bits) for bits in (32, 64, 8))
    address = utils.getelementptr(array.pointer, [arith.extui(i64, index.value)], i8)
    words = llvm.load(ir.VectorType.get((WORDS,), i32), address, alignment=ALIGNMENT)
    return [Int(llvm.extractelement(words, ln.constant(word).value)) for word in range(WORDS)]


def _count_share(work: Work, mask: Array, end: Int, warp_in_team: Int, lane: Int) -> Int:
    """How many entries before `end` are true, of those that this lane looks at."""
    if not work.rounds:
        return ln.constant(0)
    span = work.loads * work.counted_at_once
    first = (warp_in_team * WARP + lane) * ALIGNMENT

    def count_round(step, carry):
        offsets = [step * span + (first + load * work.counted_at_once) for load in range(work.loads)]
        loaded = [load_words(mask, ln.select(offset < end, offset, 0)) for offset in offsets]
        sums = [ln.select(offset < end, ln.total(x), 0) for offset, x in zip(offsets, loaded, strict=True)]
        of_bytes = ln.total(sums)  # four sums in one, each at most LOADS * WORDS
        return [carry[0] + (of_bytes * 0x01010101 >> 24)]

    # A loop that runs once at most is unrolled by ptxas all the same, so teams do without. Ahead of the many entries
    # of a warp alone it is better: without, ptxas delays some of their loads until after the first are used.
    if work.team > 1 and work.rounds == 1:
        [count] = count_round(ln.constant(0), [ln.constant(0)])
    else:
        [count] = ln.loop((end + (span - 1)) // span, [ln.constant(0)], count_round)
    return count


def _exchange(work: Work, smem: dict[str, Array], before: Int, own: Int, warp: Int, lane: Int) -> Int:
    """Rank of a warp's first entry, from what all warps of its team counted."""
    with ln.when(lane.equals(0)):
        smem["before"].store(warp, before)
        smem["own"].store(warp, own)
    ln.block_barrier()
    warp_in_team = warp % work.team
    other = warp - warp_in_team + ln.minimum(lane, work.team - 1)  # of which this lane reads
    of_team = ln.select(lane < work.team, smem["before"].load(other), 0)
    of_earlier = ln.select(lane < warp_in_team, smem["own"].load(other), 0)
    return ln.warp_sum(of_team + of_earlier)


def place(work: Work, block: Int, inputs: Sequence[Array], outputs: Sequence[Array], smem: dict[str, Array]) -> None:
    """What a thread does."""
    [mask], [indices, counts] = inputs, outputs
    lane, warp = ln.thread() % WARP, ln.warp()
    warp_in_team = warp % work.team
    team = block * (work.warps // work.team) + warp // work.team
    number = ln.minimum(team // work.teams_a_list, work.lists - 1)
    # Past the last list's teams there may be some whose entries would be past its end, as those of some warps are.
    team_in_list = team - number * work.teams_a_list
    part = team_in_list * work.team + warp_in_team
    mask, indices = row(mask, number, work.padded), row(indices, number, work.length)

    # The loads first: all of them, and those of the count, are under way together.
    entries = [part * work.entries + (lane + first) for first in range(0, work.entries, WARP)]
    inside = [entry < work.length for entry in entries]
    loaded = [mask.load(ln.minimum(entry, work.length - 1)) for entry in entries]
    end = ln.minimum(team_in_list * (work.team * work.entries), work.length)
    share = _count_share(work, mask, end, warp_in_team, lane)
    is_listed = [exists & (byte > 0) for exists, byte in zip(inside, loaded, strict=True)]
    listed = [ln.ballot(x) for x in is_listed]
    rank = ln.warp_sum(share) if work.rounds else share
    if work.team > 1:
        rank = _exchange(work, smem, rank, ln.total([ln.popcount(x) for x in listed]), warp, lane)
    lanes_below = (ln.constant(1) << lane) - 1
    for entry, exists, true, lanes in zip(entries, inside, is_listed, listed, strict=True):
        own_rank = rank + ln.popcount(lanes & lanes_below)
        from_end = own_rank - entry + (work.length - 1)
        with ln.when(exists):
            indices.store(ln.select(true, own_rank, from_end), ln.select(true, entry, 0))
        rank = rank + ln.popcount(lanes)
    with ln.when(lane.equals(0) & part.equals(work.warps_a_list - 1)):
        counts.store(number, rank)
