"""The Mosaic GPU kernel of `gather_matmul` for Hopper: body, launch, configs.

What was tried on an H200, 4096 cubed in bfloat16, at 128x1 and 0 / 50 / 90 / 99% sparsity (dense 171 us):
- 8 lanes a row, so that a row's index is loaded once and all else of an address is constant, entries staged 256 at a
  time and a tile ahead: 196 / 108 / 32 / 13 us, against 213 / 114 / 35 / 14 with a row spread over a whole pass of
  threads and the list staged when its tile begins.
- Counts loaded a tile ahead: 192 / 105 / 31 / 13, and at 64x1 297 / 158 / 43 / 18 -> 276 / 149 / 40 / 17.
- No gain: 3 instead of 4 stages (+1 to +2 us), an output buffer for each of a consumer's copies, 2 to 32 row blocks
  walked together (within 2%). block_n 128 costs a third more: 48 kB a stage through L2 become 64 kB.
What holds it: a step of 64 k takes 0.72 us, its wgmma 0.58. Shared memory serves 80 kB of operands to wgmma and takes
48 kB of copies in it, near its 128 bytes a clock. Lists that all name the same k are no quicker (30 us at 90%), so
it is not the gather's scatter over memory. A tile without k costs 9.4 us of output writes in all.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float

from pallas_kernels.micro_tile_index import MicroTileIndex
from pallas_kernels.tile import device, pipeline, sread, swrite

CHUNK = 4 * pipeline.BLOCK_K  # index entries staged at a time; a TMA copy takes 256 along a dimension
HOPPER_SMS = 132
SPLIT_PRODUCTS = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0))  # (term of A, term of B); the rest is below float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tiling of the Mosaic kernel.

    Attributes:
        block_m: rows of C a tile, 64 or 128; must divide the index's `rows`.
        block_n: columns of C a tile, 128 or 256.
        stages: stages of shared memory in the pipeline, at least 2.
        out_slots: 64-column output buffers of a consumer; with all of its columns buffered it never waits for one.
        group: how many row blocks are walked together before the next columns (for reuse in L2).
    """

    block_m: int = 128
    block_n: int = 256
    stages: int = 4
    out_slots: int = 2
    group: int = 32


def _gather_matmul_kernel(
    a_gmem, b_gmem, indices_gmem, counts_gmem, out_gmem, *, a_smem, b_smem, full, empty, out_smem, index_smem, staged,
    config: Config, rows: int, terms: int, interpret: bool,
):  # fmt: skip
    """The body: tiles of C over persistent blocks, SRead by index, SWrite in place."""
    k, m, n = a_gmem.shape[0] // terms, *out_gmem.shape
    tile = _dense_tile(config)
    m_tiles, n_tiles = pl.cdiv(m, tile.block_m), pl.cdiv(n, tile.block_n)
    first_tile, tile_stride = lax.axis_index("sm"), lax.axis_size("sm")
    own_tiles = pl.cdiv(m_tiles * n_tiles - first_tile, tile_stride)
    products = SPLIT_PRODUCTS if terms > 1 else ((0, 0),)
    warpgroup = lax.axis_index("warpgroup")

    def position(t):
        """Row and column of this block's t-th tile, and the index list of its rows."""
        i, j = plgpu.planar_snake(first_tile + t * tile_stride, (m_tiles, n_tiles), 0, config.group)
        return i * tile.block_m, j * tile.block_n, lax.div(i * tile.block_m, rows)

    def count(t):
        """Entries of the t-th tile's list. Loaded a tile ahead: nothing else hides the latency of a short tile."""
        return counts_gmem[position(jnp.minimum(t, own_tiles - 1))[2]]

    def each_tile(body, init):
        """Loop over this block's tiles: `body(t, count of tile t, carry) -> carry`."""

        def step(t, carry):
            this_count, carry = carry
            return count(t + 1), body(t, this_count, carry)

        return lax.fori_loop(0, own_tiles, step, (count(jnp.int32(0)), init))[1]

    @pl.when(warpgroup == pipeline.CONSUMERS)
    def _produce():
        plgpu.set_max_registers(pipeline.PRODUCER_REGISTERS, action="decrease")
        gather_rows = sread.gather_rows_interpreted if interpret else sread.gather_rows
        wait_copies = sread.wait_copies_interpreted if interpret else sread.wait_copies
        producer = pipeline.Producer(tile=tile, full=full, empty=empty, wait_copies=wait_copies)

        def stage_index(t, chunk, slot):
            _, _, block = position(t)
            entries = indices_gmem.at[block, pl.ds(chunk * CHUNK, CHUNK)]
            plgpu.copy_gmem_to_smem(entries, index_smem.at[slot], staged.at[slot])

        def tile_body(t, count, carry):
            m0, n0, _ = position(t)
            chunks = jnp.maximum(pl.cdiv(count, CHUNK), 1)  # an empty list has a chunk too: one rule for what is next

            def chunk_body(chunk, carry):
                g, q = carry
                slot, last = lax.rem(q, 2), chunk == chunks - 1
                next_t, next_chunk = jnp.where(last, t + 1, t), jnp.where(last, 0, chunk + 1)
                pl.when(next_t < own_tiles)(lambda: stage_index(next_t, next_chunk, 1 - slot))
                plgpu.barrier_wait(staged.at[slot])
                left = count - chunk * CHUNK

                def step(s, g):
                    def copy(stage, a_term, b_term):
                        a = sread.Source(gmem=a_gmem, smem=a_smem.at[stage], first_row=a_term * k, first_col=m0)
                        b = sread.Source(gmem=b_gmem, smem=b_smem.at[stage], first_row=b_term * k, first_col=n0)
                        first = s * pipeline.BLOCK_K
                        gather_rows((a, b), index_smem.at[slot], left - first, first)

                    for a_term, b_term in products:
                        g = producer.fill(g, functools.partial(copy, a_term=a_term, b_term=b_term))
                    return g

                steps = pl.cdiv(jnp.clip(left, 0, CHUNK), pipeline.BLOCK_K)
                return lax.fori_loop(0, steps, step, g), q + 1

            return lax.fori_loop(0, chunks, chunk_body, carry)

        stage_index(jnp.int32(0), jnp.int32(0), 0)
        g, _ = each_tile(tile_body, (jnp.int32(0), jnp.int32(0)))
        producer.drain(g)

    @pl.when(warpgroup < pipeline.CONSUMERS)
    def _consume():
        plgpu.set_max_registers(pipeline.CONSUMER_REGISTERS, action="increase")

        def multiply(g, stages):
            """The sum of `stages` stages from number g on, and the number of the next."""

            def add_stages(acc):
                g_next = pipeline.consume(
                    tile, warpgroup, g, stages, acc, a_smem=a_smem, b_smem=b_smem, full=full, empty=empty
                )
                return acc[...], g_next

            return pl.run_scoped(add_stages, plgpu.ACC(tile.consumer_shape))

        def multiply_float32(g, steps):
            # The tensor core truncates each time it adds to its accumulator: over a long k that would cost digits.
            def step(_, carry):
                total, g = carry
                products_sum, g = multiply(g, len(products))
                return total + products_sum, g

            zeros = plgpu.layout_cast(jnp.zeros(tile.consumer_shape, jnp.float32), plgpu.Layout.WGMMA)
            return lax.fori_loop(0, steps, step, (zeros, g))

        def tile_body(t, count, g):
            m0, n0, _ = position(t)
            steps = pl.cdiv(count, pipeline.BLOCK_K)
            acc, g = multiply(g, steps) if terms == 1 else multiply_float32(g, steps)
            m1, n1 = tile.consumer_origin(warpgroup)
            swrite.store(acc, out_gmem, out_smem.at[warpgroup], m0 + m1, n0 + n1)
            return g

        each_tile(tile_body, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


def _dense_tile(config: Config) -> pipeline.DenseTile:
    return pipeline.DenseTile(
        block_m=config.block_m, block_n=config.block_n, stages=config.stages, out_slots=config.out_slots
    )


def _split(x: Float[Array, "K cols"]) -> BFloat16[Array, "3*K cols"]:
    """Three bfloat16 terms of a float32 matrix, stacked by rows; they add up to it exactly from 2**-102 on.

    A term is the upper 16 bits of what is left. Plain casts would not do: XLA may drop a round trip to bfloat16.
    """
    x = jnp.where(jnp.isnan(x), jnp.nan, x)  # whose payload is in the upper bits
    terms = []
    for _ in range(3):
        bits = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000)
        term = lax.bitcast_convert_type(bits, jnp.float32)
        terms.append(term.astype(jnp.bfloat16))
        x = jnp.where(jnp.isfinite(x), x - term, 0)
    return jnp.concatenate(terms)


def mosaic(
    a_t: Float[Array, "K M"], b: Float[Array, "K N"], index: MicroTileIndex, config: Config, interpret: bool
) -> Float[Array, "M N"]:
    """Launches the kernel; `interpret` runs it on CPU under the race detector."""
    m, n = a_t.shape[1], b.shape[1]
    out_dtype = a_t.dtype
    # Rows must start on 16 bytes: pad to 8 elements (a copy, only where 8 does not divide M or N).
    a_t, b = (jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8))) for x in (a_t, b))
    indices = jnp.pad(index.indices, ((0, 0), (0, -index.indices.shape[1] % 4)))
    terms = 3 if out_dtype == jnp.float32 else 1
    if terms > 1:
        a_t, b = _split(a_t), _split(b)
    tile = _dense_tile(config)
    tiles = pl.cdiv(m, tile.block_m) * pl.cdiv(n, tile.block_n)
    kernel = plgpu.kernel(
        functools.partial(_gather_matmul_kernel, config=config, rows=index.rows, terms=terms, interpret=interpret),
        # TMA clips at the matrix's end, but only in whole swizzle atoms: the slice below is free where they fit.
        out_type=jax.ShapeDtypeStruct((m + -m % 8, n + -n % swrite.COLUMNS), out_dtype),
        grid=(min(tiles, 2 if interpret else device.sm_count()),),  # every block has a tile
        grid_names=("sm",),
        num_threads=pipeline.WARPGROUPS,
        thread_name="warpgroup",
        scratch_types=tile.scratch(a_t.dtype)
        | {
            "out_smem": swrite.scratch(tile, out_dtype),
            "index_smem": plgpu.SMEM((2, CHUNK), jnp.int32),
            "staged": plgpu.Barrier(num_arrivals=1, num_barriers=2),
        },
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
        kernel_name="gather_matmul",
    )
    return kernel(a_t, b, indices, index.counts)[:m, :n]


def _stages(block_m: int, block_n: int, out_slots: int, dtype: jnp.dtype) -> int:
    """As many stages as shared memory holds beside the output buffers and the index, up to 6."""
    tile = pipeline.DenseTile(block_m=block_m, block_n=block_n, stages=1, out_slots=out_slots)
    out_bytes = pipeline.CONSUMERS * out_slots * tile.consumer_shape[0] * swrite.COLUMNS * jnp.dtype(dtype).itemsize
    left = pipeline.SMEM_BYTES - out_bytes - 2 * CHUNK * 4 - 1024
    return min(6, left // (pipeline.BLOCK_K * (block_m + block_n) * 2))


def _block_ns(block_m: int, dtype: jnp.dtype) -> tuple[int, ...]:
    """Widths of a tile whose accumulators fit the registers; float32 keeps two of them."""
    return (128,) if dtype == jnp.float32 and block_m == 128 else (256, 128)


def candidates(a_t, b, index: MicroTileIndex) -> list[Config]:
    """Configs worth timing for these arguments (shapes are enough); the heuristic's choice comes first."""
    configs = []
    for block_m in (x for x in (128, 64) if index.rows % x == 0):
        block_ns = [x for x in _block_ns(block_m, a_t.dtype) if x <= max(128, b.shape[1])]
        if 2 * pl.cdiv(a_t.shape[1], block_m) * pl.cdiv(b.shape[1], block_ns[0]) < HOPPER_SMS:
            block_ns.reverse()  # narrow tiles first where wide ones would leave half of the SMs idle
        for block_n in block_ns:
            columns = pipeline.DenseTile(block_m=block_m, block_n=block_n, stages=1, out_slots=1).consumer_shape[1]
            for out_slots in sorted({min(2, columns // swrite.COLUMNS), columns // swrite.COLUMNS}):
                stages = _stages(block_m, block_n, out_slots, a_t.dtype)
                shape = {"block_m": block_m, "block_n": block_n, "stages": stages, "out_slots": out_slots}
                configs += [Config(**shape, group=group) for group in (32, 8)]
    return configs


def check_support(index: MicroTileIndex, devices: tuple[str, ...] | None) -> None:
    """Raises NotImplementedError where the kernel cannot take this granularity, or the device is none of `devices`."""
    if index.rows % 64 != 0:
        raise NotImplementedError(f"the Mosaic kernel needs rows in multiples of 64; got rows={index.rows}")
    if devices is not None:
        device.require_device("gather_matmul", devices)


def check_config(config: Config, a_t, index: MicroTileIndex) -> None:
    """Raises ValueError where a config does not fit the kernel or these arguments."""
    if config.block_m not in (64, 128) or index.rows % config.block_m:
        raise ValueError(f"block_m must be 64 or 128 and divide rows; got block_m={config.block_m}, rows={index.rows}")
    if config.block_n not in _block_ns(config.block_m, a_t.dtype):
        rule = f"block_n must be in {_block_ns(config.block_m, a_t.dtype)} for {a_t.dtype}, block_m={config.block_m}"
        raise ValueError(f"{rule}; got block_n={config.block_n}")
    copies = _dense_tile(config).consumer_shape[1] // swrite.COLUMNS
    if config.out_slots < 1 or copies % config.out_slots:
        raise ValueError(f"out_slots must divide the {copies} copies of a consumer; got out_slots={config.out_slots}")
    most = _stages(config.block_m, config.block_n, config.out_slots, a_t.dtype)
    if not 2 <= config.stages <= most:
        raise ValueError(f"stages must be 2 to {most} for this tile; got stages={config.stages}")
    if config.group < 1:
        raise ValueError(f"group must be at least 1; got group={config.group}")
