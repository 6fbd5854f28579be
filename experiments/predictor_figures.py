"""What the experiment `predictors` shows: its tables and figures."""

from typing import Any

import numpy as np

from experiments import figures
from experiments.runs import Row, markdown_table


def readme(result: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """A line for each method and wish, a line for each batch of decoding; and figures."""
    rows = result["rows"]
    compared = [row for row in rows[1:] if "perplexity" in row and "loss" not in row]
    parts = [f"{rows[0]['model']}, dense perplexity {rows[0]['perplexity']:.2f}."]
    header = ["method", "rank", "neurons for", "recall", "precision", "density", "true density", "perplexity"]
    parts.append(markdown_table([_cells(row) for row in compared], header))
    decoded = [row for row in rows if "time_ms" in row]
    if decoded:
        names = ("batch", "dense_ms", "time_ms", "predictor_ms")
        cells = []
        for row in decoded:
            same = f"{row['same_tokens']}/{row['new_tokens']}"
            cells.append([*(f"{row[name]:.3g}" for name in names), f"{row['density']:.1%}", same])
        ratio = decoded[0]["perplexity"] / decoded[0]["dense_perplexity"] - 1
        parts.append(f"Decoding with a recall of {decoded[0]['recall_wanted']:g} wanted, perplexity {ratio:+.1%}:")
        header = ["batch", "dense ms", "ms a token", "of it predictors", "density", "as simulated"]
        parts.append(markdown_table(cells, header))
    spans: dict[str, list[float]] = {}
    for row in rows:
        if "granularity" in row:
            spans.setdefault(row["granularity"], []).append(row["density"])
    return "\n\n".join(parts), {
        "predictors_density.png": figures.draw(lambda axes: figures.density_by_layer(axes, spans)),
        "predictors_hot.png": figures.draw(lambda axes: _plot_hot(axes, rows)),
        "predictors_recall.png": figures.draw(lambda axes: _plot_recall(axes, rows)),
        "predictors_perplexity.png": figures.draw(lambda axes: _plot_perplexity(axes, compared, rows[0])),
    }


def _cells(row: Row) -> list[str]:
    shares = [f"{row[name]:.1%}" if name in row else "–" for name in ("recall", "precision", "density", "true_density")]
    return [row["method"], str(row.get("rank", "–")), _wish(row), *shares, f"{row['perplexity']:.2f}"]


def line(row: Row) -> str:
    """One row, as it is printed while the experiment runs."""
    shares = "  ".join(f"{name} {row[name]:.1%}" for name in ("recall", "precision", "density") if name in row)
    perplexity = f"  perplexity {row['perplexity']:.2f}" if "perplexity" in row else ""
    return f"{row['method']:8} {_wish(row):14} {shares}{perplexity}"


def _wish(row: Row) -> str:
    names = {"budget": "budget", "recall_wanted": "recall", "sparsity": "sparsity"}
    return next(f"{shown} {row[name]:g}" for name, shown in names.items() if name in row)


def _plot_hot(axes, rows: list[Row]) -> None:
    layers = [row for row in rows if "fires" in row]
    for colour, row in zip(figures.ordered_colours(len(layers)), layers, strict=True):
        axes.plot(np.linspace(0, 1, len(row["fires"])), row["fires"], color=colour, label=str(row["layer"]))
    axes.set(title="A few neurons fire for most tokens", xlabel="neurons, hottest first", ylabel="tokens they fire for")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:.0%}")
    axes.legend(title="layer", loc="center left", bbox_to_anchor=(1.0, 0.5), ncols=-(-len(layers) // 12))


def _plot_recall(axes, rows: list[Row]) -> None:
    for method, points in _points(rows, "recall", "precision").items():
        axes.plot(*zip(*points, strict=True), "o-", color=_colour(method), markersize=4, label=method)
    axes.set(title="What is found of what fires", xlabel="recall", ylabel="precision")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:.0%}")
    axes.legend()


def _plot_perplexity(axes, rows: list[Row], dense: Row) -> None:
    for method, points in _points(rows, "density", "perplexity").items():
        if method not in ("teal", "heads"):  # whose density is of inputs, and of heads
            axes.plot(*zip(*points, strict=True), "o-", color=_colour(method), markersize=4, label=method)
    axes.axhline(dense["perplexity"], color=figures.INK, linestyle=":", label="dense")
    axes.set(title="What predicting costs", xlabel="density (neurons predicted)", ylabel="perplexity", yscale="log")
    axes.xaxis.set_major_formatter("{x:.0%}")
    for place in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        place("{x:g}")
    axes.legend()


def _points(rows: list[Row], x: str, y: str) -> dict[str, list[tuple[float, float]]]:
    """Of each method, the points of its rows for a budget or a recall."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if {x, y, "method"} <= row.keys() and "loss" not in row:
            points.setdefault(row["method"], []).append((row[x], row[y]))
    return {method: sorted(found) for method, found in points.items()}


def _colour(method: str) -> str:
    colours = {"trained": figures.BLUE, "ahead": figures.GREEN, "svd": figures.ORANGE, "heads": figures.PINK}
    return colours.get(method, "#888888")
