"""Prompts of real lengths: instruction records in Alpaca's format from a file, or made up where there is none.

A record is a JSON object with the texts `instruction`, `input` (may be empty) and `output`; a file is a list of them.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sparsellm.text import END_OF_TEXT, Tokenizer, load_tokenizer

FIRST_TOKEN = 4  # after OPT's special ones
MEDIAN, SPREAD, LONGEST = 96, 0.8, 388  # of made-up records: log-normal, as those of Alpaca nearly are


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """Tokens of what is asked, and of what is answered."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        """Both."""
        return self.prompt + self.answer


def read_records(path: str | Path, tokenizer: Tokenizer) -> list[Record]:
    """Every record of a file, tokenised; its prompt is the instruction, and the input on a line of its own.

    Raises:
        ValueError: the file is no list of records, or has none.
    """
    path = Path(path)
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"records must be JSON; {path} is not: {error}") from None
    if not isinstance(records, list) or not records:
        raise ValueError(f"records must be a list of at least one; {path} holds {type(records).__name__}")
    read = []
    for i, record in enumerate(records):
        texts = (
            [record.get(name, "") for name in ("instruction", "input", "output")] if isinstance(record, dict) else []
        )
        if len(texts) != 3 or not all(isinstance(text, str) for text in texts) or not texts[0]:
            raise ValueError(
                f"a record must have the texts instruction, input and output; record {i} of {path} has not"
            )
        instruction, given, output = texts
        prompt = tokenizer.encode(f"{instruction}\n{given}\n" if given else f"{instruction}\n")
        read.append(Record(prompt=tuple(prompt), answer=tuple(tokenizer.encode(output)[1:])))  # without the first </s>
    return read


def made_up_records(count: int, *, vocab_size: int, longest: int = LONGEST, seed: int = 0) -> list[Record]:
    """Random tokens, as many as real records have: an eighth of them ask, the rest answers."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(np.log(min(MEDIAN, longest / 3)), SPREAD, count), 8, longest).astype(int)
    made = []
    for length in lengths:
        tokens = [END_OF_TEXT, *rng.integers(FIRST_TOKEN, vocab_size, length - 1).tolist()]
        made.append(Record(prompt=tuple(tokens[: max(length // 8, 2)]), answer=tuple(tokens[max(length // 8, 2) :])))
    return made


def choose_records(
    records: Path | None, tokenizer: Path | None, count: int, *, vocab_size: int, longest: int, seed: int
) -> list[Record]:
    """`count` records that fit: of a file in random order, or made up.

    Args:
        records: the file; None makes them up.
        tokenizer: the folder of the tokenizer that reads it.
        count: how many.
        vocab_size: of the model: tokens outside are refused.
        longest: most tokens of a record; longer ones are passed over.
        seed: of the order.

    Raises:
        ValueError: there is no tokenizer for the file, too few records fit, or it is another model's tokenizer.
    """
    if records is None:
        return made_up_records(count, vocab_size=vocab_size, longest=min(longest, LONGEST), seed=seed)
    if tokenizer is None:
        raise ValueError("tokenizer must be the folder of one that reads the records; got None")
    loaded = load_tokenizer(tokenizer)
    if loaded.vocab_size > vocab_size:
        raise ValueError(f"tokenizer must be of at most the model's {vocab_size} tokens; got {loaded.vocab_size}")
    every = read_records(records, loaded)
    fitting: Sequence[Record] = [record for record in every if record.answer and len(record.tokens) <= longest]
    if len(fitting) < count:
        raise ValueError(f"{count} records of at most {longest} tokens are needed; {records} has {len(fitting)}")
    return [fitting[i] for i in np.random.default_rng(seed).permutation(len(fitting))[:count]]
