"""From which sparsity on, and for how many tokens, are unstructured weights quicker than cuBLAS?

    python -m experiments unstructured_spmm --keep              on a GPU, in about two minutes
    python -m experiments unstructured_spmm --all --keep        Flash-LLM's twelve shapes, n to 256, 40 to 90%
    python -m experiments unstructured_spmm --source FOLDER     layers of pruned OPTs or Mixtrals, and random masks

Times y = x W^T with W [m, k] as `UnstructuredWeights`, its elements stored one by one and in pairs, and x [n, k] and
y [n, m] in memory as models have them, next to the dense product of the same weights in the same run: by cuBLAS, the
quicker of the algorithm that XLA finds quickest and the one that cuBLAS names first, and by what XLA takes for the
quicker one of cuBLAS and its own. A matrix smaller than 120 MB is copied until all copies together are larger, and a
call multiplies by every one of them: so that weights come from memory as in a model, not from L2. `gbps` counts
compressed bytes, `roof` is how many times fewer of them there are than dense ones: the speed-up of a kernel that reads
as fast.

Seen on an H200 for 28672 x 7168, against the quickest dense product of several runs (at n = 8, 16 and 32 cuBLAS was
seen at 93 to 102, 94 to 105 and 95 to 107 us): 1.46, 1.41 and 1.32 at 50%; 1.67, 1.55 and 1.46 at 70%; in pairs 1.96,
1.91 and 1.76 at 80%; pairs of float8 1.7, 1.6 and 1.5 whatever the zeros. Pairs of 16 bits are quicker from about 75%
zeros on, with n = 32 from 70% on. At n = 64 it is 1.1, 1.3 and 1.5; and where W is 7168 x 7168, slower than cuBLAS up
to 80%. What Wanda leaves of an OPT-1.3B takes as long as random masks, to within 2%. A device without the kernel takes
the xla path, which is slower than dense everywhere.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from experiments import options, products, programs
from experiments.headlines import headline
from experiments.pruning import load_model
from experiments.runs import Row, Run, markdown_table
from pallas_kernels.unstructured_matmul import UnstructuredWeights, unstructured_matmul, work
from pallas_kernels.unstructured_matmul.weights import VALUE_DTYPES
from pallas_kernels.workbench.gpus import find_gpu
from pallas_kernels.workbench.timing import ROUNDS, Timer, cupti
from sparsellm.unstructured import Treatment

# Source: Flash-LLM (VLDB'24), section 6.1: the four products of OPT-30B, 66B and 175B.
FLASH_LLM = tuple(
    f"{m * width}x{k * width}" for width in (7168, 9216, 12288) for m, k in ((3, 1), (1, 1), (4, 1), (1, 4))
)
CUBLAS = {"xla_gpu_enable_triton_gemm": False}
LAYOUTS = ("single", "paired")  # or "chosen" of them
MOST_COPIES = 32
TOLERANCE = 5e-3  # of the relative RMS error, in 16 bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of unstructured_spmm.

    Attributes:
        shapes: of W, "MxK": outputs by inputs.
        ns: tokens at once.
        sparsities: shares of zeros, at random places.
        value_dtypes: what the values that are left are kept in: "dtype" (as W is), "int8" or "float8_e4m3fn".
        layouts: how they are stored: "single", "paired", or "chosen": as `compress` would store so many zeros.
        dtype: of W and x: "bfloat16" or "float16".
        source: pruned models (OPT or Mixtral): the linear layers of their middle blocks in place of `shapes`, and for
            each shape and sparsity among them a random mask.
        cold_mb: what the copies of a matrix take at least, up to 32 of them; an H200's L2 has 60.
        all: shapes, ns and sparsities of Flash-LLM's paper and beyond, in place of those above.
        seed: of weights, masks and x.
    """

    shapes: tuple[str, ...] = ("28672x7168", "7168x28672", "36864x9216")
    ns: tuple[int, ...] = (8, 16, 32)
    sparsities: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8)
    value_dtypes: tuple[str, ...] = ("dtype",)
    layouts: tuple[str, ...] = LAYOUTS
    dtype: str = "bfloat16"
    source: tuple[str, ...] = ()
    cold_mb: int = 120
    all: bool = False
    seed: int = 0

    @classmethod
    def smoke(cls) -> "Config":
        """A small matrix; also without a GPU, by the clock on the wall."""
        return cls(shapes=("48x96",), ns=(8,), sparsities=(0.7,), cold_mb=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A weight matrix to be made.

    Attributes:
        named: what a row says of it: m, k, mask and sparsity, and the layer and model that it is of.
        make: gives it, [m, k].
    """

    named: Row
    make: Callable[[], Float[Array, "m k"]]


def run(config: Config, run: Run) -> list[Row]:
    """A row for each matrix, dtype of values and n; and a figure."""
    rows = measure(config, run, cupti if jax.default_backend() == "gpu" else programs.wall_clock)
    run.show(*readme({"rows": rows}))
    return rows


def measure(config: Config, run: Run, timer: Timer) -> list[Row]:
    """Times and checks every product; what an earlier process of the run has measured is taken as it is.

    Raises:
        ValueError: an option is empty or holds what it must not.
        RuntimeError: a result is not that of the dense product.
    """
    config = _checked(config)
    rows = []
    for number, problem in enumerate(problems(config)):
        compute = functools.partial(measure_matrix, config, problem, timer)
        rows += run.remembered(f"rows_{number}", compute)
    return rows


def _checked(config: Config) -> Config:
    """With `all` written out; raises ValueError for what cannot be measured."""
    if config.all:
        sparsities = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
        config = dataclasses.replace(config, shapes=FLASH_LLM, ns=(8, 16, 32, 64, 128, 256), sparsities=sparsities)
    options.check_filled(config, "shapes", "ns", "sparsities", "value_dtypes", "layouts")
    options.check_least(config, 1, "ns")
    options.check_known(config, "dtype", ("bfloat16", "float16"))
    options.check_known(config, "value_dtypes", ("dtype", *VALUE_DTYPES))
    options.check_known(config, "layouts", (*LAYOUTS, "chosen"))
    for shape in config.shapes:
        _sizes(shape)
    options.check_shares(config, "sparsities")
    return config


def _sizes(shape: str) -> tuple[int, int]:
    m, _, k = shape.partition("x")
    if not (m.isdecimal() and k.isdecimal() and int(m) and int(k)):
        raise ValueError(f'a shape is "MxK", as in 28672x7168; got "{shape}"')
    return int(m), int(k)


def problems(config: Config) -> Iterator[Problem]:
    """The matrices of pruned models with random ones like them, or random ones."""
    if not config.source:
        alike = itertools.product(map(_sizes, config.shapes), config.sparsities)
        yield from (_random(config, shape, sparsity) for shape, sparsity in alike)
        return
    found: dict[tuple[tuple[int, int], float], None] = {}  # in order
    for source in config.source:
        model, _, folder = load_model(source, dtype=config.dtype)
        for name, kernel in _middle_kernels(model):
            k, m = kernel.shape
            sparsity = round(1 - int(jnp.count_nonzero(kernel)) / kernel.size, 4)
            found[(m, k), round(sparsity, 2)] = None
            named = {"m": m, "k": k, "mask": "pruned", "sparsity": sparsity, "layer": name, "model": folder.name}
            yield Problem(named=named, make=functools.partial(lambda kernel: kernel.T, kernel))
    yield from (_random(config, shape, sparsity) for shape, sparsity in found)


def _random(config: Config, shape: tuple[int, int], sparsity: float) -> Problem:
    make = functools.partial(random_weights, jax.random.key(config.seed), sparsity, shape, config.dtype)
    return Problem(named={"m": shape[0], "k": shape[1], "mask": "random", "sparsity": sparsity}, make=make)


def _middle_kernels(model: Any) -> Iterator[tuple[str, Float[Array, "k m"]]]:
    """Those of the linear layers of a model's middle block, by name."""
    middle = len(model.layers) // 2
    for path, module in nnx.iter_modules(model.layers[middle]):
        if type(module) is nnx.Linear:
            yield ".".join(map(str, ("layers", middle, *path))), module.kernel[...]


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def random_weights(key: Array, sparsity: ArrayLike, shape: tuple[int, int], dtype: str) -> Float[Array, "m k"]:
    """Normal, each zero with probability `sparsity`."""
    key_mask, key_values = jax.random.split(key)
    keep = jax.random.uniform(key_mask, shape, jnp.float32) >= sparsity
    return jnp.where(keep, jax.random.normal(key_values, shape, dtype), 0)


def measure_matrix(config: Config, problem: Problem, timer: Timer) -> list[Row]:
    """Times and checks the products by one matrix: of an n, all ways to store it and both dense ones in turns."""
    w, rows = problem.make(), []
    zeros = 1 - int(jnp.count_nonzero(w)) / w.size
    dense = _cold(w, config.cold_mb)
    stored = {
        (values, paired): UnstructuredWeights.from_dense(w, None if values == "dtype" else values, paired)
        for values, layout in itertools.product(config.value_dtypes, config.layouts)
        for paired in (_paired(layout, values, 1 - zeros, config.dtype),)
    }
    calls: dict[Any, Any] = {kind: (_products, _cold(weights, config.cold_mb)) for kind, weights in stored.items()}
    calls |= {"tuned": (_tuned_products, dense), "first": (_first_products, dense), "xla": (_xla_products, dense)}
    for n in config.ns:
        x = jax.random.normal(jax.random.key(config.seed + 1), (n, w.shape[1]), w.dtype)
        outputs, us = _interleaved(calls, x, timer)
        for kind, weights in stored.items():
            time_us, dense_us, xla_us = us[kind], min(us["tuned"], us["first"]), us["xla"]
            row = problem.named | {"n": n, "dtype": config.dtype}
            row |= {"values": str(weights.values.dtype), "layout": LAYOUTS[weights.paired]}
            row |= {"time_us": time_us, "dense_us": dense_us, "xla_us": xla_us}
            row |= {"speedup": round(dense_us / time_us, 3), "roof": round(w.nbytes / weights.nbytes, 3)}
            row |= {"over_xla": round(xla_us / time_us, 3), "gbps": round(weights.nbytes / time_us / 1e3, 1)}
            expected = w if kind[0] == "dtype" else weights.to_dense()  # 8 bits round, which is no error of the product
            row["bound_us"] = _bound_us(weights, x)
            row["error"] = float(products.product_error(outputs[kind].T, expected, x.T))
            if not row["error"] <= TOLERANCE:
                raise RuntimeError(f"{_label(row)}: error {row['error']:.1e} is above {TOLERANCE}")
            said = f"cuBLAS {dense_us}, {row['speedup']}x, XLA {xla_us}, {row['over_xla']}x"
            print(f"{_label(row)}: {time_us} us, {said}", flush=True)
            rows.append(row)
    return rows


def _paired(layout: str, values: str, density: float, dtype: str) -> bool:
    if layout == "chosen":
        return Treatment(value_dtype=None if values == "dtype" else values).pairs(density, dtype)
    return layout == "paired"


def _cold[T](weights: T, cold_mb: int) -> list[T]:
    """So many copies that together they do not fit into L2."""
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    count = min(max(-(-(cold_mb * 10**6) // nbytes), 1), MOST_COPIES)
    return [weights, *(jax.tree.map(jnp.copy, weights) for _ in range(count - 1))]


@jax.jit
def _products(copies: list[UnstructuredWeights], x: Float[Array, "n k"]) -> list[Float[Array, "n m"]]:
    return [unstructured_matmul(weights, x.T).T for weights in copies]


def _dense_products(copies: list[Float[Array, "m k"]], x: Float[Array, "n k"]) -> list[Float[Array, "n m"]]:
    return [jnp.dot(x, w.T) for w in copies]


_xla_products = jax.jit(_dense_products)
# XLA takes cuBLAS's algorithm that was quickest when it timed all of them once; or the first that cuBLAS names.
_tuned_products = jax.jit(_dense_products, compiler_options=CUBLAS)
_first_products = jax.jit(_dense_products, compiler_options=CUBLAS | {"xla_gpu_autotune_level": 0})


def _interleaved[K](
    calls: dict[K, tuple[Callable[..., Any], list[Any]]], x: Array, timer: Timer
) -> tuple[dict[K, Array], dict[K, float]]:
    """A product by the first copy, and the median time a copy, of each; in turns, so that clocks are the same."""
    outputs, times = {}, {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, (function, copies) in calls.items():
            out, us = products.time_us(function, [copies, x], timer)
            outputs[name] = out[0]
            times[name].append(us / len(copies))
    return outputs, {name: round(float(np.median(measured)), 2) for name, measured in times.items()}


def _bound_us(weights: UnstructuredWeights, x: Float[Array, "n k"]) -> float | None:
    """The least time for these bytes and FLOPs; None on a device whose rates are unknown."""
    gpu = find_gpu(jax.devices()[0].device_kind)
    return None if gpu is None else round(gpu.bound_us(work(weights, x.T)), 2)


def break_even(rows: list[Row]) -> float | None:
    """The n where dense becomes quicker, between measured ones on a line; None if it does not up to the largest."""
    found = [(row["n"], _over_dense(row)) for row in sorted(rows, key=lambda row: row["n"])]
    if not found[-1][1] < 1:
        return None
    last = max((i for i, (_, speedup) in enumerate(found) if speedup >= 1), default=None)
    if last is None:
        return 0.0
    (n0, s0), (n1, s1) = found[last : last + 2]
    return n0 + (n1 - n0) * (s0 - 1) / (s0 - s1)


def _over_dense(row: Row) -> float:
    """How many times as quick as the quicker one of both dense products."""
    return min(row["speedup"], row.get("over_xla", math.inf))  # older results have XLA's choice alone


def headlines(result: dict[str, Any]) -> list[list[str]]:
    """Of random masks of 28672 x 7168, 16 tokens, in the quicker layout."""
    quickest: dict[float, Row] = {}
    for row in sorted(result["rows"], key=lambda row: row["time_us"]):
        if (row["m"], row["k"], row["mask"], row["n"], row["values"]) == (28672, 7168, "random", 16, row["dtype"]):
            quickest.setdefault(row["sparsity"], row)
    return [
        headline(
            f"{row['m']}x{row['k']}, {row['sparsity']:.0%} zeros anywhere, 16 tokens",
            row["time_us"],
            "µs",
            min(row["dense_us"], row.get("xla_us", math.inf)),
        )
        for sparsity, row in sorted(quickest.items())
        if sparsity in (0.5, 0.7)
    ]


def readme(result: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """Speed-ups, a line a matrix and a column a number of tokens; and a figure of them over sparsity."""
    from experiments import figures

    rows = result["rows"]
    ns = sorted({row["n"] for row in rows})
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((_matrix(row), _kind(row), f"{row['sparsity']:.0%}"), []).append(row)
    cells = []
    for (name, values, sparsity), found in groups.items():
        by_n = {row["n"]: row for row in found}
        even, mixed = break_even(found), min(map(_over_dense, found)) < 1
        cells.append([name, values, sparsity, *(_times(by_n, n) for n in ns), f"{found[0]['roof']:.2f}x"])
        cells[-1] += [f"{even:.0f}" if even is not None else "here and there" if mixed else f"above {max(by_n)}"]
        cells[-1] += [f"{max(r['error'] for r in found):.0e}"]
    header = ["weights", "values", "zeros", *(f"n = {n}" for n in ns), "roof", "dense wins from n", "error"]
    both = all("over_xla" in row for row in rows)  # older results have XLA's choice alone
    dense = "the dense product by cuBLAS / by XLA's choice" if both else "the dense product that XLA chose"
    intro = f"Times as quick as {dense}, weights read from memory."
    drawn = figures.draw(lambda axes: _plot(axes, rows, ns))
    return f"{intro}\n\n{markdown_table(cells, header)}", {"unstructured_spmm.png": drawn}


def _times(by_n: dict[int, Row], n: int) -> str:
    if n not in by_n:
        return "–"
    over_xla = by_n[n].get("over_xla")
    return f"{by_n[n]['speedup']:.2f}x" + (f" / {over_xla:.2f}x" if over_xla else "")


def _kind(row: Row) -> str:
    paired = row.get("layout") == "paired"  # older results have none
    return f"{row['values']}{', paired' * paired}"


def _label(row: Row) -> str:
    return f"{_matrix(row)}, {row['sparsity']:.0%} zeros, {_kind(row)}, n = {row['n']}"


def _matrix(row: Row) -> str:
    shape = f"{row['m']}x{row['k']}"
    return f"{row['model']}, {row['layer']}, {shape}" if "layer" in row else shape


def _plot(axes, rows: list[Row], ns: list[int]) -> None:
    from experiments import figures

    pruned = [row for row in rows if row["mask"] == "pruned"]
    rows = pruned or rows  # beside them, random ones are for the table
    kinds = list(dict.fromkeys(row["values"] for row in rows))

    def mean(of_row: Callable[[Row], float], n: int, values: str) -> list[tuple[float, float]]:
        """The geometric mean over matrices, each in its quicker layout, by sparsity."""
        found: dict[float, dict[tuple, Row]] = {}
        for row in sorted(rows, key=_over_dense):
            if (row["n"], row["values"]) == (n, values):
                matrix = (row.get("model"), row.get("layer"), row["m"], row["k"])
                found.setdefault(round(row["sparsity"], 2), {})[matrix] = row
        return [
            (s, math.exp(np.mean([math.log(of_row(row)) for row in own.values()]))) for s, own in sorted(found.items())
        ]

    for colour, n in zip(figures.ordered_colours(len(ns)), ns, strict=True):
        for style, values in zip(itertools.cycle(("o-", "s--", "v:")), kinds):
            if points := mean(_over_dense, n, values):
                label = f"n = {n}" + (f", {values}" if len(kinds) > 1 else "")
                axes.plot(*zip(*points, strict=True), style, color=colour, markersize=4, label=label)
    if points := mean(lambda row: row["roof"], ns[0], kinds[0]):
        axes.plot(*zip(*points, strict=True), "--", color=figures.ORANGE, label="fewer bytes")
    axes.axhline(1, color="#999999", linewidth=1)
    axes.set(title="Unstructured weights against the quicker dense product", xlabel="zeros", ylabel="times as quick")
    axes.set_xticks(sorted({round(row["sparsity"], 2) for row in rows}))
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
