"""The reference of `route`, by sorting."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.routing import Routing


def reference(
    scores: Float[Array, "tokens experts"],
    top_k: int,
    capacity: int | None = None,
    priority: Float32[Array, " tokens"] | None = None,
    mask: Bool[Array, " tokens"] | None = None,
    groups: int = 1,
) -> tuple[Int32[Array, "tokens {top_k}"], Routing]:
    """A stable sort of each token's scores, one of the queue before each expert, and one of what the experts take."""
    tokens, experts = scores.shape
    falling = -jnp.where(jnp.isnan(scores), -jnp.inf, scores.astype(jnp.float32))
    ids = jnp.argsort(falling, axis=1, stable=True)[:, :top_k].astype(jnp.int32)

    token, choice = (x.ravel() for x in jnp.indices(ids.shape, jnp.int32))
    is_taken = jnp.ones(token.shape, bool) if mask is None else mask[token]
    if capacity is not None:
        turn = jnp.zeros(tokens) if priority is None else -priority
        queue = jnp.lexsort((turn[token], choice))  # stable, so by token where these are equal
        expert_of_group = token // max(tokens // groups, 1) * experts + ids.ravel()
        expert_of_group = jnp.where(is_taken, expert_of_group, groups * experts)[queue]
        by_expert = jnp.argsort(expert_of_group, stable=True)
        in_line = expert_of_group[by_expert]
        served_before = jnp.arange(token.size) - jnp.searchsorted(in_line, in_line)
        is_taken &= jnp.zeros_like(is_taken).at[queue[by_expert]].set(served_before < capacity)

    expert = jnp.where(is_taken, ids.ravel(), experts)
    order = jnp.argsort(expert, stable=True).astype(jnp.int32)
    counts = jnp.bincount(expert, length=experts + 1)[:experts].astype(jnp.int32)
    return ids, Routing(counts=counts, order=order, top_k=top_k)
