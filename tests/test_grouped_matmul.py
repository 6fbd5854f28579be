"""`grouped_matmul` against numpy in float64: counts that break groups, every option, gradients, wrong arguments."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from pallas_kernels.grouped_matmul import CASES, candidates, grouped_matmul, peers, work
from pallas_kernels.grouped_matmul.mosaic import check_config
from pallas_kernels.grouped_matmul.reference import _xla
from pallas_kernels.routing import Routing
from pallas_kernels.tile import epilogue
from pallas_kernels.workbench.arguments import split_static
from pallas_kernels.workbench.timing import jitted

ERF = np.vectorize(math.erf, otypes=[float])
ACTIVATIONS = {
    None: lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * (1 + ERF(x / 2**0.5)) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
}
PATHS = [functools.partial(_xla, static=static) for static in (False, True)]  # a CPU runs the first, a GPU the second


def routing_of(seed: int, counts, slots: int, top_k: int = 1) -> Routing:
    order = np.random.default_rng(seed).permutation(slots).astype(np.int32)
    return Routing(counts=jnp.asarray(counts, jnp.int32), order=jnp.asarray(order), top_k=top_k)


def problem(
    seed: int, counts, *, slots: int, top_k=1, k=24, n=20, gather=False, transposed=False, biased=False, scaled=False,
    dtype=jnp.float32,
):  # fmt: skip
    """x, w, routing, bias and scale."""
    rng = np.random.default_rng(seed)
    experts = len(counts)
    shapes = ((slots // top_k if gather else slots, k), (experts, n, k) if transposed else (experts, k, n))
    x, w = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    bias = jnp.asarray(rng.normal(size=(experts, n)), dtype) if biased else None
    scale = jnp.asarray(rng.normal(size=slots), jnp.float32) if scaled else None
    return x, w, routing_of(seed, counts, slots, top_k), bias, scale


def expected(
    x, w, routing, bias=None, scale=None, gather=False, scatter=False, activation=None, gated=False, transposed=False
) -> np.ndarray:
    """One slot after the other."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    w = w.transpose(0, 2, 1) if transposed else w
    order, counts = np.asarray(routing.order), np.asarray(routing.counts)
    bias, scale = (None if array is None else np.asarray(array, np.float64) for array in (bias, scale))
    n = w.shape[2]
    out = np.zeros((len(order), n // 2 if gated else n))
    for slot, expert in enumerate(np.repeat(np.arange(len(counts)), counts)):
        y = x[order[slot] // routing.top_k if gather else slot] @ w[expert]
        y = y if bias is None else y + bias[expert]
        y = ACTIVATIONS[activation](y[: n // 2]) * y[n // 2 :] if gated else ACTIVATIONS[activation](y)
        out[order[slot] if scatter else slot] = y if scale is None else y * scale[slot]
    return out


def assert_close(out, ref, bound):
    out, ref = np.asarray(out, np.float64), np.asarray(ref, np.float64)
    assert out.shape == ref.shape
    assert np.linalg.norm(out - ref) <= bound * max(np.linalg.norm(ref), 1e-30)


def assert_right(args, bound=1e-6, **options):
    out = jax.jit(functools.partial(grouped_matmul, **options))(*args)
    assert out.dtype == args[0].dtype
    assert_close(out, expected(*args, **options), bound)


@functools.partial(jax.jit, static_argnums=(0, 6, 7))
def _run(path, x, w, routing, bias, scale, gather, scatter):
    options = {"activation": None, "gated": False, "transposed": False}
    return path(x, w, routing, bias, scale, gather=gather, scatter=scatter, **options)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**16),
    counts=st.lists(st.one_of(st.sampled_from((0, 1, 15, 16, 17, 48)), st.integers(0, 48)), min_size=3, max_size=3),
    top_k=st.sampled_from((1, 3)),
    static=st.booleans(),
)
def test_any_counts(seed, counts, top_k, static):
    counts = np.diff(np.minimum(np.cumsum([0, *counts]), 48))  # 48 slots in tiles of 16; what is left is dropped
    args = problem(seed, counts, slots=48, top_k=top_k, gather=True, scaled=True)
    out = _run(PATHS[static], *args, True, True)
    assert_close(out, expected(*args, gather=True, scatter=True), 1e-6)


@pytest.mark.parametrize(
    ("activation", "gated"),
    [(None, True), ("relu", False), ("gelu", False), ("gelu_tanh", True), ("silu", True)],
)
def test_every_activation(activation, gated):
    args = problem(1, (9, 0, 20, 6), slots=40, top_k=2, gather=True, biased=True, scaled=True)
    assert_right(args, gather=True, scatter=True, activation=activation, gated=gated)


def test_the_kernels_activations_are_right_over_float32():
    x = np.concatenate([np.linspace(-12, 12, 4801), [1e4, -1e4, 3e38, -3e38]]).astype(np.float32)
    wide = x.astype(np.float64)
    with np.errstate(over="ignore"):
        expected = {
            "gelu": wide * np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in wide]),
            "gelu_tanh": 0.5 * wide * (1 + np.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))),
            "silu": wide / (1 + np.exp(-wide)),
        }
    for name, want in expected.items():
        got = np.asarray(epilogue.ACTIVATIONS[name](jnp.asarray(x)), np.float64)
        assert np.all(np.abs(got - want) <= 2e-6 * np.maximum(1, np.abs(want))), name
        assert np.isnan(epilogue.ACTIVATIONS[name](jnp.float32(jnp.nan)))


@pytest.mark.parametrize(
    ("gather", "scatter", "transposed"),
    [(False, False, True), (True, False, False), (False, True, False), (True, True, True)],
)
def test_every_layout(gather, scatter, transposed):
    args = problem(2, (9, 0, 20, 6), slots=42, top_k=3, gather=gather, transposed=transposed, biased=True)
    assert_right(args, gather=gather, scatter=scatter, transposed=transposed, activation="relu")


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 1e-2), ("float16", 1e-3), ("float32", 1e-6)])
def test_every_dtype(dtype, bound):
    args = problem(3, (300, 0, 1, 99), slots=401, biased=True, scaled=True, dtype=dtype)
    assert_right(args, bound, activation="silu", gated=True)


def test_what_follows_the_product_is_rounded_once():
    """bfloat16: 256 + 1 - 256 is 1 where the sum is kept in float32, and 0 where the product is rounded first."""
    x, w = jnp.ones((1, 257), jnp.bfloat16), jnp.ones((1, 257, 1), jnp.bfloat16)
    out = grouped_matmul(x, w, routing_of(0, (1,), 1), jnp.full((1, 1), -256, jnp.bfloat16))
    assert out.item() == 1


@pytest.mark.parametrize("path", PATHS)
def test_what_is_not_finite_stays_where_it_is(path):
    """In an expert's weights, in a slot's row, in dropped rows; an expert without slots is not read."""
    counts, slots = (20, 0, 18, 2), 50
    x, w, routing, *_ = problem(4, counts, slots=slots)
    x, w = x.at[40:].set(jnp.nan).at[3].set(jnp.inf), w.at[1].set(jnp.nan).at[2].set(jnp.nan)
    out = np.asarray(_run(path, x, w, routing, None, None, False, False))
    poisoned = np.isin(np.arange(slots), (3, *range(20, 38)))
    assert not np.isfinite(out[poisoned]).any() and np.isfinite(out[~poisoned]).all()
    assert not out[40:].any()


def test_gradients_of_what_is_not_finite_stay_with_the_expert():
    counts = (20, 0, 18)
    x, w, routing, bias, scale = problem(5, counts, slots=44, biased=True, scaled=True)
    assert scale is not None
    x, scale = x.at[5].set(jnp.nan).at[38:].set(jnp.nan), scale.at[38:].set(jnp.nan)

    def loss(x, w, bias, scale):
        out = grouped_matmul(x, w, routing, bias, scale, activation="silu")
        return jnp.sum(out * jnp.where(jnp.arange(44) < 38, 1, jnp.nan)[:, None])

    grad_x, grad_w, grad_bias, grad_scale = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(x, w, bias, scale)
    for by_slot in (grad_x, grad_scale):
        np.testing.assert_array_equal(np.flatnonzero(~np.isfinite(np.asarray(by_slot).reshape(44, -1)).all(1)), [5])
        assert not np.asarray(by_slot[38:]).any()
    for by_expert in (grad_w, grad_bias):
        assert not np.isfinite(by_expert[0]).any() and np.isfinite(by_expert[1:]).all()
        assert not np.asarray(by_expert[1]).any()


JNP_ACTIVATIONS = {None: lambda x: x, "relu": jax.nn.relu, "gelu": functools.partial(jax.nn.gelu, approximate=False),
                   "gelu_tanh": jax.nn.gelu, "silu": jax.nn.silu}  # fmt: skip


def plain(
    x, w, routing, bias, scale, *, gather=False, scatter=False, activation=None, gated=False, transposed=False
):  # fmt: skip
    """The formula with a copy of its weights for every slot."""
    expert = np.repeat(np.arange(len(routing.counts)), np.asarray(routing.counts))
    taken, order = len(expert), np.asarray(routing.order)[: len(expert)]
    rows = x[order // routing.top_k] if gather else x[:taken]
    y = jnp.einsum("sk,snk->sn" if transposed else "sk,skn->sn", rows, w[expert], precision="highest")
    y = y if bias is None else y + bias[expert]
    gate, up = jnp.split(y, 2, axis=1) if gated else (y, jnp.ones_like(y))
    y = JNP_ACTIVATIONS[activation](gate) * up
    y = y if scale is None else y * scale[:taken, None]
    places = order if scatter else jnp.arange(taken)
    return jnp.zeros((len(routing.order), y.shape[1])).at[places].set(y)


@pytest.mark.parametrize(
    ("top_k", "extras", "options"),
    [
        (1, True, {}),
        (2, False, {"gather": True, "activation": "silu", "gated": True}),
        (3, True, {"scatter": True, "activation": "gelu_tanh", "gated": True}),
        (2, True, {"gather": True, "scatter": True, "activation": "gelu", "transposed": True}),
    ],
)
def test_gradients_are_those_of_the_formula(top_k, extras, options):
    layout = {name: options.get(name, False) for name in ("gather", "transposed")}
    x, w, routing, bias, scale = problem(
        6, (9, 0, 25, 6), slots=48, top_k=top_k, biased=extras, scaled=extras, **layout
    )  # fmt: skip
    weight = np.random.default_rng(7).normal(size=(48, 10 if options.get("gated") else 20)).astype(np.float32)

    def gradients(product):
        def loss(x, w, bias, scale):
            return jnp.sum(weight * product(x, w, routing, bias, scale, **options))

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3) if extras else (0, 1)))(x, w, bias, scale)

    for out, ref in zip(gradients(grouped_matmul), gradients(plain), strict=True):
        assert out.dtype == jnp.float32
        assert_close(out, ref, 1e-5)


def test_gradients_of_gradients_are_those_of_the_formula():
    x, w, routing, *_ = problem(8, (7, 0, 12), slots=24, top_k=2, k=8, n=6, gather=True)

    def second(product):
        def loss(x, w):
            return jnp.sum(jnp.sin(product(x, w, routing, None, None, gather=True, scatter=True, activation="silu")))

        def norm(x, w):
            return sum(jnp.sum(grad**2) for grad in jax.grad(loss, argnums=(0, 1))(x, w))

        return jax.jit(jax.grad(norm, argnums=(0, 1)))(x, w)

    for out, ref in zip(second(grouped_matmul), second(plain), strict=True):
        assert_close(out, ref, 1e-5)


def test_gradients_of_bfloat16_add_up_in_float32():
    """512 slots of ones: in bfloat16 their sum stops at 256; so would that of 512 choices of a token."""
    x, w = jnp.ones((1, 8), jnp.bfloat16), jnp.ones((1, 8, 8), jnp.bfloat16) / 8
    routing = routing_of(9, (512,), 512, top_k=512)
    loss = jax.jit(jax.grad(lambda x, w, bias: grouped_matmul(x, w, routing, bias, gather=True).sum(), (0, 1, 2)))
    for grad in loss(x, w, jnp.zeros((1, 8), jnp.bfloat16)):
        np.testing.assert_array_equal(np.asarray(grad, np.float32), 512)


def test_new_counts_compile_nothing_and_ask_the_host_nothing():
    traces = []

    @jax.jit
    def gradient(x, w, routing):
        traces.append(None)
        return jax.grad(lambda w: grouped_matmul(x, w, routing, activation="relu").sum())(w)

    variants = [problem(10, counts, slots=40)[:3] for counts in ((40, 0, 0), (0, 0, 0), (1, 20, 19))]
    with jax.transfer_guard("disallow"):
        outputs = [gradient(*args) for args in variants]
    assert len(traces) == 1
    for (x, w, routing), out in zip(variants, outputs, strict=True):
        slots = np.asarray(expected(x, w, routing) > 0, np.float64)
        rows = np.split(np.asarray(x, np.float64), np.cumsum(routing.counts))
        signs = np.split(slots, np.cumsum(routing.counts))
        assert_close(out, np.stack([a.T @ b for a, b in zip(rows[:-1], signs[:-1], strict=True)]), 1e-5)


@pytest.mark.parametrize(
    ("x_spec", "w_spec", "routing_spec", "out_spec"),
    [
        (P("x"), P(), P("x"), P("x")),  # tokens over devices, the weights on each
        (P(), P(None, None, "y"), P(), P(None, "y")),  # columns of the weights over devices
    ],
)
def test_value_and_gradients_under_shard_map(x_spec, w_spec, routing_spec, out_spec):
    """Operands vary over different mesh axes: the types must fit, on one device too."""
    x, w, routing, *_ = problem(11, (9, 0, 20), slots=32, top_k=2, gather=True)
    mesh = jax.make_mesh((1, 1), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    options = {"gather": True, "scatter": True, "activation": "silu"}

    def product(x, w, routing):
        return grouped_matmul(x, w, routing, **options)

    sharded = jax.shard_map(product, mesh=mesh, in_specs=(x_spec, w_spec, routing_spec), out_specs=out_spec)

    def value_and_gradients(product):
        loss = jax.value_and_grad(lambda x, w: jnp.sum(product(x, w) ** 2), argnums=(0, 1))
        return jax.tree.leaves(jax.jit(loss)(x, w))

    ours = value_and_gradients(lambda x, w: sharded(x, w, routing))
    theirs = value_and_gradients(lambda x, w: plain(x, w, routing, None, None, **options))
    for out, ref in zip(ours, theirs, strict=True):
        assert_close(out, ref, 1e-5)


def test_under_x64_and_from_numpy(unchecked):
    args = problem(12, (9, 0, 20), slots=32, scaled=True)
    x, w, routing, _, scale = args
    with jax.enable_x64(True):
        product = jax.jit(lambda x, w, scale: grouped_matmul(x, w, routing, None, scale, activation="gelu"))
        out, pull_back = jax.vjp(product, *map(np.asarray, (x, w, scale)))
        grads = pull_back(out)
    assert {x.dtype for x in (out, *grads)} == {jnp.dtype("float32")}
    assert_close(out, expected(*args, activation="gelu"), 1e-6)


@pytest.mark.parametrize(("slots", "k", "n"), [(0, 4, 6), (8, 0, 6), (8, 4, 0)])
def test_nothing_to_do(slots, k, n):
    args = problem(13, (slots, 0), slots=slots, top_k=2, k=k, n=n, gather=True, biased=True, scaled=True)
    options = {"gather": True, "activation": "silu", "gated": True}
    assert_right(args, **options)
    x, w, routing, *added = args

    def loss(x, w, added):
        return grouped_matmul(x, w, routing, *added, **options).sum()

    grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, w, added)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, (x, w, added))


def _arguments(**changes):
    x, w, routing, *_ = problem(14, (3, 5), slots=8, k=4, n=6)
    routing_changes = {name: changes.pop(name) for name in ("counts", "order", "top_k") if name in changes}
    return {"x": x, "w": w, "routing": dataclasses.replace(routing, **routing_changes)} | changes


ONES = jnp.ones


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(x=ONES((2, 8, 4))), r"x and w must be \[rows, K\] and \[experts, K, N\]; got shapes \(2, 8, 4\)"),
        (dict(w=ONES((4, 6)), transposed=True), r"\[experts, N, K\]; got shapes \(8, 4\) and \(4, 6\)"),
        (dict(x=ONES((7, 4))), "x must have a row for each slot; got 7 rows, 8 slots, top_k=1"),
        (dict(gather=True, top_k=2), "x must have a row for each token; got 8 rows, 8 slots, top_k=2"),
        (dict(w=ONES((2, 5, 6))), r"K of x; got \[2, 5, 6\], experts=2, K=4"),
        (dict(w=ONES((3, 4, 6))), r"experts of routing .* got \[3, 4, 6\], experts=2"),
        (dict(transposed=True), r"w must be \[experts, N, K\]"),
        (dict(x=ONES((8, 4), jnp.int32)), "dtype must be bfloat16, float16, float32 or float8_e4m3fn; got int32"),
        (dict(w=ONES((2, 4, 6), jnp.bfloat16)), "x and w must have one dtype; got float32 and bfloat16"),
        (dict(bias=ONES((2, 6), jnp.float16)), "bias must be float32, as the result is; got float16"),
        (dict(bias=ONES((2, 5))), r"bias must be \[experts, N\]; got \[2, 5\], experts=2, N=6"),
        (dict(scale=ONES(7)), r"scale must be float32\[8\], one a slot; got float32\[7\]"),
        (dict(scale=ONES(8, jnp.bfloat16)), r"scale must be float32\[8\].* got bfloat16\[8\]"),
        (dict(activation="tanh"), "activation must be one of None, relu, .*; got 'tanh'"),
        (dict(w=ONES((2, 4, 5)), gated=True), "N of w must be even where it is gated; got N=5"),
        (dict(counts=ONES(2)), r"routing.counts must be int32 of rank 1; got float32\[2\]"),
        (dict(order=ONES((8, 1), jnp.int32)), r"routing.order must be int32 of rank 1; got int32\[8, 1\]"),
        (dict(counts=ONES(0, jnp.int32)), "must name at least one expert; got none"),
        (dict(top_k=0), "routing.top_k must be at least 1; got top_k=0"),
        (dict(top_k=3), r"must have tokens \* top_k slots; got 8, top_k=3"),
        (dict(implementation="triton"), "implementation must be .*; got 'triton'"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_compiled(unchecked, changes, message):
    with pytest.raises(ValueError, match=message):
        grouped_matmul(**_arguments(**changes))


def test_more_slots_than_int32_counts(unchecked):
    order = jax.ShapeDtypeStruct((2**30,), jnp.int32)
    with pytest.raises(ValueError, match=r"fewer than 2\*\*30 slots, which int32 counts; got 1073741824"):
        jax.eval_shape(lambda order: grouped_matmul(**_arguments(order=order)), order)


def test_a_cpu_has_no_mosaic_kernel():
    args = problem(15, (3, 5), slots=8, k=64, n=64, dtype=jnp.bfloat16)
    with pytest.raises(NotImplementedError):
        grouped_matmul(*args, implementation="mosaic_gpu")


def test_work_counts_what_the_routing_needs():
    routing = Routing(counts=jnp.asarray([2, 0, 1], jnp.int32), order=jnp.asarray([0, 2, 3, 1], jnp.int32), top_k=2)
    x, w = ONES((2, 10), jnp.bfloat16), ONES((3, 10, 8), jnp.bfloat16)
    counted = work(x, w, routing, None, ONES(4), True, False, "silu", True, False)
    assert counted.flops == 3 * 2 * 10 * 8
    assert counted.bytes == 2 * (2 * 10 + 2 * 10 * 8 + 4 * 4) + 4 * (3 + 3)
    sorted_rows = work(ONES((4, 10), jnp.bfloat16), w, routing)
    assert sorted_rows.bytes == 2 * (3 * 10 + 2 * 10 * 8 + 4 * 8)


@pytest.mark.parametrize("case", CASES[4:5], ids=lambda case: case.name)
def test_peers_and_candidates(case):
    args = case.make(jax.random.key(0), jnp.dtype("bfloat16"))
    for config in candidates(*args):
        check_config(config, *args)
    named = peers(*args)
    arrays, _ = split_static(args)
    assert jitted(named["dense"], args)(*arrays).size == args[2].slots * args[1].shape[1 if args[9] else 2]
    if "ragged_dot" in named:
        assert_close(jitted(named["ragged_dot"], args)(*arrays), expected(*args), 1e-2)


@pytest.mark.parametrize("transposed", [False, True])
def test_float8_gives_bfloat16(transposed):
    """Value and gradients: what float8 holds is exact in bfloat16, so the rest is the wide product's rounding."""
    x, w, routing, bias, scale = problem(
        5, (3, 0, 6), slots=10, transposed=transposed, biased=True, scaled=True, dtype=jnp.float8_e4m3fn
    )
    assert bias is not None
    bias, options = bias.astype(jnp.bfloat16), {"transposed": transposed, "activation": "silu", "scatter": True}
    out, pull_back = jax.vjp(lambda x, w: grouped_matmul(x, w, routing, bias, scale, **options), x, w)
    assert out.dtype == jnp.bfloat16
    assert_close(out, expected(x, w, routing, bias, scale, **options), 1e-2)
    wide, exact = (a.astype(jnp.float32) for a in (x, w)), (bias.astype(jnp.float32), scale)
    _, pull_back_wide = jax.vjp(lambda x, w: grouped_matmul(x, w, routing, *exact, **options), *wide)
    for grad, ref, operand in zip(pull_back(out), pull_back_wide(out.astype(jnp.float32)), (x, w), strict=True):
        assert grad.dtype == operand.dtype
        assert_close(grad, jnp.clip(ref, -448, 448), 0.05)  # three bits of mantissa


def test_float8_weights_of_the_kernel_are_transposed():
    x, w, routing, *_ = problem(0, (4, 4), slots=8, k=64, n=64, dtype=jnp.float8_e4m3fn)
    with pytest.raises(NotImplementedError, match=r"float8_e4m3fn weights as \[experts, N, K\]"):
        grouped_matmul(x, w, routing, implementation="interpret")
