"""`grouped_outer` against numpy in float64: counts that break groups, both gathers, gradients, wrong arguments."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from pallas_kernels.grouped_outer import CASES, candidates, grouped_outer, peers, work
from pallas_kernels.grouped_outer.mosaic import check_config
from pallas_kernels.grouped_outer.reference import _xla
from pallas_kernels.routing import Routing
from pallas_kernels.workbench.arguments import split_static
from pallas_kernels.workbench.timing import jitted

PATHS = [functools.partial(_xla, static=static) for static in (False, True)]  # a CPU runs the first, a GPU the second
ONES = jnp.ones


def problem(seed: int, counts, *, slots: int, top_k=1, k=24, n=20, of_tokens=(False, False), dtype=jnp.float32):
    """x, y and routing; each operand has a row a slot (or position), or a row a token."""
    rng = np.random.default_rng(seed)
    shapes = [(slots // top_k if tokens else slots, width) for tokens, width in zip(of_tokens, (k, n), strict=True)]
    x, y = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    order = jnp.asarray(rng.permutation(slots), jnp.int32)
    return x, y, Routing(counts=jnp.asarray(counts, jnp.int32), order=order, top_k=top_k)


def rows_of(operand, routing, gather) -> np.ndarray:
    """The rows of an operand in the order of slots, float64."""
    rows_a_position = max(len(routing.order), 1) // max(len(operand), 1)
    rows = [position // rows_a_position for position in np.asarray(routing.order)] if gather else slice(None)
    return np.asarray(operand, np.float64)[rows]


def expected(x, y, routing, gather_x=False, gather_y=False) -> np.ndarray:
    """One expert after the other."""
    ends = np.cumsum(np.asarray(routing.counts))
    experts = [slice(end - count, end) for end, count in zip(ends, np.asarray(routing.counts), strict=True)]
    x, y = rows_of(x, routing, gather_x), rows_of(y, routing, gather_y)
    return np.stack([x[own].T @ y[own] for own in experts])


def assert_close(out, ref, bound):
    out, ref = np.asarray(out, np.float64), np.asarray(ref, np.float64)
    assert out.shape == ref.shape
    assert np.linalg.norm(out - ref) <= bound * max(np.linalg.norm(ref), 1e-30)


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _run(path, x, y, routing, gather_x, gather_y):
    return path(x, y, routing, gather_x=gather_x, gather_y=gather_y)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**16),
    counts=st.lists(st.one_of(st.sampled_from((0, 1, 15, 16, 17, 48)), st.integers(0, 48)), min_size=3, max_size=3),
    top_k=st.sampled_from((1, 3)),
    static=st.booleans(),
)
def test_any_counts(seed, counts, top_k, static):
    counts = np.diff(np.minimum(np.cumsum([0, *counts]), 48))  # 48 slots in tiles of 16; what is left is dropped
    args = problem(seed, counts, slots=48, top_k=top_k, of_tokens=(True, False))
    assert_close(_run(PATHS[static], *args, True, True), expected(*args, True, True), 1e-6)


LAYOUTS = [  # of_tokens, gather_x, gather_y
    ((False, False), False, False),
    ((True, False), True, False),
    ((False, True), True, True),
    ((True, True), True, True),
]


@pytest.mark.parametrize(("of_tokens", "gather_x", "gather_y"), LAYOUTS)
def test_value_and_gradients_of_every_layout(of_tokens, gather_x, gather_y):
    x, y, routing = problem(1, (9, 0, 25, 6), slots=42, top_k=3, of_tokens=of_tokens)
    weight = np.random.default_rng(2).normal(size=(4, 24, 20))
    product = jax.jit(lambda x, y: grouped_outer(x, y, routing, gather_x, gather_y))
    out, pull_back = jax.vjp(product, x, y)
    assert_close(out, expected(x, y, routing, gather_x, gather_y), 1e-6)

    expert = np.repeat(np.arange(4), np.asarray(routing.counts))
    weights = np.concatenate([weight[expert], np.zeros((42 - len(expert), 24, 20))])  # a dropped slot's is zero
    by_slot = (
        np.einsum("skn,sn->sk", weights, rows_of(y, routing, gather_y)),
        np.einsum("skn,sk->sn", weights, rows_of(x, routing, gather_x)),
    )
    grads = pull_back(jnp.asarray(weight, jnp.float32))
    for grad, ref, operand, gather in zip(grads, by_slot, (x, y), (gather_x, gather_y), strict=True):
        added = np.zeros(operand.shape)
        order = np.asarray(routing.order) // (42 // len(operand)) if gather else np.arange(42)
        np.add.at(added, order, ref)
        assert_close(grad, added, 1e-6)


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 1e-2), ("float16", 1e-3), ("float32", 1e-6)])
def test_every_dtype(dtype, bound):
    args = problem(3, (300, 0, 1, 99), slots=401, dtype=dtype)
    out = grouped_outer(*args)
    assert out.dtype == dtype
    assert_close(out, expected(*args), bound)


def test_sums_are_kept_in_float32():
    """512 slots of ones: in bfloat16 their sum stops at 256."""
    x, y, routing = problem(4, (0, 512), slots=512, k=1, n=2, dtype=jnp.bfloat16)
    out = np.asarray(grouped_outer(jnp.ones_like(x), jnp.ones_like(y), routing), np.float32)
    np.testing.assert_array_equal(out, [[[0, 0]], [[512, 512]]])


@pytest.mark.parametrize("path", PATHS)
def test_what_is_not_finite_stays_with_its_expert(path):
    """In an expert's rows of either operand, and in dropped rows."""
    x, y, routing = problem(5, (20, 0, 18, 2), slots=50)
    x, y = x.at[40:].set(jnp.nan).at[3].set(jnp.inf), y.at[39].set(jnp.nan).at[40:].set(jnp.inf)
    finite = np.isfinite(np.asarray(_run(path, x, y, routing, False, False)))
    assert not finite[0].any() and not finite[3].any() and finite[1:3].all()


def test_gradients_of_gradients_are_those_of_the_formula():
    x, y, routing = problem(6, (7, 0, 12), slots=24, top_k=2, k=8, n=6, of_tokens=(True, False))
    order, experts = np.asarray(routing.order), np.repeat([0, 2, 3], [7, 12, 5])
    one_hot = jnp.asarray(experts[:, None] == np.arange(3)[None], jnp.float32)

    def plain(x, y):
        return jnp.einsum("se,sk,sn->ekn", one_hot, x[order // 2], y[order], precision="highest")

    def second(product):
        def norm(x, y):
            grads = jax.grad(lambda x, y: jnp.sum(jnp.sin(product(x, y))), argnums=(0, 1))(x, y)
            return sum(jnp.sum(grad**2) for grad in grads)

        return jax.jit(jax.grad(norm, argnums=(0, 1)))(x, y)

    for out, ref in zip(second(lambda x, y: grouped_outer(x, y, routing, True, True)), second(plain), strict=True):
        assert_close(out, ref, 1e-5)


def test_new_counts_compile_nothing_and_ask_the_host_nothing():
    traces = []

    @jax.jit
    def product(x, y, routing):
        traces.append(None)
        return grouped_outer(x, y, routing)

    variants = [problem(7, counts, slots=40) for counts in ((40, 0, 0), (0, 0, 0), (1, 20, 19))]
    with jax.transfer_guard("disallow"):
        outputs = [product(*args) for args in variants]
    assert len(traces) == 1
    for args, out in zip(variants, outputs, strict=True):
        assert_close(out, expected(*args), 1e-6)


def test_value_and_gradients_under_shard_map():
    """Operands vary over different mesh axes: the types must fit, on one device too."""
    x, y, routing = problem(8, (9, 0, 20), slots=32)
    mesh = jax.make_mesh((1, 1), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = (P(None, "x"), P(None, "y"), P())
    product = jax.shard_map(grouped_outer, mesh=mesh, in_specs=specs, out_specs=P(None, "x", "y"))
    out, pull_back = jax.vjp(jax.jit(lambda x, y: product(x, y, routing)), x, y)
    ref = expected(x, y, routing)
    assert_close(out, ref, 1e-6)
    by_slot = np.concatenate([ref[np.repeat([0, 2], [9, 20])], np.zeros((3, 24, 20))])
    grad_x, grad_y = pull_back(out)
    assert_close(grad_x, np.einsum("skn,sn->sk", by_slot, np.asarray(y, np.float64)), 1e-5)
    assert_close(grad_y, np.einsum("skn,sk->sn", by_slot, np.asarray(x, np.float64)), 1e-5)


def test_under_x64_and_from_numpy(unchecked):
    args = problem(9, (9, 0, 20), slots=32)
    with jax.enable_x64(True):
        out, pull_back = jax.vjp(jax.jit(lambda x, y: grouped_outer(x, y, args[2])), *map(np.asarray, args[:2]))
        grads = pull_back(out)
    assert {x.dtype for x in (out, *grads)} == {jnp.dtype("float32")}
    assert_close(out, expected(*args), 1e-6)


@pytest.mark.parametrize(("slots", "k", "n"), [(0, 4, 6), (8, 0, 6), (8, 4, 0)])
def test_nothing_to_do(slots, k, n):
    x, y, routing = problem(10, (slots, 0), slots=slots, top_k=2, k=k, n=n, of_tokens=(True, False))
    out, pull_back = jax.vjp(jax.jit(lambda x, y: grouped_outer(x, y, routing, True, True)), x, y)
    assert out.shape == (2, k, n) and not np.asarray(out).any()
    assert [grad.shape for grad in pull_back(out)] == [x.shape, y.shape]


def _arguments(**changes):
    x, y, routing = problem(11, (3, 5), slots=8, k=4, n=6)
    routing_changes = {name: changes.pop(name) for name in ("counts", "order", "top_k") if name in changes}
    return {"x": x, "y": y, "routing": dataclasses.replace(routing, **routing_changes)} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": ONES((2, 8, 4))}, r"x and y must be \[rows, K\] and \[rows, N\]; got shapes \(2, 8, 4\) and \(8, 6\)"),
        ({"y": ONES((8, 6), jnp.float16)}, "x and y must have one dtype; got float32 and float16"),
        ({"x": ONES((8, 4), jnp.int32), "y": ONES((8, 6), jnp.int32)}, "dtype must be .* got int32"),
        ({"x": ONES((4, 4)), "top_k": 2}, "x must have a row for each slot; got 4 rows, 8 slots, top_k=2"),
        (
            {"y": ONES((2, 6)), "top_k": 2, "gather_y": True},
            "y must have a row for each slot or token; got 2 rows, 8 slots, top_k=2",
        ),
        ({"counts": ONES(2)}, r"routing.counts must be int32 of rank 1; got float32\[2\]"),
        ({"top_k": 3}, r"must have tokens \* top_k slots; got 8, top_k=3"),
        ({"implementation": "triton"}, "implementation must be .*; got 'triton'"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_compiled(unchecked, changes, message):
    with pytest.raises(ValueError, match=message):
        grouped_outer(**_arguments(**changes))


def test_a_cpu_has_no_mosaic_kernel():
    args = problem(12, (3, 5), slots=8, k=64, n=64, dtype=jnp.bfloat16)
    with pytest.raises(NotImplementedError):
        grouped_outer(*args, implementation="mosaic_gpu")


def test_work_counts_what_the_routing_needs():
    routing = Routing(counts=jnp.asarray([2, 0, 1], jnp.int32), order=jnp.asarray([0, 1, 3, 2], jnp.int32), top_k=2)
    x, y = ONES((2, 10), jnp.bfloat16), ONES((4, 8), jnp.bfloat16)
    counted = work(x, y, routing, True, False)
    assert counted.flops == 3 * 2 * 10 * 8
    assert counted.bytes == 2 * (2 * 10 + 3 * 8 + 3 * 10 * 8) + 4 * 3


@pytest.mark.parametrize("case", CASES[4:5], ids=lambda case: case.name)
def test_peers_and_candidates(case):
    args = case.make(jax.random.key(0), jnp.dtype("bfloat16"))
    for config in candidates(*args):
        check_config(config, *args)
    arrays, _ = split_static(args)
    x, y, routing, gather_x, gather_y = args
    named = peers(*args)
    assert jitted(named["dense"], args)(*arrays).shape == (x.shape[1], y.shape[1])
    assert_close(jitted(named["ragged_dot"], args)(*arrays), expected(x, y, routing, gather_x, gather_y), 1e-2)
