"""What goes on inside a model's blocks: the model runs with recorders in their place.

A model is anything whose blocks are `model.layers`, each called with the hidden states first, with a method
`feed_forward` called with its input first, an attention `self_attn.out_proj`, and "ffn_activation" captured, as OPT.
"""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Int

from sparsellm.pruning.calibrate import RECORDED


def see(graphdef: nnx.GraphDef, state: nnx.State, tokens: Int[Array, "batch length"]) -> list[dict[str, Array]]:
    """What each block sees of each token: the hidden states that enter it ("hidden"), its feed-forward block's inputs
    ("ffn_inputs") and activations ("fires"), and the norms of its heads' outputs ("head_norms").

    Raises:
        ValueError: it is not such a model.
    """
    model = nnx.merge(graphdef, state)
    for block in getattr(model, "layers", [model]):
        if not (hasattr(block, "feed_forward") and hasattr(getattr(block, "self_attn", None), "out_proj")):
            raise ValueError(
                f"blocks must have feed_forward and self_attn.out_proj, as OPT's; got {type(block).__name__}"
            )
    heads = [block.self_attn.heads for block in model.layers]
    for block in model.layers:
        block.__class__ = _recording(type(block))  # of a copy that lives for this trace
        block.self_attn.out_proj.__class__ = RECORDED[nnx.Linear]
    _, captured = nnx.capture(model, nnx.Intermediate)(tokens)
    rows = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
    seen = []
    for i, count in enumerate(heads):
        layer = captured["layers"][i]
        outputs = layer["self_attn"]["out_proj"]["kernel"][0].astype(jnp.float32)
        norms = jnp.linalg.norm(outputs.reshape(tokens.size, count, -1), axis=-1)
        hidden, inputs, activation = (rows(layer[name][0]) for name in ("hidden", "ffn_inputs", "ffn_activation"))
        seen.append({"hidden": hidden, "ffn_inputs": inputs, "fires": activation, "head_norms": norms})
    return seen


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


def checksum(arrays: Any) -> int:
    """Of the arrays' bits; integers, so that any device finds the same."""
    return int(sum(int(_sum_of_bits(x)) for x in jax.tree.leaves(arrays)) % 2**32)


@jax.jit
def _sum_of_bits(x: Array) -> Array:
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    return lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32).sum(dtype=jnp.uint32)


def check_windows(windows: np.ndarray, batch: int) -> None:
    """Raises ValueError for what is no batch of windows."""
    if windows.ndim != 2 or not windows.size:
        raise ValueError(f"windows must be [windows, length], at least one; got {list(windows.shape)}")
    if batch < 1 or len(windows) % batch:
        raise ValueError(f"batch must divide the number of windows; got batch={batch}, {len(windows)} windows")


def check_finite(finite: list[dict[str, Any]], where: str) -> None:
    """Raises ValueError, naming the first of what `all_finite` found not to be."""
    broken = [f"layers.{i}.{kind}" for i, layer in enumerate(finite) for kind, good in layer.items() if not good]
    if broken:
        raise ValueError(f"activations must be finite; {broken[0]} is not in {where} (and {len(broken) - 1} more)")
