"""Text from a language model: prefill, then one compiled loop over tokens.

Prompts are padded on the left to a bucketed length, so that new prompts compile nothing: one compilation per batch
size, bucket and `max_new_tokens`. The loop is a scan over a static number of steps, run in a few chunks: a `while_loop`
that asks the device whether all sequences have ended would wait for the host at every step. Streaming runs the same
loop: every step hands its tokens to a host callback, which finds their reader by number.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.experimental import io_callback
from jaxtyping import Array, Bool, Float, Int

from sparsellm.packing import bucket

CHUNK = 32  # steps between looks at whether all sequences have ended
SMALLEST_BUCKET = 32

_NUMBERS = itertools.count()
_READERS: dict[int, Callable[[np.ndarray], None]] = {}  # who takes the tokens of the loops now running


@runtime_checkable
class LanguageModel(Protocol):
    """What `generate` needs of a model: an `nnx.Module` with these, and `config.vocab_size` and `config.max_length`.

    `hidden_states` takes padding on the left, counts positions from the mask, and writes into the cache's next slots.
    """

    config: Any

    def init_cache(self, batch: int, length: int) -> Any: ...
    def hidden_states(self, tokens: Array, *, mask: Array | None = None, cache: Any = None) -> tuple[Array, Any]: ...
    def logits(self, hidden: Array) -> Array: ...


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int = 2,
    pad_id: int = 1,
    key: Array | None = None,
    stream: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Continues every prompt, greedily or by sampling. Deterministic for the same batch and key.

    Args:
        model: the language model.
        prompts: token ids; lengths may differ.
        max_new_tokens: the most tokens to add to a prompt.
        temperature: 0 takes the likeliest token; above, logits are divided by it and a token is drawn.
        top_k: draw among the k likeliest tokens only (those as likely as the k-th stay in).
        top_p: draw among the likeliest tokens that together reach this probability, after `top_k`.
        eos_id: the end-of-text token, which ends a sequence; -1 for none.
        pad_id: the token that prompts are padded with.
        key: PRNG key; required where temperature > 0.
        stream: called as `stream(row, token)` for each new token as soon as it is known, from inside the compiled loop:
            maybe on another thread, and it must not use JAX. What it raises ends the stream at once, and comes out of
            here when the loop's chunk of up to 32 steps has ended.

    Returns:
        The new tokens of each prompt, without end-of-text: fewer than `max_new_tokens` where that came first.

    Raises:
        ValueError: an argument is out of range, or a prompt is empty, holds ids outside the vocabulary, or does not fit
            into the model's positions together with `max_new_tokens`.
    """
    _check(model.config, prompts, max_new_tokens, temperature, top_k, top_p, key)
    # None means "off" and is static; numbers are traced, so that another temperature compiles nothing.
    sampling = (
        np.float32(temperature) if temperature >= np.finfo(np.float32).tiny else None,
        None if top_k is None else np.int32(min(top_k, model.config.vocab_size)),
        None if top_p is None or top_p == 1 else np.float32(top_p),
    )
    tokens, mask = _pad_left(prompts, pad_id)
    chunk, chunks = _chunks(max_new_tokens)
    graphdef, state = nnx.split(model)
    slots = tokens.shape[1] + chunk * chunks
    key = jax.random.key(0) if key is None else key
    carry = _prefill(graphdef, state, tokens, mask, key, sampling, np.int32(eos_id), slots=slots)
    rows: list[list[int]] = [[] for _ in prompts]
    collect = partial(_collect, rows=rows, eos_id=eos_id, most=max_new_tokens, stream=stream)
    collect(np.asarray(carry[0]))
    for _ in range(chunks):
        if np.all(carry[1]):
            break
        with nullcontext() if stream is None else _reading(collect) as reader:
            carry, new_tokens = _decode(graphdef, state, carry, key, sampling, np.int32(eos_id), reader, steps=chunk)
            new_tokens = np.asarray(new_tokens)  # waits for the chunk, and so for its callbacks
        if stream is None:
            for step in new_tokens:
                collect(step)
    return [row[:-1] if row[-1] == eos_id else row for row in rows]


def sample(
    logits: Float[Array, "batch vocab"],
    key: Array,
    temperature: Float[Array, ""] | None,
    top_k: Int[Array, ""] | None = None,
    top_p: Float[Array, ""] | None = None,
) -> Int[Array, " batch"]:
    """Draws a token for each row: temperature, then top-k, then top-p; the likeliest where `temperature` is None.

    Source: top-p is nucleus sampling (Holtzman et al., 2020), section 3.1; top-k is Fan et al. (2018), section 5.4.
    """
    if temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature  # so that none overflows
    if top_k is not None or top_p is not None:
        logits = jnp.where(logits < _threshold(logits, top_k, top_p), -jnp.inf, logits)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def _threshold(logits: Float[Array, "batch vocab"], top_k, top_p) -> Float[Array, "batch 1"]:
    """The smallest logit that may be drawn. Equal logits stand or fall together."""
    descending = -jnp.sort(-logits, axis=-1)
    if top_k is not None:
        kth = lax.dynamic_slice_in_dim(descending, top_k - 1, 1, axis=1)
        descending = jnp.where(descending < kth, -jnp.inf, descending)
    if top_p is None:
        return kth
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (before < top_p) & (probabilities > 0)
    return jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)


@partial(jax.jit, static_argnames=("graphdef", "slots"))
def _prefill(graphdef, state, tokens, mask, key, sampling, eos_id, *, slots: int):
    """Reads the prompts and draws the first token: (token, ended, step, cache), what the loop carries."""
    model = nnx.merge(graphdef, state)
    hidden, cache = model.hidden_states(tokens, mask=mask, cache=model.init_cache(tokens.shape[0], slots))
    token = sample(model.logits(hidden[:, -1]), jax.random.fold_in(key, 0), *sampling)
    return token, token == eos_id, jnp.int32(1), cache


@partial(jax.jit, static_argnames=("graphdef", "steps"), donate_argnames=("carry",))
def _decode(graphdef, state, carry, key, sampling, eos_id, reader, *, steps: int):
    """The loop: `steps` tokens for every row, [steps, batch]; rows that have ended repeat end-of-text.

    With a `reader` (a number, traced), the tokens of each step pass through the host on their way to the next: that
    orders the callbacks on any number of devices, and leaves none running when the tokens are there.
    """
    model = nnx.merge(graphdef, state)

    def step(carry, _):
        token, ended, count, cache = carry
        hidden, cache = model.hidden_states(token[:, None], cache=cache)
        new = sample(model.logits(hidden[:, -1]), jax.random.fold_in(key, count), *sampling)
        new = jnp.where(ended, eos_id, new)
        if reader is not None:
            new = io_callback(_deliver, new, reader, new)
        return (new, ended | (new == eos_id), count + 1, cache), new

    return lax.scan(step, carry, length=steps)


def _deliver(reader: Int[Array, ""], tokens: Int[Array, " batch"]) -> Int[Array, " batch"]:
    """The one host function that compiled loops call, so that another callback compiles nothing."""
    take = _READERS.get(int(reader))  # none where `generate` was interrupted while its loop ran on
    if take is not None:
        take(np.asarray(tokens))
    return tokens


@contextmanager
def _reading(collect: Callable[[np.ndarray], None]) -> Iterator[np.int32]:
    """The number under which a loop delivers its tokens to `collect`.

    What `collect` raises must not go through XLA, which would make an error of its own of it: nothing more is
    collected, and it is raised at the end.
    """
    errors: list[BaseException] = []

    def take(tokens: np.ndarray) -> None:
        if not errors:
            try:
                collect(tokens)
            except BaseException as error:
                errors.append(error)

    number = next(_NUMBERS)
    _READERS[number] = take
    try:
        yield np.int32(number)
    except jax.errors.JaxRuntimeError as error:
        if "KeyboardInterrupt" not in str(error):
            raise
        errors.append(KeyboardInterrupt())  # it came while JAX's own part of the callback ran
    finally:
        del _READERS[number]
    if errors:
        raise errors[0]


def _collect(tokens: np.ndarray, rows: list[list[int]], eos_id: int, most: int, stream) -> None:
    """Appends one step's tokens to the rows that have not ended, and streams them. End-of-text stays as a mark."""
    for i, token in enumerate(tokens.tolist()):
        if len(rows[i]) < most and (not rows[i] or rows[i][-1] != eos_id):
            rows[i].append(token)
            if stream is not None and token != eos_id:
                stream(i, token)


def _chunks(max_new_tokens: int) -> tuple[int, int]:
    """Steps in a chunk, and chunks: what follows the first token, in equal parts (a few steps may be surplus)."""
    steps = max_new_tokens - 1
    chunks = -(-steps // CHUNK)
    return (-(-steps // chunks), chunks) if chunks else (0, 0)


def _pad_left(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Int[np.ndarray, "b n"], Bool[np.ndarray, "b n"]]:
    width = _bucket(max(map(len, prompts)))
    tokens = np.full((len(prompts), width), pad_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for i, prompt in enumerate(prompts):
        tokens[i, width - len(prompt) :] = prompt
        mask[i, width - len(prompt) :] = True
    return tokens, mask


def _bucket(length: int) -> int:
    """The next of four sizes an octave (32, 40, 48, 56, 64, 80, ...): at most a quarter is padding."""
    return bucket(max(length, SMALLEST_BUCKET), 8)


def _check(config, prompts, max_new_tokens: int, temperature: float, top_k, top_p, key) -> None:
    if not prompts:
        raise ValueError("prompts must hold at least one prompt; got none")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"a prompt must hold at least one token (</s> starts a text); prompt {i} is empty")
        outside = [token for token in prompt if not 0 <= token < config.vocab_size]
        if outside:
            raise ValueError(f"token ids must be in [0, {config.vocab_size}); prompt {i} holds {outside[0]}")
        if len(prompt) + max_new_tokens > config.max_length:
            raise ValueError(
                f"a prompt and max_new_tokens must fit into max_length={config.max_length} positions; prompt {i} has "
                f"{len(prompt)} tokens and max_new_tokens={max_new_tokens}: shorten one of them"
            )
    if not (np.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be finite and at least 0; got {temperature}")
    if temperature > 0 and key is None:
        raise ValueError(f"temperature={temperature} draws at random and needs a key: key=jax.random.key(0)")
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise ValueError(f"top_k and top_p need temperature > 0; got top_k={top_k}, top_p={top_p}, temperature=0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1; got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1]; got {top_p}")
