"""Wanda: a weight counts as much as what it multiplies. No weight is updated.

Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (2023), section 3, equation 1.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsellm.pruning.method import Inputs, Scored


def score(kernel: Float[Array, "d_in d_out"], inputs: Inputs) -> Float[Array, "d_in d_out"]:
    """|W_io| * |X_i|_2, of which each output's inputs are compared with each other."""
    return jnp.abs(kernel) * jnp.sqrt(inputs.squares)[:, None]


WANDA = Scored(score=score, needs="squares", compare="output")
