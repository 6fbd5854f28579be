"""How many milliseconds does OPT take for a token when only the neurons that a predictor names are read?

    python -m experiments opt_decode --profile opt_active_neurons.csv --keep          on a GPU
    python -m experiments opt_decode --source CHECKPOINT --predictors FOLDER
    python -m experiments opt_decode --sizes 66b --devices 2
    python -m experiments opt_decode --heads 0.5                                      and over half of the heads

Timed is `sparsellm.decoding.decode`, the compiled loop that `generate` runs: wall-clock time of a chunk of steps, by
the step. Dense and sparse run the same parameters; the predictor, a low-rank pair a layer that looks ahead, is part of
the sparse loop, and so is making its answer a list. The bound is the time of a step's bytes: parameters (of listed
neurons, where it is sparse), predictors and all slots of the cache, of which the timed steps read nine tenths. Every
sparse row is checked: in one more step, what the feed-forward blocks give, against all neurons in float32 with those
that are not listed set to zero.

Without a checkpoint the weights are random, and fitted so that neurons fire as often as the profile says; predictors
then name as many neurons as the profile, of a batch together, but not those that fire: "(synthetic)" stands in the
model's name, and tokens are drawn evenly, so that a batch's differ as real ones do. Without a profile, 5% of the
neurons fire for a token, and of a batch of B sqrt(B) times as many. A batch for whose cache there is no room beside the
model is left out, which is said.

Seen on an H200, OPT-30B with predictors of rank 1024 in 8 bits: at batch 1 dense 15.2 ms and sparse 8.3, at batch 8
16.0 and 10.1; half a minute a batch, and before them 45 s for transformers. OPT-66B fits beside its predictors with
`XLA_PYTHON_CLIENT_MEM_FRACTION=0.98`, `--context 64` and `--steps 16`. By 8 bits a layer's two thin products take
18 us at batch 1, by 16 bits 25.

A layer's launches there, at batch 1, are 161 us: four products of 7168 x 7168 104 (4.0 TB/s), the predictor's two 19
(2 TB/s), `neuron_ffn` 19 and XLA's sum of it 2, ten small ones 17. By heads, 36% of them, 142: two of the four products
52, the two by `listed_matmul` 25, the predictors' 22, `neuron_ffn` and its sum 19, small ones 24. So the step takes 7.5
ms instead of 8.5, 0.2 of which because those predictors named fewer neurons: what enters a layer is not what it was
where they were fitted. At batch 8, where some text lists three quarters of the heads, 9.9 instead of 10.2 is no gain,
as the fewer neurons make up for 0.4. Long contexts are what heads are for: OPT-6.7B behind 1920 tokens takes 9.0 ms at
batch 32 with 55% of the heads, with all of them 11.5.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from experiments import opt, options
from experiments.headlines import headline
from experiments.runs import Row, Run, markdown_table
from models import OPT, with_predictors
from models.activations import ACTIVATIONS
from models.attention import KVCache, Places, place_tokens
from models.synthetic import fit_table, random_tokens
from pallas_kernels.neuron_ffn.config import MAX_BATCH
from pallas_kernels.workbench.gpus import find_gpu
from sparsellm import memory
from sparsellm.decoding import GREEDY, Rows, on_mesh
from sparsellm.predictors import Predictor, PredictorParam
from sparsellm.pruning.walk import walk

TOLERANCES = {"bfloat16": 2e-2, "float16": 5e-3, "float32": 1e-3}
BY_HEADS = "sparse, by heads"
FIT_BATCHES = (1, 8, 16, 32, 64, 256)
FIT = ("model", "layer", "batch", "target", "reached")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of opt_decode.

    Attributes:
        sizes: published sizes, 125m to 175b, or tiny; made one after the other with random weights.
        batches: sequences at once, up to 32.
        source: a run's folder, a checkpoint's, or a hub id, in place of sizes.
        predictors: of the checkpoint, as `save_predictors` leaves them.
        heads: share of the heads that random predictors name for a token, of synthetic models; None to compute all.
        head_predictors: of the checkpoint's heads, as `save_predictors` leaves them; None to compute all.
        profile: of random weights: a CSV file with the columns model, layer, batch, active_neurons, total_neurons.
        rank: of random predictors.
        predictor_bits: 8 to keep a predictor's weights in a byte each, 16 to leave them as they are.
        per_sequence: whether each sequence computes its own neurons only, or those of the batch, which are read anyway.
        dtype: of weights and activations.
        context: tokens that each sequence has.
        steps: of a chunk.
        repeats: timed chunks.
        devices: to cut a model over; predictors are whole on each.
        seed: of weights and tokens.
        no_peers: leave out what needs torch.
    """

    sizes: tuple[str, ...] = ("30b",)
    batches: tuple[int, ...] = (1, 8)
    source: str | None = None
    predictors: Path | None = None
    heads: float | None = None
    head_predictors: Path | None = None
    profile: Path | None = None
    rank: int = 1024
    predictor_bits: Literal[8, 16] = 8
    per_sequence: bool = False
    dtype: str = "bfloat16"
    context: int = 128
    steps: int = 32
    repeats: int = 3
    devices: int = 1
    seed: int = 0
    no_peers: bool = False

    @classmethod
    def smoke(cls) -> "Config":
        """A tiny model."""
        small = {"rank": 8, "dtype": "float32", "context": 8, "steps": 4, "repeats": 1}
        return cls(sizes=("tiny",), batches=(1, 2), no_peers=True, **small)


def run(config: Config, run: Run) -> list[Row]:
    """A row for each model, batch and variant: dense, sparse and, if asked for, by heads too.

    The fit of synthetic models is left as fit.md.
    """
    rows = measure(config, run)
    run.show(*readme({"rows": rows}))
    return rows


def measure(config: Config, run: Run) -> list[Row]:
    """Times and checks every model; peers first, while nothing else is on the GPU.

    Raises:
        ValueError: an option is out of range.
        RuntimeError: what blocks give over lists is not what they should, or not finite; or no batch fits into the
            device.
    """
    check(config)
    sources = config.sizes if config.source is None else (config.source,)
    peers = {source: opt.measure_peers(config, source, run) for source in sources}
    rows = []
    for source in sources:
        for row in measure_model(config, source, run):
            rows.append(row | peers[source][row["batch"]])
    if not rows:
        raise RuntimeError("there is nothing to show: no batch fits into the device")
    return rows


def check(config: Config) -> None:
    """Raises ValueError for options that would fail only after a model is made."""
    options.check_least(config, 1, "rank", "context", "steps", "repeats", "devices")
    options.check_known(config, "dtype", tuple(TOLERANCES))
    opt.mesh_over(config.devices)  # raises where there are fewer
    if not config.batches or not all(1 <= batch <= MAX_BATCH for batch in config.batches):
        raise ValueError(f"batches must be 1 to {MAX_BATCH}, which share a list; got batches={config.batches}")
    if (config.source is None) != (config.predictors is None):
        got = f"source={config.source}, predictors={config.predictors}"
        raise ValueError(f"source and predictors go together: a checkpoint and what was trained for it; got {got}")
    of_the_other = "head_predictors" if config.source is None else "heads"
    if (value := getattr(config, of_the_other)) is not None:
        rule = "heads are for a synthetic model, head_predictors for a checkpoint"
        raise ValueError(f"{rule}; got source={config.source}, {of_the_other}={value}")
    if config.heads is not None and not 0 < config.heads <= 1:
        raise ValueError(f"heads must be a share above 0 and at most 1; got heads={config.heads}")
    for size in config.sizes if config.source is None else ():
        sizes = opt.config_of(size, config.dtype)
        opt.check_length(config, size, sizes)
        opt.read_profile(config.profile, sizes.d_ff)  # raises where it is none


def measure_model(config: Config, source: str, run: Run) -> list[Row]:
    """Times and checks one model, which is made if there is a batch that no earlier process of the run has timed."""
    made: dict[str, Any] = {"source": config.source, "profile": config.profile, "seed": config.seed}
    made["mesh"] = opt.mesh_over(config.devices)
    name = Path(source).name if config.source is not None else f"opt-{source} (synthetic)"
    name += f", {config.devices} devices" if config.devices > 1 else ""

    @functools.cache
    def model() -> tuple[OPT, str]:
        model, weights = opt.make_model(source, config.dtype, neuron_major=True, **made)
        opt.check_length(config, name, model.config)
        if config.source is None:
            profile, key = opt.read_profile(config.profile, model.config.d_ff), jax.random.key(config.seed)
            batches = [batch for batch in FIT_BATCHES if profile.batches[0] <= batch <= profile.batches[-1]]
            fit = [{"model": name, **row} for row in fit_table(model, profile, batches=batches, key=key)]
            run.write(f"fit_{source}.md", markdown_table([[row[column] for column in FIT] for row in fit], FIT) + "\n")
        return model, weights

    def measure(batch: int) -> list[Row]:
        network, weights = model()
        size = memory.estimate(network, rows=batch, slots=config.context + config.steps, tokens=batch)
        try:
            with size.explaining():
                return [{"weights": weights} | row for row in measure_batch(config, network, name, batch)]
        except memory.OutOfMemory as error:  # a gap in the table, not the end of it
            print(f"{name}, batch {batch}: {error}", flush=True)
            return []

    rows: list[Row] = []
    for batch in config.batches:
        found = run.remembered(f"{Path(source).name}_batch_{batch}", functools.partial(measure, batch))
        times = ", ".join(f"{row['variant']} {row['time_ms']} ms" for row in found)
        print(f"{name}, batch {batch}: {times or 'left out'}", flush=True)
        rows += found
    return rows


def measure_batch(config: Config, model: OPT, name: str, batch: int) -> list[Row]:
    """The rows of one batch: dense, over listed neurons and, where heads are predicted, over those of them too."""
    row: Row = {"model": name, "batch": batch, "dtype": config.dtype, "context": config.context}
    row["devices"] = config.devices
    time_ms, rows = _time(config, model, batch)
    found = [row | {"variant": "dense", "time_ms": time_ms, **bound(model, rows)}]
    del rows
    found.append(row | {"variant": "sparse"} | _measure_lists(config, model, name, batch, None))
    if (of_heads := opt.make_head_predictors(config, model)) is not None:
        found.append(row | {"variant": BY_HEADS} | _measure_lists(config, model, name, batch, of_heads))
    return found


def _time(config: Config, model: OPT, batch: int) -> tuple[float, Rows]:
    """Milliseconds a token, and the rows behind the context."""
    timed: dict[str, Any] = {name: getattr(config, name) for name in ("context", "steps", "repeats", "seed")}
    return opt.time_decode(model, batch, sampling=GREEDY if config.source is not None else opt.EVENLY, **timed)


def _measure_lists(config: Config, model: OPT, name: str, batch: int, of_heads: list[Predictor] | None) -> Row:
    """The columns of a row over listed neurons, and over the heads that these predictors name, if there are any."""
    predictors = opt.make_predictors(config, model, batch, of_heads)
    lists = with_predictors(model, predictors, head_predictors=of_heads, per_sequence=config.per_sequence)
    time_ms, rows = _time(config, lists, batch)
    tokens = random_tokens(model.config, (batch, 1), jax.random.key(config.seed))
    error, density = check_lists(lists, tokens, rows.cache)
    found: Row = {"time_ms": time_ms, "density": round(statistics.mean(density), 4), "error": error}
    found |= {"predictor_bits": config.predictor_bits, "per_sequence": config.per_sequence}
    of_all = None
    if of_heads is not None:
        found["heads_error"], of_all = check_heads(lists, tokens, rows.cache)
        by_any, own = (round(statistics.mean(shares), 4) for shares in zip(*of_all, strict=True))
        found |= {"heads_density": by_any, "heads_density_own": own}
    for things, wrong in {"neurons": error, "heads": found.get("heads_error", 0.0)}.items():
        if not wrong <= TOLERANCES[config.dtype]:
            got = f"what lists of {things} give differs by {wrong:.1e} from what they should"
            raise RuntimeError(f"{name}, batch {batch}: {got}")
    return found | bound(lists, rows, density, of_all)


def check_lists(model: OPT, tokens: Int[Array, "batch 1"], cache: KVCache) -> tuple[float, list[float]]:
    """The relative RMS error of what all blocks give for one token a row, and the share of neurons listed for any row.

    Layer by layer, so that one small program serves them all.
    """
    return _by_layers(_checked, model, tokens, cache)


def check_heads(model: OPT, tokens: Int[Array, "batch 1"], cache: KVCache) -> tuple[float, list[list[float]]]:
    """Likewise, of what attention gives; the shares are of heads, listed for any row and on the average for one."""
    return _by_layers(_checked_heads, model, tokens, cache)


def _by_layers(checked: Callable[..., Any], model: OPT, tokens, cache: KVCache) -> tuple[float, list[Any]]:
    wrong, of_all, shares = 0.0, 0.0, list[Any]()
    first = next(walk(model, np.asarray(tokens), batch=len(tokens)))  # as if these tokens came first: embeddings
    assert first.stream is not None  # there are tokens
    x, places = first.stream[0], place_tokens(tokens, cache=cache)
    before = x
    with on_mesh(nnx.state(model)):  # as `time_decode` does: over several devices, blocks are what is timed there
        for layer, *slots in zip(model.layers, cache.keys, cache.values, strict=True):
            y, *found = checked(*nnx.split(layer), x, places, tuple(slots), before)
            wrong, of_all = wrong + float(found[0]), of_all + float(found[1])
            shares.append(np.asarray(found[2]).tolist())
            before, x = x, y
    return (wrong / of_all) ** 0.5 if of_all else wrong, shares


@functools.partial(jax.jit, static_argnums=0)
def _checked(graphdef, state, x: Float[Array, "batch 1 d_model"], places: Places, slots, before):
    """A layer's output; of its block the squared error, the square of what is expected, and the share listed."""
    layer: Any = nnx.merge(graphdef, state)
    (x, _), captured = nnx.capture(layer, nnx.Intermediate)(x, places, slots, before)
    found = {name: values[0] for name, values in captured.items() if name.startswith("ffn_")}
    fires = found.get("ffn_predicted", jnp.ones((1, 1, layer.fc1.bias.shape[0]), bool))
    weights = found["ffn_input"], layer.fc1.kernel, layer.fc1.bias, layer.fc2.kernel, layer.fc2.bias
    y, w1, b1, w2, b2 = (jnp.asarray(a, jnp.float32) for a in weights)
    h = jnp.where(fires, ACTIVATIONS[layer.config.activation](y @ w1 + b1[None, None]), 0)
    expected = h @ w2 + b2[None, None]
    wrong = _squared_error(found["ffn_output"], expected, y)
    return x, wrong, jnp.sum(expected**2), jnp.mean(fires.any(axis=0), dtype=jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _checked_heads(graphdef, state, x: Float[Array, "batch 1 d_model"], places: Places, slots, before):
    """Likewise, of its attention: by all heads, where those that are not listed then count as zero."""
    layer: Any = nnx.merge(graphdef, state)
    attention, normed = layer.self_attn, layer.self_attn_layer_norm(x) if layer.config.pre_norm else x
    needed, entered = attention.predictor(before if attention.predictor.look_ahead else x), (before, x)
    found, _ = attention(normed, places, slots, entered)
    attention.prediction = "mask"
    expected, _ = attention(normed, places, slots, entered)
    attention.prediction = "lists"
    shares = jnp.stack([jnp.mean(listed, dtype=jnp.float32) for listed in (needed.any(axis=(0, 1)), needed)])
    expected = expected.astype(jnp.float32)
    return layer(x, places, slots, before)[0], _squared_error(found, expected, normed), jnp.sum(expected**2), shares


def _squared_error(found, expected: Float[Array, "batch 1 d_model"], x) -> Float[Array, ""]:
    """NaN where what they are of is not finite: nothing is predicted of that, and nothing has no error."""
    wrong = jnp.sum((found.astype(jnp.float32) - expected) ** 2)
    return jnp.where(jnp.isfinite(x).all(), wrong, jnp.nan)


def bound(
    model: OPT, rows: Rows, density: list[float] | None = None, heads_density: list[list[float]] | None = None
) -> Row:
    """`bytes_gb` that a step has to read on each device, and `bound_ms`, their time; None for a device unknown.

    Args:
        model: what decodes.
        rows: with its cache.
        density: of each layer, the share of neurons listed; None for all.
        heads_density: the shares of heads, listed for any row and for one; None for all.
    """
    total = float(_bytes(nnx.state(model, nnx.Any(nnx.Param, PredictorParam))))
    total -= _bytes(model.embed_positions.embedding[...])  # of which a step reads a row
    for i, share in enumerate(density or ()):
        layer: Any = model.layers[i]
        fc1 = layer.fc1.weight if model.config.neuron_major else layer.fc1.kernel
        total -= (1 - share) * _bytes((fc1[...], layer.fc2.kernel[...]))
    for i, (by_any, own) in enumerate(heads_density or ()):
        attention: Any = model.layers[i].self_attn
        total -= (1 - by_any) * _bytes((attention.q_proj.kernel[...], attention.out_proj.kernel[...]))
        total -= (1 - own) * _bytes((rows.cache.keys[i], rows.cache.values[i]))
    total += _bytes((rows.cache.keys, rows.cache.values))
    gpu = find_gpu(jax.devices()[0].device_kind)
    return {
        "bytes_gb": round(total / 1e9, 7),
        "bound_ms": None if gpu is None else round(1e3 * total / gpu.bandwidth, 3),
    }


def _bytes(arrays: Any) -> int:
    """What a device has of them."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(arrays))


def headlines(result: dict[str, Any]) -> list[list[str]]:
    """Of one sequence on one device, over listed neurons."""
    rows = [row for row in result["rows"] if row["batch"] == row.get("devices", 1) == 1]
    dense = {row["model"]: row for row in rows if row["variant"] == "dense"}
    return [
        headline(
            f"{row['model']}, a token of one text",
            row["time_ms"],
            "ms",
            dense[row["model"]]["time_ms"],
            {"transformers": dense[row["model"]].get("transformers_time_ms")},
        )
        for row in rows
        if row["variant"] == "sparse"
    ]


def readme(result: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """Milliseconds a token, dense and sparse, next to the bytes' bound and transformers; and a figure."""
    from experiments import figures

    rows = result["rows"]
    dense = {(row["model"], row["batch"]): row for row in rows if row["variant"] == "dense"}
    by_heads = any(row["variant"] == BY_HEADS for row in rows)
    cells = []
    for row in (row for row in rows if row["variant"] != "dense"):
        other = dense[row["model"], row["batch"]]
        times = [
            other.get("transformers_time_ms"),
            other["time_ms"],
            other["bound_ms"],
            row["time_ms"],
            row["bound_ms"],
        ]
        quicker, error = f"{other['time_ms'] / row['time_ms']:.2f}x", max(row["error"], row.get("heads_error", 0))
        cells.append([row["model"], row["batch"], *map(_number, times), quicker, f"{row['density']:.0%}"])
        shares = row.get("heads_density_own", 1), row.get("heads_density", 1)
        cells[-1] += [f"{share:.0%}" for share in shares] * by_heads + [f"{error:.0e}"]
    header = ["model", "batch", "transformers (ms)", "dense (ms)", "its bound", "sparse (ms)", "its bound", "quicker"]
    header += ["neurons read", *["heads of a text", "heads of all"] * by_heads, "error"]
    return markdown_table(cells, header), {"opt_decode.png": figures.draw(lambda axes: _plot(axes, rows))}


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _plot(axes, rows: list[Row]) -> None:
    from experiments import figures

    def line(of: Callable[[Row], bool], column: str, style: str, colour: str, label: str | None) -> None:
        points = sorted((row["batch"], row[column]) for row in rows if of(row) and row.get(column) is not None)
        if points:
            axes.plot(*zip(*points, strict=True), style, color=colour, markersize=4, label=label)

    for number, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
        for variant, colour in (("dense", figures.ORANGE), ("sparse", figures.BLUE), (BY_HEADS, figures.GREEN)):
            of = lambda row, m=model, v=variant: (row["model"], row["variant"]) == (m, v)  # noqa: E731
            line(of, "time_ms", "os^D"[number % 4] + "-", colour, f"{model}, {variant}")
            line(of, "bound_ms", ":", colour, None)
        dense = lambda row, m=model: (row["model"], row["variant"]) == (m, "dense")  # noqa: E731
        line(dense, "transformers_time_ms", "os^D"[number % 4] + "-", figures.PINK, f"{model}, transformers")
    batches = sorted({row["batch"] for row in rows})
    axes.set(title="Decoding (dotted: the bytes' time)", xlabel="batch", ylabel="ms a token", xscale="log")
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_ylim(bottom=0)
    axes.minorticks_off()
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
