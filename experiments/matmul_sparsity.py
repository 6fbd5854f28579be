"""From which sparsity on is a product quicker than the dense one, and how near the bound does it come?

C = A @ B where micro-tiles of A are zero, on a GPU: the plan that covers the granularity, over a given index and with
finding it in A's values inside the timed region, against the dense product of cuBLAS (float32: in TF32), and, where
torch is installed, cuSPARSE and torch's block-sparse Triton kernel on the same masks. Every row is checked.

    python -m experiments matmul_sparsity --keep        3 minutes on an H200, half of it with --masks random

Expected there, in bfloat16 at 128x1 and random masks: as quick as dense at 0%, 1.7x at 50%, 5.7x at 90%, 13x at 99%;
3.8x and 6.1x at the last two where the index is found anew for each product. Granularities without a kernel of their
own (32x1, 1x64, 32x64) are covered by the plan that the cost model picks, dense included.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from experiments import options, peers, products
from experiments.headlines import headline
from experiments.masks import Mask
from experiments.runs import Row, Run, markdown_table
from pallas_kernels.case import tolerance
from pallas_kernels.workbench.timing import Timer, cupti
from sparsellm.micro_tiles import MicroTile
from sparsellm.plan import Plan, choose_plan

# What has a kernel of its own. Anything else is covered by the plan that the cost model expects to be quickest.
PLANS = {
    "128x1": Plan("k", MicroTile(128, 1)),
    "64x1": Plan("k", MicroTile(64, 1)),
    "128x128": Plan("k", MicroTile(128, 128)),
}
PEERS = {"dense": "cuBLAS, dense", **peers.NAMES}
PIT_CLAIMS = {"cusparse": "88.7x"}  # PIT (SOSP'23), its best over cuSPARSE: float32, V100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of matmul_sparsity.

    Attributes:
        m: rows of A.
        n: columns of B.
        k: columns of A.
        dtypes: of the operands: bfloat16, float16 or float32.
        granularities: micro-tiles of the masks.
        masks: how zeros lie: names in `experiments.masks.KINDS`.
        sparsities: shares of micro-tiles that are zero.
        seed: of the operands and the masks.
        no_peers: leave out what needs torch.
    """

    m: int = 4096
    n: int = 4096
    k: int = 4096
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    granularities: tuple[str, ...] = ("128x1", "64x1", "32x1", "1x64", "32x64", "128x128")
    masks: tuple[str, ...] = ("random", "clustered")
    sparsities: tuple[float, ...] = (0.0, 0.5, 0.75, 0.9, 0.95, 0.99)
    seed: int = 0
    no_peers: bool = False

    @classmethod
    def smoke(cls) -> "Config":
        """One small product."""
        return cls(
            m=256, n=256, k=256, dtypes=("bfloat16",), granularities=("128x1",), masks=("random",), sparsities=(0.9,)
        )


def run(config: Config, run: Run) -> list[Row]:
    """A row for each dtype, mask, granularity and sparsity, and a figure."""
    products.require_gpu("matmul_sparsity")
    rows = measure(config, run)
    run.show(*readme({"rows": rows}))
    return rows


def measure(config: Config, run: Run, timer: Timer = cupti) -> list[Row]:
    """Times and checks every product; peers first, while nothing else of this process is on the GPU.

    Raises:
        ValueError: an option is empty or holds what it must not.
        RuntimeError: a result is not that of the reference.
    """
    options.check_filled(config, "dtypes", "granularities", "masks", "sparsities")
    for dtype in config.dtypes:
        tolerance(dtype)
    tiles = [MicroTile.parse(granularity) for granularity in config.granularities]
    size = {"m": config.m, "k": config.k, "seed": config.seed}
    jobs = [
        peers.Job(mask=Mask(kind=kind, rows=t.rows, cols=t.cols, sparsity=s, **size), n=config.n, dtype=dtype)
        for dtype, kind, t, s in itertools.product(config.dtypes, config.masks, tiles, config.sparsities)
    ]
    of_peers = [{} for _ in jobs] if config.no_peers else run.remembered("torch", lambda: peers.measure(jobs))
    rows = []
    for i, (job, of_others) in enumerate(zip(jobs, of_peers, strict=True)):
        row = run.remembered(f"row_{i}", functools.partial(measure_product, job.mask, job.n, job.dtype, timer))
        rows.append(row | of_others)
        said = f"{row['time_us']} us, {row['with_index_us']} with finding the index, dense {row['dense_us']}"
        print(f"{_named(job.mask)}, {job.dtype}, by {row['plan']}: {said}", flush=True)
    return rows


def measure_product(mask: Mask, n: int, dtype: str, timer: Timer) -> Row:
    """Times and checks one product by the plan that covers the mask's granularity.

    Raises:
        RuntimeError: the result is not that of the reference.
    """
    plan = PLANS.get(mask.granularity) or choose_plan(mask.m, mask.k, n, dtype, sample=mask.elements())
    a, b = products.operands(mask, n, dtype)
    arguments = products.prepare(plan, a, b)
    outputs, times = {}, {}
    for name, function in products.functions(plan).items():
        outputs[name], times[name] = products.time_us(function, arguments, timer)
    error = max(products.checked_error(plan, outputs[name], a, b, _named(mask)) for name in ("product", "with_index"))
    bound = products.bound_us(mask, n, dtype)
    return {
        "granularity": mask.granularity,
        "sparsity": mask.sparsity,
        "mask": mask.kind,
        "dtype": dtype,
        "m": mask.m,
        "n": n,
        "k": mask.k,
        "plan": str(plan),
        "time_us": round(times["product"], 2),
        "index_us": round(times["index"], 2) if "index" in times else None,
        "with_index_us": round(times["with_index"], 2),
        "dense_us": round(times["dense"], 2),
        "bound_us": None if bound is None else round(bound, 2),
        "speedup": round(times["dense"] / times["product"], 3),
        "error": error,
    }


def _named(mask: Mask) -> str:
    return f"{mask.granularity} {mask.kind} at {mask.sparsity:.0%}"


def break_even(rows: Iterable[Row], time: str) -> float | None:
    """The sparsity from which on `time` is below dense; None where it is not at the highest.

    By linear interpolation, save where the slower side ran dense itself: then it is the first that was quicker.

    Args:
        rows: of one granularity, mask and dtype.
        time: "time_us" or "with_index_us".
    """
    point, quicker = None, 0.0
    for row in sorted(rows, key=lambda row: -row["sparsity"]):
        gap = 0.0 if row.get("plan") == "dense" else row[time] - row["dense_us"]
        if gap >= 0:
            if point is not None and row.get("plan") != "dense":
                point += (row["sparsity"] - point) * -quicker / (gap - quicker)
            return point
        point, quicker = row["sparsity"], gap
    return point


def margins(rows: Sequence[Row]) -> list[Row]:
    """How many times quicker than each peer, by dtype, index given and index found in the timed region.

    The peer's time with its index is that of its product and of making its sparse format. Rows without zeros are left
    out: nobody runs those sparse.
    """
    found = []
    for (peer, name), dtype in itertools.product(PEERS.items(), dict.fromkeys(row["dtype"] for row in rows)):
        own = [row for row in rows if row["dtype"] == dtype and row["sparsity"] > 0 and row.get(f"{peer}_us")]
        if not own:
            continue
        theirs = [row[f"{peer}_us"] for row in own]
        with_format = [us + (row.get(f"{peer}_index_us") or 0) for us, row in zip(theirs, own, strict=True)]
        given = np.array(theirs) / [row["time_us"] for row in own]
        with_index = np.array(with_format) / [_with_index(row) for row in own]
        found.append({"peer": peer, "name": name, "dtype": dtype, "given": given, "with_index": with_index})
    return found


def _with_index(row: Row) -> float:
    return row.get("with_index_us") or row["time_us"] + row["index_us"]  # results before 0.2 hold the sum's parts


def headlines(result: dict[str, Any]) -> list[list[str]]:
    """Of random micro-tiles in bfloat16, 90% zeros, with what it takes to find them."""
    lines = []
    for row in result["rows"]:
        same = (row["dtype"], row["mask"], row["sparsity"]) == ("bfloat16", "random", 0.9)
        if same and row["granularity"] in ("128x1", "128x128"):
            what = f"product of {row['m']}x{row['k']}x{row['n']}, 90% zeros in {row['granularity']}, found in the call"
            timed = {name: peer for peer, name in peers.NAMES.items() if row.get(f"{peer}_us")}
            others = {name: row[f"{peer}_us"] + row[f"{peer}_index_us"] for name, peer in timed.items()}
            lines.append(headline(what, _with_index(row), "µs", row["dense_us"], others))
    return lines


def readme(result: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """Speedups and break-even points, the margins over each peer, and a figure of time over sparsity."""
    from experiments import figures

    rows = [row | {"with_index_us": _with_index(row)} for row in result["rows"]]
    parts = ["Speedup over dense, index given / found in the same call:", _speedups(rows)]
    parts += ["How many times quicker than each peer, over all rows that have zeros, least – geometric mean – most:"]
    parts += [_margins(rows)]
    return "\n\n".join(parts), {"matmul_sparsity.png": figures.draw(lambda axes: _plot(axes, rows), size=(7.6, 4.4))}


def _speedups(rows: list[Row]) -> str:
    sparsities = sorted({row["sparsity"] for row in rows})
    names = ("dtype", "mask", "granularity")
    cells = []
    for group in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
        own = {row["sparsity"]: row for row in rows if tuple(row[name] for name in names) == group}
        plans = " or ".join(dict.fromkeys(row["plan"] for row in own.values() if row.get("plan")))
        speedups = (
            f"{row['speedup']:.2f} / {row['dense_us'] / row['with_index_us']:.2f}" if (row := own.get(s)) else "–"
            for s in sparsities
        )
        points = [break_even(own.values(), time) for time in ("time_us", "with_index_us")]
        break_evens = " / ".join("none" if point is None else f"{point:.0%}" for point in points)
        cells.append([*group, plans or "–", *speedups, break_evens])
    return markdown_table(cells, [*names, "plan", *(f"{s:.0%}" for s in sparsities), "break-even"])


def _margins(rows: list[Row]) -> str:
    def spread(ratios: np.ndarray) -> str:
        return f"{ratios.min():.2f} – {np.exp(np.log(ratios).mean()):.2f} – {ratios.max():.1f}"

    cells = [
        [found["name"], found["dtype"], spread(found["given"]), spread(found["with_index"])]
        + [PIT_CLAIMS.get(found["peer"], "–")]
        for found in margins(rows)
    ]
    return markdown_table(cells, ["peer", "dtype", "index given", "index found", "PIT, at most"])


def _plot(axes, rows: list[Row]) -> None:
    """The first dtype and mask: each granularity's time, and dense and cuSPARSE, which care for it least."""
    from experiments import figures

    first = rows[0]
    shown = [row for row in rows if (row["dtype"], row["mask"]) == (first["dtype"], first["mask"])]
    granularities = list(dict.fromkeys(row["granularity"] for row in shown))

    def line(granularity: str, column: str, style: str, **options) -> None:
        own = [row for row in shown if row["granularity"] == granularity and row.get(column)]
        if own:
            axes.plot([100 * row["sparsity"] for row in own], [row[column] for row in own], style, **options)

    for colour, granularity in zip(figures.ordered_colours(len(granularities)), granularities, strict=True):
        line(granularity, "time_us", "o-", color=colour, markersize=4, label=granularity)
        line(granularity, "bound_us", ":", color=colour, linewidth=1)
    line(first["granularity"], "dense_us", "--", color=figures.INK, label="dense, cuBLAS")
    line(first["granularity"], "cusparse_us", "--", color=figures.ORANGE, label="cuSPARSE, CSR")
    size = "x".join(str(first[name]) for name in ("m", "k", "n"))
    axes.set(title=f"A @ B, {size}, {first['dtype']}, {first['mask']} zeros", yscale="log")
    axes.set(xlabel="zero micro-tiles of A (%); dotted: the bound", ylabel="time, index given (µs)")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
