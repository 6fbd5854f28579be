"""Continuous batching: a stream of requests through a fixed number of rows, each refilled when its text has ended.

    answers = serve(model, [Request(prompt=..., max_new_tokens=128), ...], rows=32, cache_length=1024)
    statistics(answers)["tokens_per_s"]

Between two chunks of decode steps the rows whose text has ended take waiting prompts, first come first served: these
are prefilled together, packed, straight into their rows of the cache. Nothing is compiled for a new mix of requests:
there is one decode program, and one prefill program for each size of the packed axis (and one for the first of all,
which makes the cache). A row's text does not depend on what the others hold: but for rounding, it is what `generate`
would answer to the prompt alone. (Not so where rows share something by design: the list of neurons that are predicted
for any of them, unless `with_predictors` has them listed `per_sequence`.)

Source: Yu et al., "Orca" (OSDI'22), section 3.1, iteration-level scheduling; here an iteration is a chunk of steps.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Int

from sparsellm import decoding, memory
from sparsellm.decoding import GREEDY, LanguageModel, Rows
from sparsellm.generation import check_prompt
from sparsellm.packing import PACKED_MULTIPLE, Packing, bucket


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to continue greedily.

    Attributes:
        prompt: token ids.
        max_new_tokens: the most tokens to add.
        eos_id: the end-of-text token, which ends the text; -1 for none.
        arrival_s: when it arrives, in seconds after the start.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    eos_id: int = 2
    arrival_s: float = 0.0


@dataclasses.dataclass(kw_only=True)
class Answer:
    """What became of a request; times in seconds after the start, as the host sees them.

    Attributes:
        tokens: the new tokens, without end-of-text.
        arrival_s: when the request arrived.
        first_token_s: when its first token was known.
        finished_s: when its last one was.
    """

    tokens: list[int] = dataclasses.field(default_factory=list)
    arrival_s: float = 0.0
    first_token_s: float = 0.0
    finished_s: float = 0.0


def serve(
    model: LanguageModel,
    requests: Sequence[Request],
    *,
    rows: int,
    cache_length: int,
    steps: int = 16,
    prefill_sizes: Sequence[int] | None = None,
    stream: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """Answers every request, greedily. Tokens are deterministic; times are not.

    Args:
        model: the language model.
        requests: in any order of arrival.
        rows: texts at once.
        cache_length: slots of a row: the most tokens of a prompt and its answer.
        steps: of decoding between two looks for rows to refill.
        prefill_sizes: of the packed axis, on which waiting prompts are read together; None for 128 and its doubles up
            to the first that has room for `cache_length`. The smallest that holds the prompts is taken.
        stream: called as `stream(request, token)` for each token as soon as it is known, as by `generate`.

    Returns:
        The answer to each request.

    Raises:
        ValueError: an argument is out of range; a request is empty, holds ids outside the vocabulary, or does not fit
            into the model's positions, the cache or the largest prefill; the cache does not fit into the device.
        TypeError: the rows of the model's cache are not filled each for itself.
        RuntimeError: the device is out of memory.
    """
    sizes = tuple(sorted(_sizes(cache_length) if prefill_sizes is None else prefill_sizes))
    _check(model, requests, rows, cache_length, steps, sizes)
    tokens = max((rows * min(size, cache_length) for size in sizes), default=0)
    size = memory.estimate(model, rows=rows, slots=cache_length, tokens=tokens)
    size.check()
    server = _Server(model, requests, rows, cache_length, sizes, stream)
    with size.explaining(), decoding.on_mesh(server.program[1]):
        return server.run(steps)


def statistics(answers: Sequence[Answer]) -> dict[str, int | float]:
    """Tokens a second over all answers; and of times to the first token and to the last, percentiles, in seconds.

    Raises:
        ValueError: there is no answer.
    """
    if not answers:
        raise ValueError("answers must hold at least one; got none")
    counts = [len(answer.tokens) for answer in answers]
    seconds = max(answer.finished_s for answer in answers) - min(answer.arrival_s for answer in answers)
    first = [answer.first_token_s - answer.arrival_s for answer in answers]
    whole = [answer.finished_s - answer.arrival_s for answer in answers]
    found = {"tokens": sum(counts), "seconds": seconds, "tokens_per_s": sum(counts) / max(seconds, 1e-9)}
    for name, times in (("first_token_s", first), ("latency_s", whole)):
        found |= {f"{name}_p{share}": float(np.percentile(times, share)) for share in (50, 99)}
    return found


class _Server:
    """What the host knows of the rows."""

    def __init__(self, model, requests: Sequence[Request], rows: int, cache_length: int, sizes, stream):
        self.program = nnx.split(model)
        self.requests, self.stream = requests, stream
        self.cache_length, self.sizes = cache_length, sizes
        self.answers = [Answer(arrival_s=request.arrival_s) for request in requests]
        self.waiting = deque(sorted(range(len(requests)), key=lambda i: requests[i].arrival_s))
        self.holds: list[int | None] = [None] * rows  # the request that each row answers
        self.eos_ids = np.full(rows, -1, np.int32)
        self.key = jax.random.key(0)  # nothing is drawn
        self.start = time.perf_counter()

    def run(self, steps: int) -> list[Answer]:
        """Refills and decodes in turn, until every request is answered."""
        rows: Rows | None = None
        while self.waiting or self._busy():
            while new := self._admit():
                rows = self._prefill(rows, new)
            if rows is not None and self._busy():
                drawing, streaming = (self.key, GREEDY, self.eos_ids.copy()), self.stream is not None
                rows = decoding.run_chunk(
                    *self.program, rows, *drawing, steps=steps, collect=self._collect, streaming=streaming
                )
            elif self.waiting:
                until = self.start + self.requests[self.waiting[0]].arrival_s
                time.sleep(max(until - time.perf_counter(), 0))
        return self.answers

    def _busy(self) -> bool:
        return any(held is not None for held in self.holds)

    def _admit(self) -> dict[int, int]:
        """Gives free rows to requests that have arrived, as many as one prefill holds: row -> request."""
        free = [row for row, held in enumerate(self.holds) if held is None]
        new: dict[int, int] = {}
        total, now = 0, time.perf_counter() - self.start
        while free and self.waiting and self.requests[self.waiting[0]].arrival_s <= now:
            total += len(self.requests[self.waiting[0]].prompt)
            if total > self.sizes[-1]:
                break
            new[free.pop(0)] = self.waiting.popleft()
        return new

    def _prefill(self, rows: Rows | None, new: dict[int, int]) -> Rows:
        """Reads the prompts into their rows, and takes the first token of each."""
        lengths, limits = np.zeros((2, len(self.holds)), np.int32)
        for row, i in new.items():
            self.holds[row], self.eos_ids[row] = i, self.requests[i].eos_id
            lengths[row], limits[row] = len(self.requests[i].prompt), self.requests[i].max_new_tokens
        size = next(size for size in self.sizes if size >= lengths.sum())
        packing = Packing.of(lengths, size=size, length=min(size, self.cache_length))
        tokens = np.zeros((1, size), np.int32)
        tokens[0, : lengths.sum()] = np.concatenate([self.requests[new[row]].prompt for row in sorted(new)])
        drawing = self.key, GREEDY, self.eos_ids.copy()
        filled: Rows = decoding.prefill(*self.program, rows, tokens, packing, limits, *drawing, slots=self.cache_length)
        self._collect(np.asarray(filled.token), new)
        return filled

    def _collect(self, tokens: Int[np.ndarray, " rows"], only: dict[int, int] | None = None) -> None:
        """Takes a token of each row that answers a request (in `only`), and frees the rows whose text has ended."""
        now = time.perf_counter() - self.start
        for row, i in enumerate(self.holds):
            if i is None or (only is not None and row not in only):
                continue
            request, answer, token = self.requests[i], self.answers[i], int(tokens[row])
            answer.first_token_s = answer.first_token_s or now
            answer.finished_s = now
            if token != request.eos_id:
                answer.tokens.append(token)
            if token == request.eos_id or len(answer.tokens) == request.max_new_tokens:
                self.holds[row] = None
            if token != request.eos_id and self.stream is not None:
                self.stream(i, token)


def _sizes(cache_length: int) -> list[int]:
    """128 and its doubles, the last of which holds any prompt that the cache holds."""
    sizes = [PACKED_MULTIPLE]
    while sizes[-1] < cache_length:
        sizes.append(min(2 * sizes[-1], bucket(cache_length, PACKED_MULTIPLE)))
    return sizes


def _check(model: Any, requests: Sequence[Request], rows: int, cache_length: int, steps: int, sizes) -> None:
    for name, value in (("rows", rows), ("cache_length", cache_length), ("steps", steps)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {name}={value}")
    if not sizes or sizes[0] < 1:
        raise ValueError(f"prefill_sizes must be numbers of at least 1; got {sizes}")
    for i, request in enumerate(requests):
        name, length, more = f"request {i}", len(request.prompt), request.max_new_tokens
        check_prompt(model.config, name, request.prompt, more)
        if length + more > cache_length:
            raise ValueError(
                f"a prompt and its answer must fit into cache_length={cache_length} slots; {name} has {length} tokens "
                f"and max_new_tokens={more}"
            )
        if length > sizes[-1]:
            raise ValueError(f"a prompt must fit into the largest of prefill_sizes={sizes}; {name} has {length} tokens")
        if not (np.isfinite(request.arrival_s) and request.arrival_s >= 0):
            raise ValueError(f"arrival_s must be finite and at least 0; {name} has {request.arrival_s}")
    if not hasattr(jax.eval_shape(lambda: model.init_cache(rows, cache_length)), "filled"):
        rule = "the rows of a model's cache must be filled each for itself (KVCache)"
        raise TypeError(f"{rule}; those of {type(model).__name__} are not")
