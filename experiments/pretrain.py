"""How good, how sparse and how quickly trained is an OPT of any size and activation on text of your own?

    python -m experiments pretrain --corpus TEXT.txt.xz --wikitext WIKITEXT.txt --keep        on a GPU
    python -m experiments pretrain --corpus TEXT.txt.xz --l1 1e-4                              sparse by an L1 term

The run's folder then is a `--source` for the experiments that need a model: model/ holds it (`save_opt`) with its
tokenizer, tokens.npz the text it was trained on and the text that was held out, metrics.jsonl every step. Killed at any
point, the same command goes on from the last checkpoint, and ends with the same losses to the bit on the same device:
tested on a CPU by killing it, on an H200 by taking the same steps twice.

A token costs 6 FLOPs for each weight that it is multiplied with and 6 * layers * d_model * length for causal attention:
0.80 GFLOP for 125M with OPT's vocabulary of 50,272, 0.60 with the default 8,192. On an H200 a step of 16 x 1,024 tokens
of the former, 13 TFLOP, takes 32.9 ms: 398 TFLOP/s, 50% of the 797 that cuBLAS reaches there, 40% of the 989 of the
datasheet; one of 64 x 1,024 takes 122 ms, 54% and 43%. In a minute 1,300 steps of the former go over 16 MB of English,
3.3 million tokens, 6 times, to a held-out perplexity of 174, with a GELU to 153, and with a ReLU and an L1 weight of
3e-4 to 132, while 2.1% of the activations are not zero. Twice the steps, with that weight and a dropout of 0.1,
memorise so little text: 227 held out, a training loss of 2.2. Tried there for 350 steps: learning rates of 2e-3 and
3e-3, outputs of blocks that start at zero, and larger embeddings end with a higher loss. The logits of a step's tokens
take 3.3 GB in float32 where the vocabulary is OPT's: `accumulate` divides that, should another size not fit.
"""

import dataclasses
import json
import math
import shutil
import statistics
import sysconfig
from pathlib import Path
from typing import Any, Literal

import jax
from flax import nnx
from rich.console import Console

from experiments import figures, language_models, options
from experiments.language_models import Data
from experiments.runs import Row, Run, markdown_table
from models import OPT, PRESETS, OPTConfig, save_opt
from pallas_kernels.workbench.gpus import find_gpu
from sparsellm import evaluation, text, training
from sparsellm.objectives import l1_objective, sine_stages
from sparsellm.sharding import create_model

COMPILING = 3  # steps that are left out of the median time
TINY = {"layers": 2, "d_model": 32, "heads": 2, "d_ff": 128}
VOCABULARY_MULTIPLE = 32  # OPT's 50,265 tokens have 50,272 rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of pretrain.

    Attributes:
        corpus: a text file (.txt, .txt.xz, .txt.gz), or a folder of them; None for the source of Python's standard
            library.
        tokenizer: a folder with OPT's vocab.json and merges.txt; None to train a byte-level BPE on the corpus.
        vocabulary: tokens of the BPE that is trained.
        size: a preset of OPT, "125m" to "175b", or "tiny".
        activation: of the feed-forward blocks.
        gated: multiply the activation by a second product, as in Llama's blocks.
        length: tokens a window, and positions of the model.
        batch: windows a step.
        accumulate: micro-batches that a step's batch is cut into.
        steps: optimizer steps.
        learning_rate: at the end of the warm-up; a cosine takes it down to a tenth.
        warmup_steps: from 0 to the full learning rate.
        l1: weight of the activations' L1 norm: one value for a constant weight, as TwELL; several for ProSparse's
            stages, equally long, of which each ends with one.
        dropout: share of each block's output that a training step drops.
        wikitext: a text with a row a line, to measure perplexity on by the published recipe; to compare with published
            ones, it takes OPT's tokenizer.
        sst2: a table with the columns sentence and label, for the zero-shot probe.
        against: the folder of another run on the same text, whose held-out perplexity this one's is compared with.
        held_out: the fraction of documents to hold out.
        checkpoint_steps: steps from one checkpoint to the next.
        dtype: what is computed in; parameters and their sums are float32.
        seed: of the initial weights, the split, the order of windows and what is dropped.
    """

    corpus: Path | None = None
    tokenizer: Path | None = None
    vocabulary: int = 8192
    size: str = "125m"
    activation: Literal["relu", "gelu", "silu"] = "relu"
    gated: bool = False
    length: int = 1024
    batch: int = 16
    accumulate: int = 1
    steps: int = 1300
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    l1: tuple[float, ...] = ()
    dropout: float = 0.0
    wikitext: Path | None = None
    sst2: Path | None = None
    against: Path | None = None
    held_out: float = 0.05
    checkpoint_steps: int = 650
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    seed: int = 0

    @classmethod
    def smoke(cls) -> "Config":
        """Some seconds, on one package of the standard library."""
        return cls(
            corpus=Path(sysconfig.get_path("stdlib")) / "asyncio",
            vocabulary=320,
            size="tiny",
            length=32,
            batch=4,
            accumulate=2,
            steps=30,
            learning_rate=3e-3,
            warmup_steps=5,
            l1=(1e-3, 1e-2),
            dropout=0.1,
            checkpoint_steps=10,
            dtype="float32",
        )


def run(config: Config, run: Run) -> list[Row]:
    """A row of what came of it, then one for each step; leaves the model, and figures."""
    options.check_known(config, "size", ("tiny", *PRESETS))
    train_config, weight = training_config(config), l1_weight(config)
    for path in (config.wikitext, config.sst2):
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"a text to evaluate on must be a file; there is no {path}")
    if config.wikitext is not None:  # what cannot be read shows before the training, not after
        text.read_text(config.wikitext)
    if config.sst2 is not None:
        evaluation.read_sst2(config.sst2)
    other = compared(config)
    model_config(config, config.vocabulary)  # what is wrong with it shows before the corpus is read
    with language_models.compiled_in(run.folder / "compiled"):
        console = Console()
        data = language_models.prepare(
            run,
            console,
            corpus=config.corpus,
            tokenizer=config.tokenizer or config.vocabulary,
            length=config.length,
            held_out=config.held_out,
            seed=config.seed,
        )
        sizes = model_config(config, data.tokenizer.vocab_size)
        model = create_model(lambda: OPT(sizes, rngs=nnx.Rngs(config.seed)))  # refused where it does not fit
        gpu = find_gpu(jax.devices()[0].device_kind)
        flops = training_flops(model.config, config.length)
        metrics = language_models.train(
            model,
            data.train,
            train_config,
            config.seed,
            run.folder,
            console,
            objective=l1_objective(weight, dropout_seed=config.seed),
            peak_tokens=None if gpu is None else gpu.flops / flops,
        )
        save_opt(model, run.folder / "model", overwrite=True)
        data.tokenizer.save(run.folder / "model")
        speed = step_speed(metrics, config.batch * config.length, flops, None if gpu is None else gpu.flops)
        rows = [
            describe(config, model, data, metrics) | speed | qualities(config, model, data) | other,
            *step_rows(metrics),
        ]
    shutil.rmtree(run.folder / "compiled", ignore_errors=True)
    run.show(*readme({"rows": rows}))
    print(f"\nThe model is in {run.folder}/model: --source {run.folder}")
    return rows


def compared(config: Config) -> Row:
    """The held-out perplexity of the run to compare with, if there is one."""
    if config.against is None:
        return {}
    path = config.against / "rows.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"a run to compare with must be the folder of a finished one; there is no {path}")
    return {"against_perplexity": json.loads(path.read_text().partition("\n")[0])["perplexity"]}


def training_config(config: Config) -> training.TrainConfig:
    """How to train, of the options."""
    names = ("steps", "batch", "accumulate", "learning_rate", "warmup_steps", "checkpoint_steps")
    return training.TrainConfig(**{name: getattr(config, name) for name in names})


def model_config(config: Config, tokens: int) -> OPTConfig:
    """The model's, for a tokenizer of so many tokens."""
    fields: dict[str, Any] = {
        "vocab_size": -(-tokens // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
        "max_length": config.length,
        "activation": config.activation,
        "gated": config.gated,
        "dropout": config.dropout,
        "dtype": config.dtype,
        "init_std": 0.02,  # the paper's 0.006 takes longer to get going than there are steps here
    }
    return OPTConfig(**TINY, **fields) if config.size == "tiny" else OPTConfig.preset(config.size, **fields)


def l1_weight(config: Config):
    """The L1 norm's weight as a function of the step; None without one."""
    peaks = config.l1
    if not peaks:
        return None
    if len(peaks) > config.steps:
        raise ValueError(f"l1 must have at most a stage a step; got {len(peaks)} stages, steps={config.steps}")
    return sine_stages(peaks, [config.steps * i // len(peaks) for i in range(1, len(peaks) + 1)])


def training_flops(config: OPTConfig, length: int) -> float:
    """FLOPs of training on a token: 6 for each multiply-add of the forward pass, 2 there and 4 on the way back.

    Counted is what has to be multiplied: all weights but the norms', the biases' and the position table's, the token
    table once, for the logits; and causal attention to `length` / 2 tokens on average, in two products.
    """
    width, joined = config.embed_dim or config.d_model, config.embed_dim not in (None, config.d_model)
    multiply_adds = config.vocab_size * width + (2 * width * config.d_model if joined else 0)
    for layer in range(config.layers):
        heads, d_ff = config.sizes(layer)
        attention = heads * (config.d_model // config.heads)
        multiply_adds += config.d_model * (4 * attention + (3 if config.gated else 2) * d_ff) + attention * length
    return 6.0 * multiply_adds


def step_speed(metrics: list[training.Metrics], tokens: int, flops: float, peak: float | None) -> Row:
    """The median step's time, tokens and FLOPs a second, and the share of the device's peak (MFU) where it is known.

    Args:
        metrics: of every step.
        tokens: a step.
        flops: a token.
        peak: FLOP/s.
    """
    seconds = [row["seconds"] for row in metrics]
    median = statistics.median(seconds[COMPILING:] or seconds)
    rate = tokens / median
    return {
        "tokens": tokens,
        "step_ms": round(1e3 * median, 3),
        "train_s": round(sum(seconds), 2),
        "tokens_per_s": round(rate),
        "tflops": round(rate * flops / 1e12, 3),
        "mfu": None if peak is None else round(rate * flops / peak, 4),
    }


def describe(config: Config, model: OPT, data: Data, metrics: list[training.Metrics]) -> Row:
    """What was trained, and its last step."""
    return {
        "model": f"opt-{config.size}",
        "activation": f"gated {config.activation}" if config.gated else config.activation,
        "dtype": config.dtype,
        "parameters": sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))),
        "vocabulary": data.tokenizer.vocab_size,
        "length": config.length,
        "steps": config.steps,
        "epochs": round(config.steps * config.batch / len(data.train), 2),
        "loss": metrics[-1]["loss"],
        "l1": list(config.l1),
        "dropout": config.dropout,
        "density": metrics[-1]["density"],
    }


def qualities(config: Config, model: OPT, data: Data) -> Row:
    """Of the trained model, on the text that was held out and on what else there is."""
    held_out = evaluation.perplexity(model, data.held_out)
    row: Row = {
        "held_out_loss": held_out.loss,
        "perplexity": held_out.perplexity,
        "accuracy": held_out.accuracy,
        "bits_per_byte": held_out.loss / math.log(2) / data.bytes_per_token,
    }
    if config.wikitext is not None:
        joined = evaluation.joined_rows(text.read_text(config.wikitext))
        windows = evaluation.recipe_windows(joined, data.tokenizer, length=min(2048, config.length))
        row["wikitext_perplexity"] = evaluation.perplexity(model, windows).perplexity
    if config.sst2 is not None:
        row["sst2_accuracy"] = evaluation.sst2(model, data.tokenizer, config.sst2, max_length=config.length)
    return row


def step_rows(metrics: list[training.Metrics]) -> list[Row]:
    """A row a step, of what the figures show."""
    return [{name: row[name] for name in ("step", "loss", "density", "l1_weight")} for row in metrics]


def readme(result: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """A table, and figures of the loss and of the density."""
    summary, *steps = result["rows"]
    share = "" if summary["mfu"] is None else f", {summary['mfu']:.0%} of what its matrix products reach"
    head = (
        f"{summary['model']}, {summary['activation']}, {summary['parameters']:,} parameters, {summary['dtype']}: "
        f"{summary['steps']} steps of {summary['tokens']:,} tokens ({summary['epochs']} epochs) in "
        f"{summary['train_s']:.0f} s; {summary['step_ms']:.1f} ms a step, {summary['tokens_per_s']:,} tokens/s, "
        f"{summary['tflops']:.1f} TFLOP/s{share}."
    )
    shown = {
        "training loss": f"{summary['loss']:.3f}",
        "held-out perplexity": f"{summary['perplexity']:.2f}",
        "that of the compared run": f"{summary.get('against_perplexity', math.nan):.2f}",
        "bits a byte": f"{summary['bits_per_byte']:.3f}",
        "next-token accuracy": f"{summary['accuracy']:.1%}",
        "WikiText-2 perplexity": f"{summary.get('wikitext_perplexity', math.nan):.2f}",
        "SST-2, zero-shot": f"{summary.get('sst2_accuracy', math.nan):.1%}",
        "density": f"{summary['density']:.1%}",
    }
    table = markdown_table([[value.replace("nan%", "–").replace("nan", "–") for value in shown.values()]], list(shown))
    losses = [row["loss"] for row in steps]
    return f"{head}\n\n{table}", {
        "pretrain_loss.png": figures.draw(lambda axes: figures.loss_curve(axes, losses, summary["held_out_loss"])),
        "pretrain_density.png": figures.draw(lambda axes: _plot_density(axes, steps)),
    }


def _plot_density(axes, steps: list[Row]) -> None:
    numbers = [row["step"] for row in steps]
    axes.plot(numbers, [row["density"] for row in steps], color=figures.BLUE, label="density")
    axes.set(title="Activations that are not zero", xlabel="step", ylabel="density", ylim=(0, None))
    axes.yaxis.set_major_formatter("{x:.0%}")
    if any(row["l1_weight"] for row in steps):
        weights = axes.twinx()
        weights.plot(numbers, [row["l1_weight"] for row in steps], "--", color=figures.ORANGE)
        weights.set(ylabel="weight of the L1 norm (dashed)", ylim=(0, None))
        weights.grid(visible=False)
