"""The workbench: that it finds what is wrong, and says so; and that what it starts and keeps is right."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

import pallas_kernels
from pallas_kernels import __main__ as command_line
from pallas_kernels import tuning
from pallas_kernels.case import Work, relative_error, tolerance
from pallas_kernels.workbench import checks
from pallas_kernels.workbench.bench import bench_case, write_rows
from pallas_kernels.workbench.differentiate import value_and_gradients
from pallas_kernels.workbench.gpus import GPUS, find_gpu, targeting
from pallas_kernels.workbench.interpreter import InterpreterError, run_interpreted
from pallas_kernels.workbench.kernels import Kernel, KernelError, load_kernel
from pallas_kernels.workbench.new import new_kernel, with_kernel
from pallas_kernels.workbench.tune import tune

PACKAGE = Path(pallas_kernels.__file__).parent
H200, A100, B200 = (next(gpu for gpu in GPUS if gpu.kind.endswith(kind)) for kind in ("H200", "A100", "B200"))
INFINITY = float("inf")

# A kernel without a GPU: y = 2 x, by configs that are right, wrong, or crash.
DOUBLE = '''"""y = 2 * x."""
import dataclasses
import jax
from pallas_kernels.case import Case, Work

DEVICES = ()

@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    way: str

def reference(x):
    return 2 * x

def candidates(x):
    return [Config(way=way) for way in ("slow", "wrong", "crash", "fast")]

def work(x):
    return Work(flops=x.size, bytes=4 * x.size)

def peers(x):
    return {"dense": lambda x: x + x}

CASES = tuple(
    Case(name=name, make=lambda key, dtype, scale=scale: (scale * jax.random.normal(key, (8,), dtype),),
         dtypes=("float32",), bench=True)
    for name, scale in (("low", 1), ("high", 10))
)

def double(x, *, config=None, implementation=None):
    if config is not None and config.way == "crash":
        raise ValueError("no such way")
    return (3 if config is not None and config.way == "wrong" else 2) * x
'''


def write_double(folder: Path, edit: tuple[str, str] = ("", "")) -> Kernel:
    assert edit[0] in DOUBLE
    path = folder / "double.py"
    path.write_text(DOUBLE.replace(*edit))
    return load_kernel(str(path))


def broken_template(folder: Path, *edits: tuple[str, str]) -> Kernel:
    """The kernel that `new` writes, with something broken by hand."""
    path = new_kernel("broken", folder)
    source = path.read_text()
    for old, new in edits:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    path.write_text(source)
    return load_kernel(str(path))


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float64)


def integers(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def run_command(monkeypatch, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", ["pallas_kernels", *args])
    return command_line.main()


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
    with pytest.raises(ValueError, match="bfloat16, float16, float32; got int8"):
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
    with pytest.raises(InterpreterError, match=r"races: .*test_workbench\.py:\d+.* and .*test_workbench\.py:\d+"):
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
        pytest.param([(WAIT_EMPTY, "pass"), (ARRIVE_EMPTY, "pass")], "races", id="no empty barrier"),
        pytest.param([(ARRIVE_EMPTY, "pass")], "still running after 5 s: a barrier_wait", id="empty never arrives"),
        pytest.param([(ARRIVE_EMPTY, "pass"), (MULTIPLY, f"{ARRIVE_EMPTY}; {MULTIPLY}")], "races", id="released early"),
        pytest.param([("num_arrivals=2", "num_arrivals=1")], "no threads observed", id="one arrival of two"),
        pytest.param([("        plgpu.commit_smem()\n", "")], "commit_smem is missing", id="no commit"),
        pytest.param([("plgpu.wait_smem_to_gmem(0)", "pass")], "Not all copy_smem_to_gmem", id="no final wait"),
        pytest.param([("acc[...]", "acc[...] * 1.02")], "value off by 2.0e-02 from the reference", id="wrong value"),
        pytest.param([("_xla(a.T, dc)", "2 * _xla(a.T, dc)")], "gradient 1 off by 1.0e+00", id="wrong gradient"),
    ],
)
def test_check_finds_what_was_broken_by_hand(tmp_path, edits, message):
    kernel = broken_template(tmp_path, *edits)
    result = checks.check_path(kernel, kernel.cases[0], "bfloat16", "interpret", timeout_s=5.0)
    assert result.status == "failed"
    assert message in result.detail


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


POKE = ("def _mosaic(", "@plgpu.inline_mgpu()\ndef poke(ctx):\n    del ctx\n\n\ndef _mosaic(")


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


# --- the table of tuned configs -----------------------------------------------------------------------------------


def test_arguments_are_described_alike_traced_or_not():
    x = jnp.ones((4, 8), jnp.bfloat16)
    seen = []
    jax.eval_shape(lambda x: seen.append(tuning.describe(x, {"mask": x}, 128)), x)
    assert seen[0] == tuning.describe(x, {"mask": x}, 128) == "bfloat16[4,8] ['mask']bfloat16[4,8] 128"


def test_explicit_config_goes_before_tuned_before_heuristic(tmp_path, monkeypatch):
    kernel = broken_template(tmp_path)
    module, launched = kernel.module, []
    monkeypatch.setattr(module, "_mosaic", lambda a, b, config, interpret: launched.append(config) or (a @ b))
    monkeypatch.setattr(tuning, "TUNED", tmp_path)
    tuned, explicit = module.Config(block_m=64, block_n=64, stages=2), module.Config(stages=3)
    square, other = (jax.ShapeDtypeStruct((n, n), jnp.bfloat16) for n in (128, 256))
    entry = {"config": {"block_m": 64, "block_n": 64, "stages": 2}, "cases": {}}
    table = {"broken": {"bfloat16[128,128] bfloat16[128,128]": entry}}
    (tmp_path / "nvidia_h200.json").write_text(json.dumps(table))

    with targeting(H200):
        for x, config in ((square, explicit), (square, None), (other, None)):
            jax.eval_shape(lambda a, b, config=config: kernel.function(a, b, config=config), x, x)
    assert launched == [explicit, tuned, module.candidates(other, other)[0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON"),
        ('{"k": {"int32[]": {"config": {"rows": 1}}}}', r"fields must be \['bytes', 'flops'\]; got \['rows'\]"),
    ],
)
def test_a_table_that_cannot_be_used_says_so(tmp_path, monkeypatch, text, message):
    (tmp_path / "nvidia_h200.json").write_text(text)
    monkeypatch.setattr(tuning, "TUNED", tmp_path)
    with targeting(H200), pytest.raises(ValueError, match=message):
        tuning.tuned_config("k", Work, jax.ShapeDtypeStruct((), jnp.int32))


def test_tables_of_the_package_fit_their_kernels():
    for path in tuning.TUNED.glob("*.json"):
        for name, entries in tuning.read_table(path).items():
            config_class = load_kernel(name).module.Config
            for key, entry in entries.items():
                tuning.load_config(config_class, entry["config"], f"{path.name}, {key}")
                assert all(case["time_us"] > 0 for case in entry["cases"].values())


# --- tune and bench, with the clock of a test ---------------------------------------------------------------------


def fake_timer(times: list[float]):
    def timer(function, arrays, iterations):
        out = function(*arrays)
        return out, [times.pop(0)] * iterations

    return timer


def test_tune_keeps_the_best_right_config_and_resumes(tmp_path):
    kernel, lines = write_double(tmp_path), []
    table = tmp_path / "nvidia_h200.json"
    table.write_text('{"other": {"key": {"config": {}, "cases": {}}}}')
    # Case "low" takes 10, 1 (wrong), -, 20 us; case "high", without the wrong one, 50 and 20: the mean says "fast".
    found = tune(kernel, H200.kind, folder=tmp_path, timer=fake_timer([10, 1, 20, 50, 20]), report=lines.append)
    assert not found  # something was wrong, and said so
    assert any("way='wrong'" in line and "WRONG, error 5.0e-01" in line for line in lines)
    assert any("way='crash'" in line and "FAILED, ValueError: no such way" in line for line in lines)
    written = json.loads(table.read_text())
    assert written["double"]["float32[8]"]["config"] == {"way": "fast"}
    assert written["double"]["float32[8]"]["cases"]["high"] == {"time_us": 20, "error": 0.0}
    assert "other" in written and sorted(os.listdir(tmp_path)) == ["double.py", "nvidia_h200.json"]

    assert tune(kernel, H200.kind, folder=tmp_path, timer=fake_timer([]), report=lines.append)  # measures nothing
    assert lines[-1].endswith("tuned already")
    tune(kernel, H200.kind, folder=tmp_path, timer=fake_timer([1, 1, 2, 1, 2]), again=True, report=lines.append)
    assert json.loads(table.read_text())["double"]["float32[8]"]["config"] == {"way": "slow"}


def test_tune_out_of_time_writes_nothing_half_done(tmp_path):
    lines = []
    assert tune(
        write_double(tmp_path), H200.kind, folder=tmp_path, limit_s=-1.0, timer=fake_timer([]), report=lines.append
    )
    assert "time is up" in lines[-1]
    assert not (tmp_path / "nvidia_h200.json").exists()


def test_bench_row(tmp_path):
    kernel = write_double(tmp_path)
    row = bench_case(kernel, kernel.cases[0], "float32", H200.kind, fake_timer([2, 6, 4, 6, 2, 6]))
    expected = {"time_us": 2, "dense_us": 6, "speedup": 3, "bound_us": 0, "error": 0, "ok": True, "tuned": False}
    assert {key: row[key] for key in expected} == expected
    assert (row["tflops"], row["gbps"]) == (0, 0)  # 8 FLOPs and 32 bytes in 2 us
    write_rows(tmp_path / "rows.json", kernel, H200.kind, [row])
    record = json.loads((tmp_path / "rows.json").read_text())
    assert record["rows"] == [row] and record["versions"]["jax"] == jax.__version__


def test_bench_says_when_the_result_is_wrong(tmp_path):
    kernel = write_double(tmp_path, ("else 2) * x", "else 2.1) * x"))
    row = bench_case(kernel, kernel.cases[0], "float32", "NVIDIA Unheard Of", fake_timer([1] * 6))
    assert not row["ok"] and row["error"] == pytest.approx(0.05, rel=1e-4)
    assert row["bound_us"] is None


# --- finding kernels and starting new ones ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gather_matmull", "got gather_matmull; did you mean gather_matmul?"),
        ("quantum", "or a .py file; got quantum$"),
        ("nowhere/kernel.py", "must exist; got nowhere/kernel.py"),
    ],
)
def test_an_unknown_kernel_is_refused_with_the_list(name, message):
    with pytest.raises(KernelError, match=message):
        load_kernel(name)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (("DEVICES = ()", ""), "must define DEVICES"),
        (("def peers", "def _peers"), "must define peers"),
        (('"""y = 2 * x."""', ""), "docstring"),
        (('("high", 10)', '("low", 10)'), "distinct names"),
    ],
)
def test_an_incomplete_kernel_file_is_refused(tmp_path, edit, message):
    with pytest.raises(KernelError, match=message):
        write_double(tmp_path, edit)


def test_a_new_kernel_passes_every_check(tmp_path, monkeypatch, capsys):
    path = new_kernel("fresh_kernel", tmp_path)
    assert "kernel_name" not in path.read_text()
    assert run_command(monkeypatch, "check", str(path)) == 0
    out = capsys.readouterr().out
    assert all(re.search(f"{check} .* ok", out) for check in ("xla", "interpret", "lower"))
    assert "0 failed\nlowers for: NVIDIA H100, NVIDIA H200" in out


def test_a_new_kernel_joins_the_list(tmp_path):
    """In a copy of the package: `new` changes it."""
    shutil.copytree(PACKAGE, tmp_path / "pallas_kernels", ignore=shutil.ignore_patterns("__pycache__"))

    def run(*args):
        command = [sys.executable, "-m", "pallas_kernels", *args]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    written = run("new", "fresh_kernel")
    assert written.returncode == 0, written.stderr
    assert "python -m pallas_kernels check fresh_kernel" in written.stdout
    assert "fresh_kernel\n    C = A @ B" in run("list").stdout
    again = run("new", "fresh_kernel")
    assert again.returncode == 2 and "exists" in again.stderr


@pytest.mark.parametrize(
    "name", ["", "Kernel", "2d", "my-kernel", "lambda", "_x", "reference", "list", "jax", "a", "../x"]
)
def test_new_refuses_a_name_that_will_not_do(tmp_path, name):
    with pytest.raises(KernelError, match="name must"):
        new_kernel(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["case", "tile", "gather_matmul"])
def test_new_overwrites_nothing(name):
    with pytest.raises(KernelError, match="exists"):
        new_kernel(name)


def test_new_names_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(KernelError, match="must be a folder that can be written .* give --folder FOLDER"):
        new_kernel("fresh_kernel", tmp_path / "nowhere")


@pytest.mark.parametrize("names", [(), ("first",), tuple(f"a_kernel_with_a_rather_long_name_{i}" for i in range(4))])
def test_a_name_is_added_to_the_list_and_nothing_else_changes(names):
    source = f'"""Doc."""\n\nKERNELS = {names!r}  \n\nOTHER = 1\n'
    changed = with_kernel(source, "another")
    values = [ast.literal_eval(node.value) for node in ast.parse(changed).body if isinstance(node, ast.Assign)]
    assert values == [(*names, "another"), 1]
    assert changed.startswith('"""Doc."""\n\n') and changed.endswith("\n\nOTHER = 1\n")
    assert max(map(len, changed.split("\n"))) <= 120
    with pytest.raises(KernelError, match="must assign KERNELS"):
        with_kernel("OTHER = 1", "another")


# --- the command line ---------------------------------------------------------------------------------------------


def test_check_prints_what_failed_and_exits_1(tmp_path, monkeypatch, capsys):
    broken_template(tmp_path, ("acc[...]", "acc[...] * 1.02"))
    path = str(tmp_path / "broken.py")
    assert run_command(monkeypatch, "check", path, "--case", "two_tiles") == 1
    out = capsys.readouterr().out
    assert "FAILED value off by 2.0e-02" in out
    assert f"check {path} --case two_tiles" in out


def test_wrong_use_exits_2_with_one_sentence(tmp_path, monkeypatch, capsys):
    write_double(tmp_path)
    path = str(tmp_path / "double.py")
    assert run_command(monkeypatch, "check", path, "--case", "none") == 2
    assert capsys.readouterr().err == "case must be one of low, high; got none\n"
    assert run_command(monkeypatch, "tune", path) == 2
    assert capsys.readouterr().err == "tune needs an NVIDIA GPU that jax can use; this machine has cpu only\n"
    assert run_command(monkeypatch, "bench", path) == 2
    assert "bench needs an NVIDIA GPU" in capsys.readouterr().err


def test_list_says_what_is_there(monkeypatch, capsys):
    assert run_command(monkeypatch, "list") == 0
    out = capsys.readouterr().out
    assert all(f"{name}\n    " in out for name in pallas_kernels.KERNELS)
    assert "tuned: no GPU here" in out
