"""RIA, relative importance and activations: a weight counts by its share of what enters and leaves its two channels.

The channel permutation that the paper adds for n:m is not done. Source: Zhang et al., "Plug-and-Play: An Efficient
Post-training Pruning Method for Large Language Models" (ICLR'24), sections 3.1 and 3.2.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsellm.pruning.method import Inputs, Scored

EXPONENT = 0.5  # of the inputs' norm: the paper's alpha


def score(kernel: Float[Array, "d_in d_out"], inputs: Inputs) -> Float[Array, "d_in d_out"]:
    """(|W_io| / sum_i |W_io| + |W_io| / sum_o |W_io|) * |X_i|_2^alpha; 0 where a channel is all zero."""
    magnitude = jnp.abs(kernel)
    sums = [magnitude.sum(axis=axis, keepdims=True) for axis in (0, 1)]
    relative = sum((magnitude / jnp.where(total > 0, total, 1) for total in sums), jnp.zeros_like(magnitude))
    return relative * (inputs.squares ** (EXPONENT / 2))[:, None]


RIA = Scored(score=score, needs="squares")
