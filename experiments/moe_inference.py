"""How quick is a whole model of experts, and how much memory does it take, against one in plain XLA and in PyTorch?

Switch Transformers (base) and Swin-MoE (base) of the published sizes, with random weights made on the device. Timed is
one forward pass, wall-clock, from token ids or images on the device to logits: for Switch the encoder over 128 tokens
and the decoder over 128 (teacher-forced), as in PIT's tables; for Swin-MoE images of 192 x 192. Memory is what XLA says
its program takes at once (weights, inputs, outputs, temporaries), and the most that torch had allocated. The same
weights run in our kernels and in plain XLA, and their logits are compared; torch makes its own. In torch, Switch is
transformers' model and Swin-MoE, which transformers has not, our own of `swin_peer`.

    python -m experiments moe_inference --keep        on a GPU; goes on where it was interrupted

Expected on an H200: in a bfloat16 batch of 8, 10 to 19 times as quick as plain XLA for Switch and 2 to 3.6 times for
Swin-MoE; in float32 2.8 to 3.9 and 1.8 to 2.8 times. Torch's Swin-MoE takes 14 to 23 ms for 8 images as for 32, the
time of its launches, where ours takes 4 and 10. Some half an hour with both dtypes: most of it is compiling, one
to two minutes a model and dtype.

Routers are made as sure as trained ones (the largest probability is near one), so that a wrong expert shows in the
logits: one wrong layer changes them by a fifth and more. Rounding sends some tokens that are near a tie elsewhere, and
more from layer to layer, hence the check: the median row of logits, which in bfloat16 moves by one to three percent. In
float32 JAX multiplies as TF32 what is no expert's, which can be too rough: then both are computed once more, untimed,
with every product in float32, and compared.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from experiments import moe, moe_peers, options, programs, swin_peer
from experiments.headlines import headline
from experiments.runs import Row, Run, markdown_table
from models.swin_moe import SwinMoE, SwinMoEConfig
from models.switch_checkpoint import ARCHITECTURE
from models.switch_config import SwitchConfig
from models.switch_transformer import SwitchTransformer
from pallas_kernels.workbench.timing import Timer
from sparsellm.mixture_of_experts import MixtureOfExperts

BASELINES = tuple(variant for variant in moe.VARIANTS if variant != "sparse")
PEERS = {"xla": "XLA", "one_hot": "XLA, one-hot", "transformers": "transformers, torch", "torch": "torch"}
SURE = 4.0  # what the initial routers' logits are multiplied by
TOLERANCES = {"bfloat16": 5e-2, "float16": 2e-2, "float32": 1e-3}  # rounding adds up over a network


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of moe_inference.

    Attributes:
        models: "switch-" or "swin-" and a preset's name.
        batches: sequences or images at once.
        dtypes: of weights and activations: bfloat16 or float32.
        length: tokens that Switch's encoder reads, and its decoder.
        baselines: what to compare with: xla (our layers without kernels), one_hot (every expert on every token).
        repeats: timed calls.
        seed: of weights and inputs.
        no_peers: leave out what needs torch.
    """

    models: tuple[str, ...] = tuple(f"switch-base-{e}" for e in (64, 128, 256)) + tuple(
        f"swin-base-{e}" for e in (8, 16, 32)
    )
    batches: tuple[int, ...] = (8, 32)
    dtypes: tuple[str, ...] = ("bfloat16",)
    length: int = 128
    baselines: tuple[str, ...] = ("xla",)
    repeats: int = 10
    seed: int = 0
    no_peers: bool = False

    @classmethod
    def smoke(cls) -> "Config":
        """A tiny model."""
        return cls(models=("switch-tiny",), batches=(2,), dtypes=("float32",), length=8, repeats=2, no_peers=True)


def run(config: Config, run: Run) -> list[Row]:
    """A row for each model, dtype and batch."""
    rows = measure(config, run)
    run.show(*readme({"rows": rows}))
    return rows


def measure(config: Config, run: Run, timer: Timer = programs.wall_clock) -> list[Row]:
    """Times and checks every model; peers first, while little else is on the GPU.

    Raises:
        ValueError: an option is empty or holds what it must not.
        RuntimeError: the logits of two ways to compute a model differ.
    """
    _check(config)
    jobs = [(model, dtype) for model in config.models for dtype in config.dtypes]
    of_peers = {
        job: run.remembered(f"peers_{'_'.join(job)}", functools.partial(measure_peers, config, *job)) for job in jobs
    }
    rows = []
    for model, dtype in jobs:
        compute = functools.partial(measure_model, config, model, dtype, timer)
        for row in run.remembered(f"rows_{model}_{dtype}", compute):
            prefix, theirs = f"{row['batch']}_", of_peers[model, dtype].items()
            peer = "transformers" if model.startswith("switch-") else "torch"
            row |= {f"{peer}_{k.removeprefix(prefix)}": v for k, v in theirs if k.startswith(prefix)}
            rows.append(row)
            times = ", ".join(f"{name} {value}" for name, value in row.items() if name.endswith(("_ms", "_gib")))
            print(f"{_label(row)}: {times}", flush=True)
    return rows


def _check(config: Config) -> None:
    options.check_filled(config, "models", "batches", "dtypes", "baselines")
    options.check_known(config, "dtypes", tuple(TOLERANCES))
    options.check_known(config, "baselines", BASELINES)
    for model in config.models:
        for dtype in config.dtypes:
            model_config(model, dtype)


def model_config(model: str, dtype: str) -> SwitchConfig | SwinMoEConfig:
    """The published configuration, with initial weights that let experts show in the logits.

    Raises:
        ValueError: there is no such model.
    """
    family, _, size = model.partition("-")
    dtypes = {"dtype": dtype, "param_dtype": dtype}
    if family == "switch":
        return SwitchConfig.preset(size, init_scale=1.0, **dtypes)
    if family == "swin":
        return SwinMoEConfig.preset(size, init_std=0.02, **dtypes)
    raise ValueError(f"models must start with switch- or swin-; got {model!r}")


def measure_peers(config: Config, model: str, dtype: str) -> Row:
    """Times and memory of transformers' Switch or torch's Swin-MoE, a process for each so that memory is its own."""
    if config.no_peers:
        return {}
    sizes, batches = model_config(model, dtype), sorted(config.batches)
    if isinstance(sizes, SwinMoEConfig):
        return swin_peer.measure_model(swin_peer.describe(sizes, batches, router_std=SURE, repeats=config.repeats))
    fields = ARCHITECTURE.write_config(sizes)
    job = moe_peers.Model(config=fields, dtype=dtype, batches=batches, length=config.length, repeats=config.repeats)
    return moe_peers.measure_model(job)


def measure_model(config: Config, model: str, dtype: str, timer: Timer) -> list[Row]:
    """Times and checks one model on every batch."""
    sizes = model_config(model, dtype)
    network = make(sizes, config.seed)
    return [_measure(config, model, dtype, network, inputs(sizes, batch, config), timer) for batch in config.batches]


def make(sizes: SwitchConfig | SwinMoEConfig, seed: int) -> SwitchTransformer | SwinMoE:
    """The model, with routers that are sure."""
    rngs = nnx.Rngs(seed)
    network = SwitchTransformer(sizes, rngs=rngs) if isinstance(sizes, SwitchConfig) else SwinMoE(sizes, rngs=rngs)
    for _, layer in list(nnx.iter_modules(network)):
        if isinstance(layer, MixtureOfExperts):
            kernel = layer.router.kernel  # LinearRouter's: lecun_normal gives logits of variance one
            scale = SURE / (jnp.std(kernel[...].astype(jnp.float32)) * layer.d_model**0.5)
            kernel[...] = kernel[...] * scale.astype(kernel.dtype)
    return network


def inputs(sizes: SwitchConfig | SwinMoEConfig, batch: int, config: Config) -> list[Array]:
    """Random tokens of the encoder and of the decoder, or random images."""
    key = jax.random.key(config.seed)
    if isinstance(sizes, SwitchConfig):
        return list(jax.random.randint(key, (2, batch, config.length), 0, sizes.vocab_size))
    return [jax.random.normal(key, (batch, sizes.image_size, sizes.image_size, sizes.channels), sizes.dtype)]


def _measure(config: Config, model: str, dtype: str, network: nnx.Module, arrays: list[Array], timer: Timer) -> Row:
    row: Row = {"model": model, "experts": _experts(network), "batch": len(arrays[0]), "dtype": dtype}
    outputs = {}
    for variant in ("sparse", *config.baselines):
        changed = moe.with_experts(network, variant)
        outputs[variant], time_ms, memory_gib = programs.measure(_forward, changed, arrays, config.repeats, timer)
        prefix = "" if variant == "sparse" else f"{variant}_"
        row |= {f"{prefix}time_ms": time_ms, f"{prefix}memory_gib": memory_gib}
    error = _error(outputs)
    if dtype == "float32" and not error <= TOLERANCES[dtype]:
        error = _error({variant: _in_full(moe.with_experts(network, variant), arrays) for variant in outputs})
    if not error <= TOLERANCES[dtype]:
        raise RuntimeError(f"{model} in {dtype}: logits differ by {error:.1e}, above {TOLERANCES[dtype]}")
    return row | {"error": error}


def _in_full(network: nnx.Module, arrays: list[Array]) -> Array:
    """The logits, no product rounded to TF32."""
    with jax.default_matmul_precision("float32"):
        leaves, compiled = programs.compile_model(_forward, network, *arrays)
    return compiled(leaves, *arrays)


def _error(outputs: dict[str, Array]) -> float:
    """The largest of the baselines' distances."""
    ours, *theirs = outputs.values()
    return max(float(programs.median_error(ours, other)) for other in theirs)


def _forward(network: Any, *arrays: Array) -> Array:
    return network(*arrays)


def _experts(network: nnx.Module) -> int:
    found = (layer for _, layer in nnx.iter_modules(network) if isinstance(layer, MixtureOfExperts))
    return max(layer.router.experts for layer in found)


def headlines(result: dict[str, Any]) -> list[list[str]]:
    """Of a model of each kind in bfloat16, at its smaller batch, where peers were there."""
    models = {"switch-base-128": "transformers", "swin-base-16": "torch"}
    return [
        headline(
            f"{row['model']}, a forward pass of {row['batch']}",
            row["time_ms"],
            "ms",
            min(row[name] for name in ("xla_time_ms", "one_hot_time_ms") if row.get(name)),
            {PEERS[peer]: row[f"{peer}_time_ms"]},
        )
        for row in result["rows"]
        if (row["dtype"], row["batch"]) == ("bfloat16", 8)
        if (peer := models.get(row["model"])) and row.get(f"{peer}_time_ms")
    ]


def readme(result: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """Latency and memory of every model next to its peers', and a figure of the latency."""
    from experiments import figures

    rows = result["rows"]
    peers = {peer: name for peer, name in PEERS.items() if any(row.get(f"{peer}_time_ms") for row in rows)}
    cells = [
        [row["model"], row["batch"], row["dtype"], f"{row['time_ms']:.1f}"]
        + [_number(row, f"{peer}_time_ms", "{:.1f}") for peer in peers]
        + [_number(row, f"{peer}_memory_gib".lstrip("_"), "{:.2f}") for peer in ("", *peers)]
        + [f"{row['error']:.0e}"]
        for row in rows
    ]
    names = [*peers.values()]
    header = ["model", "batch", "dtype", "ms", *(f"{name} (ms)" for name in names)]
    header += ["GiB", *(f"{name} (GiB)" for name in names), "error"]
    height = 1.2 + 0.22 * len(rows)
    drawn = figures.draw(lambda axes: _plot(axes, rows, peers), size=(7.6, height))
    return markdown_table(cells, header), {"moe_inference.png": drawn}


def _number(row: Row, name: str, shown: str) -> str:
    return shown.format(row[name]) if row.get(name) else "–"


def _label(row: Row) -> str:
    return f"{row['model']}, batch {row['batch']}, {row['dtype']}"


def _plot(axes, rows: list[Row], peers: dict[str, str]) -> None:
    from experiments import figures

    colours = dict(zip(PEERS, (figures.GREEN, figures.PINK, figures.ORANGE, figures.INK), strict=True))
    for name, colour in [(name, colours[name]) for name in peers] + [("", figures.BLUE)]:
        column = f"{name}_time_ms".lstrip("_")
        own = [(row[column], place) for place, row in enumerate(rows) if row.get(column)]
        axes.plot(*zip(*own, strict=True), "o", color=colour, label=peers.get(name, "ours"))
    axes.set(title="A forward pass", xlabel="time (ms)", xscale="log")
    axes.set(yticks=range(len(rows)), yticklabels=map(_label, rows))
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
