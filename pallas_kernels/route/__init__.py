"""The experts that each token goes to, and the order in which experts read their tokens.

    ids[t] = the top_k experts e of largest scores[t, e];  order = the positions t * top_k + j, sorted by ids[t, j]

Layouts: `scores` is [tokens, experts], a token's scores contiguous. Work: tokens * experts * top_k comparisons; bytes:
the scores once, 8 * tokens * top_k of ids and order written.
Everything stays on the device: how many tokens an expert gets is data, not shape.

Measured on an H200, in us (xla in brackets): 4096 tokens to 64 experts 4.0 (14), to 256 7.5 (23); 16384 tokens to 2 of
8 experts 4.5 (19), to 8 of 128 17 (73).

Sources: Switch Transformer (JMLR'22), section 2.2, capacity; GShard (ICLR'21), algorithm 1, groups and the order of
choices; V-MoE (NeurIPS'21), section 4.1, batch-prioritised routing.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels import tuning
from pallas_kernels.operands import check_implementation, vary_together
from pallas_kernels.route.cases import CASES, peers, work
from pallas_kernels.route.mosaic import Config, check_config, check_support, configs, mosaic
from pallas_kernels.route.reference import reference
from pallas_kernels.route.xla import xla
from pallas_kernels.routing import MAX_SLOTS, Routing

DEVICES = ("NVIDIA H100", "NVIDIA H200")

__all__ = ["CASES", "DEVICES", "Config", "candidates", "peers", "reference", "route", "work"]


def candidates(scores, top_k: int, capacity=None, priority=None, mask=None, groups: int = 1) -> list[Config]:
    """Configs worth timing for these arguments (shapes are enough); the heuristic's choice comes first."""
    del top_k, capacity, priority, mask, groups
    return configs(scores.shape[0])


def route(
    scores: Float[Array, "tokens experts"],
    top_k: int,
    capacity: int | None = None,
    priority: Float32[Array, " tokens"] | None = None,
    mask: Bool[Array, " tokens"] | None = None,
    groups: int = 1,
    *,
    config: Config | None = None,
    implementation: str | None = None,
) -> tuple[Int32[Array, "tokens {top_k}"], Routing]:
    """Finds the `top_k` experts of each token, and sorts these choices by expert.

    Of equal scores the lower expert wins, and the experts of a token are always distinct. Integers come out: nothing to
    differentiate. NaN is an error, but only where values are known: under a trace (jit, grad, vmap) it counts as minus
    infinity, so it never wins while anything is left, and no other token is affected.

    With a `capacity`, all first choices of a group come before its second ones, and so on, and a choice is dropped
    where `capacity` positions of its group came to that expert before. Choices of the same rank come in order of token,
    or by falling `priority`. `ids` says what was chosen, dropped or not.

    Args:
        scores: of each expert, [tokens, experts]; bfloat16, float16 or float32.
        top_k: choices of a token.
        capacity: positions that an expert takes of a group; None takes all.
        priority: of each token where there is a capacity, higher first, of equal ones the lower token, NaN last; None
            serves tokens as they come. V-MoE and Tutel's batch-prioritised routing have the largest probability here.
        mask: False where a token is padding: it is dropped, and takes no room.
        groups: equal runs of consecutive tokens with a capacity each: the sequences of a batch for Switch
            Transformers as Hugging Face's transformers 4 has them.
        config: tiling of the Mosaic kernel; None takes the tuned one, or a heuristic.
        implementation: "mosaic_gpu" (Hopper), "xla" (anywhere), "interpret" (the Mosaic kernel on CPU under the race
            detector, slow), or None: the Mosaic kernel where it can run, else xla.

    Returns:
        ids: experts of each token by falling score, int32 [tokens, top_k].
        The routing: in `order`, an expert's positions ascend, and so do the dropped ones behind them.

    Raises:
        ValueError: the arguments do not fit together; or, under no trace, a token that is no padding has a NaN score.
        NotImplementedError: the asked implementation cannot take these arguments or this device.

    Source: GShard (ICLR'21), algorithm 1; V-MoE (NeurIPS'21), section 4.1.
    """
    scores = jnp.asarray(scores)
    _check(scores, top_k, capacity, priority, mask, groups)
    check_implementation(implementation)
    if config is not None:
        check_config(config)
    if not scores.size:
        return _nothing(scores, top_k)
    _check_numbers(scores, mask)
    if capacity is not None and capacity >= scores.shape[0] // groups:  # room for all: a token names an expert once
        capacity, priority, groups = None, None, 1

    def check(config: Config | None) -> None:
        check_support(scores, top_k, capacity, priority, groups, None if implementation == "interpret" else DEVICES)

    config = tuning.choose_config(
        "route", Config, (scores, top_k, capacity, priority, mask, groups), config, implementation, check=check,
        candidates=lambda *_: configs(scores.shape[0]),
    )  # fmt: skip
    scores = lax.stop_gradient(scores)
    with jax.enable_x64(False):  # under which a Python integer meets an int32 as one of its kind
        if config is None:
            return xla(scores, top_k, capacity, priority, mask, groups)
        out = mosaic(scores, top_k, capacity, mask, groups, config, interpret=implementation == "interpret")
    return vary_together(scores, out)[1]  # under shard_map a kernel's output does not say that it varies


def _nothing(scores, top_k: int) -> tuple[Int32[Array, "0 {top_k}"], Routing]:
    """No token, so no position."""
    zeros = jnp.zeros_like(scores, jnp.int32, shape=(scores.shape[1],))
    return zeros[:0, None].repeat(top_k, axis=1), Routing(counts=zeros, order=zeros[:0], top_k=top_k)


def _check(scores, top_k: int, capacity: int | None, priority, mask, groups: int) -> None:
    """Raises ValueError where the arguments of `route` do not fit together."""
    if scores.ndim != 2 or scores.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        rule = "scores must be bfloat16, float16 or float32 [tokens, experts]"
        raise ValueError(f"{rule}; got {scores.dtype}{list(scores.shape)}")
    tokens, experts = scores.shape
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k must be 1 to the number of experts; got top_k={top_k}, experts={experts}")
    if tokens * top_k >= MAX_SLOTS:
        raise ValueError(f"tokens * top_k must be less than 2**30; got tokens={tokens}, top_k={top_k}")
    if capacity is not None and capacity < 1:
        raise ValueError(f"capacity must be None or at least 1; got capacity={capacity}")
    if capacity is None and (priority is not None or groups != 1):
        raise ValueError(f"priority and groups must come with a capacity; got capacity=None, groups={groups}")
    if groups < 1 or tokens % groups:
        raise ValueError(f"groups must be at least 1 and divide tokens; got groups={groups}, tokens={tokens}")
    for name, array, dtype in (("priority", priority, jnp.float32), ("mask", mask, jnp.bool_)):
        if array is not None and (array.shape != (tokens,) or array.dtype != dtype):
            rule = f"{name} must be {jnp.dtype(dtype).name}[{tokens}], one for each token"
            raise ValueError(f"{rule}; got {array.dtype}{list(array.shape)}")


def _check_numbers(scores, mask) -> None:
    """Raises ValueError where a token that is no padding has a NaN score; under a trace it does nothing."""
    if isinstance(scores, Tracer) or isinstance(mask, Tracer):
        return
    is_nan = jnp.isnan(scores).any(axis=1)
    is_nan = is_nan if mask is None else is_nan & mask
    if isinstance(is_nan, Tracer):  # of a traced function's constants
        return
    found = np.flatnonzero(jax.device_get(is_nan))
    if found.size:
        got = f"NaN for {found.size} of {is_nan.size} tokens, the first is token {found[0]}"
        raise ValueError(f"scores (router logits) must not be NaN; got {got}")
