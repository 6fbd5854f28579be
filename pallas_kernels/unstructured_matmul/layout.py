"""Where an element of a matrix lies in `UnstructuredWeights`: constants of the format and its order.

A strip is 16 rows, a block 64 columns of one. The four mma.m16n8k16 that multiply a block give lane l of a warp 16
registers of two elements: register t = 4 q + 2 c + r holds row l // 4 + 8 r and the columns 16 q + 8 c + 2 (l % 4) and
one more. The lower halves are the lane's even stream, the upper ones its odd stream, in the order of t: 64 streams of
16 elements a block, numbered 2 * lane + half.

Paired, both streams of a lane store the same places: those where either element is not zero. They stay side by side, so
a word of values is a register; and the bits of one of them are enough, so a mask word serves two blocks.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32, Shaped, UInt8, UInt32

LANES = 32
STREAMS = 2 * LANES  # one row of stored values: 32 lanes x (even, odd), so that each lane reads a bank of its own
DEPTH = 16  # elements of a stream in a block
STRIP, BLOCK = 16, 64
STRIPS = 4  # in a run: streams go on through them, and are aligned again at the next run
RUN = STRIPS * STRIP
SECTION = 8  # blocks of a strip after which decoding can start anew: the unit that multiprocessors share out
MAX_LAG = 32  # rows that a stream may be behind the one furthest ahead, when a block starts


def bit(half, t):
    """The bit of a lane's mask word that says whether element t of its even (0) or odd (1) stream is stored.

    With the word rotated right by 2 g, bit 0 of byte j is the even and bit 7 the odd element t = 4 g + j. So what a
    decoder needs of four elements is in four bytes, and a dot product of bytes (dp4a) counts them or makes a selector.
    """
    return (8 * (t % 4) + 2 * (t // 4) + 7 * half) % 32


def mask_blocks(blocks: int, paired: bool) -> int:
    """Words of a lane that the masks of a strip's blocks take."""
    return -(-blocks // 2) if paired else blocks


def padded(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of whole runs and blocks."""
    rows, columns = shape
    return rows + -rows % RUN, columns + -columns % BLOCK


def to_streams(w: Shaped[Array, "rows columns"]) -> Shaped[Array, "strips blocks streams depth"]:
    """The elements of padded rows in the order of the format."""
    rows, columns = w.shape
    strips, blocks = rows // STRIP, columns // BLOCK
    # strip, r, l // 4, block, q, c, l % 4, half
    split = w.reshape(strips, 2, 8, blocks, 4, 2, 4, 2)
    return split.transpose(0, 3, 2, 6, 7, 4, 5, 1).reshape(strips, blocks, STREAMS, DEPTH)


def from_streams(elements: Shaped[Array, "strips blocks streams depth"]) -> Shaped[Array, "rows columns"]:
    """The inverse of `to_streams`."""
    strips, blocks = elements.shape[:2]
    split = elements.reshape(strips, blocks, 8, 4, 2, 4, 2, 2)
    return split.transpose(0, 7, 2, 1, 5, 6, 3, 4).reshape(strips * STRIP, blocks * BLOCK)


def _shifts(leading: int) -> UInt32[Array, "*ones halves depth"]:
    """All bits, computed, since a Pallas kernel takes no constant arrays."""
    half, t = (lax.broadcasted_iota(jnp.uint32, (2, DEPTH), axis) for axis in (0, 1))
    return bit(half, t).reshape(*(1,) * leading, 2, DEPTH)


def to_words(
    present: Shaped[Array, "*strips blocks streams depth"], paired: bool
) -> UInt32[Array, "*strips words lanes"]:
    """The mask words of elements that are stored or not; of two blocks, if they are stored in pairs."""
    halves = present.reshape(*present.shape[:-2], LANES, 2, DEPTH).astype(jnp.uint32)
    if paired:  # the bits of the even stream: of an even block in their own place, of an odd one in the odd stream's
        evens, words = halves[..., 0, :], mask_blocks(present.shape[-3], True)
        pad = [(0, 0)] * (evens.ndim - 3) + [(0, 2 * words - present.shape[-3]), (0, 0), (0, 0)]
        halves = jnp.pad(evens, pad).reshape(*evens.shape[:-3], words, 2, LANES, DEPTH).swapaxes(-3, -2)
    return (halves << _shifts(halves.ndim - 2)).sum(axis=(-2, -1), dtype=jnp.uint32)


def to_bits(
    words: UInt32[Array, "*strips words lanes"], blocks: int, paired: bool
) -> UInt8[Array, "*strips blocks streams depth"]:
    """1 for each element of so many blocks that is stored: the inverse of `to_words`."""
    bits = ((words[..., None, None] >> _shifts(words.ndim)) & 1).astype(jnp.uint8)
    if paired:
        evens = bits.swapaxes(-3, -2).reshape(*words.shape[:-2], -1, LANES, DEPTH)[..., :blocks, :, :]
        bits = jnp.stack([evens, evens], axis=-2)
    return bits.reshape(*bits.shape[:-3], STREAMS, DEPTH)


def counts(words: UInt32[Array, "*strips words lanes"], blocks: int, paired: bool) -> Int32[Array, "..."]:
    """How many elements of each stream are stored in each of so many blocks, [*strips, blocks, streams]."""
    halves = lax.population_count(jnp.stack([words, words >> 1], axis=-1) & 0x55555555).astype(jnp.int32)
    if paired:
        evens = halves.swapaxes(-2, -1).reshape(*words.shape[:-2], -1, LANES)[..., :blocks, :]
        halves = jnp.stack([evens, evens], axis=-1)
    return halves.reshape(*halves.shape[:-2], STREAMS)


def ranks(bits: UInt8[Array, "*blocks streams depth"]) -> UInt8[Array, "*blocks streams depth"]:
    """How many elements of its stream come before each in its block."""
    return jnp.cumsum(bits, axis=-1, dtype=jnp.uint8) - bits


def sections(blocks: int) -> int:
    """Of a strip."""
    return -(-blocks // SECTION)


def first_blocks(strips: int, blocks: int) -> np.ndarray:
    """The block in which each section starts, counted on from strip to strip, and the number of blocks."""
    own = np.arange(sections(blocks)) * SECTION
    return np.append((np.arange(strips)[:, None] * blocks + own[None]).ravel(), strips * blocks)


def runs_at_once(columns: int) -> int:
    """Runs of strips to convert at a time: 2**22 elements, some 100 MB of temporaries."""
    return max(1, 2**22 // (RUN * columns))
