import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from models import OPT, OPTConfig, layers
from sparsellm import objectives, training

VOCAB, D_FF = 13, 24


class Neurons(nnx.Module):
    """Two feed-forward blocks on an embedding, whose activations are captured: ReLU's, and one as it is."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(VOCAB, 8, rngs=rngs)
        self.up = nnx.List([nnx.Linear(8, D_FF, rngs=rngs) for _ in range(2)])
        self.out = nnx.Linear(D_FF, VOCAB, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        h = [jax.nn.relu(self.up[0](x)), self.up[1](x)]
        if hasattr(self, "__captures__"):
            for i, activation in enumerate(h):
                self.sow(nnx.Intermediate, f"layer_{i}", {"ffn_activation": activation.reshape(-1, D_FF)})
        return self.out(h[0] + h[1])


def windows(count: int = 4) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (count, 9)).astype(np.int32)


def float64(model: Neurons) -> dict[str, Any]:
    """The parameters, for numpy."""
    arrays = {"embed": model.embed.embedding, "out": model.out.kernel, "bias": model.out.bias}
    for i, up in enumerate(model.up):
        arrays |= {f"up{i}": up.kernel, f"bias{i}": up.bias}
    return {name: np.asarray(x[...], np.float64) for name, x in arrays.items()}


def reference(values: dict[str, Any], tokens: np.ndarray, weight: float):
    """Total, loss, L1 norm and density, in numpy float64."""
    x = values["embed"][tokens[:, :-1]]
    h = [np.maximum(x @ values["up0"] + values["bias0"], 0), x @ values["up1"] + values["bias1"]]
    logits = (h[0] + h[1]) @ values["out"] + values["bias"]
    log_z = np.log(np.exp(logits).sum(-1))
    loss = np.mean(log_z - np.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0])
    l1 = np.mean([np.abs(activation).sum() / activation[..., 0].size for activation in h])
    density = np.mean([np.count_nonzero(activation) / activation.size for activation in h])
    return loss + weight * l1, loss, l1, density


def opt(dropout: float) -> OPT:
    config = OPTConfig(
        vocab_size=VOCAB, layers=1, d_model=8, heads=2, d_ff=16, max_length=9, init_std=0.3, dropout=dropout
    )
    return OPT(config, rngs=nnx.Rngs(0))


def equations(jaxpr):
    """Of a jaxpr and of all within it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for body in jaxprs_in_params(eqn.params):
            yield from equations(body)


def test_the_gradient_adds_up_tokens_in_an_order_of_its_own():
    """A scatter that adds has none on a GPU; against numpy's own, with tokens that occur often."""
    model = opt(dropout=0.1)
    graphdef, params = nnx.split(model, nnx.Param)
    windows = jnp.asarray(np.random.default_rng(0).integers(0, 4, (3, 9)), jnp.int32)
    dropping = objectives.l1_objective(optax.constant_schedule(0.1), dropout_seed=0)
    for objective in (objectives.next_token_objective, dropping):

        def loss(params, objective=objective):
            return objective(nnx.merge(graphdef, params), windows, jnp.int32(0))[0]

        names = ("scatter", "scatter-add")
        found = [eqn for eqn in equations(jax.make_jaxpr(jax.grad(loss))(params).jaxpr) if eqn.primitive.name in names]
        assert len(found) == 2  # of tokens and of positions
        assert all(eqn.primitive.name == "scatter" and eqn.params["unique_indices"] for eqn in found)
    table, weights = np.random.default_rng(1).normal(size=(2, VOCAB, 8)).astype(np.float32)
    ids = np.array([[3, 3, 0], [12, 3, 0]], np.int32)
    embed = model.embed_tokens
    embed.embedding[...] = jnp.asarray(table)
    gradient = nnx.grad(lambda embed: (embed(jnp.asarray(ids)) * weights[ids]).sum())(embed).embedding[...]
    expected = np.zeros_like(table)
    np.add.at(expected, ids, weights[ids])
    np.testing.assert_allclose(gradient, expected, atol=1e-6)
    np.testing.assert_array_equal(embed(jnp.asarray(ids)), table[ids])
    assert np.isnan(embed(jnp.asarray([VOCAB]))).all()


@pytest.mark.parametrize(
    "ids",
    [[], [4], [7] * 9, [0, 12, 0, 5, 12, 12, 0], [-1, 3, 13, 3, -13, 2**31 - 1, -(2**31), 3]],
    ids=["none", "one", "equal", "repeated", "outside"],
)
def test_rows_are_summed_by_id(ids):
    ids = np.array(ids, np.int32)
    x = np.random.default_rng(0).normal(size=(len(ids), 8)).astype(np.float32)
    expected, inside = np.zeros((VOCAB, 8)), (ids >= 0) & (ids < VOCAB)
    np.add.at(expected, ids[inside], x[inside].astype(np.float64))
    for sum_by_id in (layers.sum_by_id, jax.jit(layers.sum_by_id, static_argnums=2)):
        np.testing.assert_allclose(sum_by_id(jnp.asarray(ids), jnp.asarray(x), VOCAB), expected, atol=1e-6)


def test_not_a_number_stays_with_its_id():
    x = jnp.ones((4, 2)).at[1, 0].set(jnp.nan)
    found = np.asarray(layers.sum_by_id(jnp.array([2, 5, 2, 3]), x, 7))
    assert np.isnan(found[5, 0]) and np.isnan(found).sum() == 1 and found[2].tolist() == [2, 2]


@pytest.mark.parametrize("width", [1, 7, 1000])
@pytest.mark.parametrize("scale", [1.0, 1e4, 1e30])
def test_logsumexp_in_one_pass(width, scale):
    x = (scale * np.random.default_rng(width).normal(size=(3, 5, width))).astype(np.float32)
    x[0, 0, 1:] = -np.inf
    most = x.max(axis=-1).astype(np.float64)
    expected = most + np.log(np.exp(x - most[..., None]).sum(axis=-1))
    np.testing.assert_allclose(jax.jit(objectives.logsumexp)(jnp.asarray(x)), expected, rtol=1e-6)


def test_logsumexp_of_what_is_not_finite():
    found = objectives.logsumexp(jnp.array([[-jnp.inf] * 3, [0, jnp.nan, 1]]))
    assert found[0] == -jnp.inf and np.isnan(found[1])


def test_without_a_weight_the_norm_is_measured_alone():
    model, batch = Neurons(), jnp.asarray(windows())
    (total, found), (_, expected) = (
        objectives.l1_objective(weight)(model, batch, jnp.int32(3)) for weight in (None, lambda step: 0.5)
    )
    assert total == found["loss"] == expected["loss"] and found["l1_weight"] == 0
    assert (found["l1"], found["density"]) == (expected["l1"], expected["density"])


def test_the_l1_objective_is_numpys_and_so_is_its_gradient():
    model, batch, step = Neurons(), windows(), 3
    objective = objectives.l1_objective(lambda step: 0.01 * (step + 1))
    graphdef, params = nnx.split(model)

    def total(params):
        return objective(nnx.merge(graphdef, params), jnp.asarray(batch), jnp.int32(step))

    (value, metrics), gradient = jax.value_and_grad(total, has_aux=True)(params)
    values = float64(model)
    expected = reference(values, batch, 0.04)
    found = (value, metrics["loss"], metrics["l1"], metrics["density"])
    assert [float(x) for x in found] == pytest.approx(expected, rel=1e-5)
    assert float(metrics["l1_weight"]) == pytest.approx(0.04) and 0.5 < float(metrics["density"]) < 1
    changed = {"embed": gradient["embed"]["embedding"], "up0": gradient["up"][0]["kernel"]}
    changed |= {"up1": gradient["up"][1]["kernel"], "bias1": gradient["up"][1]["bias"]}
    for name, found in changed.items():
        for index in np.random.default_rng(1).integers(0, values[name].size, 5):
            difference = 0.0
            for sign in (1, -1):
                moved = values[name].copy()
                moved.flat[index] += sign * 1e-5
                difference += sign * reference(values | {name: moved}, batch, 0.04)[0] / 2e-5
            assert np.asarray(found[...]).flat[index] == pytest.approx(difference, rel=1e-3, abs=1e-5)


def test_what_is_dropped_is_a_function_of_the_step_and_the_windows():
    """Which a training that is continued has again, and but the next step, and the next micro-batch, does not."""
    graphdef, params = nnx.split(opt(dropout=0.5))
    batch = jnp.asarray(windows())

    @jax.jit(static_argnames="seed")
    def loss(windows, step, seed=0):
        objective = objectives.l1_objective(optax.constant_schedule(0.0), dropout_seed=seed)
        return objective(nnx.merge(graphdef, params), windows, step)[0]

    found = [loss(batch, jnp.int32(step)) for step in (0, 1, 1, 2)]
    assert found[1] == found[2] and len({*map(float, found), float(loss(batch, jnp.int32(1), seed=1))}) == 4
    plain, _ = objectives.next_token_objective(nnx.merge(graphdef, params), batch, 0)
    assert loss(batch, jnp.int32(1), seed=None) == pytest.approx(float(plain), rel=1e-6)
    parts = [batch[:2], batch[2:], -batch, jnp.full_like(batch, 2**31 - 1)]  # whatever their sum is
    drawn = [objectives.dropout_rngs(0, part, step).dropout() for part in parts for step in (0, 1)]
    assert len({tuple(np.asarray(jax.random.key_data(key))) for key in drawn}) == 8


def test_activations_are_found_in_the_order_of_the_layers():
    layers = {i: {"ffn_activation": (jnp.full((2, 3), float(i)),)} for i in reversed(range(12))}
    found = objectives.ffn_activations({"layers": layers, "hidden": (jnp.zeros((2, 3)),)})
    assert [int(h[0, 0]) for h in found] == list(range(12))
    with pytest.raises(ValueError, match="must capture its feed-forward activations as ffn_activation"):
        objectives.ffn_activations({"layers": {}})


def test_a_weight_makes_the_activations_sparse(tmp_path):
    class Same:
        def __getitem__(self, step: int) -> np.ndarray:
            return windows()

    config = training.TrainConfig(steps=30, batch=4, accumulate=2, learning_rate=0.02, warmup_steps=1)
    last = {}
    for weight in (0.0, 0.3):
        objective = objectives.l1_objective(optax.constant_schedule(weight))
        rows = training.train(Neurons(), Same(), config, tmp_path / str(weight), objective=objective)
        last[weight] = rows[-1]
        assert rows[0]["l1_weight"] == pytest.approx(weight)
    assert last[0.3]["l1"] < last[0.0]["l1"] / 3
    assert last[0.3]["density"] < last[0.0]["density"] - 0.1


# ProSparse's schedule


def algorithm_1(peaks, ends) -> list[float]:
    """The weight of steps 1 to the last, by the listing in ProSparse's appendix B."""
    weights = []
    for _ in range(1, ends[0] + 1):
        weights.append(peaks[0])
    for i in range(1, len(peaks)):
        for t in range(ends[i - 1] + 1, ends[i] + 1):
            eta = 0.5 * (math.sin(-math.pi / 2 + (t - ends[i - 1]) / (ends[i] - ends[i - 1]) * math.pi) + 1)
            weights.append(peaks[i - 1] + eta * (peaks[i] - peaks[i - 1]))
    return weights


@pytest.mark.parametrize(
    "peaks,ends",
    [((2e-5,), (7,)), ((0.0, 1.0), (1, 9)), ((1e-3, 1e-3, 5e-2, 0.1), (3, 5, 11, 30))],
)
def test_the_schedule_is_prosparses_listing(peaks, ends):
    schedule: Any = jax.jit(objectives.sine_stages(peaks, ends))
    found = [float(schedule(jnp.int32(t - 1))) for t in range(1, ends[-1] + 1)]
    assert found == pytest.approx(algorithm_1(peaks, ends), rel=1e-5, abs=1e-9)
    assert float(schedule(jnp.int32(ends[-1] + 100))) == pytest.approx(peaks[-1])


def test_values_of_the_schedule_by_hand():
    schedule: Any = objectives.sine_stages((1.0, 3.0), (2, 10))
    found = [float(schedule(jnp.int32(t - 1))) for t in (1, 2, 4, 6, 8, 10)]
    assert found == pytest.approx([1, 1, 2 - math.sqrt(0.5), 2, 2 + math.sqrt(0.5), 3])


@pytest.mark.parametrize(
    "peaks,ends,message",
    [
        ((), (), "at least one; got 0 and 0"),
        ((1.0, 2.0), (3,), "must be as many, at least one; got 2 and 1"),
        ((2.0, 1.0), (3, 4), r"none less than the one before; got \(2.0, 1.0\)"),
        ((-1.0,), (3,), "at least 0"),
        ((math.nan,), (3,), "must be finite"),
        ((0.0, math.inf), (3, 4), "must be finite"),
        ((1.0, 2.0), (3, 3), r"ends must rise from 1 on; got \(3, 3\)"),
        ((1.0,), (0,), "ends must rise from 1 on"),
    ],
)
def test_stages_out_of_order_are_refused(peaks, ends, message):
    with pytest.raises(ValueError, match=message):
        objectives.sine_stages(peaks, ends)
