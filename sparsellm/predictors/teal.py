"""TEAL: no predictor at all; a product skips the entries of its input that are close to zero.

What is close is a threshold for each product, from a histogram of its inputs' magnitudes on a calibration text, so that
a given share of the entries falls below. The columns of the weights that they meet need not be read.

Source: Liu et al., "Training-Free Activation Sparsity in Large Language Models" (2024), section 4.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, Int32

from sparsellm.predictors.predictor import PredictorParam
from sparsellm.pruning.calibrate import RECORDED

BINS = 2**15  # a bin for each magnitude of bfloat16: within 1/128 of each other, wherever they lie


class ThresholdedLinear(nnx.Module):
    """A linear layer on what of its input is larger than the threshold.

    Attributes:
        linear: the layer.
        threshold: float32 [].
    """

    def __init__(self, linear: nnx.Module, threshold: float):
        self.linear = linear
        self.threshold = PredictorParam(jnp.float32(threshold))

    def __call__(self, x: Float[Array, "*tokens d_in"]) -> Float[Array, "*tokens d_out"]:
        """The product; NaN is not small, and stays."""
        return self.linear(jnp.where(jnp.abs(x).astype(jnp.float32) <= self.threshold[...], 0, x))  # pyright: ignore


def with_input_thresholds(
    model: Any, windows: Int[np.ndarray, "windows length"], sparsity: float, *, select: str = "", batch: int = 1
) -> Any:
    """The same parameters, in a model whose linear layers each ignore a share of their inputs' entries.

    Args:
        model: anything whose blocks are `model.layers`.
        windows: calibration tokens, no padding.
        sparsity: the share, 0 to 1; at least so much of each layer's entries on these tokens.
        select: a regular expression that is found in the paths of the layers wanted, as in r"fc[12]"; "" for all
            `nnx.Linear` of the blocks.
        batch: windows at once, a divisor of their number.

    Raises:
        ValueError: an argument is out of range, or no layer is selected; or one is applied by its parent, as fc1 and
            fc2 of a model with `sparse_rows`.
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must be 0 to 1; got sparsity={sparsity}")
    if not len(windows) or batch < 1 or len(windows) % batch:
        raise ValueError(f"batch must divide the number of windows; got batch={batch}, {len(windows)} windows")
    paths = tuple(path for path in _linears(model) if re.search(select, _name(path)))
    if not paths:
        known = ", ".join(map(_name, _linears(model)))
        raise ValueError(f"select must be found in the path of some layer ({known}); got select={select!r}")
    graphdef, state = nnx.split(model)
    counts: Any = 0
    for part in np.split(windows, len(windows) // batch):
        counts = counts + np.asarray(_histograms(graphdef, paths, state, jnp.asarray(part, jnp.int32)), np.int64)
    thresholded = nnx.merge(graphdef, state)
    for path, histogram in zip(paths, counts, strict=True):
        owner = functools.reduce(_child, path[:-1], thresholded)
        linear = ThresholdedLinear(getattr(owner, path[-1]), threshold_for_sparsity(histogram, sparsity))
        setattr(owner, path[-1], linear)
    return thresholded


def threshold_for_sparsity(histogram: Int[np.ndarray, " bins"], sparsity: float) -> float:
    """The upper end of the first bin up to which there is at least this share; below all where that is none."""
    below = np.cumsum(histogram)
    if sparsity <= 0 or not below[-1]:
        return -1.0
    found = np.searchsorted(below, sparsity * below[-1] - 1e-6)
    return float(np.uint32((int(found) << 16) | 0xFFFF).view(np.float32))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _histograms(
    graphdef: nnx.GraphDef, paths: tuple[tuple[Any, ...], ...], state: nnx.State, tokens: Int[Array, "batch length"]
) -> Int32[Array, "layers bins"]:
    """How many entries of each layer's input have each magnitude."""
    model = nnx.merge(graphdef, state)
    for path in paths:
        functools.reduce(_child, path, model).__class__ = RECORDED[nnx.Linear]  # of a copy that lives for this trace
    _, captured = nnx.capture(model, nnx.Intermediate)(tokens)
    histograms = []
    seen = {path[:-1] for path, _ in nnx.to_flat_state(captured) if path[-1] == "kernel"}
    if missing := [_name(path) for path in paths if path not in seen]:
        raise ValueError(f"a layer must be applied by its own module to be calibrated; {', '.join(missing)} are not")
    for path in paths:
        x = functools.reduce(lambda tree, key: tree[key], path, captured)["kernel"][0]
        bits = lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)).ravel(), jnp.uint32) >> 16
        histograms.append(jnp.bincount(bits.astype(jnp.int32), length=BINS))
    return jnp.stack(histograms).astype(jnp.int32)


def _linears(model: Any) -> list[tuple[Any, ...]]:
    """The paths of the blocks' linear layers."""
    return [path for path, module in nnx.iter_modules(model) if type(module) is nnx.Linear and path[0] == "layers"]


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def _child(module: Any, key: Any) -> Any:
    return module[key] if isinstance(key, int) else getattr(module, key)
