"""Grouped outer products: for each expert, the sum of x[s] (outer) y[s] over its slots: Z[e] = X[e's]^T @ Y[e's].

Layouts: slot s is a place in `routing.order`, whose experts' slots follow each other. X is [slots, K] in that order;
where it is gathered, slot s reads row `order[s]` of X [slots, K], or row `order[s] // top_k` of X [tokens, K]. So Y, of
N columns. Z is [experts, K, N]. Work: 2 * K * N FLOPs a slot that is not dropped. Bytes: each row of X and of Y that
some slot reads (once), Z, and 4 a slot for the order.

This is the gradient of `grouped_matmul` in its weights: the k axis of `km,kn->mn`, one run of it an expert.

Source: PIT (SOSP'23), section 3.1; MegaBlocks (MLSys'23), section 5.1 (the sparse products of training).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import tuning
from pallas_kernels.grouped_outer.cases import CASES, peers, work
from pallas_kernels.grouped_outer.mosaic import Config, candidates, check_config, check_support, mosaic
from pallas_kernels.grouped_outer.reference import reference, xla
from pallas_kernels.operands import check_implementation, same_path, vary_together
from pallas_kernels.routing import Routing, check_routing

DEVICES = ("NVIDIA H100", "NVIDIA H200")

__all__ = ["CASES", "DEVICES", "Config", "candidates", "grouped_outer", "peers", "reference", "work"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _grouped_outer(
    x, y, routing: Routing, gather_x: bool, gather_y: bool, config: Config | None, implementation: str | None
):
    """The product by the Mosaic kernel, or by xla where there is no config. The gradients make their own choice."""
    if 0 in (routing.slots, x.shape[1], y.shape[1]):
        return jnp.zeros_like(x, shape=(routing.counts.shape[0], x.shape[1], y.shape[1]))
    gathers = {"gather_x": gather_x, "gather_y": gather_y}
    with jax.enable_x64(False):  # under which a Python integer meets an int32 as one of its kind
        if config is None:
            return xla(x, y, routing, **gathers)
        out = mosaic(x, y, routing, **gathers, config=config, interpret=implementation == "interpret")
        return vary_together(x, out)[1]  # under shard_map a kernel's output does not say that it varies


def _forward(x, y, routing, gather_x, gather_y, config, implementation):
    return _grouped_outer(x, y, routing, gather_x, gather_y, config, implementation), (x, y, routing)


def _backward(gather_x, gather_y, config, implementation, residuals, g):
    """Each operand's rows are the other's by the expert's g, or by its transpose; dropped slots have no gradient."""
    from pallas_kernels.grouped_matmul import grouped_matmul  # here, since the two are each other's gradients

    del config
    x, y, routing = residuals

    def gradient(own, gather_own, other, gather_other, transposed):
        top_k = max(routing.slots, 1) // max(other.shape[0], 1)  # of a row a position 1, of a row a token its choices
        options = None, None, gather_other, gather_own, None, False, transposed
        by_row = dataclasses.replace(routing, top_k=top_k)
        rows = same_path(grouped_matmul, other, g, by_row, *options, implementation=implementation)
        choices = rows.reshape(own.shape[0], max(routing.slots, 1) // max(own.shape[0], 1), own.shape[1])
        return choices.sum(axis=1, dtype=jnp.float32).astype(own.dtype)

    no_grad = jax.tree.map(lambda x: jnp.zeros(x.shape, jax.dtypes.float0), routing)
    return gradient(x, gather_x, y, gather_y, True), gradient(y, gather_y, x, gather_x, False), no_grad


_grouped_outer.defvjp(_forward, _backward)


def _check(x, y, routing: Routing, gather_x: bool, gather_y: bool) -> None:
    """Raises ValueError unless the arguments fit together."""
    check_routing(routing)
    if x.ndim != 2 or y.ndim != 2:
        raise ValueError(f"x and y must be [rows, K] and [rows, N]; got shapes {x.shape} and {y.shape}")
    if x.dtype != y.dtype:
        raise ValueError(f"x and y must have one dtype; got {x.dtype} and {y.dtype}")
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"dtype must be bfloat16, float16 or float32; got {x.dtype}")
    slots = routing.slots
    for name, operand, gather in (("x", x, gather_x), ("y", y, gather_y)):
        if operand.shape[0] not in ((slots, slots // routing.top_k) if gather else (slots,)):
            rule = f"{name} must have a row for each slot" + " or token" * gather
            raise ValueError(f"{rule}; got {operand.shape[0]} rows, {slots} slots, top_k={routing.top_k}")


def grouped_outer(
    x: Float[Array, "x_rows K"],
    y: Float[Array, "y_rows N"],
    routing: Routing,
    gather_x: bool = False,
    gather_y: bool = False,
    *,
    config: Config | None = None,
    implementation: str | None = None,
) -> Float[Array, "experts K N"]:
    """Sums the outer products of x's and y's rows over the slots of each expert; zeros where an expert has none.

    Differentiable in `x` and `y` (reverse mode, any order). Accumulates in float32; equal inputs give equal bits. What
    is not finite stays within the expert that has it; dropped slots' rows do not matter.

    Args:
        x: [slots, K] in the order of slots; where it is gathered [slots, K] in the order of positions, or [tokens, K].
            bfloat16, float16 or float32.
        y: [slots, N] or [tokens, N] likewise, of the same dtype.
        routing: which expert takes which positions. Its values are not checked, as they are traced: counts that are
            negative or sum to more than there are slots, and an order that is no permutation, give an undefined result.
        gather_x: slot s reads row `order[s]` of x, or row `order[s] // top_k` where x has a row a token.
        gather_y: so for y.
        config: tiling of the Mosaic kernel; None takes the tuned one, or a heuristic.
        implementation: "mosaic_gpu" (Hopper), "xla" (anywhere), "interpret" (the Mosaic kernel on CPU under the race
            detector, slow), or None: the Mosaic kernel where it can run, else xla.

    Returns:
        [experts, K, N], in the operands' dtype.

    Raises:
        ValueError: shapes, dtypes, routing or config do not fit together.
        NotImplementedError: the asked implementation cannot take these arguments or this device.

    Source: PIT (SOSP'23), section 3.1.
    """
    x, y = jnp.asarray(x), jnp.asarray(y)
    _check(x, y, routing, gather_x, gather_y)
    check_implementation(implementation)
    arguments = x, y, routing, gather_x, gather_y

    def check(config: Config | None) -> None:
        devices = None if implementation == "interpret" else DEVICES
        check_support(*arguments, devices=devices)
        if config is not None:
            check_config(config, *arguments)

    config = tuning.choose_config(
        "grouped_outer", Config, arguments, config, implementation, check=check, candidates=candidates
    )
    return _grouped_outer(*vary_together(x, y, routing), gather_x, gather_y, config, implementation)
