"""How good a model is: perplexity by the published recipe, next-token accuracy, and a zero-shot probe by prompts.

All of it is read off one function, compiled once for a shape: the log-probability of each next token. It asks nothing
of a model but logits for tokens [batch, length], be it dense, pruned, sparse or with predictors.
"""

import csv
import functools
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from sparsellm.packing import bucket
from sparsellm.text import PAD, Tokenizer, check_tokens, read_text

SST2_PROMPT = "{sentence} It was"
SST2_LABELS = (" terrible", " great")  # of 0 and 1: Gao et al., "Making Pre-trained Language Models Better" (2021)


class Quality(NamedTuple):
    """Of a model on a text.

    Attributes:
        loss: mean cross-entropy in nats a token.
        perplexity: its exponential.
        accuracy: share of tokens that were the likeliest.
        tokens: how many were predicted.
    """

    loss: float
    perplexity: float
    accuracy: float
    tokens: int


def perplexity(model: nnx.Module, windows: Int32[np.ndarray, "windows length_plus_1"], *, batch: int = 8) -> Quality:
    """Predicts every token of every window but its first from those before it in the window.

    What a model answers with NaN has a loss of NaN.

    Args:
        model: maps tokens to logits.
        windows: of `recipe_windows`, or of `text.token_windows` as in training.
        batch: windows at once; logits take batch * length * vocabulary * 4 bytes.

    Raises:
        ValueError: there is no window, a token that the model does not know, or `batch` is not positive.
    """
    if not windows.size:
        raise ValueError(f"windows must hold one at least; got shape {windows.shape}")
    check_tokens(windows, model)
    scores, likeliest = token_scores(model, windows, batch=batch)
    loss = -float(scores.mean(dtype=np.float64))
    perplexity = math.inf if loss > 700 else math.exp(loss)  # past what a float64 holds
    return Quality(loss, perplexity, float(likeliest.mean()), scores.size)


def recipe_windows(text: str, tokenizer: Tokenizer, *, length: int = 2048) -> Int32[np.ndarray, "windows length"]:
    """The text as the published perplexities cut it up: tokenised as one, then windows that do not overlap.

    A window's first token is read but not predicted; the tail that fills no window is dropped, as in the original.

    Args:
        text: all of it; of a file with a row a line, such as WikiText's, what `joined_rows` returns.
        tokenizer: the model's.
        length: tokens a window: 2,048 in the papers, or what the model has positions for, if that is less.

    Raises:
        ValueError: there are too few tokens for one window.

    Source: Frantar et al., GPTQ (2022) and SparseGPT (2023), `opt_eval` of their code, which most later papers use.
    """
    tokens = tokenizer.encode(text)
    if len(tokens) < length:
        raise ValueError(f"the text must fill a window of length={length} tokens; got {len(tokens)} tokens")
    whole = len(tokens) // length * length
    return np.array(tokens[:whole], np.int32).reshape(-1, length)


def joined_rows(text: str) -> str:
    r"""The lines of a file as the recipe joins a data set's rows: by two line ends, after their own, be it \n or \r\n.

    Blank lines are rows too: of a copy of WikiText without them, the perplexity is a little different.
    """
    return "\n\n".join(row if row.strip() else "" for row in io.StringIO(text, newline=None))


def sst2(
    model: nnx.Module,
    tokenizer: Tokenizer,
    path: str | Path,
    *,
    prompt: str = SST2_PROMPT,
    labels: tuple[str, str] = SST2_LABELS,
    max_length: int | None = None,
    batch: int = 32,
) -> float:
    """Zero-shot accuracy on sentiment: the label is the likelier of two continuations of the sentence.

    Args:
        model: maps tokens to logits.
        tokenizer: the model's.
        path: a table with tabs between its columns, "sentence" and "label" (0 or 1) among them, as GLUE has it.
        prompt: what is asked, with {sentence} in it.
        labels: how it goes on where the label is 0, and where it is 1.
        max_length: tokens that the model reads at most: longer sentences lose their start.
        batch: continuations at once.

    Raises:
        ValueError: the file is not such a table, or empty.
    """
    examples = read_sst2(path)
    pairs = []
    for sentence, _ in examples:
        asked = prompt.replace("{sentence}", sentence.strip())
        pairs += [split_tokens(tokenizer, asked, label) for label in labels]
    found = continuation_scores(model, pairs, max_length=max_length, batch=batch)
    scores = np.array([score for score, _ in found]).reshape(-1, 2)
    return float(np.mean((scores[:, 1] > scores[:, 0]) == [label for _, label in examples]))


def read_sst2(path: str | Path) -> list[tuple[str, int]]:
    """The sentences of such a table, and their labels; errors as of `sst2`."""
    rows = csv.DictReader(io.StringIO(read_text(Path(path))), delimiter="\t", quoting=csv.QUOTE_NONE)
    if not {"sentence", "label"} <= set(rows.fieldnames or ()):
        raise ValueError(f"{path} must have the columns sentence and label; got {', '.join(rows.fieldnames or ())}")
    examples = []
    for row in rows:
        if row["label"] not in ("0", "1"):
            raise ValueError(f"label must be 0 or 1; got {row['label']!r} in line {rows.line_num} of {path}")
        examples.append((row["sentence"], int(row["label"])))
    if not examples:
        raise ValueError(f"{path} must hold one example at least; got none")
    return examples


def split_tokens(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of the context, the end-of-text that starts it among them, and of what follows, tokenised as one text."""
    spaces = len(context) - len(context.rstrip())  # a space belongs to the word after it
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    before, whole = tokenizer.encode(context), tokenizer.encode(context + continuation)
    return before, whole[len(before) :]


def continuation_scores(
    model: nnx.Module,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    max_length: int | None = None,
    batch: int = 32,
) -> list[tuple[float, bool]]:
    """Of each (context, continuation) in tokens: the continuation's log-probability, and whether it is the greedy one.

    Args:
        model: maps tokens to logits.
        pairs: contexts and continuations; a context holds one token at least.
        max_length: tokens that the model reads at most: longer pairs lose the start of their context.
        batch: pairs at once.

    Raises:
        ValueError: a context is empty, or a continuation longer than `max_length`.
    """
    if not pairs:
        return []
    lengths = [len(continuation) for _, continuation in pairs]
    if not all(context for context, _ in pairs):
        raise ValueError("a context must hold one token at least, such as end-of-text; got an empty one")
    if max_length is not None and max(lengths) > max_length:
        raise ValueError(f"a continuation must be at most max_length={max_length} tokens; got {max(lengths)}")
    rows = [[*context, *continuation] for context, continuation in pairs]
    width = bucket(max(map(len, rows)) - 1, 16)  # few shapes, whatever the pairs
    if max_length is not None:
        width = min(width, max_length)
        rows = [row[-max_length - 1 :] for row in rows]  # the last token is predicted, not read
    windows = np.full((len(rows), width + 1), PAD, np.int32)
    for window, row in zip(windows, rows, strict=True):
        window[: len(row)] = row
    scores, likeliest = token_scores(model, windows, batch=batch)
    found = []
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        of_it = slice(len(row) - 1 - length, len(row) - 1)
        found.append((float(scores[i, of_it].sum(dtype=np.float64)), bool(likeliest[i, of_it].all())))
    return found


def token_scores(
    model: nnx.Module, windows: Int32[np.ndarray, "windows length_plus_1"], *, batch: int
) -> tuple[Float[np.ndarray, "windows length"], Bool[np.ndarray, "windows length"]]:
    """Of every token but the first of a window: its log-probability in nats, and whether it was the likeliest.

    Raises:
        ValueError: `batch` is not positive.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1; got batch={batch}")
    graphdef, state = nnx.split(model)
    parts = []
    for start in range(0, len(windows), batch):
        rows = windows[start : start + batch]
        full = np.pad(rows, ((0, batch - len(rows)), (0, 0)))  # one shape, one compilation
        parts.append(_token_scores(graphdef, state, jnp.asarray(full)))
    scores, likeliest = (np.concatenate(part)[: len(windows)] for part in zip(*jax.device_get(parts), strict=True))
    return scores, likeliest


@functools.partial(jax.jit, static_argnums=0)
def _token_scores(
    graphdef: nnx.GraphDef, state: Any, windows: Int32[Array, "batch length_plus_1"]
) -> tuple[Float[Array, "batch length"], Bool[Array, "batch length"]]:
    logits = nnx.merge(graphdef, state)(windows[:, :-1]).astype(jnp.float32)
    targets = windows[:, 1:]
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return -nats, jnp.argmax(logits, axis=-1) == targets
