"""How many neurons of a feed-forward block fire for some token of a batch, and how often each one then does.

How often neurons fire is heavy-tailed: a few do for most tokens, most for few. The counts u(B) for B tokens say how,

    u(B) = sum over neurons of 1 - (1 - p_j)^B

which is solved here for a mixture of probabilities p on a logarithmic grid.

Source of the profiles: Shrestha et al., "Polar Sparsity" (2025), section 3, and the counts in its repository.
"""

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

COLUMNS = ("model", "layer", "batch", "active_neurons", "total_neurons")
GRID = np.geomspace(1e-6, 0.99, 64)  # how often a neuron may fire
UPDATES = 4000  # of the mixture; each layer's error has settled by then


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """Which share of a layer's neurons fires for some token of a batch.

    Attributes:
        batches: how many tokens, ascending.
        shares: 0 to 1, [layers, batches].
    """

    batches: tuple[int, ...]
    shares: Float[np.ndarray, "layers batches"]

    def __post_init__(self):
        ascending = all(a < b for a, b in zip(self.batches, self.batches[1:], strict=False))
        if not self.batches or self.batches[0] < 1 or not ascending:
            raise ValueError(f"batches must be ascending, at least 1; got batches={self.batches}")
        if self.shares.ndim != 2 or self.shares.shape[1] != len(self.batches) or not self.shares.size:
            raise ValueError(f"shares must be [layers, {len(self.batches)}]; got shape {self.shares.shape}")
        if not np.all((self.shares > 0) & (self.shares <= 1)):
            raise ValueError("shares must lie above 0 and be at most 1; some do not")

    @classmethod
    def read(cls, path: str | Path, d_ff: int) -> "Profile":
        """The profile of the model whose blocks have the number of neurons nearest to `d_ff`.

        Args:
            path: a CSV file with the columns model, layer, batch, active_neurons and total_neurons.
            d_ff: neurons of a block.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: columns or rows are missing from it, or hold no numbers in range.
        """
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            if missing := [column for column in COLUMNS if column not in (reader.fieldnames or ())]:
                raise ValueError(f"{path} must have the columns {', '.join(COLUMNS)}; it lacks {', '.join(missing)}")
            rows = list(reader)
        if not rows:
            raise ValueError(f"{path} must have a row for each layer and batch; it has none")
        try:
            widths = {row["model"]: int(row["total_neurons"]) for row in rows}
            if min(widths.values()) < 1:
                raise ValueError("total_neurons must be at least 1")
            nearest = min(widths, key=lambda model: abs(np.log(widths[model] / d_ff)))
            active = {
                (int(r["layer"]), int(r["batch"])): int(r["active_neurons"]) for r in rows if r["model"] == nearest
            }
            layers, batches = (sorted(set(numbers)) for numbers in zip(*active, strict=True))
            counts = [[active[layer, batch] for batch in batches] for layer in layers]
        except (ValueError, KeyError) as error:
            rule = "must hold whole numbers, and for each layer of a model the same batches"
            raise ValueError(f"{path} {rule}; got {error!r}") from error
        return cls(batches=tuple(batches), shares=np.array(counts) / widths[nearest])

    @classmethod
    def power(cls, density: float = 0.05, exponent: float = 0.5, *, batches: Sequence[int] = (1, 8, 64, 256)):
        """Every layer alike: density * B ** exponent of the neurons for B tokens, as is typical of OPT's middle."""
        shares = np.minimum(density * np.array(batches, float) ** exponent, 0.99)
        return cls(batches=tuple(batches), shares=shares[None])

    def stretched(self, layers: int) -> "Profile":
        """The profile of a model of so many layers, each as the one at the nearest relative depth."""
        places = np.linspace(0, len(self.shares) - 1, layers).round().astype(int)
        return dataclasses.replace(self, shares=self.shares[places])

    def share(self, layer: int, batch: int) -> float:
        """Of a layer's neurons, those that fire for `batch` tokens; between batches by interpolation.

        Raises:
            ValueError: `batch` is not between the profile's first and last.
        """
        if not self.batches[0] <= batch <= self.batches[-1]:
            raise ValueError(f"batch must be {self.batches[0]} to {self.batches[-1]}, as profiled; got batch={batch}")
        return float(np.exp(np.interp(np.log(batch), np.log(self.batches), np.log(self.shares[layer]))))


def firing_probabilities(
    batches: Sequence[int], shares: Float[np.ndarray, " batches"], d_ff: int
) -> Float[np.ndarray, " d_ff"]:
    """How often each neuron of a layer is to fire, ascending, so that batches of tokens find these shares of them.

    The mixture minimises the relative errors of u(B) by multiplicative updates, which keep it positive and smooth.

    Source: Lee and Seung, "Algorithms for Non-negative Matrix Factorization" (2000), theorem 1.
    """
    fires = 1 - (1 - GRID[:, None]) ** np.array([*batches, np.inf])  # the last column counts all neurons
    relative = fires / np.append(shares, 1)
    gram, target = relative @ relative.T, relative.sum(axis=1)
    mixture = np.full(len(GRID), 1 / len(GRID))
    for _ in range(UPDATES):
        mixture *= target / (gram @ mixture)
    below = np.cumsum(mixture) / mixture.sum()
    places = np.searchsorted(below, (np.arange(d_ff) + 0.5) / d_ff)
    return GRID[np.minimum(places, len(GRID) - 1)]
