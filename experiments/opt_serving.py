"""How many tokens a second does OPT write for a stream of requests, dense and over predicted neurons?

    python -m experiments opt_serving --records alpaca.json --tokenizer FOLDER --profile neurons.csv --keep

A request is a record's prompt, and asks for as many tokens as the record's answer has, so that texts end at different
times and their rows are refilled (`sparsellm.serving`). All arrive at once, or at random with a mean rate. Reported are
tokens a second, and median and 99th percentile of the time to the first token and of the whole latency, of the first
time that the stream is served and nothing is compiled. `sparse` decodes over the neurons that look-ahead predictors
name.

Weights and predictors are synthetic: random, with as many neurons firing as the profile says, so times are real and
texts are noise. The likeliest tokens of such a model run in circles, in which a batch has fewer neurons to list than a
real one: while it is timed, its tokens are drawn evenly. `--source` serves a checkpoint greedily, over neurons where
its `--predictors` are given. The check: some greedy answers of rows that were refilled, and of a row beside them, each
token fed to the model as it is alone and simulating what it lists; `error` is how far below the largest logit that of
the answer's token lies at most, in standard deviations of the logits. Rounding gives hundredths, in bfloat16 over 32
layers up to a tenth; over listed neurons up to three tenths, as rounding decides whether a neuron at its predictor's
threshold is listed (an answer of 427 tokens of OPT-6.7B: 0.26 where it is served alone, 0.22 beside 31 others that list
their own, and 0.26 so by masks); a wrong row of the cache gives 1 and more. Where rows share their lists, no text goes
on beside one that is checked.

Expected on an H200, in two and a half minutes: OPT-6.7B writes 3,700 tokens a second, over listed neurons 4,000.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from experiments import opt, options, programs
from experiments.headlines import headline
from experiments.records import Record, choose_records
from experiments.runs import Row, Run, markdown_table
from models import OPT
from models.attention import KVCache
from models.opt import with_predictors
from pallas_kernels.neuron_ffn.config import MAX_BATCH
from sparsellm.packing import bucket
from sparsellm.serving import Answer, Request, serve, statistics
from sparsellm.unstructured import compressed_layers

VARIANTS = ("dense", "sparse")
BY_TEXT = "sparse by text"
TOLERANCE, LISTED_TOLERANCE = 0.25, 0.5  # of `error`; bfloat16 and dozens of layers
MOST_TRIES = 5  # to serve the stream without compiling anything
NEVER = -1  # no token ends a text
NOISE = 1e6  # beside it, the logits of a model are alike


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of opt_serving.

    Attributes:
        model: size of a synthetic model: "6.7b" and the like, or "tiny".
        source: a run's folder, a checkpoint's, or a hub id, in place of it.
        predictors: of the source, as `save_predictors` leaves them; None serves it dense.
        profile: a CSV file that says how many neurons of a synthetic model fire; None for a power law.
        records: a JSON file of records in Alpaca's format; None makes lengths up.
        tokenizer: the folder of the tokenizer that reads them.
        requests: how many.
        rate: requests a second, at random times; 0 for all at once.
        rows: texts at once.
        cache_length: slots of a row; longer records are passed over.
        steps: of decoding between two looks for rows to refill.
        prefill_sizes: tokens that are read together.
        rank: of random predictors.
        predictor_bits: 8 to keep a predictor's weights in a byte each, 16 to leave them as they are.
        per_sequence: whether each text computes its own neurons only, or those of all rows, which are read anyway.
        dtype: of weights and activations.
        samples: answers to check.
        seed: of weights and the choice of records.
    """

    model: str = "6.7b"
    source: str | None = None
    predictors: Path | None = None
    profile: Path | None = None
    records: Path | None = None
    tokenizer: Path | None = None
    requests: int = 200
    rate: float = 0.0
    rows: int = 32
    cache_length: int = 512
    steps: int = 16
    prefill_sizes: tuple[int, ...] = (128, 512)
    rank: int = 128
    predictor_bits: Literal[8, 16] = 8
    per_sequence: bool = False
    dtype: str = "bfloat16"
    samples: int = 2
    seed: int = 0

    @classmethod
    def smoke(cls) -> "Config":
        """A tiny model."""
        return cls(
            model="tiny",
            requests=6,
            rows=2,
            cache_length=48,
            steps=4,
            prefill_sizes=(48,),
            rank=4,
            dtype="float32",
            samples=1,
        )


def run(config: Config, run: Run) -> list[Row]:
    """A row for each variant; and a figure of when every request's tokens came."""
    rows = run.remembered("rows", functools.partial(measure, config))
    run.show(*readme({"rows": rows}))
    return rows


def measure(config: Config) -> list[Row]:
    """Serves the stream by every variant, and checks some answers.

    Raises:
        ValueError: an option is out of range.
        RuntimeError: an answer is not the model's.
    """
    options.check_least(config, 1, "requests", "rows", "rank", "samples")
    options.check_least(config, 0, "rate")
    if config.predictors is not None and config.source is None:
        raise ValueError(f"predictors must be a source's; got predictors={config.predictors} and no source")
    made = {"source": config.source, "profile": config.profile, "seed": config.seed}
    variants = VARIANTS if config.source is None or config.predictors is not None else VARIANTS[:1]
    if "sparse" in variants and config.rows > MAX_BATCH:
        raise ValueError(f"rows must be at most {MAX_BATCH}, which share a list of neurons; got rows={config.rows}")
    model, weights = opt.make_model(config.model, config.dtype, **made, neuron_major="sparse" in variants)
    records = choose_records(
        config.records,
        config.tokenizer,
        config.requests,
        vocab_size=model.config.vocab_size,
        longest=min(config.cache_length, model.config.max_length),
        seed=config.seed,
    )
    requests = stream(records, config.rate, config.seed)
    name = config.model if config.source is None else Path(config.source).name
    about = {"model": f"opt-{name}", "weights": weights, "requests": len(requests), "rate": config.rate}
    about |= {"batch": config.rows, "dtype": config.dtype, "prompt_tokens": sum(len(r.prompt) for r in records)}
    rows = []
    for variant in variants:
        served, reference = variant_of(model, variant, config)
        named = "compressed" if variant == "dense" and any(compressed_layers(model)) else variant
        named = BY_TEXT if variant == "sparse" and config.per_sequence else named
        row = about | {"variant": named} | _measure(config, served, reference, requests)
        print(", ".join(f"{name} {value}" for name, value in row.items() if name != "latencies_s"), flush=True)
        rows.append(row)
    return rows


def stream(records: list[Record], rate: float, seed: int) -> list[Request]:
    """A request for each record: its prompt, as many tokens as its answer, and when it arrives."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, len(records)) if rate else np.zeros(len(records))
    return [
        Request(prompt=record.prompt, max_new_tokens=len(record.answer), eos_id=NEVER, arrival_s=float(time))
        for record, time in zip(records, np.cumsum(gaps), strict=True)
    ]


def variant_of(model: OPT, variant: str, config: Config) -> tuple[OPT, OPT]:
    """The model that serves; and the one that computes the same without lists."""
    if variant == "dense":
        return model, model
    predictors = opt.make_predictors(config, model, config.rows)
    lists, mask = (with_predictors(model, predictors, p, per_sequence=config.per_sequence) for p in ("lists", "mask"))
    return lists, mask


class Drawn(nnx.Module):
    """A model whose likeliest token is drawn evenly where `evenly` is 1, and its own where that is 0.

    The draw follows from the hidden states, so that `serve`, which is greedy, makes it; and one program does for both.
    """

    def __init__(self, model: OPT, evenly: float):
        self.model, self.config, self.evenly = model, model.config, nnx.Variable(jnp.float32(evenly))

    def init_cache(self, batch: int, length: int) -> KVCache:
        return self.model.init_cache(batch, length)

    def hidden_states(self, tokens: Int[Array, "batch length"], **options: Any):
        return self.model.hidden_states(tokens, **options)

    def logits(self, hidden: Float[Array, "batch d_model"]) -> Float[Array, "batch vocab"]:
        logits = self.model.logits(hidden)
        seed = lax.bitcast_convert_type(jnp.sum(hidden, dtype=jnp.float32), jnp.uint32)
        noise = jax.random.uniform(jax.random.key(seed, impl="rbg"), logits.shape, jnp.float32)
        return logits + NOISE * self.evenly[...] * noise


def _measure(config: Config, model: OPT, reference: OPT, requests: list[Request]) -> Row:
    serving: dict[str, Any] = {
        "rows": config.rows,
        "cache_length": config.cache_length,
        "steps": config.steps,
        "prefill_sizes": config.prefill_sizes,
    }
    own, served = (model, model) if config.source is not None else (Drawn(model, 0.0), Drawn(model, 1.0))
    shared = model is not reference and not config.per_sequence
    last = requests[-config.samples :]
    pairs = [pair for request in last for pair in _refilled(own, requests, request, shared, serving)]
    error = max(float(largest_gap(reference, *pair, config.cache_length)) for pair in pairs)
    if not error <= (TOLERANCE if model is reference else LISTED_TOLERANCE):
        raise RuntimeError(
            f"an answer's token lies {error:.2f} standard deviations below the likeliest: not the model's"
        )
    answers = _serve_compiled(functools.partial(serve, served, requests, **serving))
    found = {name: round(value, 4) for name, value in statistics(answers).items()}
    return found | {"error": error, "latencies_s": _latencies(answers)}


def _refilled(
    model: Any, requests: list[Request], last: Request, shared: bool, serving: dict[str, Any]
) -> list[tuple[Request, Answer]]:
    """A request that had to wait for a row, its answer, and the longest one's beside it.

    With `shared` lists, which a text beside it would change, the others end with their first token, and are not given.
    """
    before = list(itertools.islice(itertools.cycle(requests), serving["rows"]))
    if shared:
        before = [dataclasses.replace(request, max_new_tokens=1) for request in before]
    stream = [dataclasses.replace(request, arrival_s=0.0) for request in [*before, last]]
    pairs = list(zip(stream, serve(model, stream, **serving), strict=True))
    return pairs[-1:] if shared else [pairs[-1], max(pairs[:-1], key=lambda pair: len(pair[1].tokens))]


def _serve_compiled(serve_all: Callable[[], list[Answer]]) -> list[Answer]:
    """Answers of the first time that nothing is compiled.

    Raises:
        RuntimeError: there is none among the first few.
    """
    with programs.compilations() as compiled:
        for _ in range(MOST_TRIES):
            compiled.clear()
            answers = serve_all()
            if not compiled:
                return answers
    raise RuntimeError(f"serving the stream must compile nothing after {MOST_TRIES} times; it did each time")


def _latencies(answers: list[Answer]) -> list[list[float]]:
    """Of every request, from its arrival: when its first token was known, and its last."""
    return [
        [round(answer.first_token_s - answer.arrival_s, 3), round(answer.finished_s - answer.arrival_s, 3)]
        for answer in answers
    ]


def largest_gap(model: OPT, request: Request, answer: Answer, slots: int) -> Float[Array, ""]:
    """How far a token of an answer lies below the likeliest at most, in standard deviations of the logits.

    The answer is fed to the model token by token, after the prompt, alone in a cache of its own: the padding behind the
    prompt, which makes one program do for all, is of no weight in it.
    """
    length = bucket(slots, 8)
    prompt, tokens = np.zeros((1, length), np.int32), np.zeros(length, np.int32)
    prompt[0, : len(request.prompt)] = request.prompt
    tokens[: len(answer.tokens)] = answer.tokens
    count = np.int32(len(answer.tokens))
    return _largest_gap(*nnx.split(model), jnp.asarray(prompt), np.int32(len(request.prompt)), tokens, count)


@functools.partial(jax.jit, static_argnums=0)
def _largest_gap(graphdef, state, prompt: Int[Array, "1 length"], ends, tokens: Int[Array, " length"], count):
    model = nnx.merge(graphdef, state)
    mask = jnp.arange(prompt.shape[1])[None] < ends
    cache = model.init_cache(1, prompt.shape[1])
    hidden, cache = model.hidden_states(prompt, mask=mask, cache=cache)

    def step(carry, token):
        hidden, cache = carry
        logits = model.logits(hidden)
        gap = (jnp.max(logits) - logits[token]) / jnp.std(logits)
        hidden, cache = model.hidden_states(token[None, None], cache=cache)
        return (hidden[0, 0], cache), gap

    _, gaps = lax.scan(step, (hidden[0, ends - 1], cache), tokens)
    return jnp.max(jnp.where(jnp.arange(len(tokens)) < count, gaps, 0))


def headlines(result: dict[str, Any]) -> list[list[str]]:
    """The whole stream."""
    seconds = {row["variant"]: row["seconds"] for row in result["rows"]}
    row, what = result["rows"][0], "{model}, a stream of {requests} requests on {batch} rows"
    return [
        headline(what.format_map(row) + of_text, seconds[variant], "s", seconds.get("dense"))
        for variant, of_text in (("sparse", ""), (BY_TEXT, ", each text its own neurons"))
        if variant in seconds
    ]


def readme(result: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """Throughput and latency of every variant, and a figure of the latencies."""
    from experiments import figures

    rows = result["rows"]
    cells = [
        [row["model"], row["variant"], row["batch"], f"{row['tokens_per_s']:.0f}"]
        + [f"{row[f'{name}_s_p{share}']:.2f}" for name in ("first_token", "latency") for share in (50, 99)]
        + [f"{row['error']:.0e}"]
        for row in rows
    ]
    header = ["model", "variant", "rows", "tokens/s", "first token p50 (s)", "p99 (s)", "latency p50 (s)", "p99 (s)"]
    first = rows[0]
    arriving = f"at {first['rate']:g} a second" if first["rate"] else "at once"
    said = f"{first['requests']} requests arriving {arriving}, weights: {first['weights']}.\n\n"
    drawn = figures.draw(lambda axes: _plot(axes, rows))
    return said + markdown_table(cells, [*header, "error"]), {"opt_serving.png": drawn}


def _plot(axes, rows: list[Row]) -> None:
    from experiments import figures

    for row, colour in zip(rows, (figures.BLUE, figures.GREEN), strict=False):
        share = np.arange(1, len(row["latencies_s"]) + 1) / len(row["latencies_s"])
        for which, style, name in ((0, "--", "first token"), (1, "-", "whole answer")):
            times = sorted(latency[which] for latency in row["latencies_s"])
            axes.plot(times, share, style, color=colour, label=f"{row['variant']}, {name}")
    axes.set(title="Requests answered within a time", xlabel="seconds after arrival", ylabel="share of requests")
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.legend()
