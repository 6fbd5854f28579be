"""The Mosaic GPU kernel of `sampled_matmul` for Hopper: rows of A against the rows of B in a list's block."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.micro_tile_index import MicroTileIndex
from pallas_kernels.tile import device, row_groups, row_tiling
from pallas_kernels.tile.launch import lowered_once
from pallas_kernels.tile.row_tiling import Config, Geometry


@lowered_once()
def mosaic(
    a: Float[Array, "L N"], b: Float[Array, "W N"], index: MicroTileIndex, config: Config, interpret: bool
) -> Float[Array, "L W"]:
    """Launches the kernel; `interpret` runs it on CPU under the race detector."""
    (lists, entries), (length, depth), width = index.indices.shape, a.shape, b.shape[0]
    listed = index.indices.reshape(-1)
    starts = jnp.arange(lists, dtype=jnp.int32) * entries
    groups = row_groups.Groups(starts=starts, counts=index.counts, reads=listed, writes=listed)
    geometry = Geometry(
        config=config,
        matrices=lists,
        depth=depth,
        width=index.rows,
        transposed=True,
        side_by_side=True,
        dtype=a.dtype,
    )
    blocks = jnp.pad(b, ((0, -width % index.rows), (0, 0))).reshape(lists, index.rows, depth)
    out = row_groups.row_groups_matmul(
        "sampled_matmul", a, blocks, groups, geometry, out=(length, lists * index.rows), zeros=True,
        most_slots=lists * length, interpret=interpret,
    )  # fmt: skip
    return out[:, :width]


def candidates(a, b, index: MicroTileIndex) -> list[Config]:
    """Configs worth timing for these arguments (shapes are enough); the heuristic's choice comes first."""
    del b
    lists = index.indices.shape[0]
    return row_tiling.tilings(lists * a.shape[0], lists, a.shape[1], index.rows, dtype=a.dtype)


def check_support(index: MicroTileIndex, devices: tuple[str, ...] | None) -> None:
    """Raises NotImplementedError where the kernel cannot take these arguments, or the device is none of `devices`."""
    if index.cols != 1:
        raise NotImplementedError(f"the Mosaic kernel takes lists of single rows; got cols={index.cols}")
    if index.rows % 32 != 0:
        raise NotImplementedError(f"the Mosaic kernel needs rows in multiples of 32; got rows={index.rows}")
    if devices is not None:
        device.require_device("sampled_matmul", devices)


def check_config(config: Config, a, b, index: MicroTileIndex) -> None:
    """Raises ValueError where a config does not fit the kernel or these arguments."""
    del b, index
    row_tiling.check_config(config, dtype=a.dtype)
