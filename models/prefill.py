"""Which of OPT's layers multiply sparse where it reads prompts: chosen for each by how many micro-tiles are live in it.

A layer whose tokens share few silent neurons runs quicker dense. `choose_sparse_rows` measures on sample tokens, once;
what it chooses is static, and a pattern unlike the sample is slower than it might be, never wrong.
"""

from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from models.activations import RELUS
from models.opt import OPT, with_sparse_rows
from pallas_kernels.tile.device import device_kind
from sparsellm.micro_tiles import MicroTile, live_micro_tiles
from sparsellm.packing import Packing
from sparsellm.plan import Plan, TileCosts, expected_us

ROWS = (128, 64)  # of a micro-tile that the kernels gather


def choose_sparse_rows(
    model: OPT,
    tokens: Int[Array, "batch length"],
    packing: Packing | None = None,
    *,
    costs: TileCosts | None = None,
) -> tuple[int | None, ...]:
    """`sparse_rows` of each layer, for `OPTConfig` or `models.opt.with_sparse_rows`: None where dense is quicker.

    What differs between the ways is fc2, and that the index has to be found: fc1 computes every neuron.

    Args:
        model: the model.
        tokens: such as it will read, as many at once.
        packing: where they belong if they are packed.
        costs: the tile database; None takes that of the default device.

    Raises:
        ValueError: the model's activation has no exact zeros.

    Source: PIT (SOSP'23), section 3.4.
    """
    config = model.config
    if config.activation not in RELUS:
        raise ValueError(f"sparse_rows needs exact zeros, so activation {', '.join(RELUS)}; got {config.activation!r}")
    costs = costs or TileCosts.load(device_kind())
    counts = _live_counts(*nnx.split(with_sparse_rows(model, None)), tokens, packing)

    def expected(layer: int, rows: int | None) -> float:
        plan = Plan("dense") if rows is None else Plan("k", MicroTile(rows, 1))
        live = 1.0 if rows is None else np.asarray(counts[layer][ROWS.index(rows)])
        sizes = tokens.size, config.sizes(layer)[1], config.d_model
        return expected_us(plan, *sizes, config.dtype, live, costs=costs, with_index=True)

    known = [rows for rows in ROWS if costs.find(f"k {MicroTile(rows, 1)}", config.dtype)]
    return tuple(min((None, *known), key=partial(expected, layer)) for layer in range(config.layers))


@partial(jax.jit, static_argnums=0)
def _live_counts(graphdef, state, tokens: Int[Array, "batch length"], packing: Packing | None) -> list[list[Array]]:
    """Of each layer and number of rows, the live micro-tiles in each block of so many tokens."""
    model: Any = nnx.merge(graphdef, state)
    _, captured = nnx.capture(model, nnx.Intermediate)(tokens, packing=packing)
    active = [captured["layers"][layer]["ffn_activation"][0] for layer in range(len(captured["layers"]))]
    return [[live_micro_tiles(h, MicroTile(rows, 1)).sum(axis=1) for rows in ROWS] for h in active]
