"""OPT's feed-forward block: dense, over the micro-tiles that are live, or over the neurons that a predictor names.

    dense       fc2(a(fc1(x)))
    sparse      the same, where fc2 skips what no token of a block activates (`relu_matmul`, `gather_matmul`)
    predicted   the neurons predicted for any token of a batch, of both weights no other rows are read (`neuron_ffn`);
                each token computes all of them, or its own

With a gate, fc2(a(fc1(x)) * fc1_up(x)). Source of predicted decoding: Liu et al., "Deja Vu" (ICML 2023), section 4.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Shaped

from models.activations import ACTIVATIONS, SHIFT, fatrelu
from models.attention import Places
from models.layers import linear
from pallas_kernels import gather_matmul, neuron_ffn, relu_matmul
from pallas_kernels.micro_tile_index import compact, micro_tile_index
from pallas_kernels.neuron_ffn.config import MAX_BATCH
from sparsellm.predictors import Predictor
from sparsellm.sharding import sharded, sum_over_shards

type Prediction = Literal["lists", "mask", "mask_everywhere"]

PREDICTIONS = ("lists", "mask", "mask_everywhere")
LISTED = {"relu": "relu", "gelu": "gelu", "silu": "silu", "shifted_relu": "relu"}  # what neuron_ffn calls them


def output_init(config: Any) -> nnx.Initializer:
    """Layers that write to the residual stream start smaller, by 1/sqrt(2 L) (OPT's paper, section 2.2)."""
    return nnx.initializers.normal(config.init_std / (2 * config.layers) ** 0.5)


def capture(module: nnx.Module, name: str, value: Shaped[Array, "*shape"]) -> None:
    """Leaves an intermediate value to `nnx.capture`."""
    if hasattr(module, "__captures__"):  # inside of it; elsewhere `sow` warns and would change the module
        module.sow(nnx.Intermediate, name, value)


class NeuronMajorLinear(nnx.Module):
    """x @ weight.T + bias: each neuron's weights lie together, as in Hugging Face's files, whose word `weight` is."""

    def __init__(self, config: Any, d_model: int, neurons: int, *, rngs: nnx.Rngs):
        self.dtype, param_dtype = jnp.dtype(config.dtype), jnp.dtype(config.param_dtype)
        init = nnx.initializers.normal(config.init_std)
        self.weight = nnx.Param(init(rngs.params(), (neurons, d_model), param_dtype), **sharded("ffn", "embed"))
        self.bias = nnx.Param(jnp.zeros(neurons, param_dtype), **sharded("ffn"))

    @property
    def kernel(self) -> Float[Array, "d_model neurons"]:
        """As `nnx.Linear` has it."""
        return self.weight[...].T

    def __call__(self, x: Float[Array, "*tokens d_model"]) -> Float[Array, "*tokens neurons"]:
        x, weight, bias = (jnp.asarray(a, self.dtype) for a in (x, self.weight, self.bias))
        y = lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())))
        return y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


class FeedForward(nnx.Module):
    """A feed-forward block. A decoder layer is one, so that fc1 and fc2 have the names they have on the hub.

    Attributes:
        sparse_rows: tokens in a micro-tile, or None: see `OPTConfig`.
        predictor: which neurons a token will activate, or None: all are computed.
        prediction: what that is used for: see `models.opt.with_predictors`.
        per_sequence: whether tokens that decode together compute their own neurons only: likewise.
    """

    def __init__(self, config: Any, layer: int, *, rngs: nnx.Rngs):
        self.config = config
        d_model, d_ff = config.d_model, config.sizes(layer)[1]

        def up() -> nnx.Module:
            return linear(config, (d_model, d_ff), ("embed", "ffn"), bias=True, rngs=rngs)

        self.fc1: Any = NeuronMajorLinear(config, d_model, d_ff, rngs=rngs) if config.neuron_major else up()
        if config.gated:
            self.fc1_up = up()
        self.threshold = config.thresholds[layer] if config.thresholds else 0.0
        self.fc2 = linear(config, (d_ff, d_model), ("ffn", "embed"), init=output_init(config), bias=True, rngs=rngs)
        self.sparse_rows: int | None = config.rows(layer)
        self.predictor: Predictor | None = nnx.data(None)
        self.prediction: Prediction = "lists"
        self.per_sequence = False

    def feed_forward(
        self,
        x: Float[Array, "batch length d_model"],
        places: Places,
        entering: Float[Array, "batch length d_model"],
    ) -> Float[Array, "batch length d_model"]:
        """The block's output.

        Args:
            x: its input.
            places: where the tokens stand. Padding activates no neuron, so that it makes no micro-tile live.
            entering: what came into the decoder layer: a predictor that looks ahead reads it.
        """
        capture(self, "ffn_input", x)
        mask, fires = places.mask, self._predicted(x, places, entering)
        if fires is not None and self.prediction == "lists":
            y = self._listed(x, fires)
        elif fires is not None or self.sparse_rows is None:
            y = self._dense(x, mask, fires)
        else:
            y = self._sparse(x, mask, self.sparse_rows)
        capture(self, "ffn_output", y)
        return y

    def _predicted(self, x, places: Places, entering) -> Bool[Array, "#batch #length d_ff"] | None:
        """Which neurons to compute, or None for all: by token, or what any token of the batch is predicted to need."""
        if self.predictor is None:
            return None
        everywhere = self.prediction == "mask_everywhere"
        if not everywhere and not (places.decoding and len(x) <= MAX_BATCH):
            return None
        fires = self.predictor(entering if self.predictor.look_ahead else x) & places.mask[..., None]
        fires = fires if everywhere or self.per_sequence else fires.any(axis=0, keepdims=True)
        capture(self, "ffn_predicted", fires)
        return fires

    def _listed(self, x: Float[Array, "batch 1 d_model"], fires: Bool[Array, "#batch 1 d_ff"]):
        """Over the neurons that fire, for each token or for all: no other row of the weights is read."""
        rows = self.fc1.weight if self.config.neuron_major else self.fc1.kernel[...].T
        w1, b1, w2, b2 = (jnp.asarray(w, x.dtype) for w in (rows, self.fc1.bias, self.fc2.kernel, self.fc2.bias))
        b1 = b1 - SHIFT if self.config.activation == "shifted_relu" else b1

        def listed(x, fires, w1, b1, w2):
            neurons, counts = compact(fires.any(axis=0, keepdims=True))
            own = fires if len(fires) > 1 else None
            return neuron_ffn(x, w1, b1, w2, neurons[0], counts[0], LISTED[self.config.activation], own)

        y = sum_over_shards(listed, "ffn", (None, 1, 0, 0, 0), x[:, 0], fires[:, 0], w1, b1, w2)
        return y[:, None] + b2[None, None]

    def _dense(self, x, mask, fires: Bool[Array, "#batch #length d_ff"] | None):
        """Every neuron; those that are not to fire count as zero."""
        config = self.config
        h = ACTIVATIONS[config.activation](self.fc1(x))
        h = h if config.thresholds is None else fatrelu(h, self.threshold)
        h = jnp.where(mask[..., None], h, 0)
        if config.gated:
            capture(self, "ffn_gate", h.reshape(-1, h.shape[-1]))
            h = h * self._up(x)
        h = h if fires is None else jnp.where(fires, h, 0)
        capture(self, "ffn_activation", h.reshape(-1, h.shape[-1]))
        return self.fc2(h)

    def _sparse(self, x, mask, rows: int):
        """fc1 straight into k-major, [d_ff, tokens]: a neuron's values for the tokens of a micro-tile lie together."""
        config = self.config
        w1, b1, w2, b2 = (
            jnp.asarray(w, x.dtype) for w in (self.fc1.kernel, self.fc1.bias, self.fc2.kernel, self.fc2.bias)
        )
        offset = SHIFT if config.activation == "shifted_relu" else self.threshold

        def block(x, mask, w1, b1, w2, up=None):
            h_t, index = relu_matmul(x, w1, b1, rows, mask)
            if config.thresholds is not None:  # FATReLU gives what it has compared, without the offset
                h_t = jnp.where(h_t == 0, 0, h_t + offset)
            h_t = h_t if up is None else h_t * up.T
            if config.activation == "drelu":  # what the gate is multiplied with has zeros too
                index = micro_tile_index(h_t, rows)
            capture(self, "ffn_activation", h_t.T)
            return gather_matmul(h_t, w2, index, zero_elsewhere=True)

        arrays = [x.reshape(-1, x.shape[-1]), mask.reshape(-1), w1, b1 - offset, w2]
        if config.gated:
            arrays.append(self._up(x).reshape(len(arrays[0]), -1))
        axes = (None, None, 1, 0, 0, 1)[: len(arrays)]
        captured = hasattr(self, "__captures__")  # which a shard's activation cannot be
        out = block(*arrays) if captured else sum_over_shards(block, "ffn", axes, *arrays)
        return out.reshape(x.shape) + b2[None, None]

    def _up(self, x: Float[Array, "batch length d_model"]) -> Float[Array, "batch length d_ff"]:
        """What a gate's activation is multiplied with."""
        up = self.fc1_up(x)
        return jax.nn.relu(up) if self.config.activation == "drelu" else up
