"""`sparse_dot` against numpy in float64: every plan, operand, dtype and pattern; gradients; transformations."""

import functools
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.workbench.gpus import GPUS, lower
from sparsellm.micro_tiles import MicroTile
from sparsellm.plan import DENSE, Plan
from sparsellm.sparse_dot import sparse_dot

PLANS = (
    Plan("dense"),
    Plan("k", MicroTile(128, 1)),
    Plan("k", MicroTile(64, 64)),
    Plan("k", MicroTile(8, 1)),
    Plan("m", MicroTile(1, 32)),
    Plan("m", MicroTile(1, 256)),
)
GRADIENT_PLANS = (Plan("k", MicroTile(64, 64)), Plan("k", MicroTile(64, 1)), Plan("m", MicroTile(1, 32)))
dot = jax.jit(sparse_dot, static_argnames=("sparse", "plan", "density"))  # eager, each of its steps compiles alone
BOUNDS = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}
PATTERNS = {
    "empty": (),
    "full": (slice(None), slice(None)),
    "one element": (-1, 0),
    "one row": (3,),
    "one column": (..., 1),
}


def f64(x) -> np.ndarray:
    return np.asarray(x, np.float64)


def assert_close(out, ref, dtype="float32"):
    assert out.shape == ref.shape
    assert np.linalg.norm(f64(out) - ref) <= BOUNDS[jnp.dtype(dtype).name] * max(np.linalg.norm(ref), 1e-30)


def normal(seed: int, shape, dtype="float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def patterned(x, name: str) -> jax.Array:
    mask = np.zeros(x.shape, bool)
    if PATTERNS[name]:
        mask[PATTERNS[name]] = True
    return jnp.where(mask, x, 0)


def blocky(x, seed: int, density: float = 0.4, size: int = 128) -> jax.Array:
    """Zero in blocks of `size` x `size`, at random."""
    live = np.random.default_rng(seed).random([-(-s // size) for s in x.shape]) < density
    mask = np.repeat(np.repeat(live, size, axis=0), size, axis=1)[: x.shape[0], : x.shape[1]]
    return jnp.where(mask, x, 0)


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("sparse", ["a", "b"])
def test_every_plan_and_pattern(plan, sparse):
    for pattern in PATTERNS:
        a, b = normal(0, (150, 70)), normal(1, (70, 90))
        a, b = (patterned(a, pattern), b) if sparse == "a" else (a, patterned(b, pattern))
        assert_close(dot(a, b, sparse=sparse, plan=plan), f64(a) @ f64(b))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("plan", [PLANS[0], PLANS[1], PLANS[4]], ids=str)
def test_every_plan_and_dtype(plan, dtype):
    a, b = patterned(normal(0, (130, 300), dtype), "one row"), normal(1, (300, 40), dtype)
    out = dot(a, b, plan=plan)
    assert out.dtype == dtype
    assert_close(out, f64(a) @ f64(b), dtype)


@settings(max_examples=8)
@given(
    seed=st.integers(0, 2**16),
    sizes=st.tuples(st.integers(1, 140), st.integers(1, 140), st.integers(1, 140)),
    plan=st.sampled_from(PLANS),
    density=st.sampled_from([0.0, 0.01, 0.5]),
    sparse=st.sampled_from(["a", "b", "both"]),
    masked=st.booleans(),
)
def test_any_shape(seed, sizes, plan, density, sparse, masked):
    m, k, n = sizes
    rng = np.random.default_rng(seed)
    a, b = normal(seed, (m, k)), normal(seed + 1, (k, n))
    masks = [rng.random(x.shape) < density if sparse in (name, "both") else np.ones(x.shape, bool)
             for name, x in (("a", a), ("b", b))]  # fmt: skip
    mask_a, mask_b = map(jnp.asarray, masks)
    ref = np.where(masks[0], f64(a), 0) @ np.where(masks[1], f64(b), 0)
    if not masked:
        a, b = jnp.where(mask_a, a, 0), jnp.where(mask_b, b, 0)
    mask = {"a": mask_a, "b": mask_b, "both": (mask_a, mask_b)}[sparse] if masked else None
    assert_close(dot(a, b, mask=mask, sparse=sparse, plan=None if sparse == "both" else plan), ref)


@pytest.mark.parametrize("sizes", [(0, 8, 8), (8, 0, 8), (8, 8, 0)])
def test_empty_operands(sizes):
    m, k, n = sizes
    for plan in (PLANS[0], PLANS[1], PLANS[4]):
        for sparse in ("a", "b"):
            assert np.array_equal(dot(jnp.ones((m, k)), jnp.ones((k, n)), sparse=sparse, plan=plan), np.zeros((m, n)))


@pytest.mark.parametrize("plan", PLANS[::2], ids=str)
def test_nan_and_huge_values_reach_the_result(plan):
    a = patterned(normal(0, (150, 70)), "one column").at[140, 3].set(jnp.nan).at[2, 5].set(1e30)
    b = normal(1, (70, 20))
    out = np.asarray(dot(a, b, plan=plan))
    assert np.isnan(out[140]).all() and np.isfinite(out[:140]).all()
    np.testing.assert_allclose(out[2], 1e30 * f64(b)[5], rtol=1e-5)


@pytest.mark.parametrize("plan", [PLANS[0], *PLANS[1::2]], ids=str)
def test_a_mask_hides_values_even_nan(plan):
    a, b = normal(0, (150, 70)), normal(1, (70, 20))
    mask = jnp.asarray(np.random.default_rng(2).random(a.shape) < 0.1)
    out = dot(jnp.where(mask, a, jnp.nan), b, mask=mask, plan=plan)
    assert_close(out, np.where(mask, f64(a), 0) @ f64(b))


def test_both_sparse_in_blocks():
    a, b = blocky(normal(0, (300, 500)), 1), blocky(normal(2, (500, 260)), 3)
    assert_close(dot(a, b, sparse="both"), f64(a) @ f64(b))
    for zero in (jnp.zeros_like(a), a):
        assert_close(dot(zero, jnp.zeros_like(b), sparse="both"), np.zeros((300, 260)))


@pytest.mark.parametrize("plan, sparse", [(PLANS[0], "a"), *((plan, "b") for plan in PLANS[1:5]), (None, "both")])
def test_only_wanted_blocks(plan, sparse):
    a, b = blocky(normal(0, (300, 200)), 1), blocky(normal(2, (200, 140)), 3)
    weight = normal(4, (300, 140))
    wanted = np.array([[True, False], [False, False], [True, True]])
    kept = np.repeat(np.repeat(wanted, 128, axis=0), 128, axis=1)[:300, :140]

    @jax.jit
    def product_and_gradients(a, b):
        out, vjp = jax.vjp(lambda a, b: dot(a, b, sparse=sparse, plan=plan, out_mask=jnp.asarray(wanted)), a, b)
        return out, vjp(weight)

    out, grads = product_and_gradients(a, b)
    assert_close(out, f64(a) @ f64(b) * kept)
    g = f64(weight) * kept  # blocks that nobody wants have no say in the gradients
    live_a, live_b = f64(a) != 0, f64(b) != 0
    assert_close(np.where(live_a, grads[0], 0), (g @ f64(b).T) * live_a)
    assert_close(np.where(live_b, grads[1], 0), (f64(a).T @ g) * live_b)


@pytest.mark.parametrize("plan, sparse", list(zip(PLANS, "ababab", strict=True)))
def test_gradients_under_a_mask_are_those_of_the_masked_product(plan, sparse):
    a, b, weight = normal(0, (140, 70)), normal(1, (70, 90)), normal(2, (140, 90))
    mask = jnp.asarray(np.random.default_rng(3).random((a if sparse == "a" else b).shape) < 0.05)

    def masked(a, b):
        return (jnp.where(mask, a, 0), b) if sparse == "a" else (a, jnp.where(mask, b, 0))

    def loss(a, b):
        return jnp.sum(weight * dot(a, b, mask=mask, sparse=sparse, plan=plan))

    def dense_loss(a, b):
        a, b = masked(a, b)
        return jnp.sum(weight * jnp.dot(a, b, precision="highest"))

    expected = jax.grad(dense_loss, argnums=(0, 1))(a, b)
    for grad, ref in zip(jax.jit(jax.grad(loss, argnums=(0, 1)))(a, b), expected, strict=True):
        assert_close(grad, f64(ref))


@pytest.mark.parametrize("plan", PLANS[1:], ids=str)
def test_gradients_without_a_mask_end_at_the_live_micro_tiles(plan):
    a, b, weight = patterned(normal(0, (140, 70)), "one element"), normal(1, (70, 90)), normal(2, (140, 90))
    grads = jax.jit(jax.grad(lambda a, b: jnp.sum(weight * dot(a, b, plan=plan)), argnums=(0, 1)))(a, b)
    rows, cols = plan.micro_tile.rows, plan.micro_tile.cols
    live = np.zeros((140, 70))
    live[139 // rows * rows :, : max(cols, 1)] = 1
    assert_close(grads[0], (f64(weight) @ f64(b).T) * live)
    assert_close(grads[1], f64(a).T @ f64(weight))


def test_gradients_where_both_are_sparse_end_at_the_live_blocks():
    a, b, weight = blocky(normal(0, (300, 500)), 1), blocky(normal(2, (500, 260)), 3), normal(4, (300, 260))
    grads = jax.grad(lambda a, b: jnp.sum(weight * dot(a, b, sparse="both")), argnums=(0, 1))(a, b)
    live_a, live_b = f64(a) != 0, f64(b) != 0  # blocks are zero as a whole
    assert_close(grads[0], (f64(weight) @ f64(b).T) * live_a)
    assert_close(grads[1], (f64(a).T @ f64(weight)) * live_b)


def test_training_behind_a_relu_is_training_a_dense_layer():
    """The use that value-derived zeros are for: what has no gradient here has none through the ReLU either."""
    x, up, down = normal(0, (48, 16)), normal(1, (16, 64)), normal(2, (64, 12))

    @functools.partial(jax.jit, static_argnums=0)
    def loss(dot, up, down):
        return jnp.sum(jnp.square(dot(jax.nn.relu(x @ up - 2), down)))

    grads = [jax.grad(loss, argnums=(1, 2))(dot, up, down) for dot in (sparse_dot, jnp.dot)]
    for grad, ref in zip(*grads, strict=True):
        np.testing.assert_allclose(grad, ref, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("plan, sparse", [(PLANS[0], "a"), (PLANS[1], "b"), (PLANS[4], "a")])
@pytest.mark.parametrize("shared", [True, False])
def test_leading_dimensions(plan, sparse, shared):
    a, b = normal(0, (2, 3, 20, 30)), normal(1, (30, 10) if shared else (2, 3, 30, 10))
    mask = jnp.asarray(np.random.default_rng(2).random((a if sparse == "a" else b).shape) < 0.3)
    masked = [np.where(mask, f64(x), 0) if name == sparse else f64(x) for name, x in (("a", a), ("b", b))]
    out = dot(a, b, mask=mask, sparse=sparse, plan=plan)
    assert_close(out, masked[0] @ masked[1])


def test_out_mask_and_both_with_leading_dimensions():
    a, b = normal(0, (2, 150, 30)), normal(1, (2, 30, 10))
    wanted = jnp.asarray([[[True], [False]], [[False], [True]]])
    kept = np.repeat(np.asarray(wanted), 128, axis=1)[:, :150]
    for sparse in ("a", "both"):
        assert_close(dot(a, b, sparse=sparse, out_mask=wanted), f64(a) @ f64(b) * kept)
        kept_rows = np.repeat([True, False, True], 128)[:300].reshape(2, 150, 1)
        out = dot(a, b[0], sparse=sparse, out_mask=jnp.asarray([[True], [False], [True]]))
        assert_close(out, f64(a) @ f64(b[0]) * kept_rows)


def test_a_single_row_and_a_vectors_worth():
    a, b = patterned(normal(0, (1, 300)), "one column"), normal(1, (300, 7))
    for plan in (PLANS[1], PLANS[5]):
        assert_close(dot(a, b, plan=plan), f64(a) @ f64(b))


def test_fp8_is_widened_exactly():
    a, b = (x.astype(jnp.float8_e4m3fn) for x in (normal(0, (20, 30)), normal(1, (30, 10))))
    out = dot(a, b)
    assert out.dtype == jnp.bfloat16
    assert_close(out, f64(a) @ f64(b), "bfloat16")
    assert dot(a, b.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_density_chooses_the_plan(monkeypatch):
    """At 5% of elements, 1 - 0.95**32 of the smallest micro-tiles of many rows are live: dense; of one row, 5%."""
    asked = []
    module = sys.modules["sparsellm.sparse_dot"]
    choose = module.choose_plan
    monkeypatch.setattr(
        module, "choose_plan", lambda *args, **kwargs: asked.append(choose(*args, **kwargs)) or asked[-1]
    )
    for m, k in ((256, 1024), (1, 8192)):
        a, b = normal(0, (m, k)), normal(1, (k, 256))
        a = jnp.where(np.random.default_rng(2).random(a.shape) < 0.05, a, 0)
        assert_close(dot(a, b, density=0.05), f64(a) @ f64(b))
        out = dot(b.T, a.T, sparse="b", density=0.05)  # the transposed problem: the same plan
        assert_close(out, f64(b).T @ f64(a).T)
    assert [plan.axis for plan in asked] == ["dense", "dense", "k", "k"]


@pytest.mark.parametrize("plan", [PLANS[3], PLANS[4]], ids=str)
def test_vmap(plan):
    a, b = normal(0, (3, 20, 30)), normal(1, (3, 30, 10))
    a = jnp.where(np.random.default_rng(2).random(a.shape) < 0.2, a, 0)
    dot = jax.vmap(lambda a, b: sparse_dot(a, b, plan=plan))
    assert_close(jax.jit(dot)(a, b), f64(a) @ f64(b))
    grad = jax.jit(jax.vmap(jax.grad(lambda b, a: sparse_dot(a, b, plan=plan).sum())))(b, a)
    assert_close(grad, f64(a).transpose(0, 2, 1) @ np.ones((3, 20, 10)))


def test_gradients_through_a_scan_are_made_for_a_gpu():
    """Its kernels write into memory that is zero before, which no trace may take from one half of a scan to another."""
    plan, shape = Plan("m", MicroTile(1, 256)), jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)
    stack = jax.ShapeDtypeStruct((2, 256, 256), jnp.bfloat16)

    def loss(x, ws):
        def layer(h, w):
            return sparse_dot(jax.nn.relu(h), w, plan=plan), None

        return jax.lax.scan(layer, x, ws)[0].astype(jnp.float32).sum()

    program = lower(jax.grad(loss, (0, 1)), [shape, stack], GPUS[0])
    assert "mosaic_gpu" in program


def test_scan():
    plan = PLANS[3]
    xs, w = normal(0, (4, 20, 30)), normal(1, (30, 30)) / 8

    def loss(w, dot):
        def step(h, x):
            return dot(jax.nn.relu(h + x), w), None

        return jnp.sum(jax.lax.scan(step, jnp.zeros((20, 30)), xs)[0] ** 2)

    for function in (loss, jax.grad(loss)):
        out = jax.jit(function, static_argnums=1)(w, lambda a, b: sparse_dot(a, b, plan=plan))
        np.testing.assert_allclose(out, function(w, jnp.dot), rtol=1e-4, atol=1e-3)


def test_a_new_pattern_compiles_nothing_and_asks_the_host_nothing():
    b = normal(1, (70, 90))
    patterns = [patterned(normal(0, (150, 70)), name) for name in PATTERNS]
    masks = [x != 0 for x in patterns]
    wanted = [jnp.asarray([[i], [not i]]) for i in (True, False)]
    for sparse, plan in (("a", PLANS[1]), ("a", PLANS[4]), ("both", None)):
        traces = []

        @jax.jit
        def product(a, b, mask, out_mask, sparse: Any = sparse, plan=plan, traces=traces):
            traces.append(None)
            pair = (mask, jnp.ones(b.shape, bool)) if sparse == "both" else mask
            return sparse_dot(a, b, mask=pair, sparse=sparse, plan=plan, out_mask=out_mask), sparse_dot(
                a, b, sparse=sparse, plan=plan
            )

        product(patterns[0], b, masks[0], wanted[0])
        with jax.transfer_guard("disallow"):
            outputs = [product(a, b, mask, wanted[i % 2]) for i, (a, mask) in enumerate(zip(patterns, masks))]  # noqa: B905
        assert len(traces) == 1
        for i, (a, (some, every)) in enumerate(zip(patterns, outputs, strict=True)):
            ref = f64(a) @ f64(b)
            assert_close(every, ref)
            ref[slice(128, None) if i % 2 == 0 else slice(128)] = 0
            assert_close(some, ref)


@pytest.mark.parametrize("name", ["k", "both", "out_mask", "batched", "gradient"])
def test_the_kernels_lower_for_an_h200(name):
    """On this machine, which has none: `implementation` reaches the kernel, and what is asked for exists there."""
    matrix, stack = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((256, 256), (2, 256, 256)))
    dot = functools.partial(sparse_dot, implementation="mosaic_gpu")
    function, shapes = {
        "k": (functools.partial(dot, plan=PLANS[2]), [matrix, matrix]),
        "both": (functools.partial(dot, sparse="both"), [matrix, matrix]),
        "out_mask": (lambda a, b, c: dot(a, b, out_mask=c), [matrix, matrix, jax.ShapeDtypeStruct((2, 2), bool)]),
        "batched": (dot, [stack, stack]),
        "gradient": (jax.grad(lambda a, b: dot(a, b).astype(jnp.float32).sum(), argnums=(0, 1)), [matrix, matrix]),
    }[name]
    kernels = {"gradient": 3}.get(name, 1)
    assert lower(function, shapes, GPUS[0]).count("custom_call @mosaic_gpu") >= kernels


@pytest.mark.parametrize("plan", GRADIENT_PLANS, ids=str)
@pytest.mark.parametrize("operand", ["a", "b"])
def test_every_gradient_of_a_sparse_operand_is_a_kernel_on_an_h200(plan, operand):
    """Beside what finds and makes lists: of XLA's products, which the kernels fall back to, there is none."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((256, 384), (384, 512))]

    def loss(a, b):
        return sparse_dot(a, b, plan=plan).astype(jnp.float32).sum()

    text = lower(jax.grad(loss, argnums="ab".index(operand)), shapes, GPUS[0])
    assert "custom_call @mosaic_gpu" in text and "stablehlo.dot" not in text


@pytest.mark.gpu
@pytest.mark.parametrize("plan", [*PLANS, Plan("k", MicroTile(128, 128)), Plan("m", MicroTile(1, 64))], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_compiled_on_a_gpu(plan, dtype):
    for sparse in ("a", "b"):
        for pattern in PATTERNS:
            a, b = normal(0, (300, 520), dtype), normal(1, (520, 264), dtype)
            a, b = (patterned(a, pattern), b) if sparse == "a" else (a, patterned(b, pattern))
            assert_close(dot(a, b, sparse=sparse, plan=plan), f64(a) @ f64(b), dtype)
    stack = jnp.stack([a, 2 * a])
    assert_close(dot(stack, jnp.stack([b, b]), plan=plan), f64(stack) @ f64(b), dtype)


@pytest.mark.gpu
def test_blocks_and_gradients_compiled_on_a_gpu():
    a, b = (blocky(normal(i, shape, "bfloat16"), i) for i, shape in ((0, (300, 520)), (1, (520, 264))))
    assert_close(dot(a, b, sparse="both"), f64(a) @ f64(b), "bfloat16")
    wanted = np.array([[True, False, False], [False, True, True], [False] * 3])
    kept = np.repeat(np.repeat(wanted, 128, axis=0), 128, axis=1)[:300, :264]
    assert_close(dot(a, b, out_mask=jnp.asarray(wanted)), f64(a) @ f64(b) * kept, "bfloat16")
    grads = jax.jit(jax.grad(lambda a, b: sparse_dot(a, b).astype(jnp.float32).sum(), argnums=(0, 1)))(a, b)
    live = np.repeat(np.add.reduceat(np.abs(f64(a)), [0, 128, 256], axis=0) > 0, 128, axis=0)[:300]
    assert_close(grads[0], np.where(live, f64(b).sum(axis=1), 0), "bfloat16")
    assert_close(grads[1], np.broadcast_to(f64(a).sum(axis=0)[:, None], b.shape), "bfloat16")


@pytest.mark.gpu
@pytest.mark.parametrize("plan", GRADIENT_PLANS, ids=str)
def test_gradients_of_every_plan_compiled_on_a_gpu(plan):
    """Zeros in blocks of a [300, 520], which all these plans skip."""
    a, b, weight = (normal(i, shape, "bfloat16") for i, shape in enumerate(((300, 520), (520, 264), (300, 264))))
    tiles = np.random.default_rng(3).random((5, 9)) < 0.3
    live = np.repeat(np.repeat(tiles, 64, axis=0), 64, axis=1)[:300, :520]
    a = jnp.where(live, a, 0)

    def loss(a, b):
        return jnp.sum((weight * sparse_dot(a, b, plan=plan)).astype(jnp.float32))

    grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(a, b)
    assert_close(grads[0], np.where(live, f64(weight) @ f64(b).T, 0), "bfloat16")
    assert_close(grads[1], f64(a).T @ f64(weight), "bfloat16")


def test_rows_over_several_devices():
    """Under shard_map each device finds the zeros of its own rows; nothing is exchanged."""
    script = """
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import AxisType, PartitionSpec as P
        from sparsellm.micro_tiles import MicroTile
        from sparsellm.plan import DENSE, Plan
        from sparsellm.sparse_dot import sparse_dot
        assert len(jax.devices()) == 4
        mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Auto,))
        rng = np.random.default_rng(0)
        a = jnp.asarray(rng.normal(size=(64, 30)) * (rng.random((64, 30)) < 0.1), jnp.float32)
        b = jnp.asarray(rng.normal(size=(30, 20)), jnp.float32)
        for plan in (Plan("dense"), Plan("k", MicroTile(8, 1)), Plan("m", MicroTile(1, 32))):
            dot = jax.shard_map(
                lambda a, b: sparse_dot(a, b, plan=plan), mesh=mesh, in_specs=(P("rows"), P()), out_specs=P("rows")
            )
            np.testing.assert_allclose(jax.jit(dot)(a, b), a @ b, rtol=1e-4, atol=1e-5)
            grads = jax.jit(jax.grad(lambda b, a: (dot(a, b) ** 2).sum()))(b, a)
            np.testing.assert_allclose(grads, 2 * a.T @ (a @ b), rtol=1e-4, atol=1e-4)
            assert "all-gather" not in jax.jit(dot).lower(a, b).compile().as_text()
    """
    root = Path(__file__).parents[1]
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, cwd=root, env=env
    )
    assert done.returncode == 0, done.stderr


def test_what_is_asked_wrongly(unchecked):
    a, b, mask = jnp.ones((4, 6)), jnp.ones((6, 5)), jnp.ones((4, 6), bool)
    plan = Plan("k", MicroTile(8, 1))
    wrong = [
        (r"a must be \[..., M, K\].*got shapes \(4, 6\) and \(5, 6\)", (a, b.T), {}),
        ("leading dimensions", (jnp.ones((2, 4, 6)), jnp.ones((3, 6, 5))), {}),
        ("leading dimensions", (a, jnp.ones((3, 6, 5))), {}),
        ("one dtype; got float32 and bfloat16", (a, b.astype(jnp.bfloat16)), {}),
        (r"a must be a matrix, or several, of.*got int32\[4,6\]|got int32\[4, 6\]", (a.astype(int), b), {}),
        (r"b must be a matrix.*got float32\[6\]", (a, b[:, 0]), {}),
        ('sparse must be "a", "b" or "both"; got sparse=\'c\'', (a, b), {"sparse": "c"}),
        (r"mask must be bool\[4, 6\].*got float32\[4, 6\]", (a, b), {"mask": a}),
        (r"mask must be bool\[6, 5\].*got bool\[4, 6\]", (a, b), {"mask": mask, "sparse": "b"}),
        ("mask must be a pair", (a, b), {"mask": mask, "sparse": "both"}),
        ("plan must be None where density is given", (a, b), {"plan": plan, "density": 0.1}),
        ("plan must be None", (a, b), {"plan": plan, "sparse": "both"}),
        ("density must be None", (a, b), {"density": 0.1, "sparse": "both"}),
        ("density must be 0 to 1", (a, b), {"density": 2.0}),
        (r"out_mask must be bool\[1, 1\].*got bool\[4, 6\]", (a, b), {"out_mask": mask}),
        (r"out_mask must be bool\[1, 1\].*got float32\[1, 1\]", (a, b), {"out_mask": jnp.ones((1, 1))}),
        ("implementation must be", (a, b), {"implementation": "cuda"}),
    ]
    for match, args, kwargs in wrong:
        with pytest.raises(ValueError, match=match):
            sparse_dot(*args, **kwargs)


@pytest.mark.parametrize(
    "kwargs",
    [{"plan": Plan("k", MicroTile(128, 1))}, {"plan": Plan("m", MicroTile(1, 8))}, {"sparse": "both"}],
    ids=str,
)
def test_eagerly_on_arrays_of_an_explicit_mesh(kwargs):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    a, b = (jax.device_put(x, sharding) for x in (jnp.eye(8), jnp.arange(32.0).reshape(8, 4)))
    np.testing.assert_array_equal(np.asarray(sparse_dot(a, b, **kwargs)), np.asarray(b))


def test_nothing_to_do_where_both_are_sparse_or_little_is_wanted():
    assert sparse_dot(jnp.ones((4, 0)), jnp.ones((0, 5)), sparse="both").shape == (4, 5)
    nothing = jnp.zeros((8, 0))
    for product in (
        lambda a: sparse_dot(a, nothing, sparse="both"),
        lambda a: sparse_dot(a, nothing, out_mask=jnp.zeros((1, 0), bool)),
    ):
        grad = jax.grad(lambda a, product=product: product(a).sum())(jnp.ones((4, 8)))
        np.testing.assert_array_equal(np.asarray(grad), np.zeros((4, 8)))


def test_arguments_of_another_kind(unchecked):
    a, b = jnp.ones((4, 4)), jnp.arange(16.0).reshape(4, 4)
    with pytest.raises(ValueError, match="plan must be a Plan or None; got plan='k 128x1'"):
        sparse_dot(a, b, plan="k 128x1")  # pyright: ignore
    with pytest.raises(ValueError, match="implementation must be .*; got 'mosaic'"):
        sparse_dot(a, b, plan=DENSE, implementation="mosaic")
    np.testing.assert_array_equal(np.asarray(sparse_dot(a, b, out_mask=[[True]])), np.asarray(a @ b))  # pyright: ignore
    mask = np.eye(4, dtype=bool)
    np.testing.assert_array_equal(np.asarray(sparse_dot(a, b, sparse="both", mask=(mask, None))), np.asarray(b))
