"""Text in and out: byte-level BPE as OPT has it, corpora from disk, and token windows for training.

A document is tokenised as `</s>` followed by its tokens, so that `</s>` both starts a text and ends the one before.
Any text survives encoding and decoding unchanged; no text encodes to a special token, whatever it spells.
"""

import dataclasses
import gzip
import json
import lzma
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int32

if TYPE_CHECKING:
    import tokenizers

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
"""OPT's, at ids 0 to 3."""
PAD, END_OF_TEXT = 1, 2

_DOCUMENT_CHARACTERS = 16_384


class Tokenizer:
    """Byte-level BPE with OPT's special tokens. Made by `train_bpe` or `load_tokenizer`."""

    def __init__(self, bpe: "tokenizers.models.BPE"):
        from tokenizers import Tokenizer, decoders, pre_tokenizers

        self._bpe = bpe
        self._tokenizer = Tokenizer(bpe)
        # GPT-2's pattern cuts "</s>" into "</", "s", ">": text can never merge into a special token.
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._tokenizer.decoder = decoders.ByteLevel()

    @property
    def vocab_size(self) -> int:
        """Number of ids, the four special ones included."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, after the `</s>` (id 2) that OPT starts every sequence with."""
        return [END_OF_TEXT, *self._tokenizer.encode(text).ids]

    def encode_documents(self, documents: Sequence[str]) -> Int32[np.ndarray, " tokens"]:
        """The documents one after the other, each encoded as by `encode`. Uses every core."""
        encoded = self._tokenizer.encode_batch_fast(list(documents))
        return np.concatenate([np.array([END_OF_TEXT, *document.ids], np.int32) for document in encoded])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`. Special tokens, and ids past the vocabulary (OPT pads it), stand for no text."""
        return self._tokenizer.decode([int(i) for i in ids if i >= len(SPECIAL_TOKENS)])

    def save(self, folder: str | Path) -> None:
        """Writes vocab.json and merges.txt, and the tokenizer_config.json by which transformers reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._bpe.save(str(folder))
        settings = {
            "tokenizer_class": "GPT2Tokenizer",
            "bos_token": "</s>",
            "eos_token": "</s>",
            "unk_token": "</s>",
            "pad_token": "<pad>",
            "add_bos_token": True,
            "add_prefix_space": False,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learns merges from `texts`: the same texts in the same order give the same tokenizer.

    Args:
        texts: the corpus.
        vocab_size: ids to end up with; fewer where the corpus has no pair left to merge.

    Raises:
        ValueError: `vocab_size` has no room for the special tokens and the 256 bytes.
    """
    from tokenizers import models, pre_tokenizers, trainers

    floor = len(SPECIAL_TOKENS) + 256
    if vocab_size < floor:
        raise ValueError(f"vocab_size must be at least {floor} (special tokens and bytes); got vocab_size={vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer._tokenizer.train_from_iterator(texts, trainer)
    return Tokenizer(tokenizer._tokenizer.model)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Reads OPT's vocab.json and merges.txt, or else the byte-level BPE of a tokenizer.json.

    Raises:
        FileNotFoundError: the folder holds neither.
        ValueError: a file is not what its name says, or the special tokens are not OPT's.
    """
    folder = Path(folder)
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        vocab = _read_json(folder / "vocab.json")
        try:
            lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{folder / 'merges.txt'} must be UTF-8 text; {error}") from None
        merges = [line for line in lines if line and not line.startswith("#version")]
    elif (folder / "tokenizer.json").exists():
        model = _read_json(folder / "tokenizer.json").get("model", {})
        if model.get("type") != "BPE":
            raise ValueError(f"{folder / 'tokenizer.json'} must hold a BPE model; got {model.get('type')}")
        if not {"vocab", "merges"} <= model.keys():
            raise ValueError(f"{folder / 'tokenizer.json'} must hold a vocab and merges; got {sorted(model)}")
        vocab, merges = model["vocab"], model["merges"]
    else:
        raise FileNotFoundError(f"a tokenizer is vocab.json with merges.txt, or tokenizer.json; {folder} has neither")
    return Tokenizer(_bpe(vocab, merges, folder))


def _bpe(vocab: dict[str, int], merges: Iterable[str | Sequence[str]], folder: Path) -> "tokenizers.models.BPE":
    from tokenizers import models

    special = tuple(vocab.get(token) for token in SPECIAL_TOKENS)
    if special != (0, 1, 2, 3):
        raise ValueError(f"{', '.join(SPECIAL_TOKENS)} must have ids 0 to 3, as in OPT; {folder} has {special}")
    pairs: list[tuple[str, str]] = []
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
            raise ValueError(f"a merge must join two tokens of the vocabulary into a third; {folder} has {merge}")
        pairs.append((pair[0], pair[1]))
    return models.BPE(vocab=vocab, merges=pairs)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} must be JSON; {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a JSON object; got a {type(content).__name__}")
    return content


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents, and the files that were left out because they are not UTF-8 text."""

    documents: tuple[str, ...]
    skipped: tuple[Path, ...]


def read_text(path: str | Path) -> str:
    """A UTF-8 text file, plain or compressed (.xz, .gz).

    Raises:
        ValueError: the file is binary: it holds a NUL byte or is not UTF-8.
    """
    path = Path(path)
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    try:
        with opener(path, "rb") as file:
            text = file.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"a corpus must be UTF-8 text; {path} is not, at byte {error.start}") from None
    except (lzma.LZMAError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path} is not a whole {path.suffix} file; {error}") from None
    if "\0" in text:
        raise ValueError(f"a corpus must be text; {path} holds a NUL byte at character {text.index(chr(0))}")
    return text


def read_corpus(path: str | Path, *, pattern: str = "*", exclude: Sequence[str] = ()) -> Corpus:
    """The documents of a text file, or of every text file in a folder and below, in the order of their paths.

    A file in a folder is a document. A single file is cut into documents of 16,384 characters; or, if its name ends in
    .jsonl (.jsonl.xz, .jsonl.gz), each line is an object whose "text" is one, as C4 has them.

    Args:
        path: a file or a folder. Hidden files and folders inside it are passed over.
        pattern: which file names count, as in "*.py".
        exclude: names of folders to pass over.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: the file is not text, a line of .jsonl holds none, or nothing but white space was found.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"a corpus must be a text file or a folder of them; there is no {path}")
    documents, skipped = [], []
    if path.is_file():
        text = read_text(path)
        if ".jsonl" in path.suffixes:
            documents = [_document(line, path, i + 1) for i, line in enumerate(text.split("\n")) if line.strip()]
        else:
            documents = [text[i : i + _DOCUMENT_CHARACTERS] for i in range(0, len(text), _DOCUMENT_CHARACTERS)]
    else:
        for file in _files(path, pattern, set(exclude)):
            try:
                documents.append(read_text(file))
            except ValueError:
                skipped.append(file)
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ValueError(f"a corpus must hold text; {path} has none in files named {pattern} ({len(skipped)} not text)")
    return Corpus(documents=tuple(documents), skipped=tuple(skipped))


def _files(folder: Path, pattern: str, exclude: set[str]) -> list[Path]:
    def counts(file: Path) -> bool:
        parts = file.relative_to(folder).parts
        return file.is_file() and exclude.isdisjoint(parts) and not any(part.startswith(".") for part in parts)

    return sorted(file for file in folder.rglob(pattern) if counts(file))


def _document(line: str, path: Path, number: int) -> str:
    """The text of a line of .jsonl."""
    try:
        document = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        document = None
    if not isinstance(document, str):
        raise ValueError(f'a line of .jsonl must be an object with a "text"; line {number} of {path} is not')
    return document


def split_documents(documents: Sequence[str], *, held_out: float, seed: int) -> tuple[list[str], list[str]]:
    """Splits whole documents at random into (train, held out), at least one in each.

    Args:
        documents: at least two.
        held_out: the fraction of documents to hold out, between 0 and 1.
        seed: which ones.

    Raises:
        ValueError: fewer than two documents, or a fraction that is not one.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be a fraction between 0 and 1; got held_out={held_out}")
    if len(documents) < 2:
        raise ValueError(
            "a corpus must hold at least 2 documents (one to train on, one to hold out; a single file counts one for "
            f"every {_DOCUMENT_CHARACTERS} characters); got {len(documents)}: give a larger corpus"
        )
    count = min(max(round(held_out * len(documents)), 1), len(documents) - 1)
    order: list[int] = np.random.default_rng(seed).permutation(len(documents)).tolist()
    return [documents[i] for i in sorted(order[count:])], [documents[i] for i in sorted(order[:count])]


def check_tokens(windows: Any, model: Any) -> None:
    """Raises ValueError for tokens that a model has no embedding of: it would answer with NaN, or to another token.

    Args:
        windows: of tokens, of any shape, on the host.
        model: one whose `config.vocab_size` says how many it knows; of another nothing is asked.
    """
    known = getattr(getattr(model, "config", None), "vocab_size", None)
    windows = np.asarray(windows)
    if known is None or not windows.size or (windows.min() >= 0 and windows.max() < known):
        return
    outside = windows[(windows < 0) | (windows >= known)].flat[0]
    raise ValueError(f"token ids must be in [0, {known}); windows hold {outside}: were they made by its tokenizer?")


def token_windows(tokens: Int32[np.ndarray, " tokens"], *, length: int) -> Int32[np.ndarray, "windows length_plus_1"]:
    """Windows of `length` inputs and their next token: every token but the first is predicted once.

    A view, not a copy. The last, incomplete window is dropped.

    Raises:
        ValueError: there are too few tokens for one window.
    """
    if len(tokens) < length + 1:
        raise ValueError(
            f"a window of length={length} needs {length + 1} tokens; got {len(tokens)} tokens: "
            "give a larger corpus or a shorter window"
        )
    return np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::length]


class ShuffledBatches:
    """Endless batches with random access: `batches[step]` is a pure function of the windows, the seed and the step.

    So the state of the pipeline is the step. Every epoch covers every window once, in an order of its own; a batch may
    reach from one epoch into the next.
    """

    def __init__(self, windows: Int32[np.ndarray, "windows length"], *, batch: int, seed: int):
        import grain

        self._windows = windows
        self._indices = grain.MapDataset.source(range(len(windows))).seed(seed).shuffle().repeat().batch(batch)

    def __getitem__(self, step: int) -> Int32[np.ndarray, "batch length"]:
        return self._windows[np.asarray(self._indices[step])]
