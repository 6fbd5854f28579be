"""Which layers read prompts sparse: models/prefill.py and `OPTConfig.sparse_rows` a layer."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import OPT, OPTConfig
from models.opt import with_sparse_rows
from models.prefill import choose_sparse_rows
from sparsellm.packing import pack
from sparsellm.tiles import TileCost, TileCosts

CONFIG = OPTConfig(vocab_size=31, layers=3, d_model=8, heads=2, d_ff=32, max_length=64)
COST = TileCost(tile_m=64, tile_n=8, overhead_us=0.0, tile_us=0.0, tflops=1.0)
COSTS = TileCosts(  # a device whose gathers cost a tenth more than its dense products
    source="a test", sms=1, bandwidth=1e15,
    kernels={"dense float32": COST, "k 64x1 float32": dataclasses.replace(COST, tflops=0.9)},
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> OPT:
    """Of layer 0 no neuron fires, of layer 1 every one, of layer 2 the second half."""
    rng = np.random.default_rng(0)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: OPT(CONFIG, rngs=nnx.Rngs(0))))
    model = nnx.merge(graphdef, jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), state))
    half = np.where(np.arange(32) < 16, -100, 100)
    for layer, bias in zip(model.layers, (np.full(32, -100), np.full(32, 100), half), strict=True):
        layer.fc1.bias[...] = jnp.asarray(bias, jnp.float32)
    return model


def test_layers_multiply_sparse_where_that_is_expected_to_be_quicker(model):
    """Two blocks of 64 tokens: k in steps of 64, so 32 live neurons cost what 16 do, and none costs nothing."""
    tokens = jax.random.randint(jax.random.key(0), (4, 32), 3, 31)
    assert choose_sparse_rows(model, tokens, costs=COSTS) == (64, None, None)
    sparse = with_sparse_rows(model, (64, None, 8))
    assert sparse.config.sparse_rows == (64, None, 8) and model.config.sparse_rows is None
    assert [layer.sparse_rows for layer in sparse.layers] == [64, None, 8]
    assert choose_sparse_rows(sparse, tokens, costs=COSTS) == (64, None, None)  # whatever it runs as now
    run = jax.jit(lambda graphdef, state: nnx.merge(graphdef, state)(tokens), static_argnums=0)
    np.testing.assert_allclose(run(*nnx.split(sparse)), run(*nnx.split(model)), atol=1e-4)


def test_padding_makes_no_micro_tile_live(model):
    """A packed batch of 3 tokens, 61 places empty."""
    tokens, packing = pack([[5, 9], [7]], size=64, length=32)
    assert choose_sparse_rows(model, tokens, packing, costs=COSTS) == (64, None, None)


def test_a_device_without_the_kernels_runs_dense(model):
    costs = dataclasses.replace(COSTS, kernels={"dense float32": COST})
    assert choose_sparse_rows(model, jnp.zeros((1, 4), jnp.int32), costs=costs) == (None, None, None)


def test_activations_without_zeros_are_refused():
    gelu = nnx.eval_shape(lambda: OPT(dataclasses.replace(CONFIG, activation="gelu"), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="sparse_rows needs exact zeros, .* got 'gelu'"):
        choose_sparse_rows(gelu, jnp.zeros((1, 4), jnp.int32), costs=COSTS)


def test_rows_of_each_layer_come_back_from_json():
    config = dataclasses.replace(CONFIG, sparse_rows=(64, None, 8))
    assert OPTConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert [config.rows(layer) for layer in range(3)] == [64, None, 8]
    with pytest.raises(ValueError, match=r"sparse_rows must be one, or 3; got sparse_rows=\(64, None\)"):
        dataclasses.replace(CONFIG, sparse_rows=(64, None))
    with pytest.raises(ValueError, match=r"sparse_rows must be None or one of .* got sparse_rows=\(64, None, 7\)"):
        dataclasses.replace(CONFIG, sparse_rows=(64, None, 7))
