"""The reference of `grouped_outer` and its xla path, in plain jnp."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.grouped_matmul.reference import each_tile, positions
from pallas_kernels.routing import Routing


def reference(
    x: Float[Array, "x_rows K"],
    y: Float[Array, "y_rows N"],
    routing: Routing,
    gather_x: bool = False,
    gather_y: bool = False,
) -> Float[Array, "experts K N"]:
    """For each expert, one dense product in float32 over all slots, the others' set to zero."""
    expert_of_slot = routing.slot_experts()[:, None]

    def rows(operand, gather, expert):
        rows_a_position = routing.slots // max(len(operand), 1)
        in_slots = operand[routing.order // rows_a_position] if gather else operand
        return jnp.where(expert_of_slot == expert, in_slots, 0).astype(jnp.float32)

    @jax.checkpoint  # whose residuals would be the rows of each expert
    def outer(expert):
        return jnp.dot(rows(x, gather_x, expert).T, rows(y, gather_y, expert), precision=lax.Precision.HIGHEST)

    return lax.map(outer, jnp.arange(len(routing.counts), dtype=jnp.int32)).astype(x.dtype)


def _xla(
    x: Float[Array, "x_rows K"],
    y: Float[Array, "y_rows N"],
    routing: Routing,
    *,
    gather_x: bool,
    gather_y: bool,
    static: bool,
) -> Float[Array, "experts K N"]:
    """Tile by tile: reads both's rows, and adds their product to the expert's."""

    def rows(operand, gather, slots):
        rows = positions(routing, slots) // (routing.slots // len(operand)) if gather else slots
        return jnp.where((slots < routing.slots)[:, None], operand.at[rows].get(mode="clip"), 0)

    def add_outer(expert, slots, out):
        product = lax.dot_general(
            rows(x, gather_x, slots),
            rows(y, gather_y, slots),
            (((0,), (0,)), ((), ())),
            precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        return out.at[expert].add(product)

    zeros = jnp.zeros_like(x, jnp.float32, shape=(len(routing.counts), x.shape[1], y.shape[1]))
    return each_tile(routing, add_outer, zeros, static=static).astype(x.dtype)


@functools.partial(jax.jit, static_argnames=("gather_x", "gather_y"))
def xla(x, y, routing: Routing, *, gather_x: bool, gather_y: bool) -> Float[Array, "experts K N"]:
    """The xla path: a loop over tiles, which has no work for experts without slots."""
    # On a GPU each step of a loop whose length lives on the device costs a host round trip, more than it saves.
    loop = functools.partial(_xla, gather_x=gather_x, gather_y=gather_y)
    return lax.platform_dependent(
        x, y, routing, cpu=functools.partial(loop, static=False), default=functools.partial(loop, static=True)
    )
