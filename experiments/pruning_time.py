"""How long does it take to prune a large OPT, or a layer of it?

    python -m experiments pruning_time --keep          OPT-13B's, on a GPU: more than 90 s
    python -m experiments pruning_time --sizes 30b --methods wanda sparsegpt --whole --keep --variant whole

Decoder layers with random weights go through `sparsellm.pruning.prune`, which prunes models block by block: the
calibration tokens run through the layer, sums over the inputs of its six kernels are taken, and each kernel is pruned.
Random tokens through random weights have nothing of the structure that a method lives on: the errors say that it ran,
not how good it is. Rows: one for each size and method.

Of one layer all of that is timed, on the wall, once everything is compiled (`compiling_s` is the first time less that).
The check: the share of zeros, and the error of the kernels' outputs on the calibration tokens, relative to the outputs,
of the same call with `errors`. Seen on an H200 with OPT-13B's layer and 128 windows of 2048 tokens: magnitude 0.25 s,
Wanda 0.33, RIA 0.46, and SparseGPT, whose products for X^T X alone are 289 TFLOP, 1.9.

A whole model is made anew for each method and pruned in place, once: there is no room for a copy of the weights. What
does not fit into the device's memory is refused before anything is made. Between its layers the hidden states of the
next one are computed, but not for magnitude, which needs no tokens. `block_s` is the median over layers, `compiling_s`
what the first one took beyond it, and `memory_gib` the most that the process has held of the device, where this method
held more than what was before it. The check: the share of zeros, and how far the last layer's output for a window is
from that of the dense model, relative to it, in the median over tokens. Killed at any point, the same command goes on
after the last method. OPT-30B on an H200, 32 windows: SparseGPT three minutes and 74 GiB. At the published damping
its sixth block came out as NaN (28,672 nearly parallel inputs, in float32): damping is raised where that happens.
"""

import collections
import dataclasses
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32

from experiments import opt, options, programs
from experiments.language_models import progress
from experiments.runs import Row, Run, markdown_table
from models import OPT
from sparsellm import pruning
from sparsellm.pruning import METHODS
from sparsellm.pruning.memory import estimate
from sparsellm.sharding import create_model

type Windows = Int32[np.ndarray, "windows length"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of pruning_time.

    Attributes:
        sizes: of OPT, 125m to 175b, or tiny.
        methods: the methods to time.
        whole: all layers of a model in place of one.
        pattern: where zeros may lie: "unstructured", N:M, or ROWSxCOLS.
        sparsity: share of zeros; n:m has its own.
        windows: of calibration.
        length: tokens of each.
        batch: windows at once.
        dtype: of weights and activations.
        repeats: timed calls for a layer, of which the median is given; a whole model is pruned once.
        seed: of weights and tokens.
    """

    sizes: tuple[str, ...] = ("13b",)
    methods: tuple[str, ...] = tuple(METHODS)
    whole: bool = False
    pattern: str = "unstructured"
    sparsity: float = 0.5
    windows: int = 128
    length: int = 2048
    batch: int = 8
    dtype: str = "bfloat16"
    repeats: int = 2
    seed: int = 0

    @classmethod
    def smoke(cls) -> "Config":
        """A tiny layer."""
        return cls(sizes=("tiny",), windows=4, length=16, batch=2, dtype="float32", repeats=1)


def run(config: Config, run: Run) -> list[Row]:
    """A row for each size and method."""
    options.check_known(config, "methods", tuple(METHODS))
    options.check_least(config, 1, "windows", "length", "batch", "repeats")
    options.check_shares(config, "sparsity", ends=False)
    pruning.parse_pattern(config.pattern)
    rows: list[Row] = []
    if config.whole:
        cells = [(size, method) for size in config.sizes for method in config.methods]
        for cell in cells:
            check_memory(config, *cell)
        rows = [run.remembered("_".join(cell), functools.partial(measure_whole, config, *cell)) for cell in cells]
    else:
        for size in config.sizes:
            model = create_model(functools.partial(make, config, size), None)
            dense = jax.tree.map(jnp.copy, nnx.state(model))
            rows += [measure_layer(config, size, method, model, dense) for method in config.methods]
    run.show(*readme({"rows": rows}))
    return rows


def make(config: Config, size: str) -> OPT:
    """A model of a size, or its first decoder layer, behind a small vocabulary, which is no part of what is pruned."""
    changes: dict[str, Any] = {"vocab_size": 512, "max_length": config.length, "init_std": 0.02}
    changes |= {} if config.whole else {"layers": 1}
    return OPT(opt.config_of(size, config.dtype, **changes), rngs=nnx.Rngs(config.seed))


def check_memory(config: Config, size: str, method: str) -> None:
    """Raises ValueError where the device has not the memory to prune all of a model."""
    model = nnx.eval_shape(functools.partial(make, config, size))
    windows = (config.windows, config.length) if needs_windows(method) else None
    estimate(model, METHODS[method], windows=windows, batch=config.batch).check()


def needs_windows(method: str) -> bool:
    """Whether the method looks at what the kernels see."""
    return METHODS[method].needs != "nothing"


def prune(config: Config, method: str, model: OPT, windows: Windows | None, **choices: Any) -> tuple[float, list[Row]]:
    """Prunes the model in place; the seconds that it took, and what `sparsellm.pruning.prune` says of each kernel."""
    pattern = pruning.parse_pattern(config.pattern)
    sparsity = None if isinstance(pattern, pruning.NM) else config.sparsity
    asked: Any = {"pattern": pattern, "sparsity": sparsity, "windows": windows, "batch": config.batch}
    jax.block_until_ready(nnx.state(model))
    start = time.perf_counter()
    rows = pruning.prune(model, METHODS[method], **asked, **choices)
    jax.block_until_ready(nnx.state(model))
    return time.perf_counter() - start, rows


def random_windows(config: Config, model: OPT) -> Windows:
    """The calibration tokens."""
    rng = np.random.default_rng(config.seed)
    return rng.integers(0, model.config.vocab_size, (config.windows, config.length), np.int32)


def described(name: str, method: str, config: Config, model: OPT, windows: Windows | None) -> Row:
    """What was pruned: the first columns of a row."""
    kernels = [kernel for block in pruning.walk(model) for kernel in block.kernels.values()]
    return {
        "model": name,
        "method": method,
        "pattern": config.pattern,
        "kernels": len(kernels),
        "weights": sum(kernel.size for kernel in kernels),
        "tokens": 0 if windows is None else windows.size,
    }


def measure_layer(config: Config, size: str, method: str, model: OPT, dense: nnx.State) -> Row:
    """The seconds of a method for a layer, and its check; the model is as it was before."""
    windows = random_windows(config, model)

    def again(errors: bool = False) -> tuple[float, list[Row]]:
        nnx.update(model, jax.tree.map(jnp.copy, dense))
        return prune(config, method, model, windows, errors=errors)

    _, checked = again(errors=True)
    first, _ = again()
    seconds = statistics.median(again()[0] for _ in range(config.repeats))
    nnx.update(model, jax.tree.map(jnp.copy, dense))
    row = described(f"opt-{size}, a layer", method, config, model, windows) | {
        "time_s": round(seconds, 3),
        "compiling_s": round(first - seconds, 3),
        "zeros": float(np.mean([kernel["sparsity"] for kernel in checked])),
        "error": float(np.mean([kernel["error"] for kernel in checked])),
    }
    print(f"{row['model']}: {method} {row['time_s']} s, error {row['error']:.4f}", flush=True)
    return row


def measure_whole(config: Config, size: str, method: str) -> Row:
    """The seconds of a method for all layers of a model, which is made for it and then dropped; and its check."""
    held = programs.peak_memory_gib()
    model = create_model(functools.partial(make, config, size), None)
    windows = random_windows(config, model)
    calibration = windows if needs_windows(method) else None
    dense = jax.block_until_ready(last_output(model, windows[:1]))
    ends: dict[str, float] = {}  # of blocks
    start = time.perf_counter()
    with progress(f"opt-{size}, {method}", len(model.layers)) as advance:

        def report(kernel: Row) -> None:
            block = kernel["layer"].split(".")[1]
            ends.setdefault(block, time.perf_counter())
            advance(len(ends), f"{(ends[block] - start) / len(ends):.1f} s a block")

        seconds, rows = prune(config, method, model, calibration, report=report)
    blocks = np.diff([start, *ends.values()])
    peak = programs.peak_memory_gib()
    return described(f"opt-{size}", method, config, model, calibration) | {
        "time_s": round(seconds, 3),
        "block_s": round(float(np.median(blocks)), 3),
        "compiling_s": round(float(blocks[0] - np.median(blocks)), 3),
        "memory_gib": None if peak == held else peak,
        "zeros": float(np.mean([kernel["sparsity"] for kernel in rows])),
        "error": float(programs.median_error(last_output(model, windows[:1]), dense)),
    }


def last_output(model: OPT, windows: Windows) -> Float[Array, "windows length d_model"]:
    """What the last block makes of some windows, in float32."""
    (last,) = collections.deque(pruning.walk(model, windows), maxlen=1)
    return jnp.concatenate(last.forward() or []).astype(jnp.float32)


def readme(result: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """A table; whole models have more columns."""
    whole = any("block_s" in row for row in result["rows"])
    header = ["model", "method", "pattern", "tokens", "s", *(["s a block", "GiB"] if whole else []), "zeros", "error"]
    cells = []
    for row in result["rows"]:
        cell = [row["model"], row["method"], row["pattern"], f"{row['tokens']:,}", f"{row['time_s']:.2f}"]
        if whole:
            cell += [f"{row['block_s']:.2f}", "–" if row["memory_gib"] is None else f"{row['memory_gib']:.1f}"]
        cells.append([*cell, f"{row['zeros']:.1%}", f"{row['error']:.4f}"])
    return markdown_table(cells, header), {}
