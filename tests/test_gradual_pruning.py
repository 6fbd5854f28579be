"""Pruning while a model is trained."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from pruned_models import LENGTH, VOCAB, Table, compilations, windows

from sparsellm import training
from sparsellm.pruning import NM
from sparsellm.pruning.gradual import GradualConfig, cubic_sparsity, gradually_pruned


def test_masks_change_while_training_and_nothing_compiles_again():
    """Against a loop in numpy: SGD on a table, a new mask every second step from the third on."""
    config = GradualConfig(sparsity=0.8, begin=2, end=10, every=2, select="table")
    transformation = gradually_pruned(optax.sgd(0.5), config)
    graphdef, params = nnx.split(Table(), nnx.Param)
    table, mask, masks = np.asarray(params["table"][...], np.float64), np.ones((VOCAB, VOCAB), bool), []
    state = training.TrainState(params, transformation.init(params))
    compiled = compilations()
    for step in range(1, 13):
        batch = windows(4, LENGTH + 1)
        state, _ = training.train_step(graphdef, transformation, state, jnp.asarray(batch))
        g = np.zeros_like(table)
        for token, target in zip(batch[:, :-1].flatten(), batch[:, 1:].flatten(), strict=True):
            p = np.exp(table[token])
            p /= p.sum()
            p[target] -= 1
            g[token] += p / batch[:, 1:].size
        trained = table - 0.5 * g
        if step >= 2 and step % 2 == 0:
            t = min((step - 2) / 8, 1)
            count = round(0.8 * (1 - (1 - t) ** 3) * table.size)
            mask = np.ones(table.size, bool)
            mask[np.argsort(np.abs(trained.flatten()), kind="stable")[:count]] = False
            mask = mask.reshape(table.shape)
        table = np.where(mask, trained, 0)
        found = np.asarray(state.params["table"][...])
        np.testing.assert_array_equal(found != 0, mask)
        np.testing.assert_allclose(found, table, atol=1e-5)
        masks.append(mask)
    assert compilations() == compiled + 1
    assert [round(float(1 - m.mean()), 2) for m in masks[::3]] == [0.0, 0.46, 0.7, 0.8]
    assert float(cubic_sparsity(config, jnp.int32(0))) == 0


@pytest.mark.parametrize(
    "options,message",
    [
        ({"sparsity": 2.0}, "sparsity must be at least 0 and less than 1; got sparsity=2.0"),
        ({"end": 0}, "begin must be less than end; got begin=0, end=0"),
        ({"every": 0}, "every must be at least 1; got every=0"),
        ({"pattern": NM(2, 4)}, "pattern must not be n:m"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GradualConfig(**({"sparsity": 0.5, "end": 4} | options))
