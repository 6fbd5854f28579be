"""The workbench: that what it keeps, prints and starts is right."""

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
import pytest
from prototypes import H200, broken_template, write_double

import pallas_kernels
from pallas_kernels import __main__ as command_line
from pallas_kernels import tuning
from pallas_kernels.case import Work
from pallas_kernels.workbench.bench import bench_case, write_rows
from pallas_kernels.workbench.gpus import targeting
from pallas_kernels.workbench.kernels import KernelError, load_kernel
from pallas_kernels.workbench.new import new_kernel, with_kernel
from pallas_kernels.workbench.tune import tune

PACKAGE = Path(pallas_kernels.__file__).parent


def run_command(monkeypatch, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", ["pallas_kernels", *args])
    return command_line.main()


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
    for seconds in ("0", "-5", "nan"):
        with pytest.raises(SystemExit):
            run_command(monkeypatch, "check", path, "--timeout", seconds)
        assert f"argument --timeout: must be above 0; got {seconds}" in capsys.readouterr().err


def test_list_says_what_is_there(monkeypatch, capsys):
    assert run_command(monkeypatch, "list") == 0
    out = capsys.readouterr().out
    assert all(f"{name}\n    " in out for name in pallas_kernels.KERNELS)
    assert "tuned: no GPU here" in out
