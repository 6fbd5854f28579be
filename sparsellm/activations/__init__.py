"""What goes on inside a model's blocks while it reads a text: collected to disk in shards, or counted on the way."""

from sparsellm.activations.collection import KINDS, Activations, collect, unpack_bits
from sparsellm.activations.recording import fingerprint
from sparsellm.activations.statistics import SPANS, Statistics, measure

__all__ = ["KINDS", "SPANS", "Activations", "Statistics", "collect", "fingerprint", "measure", "unpack_bits"]
