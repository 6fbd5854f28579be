"""The dense tile and its pipeline: one producer warpgroup fills stages of shared memory, two consumers multiply them.

    producer:  wait empty[slot] -> SRead into stage slot -> arrive full[slot]
    consumer:  wait full[slot] -> wgmma on stage slot -> arrive empty[slot] one step later

Stage number g counts on over all tiles of a persistent block, so the producer runs ahead into the next tile while the
consumers write the last one. Operands of a stage are k-major: A as [block_k, block_m], B as [block_k, block_n].
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

CONSUMERS = 2  # warpgroups that multiply; the warpgroup after them is the producer
WARPGROUPS = CONSUMERS + 1
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 56, 224  # a thread; (56 + 2 * 224) * 128 <= 65536
SMEM_BYTES = 227 * 1024  # what a Hopper block can have
BLOCK_K = 64  # k a stage; a transposed wgmma operand takes k in multiples of 64


def swizzled(dtype: DTypeLike) -> tuple[Any, ...]:
    """The layout that wgmma and TMA like: atoms of 8 rows x 128 bytes, 16-byte chunks permuted by row."""
    tiling = plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize))  # pyright: ignore[reportAbstractUsage]
    return tiling, plgpu.SwizzleTransform(128)  # pyright: ignore[reportAbstractUsage]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseTile:
    """Shape of the tile that the tensor core sees, and how the two consumers share it.

    Attributes:
        block_m: rows of C, 64 or a multiple of 128.
        block_n: columns of C, a multiple of 128.
        stages: stages of shared memory, each (block_m + block_n) * 64 elements of 2 bytes.
        out_slots: buffers of 64 columns through which a consumer stores its part.
    """

    block_m: int
    block_n: int
    stages: int
    out_slots: int

    @property
    def consumer_shape(self) -> tuple[int, int]:
        """Rows and columns of C of one consumer: the tile halved along m, or along n where m is 64."""
        return (self.block_m // 2, self.block_n) if self.block_m > 64 else (self.block_m, self.block_n // 2)

    def consumer_origin(self, consumer: jax.Array) -> tuple[Any, Any]:
        """First row and column of a consumer's part within the tile."""
        m, n = self.consumer_shape
        return (consumer * m, 0) if self.block_m > 64 else (0, consumer * n)

    def scratch(self, dtype: jnp.dtype) -> dict[str, Any]:
        """Stages of both operands and their barriers, as scratch types of `plgpu.kernel`."""
        return {
            "a_smem": plgpu.SMEM((self.stages, BLOCK_K, self.block_m), dtype, transforms=swizzled(dtype)),
            "b_smem": plgpu.SMEM((self.stages, BLOCK_K, self.block_n), dtype, transforms=swizzled(dtype)),
            "full": plgpu.Barrier(num_arrivals=1, num_barriers=self.stages),
            "empty": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=self.stages),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Producer:
    """Fills stages whose copies complete in order.

    A stage is handed to the consumers `lag` stages after its copies began. With `stages - 1` they would never end: a
    consumer frees a stage only once it has the next, and that one would be waiting for the freed stage.
    """

    tile: DenseTile
    full: Any
    empty: Any
    wait_copies: Callable[[int], None]

    @property
    def lag(self) -> int:
        return self.tile.stages - 2

    def fill(self, g: jax.Array, copy: Callable[[jax.Array], None]) -> jax.Array:
        """Starts the copies of stage number g by `copy(slot)`; hands the stage `lag` before it to the consumers."""
        stages, lag = self.tile.stages, self.lag
        slot = lax.rem(g, stages)
        pl.when(g >= stages)(lambda: plgpu.barrier_wait(self.empty.at[slot]))
        copy(slot)
        self.wait_copies(lag)
        pl.when(g >= lag)(lambda: plgpu.barrier_arrive(self.full.at[lax.rem(g - lag, stages)]))
        return g + 1

    def drain(self, g: jax.Array) -> None:
        """Hands over the stages still in flight after the last one, and sees the consumers through them."""
        stages, lag = self.tile.stages, self.lag
        self.wait_copies(0)

        def hand_over(q, _):
            plgpu.barrier_arrive(self.full.at[lax.rem(q, stages)])

        def wait_until_free(q, _):
            plgpu.barrier_wait(self.empty.at[lax.rem(q, stages)])

        lax.fori_loop(jnp.maximum(g - lag, 0), g, hand_over, None)
        lax.fori_loop(jnp.maximum(g - stages, 0), g, wait_until_free, None)  # a barrier must not outlive its waits


def consume(tile: DenseTile, consumer, g, steps, acc, *, a_smem, b_smem, full, empty):
    """Adds stages g to g + steps to a consumer's accumulator.

    Args:
        tile: the dense tile.
        consumer: which consumer this warpgroup is.
        g: number of the first stage.
        steps: stages of this tile, 0 or more.
        acc: `plgpu.ACC` of `tile.consumer_shape`.
        a_smem, b_smem, full, empty: as made by `tile.scratch`.

    Returns:
        The number of the next tile's first stage.
    """
    rows, cols = tile.consumer_shape
    m0, n0 = tile.consumer_origin(consumer)

    def step(s, g):
        slot = lax.rem(g, tile.stages)
        plgpu.barrier_wait(full.at[slot])
        a, b = a_smem.at[slot, :, pl.ds(m0, rows)], b_smem.at[slot, :, pl.ds(n0, cols)]
        plgpu.wgmma(acc, a.transpose((1, 0)), b)
        plgpu.wgmma_wait(1)  # the product before this one is done: its stage is free
        pl.when(s > 0)(lambda: plgpu.barrier_arrive(empty.at[lax.rem(g - 1, tile.stages)]))
        return g + 1

    g = lax.fori_loop(0, steps, step, g)
    plgpu.wgmma_wait(0)
    last = lax.rem(g + tile.stages - 1, tile.stages)
    pl.when(jnp.asarray(steps) > 0)(lambda: plgpu.barrier_arrive(empty.at[last]))
    return g
