"""Which kernel runs a sparse product: the PIT axis, the micro-tile, or dense, by what a cost model expects of each.

A plan covers the non-zeros of A [M, K] with its micro-tiles; its cost is the dense tiles that they fill on the SM that
has most to do, by the kernel's own order of tiles, times what a tile costs on this device; adding up where several
lists give a part of a row; and finding the index where it is not given:

    us = max(overhead + tiles * tile_us + steps * step_us, bytes / bandwidth) + sums / bandwidth + index

On the 48 made-up masks of plan_choice (H200, bfloat16, index found) products along k took 0.88 to 1.40 times what is
expected, 1.12 in the middle; lists taken to be dealt evenly, up to 1.74, and more for kernels that do not sort them.

Source: PIT (SOSP'23), sections 3.4 and 5.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from pallas_kernels.gather_matmul import candidates as gather_configs
from pallas_kernels.micro_tile_index import MicroTileIndex
from pallas_kernels.tile import schedule
from pallas_kernels.tile.device import device_kind
from sparsellm.micro_tiles import MicroTile, live_micro_tiles
from sparsellm.tiles import STEP_K, TileCost, TileCosts

__all__ = ["Plan", "TileCosts", "candidates", "choose_plan", "covered_density", "expected_us", "live_counts"]

DTYPES = ("bfloat16", "float16", "float32")
NARROW = 4 / 3  # what a tile of half the width costs a column (see gather_matmul/mosaic.py)
LEAST_GAIN = 0.03  # over dense, below which a plan is not worth its risk: estimates were seen 5% off


@dataclasses.dataclass(frozen=True)
class Plan:
    """How C = A @ B runs, written "k 128x1", "m 1x64" or "dense".

    Attributes:
        axis: the PIT axis along which micro-tiles are packed: "k" (`gather_matmul`), "m" (`scatter_matmul`), or
            "dense" (`jnp.dot`).
        micro_tile: of A; None for dense.
    """

    axis: Literal["dense", "k", "m"]
    micro_tile: MicroTile | None = None

    def __post_init__(self):
        if self.axis not in ("dense", "k", "m"):
            raise ValueError(f'axis must be "dense", "k" or "m"; got axis={self.axis!r}')
        if (self.micro_tile is None) != (self.axis == "dense"):
            raise ValueError(f"micro_tile must be given for k and m, and None for dense; got {self}")
        if self.axis == "m" and self.micro_tile and self.micro_tile.rows != 1:
            raise ValueError(f"a micro-tile of the m axis must have one row; got {self}")

    def __str__(self) -> str:
        return self.axis if self.micro_tile is None else f"{self.axis} {self.micro_tile}"


DENSE = Plan("dense")
ELEMENT = MicroTile(1, 1)


def candidates(m: int, k: int, n: int, dtype: DTypeLike) -> list[Plan]:
    """The plans that the kernels offer for A [m, k] @ B [k, n]; of equals, the earlier one is to be preferred.

    Raises:
        ValueError: a dimension is negative, or the dtype is none of the kernels'.
    """
    if min(m, k, n) < 0:
        raise ValueError(f"m, k and n must not be negative; got {m}, {k} and {n}")
    if jnp.dtype(dtype).name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {jnp.dtype(dtype).name}")
    whole_row = math.ceil(max(k, 1) / STEP_K) * STEP_K
    packed_along_k = [Plan("k", MicroTile(*tile)) for tile in ((128, 128), (128, 1), (64, 64), (64, 1))]
    packed_along_m = [Plan("m", MicroTile(1, cols)) for cols in dict.fromkeys((whole_row, 64, 32))]
    return [DENSE, *packed_along_k, *packed_along_m]


def covered_density(density: float, granularity: MicroTile, micro_tile: MicroTile, m: int, k: int) -> float:
    """Expected share of live micro-tiles of A [m, k] where its zeros lie at random.

    A micro-tile is zero where all that it covers is: sparsity ** (granules it touches).

    Args:
        density: share of non-zero granules, 0 to 1.
        granularity: blocks of A that are zero or not independently of each other.
        micro_tile: of the plan.
        m: rows of A; a micro-tile covers no more of them.
        k: columns of A.

    Source: PIT (SOSP'23), section 5.
    """
    rows, cols = min(micro_tile.rows, m), min(micro_tile.cols, k)
    granules = math.ceil(rows / granularity.rows) * math.ceil(cols / granularity.cols)
    return 1 - (1 - density) ** granules


def live_counts(values: Any, plan: Plan) -> np.ndarray:
    """Live micro-tiles in each list of the plan's index: a list a row block of A for k, a column block for m.

    Args:
        values: A or a boolean mask [M, K], concrete.
        plan: of axis k or m.

    Returns:
        int [lists].
    """
    if plan.micro_tile is None:
        raise ValueError(f"plan must have an index to count for; got {plan}")
    return np.asarray(live_micro_tiles(np.asarray(values), plan.micro_tile)).sum(axis=1 if plan.axis == "k" else 0)


def expected_us(
    plan: Plan,
    m: int,
    k: int,
    n: int,
    dtype: DTypeLike,
    live: float | np.ndarray,
    *,
    costs: TileCosts,
    with_index: bool = True,
) -> float:
    """Microseconds that A [m, k] @ B [k, n] takes by `plan`, operands in the layout that its kernel reads.

    Args:
        plan: how it runs.
        m: rows of A.
        k: columns of A.
        n: columns of B.
        dtype: of the operands.
        live: share of the plan's micro-tiles that are live, or how many are in each list, as `live_counts` gives
            them. Dense has no use for it.
        costs: the device's tile database.
        with_index: whether the index has to be found for this product.

    Raises:
        ValueError: `costs` has no such kernel.
    """
    cost = costs.find(_kernel(plan, k), dtype)
    if cost is None:
        raise ValueError(f"plan must be one that the tile database has in {jnp.dtype(dtype)}; got {plan}")
    if 0 in (m, n):
        return 0.0
    counts = _counts(plan, m, k, live)
    tiles, steps = workload(plan, cost, costs.sms, m, k, n, dtype, counts)
    step_us = 2 * cost.tile_m * cost.tile_n * STEP_K * costs.sms / cost.tflops / 1e6
    product_us = cost.overhead_us + tiles * cost.tile_us + steps * step_us
    moved, added_up = moved_bytes(plan, m, k, n, dtype, counts)
    product_us = max(product_us, moved / costs.bandwidth * 1e6) + added_up / costs.bandwidth * 1e6
    dense = costs.find("dense", dtype)
    if dense is not None and plan != DENSE:  # a fit may say otherwise: what is live is not multiplied quicker by lists
        listed = _listed(plan, m, k, counts)
        product_us = max(product_us, dense.overhead_us + 2 * listed * n / dense.tflops / 1e6)
    return product_us + (cost.index_us + m * k * cost.index_ps / 1e6 if with_index else 0.0)


def _listed(plan: Plan, m: int, k: int, counts: np.ndarray) -> float:
    """Elements of A [m, k] in the live micro-tiles of these lists."""
    assert plan.micro_tile is not None  # dense has no lists
    width, size, cols = (
        (m, plan.micro_tile.rows, plan.micro_tile.cols) if plan.axis == "k" else (k, plan.micro_tile.cols, 1)
    )
    widths = np.minimum(size, width - np.arange(len(counts)) * size)
    return float(np.sum(widths * np.minimum(counts * cols, k if plan.axis == "k" else m)))


def workload(
    plan: Plan, cost: TileCost, sms: int, m: int, k: int, n: int, dtype: DTypeLike, counts: np.ndarray
) -> tuple[float, float]:
    """Dense tiles that these lists fill on the busiest multiprocessor, and steps of 64 k there."""
    if plan.axis == "k" and cost.tile_m > 1:
        return _dealt(plan, cost, sms, m, k, n, dtype, counts)
    across = math.ceil(n / cost.tile_n)
    if plan.micro_tile is None:
        tiles, steps = np.array([math.ceil(m / cost.tile_m) * across]), np.array([math.ceil(k / STEP_K)])
    elif plan.axis == "k":
        rows = np.minimum(plan.micro_tile.rows, m - np.arange(len(counts)) * plan.micro_tile.rows)
        tiles = np.ceil(rows / cost.tile_m) * across
        steps = np.ceil(counts * min(plan.micro_tile.cols, k) / STEP_K)
    else:
        tiles = np.ceil(counts / cost.tile_m) * across
        steps = np.full(len(counts), math.ceil(min(plan.micro_tile.cols, k) / STEP_K))
    if not tiles.sum():
        return 0.0, 0.0
    waves = float(math.ceil(tiles.sum() / sms))
    return waves, max(waves * float(np.average(steps, weights=tiles)), float(steps[tiles > 0].max()))


def _dealt(
    plan: Plan, cost: TileCost, sms: int, m: int, k: int, n: int, dtype: DTypeLike, counts: np.ndarray
) -> tuple[float, float]:
    """`workload` of gather_matmul, whose persistent blocks are dealt rows of tiles in its own order."""
    assert plan.micro_tile is not None
    rows, cols = plan.micro_tile.rows, plan.micro_tile.cols
    shape = jax.ShapeDtypeStruct
    index = MicroTileIndex(indices=shape((len(counts), 0), jnp.int32), counts=counts, rows=rows, cols=cols)
    config = gather_configs(shape((k, m), dtype), shape((k, n), dtype), index)[0]
    lists = max(1, config.block_m // rows)  # of a tile
    steps = np.ceil(counts * min(cols, k) / STEP_K)
    steps = np.pad(steps, (0, -len(steps) % lists)).reshape(-1, lists).sum(axis=1)
    steps = np.repeat(steps, max(1, rows // config.block_m))
    if config.longest_first and len(steps) <= schedule.MOST_SORTED:
        steps = np.sort(steps)[::-1]
    across, width = math.ceil(n / config.block_n), config.block_n / cost.tile_n
    width *= NARROW if width < 1 else 1
    block, row = schedule.dealt(len(steps), across, config.group, sms)
    return width * lists * int(np.bincount(block).max()), width * float(np.bincount(block, weights=steps[row]).max())


def moved_bytes(plan: Plan, m: int, k: int, n: int, dtype: DTypeLike, counts: np.ndarray) -> tuple[float, float]:
    """Bytes of A that are live, of the rows of B that they can name, and of C; and of sums, written and read for it."""
    sums = 0.0
    if plan.micro_tile is None:
        of_a, rows_of_b = m * k, k
    else:
        rows, cols = min(plan.micro_tile.rows, m), min(plan.micro_tile.cols, k)
        of_a = min(m * k, float(counts.sum()) * rows * cols)
        rows_of_b = min(k, float((counts if plan.axis == "k" else counts > 0).sum()) * cols)
        if plan.axis == "m" and cols < k:  # scatter_matmul writes what each list gives, and reads it
            sums = 2 * float(counts.sum()) * n
    size = jnp.dtype(dtype).itemsize
    return float(size * (of_a + rows_of_b * n + m * n)), size * sums


def choose_plan(
    m: int,
    k: int,
    n: int,
    dtype: DTypeLike,
    *,
    sample: Any = None,
    density: float | None = None,
    granularity: MicroTile = ELEMENT,
    costs: TileCosts | None = None,
    with_index: bool = True,
) -> Plan:
    """The plan of least expected time for A [m, k] @ B [k, n], from a sample of A or from how dense it will be.

    Dense where no other is expected to be `LEAST_GAIN` quicker.

    Runs on the host, once, before anything is traced: the plan is static, the pattern is not. A pattern unlike the
    sample is slower than it might be, never wrong.

    Args:
        m: rows of A.
        k: columns of A.
        n: columns of B.
        dtype: of the operands: bfloat16, float16 or float32.
        sample: a concrete A or boolean mask [m, k]; exactly one of `sample` and `density` is given.
        density: share of non-zeros at `granularity`, 0 to 1, lying at random.
        granularity: blocks that are zero or not as one.
        costs: the tile database; None takes that of the default device.
        with_index: whether each product has to find its index.

    Raises:
        ValueError: arguments are out of range, or `sample` is traced.

    Source: PIT (SOSP'23), section 3.4.
    """
    plans = candidates(m, k, n, dtype)
    if (sample is None) == (density is None):
        raise ValueError(f"exactly one of sample and density must be given; got density={density}, sample={sample}")
    if density is not None and not 0 <= density <= 1:
        raise ValueError(f"density must be 0 to 1; got density={density}")
    if isinstance(sample, Tracer):
        raise ValueError(f"sample must be concrete: choose the plan outside jit; got {sample}")
    if sample is not None:
        sample = np.asarray(sample)
        if sample.shape != (m, k):
            raise ValueError(f"sample must be A or its mask, [{m}, {k}]; got shape {sample.shape}")
    costs = costs or TileCosts.load(device_kind())

    def expected(plan: Plan) -> float:
        live: float | np.ndarray = 1.0
        if plan.micro_tile is not None:
            live = (
                covered_density(density, granularity, plan.micro_tile, m, k)
                if density is not None
                else live_counts(sample, plan)
            )
        us = expected_us(plan, m, k, n, dtype, live, costs=costs, with_index=with_index)
        return us if plan == DENSE else us * (1 + LEAST_GAIN)

    return min((plan for plan in plans if costs.find(_kernel(plan, k), dtype)), key=expected)


def _kernel(plan: Plan, k: int) -> str:
    """Its name in the tile database: whole rows are one kernel, and so are widths in multiples of 64."""
    if plan.axis != "m" or plan.micro_tile is None or plan.micro_tile.cols % STEP_K:
        return str(plan)
    return "m 1xK" if plan.micro_tile.cols >= k else f"m 1x{STEP_K}"


def _counts(plan: Plan, m: int, k: int, live: float | np.ndarray) -> np.ndarray:
    """Live micro-tiles of each list."""
    if plan.micro_tile is None:
        return np.zeros(0)
    blocks = (math.ceil(m / plan.micro_tile.rows), math.ceil(k / plan.micro_tile.cols))
    lists, length = blocks if plan.axis == "k" else blocks[::-1]
    if isinstance(live, np.ndarray):
        if live.shape != (lists,):
            raise ValueError(f"live must count for each of the {lists} lists of {plan}; got shape {live.shape}")
        return live
    return np.full(lists, live * length)
