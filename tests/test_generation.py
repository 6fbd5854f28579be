import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsellm import generation
from sparsellm.generation import generate, sample

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

    def hidden_states(self, tokens, *, mask=None, cache: Any = None):
        slots, filled = cache
        slots = jax.lax.dynamic_update_slice_in_dim(slots, tokens, filled, axis=1)
        return tokens[..., None], (slots, filled + tokens.shape[1])

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
    decode = generation._decode
    monkeypatch.setattr(generation, "_decode", lambda *args, **kwargs: calls.append(1) or decode(*args, **kwargs))
    assert generate(COUNTER, [[3], [5]], max_new_tokens=90, eos_id=9) == [[4, 5, 6, 7, 8], [6, 7, 8]]
    assert len(calls) == 1  # of three chunks


def test_streams_every_token_once_and_in_order():
    got = []
    rows = generate(
        COUNTER, [[3], [7], [1]], max_new_tokens=6, eos_id=9, stream=lambda row, token: got.append((row, token))
    )
    assert rows == [[4, 5, 6, 7, 8], [8], [2, 3, 4, 5, 6, 7]]
    assert got == [(0, 4), (1, 8), (2, 2), (0, 5), (2, 3), (0, 6), (2, 4), (0, 7), (2, 5), (0, 8), (2, 6), (2, 7)]


def test_an_error_in_the_callback_comes_through():
    def stream(row, token):
        raise ConnectionResetError("reader left")

    with pytest.raises(ConnectionResetError, match="reader left"):
        generate(COUNTER, [[3]], max_new_tokens=6, stream=stream)


def test_new_prompts_compile_nothing():
    def compiled():
        return tuple(getattr(f, "_cache_size")() for f in (generation._prefill, generation._decode))  # noqa: B009

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
