"""The two kernels of `route` on the device, in inline MLIR.

`choose`: a warp takes its tokens one after the other, a few at a time. Its lanes hold a token's scores as integers in
the same order, lane `e % 32` that of expert e; each choice is a maximum over the warp and then the lowest expert that
has it. What is left is a bit for each token and expert, a word of them for each expert and warp, and their number for
each expert and block.

`place`: every block adds up the numbers of the blocks before it, once for each expert, and so knows where its positions
belong; the bits of a warp's earlier tokens, counted, rank a position within it.
"""

import dataclasses
import functools
from collections.abc import Iterator

from jax.experimental import pallas as pl

from pallas_kernels.route.xla import CHOSEN, INFINITY
from pallas_kernels.tile import lane as ln
from pallas_kernels.tile.lane import WARP, Array, Int

LOADS = 16  # in flight while adding up
LARGEST = 2**31 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """How tokens are divided: a group among blocks, a block among its warps.

    Attributes:
        tokens: in all.
        experts: of a token.
        top_k: of a token.
        groups: equal runs of tokens; no block has tokens of two.
        capacity: positions an expert takes of a group.
        is_masked: whether some tokens choose nobody.
        warp_tokens: of a warp, at most 32.
        warps: of a block.
    """

    tokens: int
    experts: int
    top_k: int
    groups: int
    capacity: int | None
    is_masked: bool
    warp_tokens: int
    warps: int

    @property
    def group_tokens(self) -> int:
        return self.tokens // self.groups

    @property
    def blocks_a_group(self) -> int:
        return pl.cdiv(self.group_tokens, self.warps * self.warp_tokens)

    @property
    def blocks(self) -> int:
        return self.groups * self.blocks_a_group

    @property
    def registers(self) -> int:
        """Experts of a lane."""
        return pl.cdiv(self.experts, WARP)

    @property
    def padded(self) -> int:
        """Experts, a whole number for each lane."""
        return self.registers * WARP

    @property
    def run(self) -> int:
        """Blocks that a capacity is for."""
        return 1 if self.capacity is None else self.blocks_a_group

    @property
    def drops(self) -> bool:
        """Whether a position may find no expert."""
        return self.is_masked or self.capacity is not None

    @property
    def threads(self) -> int:
        return self.warps * WARP

    @property
    def parts(self) -> int:
        """Threads that share the adding up for an expert."""
        return max(self.threads // self.padded, 1)

    @property
    def interleaved(self) -> int:
        """Tokens that a warp looks at together, so that it waits for none of them."""
        return 4 if self.registers <= 8 else 2


def shared_memory(work: Work) -> dict[str, int]:
    """How many integers the kernels share in a block, by name."""
    return {
        "words": work.warps * work.experts,  # of `choose`
        "sums": 2 * work.parts * work.padded,  # of all blocks, then of those before this one, by part of the threads
        "totals": work.padded,  # positions that an expert takes
        "starts": work.padded,  # slot of its first one
        "limits": work.experts,  # slot behind the last one that it can take of this group
        "slots": work.warps * work.experts,  # of the first position of a warp that it takes
    }


def _first_token(work: Work, block: Int, warp: Int) -> tuple[Int, Int]:
    """A warp's first token, and how many are left of the group from there."""
    group, part = block // work.blocks_a_group, block % work.blocks_a_group
    in_group = part * (work.warps * work.warp_tokens) + warp * work.warp_tokens
    return group * work.group_tokens + in_group, ln.constant(work.group_tokens) - in_group


def _each(work: Work, count: int) -> Iterator[Int]:
    """The numbers up to `count`, shared out among the threads of a block: the body of the loop is this thread's."""
    for start in range(0, count, work.threads):
        number = ln.thread() + start
        with ln.when(number < count):
            yield number


def _sortable(bits: Int) -> Int:
    """As `xla.sortable`."""
    magnitude = bits & LARGEST
    key = ln.select(bits < 0, ln.constant(0) - magnitude, magnitude)
    return ln.select(magnitude > INFINITY, -INFINITY, key)


def _keys(work: Work, scores: Array, token: Int, lane: Int) -> list[Int]:
    """What this lane holds of a token's scores."""
    keys = []
    for r in range(work.registers):
        expert = lane + r * WARP
        score = scores.load(token * work.experts + ln.minimum(expert, work.experts - 1))
        keys.append(ln.select(expert < work.experts, _sortable(score), CHOSEN))
    return keys


def choose(work: Work, block: Int, inputs, outputs, smem: dict[str, Array]) -> None:
    """What a thread of `choose` does."""
    (scores, *masks), (ids, words_gmem, counts) = inputs, outputs
    lane, warp = ln.thread() % WARP, ln.warp()
    first, left = _first_token(work, block, warp)

    def choose_some(step, words):
        offsets = [step * work.interleaved + u for u in range(work.interleaved)]
        tokens = [ln.minimum(first + offset, work.tokens - 1) for offset in offsets]
        exist = [offset < left for offset in offsets]
        takes = [e & (mask.load(t) > 0) for mask in masks for e, t in zip(exist, tokens, strict=True)] or exist
        keys = [_keys(work, scores, token, lane) for token in tokens]
        own = [ln.constant(0)] * work.interleaved  # lane j keeps choice j
        for j in range(work.top_k):
            for u in range(work.interleaved):
                best = ln.warp_max(functools.reduce(ln.maximum, keys[u]))
                lowest = ln.constant(LARGEST)
                for r in reversed(range(work.registers)):
                    lowest = ln.select(keys[u][r].equals(best), lane + r * WARP, lowest)
                expert = ln.warp_min(lowest)
                keys[u] = [ln.select((lane + r * WARP).equals(expert), CHOSEN, key) for r, key in enumerate(keys[u])]
                own[u] = ln.select(lane.equals(j), expert, own[u])
        for u, offset in enumerate(offsets):
            with ln.when(exist[u] & (lane < work.top_k)):
                ids.store(tokens[u] * work.top_k + lane, own[u])
            bit = ln.select(takes[u], ln.constant(1) << offset, 0)
            words = [word | ln.select(key.equals(CHOSEN), bit, 0) for word, key in zip(words, keys[u], strict=True)]
        return words

    nobody = [ln.constant(0)] * work.registers
    words = ln.loop(work.warp_tokens // work.interleaved, nobody, choose_some)
    for r, word in enumerate(words):
        expert = lane + r * WARP
        with ln.when(expert < work.experts):
            words_gmem.store((block * work.warps + warp) * work.experts + expert, word)
            smem["words"].store(warp * work.experts + expert, word)
    ln.block_barrier()
    for expert in _each(work, work.experts):
        own = [smem["words"].load(expert + w * work.experts) for w in range(work.warps)]
        counts.store(block * work.experts + expert, ln.total([ln.popcount(word) for word in own]))


def _count_run(work: Work, counts: Array, run: Int, blocks: Int | int, expert: Int) -> Int:
    """What the first `blocks` of a run of blocks count for an expert; nothing of one that there is not."""

    def add_blocks(step, carry):
        numbers = [step * LOADS + u for u in range(min(LOADS, work.run))]
        counted = [
            counts.load(ln.minimum(run * work.run + x, work.blocks - 1) * work.experts + expert) for x in numbers
        ]
        return [ln.total([*carry, *(ln.select(x < blocks, c, 0) for x, c in zip(numbers, counted, strict=True))])]

    [count] = ln.loop(pl.cdiv(work.run, LOADS), [ln.constant(0)], add_blocks)
    return ln.select(run < work.blocks // work.run, count, 0)


def _add_up(work: Work, counts: Array, expert: Int, part: Int, own_run: Int) -> tuple[Int, Int]:
    """What an expert takes of every `parts`-th run of blocks, and what of those before this block's."""
    runs = work.blocks // work.run
    at_once = min(LOADS, pl.cdiv(runs, work.parts)) if work.run == 1 else 1

    def add_runs(step, carry):
        total, before = carry
        numbers = [(step * at_once + u) * work.parts + part for u in range(at_once)]
        counted = [_count_run(work, counts, run, work.run, expert) for run in numbers]
        for run, count in zip(numbers, counted, strict=True):
            taken = count if work.capacity is None else ln.minimum(count, work.capacity)
            total, before = total + taken, before + ln.select(run < own_run, taken, 0)
        return [total, before]

    total, before = ln.loop(pl.cdiv(runs, work.parts * at_once), [ln.constant(0)] * 2, add_runs)
    return total, before


def _find_starts(work: Work, smem: dict[str, Array], lane: Int) -> None:
    """One warp: where each expert's slots start, a prefix sum over experts."""
    own = [lane * work.registers + r for r in range(work.registers)]
    totals = [smem["totals"].load(expert) for expert in own]
    through = ln.total(totals)
    for distance in (1, 2, 4, 8, 16):
        below = ln.from_lane(through, lane - distance)
        through = through + ln.select(lane < distance, 0, below)
    start = through - ln.total(totals)
    for expert, total in zip(own, totals, strict=True):
        smem["starts"].store(expert, start)
        start = start + total


def _find_slots(work: Work, block: Int, words: Array, counts: Array, totals: Array, smem: dict[str, Array]) -> None:
    """Every thread: the slot of the first position of each warp, for some experts."""
    run, block_in_run = block // work.run, block % work.run
    for number in _each(work, work.parts * work.padded):
        part, expert = number // work.padded, ln.minimum(number % work.padded, work.experts - 1)
        total, before = _add_up(work, counts, expert, part, run)
        smem["sums"].store(number, total)
        smem["sums"].store(number + work.parts * work.padded, before)
    ln.block_barrier()
    for expert in _each(work, work.padded):
        total = ln.total([smem["sums"].load(expert + part * work.padded) for part in range(work.parts)])
        smem["totals"].store(expert, ln.select(expert < work.experts, total, 0))
    ln.block_barrier()
    with ln.when(ln.warp().equals(0)):
        _find_starts(work, smem, ln.thread() % WARP)
    ln.block_barrier()
    for expert in _each(work, work.experts):
        parts = [smem["sums"].load(expert + (work.parts + part) * work.padded) for part in range(work.parts)]
        slot = ln.total([smem["starts"].load(expert), *parts])
        if work.capacity is not None:
            smem["limits"].store(expert, slot + work.capacity)
        if work.run > 1:
            slot = slot + _count_run(work, counts, run, block_in_run, expert)
        own = [words.load((block * work.warps + warp) * work.experts + expert) for warp in range(work.warps)]
        for warp, word in enumerate(own):
            smem["words"].store(expert + warp * work.experts, word)
            smem["slots"].store(expert + warp * work.experts, slot)
            slot = slot + ln.popcount(word)
        with ln.when(block.equals(0)):
            totals.store(expert, smem["totals"].load(expert))
    ln.block_barrier()


def _count_taken(work: Work, smem: dict[str, Array], warp: Int, lane: Int) -> tuple[Int, Int]:
    """Positions that experts take: those before this warp's, and all."""
    before, all_taken = [], []
    for r in range(work.registers):
        expert = ln.minimum(lane + r * WARP, work.experts - 1)
        slot = smem["slots"].load(warp * work.experts + expert)
        if work.capacity is not None:
            slot = ln.minimum(slot, smem["limits"].load(expert))
        before.append(ln.select(lane + r * WARP < work.experts, slot - smem["starts"].load(expert), 0))
        all_taken.append(smem["totals"].load(lane + r * WARP))
    return ln.warp_sum(ln.total(before)), ln.warp_sum(ln.total(all_taken))


def place(work: Work, block: Int, inputs, outputs, smem: dict[str, Array]) -> None:
    """What a thread of `place` does."""
    (ids, words, counts), (order, totals) = inputs, outputs
    lane, warp = ln.thread() % WARP, ln.warp()
    first, left = _first_token(work, block, warp)
    numbers = [lane + start for start in range(0, work.warp_tokens * work.top_k, WARP)]
    positions = [first * work.top_k + number for number in numbers]
    experts = [ids.load(ln.minimum(position, work.tokens * work.top_k - 1)) for position in positions]
    _find_slots(work, block, words, counts, totals, smem)
    taken_before, all_taken = _count_taken(work, smem, warp, lane) if work.drops else (ln.constant(0),) * 2
    for number, position, expert in zip(numbers, positions, experts, strict=True):
        offset = number // work.top_k
        inside = (offset < work.warp_tokens) & (offset < left)
        entry = warp * work.experts + expert
        word, slot = smem["words"].load(entry), smem["slots"].load(entry)
        slot = slot + ln.popcount(word & ((ln.constant(1) << offset) - 1))
        if work.drops:
            is_taken = inside & (((word >> offset) & 1) > 0)
            if work.capacity is not None:
                is_taken &= slot < smem["limits"].load(expert)
            lanes = ln.ballot(is_taken)
            lower = ln.popcount(lanes & ((ln.constant(1) << lane) - 1))
            slot = ln.select(is_taken, slot, all_taken + position - taken_before - lower)
            taken_before = taken_before + ln.popcount(lanes)
        with ln.when(inside):
            order.store(slot, position)


def choose_and_place(work: Work, block: Int, inputs, outputs, smem: dict[str, Array]) -> None:
    """Both, where one block has all tokens."""
    choose(work, block, inputs, outputs[:3], smem)
    ln.block_barrier()
    place(work, block, outputs[:3], outputs[3:], smem)
