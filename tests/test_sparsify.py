"""A function comes out computing the same, with its zero-rich products, and no others, on `sparse_dot`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from replaced_products import assert_same, dense, replaced
from sparsify_models import MLP

from sparsellm.explain import explain
from sparsellm.micro_tiles import MicroTile
from sparsellm.plan import Plan
from sparsellm.sparsify import Rule, products, sparsify

relu = jax.nn.relu


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(1), (6, 8))


@pytest.fixture
def w():
    return jax.random.normal(jax.random.key(2), (8, 8))


MASK = np.arange(48).reshape(6, 8) % 3 == 0

RICH = {
    "relu": relu,
    "relu of nnx": nnx.relu,
    "maximum, 0 first": lambda x: jnp.maximum(0, x),
    "lax.max": lambda x: lax.max(x, jnp.zeros_like(x)),
    "minimum": lambda x: jnp.minimum(x, 0),
    "relu6": jax.nn.relu6,
    "clip": lambda x: jnp.clip(x, 0, 2),
    "clip, no maximum": lambda x: jnp.clip(x, 0),
    "lax.clamp": lambda x: lax.clamp(0.0, x, 1.0),
    "where x": lambda x: jnp.where(MASK, x, 0),
    "where 0": lambda x: jnp.where(x > 1, 0.0, x),
    "boolean mask": lambda x: x * jnp.asarray(MASK).astype(x.dtype),
    "mask first": lambda x: jnp.asarray(MASK).astype(x.dtype) * x,
    "one-hot": lambda x: jax.nn.one_hot(x[:, 0].astype(jnp.int32), 8),
    "tril": jnp.tril,
    "dropout": lambda x: jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, x.shape), x / 0.5, 0),
    "gradient of relu": lambda x: jax.grad(lambda x: (relu(x) ** 2).sum())(x),
    "squared relu": lambda x: jnp.square(relu(x)),
    "cube": lambda x: relu(x) ** 3,
    "power": lambda x: relu(x) ** 1.5,
    "sqrt": lambda x: jnp.sqrt(relu(x) * 2),
    "neg, abs, sign": lambda x: -jnp.sign(jnp.abs(relu(x))),
    "tanh, sin, expm1": lambda x: jnp.tanh(jnp.sin(jnp.expm1(relu(x)))),
    "scaled": lambda x: 3 * relu(x) / 7,
    "gated": lambda x: relu(x) * jax.nn.sigmoid(x),
    "cast": lambda x: relu(x).astype(jnp.bfloat16).astype(jnp.float32),
    "reshape, transpose": lambda x: relu(x).reshape(2, 3, 8).transpose(1, 0, 2).reshape(6, 8),
    "slice": lambda x: relu(jnp.concatenate([x, x]))[2:8],
    "expand, squeeze": lambda x: relu(x)[:, None].squeeze(1),
    "flip, roll": lambda x: jnp.roll(jnp.flip(relu(x), 0), 1, axis=0),
    "take": lambda x: relu(x)[jnp.array([1, 0, 2, 3, 5, 5])],
    "concatenate": lambda x: jnp.concatenate([relu(x[:3]), jnp.minimum(x[3:], 0)]),
    "pad": lambda x: jnp.pad(relu(x[1:-1]), ((1, 1), (0, 0))),
    "stop_gradient, name": lambda x: checkpoint_name(lax.stop_gradient(relu(x)), "h"),
    "optimization_barrier": lambda x: lax.optimization_barrier((x, relu(x)))[1],
    "where of both": lambda x: jnp.where(MASK, relu(x), jnp.minimum(x, 0)),
    "kept by a clamp around 0": lambda x: jnp.clip(relu(x), -1, 1),
}

NOT_RICH = {
    "argument": lambda x: x,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "softmax": jax.nn.softmax,
    "leaky relu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "plus 1": lambda x: relu(x) + 1,
    "plus another": lambda x: relu(x) + relu(-x),
    "exp": lambda x: jnp.exp(relu(x)),
    "cos": lambda x: jnp.cos(relu(x)),
    "to the 0": lambda x: relu(x) ** jnp.float32(0),
    "cumsum": lambda x: jnp.cumsum(relu(x), axis=1),
    "clip at 1": lambda x: jnp.clip(relu(x), 1, 2),
    "maximum of two": lambda x: jnp.maximum(relu(x), x),
    "where of one": lambda x: jnp.where(MASK, relu(x), x),
    "where with -inf": lambda x: jax.nn.softmax(jnp.where(MASK, x, -jnp.inf), axis=0),
    "half a concatenation": lambda x: jnp.concatenate([relu(x[:3]), x[3:]]),
    "pad with 1": lambda x: jnp.pad(relu(x[1:-1]), ((1, 1), (0, 0)), constant_values=1),
    "uniform": lambda x: jax.random.uniform(jax.random.key(0), x.shape),
    "dropped divisor": lambda x: 1 / (1 + relu(x)),
}


@pytest.mark.parametrize("name", RICH)
def test_zeros_by_construction_are_found(name, x, w):
    assert replaced(sparsify(lambda x, w: RICH[name](x) @ w), x, w) == 1


@pytest.mark.parametrize("name", NOT_RICH)
def test_all_else_is_left_alone(name, x, w):
    assert replaced(sparsify(lambda x, w: NOT_RICH[name](x) @ w), x, w) == 0


def test_all_of_them_together(x, w):
    def fn(x, w):
        return {name: make(x) @ w for name, make in (RICH | NOT_RICH).items()}

    fast = sparsify(fn)
    assert replaced(fast, x, w) == len(RICH)
    assert_same(fast(x, w), jax.jit(fn)(x, w))


CONTRACTIONS = [
    ("mk,kn->mn", (6, 8), (8, 5)),
    ("km,kn->mn", (8, 6), (8, 5)),
    ("mk,nk->mn", (6, 8), (5, 8)),
    ("km,nk->nm", (8, 6), (5, 8)),
    ("abk,kn->abn", (2, 3, 8), (8, 5)),
    ("akb,cnk->abcn", (2, 8, 3), (4, 5, 8)),
    ("mkl,kln->mn", (6, 4, 2), (4, 2, 5)),
    ("mkl,lkn->mn", (6, 4, 2), (2, 4, 5)),
    ("bmk,bkn->bmn", (3, 6, 8), (3, 8, 5)),
    ("bhqk,bkhd->bqhd", (2, 3, 4, 8), (2, 8, 3, 5)),
    ("k,kn->n", (8,), (8, 5)),
    ("mk,k->m", (6, 8), (8,)),
    ("k,k->", (8,), (8,)),
    ("m,n->mn", (6,), (5,)),
    ("bk,bk->b", (6, 8), (6, 8)),
]


@pytest.mark.parametrize("side", ["a", "b"])
def test_any_contraction(side, getkey, calls):
    operands = [[jax.random.normal(getkey(), shape) for shape in shapes] for _, *shapes in CONTRACTIONS]

    def fn(operands, activate=relu, einsum=jnp.einsum):
        pairs = [(activate(x), y) if side == "a" else (x, activate(y)) for x, y in operands]
        return [einsum(spec, *pair) for (spec, *_), pair in zip(CONTRACTIONS, pairs, strict=True)]

    fast = sparsify(fn)
    assert replaced(fast, operands) == len(CONTRACTIONS)
    wide = [[np.asarray(x, np.float64) for x in pair] for pair in operands]
    for out, expected in zip(fast(operands), fn(wide, lambda x: np.maximum(x, 0), np.einsum), strict=True):
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)

    def loss(operands, fn):
        return sum(jnp.sin(y).sum() for y in fn(operands))

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    assert_same(gradient(operands, fast), gradient(operands, fn))


@jax.custom_vjp
def tenfold(x, w):
    """A product whose own gradient is ten times what it should be."""
    return relu(x) @ w


tenfold.defvjp(
    lambda x, w: (relu(x) @ w, (x, w)),
    lambda saved, g: (10 * jnp.where(saved[0] > 0, g @ saved[1].T, 0), 10 * relu(saved[0]).T @ g),
)


@jax.custom_jvp
def fivefold(x, w):
    return relu(x) @ w


fivefold.defjvp(lambda primals, tangents: (relu(primals[0]) @ primals[1], 5 * tangents[0] @ primals[1]))


def scanned(x, w):
    return lax.scan(lambda h, _: (relu(h @ w), h @ w), relu(x), None, length=3)


BODIES = {
    "jit": (lambda x, w: jax.jit(lambda h: h @ w)(relu(x)), 1),
    "relu inside jit": (lambda x, w: jax.jit(lambda x: relu(x) @ w)(x), 1),
    "the same jit with and without zeros": (lambda x, w: [g(relu(x), w), g(x, w)], 1),
    "remat": (lambda x, w: jax.checkpoint(lambda x: relu(relu(x) @ w) @ w)(x), 2),
    "cond": (lambda x, w: lax.cond(x[0, 0] > 0, lambda h: h @ w, lambda h: 2 * h @ w, relu(x)), 2),
    "after cond": (lambda x, w: lax.cond(x[0, 0] > 0, relu, lambda x: jnp.minimum(x, 0), x) @ w, 1),
    "after half a cond": (lambda x, w: lax.cond(x[0, 0] > 0, relu, lambda x: x, x) @ w, 0),
    "switch": (lambda x, w: lax.switch(1, [lambda h: h @ w, lambda h: h, lambda h: -h @ w], relu(x)), 2),
    "scan, carry": (scanned, 2),
    "scan, carry from zeros": (lambda x, w: lax.scan(lambda h, x: (relu(h @ w + x), None), jnp.zeros(8), x)[0], 1),
    "scan, carry that starts dense": (lambda x, w: lax.scan(lambda h, _: (relu(h @ w), None), x, None, length=3)[0], 0),
    "scan, carry that turns dense": (lambda x, w: lax.scan(lambda h, _: (h @ w, None), relu(x), None, length=3)[0], 0),
    "scan, xs": (lambda x, w: lax.scan(lambda c, h: (c + 1, h @ w), 0.0, relu(x))[1], 1),
    "scan, consts": (lambda x, w: lax.scan(lambda c, h: (c, relu(x) @ h), 0.0, w[:, :, None])[1], 1),
    "scan, ys": (lambda x, w: lax.scan(lambda c, x: (c, relu(x)), 0.0, x)[1] @ w, 1),
    "scan in scan": (lambda x, w: lax.scan(lambda c, _: (scanned(c, w)[0], None), x, None, length=2)[0], 2),
    "while": (
        lambda x, w: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, relu(c[1] @ w)), (0, relu(x)))[1],
        1,
    ),
    "while that starts dense": (lambda x, w: lax.fori_loop(0, 3, lambda i, h: relu(h @ w), x), 0),
    "custom_vjp": (lambda x, w: tenfold(x, w), 1),
    "custom_jvp": (lambda x, w: fivefold(x, w), 1),
    "vmap": (lambda x, w: jax.vmap(lambda row: relu(row) @ w)(x), 1),
    "all of them": (
        lambda x, w: jax.jit(jax.checkpoint(lambda x: lax.cond(True, tenfold, tenfold, scanned(x, w)[0], w)))(x),
        4,
    ),
}


@jax.jit
def g(h, w):
    return h @ w


@pytest.mark.parametrize("name", BODIES)
def test_products_inside_other_primitives(name, x, w, calls):
    fn, count = BODIES[name]
    fast = sparsify(fn)
    assert replaced(fast, x, w) == count

    def loss(x, w, fn):
        return sum(jnp.sin(y).sum() for y in jax.tree.leaves(fn(x, w)))

    def results(fn, wrap=lambda gradient: gradient):
        if "while" in name:  # of which there is no reverse mode
            return fn(x, w), None
        return fn(x, w), wrap(jax.grad(lambda x, w: loss(x, w, fn), (0, 1)))(x, w)

    # The function and its gradient; the gradient of its sparse form; the sparse form of its gradient.
    expected, actual, whole = jax.jit(lambda: (results(fn), results(fast), results(fn, sparsify)))()
    assert_same(actual, expected, 1e-4)
    assert_same(whole, expected, 1e-4)


def test_the_products_of_a_backward_pass_are_replaced_too(x, w):
    def loss(x, w):
        return (relu(relu(x @ w) @ w) ** 2).sum()

    gradient = jax.grad(loss, (0, 1))
    assert dense(gradient, x, w) == 6
    assert (replaced(sparsify(gradient), x, w), dense(sparsify(gradient), x, w)) == (5, 1)  # all but x @ w


def test_the_rules_of_custom_derivatives_are_kept(x, w, calls):
    fast = sparsify(lambda x, w: tenfold(x, w).sum())
    assert replaced(jax.grad(fast), x, w) == 1  # the forward rule's own product
    assert_same(jax.grad(fast)(x, w), 10 * jax.grad(lambda x: (relu(x) @ w).sum())(x))
    fast = sparsify(lambda x, w: fivefold(x, w).sum())
    assert_same(jax.grad(fast)(x, w), 5 * jnp.ones((6, 8)) @ w.T)
    zero = jnp.zeros((2, 8))  # where jax.nn.relu's gradient is 0 and jnp.maximum's is 1/2
    assert not jax.grad(sparsify(lambda x, w: (relu(x) @ w).sum()))(zero, w).any()


@jax.custom_jvp
def straight_through(x):
    return relu(x)


straight_through.defjvp(lambda primals, tangents: (relu(primals[0]), tangents[0]))

ZERO_AND_NOT_DEAD = {  # functions of x, w, and z, which is zero
    "masked weights that start at zero": lambda x, w, z: x @ jnp.where(jnp.eye(8, dtype=bool), z, 0),
    "weights times a mask": lambda x, w, z: x @ (z * jnp.eye(8, dtype=bool).astype(w.dtype)),
    "a gate that starts at zero": lambda x, w, z: (relu(x) * z[:6]) @ w,
    "half the gradient at a tie": lambda x, w, z: jnp.maximum(z, 0) @ w,
    "dropout of zeros": lambda x, w, z: jnp.where(jnp.asarray(MASK), z[:6], 0) @ w,
    "a gradient of its own": lambda x, w, z: straight_through(-jnp.abs(z + 1)) @ w,
    "too small for float16": lambda x, w, z: (relu(x + 9) * 1e-9).astype(jnp.float16) @ w.astype(jnp.float16),
    "forced": lambda x, w, z: z @ w,
}


def test_zeros_that_want_a_gradient_get_it(x, w):
    def fn(x, w, z):
        return {name: make(x, w, z) for name, make in ZERO_AND_NOT_DEAD.items()}

    def loss(operands, fn):
        return {name: jnp.sin(y + 1).astype(jnp.float32).sum() for name, y in fn(*operands).items()}

    operands = x, w, jnp.zeros((8, 8))
    fast = sparsify(fn, rules=[Rule("", "force")])
    assert replaced(fast, *operands) == len(ZERO_AND_NOT_DEAD)
    assert replaced(sparsify(fn), *operands) == len(ZERO_AND_NOT_DEAD) - 1
    actual, expected = (jax.jit(jax.jacrev(loss), static_argnums=1)(operands, fn) for fn in (fast, fn))
    for name, (of_x, _, of_z) in expected.items():
        assert of_x.any() if name == "too small for float16" else of_z.any(), name
        assert_same(actual[name], expected[name], 2e-3 if "float16" in name else 2e-5)


@pytest.mark.parametrize("steps", [0, 1])
def test_a_scan_may_end_as_it_begins(steps):
    """Then zeros that want a gradient come out of it, where after a step they do not."""

    def fn(w, x):
        return (lax.scan(lambda c, _: (relu(c), None), w, None, length=steps)[0] @ x).sum()

    operands = jnp.zeros((8, 8)), jnp.ones((8, 8))
    assert_same(jax.grad(sparsify(fn, rules=[Rule("", "force")]))(*operands), jax.grad(fn)(*operands))


def test_behind_a_relu_the_gradient_is_sparse_too(x, w):
    def fn(x, w):
        return jnp.where(jnp.asarray(MASK), 2 * relu(x).reshape(6, 8) / 3, 0) ** 2 @ w

    (row,) = explain(fn, x, w).rows
    assert row.product.dead
    assert not explain(lambda x, w: jnp.maximum(x, 0) @ w, x, w).rows[0].product.dead


def test_other_transformations(x, w):
    def fn(x, w):
        return relu(jnp.tanh(x @ w)) @ w

    fast = sparsify(fn)
    assert_same(jax.jit(fast)(x, w), fn(x, w))
    assert_same(jax.vmap(fast, (0, None))(x, w), fn(x, w))
    ws = jnp.stack([w, w.T, -w])
    assert_same(jax.vmap(fast, (None, 0))(x, ws), jnp.stack([fn(x, w) for w in ws]))
    assert_same(lax.scan(lambda h, w: (fast(h, w), None), x, ws)[0], fn(fn(fn(x, w), w.T), -w))
    per_row = jax.vmap(jax.grad(lambda x, w: fast(x, w).sum(), 1), (0, None))
    assert_same(per_row(x, w), jax.vmap(jax.grad(lambda x, w: fn(x, w).sum(), 1), (0, None))(x, w))
    assert_same(jax.checkpoint(fast)(x, w), fn(x, w))
    assert_same(sparsify(fast)(x, w), fn(x, w))


def test_it_is_traced_once_for_each_shape(x, w, calls):
    traces = []

    def fn(x, w, scale=1.0, *, flip=False):
        traces.append((scale, flip))
        return relu(-x if flip else x) @ w * float(scale)

    fast = sparsify(fn)
    for pattern in (x, jnp.zeros_like(x), -x, jnp.abs(x)):  # as they come, empty, others, full
        assert_same(fast(pattern, w), np.maximum(np.asarray(pattern), 0) @ np.asarray(w))
    assert len(traces) == 1
    assert_same(fast(x[:2], w), fn(x[:2], w))
    assert_same(fast(x, w, flip=True), fn(x, w, flip=True))
    assert_same(fast(x, w, 2.0), fn(x, w, 2.0))
    del traces[:]
    for scale in (1, True, 1.0):
        fast(x, w, scale)
    assert traces == [(1, False), (True, False), (1.0, False)] and [type(scale) for scale, _ in traces] == [
        int,
        bool,
        float,
    ]
    sign = sparsify(lambda x, s: jnp.copysign(x, s))
    assert_same(sign(x, 0.0), jnp.abs(x))
    assert_same(sign(x, -0.0), -jnp.abs(x))
    outer = jax.jit(fast)
    del traces[:]
    outer(x, w)
    outer(-x, w)
    assert not traces


class Pair(NamedTuple):
    x: jax.Array
    w: jax.Array


def test_arguments_and_results_are_any_pytrees(x, w):
    def fn(pair, options, name=None):
        y = relu(pair.x) @ pair.w
        return {"y": y, "kept": options["more"], "none": None, "number": 3, name: y.sum()}

    args = Pair(x, w), {"more": [np.ones(2, np.float32), None], "flag": True}
    out, expected = sparsify(fn)(*args, name="total"), fn(*args, name="total")
    assert replaced(lambda x, w: sparsify(fn)(Pair(x, w), args[1], name="total"), x, w) == 1
    assert out.keys() == expected.keys() and out["none"] is None
    assert_same(out["y"], expected["y"])
    assert out["number"] == 3


def test_operands_that_sparse_dot_does_not_take_stay_as_they_are(x, w, calls):
    def mixed(x, w):
        return jnp.dot(relu(x).astype(jnp.bfloat16), w.astype(jnp.bfloat16), preferred_element_type=jnp.float32)

    cases = {
        "float32 result": mixed,
        "integers": lambda x, w: relu(x).astype(jnp.int32) @ w.astype(jnp.int32),
        "complex": lambda x, w: relu(x).astype(jnp.complex64) @ w.astype(jnp.complex64),
        "empty": lambda x, w: relu(x[:0]) @ w,
        "algorithm": lambda x, w: jnp.dot(relu(x), w, precision=lax.DotAlgorithmPreset.F32_F32_F32),
    }
    for name, fn in cases.items():
        force = sparsify(fn, rules=[Rule("", "force")])
        assert replaced(sparsify(fn), x, w) == replaced(force, x, w) == 0, name
    assert_same(sparsify(mixed)(x, w), mixed(x, w), 0)
    for dtype in (jnp.bfloat16, jnp.float16):
        args = x.astype(dtype), w.astype(dtype)
        fast = sparsify(lambda x, w: relu(x) @ w)
        assert replaced(fast, *args) == 1 and fast(*args).dtype == dtype
        assert_same(fast(*args), relu(args[0]) @ args[1], 2e-2)
    for precision in ("highest", "high", "default"):
        fast = sparsify(lambda x, w, precision=precision: jnp.dot(relu(x), w, precision=precision))
        assert replaced(fast, x, w) == 1
        assert_same(fast(x, w), relu(x) @ w)


def test_what_is_not_finite(x, w):
    x = x.at[0, 0].set(jnp.nan).at[1, 1].set(jnp.inf)
    out, expected = sparsify(lambda x, w: relu(x) @ w)(x, w), np.asarray(relu(x) @ w)
    assert np.isnan(out[0]).all() and np.isnan(expected[0]).all()
    np.testing.assert_allclose(out[2:], expected[2:], rtol=1e-5, atol=1e-5)
    assert not np.isfinite(out[1]).any()


@pytest.fixture
def calls(monkeypatch):
    """What `sparse_dot` is asked for, in order."""
    made = []

    def spy(a, b, **kwargs):
        made.append(kwargs)
        return jnp.matmul(a, b)

    monkeypatch.setattr(products, "sparse_dot", spy)
    return made


def two(params, x):
    with jax.named_scope("first"):
        h = relu(x @ params["w1"])
    with jax.named_scope("second"):
        return h @ params["w2"]


def test_rules(calls, x, w):
    params, plan = {"w1": w, "w2": w}, Plan("k", MicroTile(8, 1))

    def asked(*rules):
        del calls[:]
        assert_same(sparsify(two, rules=rules)(params, x), two(params, x))
        return [{name: value for name, value in call.items() if value is not None} for call in calls]

    found = {"sparse": "a"}
    assert asked() == asked(Rule("no such place", "skip")) == [found]
    assert (
        asked(Rule(r"params\.w2$", "skip")) == asked(Rule("second/", "skip")) == asked(Rule(r"\(two\)", "skip")) == []
    )
    assert asked(Rule("w2", density=0.25)) == [found | {"density": 0.25}]
    assert asked(Rule("w2", plan)) == [found | {"plan": plan}]
    assert asked(Rule("w2", Plan("dense"))) == []
    assert asked(Rule("w1", plan)) == [found]  # a plan forces nothing
    assert asked(Rule("w1", plan, sparse="b")) == [{"sparse": "b", "plan": plan}, found]  # but named with its operand
    assert asked(Rule("w1", "force", sparse="b")) == [{"sparse": "b"}, found]
    assert asked(Rule("", "force")) == [found, found]
    assert asked(Rule("w2", sparse="b")) == []  # that operand has no zeros
    assert asked(Rule("w2", "skip"), Rule("", "force")) == [found]  # the first that matches


@pytest.mark.parametrize("sparse", ["a", "b"])
def test_zeros_that_are_to_stay_get_no_gradient(x, w, sparse):
    """By a rule, as pruned weights ask for; other operands, and what is not zero, get theirs."""
    operands = {"a": x, "b": w}
    mask = np.arange(operands[sparse].size).reshape(operands[sparse].shape) % 3 == 0
    operands[sparse] = jnp.where(mask, operands[sparse], 0)
    plan = Plan("k", MicroTile(1, 1))

    def gradients(**options):
        def loss(operands):
            rule = Rule("", plan, sparse=sparse, **options)
            return jnp.sum(jnp.sin(sparsify(lambda a, b: a @ b, rules=[rule])(operands["a"], operands["b"])))

        return jax.grad(loss)(operands)

    expected = jax.grad(lambda operands: jnp.sum(jnp.sin(operands["a"] @ operands["b"])))(operands)
    assert_same(gradients(), expected)
    expected[sparse] = jnp.where(mask, expected[sparse], 0)
    assert_same(gradients(masked=True), expected)


def test_both_operands_rich(calls, x, w):
    def fn(x, w):
        return relu(x) @ jnp.where(w > 0, w, 0)

    sparsify(fn)(x, w)
    sparsify(fn, rules=[Rule("", sparse="b")])(x, w)
    assert [call["sparse"] for call in calls] == ["a", "b"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"path": "("}, r"path must be a regular expression; got '\('"),
        ({"path": "", "action": "drop"}, 'action must be "skip", "force", a Plan or None; got action='),
        ({"path": "", "density": 1.5}, "density must be 0 to 1; got density=1.5"),
        ({"path": "", "sparse": "c"}, 'sparse must be "a", "b" or None; got sparse='),
    ],
)
def test_rules_that_mean_nothing(arguments, message, unchecked):
    with pytest.raises(ValueError, match=message):
        Rule(**arguments)


def test_bad_arguments(unchecked, x):
    with pytest.raises(TypeError, match="fn must be a function or a module with __call__; got int"):
        sparsify(3)  # pyright: ignore
    with pytest.raises(TypeError, match="module with __call__; got ArrayImpl"):
        sparsify(nnx.Linear(1, 1, rngs=nnx.Rngs(0)).kernel[...])  # pyright: ignore
    with pytest.raises(TypeError, match="rules must be Rules; got"):
        sparsify(relu, rules=["w2"])  # pyright: ignore
    with pytest.raises(TypeError, match="sample must be a tuple, the arguments of fn; got ArrayImpl"):
        sparsify(relu, sample=x)


def test_a_sample_chooses_the_plans(calls):
    w = jnp.ones((512, 512))

    def fn(x, w):
        return relu(x) @ w

    sparse_x = jnp.full((512, 512), -1.0).at[0, 0].set(1)
    sparsify(fn, sample=(sparse_x, w))(sparse_x, w)
    assert len(calls) == 1 and calls[0]["plan"].axis in ("k", "m")
    assert replaced(sparsify(fn, sample=(-sparse_x, w)), sparse_x, w) == 0  # dense is quicker there
    model = MLP(rngs=nnx.Rngs(0))
    sparsify(model, sample=(jnp.ones((4, 12)),))
    assert model.dropout.rngs is not None and model.dropout.rngs.count[...] == 0


def test_under_shard_map_it_is_applied_inside(x, w):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))

    def fn(x, w):
        return relu(x) @ w

    def sharded(fn):
        return jax.shard_map(fn, mesh=mesh, in_specs=(P("x"), P()), out_specs=P("x"))

    inside, outside = sharded(sparsify(fn)), sparsify(sharded(fn))
    assert replaced(inside, x, w) == 1 and replaced(outside, x, w) == 0
    assert_same(inside(x, w), fn(x, w))
    assert_same(outside(x, w), fn(x, w))


def test_operands_cut_over_explicit_axes_stay(x, w):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        cut = jax.device_put(x, P("x"))
        fast = sparsify(lambda x, w: relu(x) @ w)
        assert replaced(fast, cut, w) == 0
        assert_same(fast(cut, w), relu(x) @ w)


NARROW = {
    "float8_e4m3fn": (lambda x: x.astype(jnp.float8_e4m3fn).astype(jnp.bfloat16), jnp.bfloat16, 1e-4, 1.0),
    "reduce_precision": (lambda x: lax.reduce_precision(x, 5, 2), jnp.float32, 1e-7, 1.0),
    "float16": (lambda x: x * x * jnp.float16(100), jnp.float16, 1e-4, 100.0),
    "float16, scaled": (lambda x: x * jnp.float16(1e-4), jnp.float16, 1e-4, 1000.0),
}


@pytest.mark.parametrize("name", NARROW)
def test_numbers_that_underflow_keep_their_gradient(name):
    """Zeros that a narrow dtype makes of small numbers are not dead, as those of the ReLU before it are."""
    narrow, dtype, value, weight = NARROW[name]

    def f(x, w):
        return jnp.sum((narrow(jax.nn.relu(x)) @ w).astype(jnp.float32))

    x, w = jnp.full((4, 4), value, dtype), jnp.full((4, 4), weight, dtype)
    expected, grad = (np.asarray(jax.grad(g)(x, w), np.float64) for g in (f, sparsify(f)))
    assert (expected != 0).all()
    np.testing.assert_allclose(grad, expected, rtol=1e-2)


def test_a_plan_of_ones_own_has_no_density():
    with pytest.raises(ValueError, match="density must be None where action is a Plan"):
        Rule("", action=Plan("k", MicroTile(128, 1)), density=0.1)
