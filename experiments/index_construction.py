"""What does finding the live micro-tiles cost, by granularity and sparsity?

`micro_tile_index` on A's values, against what else there is to find zeros with: cuSPARSE's dense-to-CSR (through JAX,
float32 only), `jnp.nonzero`, both told the number of non-zeros beforehand, and, where torch is installed, its
`to_sparse_csr`, which waits for the host to learn it. Every index is compared with the mask.

    python -m experiments index_construction --keep        two minutes on an H200

Expected there, in bfloat16 at 4096 squared: 9.3 to 10.7 us whatever the sparsity, the most at 32x1; reading A
once takes 7.8.
"""

import dataclasses
import functools
import itertools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse

from experiments import options, peers, products
from experiments.headlines import headline
from experiments.masks import Mask
from experiments.runs import Row, Run, markdown_table
from pallas_kernels.case import Work, tolerance
from pallas_kernels.workbench.gpus import find_gpu
from pallas_kernels.workbench.timing import Timer, cupti
from sparsellm.micro_tiles import MicroTile
from sparsellm.plan import Plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of index_construction.

    Attributes:
        m: rows of A.
        k: columns of A.
        dtypes: of A: bfloat16, float16 or float32.
        granularities: micro-tiles to find; those of one row are listed along m, others along k.
        sparsities: shares of micro-tiles that are zero, at random.
        seed: of A.
        no_peers: leave out what needs torch.
    """

    m: int = 4096
    k: int = 4096
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    granularities: tuple[str, ...] = ("128x1", "64x1", "32x1", "1x64", "32x64", "128x128")
    sparsities: tuple[float, ...] = (0.0, 0.5, 0.9, 0.99)
    seed: int = 0
    no_peers: bool = False

    @classmethod
    def smoke(cls) -> "Config":
        """One small matrix."""
        return cls(m=256, k=256, dtypes=("bfloat16",), granularities=("128x1",), sparsities=(0.9,))


def run(config: Config, run: Run) -> list[Row]:
    """A row for each dtype, granularity and sparsity, and a figure."""
    products.require_gpu("index_construction")
    rows = measure(config, run)
    run.show(*readme({"rows": rows}))
    return rows


def measure(config: Config, run: Run, timer: Timer = cupti) -> list[Row]:
    """Times and checks every index; peers first, while nothing else of this process is on the GPU.

    Raises:
        ValueError: an option is empty or holds what it must not.
        RuntimeError: an index does not list what is live.
    """
    options.check_filled(config, "dtypes", "granularities", "sparsities")
    for dtype in config.dtypes:
        tolerance(dtype)
    tiles = [MicroTile.parse(granularity) for granularity in config.granularities]
    size = {"m": config.m, "k": config.k, "seed": config.seed}
    jobs = [
        peers.Job(
            mask=Mask(kind="random", rows=t.rows, cols=t.cols, sparsity=s, **size), n=16, dtype=dtype, index_only=True
        )
        for dtype, t, s in itertools.product(config.dtypes, tiles, config.sparsities)
    ]
    of_peers = [{} for _ in jobs] if config.no_peers else run.remembered("torch", lambda: peers.measure(jobs))
    rows = []
    for i, (job, of_others) in enumerate(zip(jobs, of_peers, strict=True)):
        row = run.remembered(f"row_{i}", functools.partial(_measure, job.mask, job.dtype, timer))
        rows.append(row | {"to_sparse_csr_us": of_others.get("cusparse_index_us")})
        print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    return rows


def _measure(mask: Mask, dtype: str, timer: Timer) -> Row:
    plan = Plan("m" if mask.rows == 1 else "k", MicroTile(mask.rows, mask.cols))
    live = mask.micro_tiles() if plan.axis == "k" else mask.micro_tiles().T
    a, _ = products.operands(mask, 1, dtype)
    x = products.as_read(plan, a)
    index, index_us = products.time_us(products.functions(plan)["index"], [a, None, x, None], timer)
    if not np.array_equal(np.asarray(index.mask()), live):
        raise RuntimeError(f"{mask.granularity} at {mask.sparsity:.0%}: the index does not list what is live")
    positions = np.nonzero(mask.elements())
    nonzero_us = _nonzero_us(a, positions, timer)
    csr_us = _csr_us(a, positions, timer) if dtype == "float32" else None  # all that JAX hands to cuSPARSE
    gpu = find_gpu(jax.devices()[0].device_kind)
    moved = Work(flops=0, bytes=a.nbytes + 4 * int(live.sum()))  # A once, and the entries that count
    return {
        "granularity": mask.granularity,
        "sparsity": mask.sparsity,
        "mask": mask.kind,
        "dtype": dtype,
        "m": mask.m,
        "k": mask.k,
        "index_us": round(index_us, 2),
        "nonzero_us": round(nonzero_us, 2),
        "cusparse_us": None if csr_us is None else round(csr_us, 2),
        "bound_us": None if gpu is None else round(gpu.bound_us(moved), 2),
        "error": 0.0,
    }


def _nonzero_us(a: jax.Array, positions: tuple[np.ndarray, ...], timer: Timer) -> float:
    function = jax.jit(lambda a: jnp.nonzero(a, size=positions[0].size))
    out, time = products.time_us(function, [a], timer)
    if not all(map(np.array_equal, out, positions)):
        raise RuntimeError("jnp.nonzero does not find what is live")
    return time


def _csr_us(a: jax.Array, positions: tuple[np.ndarray, ...], timer: Timer) -> float | None:
    """Its time; None, with a line that says so, where its result is not what is live: a peer has no row then."""

    def convert(a):
        csr = sparse.CSR.fromdense(a, nse=positions[0].size)
        return csr.data, csr.indices, csr.indptr

    (_, cols, starts), time = products.time_us(jax.jit(convert), [a], timer)
    counts = np.bincount(positions[0], minlength=a.shape[0])
    if not (np.array_equal(cols, positions[1]) and np.array_equal(np.diff(starts), counts)):
        print(f"cuSPARSE's dense-to-CSR of {a.dtype} does not find what is live: no time of it", file=sys.stderr)
        return None
    return time


def headlines(result: dict[str, Any]) -> list[list[str]]:
    """Of micro-tiles of 128x1 in bfloat16, 90% zeros."""
    return [
        headline(
            f"index of {row['m']}x{row['k']}, 90% zeros in 128x1",
            row["index_us"],
            "µs",
            others={"jnp.nonzero": row["nonzero_us"], "torch to_sparse_csr": row.get("to_sparse_csr_us")},
        )
        for row in result["rows"]
        if (row["dtype"], row["granularity"], row["sparsity"]) == ("bfloat16", "128x1", 0.9)
    ]


def readme(result: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """The table, and a figure of the times over sparsity."""
    from experiments import figures

    rows = result["rows"]
    columns = {
        "dtype": "dtype",
        "granularity": "granularity",
        "sparsity": "sparsity",
        "index_us": "micro_tile_index (µs)",
        "cusparse_us": "cuSPARSE dense-to-CSR (µs)",
        "nonzero_us": "jnp.nonzero (µs)",
        "to_sparse_csr_us": "torch to_sparse_csr (µs)",
        "bound_us": "bound (µs)",
    }
    rows = [row | {"sparsity": f"{row['sparsity']:.0%}"} for row in rows]
    cells = [["–" if row.get(name) is None else row[name] for name in columns] for row in rows]
    figure = figures.draw(lambda axes: _plot(axes, result["rows"]), size=(7.6, 4.0))
    return markdown_table(cells, list(columns.values())), {"index_construction.png": figure}


def _plot(axes, rows: list[Row]) -> None:
    """The last dtype (float32 by default: cuSPARSE is in it): each granularity, and the others at the first one."""
    from experiments import figures

    rows = [row for row in rows if row["dtype"] == rows[-1]["dtype"]]
    granularities = list(dict.fromkeys(row["granularity"] for row in rows))
    for colour, granularity in zip(figures.ordered_colours(len(granularities)), granularities, strict=True):
        own = [row for row in rows if row["granularity"] == granularity]
        axes.plot([100 * row["sparsity"] for row in own], [row["index_us"] for row in own], "o-", color=colour,
                  markersize=4, label=granularity)  # fmt: skip
    others = {
        "cusparse_us": (figures.ORANGE, "cuSPARSE\ndense-to-CSR"),
        "nonzero_us": (figures.PINK, "jnp.nonzero"),
        "bound_us": (figures.INK, "A read once"),
    }
    own = [row for row in rows if row["granularity"] == granularities[0]]
    for column, (colour, label) in others.items():
        if all(row[column] for row in own):
            axes.plot([100 * row["sparsity"] for row in own], [row[column] for row in own], "--", color=colour,
                      label=label)  # fmt: skip
    title = f"Finding what is live, {own[0]['m']}x{own[0]['k']}, {own[0]['dtype']}"
    axes.set(title=title, xlabel="zero micro-tiles (%)", ylabel="time (µs)", yscale="log")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
