"""Pruning: fewer weights, heads or neurons, and a model that is nearly as good.

A method is a score (magnitude, Wanda, RIA) or an update (SparseGPT); patterns, the walk through the model, calibration
and reports are shared. A new method is one file, and one line here.
"""

from sparsellm.pruning.gradual import GradualConfig, gradually_pruned
from sparsellm.pruning.lora import recover
from sparsellm.pruning.magnitude import MAGNITUDE, global_sparsities
from sparsellm.pruning.method import Inputs, Method, Scored
from sparsellm.pruning.owl import owl_sparsities
from sparsellm.pruning.patterns import NM, Blocks, Pattern, Unstructured, parse_pattern
from sparsellm.pruning.ria import RIA
from sparsellm.pruning.sparsegpt import SparseGPT
from sparsellm.pruning.structured import prune_structures
from sparsellm.pruning.walk import prune, walk
from sparsellm.pruning.wanda import WANDA

METHODS: dict[str, Method] = {"magnitude": MAGNITUDE, "wanda": WANDA, "ria": RIA, "sparsegpt": SparseGPT()}

__all__ = [
    "MAGNITUDE",
    "METHODS",
    "NM",
    "RIA",
    "WANDA",
    "Blocks",
    "GradualConfig",
    "Inputs",
    "Method",
    "Pattern",
    "Scored",
    "SparseGPT",
    "Unstructured",
    "global_sparsities",
    "gradually_pruned",
    "owl_sparsities",
    "parse_pattern",
    "prune",
    "prune_structures",
    "recover",
    "walk",
]
