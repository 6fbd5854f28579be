"""Micro-tiles: the granularity at which zeros are skipped.

A micro-tile is the smallest block that is either computed or left out. A GPU's dense tile is large; micro-tiles are
gathered into it from wherever they lie, so the sparsity that pays is the sparsity at the micro-tile's size, not the
matrix's own. Source: PIT (SOSP'23), section 3.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from pallas_kernels import MicroTileIndex, micro_tile_index

__all__ = ["MicroTile", "MicroTileIndex", "density", "live_micro_tiles", "micro_tile_index"]


@dataclass(frozen=True)
class MicroTile:
    """A block of `rows` x `cols` elements, written "128x1"."""

    rows: int
    cols: int

    def __post_init__(self):
        if self.rows < 1 or self.cols < 1:
            raise ValueError(f"a micro-tile's rows and cols must be at least 1; got {self}")

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols}"

    @classmethod
    def parse(cls, text: str) -> "MicroTile":
        """The micro-tile that `text` names.

        Raises:
          ValueError: if `text` is not two positive integers with an "x" between them.
        """
        rows, _, cols = text.partition("x")
        if not (rows.isdecimal() and cols.isdecimal()):
            raise ValueError(f'a micro-tile is written ROWSxCOLS, as in "128x1"; got "{text}"')
        return cls(int(rows), int(cols))


def live_micro_tiles[A: (Array, np.ndarray)](
    values: Shaped[A, "M K"], micro_tile: MicroTile
) -> Bool[A, "blocks_m blocks_k"]:
    """True where a micro-tile holds at least one non-zero; in numpy for a numpy array.

    Args:
      values: numbers, or a boolean mask. NaN is non-zero, -0.0 is zero.
      micro_tile: the granularity. Where it does not divide M or K, the micro-tiles at the edge are cut.
    """
    xp: Any = np if isinstance(values, np.ndarray) else jnp
    rows, cols = values.shape
    blocks_m, blocks_k = -(-rows // micro_tile.rows), -(-cols // micro_tile.cols)
    edges = ((0, blocks_m * micro_tile.rows - rows), (0, blocks_k * micro_tile.cols - cols))
    padded = xp.pad(values.astype(bool), edges)
    return padded.reshape(blocks_m, micro_tile.rows, blocks_k, micro_tile.cols).any(axis=(1, 3))


def density(values: Shaped[Array, "M K"], micro_tile: MicroTile) -> Float[Array, ""]:
    """Fraction of micro-tiles that hold at least one non-zero (1 - sparsity at that granularity).

    Args:
      values: as for `live_micro_tiles`.
      micro_tile: the granularity; cut micro-tiles at the edge count whole.

    Returns:
      A float32 between 0 and 1; 0 for an empty matrix.
    """
    live = live_micro_tiles(values, micro_tile)
    return jnp.sum(live, dtype=jnp.int32).astype(jnp.float32) / max(live.size, 1)
