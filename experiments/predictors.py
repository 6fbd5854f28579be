"""Can the neurons that a token will activate be told beforehand, cheaply enough and well enough to read no others?

    python -m experiments predictors --source runs/pretrain/TIME --keep      a model that `pretrain` has trained
    python -m experiments predictors                                         a small OPT, trained first

Counts how sparse the model's feed-forward activations are: by layer, for one token and for the union of many, and how
much of it a few hot neurons do. Then collects activations, trains Deja Vu's predictors on them (from the block's own
input; the same with their weights in 8 bits; looking ahead, from what enters the layer; and for heads), and sets them
beside what needs no training: an SVD of fc1, CATS (here the gate is fc1 itself: what the best choice of as many neurons
would lose), TEAL's thresholds. "trained svd" begins Deja Vu's training with the SVD, and has fc1's biases to begin
with. Thresholds are chosen on held-out windows that nothing was trained on, everything is measured on others. Last, the
model decodes with the predictor that loses at most `loss` of perplexity. Killed at any point, the same command goes on.

Rows: density by layer and span; a row for each method and wish (`budget`: neurons over those that truly fire, or
`recall_wanted`), with recall, precision, density and perplexity; of the chosen predictor every layer, and decoding,
with how many tokens of the lists' text their simulation would write too. Seen on an H200, in two to four minutes: with
the model that `pretrain` makes there, at the true density the trained predictor recalls 90 to 92% and the SVD 86 to
91%, and both lose less than 0.1% of perplexity. With one that had an L1 term, 2.2% of whose neurons fire, and a rank of
256: 80% and 78%, "trained svd" 77%, for 0.5%, 0.7% and 0.6% more perplexity; at 1.5 times the true density 0.1% each,
looking ahead 4%. With one that had that, dropout and twice the steps, and a rank of 96: 72% and 66%, for 10% and 60%
more perplexity, and at 1.5 times the true density 4% and 22%.
"""

import dataclasses
import functools
import math
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jaxtyping import Int32

from experiments import options, pruning
from experiments.language_models import progress
from experiments.predicted_decoding import decoded_perplexity, measure_decoding
from experiments.predictor_figures import line, readme
from experiments.runs import Row, Run
from models import OPT, OPTConfig
from models.activations import ACTIVATIONS
from models.feed_forward import LISTED
from models.opt import with_predictors
from sparsellm.activations import SPANS, Activations, collect, measure
from sparsellm.evaluation import perplexity
from sparsellm.predictors import (
    EightBitPredictor,
    GatePredictor,
    Heads,
    LowRankPredictor,
    Neurons,
    Predictor,
    PredictorConfig,
    calibrate,
    calibrate_for_quality,
    load_predictors,
    measure_predictors,
    save_predictors,
    train_predictors,
    with_input_thresholds,
)

METHODS = ("trained", "8-bit", "ahead", "svd", "trained svd", "cats", "heads", "teal")
MOST_AT_ONCE = 16  # windows that decode together
HOT = 0.1  # of the neurons, those that fire most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of predictors.

    Attributes:
        source: as of `pruning`: a run, or a checkpoint's folder with its tokenizer's files; None trains quickstart's
            model first.
        corpus: as of `pruning`.
        text: what everything is chosen and measured on; None for what is held out.
        size: of the model where one is trained; "auto" is "large" on a GPU and "small" elsewhere.
        methods: what to compare.
        rank: of predictors; None for an eighth of d_model (the published 1000 are a twelfth of OPT-175B's).
        epochs: of training, at most.
        training: windows to train predictors on.
        windows: windows to choose thresholds on, and again so many to measure on, at most.
        batch: windows at once.
        budgets: neurons to predict in each layer, over those that truly fire.
        recalls: to predict for instead.
        sparsities: of inputs, for TEAL.
        loss: the rise of perplexity that is allowed to the predictor that decodes.
        batches: sequences that decode together.
        per_sequence: whether each of these computes its own neurons only, as where perplexity is measured; or those of
            all of them, which are read anyway.
        prompt_tokens: of a window, to continue.
        new_tokens: to generate.
        seed: of the weights, the split, and the order of windows.
    """

    source: str | None = None
    corpus: Path | None = None
    text: Path | None = None
    size: Literal["auto", "tiny", "small", "large"] = "auto"
    methods: tuple[str, ...] = METHODS
    rank: int | None = None
    epochs: int = 20
    training: int = 128
    windows: int = 16
    batch: int = 8
    budgets: tuple[float, ...] = (0.5, 1.0, 1.25, 1.5, 2.0, 3.0)
    recalls: tuple[float, ...] = (0.9, 0.95, 0.99)
    sparsities: tuple[float, ...] = (0.25, 0.4, 0.5)
    loss: float = 0.01
    batches: tuple[int, ...] = (1, 8)
    per_sequence: bool = False
    prompt_tokens: int = 32
    new_tokens: int = 64
    seed: int = 0

    @classmethod
    def smoke(cls) -> "Config":
        """Some seconds, on one package of the standard library."""
        return cls(
            corpus=Path(sysconfig.get_path("stdlib")) / "asyncio",
            size="tiny",
            rank=16,
            epochs=4,
            training=32,
            windows=8,
            budgets=(1.0, 1.5),
            recalls=(0.95,),
            sparsities=(0.4,),
            loss=0.1,
            batches=(1, 2),
            prompt_tokens=8,
            new_tokens=8,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """The model; windows to train on, to choose on, to measure on; and activations of each."""

    name: str
    model: OPT
    rank: int
    choose: Int32[np.ndarray, "windows length_plus_1"]
    test: Int32[np.ndarray, "windows length_plus_1"]
    activations: dict[str, Activations]

    @functools.cached_property
    def dense_perplexity(self) -> float:
        return perplexity(self.model, self.test).perplexity

    def quality(self, predictors: Sequence[Predictor], windows: Int32[np.ndarray, "windows length_plus_1"]) -> float:
        """Perplexity where every token has only the neurons that are predicted for it."""
        return perplexity(with_predictors(self.model, predictors, "mask_everywhere"), windows).perplexity

    def quality_of_heads(
        self, predictors: Sequence[Predictor], windows: Int32[np.ndarray, "windows length_plus_1"]
    ) -> float:
        """Perplexity where every token has only the heads that are predicted for it."""
        listed = with_predictors(self.model, None, head_predictors=predictors)
        return decoded_perplexity(listed, windows, math.gcd(len(windows), MOST_AT_ONCE))


def run(config: Config, run: Run) -> list[Row]:
    """Rows of the model, of each method, of the chosen predictor; figures, and the predictors."""
    _check(config)
    subject = prepare(config, run)
    print(f"{subject.name}: perplexity {subject.dense_perplexity:.2f}", flush=True)
    rows: list[Row] = [{"model": subject.name, "perplexity": subject.dense_perplexity, "method": "dense"}]
    rows += run.remembered("statistics", lambda: statistics(config, subject))
    for method in config.methods:
        rows += run.remembered(method, lambda: compare(config, subject, method, run))  # noqa: B023 - called at once
    rows += run.remembered("chosen", lambda: decode(config, subject, run))
    run.show(*readme({"rows": rows}))
    return rows


def _check(config: Config) -> None:
    """What would otherwise show only after the training."""
    options.check_known(config, "methods", METHODS)
    options.check_least(config, 1, "rank", "epochs", "training", "windows", "batch", "prompt_tokens", "new_tokens")
    for name in ("training", "windows"):
        if getattr(config, name) % config.batch:
            raise ValueError(f"batch must divide {name}; got batch={config.batch}, {name}={getattr(config, name)}")
    for name in ("budgets", "batches"):
        if min(getattr(config, name), default=1) <= 0:
            raise ValueError(f"{name} must be above 0; got {name}={getattr(config, name)}")
    options.check_shares(config, "recalls", "sparsities", ends=False)
    if config.loss <= 0:
        raise ValueError(f"loss must be above 0; got loss={config.loss}")


def _check_model(config: Config, model: OPT, rank: int, test: Int32[np.ndarray, "windows length_plus_1"]) -> None:
    """What would otherwise show only after the predictors' training."""
    if not isinstance(model, OPT):
        raise ValueError(f"source must be an OPT, whose neurons and heads can be left out; got {type(model).__name__}")
    if not 1 <= rank <= model.config.d_model:
        raise ValueError(f"rank must be 1 to d_model={model.config.d_model}; got rank={rank}")
    if max(config.batches, default=1) > len(test):
        raise ValueError(f"batches must be at most the {len(test)} windows to measure on; got {config.batches}")
    room = min(test.shape[1], model.config.max_length - config.new_tokens)
    if config.prompt_tokens > room:
        raise ValueError(f"prompt_tokens must be at most {room} here; got prompt_tokens={config.prompt_tokens}")


def prepare(config: Config, run: Run) -> Subject:
    """The model, its text in three parts, and what the model's blocks see of them."""
    asked = pruning.Config(
        source=config.source, corpus=config.corpus, text=config.text, size=config.size, seed=config.seed
    )
    loaded = pruning.prepare(asked, run)
    model, batch = loaded.model, config.batch
    order = np.random.default_rng(config.seed).permutation(len(loaded.train))
    parts = {"train": loaded.train[order[: config.training]]}
    parts |= {"choose": loaded.held_out[::2][: config.windows], "test": loaded.held_out[1::2][: config.windows]}
    for name, part in parts.items():
        parts[name] = np.ascontiguousarray(part[: len(part) // batch * batch])
        if not len(parts[name]):
            raise ValueError(f"batch must be at most the {len(part)} windows of text to {name}; got batch={batch}")
    rank = max(model.config.d_model // 8, 1) if config.rank is None else config.rank
    _check_model(config, model, rank, parts["test"])
    kinds = ["ffn_inputs", "fires"] + ["hidden"] * bool({"ahead", "heads"} & set(config.methods))
    kinds += ["head_norms"] * ("heads" in config.methods)
    activations = {}
    for name, part in parts.items():
        folder = run.folder / "checkpoints" / "activations" / name
        with progress(f"activations to {name}", len(part) // batch) as advance:
            report = lambda done, _, advance=advance: advance(done, "")  # noqa: E731
            activations[name] = collect(model, part[:, :-1], folder, kinds=kinds, batch=batch, report=report)
    texts = {"choose": parts["choose"], "test": parts["test"]}
    return Subject(name=loaded.name, model=model, rank=rank, activations=activations, **texts)


def statistics(config: Config, subject: Subject) -> list[Row]:
    """Of each layer the density for one token and for many, and how much the hottest neurons fire."""
    windows = subject.test[:, :-1]
    spans = [span for span in SPANS if span <= windows.shape[1]]
    found = measure(subject.model, windows, spans=spans, batch=config.batch)
    rows = [
        {"layer": layer, "granularity": f"{span}x1", "density": density}
        for span in spans
        for layer, density in enumerate(found.union[span])
    ]
    for layer, fires in enumerate(found.fires):
        descending = np.sort(fires)[::-1]
        hot = descending[: max(round(HOT * len(fires)), 1)].sum() / max(fires.sum(), 1)
        quantiles = descending[np.linspace(0, len(fires) - 1, 50).astype(int)] / found.tokens
        rows.append(
            {"layer": layer, "hot": float(hot), "dead": float(np.mean(fires == 0)), "fires": quantiles.tolist()}
        )
    return rows


def predictors_of(config: Config, subject: Subject, method: str, run: Run) -> Sequence[Predictor]:
    """A method's predictor of each layer."""
    model = subject.model
    if method == "svd":
        return svd_predictors(subject)
    if method == "cats":
        activation = ACTIVATIONS[model.config.activation]
        return [GatePredictor(layer.fc1.kernel[...], layer.fc1.bias[...], activation) for layer in model.layers]
    if method == "8-bit":
        return [predictor.in_8_bits() for predictor in trained_predictors(config, subject, "trained", run)]
    return trained_predictors(config, subject, method, run)


def svd_predictors(subject: Subject) -> list[LowRankPredictor]:
    """What needs no training."""
    kernels = [(layer.fc1.kernel[...], layer.fc1.bias[...]) for layer in subject.model.layers]
    return [LowRankPredictor.from_svd(kernel, bias, rank=subject.rank) for kernel, bias in kernels]


def trained_predictors(config: Config, subject: Subject, method: str, run: Run) -> list[LowRankPredictor]:
    """Of the methods trained, trained svd, ahead and heads: trained, gone on with, or read if they are there."""
    model = subject.model
    folder = run.folder / "predictors" / method
    if folder.exists():
        return load_predictors(folder, model)
    target = Heads() if method == "heads" else Neurons()
    changes: dict[str, Any] = {} if method == "heads" else {"look_ahead": method == "ahead"}
    recipe = PredictorConfig.preset(target, rank=subject.rank, epochs=config.epochs, seed=config.seed, **changes)
    with progress(f"training {method}", recipe.epochs) as advance:

        def report(row: Row) -> None:
            advance(row["epoch"], f"recall {np.mean(row['recall']):.1%}  precision {np.mean(row['precision']):.1%}")

        training = run.folder / "checkpoints" / f"training_{method}"
        kept: Any = {"target": target, "folder": training, "report": report}
        kept["start"] = svd_predictors(subject) if method == "trained svd" else None
        predictors = train_predictors(subject.activations["train"], recipe, **kept)
    save_predictors(predictors, folder, model)
    return predictors


def compare(config: Config, subject: Subject, method: str, run: Run) -> list[Row]:
    """A method's row for every budget and recall."""
    if method == "teal":
        return [teal(config, subject, sparsity) for sparsity in config.sparsities]
    predictors = predictors_of(config, subject, method, run)
    target = Heads() if method == "heads" else Neurons()
    choose, test = subject.activations["choose"], subject.activations["test"]
    fire = [int(np.bitwise_count(target.bits(choose, i)).sum()) / choose.tokens for i in range(choose.layers)]
    widths = target.widths(choose)
    rows = []
    for wish in ("budget", "recall_wanted"):
        for value in config.budgets if wish == "budget" else config.recalls:
            if wish == "budget":
                neurons = [min(value * count, float(width)) for count, width in zip(fire, widths, strict=True)]
                calibrate(predictors, choose, neurons=neurons, target=target)
            else:
                calibrate(predictors, choose, recall=value, target=target)
            layers = measure_predictors(predictors, test, target=target)
            row: Row = {"method": method, wish: value, **mean(layers), "predictor_share": cost(subject, predictors)}
            quality = subject.quality_of_heads if method == "heads" else subject.quality
            row |= {"perplexity": quality(predictors, subject.test), "dense_perplexity": subject.dense_perplexity}
            rows.append(row | described(predictors))
            print(line(rows[-1]), flush=True)
    return rows


def teal(config: Config, subject: Subject, sparsity: float) -> Row:
    """The perplexity where the products of all layers skip a share of their inputs."""
    sparse = with_input_thresholds(subject.model, subject.choose[:, :-1], sparsity, batch=config.batch)
    row = {"method": "teal", "sparsity": sparsity, "density": 1 - sparsity}
    row |= {"perplexity": perplexity(sparse, subject.test).perplexity, "dense_perplexity": subject.dense_perplexity}
    print(line(row), flush=True)
    return row


def mean(layers: Sequence[Row]) -> Row:
    """Over layers, of what is measured of each."""
    names = ("recall", "precision", "density", "true_density", "neurons")
    return {name: float(np.mean([row[name] for row in layers])) for name in names}


def described(predictors: Sequence[Predictor]) -> Row:
    """The rank of low-rank predictors, and whether they look ahead."""
    first = predictors[0]
    if not isinstance(first, LowRankPredictor | EightBitPredictor):
        return {}
    return {"rank": min(first.down.shape), "look_ahead": first.look_ahead}


def cost(subject: Subject, predictors: Sequence[Predictor]) -> float:
    """Weights that a prediction reads, over those of the feed-forward blocks."""
    arrays = [x for predictor in predictors for x in jax.tree.leaves(nnx.state(predictor))]
    blocks = sum(layer.fc1.kernel.size + layer.fc2.kernel.size for layer in subject.model.layers)
    return sum(x.size for x in arrays) / blocks


def decode(config: Config, subject: Subject, run: Run) -> list[Row]:
    """Chooses a trained predictor's thresholds for the allowed loss; its layers, and the time of decoding with it.

    It is the SVD that was trained further, if that is among the methods.
    """
    method = "trained svd" if "trained svd" in config.methods else "trained"
    predictors = trained_predictors(config, subject, method, run)
    limit = perplexity(subject.model, subject.choose).perplexity * (1 + config.loss)
    quality = functools.partial(subject.quality, predictors, subject.choose)
    wanted = calibrate_for_quality(predictors, subject.activations["choose"], quality, limit)
    save_predictors(predictors, run.folder / "predictors" / "chosen", subject.model, overwrite=True)
    common = {"method": method, "loss": config.loss, "recall_wanted": wanted, **described(predictors)}
    whole = {
        "perplexity": subject.quality(predictors, subject.test),
        "dense_perplexity": subject.dense_perplexity,
        "predictor_share": cost(subject, predictors),
    }
    layers = measure_predictors(predictors, subject.activations["test"], batches=config.batches)
    rows = [common | row for row in layers]
    for batch in config.batches:
        rows.append(common | {"batch": batch, **mean([row for row in layers if row["batch"] == batch]), **whole})
        if can_list(subject.model.config):
            prompts = subject.test[:batch, : config.prompt_tokens]
            asked = {"new_tokens": config.new_tokens, "per_sequence": config.per_sequence}
            rows[-1] |= measure_decoding(subject.model, predictors, prompts, **asked)
    return rows


def can_list(config: OPTConfig) -> bool:
    """Whether `neuron_ffn` knows such feed-forward blocks."""
    return config.activation in LISTED and not config.gated and config.thresholds is None
