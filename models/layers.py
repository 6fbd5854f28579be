"""What the models here have in common: products and embeddings whose parameters name their axes, and RMS norm.

`config` is any model's: its `dtype` is computed in, its `param_dtype` kept, its `init_std` the initial weights' spread.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sparsellm.sharding import sharded


def linear(
    config: Any,
    in_out: tuple[int, int],
    axes: tuple[str, str],
    *,
    init: nnx.Initializer | None = None,
    bias: bool = False,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """x @ kernel (+ bias), whose dimensions are called `axes` (see `sparsellm.sharding`)."""
    return nnx.Linear(
        *in_out,
        use_bias=bias,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        kernel_init=init or nnx.initializers.normal(config.init_std),
        kernel_metadata=sharded(*axes),
        bias_metadata=sharded(axes[1]) if bias else {},
        rngs=rngs,
    )


def embed(
    config: Any,
    rows: int,
    features: int,
    axes: tuple[str, str],
    *,
    init: nnx.Initializer | None = None,
    rngs: nnx.Rngs,
) -> nnx.Embed:
    """A table of vectors; a row outside it is NaN."""
    # Rows are looked up in the parameters' dtype and cast after: casting first would copy the whole table.
    return nnx.Embed(
        rows,
        features,
        dtype=jnp.dtype(config.param_dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        embedding_init=init or nnx.initializers.normal(config.init_std),
        embedding_metadata=sharded(*axes),
        rngs=rngs,
    )


class RMSNorm(nnx.RMSNorm):
    """x / sqrt(mean(x^2) + epsilon) * scale in float32, whatever it is given and gives back."""

    def __init__(self, config: Any, *, epsilon: float, rngs: nnx.Rngs):
        super().__init__(
            config.d_model,
            epsilon=epsilon,
            dtype=jnp.float32,
            param_dtype=jnp.dtype(config.param_dtype),
            scale_metadata=sharded("embed"),
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "*tokens d_model"]) -> Float[Array, "*tokens d_model"]:
        return super().__call__(x).astype(x.dtype)
