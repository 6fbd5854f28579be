"""Does a model of experts learn the same in sparse kernels as when every expert computes every token?

Trains a Mixtral of 50 million parameters (by default on the source of Python's own standard library, its tokenizer
trained there too) with the load-balance loss: once as it is, and once from the same weights and on the same batches
with dense one-hot dispatch in plain XLA, forward and backward. Killed at any point, the same command goes on.

    python -m experiments moe_training --keep        on a GPU

Checked are the norm of the first step's gradient, and both losses, in a row for each step: rounding lets these drift
apart slowly, as a token that is near a tie goes elsewhere.
"""

import dataclasses
import io
import statistics
import sysconfig
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int32
from rich.console import Console

from experiments import language_models, moe
from experiments.headlines import headline
from experiments.runs import Row, Run, markdown_table
from models.mixtral import Mixtral, MixtralConfig
from sparsellm import text, training
from sparsellm.mixture_of_experts import load_balance_loss
from sparsellm.objectives import next_token_loss

BALANCE = 0.01  # weight of the load-balance loss, as in the Switch Transformer
TOLERANCE = 0.02  # mean relative difference of the two losses, and of the gradient's norm before they drift
COMPILING = 3  # steps that are left out of the median time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """What fits a kind of machine: a model, and how long to train it, on windows of so many tokens."""

    model: MixtralConfig
    training: training.TrainConfig
    window: int


SIZES = {
    "tiny": Size(
        model=MixtralConfig.preset("tiny", vocab_size=320, layers=1, d_model=32, d_ff=64, experts=4, init_std=0.2),
        training=training.TrainConfig(steps=20, batch=4, learning_rate=3e-3, warmup_steps=5, checkpoint_steps=20),
        window=32,
    ),
    "small": Size(
        model=MixtralConfig.preset("tiny", vocab_size=2048, d_model=128, d_ff=256, init_std=0.08),
        training=training.TrainConfig(steps=200, batch=8, learning_rate=3e-3, warmup_steps=20),
        window=128,
    ),
    "large": Size(
        model=MixtralConfig(
            vocab_size=8192, layers=6, d_model=384, heads=6, kv_heads=2, d_ff=768, max_length=1024, dtype="bfloat16"
        ),
        training=training.TrainConfig(steps=300, batch=32, learning_rate=1e-3, warmup_steps=50, checkpoint_steps=100),
        window=512,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of moe_training.

    Attributes:
        corpus: a text file, or a folder of them; None for the source of Python's standard library.
        size: the model and how long to train it; "auto" is "large" on a GPU and "small" elsewhere.
        steps: training steps; None for the size's own.
        seed: of the initial weights and the order of the windows.
    """

    corpus: Path | None = None
    size: Literal["auto", "tiny", "small", "large"] = "auto"
    steps: int | None = None
    seed: int = 0

    @classmethod
    def smoke(cls) -> "Config":
        """A few seconds, on one package of the standard library."""
        return cls(corpus=Path(sysconfig.get_path("stdlib")) / "asyncio", size="tiny")


def run(config: Config, run: Run) -> list[Row]:
    """A row of what came of it, then one for each step; and a figure of both losses.

    Raises:
        RuntimeError: the losses do not agree.
    """
    name = language_models.size_of(config)
    size = SIZES[name]
    train_config = language_models.for_steps(size.training, config.steps)
    windows = prepare(config, size, run)
    found, parameters = {}, 0
    for variant in ("sparse", "one_hot"):
        model = moe.with_experts(Mixtral(size.model, rngs=nnx.Rngs(config.seed)), variant)
        parameters = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
        found[variant] = train(model, windows, train_config, config.seed, run, variant)
    rows = make_rows(found["sparse"], found["one_hot"])
    rows[0] = {"model": f"mixtral-{name}", "parameters": parameters, "dtype": size.model.dtype} | rows[0]
    rows[0] |= {"experts": size.model.experts, "tokens": train_config.batch * size.window}
    run.show(*readme({"rows": rows}))
    for name in ("gradient_error", "error"):
        if not rows[0][name] <= TOLERANCE:
            raise RuntimeError(f"{name} of {TOLERANCE} at most is right; got {rows[0][name]:.1e}")
    return rows


def prepare(config: Config, size: Size, run: Run) -> Int32[np.ndarray, "windows length_plus_1"]:
    """Windows of the corpus's tokens; or of those that this run has made before."""
    path = run.folder / "checkpoints" / "tokens.npy"
    if not path.exists():
        corpus = language_models.read_corpus(config.corpus)
        tokens = text.train_bpe(corpus.documents, size.model.vocab_size).encode_documents(corpus.documents)
        text.token_windows(tokens, length=size.window)  # too small a corpus is refused before anything is kept
        buffer = io.BytesIO()
        np.save(buffer, tokens)
        run.write(f"checkpoints/{path.name}", buffer.getvalue())
    return text.token_windows(np.load(path), length=size.window)


def objective(
    model: nnx.Module, windows: Int32[Array, "batch length_plus_1"], step: Int[Array, ""]
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """What is minimised, and its parts."""
    del step
    logits, captured = nnx.capture(model, nnx.Intermediate)(windows[:, :-1])
    loss, balance = next_token_loss(logits, windows[:, 1:]), load_balance_loss(captured)
    return loss + BALANCE * balance, {"loss": loss, "balance": balance}


def train(
    model: nnx.Module,
    windows: Int32[np.ndarray, "windows length_plus_1"],
    config: training.TrainConfig,
    seed: int,
    run: Run,
    variant: str,
) -> dict[str, Any]:
    """Trains one of both models.

    Returns:
        "losses" and "balances" of every step, the first one's "gradient_norm", and the median "step_ms".
    """
    folder, label = run.folder / "checkpoints" / variant, f"training, {variant:7}"
    options: dict[str, Any] = {"objective": objective, "label": label}
    metrics = language_models.train(model, windows, config, seed, folder, Console(), **options)
    seconds = [row["seconds"] for row in metrics]
    return {
        "losses": [row["loss"] for row in metrics],
        "balances": [row["balance"] for row in metrics],
        "gradient_norm": metrics[0]["gradient_norm"],
        "step_ms": round(1e3 * statistics.median(seconds[COMPILING:] or seconds), 3),
    }


def make_rows(sparse: dict[str, Any], reference: dict[str, Any]) -> list[Row]:
    """The summary, then a row for each step."""
    losses, references = np.array(sparse["losses"]), np.array(reference["losses"])
    errors = np.abs(losses - references) / references
    summary = {
        "steps": len(losses),
        "loss": sparse["losses"][-1],
        "reference_loss": reference["losses"][-1],
        "step_ms": sparse["step_ms"],
        "reference_step_ms": reference["step_ms"],
        "gradient_error": abs(sparse["gradient_norm"] / reference["gradient_norm"] - 1),
        "error": float(errors.mean()),
    }
    columns = zip(sparse["losses"], reference["losses"], sparse["balances"], errors.tolist(), strict=True)
    names = ("loss", "reference_loss", "balance", "error")
    return [summary, *({"step": i} | dict(zip(names, values, strict=True)) for i, values in enumerate(columns, 1))]


def headlines(result: dict[str, Any]) -> list[list[str]]:
    """A step, next to one-hot dispatch."""
    row = result["rows"][0]
    what = f"training step of {row['model']}, {row['experts']} experts, {row['tokens']} tokens"
    return [headline(what, row["step_ms"], "ms", row["reference_step_ms"])]


def readme(result: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """The summary and a few of the steps, and a figure of both losses."""
    from experiments import figures

    summary, *steps = result["rows"]
    shown = [steps[i] for i in sorted({round(i) for i in np.linspace(0, len(steps) - 1, 7)})]
    cells = [
        [row["step"], f"{row['loss']:.4f}", f"{row['reference_loss']:.4f}", f"{row['error']:.1e}"]
        + [f"{row['balance']:.3f}"]
        for row in shown
    ]
    head = (
        f"{summary['model']}, {summary['parameters']:,} parameters, {summary['experts']} experts, {summary['dtype']}, "
        f"{summary['tokens']:,} tokens a step: {summary['step_ms']:.1f} ms a step, {summary['reference_step_ms']:.1f} "
        f"by one-hot dispatch. The losses differ by {summary['error']:.1e} on average, the first gradient's norms by "
        f"{summary['gradient_error']:.1e}."
    )
    table = markdown_table(cells, ["step", "loss", "by one-hot dispatch", "difference", "load-balance loss"])
    return f"{head}\n\n{table}", {"moe_training.png": figures.draw(lambda axes: _plot(axes, steps))}


def _plot(axes, steps: list[Row]) -> None:
    from experiments import figures

    numbers = [row["step"] for row in steps]
    axes.plot(numbers, [row["reference_loss"] for row in steps], color=figures.ORANGE, label="one-hot dispatch")
    axes.plot(numbers, [row["loss"] for row in steps], "--", color=figures.BLUE, label="sparse kernels")
    axes.set(title="Learning with experts", xlabel="step", ylabel="loss (nats a token)")
    axes.legend(loc="upper right")
