"""The xla path of `route`: no sort, and nothing as long as the tokens is summed up one by one."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.routing import Routing

BLOCK = 128  # tokens whose prefix sums are one product with a triangular matrix
UNROLLED = 16  # choices taken one by one; beyond, sorting is quicker
INFINITY = 0x7F800000  # the bits of a float32
CHOSEN = -(2**31)  # below every key


def sortable(scores: Float[Array, "tokens experts"]) -> Int32[Array, "tokens experts"]:
    """Integers in the order of the scores: -0.0 equals 0.0, and NaN equals minus infinity."""
    bits = lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.int32)
    magnitude = bits & 0x7FFFFFFF
    keys = jnp.where(bits < 0, -magnitude, magnitude)
    return jnp.where(magnitude > INFINITY, -INFINITY, keys)


def top_experts(scores: Float[Array, "tokens experts"], top_k: int) -> Int32[Array, "tokens {top_k}"]:
    """The experts of the largest scores, in falling order; of equal ones the lower."""
    keys = sortable(scores)
    if top_k > UNROLLED:
        return lax.top_k(keys, top_k)[1]
    ids, expert = [], lax.broadcasted_iota(jnp.int32, keys.shape, 1)
    for _ in range(top_k):
        ids.append(lax.argmax(keys, 1, jnp.int32))
        keys = jnp.where(expert == ids[-1][:, None], CHOSEN, keys)
    return jnp.stack(ids, axis=1)


def earlier(
    experts_named: Int32[Array, "queues tokens choices"], experts: int
) -> tuple[Int32[Array, "queues tokens choices"], Int32[Array, "queues {experts}"]]:
    """How many earlier tokens of its queue name the same expert, and how many name each expert in all.

    Args:
        experts_named: distinct for a token; numbers from `experts` on name nobody.
        experts: how many there are.
    """
    queues, tokens, choices = experts_named.shape
    block = min(BLOCK, tokens)
    named = jnp.pad(experts_named, ((0, 0), (0, -tokens % block), (0, 0)), constant_values=experts)
    named = named.reshape(queues, -1, block, choices)
    is_named = jax.nn.one_hot(named, experts, dtype=jnp.bool_).any(axis=3)
    # Zeros and ones: exact in whatever precision the product is made.
    below = jnp.tril(jnp.ones((block, block), jnp.float32), -1)
    in_block = jnp.einsum("st,qbte->qbse", below, is_named.astype(jnp.float32)).astype(jnp.int32)
    counts = is_named.sum(axis=2, dtype=jnp.int32)
    through_block = jnp.cumsum(counts, axis=1)
    before = in_block + (through_block - counts)[:, :, None]
    own = jnp.take_along_axis(before, named, axis=3, mode="clip")
    return own.reshape(queues, -1, choices)[:, :tokens], through_block[:, -1]


def within_capacity(
    named: Int32[Array, "tokens top_k"],
    experts: int,
    capacity: int,
    priority: Float32[Array, " tokens"] | None,
    groups: int,
) -> Bool[Array, "tokens top_k"]:
    """Whether an expert has room when a position's turn comes: all first choices of a group before its second ones."""
    tokens, top_k = named.shape
    queue = named.reshape(groups, tokens // groups, top_k)
    if priority is not None:
        turns = jnp.argsort(-priority.reshape(groups, -1), axis=1, stable=True)
        in_turn = jnp.arange(groups)[:, None], turns
        queue = queue[in_turn]
    before, _ = earlier(queue.swapaxes(1, 2).reshape(groups, -1, 1), experts)
    has_room = before.reshape(groups, top_k, -1).swapaxes(1, 2) < capacity
    if priority is not None:
        has_room = jnp.zeros_like(has_room).at[in_turn].set(has_room, unique_indices=True)
    return has_room.reshape(tokens, top_k)


def sort_by_expert(named: Int32[Array, "tokens top_k"], experts: int, *, drops: bool) -> Routing:
    """Sorts the positions by the expert they name; those that name nobody, if `drops`, come last."""
    tokens, top_k = named.shape
    before, counts = earlier(named[None], experts)
    counts = counts[0]
    ends = jnp.cumsum(counts)
    slots = (before[0] + (ends - counts).at[named].get(mode="clip")).ravel()
    if drops:
        is_dropped = named.ravel() == experts
        slots = jnp.where(is_dropped, ends[-1] - 1 + jnp.cumsum(is_dropped, dtype=jnp.int32), slots)
    positions = jnp.arange(tokens * top_k, dtype=jnp.int32)
    order = jnp.zeros_like(positions).at[slots].set(positions, unique_indices=True)
    return Routing(counts=counts, order=order, top_k=top_k)


def xla(
    scores: Float[Array, "tokens experts"],
    top_k: int,
    capacity: int | None,
    priority: Float32[Array, " tokens"] | None,
    mask: Bool[Array, " tokens"] | None,
    groups: int,
) -> tuple[Int32[Array, "tokens {top_k}"], Routing]:
    """`route` of at least one token."""
    experts = scores.shape[1]
    ids = named = top_experts(scores, top_k)
    if mask is not None:
        named = jnp.where(mask[:, None], named, experts)
    if capacity is not None:
        named = jnp.where(within_capacity(named, experts, capacity, priority, groups), named, experts)
    return ids, sort_by_expert(named, experts, drops=named is not ids)
