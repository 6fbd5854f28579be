"""OWL, outlier-weighed layer-wise sparsity: blocks with more outliers among their scores are pruned less.

Source: Yin et al., "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High
Sparsity" (ICML'24), section 3.2, with M = 5 and lambda = 0.08, over decoder blocks as in its code. With a pattern
n:m it is the paper's mixed N:8 sparsity: each layer has its own N. The rounding to whole weights is ours (`NM.mixed`).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparsellm.pruning import wanda
from sparsellm.pruning.method import Inputs, check_sparsity
from sparsellm.pruning.walk import walk


def owl_sparsities(
    model: Any,
    windows: Int[np.ndarray, "windows length"],
    sparsity: float,
    *,
    batch: int = 1,
    select: str = "",
    outlier: float = 5.0,
    spread: float = 0.08,
) -> dict[str, float]:
    """The sparsity of each kernel, the same within a block: what `prune` takes for any method.

    Args:
        model: as for `prune`; it is not changed.
        windows: calibration tokens.
        sparsity: the mean over blocks.
        batch: windows at once, a divisor of their number.
        select: as for `prune`.
        outlier: how many times the mean score of its block an outlier is: the paper's M.
        spread: how far a block's sparsity may lie from the mean one: at most 2 of it, the paper's lambda.
    """
    check_sparsity(sparsity)
    names, ratios = [], []
    for block in walk(model, windows, batch=batch, select=select):
        if block.kernels:
            inputs = block.inputs("squares")
            scored = [(kernel[...], inputs[name]) for name, kernel in block.kernels.items()]
            names.append(list(block.kernels))
            ratios.append(float(outlier_ratio(scored, jnp.float32(outlier))))
    sparsities = layer_sparsities(np.array(ratios), sparsity, spread)
    return {name: float(value) for group, value in zip(names, sparsities, strict=True) for name in group}


@jax.jit
def outlier_ratio(kernels: list[tuple[Array, Inputs]], outlier: Float[Array, ""]) -> Float[Array, ""]:
    """The share of all these kernels' Wanda scores that exceed `outlier` times their mean."""
    score = {2: wanda.score, 3: jax.vmap(wanda.score)}
    scores = [score[kernel.ndim](kernel.astype(jnp.float32), inputs) for kernel, inputs in kernels]
    size = float(sum(x.size for x in scores))
    mean = sum((x.sum() for x in scores), jnp.float32(0)) / size
    above = sum((jnp.sum(x > outlier * mean, dtype=jnp.int32) for x in scores), jnp.int32(0))
    return above.astype(jnp.float32) / size


def layer_sparsities(
    ratios: Float[np.ndarray, " layers"], sparsity: float, spread: float
) -> Float[np.ndarray, " layers"]:
    """Sparsities that fall with the outlier ratio, over a range of 2 * spread, around a mean of `sparsity`.

    Where 0 or 1 cuts one off, the mean is off by as much.
    """
    width = np.ptp(ratios)
    scaled = (ratios - ratios.min()) * (2 * spread / width if width else 0.0)
    return np.clip(sparsity - (scaled - scaled.mean()), 0.0, 1.0)
