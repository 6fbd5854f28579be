"""Tilings of `unstructured_matmul`'s Mosaic kernel: which there are, which fit, and which arguments it takes at all."""

import dataclasses

from jax.experimental import pallas as pl

from pallas_kernels.tile import device
from pallas_kernels.tile.pipeline import SMEM_BYTES
from pallas_kernels.unstructured_matmul import layout

WARPS = 4  # of a warpgroup
MAX_N = 64  # columns of x that are multiplied at a time
EXPAND_N = 128  # more than so many, and the dense matrix is written first
TILE_N = 8  # columns of x: the least of a wgmma
CHUNK = 8  # elements of a column of x that are 16 bytes: what the columns' distance in memory is a multiple of
PIECE_BYTES = 2 * layout.STREAMS * layout.DEPTH  # of a ring: 16 rows of values of 16 bits, 32 of 8
X_TILE_BYTES = layout.BLOCK * TILE_N * 2  # of x, of a block and tile
QUAD = 4  # blocks of a strip that the loop's body takes
STEPS = 4  # of x in shared memory
MMA_TILES = 2  # up to so many tiles a warp multiplies by mma, without waiting for the three others of a wgmma
WGMMA_BLOCKS = 2  # whose wgmmas are begun together: the four warps wait for one another once for both
SMS = 132  # of an H200: what the heuristic counts with
MANY_ROWS, MANY_QUICK_ROWS = 7.5, 5.0  # of values that a block takes on average, of 16: from there on a fifth piece
SLOWER = {4: 1.0, 3: 1.15, 2: 1.2, 1: 1.7}  # a strip of a block of so many warpgroups: fewer warps hide less latency
QUICK_TILES = 4  # pairs of up to so many tiles have it from the latter on
RESERVED = 1536  # bytes of shared memory for barriers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tiling of the Mosaic kernel.

    Attributes:
        warpgroups: of a block, 1 to 4. Each warp has a strip at a time.
        pieces: of 2 kB of values, that a warp's ring holds: 4 to 8.
    """

    warpgroups: int = 4
    pieces: int = 5

    @property
    def warps(self) -> int:
        return WARPS * self.warpgroups

    @property
    def ring_bytes(self) -> int:
        """A ring's pieces, and the first one again, so that no block of values wraps."""
        return (self.pieces + 1) * PIECE_BYTES


def step_blocks(config: Config, tiles: int) -> int:
    """Blocks of x in a step, of which there are `STEPS` in what the rings leave: a quad's, a part of it, or 0.

    Args:
        config: the tiling.
        tiles: of 8 columns.
    """
    room = SMEM_BYTES - RESERVED - config.warps * config.ring_bytes
    return next((blocks for blocks in (QUAD, 2, 1) if STEPS * blocks * tiles * X_TILE_BYTES <= room), 0)


def candidates(weights, x, bias=None, activation: str | None = None) -> list[Config]:
    """Configs worth timing for these arguments (shapes are enough); the heuristic's choice comes first.

    That is the one whose busiest multiprocessor is done first, reckoned by its strips and `SLOWER`. The latter is from
    an H200's times of OPT-13B's products at 70% and 80% zeros, 8 and 32 columns: its fc1, whose busiest has 7 units of
    16 strips, 9 of 12, 13 of 8 or 25 of 4, took 37.1 us with four warpgroups, 40.1, 41.9 and 57.1 with 3, 2 and 1; its
    q, k and v 27.3, 33.7, 31.1 and 44.5; q, k and v of OPT-1.3B, 1 unit or 2, 11.6, 9.5, 10.4 and 11.3. The choice was
    the quickest of them in 20 of 22 cases, and 3% slower in two. Reckoned without `SLOWER`, OPT-13B's were on 4 and
    8 warps, and no quicker than dense ones in its decoding. OPT-30B's keep 131 of 132 multiprocessors busy either way.
    The more values there are, the further ahead they have to be copied; a fifth piece costs a division, though. With 5
    and 4 pieces an H200 took, of 28672 x 7168, at 50% zeros 66 and 70 us for 8 columns, 88 and 89 for 32; at 80% 62 and
    60, 86 and 80 (all that by cp.async); and in pairs 49 and 51, 57 and 59. Pairs of 8 bits took 1 to 3 us less with 4
    whatever the density. `weights` may be several, alike.
    """
    del bias, activation
    matrices = weights if isinstance(weights, tuple) else (weights,)
    strips, blocks = matrices[0].strips, matrices[0].blocks
    rows = sum(matrix.values.shape[0] for matrix in matrices)
    narrow = matrices[0].paired and matrices[0].values.dtype.itemsize == 1  # which the kernel has in half the bytes
    many = MANY_QUICK_ROWS if matrices[0].paired and tiles(x.shape[1]) <= QUICK_TILES else MANY_ROWS
    pieces = (5, 4) if rows > many * len(matrices) * strips * blocks and not narrow else (4, 5)
    wanted = [*(Config(pieces=p) for p in pieces), Config(warpgroups=3, pieces=7)]
    wanted += [Config(warpgroups=g, pieces=8) for g in (2, 1)]
    wanted = [config for config in wanted if step_blocks(config, tiles(min(x.shape[1], MAX_N)))]

    def busiest(config: Config) -> float:
        """The time of the multiprocessor that has most to do: strips times sections, of the widest block."""
        groups = len(matrices) * pl.cdiv(strips, config.warps)
        return pl.cdiv(layout.sections(blocks) * groups, SMS) * config.warps * SLOWER[config.warpgroups]

    least = max(min(map(busiest, wanted)), 1)
    return sorted(wanted, key=lambda config: round(busiest(config) / least, 1))  # stable: of equals, the widest first


def check_support(x, devices: tuple[str, ...] | None) -> None:
    """Raises NotImplementedError where the kernel cannot take these arguments, or the device is none of `devices`."""
    if x.dtype.itemsize != 2:
        raise NotImplementedError(f"the Mosaic kernel takes bfloat16 and float16; got {x.dtype}")
    if devices is not None:
        device.require_device("unstructured_matmul", devices)


def check_config(config: Config, n: int) -> None:
    """Raises ValueError where a config does not fit the kernel, or no room is left for n columns of x."""
    if not 1 <= config.warpgroups <= 4 or not 4 <= config.pieces <= 8:
        raise ValueError(f"warpgroups must be 1 to 4, and pieces 4 to 8; got {config}")
    if not step_blocks(config, tiles(min(n, MAX_N))):
        raise ValueError(f"rings and x must fit into {SMEM_BYTES} bytes of shared memory; got {config}, n={n}")


def tiles(n: int) -> int:
    """Of 8 columns, that n columns take."""
    return pl.cdiv(n, TILE_N)
