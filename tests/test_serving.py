"""Continuous batching against the model alone: without a cache, one prompt at a time, the whole text at every step."""

import dataclasses
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

from models import OPT, Mixtral, MixtralConfig, OPTConfig, SwitchConfig, SwitchTransformer, load_opt, save_opt
from sparsellm import decoding, memory
from sparsellm.generation import generate
from sparsellm.memory import estimate
from sparsellm.packing import Packing
from sparsellm.serving import Answer, Request, serve, statistics
from sparsellm.sharding import create_model

OPT_SIZES = OPTConfig(vocab_size=37, layers=2, d_model=16, heads=2, d_ff=29, max_length=64)
MIXTRAL_SIZES = MixtralConfig(
    vocab_size=37, layers=1, d_model=16, heads=2, kv_heads=1, d_ff=11, experts=3, sliding_window=5, max_length=64
)
LENGTH = 48  # slots of a row
EOS = 2


def make(kind, config):
    """Random weights, by numpy: the initialiser takes longer to compile."""
    rng = np.random.default_rng(0)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0))))

    def draw(path, x):  # biases and norms small and near one, so that texts are not of a few tokens only
        near = 1.0 if x.ndim == 1 and "scale" in str(path) else 0.0
        return jnp.asarray(near + (0.1 if x.ndim == 1 else 1.0) * rng.normal(size=x.shape), x.dtype)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(draw, state))


@pytest.fixture(scope="module")
def mixtral():
    """With a window that is shorter than the texts, and grouped queries."""
    return make(Mixtral, MIXTRAL_SIZES)


@pytest.fixture(scope="module")
def opt():
    return make(OPT, OPT_SIZES)


@jax.jit
def _logits(model, tokens):
    return model(tokens)[0]


def logits_of(model, text) -> np.ndarray:
    """Of all its tokens, without a cache: padded on the right, where no token looks."""
    tokens = np.zeros((1, LENGTH), np.int32)
    tokens[0, : len(text)] = text
    return np.asarray(_logits(model, tokens))[: len(text)]


def expected(model, prompt, max_new_tokens: int, eos_id: int = EOS) -> list[int]:
    """Greedily, by a full pass over prompt and text for each token."""
    text = list(prompt)
    for _ in range(max_new_tokens):
        token = int(np.argmax(logits_of(model, text)[-1]))
        if token == eos_id:
            break
        text.append(token)
    return text[len(prompt) :]


def requests_of(rng, count: int, eos_id: int = EOS) -> list[Request]:
    """Of 1 to 30 tokens, and answers of 1 to 15."""
    return [
        Request(
            prompt=rng.integers(3, 37, rng.integers(1, 31)).tolist(),
            max_new_tokens=int(rng.integers(1, 16)),
            eos_id=eos_id,
        )
        for _ in range(count)
    ]


OPTIONS: dict[str, Any] = {"rows": 3, "cache_length": LENGTH, "steps": 4, "prefill_sizes": (48,)}


def some_end_early(model, requests: list[Request]) -> list[Request]:
    """Every third one, by a token that its text holds."""
    found = list(requests)
    for i, request in enumerate(requests[::3]):
        text = expected(model, request.prompt, request.max_new_tokens, request.eos_id)
        found[3 * i] = dataclasses.replace(request, eos_id=text[len(text) // 2])
    return found


def test_answers_are_those_of_the_prompts_alone(mixtral):
    """In whatever order they come; and streaming gives the same."""
    model, requests = mixtral, some_end_early(mixtral, requests_of(np.random.default_rng(1), 13, eos_id=-1))
    texts = [expected(model, r.prompt, r.max_new_tokens, r.eos_id) for r in requests]
    early = [len(text) < r.max_new_tokens for r, text in zip(requests, texts, strict=True)]
    assert any(early) and not all(early) and len({token for text in texts for token in text}) > 9
    order = np.random.default_rng(2).permutation(len(requests))
    streamed = [[] for _ in requests]
    answers = serve(
        model, [requests[i] for i in order], **OPTIONS, stream=lambda i, token: streamed[order[i]].append(token)
    )
    assert [answer.tokens for answer in answers] == [texts[i] for i in order]
    assert streamed == texts


@pytest.mark.parametrize(("rows", "count"), [(1, 4), (3, 2)])
def test_one_row_and_more_rows_than_requests(opt, rows, count):
    few = requests_of(np.random.default_rng(4), count)
    answers = serve(opt, few, **(OPTIONS | {"rows": rows}))
    assert [a.tokens for a in answers] == [expected(opt, r.prompt, r.max_new_tokens, r.eos_id) for r in few]


def test_all_rows_end_in_the_same_chunk(opt):
    """And a text of one token ends before any chunk."""
    new = [Request(prompt=[5, i], max_new_tokens=most, eos_id=-1) for i, most in enumerate([4] * 5 + [1] * 4 + [4])]
    answers = serve(opt, new, **OPTIONS)
    assert [answer.tokens for answer in answers] == [expected(opt, r.prompt, r.max_new_tokens, -1) for r in new]


def test_end_of_text_as_the_first_token(opt):
    first = expected(opt, [5, 6], 1, eos_id=-1)[0]
    answers = serve(opt, [Request(prompt=[5, 6], max_new_tokens=9, eos_id=first)] * 5, **OPTIONS)
    assert [answer.tokens for answer in answers] == [[]] * 5
    assert all(0 < answer.first_token_s <= answer.finished_s for answer in answers)


def test_no_requests(opt):
    assert serve(opt, [], **OPTIONS) == []


def test_another_mix_compiles_nothing(opt):
    def compiled():
        return tuple(getattr(f, "_cache_size")() for f in (decoding.prefill, decoding.decode))  # noqa: B009

    options: dict[str, Any] = OPTIONS | {"prefill_sizes": (40, 48)}
    serve(opt, requests_of(np.random.default_rng(1), 20), **options)
    before = compiled()
    other = some_end_early(opt, requests_of(np.random.default_rng(5), 13, eos_id=-1))
    answers = serve(opt, other, **options)
    assert compiled() == before
    assert [a.tokens for a in answers] == [expected(opt, r.prompt, r.max_new_tokens, r.eos_id) for r in other]


def test_requests_wait_for_their_arrival(opt):
    late = Request(prompt=[3, 4], max_new_tokens=2, eos_id=-1, arrival_s=0.2)
    early = Request(prompt=[5], max_new_tokens=2, eos_id=-1)
    first, second = serve(opt, [late, early], **OPTIONS)
    assert first.tokens == expected(opt, [3, 4], 2, -1) and second.tokens == expected(opt, [5], 2, -1)
    assert second.finished_s < 0.2 < first.first_token_s <= first.finished_s
    assert (first.arrival_s, second.arrival_s) == (0.2, 0)


def test_statistics():
    answers = [
        Answer(tokens=[1] * 10, arrival_s=1.0, first_token_s=2.0, finished_s=5.0),
        Answer(tokens=[1] * 30, arrival_s=1.0, first_token_s=4.0, finished_s=11.0),
    ]
    assert statistics(answers) == pytest.approx(
        {
            "tokens": 40,
            "seconds": 10.0,
            "tokens_per_s": 4.0,
            "first_token_s_p50": 2.0,
            "first_token_s_p99": 2.98,
            "latency_s_p50": 7.0,
            "latency_s_p99": 9.94,
        }
    )
    with pytest.raises(ValueError, match="answers must hold at least one; got none"):
        statistics([])


def test_generate_equals_the_model_without_a_cache(opt):
    """A batch of prompts of very different lengths, prefilled packed."""
    prompts = [r.prompt for r in requests_of(np.random.default_rng(6), 6)]
    rows = generate(opt, prompts, max_new_tokens=9, eos_id=-1)
    assert rows == [expected(opt, prompt, 9, -1) for prompt in prompts]


def test_prefill_into_some_rows_leaves_the_others(opt):
    """Packed, padded on the left, padded on the right and one by one fill a cache alike; others keep their text."""
    rng = np.random.default_rng(3)
    old, new = rng.integers(3, 37, (3, 6)), rng.integers(3, 37, (3, 4))

    @jax.jit
    def call(model, tokens, mask=None, packing=None, cache=None):
        return model(tokens, mask=mask, packing=packing, cache=cache)

    _, cache = call(opt, jnp.asarray(old), cache=opt.init_cache(3, 16))
    assert cache.filled.tolist() == [6, 6, 6]
    packing = Packing.of([0, 3, 0], size=8, length=8)
    tokens = np.zeros((1, 8), np.int32)
    tokens[0, :3] = new[1, :3]
    logits, cache = call(opt, jnp.asarray(tokens), packing=packing, cache=cache)
    assert cache.filled.tolist() == [6, 3, 6]
    np.testing.assert_allclose(logits[0, :3], logits_of(opt, new[1, :3]), atol=1e-3)
    whole = [[*old[0], *new[0, :2]], [*new[1]], [*old[2], *new[2]]]  # rows now get 2, 1 and 4 tokens
    more = [new[0, :2], new[1, 3:], new[2]]
    for left in (True, False):
        tokens, mask = np.zeros((3, 4), np.int32), np.zeros((3, 4), bool)
        for row, added in enumerate(more):
            columns = slice(4 - len(added), 4) if left else slice(len(added))
            tokens[row, columns], mask[row, columns] = added, True
        logits, after = call(opt, jnp.asarray(tokens), mask=jnp.asarray(mask), cache=cache)
        assert after.filled.tolist() == [8, 4, 10]
        for row, text in enumerate(whole):
            full = logits_of(opt, text)[-len(more[row]) :]
            np.testing.assert_allclose(np.asarray(logits)[row][mask[row]], full, atol=1e-3)


@pytest.mark.gpu
def test_packed_prefill_into_a_cache_by_cudnn():
    """Rows without a prompt, too; against XLA's attention in float32."""
    config = dataclasses.replace(OPT_SIZES, d_model=128)
    params = nnx.state(make(OPT, config))  # kept small, as a saturated softmax makes a tenth of what bfloat16 rounds
    params = jax.tree.map(lambda x: x / x.shape[0] ** 0.5 if x.ndim == 2 else x, params)
    wide, narrow = (make(OPT, dataclasses.replace(config, dtype=dtype)) for dtype in ("float32", "bfloat16"))
    nnx.update(wide, params)
    nnx.update(narrow, params)
    packing = Packing.of([0, 30, 7], size=128, length=32)
    tokens = jnp.arange(128)[None] % 37

    @jax.jit
    def call(model, tokens, packing):
        return model(tokens, packing=packing, cache=model.init_cache(3, 64))

    assert "cudnn" in call.lower(narrow, tokens, packing).as_text()
    (logits, cache), (exact, _) = call(narrow, tokens, packing), call(wide, tokens, packing)
    error = np.linalg.norm(logits[0, :37] - exact[0, :37]) / np.linalg.norm(exact[0, :37])
    assert error < 3e-2 and cache.filled.tolist() == [0, 30, 7]
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in (*cache.keys, *cache.values))


def test_slots_past_the_end_are_dropped(opt):
    """And touch no other row."""
    cache = opt.init_cache(2, 4)._replace(filled=jnp.array([4, 2], jnp.int32))
    _, after = jax.jit(lambda model, tokens, cache: model(tokens, cache=cache))(opt, jnp.array([[3], [4]]), cache)
    for keys in (*after.keys, *after.values):
        written = np.any(np.asarray(keys), axis=(2, 3))
        assert written.tolist() == [[False] * 4, [False, False, True, False]]


def test_the_cache_is_written_in_place(opt):
    """The compiled loop holds each array of the cache once: nothing in its body copies one."""
    graphdef, state = nnx.split(opt)
    cache = opt.init_cache(3, 4096)
    rows = decoding.Rows(jnp.zeros(3, jnp.int32), jnp.full(3, 9, jnp.int32), jnp.int32(0), cache)
    arguments = graphdef, state, rows, jax.random.key(0), decoding.GREEDY, np.full(3, -1, np.int32), None
    compiled: Any = decoding.decode.lower(*arguments, steps=4).compile()
    size = sum(x.nbytes for x in jax.tree.leaves(cache))
    found = compiled.memory_analysis()
    assert found.alias_size_in_bytes >= size
    shape = "f32[3,4096,2,8]"
    copies = [line for line in compiled.as_text().splitlines() if f"= {shape}" in line and " copy(" in line]
    assert not copies


@pytest.mark.parametrize("fixture", ["opt", "mixtral"])
def test_one_row_under_x64(fixture, request):
    model = request.getfixturevalue(fixture)
    expected = generate(model, [[1, 2]], max_new_tokens=3, eos_id=-1)
    with jax.enable_x64(True):
        assert generate(model, [[1, 2]], max_new_tokens=3, eos_id=-1) == expected


SHARDED = """
import jax, numpy as np
from flax import nnx
from models import OPT, OPTConfig
from sparsellm import decoding
from sparsellm.generation import generate
from sparsellm.serving import Request, serve
from sparsellm.sharding import create_model, mesh_of, sum_over_shards

config = OPTConfig(vocab_size=88, layers=1, d_model=32, heads=8, d_ff=64, max_length=64, init_std=0.3, sparse_rows=8)
mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
make = lambda: OPT(config, rngs=nnx.Rngs(0))
whole, cut = create_model(make), create_model(make, mesh)
rng = np.random.default_rng(0)
prompts = [rng.integers(3, 88, n).tolist() for n in (3, 17, 1, 9, 12)]
expected = generate(whole, prompts, max_new_tokens=12, eos_id=-1)
before = decoding.prefill._cache_size(), decoding.decode_over_mesh._cache_size()
requests = [Request(prompt=p, max_new_tokens=12, eos_id=-1) for p in prompts]
answers = serve(cut, requests, rows=2, cache_length=32, steps=4, prefill_sizes=(32,))
assert [a.tokens for a in answers] == expected
def block(x, w1, w2):
    return jax.nn.relu(x @ w1) @ w2

x, w1, w2 = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 32), (32, 64), (64, 32)))
ffn = jax.jit(lambda *arrays: sum_over_shards(block, "ffn", (None, 1, 0), *arrays))
np.testing.assert_allclose(ffn(x, w1, w2), np.maximum(x @ w1, 0) @ w2, atol=1e-4)
layer = cut.layers[0]
given = x, layer.fc1.kernel[...], layer.fc2.kernel[...]
assert mesh_of(nnx.state(cut)) == mesh and mesh_of(nnx.state(whole)) is None
with jax.set_mesh(mesh):
    np.testing.assert_allclose(ffn(*given), np.maximum(x @ given[1], 0) @ given[2], atol=1e-5)
    program = ffn.lower(*given).compile().as_text()
assert "all-reduce" in program and "all-gather" not in program
print("compiled", decoding.prefill._cache_size() - before[0], decoding.decode_over_mesh._cache_size() - before[1])
"""


def test_served_by_eight_devices():
    """Tensor parallel, with the sparse operators: tokens as of one device; a program for the first prefill, one for
    later ones, one for decoding."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED],
        env=os.environ | flags | {"JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == "compiled 2 1", done.stderr


def test_a_text_that_is_not_finite_does_not_outlive_its_row():
    """Its keys and values are still in the slots behind the next text of the row, where nobody looks."""
    model = make(OPT, OPT_SIZES)
    embedding = model.embed_tokens.embedding
    embedding[...] = embedding[...].at[36].set(jnp.nan)
    model.logits = lambda hidden: hidden[..., :30]  # of which none is that of token 36
    sound, lost = Request(prompt=[5, 6, 7], max_new_tokens=9), Request(prompt=[3] * 20 + [36] * 9, max_new_tokens=9)
    alone, after = serve(model, [sound], **OPTIONS), serve(model, [lost, sound], **{**OPTIONS, "rows": 1})
    assert after[0].tokens == [0] * 9  # what argmax makes of NaN
    assert after[1].tokens == alone[0].tokens and len(set(alone[0].tokens)) > 2


@pytest.mark.parametrize(
    ("request_", "options", "message"),
    [
        ({"prompt": []}, {}, "a prompt must hold at least one token .*; request 1 is empty"),
        ({"prompt": [37]}, {}, r"token ids must be in \[0, 37\); request 1 holds 37"),
        ({"prompt": [3] * 60}, {}, "must fit into max_length=64 positions; request 1 has 60 tokens"),
        ({"prompt": [3] * 40, "max_new_tokens": 9}, {}, "fit into cache_length=48 slots; request 1 has 40 tokens"),
        ({"prompt": [3] * 20}, {"prefill_sizes": (16,)}, r"largest of prefill_sizes=\(16,\); request 1 has 20 tokens"),
        ({"max_new_tokens": 0}, {}, "max_new_tokens must be at least 1; got 0"),
        ({"arrival_s": float("nan")}, {}, "arrival_s must be finite and at least 0; request 1 has nan"),
        ({}, {"rows": 0}, "rows must be at least 1; got rows=0"),
        ({}, {"steps": 0}, "steps must be at least 1; got steps=0"),
        ({}, {"prefill_sizes": ()}, r"prefill_sizes must be numbers of at least 1; got \(\)"),
    ],
)
def test_wrong_requests(opt, request_, options, message):
    good = {"prompt": [3], "max_new_tokens": 5}
    with pytest.raises(ValueError, match=message):
        serve(opt, [Request(**good), Request(**(good | request_))], **(OPTIONS | options))


def test_numbers_that_are_no_tokens(opt, unchecked):
    with pytest.raises(ValueError, match="token ids must be integers; request 0 holds float64"):
        serve(opt, [Request(prompt=[3.7, 5.2], max_new_tokens=5)], rows=1, cache_length=9)  # pyright: ignore


def test_models_whose_rows_cannot_be_refilled():
    switch = nnx.eval_shape(lambda: SwitchTransformer(SwitchConfig.preset("tiny"), rngs=nnx.Rngs(0)))
    with pytest.raises(TypeError, match="filled each for itself .*; those of SwitchTransformer are not"):
        serve(switch, [Request(prompt=[3], max_new_tokens=1)], **OPTIONS)


def test_memory_is_what_the_arrays_take(opt):
    found = estimate(opt, rows=3, slots=48, tokens=96)
    assert found.parameters == sum(x.nbytes for x in jax.tree.leaves(nnx.state(opt)))
    assert found.cache == 3 * 48 * 16 * 4 * 2 * 2 + 3 * 4  # keys and values of two layers, and how full each row is


def test_a_cache_larger_than_the_device(opt, monkeypatch):
    """The message says what would fit, and that does."""
    one = estimate(opt, rows=1, slots=48, tokens=48)
    has = one.parameters + estimate(opt, rows=8, slots=48, tokens=8 * 48).activations + 5 * one.cache + 7
    monkeypatch.setattr(memory, "capacity", lambda: has)
    with pytest.raises(
        ValueError, match=r"8 rows of 48 slots need about .* GiB .*: 5 rows of 48 slots, or 8 rows of 30"
    ):
        serve(opt, [Request(prompt=[3], max_new_tokens=1)], rows=8, cache_length=48, prefill_sizes=(48,))
    with pytest.raises(ValueError, match="16 rows of .* slots need about .* of a device"):
        generate(opt, [[3]] * 16, max_new_tokens=20)


def test_parameters_larger_than_the_device(tmp_path, monkeypatch):
    """Refused before any is made or read; so many devices as the message names have room."""
    config = OPTConfig(vocab_size=64, layers=1, d_model=16, heads=2, d_ff=64, max_length=32)
    model = create_model(lambda: OPT(config, rngs=nnx.Rngs(0)))
    save_opt(model, tmp_path / "model")
    needed = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))
    monkeypatch.setattr(memory, "capacity", lambda: needed)
    load_opt(tmp_path / "model")
    monkeypatch.setattr(memory, "capacity", lambda: needed // 2)
    for make in (
        lambda: load_opt(tmp_path / "model"),
        lambda: create_model(lambda: OPT(config, rngs=nnx.Rngs(0))),
    ):
        with pytest.raises(
            ValueError, match=r"parameters need about .* GiB of a device; .* cut over [23] such devices"
        ):
            make()


def test_out_of_memory_says_how_much_was_needed(opt, monkeypatch):
    def exhausted(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")

    monkeypatch.setattr(decoding, "prefill", exhausted)
    with pytest.raises(RuntimeError, match="out of memory: 3 rows of 48 slots need about .* GiB"):
        serve(opt, [Request(prompt=[3], max_new_tokens=1)], **OPTIONS)
