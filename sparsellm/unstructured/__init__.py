"""Unstructured weights in models: linear layers that neither store nor read their zeros.

    prune(model, WANDA, sparsity=0.7, windows=windows)
    compress(model)

puts an `UnstructuredLinear` in the place of every `nnx.Linear` that is worth it, with `experts=True` of the stacks of
experts too. The rest of the model stays as it is, code included; it generates, is saved and loaded as before.
"""

from sparsellm.unstructured.layouts import check_layers, compressed_layers, layouts, with_layouts
from sparsellm.unstructured.linear import CompressedArray, UnstructuredLinear, apply_all
from sparsellm.unstructured.rules import EVERYWHERE, Rules, Treatment, compress

__all__ = [
    "EVERYWHERE",
    "CompressedArray",
    "Rules",
    "Treatment",
    "UnstructuredLinear",
    "apply_all",
    "check_layers",
    "compress",
    "compressed_layers",
    "layouts",
    "with_layouts",
]
