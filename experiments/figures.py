"""How figures look: small, legible on light and dark pages, and safe for colour-blind readers."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#333333"
BLUE, ORANGE, GREEN, PINK = "#0072b2", "#d55e00", "#009e73", "#cc79a7"  # Okabe and Ito's

STYLE: dict[Any, Any] = {
    "axes.edgecolor": "#999999",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.facecolor": "white",
    "font.size": 10,
    "grid.color": "#e5e5e5",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.hashsalt": "sparsellm",  # else ids in an SVG differ from run to run
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def ordered_colours(count: int) -> list[tuple[float, ...]]:
    """Colours for an ordered quantity, dark to light, told apart in grey as well."""
    from matplotlib import colormaps

    return [tuple(colour) for colour in colormaps["viridis"](np.linspace(0.0, 0.85, count))]


def draw(plot: Callable[[Axes], None], *, file_format: str = "png", size: tuple[float, float] = (6.4, 3.8)) -> bytes:
    """One pair of axes, drawn by `plot`: the same call gives the same bytes."""
    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        plot(figure.subplots())
        buffer = io.BytesIO()
        metadata = {"Date": None} if file_format == "svg" else {"Software": None}
        figure.savefig(buffer, format=file_format, dpi=150, metadata=metadata)
        return buffer.getvalue()


def density_by_layer(axes: Axes, densities: Mapping[str, Sequence[float]]) -> None:
    """A line for each granularity: the density of every layer's activation."""
    for colour, (granularity, by_layer) in zip(ordered_colours(len(densities)), densities.items(), strict=True):
        axes.plot(range(len(by_layer)), by_layer, "o-", color=colour, markersize=4, label=granularity)
    layers = len(next(iter(densities.values())))
    axes.set(
        title="How much of the feed-forward blocks is live",
        xlabel="layer",
        ylabel="density (live micro-tiles)",
        ylim=(0, 1.03),
        xticks=range(0, layers, max(layers // 12, 1)),
    )
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.legend(title="micro-tile\n(tokens x neurons)", loc="center left", bbox_to_anchor=(1.0, 0.5))


def loss_curve(axes: Axes, losses: Sequence[float], held_out: float) -> None:
    """The loss of every training step, its running mean, and the held-out loss at the end."""
    steps = np.arange(1, len(losses) + 1)
    span = max(len(losses) // 25, 1)
    smooth = np.convolve(losses, np.ones(span) / span, mode="valid")
    axes.plot(steps, losses, color=BLUE, alpha=0.3, linewidth=0.8, label="training, each step")
    axes.plot(steps[span - 1 :], smooth, color=BLUE, label=f"training, mean of {span}")
    axes.axhline(held_out, color=ORANGE, linestyle="--", label=f"held out, at the end: {held_out:.2f}")
    axes.set(title="Learning", xlabel="step", ylabel="loss (nats a token)", xlim=(0, len(losses)))
    axes.legend(loc="upper right")
