"""How much sooner does OPT read a batch of prompts without padding, and without the neurons that do not fire?

    python -m experiments opt_inference --records alpaca.json --tokenizer FOLDER --profile neurons.csv --keep
    python -m experiments opt_inference --source FOLDER-OR-HUB-ID --records alpaca.json --tokenizer FOLDER

PIT's figure 9 on this device: a batch of instruction records, whole and truncated, from token ids to the logits after
each record. Variants: `padded` to the longest record; `packed`, one after another; `packed+sparse`, where products skip
the micro-tiles of the feed-forward activations that no token makes live, in the layers where that is to pay; and the
same with all occurrences of a token side by side, so that fewer micro-tiles are live. Beside them transformers (SDPA,
padded), with weights of its own, where torch and a GPU are there. Times are wall-clock medians; memory is what XLA says
a program holds at once, and the most that torch had allocated. What attention and the feed-forward blocks take is that
of the middle layer by itself, times the layers; on a GPU by CUPTI, as dispatching a layer takes longer than some of
them. Every variant's logits are compared with those of `padded` in the same run.

Weights are synthetic unless `--source` is given: random, with as many neurons firing as the profile says. Without
`--records`, tokens are random and only lengths are like real ones. Seen on an H200, in five minutes with transformers:
13B padded 600 ms, packed 198, packed and sparse 159, by token 167; 30B 1267, 460, 351 and 365: that order does not pay.
Another H200 took 3% less for 13B and 2 to 7% less for 30B.
Source: PIT (SOSP'23), section 5.2 and figure 9.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from experiments import opt, opt_peers, options, programs
from experiments.headlines import headline
from experiments.moe_inference import TOLERANCES
from experiments.records import choose_records
from experiments.runs import Row, Run, markdown_table
from models import OPT
from models.attention import Places, place_tokens
from models.opt import with_sparse_rows
from models.prefill import choose_sparse_rows
from pallas_kernels.workbench.timing import Timer, cupti
from sparsellm.packing import Packing, pack

BY_TOKEN = "packed by token+sparse"
VARIANTS = ("padded", "packed", "packed+sparse", BY_TOKEN)
PARTS = ("attention", "feed_forward", "rest")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of opt_inference.

    Attributes:
        models: sizes of synthetic models: "13b" and the like, or "tiny".
        source: a run's folder, a checkpoint's, or a hub id, in place of them.
        profile: a CSV file that says how many neurons of a synthetic model fire; None for a power law.
        records: a JSON file of records in Alpaca's format; None makes lengths up.
        tokenizer: the folder of the tokenizer that reads them.
        batch: records at once.
        truncate: most tokens of a record, for each of the batches; 0 leaves them whole.
        sparse_rows: tokens in a micro-tile of every layer; None lets `choose_sparse_rows` decide for each layer, by
            what is live in this very batch.
        dtype: of weights and activations.
        repeats: timed calls.
        seed: of weights and the choice of records.
        no_peers: leave out what needs torch.
    """

    models: tuple[str, ...] = ("13b", "30b")
    source: str | None = None
    profile: Path | None = None
    records: Path | None = None
    tokenizer: Path | None = None
    batch: int = 32
    truncate: tuple[int, ...] = (0, 128)
    sparse_rows: int | None = None
    dtype: str = "bfloat16"
    repeats: int = 5
    seed: int = 0
    no_peers: bool = False

    @classmethod
    def smoke(cls) -> "Config":
        """A tiny model."""
        return cls(models=("tiny",), batch=4, truncate=(0,), sparse_rows=8, dtype="float32", repeats=2, no_peers=True)


def run(config: Config, run: Run) -> list[Row]:
    """A row for each model, batch and variant."""
    rows = measure(config, run)
    run.show(*readme({"rows": rows}))
    return rows


def measure(config: Config, run: Run, timer: Timer = programs.wall_clock) -> list[Row]:
    """Times and checks every model, and transformers' on the same batches.

    Raises:
        ValueError: an option is out of range.
        RuntimeError: the logits of two variants differ.
    """
    _check(config)
    rows = []
    for size in config.models if config.source is None else (config.source,):
        rows += _measure_size(config, size, run, timer)
    return rows


def _check(config: Config) -> None:
    options.check_filled(config, "models", "truncate")
    options.check_known(config, "dtype", tuple(TOLERANCES))
    options.check_least(config, 1, "batch", "repeats")
    options.check_least(config, 0, "truncate")
    for size in config.models:
        sizes = opt.config_of(size, config.dtype, sparse_rows=config.sparse_rows)
        if config.source is None:
            opt.read_profile(config.profile, sizes.d_ff)  # raises where it is none


def _measure_size(config: Config, size: str, run: Run, timer: Timer) -> list[Row]:
    """Rows of one model; peers first, while it is not on the GPU yet, unless it says itself how large it is."""
    made, name = {"source": config.source, "profile": config.profile, "seed": config.seed}, Path(size).name
    model = functools.cache(lambda: opt.make_model(size, config.dtype, **made))
    sizes = opt.config_of(size, config.dtype) if config.source is None else model()[0].config
    limits = {"vocab_size": sizes.vocab_size, "longest": sizes.max_length}
    every = choose_records(config.records, config.tokenizer, config.batch, **limits, seed=config.seed)
    batches = [[record.tokens[: most or None] for record in every] for most in config.truncate]
    lengths, peers = [list(map(len, batch)) for batch in batches], [{} for _ in batches]
    if not config.no_peers:
        ask = functools.partial(opt_peers.measure_prefill, sizes, lengths, config.repeats)
        peers = run.remembered(f"transformers_{name}", ask)
    rows = []
    for most, batch, peer in zip(config.truncate, batches, peers, strict=True):
        about: Row = {"model": f"opt-{name}", "batch": len(batch), "truncated": most, "dtype": config.dtype}
        about |= {"tokens": sum(map(len, batch)), "longest": max(map(len, batch))}
        theirs = {f"transformers_{column}": value for column, value in peer.items()}

        def measure(batch=batch) -> list[Row]:
            network, weights = model()
            return [{"weights": weights} | row for row in _measure_batch(config, network, batch, timer)]

        for row in run.remembered(f"{name}_truncated_{most}", measure):
            rows.append(about | row | theirs)
            print(", ".join(f"{column} {value}" for column, value in rows[-1].items()), flush=True)
    return rows


def _measure_batch(config: Config, model: OPT, batch: list[tuple[int, ...]], timer: Timer) -> list[Row]:
    rows, expected, on_gpu = [], None, jax.default_backend() == "gpu"
    for variant in VARIANTS:
        arrays = _padded(batch) if variant == "padded" else _packed(batch, by_token=variant == BY_TOKEN)
        sparse_rows = None
        if variant.endswith("+sparse"):
            chosen = config.sparse_rows is None
            sparse_rows = choose_sparse_rows(model, arrays[0], arrays[2]) if chosen else config.sparse_rows
        network = with_sparse_rows(model, sparse_rows)
        logits, time_ms, memory_gib = programs.measure(next_logits, network, arrays, config.repeats, timer)
        expected = logits if expected is None else expected
        error = float(programs.median_error(logits, expected))
        if not error <= TOLERANCES[config.dtype]:
            raise RuntimeError(f"{variant}: logits differ by {error:.1e}, above {TOLERANCES[config.dtype]}")
        parts = parts_ms(network, arrays[0], arrays[2], config.repeats, cupti if on_gpu else timer)
        parts["rest_ms"] = round(max(time_ms - sum(parts.values()), 0), 3)
        print(f"{variant}: {time_ms} ms", flush=True)
        sparse_layers = sum(layer.sparse_rows is not None for layer in network.layers)
        row: Row = {"variant": variant, "sparse_layers": sparse_layers, "time_ms": time_ms, "memory_gib": memory_gib}
        rows.append(row | parts | {"error": error})
    return rows


def parts_ms(model: OPT, tokens: Array, packing: Packing | None, repeats: int, timer: Timer) -> Row:
    """What attention, and what the feed-forward blocks take, with the norm before them: a layer's time times layers.

    The layer is the middle one, given what comes out of those before it.
    """
    middle = len(model.layers) // 2
    places = _places(tokens, packing=packing)
    x = entering(model, middle, tokens, places)
    layer: Any = model.layers[middle]
    pre_norm = model.config.pre_norm
    attention, feed_forward = (functools.partial(part, pre_norm=pre_norm) for part in (_attention, _feed_forward))
    y, attention_ms, _ = programs.measure(attention, layer, [x, places], repeats, timer)
    _, feed_forward_ms, _ = programs.measure(feed_forward, layer, [x, y, places], repeats, timer)
    times = {"attention": attention_ms, "feed_forward": feed_forward_ms}
    return {f"{part}_ms": round(len(model.layers) * ms, 3) for part, ms in times.items()}


def entering(model: OPT, layer: int, tokens: Array, places: Places) -> Float[Array, "rows columns d_model"]:
    """What comes into a layer: one program runs all those before it, in turn."""
    embedding: Any = nnx.merge(*nnx.split(model))
    embedding.layers, embedding.final_layer_norm = nnx.List([]), _Same()
    x = _embed(*nnx.split(embedding), tokens, places.packing)
    for before in model.layers[:layer]:
        x = _step(*nnx.split(before), x, places)
    return x


_places = jax.jit(place_tokens)


class _Same(nnx.Module):
    """In place of the last norm."""

    def __call__(self, x: Array) -> Array:
        return x


@functools.partial(jax.jit, static_argnums=0)
def _embed(graphdef, state, tokens: Array, packing: Packing | None) -> Array:
    return nnx.merge(graphdef, state).hidden_states(tokens, packing=packing)[0]


@functools.partial(jax.jit, static_argnums=0)
def _step(graphdef, state, x: Array, places: Places) -> Array:
    return nnx.merge(graphdef, state)(x, places, None)[0]


def _attention(layer: Any, x: Array, places: Places, *, pre_norm: bool) -> Array:
    return layer.self_attn(layer.self_attn_layer_norm(x) if pre_norm else x, places, None)[0]


def _feed_forward(layer: Any, x: Array, y: Array, places: Places, *, pre_norm: bool) -> Array:
    """Of the layer's input and what attention made of it."""
    _, normed = (layer.final_layer_norm if pre_norm else layer.self_attn_layer_norm).of_sum(x, y)
    return layer.feed_forward(normed, places, x)


def _padded(batch: list[tuple[int, ...]]) -> list[Any]:
    """Token ids, padded behind, where no real token looks; and where on the flat batch each sequence ends."""
    longest = max(map(len, batch))
    tokens = np.ones((len(batch), longest), np.int32)
    for row, sequence in zip(tokens, batch, strict=True):
        row[: len(sequence)] = sequence
    ends = np.arange(len(batch)) * longest + np.array([len(sequence) for sequence in batch]) - 1
    return [jnp.asarray(tokens), jnp.asarray(ends, jnp.int32), None]


def _packed(batch: list[tuple[int, ...]], *, by_token: bool = False) -> list[Any]:
    tokens, packing = pack(batch, by_token=by_token)
    return [tokens, packing.last, packing]


def next_logits(
    model: OPT, tokens: Int[Array, "rows columns"], ends: Int[Array, " batch"], packing: Packing | None
) -> Float[Array, "batch vocab"]:
    """Logits of what follows each sequence."""
    hidden, _ = model.hidden_states(tokens, packing=packing)
    return model.logits(hidden.reshape(-1, hidden.shape[-1])[ends])


def headlines(result: dict[str, Any]) -> list[list[str]]:
    """Of whole prompts, packed and sparse, next to packed and dense."""
    dense = {row["model"]: row["time_ms"] for row in result["rows"] if _kind(row) == ("packed", 0)}
    return [
        headline(
            f"{row['model']}, {row['batch']} prompts at once",
            row["time_ms"],
            "ms",
            dense.get(row["model"]),
            {"transformers": row.get("transformers_time_ms")},
        )
        for row in result["rows"]
        if _kind(row) == ("packed+sparse", 0)
    ]


def _kind(row: Row) -> tuple[str, int]:
    return row["variant"], row["truncated"]


def readme(result: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """Time, memory and parts of every variant next to transformers', and a figure of the time."""
    from experiments import figures

    rows = result["rows"]
    cells = []
    for row in rows:
        theirs = row.get("transformers_time_ms")
        cells.append(
            [row["model"], row["truncated"] or "whole", row["variant"], f"{row['time_ms']:.1f}"]
            + [f"{row[f'{part}_ms'] / row['time_ms']:.0%}" for part in PARTS[:2]]
            + [f"{theirs:.1f}" if theirs else "–", f"{row['memory_gib']:.2f}"]
            + [f"{row['transformers_memory_gib']:.2f}" if theirs else "–", f"{row['error']:.0e}"]
        )
    header = ["model", "tokens at most", "variant", "ms", "attention", "feed-forward", "transformers (ms)", "GiB"]
    header += ["transformers (GiB)", "error"]
    first = rows[0]
    said = f"Batches of {first['batch']} records, weights: {first['weights']}.\n\n"
    drawn = figures.draw(lambda axes: _plot(axes, rows), size=(7.6, 1.4 + 0.3 * len(rows)))
    return said + markdown_table(cells, header), {"opt_inference.png": drawn}


def _plot(axes, rows: list[Row]) -> None:
    from experiments import figures

    bars: list[tuple[str, dict[str, float]]] = []
    for row in rows:
        label = f"{row['model']}, {row['truncated'] or 'whole'}"
        if row["variant"] == VARIANTS[0] and row.get("transformers_time_ms"):
            bars.append((f"{label}: transformers", {"all": row["transformers_time_ms"]}))
        bars.append((f"{label}: {row['variant']}", {part: row[f"{part}_ms"] for part in PARTS}))
    colours: dict[str, str] = {"all": "#999999"}
    colours |= zip(PARTS, (figures.ORANGE, figures.BLUE, figures.GREEN), strict=True)
    for place, (_, parts) in enumerate(bars):
        left = 0.0
        for part, ms in parts.items():
            axes.barh(place, ms, left=left, color=colours[part])
            left += ms
    for part in PARTS:
        axes.barh(0, 0, color=colours[part], label=part.replace("_", "-"))
    axes.set(title="From prompts to the first token", xlabel="time (ms)")
    axes.set(yticks=range(len(bars)), yticklabels=[label for label, _ in bars])
    axes.invert_yaxis()
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
