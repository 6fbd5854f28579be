"""What every kernel must do: these tests follow from KERNELS and from the CASES of each."""

import functools

import jax.numpy as jnp
import pytest

from pallas_kernels import KERNELS
from pallas_kernels.workbench.arguments import refusal
from pallas_kernels.workbench.checks import (
    Result,
    check_lowering,
    check_path,
    claims,
    has_gpu,
    sized_for_gpu,
)
from pallas_kernels.workbench.gpus import GPUS
from pallas_kernels.workbench.kernels import load_kernel

LOADED = [load_kernel(name) for name in KERNELS]
MOSAIC = [kernel for kernel in LOADED if kernel.devices]


def _cases(kernels, keep):
    return [
        pytest.param(kernel, case, jnp.dtype(dtype).name, id=f"{kernel.name}-{case.name}-{jnp.dtype(dtype).name}")
        for kernel in kernels
        for case in kernel.cases
        for dtype in case.dtypes
        if keep(case)
    ]


def _spread(cases):
    """Each case in its first dtype, and each kernel's last one in the others too; `check` and a GPU run all of them.

    Without float16: the kernels take both 16-bit types alike, on the xla path as on Mosaic's.
    """
    done, chosen = set(), []
    for param in reversed(cases):
        kernel, case, dtype = param.values
        if dtype != "float16" and (dtype == jnp.dtype(case.dtypes[0]).name or (kernel.name, dtype) not in done):
            done.add((kernel.name, dtype))
            chosen.append(param)
    return chosen[::-1]


def _passes_or_skips(result: Result) -> None:
    if result.status == "skipped":
        pytest.skip(result.detail)
    assert result.status == "ok", result.detail


@pytest.mark.parametrize(
    ("kernel", "case", "dtype"), _spread(_cases(LOADED, lambda case: not sized_for_gpu(case, "cpu")))
)
def test_xla_path_equals_reference(kernel, case, dtype):
    result = check_path(kernel, case, dtype, "xla")
    assert result.status == "ok", result.detail  # the xla path takes every case


@pytest.mark.parametrize(("kernel", "case", "dtype"), _spread(_cases(MOSAIC, lambda case: case.small)))
def test_interpreted_kernel_equals_reference_without_races(kernel, case, dtype):
    _passes_or_skips(check_path(kernel, case, dtype, "interpret"))


@pytest.mark.parametrize("kernel", MOSAIC, ids=lambda kernel: kernel.name)
def test_some_small_case_reaches_the_mosaic_kernel(kernel):
    """Otherwise every interpreted test might skip, and no race would ever be looked for."""
    interpreted = functools.partial(kernel.function, implementation="interpret")
    cases = [case for case in kernel.cases if case.small]
    assert any(refusal(interpreted, case, case.dtypes[0]) is None for case in cases)


# GPUs that lowering cannot tell apart (H100 and H200) are lowered for once here, as 16-bit types are; each by `check`.
TARGETS = list({(gpu.compute_capability, gpu.sms): gpu for gpu in reversed(GPUS)}.values())


@pytest.mark.parametrize(
    ("kernel", "gpu", "dtype"),
    [
        pytest.param(kernel, gpu, dtype, id=f"{kernel.name}-{gpu.kind}-{dtype}")
        for kernel in MOSAIC
        for gpu in TARGETS
        for dtype in kernel.dtypes
        if claims(kernel, gpu) and dtype != "float16"
    ],
)
def test_every_candidate_lowers_on_the_gpus_it_claims(kernel, gpu, dtype):
    _passes_or_skips(check_lowering(kernel, gpu, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize(("kernel", "case", "dtype"), _cases(MOSAIC, lambda case: True))
def test_compiled_kernel_equals_reference(kernel, case, dtype):
    if not has_gpu(kernel):
        pytest.skip(f"needs {' or '.join(kernel.devices)}")
    _passes_or_skips(check_path(kernel, case, dtype, "mosaic_gpu"))


@pytest.mark.gpu
@pytest.mark.parametrize(("kernel", "case", "dtype"), _cases(LOADED, lambda case: True))
def test_xla_path_on_the_gpu_equals_reference(kernel, case, dtype):
    result = check_path(kernel, case, dtype, "xla")
    assert result.status == "ok", result.detail
