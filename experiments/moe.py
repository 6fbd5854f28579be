"""What experiments on mixtures of experts share: the layer in plain JAX, and its reference.

`one_hot`, `ragged_dot` and `balanced` are what is written without kernels: the first two compute what
`MixtureOfExperts.apply_experts` does, the third the least that any way of computing it has to do.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.grouped_matmul.reference import ACTIVATIONS, finish
from pallas_kernels.routing import Routing
from sparsellm.mixture_of_experts import MixtureOfExperts
from sparsellm.routers import RouterOutput

VARIANTS = ("sparse", "xla", "one_hot")


def weights(layer: MixtureOfExperts) -> tuple[Array, Array, Array | None, Array | None]:
    """wi, wo, wi_bias and wo_bias in the layer's dtype."""
    wi_bias, wo_bias = (
        None if bias is None else bias[...].astype(layer.dtype) for bias in (layer.wi_bias, layer.wo_bias)
    )
    return layer.wi[...].astype(layer.dtype), layer.wo[...].astype(layer.dtype), wi_bias, wo_bias


def one_hot(
    layer: MixtureOfExperts, x: Float[Array, "tokens d_model"], router: RouterOutput
) -> Float[Array, "tokens d_model"]:
    """Dense dispatch: every expert multiplies every token, and a row of weights, most of them zero, sums up."""
    wi, wo, wi_bias, wo_bias = weights(layer)
    h = _einsum("td,edh->eth", x, wi)
    h = _activate(layer, h if wi_bias is None else h + wi_bias[:, None])
    y = _einsum("eth,ehd->etd", h, wo)
    y = y if wo_bias is None else y + wo_bias[:, None]
    kept = jnp.where(router.kept, router.weights, 0)
    token = jnp.arange(len(x), dtype=jnp.int32)[:, None]
    combine = jnp.zeros_like(router.logits).at[token, router.ids].add(kept)
    return jnp.sum(combine.T[:, :, None] * y.astype(jnp.float32), axis=0).astype(x.dtype)


def ragged_dot(
    layer: MixtureOfExperts, x: Float[Array, "tokens d_model"], router: RouterOutput
) -> Float[Array, "tokens d_model"]:
    """The same three steps as the layer's, with XLA's own product of ragged groups in place of the kernel."""
    wi, wo, wi_bias, wo_bias = weights(layer)
    routing, scale = router.routing, router.weights.reshape(-1)[router.routing.order]
    h = ragged_product(x[routing.order // routing.top_k], wi, routing).astype(jnp.float32)
    h = finish(h, _of_slots(wi_bias, routing), None, layer.activation, layer.gated).astype(x.dtype)
    y = ragged_product(h, wo, routing).astype(jnp.float32)
    y = finish(y, _of_slots(wo_bias, routing), scale, None, False)
    y = jnp.where((routing.slot_experts() < len(wi))[:, None], y, 0)
    y = jnp.zeros_like(y).at[routing.order].set(y, unique_indices=True)
    return y.reshape(*router.ids.shape, -1).sum(axis=1).astype(x.dtype)


def ragged_product(x: Float[Array, "slots K"], w: Float[Array, "experts K N"], routing: Routing):
    """x's rows, in order of experts, times their expert's weights: [slots, N]."""
    return lax.ragged_dot(x, w, routing.counts, precision=lax.Precision.HIGHEST)


def _of_slots(bias: Array | None, routing: Routing) -> Array | None:
    return None if bias is None else bias.at[routing.slot_experts()].get(mode="fill", fill_value=0)


def balanced(layer: MixtureOfExperts, x: Float[Array, "experts rows d_model"]) -> Float[Array, "experts rows d_model"]:
    """Only the products, for equally many tokens of each expert that lie in its order already: no routing, no sum."""
    wi, wo, _, _ = weights(layer)
    return batched_product(_activate(layer, batched_product(x, wi)), wo)


def batched_product(x: Float[Array, "experts rows K"], w: Float[Array, "experts K N"]):
    """x[e] @ w[e] for each expert."""
    return _einsum("erk,ekn->ern", x, w)


def _einsum(dimensions: str, x: Array, w: Array) -> Array:
    return jnp.einsum(dimensions, x, w, precision=lax.Precision.HIGHEST)  # float32 as exact as in our kernels


def _activate(layer: MixtureOfExperts, h: Array) -> Array:
    gate, up = jnp.split(h, 2, axis=-1) if layer.gated else (h, None)
    h = ACTIVATIONS[layer.activation](gate)
    return h if up is None else h * up


def reference(module: MixtureOfExperts, x: Float[Array, "tokens d_model"]) -> Float[Array, "tokens d_model"]:
    """Every expert on every token in float32, and the sum by weights that are made anew."""
    return _reference(*nnx.split(module), x)


@functools.partial(jax.jit, static_argnums=0)
def _reference(graphdef: nnx.GraphDef, params: nnx.State, x: Float[Array, "tokens d_model"]):
    module, x = nnx.merge(graphdef, params), x.astype(jnp.float32)
    experts = module.router.experts
    logits = module.router(x)
    chosen, ids = lax.top_k(logits, module.router.rule.top_k)
    normaliser = jax.nn.logsumexp(chosen if module.router.rule.top_k > 1 else logits, axis=1, keepdims=True)
    combine = jnp.exp(chosen - normaliser)
    wi, wo, wi_bias, _ = weights(module)
    wi_bias = jnp.zeros_like(wi, shape=(experts, wi.shape[2])) if wi_bias is None else wi_bias

    def add(total, of_expert):
        expert, *parameters = of_expert
        wi, wo, bias = (w.astype(jnp.float32) for w in parameters)
        h = jnp.dot(x, wi, precision=lax.Precision.HIGHEST) + bias[None]
        gate, up = jnp.split(h, 2, axis=1) if module.gated else (h, jnp.ones_like(h))
        y = jnp.dot(ACTIVATIONS[module.activation](gate) * up, wo, precision=lax.Precision.HIGHEST)
        return total + jnp.where(ids == expert, combine, 0).sum(axis=1, keepdims=True) * y, None

    return lax.scan(add, jnp.zeros_like(x), (jnp.arange(experts, dtype=jnp.int32), wi, wo, wi_bias))[0]


@jax.jit
def product_reference(
    x: Float[Array, "rows K"], w: Float[Array, "experts K N"], experts: Int[Array, " rows"]
) -> Float[Array, "rows N"]:
    """Each row times its expert's weights, in float32."""

    def add(total, of_expert):
        expert, w = of_expert
        product = jnp.dot(x.astype(jnp.float32), w.astype(jnp.float32), precision=lax.Precision.HIGHEST)
        return jnp.where(experts[:, None] == expert, product, total), None

    zeros = jnp.zeros((len(x), w.shape[2]), jnp.float32)
    return lax.scan(add, zeros, (jnp.arange(len(w), dtype=jnp.int32), w))[0]


class OneHot(nnx.Module):
    """A layer with its own routing and parameters, computed by `one_hot`."""

    def __init__(self, layer: MixtureOfExperts):
        self.layer = layer

    def __call__(
        self, x: Float[Array, "*batch d_model"], mask: Bool[Array, "*batch"] | None = None
    ) -> Float[Array, "*batch d_model"]:
        """As the layer's."""
        tokens = x.reshape(-1, x.shape[-1]).astype(self.layer.dtype)
        return one_hot(self.layer, tokens, self.layer.route(x, mask)).reshape(x.shape)


def with_experts(model: nnx.Module, variant: str) -> nnx.Module:
    """A model on the same parameters, whose mixtures of experts are computed in another way.

    Args:
        model: is left as it is.
        variant: "sparse" (the best path there is), "xla" (the same without kernels) or "one_hot".

    Raises:
        ValueError: there is no such variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}; got {variant!r}")
    copy = nnx.merge(*nnx.split(model))
    for _, parent in list(nnx.iter_modules(copy)):
        for name, child in list(vars(parent).items()):
            if isinstance(child, MixtureOfExperts):
                child.implementation = None if variant == "sparse" else "xla"
                if variant == "one_hot":
                    setattr(parent, name, OneHot(child))
    return copy
