"""A mixture of experts: a feed-forward layer of which every token uses only the few experts that its router chose.

Tokens are read in the order of their experts, multiplied by them, and written back (`pallas_kernels.grouped_matmul`):
nothing is padded, and without a capacity no token is dropped. Which token goes where is data: it compiles nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.neuron_ffn.reference import ACTIVATIONS as ACTIVATION_FUNCTIONS
from pallas_kernels.operands import check_implementation
from pallas_kernels.unstructured_matmul import EXPAND_N, expand
from sparsellm.routers import (
    CosineRouter,
    LinearRouter,
    Router,
    RouterOutput,
    RouterRule,
    select_experts,
)
from sparsellm.sharding import sharded

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")
LECUN_NORMAL = nnx.initializers.lecun_normal(batch_axis=0)  # each expert as a layer of its own

__all__ = [
    "CosineRouter",
    "LinearRouter",
    "MixtureOfExperts",
    "Router",
    "RouterOutput",
    "RouterRule",
    "load_balance_loss",
    "z_loss",
]


class MixtureOfExperts(nnx.Module):
    """y = sum over the chosen experts e of weight_e * (activation(x @ wi[e] + wi_bias[e]) @ wo[e] + wo_bias[e]).

    What the router decided is captured: `y, captured = nnx.capture(model, nnx.Intermediate)(x)` holds a `RouterOutput`
    named "router" for each layer, and `load_balance_loss(captured)` and `z_loss(captured)` find them.

    A model that does more with dropped tokens than leave them to its residual stream calls the two halves itself:
        router = layer.route(x)
        y = layer.apply_experts(x, router)  # and router.kept and router.weights say the rest

    Example:
        router = LinearRouter(512, 8, RouterRule(top_k=2, renormalise=True), rngs=rngs)
        layer = MixtureOfExperts(512, 2048, router, activation="silu", gated=True, rngs=rngs)
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        router: Router,
        *,
        activation: str,
        gated: bool = False,
        bias: bool = False,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        kernel_init: nnx.Initializer = LECUN_NORMAL,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        """Makes the layer.

        Args:
            d_model: width of its input and output.
            d_ff: neurons of an expert.
            router: says how many experts there are, and which tokens they get.
            activation: "relu", "gelu" (exact), "gelu_tanh" or "silu".
            gated: wi's columns are gate then up, d_ff each, and the hidden layer is activation(gate) * up.
            bias: whether the two products have biases.
            dtype: what experts compute in, accumulating in float32. Routers compute in float32.
            param_dtype: what the experts' parameters are kept in.
            kernel_init: makes wi and wo, [experts, in, out].
            implementation: of the experts' products: "mosaic_gpu", "xla", "interpret", or None for the best.
            rngs: makes the parameters.

        Raises:
            ValueError: a size, the activation or the implementation is out of range.
        """
        for name, size in (("d_model", d_model), ("d_ff", d_ff)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1; got {name}={size}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got activation={activation!r}")
        check_implementation(implementation)
        self.d_model, self.activation, self.gated = d_model, activation, gated
        self.dtype, self.implementation = jnp.dtype(dtype), implementation
        self.router: Any = router
        experts, hidden = router.experts, 2 * d_ff if gated else d_ff

        def param(shape, axes, init):
            return nnx.Param(init(rngs.params(), shape, param_dtype), **sharded(*axes))

        # Stacks; or, once `compress` was there, a layer of all experts' neurons each.
        self.wi: Any = param((experts, d_model, hidden), ("expert", "embed", "ffn"), kernel_init)
        self.wo: Any = param((experts, d_ff, d_model), ("expert", "ffn", "embed"), kernel_init)
        zeros = nnx.initializers.zeros
        self.wi_bias = param((experts, hidden), ("expert", "ffn"), zeros) if bias else None
        self.wo_bias = param((experts, d_model), ("expert", "embed"), zeros) if bias else None

    def __call__(
        self, x: Float[Array, "*batch d_model"], mask: Bool[Array, "*batch"] | None = None
    ) -> Float[Array, "*batch d_model"]:
        """Sends every token through its experts.

        Args:
            x: the tokens. The last of the leading dimensions is the length of a sequence, for a capacity per sequence.
            mask: True for real tokens, False for padding, which goes to no expert; None if all are real.

        Returns:
            The output in `dtype`; zero at padding, and where no expert had room. Under a trace (jit, grad, vmap), where
            nothing can be raised, a token whose router logits are NaN is NaN, and no other token is affected.

        Raises:
            ValueError: shapes or dtypes do not fit; or, under no trace, router logits of a real token are NaN.
        """
        return self.apply_experts(x, self.route(x, mask))

    def route(self, x: Float[Array, "*batch d_model"], mask: Bool[Array, "*batch"] | None = None) -> RouterOutput:
        """Which experts each token goes to; arguments as of a call, tokens [*batch] as one dimension."""
        self._check(x, mask)
        tokens = x.reshape(-1, self.d_model)
        if mask is not None:  # else NaN at padding would get into the router's gradient
            mask = mask.reshape(-1)
            tokens = jnp.where(mask[:, None], tokens, 0)
        sequences = tokens.shape[0] // max(x.shape[-2], 1) if x.ndim > 1 else 1
        # A product's kernel that was asked for is no reason to route by one where there is none.
        path = "xla" if self.implementation == "xla" else None
        rule = self.router.rule
        router = select_experts(self.router(tokens), rule, mask=mask, sequences=sequences, implementation=path)
        if hasattr(self, "__captures__"):  # inside nnx.capture; elsewhere `sow` warns and would change the module
            self.sow(nnx.Intermediate, "router", router)
        return router

    def apply_experts(self, x: Float[Array, "*batch d_model"], router: RouterOutput) -> Float[Array, "*batch d_model"]:
        """The weighted sum of what the experts make of their tokens."""
        if isinstance(self.wi, nnx.Variable):
            wi, wo = (w[...].astype(self.dtype) for w in (self.wi, self.wo))
        elif router.ids.shape[0] > EXPAND_N:  # compressed, and too many tokens for every expert
            wi, wo = expand(self.wi.weights), expand(self.wo.weights).T
            wi, wo = (w.reshape(self.router.experts, -1, self.d_model) for w in (wi, wo))
        else:
            return self._apply_all_experts(x, router)
        wi_bias, wo_bias = self._biases()
        routing = router.routing
        h = grouped_matmul(
            x.reshape(-1, self.d_model).astype(self.dtype),
            wi,
            routing,
            wi_bias,
            gather=True,
            activation=self.activation,
            gated=self.gated,
            transposed=not isinstance(self.wi, nnx.Variable),  # out of a layer's weights, [out, in]
            implementation=self.implementation,
        )
        scale = router.weights.reshape(-1)[routing.order]
        y = grouped_matmul(h, wo, routing, wo_bias, scale, scatter=True, implementation=self.implementation)
        if routing.top_k > 1:
            y = y.reshape(-1, routing.top_k, self.d_model).sum(axis=1, dtype=jnp.float32).astype(self.dtype)
        return y.reshape(x.shape)

    def _apply_all_experts(self, x: Float[Array, "*batch d_model"], router: RouterOutput):
        """By compressed experts: as one block of all their neurons, where those of other experts are zero.

        Every expert is read, which few tokens may not need; but once, by two products for all of them. What is not
        finite among the weights of wo reaches every token, as zeros are multiplied by it too.
        """
        chosen = jax.nn.one_hot(router.ids, self.router.experts, dtype=jnp.bool) & router.kept[..., None]
        weights = jnp.where(chosen, router.weights[..., None], 0).sum(axis=1)  # a choice that is dropped may be NaN
        wi_bias, wo_bias = self._biases()
        h = self.wi(x.reshape(-1, self.d_model)).reshape(len(weights), self.router.experts, -1).astype(jnp.float32)
        h = h if wi_bias is None else h + wi_bias[None].astype(jnp.float32)
        gate, *up = jnp.split(h, 2, axis=2) if self.gated else [h]
        h = ACTIVATION_FUNCTIONS[self.activation](gate)
        h = h * up[0] if up else h
        h = jnp.where(chosen.any(axis=1)[..., None], h * weights[..., None], 0)  # NaN of wi stays within its expert
        y = self.wo(h.astype(self.dtype).reshape(len(weights), -1))
        if wo_bias is not None:
            y = y + jnp.dot(weights, wo_bias.astype(jnp.float32), precision=lax.Precision.HIGHEST).astype(y.dtype)
        return y.reshape(x.shape)

    def _biases(self) -> tuple[Array | None, Array | None]:
        wi_bias, wo_bias = (None if b is None else b[...].astype(self.dtype) for b in (self.wi_bias, self.wo_bias))
        return wi_bias, wo_bias

    def _check(self, x: Array, mask: Array | None) -> None:
        if x.ndim < 1 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must be [..., {self.d_model}]; got shape {x.shape}")
        if mask is not None and (mask.shape != x.shape[:-1] or mask.dtype != bool):
            rule = f"mask must be bool{list(x.shape[:-1])}, one for each token"
            raise ValueError(f"{rule}; got {mask.dtype}{list(mask.shape)}")


def load_balance_loss(outputs: Any) -> Float[Array, ""]:
    """experts * sum_i f_i P_i, summed over layers; f_i: share of tokens that chose expert i, P_i: its mean probability.

    It is top_k where all are chosen evenly. Choices count whether they were kept or not, padding does not. The paper
    multiplies it by 0.01.

    Args:
        outputs: a `RouterOutput`, or any pytree that holds some, as `nnx.capture` gives it.

    Raises:
        ValueError: there is none in it.

    Source: Switch Transformer, equations 4 to 6; top_k above 1 as in transformers' `load_balancing_loss_func`.
    """

    def loss(router: RouterOutput) -> Float[Array, ""]:
        chosen = jnp.broadcast_to(router.mask[:, None], router.ids.shape).astype(jnp.int32)
        counts = jnp.zeros(router.logits.shape[1], jnp.int32).at[router.ids].add(chosen).astype(jnp.float32)
        probability = _mean(jax.nn.softmax(router.logits), router.mask)
        return counts.size * jnp.dot(counts / _count(router.mask), probability, precision=lax.Precision.HIGHEST)

    return sum(map(loss, _routers(outputs)), jnp.float32(0))


def z_loss(outputs: Any) -> Float[Array, ""]:
    """Mean over tokens of logsumexp(logits)^2, added up over layers: it keeps logits small. Padding does not count.

    Args:
        outputs: as for `load_balance_loss`.

    Raises:
        ValueError: there is no `RouterOutput` in it.

    Source: ST-MoE (Zoph et al., 2022), equation 5, which multiplies it by 0.001.
    """

    def loss(router: RouterOutput) -> Float[Array, ""]:
        return _mean(jax.nn.logsumexp(router.logits, axis=1) ** 2, router.mask)

    return sum(map(loss, _routers(outputs)), jnp.float32(0))


def _routers(outputs: Any) -> list[RouterOutput]:
    leaves = jax.tree.leaves(outputs, is_leaf=lambda x: isinstance(x, RouterOutput))
    if found := [leaf for leaf in leaves if isinstance(leaf, RouterOutput)]:
        return found
    raise ValueError(f"outputs must hold a RouterOutput; got {jax.tree.structure(outputs)}: was the model captured?")


def _count(mask: Bool[Array, " tokens"]) -> Float[Array, ""]:
    return jnp.maximum(mask.sum(dtype=jnp.int32), 1).astype(jnp.float32)


def _mean(x: Float[Array, "tokens ..."], mask: Bool[Array, " tokens"]) -> Float[Array, "..."]:
    """Over the tokens that are not padding; 0 where there are none."""
    mask_x = mask.reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.where(mask_x, x, 0).sum(axis=0) / _count(mask)
