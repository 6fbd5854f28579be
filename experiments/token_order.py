"""Does it pay to reorder a batch's tokens, so that those which activate the same neurons share micro-tiles?

    python -m experiments token_order --source runs/pretrain/TIME --keep      a model that `pretrain` has trained
    python -m experiments token_order                                         a small OPT, trained first

A micro-tile of R rows is read if any of its R tokens activates the neuron, so the time of the sparse products goes with
the share of micro-tiles that are live. Packed tokens may stand in any order. Compared, over held-out text, are

    as written   one sequence after the other
    random       what neighbours in a text have in common is lost
    by token     all occurrences of a token together: an order that is known before the first layer
    by neurons   of each layer its own: tokens are halved by the first principal component of what they activate, and
                 the halves again, down to a micro-tile; known only once everything is computed

The last one says what there is to win by an order that a layer would have to predict and pay for with a permutation
of its own. The check: an order holds every token once, and the density of single tokens is the same in all of them.

Rows: one for each layer, number of rows and order, with the share of live micro-tiles. Seen with quickstart's model of
a CPU (4 layers, 19% of single activations), 64x1 micro-tiles: 78% live as written, 72% by token, 60% by neurons; of 8x1
53, 40 and 32%.
"""

import dataclasses
import functools
import sysconfig
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt8

from experiments import options, pruning
from experiments.language_models import progress
from experiments.runs import Row, Run, markdown_table
from sparsellm.activations import collect, unpack_bits
from sparsellm.micro_tiles import MicroTile, live_micro_tiles

ORDERS = ("as written", "random", "by token", "by neurons")
STEPS = 8  # of the power iteration: a direction that splits well will do


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of token_order.

    Attributes:
        source: as of `pruning`: a run, or a checkpoint's folder with its tokenizer's files; None trains quickstart's
            model first.
        corpus: as of `pruning`.
        text: what the model reads; None for what is held out.
        size: of the model where one is trained; "auto" is "large" on a GPU and "small" elsewhere.
        windows: that stand in one batch, a power of two.
        batches: to measure on, at most.
        rows: tokens in a micro-tile, powers of two.
        seed: of the random order, and of the weights where a model is trained.
    """

    source: str | None = None
    corpus: Path | None = None
    text: Path | None = None
    size: Literal["auto", "tiny", "small", "large"] = "auto"
    windows: int = 4
    batches: int = 4
    rows: tuple[int, ...] = (8, 32, 64, 128)
    seed: int = 0

    @classmethod
    def smoke(cls) -> "Config":
        """Some seconds, on one package of the standard library."""
        corpus = Path(sysconfig.get_path("stdlib")) / "asyncio"
        return cls(corpus=corpus, size="tiny", windows=2, batches=2, rows=(8,))


def run(config: Config, run: Run) -> list[Row]:
    """A row for each layer, number of rows and order; and a figure."""
    _check(config)
    asked = {name: getattr(config, name) for name in ("source", "corpus", "text", "size", "seed")}
    subject = pruning.prepare(pruning.Config(**asked), run)
    count = min(config.batches, len(subject.held_out) // config.windows)
    if not count:
        raise ValueError(f"windows must be at most the {len(subject.held_out)} there are; got windows={config.windows}")
    windows = subject.held_out[: count * config.windows, :-1]
    # A power of two of tokens, so that halving ends in whole micro-tiles: the last ones of each window are left out.
    windows = windows[:, : 1 << windows.shape[1].bit_length() - 1]
    if max(config.rows) > windows.shape[1] * config.windows:
        got = f"{windows.shape[1] * config.windows} of a batch; got rows={config.rows}"
        raise ValueError(f"rows must be at most the tokens {got}")
    with progress("activations", count) as advance:
        folder, report = run.folder / "checkpoints" / "activations", lambda done, _: advance(done, "")
        activations = collect(subject.model, windows, folder, kinds=("fires",), batch=config.windows, report=report)
    rows = []
    for layer, width in enumerate(activations.neurons):
        bits = activations.read("fires", layer).reshape(count, config.windows * windows.shape[1], -1)
        measured = measure_layer(config, bits, width, windows.reshape(count, -1))
        rows += [{"model": subject.name, "layer": layer} | row for row in measured]
    run.show(*readme({"rows": rows}))
    return rows


def _check(config: Config) -> None:
    options.check_least(config, 1, "windows", "batches", "rows")
    options.check_filled(config, "rows")
    for name, values in {"windows": (config.windows,), "rows": config.rows}.items():
        if any(value.bit_count() != 1 for value in values):
            raise ValueError(f"{name} must be powers of two, as tokens are halved; got {name}={getattr(config, name)}")


def measure_layer(
    config: Config,
    bits: UInt8[np.ndarray, "batches tokens bytes"],
    width: int,
    tokens: Int32[np.ndarray, "batches tokens"],
) -> list[Row]:
    """A layer's rows.

    Args:
        config: says of which micro-tiles.
        bits: of every batch which neurons each token activates, eight a byte.
        width: neurons.
        tokens: of every batch.

    Raises:
        RuntimeError: an order lost tokens.
    """
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for number, (packed, ids) in enumerate(zip(bits, tokens, strict=True)):
        fires = unpack_bits(jnp.asarray(packed), width).astype(jnp.float32)
        fixed = {
            "as written": np.arange(len(ids)),
            "random": np.random.default_rng((config.seed, number)).permutation(len(ids)),
            "by token": np.argsort(ids, kind="stable"),
        }
        for rows in config.rows:
            for name, order in {**fixed, "by neurons": np.asarray(order_by_neurons(rows, fires))}.items():
                if not np.array_equal(np.sort(order), fixed["as written"]):
                    raise RuntimeError(f"an order must hold every token once; {name} does not")
                found[name, rows].append(float(_live(rows, fires, jnp.asarray(order))))
        density = float(fires.mean())
        found["", 1].append(density)
    density = float(np.mean(found.pop(("", 1))))
    return [
        {"rows": rows, "order": name, "live": float(np.mean(shares)), "density": density}
        for (name, rows), shares in found.items()
    ]


@functools.partial(jax.jit, static_argnums=0)
def _live(rows: int, fires: Float[Array, "tokens neurons"], order: Int32[Array, " tokens"]) -> Float[Array, ""]:
    """The share of micro-tiles of so many rows that are live."""
    return live_micro_tiles(fires[order], MicroTile(rows, 1)).mean(dtype=jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def order_by_neurons(rows: int, fires: Float[Array, "tokens neurons"]) -> Int32[Array, " tokens"]:
    """Tokens halved by the first principal component of what they activate, and the halves again, down to `rows`.

    Args:
        rows: tokens that are left together; a power of two, as the number of tokens.
        fires: 1 where a token activates a neuron, else 0.
    """
    order, groups = jnp.arange(len(fires), dtype=jnp.int32), 1
    while len(fires) // groups > rows:
        members = order.reshape(groups, -1)
        scores = jax.lax.map(_component, fires[members])
        order = jnp.take_along_axis(members, jnp.argsort(scores, axis=1), axis=1).reshape(-1)
        groups *= 2
    return order


def _component(x: Float[Array, "tokens neurons"]) -> Float[Array, " tokens"]:
    """Each token's coordinate along the first principal component, by power iteration."""
    x = x - x.mean(axis=0, keepdims=True)
    start = jnp.cos(jnp.arange(len(x), dtype=jnp.float32))  # anything that is not the same for all

    def step(_, scores: Array) -> Array:
        scores = x @ (scores @ x)
        return scores / jnp.maximum(jnp.linalg.norm(scores), jnp.finfo(jnp.float32).tiny)

    return jax.lax.fori_loop(0, STEPS, step, start)


def readme(result: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """A table of means over layers, and a figure of the layers."""
    from experiments import figures

    rows = result["rows"]
    sizes = sorted({row["rows"] for row in rows})

    def mean(name: str, size: int) -> float:
        return float(np.mean([row["live"] for row in rows if (row["order"], row["rows"]) == (name, size)]))

    cells = [[f"{size}x1", *(f"{mean(name, size):.1%}" for name in ORDERS)] for size in sizes]
    density = np.mean([row["density"] for row in rows])
    text = f"{rows[0]['model']}, {density:.1%} of single activations; live micro-tiles, mean over layers:"
    drawn = figures.draw(lambda axes: _plot(axes, [row for row in rows if row["rows"] == sizes[-1]]))
    return f"{text}\n\n{markdown_table(cells, ['micro-tile', *ORDERS])}", {"token_order.png": drawn}


def _plot(axes, rows: list[Row]) -> None:
    from experiments import figures

    colours = (figures.INK, "#999999", figures.BLUE, figures.ORANGE)
    for name, colour in zip(ORDERS, colours, strict=True):
        own = [row for row in rows if row["order"] == name]
        axes.plot(
            [row["layer"] for row in own], [row["live"] for row in own], "o-", color=colour, markersize=4, label=name
        )
    axes.set(title=f"Live micro-tiles of {rows[0]['rows']}x1", xlabel="layer", ylabel="live", ylim=(0, 1.03))
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
