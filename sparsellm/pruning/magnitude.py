"""Magnitude pruning: the weights nearest to zero go, layer by layer or wherever in the model they are.

Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks" (2015), section 3.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sparsellm.pruning.method import Scored, check_sparsity
from sparsellm.pruning.walk import walk

INFINITY_BITS = 0x7F800000  # float32 of one sign are ordered as their bits are


def score(kernel: Float[Array, "d_in d_out"], inputs: object = None) -> Float[Array, "d_in d_out"]:
    """|W|."""
    return jnp.abs(kernel)


MAGNITUDE = Scored(score=score)


def global_sparsities(model: nnx.Module, sparsity: float, *, select: str = "") -> dict[str, float]:
    """The sparsity of each kernel when one threshold serves them all: what `prune` takes for global magnitude pruning.

    The threshold is found by bisection, so no more than one kernel is looked at at once.

    Args:
        model: as for `prune`.
        sparsity: share of all selected weights that are to be zero.
        select: as for `prune`.

    Returns:
        For each kernel by its path, the share of its weights that lie below the threshold. Those just at it (bfloat16
        has many equal ones) are shared out evenly.

    Raises:
        ValueError: the sparsity is not at least 0 and less than 1, or no kernel is selected.
    """
    check_sparsity(sparsity)
    kernels = {name: kernel[...] for block in walk(model, select=select) for name, kernel in block.kernels.items()}
    wanted = round(sparsity * sum(kernel.size for kernel in kernels.values()))

    def below(bits: int) -> dict[str, int]:
        return {name: int(count) for name, count in _below(kernels, jnp.int32(bits)).items()}

    low, high = 0, INFINITY_BITS  # sum(below(low)) <= wanted
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if sum(below(middle).values()) <= wanted else (low, middle)
    fewer, more = below(low), below(low + 1)
    equal = sum(more.values()) - sum(fewer.values())
    share = (wanted - sum(fewer.values())) / max(equal, 1)
    return {name: (fewer[name] + share * (more[name] - fewer[name])) / kernel.size for name, kernel in kernels.items()}


@jax.jit
def _below(kernels: dict[str, Array], bits: Int[Array, ""]) -> dict[str, Array]:
    """How many weights of each kernel have a magnitude whose bits, as a float32, are less than `bits`."""

    def count(kernel: Array) -> Array:
        magnitude = jax.lax.bitcast_convert_type(jnp.abs(kernel.astype(jnp.float32)), jnp.int32)
        return jnp.sum(magnitude < bits, dtype=jnp.int32)

    return {name: count(kernel) for name, kernel in kernels.items()}
