"""The tile database: what a dense tile costs on a device, by plan and dtype, and what finding the index costs.

`sparsellm/tiles/<device>.json` holds what `python -m sparsellm.tiles.measure` measured there. A device without a table
gets a model from its data-sheet rates, and a CPU a guess; `TileCosts.source` says which of them it is.
Source: PIT (SOSP'23), section 3.4: costs are profiled offline for each tile, and a plan's cost is a count of tiles.
"""

import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.gather_matmul import DEVICES as GATHER_DEVICES
from pallas_kernels.scatter_matmul import DEVICES as SCATTER_DEVICES
from pallas_kernels.tuning import read_table, table_path
from pallas_kernels.workbench.gpus import Gpu, find_gpu

TABLES = Path(__file__).parent
STEP_K = 64  # k a step of the dense tile


@dataclasses.dataclass(frozen=True, kw_only=True)
class TileCost:
    """What one kernel costs: `overhead_us` + tiles x `tile_us` + their steps of 64 k at the rate `tflops`.

    The tiles and steps are those of the multiprocessor that has most of them.

    Attributes:
        tile_m: rows of C a dense tile; 1, with `tile_n` 1, where tiles are cut to fit (a library's dense product, XLA
            on a CPU).
        tile_n: columns of C a dense tile.
        overhead_us: of a product, however small.
        tile_us: of a tile, however few its steps.
        tflops: rate of the whole device, TFLOP/s, while all its multiprocessors are in their steps.
        index_us: overhead of finding the index.
        index_ps: of finding the index, picoseconds an element of the sparse operand.
    """

    tile_m: int
    tile_n: int
    overhead_us: float
    tile_us: float
    tflops: float
    index_us: float = 0.0
    index_ps: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TileCosts:
    """The tile database of one device.

    Attributes:
        source: where the figures come from.
        sms: tiles that run at a time.
        bandwidth: device memory, bytes/s.
        kernels: cost by kernel and dtype, such as "k 128x1 bfloat16". A plan whose kernel is not there is none to
            choose: the device has no such kernel.
    """

    source: str
    sms: int
    bandwidth: float
    kernels: Mapping[str, TileCost]

    def find(self, kernel: str, dtype: DTypeLike) -> TileCost | None:
        """The cost of a kernel ("k 128x1", "m 1xK", "dense") in this dtype; float16 costs what bfloat16 does."""
        name = jnp.dtype(dtype).name
        return self.kernels.get(f"{kernel} {'bfloat16' if name == 'float16' else name}")

    @classmethod
    def load(cls, device_kind: str) -> "TileCosts":
        """The table of a device, else the model of a known GPU, else a guess.

        Args:
            device_kind: as jax names it: "NVIDIA H200", "cpu".

        Raises:
            ValueError: the table is not one that `save` wrote.
        """
        return _load(device_kind)

    def save(self, device_kind: str, measured: list[dict[str, Any]], folder: Path = TABLES) -> Path:
        """Writes the table of a device, whole or not at all, beside the measurements that it was fitted to.

        Kernels of an older table that are not in this one stay as they were.
        """
        path = table_path(device_kind, folder)
        older = read_table(path)
        fields = {**dataclasses.asdict(self), "measured": []}
        fields["kernels"] = older.get("kernels", {}) | fields["kernels"]
        fields_of = lambda row: (row["plan"], row["dtype"])  # noqa: E731
        renewed = set(map(fields_of, measured))
        measured = [row for row in older.get("measured", []) if fields_of(row) not in renewed] + measured
        head = json.dumps(fields, indent=2).removesuffix("[]\n}")
        body = ",\n    ".join(json.dumps(row) for row in measured)  # a row a line
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".json", delete=False) as file:
            file.write(f"{head}[\n    {body}\n  ]\n}}\n")
        os.chmod(file.name, 0o644)  # a temporary file is its owner's alone
        os.replace(file.name, path)
        _load.cache_clear()
        return path


def load_table(path: Path) -> TileCosts:
    """The tile database in a file that `TileCosts.save` wrote.

    Raises:
        ValueError: it is not.
    """
    table: Any = read_table(path)
    try:
        kernels = {name: TileCost(**cost) for name, cost in table.pop("kernels").items()}
        table.pop("measured")
        return TileCosts(**table, kernels=kernels)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} must be a table as sparsellm.tiles.measure writes it; got {error!r}") from error


def runs_on(kernel: str, device_kind: str) -> bool:
    """Whether a kernel, by its name in the tile database, is more than a masked dense product on a GPU."""
    devices = {"k": GATHER_DEVICES, "m": SCATTER_DEVICES}.get(kernel[0])
    return devices is None or device_kind.startswith(devices)


@functools.cache
def _load(device_kind: str) -> TileCosts:
    path = table_path(device_kind, TABLES)
    if path.exists():
        return load_table(path)
    gpu = find_gpu(device_kind)
    return _cpu() if gpu is None else _modelled(gpu)


def _modelled(gpu: Gpu) -> TileCosts:
    """From rates alone; shares of the dense rate are an H200's, where a step takes 0.72 us at 128x1 and 0.52 at 64x1.

    A launch takes 2 us; a tile writes its result, at its share of the bandwidth. A float32 product of ours is six of
    bfloat16; the library's, as TF32, takes twice as long as bfloat16.
    """
    kernels = {}
    for dtype, size, ours, dense in (("bfloat16", 2, 1.0, 1.0), ("float32", 4, 1 / 6, 0.5)):
        rate = gpu.flops / 1e12
        kernels[f"dense {dtype}"] = TileCost(tile_m=1, tile_n=1, overhead_us=2.0, tile_us=0.0, tflops=rate * dense)
        for kernel, tile_m, share, moved in (
            ("k 128x128", 128, 0.96, size),
            ("k 128x1", 128, 0.96, size),
            ("k 64x64", 64, 0.67, size),
            ("k 64x1", 64, 0.67, size),
            ("m 1xK", 128, 0.96, size),
        ):
            if runs_on(kernel, gpu.kind):
                kernels[f"{kernel} {dtype}"] = TileCost(
                    tile_m=tile_m,
                    tile_n=256,
                    overhead_us=2.0,
                    tile_us=tile_m * 256 * moved * gpu.sms / gpu.bandwidth * 1e6,
                    tflops=rate * share * ours,
                    index_us=2.0,
                    index_ps=size / gpu.bandwidth * 1e12,
                )
    source = f"modelled: {gpu.kind}, {gpu.source}"
    return TileCosts(source=source, sms=gpu.sms, bandwidth=gpu.bandwidth, kernels=kernels)


def _cpu() -> TileCosts:
    """Round figures of the xla path on two x86-64 cores, products of up to 512 x 2048 x 3072: a guess for others."""
    kernels = {}
    for dtype in ("bfloat16", "float32"):
        kernels[f"dense {dtype}"] = TileCost(tile_m=1, tile_n=1, overhead_us=10.0, tile_us=0.0, tflops=0.08)
        for kernel in ("k 128x128", "k 128x1", "k 64x64", "k 64x1", "m 1xK", "m 1x64", "m 1x32"):
            kernels[f"{kernel} {dtype}"] = TileCost(
                tile_m=1, tile_n=1, overhead_us=50.0, tile_us=0.0, tflops=0.06, index_us=100.0, index_ps=200.0
            )
    return TileCosts(source="a guess: two x86-64 cores", sms=1, bandwidth=40e9, kernels=kernels)
