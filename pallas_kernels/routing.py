"""Which token goes to which expert: the order in which an expert's tokens are read, and where their results belong."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

MAX_SLOTS = 2**30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """Positions sorted by expert. Position `token * top_k + j` is the j-th choice of a token.

    A slot is a place in `order`. The first `counts[0]` slots are expert 0's, the next `counts[1]` expert 1's, and so
    on; the slots that are left are those of dropped positions, which no expert takes.

    Attributes:
        counts: slots of each expert, int32 [experts].
        order: position of each slot, int32 [slots]: a permutation of all positions.
        top_k: choices of a token; slots = tokens * top_k.
    """

    counts: Any  # not typed as arrays: as a pytree it also carries shapes, shardings and cotangents
    order: Any
    top_k: int = dataclasses.field(default=1, metadata={"static": True})

    @property
    def slots(self) -> int:
        """How many slots there are, dropped ones too."""
        return self.order.shape[0]

    def slot_experts(self) -> Int32[Array, " slots"]:
        """The expert of each slot; of a dropped one, one past the last."""
        ends = jnp.cumsum(self.counts, dtype=jnp.int32)
        slots = jnp.arange(self.slots, dtype=jnp.int32)
        return jnp.searchsorted(ends, slots, side="right").astype(jnp.int32)


def check_routing(routing: Routing) -> None:
    """Raises ValueError unless the shapes and dtypes are those of a routing. Values are traced, so not looked at."""
    for name in ("counts", "order"):
        array = getattr(routing, name)
        if array.ndim != 1 or array.dtype != jnp.int32:
            raise ValueError(f"routing.{name} must be int32 of rank 1; got {array.dtype}{list(array.shape)}")
    if routing.top_k < 1:
        raise ValueError(f"routing.top_k must be at least 1; got top_k={routing.top_k}")
    if routing.counts.shape[0] < 1:
        raise ValueError("routing.counts must name at least one expert; got none")
    if routing.slots % routing.top_k:
        rule = "routing.order must have tokens * top_k slots"
        raise ValueError(f"{rule}; got {routing.slots}, top_k={routing.top_k}")
    if routing.slots >= MAX_SLOTS:
        raise ValueError(f"routing.order must have fewer than 2**30 slots, which int32 counts; got {routing.slots}")
