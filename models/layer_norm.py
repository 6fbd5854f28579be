"""OPT's layer norm, with the residual sum before it: while decoding one launch of a kernel, else XLA's."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.feed_forward import capture
from pallas_kernels.layer_norm import DEVICES, layer_norm
from pallas_kernels.layer_norm.config import check_support
from sparsellm.sharding import sharded


class LayerNorm(nnx.LayerNorm):
    """Layer norm in float32, whatever it is given and gives back; with `relu`, only what is positive of it."""

    def __init__(self, config: Any, *, relu: bool = False, rngs: nnx.Rngs):
        self.relu = relu
        super().__init__(
            config.d_model,
            epsilon=1e-5,
            dtype=jnp.float32,
            param_dtype=jnp.dtype(config.param_dtype),
            use_fast_variance=False,
            scale_metadata=sharded("embed"),
            bias_metadata=sharded("embed"),
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "*tokens d_model"]) -> Float[Array, "*tokens d_model"]:
        return self.of_sum(x, None)[1]

    def of_sum(self, x: Float[Array, "*tokens d_model"], addend: Float[Array, "*tokens d_model"] | None):
        """x + addend (x if that is None), and its norm: in one launch where a kernel takes x."""
        if _kernel_takes(x):
            scale, bias = (jnp.asarray(parameter) for parameter in (self.scale, self.bias))
            rows, added = x[:, 0], None if addend is None else addend[:, 0]
            x, y = (a[:, None] for a in layer_norm(rows, scale, bias, added, epsilon=self.epsilon))
        else:
            x = x if addend is None else x + addend
            y = super().__call__(x).astype(x.dtype)
        if self.relu:
            y = jax.nn.relu(y)
            capture(self, "norm_activation", y)
        return x, y


def _kernel_takes(x: Float[Array, "*tokens d_model"]) -> bool:
    """Whether x is one token a row, as while decoding, for which `layer_norm` has a kernel on this device.

    Over several devices XLA's norm stays: it is cut along the batch as its input is.
    """
    if x.ndim != 3 or x.shape[1] != 1 or jax.sharding.get_abstract_mesh().size > 1:
        return False
    try:
        check_support(x[:, 0], DEVICES)
    except NotImplementedError:
        return False
    return True
