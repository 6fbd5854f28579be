"""The Mosaic GPU kernel of `scatter_matmul` for Hopper: one list of whole rows."""

from jaxtyping import Array, Float

from pallas_kernels.micro_tile_index import MicroTileIndex
from pallas_kernels.tile import device, row_groups
from pallas_kernels.tile.row_groups import Config


def mosaic(
    a: Float[Array, "M K"], b: Float[Array, "K N"], index: MicroTileIndex, config: Config, interpret: bool
) -> Float[Array, "M N"]:
    """Launches the kernel; `interpret` runs it on CPU under the race detector."""
    (m, k), n = a.shape, b.shape[1]
    listed = index.indices[0]
    groups = row_groups.Groups(starts=index.counts - index.counts, counts=index.counts, reads=listed, writes=listed)
    geometry = row_groups.Geometry(config=config, matrices=1, depth=k, width=n, transposed=False)
    return row_groups.row_groups_matmul(
        "scatter_matmul", a, b[None], groups, geometry, out=(m, n), zeros=True, most_slots=m, interpret=interpret
    )


def candidates(a, b, index: MicroTileIndex) -> list[Config]:
    """Configs worth timing for these arguments (shapes are enough); the heuristic's choice comes first."""
    del index
    return row_groups.tilings(a.shape[0], 1, *b.shape)


def check_support(a, index: MicroTileIndex, devices: tuple[str, ...] | None) -> None:
    """Raises NotImplementedError where the kernel cannot take these arguments, or the device is none of `devices`."""
    if a.dtype.itemsize != 2:
        raise NotImplementedError(f"the Mosaic kernel takes bfloat16 and float16; got {a.dtype}")
    if index.cols != 1:
        raise NotImplementedError(f"the Mosaic kernel takes lists of single rows; got cols={index.cols}")
    if index.rows < a.shape[1]:
        rule = "the Mosaic kernel takes one list of whole rows"
        raise NotImplementedError(f"{rule}; got lists for {index.rows} of {a.shape[1]} columns each")
    if devices is not None:
        device.require_device("scatter_matmul", devices)


def check_config(config: Config, a, b, index: MicroTileIndex) -> None:
    """Raises ValueError where a config does not fit the kernel or these arguments."""
    del a, index
    row_groups.check_config(config, b.shape[1])
