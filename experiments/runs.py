"""Runs and results: what an experiment leaves behind, written whole or not at all.

A run is the folder `runs/<experiment>/<time>/`: config.json when it starts (and at which commits), whatever the
experiment leaves on the way (checkpoints/ for as long as it can be continued), and rows.jsonl when it is finished. A
result worth quoting is `experiments/results/<device>/<experiment>.json`, or `<experiment>.<variant>.json` for one more
of the same experiment.
"""

import dataclasses
import datetime
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import jax

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("jax", "jaxlib", "flax")
_DESCRIBED = ("experiment", "device", "versions")  # of a run, in its result too

type Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One run of an experiment; made by `Run.start`, its own for as long as the `with` block lasts.

    Attributes:
        experiment: its name.
        folder: where to leave files.
        continued: whether an earlier process has begun it.
    """

    experiment: str
    folder: Path
    continued: bool
    _lock: IO[str] = dataclasses.field(repr=False)

    @classmethod
    def start(
        cls, experiment: str, config: Any, *, root: Path = Path("runs"), fresh: bool = False, command: str = ""
    ) -> "Run":
        """Continues the latest unfinished run of the same config on the same device, or starts a new one.

        Args:
            experiment: its name.
            config: its config, a dataclass.
            root: where runs are.
            fresh: start a new one in any case.
            command: that this is, for whoever keeps its rows.
        """
        # By way of JSON, so that it compares with what an earlier process has written.
        described = json.loads(json.dumps(_described(experiment, config), default=str))
        if not fresh:
            for folder in sorted((root / experiment).glob("*/"), reverse=True):
                found = {} if (folder / "rows.jsonl").exists() else _read_config(folder)
                if described.items() <= found.items():
                    lock = _try_lock(folder)
                    if lock is not None:
                        _write_config(folder, found | {"command": command}, found.get("commits", []))
                        return cls(experiment=experiment, folder=folder, continued=True, _lock=lock)
        folder = _new_folder(root / experiment)
        lock = _try_lock(folder)
        if lock is None:
            raise RuntimeError(f"another process has taken the run {folder} in the moment it was made")
        _write_config(folder, described | {"command": command}, [])
        return cls(experiment=experiment, folder=folder, continued=False, _lock=lock)

    def write(self, name: str, content: str | bytes) -> Path:
        """Leaves a file in the run's folder."""
        return write_atomically(self.folder / name, content)

    def show(self, text: str, figures: Mapping[str, bytes]) -> None:
        """Prints what an experiment's `readme` makes of its rows, and leaves the figures."""
        for name, content in figures.items():
            self.write(name, content)
        print(text, flush=True)

    def remembered[T: Row | list[Row]](self, name: str, compute: Callable[[], T]) -> T:
        """What an earlier process of this run has computed under this name, or else computes it and says how long."""
        path = self.folder / "checkpoints" / f"{name}.json"  # removed when the run is finished
        if not path.exists():
            start = time.perf_counter()
            self.write(f"checkpoints/{path.name}", json.dumps(compute()))
            print(f"{name.replace('_', ' ')}: {time.perf_counter() - start:.0f} s", flush=True)
        return json.loads(path.read_text())

    def finish(self, rows: Sequence[Row]) -> None:
        """Writes the rows, a JSON object a line: the run is finished, and what only continues it is removed."""
        self.write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, error: type[BaseException] | None, *_) -> None:
        if error and {path.name for path in self.folder.iterdir()} <= {"config.json", ".lock"}:
            shutil.rmtree(self.folder)  # refused before it did anything: nothing to continue
        self._lock.close()


def keep(folder: Path, *, variant: str = "", results: Path = RESULTS) -> Path:
    """Keeps a finished run's rows as the result of its experiment on its device, in place of an earlier one.

    Args:
        folder: of the run.
        variant: a word for a result that is kept beside the experiment's own, of other options.
        results: the folder of the kept results.

    Raises:
        FileNotFoundError: the folder holds no finished run.
        ValueError: it is one of `--smoke`, or the variant is no word.
    """
    config, path = _read_config(folder), folder / "rows.jsonl"
    if not config.keys() >= {*_DESCRIBED, "command", "commits"} or not path.is_file():
        raise FileNotFoundError(f"a finished run is a folder with config.json and rows.jsonl; {folder} is none")
    if "--smoke" in config["command"].split():
        raise ValueError(f"a kept result is worth quoting, which --smoke is not; got {folder}")
    check_variant(variant)
    rows, commits = path.read_text().splitlines(), config["commits"]
    result = {name: config[name] for name in _DESCRIBED}
    result |= {"commit": commits[-1]} | ({"begun_at": commits[0]} if len(commits) > 1 else {})
    finished = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC)
    result |= {"date": finished.date().isoformat(), "command": config["command"]}
    lines = json.dumps({**result, "rows": []}, indent=2).removesuffix("[]\n}")
    body = ",\n    ".join(rows)  # a row a line: a new result shows as a readable diff
    name = f"{result['experiment']}.{variant}" if variant else result["experiment"]
    return write_atomically(results / slug(result["device"]) / f"{name}.json", f"{lines}[\n    {body}\n  ]\n}}\n")


def check_variant(variant: str) -> None:
    """Raises ValueError where a variant's name is no word."""
    if not (variant + "_").isidentifier():
        raise ValueError(f"--variant takes a word; got {variant!r}")


def write_atomically(path: Path, content: str | bytes) -> Path:
    """Writes a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def read_results(results: Path = RESULTS) -> dict[tuple[str, str], dict[str, Any]]:
    """Every kept result by (device folder, file name without .json: the experiment's, or with its variant).

    Raises:
        ValueError: a file is no such result.
    """
    found = {}
    for path in sorted(results.glob("*/*.json"), key=lambda path: (path.parent.name, path.stem)):  # variants come after
        result = _read_object(path)
        if not result.keys() >= {*_DESCRIBED, "commit", "date", "command", "rows"}:
            raise ValueError(f"a kept result is a file that --keep has written; {path} is none: remove it")
        found[path.parent.name, path.stem] = result
    return found


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide a measurement."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _PACKAGES}


def slug(device: str) -> str:
    """A device as a folder's name: "nvidia_h200", "cpu"."""
    return device.lower().replace(" ", "_")


def markdown_table(rows: Iterable[Sequence[Any]], header: Sequence[str]) -> str:
    """A table in Markdown, padded so that it reads as plain text too; numbers to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(header, *cells, strict=True)]
    right = [all(cell[:1].isdigit() or cell[:1] in "-–" for cell in column) for column in zip(*cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (w + 1) + ":" if r else "-" * (w + 2) for w, r in zip(widths, right, strict=True))
    return "\n".join([line(header), f"|{rule}|", *map(line, cells)])


def _described(experiment: str, config: Any) -> dict[str, Any]:
    return {
        "experiment": experiment,
        "config": dataclasses.asdict(config),
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
    }


def _write_config(folder: Path, config: dict[str, Any], commits: list[str | None]) -> None:
    """Of a run; with the commits that it has run at, this one the last."""
    commit = _commit()
    commits = commits if commits[-1:] == [commit] else [*commits, commit]
    write_atomically(folder / "config.json", json.dumps(config | {"commits": commits}, indent=2) + "\n")


def _new_folder(parent: Path) -> Path:
    time = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for suffix in ("", *(f"-{i}" for i in range(2, 100))):
        folder = parent / f"{time}{suffix}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"a run of this second must have a free name; {parent} has a hundred of {time}")


def _try_lock(folder: Path) -> IO[str] | None:
    """A lock that ends with the process, however that ends: what is locked is running."""
    file = open(folder / ".lock", "w")  # noqa: SIM115 - it stays open as long as the run
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _read_config(folder: Path) -> dict[str, Any]:
    """Of a run; nothing where there is none, or a damaged one."""
    return _read_object(folder / "config.json")


def _read_object(path: Path) -> dict[str, Any]:
    """Of JSON; nothing where a file is missing or holds anything else."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):  # a UnicodeDecodeError is one
        return {}
    return found if isinstance(found, dict) else {}


def _commit() -> str | None:
    """The environment's SPARSELLM_COMMIT, for a copy on another machine; else the checkout's, if it is one."""
    if commit := os.environ.get("SPARSELLM_COMMIT"):
        return commit
    command = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
