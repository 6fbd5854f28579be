"""README's summary: of each experiment a line or two, next to the dense way here and the quickest other system.

An experiment that belongs there defines `headlines(result)`, which gives lines by `headline` for the rows that stand
for the rest. Of lines that say the same, the one of the result that is no variant is shown.
"""

from collections.abc import Iterable, Mapping, Sequence

from experiments.runs import markdown_table

HEADER = ("", "sparse", "dense, here", "the quickest other system")


def headline(
    what: str, time: float, unit: str, dense: float | None = None, others: Mapping[str, float | None] | None = None
) -> list[str]:
    """A line of the summary.

    Args:
        what: was timed.
        time: that it took.
        unit: of all times.
        dense: what it takes here without sparsity; None where that was not timed.
        others: what other systems take, by their names; None for those that were not timed.
    """
    line = [what, f"{time:.4g} {unit}", "–" if dense is None else _beside(dense, time, unit)]
    timed = {name: other for name, other in (others or {}).items() if other is not None}
    if not timed:
        return [*line, "–"]
    quickest = min(timed, key=lambda name: timed[name])
    return [*line, f"{quickest}: {_beside(timed[quickest], time, unit)}"]


def _beside(other: float, time: float, unit: str) -> str:
    return f"{other:.4g} {unit} ({other / time:.2f}x)"


def summary(lines: Iterable[Sequence[str]]) -> str:
    """The table of these lines, each `what` once."""
    first: dict[str, Sequence[str]] = {}
    for line in lines:
        first.setdefault(line[0], line)
    return markdown_table(first.values(), HEADER)
