"""`layer_norm` against numpy in float64: the interpreted kernel, hard rows, gradients; and its use in OPT."""

import functools
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from models import OPT, OPTConfig
from models import layer_norm as norms
from pallas_kernels.layer_norm import Config, candidates, layer_norm, peers, work
from pallas_kernels.layer_norm.config import THREADS, check_fits, check_support
from pallas_kernels.workbench.gpus import GPUS, targeting
from pallas_kernels.workbench.interpreter import run_interpreted

EPSILON = 1e-3


def problem(seed: int, *, rows: int, d: int, dtype="float32", parameters="float32", addend: bool = True) -> Any:
    rng = np.random.default_rng(seed)
    x, added = (jnp.asarray(4 * rng.normal(size=(rows, d)) + 2, dtype) for _ in range(2))
    scale, bias = (jnp.asarray(rng.normal(size=d), parameters) for _ in range(2))
    return x, scale, bias, added if addend else None


def expected(x, scale, bias, addend) -> tuple[np.ndarray, np.ndarray]:
    """The sum, rounded, and the norm of that in float64."""
    total = x if addend is None else np.asarray(x, np.float32) + np.asarray(addend, np.float32)
    total = np.asarray(total, x.dtype)
    wide, scale, bias = (np.asarray(a, np.float64) for a in (total, scale, bias))
    centred = wide - wide.mean(axis=1, keepdims=True)
    return total, centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + EPSILON) * scale + bias


def interpreted(*arguments, **options):
    return run_interpreted(lambda: layer_norm(*arguments, epsilon=EPSILON, implementation="interpret", **options))


@pytest.mark.parametrize(
    ("parts", "d", "dtype", "parameters", "addend"),
    [
        (1, 640, "bfloat16", "bfloat16", True),
        (4, 1024, "bfloat16", "float16", True),
        (3, 384, "float16", "float32", False),
        (2, 256, "float32", "bfloat16", True),
    ],
)
def test_every_part_of_a_row_by_the_interpreted_kernel(parts, d, dtype, parameters, addend):
    args = problem(parts, rows=2, d=d, dtype=dtype, parameters=parameters, addend=addend)
    total, normed = interpreted(*args, config=Config(parts=parts))
    ref_total, ref = expected(*args)
    np.testing.assert_array_equal(total, ref_total)
    assert total.dtype == normed.dtype == dtype
    np.testing.assert_allclose(np.asarray(normed, np.float64), ref, rtol=2.0**-8, atol=1e-5)


@pytest.mark.parametrize("implementation", ["interpret", "xla"])
def test_what_is_hard_about_a_row(implementation):
    """A large mean, a constant, the largest values that have a variance, and rows with infinity or NaN."""
    x = np.random.default_rng(5).normal(size=(5, 128)).astype(np.float32)
    x[0], x[1] = x[0] + 3e4, 7
    x[2] *= 1e18
    x[3, 5], x[4, 7] = np.inf, np.nan
    scale, bias = jnp.full(128, 2.0), jnp.ones(128)
    call = functools.partial(layer_norm, epsilon=EPSILON, implementation=implementation)
    total, normed = run_interpreted(lambda: call(jnp.asarray(x), scale, bias))
    np.testing.assert_array_equal(total, x)
    rounding = 2.0**-10 * 2  # that of the mean of the first row, scaled
    np.testing.assert_allclose(normed[:3], expected(x[:3], scale, bias, None)[1], atol=rounding)
    assert np.isnan(normed[3:]).all()


def test_gradients_are_those_of_the_definition():
    args = problem(6, rows=2, d=128)
    weights = [jnp.asarray(np.random.default_rng(i).normal(size=(2, 128)), jnp.float32) for i in (7, 8)]

    def loss(*args, implementation):
        found = layer_norm(*args, epsilon=EPSILON, implementation=implementation)
        return sum(jnp.sum(w * out) for w, out in zip(weights, found, strict=True))

    kernel = functools.partial(loss, implementation="interpret")
    grads = run_interpreted(lambda: jax.grad(kernel, argnums=(0, 1, 2, 3))(*args))
    x, scale, bias, addend = (np.asarray(a, np.float64) for a in args)
    to_total, to_normed = (np.asarray(w, np.float64) for w in weights)
    centred = x + addend - (x + addend).mean(axis=1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(axis=1, keepdims=True) + EPSILON)
    standard, g = centred / deviation, to_normed * scale
    to_x = (g - g.mean(axis=1, keepdims=True) - standard * (g * standard).mean(axis=1, keepdims=True)) / deviation
    refs = to_x + to_total, (to_normed * standard).sum(axis=0), to_normed.sum(axis=0), to_x + to_total
    for grad, ref in zip(grads, refs, strict=True):
        np.testing.assert_allclose(grad, ref, rtol=1e-4, atol=1e-4)


def test_a_batch_of_calls():
    x, scale, bias, addend = problem(9, rows=4, d=128)
    cut = [a.reshape(2, 2, 128) for a in (x, addend)]
    batched = jax.vmap(functools.partial(layer_norm, epsilon=EPSILON, implementation="interpret"), (0, None, None, 0))
    found = run_interpreted(lambda: batched(cut[0], scale, bias, cut[1]))
    for out, ref in zip(found, expected(x, scale, bias, addend), strict=True):
        np.testing.assert_allclose(out.reshape(4, 128), ref, rtol=1e-4, atol=1e-5)


def test_wrong_arguments(unchecked):
    x, scale, bias, addend = problem(10, rows=2, d=128)
    for args, message in (
        ((x[0], scale, bias), r"x must be .* \[rows, d\]; got float32\[128\]"),
        ((x, scale[:3], bias), r"scale must be floating-point \[128\]; got float32\[3\]"),
        ((x, scale, bias.astype(int)), r"bias must be floating-point \[128\]; got int32\[128\]"),
        ((x, scale, bias, addend[:1]), r"addend must be as x, float32\[2, 128\]; got float32\[1, 128\]"),
        ((x, scale, bias, addend.astype(jnp.bfloat16)), r"addend must be as x, .*; got bfloat16\[2, 128\]"),
    ):
        with pytest.raises(ValueError, match=message):
            layer_norm(*args)
    with pytest.raises(ValueError, match=r"epsilon must be at least 0; got epsilon=-1\.0"):
        layer_norm(x, scale, bias, epsilon=-1.0)
    with pytest.raises(ValueError, match="implementation must be None, .*; got 'triton'"):
        layer_norm(x, scale, bias, implementation="triton")
    for parts in (0, 3):
        with pytest.raises(ValueError, match=f"parts must divide d into multiples of 128; got parts={parts}, d=128"):
            layer_norm(x, scale, bias, config=Config(parts=parts), implementation="interpret")


def test_what_the_kernel_leaves_to_xla():
    for shape, dtype, message in (
        ((65, 128), "bfloat16", "takes 1 to 64 rows; got rows=65"),
        ((2, 100), "bfloat16", "a multiple of 128, .*; got d=100 of bfloat16"),
        ((2, 12288), "float32", "at most 32768 bytes a row; got d=12288 of float32"),
    ):
        x, scale = jnp.ones(shape, dtype), jnp.ones(shape[1], dtype)
        with pytest.raises(NotImplementedError, match=message):
            layer_norm(x, scale, scale, implementation="interpret")
        assert layer_norm(x, scale, scale)[0] is x
    with pytest.raises(NotImplementedError, match="runs on NVIDIA H100, NVIDIA H200; got cpu"):
        layer_norm(jnp.ones((2, 128)), jnp.ones(128), jnp.ones(128), implementation="mosaic_gpu")


def test_candidates_fit():
    parameters = jax.ShapeDtypeStruct((1,), jnp.bfloat16)
    for rows, d in itertools.product((1, 8, 32, 64), (128, 768, 2560, 7168, 12288)):
        x = jax.ShapeDtypeStruct((rows, d), jnp.bfloat16)
        check_support(x, None)
        found = candidates(x, parameters, parameters)
        assert Config() in found and len(set(found)) == len(found)
        for config in found:
            check_fits(config, x)
            assert d // config.parts % THREADS == 0
        assert rows * found[0].parts <= 66


def test_work_and_peers():
    args = problem(11, rows=3, d=10)
    assert work(*args).bytes == 4 * (4 * 30 + 2 * 10) and work(*args[:3]).bytes == 4 * (2 * 30 + 2 * 10)
    total, normed = peers(*args)["xla"](*args)
    np.testing.assert_array_equal(total, expected(*args)[0])
    np.testing.assert_allclose(normed, expected(*args)[1], atol=1e-3)


CONFIG = OPTConfig(vocab_size=20, layers=1, d_model=128, heads=2, d_ff=8, dtype="bfloat16", param_dtype="bfloat16")


TWO_GPUS = AbstractMesh(
    (2,), ("model",), axis_types=(AxisType.Auto,), abstract_device=AbstractDevice("NVIDIA H200", 132, "gpu")
)


@pytest.mark.parametrize("shape", [(2, 3), (5,), ()])
def test_gradients_of_opts_norm(shape):
    """Of a layer norm that is no kernel's: numpy's, in float64."""
    generator = np.random.default_rng(11)
    norm: Any = norms.LayerNorm(OPTConfig.preset("125m", d_model=24, heads=2), rngs=nnx.Rngs(0))
    scale, bias, x, to_y = (generator.normal(size=size) for size in (24, 24, (*shape, 24), (*shape, 24)))
    norm.scale[...], norm.bias[...] = (jnp.asarray(a, jnp.float32) for a in (scale, bias))

    def loss(norm, x):
        return (norm(x) * to_y.astype(np.float32)).sum()

    y = norm(jnp.asarray(x, jnp.float32))
    of_norm, to_x = jax.jit(nnx.grad(loss, argnums=(0, 1)))(norm, jnp.asarray(x, jnp.float32))
    inverse = 1 / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
    standard, g = (x - x.mean(axis=-1, keepdims=True)) * inverse, to_y * scale
    expected = inverse * (g - g.mean(axis=-1, keepdims=True) - standard * (g * standard).mean(axis=-1, keepdims=True))
    np.testing.assert_allclose(y, standard * scale + bias, atol=1e-5)
    np.testing.assert_allclose(to_x, expected, atol=1e-4)
    np.testing.assert_allclose(of_norm.scale[...], (to_y * standard).reshape(-1, 24).sum(axis=0), atol=1e-5)
    np.testing.assert_allclose(of_norm.bias[...], to_y.reshape(-1, 24).sum(axis=0), atol=1e-5)


def test_opt_has_its_norms_in_one_launch_for_one_token_a_row():
    """Both of the layer and the last one, also by each of two devices; none in prefill, nor where the batch is cut."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: OPT(CONFIG, rngs=nnx.Rngs(0))))
    cache = jax.eval_shape(lambda: nnx.merge(graphdef, state).init_cache(2, 8))

    def launches(tokens: int) -> int:
        def run(state, tokens, cache):
            return nnx.merge(graphdef, state).hidden_states(tokens, cache=cache)[0]

        shapes = state, jax.ShapeDtypeStruct((2, tokens), jnp.int32), cache
        return str(jax.make_jaxpr(run)(*shapes)).count("name=_layer_norm")

    assert launches(1) == 0
    with targeting(GPUS[0]):
        assert launches(1) == 3
        assert launches(2) == 0
    with jax.sharding.use_abstract_mesh(TWO_GPUS):
        assert launches(1) == 3
    cut = AbstractMesh((2, 2), ("data", "model"), (AxisType.Auto,) * 2, abstract_device=TWO_GPUS.abstract_device)
    with jax.sharding.use_abstract_mesh(cut):
        assert launches(1) == 0


def test_rows_cut_over_devices():
    """Inside of shard_map the results vary as the rows do, though a kernel's outputs do not say so by themselves."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 128), (128,), (128,), (4, 128))]

    def normed(*arrays):
        return jax.lax.scan(lambda carry, _: (layer_norm(carry, *arrays[1:])[1], None), arrays[0], length=2)[0]

    specs = P("model"), P(), P(), P("model")
    with jax.sharding.use_abstract_mesh(TWO_GPUS):
        cut = jax.jit(jax.shard_map(normed, mesh=TWO_GPUS, in_specs=specs, out_specs=P("model")))
        assert "mosaic_gpu" in cut.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def test_opt_norms_the_same_either_way(monkeypatch):
    rng = np.random.default_rng(12)
    norm: Any = norms.LayerNorm(CONFIG, relu=True, rngs=nnx.Rngs(0))
    norm.scale[...], norm.bias[...] = (jnp.asarray(rng.normal(size=128), jnp.bfloat16) for _ in range(2))
    x, addend = (jnp.asarray(rng.normal(size=(3, 1, 128)), jnp.bfloat16) for _ in range(2))
    usual = norm.of_sum(x, addend)
    np.testing.assert_array_equal(usual[0], x + addend)
    monkeypatch.setattr(norms, "check_support", lambda x, devices: None)
    monkeypatch.setattr(norms, "layer_norm", functools.partial(layer_norm, implementation="xla"))
    for out, ref in zip((*norm.of_sum(x, addend), norm(x + addend)), (*usual, usual[1]), strict=True):
        np.testing.assert_array_equal(out, ref)


TWO_CPUS = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from models import OPTConfig
from models import layer_norm as norms
from pallas_kernels.layer_norm import layer_norm

norm = norms.LayerNorm(OPTConfig.preset("125m", d_model=128, heads=2), rngs=nnx.Rngs(0))
rng = np.random.default_rng(13)
norm.scale[...], norm.bias[...] = (jnp.asarray(rng.normal(size=128), jnp.float32) for _ in range(2))
x, addend = (jnp.asarray(rng.normal(size=(3, 1, 128)), jnp.float32) for _ in range(2))
wide = np.asarray(x + addend, np.float64)
centred = wide - wide.mean(axis=-1, keepdims=True)
expected = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5) * norm.scale[...] + norm.bias[...]

calls = []
norms.check_support = lambda x, devices: None
norms.layer_norm = lambda *args, **options: calls.append(args) or layer_norm(*args, **options, implementation="xla")
with jax.set_mesh(jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))):
    total, y = jax.jit(norm.of_sum)(x, addend)
    alone = jax.jit(lambda x: norm.of_sum(x, None))(x + addend)
assert len(calls) == 2 and all(a.sharding.is_fully_replicated for a in (total, y))
np.testing.assert_array_equal(total, x + addend)
np.testing.assert_allclose(y, expected, atol=1e-5)
np.testing.assert_array_equal(alone[1], y)
print("whole")
"""


def test_each_of_two_devices_norms_whole_rows():
    """In a process that sees two CPU devices, with the kernel's xla path in its place."""
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command, root = [sys.executable, "-c", TWO_CPUS], Path(__file__).parents[1]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "whole", done.stderr
