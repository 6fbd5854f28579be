"""The dense tile over listed rows: out[r, own columns of list e] = A[r] @ B[:, own columns] for every r in list e.

The other two products of a `MicroTileIndex`, `scatter_matmul` and `sampled_matmul`, are this one kernel. Rows of A are
gathered (SRead) 128 at a time and B comes by TMA; what they give is scattered to the same rows of a result that starts
as zeros (SWrite). Tiles are walked row tile by row tile over all lists, so that those with entries come first and a
block stops where the longest list ends.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.tile import device, gathered, pipeline, sread, swrite
from pallas_kernels.tile.gathered import Gathered
from pallas_kernels.tile.pipeline import BLOCK_K

BLOCK_ROWS = 128  # rows of a tile: 64 for each consumer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """What is multiplied, and how it is tiled.

    Attributes:
        lists: how many lists of rows there are.
        depth: columns of A: what is summed over.
        width: columns of the result that a list has.
        columns: of the result.
        b_is_transposed: B is given as [columns, depth].
        block_n: columns of a tile, 64, 128 or 256; divides `width` where there are several lists.
        stages: of the pipeline.
    """

    lists: int
    depth: int
    width: int
    columns: int
    b_is_transposed: bool
    block_n: int
    stages: int

    @property
    def tiles_a_list(self) -> int:
        """Column tiles."""
        return pl.cdiv(min(self.width, self.columns), self.block_n)

    def own_tiles(self, counts_gmem) -> jax.Array:
        """How many tiles this block has; `counts_gmem` ends with the largest count."""
        tiles = pl.cdiv(counts_gmem[counts_gmem.shape[0] - 1], BLOCK_ROWS) * self.lists * self.tiles_a_list
        return pl.cdiv(tiles - lax.axis_index("sm"), lax.axis_size("sm"))

    def position(self, t) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The list of this block's t-th tile, its first entry there, and its first column of the result."""
        number = lax.axis_index("sm") + t * lax.axis_size("sm")
        number, j = lax.div(number, self.tiles_a_list), lax.rem(number, self.tiles_a_list)
        i, list_number = lax.div(number, self.lists), lax.rem(number, self.lists)
        return list_number, i * BLOCK_ROWS, list_number * self.width + j * self.block_n


def stages(block_n: int) -> int:
    """As many as shared memory holds beside the output buffers and the entries, up to 6."""
    out_bytes = pipeline.CONSUMERS * swrite.SCATTER_SLOTS * 64 * 64 * 2
    left = pipeline.SMEM_BYTES - out_bytes - 2 * BLOCK_ROWS * 4 - 1024
    return min(6, left // (BLOCK_K * (BLOCK_ROWS + block_n) * 2))


def _produce(geometry: Geometry, producer, a_gmem, b_gmem, indices_gmem, counts_gmem, smem, *, interpret: bool):
    """The producer warpgroup: stages the entries of each tile, gathers rows of A and copies tiles of B."""
    a_smem, b_smem, entries_smem, staged = smem
    gather_rows = sread.gather_rows_interpreted if interpret else sread.gather_rows
    own_tiles = geometry.own_tiles(counts_gmem)

    def stage_entries(t, slot):
        list_number, first, _ = geometry.position(t)
        entries = indices_gmem.at[list_number, pl.ds(first, BLOCK_ROWS)]
        plgpu.copy_gmem_to_smem(entries, entries_smem.at[slot], staged.at[slot])

    def tile_body(t, g):
        list_number, first, n0 = geometry.position(t)
        slot = lax.rem(t, 2)
        pl.when(t + 1 < own_tiles)(lambda: stage_entries(t + 1, 1 - slot))
        plgpu.barrier_wait(staged.at[slot])
        left = counts_gmem[list_number] - first

        def step(s, g):
            k0 = s * BLOCK_K

            def copy(stage, barrier):
                k, n = pl.ds(k0, BLOCK_K), pl.ds(n0, geometry.block_n)
                b_tile = b_gmem.at[n, k] if geometry.b_is_transposed else b_gmem.at[k, n]
                plgpu.copy_gmem_to_smem(b_tile, b_smem.at[stage], barrier)
                rows = sread.Source(gmem=a_gmem, smem=a_smem.at[stage], first_row=0, first_col=k0, cols=BLOCK_K)
                gather_rows((rows,), entries_smem.at[slot], left, jnp.int32(0))
                return 1

            return producer.gather(g, copy)

        g = lax.fori_loop(0, _steps(geometry, left), step, g)
        plgpu.commit_smem()  # every thread has read its entries: the slot may be staged anew
        return g

    pl.when(own_tiles > 0)(lambda: stage_entries(jnp.int32(0), 0))
    producer.drain(lax.fori_loop(0, own_tiles, tile_body, jnp.int32(0)))


def _steps(geometry: Geometry, left: jax.Array) -> jax.Array:
    return jnp.where(left > 0, pl.cdiv(geometry.depth, BLOCK_K), 0)


def _consume(geometry: Geometry, consumer, indices_gmem, counts_gmem, out_gmem, smem, barriers, *, interpret: bool):
    """A consumer warpgroup: multiplies 64 rows of each tile and scatters them."""
    a_smem, b_smem, out_smem = smem
    scatter = swrite.scatter_rows_interpreted if interpret else swrite.scatter_rows
    m0 = consumer * 64

    def operands(slot):
        b = b_smem.at[slot].transpose((1, 0)) if geometry.b_is_transposed else b_smem.at[slot]
        return a_smem.at[slot, 0, pl.ds(m0, 64)], b

    def tile_body(t, g):
        list_number, first, n0 = geometry.position(t)
        left = counts_gmem[list_number] - first

        def multiply(acc):
            stages = geometry.stages
            g_next = pipeline.consume(stages, g, _steps(geometry, left), acc, operands, **barriers)
            return acc[...], g_next

        acc, g_next = pl.run_scoped(multiply, plgpu.ACC((64, geometry.block_n)))
        to = functools.partial(scatter, indices_gmem, list_number, first + m0, left - m0, out_gmem)
        swrite.store_scattered(acc, out_smem, n0, geometry.columns, to)
        return g_next

    lax.fori_loop(0, geometry.own_tiles(counts_gmem), tile_body, jnp.int32(0))


def _listed_rows_kernel(
    a_gmem, b_gmem, indices_gmem, counts_gmem, out_gmem, *, a_smem, b_smem, out_smem, entries_smem, staged, full,
    empty, arrived, geometry: Geometry, interpret: bool,
):  # fmt: skip
    warpgroup = lax.axis_index("warpgroup")
    words = entries_smem.at[2, pl.ds(0, gathered.words(geometry.stages))]
    arrived = Gathered(memory=words, interpreted=arrived if interpret else None, stages=geometry.stages)

    @pl.when(warpgroup == pipeline.CONSUMERS)
    def _producer():
        plgpu.set_max_registers(pipeline.PRODUCER_REGISTERS, action="decrease")
        arrived.begin()
        producer = pipeline.Producer(stages=geometry.stages, full=full, empty=empty, arrivals=1, gathered=arrived)
        smem = a_smem, b_smem, entries_smem, staged
        _produce(geometry, producer, a_gmem, b_gmem, indices_gmem, counts_gmem, smem, interpret=interpret)

    @pl.when(warpgroup < pipeline.CONSUMERS)
    def _consumer():
        plgpu.set_max_registers(pipeline.CONSUMER_REGISTERS, action="increase")
        smem, barriers = (a_smem, b_smem, out_smem.at[warpgroup]), {"full": full, "empty": empty, "gathered": arrived}
        _consume(geometry, warpgroup, indices_gmem, counts_gmem, out_gmem, smem, barriers, interpret=interpret)


def listed_rows_matmul(
    name: str,
    a: Float[Array, "L K"],
    b: Float[Array, "..."],
    indices: Int32[Array, "lists L"],
    counts: Int32[Array, " lists"],
    geometry: Geometry,
    interpret: bool,
) -> Float[Array, "L columns"]:
    """Launches the kernel. 16-bit operands; rows that no list names are zero.

    Args:
        name: of the kernel, for profiles.
        a: A.
        b: B [K, columns], or [columns, K] as `geometry` says.
        indices, counts: lists of rows of A.
        geometry: the tiling.
        interpret: runs it on CPU under the race detector.
    """
    length, dtype = a.shape[0], a.dtype
    pad: Callable[[Any, int, int], Any] = lambda x, rows, cols: jnp.pad(  # noqa: E731
        x, ((0, -x.shape[0] % rows), (0, -x.shape[1] % cols))
    )
    a, b, indices = pad(a, 1, 8), pad(b, 8, 64), pad(indices, 1, 4)  # what 16-byte rows and whole TMA atoms take
    columns = geometry.columns + -geometry.columns % swrite.COLUMNS
    tile_b = (geometry.block_n, BLOCK_K) if geometry.b_is_transposed else (BLOCK_K, geometry.block_n)
    smem = functools.partial(plgpu.SMEM, dtype=dtype, transforms=pipeline.swizzled(dtype))
    most_tiles = pl.cdiv(length, BLOCK_ROWS) * geometry.lists * geometry.tiles_a_list
    kernel = plgpu.kernel(
        functools.partial(_listed_rows_kernel, geometry=geometry, interpret=interpret),
        out_type=(),
        grid=(min(most_tiles, 2 if interpret else device.sm_count()),),
        grid_names=("sm",),
        num_threads=pipeline.WARPGROUPS,
        thread_name="warpgroup",
        scratch_types={
            "a_smem": smem((geometry.stages, 1, BLOCK_ROWS, BLOCK_K)),
            "b_smem": smem((geometry.stages, *tile_b)),
            "out_smem": smem((pipeline.CONSUMERS, swrite.SCATTER_SLOTS, 64, swrite.COLUMNS)),
            "entries_smem": plgpu.SMEM((3, BLOCK_ROWS), jnp.int32),
            "staged": plgpu.Barrier(num_arrivals=1, num_barriers=2),
        }
        | pipeline.barriers(geometry.stages, arrivals=1)
        | {"arrived": plgpu.Barrier(num_arrivals=1, num_barriers=geometry.stages)},  # of the interpreter
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
        kernel_name=name,
    )
    out = jax.new_ref(jnp.zeros((length, columns), dtype))
    counts = counts if geometry.lists == 1 else jnp.append(counts, jnp.max(counts))
    kernel(a, b, indices, counts, out)
    return out[...][:, : geometry.columns]
