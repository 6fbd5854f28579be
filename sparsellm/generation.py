"""Text from a language model: `generate` continues a batch of prompts.

Prompts are packed into bucketed sizes, so that new prompts compile nothing: one compilation per batch size, buckets and
`max_new_tokens`. The loop runs in a few chunks of steps, and ends with the one in which all rows have ended.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from sparsellm import decoding, memory
from sparsellm.decoding import LanguageModel
from sparsellm.packing import bucket, pack

CHUNK = 32  # steps between looks at whether all sequences have ended
SMALLEST_BUCKET = 32


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]] | Int[np.ndarray, "prompts length"],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int = 2,
    key: Array | None = None,
    stream: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Continues every prompt, greedily or by sampling. Deterministic for the same batch and key.

    Args:
        model: the language model.
        prompts: token ids; lengths may differ, or an array of equal ones.
        max_new_tokens: the most tokens to add to a prompt.
        temperature: 0 takes the likeliest token; above, logits are divided by it and a token is drawn.
        top_k: draw among the k likeliest tokens only (those as likely as the k-th stay in).
        top_p: draw among the likeliest tokens that together reach this probability, after `top_k`.
        eos_id: the end-of-text token, which ends a sequence; -1 for none.
        key: PRNG key; required where temperature > 0.
        stream: called as `stream(row, token)` for each new token as soon as it is known, from inside the compiled loop:
            maybe on another thread, and it must not use JAX. What it raises ends the stream at once, and comes out of
            here when the loop's chunk of up to 32 steps has ended.

    Returns:
        The new tokens of each prompt, without end-of-text: fewer than `max_new_tokens` where that came first.

    Raises:
        ValueError: an argument is out of range, or a prompt is empty, holds ids outside the vocabulary, or does not fit
            into the model's positions together with `max_new_tokens`; or the cache does not fit into the device.
        RuntimeError: the device is out of memory.
    """
    _check(model.config, prompts, max_new_tokens, temperature, top_k, top_p, key)
    # None means "off" and is static; numbers are traced, so that another temperature compiles nothing.
    sampling = (
        np.float32(temperature) if temperature >= np.finfo(np.float32).tiny else None,
        None if top_k is None else np.int32(min(top_k, model.config.vocab_size)),
        None if top_p is None or top_p == 1 else np.float32(top_p),
    )
    prompts = list(prompts)
    tokens, packing = pack(prompts, size=_bucket(sum(map(len, prompts))), length=_bucket(max(map(len, prompts))))
    chunk, chunks = _chunks(max_new_tokens)
    slots = packing.length + chunk * chunks
    size = memory.estimate(model, rows=len(prompts), slots=slots, tokens=packing.batch * packing.length)
    size.check()
    program = nnx.split(model)
    drawing = jax.random.key(0) if key is None else key, sampling, np.int32(eos_id)
    limits = np.full(len(prompts), max_new_tokens, np.int32)
    texts: list[list[int]] = [[] for _ in prompts]
    collect = partial(_collect, texts=texts, eos_id=eos_id, most=max_new_tokens, stream=stream)
    with size.explaining(), decoding.on_mesh(program[1]):
        rows = decoding.prefill(*program, None, tokens, packing, limits, *drawing, slots=slots)
        collect(np.asarray(rows.token))
        for _ in range(chunks):
            if not np.any(rows.left):
                break
            rows = decoding.run_chunk(
                *program, rows, *drawing, steps=chunk, collect=collect, streaming=stream is not None
            )
    return [text[:-1] if text[-1] == eos_id else text for text in texts]


def _collect(tokens: np.ndarray, texts: list[list[int]], eos_id: int, most: int, stream) -> None:
    """Appends one step's tokens to the texts that have not ended, and streams them. End-of-text stays as a mark."""
    for i, token in enumerate(tokens.tolist()):
        if len(texts[i]) < most and (not texts[i] or texts[i][-1] != eos_id):
            texts[i].append(token)
            if stream is not None and token != eos_id:
                stream(i, token)


def _chunks(max_new_tokens: int) -> tuple[int, int]:
    """Steps in a chunk, and chunks: what follows the first token, in equal parts (a few steps may be surplus)."""
    steps = max_new_tokens - 1
    chunks = -(-steps // CHUNK)
    return (-(-steps // chunks), chunks) if chunks else (0, 0)


def _bucket(length: int) -> int:
    """The next of four sizes an octave (32, 40, 48, 56, 64, 80, ...): at most a quarter is padding."""
    return bucket(max(length, SMALLEST_BUCKET), 8)


def check_prompt(config: Any, name: str, prompt: Any, max_new_tokens: int) -> None:
    """Raises ValueError unless the model can continue this prompt by so many tokens; `name` is what to call it."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
    ids = np.asarray(prompt)
    if ids.ndim != 1:
        raise ValueError(f"a prompt must be a sequence of token ids; {name} is {prompt!r}")
    if not ids.size:
        raise ValueError(f"a prompt must hold at least one token (</s> starts a text); {name} is empty")
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"token ids must be integers; {name} holds {ids.dtype}")
    outside = ids[(ids < 0) | (ids >= config.vocab_size)]
    if outside.size:
        raise ValueError(f"token ids must be in [0, {config.vocab_size}); {name} holds {outside[0]}")
    if len(prompt) + max_new_tokens > config.max_length:
        raise ValueError(
            f"a prompt and max_new_tokens must fit into max_length={config.max_length} positions; {name} has "
            f"{len(prompt)} tokens and max_new_tokens={max_new_tokens}: shorten one of them"
        )


def _check(config, prompts, max_new_tokens: int, temperature: float, top_k, top_p, key) -> None:
    if not len(prompts):
        raise ValueError("prompts must hold at least one prompt; got none")
    for i, prompt in enumerate(prompts):
        check_prompt(config, f"prompt {i}", prompt, max_new_tokens)
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
