"""Is a finished run worth quoting?

Keeps its rows, as --keep would have done.

    python -m experiments keep --source runs/matmul_sparsity/TIME

Then `python -m experiments report` puts it into README. The result says at which commit the run was measured, not at
which it is kept.
"""

import dataclasses
from pathlib import Path

from experiments import runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of keep.

    Attributes:
        source: the folder of a finished run, of this machine or copied from another.
        variant: a word that names this result among several of the experiment; it is kept beside the one without.
        results: the folder of the kept results.
    """

    source: Path
    variant: str = ""
    results: Path = runs.RESULTS


def main(config: Config) -> int:
    """Keeps the run, and says where."""
    print(f"kept {runs.keep(config.source, variant=config.variant, results=config.results)}")
    return 0
