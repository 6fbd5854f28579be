"""What does a model write after a prompt?

    python -m experiments generate --source RUN --prompt "import os"

The text appears as it is generated. `RUN` is a run of quickstart, a checkpoint folder of either format with its
tokenizer's files, or a hub id such as facebook/opt-125m.
"""

import dataclasses

import jax

from experiments.language_models import model_folder
from models import load_opt
from sparsellm.generation import generate
from sparsellm.text import Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of generate.

    Attributes:
        source: a run's folder, a checkpoint's folder, or a hub id.
        prompt: the text to continue.
        max_new_tokens: the most tokens to add; None for 128, or fewer where the model's context ends before.
        temperature: 0 takes the likeliest token at every step; above 0, tokens are drawn.
        top_k: draw among the k likeliest tokens only.
        top_p: draw among the likeliest tokens that together have this probability.
        sparse_rows: run the feed-forward blocks sparse, with micro-tiles of so many tokens.
        dtype: "bfloat16", "float16" or "float32"; None for the checkpoint's own.
        seed: for drawing.
    """

    source: str
    prompt: str
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    sparse_rows: int | None = None
    dtype: str | None = None
    seed: int = 0


class Printer:
    """Prints tokens as text while they come; a character is held back until its last byte is there."""

    def __init__(self, tokenizer: Tokenizer, prompt: str = ""):
        self._tokenizer = tokenizer
        self._prompt = prompt  # printed with the first token: what is wrong with it shows before
        self._tokens: list[int] = []
        self._printed = 0

    def __call__(self, row: int, token: int) -> None:
        """Takes the next token (the `stream` of `generate`)."""
        del row
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        self._print(text.rstrip("\N{REPLACEMENT CHARACTER}"))

    def end(self) -> None:
        """Prints what has been held back."""
        self._print(self._tokenizer.decode(self._tokens))
        print(flush=True)

    def _print(self, text: str) -> None:
        print(self._prompt + text[self._printed :], end="", flush=True)
        self._prompt = ""
        self._printed = max(self._printed, len(text))


def main(config: Config) -> int:
    """Prints the prompt and, as it comes, its continuation."""
    folder = model_folder(config.source)
    tokenizer = load_tokenizer(folder)
    model = load_opt(folder, dtype=config.dtype, sparse_rows=config.sparse_rows)
    prompt = tokenizer.encode(config.prompt)
    room = max(model.config.max_length - len(prompt), 1)
    printer = Printer(tokenizer, config.prompt)
    generate(
        model,
        [prompt],
        max_new_tokens=min(128, room) if config.max_new_tokens is None else config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        key=jax.random.key(config.seed),
        stream=printer,
    )
    printer.end()
    return 0
