"""What the sparse compiler sees in a function: its products, how dense their operands are, and how they run.

print(explain(model, tokens))
"""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.case import Work
from pallas_kernels.tile.device import device_kind
from pallas_kernels.workbench.gpus import find_gpu
from pallas_kernels.workbench.timing import cupti, interleaved_us
from sparsellm.micro_tiles import MicroTile, live_micro_tiles
from sparsellm.plan import DENSE, Plan, expected_us, live_counts
from sparsellm.sparse_dot import sparse_dot
from sparsellm.sparsify import Product, Rule
from sparsellm.sparsify.observe import most_chosen, observe, unpacked
from sparsellm.tiles import TileCosts

GRANULARITIES = ("1x1", "1x64", "1xK", "32x1", "64x1", "128x1", "32x64", "128x128")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One product of a function. Times are microseconds for all its matrices; None where not known.

    Attributes:
        product: what and where it is, and why it is replaced or stays.
        densities: share of micro-tiles that hold a non-zero, by granularity, of the sparse operand (rows by what is
            summed over; "1xK" are whole rows); of the left one where the product stays. Empty if it never ran.
        plan: how it runs: a rule's, or the one of least expected time for these arguments, as
            `sparsify(fn, sample=args)` takes it. None where it stays or never ran.
        expected_us: what the cost model expects of the plan.
        expected_dense_us: what it expects of the dense product.
        measured_us: of `sparse_dot` by this plan on an operand with these zeros; on a GPU only.
        measured_dense_us: of `jnp.dot` in the same run.
        bound_us: the least time for the work that non-zeros make, on a GPU whose rates are known.
    """

    product: Product
    densities: Mapping[str, float]
    plan: Plan | None = None
    expected_us: float | None = None
    expected_dense_us: float | None = None
    measured_us: float | None = None
    measured_dense_us: float | None = None
    bound_us: float | None = None


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Every product of a function, in the order they are computed; `str()` makes a table of them."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        replaced = sum(row.product.sparse is not None for row in self.rows)
        table = [_cells(row) for row in self.rows]
        columns = [name for name in _cells(_EMPTY) if any(cells[name] for cells in table)]
        widths = {name: max(len(cells[name]) for cells in ({name: name}, *table)) for name in columns}
        lines = [{name: name for name in columns}, {name: "-" * widths[name] for name in columns}, *table]
        text = ["  ".join(cells[name].ljust(widths[name]) for name in columns).rstrip() for cells in lines]
        return "\n".join([f"{len(self.rows)} products, {replaced} with an operand rich in zeros", *text])


def explain(
    fn: Callable[..., Any] | nnx.Module,
    *args: Any,
    rules: Sequence[Rule] = (),
    measure: bool | None = None,
    **kwargs: Any,
) -> Explanation:
    """Says of each product in `fn` whether `sparsify` replaces it and why, how dense it is here, and what that gains.

    Runs `fn(*args, **kwargs)` once, as it is; modules do not change. A line that is run several times (a loop, calls
    of one function) is one row; densities and times are means of a few of its runs. What lies in bodies that `sparsify`
    does not look into (shard_map, kernels) is not listed, nor is what is no product of matrices (convolutions).

    Args:
        fn: what `sparsify` takes.
        *args: its arguments, arrays concrete.
        rules: as `sparsify` takes them.
        measure: time each product that is replaced; None does where the default device is a GPU that is known.
        **kwargs: more arguments of `fn`.

    Raises:
        TypeError: `fn` cannot be called.
        ValueError: `measure` is True and there is no such GPU.
    """
    gpu = find_gpu(device_kind())
    if measure and gpu is None:
        raise ValueError(f"measure must be None or False without a GPU that is known; got {device_kind()}")
    seen = observe(fn, args, kwargs, rules)
    return Explanation(
        tuple(_row(product, masks, bool(gpu) if measure is None else measure) for product, masks in seen.items())
    )


def _row(product: Product, packed: Sequence[np.ndarray], measure: bool) -> Row:
    masks = unpacked(product, packed)
    if not masks or product.dtype not in ("bfloat16", "float16", "float32"):
        return Row(product=product, densities=_densities(masks))
    (m, k, n), dtype, times = product.shape, product.dtype, {}
    plan = most_chosen(product, masks) if product.sparse else None

    def expected(plan: Plan, mask: np.ndarray) -> float:
        live = 1.0 if plan == DENSE else live_counts(mask, plan)
        return expected_us(plan, m, k, n, dtype, live, costs=TileCosts.load(device_kind()))

    if plan is not None:
        times["expected_us"] = _mean(expected(plan, mask) for mask in masks)
        if measure:
            times["measured_us"], times["measured_dense_us"] = _measure(product, plan, masks[0])
    times["expected_dense_us"] = expected(DENSE, masks[0])
    if gpu := find_gpu(device_kind()):
        times["bound_us"] = _mean(gpu.bound_us(_work(mask, n, dtype)) for mask in masks)
    return Row(
        product=product,
        densities=_densities(masks),
        plan=plan,
        **{name: product.batch * time for name, time in times.items()},
    )


def _densities(masks: Sequence[np.ndarray]) -> dict[str, float]:
    if not masks or not masks[0].size:
        return {}
    tiles = {name: MicroTile.parse(name.replace("K", str(masks[0].shape[1]))) for name in GRANULARITIES}
    return {name: _mean(live_micro_tiles(mask, tile).mean() for mask in masks) for name, tile in tiles.items()}


def _mean(values) -> float:
    return statistics.fmean(map(float, values))


def _work(mask: np.ndarray, n: int, dtype: str) -> Work:
    """What the non-zeros of A [m, k] cost: each read and multiplied once, the rows of B that they meet, C in full."""
    live, rows_of_b = int(mask.sum()), int(mask.any(axis=0).sum())
    size = jnp.dtype(dtype).itemsize
    return Work(flops=2 * live * n, bytes=size * (live + rows_of_b * n + mask.shape[0] * n))


def _measure(product: Product, plan: Plan, mask: np.ndarray) -> tuple[float, float]:
    """Microseconds of `sparse_dot` and of `jnp.dot` on one matrix with these zeros."""
    a = jnp.where(mask, 1, 0).astype(product.dtype)
    b = jax.random.normal(jax.random.key(0), (mask.shape[1], product.shape[2]), product.dtype)
    operands = [b.T, a.T] if product.sparse == "b" else [a, b]
    functions = {
        "sparse": jax.jit(lambda a, b: sparse_dot(a, b, sparse=product.sparse or "a", plan=plan)),
        "dense": jax.jit(jnp.dot),
    }
    _, times = interleaved_us(functions, operands, cupti)
    return times["sparse"], times["dense"]


def _cells(row: Row) -> dict[str, str]:
    product = row.product
    shape = f"{product.m}x{product.k}x{product.n}"
    times = ("expected_us", "expected_dense_us", "measured_us", "measured_dense_us", "bound_us")
    return {
        "product": product.path or product.source,
        "m x k x n": shape if product.batch == 1 else f"{product.batch} of {shape}",
        "dtype": product.dtype,
        "sparse": product.sparse or "-",
        **{
            name: f"{density:.1%}" if (density := row.densities.get(name)) is not None else "" for name in GRANULARITIES
        },
        "plan": "" if row.plan is None else str(row.plan),
        "gradient": "" if product.sparse is None else "sparse" if product.dead else "dense",
        **{name.replace("_", " "): "" if (us := getattr(row, name)) is None else f"{us:.1f}" for name in times},
        "why": product.why,
        "where": product.source,
    }


_EMPTY = Row(product=Product(path="", source="", batch=1, m=0, k=0, n=0, dtype="", sparse=None, why=""), densities={})
