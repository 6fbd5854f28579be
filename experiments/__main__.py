"""python -m experiments: lists the experiments, or runs one of them.

python -m experiments                      every experiment and its question
python -m experiments NAME --help          its options
python -m experiments NAME --smoke         the same in seconds, to see that it works
python -m experiments NAME --keep          keep the rows under experiments/results/<device>/
"""

import ast
import dataclasses
import difflib
import errno
import importlib
import os
import pkgutil
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import experiments

OUR_PACKAGES = ("experiments", "models", "sparsellm", "pallas_kernels")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Of every experiment.

    Attributes:
        smoke: defaults for a run of seconds, to see that it works.
        fresh: start a new run even where an unfinished one with the same config could be continued.
        keep: keep the rows as this device's result, under experiments/results/<device>/.
        variant: a word that names this result among several of the experiment; it is kept beside the one without.
        runs: the folder where runs are left.
    """

    smoke: bool = False
    fresh: bool = False
    keep: bool = False
    variant: str = ""
    runs: Path = Path("runs")


def questions() -> dict[str, str]:
    """Name -> question of every experiment and command, read without importing any."""
    found = {}
    for module in pkgutil.iter_modules(experiments.__path__):
        path = Path(experiments.__path__[0]) / f"{module.name}.py"
        if path.is_file():
            tree = ast.parse(path.read_text())
            if any(isinstance(node, ast.ClassDef) and node.name == "Config" for node in tree.body):
                found[module.name] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def main(arguments: Sequence[str]) -> int:
    """Runs one experiment from command-line arguments; returns the exit code."""
    found = questions()
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, found))
        print("\n".join(f"{name:{width}}  {question}" for name, question in found.items()))
        print("\npython -m experiments NAME --help shows the options of one.")
        return 0
    name, *rest = arguments
    if name not in found:
        close = difflib.get_close_matches(name, found, n=1)
        meant = f"did you mean {close[0]}?" if close else f"there are {', '.join(found)}"
        print(f'no experiment is called "{name}": {meant}', file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that termination, too, leaves things in order
    try:
        return _execute(importlib.import_module(f"experiments.{name}"), rest)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from its last checkpoint, if it has left one", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        print(f"error: {error}; pip install 'sparsellm[experiments]' installs what experiments need", file=sys.stderr)
    except (ValueError, RuntimeError, FloatingPointError) as error:
        if not _raised_by_us(error.__traceback__):
            raise
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        said = error if error.filename or not error.strerror else error.strerror
        bare = error.strerror == os.strerror(errno.ENOSPC)  # whoever wrote knew no better sentence
        hint = ": free some, or give --runs a folder on another disk, and run the same command again" if bare else ""
        print(f"error: {said}{hint}", file=sys.stderr)
    return 1


def _execute(module: ModuleType, arguments: Sequence[str]) -> int:
    import tyro

    name = module.__name__.partition(".")[2]
    prog, description = f"python -m experiments {name}", module.__doc__
    style = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
    if hasattr(module, "main"):
        return module.main(tyro.cli(module.Config, prog=prog, description=description, args=arguments, config=style))

    from experiments.runs import Run, check_variant, keep

    config = module.Config.smoke() if "--smoke" in arguments else module.Config()
    both = dataclasses.make_dataclass(
        "Options", [("config", module.Config), ("options", RunOptions)], frozen=True, kw_only=True
    )
    chosen: Any = tyro.cli(
        both,
        prog=prog,
        description=description,
        args=arguments,
        default=both(config=config, options=RunOptions()),
        config=style,
    )
    if chosen.options.smoke and chosen.options.keep:
        raise ValueError("--keep keeps a result worth quoting, which --smoke is not: leave one of them out")
    check_variant(chosen.options.variant)
    if chosen.options.variant and not chosen.options.keep:
        raise ValueError(f"--variant names a result, so it takes --keep; got {chosen.options.variant!r}")
    command = f"{prog} {shlex.join(arguments)}"
    where = {"root": chosen.options.runs, "fresh": chosen.options.fresh}
    with Run.start(name, chosen.config, **where, command=command) as run:
        print(f"{'going on with' if run.continued else 'starting'} {run.folder}", flush=True)
        rows = module.run(chosen.config, run)
        run.finish(rows)
        if chosen.options.keep:
            print(f"kept {keep(run.folder, variant=chosen.options.variant)}")
    return 0


def _raised_by_us(traceback: TracebackType | None) -> bool:
    """Whether the innermost frame is ours: then the message is a sentence for the user, else a bug to be shown."""
    package = ""
    while traceback is not None:
        package = traceback.tb_frame.f_globals.get("__name__", "").partition(".")[0]
        traceback = traceback.tb_next
    return package in OUR_PACKAGES or package == "__main__"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
