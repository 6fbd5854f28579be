"""Models here as EleutherAI's lm-evaluation-harness wants them (`pip install sparsellm[eval]`).

    import lm_eval
    from sparsellm.lm_eval_adapter import HarnessModel

    lm_eval.simple_evaluate(HarnessModel(model, tokenizer), tasks=["wikitext", "hellaswag"])

Every text starts with end-of-text, as OPT's did in training. Contexts that are too long lose their start.
"""

from collections.abc import Sequence
from itertools import batched
from typing import Any

import jax
from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports] - an extra

from sparsellm.evaluation import continuation_scores, split_tokens
from sparsellm.generation import LanguageModel, generate
from sparsellm.text import Tokenizer

MAX_NEW_TOKENS = 256  # the harness's own default


class HarnessModel(LM):
    """A language model with its tokenizer. A request's `args` are what each method's first line says."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, *, batch: int = 32):
        """Takes `batch` requests at once."""
        super().__init__()
        self.model, self.text_tokenizer, self.batch = model, tokenizer, batch
        self.max_length = model.config.max_length

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of (context, continuation): the continuation's log-probability, and whether it is the greedy one."""
        pairs = [split_tokens(self.text_tokenizer, *request.args) for request in requests]
        scores = self._scores(pairs)
        for request, score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, score)
        return scores

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of (text,): its log-probability after end-of-text, each token predicted once."""
        windows = [self._rolling(self.text_tokenizer.encode(request.args[0])) for request in requests]
        scores = iter(self._scores([pair for pairs in windows for pair in pairs]))
        totals = [sum((next(scores)[0] for _ in pairs), 0.0) for pairs in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Of (context, options): how the model goes on, up to the first of the strings in options["until"]."""
        texts = [""] * len(requests)
        groups: dict[tuple[int, float], list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(_limits(request.args[1]), []).append(i)
        for (new_tokens, temperature), members in groups.items():
            for some in batched(members, self.batch):
                prompts = [self._prompt(requests[i].args[0], new_tokens) for i in some]
                key = jax.random.key(some[0])
                tokens = generate(self.model, prompts, max_new_tokens=new_tokens, temperature=temperature, key=key)
                for i, row in zip(some, tokens, strict=True):
                    texts[i] = _cut(self.text_tokenizer.decode(row), requests[i].args[1].get("until"))
                    self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
        return texts

    def _scores(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        model: Any = self.model
        return continuation_scores(model, pairs, max_length=self.max_length, batch=self.batch)

    def _rolling(self, tokens: list[int]) -> list[tuple[list[int], list[int]]]:
        """Cuts tokens, end-of-text first, into what is predicted at once and as much before it as there is room for."""
        pairs = []
        for start in range(1, len(tokens), self.max_length):
            end = min(start + self.max_length, len(tokens))
            pairs.append((tokens[max(end - self.max_length - 1, 0) : start], tokens[start:end]))
        return pairs

    def _prompt(self, context: str, new_tokens: int) -> list[int]:
        room = self.max_length - new_tokens
        if room < 1:
            raise ValueError(f"max_gen_toks must be less than max_length={self.max_length}; got {new_tokens}")
        tokens = self.text_tokenizer.encode(context)
        return tokens if len(tokens) <= room else tokens[-room:]


def _limits(options: dict[str, Any]) -> tuple[int, float]:
    """Tokens to generate at most, and the temperature, read as the harness reads them."""
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    most = next((int(options[name]) for name in names if options.get(name) is not None), MAX_NEW_TOKENS)
    return most, 0.0 if options.get("do_sample") is False else float(options.get("temperature", 0.0))


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    """The text before the first of the stop strings."""
    for stop in [until] if isinstance(until, str) else until or ():
        text = text.partition(stop)[0] if stop else text
    return text
