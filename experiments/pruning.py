"""How much of a model can be pruned, by which method and in which pattern, before it predicts worse?

    python -m experiments pruning --keep                          a small OPT, trained first
    python -m experiments pruning --source runs/quickstart/TIME   the model that quickstart has trained
    python -m experiments pruning --source FOLDER --corpus C4.txt --text WIKITEXT.txt
    python -m experiments pruning --source FOLDER --corpus C4.txt --methods wanda --patterns unstructured --save

Every method prunes the same model at every sparsity in every pattern it knows, calibrated on text that is not the one
it is measured on. Heads and neurons are removed in turn, with and without recovery by LoRA. Killed at any point, the
same command goes on after the last model it has pruned. With `--save` each stays in the run's folder, with its
tokenizer: `models/wanda_unstructured_50` is then a `--source` of generate, opt_decode_pruned or unstructured_spmm.

A row a pruned model: its perplexity beside the dense one's, how many of its blocks' weights are left (`density`), and
the mean relative error of its layers' outputs on the calibration set. Expected: SparseGPT best everywhere, the more so
the higher the sparsity; and the larger what is zero as one, the worse. Of a model that has learned little half the
weights are not missed, and the others fall as they may. Seen on an H200 with OPT-125M after `pretrain`'s 1,300 steps
(perplexity 166.1): SparseGPT 166.0, magnitude 166.7, Wanda 167.1; with an L1 term (124.7): 124.5, 128.0, 128.0; after
2,600 with that and dropout (211.2): 213.2, 228.0, 220.8, and in 2:4 220.0, 267.7, 257.2.
"""

import dataclasses
import json
import re
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int32
from rich.console import Console

from experiments import language_models, options, quickstart
from experiments.runs import Row, Run, markdown_table
from models import OPT, PRESETS, OPTConfig, load_mixtral, load_opt, save_mixtral, save_opt
from sparsellm import evaluation, pruning, text, training
from sparsellm.checkpoint import load_config
from sparsellm.pruning import METHODS, NM, Pattern, Unstructured

LENGTH = 2048  # tokens a window at most, as in the papers
LOADERS = {"opt": load_opt, "mixtral": load_mixtral}
WITH_RATIOS = ("magnitude global", "wanda owl", "sparsegpt owl")  # each kernel its own sparsity
STRUCTURES = "heads and neurons"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of pruning.

    Attributes:
        source: a run of quickstart or pretrain, a checkpoint's folder with its tokenizer's files (OPT or Mixtral), or a
            hub id; None trains quickstart's model first.
        corpus: text to calibrate on (and to train on): a file, or a folder of them. None for the tokens of the run,
            or, where a model is trained, the source of Python's standard library. Part of it is held out, unless the
            source is a run, which has its own.
        text: what perplexity is measured on; None for what is held out.
        size: of the model where one is trained; "auto" is "large" on a GPU and "small" elsewhere.
        methods: the one-shot methods to compare.
        patterns: where zeros may lie: "unstructured", N:M, or ROWSxCOLS.
        sparsities: shares of zeros; n:m has its own, which methods with ratios ("wanda owl") take as the mean over
            kernels that differ in their n (4:8, not 2:4: OWL's ratios differ by less than one weight of four).
        structures: shares of heads and neurons that are removed from a model of OPT's kind.
        recovery_steps: of training after that, by LoRA.
        calibration: windows to calibrate on.
        windows: windows to measure perplexity on, at most.
        batch: windows at once.
        save: leave every pruned model in the run's folder, as models/METHOD_PATTERN_PERCENT.
        seed: of the weights, the split, and the order of windows.
    """

    source: str | None = None
    corpus: Path | None = None
    text: Path | None = None
    size: Literal["auto", "tiny", "small", "large"] = "auto"
    methods: tuple[str, ...] = (*METHODS, *WITH_RATIOS)
    patterns: tuple[str, ...] = ("unstructured", "2:4", "64x64", "32x1")
    sparsities: tuple[float, ...] = (0.5, 0.7)
    structures: tuple[float, ...] = (0.25, 0.5)
    recovery_steps: int = 100
    calibration: int = 128
    windows: int = 128
    batch: int = 8
    save: bool = False
    seed: int = 0

    @classmethod
    def smoke(cls) -> "Config":
        """Some seconds, on one package of the standard library."""
        return cls(
            corpus=Path(sysconfig.get_path("stdlib")) / "asyncio",
            size="tiny",
            methods=("magnitude", "sparsegpt", "wanda owl"),
            patterns=("unstructured", "2:4"),
            sparsities=(0.5,),
            structures=(0.5,),
            recovery_steps=5,
            calibration=8,
            windows=8,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """The model, and text for it."""

    name: str
    model: Any
    tokenizer: text.Tokenizer
    train: Int32[np.ndarray, "windows length_plus_1"]
    held_out: Int32[np.ndarray, "held_out_windows length_plus_1"]


def run(config: Config, run: Run) -> list[Row]:
    """A row for each pruned model; and a figure."""
    _check(config)
    subject = prepare(config, run)
    train, batch = subject.train, config.batch
    spread = np.random.default_rng(config.seed).permutation(len(train))[: max(config.calibration // batch, 1) * batch]
    if len(spread) < batch:
        raise ValueError(f"batch must be at most the {len(train)} windows of the corpus; got batch={batch}")
    calibration = np.ascontiguousarray(train[spread[: len(spread) // batch * batch]])
    held_out = subject.held_out[:: max(len(subject.held_out) // config.windows, 1)][: config.windows]
    dense = jax.device_get(nnx.state(subject.model))  # on the host: the device holds one model at a time
    path = run.folder / "checkpoints" / "rows.json"
    rows: list[Row] = json.loads(path.read_text()) if path.exists() else []

    def perplexity(model: Any) -> float:
        return evaluation.perplexity(model, held_out, batch=batch).perplexity

    dense_perplexity = perplexity(subject.model)
    print(f"{subject.name}: perplexity {dense_perplexity:.2f}, calibrated on {calibration[:, :-1].size:,} tokens")
    for number, (method, pattern, sparsity) in enumerate(cells(config, subject.model)):
        if number < len(rows):
            continue
        nnx.update(subject.model, jax.tree.map(jnp.asarray, dense))
        start = time.perf_counter()
        if pattern is None:
            model, measured = remove_structures(config, subject, calibration, method, sparsity)
        else:
            model, measured = subject.model, zero_weights(subject.model, calibration, method, pattern, sparsity, batch)
        seconds = round(time.perf_counter() - start, 2)
        row: Row = {"model": subject.name, "method": method, "pattern": str(pattern or STRUCTURES), **measured}
        row |= {
            "sparsity": sparsity,
            "perplexity": perplexity(model),
            "dense_perplexity": dense_perplexity,
            "time_s": seconds,
        }
        print(f"{method:20} {row['pattern']:18} {row['sparsity']:.0%}  perplexity {row['perplexity']:.2f}", flush=True)
        if config.save:
            save(model, subject.tokenizer, run.folder / "models" / saved_name(method, row["pattern"], sparsity))
        rows.append(row)
        run.write("checkpoints/rows.json", json.dumps(rows))
    nnx.update(subject.model, jax.tree.map(jnp.asarray, dense))
    run.show(*readme({"rows": rows}))
    return rows


def saved_name(method: str, pattern: str, sparsity: float) -> str:
    """Of the folder of a pruned model: "wanda_unstructured_50"."""
    return re.sub(r"[^\w.]+", "_", f"{method} {pattern} {100 * sparsity:g}")


def save(model: Any, tokenizer: text.Tokenizer, folder: Path) -> None:
    """Leaves a pruned model and its tokenizer, and says where."""
    if isinstance(model, OPT):
        save_opt(model, folder, overwrite=True)
    else:
        save_mixtral(model, folder, overwrite=True)
    tokenizer.save(folder)
    print(f"saved: {folder}", flush=True)


def _check(config: Config) -> None:
    """What would otherwise show only after the training."""
    options.check_known(config, "methods", (*METHODS, *WITH_RATIOS))
    for pattern in config.patterns:
        pruning.parse_pattern(pattern)
    options.check_shares(config, "sparsities", "structures", ends=False)
    options.check_least(config, 1, "calibration", "windows", "batch")
    options.check_least(config, 0, "recovery_steps")


def prepare(config: Config, run: Run) -> Subject:
    """Trains the model, or loads it; and its text."""
    if config.source is None:
        name = language_models.size_of(config)
        size = quickstart.SIZES[name]
        data = quickstart.prepare(quickstart.Config(corpus=config.corpus, seed=config.seed), size, run, Console())
        model = OPT(size.model, rngs=nnx.Rngs(config.seed))
        language_models.train(model, data.train, size.training, config.seed, run.folder, Console())
        held_out = data.held_out
        if config.text is not None:
            held_out = _windows(data.tokenizer, text.read_corpus(config.text).documents, size.window)
        return Subject(name=f"opt-{name}", model=model, tokenizer=data.tokenizer, train=data.train, held_out=held_out)
    earlier = Path(config.source)
    model, kind, folder = load_model(config.source)
    tokenizer = text.load_tokenizer(folder)
    name = f"opt-{_size(model.config)}" if kind == "opt" else f"{kind}-{folder.name}"
    own = language_models.load(earlier) if (earlier / language_models.TOKENS).is_file() else None
    if own is None and config.corpus is None:
        raise ValueError("corpus must be given for a model that quickstart or pretrain has not trained; got None")
    length = min(model.config.max_length, LENGTH) if own is None else own.train.shape[1] - 1  # as it was trained
    documents = [] if config.corpus is None else text.read_corpus(config.corpus).documents
    if own is None:
        parts = text.split_documents(documents, held_out=0.1, seed=config.seed)
        train, held_out = (_windows(tokenizer, part, length) for part in parts)
    else:
        train = own.train if config.corpus is None else _windows(tokenizer, documents, length)
        held_out = own.held_out
    if config.text is not None:
        held_out = _windows(tokenizer, text.read_corpus(config.text).documents, length)
    return Subject(name=name, model=model, tokenizer=tokenizer, train=train, held_out=held_out)


def _size(config: OPTConfig) -> str:
    """The published size that this is one of; else its layers and width."""
    found = [name for name, preset in PRESETS.items() if all(getattr(config, key) == preset[key] for key in preset)]
    return found[0] if found else f"{config.layers}x{config.d_model}"


def load_model(source: str, **options: Any) -> tuple[Any, str, Path]:
    """A model of any kind that can be pruned; its kind, and where it lies.

    Args:
        source: a run's folder, a checkpoint's, or a hub id.
        options: of the kind's loader.

    Raises:
        FileNotFoundError: there is no such folder, or no config.json in it.
        ValueError: it is of another kind, or its config.json is no JSON object.
    """
    folder = language_models.model_folder(source)
    kind = load_config(folder).get("model_type")
    if kind not in LOADERS:
        raise ValueError(f"source must be a model of {' or '.join(LOADERS)}; {folder} is of {kind}")
    return LOADERS[kind](folder, **options), kind, folder


def _windows(tokenizer: text.Tokenizer, documents, length: int) -> Int32[np.ndarray, "windows length_plus_1"]:
    return text.token_windows(tokenizer.encode_documents(documents), length=length)


def cells(config: Config, model: Any) -> Iterator[tuple[str, Pattern | None, float]]:
    """(method, pattern, sparsity) of every model to make; for structures the pattern is None."""
    for pattern in map(pruning.parse_pattern, config.patterns):
        for sparsity in (pattern.sparsity,) if isinstance(pattern, NM) else config.sparsities:
            for method in config.methods:
                if method not in WITH_RATIOS or _takes_ratios(pattern):
                    yield method, pattern, sparsity
    if isinstance(model, OPT):
        for share in config.structures:
            for order in (1, 2):
                yield f"taylor {order}", None, share
                if config.recovery_steps:
                    yield f"taylor {order} + lora", None, share


def _takes_ratios(pattern: Pattern) -> bool:
    """Whether methods with ratios meet it: not 2:4, as OWL's lie within 0.16 of each other, and are rounded to one."""
    return isinstance(pattern, Unstructured) or (isinstance(pattern, NM) and 0.16 * pattern.m > 1)


def zero_weights(
    model: Any,
    calibration: Int32[np.ndarray, "windows length_plus_1"],
    method: str,
    pattern: Pattern,
    sparsity: float,
    batch: int,
) -> Row:
    """Prunes the model in place; returns its density, and the mean error of its layers."""
    windows = calibration[:, :-1]
    name, _, ratios = method.partition(" ")
    shares: Any = sparsity
    if ratios == "global":
        shares = pruning.global_sparsities(model, sparsity)
    elif ratios == "owl":
        shares = pruning.owl_sparsities(model, windows, sparsity, batch=batch)
    rows = pruning.prune(
        model, METHODS[name], pattern=pattern, sparsity=shares, windows=windows, batch=batch, errors=True
    )
    kernels = {name: kernel for block in pruning.walk(model) for name, kernel in block.kernels.items()}
    zeros = sum(row["sparsity"] * kernels[row["layer"]].size for row in rows)
    total = sum(kernel.size for kernel in kernels.values())
    return {"density": round(1 - zeros / total, 4), "error": float(np.mean([row["error"] for row in rows]))}


def remove_structures(
    config: Config,
    subject: Subject,
    calibration: Int32[np.ndarray, "windows length_plus_1"],
    method: str,
    share: float,
) -> tuple[Any, Row]:
    """A smaller model, recovered where the method says so; and how many of its blocks' parameters are left."""
    order: Any = int(method.split()[1])
    layers = subject.model.config.layers
    few = range(layers) if layers <= 4 else None  # the first and the last are half of the model
    structures: Any = {"heads": share, "neurons": share, "order": order, "layers": few}
    smaller = pruning.prune_structures(subject.model, calibration, **structures)
    if method.endswith("lora"):
        steps = config.recovery_steps
        recovery = training.TrainConfig(
            steps=steps, batch=config.batch, learning_rate=1e-3, warmup_steps=steps // 10, weight_decay=0.0
        )
        batches = text.ShuffledBatches(subject.train, batch=config.batch, seed=config.seed)
        pruning.recover(smaller, batches, recovery, rngs=nnx.Rngs(config.seed))

    def parameters(model: Any) -> int:
        return sum(x.size for x in jax.tree.leaves(nnx.state(model.layers, nnx.Param)))

    return smaller, {"density": round(parameters(smaller) / parameters(subject.model), 4)}


def readme(result: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """A table of perplexities, a line a pattern and sparsity, a column a method; and a figure."""
    from experiments import figures

    rows = result["rows"]
    weights = [row for row in rows if row["pattern"] != STRUCTURES]
    methods = list(dict.fromkeys(row["method"] for row in weights))
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in weights:
        key = row["pattern"], f"{row['sparsity']:.0%}"
        found.setdefault(key, {})[row["method"]] = row["perplexity"]
    cells = [[*key, *(_number(by_method.get(method)) for method in methods)] for key, by_method in found.items()]
    parts = [f"{rows[0]['model']}, dense perplexity {rows[0]['dense_perplexity']:.2f}." if rows else "Nothing pruned."]
    if cells:
        parts.append(markdown_table(cells, ["pattern", "sparsity", *methods]))
    structures = [row for row in rows if row["pattern"] == STRUCTURES]
    if structures:
        lines = [[row["method"], f"{1 - row['density']:.0%}", _number(row["perplexity"])] for row in structures]
        parts.append(markdown_table(lines, [STRUCTURES, "parameters gone", "perplexity"]))
    return "\n\n".join(parts), {"pruning.png": figures.draw(lambda axes: _plot(axes, rows))}


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if value < 1000 else f"{value:.3g}"


def _plot(axes, rows: list[Row]) -> None:
    from experiments import figures

    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["pattern"] in ("unstructured", STRUCTURES):
            lines.setdefault(row["method"], []).append((1 - row["density"], row["perplexity"]))
    colours = {"magnitude": figures.BLUE, "wanda": figures.ORANGE, "ria": figures.GREEN, "sparsegpt": figures.PINK}
    for method, points in lines.items():  # a method's variant: its colour, dashed
        colour, variant = colours.get(method.split()[0], "#888888"), method not in colours and "lora" not in method
        style = "s--" if variant else "o-"
        axes.plot(*zip(*sorted(points), strict=True), style, color=colour, markersize=4, label=method)
    if rows:
        axes.axhline(rows[0]["dense_perplexity"], color=figures.INK, linestyle=":", label="dense")
    axes.set(title="What pruning costs", xlabel="sparsity", ylabel="perplexity", yscale="log")
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
