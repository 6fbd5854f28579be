"""Permutation-invariant axes of an einsum: along which of its axes may micro-tiles be packed in any order?

An axis is a PIT axis if permuting the operands along it permutes the result along it (an axis of the result) or leaves
it as it is (a reduced axis). Then the slices that matter can be read from wherever they lie into one dense tile
(SRead), and, where the axis is one of the result's, written back to wherever they belong (SWrite).

Source: PIT (SOSP'23), section 3.1, Theorem 1: an axis qualifies if nothing but the axis itself indexes the operands
along it, and if the reduction over it, where it is reduced, is commutative and associative.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

# Floating-point sums and products are so up to rounding.
COMMUTATIVE = ("sum", "prod", "max", "min", "any", "all", "logsumexp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axis:
    """What may be done along one axis of an einsum.

    Attributes:
        name: its letter.
        role: "batch" (in the result and every one of several operands: one product for each entry), "spatial" (in the
            result), or "reduction" (in operands only).
        gathered: positions of the operands that SRead gathers along it.
        swrite: whether results have to be scattered back along it; a reduced axis needs SRead alone.
        refusal: why its order matters; None for a PIT axis.
    """

    name: str
    role: Literal["batch", "spatial", "reduction"]
    gathered: tuple[int, ...]
    swrite: bool
    refusal: str | None = None

    @property
    def invariant(self) -> bool:
        """Whether it is a PIT axis."""
        return self.refusal is None


def pit_axes(spec: str, reduce: str = "sum") -> dict[str, Axis]:
    """The axes of `spec`, in order of appearance, and which of them are permutation-invariant.

    Args:
        spec: an einsum with its result and every axis written out: "mk,kn->mn", "bhqd,bhkd->bhqk", or "mk->m".
        reduce: what combines the products over the axes that the result lacks. Those in `COMMUTATIVE` keep such axes
            invariant; any other (a "cumsum", an "argmax") is taken to depend on the order.

    Returns:
        An `Axis` for each letter.

    Raises:
        ValueError: `spec` is not such an einsum.

    Source: PIT (SOSP'23), section 3.1.
    """
    operands, result = _parse(spec)
    axes = {}
    for name in dict.fromkeys("".join(operands)):
        gathered = tuple(i for i, operand in enumerate(operands) if name in operand)
        swrite = name in result
        everywhere = len(operands) > 1 and len(gathered) == len(operands)
        role = "reduction" if not swrite else "batch" if everywhere else "spatial"
        axes[name] = Axis(
            name=name, role=role, gathered=gathered, swrite=swrite, refusal=_refusal(name, operands, result, reduce)
        )
    return axes


def micro_tile(spec: str, axis: str, dense_tile: Mapping[str, int]) -> tuple[tuple[int, ...], ...]:
    """Shape of each operand's micro-tile: its slice of the dense tile, of size 1 along the PIT axis.

    `micro_tile("mk,kn->mn", "k", {"m": 128, "k": 64, "n": 256})` is `((128, 1), (1, 256))`: micro-tiles 128x1 of A,
    each with a row of B, are packed 64 at a time into the dense tile 128x64x256.

    Args:
        spec: an einsum, as for `pit_axes`.
        axis: one of its PIT axes.
        dense_tile: size of the dense tile along each axis.

    Returns:
        A shape for each operand, axes in the operand's order; one without `axis` has its whole dense tile.

    Raises:
        ValueError: `axis` is not a PIT axis of `spec`, or `dense_tile` does not give a positive size to each axis.

    Source: PIT (SOSP'23), section 3.1.
    """
    axes = pit_axes(spec)
    if axis not in axes:
        raise ValueError(f"axis must be one of {', '.join(axes)}; got axis={axis!r}")
    if refusal := axes[axis].refusal:
        raise ValueError(f"axis must be permutation-invariant; got axis={axis!r}: {refusal}")
    if set(dense_tile) != set(axes) or any(size < 1 for size in dense_tile.values()):
        raise ValueError(f"dense_tile must give a positive size to each of {', '.join(axes)}; got {dict(dense_tile)}")
    sizes = {**dense_tile, axis: 1}
    return tuple(tuple(sizes[name] for name in operand) for operand in _parse(spec)[0])


def _refusal(name: str, operands: list[str], result: str, reduce: str) -> str | None:
    for i, operand in enumerate(operands):
        if operand.count(name) > 1:
            return f"{name} indexes {operand.count(name)} dimensions of operand {i} ({operand!r}), which a gather parts"
    if name not in result and reduce not in COMMUTATIVE:
        return f"reduce={reduce!r} is not known to be commutative and associative, as {', '.join(COMMUTATIVE)} are"
    return None


def _parse(spec: str) -> tuple[list[str], str]:
    """The operands' axes and the result's."""
    left, arrow, result = spec.replace(" ", "").partition("->")
    operands = left.split(",")
    letters = "".join(operands) + result
    if not arrow or not all(letter.isascii() and letter.isalpha() for letter in letters):
        raise ValueError(f'spec must be an einsum of letters with its result, as in "mk,kn->mn"; got {spec!r}')
    if len(set(result)) < len(result) or set(result) - set(left):
        raise ValueError(f"the result of spec must name axes of its operands, each once; got {spec!r}")
    return operands, result
