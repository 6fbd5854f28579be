"""The dense tile and its pipeline: one producer warpgroup fills stages of shared memory, two consumers multiply them.

    producer:  wait empty[slot] -> begin SRead (gather or TMA) into stage slot, whose copies arrive when complete
    consumer:  wait full[slot], gathered[slot] -> wgmma on stage slot -> arrive empty[slot] one step later

Stage number g counts on over all tiles of a persistent block, so the producer runs ahead into the next tile while the
consumers write the last one. Operands of a stage are k-major, in panels: A as [block_m / 64, 64, 64], a panel for
each 64 rows, B as [1, 64, block_n].
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

from pallas_kernels.tile.gathered import Gathered

CONSUMERS = 2  # warpgroups that multiply; the warpgroup after them is the producer
WARPGROUPS = CONSUMERS + 1
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 56, 224  # a thread; (56 + 2 * 224) * 128 <= 65536
SMEM_BYTES = 227 * 1024  # what a Hopper block can have
BLOCK_K = 64  # k a stage; a transposed wgmma operand takes k in multiples of 64
PANEL = 64  # columns of a panel of A: the swizzle's atom


def swizzled(dtype: DTypeLike) -> tuple[Any, ...]:
    """The layout that wgmma and TMA like: atoms of 8 rows x 128 bytes, 16-byte chunks permuted by row."""
    tiling = plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize))  # pyright: ignore[reportAbstractUsage]
    return tiling, plgpu.SwizzleTransform(128)  # pyright: ignore[reportAbstractUsage]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseTile:
    """Shape of the tile that the tensor core sees, and how the two consumers share it.

    Attributes:
        block_m: rows of C, 64 or 128.
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
        """Stages of both operands, as scratch types of `plgpu.kernel`."""
        return {
            "a_smem": plgpu.SMEM(
                (self.stages, self.block_m // PANEL, BLOCK_K, PANEL), dtype, transforms=swizzled(dtype)
            ),
            "b_smem": plgpu.SMEM((self.stages, 1, BLOCK_K, self.block_n), dtype, transforms=swizzled(dtype)),
        }

    def operands(self, consumer: jax.Array, a_smem, b_smem) -> Callable[[jax.Array], list[tuple[Any, Any]]]:
        """What a consumer multiplies of the stage in a slot."""
        m0, n0 = self.consumer_origin(consumer)
        panel, cols = m0 // PANEL, self.consumer_shape[1]
        return lambda slot: [(a_smem.at[slot, panel].transpose((1, 0)), b_smem.at[slot, 0, :, pl.ds(n0, cols)])]


def barriers(stages: int, arrivals: int) -> dict[str, Any]:
    """The barriers of a pipeline: `full` takes `arrivals` from the producer, `empty` one from each consumer."""
    return {
        "full": plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Producer:
    """Fills stages, each by TMA copies, by gathers, or by both.

    Attributes:
        stages: how many there are.
        full, empty: as made by `barriers`.
        arrivals: of `full` for a stage: one for each TMA copy that may fill it. Where fewer do, the producer makes up
            for them.
        gathered: tells consumers that the gathers of a stage are complete; None where nothing is gathered.
    """

    stages: int
    full: Any
    empty: Any
    arrivals: int
    gathered: Gathered | None = None

    def copy(self, g: jax.Array, start: Callable[[jax.Array, Any], int]) -> jax.Array:
        """Fills stage g by TMA copies, by `start(slot, barrier)`, which says how many they are; the next stage."""
        return self._fill(g, start, lambda gathered, slot: gathered.arrive(slot))

    def gather(self, g: jax.Array, start: Callable[[jax.Array, Any], int]) -> jax.Array:
        """`copy` where `start` begins gathers too."""
        return self._fill(g, start, lambda gathered, slot: gathered.arrive_when_complete(slot))

    def _fill(self, g, start, arrive) -> jax.Array:
        slot = lax.rem(g, self.stages)
        pl.when(g >= self.stages)(lambda: plgpu.barrier_wait(self.empty.at[slot]))
        copies = start(slot, self.full.at[slot])
        for _ in range(self.arrivals - copies):
            plgpu.barrier_arrive(self.full.at[slot])
        if self.gathered is not None:
            arrive(self.gathered, slot)
        return g + 1

    def drain(self, g: jax.Array) -> None:
        """Sees the consumers through the last stages: a barrier must not outlive its waits."""

        def wait_until_free(q, _):
            plgpu.barrier_wait(self.empty.at[lax.rem(q, self.stages)])

        lax.fori_loop(jnp.maximum(g - self.stages, 0), g, wait_until_free, None)


def consume(
    stages: int, g, steps, accs, operands: Callable[[jax.Array], list[tuple[Any, Any]]], *, full, empty, gathered=None
):
    """Adds stages g to g + steps to a consumer's accumulators.

    Args:
        stages: how many there are in the pipeline.
        g: number of the first stage.
        steps: stages of this tile, 0 or more.
        accs: `plgpu.ACC` of each product of the consumer's part of the tile.
        operands: the parts of A [m, k] and B [k, n] of each, in the stage of a slot.
        full, empty: as made by `barriers`.
        gathered: as the producer's.

    Returns:
        The number of the next tile's first stage.
    """

    def step(s, g):
        slot = lax.rem(g, stages)
        plgpu.barrier_wait(full.at[slot])
        if gathered is not None:
            gathered.wait(g)
        for acc, (a, b) in zip(accs, operands(slot), strict=True):
            plgpu.wgmma(acc, a, b)
        plgpu.wgmma_wait(len(accs))  # the products of the stage before this one are done: it is free
        pl.when(s > 0)(lambda: plgpu.barrier_arrive(empty.at[lax.rem(g - 1, stages)]))
        return g + 1

    g = lax.fori_loop(0, steps, step, g)
    plgpu.wgmma_wait(0)
    last = lax.rem(g + stages - 1, stages)
    pl.when(jnp.asarray(steps) > 0)(lambda: plgpu.barrier_arrive(empty.at[last]))
    return g


def skip(stages: int, g, steps, *, full, empty, gathered=None):
    """`consume` of a consumer that has nothing to multiply: the stages pass, the number of the next is returned."""

    def step(_, g):
        plgpu.barrier_wait(full.at[lax.rem(g, stages)])
        if gathered is not None:
            gathered.wait(g)
        plgpu.barrier_arrive(empty.at[lax.rem(g, stages)])
        return g + 1

    return lax.fori_loop(0, steps, step, g)
