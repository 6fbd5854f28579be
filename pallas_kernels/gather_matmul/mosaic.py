"""The Mosaic GPU kernel of `gather_matmul` for Hopper: body and launch.

One dense tile, three rules for what the producer reads into it: single k by 16-byte gathers, blocks of k by TMA, and
everything by TMA where a tile's lists are nearly full.

What was tried on an H200, 4096 cubed in bfloat16, in us (cuBLAS 171 to 175), at 0 / 50 / 90 / 95 / 99% sparsity:
- 128x1, gathers with the dense rule: 172 / 98 / 28 / 21 / 12.4; 64x1, two lists a tile: 173 / 128 / 36 / 26 / 15.4;
  64x64: 171 / 134 / 34 / 25 / 17.6; 128x128: 170 / 92 / 31 / 25 / 17.6. Without any k: 9.8, of which 7.8 write C.
- Copies that arrive on a barrier by themselves (`tile/gathered.py`): before, the producer waited for its own gathers
  two stages late, and 128x1 took 30.4 at 90%, 64x1 140 at 50% and 39 at 90%.
- All entries of a stage loaded before its first copy (a load from shared memory does not move above a copy to it):
  a step of 64 k falls from 0.75 to 0.68 us. Entries by way of registers instead of TMA: another 1 us at 64x1.
- 8 lanes a row, so that all but the row of an address is constant: -8%. Counts loaded a tile ahead: 64x1 -7%.
- The last stage trimmed to the next 16 k, by own wgmma instructions: -3% at 90 and 95%, for 100 lines; left out.
- Stages of 32 k with 64-byte atoms: 290 / 154 / 39 / 25 / 13, as 64-byte atoms multiply slower. Three stages and an
  output buffer for each copy, or six of 32 k: within 5%, worse. block_n 128 costs a third more.
- Rows of tiles sorted by the length of their lists: 128x128 at 50% 97 -> 92, at 90% 35 -> 31; where all lists are
  about equal (128x1) the sort itself costs 0.5 to 1 us, so only blocks have it. Blocks walked 8 rows of tiles at a time
  instead of 32: 128x128 at 99% 23.6 -> 17.5, 64x64 at 50% 125 -> 134.
- Blocks by 16-byte copies instead of TMA: 128x128 at 50% 92 -> 96, no gain at 99%.
- A tile's last 128 columns kept in registers, rounded, and stored while the next tile multiplies: 128x1 169 / 95.6 /
  29.2 / 21.7 / 12.7 -> 167 / 94.8 / 28.5 / 21.6 / 12.7, but 64x1 at 50% 124 -> 148; not taken. One buffer of zeros for
  all columns of an empty tile, and a block's shortest tile first: no gain (128x128 at 99% 15.3 -> 15.8).
- Lists of 32 rows of their own, on the tile of 64 with half of wgmma's rows dropped, in place of micro-tiles of 64 or
  128 rows that cover them, at 90 / 95 / 99%: 32x1 63 / 41 / 20.5, covered 64 / 42 / 19.4; 32x64 64 / 34 / 20, covered
  58 / 33 / 18.6. Each of four lists reads rows of B of its own, from L2: 430 MB at 90%. Not taken. Entries loaded a
  tile ahead instead of a list ahead: no change.
What holds it: with nothing multiplied the fill alone takes 0.57 us a step, with nothing copied the products take 0.56.
Shared memory serves 80 kB of operands to wgmma and takes 48 kB of copies in it: 128 kB at 128 bytes a clock, about all
of these 0.57 us. The stores of C go through it too, about 5 us at 90%, which is why hiding them gains so little. Not
understood: why a few live tiles among empty ones (128x128 at 99%) cost as much as they do.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.gather_matmul.config import Config, dense_tile
from pallas_kernels.micro_tile_index import MicroTileIndex
from pallas_kernels.tile import device, gathered, pipeline, schedule, sread, swrite
from pallas_kernels.tile.gathered import Gathered
from pallas_kernels.tile.launch import lowered_once
from pallas_kernels.tile.pipeline import BLOCK_K
from pallas_kernels.tile.split import PRODUCTS, split

CHUNK = 256  # index entries staged at a time
ENTRIES_LAYOUT = plgpu.Layout.WG_STRIDED((CHUNK,), vec_size=CHUNK // 128)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Walk:
    """The tiles of C that a persistent block computes, and the lists of each: one order for producer and consumers.

    Attributes:
        shape: M, N and K; K without the terms of a split.
        index: its shapes and static fields.
        counts_gmem: entries of each list.
        order_smem: rows of tiles in the order of the walk; None where that is their own.
        may_be_dense: tiles may be read as they lie.
    """

    config: Config
    shape: tuple[int, int, int]
    index: MicroTileIndex
    counts_gmem: Any
    order_smem: Any
    may_be_dense: bool

    @property
    def lists_a_tile(self) -> int:
        return pl.cdiv(self.config.block_m, self.index.rows)

    @property
    def list_tile(self) -> pipeline.DenseTile:
        """The part of a tile that one list serves."""
        return dense_tile(self.config, self.config.block_m // self.lists_a_tile)

    @property
    def tiles(self) -> tuple[int, int]:
        m, n, _ = self.shape
        return pl.cdiv(m, self.config.block_m), pl.cdiv(n, self.config.block_n)

    @property
    def own_tiles(self) -> jax.Array:
        return schedule.own_tiles(self.tiles[0] * self.tiles[1])

    def position(self, t) -> tuple[jax.Array, jax.Array]:
        """First row and column of this block's t-th tile."""
        i, j = schedule.row_and_column(schedule.tile_number(t), *self.tiles, self.config.group)
        if self.order_smem is not None:
            i = self.order_smem[i]
        return i * self.config.block_m, j * self.config.block_n

    def list_number(self, t, part: int) -> jax.Array:
        """The list of a part of the t-th tile. Past the last row there is none: then one too high."""
        m0, n0 = self.position(t)
        across = pl.cdiv(self.shape[1], self.index.out_cols) if self.index.out_cols else 1
        block = lax.div(m0 + part * self.list_tile.block_m, self.index.rows)
        return block * across + (lax.div(n0, self.index.out_cols) if self.index.out_cols else 0)

    def counts(self, t) -> tuple[jax.Array, ...]:
        """Entries of the lists of the t-th tile."""
        numbers = [self.list_number(jnp.minimum(t, self.own_tiles - 1), part) for part in range(self.lists_a_tile)]
        last = self.index.counts.shape[0] - 1
        return tuple(jnp.where(i > last, 0, self.counts_gmem[jnp.minimum(i, last)]) for i in numbers)

    def dense_and_counts(self, counts: tuple[jax.Array, ...]) -> tuple[Any, tuple[jax.Array, ...]]:
        """Whether the tile is read as it lies, and then no list of it is."""
        if not self.may_be_dense:
            return False, counts
        least = math.ceil(self.config.dense_from * self.index.indices.shape[1]) * self.lists_a_tile
        dense = functools.reduce(jnp.add, counts) >= max(least, 1)
        return dense, tuple(jnp.where(dense, 0, count) for count in counts)

    def each_tile(self, body, init):
        """Loop over this block's tiles: `body(t, dense, counts, carry) -> carry`."""

        def step(t, carry):
            counts, carry = carry
            # Loaded a tile ahead: nothing else hides the latency where tiles are short.
            return self.counts(t + 1), body(t, *self.dense_and_counts(counts), carry)

        return lax.fori_loop(0, self.own_tiles, step, (self.counts(jnp.int32(0)), init))[1]


def _produce(
    walk: _Walk, producer: pipeline.Producer, products, a_gmem, b_gmem, indices_gmem, a_smem, b_smem, entries_smem,
    *, interpret: bool,
):  # fmt: skip
    """The producer warpgroup: stages the lists, and fills stages by what they name, or in order."""
    gather_rows = sread.gather_rows_interpreted if interpret else sread.gather_rows
    config, cols, parts, k = walk.config, walk.index.cols, walk.lists_a_tile, walk.shape[2]

    def copy_tile(g, k0, m0, n0, block_m):
        """The contiguous rows k0 to k0 + BLOCK_K, by TMA."""
        for a_term, b_term in products:

            def start(slot, barrier, a_term=a_term, b_term=b_term):
                for panel in range(block_m // pipeline.PANEL):
                    a_tile = a_gmem.at[
                        pl.ds(a_term * k + k0, BLOCK_K), pl.ds(m0 + panel * pipeline.PANEL, pipeline.PANEL)
                    ]
                    plgpu.copy_gmem_to_smem(a_tile, a_smem.at[slot, panel], barrier)
                b_tile = b_gmem.at[pl.ds(b_term * k + k0, BLOCK_K), pl.ds(n0, config.block_n)]
                plgpu.copy_gmem_to_smem(b_tile, b_smem.at[slot, 0], barrier)
                return block_m // pipeline.PANEL + 1

            g = producer.copy(g, start)
        return g

    def gather_stage(g, entries_smem, first, left, m0, n0, block_m):
        """The rows that entries `first` to `first + BLOCK_K` name, of which `left` count."""
        for a_term, b_term in products:

            def copy(slot, _, a_term=a_term, b_term=b_term):
                a = sread.Source(gmem=a_gmem, smem=a_smem.at[slot], first_row=a_term * k, first_col=m0, cols=block_m)
                b = sread.Source(
                    gmem=b_gmem, smem=b_smem.at[slot], first_row=b_term * k, first_col=n0, cols=config.block_n
                )
                gather_rows((a, b), entries_smem, left, first)
                return 0

            g = producer.gather(g, copy)
        return g

    def list_number(t, part):
        """The list of a part of the t-th tile; any that there is where there is none."""
        return jnp.minimum(walk.list_number(jnp.minimum(t, walk.own_tiles - 1), part), walk.index.counts.shape[0] - 1)

    def load_entries(number, chunk):
        """A chunk of a list, in registers: by TMA it would queue behind the stores of C."""
        entries = indices_gmem.at[number, pl.ds(chunk * CHUNK, CHUNK)]
        return plgpu.load(entries, layout=ENTRIES_LAYOUT, optimized=False)

    def list_body(t, part, count, carry):
        m0, n0 = walk.position(t)
        block_m = walk.list_tile.block_m
        m0 += part * block_m
        chunks = jnp.maximum(pl.cdiv(count, CHUNK), 1)  # an empty list has a chunk too: one rule for what is next

        def chunk_body(chunk, carry):
            g, entries = carry
            last = chunk == chunks - 1
            next_t, next_part = (t, part + 1) if part + 1 < parts else (t + 1, 0)
            entries_smem[...] = entries
            plgpu.commit_smem()
            next_number = jnp.where(last, list_number(next_t, next_part), list_number(t, part))
            next_entries = load_entries(next_number, jnp.where(last, 0, chunk + 1))
            left = jnp.clip(count - chunk * CHUNK, 0, CHUNK)
            if cols == 1:

                def step(s, g):
                    first = s * BLOCK_K
                    return gather_stage(g, entries_smem, first, left - first, m0, n0, block_m)

                g = lax.fori_loop(0, pl.cdiv(left, BLOCK_K), step, g)
            else:

                def block_step(s, g):
                    entry, inner = lax.div(s, cols // BLOCK_K), lax.rem(s, cols // BLOCK_K)
                    k0 = entries_smem[entry] * cols + inner * BLOCK_K
                    return copy_tile(g, k0, m0, n0, block_m)

                g = lax.fori_loop(0, left * (cols // BLOCK_K), block_step, g)
            plgpu.commit_smem()  # every thread has read its entries: the slot may be staged anew
            return g, next_entries

        return lax.fori_loop(0, chunks, chunk_body, carry)

    def tile_body(t, dense, counts, carry):
        if walk.may_be_dense:
            m0, n0 = walk.position(t)
            steps = jnp.where(dense, pl.cdiv(k, BLOCK_K), 0)
            copy_step = lambda s, g: copy_tile(g, s * BLOCK_K, m0, n0, config.block_m)  # noqa: E731
            carry = lax.fori_loop(0, steps, copy_step, carry[0]), carry[1]
        for part, count in enumerate(counts):
            carry = list_body(t, part, count, carry)
        return carry

    first_entries = load_entries(list_number(jnp.int32(0), 0), 0)
    g, _ = walk.each_tile(tile_body, (jnp.int32(0), first_entries))
    producer.drain(g)


def _consume(walk: _Walk, consumer, products, out_gmem, out_smem, a_smem, b_smem, barriers: dict[str, Any]):
    """A consumer warpgroup: multiplies the stages of its part of each tile, and stores it."""
    config, k = walk.config, walk.shape[2]

    def multiply(tile, g, stages):
        """The sum of `stages` stages from number g on, and the number of the next."""

        def add_stages(acc):
            operands = tile.operands(consumer, a_smem, b_smem)
            g_next = pipeline.consume(config.stages, g, stages, [acc], operands, **barriers)
            return acc[...], g_next

        return pl.run_scoped(add_stages, plgpu.ACC(tile.consumer_shape))

    def multiply_float32(tile, g, steps):
        # The tensor core truncates each time it adds to its accumulator: over a long k that would cost digits.
        def step(_, carry):
            total, g = carry
            products_sum, g = multiply(tile, g, len(products))
            return total + products_sum, g

        zeros = plgpu.layout_cast(jnp.zeros(tile.consumer_shape, jnp.float32), plgpu.Layout.WGMMA)
        return lax.fori_loop(0, steps, step, (zeros, g))

    def compute(tile, g, steps, m0, n0, first_slot=0):
        acc, g = multiply(tile, g, steps) if len(products) == 1 else multiply_float32(tile, g, steps)
        m1, n1 = tile.consumer_origin(consumer)
        swrite.store(acc, out_gmem, out_smem, m0 + m1, n0 + n1, first_slot)
        return g

    def list_steps(count):
        return pl.cdiv(count, BLOCK_K) if walk.index.cols == 1 else count * (walk.index.cols // BLOCK_K)

    def tile_body(t, dense, counts, g):
        m0, n0 = walk.position(t)
        tile, dense_steps = walk.list_tile, pl.cdiv(k, BLOCK_K)
        copies = tile.consumer_shape[1] // swrite.COLUMNS

        def by_lists(g):
            for part, count in enumerate(counts):
                first_slot = part * copies if config.out_slots > copies else 0
                g = compute(tile, g, list_steps(count), m0 + part * tile.block_m, n0, first_slot)
            return g

        if not walk.may_be_dense:
            return by_lists(g)
        if len(counts) == 1:
            return compute(tile, g, jnp.where(dense, dense_steps, list_steps(counts[0])), m0, n0)
        return lax.cond(dense, lambda g: compute(dense_tile(config), g, dense_steps, m0, n0), by_lists, g)

    walk.each_tile(tile_body, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _gather_matmul_kernel(
    a_gmem, b_gmem, indices_gmem, counts_gmem, out_gmem, *, a_smem, b_smem, full, empty, arrived, out_smem,
    index_smem, ordered, config: Config, shape: tuple[int, int, int], index: MicroTileIndex, may_be_dense: bool,
    arrivals: int, interpret: bool,
):  # fmt: skip
    """The body: tiles of C over persistent blocks, SRead by index, SWrite in place."""
    products = PRODUCTS if a_gmem.shape[0] > shape[2] else ((0, 0),)
    warpgroup = lax.axis_index("warpgroup")
    if index.cols == 1:
        words = index_smem.at[pl.ds(CHUNK + schedule.MOST_SORTED, gathered.words(config.stages))]
        arrived = Gathered(memory=words, interpreted=arrived if interpret else None, stages=config.stages)
    else:
        arrived = None
    walk = _Walk(
        config=config, shape=shape, index=index, counts_gmem=counts_gmem, order_smem=None, may_be_dense=may_be_dense
    )
    if config.longest_first and index.out_cols is None and walk.tiles[0] <= schedule.MOST_SORTED:
        order_smem, count_smem = (index_smem.at[pl.ds(first, schedule.MOST_SORTED)] for first in (CHUNK, 0))
        walk = dataclasses.replace(walk, order_smem=order_smem)

        @pl.when(warpgroup == pipeline.CONSUMERS)
        def _sort():
            sort = schedule.longest_first_interpreted if interpret else schedule.longest_first
            sort(counts_gmem, walk.lists_a_tile, order_smem, count_smem)
            plgpu.barrier_arrive(ordered)

        plgpu.barrier_wait(ordered)

    @pl.when(warpgroup == pipeline.CONSUMERS)
    def _producer():
        plgpu.set_max_registers(pipeline.PRODUCER_REGISTERS, action="decrease")
        if arrived is not None:
            arrived.begin()
        producer = pipeline.Producer(stages=config.stages, full=full, empty=empty, arrivals=arrivals, gathered=arrived)
        smem = a_smem, b_smem, index_smem.at[pl.ds(0, CHUNK)]
        _produce(walk, producer, products, a_gmem, b_gmem, indices_gmem, *smem, interpret=interpret)

    @pl.when(warpgroup < pipeline.CONSUMERS)
    def _consumer():
        plgpu.set_max_registers(pipeline.CONSUMER_REGISTERS, action="increase")
        barriers = {"full": full, "empty": empty, "gathered": arrived}
        _consume(walk, warpgroup, products, out_gmem, out_smem.at[warpgroup], a_smem, b_smem, barriers)


@lowered_once("zero_elsewhere")
def mosaic(
    a_t: Float[Array, "K M"],
    b: Float[Array, "K N"],
    index: MicroTileIndex,
    zero_elsewhere: bool,
    config: Config,
    interpret: bool,
) -> Float[Array, "M N"]:
    """Launches the kernel; `interpret` runs it on CPU under the race detector."""
    m, n = a_t.shape[1], b.shape[1]
    out_dtype = a_t.dtype
    splits, uses_tma = out_dtype == jnp.float32, zero_elsewhere or index.cols > 1
    # Rows must start on 16 bytes and TMA takes whole atoms: pad to 8 or 64 elements (a copy, only where they do not
    # divide M or N). Terms of a split lie below each other: there TMA must not read past the last k of one.
    width = 64 if uses_tma else 8
    pad_k = -a_t.shape[0] % ((max(index.cols, BLOCK_K) if splits else 8) if uses_tma else 1)
    a_t, b = (jnp.pad(x, ((0, pad_k), (0, -x.shape[1] % width))) for x in (a_t, b))
    indices = jnp.pad(index.indices, ((0, 0), (0, -index.indices.shape[1] % CHUNK)))
    k = a_t.shape[0]
    if splits:
        a_t, b = split(a_t), split(b)
    tile = dense_tile(config)
    tiles = pl.cdiv(m, tile.block_m), pl.cdiv(n, tile.block_n)
    arrivals = tile.block_m // pipeline.PANEL + 1 if uses_tma else 1
    static = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), index)
    kernel = plgpu.kernel(
        functools.partial(
            _gather_matmul_kernel,
            config=config,
            shape=(m, n, k),
            index=static,
            may_be_dense=zero_elsewhere,
            arrivals=arrivals,
            interpret=interpret,
        ),
        # TMA clips at the matrix's end, but only in whole swizzle atoms: the slice below is free where they fit.
        out_type=jax.ShapeDtypeStruct((m + -m % 8, swrite.stored_columns(n)), out_dtype),
        grid=(schedule.blocks(*tiles, most=2 if interpret else device.sm_count()),),  # every block has a tile
        grid_names=("sm",),
        num_threads=pipeline.WARPGROUPS,
        thread_name="warpgroup",
        scratch_types=tile.scratch(a_t.dtype)
        | pipeline.barriers(tile.stages, arrivals)
        | {
            "arrived": plgpu.Barrier(num_arrivals=1, num_barriers=tile.stages),  # of the interpreter
            "out_smem": swrite.scratch(tile, out_dtype),
            # One buffer, since each starts on a kB of its own: a chunk of entries, the order of the walk, and barriers.
            "index_smem": plgpu.SMEM((CHUNK + schedule.MOST_SORTED + gathered.words(tile.stages),), jnp.int32),
            "ordered": plgpu.Barrier(num_arrivals=1),
        },
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
        kernel_name="gather_matmul",
    )
    return kernel(a_t, b, indices, index.counts)[:m, :n]
