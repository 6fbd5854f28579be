"""The reference of `grouped_matmul` and its xla path, in plain jnp."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.operands import XLA_CHUNK, result_dtype
from pallas_kernels.routing import Routing

ACTIVATIONS: dict[str | None, Callable[[Array], Array]] = {
    None: lambda x: x,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
}


def finish(
    product: Float32[Array, "rows N"],
    bias: Float[Array, "#rows N"] | None,
    scale: Float32[Array, " rows"] | None,
    activation: str | None,
    gated: bool,
) -> Float32[Array, "rows N_out"]:
    """What follows the product, in float32: scale * act(product + bias), or scale * act(gate) * up."""
    if bias is not None:
        product += bias.astype(jnp.float32)
    gate, up = jnp.split(product, 2, axis=1) if gated else (product, None)
    out = ACTIVATIONS[activation](gate)
    out = out if up is None else out * up
    return out if scale is None else out * scale[:, None]


def reference(
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
) -> Float[Array, "slots N_out"]:
    """Every expert multiplies every slot in float32; a slot keeps what its own expert makes of it."""
    rows = x[routing.order // routing.top_k] if gather else x
    w = w.swapaxes(1, 2) if transposed else w
    expert_of_slot = routing.slot_experts()[:, None]

    def keep_own(kept, expert_and_w):
        expert, w = expert_and_w
        product = jnp.dot(rows.astype(jnp.float32), w.astype(jnp.float32), precision=lax.Precision.HIGHEST)
        return jnp.where(expert_of_slot == expert, product, kept), None

    experts = jnp.arange(len(w), dtype=jnp.int32)
    zeros = jnp.zeros((routing.slots, w.shape[2]), jnp.float32)
    product, _ = lax.scan(keep_own, zeros, (experts, w))
    bias = None if bias is None else bias[jnp.minimum(expert_of_slot[:, 0], len(w) - 1)]
    out = jnp.where(expert_of_slot < len(w), finish(product, bias, scale, activation, gated), 0)
    out = out.astype(result_dtype(x.dtype))
    return jnp.zeros_like(out).at[routing.order].set(out) if scatter else out


def each_tile[Out](
    routing: Routing, step: Callable[[Array, Int32[Array, " tile"], Out], Out], out: Out, *, static: bool
) -> Out:
    """Loops over tiles of slots, each of one expert: `step(expert, slots, out) -> out`.

    Args:
        routing: whose slots; dropped ones are in no tile.
        step: takes the slots of a tile, distinct; those out of range stand where the expert has no more.
        out: what the first step takes.
        static: as many steps as any counts could need (the last ones have no slots), instead of as many as there are
            tiles.
    """
    experts, slots = len(routing.counts), routing.slots
    size = min(max(-(-slots // experts), 16), XLA_CHUNK)  # of an average expert, so that padding stays small
    own = jnp.arange(size, dtype=jnp.int32)
    tiles = -(-routing.counts // size)
    tile_ends, slot_ends = (jnp.cumsum(x, dtype=jnp.int32) for x in (tiles, routing.counts))

    def tile_step(tile, out):
        expert = jnp.minimum(jnp.sum(tile_ends <= tile, dtype=jnp.int32), experts - 1)
        tile_of_expert = tile - tile_ends[expert] + tiles[expert]
        first = slot_ends[expert] - routing.counts[expert] + tile_of_expert * size
        return step(expert, jnp.where(first + own < slot_ends[expert], first + own, slots + own), out)

    return lax.fori_loop(0, slots // size + experts if static else tile_ends[-1], tile_step, out)


def positions(routing: Routing, slots: Int32[Array, " tile"]) -> Int32[Array, " tile"]:
    """The positions of the slots of a tile; what is out of range stays so."""
    return jnp.where(slots < routing.slots, routing.order.at[slots].get(mode="clip"), slots)


def _xla(
    x: Float[Array, "rows K"],
    w: Float[Array, "experts _ _"],
    routing: Routing,
    bias: Float[Array, "experts N"] | None,
    scale: Float32[Array, " slots"] | None,
    *,
    gather: bool,
    scatter: bool,
    activation: str | None,
    gated: bool,
    transposed: bool,
    static: bool,
) -> Float[Array, "slots N_out"]:
    """Tile by tile: reads its rows, multiplies them by their expert's weights, writes them where they belong."""

    def multiply(expert, slots, out):
        order = positions(routing, slots)
        rows = x.at[order // routing.top_k if gather else slots].get(mode="clip")
        product = lax.dot_general(
            rows,
            w[expert],
            (((1,), (1 if transposed else 0,)), ((), ())),
            precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        bias_row = None if bias is None else bias[expert][None]
        scale_rows = None if scale is None else scale.at[slots].get(mode="clip")
        tile = finish(product, bias_row, scale_rows, activation, gated).astype(x.dtype)
        return out.at[order if scatter else slots].set(tile, mode="drop", unique_indices=True)

    columns = w.shape[1 if transposed else 2] // (2 if gated else 1)
    return each_tile(routing, multiply, jnp.zeros_like(x, shape=(routing.slots, columns)), static=static)


@functools.partial(jax.jit, static_argnames=("gather", "scatter", "activation", "gated", "transposed"))
def xla(x, w, routing, bias, scale, **options) -> Float[Array, "slots N_out"]:
    """The xla path: a loop over tiles, which has no work for experts without slots."""
    # On a GPU each step of a loop whose length lives on the device costs a host round trip, more than it saves.
    return lax.platform_dependent(
        x, w, routing, bias, scale,
        cpu=functools.partial(_xla, static=False, **options),
        default=functools.partial(_xla, static=True, **options),
    )  # fmt: skip
