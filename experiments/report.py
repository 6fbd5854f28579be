"""What do the kept results say, as README's tables and figures?

    python -m experiments report            write them
    python -m experiments report --check    fail if README is stale

A block `<!-- report:NAME -->` ... `<!-- /report:NAME -->` of README holds the kept results of the experiment NAME, one
for each device and variant (`--keep --variant WORD`), whose figures' names begin with it. An experiment that defines
`readme(result) -> (markdown, figures)`, with figures a dict of file name to bytes, decides what to show and how; for
any other, the rows are shown as one table. Long tables are folded. The block of the name `summary` holds a table for
each device, of the lines that experiments with `headlines(result)` give, in the order of README's blocks.
"""

import ast
import dataclasses
import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments import headlines, runs

ROOT = Path(__file__).parents[1]
LONG_TABLE = re.compile(r"(?:^\|.*(?:\n|\Z)){19,}", re.MULTILINE)  # two lines of it are its header
SUMMARY = "summary"
BLOCK = re.compile(r"(<!-- report:(\w+) -->\n).*?(<!-- /report:\2 -->)", re.DOTALL)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of report.

    Attributes:
        check: change nothing; exit with 1 if README is stale.
        readme: the file whose blocks to write.
        results: the folder of the kept results.
    """

    check: bool = False
    readme: Path = ROOT / "README.md"
    results: Path = runs.RESULTS


def main(config: Config) -> int:
    """Writes README's blocks and the figures they show, or checks that they are up to date."""
    before = config.readme.read_text()
    after, figures = render(before, config.results, config.readme.parent)
    if not config.check:
        for path, content in figures.items():
            runs.write_atomically(path, content)
        runs.write_atomically(config.readme, after)
        print(f"wrote {config.readme.name} and {len(figures)} figures")
        return 0
    missing = [str(path) for path in figures if not path.exists()]
    if after != before or missing:
        print(
            f"{config.readme} is stale{': no ' + ', '.join(missing) if missing else ''}; "
            "`python -m experiments report` writes it anew",
            file=sys.stderr,
        )
        return 1
    return 0


def render(readme: str, results: Path, root: Path) -> tuple[str, dict[Path, bytes]]:
    """README with every block written from the result files, and the figures it shows.

    Args:
        readme: its text.
        results: the folder of the kept results.
        root: the folder that README is in, for links.

    Raises:
        ValueError: a block names an experiment that has no result.
    """
    kept = runs.read_results(results)
    figures: dict[Path, bytes] = {}

    def block(match: re.Match[str]) -> str:
        if match[2] == SUMMARY:
            return match[1] + _summary(kept, [found[2] for found in BLOCK.finditer(readme)]) + match[3]
        parts = []
        for (device, name), result in kept.items():
            experiment, dot, variant = name.partition(".")
            if experiment == match[2]:
                markdown, drawn = _show(experiment, result)
                paths = {results / device / f"{variant}{dot and '_'}{file}": drawn[file] for file in drawn}
                images = [f"![{p.stem.replace('_', ' ')}]({p.relative_to(root, walk_up=True)})\n" for p in paths]
                figures.update(paths)
                parts.append("\n".join([_caption(result), *images, _folded(markdown + "\n")]))
        if not parts:
            raise ValueError(
                f"README has a block for {match[2]}, of which {results} holds no result: keep one (--keep)"
            )
        return match[1] + "\n".join(parts) + match[3]

    return BLOCK.sub(block, readme), figures


def _summary(kept: dict[tuple[str, str], dict[str, Any]], experiments: list[str]) -> str:
    """A table for each device, of what these experiments' own `headlines` say of the results kept there."""
    parts = []
    for device in dict.fromkeys(device for device, _ in kept):
        results = {name: result for (of, name), result in kept.items() if of == device}
        lines = []
        for experiment in experiments:
            if say := _own(experiment, "headlines"):
                own = [result for name, result in results.items() if name.partition(".")[0] == experiment]
                lines += [line for result in own for line in say(result)]
        if lines:
            parts.append(f"{next(iter(results.values()))['device']}:\n\n{headlines.summary(lines)}\n")
    return "\n".join(parts)


def _own(experiment: str, name: str) -> Callable[..., Any] | None:
    """An experiment's function of this name, defined or imported, if it has one: found without importing the others."""
    path = Path(__file__).parent / f"{experiment}.py"
    names = set()
    for node in ast.parse(path.read_text()).body if path.exists() else []:
        names |= {node.name} if isinstance(node, ast.FunctionDef) else set()
        names |= {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
    return getattr(importlib.import_module(f"experiments.{experiment}"), name) if name in names else None


def _show(experiment: str, result: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """By the experiment's own `readme` if it has one."""
    if readme := _own(experiment, "readme"):
        return readme(result)
    columns = list(dict.fromkeys(name for row in result["rows"] for name in row))
    cells = [[_cell(row.get(name)) for name in columns] for row in result["rows"]]
    return runs.markdown_table(cells, columns), {}


def _folded(markdown: str) -> str:
    """Long tables behind a line to click on: figures come first."""

    def fold(table: re.Match[str]) -> str:
        rows = table[0].count("\n") - 2
        return f"<details><summary>All {rows} rows</summary>\n\n{table[0]}\n</details>\n"

    return LONG_TABLE.sub(fold, markdown)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _caption(result: dict[str, Any]) -> str:
    commit, _, changed = (result["commit"] or "").partition("-")
    commit = f", commit {commit[:8]}{' with changes' if changed else ''}" if commit else ""
    commit += f", begun at {result['begun_at'][:8]}" if result.get("begun_at") else ""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if name != "python")
    return f"{result['device']}, {versions}, {result['date']}{commit}: `{result['command']}`\n"
