"""The Mosaic GPU kernel of `scatter_matmul` for Hopper: listed rows of A, block by block of its columns.

One list of whole rows is one product: its results are scattered into zeros. With several lists a row of C is a sum, and
adding to it in place would make the order of the blocks one of chance. So there are three launches. The first (`sums`)
finds which rows of A each product reads, and which results make each row of C. The second stores what each list gives
densely, in its own order and the operands' dtype, and the third adds up what belongs to a row. Writing and reading that
takes 4 * N bytes a listed row of a block (8 in float32), which is what it costs; past `_capacity` listed rows a dense
product is quicker, and the second launch makes that of A as it is masked: the third then finds one sum a row.

Measured on an H200, 4096 cubed in bfloat16 (cuBLAS 168), in us at 90 / 95 / 99%: 1x64 184 / 103 / 43; 1x32 686 / 191 /
69. Of 43 the first launch has 3, the products 26, the sums 14. Before `sums` nine small kernels of XLA took 16, and
sums that looked through all lists for each row 24: 195 / 119 / 62; - / 210 / 104. Tiles of 64 rows are quicker where
lists are short (1x64 42 at 99%, 1x32 63) and slower else (107 and 197 at 95%), narrower ones slower everywhere.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.micro_tile_index import MicroTileIndex
from pallas_kernels.scatter_matmul.device import MOST_LISTS
from pallas_kernels.scatter_matmul.sums import find_sums
from pallas_kernels.tile import device, row_groups, row_sums, row_tiling
from pallas_kernels.tile.launch import lowered_once
from pallas_kernels.tile.row_tiling import Config, Geometry

MOST_SUMS = 8  # stored for each row of C, on average
PAYS = 1 / 384  # sums stored for each element of A: where their bytes cost an H200 what the dense product does


def _capacity(m: int, k: int) -> int:
    """How many listed rows of blocks are multiplied as such: their results are stored."""
    return m * min(max(int(k * PAYS), 1), MOST_SUMS)


@lowered_once()
def mosaic(
    a: Float[Array, "M K"], b: Float[Array, "K N"], index: MicroTileIndex, config: Config, interpret: bool
) -> Float[Array, "M N"]:
    """Launches the kernel; `interpret` runs it on CPU under the race detector."""
    product = _whole_rows if index.indices.shape[0] == 1 else _blocks
    return product(a, b, index, config, interpret)


def _whole_rows(a, b, index: MicroTileIndex, config: Config, interpret: bool) -> Float[Array, "M N"]:
    (m, k), n = a.shape, b.shape[1]
    listed = index.indices[0]
    groups = row_groups.Groups(starts=jnp.zeros_like(index.counts), counts=index.counts, reads=listed, writes=listed)
    geometry = Geometry(config=config, matrices=1, depth=k, width=n, transposed=False, dtype=a.dtype)
    return row_groups.row_groups_matmul(
        "scatter_matmul", a, b[None], groups, geometry, out=(m, n), zeros=True, most_slots=m, interpret=interpret
    )


def _blocks(a, b, index: MicroTileIndex, config: Config, interpret: bool) -> Float[Array, "M N"]:
    (m, k), n, (lists, width) = a.shape, b.shape[1], (index.indices.shape[0], index.rows)
    a, b = jnp.pad(a, ((0, 0), (0, -k % width))), jnp.pad(b, ((0, -k % width), (0, 0)))
    capacity = _capacity(m, k)
    groups, numbers, counts = find_sums(index, capacity, config.block_m, interpret)
    geometry = Geometry(config=config, matrices=lists, depth=width, width=n, transposed=False, dtype=a.dtype, summed=m)
    sums = row_groups.row_groups_matmul(  # row m of A is `lists` rows, one for each block
        "scatter_matmul", a.reshape(m * lists, width), b.reshape(lists, width, n), groups, geometry,
        out=(capacity, n + -n % row_sums.COLUMNS), most_slots=capacity, interpret=interpret,
    )  # fmt: skip
    return row_sums.row_sums("scatter_matmul_sums", sums, numbers, counts, interpret=interpret)[:, :n]


def candidates(a, b, index: MicroTileIndex) -> list[Config]:
    """Configs worth timing for these arguments (shapes are enough); the heuristic's choice comes first."""
    (m, k), n, lists = a.shape, b.shape[1], index.indices.shape[0]
    if lists == 1:
        return row_tiling.tilings(m, 1, k, n, dtype=a.dtype)
    return row_tiling.tilings(_capacity(m, k), lists, index.rows, n, dtype=a.dtype)


def check_support(a, index: MicroTileIndex, devices: tuple[str, ...] | None) -> None:
    """Raises NotImplementedError where the kernel cannot take these arguments, or the device is none of `devices`."""
    if index.cols != 1:
        raise NotImplementedError(f"the Mosaic kernel takes lists of single rows; got cols={index.cols}")
    if index.rows < a.shape[1] and index.rows % 32 != 0:
        rule = "the Mosaic kernel needs rows in multiples of 32, or one list of whole rows"
        raise NotImplementedError(f"{rule}; got rows={index.rows}, K={a.shape[1]}")
    if index.counts.shape[0] > MOST_LISTS:
        rule = f"the Mosaic kernel takes {MOST_LISTS} lists at most"
        raise NotImplementedError(f"{rule}; got K={a.shape[1]}, rows={index.rows}")
    if devices is not None:
        device.require_device("scatter_matmul", devices)


def check_config(config: Config, a, b, index: MicroTileIndex) -> None:
    """Raises ValueError where a config does not fit the kernel or these arguments."""
    del b, index
    row_tiling.check_config(config, dtype=a.dtype)
