"""`decode_attention` against numpy in float64: what is in use and listed, what must not matter, both paths, models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from models.attention import KVCache, attend, place_tokens
from pallas_kernels.decode_attention import Config, candidates, decode_attention, peers, work
from pallas_kernels.decode_attention.config import check_config, check_fits
from pallas_kernels.workbench.gpus import GPUS, targeting
from pallas_kernels.workbench.interpreter import run_interpreted

NAMES = ("q", "keys", "values", "lengths", "heads", "counts")


def problem(seed: int, lengths, lists=None, *, slots=9, kv_heads=4, group=2, head_dim=8, dtype=jnp.float32):
    """Arguments of which all that is not in use and listed is NaN, and what follows a list no head at all."""
    rng = np.random.default_rng(seed)
    batch = len(lengths)
    q = rng.normal(size=(batch, kv_heads * group, head_dim))
    keys, values = rng.normal(size=(2, batch, slots, kv_heads, head_dim))
    for row, length in enumerate(lengths):
        unlisted = np.setdiff1d(np.arange(kv_heads), range(kv_heads) if lists is None else lists[row])
        for array in (keys, values):
            array[row, length:] = np.nan
            array[row][:, unlisted] = np.nan
    arrays = [*(jnp.asarray(a, dtype) for a in (q, keys, values)), jnp.array(lengths, jnp.int32)]
    if lists is not None:
        heads = rng.choice([-(2**31), -1, kv_heads, 2**31 - 1], (batch, kv_heads))
        for row, listed in enumerate(lists):
            heads[row, : len(listed)] = listed
        arrays += [jnp.asarray(heads, jnp.int32), jnp.array([len(listed) for listed in lists], jnp.int32)]
    return tuple(arrays)


def expected(q, keys, values, lengths, heads=None, counts=None, *, scale=None) -> np.ndarray:
    q, keys, values = (np.asarray(a, np.float64) for a in (q, keys, values))
    group, out = q.shape[1] // keys.shape[2], np.zeros(q.shape)
    for row, length in enumerate(np.asarray(lengths)):
        listed = np.arange(keys.shape[2])
        if heads is not None and counts is not None:
            listed = np.asarray(heads)[row, : int(counts[row])]
        for head in [h * group + i for h in listed for i in range(group) if length]:
            k, v = keys[row, :length, head // group], values[row, :length, head // group]
            scores = k @ q[row, head] * (q.shape[-1] ** -0.5 if scale is None else scale)
            weights = np.exp(scores - scores.max())
            out[row, head] = weights @ v / weights.sum()
    return out


@jax.jit
def by_xla(*args):
    return decode_attention(*args, implementation="xla")


row_lists = st.lists(st.lists(st.integers(0, 3), unique=True, max_size=4), min_size=2, max_size=2)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**16), lengths=st.lists(st.integers(0, 9), min_size=2, max_size=2), lists=row_lists)
@example(seed=0, lengths=[0, 9], lists=[[0, 1, 2, 3], [3, 1, 0, 2]])
@example(seed=0, lengths=[1, 9], lists=[[], [2]])
def test_any_lengths_and_lists(seed, lengths, lists):
    args = problem(seed, lengths, lists)
    np.testing.assert_allclose(by_xla(*args), expected(*args), atol=1e-6)


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 2e-2), ("float16", 2e-3), ("float32", 2e-6)])
def test_every_dtype_without_lists(dtype, bound):
    args = problem(1, [0, 5], dtype=dtype)
    out = by_xla(*args)
    assert out.dtype == dtype
    np.testing.assert_allclose(out.astype(jnp.float32), expected(*args), atol=bound)


def test_the_scores_scale_and_their_size():
    """Scores of thousands choose one slot; their exponentials alone would not be finite."""
    args = problem(2, [9, 4])
    for scale in (0.0, -2.0, 1e4):
        out = decode_attention(*args, scale=scale)
        np.testing.assert_allclose(out, expected(*args, scale=scale), atol=1e-5)


def test_lengths_past_the_slots_count_all_of_them():
    args = problem(3, [9, 9])
    more = (*args[:3], jnp.array([10, 2**31 - 1], jnp.int32))
    np.testing.assert_array_equal(by_xla(*more), by_xla(*args))


def test_what_is_not_finite_in_use_is_seen():
    args = problem(4, [9, 9], [[1], [1]])
    for i in (1, 2):
        broken = [a.at[0, 8, 1].set(jnp.nan) if j == i else a for j, a in enumerate(args)]
        out = by_xla(*broken)
        assert np.isnan(out[0, 2:4]).all() and np.isfinite(out[1]).all() and not np.asarray(out[0, 4:]).any()


def test_new_lists_compile_nothing_and_ask_the_host_nothing():
    traces = []

    @jax.jit
    def run(*args):
        traces.append(None)
        return decode_attention(*args)

    variants = [problem(5, [3, 9], [[0], [1, 2, 3]]), problem(6, [0, 1], [[], [3]])]
    with jax.transfer_guard("disallow"):
        outputs = [run(*args) for args in variants]
    assert len(traces) == 1
    for args, out in zip(variants, outputs, strict=True):
        np.testing.assert_allclose(out, expected(*args), atol=1e-6)


def test_under_x64_and_from_numpy(unchecked):
    args = problem(7, [3, 9], [[0], [1, 2]])
    with jax.enable_x64(True):
        out = decode_attention(*jax.tree.map(np.asarray, args))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected(*args), atol=1e-6)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("lists", [None, [[2], [], [1, 0, 2]]])
def test_the_kernel_reads_what_it_should(lists, splits):
    """Interpreted, with NaN in all the rest: splits that have no slots, a last stage past the cache, stages reused."""
    args = problem(8, [0, 70, 190], lists, slots=190, kv_heads=3, head_dim=64, dtype=jnp.bfloat16)
    config = Config(block_slots=32, stages=2, splits=splits)
    run = functools.partial(decode_attention, *args, config=config, implementation="interpret")
    out = run_interpreted(jax.jit(run))
    np.testing.assert_allclose(out.astype(jnp.float32), expected(*args), atol=2e-2)


@pytest.mark.parametrize("changes", [{"batch": 0}, {"slots": 0}, {"capacity": 0}])
def test_nothing_to_do(changes):
    size = {"batch": 2, "slots": 3, "capacity": 4} | changes
    q, keys = jnp.ones((size["batch"], 4, 8)), jnp.ones((size["batch"], size["slots"], 4, 8))
    lengths = jnp.full(size["batch"], size["slots"], jnp.int32)
    heads = jnp.zeros((size["batch"], size["capacity"]), jnp.int32)
    out = decode_attention(q, keys, keys, lengths, heads, jnp.full(size["batch"], size["capacity"], jnp.int32))
    assert out.shape == q.shape and not np.asarray(out).any()


def test_a_gradient_is_refused_in_words():
    args = problem(9, [3, 9])
    with pytest.raises(NotImplementedError, match="no gradient"):
        jax.grad(lambda q: decode_attention(q, *args[1:]).sum())(args[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": jnp.ones((2, 8))}, r"q must be .* \[batch, heads, head_dim\]; got float32\[2, 8\]"),
        ({"keys": jnp.ones((2, 9, 4, 6))}, r"keys must be float32\[2, slots, kv_heads, 8\]; got float32\[2, 9, 4, 6\]"),
        ({"values": jnp.ones((2, 8, 4, 8))}, r"values must be as keys, .*; got float32\[2, 8, 4, 8\]"),
        ({"q": jnp.ones((2, 6, 8))}, "kv_heads must divide heads; got kv_heads=4, heads=6"),
        ({"lengths": jnp.ones(2)}, r"lengths must be int32\[2\]; got float32\[2\]"),
        ({"heads": None}, "heads and counts must be given together; got counts alone"),
        ({"heads": jnp.ones(2, jnp.int32)}, r"heads must be int32\[2, capacity\]; got int32\[2\]"),
        ({"counts": jnp.ones(3, jnp.int32)}, r"counts must be int32\[2\]; got int32\[3\]"),
        ({"implementation": "triton"}, "implementation must be .*; got 'triton'"),
        ({"config": Config(block_slots=48)}, "block_slots must be 32 or 64; got block_slots=48"),
    ],
)
def test_wrong_arguments(unchecked, changes, message):
    arguments = dict(zip(NAMES, problem(10, [3, 9], [[0], [1]]), strict=True)) | changes
    with pytest.raises(ValueError, match=message):
        decode_attention(**arguments)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"dtype": jnp.float32}, "takes bfloat16 and float16; got float32"),
        ({"head_dim": 80}, "takes a head_dim of 32, 64, 128; got head_dim=80"),
        ({"group": 9}, "takes 8 queries of a head of the keys at most; got heads=9, kv_heads=1"),
        ({"slots": 63}, "at least 64 slots; got slots=63"),
    ],
)
def test_what_the_kernel_leaves_to_xla(sizes, message):
    args = problem(11, [5], **{"slots": 64, "kv_heads": 1, "head_dim": 32, "dtype": jnp.bfloat16} | sizes)
    with pytest.raises(NotImplementedError, match=message):
        decode_attention(*args, implementation="interpret")


def test_configs_that_the_kernel_does_not_take():
    keys = jnp.zeros((1, 64, 1, 128), jnp.bfloat16)
    for config, message in (
        (Config(stages=0), "stages must be at least 1; got stages=0"),
        (Config(splits=65), "splits must be 1 to 64; got splits=65"),
    ):
        with pytest.raises(ValueError, match=message):
            check_config(config)
    with pytest.raises(ValueError, match="stages must leave room for two blocks an SM.*; got block_slots=64, stages=4"):
        check_fits(Config(stages=4), keys)


@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("slots", [64, 2048, 2**16])
def test_candidates_fit_and_fill_the_card(batch, slots):
    q, keys = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((batch, 56, 128), (batch, slots, 56, 128)))
    found = candidates(q, keys, keys, jax.ShapeDtypeStruct((batch,), jnp.int32))
    assert found and len(set(found)) == len(found)
    for config in found:
        check_config(config)
        check_fits(config, keys)
    waves = batch * 56 * found[0].splits / 264
    assert slots == 64 or waves / np.ceil(waves) > 0.8


def test_work_is_counted_from_the_arguments():
    args = problem(12, [3, 9], [[0], [1, 2, 3]], dtype=jnp.bfloat16)
    counted = work(*args)
    listed = 3 * 1 + 9 * 3
    assert counted.flops == 4 * listed * 2 * 8
    assert counted.bytes == 2 * (2 * listed * 8 + 4 * 2 * 8 + 2 * 8 * 8) + 4 * (2 + 2 + 4)
    whole = problem(13, [3, 9], kv_heads=2, slots=9)
    q, keys, values, lengths = (jnp.nan_to_num(x) for x in whole)
    dense = peers(q, keys, values, lengths)["dense"](q, keys, values, lengths)
    np.testing.assert_allclose(dense, expected(*whole), atol=1e-6)


def traced_attention(*, listed: bool, head_dim: int = 64) -> str:
    """The program of attention to a cache, traced for a GPU."""

    def run(q, k, v, filled, tokens, heads):
        places = place_tokens(tokens, cache=KVCache((k,), (v,), filled))
        return attend(q, k, v, places, listed=heads if listed else None)

    shapes = [jax.ShapeDtypeStruct((2, n, 4, head_dim), jnp.bfloat16) for n in (1, 64, 64)]
    shapes += [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2,), (2, 1))]
    with targeting(GPUS[0]):
        return str(jax.make_jaxpr(run)(*shapes, jax.ShapeDtypeStruct((2, 4), bool)))


def test_models_decode_by_the_kernel_where_there_is_one():
    assert "decode_attention" in traced_attention(listed=True)
    assert "decode_attention" in traced_attention(listed=False)
    assert "decode_attention" not in traced_attention(listed=False, head_dim=80)
    with pytest.raises(ValueError, match="only for one token a row behind a cache"):
        q, k = jnp.ones((1, 2, 2, 8)), jnp.ones((1, 2, 2, 8))
        attend(q, k, k, place_tokens(jnp.ones((1, 2), jnp.int32)), listed=jnp.ones((1, 2), bool))
