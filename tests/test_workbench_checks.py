"""The checks of the workbench: that they find what is wrong with a kernel, and say so."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from prototypes import A100, B200, H200, broken_template

from pallas_kernels.case import Work, relative_error, tolerance
from pallas_kernels.workbench import checks
from pallas_kernels.workbench.differentiate import value_and_gradients
from pallas_kernels.workbench.gpus import GPUS, find_gpu
from pallas_kernels.workbench.interpreter import InterpreterError, run_interpreted

INFINITY = float("inf")


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float64)


def integers(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


# --- the error metric ---------------------------------------------------------------------------------------------


def test_relative_error_is_the_ratio_of_root_mean_squares():
    assert relative_error(floats(3, 4.5), floats(3, 4)) == pytest.approx(0.5 / 5.0)
    assert relative_error({"a": floats(1), "b": floats(2.2)}, {"a": floats(1), "b": floats(2)}) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("out", "ref"),
    [
        (floats(np.nan, 1), floats(1, 1)),
        (floats(1, 1), floats(np.nan, 1)),
        (floats(np.inf, 1), floats(np.inf, 1)),
        (floats(1e-9, 0), floats(0, 0)),
        (integers(1, 2), integers(1, 3)),
        (np.array([True]), np.array([False])),
    ],
)
def test_relative_error_is_infinite_for(out, ref):
    assert relative_error(out, ref) == INFINITY


def test_relative_error_is_zero_for_equal_zeros_and_integers_and_nothing():
    assert relative_error(np.zeros(3), np.zeros(3)) == 0
    assert relative_error(integers(1, 2), integers(1, 2)) == 0
    assert relative_error(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32)) == 0


def test_relative_error_names_what_differs():
    with pytest.raises(ValueError, match=r"shape of ref, \(2,\); got \(3,\)"):
        relative_error(np.zeros(3), np.zeros(2))
    with pytest.raises(ValueError, match="structure of ref"):
        relative_error((np.zeros(3), np.zeros(3)), np.zeros(3))


def test_tolerance_names_the_dtypes():
    assert (tolerance("bfloat16"), tolerance(jnp.float32)) == (1e-2, 1e-5)
    with pytest.raises(ValueError, match="bfloat16, float16, float32, float8_e4m3fn; got int8"):
        tolerance("int8")


def test_gradients_leave_integers_and_statics_alone():
    def function(x, n, power):
        return x**power * n.astype(x.dtype), n

    x, n = jnp.array([2.0, 3.0]), jnp.array([1, 10])
    found = value_and_gradients(function, (x, n, 2))
    assert set(found) == {"value", "gradient 0"}
    np.testing.assert_allclose(found["value"][0], [4.0, 90.0])
    eighths = 8 * found["gradient 0"] / np.array([4.0, 60.0], np.float32)  # d(x^2 n)/dx = 2 x n, times the cotangent
    np.testing.assert_array_equal(eighths, np.round(eighths))
    assert np.any(eighths != 0) and np.all(np.abs(eighths) <= 8)
    assert set(value_and_gradients(lambda n: n + 1, (n,))) == {"value"}
    assert set(value_and_gradients(function, (x, n, 2), gradient=False)) == {"value"}


# --- the interpreter ----------------------------------------------------------------------------------------------


def hand_over(x, *, wait: bool):
    """One warpgroup doubles x into shared memory, another stores it; `wait` for the barrier between them, or not."""

    def body(x_gmem, y_gmem, smem, loaded, doubled):
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == 0)
        def _double():
            plgpu.copy_gmem_to_smem(x_gmem, smem, loaded)
            plgpu.barrier_wait(loaded)
            smem[...] = smem[...] * 2
            plgpu.commit_smem()
            if wait:
                plgpu.barrier_arrive(doubled)

        @pl.when(warpgroup == 1)
        def _store():
            if wait:
                plgpu.barrier_wait(doubled)
            plgpu.copy_smem_to_gmem(smem, y_gmem)
            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types=[plgpu.SMEM(x.shape, x.dtype), plgpu.Barrier(), plgpu.Barrier()],
        num_threads=2,
        thread_name="warpgroup",
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )(x)


def test_a_missing_barrier_is_a_race_and_is_located():
    x = jnp.arange(256, dtype=jnp.float32)
    with pytest.raises(
        InterpreterError, match=r"races: .*test_workbench_checks\.py:\d+.* and .*test_workbench_checks\.py:\d+"
    ):
        run_interpreted(lambda: hand_over(x, wait=False))
    # What a failure leaves behind does not reach the next run.
    np.testing.assert_array_equal(run_interpreted(lambda: hand_over(x, wait=True)), 2 * np.arange(256.0))


def test_a_race_in_the_first_of_two_kernels_is_not_forgotten():
    x = jnp.arange(256, dtype=jnp.float32)
    with pytest.raises(InterpreterError, match="races"):
        run_interpreted(lambda: hand_over(hand_over(x, wait=False), wait=True))


WAIT_EMPTY = "pl.when(s >= config.stages)(lambda: plgpu.barrier_wait(empty.at[slot]))"
ARRIVE_EMPTY = "pl.when(s + config.stages < steps)(lambda: plgpu.barrier_arrive(empty.at[slot]))"
MULTIPLY = "plgpu.wgmma(acc, a_smem.at[slot], b_smem.at[slot])"


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        pytest.param([("plgpu.barrier_wait(full.at[slot])", "pass")], "no threads observed", id="full not awaited"),
        pytest.param(
            [(WAIT_EMPTY, "pass"), (ARRIVE_EMPTY, "pass")], "races|no threads observed", id="no empty barrier"
        ),
        pytest.param([(ARRIVE_EMPTY, "pass")], "still running after 5 s: a barrier_wait", id="empty never arrives"),
        pytest.param([(ARRIVE_EMPTY, "pass"), (MULTIPLY, f"{ARRIVE_EMPTY}; {MULTIPLY}")], "races", id="released early"),
        pytest.param([("num_arrivals=2", "num_arrivals=1")], "races|observed", id="one arrival of two"),
        pytest.param([("        plgpu.commit_smem()\n", "")], "commit_smem is missing", id="no commit"),
        pytest.param([("plgpu.wait_smem_to_gmem(0)", "pass")], "Not all copy_smem_to_gmem", id="no final wait"),
        pytest.param([("acc[...]", "acc[...] * 1.02")], "value off by 2.0e-02 from the reference", id="wrong value"),
    ],
)
def test_check_finds_what_was_broken_by_hand(tmp_path, edits, message):
    kernel = broken_template(tmp_path, *edits)
    result = checks.check_path(kernel, kernel.cases[0], "bfloat16", "interpret", timeout_s=5.0)
    assert result.status == "failed"
    assert re.search(message, result.detail)


def test_check_finds_a_wrong_gradient(tmp_path):
    kernel = broken_template(tmp_path, ("_xla(a.T, dc)", "2 * _xla(a.T, dc)"))
    result = checks.check_path(kernel, kernel.cases[0], "bfloat16", "xla")
    assert result.status == "failed" and re.search(r"gradient 1 off by 1.0e\+00", result.detail)


# --- lowering -----------------------------------------------------------------------------------------------------


def test_lowering_reports_why_other_gpus_are_not_supported(tmp_path):
    kernel = broken_template(tmp_path)
    by_gpu = {gpu.kind: checks.check_lowering(kernel, gpu, "bfloat16") for gpu in GPUS}
    assert {kind: r.status for kind, r in by_gpu.items()} == {
        "NVIDIA H200": "ok",
        "NVIDIA H100": "ok",
        "NVIDIA A100": "skipped",
        "NVIDIA B200": "skipped",
    }
    assert "Hopper and newer" in by_gpu["NVIDIA A100"].detail
    assert "wgmma.mma_async needs compute capability 9.0" in by_gpu["NVIDIA B200"].detail
    assert kernel.devices == ("NVIDIA H100", "NVIDIA H200")  # as its author wrote it


@pytest.mark.parametrize("gpu", [A100, B200], ids=lambda gpu: gpu.kind)
def test_a_claim_that_does_not_lower_fails(tmp_path, gpu):
    kernel = broken_template(tmp_path, ('("NVIDIA H100", "NVIDIA H200")', f'("{gpu.kind}",)'))
    assert checks.check_lowering(kernel, gpu, "bfloat16").status == "failed"


def test_a_candidate_that_does_not_lower_is_named(tmp_path):
    kernel = broken_template(tmp_path, ("for stages in (4, 2)", "for stages in (4, 40)"))
    result = checks.check_lowering(kernel, H200, "bfloat16")
    assert result.status == "failed"
    assert (
        "stages=40) on case two_tiles: ValueError: Mosaic GPU kernel exceeds available shared memory" in result.detail
    )


POKE = ("@lowered_once()", "@plgpu.inline_mgpu()\ndef poke(ctx):\n    del ctx\n\n\n@lowered_once()")


def test_what_jax_does_not_implement_is_a_defect_and_no_reason_to_skip(tmp_path):
    kernel = broken_template(tmp_path, ("= acc.astype", "= jnp.cumsum(acc, axis=0).astype"))
    lowered = checks.check_lowering(kernel, H200, "bfloat16")
    assert lowered.status == "failed" and "cumsum" in lowered.detail


def test_a_kernel_that_cannot_be_interpreted_fails(tmp_path):
    kernel = broken_template(tmp_path, POKE, ("plgpu.wait_smem_to_gmem(0)", "plgpu.wait_smem_to_gmem(0), poke()"))
    result = checks.check_path(kernel, kernel.cases[0], "bfloat16", "interpret")
    assert result.status == "failed" and "does not support `inline_mgpu`" in result.detail


def test_bound_is_the_larger_of_compute_and_memory():
    assert H200.bound_us(Work(flops=797e12, bytes=0)) == pytest.approx(1e6)
    assert H200.bound_us(Work(flops=1, bytes=4.3e12)) == pytest.approx(1e6)
    assert find_gpu("NVIDIA H200") == find_gpu("NVIDIA H200 NVL") == H200
    assert find_gpu("cpu") is None
