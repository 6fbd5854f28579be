"""What does gathering cost, against the same dense tile over contiguous reads?

C = A @ B over `listed` of the K columns of A, the same number for every block of rows, three times by one kernel:
lists that name columns at random (what sparsity does), lists that name the first ones (the gathering SRead, without the
scatter over memory), and A and B cut to `listed`, read as they lie by TMA. Every row is checked.

    python -m experiments sread_cost --keep        a minute on an H200

Expected there, in bfloat16: at 128x1 gathering costs 6 to 8% up to 75% zeros, and nothing from 90% on, where tiles have
few steps; at 64x1 34 to 40%, as its tile reads B twice as often. Neighbours are as quick as random ones at 128x1, to
within 5% up to 90% zeros; at 64x1 6 to 9% quicker from half zeros on, a quarter from 95%.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import options, products
from experiments.runs import Row, Run, markdown_table
from pallas_kernels import MicroTileIndex, gather_matmul
from pallas_kernels.case import tolerance
from pallas_kernels.workbench.timing import Timer, cupti

READS = ("random", "consecutive", "contiguous")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of sread_cost.

    Attributes:
        m: rows of A.
        n: columns of B.
        k: columns of A.
        dtypes: of the operands: bfloat16, float16 or float32.
        rows: rows of a micro-tile; the kernel gathers 64 and 128.
        sparsities: shares of columns that no list names.
        seed: of the operands and the lists.
    """

    m: int = 4096
    n: int = 4096
    k: int = 4096
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    rows: tuple[int, ...] = (128, 64)
    sparsities: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
    seed: int = 0

    @classmethod
    def smoke(cls) -> "Config":
        """One small product."""
        return cls(m=256, n=256, k=256, dtypes=("bfloat16",), rows=(128,), sparsities=(0.9,))


def run(config: Config, run: Run) -> list[Row]:
    """A row for each dtype, granularity and sparsity, and a figure."""
    products.require_gpu("sread_cost")
    rows = measure(config, run)
    run.show(*readme({"rows": rows}))
    return rows


def measure(config: Config, run: Run, timer: Timer = cupti) -> list[Row]:
    """Times and checks every product.

    Raises:
        ValueError: an option is empty or holds what it must not.
        RuntimeError: a result is not that of the reference.
    """
    options.check_filled(config, "dtypes", "rows", "sparsities")
    options.check_shares(config, "sparsities")
    for dtype in config.dtypes:
        tolerance(dtype)
    rows = []
    for i, cell in enumerate(itertools.product(config.dtypes, config.rows, config.sparsities)):
        rows.append(run.remembered(f"row_{i}", functools.partial(_measure, config, *cell, timer)))
        print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    return rows


def _measure(config: Config, dtype: str, tile_rows: int, sparsity: float, timer: Timer) -> Row:
    listed = max(round((1 - sparsity) * config.k), 1)
    key_a, key_b = jax.random.split(jax.random.key(config.seed))
    a_t = jax.random.normal(key_a, (config.k, config.m), dtype)
    b = jax.random.normal(key_b, (config.k, config.n), dtype)
    row: Row = {"granularity": f"{tile_rows}x1", "sparsity": sparsity, "mask": "random", "dtype": dtype}
    row |= {"m": config.m, "n": config.n, "k": config.k, "listed": listed}
    errors = []
    for read in READS:
        lists = _lists(config, tile_rows, listed, at_random=read == "random")
        arguments = [a_t, b, _index(lists, config.k, tile_rows)]
        if read == "contiguous":
            arguments = [a_t[:listed], b[:listed], _index(lists, listed, tile_rows)]
        out, time = products.time_us(_gather if read != "contiguous" else _as_it_lies, arguments, timer)
        row["time_us" if read == "random" else f"{read}_us"] = round(time, 2)
        errors.append(float(_error(out, a_t, b, lists, tile_rows)))
    row |= {"overhead": round(row["time_us"] / row["contiguous_us"] - 1, 4), "error": max(errors)}
    if not row["error"] <= tolerance(dtype):
        raise RuntimeError(f"{tile_rows}x1 at {sparsity:.0%}: an error of {errors} is above {tolerance(dtype)}")
    return row


def _lists(config: Config, tile_rows: int, listed: int, *, at_random: bool) -> np.ndarray:
    """Columns that each block of rows takes, ascending, [blocks, listed]."""
    blocks = -(-config.m // tile_rows)
    if not at_random:
        return np.broadcast_to(np.arange(listed, dtype=np.int32), (blocks, listed))
    order = np.random.default_rng(config.seed).random((blocks, config.k)).argsort(axis=1)
    return np.sort(order[:, :listed], axis=1).astype(np.int32)


def _index(lists: np.ndarray, k: int, tile_rows: int) -> MicroTileIndex:
    blocks, listed = lists.shape
    indices = np.zeros((blocks, k), np.int32)
    indices[:, :listed] = lists
    counts = np.full(blocks, listed, np.int32)
    return MicroTileIndex(indices=jnp.asarray(indices), counts=jnp.asarray(counts), rows=tile_rows)


@jax.jit
def _gather(a_t, b, index):
    return gather_matmul(a_t, b, index)


@jax.jit
def _as_it_lies(a_t, b, index):
    return gather_matmul(a_t, b, index, zero_elsewhere=True)  # every k is listed: dense is the kernel's own choice


@jax.jit(static_argnums=4)
def _error(out, a_t, b, lists, tile_rows):
    """Against the dense product of what is listed, in float32."""
    blocks = lists.shape[0]
    live = jnp.zeros((blocks, a_t.shape[0]), bool).at[jnp.arange(blocks)[:, None], lists].set(True)
    live = jnp.repeat(live, tile_rows, axis=0)[: a_t.shape[1]]
    return products.product_error(out, jnp.where(live, a_t.T, 0), b)


def readme(result: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """The table, and a figure of the overhead over sparsity."""
    from experiments import figures

    rows = result["rows"]
    header = ["dtype", "granularity", "sparsity", "gathered (µs)", "neighbours, gathered (µs)", "contiguous (µs)"]
    cells = [
        [row["dtype"], row["granularity"], f"{row['sparsity']:.0%}", row["time_us"], row["consecutive_us"]]
        + [row["contiguous_us"], f"{row['overhead']:.0%}", f"{row['error']:.0e}"]
        for row in rows
    ]
    return markdown_table(cells, [*header, "overhead", "error"]), {"sread_cost.png": figures.draw(
        lambda axes: _plot(axes, rows)
    )}  # fmt: skip


def _plot(axes, rows: list[Row]) -> None:
    from experiments import figures

    groups = list(dict.fromkeys((row["dtype"], row["granularity"]) for row in rows))
    for colour, group in zip(figures.ordered_colours(len(groups)), groups, strict=True):
        own = [row for row in rows if (row["dtype"], row["granularity"]) == group]
        sparsities, overheads = [100 * row["sparsity"] for row in own], [100 * row["overhead"] for row in own]
        axes.plot(sparsities, overheads, "o-", color=colour, markersize=4, label=f"{group[1]}, {group[0]}")
    axes.axhline(0, color=figures.INK, linewidth=1)
    axes.set(title="Gathering against contiguous reads", xlabel="sparsity (%)", ylabel="time over contiguous (%)")
    axes.legend()
