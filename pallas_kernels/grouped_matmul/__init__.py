"""Grouped matrix product: each expert multiplies the rows routed to it, Y[s] = scale[s] * act(X[s] @ W[e] + bias[e]).

Layouts: slot s is a place in `routing.order`, whose experts' slots follow each other. X is [slots, K] in that order, or
[tokens, K] and gathered: slot s reads row `order[s] // top_k`. W is [experts, K, N]. Y is [slots, N] in the order of
slots, or scattered: slot s writes row `order[s]`, its position. Work: 2 * K * N FLOPs a slot that is not dropped.
Bytes: each row of X that some slot reads (once), W and bias of every expert with slots, Y (dropped slots are written
too: zeros), and 4 a slot for the order and for the scale.

No row is padded to an expert's capacity and no expert is multiplied by a row of another: of MoE layers, this is the m
axis of `mk,ekn->mn`, gathered, multiplied and scattered back, with the weights chosen by expert.

Source: PIT (SOSP'23), section 3.1; MegaBlocks (MLSys'23), section 4 (dropless experts).
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels import tuning
from pallas_kernels.grouped_matmul.cases import CASES, peers, work
from pallas_kernels.grouped_matmul.mosaic import Config, candidates, check_config, check_support, mosaic
from pallas_kernels.grouped_matmul.reference import ACTIVATIONS, finish, reference, xla
from pallas_kernels.operands import check_implementation, result_dtype, same_path, vary_together
from pallas_kernels.routing import Routing, check_routing

DEVICES = ("NVIDIA H100", "NVIDIA H200")

__all__ = ["CASES", "DEVICES", "Config", "candidates", "grouped_matmul", "peers", "reference", "work"]


class _Options(NamedTuple):
    gather: bool
    scatter: bool
    activation: str | None
    gated: bool
    transposed: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _grouped_matmul(
    x, w, routing: Routing, bias, scale, options: _Options, config: Config | None, implementation: str | None
):
    """The product by the Mosaic kernel, or by xla where there is no config. The gradients make their own choice."""
    n, dtype = w.shape[1 if options.transposed else 2] // (2 if options.gated else 1), result_dtype(x.dtype)
    if 0 in (routing.slots, n):
        return jnp.zeros_like(x, shape=(routing.slots, n), dtype=dtype)
    config = config if x.size else None  # without K there is still what follows the product
    with jax.enable_x64(False):  # under which a Python integer meets an int32 as one of its kind
        if config is None:
            return xla(x.astype(dtype), w.astype(dtype), routing, bias, scale, **options._asdict())
        interpret = implementation == "interpret"
        out = mosaic(x, w, routing, bias, scale, **options._asdict(), config=config, interpret=interpret)
        return vary_together(x, out)[1]  # under shard_map a kernel's output does not say that it varies


def _forward(x, w, routing, bias, scale, options, config, implementation):
    out = _grouped_matmul(x, w, routing, bias, scale, options, config, implementation)
    return out, (x, w, routing, bias, scale)


def _finish_gradients(product, routing: Routing, bias, scale, options: _Options, g):
    """Gradients of the product, in its order of rows, and of the scale, in the order of slots."""
    expert_of_slot = routing.slot_experts()

    def by_row(of_slots):
        return jnp.zeros_like(of_slots).at[routing.order].set(of_slots) if options.scatter else of_slots

    bias_rows = None if bias is None else bias.at[by_row(expert_of_slot)].get(mode="clip")
    scale_rows = None if scale is None else by_row(scale)

    def finished(product, scale_rows):
        return finish(product, bias_rows, scale_rows, options.activation, options.gated)

    _, pull_back = jax.vjp(finished, product.astype(jnp.float32), scale_rows)
    grad, grad_scale = pull_back(g.astype(jnp.float32))
    if grad_scale is not None:
        grad_scale = grad_scale[routing.order] if options.scatter else grad_scale
        grad_scale = jnp.where(expert_of_slot < len(routing.counts), grad_scale, 0)
    return grad.astype(product.dtype), grad_scale


def _backward(options: _Options, config, implementation, residuals, g):
    """The products of the same routing along the other two dimensions; dropped slots have no gradient."""
    from pallas_kernels.grouped_outer import grouped_outer  # here, since the two are each other's gradients

    del config
    x, w, routing, bias, scale = residuals
    operand_dtype, (x, w) = x.dtype, (a.astype(result_dtype(a.dtype)) for a in (x, w))
    gather, scatter, activation, gated, transposed = options
    path = functools.partial(same_path, implementation=implementation)

    grad_scale = None
    if activation is not None or gated or scale is not None:  # of what follows the product, which is made again
        product = path(grouped_matmul, x, w, routing, None, None, gather, scatter, None, False, transposed)
        g, grad_scale = _finish_gradients(product, routing, bias, scale, options, g)

    # A row of g is a slot's or a position's, and is gathered as a token that makes one choice.
    by_position = dataclasses.replace(routing, top_k=1)
    grad_x = path(grouped_matmul, g, w, by_position, None, None, scatter, gather, None, False, not transposed)
    if gather:
        choices = grad_x.reshape(len(x), routing.top_k, x.shape[1])
        grad_x = choices.sum(axis=1, dtype=jnp.float32).astype(x.dtype)
    if transposed:
        grad_w = path(grouped_outer, g, x, routing, scatter, gather)
    else:
        grad_w = path(grouped_outer, x, g, routing, gather, scatter)
    grad_bias = None
    if bias is not None:
        ones = jnp.ones((routing.slots, 1), g.dtype)
        grad_bias = path(grouped_outer, ones, g, routing, False, scatter)[:, 0]
    no_grad = jax.tree.map(lambda x: jnp.zeros(x.shape, jax.dtypes.float0), routing)
    return grad_x.astype(operand_dtype), grad_w.astype(operand_dtype), no_grad, grad_bias, grad_scale


_grouped_matmul.defvjp(_forward, _backward)


def _check(x, w, routing: Routing, bias, scale, options: _Options) -> None:
    """Raises ValueError unless the arguments fit together."""
    check_routing(routing)
    layout = "[experts, N, K]" if options.transposed else "[experts, K, N]"
    if x.ndim != 2 or w.ndim != 3:
        raise ValueError(f"x and w must be [rows, K] and {layout}; got shapes {x.shape} and {w.shape}")
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float8_e4m3fn):
        raise ValueError(f"dtype must be bfloat16, float16, float32 or float8_e4m3fn; got {x.dtype}")
    slots, experts = routing.slots, routing.counts.shape[0]
    rows = slots // routing.top_k if options.gather else slots
    if x.shape[0] != rows:
        rule = "x must have a row for each token" if options.gather else "x must have a row for each slot"
        raise ValueError(f"{rule}; got {x.shape[0]} rows, {slots} slots, top_k={routing.top_k}")
    k, n = w.shape[1:][::-1] if options.transposed else w.shape[1:]
    if (w.shape[0], k) != (experts, x.shape[1]):
        got = f"{list(w.shape)}, experts={experts}, K={x.shape[1]}"
        raise ValueError(f"w must be {layout}, of the experts of routing and the K of x; got {got}")
    if bias is not None and bias.shape != (experts, n):
        raise ValueError(f"bias must be [experts, N]; got {list(bias.shape)}, experts={experts}, N={n}")
    if w.dtype != x.dtype:
        raise ValueError(f"x and w must have one dtype; got {x.dtype} and {w.dtype}")
    if bias is not None and bias.dtype != result_dtype(x.dtype):
        raise ValueError(f"bias must be {result_dtype(x.dtype)}, as the result is; got {bias.dtype}")
    if scale is not None and (scale.shape != (slots,) or scale.dtype != jnp.float32):
        raise ValueError(f"scale must be float32[{slots}], one a slot; got {scale.dtype}{list(scale.shape)}")
    if options.activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(str, ACTIVATIONS))}; got {options.activation!r}")
    if options.gated and n % 2:
        raise ValueError(f"N of w must be even where it is gated; got N={n}")


def grouped_matmul(
    x: Float[Array, "rows K"],
    w: Float[Array, "experts _ _"],
    routing: Routing,
    bias: Float[Array, "experts N"] | None = None,
    scale: Float32[Array, " slots"] | None = None,
    gather: bool = False,
    scatter: bool = False,
    activation: str | None = None,
    gated: bool = False,
    transposed: bool = False,
    *,
    config: Config | None = None,
    implementation: str | None = None,
) -> Float[Array, "slots N_out"]:
    """Multiplies each slot's row by the weights of its expert: y[s] = scale[s] * act(row_s @ w[e] + bias[e]).

    Results of dropped slots are zeros. Differentiable in `x`, `w`, `bias` and `scale` (reverse mode, any order); the
    gradient recomputes the product that an activation or a scale follows. Accumulates in float32 and finishes there
    (bias, activation, gate, scale) before it rounds; equal inputs give equal bits. Float8 gives bfloat16, and gradients
    that are made in bfloat16. What is not finite stays within the expert, and the slot, that has it; a dropped slot's
    row is not read.

    Args:
        x: [slots, K] in the order of slots; where it is gathered [tokens, K]. bfloat16, float16, float32, or
            float8_e4m3fn (the Mosaic kernel takes that with transposed weights).
        w: weights of each expert, [experts, K, N], of the same dtype.
        routing: which expert takes which positions. Its values are not checked, as they are traced: counts that are
            negative or sum to more than there are slots, and an order that is no permutation, give an undefined result.
        bias: [experts, N], of the result's dtype.
        scale: of each slot's result, such as its weight in the mixture; float32 [slots], in the order of slots.
        gather: slot s reads row `order[s] // top_k` of x, instead of row s.
        scatter: slot s writes row `order[s]` of the result, instead of row s.
        activation: None, "relu", "gelu", "gelu_tanh" or "silu".
        gated: the first half of w's columns are the gate's: the result is act(gate) * up, of half as many.
        transposed: w is [experts, N, K].
        config: tiling of the Mosaic kernel; None takes the tuned one, or a heuristic.
        implementation: "mosaic_gpu" (Hopper), "xla" (anywhere), "interpret" (the Mosaic kernel on CPU under the race
            detector, slow), or None: the Mosaic kernel where it can run, else xla.

    Returns:
        [slots, N], or [slots, N / 2] where it is gated, in the dtype of x or, for float8, bfloat16: rows are slots, or
        positions if scattered.

    Raises:
        ValueError: shapes, dtypes, routing, activation or config do not fit together.
        NotImplementedError: the asked implementation cannot take these arguments or this device.

    Source: PIT (SOSP'23), section 3.1.
    """
    x, w = jnp.asarray(x), jnp.asarray(w)
    bias, scale = (None if array is None else jnp.asarray(array) for array in (bias, scale))
    options = _Options(gather, scatter, activation, gated, transposed)
    _check(x, w, routing, bias, scale, options)
    check_implementation(implementation)
    arguments = x, w, routing, bias, scale, *options

    def check(config: Config | None) -> None:
        devices = None if implementation == "interpret" else DEVICES
        check_support(*arguments, devices=devices)
        if config is not None:
            check_config(config, *arguments)

    config = tuning.choose_config(
        "grouped_matmul", Config, arguments, config, implementation, check=check, candidates=candidates
    )
    return _grouped_matmul(*vary_together(x, w, routing, bias, scale), options, config, implementation)
