"""Whether tokens that activate the same neurons are brought together, and what is measured of it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import token_order
from experiments.runs import Run

CONFIG = token_order.Config.smoke()


def test_tokens_of_one_kind_are_brought_together():
    """Eight kinds of 16 tokens: of each bit of a kind's number there are neurons that fire where it is 1."""
    kinds = np.random.default_rng(0).permutation(np.repeat(np.arange(8), 16))
    bit_of_neuron = np.repeat([0, 1, 2], [32, 16, 8])  # fewer, so that kinds are told apart bit by bit
    fires = (kinds[:, None] >> bit_of_neuron[None]) & 1 == 1
    order = np.asarray(token_order.order_by_neurons(16, jnp.asarray(fires, jnp.float32)))
    assert sorted(order.tolist()) == list(range(128))
    assert all(len(set(group)) == 1 for group in kinds[order].reshape(8, 16).tolist())
    bits, tokens = np.packbits(fires, axis=1)[None], kinds[None].astype(np.int32)
    rows = token_order.measure_layer(dataclasses.replace(CONFIG, rows=(16,)), bits, 56, tokens)
    live = {row["order"]: row["live"] for row in rows}
    assert live["as written"] == pytest.approx(fires.reshape(8, 16, 56).any(axis=1).mean()) and live["as written"] > 0.9
    assert live["by token"] == live["by neurons"] == 0.5 == rows[0]["density"]


def test_a_layer_where_nothing_or_everything_fires_has_some_order():
    for value in (0.0, 1.0):
        order = token_order.order_by_neurons(8, jnp.full((32, 4), value))
        assert sorted(np.asarray(order).tolist()) == list(range(32))


def test_a_row_for_each_layer_size_and_order(tmp_path, capsys):
    with Run.start("token_order", CONFIG, root=tmp_path) as run:
        rows = token_order.run(CONFIG, run)
    assert [row["order"] for row in rows] == [*token_order.ORDERS] * (len(rows) // 4)
    assert {row["rows"] for row in rows} == {8} and all(row["density"] <= row["live"] <= 1 for row in rows)
    assert "by neurons" in capsys.readouterr().out and (run.folder / "token_order.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": (48,)}, "rows must be powers of two"),
        ({"windows": 3}, "windows must be powers of two"),
        ({"rows": ()}, "rows must hold something"),
        ({"batches": 0}, "batches must be at least 1"),
    ],
)
def test_what_cannot_be_halved_is_refused_first(tmp_path, changes, message):
    config = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(ValueError, match=message), Run.start("token_order", config, root=tmp_path) as run:
        token_order.run(config, run)
    assert not list((tmp_path / "token_order").iterdir())
