"""The mask words of a lane, a bit an element, of a quad of blocks: where they are, and which of them count."""

from collections.abc import Sequence

from pallas_kernels.tile import lane as ln
from pallas_kernels.tile.lane import Array, Int
from pallas_kernels.unstructured_matmul import layout
from pallas_kernels.unstructured_matmul.config import QUAD
from pallas_kernels.unstructured_matmul.division import Part


def origin(part: Part) -> Int:
    """Where the lane's mask words of a part begin."""
    in_strip = layout.mask_blocks(part.work.blocks, part.work.paired)
    words = part.own(ln.warp()) * in_strip + part.first_block // part.work.blocks_a_word
    return words * ln.WARP + ln.thread() % ln.WARP


def load(part: Part, masks: Array, origin: Int, first: Int) -> list[Int]:
    """The lane's mask words of the quad from block `first` on, as they are read by `stored`."""
    per = part.work.blocks_a_word
    if part.work.whole_quads:
        first = ln.minimum(first, part.blocks - QUAD)
        return [masks.load(origin + (first // per) * ln.WARP + i * ln.WARP) for i in range(QUAD // per)]
    numbers = (ln.minimum(first // per + i, _count(part) - 1) for i in range(QUAD // per))
    return [masks.load(origin + number * ln.WARP) for number in numbers]


def stored(part: Part, words: Sequence[Int], first: Int) -> list[Int]:
    """Those words; zeros behind the part's last block. Apart from loading, as whoever looks at them waits for them."""
    if part.work.whole_quads:
        return list(words)
    numbers = (first // part.work.blocks_a_word + i for i in range(len(words)))
    return [ln.select(number < _count(part), word, 0) for number, word in zip(numbers, words, strict=True)]


def _count(part: Part) -> Int:
    """Of a lane, that the masks of the part's blocks are."""
    per = part.work.blocks_a_word
    return (part.blocks + (per - 1)) // per
