"""The Mosaic GPU kernel of `unstructured_matmul` for Hopper: what is launched; `device` says what a thread does.

A lane decodes the 32 elements of a block that are its own by their position among those stored: every element is looked
at, whatever the density, by one load of 16 bits from a bank that is the lane's own.

Instructions a warp and block of 16 x 64, 32 elements a lane (SASS of 8 columns of x at 80% zeros, counted by ncu):

    dp4a (IDP.4A): 30 places, 16 selectors    46    at 64 lanes a clock and SM
    LDS.U16, a bank for each lane             32    at 32
    PRMT, LOP3, SHF                           40    at 64
    mask words, ring, waits, loop, uniform   ~64
    all                                      182    at 128: 38 us of 28672 x 7168, and 45 with the start and the end

It takes 64: a third of the clocks find no warp that is ready (ncu: 67% of the issue slots are used, no pipe above 60%,
memory at 2.0 TB/s; at 50% zeros 3.6). Microseconds of 28672 x 7168 at 50% and 80% zeros, weights in memory, for 8 and
for 32 columns of x; the dense product takes 104 and 106 by cuBLAS:

    this, 5 pieces a ring                                  74 / 68      87 / 80
    this, 4 pieces (no division by 5)                      80 / 64      90 / 74
    one block a step of the loop, mma, 4 pieces            79 / 66
        a mask word that is carried on is waited for in every block: the latency of L2
    four blocks a step, mma                                74 / 61      91 / 84
        each warp loads x for itself, which wgmma reads once for four
    20 warps, 4 pieces                                     82 / 68
    12 warps, 7 pieces                                     81 / 75      93 / 88
    8 warps of two strips, mma                             86 / 72     104 / 91
    two blocks decoded before they are multiplied          75 / 67      89 / 79
In CUDA C++ with one block a step: places by shift and add 6% slower, by IMAD prefix sums 10%, zeros by sign masks 3%,
pieces of 8 rows 9%; without any decoding 12% quicker, so the loop's latencies are what there was to win.

Decoders that lost on paper: value + location, scattered by lane into a zeroed tile (at 80%, 11 steps, as the fullest of
32 lanes has 11 of its 32 elements, and 32 wavefronts to clear and read the tile: 48 a block where this takes 32); 2:4
mma.sp and an overflow of value + location (1.5 bytes an element at 50%, a roof of 1.33x where 1.77x is).

Beside these: a block begins with the offsets, the first values and the first decode, some 3 us, once more where it goes
on to other strips; and XLA adds up the slots, 2 us.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Shaped

from pallas_kernels.tile import device as tile_device
from pallas_kernels.tile import lane
from pallas_kernels.tile.launch import lowered_once
from pallas_kernels.unstructured_matmul import device, layout, pipelines
from pallas_kernels.unstructured_matmul.config import TILE_N, WARPS, Config, tiles
from pallas_kernels.unstructured_matmul.division import Work
from pallas_kernels.unstructured_matmul.reference import product
from pallas_kernels.unstructured_matmul.weights import UnstructuredWeights, block_starts, decode

INTERPRETED_BLOCKS = 2


def for_wgmma(x: Shaped[Array, "in n"], blocks: int) -> Shaped[Array, "blocks 8 tiles 8 8"]:
    """x as wgmma's B without a swizzle: core matrices of 8 columns by 8 rows, those of the same rows side by side."""
    rows, n = x.shape
    x = jnp.pad(x, ((0, blocks * layout.BLOCK - rows), (0, tiles(n) * TILE_N - n)))
    return x.reshape(blocks, layout.BLOCK // 8, 8, tiles(n), TILE_N).transpose(0, 1, 3, 4, 2)


def from_wgmma(cores: Shaped[Array, "blocks 8 tiles 8 8"]) -> Shaped[Array, "padded columns"]:
    """The inverse of `for_wgmma`, padded."""
    blocks, n_tiles = cores.shape[0], cores.shape[2]
    return cores.transpose(0, 1, 4, 2, 3).reshape(blocks * layout.BLOCK, n_tiles * TILE_N)


def _interpreted(work: Work, block, warpgroup, inputs, outputs, like: UnstructuredWeights) -> None:
    """What a warpgroup writes in `device.multiply`, with plain reads and writes, for the interpreter."""
    values, masks, rows, lags, x_cores = (ref[...] for ref in inputs)
    weights = UnstructuredWeights(
        values=values, masks=masks, rows=rows, lags=lags, scales=None, shape=like.shape, dtype=like.dtype
    )  # fmt: skip
    starts, x = block_starts(weights), from_wgmma(x_cores)[: work.blocks * layout.BLOCK]
    start = block * work.units
    end = jnp.minimum(start + work.units, work.sections * work.groups) - 1
    columns = jnp.arange(x.shape[0], dtype=jnp.int32) // (layout.SECTION * layout.BLOCK)

    def write_part(group, _):
        first = jnp.where(group == start // work.sections, start % work.sections, 0)
        last = jnp.where(group == end // work.sections, end % work.sections, work.sections - 1)
        slot = block - group * work.sections // work.units
        own = jnp.where((columns >= first) & (columns <= last), 1, 0).astype(x.dtype)
        for number in range(WARPS):
            strip = group * work.config.warps + warpgroup * WARPS + number

            @pl.when(strip < work.strips)
            def _write(strip=strip):
                w = decode(weights, *(lax.dynamic_slice_in_dim(a, strip, 1) for a in (masks, starts)))
                y = product(w, jnp.where(own[:, None] > 0, x, jnp.zeros((), x.dtype)))
                place = pl.ds(strip * layout.STRIP, layout.STRIP)
                outputs[0][slot, place] = y
                for empty in range(1, work.slots):

                    @pl.when((last == work.sections - 1) & (empty > slot))
                    def _write_zeros(empty=empty):
                        outputs[0][empty, place] = jnp.zeros_like(y)

    lax.fori_loop(start // work.sections, end // work.sections + 1, write_part, None)


def divide(weights: UnstructuredWeights, x, config: Config, blocks: int) -> Work:
    """Equal runs of units for so many blocks."""
    strips, in_strip, _ = weights.masks.shape
    units = layout.sections(in_strip) * pl.cdiv(strips, config.warps)
    return Work(
        strips=strips,
        blocks=in_strip,
        tiles=tiles(x.shape[1]),
        config=config,
        units=pl.cdiv(units, blocks),
        dtype=x.dtype.name,
    )


@lowered_once()
def mosaic(
    weights: UnstructuredWeights, x: Float[Array, "in n"], config: Config, interpret: bool
) -> Float32[Array, "out n"]:
    """Launches the kernel and adds up its slots; `interpret` runs it on CPU under the race detector."""
    work = divide(weights, x, config, INTERPRETED_BLOCKS if interpret else tile_device.sm_count())
    smem = pipelines.shared_memory(work)
    inputs = [weights.values, weights.masks, weights.rows, weights.lags, for_wgmma(x, work.padded_blocks)]
    shape = (work.slots, work.strips * layout.STRIP, work.tiles * TILE_N)

    def body(*refs):
        block = lax.axis_index("block")
        if interpret:
            _interpreted(work, block, lax.axis_index("warpgroup"), refs[: len(inputs)], refs[len(inputs) :], weights)
            return

        @plgpu.inline_mgpu(arg_types=(tuple(plgpu.RefType() for _ in refs), plgpu.Layout.WG_SPLAT))
        def run(ctx, refs, block):
            del ctx
            dtypes = [*(a.dtype for a in inputs), jnp.float32]
            gmem = [lane.Array.of(ref, dtype, lane.GMEM) for ref, dtype in zip(refs, dtypes, strict=False)]
            scratch = [lane.Array.of(ref, jnp.int32, lane.SMEM) for ref in refs[len(dtypes) :]]
            own_block = lane.Int(block.registers.item())
            device.multiply(work, own_block, gmem[:-1], gmem[-1:], dict(zip(smem, scratch, strict=True)))

        run(refs, block)  # pyright: ignore[reportCallIssue]

    kernel = plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct(shape, jnp.float32),),
        scratch_types=() if interpret else [plgpu.SMEM((size,), jnp.int32) for size in smem.values()],
        grid=(work.grid,),
        grid_names=("block",),
        num_threads=config.warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
        kernel_name="unstructured_matmul",
    )
    return functools.reduce(jnp.add, kernel(*inputs)[0])[: weights.shape[0], : x.shape[1]]
