"""Float32 products on a tensor core that has bfloat16 ones: six of them, of three-term splits (BF16x6).

The tensor core's own TF32 keeps 10 bits, and takes no transposed operand.

Source: Henry, Tang, Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision
Computations" (2019).
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float

PRODUCTS = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0))  # (term of A, term of B); the rest is below float32


def split(x: Float[Array, " *shape"]) -> BFloat16[Array, " *terms"]:
    """Three bfloat16 terms of a float32 array, stacked along the first axis; exact from 2**-102 on.

    A term is the upper 16 bits of what is left. Plain casts would not do: XLA may drop a round trip to bfloat16.
    """
    x = jnp.where(jnp.isnan(x), jnp.nan, x)  # whose payload is in the upper bits
    terms = []
    for _ in range(3):
        bits = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000)
        term = lax.bitcast_convert_type(bits, jnp.float32)
        terms.append(term.astype(jnp.bfloat16))
        x = jnp.where(jnp.isfinite(x), x - term, 0)
    return jnp.concatenate(terms)
