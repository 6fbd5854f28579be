"""What goes on inside a model's blocks: the model runs with recorders in their place.

A model is anything whose blocks are `model.layers`, each called with the hidden states first, with an attention
`self_attn` that ends in `out_proj` or `o_proj`. Their feed-forward part is a method `feed_forward`, called with its
input first, with "ffn_activation" captured, as OPT's; or a `MixtureOfExperts`, as Mixtral's.
"""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from sparsellm.checksum import checksum
from sparsellm.mixture_of_experts import MixtureOfExperts
from sparsellm.pruning.calibrate import RECORDED
from sparsellm.text import check_tokens


def see(graphdef: nnx.GraphDef, state: nnx.State, tokens: Int[Array, "batch length"]) -> list[dict[str, Array]]:
    """What each block sees of each token: the hidden states that enter it ("hidden"), its feed-forward block's inputs
    ("ffn_inputs") and activations ("fires"; of experts one after the other, zero where the token went elsewhere), and
    the norms of its heads' outputs ("head_norms").

    Raises:
        ValueError: it is not such a model.
    """
    model = nnx.merge(graphdef, state)
    blocks = [_Parts.of(block) for block in getattr(model, "layers", [model])]
    for block, parts in zip(model.layers, blocks, strict=True):
        block.__class__ = _recording(type(block))  # of a copy that lives for this trace
        attention = getattr(block.self_attn, parts.projection)
        attention.__class__ = RECORDED[nnx.Linear]
        if parts.experts:
            getattr(block, parts.experts).__class__ = RECORDED[MixtureOfExperts]
    _, captured = nnx.capture(model, nnx.Intermediate)(tokens)
    seen = []
    for i, parts in enumerate(blocks):
        layer = captured["layers"][i]
        outputs = layer["self_attn"][parts.projection]["kernel"][0].astype(jnp.float32)
        norms = jnp.linalg.norm(outputs.reshape(tokens.size, parts.heads, -1), axis=-1)
        if parts.experts:
            inputs, fires = _of_experts(layer[parts.experts])
        else:
            inputs, fires = _rows(layer["ffn_inputs"][0]), _rows(layer["ffn_activation"][0])
        seen.append({"hidden": _rows(layer["hidden"][0]), "ffn_inputs": inputs, "fires": fires, "head_norms": norms})
    return seen


@dataclasses.dataclass(frozen=True)
class _Parts:
    """Where a block has what is recorded.

    Attributes:
        projection: the name of what multiplies its heads' outputs.
        experts: the name of its experts; None if it has a method `feed_forward`.
        heads: how many.
    """

    projection: str
    experts: str | None
    heads: int

    @classmethod
    def of(cls, block: Any) -> "_Parts":
        attention: Any = getattr(block, "self_attn", None)
        names = [name for name in ("out_proj", "o_proj") if hasattr(attention, name)]
        mixtures = [name for name, part in vars(block).items() if isinstance(part, MixtureOfExperts)]
        if not names or not (mixtures or hasattr(block, "feed_forward")):
            rule = "blocks must have self_attn with out_proj or o_proj, and feed_forward or experts"
            raise ValueError(f"{rule}, as OPT's and Mixtral's; got {type(block).__name__}")
        projection = getattr(attention, names[0])
        if type(projection) not in RECORDED:
            rule = "activations are collected of a dense model, before it is compressed"
            raise ValueError(f"{rule}; self_attn.{names[0]} is a {type(projection).__name__}")
        heads = attention.heads if hasattr(attention, "heads") else attention.config.heads
        return cls(names[0], mixtures[0] if mixtures else None, heads)


def _rows(x: Float[Array, "... width"]) -> Float[Array, "rows width"]:
    return x.reshape(-1, x.shape[-1])


def _of_experts(captured: Any) -> tuple[Float[Array, "tokens d_model"], Float[Array, "tokens experts_times_d_ff"]]:
    """The inputs of a mixture, and what all experts' neurons make of each token."""
    (x, routing, _), (hidden, _, _) = captured["wi"][0], captured["wo"][0]
    experts = len(routing.counts)
    fires = jnp.zeros_like(hidden, shape=(len(x), experts, hidden.shape[1]))
    fires = fires.at[routing.order // routing.top_k, routing.slot_experts()].set(hidden, mode="drop")  # dropped slots
    return x, fires.reshape(len(x), -1)


def all_finite(seen: list[dict[str, Array]]) -> list[dict[str, Array]]:
    """Of what each block sees, whether all of it is finite."""
    return jax.tree.map(lambda x: jnp.isfinite(x).all(), seen)


@functools.cache
def _recording(block_type: type) -> type:
    """The blocks' type, with what comes into them and into their feed-forward part captured."""

    class Recording(block_type):
        def __call__(self, x, *arguments):
            self.sow(nnx.Intermediate, "hidden", x)
            return super().__call__(x, *arguments)

        def feed_forward(self, x, *arguments):
            self.sow(nnx.Intermediate, "ffn_inputs", x)
            return super().feed_forward(x, *arguments)

    return Recording


def fingerprint(model: Any) -> dict[str, Any]:
    """What tells a model from another: its sizes, and a checksum over rows of its embeddings.

    The same in any dtype and on any device, and not changed by pruning, which leaves embeddings alone; nor by what
    changes kernels alone, as recovery by LoRA.
    """
    names = ("layers", "d_model", "heads", "d_ff", "layer_sizes", "activation", "gated", "thresholds")
    described = {name: getattr(model.config, name, None) for name in names}
    embeddings = [module.embedding for _, module in nnx.iter_modules(model) if isinstance(module, nnx.Embed)]
    described["embedding"] = checksum([embedding[:64].astype(jnp.bfloat16) for embedding in embeddings])
    return json.loads(json.dumps(described))  # as it is read back


def check_windows(windows: np.ndarray, batch: int, model: Any) -> None:
    """Raises ValueError for what is no batch of windows of a model's tokens."""
    if windows.ndim != 2 or not windows.size:
        raise ValueError(f"windows must be [windows, length], at least one; got {list(windows.shape)}")
    if batch < 1 or len(windows) % batch:
        raise ValueError(f"batch must divide the number of windows; got batch={batch}, {len(windows)} windows")
    check_tokens(windows, model)


def check_finite(finite: list[dict[str, Any]], where: str) -> None:
    """Raises ValueError, naming the first of what `all_finite` found not to be."""
    broken = [f"layers.{i}.{kind}" for i, layer in enumerate(finite) for kind, good in layer.items() if not good]
    if broken:
        raise ValueError(f"activations must be finite; {broken[0]} is not in {where} (and {len(broken) - 1} more)")
