"""Does a model trained here, on real text, give the same answers when its feed-forward blocks run sparse?

    make quickstart        or        python -m experiments quickstart --corpus FILE_OR_FOLDER

Trains a byte-level BPE and a small ReLU OPT on text (by default the source of Python's own standard library), measures
its held-out perplexity and how many micro-tiles of its activations are live, runs the same weights dense and sparse
side by side, saves them in both formats and loads them again. Killed at any point, the same command goes on from the
last checkpoint and ends with the same loss.

Expected: under 3 minutes, on 2 CPU cores (size "small") as on an H200 (size "large"). The logits of both paths agree
to rounding, the greedy text is the same. The density grows with the micro-tile; after so few steps, it is high enough
for dense to be quicker on a CPU. Published OPT models have far fewer live neurons: see `matmul_sparsity`.
"""

import dataclasses
import functools
import math
import os
import statistics
import sys
import sysconfig
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int32
from rich.console import Console

from experiments import figures, language_models
from experiments.language_models import Data
from experiments.runs import Row, Run, markdown_table
from models import OPT, OPTConfig, load_opt, save_hf, save_opt
from models.opt import with_sparse_rows
from sparsellm import evaluation, text, training
from sparsellm.generation import generate
from sparsellm.micro_tiles import MicroTile, density

GRANULARITIES = tuple(MicroTile(rows, 1) for rows in (1, 8, 16, 32, 64, 128))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """What fits a kind of machine: a model, and how long to train it."""

    model: OPTConfig
    training: training.TrainConfig
    window: int
    """Tokens a training window."""
    sparse_rows: int
    """Tokens in a micro-tile of the sparse path."""


SIZES = {
    "tiny": Size(
        model=OPTConfig(vocab_size=320, layers=2, d_model=32, heads=2, d_ff=128, max_length=64, init_std=0.02),
        training=training.TrainConfig(steps=30, batch=4, learning_rate=3e-3, warmup_steps=5, checkpoint_steps=10),
        window=32,
        sparse_rows=8,
    ),
    "small": Size(
        model=OPTConfig(vocab_size=2048, layers=4, d_model=128, heads=4, d_ff=512, max_length=256, init_std=0.02),
        training=training.TrainConfig(steps=500, batch=8, learning_rate=3e-3, warmup_steps=50),
        window=128,
        sparse_rows=8,
    ),
    "large": Size(
        model=OPTConfig.preset("125m", vocab_size=8192, max_length=1024, init_std=0.02, dtype="bfloat16"),
        training=training.TrainConfig(steps=600, batch=32, learning_rate=1e-3, warmup_steps=100, checkpoint_steps=200),
        window=512,
        sparse_rows=64,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the quickstart.

    Attributes:
        corpus: a text file, or a folder of them; None for the source of Python's standard library.
        size: the model and how long to train it; "auto" is "large" on a GPU and "small" elsewhere.
        steps: training steps; None for the size's own.
        held_out: the fraction of documents to hold out.
        prompt_tokens: how many tokens of a held-out window to continue.
        new_tokens: how many tokens to generate.
        seed: of the initial weights, the split and the order of the windows.
    """

    corpus: Path | None = None
    size: Literal["auto", "tiny", "small", "large"] = "auto"
    steps: int | None = None
    held_out: float = 0.05
    prompt_tokens: int = 32
    new_tokens: int = 64
    seed: int = 0

    @classmethod
    def smoke(cls) -> "Config":
        """A few seconds, on one package of the standard library."""
        corpus = Path(sysconfig.get_path("stdlib")) / "asyncio"
        return cls(corpus=corpus, size="tiny", prompt_tokens=8, new_tokens=8)


def run(config: Config, run: Run) -> list[Row]:
    """Trains, measures, compares, saves; leaves its rows, figures, models and report in the run's folder."""
    console = Console()
    name = language_models.size_of(config)
    size = SIZES[name]
    _check(config, size)
    train_config = language_models.for_steps(size.training, config.steps)
    data = prepare(config, size, run, console)
    model = OPT(size.model, rngs=nnx.Rngs(config.seed))
    metrics = language_models.train(model, data.train, train_config, config.seed, run.folder, console)
    summary: Row = {
        "model": f"opt-{name}",
        "parameters": sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))),
        "vocabulary": data.tokenizer.vocab_size,
        "steps": train_config.steps,
        "loss": metrics[-1]["loss"],
        "train_s": round(sum(row["seconds"] for row in metrics), 2),
        **held_out_quality(model, data, batch=train_config.batch),
    }
    densities = measure_density(model, data.held_out[: train_config.batch * 4, :-1])
    tokens = jnp.asarray(data.held_out[: train_config.batch, :-1])
    inference = compare(model, data, tokens, size.sparse_rows, config)
    formats = save_and_reload(model, data.tokenizer, tokens, run.folder)
    rows = [summary, *densities, *inference, *formats]
    report = write_report(run, rows, [row["loss"] for row in metrics], sampled_text(model, data, config))
    console.print(report, markup=False, highlight=False, soft_wrap=True)
    return rows


def _check(config: Config, size: Size) -> None:
    """What would otherwise show only after the training."""
    if config.seed < 0:
        raise ValueError(f"seed must be at least 0; got seed={config.seed}")
    if not 1 <= config.prompt_tokens <= size.window:
        raise ValueError(f"prompt_tokens must be 1 to {size.window} (a window); got {config.prompt_tokens}")
    if not 1 <= config.new_tokens <= size.model.max_length - config.prompt_tokens:
        raise ValueError(
            f"prompt_tokens and new_tokens must fit into the model's {size.model.max_length} positions; "
            f"got prompt_tokens={config.prompt_tokens}, new_tokens={config.new_tokens}"
        )


def prepare(config: Config, size: Size, run: Run, console: Console) -> Data:
    """The corpus's tokens, or those that an earlier process of this run has left."""
    return language_models.prepare(
        run,
        console,
        corpus=config.corpus,
        tokenizer=size.model.vocab_size,
        length=size.window,
        held_out=config.held_out,
        seed=config.seed,
    )


def held_out_quality(model: OPT, data: Data, *, batch: int, windows: int = 256) -> Row:
    """Perplexity a token, and bits a byte (whatever the vocabulary), on windows spread over the held-out text."""
    spread = data.held_out[:: max(len(data.held_out) // windows, 1)]
    quality = evaluation.perplexity(model, spread[:windows], batch=batch)
    return {
        "held_out_loss": quality.loss,
        "perplexity": quality.perplexity,
        "bits_per_byte": quality.loss / math.log(2) / data.bytes_per_token,
    }


@functools.partial(jax.jit, static_argnums=0)
def _densities(graphdef: nnx.GraphDef, params: nnx.State, tokens: Int[Array, "batch length"]):
    _, captured = nnx.capture(nnx.merge(graphdef, params), nnx.Intermediate)(tokens)
    layers = captured["layers"]
    return [[density(layers[i]["ffn_activation"][0], tile) for tile in GRANULARITIES] for i in sorted(layers)]


def measure_density(model: OPT, tokens: Int32[np.ndarray, "batch length"]) -> list[Row]:
    """How many micro-tiles of each layer's activation are live, for every granularity."""
    by_layer = _densities(*nnx.split(model, nnx.Param), jnp.asarray(tokens))
    return [
        {"layer": layer, "granularity": str(tile), "density": round(float(value), 4)}
        for layer, values in enumerate(by_layer)
        for tile, value in zip(GRANULARITIES, values, strict=True)
    ]


@functools.partial(jax.jit, static_argnums=0)
def _logits(
    graphdef: nnx.GraphDef, params: nnx.State, tokens: Int[Array, "batch length"]
) -> Float[Array, "batch length vocab"]:
    return nnx.merge(graphdef, params)(tokens)


def compare(
    model: OPT, data: Data, tokens: Int[Array, "batch length"], sparse_rows: int | None, config: Config
) -> list[Row]:
    """The same weights dense and sparse: logits, greedy text, and the time of each, measured in turns: two rows.

    Dense alone, a row, where `sparse_rows` is None.
    """
    params = nnx.state(model, nnx.Param)
    models = {"dense": model} | ({} if sparse_rows is None else {"sparse": with_sparse_rows(model, sparse_rows)})
    prompt = _prompt(data, config)
    forwards, decodes = {}, {}
    for name, variant in models.items():
        forwards[name] = functools.partial(_logits, nnx.graphdef(variant), params, tokens)
        decodes[name] = functools.partial(generate, variant, [prompt], max_new_tokens=config.new_tokens)
    logits, forward_ms = _timed_in_turns(forwards, repeats=10)
    greedy, decode_ms = _timed_in_turns(decodes, repeats=3)
    rows = []
    for name in models:
        row: Row = {"variant": name, "batch": tokens.shape[0], "tokens": tokens.size, "time_ms": forward_ms[name]}
        rows.append(row | {"decode_ms": decode_ms[name] / max(len(greedy[name][0]), 1)})
    if sparse_rows is None:
        return rows
    difference = logits["sparse"] - logits["dense"]
    error = jnp.linalg.norm(difference) / jnp.linalg.norm(logits["dense"])
    same = [a == b for a, b in zip(greedy["dense"][0], greedy["sparse"][0], strict=False)]
    rows[1] |= {
        "granularity": str(MicroTile(sparse_rows, 1)),
        "error": float(error),
        "largest_logit_difference": float(jnp.abs(difference).max()),
        "greedy_tokens": len(greedy["dense"][0]),
        "same_greedy_tokens": (same + [False]).index(False),
    }
    return rows


def _prompt(data: Data, config: Config) -> list[int]:
    return [int(token) for token in data.held_out[0, : config.prompt_tokens]]


def sampled_text(model: OPT, data: Data, config: Config) -> str:
    """A held-out prompt and how the model goes on. Sampled: greedy, a model so young only repeats itself."""
    key = jax.random.key(config.seed)
    sampling: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "key": key}
    tokens = generate(model, [_prompt(data, config)], max_new_tokens=config.new_tokens, **sampling)[0]
    return f"{data.tokenizer.decode(_prompt(data, config))} ▸ {data.tokenizer.decode(tokens)}".rstrip()


def _timed_in_turns(
    functions: dict[str, Callable[[], Any]], *, repeats: int
) -> tuple[dict[str, Any], dict[str, float]]:
    """Results, and median wall-clock milliseconds, of functions that take turns (after one call to compile)."""
    results = {name: jax.block_until_ready(function()) for name, function in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append(1e3 * (time.perf_counter() - start))
    return results, {name: round(statistics.median(values), 3) for name, values in times.items()}


def save_and_reload(
    model: OPT, tokenizer: text.Tokenizer, tokens: Int[Array, "batch length"], folder: Path
) -> list[Row]:
    """Saves the model for Orbax and for Hugging Face, with the tokenizer, loads both, compares logits."""
    orbax, huggingface = folder / "model" / "orbax", folder / "model" / "huggingface"
    save_opt(model, orbax, overwrite=True)
    tokenizer.save(orbax)
    save_hf(model, huggingface, tokenizer_folder=folder / "tokenizer", overwrite=True)
    expected = _logits(*nnx.split(model, nnx.Param), tokens)
    rows = []
    for target in (orbax, huggingface):
        loaded = load_opt(target, dtype=model.config.dtype, param_dtype=model.config.param_dtype)
        difference = jnp.abs(_logits(*nnx.split(loaded, nnx.Param), tokens) - expected).max()
        size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
        rows.append(
            {"format": target.name, "megabytes": round(size / 1e6, 2), "largest_logit_difference": float(difference)}
        )
    return rows


def write_report(run: Run, rows: Sequence[Row], losses: Sequence[float], sample: str) -> str:
    """Leaves the figures and report.txt in the run's folder; returns the report."""
    summary = rows[0]
    dense, sparse = (next(row for row in rows if row.get("variant") == name) for name in ("dense", "sparse"))
    densities: dict[str, list[float]] = {str(tile): [] for tile in GRANULARITIES}
    for row in rows:
        if "density" in row:
            densities[row["granularity"]].append(row["density"])
    run.write("density.png", figures.draw(lambda axes: figures.density_by_layer(axes, densities)))
    run.write("loss.png", figures.draw(lambda axes: figures.loss_curve(axes, losses, summary["held_out_loss"])))
    by_layer = [
        [layer, *(f"{d:.0%}" for d in values)] for layer, values in enumerate(zip(*densities.values(), strict=True))
    ]
    paths = [
        [row["variant"], row.get("granularity", "-"), f"{row['time_ms']:.1f}", f"{row['decode_ms']:.2f}"]
        for row in (dense, sparse)
    ]
    report = f"""\
{summary["model"]}, {summary["parameters"]:,} parameters, {summary["steps"]} steps in {summary["train_s"]:.0f} s

Held-out text: perplexity {summary["perplexity"]:.1f} a token, {summary["bits_per_byte"]:.2f} bits a byte
    (a model that knows nothing: perplexity {summary["vocabulary"]:,}).

Live micro-tiles of the feed-forward activations (tokens x neurons), by layer:

{markdown_table(by_layer, ["layer", *densities])}

The same weights, dense and sparse, on {dense["tokens"]} tokens at once and one token at a time:

{markdown_table(paths, ["path", "micro-tile", "ms forward", "ms a new token"])}

    sparse over dense: {dense["time_ms"] / sparse["time_ms"]:.2f}x forward, \
{dense["decode_ms"] / sparse["decode_ms"]:.2f}x a new token
    logits differ by at most {sparse["largest_logit_difference"]:.1e} (relative error {sparse["error"]:.1e})
    greedy text: {sparse["same_greedy_tokens"]} of {sparse["greedy_tokens"]} tokens the same

Saved and loaded again:
"""
    for row in rows:
        if "format" in row:
            report += f"    model/{row['format']}: {row['megabytes']:.1f} MB, "
            report += f"logits differ by at most {row['largest_logit_difference']:.1e}\n"
    report += f"\nA held-out prompt ▸ and a sample of how the model goes on:\n\n{textwrap.indent(sample, '    ')}\n\n"
    report += f"Files: {run.folder}/ rows.jsonl, density.png, loss.png, report.txt, model/\n"
    python = os.path.relpath(sys.executable)
    python = sys.executable if python.startswith("..") else python
    report += f'More text: {python} -m experiments generate --source {run.folder} --prompt "import os"\n'
    run.write("report.txt", report)
    return report
