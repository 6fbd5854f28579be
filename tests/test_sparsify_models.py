"""Whole models by `sparsify`: they compute the same, with their zero-rich products on `sparse_dot`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from replaced_products import assert_same, dense, replaced
from sparsify_models import CNN, MLP, MaskedAutoencoder, Transformer

from models import OPT, OPTConfig
from sparsellm.sparsify import Rule, sparsify

relu = jax.nn.relu


@pytest.fixture
def mlp():
    return MLP(rngs=nnx.Rngs(0))


def test_mlp_with_dropout(mlp):
    x, twin = jax.random.normal(jax.random.key(1), (5, 12)), nnx.clone(mlp)
    fast = sparsify(mlp)
    assert replaced(fast, x) == 1 and dense(fast, x) == 1
    assert_same(fast(x), twin(x))
    for _ in range(2):  # the random stream goes on as it would
        assert_same(fast(x, train=True), twin(x, train=True))
    assert_same(nnx.state(mlp), nnx.state(twin))
    assert_same(jax.jit(lambda x: fast(x))(x), twin(x))  # closed over, where nothing in it changes
    assert_same(jax.vmap(fast)(x), twin(x))
    assert replaced(sparsify(MLP(rngs=nnx.Rngs(0), activation=jax.nn.gelu)), x) == 0


def test_training_a_module(mlp):
    x, y, twin = jax.random.normal(jax.random.key(1), (5, 12)), jnp.ones((5, 6)), nnx.clone(mlp)

    def loss(model, x, y):
        return ((model(x, train=True) - y) ** 2).mean()

    value, grads = nnx.value_and_grad(sparsify(loss))(mlp, x, y)
    expected, expected_grads = nnx.value_and_grad(loss)(twin, x, y)
    assert_same((value, grads), (expected, expected_grads))
    whole = sparsify(nnx.value_and_grad(loss))
    assert_same(whole(mlp, x, y), nnx.value_and_grad(loss)(twin, x, y))
    assert_same(nnx.jit(sparsify(loss))(mlp, x, y), loss(twin, x, y))
    assert_same(nnx.state(mlp), nnx.state(twin))


def test_masked_autoencoder(getkey):
    model = MaskedAutoencoder(rngs=nnx.Rngs(0))
    twin = nnx.clone(model)
    x, visible = jax.random.normal(getkey(), (7, 12)), jax.random.bernoulli(getkey(), 0.25, (7, 12))
    fast = sparsify(model)
    assert_same(fast(x, visible), twin(x, visible))
    assert_same(nnx.state(model), nnx.state(twin))  # batch statistics
    assert model.norm.mean[...].any()
    model.eval()
    twin.eval()
    assert replaced(fast, x, visible) == 1 and dense(fast, x, visible) == 1
    assert_same(fast(x, visible), twin(x, visible))


def test_flax_mnist(getkey):
    model, images = CNN(rngs=nnx.Rngs(0)), jax.random.normal(getkey(), (3, 8, 8, 1))
    with jax.numpy_dtype_promotion("standard"):  # nnx.avg_pool divides by an integer
        assert replaced(sparsify(model), images) == 1 and dense(sparsify(model), images) == 1
        assert_same(sparsify(model)(images), nnx.jit(lambda model, x: model(x))(model, images))


def test_flax_lm1b(getkey):
    model, tokens = Transformer(rngs=nnx.Rngs(0)), jax.random.randint(getkey(), (2, 5), 0, 31)
    twin = nnx.clone(model)
    pure = nnx.split(model)
    fast = sparsify(lambda state, tokens: nnx.merge(pure[0], state)(tokens))
    assert replaced(fast, pure[1], tokens) == 1  # linear2, inside remat

    def loss(model, tokens):
        return (model(tokens, deterministic=False) ** 2).mean()

    actual, expected = (nnx.jit(nnx.value_and_grad(f))(of, tokens) for f, of in ((sparsify(loss), model), (loss, twin)))
    assert_same(actual, expected, 1e-4)
    assert_same(nnx.state(model), nnx.state(twin))


def test_opt(getkey):
    config = OPTConfig(vocab_size=64, layers=2, d_model=32, heads=4, d_ff=64, max_length=16, init_std=0.2)
    model = OPT(config, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(getkey(), (2, 9), 0, 64)
    mask = jnp.arange(9)[None] < jnp.array([[9], [4]])
    fast = sparsify(model)
    assert replaced(fast, tokens, mask=mask) == 2
    assert replaced(sparsify(model, rules=[Rule(r"layers\.0\.fc2", "skip")]), tokens, mask=mask) == 1
    live = np.asarray(mask)
    assert_same(fast(tokens, mask=mask)[live], model(tokens, mask=mask)[live])
    hidden, cache = sparsify(model.hidden_states)(tokens, mask=mask, cache=model.init_cache(2, 12))
    expected, expected_cache = model.hidden_states(tokens, mask=mask, cache=model.init_cache(2, 12))
    assert_same((hidden[live], cache), (expected[live], expected_cache))
