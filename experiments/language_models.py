"""What experiments that train share: a size for the machine, text, prepared once, and training behind a bar."""

import contextlib
import dataclasses
import io
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import Int32
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.runs import Run
from sparsellm import huggingface, text, training
from sparsellm.objectives import Objective, next_token_objective

TOKENS, PARTS = "tokens.npz", ("train", "held_out")
NOT_LIBRARY = ("test", "tests", "idle_test", "site-packages", "dist-packages")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """A corpus, ready to train on."""

    tokenizer: text.Tokenizer
    train: Int32[np.ndarray, "windows length_plus_1"]
    held_out: Int32[np.ndarray, "held_out_windows length_plus_1"]
    bytes_per_token: float
    """Of the held-out text."""


def size_of(config: Any) -> str:
    """The option `size`; for "auto" "large" on a GPU and "small" elsewhere."""
    return config.size if config.size != "auto" else "large" if jax.default_backend() == "gpu" else "small"


def for_steps(config: training.TrainConfig, steps: int | None) -> training.TrainConfig:
    """A size's training, but of so many steps, if that is asked for."""
    steps = config.steps if steps is None else steps
    return dataclasses.replace(config, steps=steps, warmup_steps=min(config.warmup_steps, steps // 4))


def read_corpus(path: Path | None) -> text.Corpus:
    """The documents of a file or a folder; None for the source of Python's standard library."""
    if path is None:
        return text.read_corpus(Path(sysconfig.get_path("stdlib")), pattern="*.py", exclude=NOT_LIBRARY)
    return text.read_corpus(path, exclude=("__pycache__",))


def prepare(
    run: Run,
    console: Console,
    *,
    corpus: Path | None,
    tokenizer: Path | int,
    length: int,
    held_out: float,
    seed: int,
) -> Data:
    """Reads the corpus and tokenises it; or reads what an earlier process of this run has left.

    Leaves `tokenizer/` and tokens.npz (train, held_out) in the run's folder.

    Args:
        run: whose folder to use.
        console: where to say what the corpus is.
        corpus: as of `read_corpus`.
        tokenizer: a folder with one, or the size of the vocabulary of one to train on the corpus.
        length: tokens a window.
        held_out: the fraction of documents to hold out.
        seed: of which ones.
    """
    path = run.folder / TOKENS
    if not path.exists():
        found = read_corpus(corpus)
        train, held_out_documents = text.split_documents(found.documents, held_out=held_out, seed=seed)
        bpe = text.train_bpe(train, tokenizer) if isinstance(tokenizer, int) else text.load_tokenizer(tokenizer)
        bpe.save(run.folder / "tokenizer")
        train_tokens, held_out_tokens = map(bpe.encode_documents, (train, held_out_documents))
        for tokens in (train_tokens, held_out_tokens):
            text.token_windows(tokens, length=length)  # too small a corpus is refused before anything is kept
        sizes = {
            "held_out_bytes": np.int64(sum(len(document.encode()) for document in held_out_documents)),
            "length": np.int64(length),
        }
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, train=train_tokens, held_out=held_out_tokens, **sizes)
        run.write(path.name, buffer.getvalue())
        skipped = f", {len(found.skipped)} files that are not UTF-8 text skipped" if found.skipped else ""
        console.print(
            f"corpus: {len(found.documents)} documents{skipped}; {len(train_tokens):,} tokens to train on, "
            f"{len(held_out_tokens):,} held out, vocabulary {bpe.vocab_size:,}",
            soft_wrap=True,
        )
    return load(run.folder)


def load(folder: Path) -> Data:
    """What `prepare` has left in a run's folder, in the windows that the run trains on."""
    with np.load(folder / TOKENS) as arrays:
        train, held_out = (text.token_windows(arrays[part], length=int(arrays["length"])) for part in PARTS)
        return Data(
            tokenizer=text.load_tokenizer(folder / "tokenizer"),
            train=train,
            held_out=held_out,
            bytes_per_token=float(arrays["held_out_bytes"]) / len(arrays["held_out"]),
        )


def model_folder(source: str) -> Path:
    """Where a model is, with its tokenizer: in a run's folder, in a checkpoint's, or in the hub's by this id."""
    for folder in (Path(source) / "model", Path(source) / "model" / "huggingface"):
        if (folder / "config.json").is_file():
            return folder
    return huggingface.find_folder(source)


def train(
    model: nnx.Module,
    windows: Int32[np.ndarray, "windows length_plus_1"],
    config: training.TrainConfig,
    seed: int,
    folder: Path,
    console: Console,
    *,
    objective: Objective = next_token_objective,
    peak_tokens: float | None = None,
    label: str = "training",
) -> list[training.Metrics]:
    """Trains behind a progress bar, from the last checkpoint in the folder.

    Args:
        model: to train in place.
        windows: to train on.
        config: how.
        seed: of the order of windows.
        folder: of checkpoints and metrics.jsonl.
        console: where the bar is drawn.
        objective: what to minimise.
        peak_tokens: tokens a second that the device's peak would allow, if known: the bar then shows the share.
        label: of the bar.

    Returns:
        The metrics of every step.
    """
    tokens = config.batch * (windows.shape[1] - 1)
    with progress(label, config.steps, console) as advance:

        def report(row: training.Metrics) -> None:
            rate = tokens / row["seconds"]
            share = "" if peak_tokens is None else f"  {rate / peak_tokens:.0%} of the peak"
            advance(row["step"], f"loss {row['loss']:.3f}  {rate:,.0f} tokens/s{share}")

        batches = text.ShuffledBatches(windows, batch=config.batch, seed=seed)
        return training.train(model, batches, config, folder, objective=objective, report=report)


@contextlib.contextmanager
def progress(label: str, total: int, console: Console | None = None) -> Iterator[Callable[[float, str], None]]:
    """A progress bar; what it gives is called with how much is done, and a note."""
    columns = TextColumn(label), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}")
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("", total=total, note="")
        yield lambda done, note: bar.update(task, completed=done, note=note)


@contextlib.contextmanager
def compiled_in(folder: Path) -> Iterator[None]:
    """Keeps what is compiled inside of the block in a folder, and takes it from there if it is there.

    A process that continues a training so runs the very same instructions: XLA chooses among algorithms by measuring
    them, and another choice rounds another way.
    """
    options = {
        "jax_compilation_cache_dir": str(folder.absolute()),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    try:
        for name, value in options.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
