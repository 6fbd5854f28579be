"""From which sparsity on is the gathered matmul quicker than the dense one, and how near the bound does it come?

C = A @ B where micro-tiles of A (rows x 1) are zero at random, on a GPU: `gather_matmul` over a given index, finding
that index from A's values (`micro_tile_index`), and the dense product of cuBLAS, all in the same run.

    python -m experiments matmul_sparsity --keep        about a minute on an H200

Expected there: at 128x1 quicker than dense from about 15% sparsity on, 5x at 90%, 12x at 99%;
3.5x and 5x where the index is found anew for each product.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from experiments.runs import Row, Run, markdown_table
from pallas_kernels import MicroTileIndex, gather_matmul, micro_tile_index
from pallas_kernels.case import relative_error, tolerance
from pallas_kernels.gather_matmul import reference, work
from pallas_kernels.workbench.gpus import find_gpu
from pallas_kernels.workbench.timing import Timer, cupti, interleaved_us


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of matmul_sparsity.

    Attributes:
        m: rows of A.
        n: columns of B.
        k: columns of A.
        dtype: of the operands: bfloat16, float16 or float32.
        rows: rows of a micro-tile; one table a value.
        sparsities: shares of micro-tiles that are zero.
        seed: of the operands and the masks.
    """

    m: int = 4096
    n: int = 4096
    k: int = 4096
    dtype: str = "bfloat16"
    rows: tuple[int, ...] = (128, 64)
    sparsities: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
    seed: int = 0

    @classmethod
    def smoke(cls) -> "Config":
        """One small product."""
        return cls(m=256, n=256, k=256, rows=(128,), sparsities=(0.9,))


def run(config: Config, run: Run) -> list[Row]:
    """A row for each granularity and sparsity, and a figure."""
    if not config.rows or not config.sparsities:
        raise ValueError(f"rows and sparsities must hold something; got {config.rows} and {config.sparsities}")
    tolerance(config.dtype)
    if jax.default_backend() != "gpu":
        raise ValueError(f"matmul_sparsity times kernels on a GPU; this machine has {jax.default_backend()} only")
    rows = []
    for tile_rows in config.rows:
        for sparsity in config.sparsities:
            rows.append(measure(config, tile_rows, sparsity))
            print(
                f"{tile_rows}x1 at {sparsity:.0%}: {rows[-1]['time_us']} us, dense {rows[-1]['dense_us']}", flush=True
            )
    _, figures = readme({"rows": rows})
    for name, content in figures.items():
        run.write(name, content)
    print(_table(rows))
    return rows


def operands(config: Config, tile_rows: int, sparsity: float) -> tuple[jax.Array, jax.Array]:
    """A, k-major and zero at a share of its micro-tiles, and B."""
    key_a, key_b, key_mask = jax.random.split(jax.random.key(config.seed), 3)
    dtype = jnp.dtype(config.dtype)
    live = jax.random.uniform(key_mask, (config.k, -(-config.m // tile_rows))) >= sparsity
    live = jnp.repeat(live, tile_rows, axis=1)[:, : config.m]
    a_t = jnp.where(live, jax.random.normal(key_a, (config.k, config.m), dtype), 0)
    return a_t, jax.random.normal(key_b, (config.k, config.n), dtype)


def measure(config: Config, tile_rows: int, sparsity: float, timer: Timer = cupti) -> Row:
    """Times and checks one product.

    Raises:
        RuntimeError: the result is not that of the reference.
    """
    a_t, b = operands(config, tile_rows, sparsity)
    index = jax.jit(micro_tile_index, static_argnums=1)(a_t, tile_rows)
    arrays, static = jax.tree.flatten((a_t, b, index))
    functions: dict[str, Any] = {
        "gather": jax.jit(lambda *arrays: gather_matmul(*jax.tree.unflatten(static, arrays))),
        "index": jax.jit(lambda a_t, *_: micro_tile_index(a_t, tile_rows)),
        "dense": jax.jit(lambda a_t, b, *_: jnp.dot(a_t.T, b, precision=lax.Precision.HIGHEST)),
    }
    outputs, times = interleaved_us(functions, arrays, timer)
    error = relative_error(outputs["gather"], _reference(a_t, b, index))
    if error > tolerance(config.dtype):
        raise RuntimeError(f"{tile_rows}x1 at {sparsity:.0%}: error {error:.1e} is above {tolerance(config.dtype)}")
    cost, gpu = work(a_t, b, index), find_gpu(jax.devices()[0].device_kind)
    return {
        "granularity": f"{tile_rows}x1",
        "sparsity": sparsity,
        "mask": "random",
        "dtype": config.dtype,
        "m": config.m,
        "n": config.n,
        "k": config.k,
        "time_us": round(times["gather"], 2),
        "index_us": round(times["index"], 2),
        "dense_us": round(times["dense"], 2),
        "bound_us": None if gpu is None else round(gpu.bound_us(cost), 2),
        "speedup": round(times["dense"] / times["gather"], 3),
        "tflops": round(cost.flops / times["gather"] / 1e6, 1),
        "error": error,
    }


def _reference(a_t: jax.Array, b: jax.Array, index: MicroTileIndex) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        return jax.jit(reference)(a_t.astype(jnp.float32), b.astype(jnp.float32), index)


def readme(result: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """The table, and a figure of time over sparsity."""
    from experiments import figures

    rows = result["rows"]

    def plot(axes) -> None:
        size = "x".join(str(rows[0][name]) for name in ("m", "k", "n"))
        colours = itertools.cycle((figures.BLUE, figures.ORANGE, figures.GREEN, figures.PINK))
        for granularity, colour in zip(dict.fromkeys(row["granularity"] for row in rows), colours):  # noqa: B905
            own = [row for row in rows if row["granularity"] == granularity]
            sparsities = [100 * row["sparsity"] for row in own]
            axes.plot(sparsities, [row["time_us"] for row in own], "o-", color=colour, label=f"gathered, {granularity}")
            if all(row["bound_us"] for row in own):
                axes.plot(
                    sparsities, [row["bound_us"] for row in own], ":", color=colour, label=f"bound, {granularity}"
                )
        own = [row for row in rows if row["granularity"] == rows[0]["granularity"]]
        xs, ys = [100 * row["sparsity"] for row in own], [row["dense_us"] for row in own]
        axes.plot(xs, ys, "--", color=figures.INK, label="dense, cuBLAS")
        axes.set(title=f"A @ B, {size}, {rows[0]['dtype']}", xlabel="zero micro-tiles of A (%)", ylabel="time (µs)")
        axes.set_yscale("log")
        axes.legend()

    return _table(rows), {"matmul_sparsity.png": figures.draw(plot)}


def _table(rows: list[Row]) -> str:
    columns = {
        "granularity": "granularity",
        "sparsity": "sparsity",
        "time_us": "gather_matmul (µs)",
        "dense_us": "dense (µs)",
        "bound_us": "bound (µs)",
        "speedup": "speedup",
        "index_us": "finding the index (µs)",
        "speedup_with_index": "speedup with it",
        "error": "error",
    }
    formats = {"sparsity": "{:.0%}", "speedup": "{:.2f}x", "speedup_with_index": "{:.2f}x", "error": "{:.0e}"}
    rows = [row | {"speedup_with_index": row["dense_us"] / (row["time_us"] + row["index_us"])} for row in rows]
    cells = [
        ["–" if row[name] is None else formats.get(name, "{}").format(row[name]) for name in columns] for row in rows
    ]
    return markdown_table(cells, list(columns.values()))
