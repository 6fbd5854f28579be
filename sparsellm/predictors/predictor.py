"""Which neurons a token will activate, guessed from less than it takes to compute them.

A predictor is called with hidden states and answers with a mask. Whoever runs a model with it decides what the mask is
for: which rows of the weights are read, or which activations are set to zero.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

UNIFORM = functools.partial(nnx.initializers.variance_scaling, 1 / 3, "fan_in", "uniform")  # within 1/sqrt(fan in)


class PredictorParam(nnx.Variable):
    """A predictor's array; no `nnx.Param`, so that what trains, prunes or saves a model's parameters passes it by."""


class Predictor(nnx.Module):
    """A neuron is predicted to fire where its score is above the threshold.

    Attributes:
        d_model: width of x.
        neurons: how many are predicted.
        look_ahead: whether x is what enters the layer, before attention, so that the prediction runs beside attention;
            False: what enters the feed-forward block itself.
        threshold: float32 []; how many neurons of this layer are predicted follows from it.
    """

    d_model: int
    neurons: int
    look_ahead: bool
    threshold: PredictorParam

    def scores(self, x: Float[Array, "*tokens d_model"]) -> Float[Array, "*tokens neurons"]:
        """Float32, the higher the likelier."""
        raise NotImplementedError

    def __call__(self, x: Float[Array, "*tokens d_model"]) -> Bool[Array, "*tokens neurons"]:
        """Which neurons are predicted to fire."""
        return self.scores(x) > self.threshold[...]


class LowRankPredictor(Predictor):
    """The scores of all neurons are x @ down @ up, two thin products.

    Nothing lies between the products, so that the best that training can find is a linear classifier of this rank for
    every neuron. Heads are predicted by the same module: `neurons` is their number.

    Attributes:
        down: [d_model, rank].
        up: [rank, neurons].
        bias: float32 [neurons], added to the scores, or None: the published predictors have none.
        dtype: what the products' inputs are cast to; they are summed in float32.

    Source: Liu et al., "Deja Vu" (ICML 2023), section 3 and appendix.
    """

    def __init__(
        self,
        d_model: int,
        rank: int,
        neurons: int,
        *,
        threshold: float = 0.0,
        bias: bool = False,
        look_ahead: bool = False,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Random weights, uniform within 1/sqrt(fan in).

        Args:
            d_model: width of x.
            rank: of the product of both weights.
            neurons: how many are predicted.
            threshold: scores above it fire.
            bias: whether the scores have one; zero at first.
            look_ahead: what x will be.
            dtype: what the products' inputs are cast to.
            param_dtype: what `down` and `up` are kept in.
            rngs: for the weights.

        Raises:
            ValueError: a size is below 1.
        """
        for name, size in {"d_model": d_model, "rank": rank, "neurons": neurons}.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1; got {name}={size}")
        init = UNIFORM(dtype=jnp.dtype(param_dtype))
        self.d_model, self.neurons, self.look_ahead = d_model, neurons, look_ahead
        self.down = PredictorParam(init(rngs.params(), (d_model, rank)))
        self.up = PredictorParam(init(rngs.params(), (rank, neurons)))
        self.bias = PredictorParam(jnp.zeros(neurons, jnp.float32)) if bias else None
        self.threshold = PredictorParam(jnp.float32(threshold))
        self.dtype = jnp.dtype(dtype)

    @classmethod
    def from_arrays(
        cls,
        down: Float[Array, "d_model rank"],
        up: Float[Array, "rank neurons"],
        bias: Float[Array, " neurons"] | None = None,
        *,
        threshold: float = 0.0,
        look_ahead: bool = False,
    ) -> "LowRankPredictor":
        """The predictor of these weights, which computes in their dtype."""
        sizes = down.shape[0], down.shape[1], up.shape[1]
        options = {"bias": bias is not None, "look_ahead": look_ahead, "dtype": down.dtype}
        predictor = nnx.eval_shape(lambda: cls(*sizes, **options, rngs=nnx.Rngs(0)))
        predictor.down, predictor.up = PredictorParam(down), PredictorParam(up)
        predictor.bias = None if bias is None else PredictorParam(bias.astype(jnp.float32))
        predictor.threshold = PredictorParam(jnp.float32(threshold))
        return predictor

    @classmethod
    def from_svd(
        cls,
        kernel: Float[Array, "d_model neurons"],
        bias: Float[Array, " neurons"] | None = None,
        *,
        rank: int,
        threshold: float = 0.0,
    ) -> "LowRankPredictor":
        """What needs no training: the scores are fc1's own outputs, as well as a product of this rank can tell them.

        Raises:
            ValueError: the rank is not 1 to the kernel's smaller side.
        """
        if not 1 <= rank <= min(kernel.shape):
            raise ValueError(f"rank must be 1 to {min(kernel.shape)}; got rank={rank}")
        u, s, v = jnp.linalg.svd(kernel.astype(jnp.float32), full_matrices=False)
        root = jnp.sqrt(s[:rank])
        down, up = u[:, :rank] * root[None, :], root[:, None] * v[:rank]
        return cls.from_arrays(down.astype(kernel.dtype), up.astype(kernel.dtype), bias, threshold=threshold)

    def scores(self, x: Float[Array, "*tokens d_model"]) -> Float[Array, "*tokens neurons"]:
        scores = low_rank_product(x.astype(self.dtype), self.down[...], self.up[...])
        return scores if self.bias is None else jnp.add(*jnp.broadcast_arrays(scores, self.bias[...]))

    def in_8_bits(self) -> "EightBitPredictor":
        """The same predictor, each weight rounded to a byte."""
        return EightBitPredictor(self)


class EightBitPredictor(Predictor):
    """A low-rank predictor whose weights are bytes: while decoding, the time of a prediction is that of reading them.

    Attributes:
        down: float8_e4m3fn [rank, d_model]; what a product sums over lies together, which is read quickest.
        up: float8_e4m3fn [neurons, rank].
        down_scale, up_scale: float32 []; the largest weight is the format's largest number times it. Two parameters,
            since XLA would copy one of [2] apart in every layer of every step: 1.1 us on an H200.
        bias: as the low-rank predictor's.
        dtype: likewise: what is multiplied is in 8 bits only where it is kept.
    """

    def __init__(self, predictor: LowRankPredictor):
        """Of the low-rank predictor."""
        self.d_model, self.neurons, self.look_ahead = predictor.d_model, predictor.neurons, predictor.look_ahead
        (down, down_scale), (up, up_scale) = _narrow(predictor.down[...].T), _narrow(predictor.up[...].T)
        self.down, self.up = PredictorParam(down), PredictorParam(up)
        self.down_scale, self.up_scale = PredictorParam(down_scale), PredictorParam(up_scale)
        self.bias = None if predictor.bias is None else PredictorParam(predictor.bias[...])
        self.threshold = PredictorParam(predictor.threshold[...])
        self.dtype = predictor.dtype

    def scores(self, x: Float[Array, "*tokens d_model"]) -> Float[Array, "*tokens neurons"]:
        scores = x
        for weight, scale in ((self.down, self.down_scale), (self.up, self.up_scale)):
            weight, scores = weight[...].astype(self.dtype), scores.astype(self.dtype)
            contracted = (((scores.ndim - 1,), (1,)), ((), ()))
            scores = scale[...] * lax.dot_general(scores, weight, contracted, preferred_element_type=jnp.float32)
        return scores if self.bias is None else jnp.add(*jnp.broadcast_arrays(scores, self.bias[...]))


def _narrow(weight: Float[Array, "out in"]) -> tuple[Float[Array, "out in"], Float[Array, ""]]:
    """The weight in 8 bits, and what it is to be multiplied by."""
    largest = jnp.abs(weight).max().astype(jnp.float32)
    scale = jnp.where(largest > 0, largest, 1) / float(jnp.finfo(jnp.float8_e4m3fn).max)
    return (weight.astype(jnp.float32) / scale).astype(jnp.float8_e4m3fn), scale


class GatePredictor(Predictor):
    """The scores are how large a gate's outputs are: it costs the gate itself, and saves the rest of the block.

    Attributes:
        gate: x -> the gate's activations, [*tokens, neurons].

    Source: Lee et al., "CATS: Contextually-Aware Thresholding for Sparsity" (COLM 2024), section 4.
    """

    def __init__(
        self,
        kernel: Float[Array, "d_model neurons"],
        bias: Float[Array, " neurons"] | None,
        activation: Callable[[Array], Array],
        *,
        threshold: float = 0.0,
    ):
        """Of the gate activation(x @ kernel + bias)."""
        self.d_model, self.neurons = kernel.shape
        self.look_ahead = False
        self.kernel = PredictorParam(kernel)
        self.bias = None if bias is None else PredictorParam(bias)
        self.activation = activation
        self.threshold = PredictorParam(jnp.float32(threshold))

    def scores(self, x: Float[Array, "*tokens d_model"]) -> Float[Array, "*tokens neurons"]:
        gate = x @ self.kernel[...].astype(x.dtype)
        if self.bias is not None:
            gate = jnp.add(*jnp.broadcast_arrays(gate, self.bias[...].astype(x.dtype)))
        return jnp.abs(self.activation(gate)).astype(jnp.float32)


def low_rank_product(
    x: Float[Array, "*tokens d_model"], down: Float[Array, "d_model rank"], up: Float[Array, "rank neurons"]
) -> Float[Array, "*tokens neurons"]:
    """(x @ down) @ up in x's dtype, summed in float32 and returned so."""
    dtype = x.dtype
    x = jnp.matmul(x, down.astype(dtype), preferred_element_type=jnp.float32).astype(dtype)
    return jnp.matmul(x, up.astype(dtype), preferred_element_type=jnp.float32)
