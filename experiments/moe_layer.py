"""How long does a layer of experts take, routing and all, and how near the bound does it come?

A `MixtureOfExperts` in bfloat16, from hidden states to output, at the sizes of Mixtral, Qwen3, Switch and Swin-MoE,
with experts that are equally popular and with few that are (Zipf's law); and one grouped product by itself. Next to it
in the same run: torch's grouped product with the same steps around it, and cuBLAS's batched products on balanced
experts without any routing; for the first routing also the layer by XLA's ragged_dot and by dense one-hot dispatch,
which take the longest and do not depend on it by much. Every row is checked.

    python -m experiments moe_layer --keep        six minutes on an H200, two of them torch's

The check is the relative error of 256 tokens against a float32 loop over experts, and that two runs agree to the bit.

Expected there: 1.1 to 2.9 times as quick as torch's layer, 80 to 93% of the bound where few tokens share an expert's
weights, 500 to 700 TFLOP/s where many do; Zipf's law costs at most a fifth over equal popularity.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from experiments import moe, moe_peers, options, products, programs
from experiments.headlines import headline
from experiments.moe_peers import NOISE, ROUTINGS, Layer
from experiments.runs import Row, Run, markdown_table
from pallas_kernels.case import Work, tolerance
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.routing import Routing
from pallas_kernels.workbench.gpus import find_gpu
from pallas_kernels.workbench.timing import Timer, cupti
from sparsellm.mixture_of_experts import LinearRouter, MixtureOfExperts, RouterRule

DTYPE = "bfloat16"
SAMPLE = 256  # tokens that are checked
PEERS = {"torch": "torch, _grouped_mm", "ragged_dot": "XLA, ragged_dot", "one_hot": "XLA, one-hot", "bmm": "cuBLAS bmm"}

# name -> sizes, numbers of experts, numbers of tokens
_MIXTRAL = {"d_model": 4096, "d_ff": 14336, "top_k": 2, "activation": "silu", "gated": True}
_QWEN3 = {"d_model": 2048, "d_ff": 768, "top_k": 8, "activation": "silu", "gated": True}
_SWITCH = {"d_model": 768, "d_ff": 3072, "activation": "relu"}
_SWIN = {"activation": "gelu", "bias": True}
MODELS: dict[str, tuple[dict[str, Any], tuple[int, ...], tuple[int, ...]]] = {
    "mixtral": (_MIXTRAL, (8,), (1024, 4096, 16384)),
    "qwen3": (_QWEN3, (128,), (4096, 16384)),
    "switch": (_SWITCH, (64, 128, 256), (1024, 4096)),
    "swin-512": ({"d_model": 512, "d_ff": 2048, **_SWIN}, (8, 16, 32), (4608,)),
    "swin-1024": ({"d_model": 1024, "d_ff": 4096, **_SWIN}, (8, 16, 32), (1152,)),
    "product": ({"d_model": 2048, "d_ff": 8192, "activation": None}, (16,), (16384,)),
    "tiny": ({"d_model": 32, "d_ff": 64, "top_k": 2, "activation": "silu", "gated": True}, (4,), (64,)),
}

# What dense dispatch may make of a layer, in values and in FLOPs: an eighth of the memory, and a tenth of a second.
DENSE_VALUES, DENSE_FLOPS = 2**33, 1e14


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of moe_layer.

    Attributes:
        models: whose layers: mixtral, qwen3, switch, swin-512, swin-1024, product (one grouped product), tiny.
        routings: uniform or zipf: how popular experts are.
        seed: of weights and tokens.
        no_peers: leave out what needs torch.
    """

    models: tuple[str, ...] = tuple(name for name in MODELS if name != "tiny")
    routings: tuple[str, ...] = ROUTINGS
    seed: int = 0
    no_peers: bool = False

    @classmethod
    def smoke(cls) -> "Config":
        """One small layer; on a CPU by the clock on the wall."""
        return cls(models=("tiny",), no_peers=True)


def run(config: Config, run: Run) -> list[Row]:
    """A row for each layer, number of tokens and routing, and a figure."""
    rows = measure(config, run, cupti if jax.default_backend() == "gpu" else programs.wall_clock)
    run.show(*readme({"rows": rows}))
    return rows


def layers(config: Config) -> list[Layer]:
    """What is measured, in this order.

    Raises:
        ValueError: an option is empty or holds what it must not.
    """
    options.check_filled(config, "models", "routings")
    options.check_known(config, "models", tuple(MODELS))
    options.check_known(config, "routings", ROUTINGS)
    return [
        Layer(model=model, experts=experts, tokens=tokens, routing=routing, seed=config.seed, **sizes)
        for model in config.models
        for sizes, all_experts, all_tokens in [MODELS[model]]
        for experts in all_experts
        for tokens in all_tokens
        for routing in config.routings
    ]


def measure(config: Config, run: Run, timer: Timer) -> list[Row]:
    """Times and checks every layer; peers first, while little else is on the GPU.

    Raises:
        RuntimeError: a result is not that of the reference.
    """
    jobs = layers(config)
    of_torch = [{} for _ in jobs]
    if not config.no_peers:
        of_torch = run.remembered("torch", lambda: moe_peers.measure_layers(jobs))
    rows = []
    for i, (layer, of_others) in enumerate(zip(jobs, of_torch, strict=True)):
        measure_one = measure_product if layer.activation is None else measure_layer
        one = functools.partial(measure_one, layer, timer, with_xla=layer.routing == config.routings[0])
        row = run.remembered(f"row_{i}", one) | of_others
        times = ", ".join(f"{name.removesuffix('_us')} {value}" for name, value in row.items() if name.endswith("_us"))
        print(f"{i + 1}/{len(jobs)} {_named(row)}, in us: {times}", flush=True)
        rows.append(row)
    return rows


def measure_layer(layer: Layer, timer: Timer, *, with_xla: bool = True) -> Row:
    """Times and checks one layer, and what XLA makes of it."""
    module, x = make(layer)
    graphdef, params = nnx.split(module)
    functions = _functions(graphdef)
    sample = jax.random.permutation(jax.random.key(layer.seed), layer.tokens)[:SAMPLE]
    checked = {name: functions[name] for name in ("time", *(_affordable(layer) if with_xla else ()))}
    row = _time_and_check(layer, checked, [params, x], sample, moe.reference(module, x[sample]), timer)
    by_expert = jnp.resize(x, (layer.experts, max(layer.slots // layer.experts, 1), layer.d_model))
    row["bmm_us"] = _time_us(functions["bmm"], [params, by_expert], timer)[1]
    return _row(layer, functions["counts"](params, x), row)


def measure_product(layer: Layer, timer: Timer, *, with_xla: bool = True) -> Row:
    """Times and checks one product of rows that lie in the order of their experts."""
    key_x, key_w, key_expert, key_sample = jax.random.split(jax.random.key(layer.seed), 4)
    x = jax.random.normal(key_x, (layer.tokens, layer.d_model), DTYPE)
    w = jax.random.normal(key_w, (layer.experts, layer.d_model, layer.d_ff), DTYPE) / layer.d_model**0.5
    expert = jax.random.categorical(key_expert, jnp.asarray(layer.log_popularity()), shape=(layer.tokens,))
    counts = jnp.bincount(expert, length=layer.experts).astype(jnp.int32)
    routing = Routing(counts=counts, order=jnp.arange(layer.tokens, dtype=jnp.int32))
    sample = jax.random.permutation(key_sample, layer.tokens)[:SAMPLE]
    expected = moe.product_reference(x[sample], w, routing.slot_experts()[sample])
    checked = {"time": _grouped_product} | ({"ragged_dot": _ragged_product} if with_xla else {})
    row = _time_and_check(layer, checked, [x, w, routing], sample, expected, timer)
    by_expert = jnp.resize(x, (layer.experts, max(layer.tokens // layer.experts, 1), layer.d_model))
    row["bmm_us"] = _time_us(_batched_product, [by_expert, w], timer)[1]
    return _row(layer, counts, row)


def _time_us(function: Callable[..., Any], arguments: list[Any], timer: Timer) -> tuple[Any, float]:
    out, us = products.time_us(function, arguments, timer)
    return out, round(us, 2)


def _time_and_check(
    layer: Layer, functions: dict[str, Callable[..., Any]], arguments: list[Any], sample, expected, timer: Timer
) -> Row:
    """Times of every function, and of the first, which is ours, the error and whether it is deterministic.

    Raises:
        RuntimeError: ours is not what is expected. A peer that is not, or that cannot, is left out.
    """
    row: Row = {}
    for name, function in functions.items():
        try:
            out, us = _time_us(function, arguments, timer)
        except jax.errors.JaxRuntimeError as failed:
            if name == "time":
                raise
            print(f"{name}, {layer}: {failed}", flush=True)
            continue
        error = float(products.relative_error(out[sample], expected))
        if name == "time":
            again = function(*arguments)
            row |= {"error": error, "deterministic": bool(jnp.array_equal(out, again))}
        if error <= tolerance(DTYPE):
            row[f"{name}_us"] = us
        elif name == "time":
            raise RuntimeError(f"{layer}: error {error:.1e} is above {tolerance(DTYPE)}")
        else:
            print(f"{name}, {layer}: left out, as its error is {error:.1e}", flush=True)
    return row


def _row(layer: Layer, counts: Any, measured: Row) -> Row:
    live, busiest = int((counts > 0).sum()), int(counts.max())
    parts = layer.hidden if layer.activation is None else layer.hidden + layer.d_ff
    written = layer.hidden if layer.activation is None else layer.d_model
    flops = 2 * layer.slots * layer.d_model * parts
    size = 2 * (layer.tokens * (layer.d_model + written) + live * layer.d_model * parts)
    gpu, us = find_gpu(jax.devices()[0].device_kind), measured["time_us"]
    return {
        **{
            name: getattr(layer, name) for name in ("model", "experts", "top_k", "d_model", "d_ff", "tokens", "routing")
        },
        "dtype": DTYPE,
        "live_experts": live,
        "busiest": round(busiest / layer.slots, 4),
        **measured,
        "bound_us": None if gpu is None else round(gpu.bound_us(Work(flops=flops, bytes=size)), 2),
        "tflops": round(flops / us / 1e6, 1),
        "gbps": round(size / us / 1e3, 1),
    }


def make(layer: Layer) -> tuple[MixtureOfExperts, Float[Array, "tokens d_model"]]:
    """The layer, and tokens that its router sends to experts of the popularity asked for."""
    rngs, dtype = nnx.Rngs(layer.seed), jnp.dtype(DTYPE)
    rule = RouterRule(top_k=layer.top_k, weights="softmax_top_k" if layer.top_k > 1 else "softmax")
    router = LinearRouter(layer.d_model, layer.experts, rule, bias=True, rngs=rngs)
    router.kernel[...] *= NOISE / jnp.std(router.kernel[...]) / layer.d_model**0.5
    assert router.bias is not None
    router.bias[...] = jnp.asarray(layer.log_popularity())
    module = MixtureOfExperts(
        layer.d_model,
        layer.d_ff,
        router,
        activation=str(layer.activation),
        gated=layer.gated,
        bias=layer.bias,
        dtype=dtype,
        param_dtype=dtype,
        rngs=rngs,
    )
    module.wo_bias = None
    if module.wi_bias is not None:
        module.wi_bias[...] = jax.random.normal(rngs.params(), module.wi_bias.shape, dtype)
    return module, jax.random.normal(rngs.params(), (layer.tokens, layer.d_model), dtype)


@functools.cache  # one compilation for both routings
def _functions(graphdef: nnx.GraphDef) -> dict[str, Callable[..., Any]]:
    """By name: "time" is the layer itself, "counts" the tokens of each expert, the rest are XLA's."""

    def of_layer(function):
        return jax.jit(lambda params, x: function(nnx.merge(graphdef, params), x))

    return {
        "time": of_layer(lambda layer, x: layer(x)),
        "counts": of_layer(lambda layer, x: layer.route(x).counts),
        "ragged_dot": of_layer(lambda layer, x: moe.ragged_dot(layer, x, layer.route(x))),
        "one_hot": of_layer(lambda layer, x: moe.one_hot(layer, x, layer.route(x))),
        "bmm": of_layer(moe.balanced),
    }


def _affordable(layer: Layer) -> list[str]:
    """XLA's ways that neither run out of memory nor of time: both multiply every token by every expert."""
    flops = 2 * layer.d_model * (layer.hidden + layer.d_ff) * layer.tokens * layer.experts
    ways = []
    values = layer.experts * layer.slots * max(layer.d_model, layer.d_ff)
    if values <= DENSE_VALUES and flops * layer.top_k <= DENSE_FLOPS:
        ways.append("ragged_dot")
    values = layer.experts * layer.tokens * layer.hidden
    if values <= DENSE_VALUES and flops <= DENSE_FLOPS:
        ways.append("one_hot")
    return ways


@jax.jit
def _grouped_product(x, w, routing):
    return grouped_matmul(x, w, routing)


@jax.jit
def _ragged_product(x, w, routing):
    return moe.ragged_product(x, w, routing)


@jax.jit
def _batched_product(x, w):
    return moe.batched_product(x, w)


def headlines(result: dict[str, Any]) -> list[list[str]]:
    """Of layers as models have them, 4096 tokens that choose experts evenly."""
    layers = {"mixtral": 8, "qwen3": 128, "switch": 128}
    return [
        headline(
            f"layer of {row['experts']} experts as {row['model'].title()}'s, {row['tokens']} tokens",
            row["time_us"] / 1e3,
            "ms",
            row["one_hot_us"] and row["one_hot_us"] / 1e3,
            {PEERS[peer]: row.get(f"{peer}_us") and row[f"{peer}_us"] / 1e3 for peer in ("torch", "ragged_dot")},
        )
        for row in result["rows"]
        if layers.get(row["model"]) == row["experts"] and (row["tokens"], row["routing"]) == (4096, "uniform")
    ]


def readme(result: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """Every layer's time next to its peers', and a figure of how much of the bound each reaches."""
    from experiments import figures

    rows = result["rows"]
    header = ["model", "experts", "tokens", "routing", "µs", "TFLOP/s", "GB/s", "of the bound"]
    peers = {peer: name for peer, name in PEERS.items() if any(row.get(f"{peer}_us") for row in rows)}
    cells = [
        [row[name] for name in ("model", "experts", "tokens", "routing", "time_us", "tflops", "gbps")]
        + [_share(row, "time")]
        + [f"{row[f'{peer}_us'] / row['time_us']:.2f}x" if row.get(f"{peer}_us") else "–" for peer in peers]
        + [f"{row['error']:.0e}"]
        for row in rows
    ]
    text = "Times of peers over ours; cuBLAS bmm is no layer but its products alone, on balanced experts:\n\n"
    text += markdown_table(cells, [*header, *peers.values(), "error"])
    if not all(row["deterministic"] for row in rows):
        text += "\n\nNot every row is the same to the bit when it is run again."
    if not any(row["bound_us"] for row in rows):
        return text, {}
    height = 1.0 + 0.25 * len({_label(row) for row in rows})
    return text, {"moe_layer.png": figures.draw(lambda axes: _plot(axes, rows), size=(7.6, height))}


def _share(row: Row, name: str) -> str:
    return f"{row['bound_us'] / row[f'{name}_us']:.0%}" if row["bound_us"] else "–"


def _label(row: Row) -> str:
    return f"{row['model']}, {row['experts']} experts, {row['tokens']} tokens"


def _named(row: Row) -> str:
    return f"{_label(row)}, {row['routing']}"


def _plot(axes, rows: Sequence[Row]) -> None:
    """A line for each layer with experts as popular as the first row's, a point for each way to compute it."""
    from experiments import figures

    shown = [row for row in rows if row["routing"] == rows[0]["routing"] and row["bound_us"]]
    labels = list(dict.fromkeys(map(_label, shown)))
    ways = {"bmm": ("|", figures.INK), "one_hot": ("v", figures.PINK), "ragged_dot": ("s", figures.GREEN)}
    ways |= {"torch": ("D", figures.ORANGE), "time": ("o", figures.BLUE)}
    for way, (marker, colour) in ways.items():
        own = [row for row in shown if row.get(f"{way}_us")]
        places = [labels.index(_label(row)) for row in own]
        shares = [100 * row["bound_us"] / row[f"{way}_us"] for row in own]
        size = 9 if way == "bmm" else 5
        name = PEERS.get(way, "ours")
        if own:
            axes.plot(shares, places, marker, color=colour, markersize=size, markeredgewidth=2, label=name)
    axes.set(title=f"Layers of experts, {rows[0]['routing']} routing", xlabel="share of the bound (%)")
    axes.set(yticks=range(len(labels)), yticklabels=labels, xscale="log")
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
