"""How sparse does a GELU or SiLU model become once its activation is a ReLU, and what does that cost it?

    python -m experiments pretrain --corpus TEXT.txt.xz --activation gelu
    python -m experiments relufication --source runs/pretrain/TIME --keep

Every method replaces the activation of the same model, keeps its parameters, and trains them on for a tenth of the
steps that the model has had, with or without an L1 term on the activations that grows on the way (ProSparse's sine).
"unchanged" trains the model on as it is: what the steps by themselves are worth. Then FATReLU thresholds cut off as
much as the perplexity of calibration text may rise for. Killed at any point, the same command goes on and ends the
same.

Rows: perplexity, density and the time of the dense and the sparse path of every method at every stage (source,
replaced, fine-tuned, thresholds); density of every layer, and along the way. Expected: right after replacing the
perplexity is far off, and most of it comes back within the first steps; a ReLU alone is zero more often than not, L1
makes it sparser the longer it trains, thresholds take what is left close to zero. Seen on an H200 with OPT-125M: 144.4
with its GELU, 143.5 trained on with it, 144.7 with a ReLU, of whose activations 8.4% are not zero. METHOD/model in the
run's folder is the model that came out, with its tokenizer: a `--source` for other experiments, with a `--corpus`.
"""

import dataclasses
import functools
import json
import math
import shutil
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Int, Int32
from rich.console import Console

from experiments import figures, language_models, options, pretrain, quickstart
from experiments.language_models import Data
from experiments.runs import Row, Run, markdown_table, write_atomically
from models import OPT, load_opt, save_opt
from sparsellm import evaluation, objectives, text, training
from sparsellm.checkpoint import load_config
from sparsellm.relufication import gate_activations, relufy, thresholds_for_perplexity

UNCHANGED = "unchanged"
METHODS: dict[str, dict[str, Any]] = {
    "relu": {},
    "stage 2": {"norm_relu": True},
    "shifted relu": {"activation": "shifted_relu"},
    "drelu": {"activation": "drelu"},
}
L1 = " + l1"
OF_SOURCE = ("size", "gated", "length", "dtype", "steps", "batch", "accumulate", "learning_rate", "warmup_steps")
WATCHED = 4  # held-out windows whose loss is followed step by step
POINTS = 60  # of a curve
TITLES = {"perplexity": "What it costs, and how soon it comes back", "density": "Activations that are not zero"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of ReLUfication.

    Attributes:
        source: a run of `pretrain`; None trains a model first, as `pretrain` does by default.
        corpus: the text to train that one on; None for the source of Python's standard library.
        size: its size, a preset of OPT or "tiny".
        activation: its activation.
        gated: whether that is a gate's.
        wikitext: a text with a row a line, to measure perplexity on by the published recipe; None for the text that
            was held out.
        methods: what to put in the activation's place, each with " + l1" or without.
        steps: to train on for; None for a tenth of the source's own.
        learning_rate: at the end of the warm-up, a tenth of the steps.
        l1: weight of the L1 norm in the end.
        increase: what thresholds may add to the perplexity of calibration text, as a share of it; 0 for no thresholds.
        one_threshold: one for all layers, as published, where otherwise each has its own.
        calibration: windows to choose thresholds on.
        windows: held-out windows to measure on, at most.
        prompt_tokens: of a held-out window, to continue when decoding is timed.
        new_tokens: to generate then.
        sparse_rows: tokens in a micro-tile of the sparse path that is timed.
        seed: of the order of windows, and of the model where one is trained.
    """

    source: Path | None = None
    corpus: Path | None = None
    size: str = "125m"
    activation: Literal["gelu", "silu"] = "gelu"
    gated: bool = False
    wikitext: Path | None = None
    methods: tuple[str, ...] = (UNCHANGED, "relu", "relu" + L1)
    steps: int | None = None
    learning_rate: float = 5e-4
    l1: float = 5e-3
    increase: float = 0.01
    one_threshold: bool = False
    calibration: int = 8
    windows: int = 128
    prompt_tokens: int = 32
    new_tokens: int = 64
    sparse_rows: int = 8
    seed: int = 0

    @classmethod
    def smoke(cls) -> "Config":
        """Some seconds, on one package of the standard library."""
        return cls(
            corpus=pretrain.Config.smoke().corpus,
            size="tiny",
            methods=("relu" + L1,),
            steps=20,
            learning_rate=3e-3,
            l1=1e-2,
            calibration=2,
            windows=16,
            prompt_tokens=8,
            new_tokens=4,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """The model, how it was trained, and text for it.

    Attributes:
        name: what rows call it.
        model: the model.
        training: the source's own.
        data: windows to train on and held-out ones.
        test: windows to measure perplexity on.
    """

    name: str
    model: OPT
    training: training.TrainConfig
    data: Data
    test: Int32[np.ndarray, "test_windows length_plus_1"]


def run(config: Config, run: Run) -> list[Row]:
    """Rows of the source and of every method; figures, and each method's model."""
    _check(config)
    subject = prepare(config, run)
    with language_models.compiled_in(run.folder / "compiled"):
        source, *others = measure(config, subject, subject.model)
        print(f"{subject.name}: perplexity {source['perplexity']:.2f}", flush=True)
        rows = [{"model": subject.name, "stage": "source", **row} for row in (source, *others)]
        for method in config.methods:
            folder = run.folder / method.replace(" + ", "_").replace(" ", "_")
            if not (folder / "rows.json").exists():
                found = [{"model": subject.name, **row} for row in relufied(config, subject, method, folder)]
                write_atomically(folder / "rows.json", json.dumps(found))
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            rows += json.loads((folder / "rows.json").read_text())
    shutil.rmtree(run.folder / "compiled", ignore_errors=True)
    run.show(*readme({"rows": rows}))
    return rows


def _check(config: Config) -> None:
    """What would otherwise show only after the training."""
    options.check_known(config, "methods", (UNCHANGED, *METHODS, *(name + L1 for name in METHODS)))
    options.check_least(config, 1, "steps", "calibration", "windows", "prompt_tokens", "new_tokens")
    options.check_least(config, 0, "l1", "increase", "seed")
    if config.wikitext is not None and not config.wikitext.is_file():
        raise FileNotFoundError(f"a text to evaluate on must be a file; there is no {config.wikitext}")
    if config.source is not None and not (config.source / "tokens.npz").is_file():
        raise ValueError(f"source must be the folder of a run of pretrain, with tokens.npz; got {config.source}")


def prepare(config: Config, run: Run) -> Subject:
    """The model and the text of the source's run; or of one that is made here, in the run's folder."""
    if config.source is None:
        source, trained = run.folder, pretrain.Config.smoke() if config.size == "tiny" else pretrain.Config()
        asked = {name: getattr(config, name) for name in ("corpus", "size", "activation", "gated", "seed")}
        trained = dataclasses.replace(trained, **asked, l1=())
    else:
        source = config.source
        described = load_config(source)
        if described.get("experiment") != "pretrain":
            raise ValueError(f"source must be a run of pretrain; {source} is of {described.get('experiment')}")
        trained = pretrain.Config(**{name: described["config"][name] for name in OF_SOURCE})
    if any(method.startswith("drelu") for method in config.methods) and not trained.gated:
        raise ValueError("methods must leave out drelu for a model without a gate; got gated=False")
    if config.source is None and not (source / "model").exists():
        pretrain.run(trained, run)
    model = load_opt(source / "model", dtype=trained.dtype, param_dtype="float32")
    data = language_models.load(source)
    test = data.held_out[:: max(len(data.held_out) // config.windows, 1)][: config.windows]
    if config.wikitext is not None:
        joined = evaluation.joined_rows(text.read_text(config.wikitext))
        test = evaluation.recipe_windows(joined, data.tokenizer, length=min(2048, trained.length))
    name = f"opt-{trained.size}"
    return Subject(name=name, model=model, training=pretrain.training_config(trained), data=data, test=test)


def relufied(config: Config, subject: Subject, method: str, folder: Path) -> list[Row]:
    """Replaces the activation, trains on, chooses thresholds: a row for each stage, layer and point of the way."""
    name = method.removesuffix(L1)
    graphdef, state = nnx.split(subject.model)
    model = nnx.merge(graphdef, jax.tree.map(jnp.copy, state))  # training gives its buffers away
    model = model if name == UNCHANGED else relufy(model, **METHODS[name])
    rows = [{"stage": "replaced", **row} for row in measure(config, subject, model)]
    metrics = train_on(config, subject, model, config.l1 if method.endswith(L1) else 0.0, folder)
    rows += [{"stage": "fine-tuned", **row} for row in measure(config, subject, model)]
    shown = ("step", "loss", "held_out_loss", "density", "l1", "l1_weight")
    points = metrics[:: -(-len(metrics) // POINTS)]
    rows += [{"stage": "on the way", **{name: row[name] for name in shown}} for row in points]
    if model.config.activation == "relu" and config.increase:
        model = with_thresholds(config, subject, model)
        rows += [{"stage": "thresholds", **row} for row in measure(config, subject, model)]
    save_opt(model, folder / "model", overwrite=True)
    subject.data.tokenizer.save(folder / "model")
    return [{"method": method, **row} for row in rows]


def with_thresholds(config: Config, subject: Subject, model: OPT) -> OPT:
    """FATReLU in place of ReLU, at what the perplexity of calibration text may rise by."""
    order = np.random.default_rng(config.seed).permutation(len(subject.data.train))
    calibration = np.ascontiguousarray(subject.data.train[order[: config.calibration]])
    gates = gate_activations(model, calibration[:, :-1], batch=1, per_layer=not config.one_threshold)
    return relufy(model, thresholds=thresholds_for_perplexity(model, gates, calibration, config.increase, batch=1))


def measure(config: Config, subject: Subject, model: OPT) -> list[Row]:
    """Perplexity, and the share of activations that are not zero: a row, and one a layer; and times, a row a path."""
    batch = subject.training.batch // subject.training.accumulate
    quality = evaluation.perplexity(model, subject.test, batch=batch)
    tokens = jnp.asarray(subject.data.held_out[:batch, :-1])
    layers, norms = jax.device_get(_densities(*nnx.split(model, nnx.Param), tokens))
    row: Row = {"perplexity": quality.perplexity, "accuracy": quality.accuracy, "density": float(np.mean(layers))}
    if norms:
        row["norm_density"] = float(np.mean(norms))
    if model.config.thresholds:
        row["threshold"] = float(np.mean(model.config.thresholds))
    by_layer = [{"layer": i, "density": float(density)} for i, density in enumerate(layers)]
    return [row, *by_layer, *times(config, subject, model)]


@functools.partial(jax.jit, static_argnums=0)
def _densities(graphdef: nnx.GraphDef, params: nnx.State, tokens: Int[Array, "batch length"]):
    """Of every layer's feed-forward activation; and, in stage 2, of what its norms give."""
    _, captured = nnx.capture(nnx.merge(graphdef, params), nnx.Intermediate)(tokens)
    norms = [x for path, x in jax.tree.leaves_with_path(captured) if "norm_activation" in jax.tree_util.keystr(path)]
    share = lambda x: (x != 0).mean(dtype=jnp.float32)  # noqa: E731
    return [share(x) for x in objectives.ffn_activations(captured)], [share(x) for x in norms]


def train_on(config: Config, subject: Subject, model: OPT, l1: float, folder: Path) -> list[training.Metrics]:
    """Trains in place; metrics of every step, the loss on some held-out windows among them."""
    steps = config.steps or max(subject.training.steps // 10, 1)
    fine_tuning = dataclasses.replace(
        subject.training,
        steps=steps,
        learning_rate=config.learning_rate,
        warmup_steps=min(steps // 10, steps - 1),
        checkpoint_steps=max(steps // 4, 1),
    )
    weight = None
    if l1:  # low for a quarter of the way, at its full weight for the last one
        weight = objectives.sine_stages((l1 / 10, l1), (max(steps // 4, 1), max(steps * 3 // 4, 2)))
    objective = watched(objectives.l1_objective(weight), subject.data.held_out[:WATCHED])
    return language_models.train(
        model, subject.data.train, fine_tuning, config.seed, folder, Console(), objective=objective
    )


def watched(
    objective: objectives.Objective, windows: Int32[np.ndarray, "windows length_plus_1"]
) -> objectives.Objective:
    """The same objective, with the loss on these windows, before the step, among its metrics."""

    def with_watched(model: nnx.Module, batch: Int32[Array, "batch length_plus_1"], step: Int[Array, ""]):
        value, metrics = objective(model, batch, step)
        graphdef, state = nnx.split(model)
        still = nnx.merge(graphdef, jax.tree.map(lax.stop_gradient, state))
        loss, _ = objectives.next_token_objective(still, jnp.asarray(windows), step)
        return value, {**metrics, "held_out_loss": loss}

    return with_watched


def times(config: Config, subject: Subject, model: OPT) -> list[Row]:
    """The same weights, dense and, where zeros can be skipped, on the sparse path: forward and decoding, in turns."""
    tokens = jnp.asarray(subject.data.held_out[: subject.training.batch // subject.training.accumulate, :-1])
    asked = quickstart.Config(prompt_tokens=config.prompt_tokens, new_tokens=config.new_tokens)
    sparse_rows = None if model.config.activation in ("gelu", "silu") else config.sparse_rows
    return quickstart.compare(model, subject.data, tokens, sparse_rows, asked)


def readme(result: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """Every method's perplexity and density before, right after and after the training, and its times; and figures."""
    source, *rows = result["rows"]
    methods: dict[str, dict[str, Row]] = {}
    for row in rows:
        if "perplexity" in row:
            methods.setdefault(row["method"], {})[row["stage"]] = row
    stages = ("replaced", "fine-tuned", "thresholds")
    cells = [[method, *(_cell(found.get(stage)) for stage in stages)] for method, found in methods.items()]
    sentence = f"{source['model']}, perplexity {_cell(source)} density. Perplexity at density:"
    tables = [markdown_table(cells, ["method", *stages])]
    timed = [
        [row.get("method", "source"), row.get("stage", "at the end"), row["variant"]]
        + [f"{row[name]:.3g}" for name in ("time_ms", "decode_ms")]
        for row in rows
        if "decode_ms" in row
    ]
    if timed:
        tables.append(markdown_table(timed, ["method", "stage", "path", "forward (ms)", "a token (ms)"]))
    way = [row for row in rows if row.get("stage") == "on the way"]
    images = {
        "relufication_perplexity.png": figures.draw(lambda axes: _plot(axes, way, "perplexity")),
        "relufication_density.png": figures.draw(lambda axes: _plot(axes, way, "density")),
    }
    return "\n\n".join([sentence, *tables]), images


def _cell(row: Row | None) -> str:
    return "–" if row is None else f"{row['perplexity']:.2f} at {row['density']:.1%}"


def _plot(axes, rows: list[Row], quantity: Literal["perplexity", "density"]) -> None:
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        value = math.exp(row["held_out_loss"]) if quantity == "perplexity" else row["density"]
        curves.setdefault(row["method"], []).append((row["step"], value))
    for colour, (method, points) in zip(figures.ordered_colours(len(curves)), curves.items(), strict=True):
        axes.plot(*zip(*points, strict=True), color=colour, label=method)
    axes.set(title=TITLES[quantity], xlabel="step after replacing", ylabel=quantity)
    if quantity == "density":
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.set_ylim(bottom=0)
    else:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend()
