"""Measures the tile database of this machine's GPU, and keeps it as sparsellm/tiles/<device>.json.

python -m sparsellm.tiles.measure        about 5 minutes on an H200

Every plan is timed by CUPTI on random micro-tiles, at several sizes and densities; a table entry is the cost model's
parameters that fit these times best. The measurements are kept in the table, beside the error of the fit.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import gather_matmul, micro_tile_index
from pallas_kernels.case import relative_error, tolerance
from pallas_kernels.scatter_matmul import scatter_matmul
from pallas_kernels.tile.device import device_kind
from pallas_kernels.workbench.gpus import Gpu, find_gpu
from pallas_kernels.workbench.timing import ITERATIONS, Timer, cupti
from sparsellm.micro_tiles import MicroTile
from sparsellm.plan import DENSE, Plan, live_counts, moved_bytes, workload
from sparsellm.tiles import STEP_K, TileCost, TileCosts, runs_on

type Row = dict[str, Any]

SIZES = ((4096, 4096, 4096), (512, 8192, 4096), (2048, 2048, 8192))  # M, K, N
DTYPES = ("bfloat16", "float32")


class Measured(NamedTuple):
    """What is timed of a kernel.

    Attributes:
        plan: that runs it.
        tile: its dense tile, (rows, columns); the columns are those that its widest config has.
        densities: shares of live micro-tiles. Not 1, where gather_matmul walks contiguous tiles (choose_plan takes
            dense there); and of parts of rows none at which scatter_matmul makes a dense product of them.
    """

    plan: Plan
    tile: tuple[int, int]
    densities: Sequence[float] = (0.5, 0.2, 0.05, 0.01)


KERNELS = {
    "dense": Measured(DENSE, (1, 1), (1.0,)),
    "k 128x128": Measured(Plan("k", MicroTile(128, 128)), (128, 256)),
    "k 128x1": Measured(Plan("k", MicroTile(128, 1)), (128, 256)),
    "k 64x64": Measured(Plan("k", MicroTile(64, 64)), (64, 256)),
    "k 64x1": Measured(Plan("k", MicroTile(64, 1)), (64, 256)),
    "m 1xK": Measured(Plan("m", MicroTile(1, max(k for _, k, _ in SIZES))), (128, 256)),
    "m 1x64": Measured(Plan("m", MicroTile(1, 64)), (128, 256), (0.05, 0.02, 0.01)),
    "m 1x32": Measured(Plan("m", MicroTile(1, 32)), (128, 256), (0.02, 0.01)),
}


def measure_tiles(
    gpu: Gpu,
    *,
    kernels_wanted: Collection[str] = tuple(KERNELS),
    sizes: Sequence[tuple[int, int, int]] = SIZES,
    dtypes: Sequence[str] = DTYPES,
    timer: Timer = cupti,
    report: Callable[[str], None] = print,
) -> tuple[TileCosts, list[Row]]:
    """Times every plan and fits the tile database to the times.

    Args:
        gpu: the GPU of this machine.
        kernels_wanted: some of KERNELS.
        sizes: M, K, N of the products.
        dtypes: of the operands.
        timer: measures a jitted function.
        report: takes a line of progress.

    Returns:
        The tile database, and a row for each measurement.

    Raises:
        RuntimeError: a product is wrong.
    """
    kernels, rows = {}, []
    wanted = [kernel for kernel in kernels_wanted if runs_on(kernel, gpu.kind)]
    for kernel, dtype in itertools.product(wanted, dtypes):
        plan, tile, densities = KERNELS[kernel]
        own = []
        for size, density in itertools.product(sizes, densities):
            own.append(measure(plan, size, density, dtype, timer))
            report(f"{kernel} {dtype} {size} at {density:g}: {own[-1]['time_us']:.2f} us")
        kernels[f"{kernel} {dtype}"] = fit(own, tile, gpu)
        kept = [{key: value for key, value in row.items() if key != "counts"} for row in own]
        rows += [row | {"plan": str(row["plan"])} for row in kept]
    source = f"measured: {gpu.kind}, jax {jax.__version__}, by python -m sparsellm.tiles.measure"
    return TileCosts(source=source, sms=gpu.sms, bandwidth=gpu.bandwidth, kernels=kernels), rows


def measure(plan: Plan, size: tuple[int, int, int], density: float, dtype: str, timer: Timer) -> Row:
    """Times and checks one product, and finding its index; `counts` are the live micro-tiles of each list."""
    m, k, n = size
    a, b = _operands(plan, size, density, dtype)
    row: Row = {"plan": plan, "dtype": dtype, "m": m, "k": k, "n": n, "density": density}
    if plan.micro_tile is None:
        out, times = timer(jax.jit(jnp.dot), [a, b], ITERATIONS)
        return row | {"time_us": statistics.median(times), "counts": np.zeros(0)}
    width = plan.micro_tile.rows if plan.axis == "k" else plan.micro_tile.cols
    x, cols = (a.T.copy(), plan.micro_tile.cols) if plan.axis == "k" else (a, 1)
    index, index_times = timer(jax.jit(lambda x: micro_tile_index(x, width, cols)), [x], ITERATIONS)
    arrays, tree = jax.tree.flatten((x, b, index))
    multiply = gather_matmul if plan.axis == "k" else scatter_matmul
    out, times = timer(jax.jit(lambda *arrays: multiply(*jax.tree.unflatten(tree, arrays))), arrays, ITERATIONS)
    error = relative_error(out, jnp.dot(a.astype(jnp.float32), b.astype(jnp.float32), precision=lax.Precision.HIGHEST))
    if not error < tolerance(dtype):
        raise RuntimeError(f"{row}: error {error:.1e} is above {tolerance(dtype)}")
    found = {"time_us": statistics.median(times), "index_us": statistics.median(index_times), "error": error}
    return row | found | {"counts": live_counts(a, plan)}


def fit(rows: list[Row], tile: tuple[int, int], gpu: Gpu) -> TileCost:
    """The parameters of one kernel, none negative, with the least relative error over these measurements.

    Those that memory alone explains are left out: the model takes the larger of both.
    """
    unit = TileCost(tile_m=tile[0], tile_n=tile[1], overhead_us=0.0, tile_us=0.0, tflops=1.0)
    features, times = [], []
    for row in rows:
        plan, m, k, n = row["plan"], row["m"], row["k"], row["n"]
        work = m, k, n, row["dtype"], row["counts"]
        memory_us, sums_us = (1e6 * moved / gpu.bandwidth for moved in moved_bytes(plan, *work))
        if memory_us < 0.8 * (row["time_us"] - sums_us):
            features.append([1.0, *workload(plan, unit, gpu.sms, *work)])
            times.append(row["time_us"] - sums_us)
    dense = rows[0]["plan"] == DENSE
    if dense:  # whose tiles are cut to fit: no waves
        features = [[one, 0.0, steps] for one, _, steps in features]
    overhead, tile_us, step_us = _nonnegative(np.array(features).reshape(-1, 3), np.array(times))
    tflops = 2 * tile[0] * tile[1] * STEP_K * gpu.sms / max(step_us, 1e-9) / 1e6
    index_us, index_us_an_element = 0.0, 0.0
    if not dense:
        elements = [[1.0, row["m"] * row["k"]] for row in rows]
        index_us, index_us_an_element = _nonnegative(np.array(elements), np.array([row["index_us"] for row in rows]))
    return TileCost(
        tile_m=tile[0],
        tile_n=tile[1],
        overhead_us=overhead,
        tile_us=tile_us,
        tflops=tflops,
        index_us=index_us,
        index_ps=1e6 * index_us_an_element,
    )


def _operands(plan: Plan, size: tuple[int, int, int], density: float, dtype: str) -> tuple[jax.Array, jax.Array]:
    """A whose micro-tiles are live at random, and B."""
    m, k, n = size
    rows, cols = (plan.micro_tile.rows, plan.micro_tile.cols) if plan.micro_tile else (1, 1)
    key_a, key_b, key_mask = jax.random.split(jax.random.key(0), 3)
    live = jax.random.uniform(key_mask, (-(-m // rows), -(-k // cols))) < density
    live = jnp.repeat(jnp.repeat(live, rows, axis=0), cols, axis=1)[:m, :k]
    a = jnp.where(live, jax.random.normal(key_a, (m, k), dtype), 0)
    return a, jax.random.normal(key_b, (k, n), dtype)


def _nonnegative(features: np.ndarray, times: np.ndarray) -> list[float]:
    """Coefficients, none negative, of the least squares of the relative error; by trying every subset of them."""
    count = features.shape[1]
    best, best_error = np.zeros(count), np.inf
    for size in range(1, count + 1):
        for columns in itertools.combinations(range(count), size):
            scaled = features[:, columns] / times[:, None]
            found = np.linalg.lstsq(scaled, np.ones(len(times)))[0]
            error = float(np.sum((scaled @ found - 1) ** 2))
            if (found >= 0).all() and error < best_error:
                best, best_error = np.zeros(count), error
                best[list(columns)] = found
    return best.tolist()


def main() -> int:
    """Measures this machine's GPU and writes its table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sparsellm.tiles.measure", description=__doc__)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"these alone, of {', '.join(KERNELS)}")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    options = parser.parse_args()
    wanted = options.kernels or tuple(KERNELS)
    if unknown := set(wanted) - set(KERNELS):
        parser.error(f"KERNEL must be one of {', '.join(KERNELS)}; got {', '.join(sorted(unknown))}")
    kind = device_kind()
    gpu = find_gpu(kind)
    if gpu is None or jax.default_backend() != "gpu":
        print(f"sparsellm.tiles.measure needs a GPU of pallas_kernels/workbench/gpus.py; got {kind}", file=sys.stderr)
        return 2
    costs, rows = measure_tiles(gpu, kernels_wanted=wanted, dtypes=options.dtypes)
    print(costs.save(kind, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
