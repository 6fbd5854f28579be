"""The layer and its routers against numpy in float64, token by token; its gradients against dense dispatch."""

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from sparsellm.mixture_of_experts import (
    CosineRouter,
    LinearRouter,
    MixtureOfExperts,
    RouterOutput,
    RouterRule,
    load_balance_loss,
    z_loss,
)
from sparsellm.routers import select_experts

D, FF, EXPERTS = 12, 20, 5
ERF = np.vectorize(math.erf)
ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * (1 + ERF(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def f64(x) -> np.ndarray:
    return np.asarray(x, np.float64)


def softmax(x):
    scores = np.exp(x - x.max(axis=-1, keepdims=True))
    return scores / scores.sum(axis=-1, keepdims=True)


def numpy_router(logits, *, top_k, weights="softmax", renormalise=False, room=None, by=None, groups=1, mask=None):
    """ids, weights and kept, [tokens, top_k]: every choice asks its expert for room, first choices first."""
    tokens, experts = logits.shape
    mask = np.ones(tokens, bool) if mask is None else mask
    scores = 1 / (1 + np.exp(-logits)) if weights == "sigmoid" else softmax(logits)
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
    chosen = np.take_along_axis(scores, ids, axis=1)
    if renormalise or weights == "softmax_top_k":
        chosen = chosen / chosen.sum(axis=1, keepdims=True)
    kept = np.zeros((tokens, top_k), bool)
    for group in np.arange(tokens).reshape(groups, -1):
        line = sorted(group, key=lambda t: -scores[t].max()) if by == "priority" else group
        taken = np.zeros(experts, int)
        for j in range(top_k):
            for t in line:
                if mask[t] and (room is None or taken[ids[t, j]] < room):
                    kept[t, j] = True
                    taken[ids[t, j]] += 1
    return ids, chosen, kept


def numpy_experts(layer, x, ids, weights, kept):
    """Token by token, expert by expert."""
    wi, wo = f64(layer.wi[...]), f64(layer.wo[...])
    biases = (layer.wi_bias, layer.wo_bias)
    wi_bias, wo_bias = (0 * w[:, 0] if b is None else f64(b[...]) for w, b in zip((wi, wo), biases, strict=True))
    out = np.zeros_like(x)
    for t, j in np.argwhere(kept):
        e = ids[t, j]
        h = x[t] @ wi[e] + wi_bias[e]
        gate, up = np.split(h, 2) if layer.gated else (h, 1)
        out[t] += weights[t, j] * ((ACTIVATIONS[layer.activation](gate) * up) @ wo[e] + wo_bias[e])
    return out


def make_layer(rule: RouterRule, *, cosine=False, seed=0, **options: Any) -> MixtureOfExperts:
    rngs = nnx.Rngs(seed)
    router = (CosineRouter if cosine else LinearRouter)(D, EXPERTS, rule, rngs=rngs)
    options = {"activation": "relu"} | options
    layer = MixtureOfExperts(D, FF, router, **options, rngs=rngs)
    for bias in (layer.wi_bias, layer.wo_bias):
        if bias is not None:  # they start at zero, where a test would not see them
            bias[...] = jax.random.normal(rngs.params(), bias.shape, bias.dtype)
    return layer


@jax.jit(static_argnums=0)
def run(graphdef, state, x, mask):
    y, captured = nnx.capture(nnx.merge(graphdef, state), nnx.Intermediate)(x, mask)
    router = captured["router"][0]
    return y, router, router.kept


def call(layer, x, mask=None):
    """The output, the RouterOutput and what of it was kept."""
    return run(*nnx.split(layer), x, mask)


select = jax.jit(select_experts, static_argnames=("rule",))


def assert_close(out, ref, bound=2e-6):
    out, ref = f64(out), f64(ref)
    assert out.shape == ref.shape
    assert np.linalg.norm(out - ref) <= bound * max(np.linalg.norm(ref), 1e-30)


LAYERS = {
    "switch": ({"top_k": 1}, {}),
    "mixtral": ({"top_k": 2, "renormalise": True}, {"activation": "silu", "gated": True}),
    "every expert": ({"top_k": EXPERTS, "weights": "softmax_top_k"}, {"activation": "gelu_tanh", "bias": True}),
    "sigmoid": ({"top_k": 2, "weights": "sigmoid"}, {"activation": "gelu", "gated": True, "bias": True}),
    "gshard": ({"top_k": 3, "weights": "sigmoid", "renormalise": True, "capacity_factor": 0.75}, {"bias": True}),
    "v-moe": ({"top_k": 2, "capacity_factor": 0.5, "drop": "priority"}, {"activation": "gelu", "bias": True}),
    "switch of transformers 4": ({"top_k": 1, "expert_capacity": 2, "per_sequence": True}, {}),
}


@pytest.mark.parametrize("rule, options", LAYERS.values(), ids=LAYERS)
def test_layer_against_numpy(rule, options):
    rng = np.random.default_rng(7)
    layer = make_layer(RouterRule(**rule), **options)
    x = rng.normal(size=(4, 11, D)).astype(np.float32)
    tokens = f64(x).reshape(-1, D)
    factor, room = rule.get("capacity_factor"), rule.get("expert_capacity")
    room = rule["top_k"] * int(factor * 9) if factor else room  # 9 = ceil(44 tokens / 5 experts)
    for mask in (np.ones((4, 11), bool), rng.random((4, 11)) < 0.7):
        ids, weights, kept = numpy_router(
            tokens @ f64(layer.router.kernel[...]),
            top_k=rule["top_k"],
            weights=rule.get("weights", "softmax"),
            renormalise=rule.get("renormalise", False),
            room=room,
            by=rule.get("drop"),
            groups=4 if rule.get("per_sequence") else 1,
            mask=mask.reshape(-1),
        )
        assert kept.sum() < mask.sum() * rule["top_k"] or room is None  # where there is a limit, it is felt
        out, router, own_kept = call(layer, jnp.asarray(x), jnp.asarray(mask))
        real = mask.reshape(-1)
        np.testing.assert_array_equal(router.ids[real], ids[real])
        np.testing.assert_array_equal(own_kept, kept)
        np.testing.assert_array_equal(router.counts, np.bincount(ids[kept], minlength=EXPERTS))
        assert_close(router.weights[real], weights[real])
        assert_close(out.reshape(-1, D), numpy_experts(layer, tokens, ids, weights, kept))
        assert not np.any(f64(out).reshape(-1, D)[~kept.any(axis=1)])


def test_without_a_mask_all_tokens_are_real(getkey):
    layer = make_layer(RouterRule(top_k=1, capacity_factor=0.5, drop="priority"))
    x = jax.random.normal(getkey(), (23, D))
    for own, ref in zip(*map(jax.tree.leaves, (call(layer, x), call(layer, x, jnp.ones(23, bool)))), strict=True):
        np.testing.assert_array_equal(own, ref)


def dense_dispatch(params, x, rule: RouterRule, kept, activation, gated):
    """Every expert for every token, and a matrix of weights that is mostly zero."""
    x = x.reshape(-1, D)
    logits = jnp.dot(x, params["kernel"], precision="highest")
    values, ids = lax.top_k(logits, rule.top_k)
    weights = jax.nn.sigmoid(values) if rule.weights == "sigmoid" else jnp.exp(values)
    if rule.renormalise:
        weights = weights / weights.sum(axis=1, keepdims=True)
    chosen = jax.nn.one_hot(ids, EXPERTS) * (weights * kept)[..., None]
    h = jnp.einsum("td,edf->etf", x, params["wi"], precision="highest") + params["wi_bias"][:, None]
    gate, up = jnp.split(h, 2, axis=-1) if gated else (h, jnp.ones_like(h))
    y = (
        jnp.einsum("etf,efd->etd", activation(gate) * up, params["wo"], precision="highest")
        + params["wo_bias"][:, None]
    )
    return jnp.einsum("etd,te->td", y, chosen.sum(axis=1), precision="highest")


@pytest.mark.parametrize(
    "rule, activation, gated",
    [
        (RouterRule(top_k=2, renormalise=True, capacity_factor=0.6), "silu", True),
        (RouterRule(top_k=3, weights="sigmoid"), "gelu_tanh", False),
    ],
)
def test_gradients_against_dense_dispatch(getkey, rule, activation, gated):
    layer = make_layer(rule, activation=activation, gated=gated, bias=True)
    x, mask = jax.random.normal(getkey(), (3, 7, D)), jnp.arange(21).reshape(3, 7) % 5 != 1
    into = jax.random.normal(getkey(), (21, D))
    kept = jnp.asarray(call(layer, x, mask)[2], jnp.float32)

    @nnx.jit
    def gradients(layer, x):
        return nnx.grad(lambda layer, x: (layer(x, mask).reshape(-1, D) * into).sum(), argnums=(0, 1))(layer, x)

    function = {"silu": jax.nn.silu, "gelu_tanh": jax.nn.gelu}[activation]
    names = ("wi", "wo", "wi_bias", "wo_bias")
    params = {name: getattr(layer, name)[...] for name in names} | {"kernel": layer.router.kernel[...]}

    @jax.jit
    def reference(params, x):
        return jax.grad(
            lambda params, x: (dense_dispatch(params, x, rule, kept, function, gated) * into).sum(), argnums=(0, 1)
        )(params, x)

    (own, own_x), (ref, ref_x) = gradients(layer, x), reference(params, x)
    for name in names:
        assert_close(own[name][...], ref[name], 1e-5)
    assert np.any(ref["kernel"])
    assert_close(own["router"]["kernel"][...], ref["kernel"], 1e-5)
    assert_close(own_x, ref_x, 1e-5)


def test_cosine_router_against_numpy(getkey):
    router: Any = CosineRouter(D, EXPERTS, RouterRule(top_k=2), rngs=nnx.Rngs(0))
    assert_close(router.temperature[...], [math.log(1 / 0.5)])
    x = jax.random.normal(getkey(), (7, D))
    logits = nnx.jit(lambda router, x: router(x))
    for log_scale in (math.log(2), 9.0):  # as it starts, and past the limit of log(100)
        router.temperature[...] = jnp.full((1,), log_scale)
        projected = f64(x) @ f64(router.cosine_projector.kernel[...]) + f64(router.cosine_projector.bias[...])
        embeddings = f64(router.sim_matrix[...])
        cosines = (projected / np.linalg.norm(projected, axis=-1, keepdims=True)) @ (
            embeddings / np.linalg.norm(embeddings, axis=0)
        )
        assert_close(logits(router, x), min(math.exp(log_scale), 100) * cosines)
    assert router.cosine_projector.kernel.shape == (D, 256) and router.sim_matrix.shape == (256, EXPERTS)
    grads = nnx.jit(nnx.grad(lambda router, x: router(x).sum()))(router, jnp.zeros((1, D)))  # of no direction
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_a_layer_with_a_cosine_router(getkey):
    layer, x = make_layer(RouterRule(top_k=2), cosine=True), jax.random.normal(getkey(), (30, D))
    out, router, _ = call(layer, x)
    assert_close(out, numpy_experts(layer, f64(x), *numpy_router(f64(router.logits), top_k=2)))


def test_routers_compute_in_float32(getkey):
    """Logits of bfloat16 tokens are those of the same tokens in float32."""
    x = jax.random.normal(getkey(), (50, D), jnp.bfloat16)
    for router in (LinearRouter, CosineRouter):
        router = router(D, EXPERTS, RouterRule(top_k=1), rngs=nnx.Rngs(0))
        assert router(x).dtype == jnp.float32
        np.testing.assert_array_equal(router(x), router(x.astype(jnp.float32)))
    with_bias: Any = LinearRouter(D, EXPERTS, RouterRule(top_k=1), bias=True, rngs=nnx.Rngs(0))
    with_bias.bias[...] = jnp.arange(5.0)
    assert_close(with_bias(x), f64(x) @ f64(with_bias.kernel[...]) + np.arange(5.0))


def test_bfloat16(getkey):
    layer = make_layer(RouterRule(top_k=2, renormalise=True), bias=True, dtype="bfloat16", param_dtype="bfloat16")
    x = jax.random.normal(getkey(), (60, D), "bfloat16")
    out = call(layer, x)[0]
    assert out.dtype == layer.wi[...].dtype == jnp.bfloat16
    tokens = f64(x)
    routed = numpy_router(tokens @ f64(layer.router.kernel[...]), top_k=2, renormalise=True)
    assert_close(out, numpy_experts(layer, tokens, *routed), 1e-2)


@pytest.mark.parametrize(
    "factor, top_k, tokens, experts, room",
    [
        (1.0, 1, 64, 8, 8),  # evenly
        (1.25, 1, 2304, 8, 360),  # 16 images in the third stage of Swin-MoE
        (1.25, 1, 36, 8, 6),  # int(1.25 * 5), as Tutel
        (1.25, 1, 180, 32, 7),  # int(1.25 * 6), where rounding 7.03 up would give 8
        (2.0, 2, 10, 8, 8),
        (0.01, 1, 64, 8, 1),  # never nothing
        (8.0, 1, 64, 8, None),  # whatever comes
        (1e9, 1, 64, 8, None),
        (1.0, 1, 0, 8, None),
    ],
)
def test_capacity(factor, top_k, tokens, experts, room):
    assert RouterRule(top_k=top_k, capacity_factor=factor).capacity(tokens, experts) == room
    assert RouterRule(top_k=top_k).capacity(tokens, experts) is None


def test_not_a_number_stays_with_its_token(getkey):
    layer = make_layer(RouterRule(top_k=2, renormalise=True), bias=True)
    x = jax.random.normal(getkey(), (30, D))
    ill = x.at[3, 0].set(jnp.nan)
    out, clean = call(layer, ill)[0], call(layer, x)[0]
    assert np.isnan(out[3]).all()
    np.testing.assert_allclose(np.delete(out, 3, axis=0), np.delete(clean, 3, axis=0), rtol=1e-6, atol=1e-6)
    for weights in ("softmax", "softmax_top_k", "sigmoid"):  # one NaN among a token's logits, not chosen
        logits = jnp.array([[5.0, 4.0, jnp.nan], [1.0, 2.0, 3.0]])
        chosen = select(logits, RouterRule(top_k=2, weights=weights)).weights
        assert np.isnan(chosen[0]).all() and np.isfinite(chosen[1]).all()


@pytest.mark.parametrize("drop", ["position", "priority"])
@pytest.mark.parametrize("cosine", [False, True])
def test_not_a_number_is_an_error_where_values_are_known(getkey, drop, cosine):
    """Not so of padding, nor of what is traced; gradients stay as they are."""
    layer = make_layer(RouterRule(top_k=1, capacity_factor=0.75, drop=drop), cosine=cosine)
    ill = jax.random.normal(getkey(), (3, 4, D)).at[1, 2, 0].set(jnp.nan)
    named = r"\(router logits\) must not be NaN; got NaN for 1 of 12 tokens, the first is token 6$"
    for function in (layer, layer.route, lambda x: nnx.capture(layer, nnx.Intermediate)(x)):
        with pytest.raises(ValueError, match=named):
            function(ill)
    with pytest.raises(ValueError, match=named):
        select_experts(layer.router(ill.reshape(-1, D)), layer.router.rule)
    mask = jnp.arange(12).reshape(3, 4) != 6
    assert np.isfinite(layer(ill, mask)).all()
    assert np.isnan(jax.vmap(layer.router)(ill)).any() and np.isnan(call(layer, ill)[1].weights[6]).all()
    gradient = nnx.grad(lambda layer: layer(ill).sum())(layer)
    assert np.isnan(gradient.router.cosine_projector.kernel[...] if cosine else gradient.router.kernel[...]).any()


def test_padding_may_hold_anything(getkey):
    """NaN at padding reaches neither the output nor a gradient, and padding takes nobody's room."""
    layer = make_layer(RouterRule(top_k=2, capacity_factor=0.5), bias=True)
    x, mask = jax.random.normal(getkey(), (2, 9, D)), jnp.arange(18).reshape(2, 9) % 3 != 0

    @nnx.jit
    def value_and_gradient(layer, x):
        return nnx.value_and_grad(lambda layer: (layer(x, mask) ** 2).sum())(layer)

    value, grads = value_and_gradient(layer, x)
    ill_value, ill_grads = value_and_gradient(layer, jnp.where(mask[..., None], x, jnp.nan))
    assert value == ill_value
    for grad, ill_grad in zip(jax.tree.leaves(grads), jax.tree.leaves(ill_grads), strict=True):
        np.testing.assert_allclose(grad, ill_grad, rtol=1e-5, atol=1e-6)
    assert not np.any(call(layer, x, jnp.zeros((2, 9), bool))[0])


def test_scores_that_underflow():
    """Sigmoids of very negative logits are zero, yet their shares are not lost; nor is a hopeless expert chosen."""
    logits = jnp.array([[-200.0, -200.0, -300.0], [-jnp.inf, 0.0, 0.0]])
    for weights in ("softmax", "softmax_top_k", "sigmoid"):
        router = select(logits, RouterRule(top_k=2, weights=weights, renormalise=True))
        np.testing.assert_allclose(router.weights, [[0.5, 0.5], [0.5, 0.5]])
        np.testing.assert_array_equal(router.ids, [[0, 1], [1, 2]])


def test_passing_on_dropped_tokens(getkey):
    """What transformers 4 does in Switch: a dropped token's output is itself times its probability."""
    layer = make_layer(RouterRule(top_k=1, expert_capacity=3, per_sequence=True))
    x = jax.random.normal(getkey(), (2, 10, D))

    @nnx.jit
    def passing_on(layer, x):
        router = layer.route(x)
        kept, probability = router.kept.reshape(2, 10, 1), router.weights.reshape(2, 10, 1)
        return jnp.where(kept, layer.apply_experts(x, router), probability * x)

    y = passing_on(layer, x)
    tokens = f64(x).reshape(-1, D)
    ids, weights, kept = numpy_router(tokens @ f64(layer.router.kernel[...]), top_k=1, room=3, groups=2)
    ref = np.where(kept, numpy_experts(layer, tokens, ids, weights, kept), weights * tokens)
    assert 0 < kept.sum() < 20
    assert_close(y.reshape(-1, D), ref)


def test_any_leading_dimensions(getkey):
    layer = make_layer(RouterRule(top_k=2))
    x = jax.random.normal(getkey(), (2, 3, 4, D))
    out = call(layer, x)[0]
    assert out.shape == x.shape
    assert_close(call(layer, x[0, 0, 0])[0], out[0, 0, 0])
    layer = make_layer(RouterRule(top_k=1, capacity_factor=1.0, per_sequence=True))
    assert call(layer, jnp.zeros((0, 3, D)))[0].shape == (0, 3, D)


class Stack(nnx.Module):
    """Two layers around residuals."""

    def __init__(self, rule: RouterRule, **options):
        self.layers = nnx.List([make_layer(rule, seed=seed, **options) for seed in (1, 2)])

    def __call__(self, x, mask=None):
        for layer in self.layers:
            x = x + layer(x, mask)
        return x


def test_losses_of_a_captured_model(getkey):
    """Against numpy, by layer, from what nnx.capture finds."""
    model = Stack(RouterRule(top_k=2, renormalise=True, capacity_factor=0.5))
    x, mask = jax.random.normal(getkey(), (4, 6, D)), jnp.arange(24).reshape(4, 6) % 4 != 0
    _, captured = nnx.jit(lambda model, x: nnx.capture(model, nnx.Intermediate)(x, mask))(model, x)
    balance, z = 0, 0
    for i in range(2):
        router = captured["layers"][i]["router"][0]
        assert isinstance(router, RouterOutput)
        logits = f64(router.logits)[np.asarray(mask).reshape(-1)]
        ids = np.argsort(-logits, axis=1, kind="stable")[:, :2]
        chosen = np.bincount(ids.reshape(-1), minlength=EXPERTS) / len(logits)
        balance += EXPERTS * np.sum(chosen * softmax(logits).mean(axis=0))
        z += np.mean(np.log(np.exp(logits).sum(axis=1)) ** 2)
    losses = jax.jit(lambda outputs: (load_balance_loss(outputs), z_loss(outputs)))
    assert_close(losses(captured), (balance, z))
    np.testing.assert_array_equal(router.mask, mask.reshape(-1))
    assert_close(losses([router, router]), 2 * f64(losses(router)))


def test_losses_at_their_ends():
    @jax.jit
    def losses(logits, mask=None):
        router = select_experts(logits, RouterRule(top_k=1), mask=mask)
        return load_balance_loss(router), z_loss(router)

    assert_close(losses(1e-4 * jnp.eye(4))[0], 1.0, 1e-4)  # evenly
    assert_close(losses(jnp.zeros((4, 4)).at[:, 1].set(50)), (4.0, 2500.0))  # all tokens to one of four
    assert losses(jnp.ones((4, 4)), jnp.zeros(4, bool)) == (0, 0)
    with pytest.raises(ValueError, match=r"outputs must hold a RouterOutput; got PyTreeDef\(\[\]\): was the model cap"):
        load_balance_loss([])
    with pytest.raises(ValueError, match="outputs must hold a RouterOutput"):
        z_loss({"router": jnp.ones(3)})


def test_training(getkey):
    """The loss falls, and the balance loss spreads tokens that a skewed router sends to one expert."""
    x = jax.random.normal(getkey(), (64, D))
    target = jnp.sin(3 * x)

    @jax.jit(static_argnums=0)
    def train(graphdef, params, balance):
        def loss(params):
            y, captured = nnx.capture(nnx.merge(graphdef, params), nnx.Intermediate)(x)
            error, unbalance = ((y - target) ** 2).mean(), load_balance_loss(captured)
            return error + balance * unbalance, jnp.stack([error, unbalance])

        def step(params, _):
            grads, metrics = jax.grad(loss, has_aux=True)(params)
            return jax.tree.map(lambda p, g: p - 0.3 * g, params, grads), metrics

        return lax.scan(step, params, length=100)[1]

    layer = make_layer(RouterRule(top_k=1))
    layer.router.kernel[...] = layer.router.kernel[...].at[:, 0].set(0)
    alone, balanced = (train(*nnx.split(layer), balance) for balance in (0.0, 0.3))
    assert alone[-1, 0] < 0.7 * alone[0, 0] and balanced[-1, 0] < 0.8 * balanced[0, 0]
    assert balanced[-1, 1] < alone[-1, 1] and balanced[-1, 1] < balanced[0, 1]


def test_scan_over_layers_and_vmap(getkey):
    """Layers stacked along an axis, as a deep model has them, one after the other and side by side."""
    layers = [make_layer(RouterRule(top_k=2), seed=seed) for seed in range(3)]
    graphdef, states = nnx.split(layers[0])[0], [nnx.state(layer) for layer in layers]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    x = jax.random.normal(getkey(), (17, D))

    @jax.jit
    def scanned(stacked, x):
        return lax.scan(lambda x, state: (x + nnx.merge(graphdef, state)(x), None), x, stacked)[0]

    ref = x
    for layer in layers:
        ref = ref + call(layer, ref)[0]
    assert_close(scanned(stacked, x), ref, 1e-5)
    xs = jax.random.normal(getkey(), (3, 17, D))
    each = jax.jit(jax.vmap(lambda state, x: nnx.merge(graphdef, state)(x)))(stacked, xs)
    assert_close(each, jnp.stack([call(layer, x)[0] for layer, x in zip(layers, xs, strict=True)]))


def test_another_routing_compiles_nothing(getkey):
    layer = make_layer(RouterRule(top_k=2))
    graphdef, state = nnx.split(layer)
    traces = []

    @jax.jit
    def forward(state, x):
        traces.append(None)
        return nnx.merge(graphdef, state)(x)

    for x in (jax.random.normal(getkey(), (9, D)), jnp.ones((9, D))):  # all to the same experts
        forward(state, x)
    assert len(traces) == 1


def test_an_expert_without_tokens_gets_no_gradient(getkey):
    layer = make_layer(RouterRule(top_k=1), bias=True)
    x = jnp.broadcast_to(jax.random.normal(getkey(), (1, D)), (8, D))
    expert = int(call(layer, x)[1].ids[0, 0])
    grads = nnx.jit(nnx.grad(lambda layer: (layer(x) ** 2).sum()))(layer)
    for name in ("wi", "wo", "wi_bias", "wo_bias"):
        assert set(np.flatnonzero(np.any(np.asarray(grads[name][...]).reshape(EXPERTS, -1), axis=1))) == {expert}


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from sparsellm.mixture_of_experts import LinearRouter, MixtureOfExperts, RouterRule, load_balance_loss
from sparsellm.sharding import create_model

def make():
    rngs = nnx.Rngs(0)
    router = LinearRouter(12, 8, RouterRule(top_k=2, renormalise=True), rngs=rngs)
    return MixtureOfExperts(12, 20, router, activation="silu", gated=True, bias=True, rngs=rngs)

def loss(model, x):
    y, captured = nnx.capture(model, nnx.Intermediate)(x)
    return (y ** 2).sum() + load_balance_loss(captured), y

mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
x = jax.random.normal(jax.random.key(1), (3, 7, 12))
value_and_grad = nnx.jit(nnx.value_and_grad(loss, has_aux=True))
(_, y), grads = value_and_grad(make(), x)
for rules, parts in (({"expert": "model"}, (2, 12, 40)), ({"ffn": "model"}, (8, 12, 10))):
    model = create_model(make, mesh, rules)
    assert model.wi[...].addressable_shards[0].data.shape == parts, model.wi[...].sharding
    (_, y_sharded), grads_sharded = value_and_grad(model, x)
    np.testing.assert_allclose(y_sharded, y, rtol=1e-4, atol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(grads_sharded), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-3, atol=1e-4)
print("sharded")
"""


def test_experts_over_four_devices():
    """Experts, or the neurons of each, cut over four CPU devices: same values and gradients."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    env = os.environ | flags | {"JAX_PLATFORMS": "cpu"}
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", SHARDED], env=env, cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "sharded", done.stderr


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"top_k": 0}, "top_k must be at least 1; got top_k=0"),
        ({"weights": "relu"}, "weights must be one of softmax, softmax_top_k, sigmoid; got weights='relu'"),
        ({"drop": "random"}, "drop must be one of position, priority; got drop='random'"),
        ({"capacity_factor": 0.0}, "capacity_factor must be positive, or None; got capacity_factor=0.0"),
        ({"capacity_factor": math.nan}, "capacity_factor must be positive, or None; got capacity_factor=nan"),
        ({"expert_capacity": 0}, "expert_capacity must be at least 1, or None; got expert_capacity=0"),
        ({"capacity_factor": 1.0, "expert_capacity": 4}, "at most one of capacity_factor and expert_capacity"),
    ],
)
def test_rules_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        RouterRule(**{"top_k": 1} | changes)


def test_what_is_asked_wrongly(unchecked):
    rngs = nnx.Rngs(0)
    for router in (LinearRouter, CosineRouter):
        with pytest.raises(ValueError, match="top_k must be at most experts; got top_k=3, experts=2"):
            router(D, 2, RouterRule(top_k=3), rngs=rngs)
        with pytest.raises(ValueError, match="experts must be at least 1; got experts=0"):
            router(D, 0, RouterRule(top_k=1), rngs=rngs)
    router = LinearRouter(D, 2, RouterRule(top_k=1), rngs=rngs)
    with pytest.raises(ValueError, match="activation must be one of relu, gelu, gelu_tanh, silu; got .*'tanh'"):
        MixtureOfExperts(D, FF, router, activation="tanh", rngs=rngs)
    with pytest.raises(ValueError, match="d_ff must be at least 1; got d_ff=0"):
        MixtureOfExperts(D, 0, router, activation="relu", rngs=rngs)
    layer = MixtureOfExperts(D, FF, router, activation="relu", rngs=rngs)
    with pytest.raises(ValueError, match=r"x must be \[..., 12\]; got shape \(4, 11\)"):
        layer(jnp.ones((4, 11)))
    with pytest.raises(ValueError, match=r"mask must be bool\[4\], one for each token; got float32\[4\]"):
        layer(jnp.ones((4, D)), jnp.ones(4))
    with pytest.raises(ValueError, match=r"mask must be bool\[2, 4\], one for each token; got bool\[4\]"):
        layer(jnp.ones((2, 4, D)), jnp.ones(4, bool))
    with pytest.raises(ValueError, match="implementation must be .* got 'cuda'"):
        MixtureOfExperts(D, FF, router, activation="relu", implementation="cuda", rngs=rngs)


def test_rules_are_values():
    """Two of them that are equal share a compilation."""
    rule = RouterRule(top_k=2, capacity_factor=1.25)
    assert hash(rule) == hash(dataclasses.replace(rule)) and rule == dataclasses.replace(rule)
