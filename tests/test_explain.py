"""What `explain` says of a function's products, against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from sparsify_models import MLP, MaskedAutoencoder

from sparsellm.explain import explain
from sparsellm.micro_tiles import MicroTile
from sparsellm.plan import DENSE, Plan
from sparsellm.sparsify import Rule, sparsify

relu = jax.nn.relu


def scaled(x, params):
    with jax.named_scope("block"):
        h = relu(x)
        return h @ params["w"]


@pytest.fixture
def x():
    """128 x 256, positive at (0, 0), (1, 0) and (40, 200)."""
    return jnp.full((128, 256), -1.0).at[jnp.array([0, 1, 40]), jnp.array([0, 0, 200])].set(1)


def test_densities_by_granularity(x):
    (row,) = explain(scaled, x, {"w": jnp.ones((256, 64))}).rows
    expected = {
        "1x1": 3 / (128 * 256),
        "1x64": 3 / (128 * 4),
        "1xK": 3 / 128,
        "32x1": 2 / (4 * 256),
        "64x1": 2 / (2 * 256),
        "128x1": 2 / 256,
        "32x64": 2 / (4 * 4),
        "128x128": 2 / 2,
    }
    assert row.densities == pytest.approx(expected)
    product = row.product
    assert (product.m, product.k, product.n, product.batch, product.dtype) == (128, 256, 64, 1, "float32")
    assert (product.path, product.sparse, product.dead) == ("block/params.w", "a", True)
    assert product.source.startswith("test_explain.py:") and product.source.endswith("(scaled)")
    assert product.why.startswith("max(x, 0) at test_explain.py:") and product.why.endswith("(scaled)")


def test_the_right_operand_is_seen_transposed(x):
    (row,) = explain(lambda y, x: y @ relu(x).T, jnp.ones((64, 256)), x).rows
    assert (row.product.sparse, row.product.shape) == ("b", (128, 256, 64))
    assert row.densities["128x1"] == pytest.approx(2 / 256)
    assert row.densities["1xK"] == pytest.approx(3 / 128)


def test_why_a_product_stays(x):
    w = jnp.ones((256, 8))

    def reason(fn, *rules):
        (row,) = explain(fn, x, w, rules=rules).rows
        assert row.product.sparse is None and row.plan is None and row.expected_us is None
        return row.product.why

    assert reason(lambda x, w: x @ w) == "not zero by construction: a is argument x, b is argument w"
    assert reason(lambda x, w: (relu(x) + 1) @ w).startswith("not zero by construction: a is add at test_explain.py:")
    assert reason(lambda x, w: relu(x) @ w, Rule("w", "skip")) == "a rule skips it"
    assert reason(lambda x, w: relu(x).astype(jnp.int32) @ w.astype(jnp.int32)) == "dtypes int32 and int32"

    def mixed(x, w):
        return jnp.dot(relu(x).astype(jnp.bfloat16), w.astype(jnp.bfloat16), preferred_element_type=jnp.float32)

    assert reason(mixed) == "float32 result of bfloat16 operands"
    (row,) = explain(lambda x, w: x @ w, x, w, rules=[Rule("", "force")]).rows
    assert row.product.why == "a rule forces it" and row.product.sparse == "a"


def test_plans_and_times(x):
    params = {"w": jnp.ones((256, 64))}
    plan = Plan("k", MicroTile(64, 1))
    (ruled,) = explain(scaled, x, params, rules=[Rule("w", plan)]).rows
    assert ruled.plan == plan and ruled.expected_us and ruled.expected_dense_us
    assert ruled.measured_us is ruled.measured_dense_us is ruled.bound_us is None  # on a CPU
    big = {"w": jnp.ones((512, 512))}
    full, empty = jnp.ones((512, 512)), -jnp.ones((512, 512))
    (dense,), (sparse,) = (explain(scaled, x, big).rows for x in (full, empty))
    assert dense.plan == DENSE and dense.expected_us == dense.expected_dense_us
    assert sparse.plan != DENSE and sparse.expected_us and sparse.expected_dense_us
    assert sparse.expected_us < sparse.expected_dense_us
    assert set(sparse.densities.values()) == {0.0} and set(dense.densities.values()) == {1.0}


def test_a_line_that_runs_often_is_one_row(x):
    w = 0.01 * jnp.eye(256)

    def fn(x, w):
        h, _ = lax.scan(lambda h, w: (relu(h @ w), None), relu(x), jnp.stack([w, -w, w]))
        return jax.jit(jax.checkpoint(lambda h: jnp.einsum("bmk,bkn->bmn", h.reshape(2, 64, 256), jnp.stack([w, w]))))(
            h
        )

    loop, batched = explain(fn, x, w).rows
    assert loop.densities["1x1"] == pytest.approx((3 + 3 + 0) / 3 / (128 * 256), rel=1e-3)
    assert batched.product.batch == 2 and batched.densities["1x1"] == 0


def test_what_never_runs_is_listed(x):
    def fn(x, w):
        return lax.cond(
            x.any(),
            lambda h: h @ w,
            lambda h: -h @ w,
            relu(x),
        )

    taken, other = explain(fn, x, jnp.ones((256, 4))).rows
    assert sorted([bool(taken.densities), bool(other.densities)]) == [False, True]


def test_gradients_are_explained_too(x):
    rows = explain(jax.grad(lambda x, w: (relu(x) @ w).sum(), (0, 1)), x, jnp.ones((256, 4))).rows
    assert [row.product.sparse is not None for row in rows] == [True, True, False]  # forward, for w, for x


def test_modules_are_named_and_left_as_they_are():
    model = MLP(rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (64, 12))
    up, down = explain(model, x, train=True).rows
    assert (up.product.path, down.product.path) == ("up.kernel", "down.kernel")
    assert 0.15 < down.densities["1x1"] < 0.35 and model.dropout.rngs is not None
    assert model.dropout.rngs.count[...] == 0
    autoencoder = MaskedAutoencoder(rngs=nnx.Rngs(0))
    visible = jnp.zeros((64, 12), bool).at[:16].set(True)
    encoder, decoder = explain(autoencoder, x, visible).rows
    assert encoder.product.why.startswith("where(..., 0) at sparsify_models.py:")
    assert encoder.densities["1xK"] == 0.25 and decoder.product.sparse is None
    assert not autoencoder.norm.mean[...].any()


def test_the_table(x):
    params = {"w": jnp.ones((256, 64))}
    text = str(explain(lambda x, params: scaled(x, params) @ params["w"].T, x, params))
    title, header, rule, *lines = text.splitlines()
    assert title == "2 products, 1 with an operand rich in zeros"
    assert header.split()[:5] == ["product", "m", "x", "k", "x"] and set(rule) == {"-", " "}
    assert len(lines) == 2 and "block/params.w" in lines[0] and "128x256x64" in lines[0] and "0.8%" in lines[0]
    starts = [header.index(name) for name in ("dtype", "128x1 ", "why", "where")]
    assert [lines[1][start - 1] for start in starts] == [" "] * 4 and lines[1][starts[0] :].startswith("float32")
    assert "measured us" not in header
    assert str(explain(lambda x: x + 1, x)).startswith("0 products")


def test_nothing_is_computed_differently(x):
    """Explaining runs the function as it is: NaN and callbacks included."""
    seen = []

    def fn(x):
        jax.debug.callback(lambda y: seen.append(np.asarray(y)), relu(x) @ relu(x).T)
        return x

    explain(fn, x.at[0, 0].set(jnp.nan))
    assert np.isnan(seen[0][0]).all() and np.isfinite(seen[0][1:, 1:]).all()


def test_measuring_needs_a_gpu(x, unchecked):
    with pytest.raises(ValueError, match="measure must be None or False without a GPU that is known; got cpu"):
        explain(scaled, x, {"w": jnp.ones((256, 8))}, measure=True)


@pytest.mark.gpu
def test_times_on_a_gpu():
    x = jnp.where(jax.random.uniform(jax.random.key(0), (1, 4096)) < 0.01, 1, -1).astype(jnp.bfloat16)
    x, w = jnp.broadcast_to(x, (4096, 4096)), jnp.ones((4096, 4096), jnp.bfloat16)
    (row,) = explain(scaled, x, {"w": w}).rows
    assert row.plan != DENSE and row.bound_us and row.measured_us and row.measured_dense_us
    assert row.bound_us < row.measured_us < row.measured_dense_us
    np.testing.assert_allclose(
        sparsify(scaled, sample=(x, {"w": w}))(x, {"w": w}).astype(jnp.float32),
        scaled(x, {"w": w}).astype(jnp.float32),
        rtol=1e-2,
        atol=1,
    )


def test_empty_and_boolean_products_have_their_row():
    assert "empty" in str(explain(lambda a, b: jax.nn.relu(a) @ b, jnp.zeros((0, 4)), jnp.zeros((4, 5))))
    assert explain(lambda a, b: a @ b, jnp.ones((3, 4), bool), jnp.zeros((4, 5), bool)).rows
