"""Tilings of `layer_norm`'s Mosaic kernel: which there are, which fit, and which arguments it takes at all."""

import dataclasses

from pallas_kernels.tile import device

THREADS = 128  # of a block: a warpgroup
MAX_ROWS = 64  # from where on XLA's launches have something to do
ROW_BYTES = 32 * 1024  # of x at most: a thread keeps its share of a row in registers
HOPPER_SMS = 132


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tiling of the Mosaic kernel.

    Attributes:
        parts: blocks that share a row: each reads all of it and writes its part.
    """

    parts: int = 1


def vector(columns: int, itemsize: int) -> int:
    """Values that a thread loads at once: 16 bytes where that divides the columns of a block."""
    return next(v for v in (16 // itemsize, 4, 2, 1) if columns % (THREADS * v) == 0)


def candidates(x, scale, bias, addend=None) -> list[Config]:
    """Configs worth timing for these arguments (shapes are enough); the heuristic's choice comes first.

    Parts are at least as wide as one load of the warpgroup. The heuristic takes the most of them that leave every other
    multiprocessor free: more would take longer to read the row, since all multiprocessors share the rate of L2.
    """
    del addend
    rows, d = x.shape
    if not d or d % THREADS:
        return []
    narrowest = THREADS * vector(d, max(a.dtype.itemsize for a in (x, scale, bias)))
    parts = [p for p in range(1, d // narrowest + 1) if d % (THREADS * p) == 0]
    best = max((p for p in parts if rows * p <= HOPPER_SMS // 2), default=1)
    return [Config(parts=p) for p in sorted(parts, key=lambda p: (p != best, p))]


def check_support(x, devices: tuple[str, ...] | None) -> None:
    """Raises NotImplementedError where the kernel cannot take these arguments, or the device is none of `devices`."""
    rows, d = x.shape
    if not 1 <= rows <= MAX_ROWS:
        raise NotImplementedError(f"the Mosaic kernel takes 1 to {MAX_ROWS} rows; got rows={rows}")
    if d % THREADS or not 0 < d * x.dtype.itemsize <= ROW_BYTES:
        rule = f"the Mosaic kernel takes a d that is a multiple of {THREADS}, of at most {ROW_BYTES} bytes a row"
        raise NotImplementedError(f"{rule}; got d={d} of {x.dtype}")
    if devices is not None:
        device.require_device("layer_norm", devices)


def check_fits(config: Config, x) -> None:
    """Raises ValueError where a config does not fit arguments that `check_support` lets pass."""
    if config.parts < 1 or x.shape[1] % (THREADS * config.parts):
        rule = f"parts must divide d into multiples of {THREADS}"
        raise ValueError(f"{rule}; got parts={config.parts}, d={x.shape[1]}")
