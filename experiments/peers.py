"""What others take for the same product: cuSPARSE in CSR and BSR, and torch's Triton kernel for BSR.

They run where torch with CUDA is installed. It is no dependency, and two profilers of one GPU do not share a process:
so peers have one of their own, here `python -m experiments.peers`, which reads jobs from stdin and writes a row a line:
`ask` and `answer` are the two ends, for what `moe_peers`, `swin_peer` and `opt_peers` measure too. Times are CUDA
events around calls that the GPU finds queued (it sleeps while the host enqueues them), so that launching from Python
does not count; what waits for the host in its middle, as making a sparse format does for the count of non-zeros, is
timed with that wait.
"""

import ctypes
import dataclasses
import functools
import importlib
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.masks import Mask

type Row = dict[str, Any]

NAMES = {"cusparse": "cuSPARSE, CSR", "cusparse_bsr": "cuSPARSE, BSR", "bsr": "torch's Triton BSR"}
TOLERANCE = {"bfloat16": 1e-2, "float16": 1e-2, "float32": 1e-3}  # of the relative RMS error; they may use TF32
BLOCKS = ((32, 32), (32, 64), (64, 64), (128, 128))  # of BSR; the quickest is reported
BATCHES = 3
SLEEP_CYCLES = 4_000_000  # 2 ms: enough to enqueue a batch
BATCH_US = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A product to measure: A [m, k] under a mask, B [k, n]."""

    mask: Mask
    n: int
    dtype: str
    index_only: bool = False
    """Only `cusparse_index_us`: CSR made from A's values."""

    def __post_init__(self):
        if not isinstance(self.mask, Mask):  # as JSON gives it
            object.__setattr__(self, "mask", Mask(**self.mask))


def measure(jobs: Sequence[Job]) -> list[Row]:
    """Measures every peer on every job, in a process of its own.

    Returns:
        For each job `<peer>_us`, `<peer>_index_us` (the sparse format made from A's values), `<peer>_block` (of BSR:
        the quickest) and `<peer>_error` of each peer in `NAMES`. What a peer cannot take, or gets wrong, is left out.
        All are empty where torch is missing.

    Raises:
        RuntimeError: the process failed.
    """
    return ask("experiments.peers", jobs, "cuSPARSE and of torch's BSR")


def ask(module: str, jobs: Sequence[Any], columns: str) -> list[Row]:
    """Hands jobs to a module that runs as a process of its own; a row for each, empty where torch or a GPU is missing.

    Args:
        module: calls `answer`.
        jobs: dataclasses of the kinds that it knows, made of what JSON can hold.
        columns: what stays empty without torch, for a message.

    Raises:
        RuntimeError: the process failed.
    """
    if importlib.util.find_spec("torch") is None:
        print(f"torch is not installed: the columns of {columns} stay empty", flush=True)
        return [{} for _ in jobs]
    command = [sys.executable, "-m", module]
    described = [{"kind": type(job).__name__, **dataclasses.asdict(job)} for job in jobs]
    process = subprocess.run(command, input=json.dumps(described), stdout=subprocess.PIPE, text=True)
    rows = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    if process.returncode or len(rows) != len(jobs):
        raise RuntimeError(f"{module} ended with {process.returncode} after {len(rows)} of {len(jobs)} jobs")
    return rows


def answer(kinds: Mapping[type, Callable[[Any, Any, Row], None]]) -> None:
    """The process: jobs from stdin, a row a line to stdout, what went wrong to stderr.

    Args:
        kinds: of jobs, and what measures one: it takes torch, the job, and the row to fill, of which it leaves what it
            could not measure.
    """
    torch: Any = importlib.import_module("torch")
    by_name = {kind.__name__: kind for kind in kinds}
    for described in json.load(sys.stdin):
        kind, row = by_name[described.pop("kind")], {}
        job = kind(**described)
        try:
            if torch.cuda.is_available():
                with torch.inference_mode():
                    kinds[kind](torch, job, row)
        except Exception as failed:  # a peer that cannot is a gap in the table, not the end of it
            print(f"{job}: {failed}", file=sys.stderr, flush=True)
        print(json.dumps(row), flush=True)


def wall_clock(torch: Any, function: Callable[[], Any], repeats: int) -> Row:
    """`time_ms`, the median as a user sees it, and `memory_gib`, the most that torch had allocated."""
    function()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    gib = torch.cuda.max_memory_allocated() / 2**30
    return {"time_ms": round(statistics.median(times), 3), "memory_gib": round(gib, 3)}


def transformers_model(torch: Any, name: str, config: Row, dtype: str, device: str = "cuda", **options: Any) -> Any:
    """transformers' model of these sizes with random weights, made on the device.

    Args:
        torch: the package.
        name: the model's class.
        config: fields of its configuration.
        dtype: of its weights.
        device: where to make it.
        options: of `_from_config`.
    """
    transformers: Any = importlib.import_module("transformers")
    made: Any = getattr(transformers, name)
    torch.set_default_dtype(getattr(torch, dtype))
    with torch.device(device):
        model = made._from_config(made.config_class(**config), **options)
    torch.set_default_dtype(torch.float32)
    return model.eval()


def _measure(torch: Any, job: Job, row: Row) -> None:
    a, b = _operands(torch, job)
    expected = a.float() @ b.float()
    for peer in _peers(torch, job):
        try:
            sparse, convert_us = _time_us(torch, functools.partial(peer.convert, a))
            if job.index_only:
                row[f"{peer.name}_index_us"] = convert_us
                continue
            out, us = _time_us(torch, functools.partial(peer.multiply, sparse, b))
            error = float((out.float() - expected).norm() / expected.norm())
            if not error <= TOLERANCE[job.dtype]:
                raise RuntimeError(f"error {error:.1e} is above {TOLERANCE[job.dtype]}")
            if us < row.get(f"{peer.name}_us", float("inf")):
                found = {"us": us, "index_us": convert_us, "block": peer.block, "error": error}
                row |= {f"{peer.name}_{key}": value for key, value in found.items()}
        except Exception as failed:  # a peer that cannot is a gap in the table, not the end of it
            print(f"{peer.name}, {job.mask.granularity} in {job.dtype}: {failed}", file=sys.stderr, flush=True)


def _operands(torch: Any, job: Job, device: str = "cuda") -> tuple[Any, Any]:
    generator = torch.Generator(device).manual_seed(job.mask.seed)
    options = {"generator": generator, "device": device, "dtype": torch.float32}
    mask, dtype = job.mask, getattr(torch, job.dtype)
    live = torch.from_numpy(np.ascontiguousarray(mask.micro_tiles())).to(device)
    live = live.repeat_interleave(mask.rows, 0).repeat_interleave(mask.cols, 1)[: mask.m, : mask.k]
    a = torch.randn(mask.m, mask.k, **options) * live
    return a.to(dtype), torch.randn(mask.k, job.n, **options).to(dtype)


@dataclasses.dataclass(frozen=True)
class Peer:
    """A to its sparse format, and the product."""

    name: str
    block: str | None
    convert: Callable[[Any], Any]
    multiply: Callable[[Any, Any], Any]


def _peers(torch: Any, job: Job) -> list[Peer]:
    """Those that may take this; BSR in every size of block that fits the mask's. Indices in 32 bits, as is quickest."""

    def to_csr(a):
        csr = a.to_sparse_csr()
        indices = csr.crow_indices().int(), csr.col_indices().int()
        return torch.sparse_csr_tensor(*indices, csr.values(), csr.shape, check_invariants=False)

    def to_bsr(block, a):
        bsr = a.to_sparse_bsr(block)
        indices = bsr.crow_indices().int(), bsr.col_indices().int()
        return torch.sparse_bsr_tensor(*indices, bsr.values().contiguous(), bsr.shape, check_invariants=False)

    peers = [Peer("cusparse", None, to_csr, torch.mm)]
    triton = importlib.import_module("torch.sparse._triton_ops")
    for block in () if job.index_only else BLOCKS:
        if job.mask.rows % block[0] == 0 and job.mask.cols % block[1] == 0:
            named, convert = f"{block[0]}x{block[1]}", functools.partial(to_bsr, block)
            peers.append(Peer("bsr", named, convert, triton.bsr_dense_mm))
            peers.append(Peer("cusparse_bsr", named, convert, CusparseBsr(torch, job.dtype)))
    return peers


def _time_us(torch: Any, function: Callable[[], Any]) -> tuple[Any, float]:
    """Its output, and the median over batches of the device time of a call."""

    def batch(calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SLEEP_CYCLES)
        start.record()
        for _ in range(calls):
            function()
        end.record()
        torch.cuda.synchronize()
        return 1e3 * start.elapsed_time(end) / calls

    out = function()  # compiles
    calls = min(max(int(BATCH_US / batch(1)), 1), 10)
    return out, round(statistics.median(batch(calls) for _ in range(BATCHES)), 2)


class CusparseBsr:
    """cuSPARSE's product of a BSR and a dense matrix; by ctypes, since torch hands blocks of these sizes to Triton.

    Source: cuSPARSE's documentation, cusparseSpMM with CUSPARSE_SPMM_BSR_ALG1, which takes row-major blocks.
    """

    INDEX_32, ZERO_BASED, ROW_MAJOR, AS_IT_IS, FLOAT32, ALGORITHM = 2, 0, 2, 0, 0, 14
    TYPES = {"bfloat16": 14, "float16": 2, "float32": 0}

    def __init__(self, torch: Any, dtype: str):
        self.torch, self.type = torch, self.TYPES[dtype]

    def __call__(self, bsr: Any, b: Any) -> Any:
        """Launches the product."""
        out = self.torch.empty(bsr.shape[0], b.shape[1], dtype=b.dtype, device=b.device)
        one, zero, size = ctypes.c_float(1), ctypes.c_float(0), ctypes.c_size_t()
        sparse, left, right = self._sparse(bsr), self._dense(b), self._dense(out)
        arguments = (
            *(_cusparse()[1], self.AS_IT_IS, self.AS_IT_IS, ctypes.byref(one), sparse, left),
            *(ctypes.byref(zero), right, self.FLOAT32, self.ALGORITHM),
        )
        _call("cusparseSpMM_bufferSize", *arguments, ctypes.byref(size))
        workspace = self.torch.empty(max(size.value, 1), dtype=self.torch.uint8, device=b.device)
        _call("cusparseSpMM", *arguments, _pointer(workspace))
        _call("cusparseDestroySpMat", sparse)
        for matrix in (left, right):
            _call("cusparseDestroyDnMat", matrix)
        return out

    def _sparse(self, bsr: Any) -> ctypes.c_void_p:
        matrix, arrays = ctypes.c_void_p(), (bsr.crow_indices(), bsr.col_indices(), bsr.values())
        blocks, rows, cols = bsr.values().shape
        sizes = map(ctypes.c_int64, (bsr.shape[0] // rows, bsr.shape[1] // cols, blocks, rows, cols))
        kinds = self.INDEX_32, self.INDEX_32, self.ZERO_BASED, self.type, self.ROW_MAJOR
        _call("cusparseCreateBsr", ctypes.byref(matrix), *sizes, *map(_pointer, arrays), *kinds)
        return matrix

    def _dense(self, x: Any) -> ctypes.c_void_p:
        matrix = ctypes.c_void_p()
        sizes = map(ctypes.c_int64, (*x.shape, x.shape[1]))
        _call("cusparseCreateDnMat", ctypes.byref(matrix), *sizes, _pointer(x), self.type, self.ROW_MAJOR)
        return matrix


@functools.cache
def _cusparse() -> tuple[ctypes.CDLL, ctypes.c_void_p]:
    """The library, which torch has loaded, and a handle."""
    library, handle = ctypes.CDLL("libcusparse.so.12"), ctypes.c_void_p()
    if status := library.cusparseCreate(ctypes.byref(handle)):
        raise RuntimeError(f"cusparseCreate returned {status}")
    return library, handle


def _call(name: str, *arguments: Any) -> None:
    if status := getattr(_cusparse()[0], name)(*arguments):
        raise RuntimeError(f"{name} returned {status}")


def _pointer(x: Any) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


if __name__ == "__main__":
    answer({Job: _measure})
