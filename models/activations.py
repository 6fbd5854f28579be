"""Activations of OPT's feed-forward block: GELU and SiLU, and the ReLUs that make it sparse.

Without a gate, h = a(x W + b). With one, h = a(x W + b) * (x W_up + b_up): `a` is of the gate, whose zeros are h's.

Sources: Mirzadeh et al., "ReLU Strikes Back" (2023), section 4.2, shifted ReLU; Song et al., "ProSparse" (2024),
section 3, FATReLU; Song et al., "Turbo Sparse" (2024), section 3, dReLU.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SHIFT = 1.0  # of the shifted ReLU


@jax.custom_vjp
def relu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """max(x, 0), whose gradient asks its output what is not zero.

    So nothing else reads x, and XLA leaves the maximum to the product that x comes from: of OPT-125M's training step on
    an H200, 4%. `jax.nn.relu` keeps x; asked what is positive of the output, XLA asks x instead.
    """
    return jnp.maximum(x, 0)


def _relu_forward(x):
    y = relu(x)
    return y, y


def _relu_backward(y, gradient):
    return (jnp.where(y != 0, gradient, 0),)


relu.defvjp(_relu_forward, _relu_backward)

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
    "shifted_relu": lambda x: relu(x - SHIFT),
    "drelu": relu,  # of the gate; and of what it is multiplied with, relu(gate) * relu(up)
}
RELUS = ("relu", "shifted_relu", "drelu")  # whose zeros are exact


def fatrelu(x: Float[Array, "*shape"], threshold: float | Float[Array, ""]) -> Float[Array, "*shape"]:
    """x where it is above the threshold, else 0; NaN stays."""
    return jnp.where(x <= jnp.asarray(threshold, x.dtype), 0, x)


def check_activation(config: Any) -> None:
    """Checks what an `OPTConfig` says of its activation.

    Raises:
        ValueError: an unknown activation, or choices that do not go together.
    """
    name, thresholds = config.activation, config.thresholds
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {name!r}")
    if name == "drelu" and not config.gated:
        raise ValueError("activation 'drelu' is of a gate and what it is multiplied with: it needs gated=True")
    if config.norm_relu and not config.pre_norm:
        raise ValueError("norm_relu would cut the residual stream itself where norms come last: it needs pre_norm=True")
    if config.sparse_rows is not None and name not in RELUS:
        raise ValueError(f"sparse_rows needs exact zeros, so activation {', '.join(RELUS)}; got {name!r}")
    if thresholds is not None:
        if name != "relu":
            raise ValueError(f"thresholds are FATReLU's, so they need activation 'relu'; got {name!r}")
        if len(thresholds) != config.layers or not all(math.isfinite(t) and t >= 0 for t in thresholds):
            rule = f"thresholds must be {config.layers} finite numbers of at least 0, one a layer"
            raise ValueError(f"{rule}; got thresholds={thresholds}")
