"""How near does the cost model's choice of a plan come to the best plan, and to dense?

Sixty masks (random, clustered, banded and power-law ones, and the ReLU activations of a model trained here), each run
by every plan there is, the index found in A's values inside the timed region: the time of the plan that `choose_plan`
picks from the mask, over the best plan's and under the dense one's. A lies as each plan's kernel reads it. Every
product is checked.

    make quickstart                                        the model, in three minutes
    python -m experiments plan_choice --keep               a minute on an H200

Expected there: on 52 of the sixty masks the best plan, on all others one within 8% of it, and none slower than dense.
Activations of quickstart's model gain by no plan: dense takes 25 us there, every other 37 and more, though up to 95% of
their values are zero.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import products
from experiments.masks import KINDS, Mask
from experiments.runs import Row, Run, markdown_table
from pallas_kernels.case import tolerance
from pallas_kernels.workbench.timing import Timer, cupti
from sparsellm.micro_tiles import MicroTile
from sparsellm.plan import candidates, choose_plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of plan_choice.

    Attributes:
        m: rows of A; of an activation, tokens.
        n: columns of B, but for activations.
        k: columns of A, but for activations.
        dtype: of the operands: bfloat16, float16 or float32.
        masks: names in `experiments.masks.KINDS`.
        granularities: their micro-tiles.
        sparsities: their shares of zero micro-tiles.
        model: the folder of a finished run of quickstart, whose ReLU activations are masks too; None for the latest
            one beside this run, or none if there is none.
        seed: of operands and masks.
    """

    m: int = 4096
    n: int = 4096
    k: int = 4096
    dtype: str = "bfloat16"
    masks: tuple[str, ...] = tuple(KINDS)
    granularities: tuple[str, ...] = ("128x1", "32x1", "1x64", "128x128")
    sparsities: tuple[float, ...] = (0.5, 0.9, 0.99)
    model: Path | None = None
    seed: int = 0

    @classmethod
    def smoke(cls) -> "Config":
        """One small mask."""
        return cls(m=256, n=256, k=256, masks=("random",), granularities=("128x1",), sparsities=(0.9,))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A product, and what its row says of it."""

    named: Row
    a: jax.Array
    b: jax.Array


def run(config: Config, run: Run) -> list[Row]:
    """A row for each mask, and a figure."""
    products.require_gpu("plan_choice")
    model = config.model or latest_quickstart(run.folder.parents[1])
    if model is None:
        print("no finished run of quickstart: its ReLU activations are left out (make quickstart, or --model)")
    rows = measure(config, model)
    run.show(*readme({"rows": rows}))
    return rows


def latest_quickstart(runs: Path) -> Path | None:
    """The latest finished run of quickstart in a folder of runs."""
    finished = sorted(path.parent for path in runs.glob("quickstart/*/rows.jsonl"))
    return finished[-1] if finished else None


def measure(config: Config, model: Path | None, timer: Timer = cupti) -> list[Row]:
    """Times and checks every plan on every mask.

    Raises:
        ValueError: an option holds what it must not.
        FileNotFoundError: `model` is no finished run of quickstart.
        RuntimeError: a result is not that of the reference.
    """
    tolerance(config.dtype)
    rows = []
    for problem in itertools.chain(synthetic(config), activations(config, model) if model else ()):
        rows.append(_measure(problem, timer))
        shown = ("mask", "granularity", "layer", "sparsity", "plan", "time_us", "best_plan", "best_us", "dense_us")
        print(", ".join(f"{name} {rows[-1][name]}" for name in shown), flush=True)
    if not rows:
        raise ValueError("there must be a mask; got none")
    return rows


def synthetic(config: Config) -> Iterator[Problem]:
    """Products under the masks of the config."""
    for kind, granularity, sparsity in itertools.product(config.masks, config.granularities, config.sparsities):
        tile = MicroTile.parse(granularity)
        mask = Mask(
            kind=kind, rows=tile.rows, cols=tile.cols, sparsity=sparsity, m=config.m, k=config.k, seed=config.seed
        )
        a, b = products.operands(mask, config.n, config.dtype)
        yield Problem(named={"mask": kind, "granularity": granularity, "layer": None, "sparsity": sparsity}, a=a, b=b)


def activations(config: Config, folder: Path) -> Iterator[Problem]:
    """The second products of a trained model's feed-forward blocks, on held-out text: one a layer."""
    from models import load_opt

    source = folder / "model" / "orbax"
    if not source.is_dir():
        raise FileNotFoundError(f"model must be the folder of a finished run of quickstart; there is no {source}")
    model = load_opt(source, dtype=config.dtype)
    with np.load(folder / "tokens.npz") as arrays:
        held_out = arrays["held_out"]
    length = min(model.config.max_length // 2, config.m)  # quickstart's window
    windows = min(-(-config.m // length), len(held_out) // length)
    tokens = jnp.asarray(held_out[: windows * length].reshape(windows, length))
    for layer, a in enumerate(_activations(*nnx.split(model, nnx.Param), tokens)):
        b = jnp.asarray(model.layers[layer].fc2.kernel[...], config.dtype)
        sparsity = round(1 - float(jnp.mean(a != 0, dtype=jnp.float32)), 4)
        named = {"mask": "relu", "granularity": "1x1", "layer": layer, "sparsity": sparsity}
        yield Problem(named=named, a=a[: config.m], b=b)


@functools.partial(jax.jit, static_argnums=0)
def _activations(graphdef: nnx.GraphDef, params: nnx.State, tokens: jax.Array) -> list[jax.Array]:
    _, captured = nnx.capture(nnx.merge(graphdef, params), nnx.Intermediate)(tokens)
    layers = captured["layers"]
    return [layers[i]["ffn_activation"][0] for i in sorted(layers)]


def _measure(problem: Problem, timer: Timer) -> Row:
    a, b = problem.a, problem.b
    (m, k), n = a.shape, b.shape[1]
    live = np.asarray(a != 0)
    began = time.perf_counter()
    chosen = choose_plan(m, k, n, a.dtype, sample=live)
    choose_ms = 1e3 * (time.perf_counter() - began)
    times, errors = {}, []
    for plan in candidates(m, k, n, a.dtype):
        out, times[plan] = products.time_us(
            products.functions(plan)["with_index"], [a, b, products.as_read(plan, a), None], timer
        )
        errors.append(products.checked_error(plan, out, a, b, f"{problem.named}"))
    best = min(times, key=times.__getitem__)
    (dense,) = (plan for plan in times if plan.axis == "dense")
    return {
        **problem.named,
        "dtype": a.dtype.name,
        **{"m": m, "n": n, "k": k},
        "plan": str(chosen),
        "time_us": round(times[chosen], 2),
        "best_plan": str(best),
        "best_us": round(times[best], 2),
        "dense_us": round(times[dense], 2),
        "over_best": round(times[chosen] / times[best], 4),
        "speedup": round(times[dense] / times[chosen], 3),
        "choose_ms": round(choose_ms, 1),
        "error": max(errors),
        **{f"{plan}_us": round(us, 2) for plan, us in times.items() if plan != dense},
    }


def readme(result: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """A line for each kind of mask and for all, and a figure with a dot for each mask."""
    from experiments import figures

    rows = result["rows"]
    groups = {kind: [row for row in rows if row["mask"] == kind] for kind in dict.fromkeys(row["mask"] for row in rows)}
    cells = []
    for kind, own in [*groups.items(), ("all", rows)]:
        over_best, speedups = (np.array([row[name] for row in own]) for name in ("over_best", "speedup"))
        cells.append(
            [kind, len(own), sum(row["plan"] == row["best_plan"] for row in own)]
            + [f"{np.exp(np.log(over_best).mean()):.3f}", f"{over_best.max():.3f}"]
            + [f"{np.exp(np.log(speedups).mean()):.2f}", f"{speedups.min():.2f}", f"{speedups.max():.2f}"]
        )
    header = ["masks", "number", "best chosen", "time over the best plan's, mean", "most"]
    header += ["speedup over dense, mean", "least", "most"]
    return markdown_table(cells, header), {"plan_choice.png": figures.draw(lambda axes: _plot(axes, groups))}


def _plot(axes, groups: dict[str, list[Row]]) -> None:
    from matplotlib.ticker import LogLocator

    from experiments import figures

    colours = [*figures.ordered_colours(max(len(groups) - 1, 1)), figures.ORANGE]
    for colour, (kind, own) in zip(colours, groups.items(), strict=False):
        best = [row["dense_us"] / row["best_us"] for row in own]
        axes.plot(best, [row["speedup"] for row in own], "o", color=colour, markersize=4, label=kind.replace("_", " "))
    ends = axes.get_xlim()
    axes.plot(ends, ends, "--", color=figures.INK, linewidth=1, label="best plan chosen")
    axes.set(xscale="log", yscale="log", title="The plan chosen, index found for each product")
    axes.set(xlabel="speedup of the best plan over dense", ylabel="speedup of the chosen plan")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}x")
        axis.set_minor_formatter("")
    axes.legend()
