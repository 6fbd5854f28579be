"""`route` against plain Python loops over tokens."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from lanes import run

from pallas_kernels.route import Config, candidates, device, route
from pallas_kernels.routing import Routing
from pallas_kernels.workbench.checks import check_path
from pallas_kernels.workbench.kernels import load_kernel

NAN, INF = float("nan"), float("inf")


def expected(scores, top_k, capacity=None, priority=None, mask=None, groups=1):
    """ids, counts and order, one token and one choice at a time."""
    tokens, experts = scores.shape
    value = np.where(np.isnan(scores), -INF, scores)
    ids = [sorted(range(experts), key=lambda e: (-value[t, e], e))[:top_k] for t in range(tokens)]
    taken, limit = {e: [] for e in range(experts)}, tokens * top_k if capacity is None else capacity
    for start in range(0, tokens, max(tokens // groups, 1)):
        queue = range(start, start + tokens // groups)
        if priority is not None:
            queue = sorted(queue, key=lambda t: (np.isnan(priority[t]), -np.nan_to_num(priority[t], nan=0), t))
        room = [limit] * experts
        for j in range(top_k):
            for t in queue:
                if (mask is None or mask[t]) and room[ids[t][j]]:
                    room[ids[t][j]] -= 1
                    taken[ids[t][j]].append(t * top_k + j)
    order = [p for e in range(experts) for p in sorted(taken[e])]
    order += sorted(set(range(tokens * top_k)) - set(order))
    return ids, [len(taken[e]) for e in range(experts)], order


def assert_routed(out, *args):
    (ids, routing), (want_ids, want_counts, want_order) = out, expected(*args)
    np.testing.assert_array_equal(np.asarray(ids), np.asarray(want_ids, np.int32).reshape(ids.shape))
    assert np.asarray(routing.counts).tolist() == want_counts
    assert np.asarray(routing.order).tolist() == want_order
    assert routing.top_k == args[1] and ids.dtype == routing.counts.dtype == routing.order.dtype == jnp.int32


def random_scores(seed: int, tokens: int, experts: int, steps: int) -> np.ndarray:
    """Many equal scores where `steps` is small; some not finite, some denormal, zeros of either sign."""
    rng = np.random.default_rng(seed)
    scores = np.round(rng.normal(size=(tokens, experts)) * steps) / steps
    odd = rng.random(scores.shape) < 0.1
    return np.where(odd, rng.choice([NAN, -NAN, INF, -INF, 0.0, -0.0, 1e-40, -1e-40], scores.shape), scores)


jitted = jax.jit(route, static_argnums=(1, 2, 5), static_argnames=("config", "implementation"))

CASES = (  # tokens, experts, top_k, capacity, groups, prioritised, masked, dtype
    (1, 1, 1, None, 1, False, False, jnp.float32),
    (150, 8, 2, None, 1, False, False, jnp.bfloat16),
    (150, 8, 2, 30, 1, False, True, jnp.float16),
    (260, 40, 3, 5, 2, True, False, jnp.float32),
    (36, 33, 1, 2, 6, True, True, jnp.bfloat16),
)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**16), case=st.sampled_from(CASES))
def test_equals_loops_over_tokens(seed, case):
    rng, (tokens, experts, top_k, capacity, groups, prioritised, masked, dtype) = np.random.default_rng(seed), case
    scores = jnp.asarray(random_scores(seed, tokens, experts, steps=1 + seed % 4), dtype)
    priority = priority_of(rng, tokens) if prioritised else None
    mask = rng.random(tokens) < 0.7 if masked else None
    args = top_k, capacity, priority, mask, groups
    assert_routed(jitted(scores, *args, implementation="xla"), np.asarray(scores.astype(jnp.float32)), *args)


def priority_of(rng, tokens: int) -> np.ndarray:
    """Many equal ones, some not finite."""
    return rng.choice([0.0, -0.0, 1.0, -3.0, NAN, INF, -INF], tokens).astype(np.float32)


@pytest.mark.parametrize("value", [NAN, -INF, INF, 0.0])
def test_experts_stay_distinct_where_no_score_is_better(value):
    ids, routing = jitted(jnp.full((5, 6), value), 6)
    assert np.asarray(ids).tolist() == [[0, 1, 2, 3, 4, 5]] * 5
    assert np.asarray(routing.counts).tolist() == [5] * 6


def test_more_choices_than_are_taken_one_by_one():
    scores = random_scores(0, 20, 50, steps=2).astype(np.float32)
    assert_routed(jitted(scores, 30), scores, 30)


def test_every_token_to_one_expert():
    scores = np.zeros((700, 9), np.float32)
    scores[:, 4] = 1
    assert_routed(jitted(scores, 1, 500), scores, 1, 500)


def test_nobody_and_nothing():
    scores = np.ones((8, 4), np.float32)
    mask = np.zeros(8, bool)
    assert_routed(jitted(scores, 2, mask=mask), scores, 2, None, None, mask)
    ids, routing = route(jnp.ones((0, 4)), 3)
    assert ids.shape == (0, 3) and routing.order.shape == (0,) and np.asarray(routing.counts).tolist() == [0] * 4


def test_room_for_all_is_no_limit():
    scores = random_scores(0, 12, 4, steps=2).astype(np.float32)
    for capacity in (3, 2**40):
        out = jitted(scores, 2, capacity, np.zeros(12, np.float32), None, 4)
        assert_routed(out, scores, 2)


def test_integers_are_32_bits_under_x64():
    with jax.enable_x64(True):
        ids, routing = jitted(np.ones((12, 4), np.float32), 2, 4, np.ones(12, np.float32), np.ones(12, bool), 2)
    assert ids.dtype == routing.counts.dtype == routing.order.dtype == jnp.int32


def test_first_choices_come_before_second_ones():
    """Both tokens want expert 1: the second one first of all. GShard, algorithm 1."""
    ids, routing = jitted(jnp.asarray([[2.0, 1.0, 0.0], [0.0, 2.0, 1.0]]), 2, 1)
    assert np.asarray(ids).tolist() == [[0, 1], [1, 2]]
    assert np.asarray(routing.counts).tolist() == [1, 1, 1]
    assert np.asarray(routing.order).tolist() == [0, 2, 3, 1]


def test_new_scores_compile_nothing():
    traces = []

    @jax.jit
    def find(scores, mask):
        traces.append(None)
        return route(scores, 2, 3, mask=mask)

    for seed in range(3):
        scores, mask = np.random.default_rng(seed).normal(size=(20, 5)).astype(np.float32), np.arange(20) % 3 != seed
        assert_routed(find(jnp.asarray(scores), jnp.asarray(mask)), scores, 2, 3, None, mask)
    assert len(traces) == 1


def test_batched_and_not_differentiated():
    scores = np.random.default_rng(1).normal(size=(2, 30, 7)).astype(np.float32)

    def scaled_sum(scores):
        ids, routing = route(scores, 2)
        return jnp.sum(scores) * routing.counts[0].astype(jnp.float32), (ids, routing.counts, routing.order)

    grads, outputs = jax.jit(jax.vmap(jax.grad(scaled_sum, has_aux=True)))(scores)
    for i, (ids, counts, order) in enumerate(zip(*outputs, strict=True)):
        assert_routed((ids, Routing(counts=counts, order=order, top_k=2)), scores[i], 2)
        np.testing.assert_array_equal(np.asarray(grads[i]), np.full((30, 7), counts[0], np.float32))


DEVICE_CASES = (  # tokens, experts, top_k, capacity, groups, share that is masked, config
    (9, 3, 3, None, 1, 0.0, Config(tokens=8, warpgroups=1)),
    (100, 40, 5, None, 1, 0.5, Config(tokens=8, warpgroups=4)),  # one block, one launch
    (300, 33, 3, None, 1, 0.2, Config(tokens=16, warpgroups=2)),
    (150, 130, 8, None, 1, 0.0, Config(tokens=32, warpgroups=1)),  # more experts than threads
    (10, 300, 2, None, 1, 0.0, Config(tokens=8, warpgroups=1)),
    (700, 4, 1, 40, 2, 0.3, Config(tokens=8, warpgroups=1)),  # runs of 11 blocks
    (160, 8, 1, 3, 5, 0.0, Config(tokens=8, warpgroups=2)),
    (40, 20, 1, 100, 1, 1.0, Config(tokens=8, warpgroups=1)),  # nobody
)


@pytest.mark.parametrize("case", DEVICE_CASES, ids=str)
def test_device_code_on_numpy_lanes(case, unchecked):
    tokens, experts, top_k, capacity, groups, masked, config = case
    scores = random_scores(tokens, tokens, experts, steps=2).astype(np.float16)
    mask = np.random.default_rng(tokens).random(tokens) >= masked if masked else None
    work = device.Work(
        tokens=tokens,
        experts=experts,
        top_k=top_k,
        groups=groups,
        capacity=capacity,
        is_masked=mask is not None,
        warp_tokens=config.tokens,
        warps=4 * config.warpgroups,
    )
    inputs = [scores] if mask is None else [scores, mask.astype(np.int8)]
    chosen = [(tokens, top_k), (work.blocks * work.warps, experts), (work.blocks, experts)]
    placed, smem = [(tokens * top_k,), (experts,)], device.shared_memory(work)
    if work.blocks == 1:
        ids, _, _, order, counts = run(device.choose_and_place, work, inputs, chosen + placed, smem)
    else:
        ids, *rest = run(device.choose, work, inputs, chosen, smem)
        order, counts = run(device.place, work, [ids, *rest], placed, smem)
    routing = Routing(counts=jnp.asarray(counts), order=jnp.asarray(order), top_k=top_k)
    assert_routed((jnp.asarray(ids), routing), scores.astype(np.float32), top_k, capacity, None, mask, groups)


def test_on_a_gpu_the_kernel_is_chosen_under_every_transformation():
    device = AbstractDevice("NVIDIA H200", 132, "gpu")
    mesh = AbstractMesh((2,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    batch = jax.ShapeDtypeStruct((2, 256, 8), jnp.bfloat16)

    def scaled_sum(scores):
        return jnp.sum(scores) * route(scores, 2)[1].counts[0].astype(scores.dtype)

    def add_counts(sums, scores):
        return sums + route(scores, 1)[1].counts, None

    def sharded(batch):  # the carry of a scan must vary over the mesh as what is added to it does
        sums = lambda x: jax.lax.scan(add_counts, route(x[0], 1)[1].counts, x)[0]  # noqa: E731
        return jax.shard_map(sums, mesh=mesh, in_specs=P(None, "x"), out_specs=P("x"))(batch)

    def lowered(function, shape) -> str:
        with jax.sharding.use_abstract_mesh(mesh):
            return jax.jit(function).trace(shape).lower(lowering_platforms=("cuda",)).as_text()

    for function in (jax.vmap(jax.grad(scaled_sum)), sharded):
        assert "mosaic_gpu" in lowered(function, batch)
    many = jax.ShapeDtypeStruct((16384, 256), jnp.float16)
    with jax.enable_x64(True):
        for function in (lambda x: route(x, 8), lambda x: route(x, 1, 64, None, x[:, 0] > 0, 8)):
            assert "mosaic_gpu" in lowered(function, many)


def test_every_candidate_is_a_valid_config():
    for tokens in (1, 128, 4096, 1 << 20):
        scores = jax.ShapeDtypeStruct((tokens, 8), jnp.float32)
        configs = candidates(scores, 2)
        assert len(set(configs)) == len(configs) >= 1
        for config in configs:
            jax.eval_shape(functools.partial(route, top_k=2, config=config), scores)


def test_errors(unchecked):
    scores = jnp.ones((6, 4))
    fails = functools.partial(pytest.raises, ValueError)
    with fails(match=r"scores must be .*; got int32\[6, 4\]"):
        route(scores.astype(jnp.int32), 1)
    with fails(match=r"scores must be .*; got float32\[4\]"):
        route(scores[0], 1)
    for top_k in (0, 5):
        with fails(match=f"top_k must be 1 to the number of experts; got top_k={top_k}, experts=4"):
            route(scores, top_k)
    with fails(match="capacity must be None or at least 1; got capacity=0"):
        route(scores, 1, 0)
    with fails(match=r"less than 2\*\*30; got tokens=536870912, top_k=2"):
        jax.eval_shape(lambda x: route(x, 2), jax.ShapeDtypeStruct((2**29, 4), jnp.float32))
    for groups in (0, 4):
        with fails(match=f"groups must be at least 1 and divide tokens; got groups={groups}, tokens=6"):
            route(scores, 1, 2, groups=groups)
    with fails(match="priority and groups must come with a capacity; got capacity=None, groups=2"):
        route(scores, 1, groups=2)
    with fails(match=r"priority must be float32\[6\], one for each token; got float32\[5\]"):
        route(scores, 1, 2, jnp.ones(5))
    with fails(match=r"mask must be bool\[6\], one for each token; got float32\[6\]"):
        route(scores, 1, mask=jnp.ones(6))
    with fails(match="implementation must be None, .*; got 'triton'"):
        route(scores, 1, implementation="triton")
    with fails(match=r"tokens must be 8, 16 or 32, and warpgroups 1, 2 or 4; got Config\(tokens=4, warpgroups=1\)"):
        route(scores, 1, config=Config(tokens=4, warpgroups=1))


def ill_scores(dtype=jnp.float32):
    """Of twelve tokens, of which 3 and 7 have a NaN."""
    return jnp.ones((12, 4), dtype).at[jnp.array([3, 7]), jnp.array([1, 2])].set(NAN)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_nan_is_an_error_where_values_are_known(dtype):
    scores, mask = ill_scores(dtype), jnp.arange(12) != 3
    named = r"^scores \(router logits\) must not be NaN; got NaN for {} of 12 tokens, the first is token {}$"
    calls: list[Any] = [(1,), (2,), (1, 2), (2, 3, jnp.ones(12)), (1, None, None, jnp.ones(12, bool))]
    for args in calls:
        with pytest.raises(ValueError, match=named.format(2, 3)):
            route(scores, *args)
    with pytest.raises(ValueError, match=named.format(1, 7)):
        route(scores, 1, mask=mask)
    masked = mask & (jnp.arange(12) != 7)  # padding may hold anything
    assert_routed(route(scores, 2, mask=masked), np.asarray(scores.astype(jnp.float32)), 2, None, None, masked)
    assert_routed(route(jnp.full((3, 4), INF, dtype), 2), np.full((3, 4), INF), 2)


def test_under_a_trace_nan_is_passed_over():
    scores = ill_scores()

    def find(scores, mask=None):
        ids, routing = route(scores, 2, mask=mask)
        return ids, routing.counts, routing.order

    def summed(scores):
        return jnp.sum(scores), find(scores)

    batched = [x[0] for x in jax.vmap(find)(scores[None])]
    outputs = {
        "argument": jax.jit(find)(scores),
        "constant": jax.jit(lambda: find(scores))(),
        "mask": jax.jit(lambda mask: find(scores, mask))(jnp.ones(12, bool)),
        "vmap": batched,
        "grad": jax.grad(summed, has_aux=True)(scores)[1],
    }
    for ids, counts, order in outputs.values():
        assert_routed((ids, Routing(counts=counts, order=order, top_k=2)), np.asarray(scores), 2)


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_the_workbench_checks_cases_with_nan(implementation):
    kernel = load_kernel("route")
    small = next(case for case in kernel.cases if case.small)
    case = dataclasses.replace(small, make=lambda *args: (small.make(*args)[0].at[3, 1].set(NAN), 2))
    result = check_path(kernel, case, "float32", implementation)
    assert result.status == "ok", result.detail


def test_what_the_kernel_leaves_to_xla(unchecked):
    scores, fails = jnp.ones((6, 4)), functools.partial(pytest.raises, NotImplementedError)
    interpreted = functools.partial(route, implementation="interpret")
    with fails(match="takes top_k=1 without priority; got top_k=2 and no priority"):
        interpreted(scores, 2, 3)
    with fails(match="takes top_k=1 without priority; got top_k=1 and a priority"):
        interpreted(scores, 1, 3, jnp.ones(6))
    with fails(match="takes 512 experts and top_k=16 at most; got experts=600, top_k=1"):
        interpreted(jnp.ones((6, 600)), 1)
    with fails(match=r"\* experts < 2\*\*30; got tokens=67108864, groups=1, experts=16"):
        jax.eval_shape(lambda x: interpreted(x, 1), jax.ShapeDtypeStruct((2**26, 16), jnp.float32))
    with fails(match="runs on NVIDIA H100, NVIDIA H200; got cpu"):
        route(scores, 1, implementation="mosaic_gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("case", DEVICE_CASES, ids=str)
@pytest.mark.parametrize("kind", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_compiled_kernel_equals_loops_over_tokens(case, kind):
    tokens, experts, top_k, capacity, groups, masked, config = case
    scores = jnp.asarray(random_scores(tokens, tokens, experts, steps=2), kind)
    mask = jnp.asarray(np.random.default_rng(tokens).random(tokens) >= masked) if masked else None
    args = top_k, capacity, None, mask, groups
    out = jitted(scores, *args, config=config, implementation="mosaic_gpu")
    assert_routed(out, np.asarray(scores.astype(jnp.float32)), *args)
