"""Routers: which experts a token goes to, and how much each of them counts.

A router is any module that turns tokens into float32 logits, one an expert; a `RouterRule` says what follows from them:
how many experts, which weights, and what happens to tokens that an expert has no room for.
"""

import dataclasses
import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.route import route
from pallas_kernels.routing import Routing
from sparsellm.sharding import sharded

WEIGHTS = ("softmax", "softmax_top_k", "sigmoid")
DROPS = ("position", "priority")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterRule:
    """From logits to experts and weights.

    Attributes:
        top_k: experts a token goes to: those of its largest logits, of equal ones the first.
        weights: what an expert's output is multiplied by: its "softmax" over all experts, "softmax_top_k" over the
            chosen ones, or its "sigmoid".
        renormalise: divides a token's weights by their sum. With top_k=1 that leaves 1: such a router learns nothing.
        capacity_factor: an expert takes at most top_k * floor(capacity_factor * ceil(tokens / experts)) tokens, and one
            at least: Switch's tokens / experts * capacity_factor, rounded as Tutel does. None: as many as come.
        expert_capacity: the same as a number of tokens. At most one of the two is given.
        per_sequence: whether capacity is counted in each sequence by itself, or over the whole batch.
        drop: which tokens an expert that is full does not take: by "position" the last ones, by "priority" those whose
            best expert is the least sure (batch-prioritised routing). All first choices come before second ones.

    Source: Switch Transformer (Fedus et al., 2021), section 2.2; V-MoE (Riquelme et al., 2021), section 4; softmax and
    renormalise are Mixtral's weights (Jiang et al., 2024, section 2.1), softmax alone is Switch's.
    """

    top_k: int
    weights: str = "softmax"
    renormalise: bool = False
    capacity_factor: float | None = None
    expert_capacity: int | None = None
    per_sequence: bool = False
    drop: str = "position"

    def __post_init__(self):
        if self.top_k < 1:
            raise ValueError(f"top_k must be at least 1; got top_k={self.top_k}")
        for name, choices in (("weights", WEIGHTS), ("drop", DROPS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {name}={getattr(self, name)!r}")
        if self.capacity_factor is not None and not 0 < self.capacity_factor < math.inf:
            raise ValueError(f"capacity_factor must be positive, or None; got capacity_factor={self.capacity_factor}")
        if self.expert_capacity is not None and self.expert_capacity < 1:
            raise ValueError(f"expert_capacity must be at least 1, or None; got expert_capacity={self.expert_capacity}")
        if self.capacity_factor is not None and self.expert_capacity is not None:
            got = f"capacity_factor={self.capacity_factor}, expert_capacity={self.expert_capacity}"
            raise ValueError(f"at most one of capacity_factor and expert_capacity must be given; got {got}")

    def capacity(self, tokens: int, experts: int) -> int | None:
        """The most of `tokens` tokens that an expert takes; None where it takes all that come."""
        capacity = self.expert_capacity
        if self.capacity_factor is not None:
            capacity = max(1, self.top_k * int(self.capacity_factor * -(-tokens // experts)))
        return None if capacity is None or capacity >= tokens else capacity


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterOutput:
    """What a router decided.

    Attributes:
        logits: of every token and expert, float32 [tokens, experts].
        ids: the experts that each token chose, best first, whether they had room or not: int32 [tokens, top_k].
        weights: what their outputs are multiplied by, whether they had room or not: float32 [tokens, top_k].
        mask: False for padding, which goes to no expert: bool [tokens].
        routing: the choices that experts took, sorted by expert.
    """

    logits: Any  # not typed as arrays: as a pytree it also carries what vmap stacks, shapes and cotangents
    ids: Any
    weights: Any
    mask: Any
    routing: Routing

    @property
    def counts(self) -> Int32[Array, " experts"]:
        """Tokens that each expert took."""
        return self.routing.counts

    @property
    def kept(self) -> Bool[Array, "tokens top_k"]:
        """False where a choice was dropped: there was no room, or the token is padding."""
        slots = jnp.arange(self.routing.slots, dtype=jnp.int32)
        taken = slots < self.counts.sum(dtype=jnp.int32)
        return jnp.zeros_like(taken).at[self.routing.order].set(taken, unique_indices=True).reshape(self.ids.shape)


@runtime_checkable
class Router(Protocol):
    """What `MixtureOfExperts` needs of a router: an `nnx.Module` with these, whose logits are float32."""

    experts: int
    rule: RouterRule

    def __call__(self, x: Array, /) -> Array: ...


class LinearRouter(nnx.Linear):
    """x @ kernel, in float32 whatever `x` is."""

    def __init__(
        self,
        d_model: int,
        experts: int,
        rule: RouterRule,
        *,
        bias: bool = False,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_experts(experts, rule)
        self.experts, self.rule = experts, rule
        super().__init__(
            d_model,
            experts,
            use_bias=bias,
            dtype=jnp.float32,
            param_dtype=param_dtype,
            precision=lax.Precision.HIGHEST,
            kernel_metadata=sharded("embed", "router"),
            bias_metadata=sharded("router") if bias else {},
            rngs=rngs,
        )


class CosineRouter(nnx.Module):
    """Cosine between a projection of the token and each expert's embedding, over a learned temperature; in float32.

    Parameters carry Tutel's names. Source: "On the Representation Collapse of Sparse Mixture of Experts" (Chi et al.,
    2022), section 3; sizes, initial values and the limit of the temperature as in Tutel's `gates/cosine_top.py`.
    """

    PROJECTION = 256
    TEMPERATURE = 0.5
    LOWEST_TEMPERATURE = 0.01

    def __init__(self, d_model: int, experts: int, rule: RouterRule, *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        check_experts(experts, rule)
        self.experts, self.rule = experts, rule
        self.cosine_projector = nnx.Linear(
            d_model,
            self.PROJECTION,
            dtype=jnp.float32,
            param_dtype=param_dtype,
            precision=lax.Precision.HIGHEST,
            kernel_metadata=sharded("embed", "router"),
            bias_metadata=sharded("router"),
            rngs=rngs,
        )
        embeddings = nnx.initializers.normal(0.01)(rngs.params(), (self.PROJECTION, experts), param_dtype)
        self.sim_matrix = nnx.Param(embeddings, **sharded("router", "router_expert"))
        self.temperature = nnx.Param(jnp.full((1,), -math.log(self.TEMPERATURE), param_dtype))  # log(1 / temperature)

    def __call__(self, x: Float[Array, "*tokens d_model"]) -> Float[Array, "*tokens experts"]:
        """The logits of each token."""
        log_scale = jnp.minimum(self.temperature[...].astype(jnp.float32)[0], -math.log(self.LOWEST_TEMPERATURE))
        embeddings = _normalised(self.sim_matrix[...].astype(jnp.float32), axis=0)
        cosines = jnp.dot(_normalised(self.cosine_projector(x), axis=-1), embeddings, precision=lax.Precision.HIGHEST)
        return cosines * jnp.exp(log_scale)


def select_experts(
    logits: Float[Array, "tokens experts"],
    rule: RouterRule,
    *,
    mask: Bool[Array, " tokens"] | None = None,
    sequences: int = 1,
    implementation: str | None = None,
) -> RouterOutput:
    """Applies a rule to logits. NaN is an error of `route`; under a trace it makes its token's weights NaN, no other's.

    Args:
        logits: float32.
        rule: the rule.
        mask: False for padding; None if there is none.
        sequences: how many of equal length `tokens` holds, for a capacity per sequence.
        implementation: as for `route`.

    Raises:
        ValueError: under no trace, a token that is no padding has a NaN among its logits.
    """
    tokens, experts = logits.shape
    groups = sequences if rule.per_sequence else 1
    capacity, priority = rule.capacity(tokens // max(groups, 1), experts), None
    if capacity is None:
        groups = 1
    elif rule.drop == "priority":
        scores = jax.nn.sigmoid(logits) if rule.weights == "sigmoid" else jax.nn.softmax(logits)
        priority = scores.max(axis=1)
    ids, routing = route(logits, rule.top_k, capacity, priority, mask, groups, implementation=implementation)
    weights = _weights(logits, ids, rule)
    mask = jnp.ones(tokens, bool) if mask is None else mask
    return RouterOutput(logits=logits, ids=ids, weights=weights, mask=mask, routing=routing)


def _weights(logits, ids, rule: RouterRule) -> Float[Array, "tokens top_k"]:
    """Weights of the chosen experts, from logarithms: a sum of scores that all underflow is no divisor."""
    log_scores = jax.nn.log_sigmoid(logits) if rule.weights == "sigmoid" else jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(log_scores, ids, axis=1)
    sums_to_one = rule.renormalise or rule.weights == "softmax_top_k"
    weights = jax.nn.softmax(chosen) if sums_to_one else jnp.exp(chosen)
    # `route` passes a NaN over; what it should have come to, nobody knows.
    return jnp.where(jnp.isnan(logits).any(axis=1, keepdims=True), jnp.nan, weights)


def _normalised(x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """x over its norm; finite, and with a gradient, where that is zero."""
    return x * lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=axis, keepdims=True), 1e-24))


def check_experts(experts: int, rule: RouterRule) -> None:
    """Raises ValueError unless there are as many experts as a token chooses."""
    if experts < 1:
        raise ValueError(f"experts must be at least 1; got experts={experts}")
    if rule.top_k > experts:
        raise ValueError(f"top_k must be at most experts; got top_k={rule.top_k}, experts={experts}")
