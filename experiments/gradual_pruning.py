"""How much quicker is a training step while magnitude pruning makes weights sparser, with new masks at every step?

    python -m experiments gradual_pruning --keep                on a GPU
    python -m experiments gradual_pruning --corpus TEXT.txt     text other than the source of Python's standard library

PIT's figure 14 on this device: an OPT, of a published width and few layers, is trained from scratch by AdamW while all
kernels of its layers lose more and more blocks, those of least magnitude, by the cubic schedule of Zhu and Gupta. Two
variants of one training step: "sparse" is the model unchanged through `sparsify`, with a rule that names the pattern's
plan, so that its products, forward and for both gradients, skip zero blocks; "dense" multiplies by the masked weights
as XLA does. Both are compiled once for a pattern, before the first step: masks are part of the state, and that nothing
is compiled later is checked. In both, masked weights get no gradient, as Zhu and Gupta have it.

The sparse step trains. Whenever the schedule reaches one of the sparsities, both steps are timed from the same state,
by the clock on the wall, and compared: the loss, and the gradient of all kernels. Memory is what XLA says a step holds
at once, its state before and after among it. Killed at any point, the same command goes on with the next pattern.

Seen on an H200, in 80 s: blocks of 64x64 pay from 60% zeros on, 1.32 times as quick at 95%; 32x64 from 90% on, 1.24
times at 98%. Gradients over 32x64, and products over 32x1, are sums of parts that `scatter_matmul` stores: 32x1 takes
1.8 times the dense time at 50%, and 1.08 times at 98%. Masks and AdamW take the same time in both variants.
Sources: PIT (SOSP'23), section 5.2 and figure 14; Zhu and Gupta, "To prune, or not to prune" (2017).
"""

import dataclasses
import functools
import inspect
import itertools
import statistics
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Int32
from rich.console import Console

from experiments import language_models, opt, options, programs
from experiments.runs import Row, Run, markdown_table
from models import OPT, OPTConfig
from sparsellm import determinism, pruning, text, training
from sparsellm.objectives import Objective, next_token_objective
from sparsellm.pruning import Blocks, GradualConfig
from sparsellm.pruning.gradual import cubic_sparsity
from sparsellm.sparsify import Rule, sparsify

# Largest relative difference of both variants' losses, and of their gradients: rounding, by other orders of sums.
TOLERANCES = {"bfloat16": (5e-3, 5e-2), "float32": (1e-3, 5e-3)}
PREFIXES = {"dense": "dense_", "sparse": ""}  # of a variant's columns
ADAM_B1 = 0.9  # optax's default

type Step = Callable[..., tuple[list[Array], Array]]
"""(state as a list, windows) -> the state after the step, and the loss before it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of gradual_pruning.

    Attributes:
        corpus: a text file, or a folder of them; None for the source of Python's standard library.
        size: of OPT, 125m to 175b, whose widths are taken, or tiny.
        layers: how many of its layers.
        vocabulary: tokens of the byte-level BPE that is trained on the corpus.
        patterns: blocks that are zero as one, INPUTSxOUTPUTS of a kernel.
        sparsities: shares of zero blocks to measure at, rising; training ends with the last one.
        steps: of training.
        warmup_steps: of the learning rate; the first mask is made after them.
        batch: windows a step.
        length: tokens a window.
        learning_rate: at the end of the warm-up; a cosine takes it down to a tenth.
        dtype: what is computed in; parameters and their sums are float32.
        repeats: timed steps of each variant, of which the median is given.
        seed: of the initial weights and the order of windows.
    """

    corpus: Path | None = None
    size: str = "1.3b"
    layers: int = 2
    vocabulary: int = 2048
    patterns: tuple[str, ...] = ("64x64", "32x64", "32x1")
    sparsities: tuple[float, ...] = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
    steps: int = 200
    warmup_steps: int = 20
    batch: int = 32
    length: int = 128
    learning_rate: float = 5e-4
    dtype: str = "bfloat16"
    repeats: int = 5
    seed: int = 0

    @classmethod
    def smoke(cls) -> "Config":
        """Some seconds, on one package of the standard library."""
        return cls(
            corpus=Path(sysconfig.get_path("stdlib")) / "asyncio",
            size="tiny",
            layers=1,
            vocabulary=320,
            patterns=("8x8",),
            sparsities=(0.0, 0.5, 0.9),
            steps=12,
            warmup_steps=2,
            batch=4,
            length=16,
            learning_rate=3e-3,
            dtype="float32",
            repeats=1,
        )


def run(config: Config, run: Run) -> list[Row]:
    """A row for each pattern and sparsity, and a figure."""
    _check(config)
    sizes = {"tokenizer": config.vocabulary, "length": config.length, "held_out": 0.05, "seed": config.seed}
    data = language_models.prepare(run, Console(), corpus=config.corpus, **sizes)
    rows = []
    for pattern in config.patterns:
        rows += run.remembered(
            pattern, functools.partial(train, config, pattern, data.train, data.tokenizer.vocab_size)
        )
    run.show(*readme({"rows": rows}))
    return rows


def _check(config: Config) -> None:
    """What would otherwise show only after the corpus was read, or some steps of training."""
    options.check_filled(config, "patterns", "sparsities")
    options.check_known(config, "dtype", tuple(TOLERANCES))
    model_config(config, config.vocabulary)
    options.check_least(config, 1, "layers", "steps", "batch", "length", "repeats")
    options.check_least(config, 0, "warmup_steps", "seed")
    rising = all(low < high for low, high in itertools.pairwise((*config.sparsities, 1)))
    if not rising or config.sparsities[0] < 0 or config.sparsities[-1] == 0:
        raise ValueError(f"sparsities must rise, to less than 1 and more than 0; got sparsities={config.sparsities}")
    for pattern in config.patterns:
        if not isinstance(pruning.parse_pattern(pattern), Blocks):
            raise ValueError(f"patterns must be ROWSxCOLS, blocks that have a plan; got {pattern}")
        if len(steps_of(config, pattern)) < len(config.sparsities):
            raise ValueError(f"steps must be enough to tell sparsities apart; got steps={config.steps}")


def model_config(config: Config, vocabulary: int) -> OPTConfig:
    """The model: its weights are kept in float32, and start as large as small models' do."""
    sizes = {"layers": config.layers, "vocab_size": vocabulary, "max_length": config.length, "init_std": 0.02}
    return dataclasses.replace(opt.config_of(config.size, config.dtype), param_dtype="float32", **sizes)


def schedule(config: Config, pattern: str) -> tuple[training.TrainConfig, GradualConfig]:
    """How it is trained, and pruned meanwhile."""
    trained = training.TrainConfig(
        steps=config.steps,
        batch=config.batch,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
    )
    blocks, last = pruning.parse_pattern(pattern), config.sparsities[-1]
    return trained, GradualConfig(sparsity=last, begin=config.warmup_steps, end=config.steps, pattern=blocks)


def masked_objective(
    model: nnx.Module, windows: Int32[Array, "batch length_plus_1"], step: Int[Array, ""]
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss of a model whose kernels are multiplied as they are, and are masked: what is zero gets no gradient."""
    for block in pruning.walk(model):
        for kernel in block.kernels.values():
            kernel[...] = jnp.where(kernel[...] != 0, kernel[...], 0)
    return next_token_objective(model, windows, step)


def sparse_objective(pattern: str) -> Objective:
    """The same loss by products that skip the layers' zero blocks, as their gradients do."""
    blocks: Any = pruning.parse_pattern(pattern)
    kernels = Rule(r"layers\..*kernel", blocks.plan, sparse="b", masked=True)
    return sparsify(next_token_objective, rules=[kernels, Rule("", "skip")])


def prepare(config: Config, pattern: str, vocabulary: int) -> tuple[list[Array], Callable[..., Any], dict[str, Step]]:
    """A training that has not begun, whose state is a list: that is handed over quickly, a state in milliseconds.

    Returns:
        The list as it starts; such a list as a `training.TrainState`; and both variants of the step, not compiled.
    """
    trained, gradual = schedule(config, pattern)
    transformation = pruning.gradually_pruned(training.optimizer(trained), gradual)
    graphdef, params = nnx.split(OPT(model_config(config, vocabulary), rngs=nnx.Rngs(config.seed)), nnx.Param)
    leaves, tree = jax.tree.flatten(training.TrainState(params, transformation.init(params)))
    train_step = inspect.unwrap(training.train_step)  # without jit, which would give the state away: it is timed again

    def step(objective: Objective, leaves: list[Array], windows: Int32[Array, "batch length_plus_1"]):
        after, metrics = train_step(graphdef, transformation, tree.unflatten(leaves), windows, objective)
        return jax.tree.leaves(after), metrics["loss"]

    objectives = {"dense": masked_objective, "sparse": sparse_objective(pattern)}
    return leaves, tree.unflatten, {variant: functools.partial(step, loss) for variant, loss in objectives.items()}


def compare(before: training.TrainState, dense: training.TrainState, sparse: training.TrainState) -> dict[str, Array]:
    """Of the layers' kernels: the share of zeros before a step, and how much both variants' gradients differ.

    AdamW's first moment is (1 - b1) times the gradient, clipped, and b1 times what it was.
    """
    was, moments, others = (_kernels(optax.tree.get(state.opt_state, "mu")) for state in (before, dense, sparse))
    gradient = optax.tree.norm([x - ADAM_B1 * old for x, old in zip(moments, was, strict=True)])
    difference = optax.tree.norm([x - other for x, other in zip(moments, others, strict=True)])
    kernels = _kernels(before.params)
    zeros = sum((jnp.sum(x == 0, dtype=jnp.int32).astype(jnp.float32) for x in kernels), jnp.float32(0))
    share = zeros / sum(x.size for x in kernels)
    return {"zeros": share, "error": jnp.where(difference == 0, 0, difference / gradient)}


def _kernels(params: Any) -> list[Array]:
    named = ((jax.tree_util.keystr(path), x) for path, x in jax.tree.leaves_with_path(params))
    return [x for name, x in named if "layers" in name and "kernel" in name]


def train(
    config: Config, pattern: str, windows: Int32[np.ndarray, "windows length_plus_1"], vocabulary: int
) -> list[Row]:
    """Trains by the sparse step; a row for each sparsity on the way.

    Raises:
        RuntimeError: the variants' losses or gradients differ, or something was compiled after the first step.
    """
    leaves, state, steps = prepare(config, pattern, vocabulary)
    batches = text.ShuffledBatches(windows, batch=config.batch, seed=config.seed)
    about: Row = {"model": f"opt-{config.size}, {config.layers} layers", "dtype": config.dtype}
    about |= {"tokens": config.batch * config.length, "pattern": pattern}
    ready: dict[str, Any] = {}
    for variant, step in steps.items():
        start = time.perf_counter()
        jitted = jax.jit(step, compiler_options=determinism.COMPILER_OPTIONS)
        ready[variant] = jitted.lower(leaves, jnp.asarray(batches[0])).compile()
        about[f"{PREFIXES[variant]}memory_gib"] = programs.memory_gib(ready[variant])
        print(f"{pattern}, {variant}: compiled in {time.perf_counter() - start:.1f} s", flush=True)
    comparison = jax.jit(lambda *three: compare(*map(state, three))).lower(leaves, leaves, leaves).compile()
    due, rows = steps_of(config, pattern), []
    with programs.compilations() as compiled:
        for number in range(config.steps + 1):
            arguments = [leaves, jnp.asarray(batches[number])]
            if number in due:
                row = about | {"sparsity": due[number], "step": number}
                rows.append(row | measure(config, ready, comparison, arguments))
                said = "{pattern}, {zeros:.1%} zeros: {time_ms} ms a step, dense {dense_time_ms}, loss {loss:.3f}"
                print(said.format_map(rows[-1]), flush=True)
            leaves, loss = ready["sparse"](*arguments)
            jax.block_until_ready(loss)  # states that nobody waits for would pile up
            if number == 0:
                compiled.clear()  # whatever the first step did
    if compiled:
        raise RuntimeError(f"new masks must compile nothing; with {pattern} they compiled {len(compiled)} programs")
    return [row | {"compiled": len(compiled)} for row in rows]


def steps_of(config: Config, pattern: str) -> dict[int, float]:
    """By the steps before it, the sparsity that the last mask of at most that has."""
    sparsity = functools.partial(cubic_sparsity, schedule(config, pattern)[1])
    reached = np.asarray(jax.vmap(sparsity)(jnp.arange(config.steps + 1)))
    return {int(np.searchsorted(reached, asked + 1e-6, side="right")) - 1: asked for asked in config.sparsities}


def measure(config: Config, steps: dict[str, Any], comparison: Callable[..., Any], arguments: list[Any]) -> Row:
    """Times both variants of a step from one state, and compares them.

    Raises:
        RuntimeError: their losses or their gradients differ.
    """
    row, after = {}, {}
    for variant, prefix in PREFIXES.items():
        (after[variant], loss), times = programs.wall_clock(steps[variant], arguments, config.repeats)
        row |= {f"{prefix}loss": float(loss), f"{prefix}time_ms": round(statistics.median(times) / 1e3, 3)}
    found = comparison(arguments[0], after["dense"], after["sparse"])
    row |= {name: float(x) for name, x in found.items()} | {"speedup": round(row["dense_time_ms"] / row["time_ms"], 3)}
    differences = {"losses": abs(row["loss"] / row["dense_loss"] - 1), "gradients": row["error"]}
    for (what, difference), limit in zip(differences.items(), TOLERANCES[config.dtype], strict=True):
        if not difference <= limit:
            raise RuntimeError(f"{what} of the dense and the sparse step differ by {difference:.1e}, above {limit}")
    return row


def readme(result: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """A line for each pattern and sparsity, and a figure of the time of a step."""
    from experiments import figures

    rows, first = result["rows"], result["rows"][0]
    head = (
        f"{first['model']}, {first['dtype']}, {first['tokens']:,} tokens a step. Programs compiled after the first "
        f"step: {sum({row['pattern']: row['compiled'] for row in rows}.values())}."
    )
    cells = [
        [row["pattern"], f"{row['zeros']:.1%}", row["step"], f"{row['loss']:.4f}", f"{row['dense_loss']:.4f}"]
        + [f"{row['error']:.0e}", f"{row['time_ms']:.2f}", f"{row['dense_time_ms']:.2f}", f"{row['speedup']:.2f}x"]
        + [f"{row['memory_gib']:.2f}", f"{row['dense_memory_gib']:.2f}"]
        for row in rows
    ]
    header = ["pattern", "zeros", "step", "loss", "dense", "gradients differ by", "ms a step", "dense (ms)", "speedup"]
    table = markdown_table(cells, [*header, "GiB", "dense (GiB)"])
    return f"{head}\n\n{table}", {"gradual_pruning.png": figures.draw(lambda axes: _plot(axes, rows))}


def _plot(axes, rows: list[Row]) -> None:
    from experiments import figures

    patterns = list(dict.fromkeys(row["pattern"] for row in rows))
    for colour, pattern in zip(figures.ordered_colours(len(patterns)), patterns, strict=True):
        own = [row for row in rows if row["pattern"] == pattern]
        zeros = [100 * row["zeros"] for row in own]
        axes.plot(zeros, [row["time_ms"] for row in own], "o-", color=colour, markersize=4, label=pattern)
        axes.plot(zeros, [row["dense_time_ms"] for row in own], "--", color=colour, linewidth=1)
    axes.plot([], [], "--", color=figures.INK, linewidth=1, label="dense")
    axes.set(title="A training step, new masks each time", xlabel="zero weights (%)", ylabel="time a step (ms)")
    axes.set_ylim(bottom=0)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
