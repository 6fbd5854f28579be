"""What predictors predict, and from what: read from a collection of activations."""

import dataclasses

import numpy as np
from jaxtyping import Shaped, UInt8

from sparsellm.activations import Activations


@dataclasses.dataclass(frozen=True)
class Neurons:
    """The neurons that fire, from what enters the feed-forward block or, ahead of it, the layer."""

    def widths(self, activations: Activations) -> tuple[int, ...]:
        """How many there are to predict in each layer."""
        return activations.neurons

    def inputs(self, activations: Activations, layer: int, look_ahead: bool) -> Shaped[np.ndarray, "tokens d_model"]:
        """What a predictor of the layer sees of each token."""
        return activations.read("hidden" if look_ahead else "ffn_inputs", layer)

    def bits(self, activations: Activations, layer: int) -> UInt8[np.ndarray, "tokens bytes"]:
        """What it should answer, eight a byte as of `numpy.packbits`."""
        return activations.read("fires", layer)


@dataclasses.dataclass(frozen=True)
class Heads:
    """The heads with the largest outputs, from what enters the layer or, ahead of it, the one before.

    Attributes:
        share: of a layer's heads, for each token; at least one.

    Source: Liu et al., "Deja Vu" (ICML 2023), sections 3 and 4.2.
    """

    share: float = 0.5

    def __post_init__(self):
        if not 0 < self.share < 1:
            raise ValueError(f"share must lie between 0 and 1; got share={self.share}")

    def widths(self, activations: Activations) -> tuple[int, ...]:
        """As for neurons."""
        return activations.heads

    def inputs(self, activations: Activations, layer: int, look_ahead: bool) -> Shaped[np.ndarray, "tokens d_model"]:
        """As for neurons."""
        return activations.read("hidden", max(layer - look_ahead, 0))

    def bits(self, activations: Activations, layer: int) -> UInt8[np.ndarray, "tokens bytes"]:
        """As for neurons."""
        norms = activations.read("head_norms", layer)
        chosen = np.argsort(-norms, axis=1, kind="stable")[:, : max(round(self.share * norms.shape[1]), 1)]
        labels = np.zeros(norms.shape, bool)
        np.put_along_axis(labels, chosen, True, axis=1)
        return np.packbits(labels, axis=1)


type Target = Neurons | Heads
