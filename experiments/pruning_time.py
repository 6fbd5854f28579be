"""How long does it take to prune a layer of a large OPT?

    python -m experiments pruning_time --keep          OPT-13B's, on a GPU: more than 90 s

One decoder layer with random weights goes through `sparsellm.pruning.prune`, which is what prunes whole models block by
block: the calibration tokens run through the layer, sums over the inputs of its six kernels are taken, and each kernel
is pruned. What is timed is all of that, on the wall, once everything is compiled (`compiling_s` is the first time less
that). The check: the share of zeros, and the error of the kernels' outputs on the calibration tokens, relative to the
outputs, of the same call with `errors`. Random tokens through random weights have nothing of the structure that a
method lives on: the errors say that it ran, not how good it is.

Rows: one for each size and method. Seen on an H200 with OPT-13B's layer and 128 windows of 2048 tokens: magnitude
0.25 s, Wanda 0.33, RIA 0.46, and SparseGPT, whose products for X^T X alone are 289 TFLOP, 1.9.
"""

import dataclasses
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import opt, options
from experiments.runs import Row, Run, markdown_table
from models import OPT
from sparsellm import pruning
from sparsellm.pruning import METHODS
from sparsellm.sharding import create_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of pruning_time.

    Attributes:
        sizes: of OPT, 125m to 175b, or tiny.
        methods: the methods to time.
        pattern: where zeros may lie: "unstructured", N:M, or ROWSxCOLS.
        sparsity: share of zeros; n:m has its own.
        windows: of calibration.
        length: tokens of each.
        batch: windows at once.
        dtype: of weights and activations.
        repeats: timed calls, of which the median is given.
        seed: of weights and tokens.
    """

    sizes: tuple[str, ...] = ("13b",)
    methods: tuple[str, ...] = tuple(METHODS)
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
    rows: list[Row] = []
    for size in config.sizes:
        model = one_layer(config, size)
        dense = jax.tree.map(jnp.copy, nnx.state(model))
        for method in config.methods:
            rows.append(measure(config, size, method, model, dense))
    run.show(*readme({"rows": rows}))
    return rows


def one_layer(config: Config, size: str) -> OPT:
    """The first decoder layer of a size, behind a small vocabulary, which is no part of what is pruned."""
    changes: dict[str, Any] = {"layers": 1, "vocab_size": 512, "max_length": config.length, "init_std": 0.02}
    return create_model(lambda: OPT(opt.config_of(size, config.dtype, **changes), rngs=nnx.Rngs(config.seed)), None)


def measure(config: Config, size: str, method: str, model: OPT, dense: nnx.State) -> Row:
    """The seconds of a method, and its check; the model is as it was before."""
    rng = np.random.default_rng(config.seed)
    windows = rng.integers(0, model.config.vocab_size, (config.windows, config.length), np.int32)

    def prune(errors: bool = False) -> tuple[float, list[Row]]:
        nnx.update(model, jax.tree.map(jnp.copy, dense))
        jax.block_until_ready(nnx.state(model))
        start = time.perf_counter()
        pattern = pruning.parse_pattern(config.pattern)
        sparsity = None if isinstance(pattern, pruning.NM) else config.sparsity
        asked: Any = {"pattern": pattern, "sparsity": sparsity, "batch": config.batch, "errors": errors}
        rows = pruning.prune(model, METHODS[method], windows=windows, **asked)
        jax.block_until_ready(nnx.state(model))
        return time.perf_counter() - start, rows

    _, checked = prune(errors=True)
    first, _ = prune()
    seconds = statistics.median(prune()[0] for _ in range(config.repeats))
    nnx.update(model, jax.tree.map(jnp.copy, dense))
    layer = model.layers[0]
    row: Row = {
        "model": f"opt-{size}, a layer",
        "method": method,
        "pattern": config.pattern,
        "kernels": len(checked),
        "weights": sum(kernel.size for kernel in (layer.fc1.kernel, layer.fc2.kernel)) + 4 * model.config.d_model**2,
        "tokens": windows.size,
        "time_s": round(seconds, 3),
        "compiling_s": round(first - seconds, 3),
        "zeros": float(np.mean([kernel["sparsity"] for kernel in checked])),
        "error": float(np.mean([kernel["error"] for kernel in checked])),
    }
    print(f"{row['model']}: {method} {row['time_s']} s, error {row['error']:.4f}", flush=True)
    return row


def readme(result: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """A table."""
    header = ["model", "method", "pattern", "tokens", "s", "zeros", "error"]
    cells = [
        [row["model"], row["method"], row["pattern"], f"{row['tokens']:,}", f"{row['time_s']:.2f}"]
        + [f"{row['zeros']:.1%}", f"{row['error']:.4f}"]
        for row in result["rows"]
    ]
    return markdown_table(cells, header), {}
