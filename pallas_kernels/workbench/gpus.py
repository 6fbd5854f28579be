"""The GPUs the workbench knows: what lowering needs to target them, and the rates that bound a kernel on them."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental.mosaic.gpu import core as mosaic_gpu
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels.case import Work

# Instructions that one architecture alone has. Mosaic emits them for others without a word, and ptxas fails later.
ONLY_ON = {"wgmma.mma_async": "9.0", "tcgen05.mma": "10.0"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        kind: how jax's `device_kind` starts.
        sms: streaming multiprocessors.
        compute_capability: "9.0" is Hopper.
        smem: bytes of shared memory a block may use.
        flops: rate of a large dense bfloat16 product, FLOP/s.
        bandwidth: device memory, bytes/s.
        source: where the two rates come from.
    """

    kind: str
    sms: int
    compute_capability: str
    smem: int
    flops: float
    bandwidth: float
    source: str

    def bound_us(self, work: Work) -> float:
        """The least time for this work: the larger of FLOPs over the peak and bytes over the bandwidth."""
        return max(work.flops / self.flops, work.bytes / self.bandwidth) * 1e6


# fmt: off
GPUS = (
    Gpu(kind="NVIDIA H200", sms=132, compute_capability="9.0", smem=227 << 10, flops=797e12, bandwidth=4.3e12,
        source="measured: cuBLAS at 4096 cubed, and a copy"),
    Gpu(kind="NVIDIA H100", sms=132, compute_capability="9.0", smem=227 << 10, flops=989e12, bandwidth=3.35e12,
        source="datasheet, SXM"),
    Gpu(kind="NVIDIA A100", sms=108, compute_capability="8.0", smem=163 << 10, flops=312e12, bandwidth=2.04e12,
        source="datasheet, SXM 80 GB"),
    Gpu(kind="NVIDIA B200", sms=148, compute_capability="10.0", smem=227 << 10, flops=2250e12, bandwidth=8e12,
        source="datasheet"),
)
# fmt: on


def find_gpu(device_kind: str) -> Gpu | None:
    """The entry of a device, by the start of its name; None for others."""
    return next((gpu for gpu in GPUS if device_kind.startswith(gpu.kind)), None)


@dataclasses.dataclass(frozen=True)
class _AbstractGpu(AbstractDevice):
    """States its compute capability as well: without one, Mosaic lowers for Hopper whatever the name."""

    compute_capability: str = "9.0"


@contextlib.contextmanager
def targeting(gpu: Gpu) -> Iterator[None]:
    """Traces and lowers for `gpu`, which need not be there."""
    device = _AbstractGpu(gpu.kind, gpu.sms, "gpu", gpu.compute_capability)
    mesh = AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), mosaic_gpu.artificial_shared_memory_limit(gpu.smem):
        yield


class LoweringError(Exception):
    """The kernel cannot be lowered for this GPU, or lowers to an instruction that it does not have."""


def lower(function: Callable[..., Any], shapes: list[jax.ShapeDtypeStruct], gpu: Gpu) -> str:
    """Runs the whole Mosaic lowering of `function(*shapes)` for `gpu`: layouts, shared memory, divisibility.

    Returns the program's text.

    Raises:
        NotImplementedError: the kernel itself, while it is traced, says that it does not take this.
        LoweringError: Mosaic lacks something that the kernel uses, or the GPU does.
        Exception: whatever else tracing and lowering raise.
    """
    with targeting(gpu):
        traced = jax.jit(function).trace(*shapes)
        try:
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        except NotImplementedError as error:
            raise LoweringError(str(error)) from error
    for instruction, capability in ONLY_ON.items():
        if instruction in text and capability != gpu.compute_capability:
            raise LoweringError(
                f"{instruction} needs compute capability {capability}; {gpu.kind} has {gpu.compute_capability}"
            )
    return text
