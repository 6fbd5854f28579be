"""`listed_matmul` against numpy in float64: what is listed and what must not matter, wrong arguments, the kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from pallas_kernels.listed_matmul import AXES, CASES, MIN_BYTES, Axis, Config, candidates, listed_matmul, peers, work
from pallas_kernels.workbench.gpus import GPUS, targeting
from pallas_kernels.workbench.interpreter import run_interpreted


def problem(seed: int, listed, axis: Axis, *, tokens=2, width=3, other=5, unread=np.nan, dtype=jnp.float32):
    """Arguments of which the kernel reads nothing that is not listed: there w is `unread`, and of rows x is NaN."""
    rng = np.random.default_rng(seed)
    divided = width * len(listed)
    x, w = rng.normal(size=(tokens, divided if axis == "rows" else other)), rng.normal(size=(divided, other))
    unlisted = ~np.repeat(np.array(listed, bool), width)
    w[unlisted] = unread
    if axis == "rows":
        x[:, unlisted] = np.nan
    return jnp.asarray(x, dtype), jnp.asarray(w if axis == "rows" else w.T, dtype), jnp.array(listed, bool), axis


def expected(x, w, listed, axis) -> np.ndarray:
    x, w = (np.asarray(a, np.float64) for a in (x, w))
    mask = np.repeat(np.asarray(listed), w.shape[AXES.index(axis)] // len(listed))
    if axis == "rows":
        return x[:, mask] @ w[mask]
    out = np.zeros((len(x), w.shape[1]))
    out[:, mask] = x @ w[:, mask]
    return out


def assert_close(out, ref, bound):
    out = np.asarray(out, np.float64)
    assert out.shape == ref.shape
    assert np.linalg.norm(out - ref) <= bound * np.linalg.norm(ref)


by_xla = jax.jit(functools.partial(listed_matmul, implementation="xla"), static_argnums=3)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**16), listed=st.lists(st.booleans(), min_size=4, max_size=4), axis=st.sampled_from(AXES))
@example(seed=0, listed=[False] * 4, axis="rows")
@example(seed=0, listed=[True] * 4, axis="rows")
@example(seed=0, listed=[False] * 4, axis="columns")
@example(seed=0, listed=[True] * 4, axis="columns")
def test_any_list(seed, listed, axis):
    """The xla path multiplies what is not listed too, so of rows it must be finite."""
    args = problem(seed, listed, axis, unread=1e9)
    assert_close(by_xla(*args), expected(*args), 1e-6)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 1e-2), ("float16", 1e-3), ("float32", 1e-6)])
def test_every_dtype(dtype, bound, axis):
    args = problem(1, [True, False, True], axis, other=200, unread=1.0, dtype=dtype)
    out = listed_matmul(*args)
    assert out.dtype == dtype
    assert_close(out, expected(*args), bound)


@pytest.mark.parametrize(
    ("axis", "tokens", "width", "listed", "config"),
    [
        ("columns", 1, 128, [0, 1, 0, 1], Config(columns=128, splits=1)),  # more stages than the ring holds
        ("columns", 3, 64, [1, 0, 1], Config(columns=64, splits=3)),
        ("columns", 8, 128, [1, 1], Config(columns=64, splits=2)),  # two tiles a block
        ("columns", 32, 128, [0, 0], Config(splits=2)),
        ("rows", 1, 128, [1, 1, 0, 1, 1, 0, 1], Config(columns=128, splits=1)),
        ("rows", 3, 64, [0, 1, 0, 1, 0], Config(columns=64, splits=3)),  # more splits than parts
        ("rows", 8, 128, [0, 0, 0], Config(columns=128, splits=2)),
        ("rows", 32, 64, [1, 1, 1], Config(columns=256, splits=2)),
    ],
)
def test_the_kernel_reads_only_what_is_listed(axis, tokens, width, listed, config):
    other = 256 if axis == "rows" else 576
    args = problem(2, listed, axis, tokens=tokens, width=width, other=other, dtype=jnp.bfloat16)
    out = run_interpreted(lambda: listed_matmul(*args, config=config, implementation="interpret"))
    assert_close(out, expected(*args), 1e-2)


def test_what_is_not_finite_in_a_listed_block_is_seen():
    for axis in AXES:
        x, w, listed, _ = problem(3, [True, False], axis, unread=1.0)
        assert np.isnan(listed_matmul(x, w.at[1, 1].set(jnp.nan), listed, axis)[:, 1]).all()


def test_new_lists_compile_nothing_and_ask_the_host_nothing():
    traces = []

    @jax.jit
    def run(x, w, listed):
        traces.append(None)
        return listed_matmul(x, w, listed, "rows")

    variants = [problem(4, listed, "rows", unread=1.0) for listed in ([True] * 3, [False] * 3, [False, True, False])]
    with jax.transfer_guard("disallow"):
        outputs = [run(*args[:3]) for args in variants]
    assert len(traces) == 1
    for args, out in zip(variants, outputs, strict=True):
        assert_close(out, expected(*args), 1e-6)


def test_under_shard_map_rows_are_split_over_devices():
    x, w, listed, axis = problem(5, [True, False, True], "rows", unread=1.0)
    mesh = jax.make_mesh((1,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.shard_map(
        lambda x, w, listed: jax.lax.psum(listed_matmul(x, w, listed, axis), "heads"),
        mesh=mesh,
        in_specs=(P(None, "heads"), P("heads"), P("heads")),
        out_specs=P(),
    )
    assert_close(jax.jit(split)(x, w, listed), expected(x, w, listed, axis), 1e-6)


def test_under_x64_and_from_numpy(unchecked):
    args = problem(6, [True, False], "columns", unread=1.0)
    with jax.enable_x64(True):
        out = functools.partial(listed_matmul, axis="columns")(*jax.tree.map(np.asarray, args[:3]))
    assert out.dtype == jnp.float32
    assert_close(out, expected(*args), 1e-6)


@pytest.mark.parametrize(("tokens", "k", "n"), [(0, 4, 6), (2, 0, 6), (2, 4, 0)])
def test_nothing_to_do(tokens, k, n):
    out = listed_matmul(jnp.ones((tokens, k)), jnp.ones((k, n)), jnp.ones(2, bool), "columns")
    assert out.shape == (tokens, n) and not np.asarray(out).any()


def test_a_gradient_is_refused_in_words():
    x, w, listed, axis = problem(7, [True], "rows")
    with pytest.raises(NotImplementedError, match="no gradient"):
        jax.grad(lambda x: listed_matmul(x, w, listed, axis).sum())(x)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": jnp.ones(5)}, "x and w must be matrices"),
        ({"x": jnp.ones((2, 4))}, "K of x and w must agree; got K=4 and 5"),
        ({"w": jnp.ones((5, 6), jnp.bfloat16)}, "must have one dtype; got float32 and bfloat16"),
        ({"axis": "heads"}, "axis must be rows or columns; got 'heads'"),
        ({"listed": jnp.ones(4, bool)}, r"listed must be bool \[blocks\], which divide the 6 columns.*; got bool\[4\]"),
        ({"listed": jnp.ones(2)}, r"which divide the 6 columns of w; got float32\[2\]"),
        ({"listed": jnp.ones(0, bool)}, r"got bool\[0\]"),
        ({"implementation": "triton"}, "implementation must be .*; got 'triton'"),
        ({"config": Config(columns=96)}, "columns must be 64, 128 or 256; got columns=96"),
        ({"config": Config(splits=17)}, "splits must be 1 to 16; got splits=17"),
    ],
)
def test_wrong_arguments(unchecked, changes, message):
    arguments = dict(zip(("x", "w", "listed", "axis"), problem(8, [True, False], "columns"), strict=True)) | changes
    with pytest.raises(ValueError, match=message):
        listed_matmul(**arguments)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"dtype": jnp.float32}, "takes bfloat16 and float16; got float32"),
        ({"tokens": 33}, "32 tokens at most; got tokens=33"),
        ({"width": 80}, "in multiples of 64.*; got K=160, N=128 and blocks of 80"),
        ({"other": 64}, "K and N of 128 at least; got K=128, N=64"),
    ],
)
def test_what_the_kernel_leaves_to_xla(sizes, message):
    args = problem(9, [True, False], "rows", **{"width": 64, "other": 128, "unread": 1.0, "dtype": "bfloat16"} | sizes)
    with pytest.raises(NotImplementedError, match=message):
        listed_matmul(*args, implementation="interpret")
    assert_close(listed_matmul(*args), expected(*args), 1e-2)


def test_a_config_that_does_not_fit_the_blocks():
    args = problem(10, [True, False], "columns", width=64, other=128, dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match="columns must divide 64; got columns=128"):
        listed_matmul(*args, config=Config(columns=128), implementation="interpret")


@pytest.mark.parametrize("axis", AXES)
def test_small_matrices_are_left_to_xla(axis):
    """On a GPU whose kernel would take them: two launches take longer than to read all of them."""

    def program(d_model: int) -> str:
        shapes = ((1, d_model), jnp.bfloat16), ((d_model, d_model), jnp.bfloat16), ((d_model // 128,), bool)
        with targeting(GPUS[0]):
            run = functools.partial(listed_matmul, axis=axis)
            return str(jax.make_jaxpr(run)(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)))

    assert 2 * 4096**2 < MIN_BYTES < 2 * 5120**2
    assert f"listed_matmul_{axis}" in program(5120) and f"listed_matmul_{axis}" not in program(4096)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("tokens", [1, 8, 32])
@pytest.mark.parametrize(("heads", "width"), [(2, 64), (12, 64), (40, 128), (56, 128), (96, 128)])
def test_every_candidate_is_a_config_that_fits(axis, tokens, heads, width):
    n = heads * width
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((tokens, n), (n, n)))
    found = candidates(x, w, jax.ShapeDtypeStruct((heads,), bool), axis)
    assert found and len(set(found)) == len(found)
    for config in found:
        assert (width if axis == "columns" else n) % config.columns == 0
        assert 1 <= config.splits <= 16 and config.stages(tokens) >= 2


def test_work_counts_what_is_listed():
    for axis in AXES:
        args, read = problem(11, [True, False, True], axis, dtype=jnp.bfloat16), 2 * (6 if axis == "rows" else 5)
        assert work(*args).flops == 2 * 2 * 6 * 5
        assert work(*args).bytes == 2 * (6 * 5 + read + 2 * args[1].shape[1]) + 3


def test_dense_peer_is_the_whole_product():
    args = problem(12, [True, True], "rows")
    assert_close(peers(*args)["dense"](*args), expected(*args), 1e-6)


def test_bench_cases_are_those_of_the_models():
    names = [case.name for case in CASES if case.bench]
    assert "opt-30b, columns, batch 1, 50%" in names and "opt-13b, rows, batch 8, 50%" in names


@pytest.mark.gpu
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("tokens", [1, 3, 8, 32])
@pytest.mark.parametrize("width", [64, 128])
def test_compiled_kernel_gives_equal_bits_and_reads_only_what_is_listed(axis, tokens, width):
    problems = [
        problem(13, np.random.default_rng(count).permutation(16) < count, axis, tokens=tokens, width=width, other=1280,
                dtype=jnp.bfloat16)
        for count in (0, 1, 7, 16)
    ]  # fmt: skip
    for config in candidates(*problems[0]):
        run = jax.jit(functools.partial(listed_matmul, axis=axis, config=config, implementation="mosaic_gpu"))
        for args in problems:
            first, second = (run(*args[:3]) for _ in range(2))
            assert_close(first, expected(*args), 1e-2)
            np.testing.assert_array_equal(np.asarray(first, np.float32), np.asarray(second, np.float32))
