"""How sparse activations are, counted while a model reads a text; nothing else is kept."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int, Int64

from sparsellm.activations.recording import all_finite, check_finite, check_windows, see
from sparsellm.micro_tiles import MicroTile, live_micro_tiles

SPANS = (1, 8, 16, 32, 64, 128, 256)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    """How sparse the feed-forward activations of a model are.

    Attributes:
        tokens: that were counted.
        fires: of each layer, how many tokens each neuron fires for.
        union: by number of consecutive tokens, of each layer: the share of neurons that fire for any of them.
    """

    tokens: int
    fires: list[Int64[np.ndarray, " neurons"]]
    union: dict[int, list[float]]


def measure(
    model: Any, windows: Int[np.ndarray, "windows length"], *, spans: Sequence[int] = SPANS, batch: int = 1
) -> Statistics:
    """Counts what fires while the model reads windows of tokens; keeps nothing but the counts.

    Args:
        model: see the module.
        windows: tokens, no padding.
        spans: numbers of consecutive tokens, none longer than a window, of which a rest is left out.
        batch: windows at once, a divisor of their number.

    Raises:
        ValueError: an argument is out of range, or activations are not finite.
    """
    check_windows(windows, batch, model)
    if not all(1 <= span <= windows.shape[1] for span in spans):
        raise ValueError(f"spans must be 1 to {windows.shape[1]}, the length of a window; got spans={tuple(spans)}")
    graphdef, state = nnx.split(model)
    total: Any = None
    for start in range(0, len(windows), batch):
        tokens = jnp.asarray(windows[start : start + batch], jnp.int32)
        counts, finite = jax.device_get(_count(graphdef, tuple(spans), state, tokens))
        check_finite(finite, f"windows {start} to {start + batch - 1}")
        counts = jax.tree.map(lambda x: x.astype(np.int64), counts)
        total = counts if total is None else jax.tree.map(np.add, total, counts)
    fires = [layer["fires"] for layer in total]
    union = {}
    for i, span in enumerate(spans):
        blocks = len(windows) * (windows.shape[1] // span)
        union[span] = [float(layer["live"][i]) / (blocks * len(layer["fires"])) for layer in total]
    return Statistics(tokens=windows.size, fires=fires, union=union)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _count(graphdef: nnx.GraphDef, spans: tuple[int, ...], state: nnx.State, tokens: Int[Array, "batch length"]):
    """Of each layer the tokens that each neuron fires for, and live micro-tiles by span; and what of it is finite."""
    seen = see(graphdef, state, tokens)
    batch, length = tokens.shape
    counts = []
    for layer in seen:
        fires = layer["fires"] != 0
        by_window = fires.reshape(batch, length, -1)
        live = []
        for span in spans:
            whole = by_window[:, : length // span * span].reshape(-1, fires.shape[1])
            live.append(live_micro_tiles(whole, MicroTile(span, 1)).sum(dtype=jnp.int32))
        counts.append({"fires": fires.sum(axis=0, dtype=jnp.int32), "live": live})
    return counts, all_finite(seen)
