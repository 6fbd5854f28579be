"""From a mask word and the places of its streams to the registers that the tensor core takes: what a lane decodes."""

from pallas_kernels.tile import lane as ln
from pallas_kernels.tile.lane import Int
from pallas_kernels.unstructured_matmul import layout, warp

# permute_bytes(odd, even, NOTHING + e * EVEN + o * ODD) is {even or 0, odd or 0}: nibbles 3 and 2 name zeros of the odd
# half's register and F the sign of the even one's upper bytes, 0; 5 and 4 are the even half, 1 and 0 the odd one.
NOTHING, EVEN = 0xFF32, 0x22  # and ODD is 0x1100 = 0x80 * EVEN: one product of bytes adds both
EVEN_ONES = 0x55555555  # the even stream's bits, all of them
ROW_BYTES = 2 * layout.STREAMS  # of values of 16 bits
EVEN_BITS, ODD_BITS = 0x01010101, -0x7F7F7F80  # as signed: 0x80808080


def decode(word: Int, even: Int, odd: Int) -> list[Int]:
    """A lane's 16 registers of a block, given the addresses of its streams."""
    registers = []
    for g in range(4):
        turned = warp.rotate_right(word, 2 * g)
        evens, odds, both = turned & EVEN_BITS, turned & ODD_BITS, turned & (EVEN_BITS | ODD_BITS)
        for j in range(4):
            before = EVEN_BITS & ((1 << 8 * j) - 1)  # the elements before this one
            even_place = warp.dot_bytes(evens, ROW_BYTES * before, even) if j else even
            odd_place = warp.dot_bytes(odds, before, odd) if j else odd  # an odd bit is ROW_BYTES already
            selector = warp.dot_bytes(both, EVEN << 8 * j, ln.constant(NOTHING))
            halves = warp.load_half(odd_place, 2), warp.load_half(even_place, 0)
            registers.append(warp.permute_bytes(*halves, selector))
        even, odd = warp.dot_bytes(evens, ROW_BYTES * EVEN_BITS, even), warp.dot_bytes(odds, EVEN_BITS, odd)
    return registers


def decode_pairs(word: Int, second: bool, place: Int, values: str, dtype: str) -> list[Int]:
    """The same of a paired lane, at `place`; the word serves two blocks, of which this is the second or the first.

    Values of 8 bits lie in rows of half the bytes, so that two lanes share a bank: a load takes two turns then, as two
    loads of single elements do.
    """
    narrow, registers = values != dtype, []
    own_bit = 0x40 if narrow else 0x80  # an element's own in its byte is the bytes of a row
    for g in range(4):
        bits = warp.rotate_right(word, (2 * g + narrow + (0 if second else 25)) % 32) & signed(own_bit * EVEN_BITS)
        for j in range(4):
            before = EVEN_BITS & ((1 << 8 * j) - 1)
            own = warp.dot_bytes(bits, before, place) if j else place
            if narrow:
                registers.append(warp.widen(warp.load_stored_half(own, bits, own_bit << 8 * j), values, dtype))
            else:
                registers.append(warp.load_word(own, bits, own_bit << 8 * j))
        place = warp.dot_bytes(bits, EVEN_BITS, place)
    return registers


def signed(word: int) -> int:
    """32 bits as the integer that lanes take them for."""
    return word - (word >> 31 << 32)
