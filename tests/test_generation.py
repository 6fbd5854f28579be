import dataclasses
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import io_callback

from sparsellm import decoding, generation
from sparsellm.decoding import sample
from sparsellm.generation import generate

VOCAB = 11


@dataclasses.dataclass(frozen=True)
class Config:
    vocab_size: int = VOCAB
    max_length: int = 100


class Markov(nnx.Module):
    """A model whose next token depends on the last one only, through a table of logits."""

    def __init__(self, table):
        self.config = Config()
        self.table = nnx.Param(jnp.asarray(table, jnp.float32))

    def init_cache(self, batch, length):
        return jnp.zeros((batch, length), jnp.int32), jnp.int32(0)

    def hidden_states(self, tokens, *, mask=None, packing=None, cache: Any = None):
        slots, filled = cache
        rows = tokens if packing is None else packing.unpack(tokens)
        slots = jax.lax.dynamic_update_slice_in_dim(slots, rows, filled, axis=1)
        return tokens[..., None], (slots, filled + rows.shape[1])

    def logits(self, hidden):
        return self.table[...][hidden[..., 0]]


def counter() -> Markov:
    """After token i comes i + 1, after the last one 0."""
    return Markov(10.0 * np.roll(np.eye(VOCAB), 1, axis=1))


COUNTER = counter()
RANDOM = Markov(np.random.default_rng(0).normal(size=(VOCAB, VOCAB)))


def numbers(start: int, count: int) -> list[int]:
    return [(start + i) % VOCAB for i in range(count)]


def test_counts_on_from_every_prompt():
    prompts = [[3], [0, 1, 2, 9], [7] * 6]
    assert generate(COUNTER, prompts, max_new_tokens=9, eos_id=-1) == [numbers(n, 9) for n in (4, 10, 8)]


@pytest.mark.parametrize("max_new_tokens", [1, 2, 33, 34, 70])
def test_any_number_of_tokens(max_new_tokens):
    """Also where the chunks of the loop do not divide it."""
    assert generate(COUNTER, [[3], [5]], max_new_tokens=max_new_tokens, eos_id=-1) == [
        numbers(4, max_new_tokens),
        numbers(6, max_new_tokens),
    ]


def test_end_of_text_ends_each_row_and_is_left_out():
    rows = generate(COUNTER, [[3], [7], [8], [9]], max_new_tokens=4, eos_id=9)
    assert rows == [[4, 5, 6, 7], [8], [], [10, 0, 1, 2]]


def test_stops_early_when_all_rows_have_ended(monkeypatch):
    calls = []
    decode = decoding.decode
    monkeypatch.setattr(decoding, "decode", lambda *args, **kwargs: calls.append(1) or decode(*args, **kwargs))
    assert generate(COUNTER, [[3], [5]], max_new_tokens=90, eos_id=9) == [[4, 5, 6, 7, 8], [6, 7, 8]]
    assert len(calls) == 1  # of three chunks


def test_streams_every_token_once_and_in_order():
    got = []
    rows = generate(
        COUNTER, [[3], [7], [1]], max_new_tokens=6, eos_id=9, stream=lambda row, token: got.append((row, token))
    )
    assert rows == [[4, 5, 6, 7, 8], [8], [2, 3, 4, 5, 6, 7]]
    assert got == [(0, 4), (1, 8), (2, 2), (0, 5), (2, 3), (0, 6), (2, 4), (0, 7), (2, 5), (0, 8), (2, 6), (2, 7)]


@pytest.mark.parametrize("max_new_tokens", [1, 2, 33, 70])
def test_streams_exactly_what_it_returns(max_new_tokens):
    """Also where the last chunk has surplus steps."""
    streamed = [[], []]
    rows = generate(
        RANDOM,
        [[3], [5]],
        max_new_tokens=max_new_tokens,
        temperature=1.0,
        key=jax.random.key(2),
        eos_id=-1,
        stream=lambda row, token: streamed[row].append(token),
    )
    assert streamed == rows == [row[:max_new_tokens] for row in rows]
    assert rows == generate(
        RANDOM, [[3], [5]], max_new_tokens=max_new_tokens, temperature=1.0, key=jax.random.key(2), eos_id=-1
    )


def test_streams_each_token_before_the_next_is_computed():
    log = []

    class Logged(Markov):
        def hidden_states(self, tokens, *, mask=None, packing=None, cache: Any = None):
            tokens = io_callback(lambda x: log.append("step") or x, tokens, tokens)
            return super().hidden_states(tokens, mask=mask, packing=packing, cache=cache)

    model = Logged(COUNTER.table[...])
    generate(model, [[3]], max_new_tokens=20, eos_id=-1, stream=lambda row, token: log.append(token))
    assert log == [entry for token in numbers(4, 20) for entry in ("step", token)]


def test_streaming_runs_the_same_chunks(monkeypatch):
    """Of up to 32 steps; the loop calls the host where there is somebody to call, and otherwise not at all."""
    decode, steps, programs = decoding.decode, [], []

    def spy(*args, **options):
        steps.append(options["steps"])
        programs.append(decode.lower(*args, **options).as_text())
        return decode(*args, **options)

    monkeypatch.setattr(decoding, "decode", spy)
    generate(COUNTER, [[3]], max_new_tokens=65, eos_id=-1)
    generate(COUNTER, [[3]], max_new_tokens=65, eos_id=-1, stream=lambda row, token: None)
    assert steps == [32] * 4
    assert ["callback" in program for program in programs] == [False] * 2 + [True] * 2


def test_another_callback_compiles_nothing():
    first, second, compiled = [], [], []

    def count(event: str, duration_secs: float, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration_secs)

    def run(got):  # in chunks of 22, which no other test has compiled
        generate(COUNTER, [[3]], max_new_tokens=45, eos_id=-1, stream=lambda row, token: got.append(token))

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        run(first)
        assert compiled
        compiled.clear()
        run(second)
        assert not compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert first == second == numbers(4, 45)


@pytest.mark.parametrize("error", [ConnectionResetError("reader left"), KeyboardInterrupt()])
@pytest.mark.parametrize("taken", [0, 1, 5, 33])
def test_an_error_in_the_callback_comes_through(error, taken):
    """As it is, at once for the reader; and the next text is not disturbed."""
    got = []

    def stream(row, token):
        if len(got) == taken:
            got.append("raised")
            raise error
        got.append(token)

    with pytest.raises(type(error)) as raised:
        generate(COUNTER, [[3], [3]], max_new_tokens=70, eos_id=-1, stream=stream)
    assert raised.value is error
    assert got == [token for token in numbers(4, 20) for _ in range(2)][:taken] + ["raised"]
    got = []
    generate(COUNTER, [[3]], max_new_tokens=70, eos_id=-1, stream=lambda row, token: got.append(token))
    assert got == numbers(4, 70)
    assert not decoding._READERS


def test_an_interrupt_inside_jax_stays_an_interrupt(monkeypatch):
    """Control-C may come before the callback's own first line: XLA then reports an error of its own."""

    class Interrupted(dict):
        def get(self, *_):
            raise KeyboardInterrupt

    monkeypatch.setattr(decoding, "_READERS", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        generate(COUNTER, [[3]], max_new_tokens=6, stream=lambda row, token: None)


def test_streams_at_the_same_time_stay_apart():
    """Two threads, whose chunks take turns on the device."""
    both = threading.Barrier(2, timeout=30)

    def run(start):
        got = []

        def stream(row, token):
            got.append(token)
            if len(got) == 1:
                both.wait()

        return generate(COUNTER, [[start]], max_new_tokens=90, eos_id=-1, stream=stream)[0], got

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run, [3, 8]))
    assert results == [(numbers(4, 90),) * 2, (numbers(9, 90),) * 2]


SHARDED = """
import jax
from flax import nnx
from models import OPT, OPTConfig
from sparsellm.generation import generate
from sparsellm.sharding import create_model

config = OPTConfig(vocab_size=92, layers=1, d_model=24, heads=4, d_ff=52, max_length=64, init_std=0.3)
mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
prompts, options = [[3], [5, 6, 7]], dict(max_new_tokens=40, eos_id=-1)
make = lambda: OPT(config, rngs=nnx.Rngs(0))
expected = generate(create_model(make), prompts, **options)
for _ in range(2):
    got = []
    model = create_model(make, mesh)
    assert generate(model, prompts, stream=lambda row, token: got.append((row, token)), **options) == expected
    assert got == [(row, tokens[i]) for i in range(40) for row, tokens in enumerate(expected)], got
print("streamed")
"""


def test_streams_from_four_devices():
    """In order and once each, from a model cut over four CPU devices."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED],
        env=os.environ | flags | {"JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == "streamed", done.stderr


@pytest.mark.gpu
def test_streams_from_a_gpu():
    test_streams_exactly_what_it_returns(70)
    test_streams_each_token_before_the_next_is_computed()
    test_another_callback_compiles_nothing()
    test_an_error_in_the_callback_comes_through(ConnectionResetError("reader left"), 5)


def test_new_prompts_compile_nothing():
    def compiled():
        return tuple(getattr(f, "_cache_size")() for f in (decoding.prefill, decoding.decode))  # noqa: B009

    key = jax.random.key(0)
    generate(RANDOM, [[3], [5, 6]], max_new_tokens=40, temperature=1.0, top_k=3, top_p=0.9, key=key)
    before = compiled()
    prompts = [list(range(10)) * 3, [1]]
    generate(RANDOM, prompts, max_new_tokens=40, temperature=0.5, top_k=7, top_p=0.2, key=jax.random.key(1), eos_id=4)
    assert compiled() == before
    generate(RANDOM, [[3] * 33, [5, 6]], max_new_tokens=40, temperature=1.0, top_k=3, top_p=0.9, key=key)
    assert compiled() == tuple(n + 1 for n in before)  # the next bucket


def test_buckets_grow_by_a_quarter_at_most():
    buckets = [generation._bucket(n) for n in range(1, 3000)]
    assert all(n <= b <= max(32, 1.25 * n) for n, b in enumerate(buckets, start=1))
    assert buckets == sorted(buckets) and len(set(buckets)) < 32


def test_a_key_gives_the_same_text_again():
    def text(seed):
        return generate(RANDOM, [[3], [5]], max_new_tokens=20, temperature=1.0, key=jax.random.key(seed), eos_id=-1)

    assert text(0) == text(0) != text(1)
    assert len(set(text(0)[0])) > 3


def test_sampling_follows_the_table():
    """Transitions that `generate` draws occur as often as the model says."""
    rows = generate(
        RANDOM, [[i % VOCAB] for i in range(200)], max_new_tokens=65, temperature=1.0, key=jax.random.key(0), eos_id=-1
    )
    rows = np.array(rows)
    counts = np.zeros((VOCAB, VOCAB))
    np.add.at(counts, (rows[:, :-1], rows[:, 1:]), 1)
    expected = probabilities(RANDOM.table[...])
    seen = counts.sum(axis=1, keepdims=True)
    assert seen.min() > 200
    assert np.all(np.abs(counts / seen - expected) < 5 * np.sqrt(expected / seen) + 1e-3)


def probabilities(logits, temperature=1.0, top_k=None, top_p=None) -> np.ndarray:
    """What each token's probability should be, row by row in float64."""
    logits = np.atleast_2d(np.asarray(logits, np.float64)) / temperature
    out = np.exp(logits - logits.max(axis=-1, keepdims=True))
    for row in out:
        row /= row.sum()
        if top_k is not None:
            row[row < np.sort(row)[::-1][top_k - 1]] = 0
            row /= row.sum()
        if top_p is not None:
            order = np.argsort(-row, kind="stable")
            last = order[np.searchsorted(np.cumsum(row[order]), top_p - 1e-9)]  # the token that reaches top_p
            row[row < row[last]] = 0
            row /= row.sum()
    return out


LOGITS = np.array([0.1, 2.0, -1.0, 0.7, 2.5, -3.0, 1.1], np.float32)
TIED = np.array([0.0, 1.0, 1.0, 1.0, -2.0], np.float32)
HALF = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))


@pytest.mark.parametrize(
    ("logits", "temperature", "top_k", "top_p"),
    [
        (LOGITS, 1.0, None, None),
        (LOGITS, 0.3, None, None),
        (LOGITS, 5.0, None, None),
        (LOGITS, 1.0, 3, None),
        (LOGITS, 1.0, 1, None),
        (LOGITS, 1.0, 7, None),
        (LOGITS, 1.0, None, 0.6),
        (LOGITS, 1.0, None, 1e-6),
        (LOGITS, 1.0, None, 0.9999),
        (LOGITS, 2.0, 5, 0.7),
        (TIED, 1.0, 2, None),  # three tokens share second place: all stay
        (TIED, 1.0, None, 0.5),
        (HALF, 1.0, None, 0.5),  # exactly reached by the first token
        (HALF, 1.0, None, 0.51),
        (np.array([0.0, -np.inf, 1.0], np.float32), 1.0, 3, 0.99),
    ],
)
def test_sample_draws_from_the_right_distribution(logits, temperature, top_k, top_p):
    draws = 20_000
    tokens = jax.jit(sample)(
        jnp.broadcast_to(logits, (draws, len(logits))),
        jax.random.key(0),
        np.float32(temperature),
        None if top_k is None else np.int32(top_k),
        None if top_p is None else np.float32(top_p),
    )
    expected = probabilities(logits, temperature, top_k, top_p)[0]
    frequency = np.bincount(tokens, minlength=len(logits)) / draws
    assert not frequency[expected == 0].any()
    assert np.all(np.abs(frequency - expected) < 5 * np.sqrt(expected * (1 - expected) / draws) + 1e-12)


def test_sample_rows_are_filtered_one_by_one():
    rows = jnp.stack([jnp.asarray(LOGITS), -jnp.asarray(LOGITS)])
    tokens = [sample(rows, jax.random.key(i), jnp.float32(3.0), jnp.int32(2)) for i in range(40)]
    assert set(np.stack(tokens)[:, 0].tolist()) == {4, 1} and set(np.stack(tokens)[:, 1].tolist()) == {5, 2}


def test_greedy_takes_the_first_of_equals():
    assert sample(jnp.stack([jnp.asarray(LOGITS[:5]), jnp.asarray(TIED)]), jax.random.key(0), None).tolist() == [4, 1]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a text", "a prompt must be a sequence of token ids; it is 'a text'"),
        (3, "a prompt must be a sequence of token ids; it is 3"),
        ([3.0], "token ids must be integers; it holds float64"),
    ],
)
def test_what_is_no_prompt(prompt, message):
    with pytest.raises(ValueError, match=message):
        generation.check_prompt(COUNTER.config, "it", prompt, 1)


def test_rows_of_an_array_are_prompts():
    assert generate(COUNTER, np.array([[3, 4], [5, 6]]), max_new_tokens=2) == generate(
        COUNTER, [[3, 4], [5, 6]], max_new_tokens=2
    )


def test_more_than_the_vocabulary_is_the_vocabulary():
    options = {"max_new_tokens": 12, "temperature": 1.0, "key": jax.random.key(0), "eos_id": -1}
    every = generate(RANDOM, [[3], [4]], **options)
    assert generate(RANDOM, [[3], [4]], top_k=10**6, **options) == every
    assert generate(RANDOM, [[3], [4]], top_p=1.0, **options) == every


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompts must hold at least one prompt; got none"),
        ([[3], []], {}, "at least one token .*; prompt 1 is empty"),
        ([[3, 11]], {}, r"token ids must be in \[0, 11\); prompt 0 holds 11"),
        ([[-1]], {}, r"token ids must be in \[0, 11\); prompt 0 holds -1"),
        ([[3] * 98], {}, "must fit into max_length=100 positions; prompt 0 has 98 tokens and max_new_tokens=3"),
        ([[3]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1; got 0"),
        ([[3]], {"temperature": -1.0}, "temperature must be finite and at least 0; got -1.0"),
        ([[3]], {"temperature": float("nan")}, "temperature must be finite"),
        ([[3]], {"temperature": 1.0}, "temperature=1.0 draws at random and needs a key"),
        ([[3]], {"top_k": 3}, "top_k and top_p need temperature > 0; got top_k=3"),
        ([[3]], {"temperature": 1.0, "key": 0, "top_k": 0}, "top_k must be at least 1; got 0"),
        ([[3]], {"temperature": 1.0, "key": 0, "top_p": 0.0}, r"top_p must be in \(0, 1\]; got 0.0"),
        ([[3]], {"temperature": 1.0, "key": 0, "top_p": 1.1}, r"top_p must be in \(0, 1\]; got 1.1"),
    ],
)
def test_wrong_arguments(prompts, options, message):
    options = {"max_new_tokens": 3} | options
    if "key" in options:
        options["key"] = jax.random.key(options["key"])
    with pytest.raises(ValueError, match=message):
        generate(COUNTER, prompts, **options)
