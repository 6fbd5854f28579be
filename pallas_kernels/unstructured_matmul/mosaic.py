"""The Mosaic GPU kernels of `unstructured_matmul` for Hopper: what is launched; `device` says what a thread does.

A lane decodes the 32 elements of a block that are its own by their position among those stored: every element is looked
at, whatever the density, by one load of 16 bits from a bank that is the lane's own.

Instructions a warp and block of 16 x 64, 32 elements a lane (counted by ncu for 8 columns of x at 80% zeros, in the
variant with mma):

    dp4a (IDP.4A): 30 places, 16 selectors    46    at 64 lanes a clock and SM
    LDS.U16, a bank for each lane             32    at 32
    PRMT, LOP3, SHF                           40    at 64
    mask words, ring, waits, loop, uniform   ~64
    all                                      182    at 128: 38 us of 28672 x 7168, and 45 with the start and the end

It took 61: a third of the clocks find no warp that is ready (67% of the issue slots are used, memory at 2.0 TB/s; at
50% zeros 3.6). Microseconds of 28672 x 7168 at 50% and 80% zeros, weights in memory, for 8 and
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
on to other strips; and XLA adds up the slots, 2 us. So small matrices gain least: 7168 x 7168 at 70% zeros took 28.6 us
for 16 columns, cuBLAS 30.7. A section had 16 blocks then, as in all times here: 98 multiprocessors had two of them for
each of 16 strips, or 131 three for each of 8. Of 8 blocks, 131 have three for each of 16: not timed yet.

With more than 64 columns x is multiplied 64 at a time; with more than 128 a second kernel writes the dense matrix, and
cuBLAS multiplies it. Reckoned, not timed: it reads 0.12 and writes 0.41 GB of 28672 x 7168, 130 us of memory, where two
passes take 200 and the dense product of 256 columns 120.
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
from pallas_kernels.unstructured_matmul.config import EXPAND_N, MAX_N, TILE_N, WARPS, Config, tiles
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


def _interpreted(work: Work, block, warpgroup, inputs, like: UnstructuredWeights, write) -> None:
    """What a warpgroup writes in `device`, for the interpreter: `write(part, strip, w)` for each of its strips, dense.

    A part is the group, its first and last section, and the block's slot of the group.
    """
    values, masks, rows, lags = (ref[...] for ref in inputs[:4])
    weights = UnstructuredWeights(
        values=values, masks=masks, rows=rows, lags=lags, scales=None, shape=like.shape, dtype=like.dtype
    )  # fmt: skip
    starts = block_starts(weights)
    start = block * work.units
    end = jnp.minimum(start + work.units, work.sections * work.groups) - 1

    def write_part(group, _):
        first = jnp.where(group == start // work.sections, start % work.sections, 0)
        last = jnp.where(group == end // work.sections, end % work.sections, work.sections - 1)
        part = group, first, last, block - group * work.sections // work.units
        for number in range(WARPS):
            strip = group * work.config.warps + warpgroup * WARPS + number

            @pl.when(strip < work.strips)
            def _write(strip=strip):
                write(part, strip, decode(weights, *(lax.dynamic_slice_in_dim(a, strip, 1) for a in (masks, starts))))

    lax.fori_loop(start // work.sections, end // work.sections + 1, write_part, None)


def _multiply_interpreted(work: Work, inputs, outputs, part, strip, w) -> None:
    """The sums of a strip, as `device.multiply` writes them."""
    _, first, last, slot = part
    x = from_wgmma(inputs[4][...])[: work.blocks * layout.BLOCK]
    section = jnp.arange(x.shape[0], dtype=jnp.int32) // (layout.SECTION * layout.BLOCK)
    y = product(w, jnp.where(((section >= first) & (section <= last))[:, None], x, jnp.zeros((), x.dtype)))
    place = pl.ds(strip * layout.STRIP, layout.STRIP)
    outputs[0][slot, place] = y
    for empty in range(1, work.slots):

        @pl.when((last == work.sections - 1) & (empty > slot))
        def _write_zeros(empty=empty):
            outputs[0][empty, place] = jnp.zeros_like(y)


def _expand_interpreted(work: Work, inputs, outputs, part, strip, w) -> None:
    """The part's blocks of a strip, as `device.expand` writes them."""
    del inputs

    def write_block(block, _):
        at = block * layout.BLOCK
        own = lax.dynamic_slice_in_dim(w, at, layout.BLOCK, axis=1)
        outputs[0][pl.ds(strip * layout.STRIP, layout.STRIP), pl.ds(at, layout.BLOCK)] = own

    _, first, last, _ = part
    end = jnp.minimum((last + 1) * layout.SECTION, work.blocks)
    lax.fori_loop(first * layout.SECTION, end, write_block, None)


def divide(weights: UnstructuredWeights, n: int, config: Config, blocks: int) -> Work:
    """Equal runs of units for so many blocks; of x there are n columns, or none if it is to be dense."""
    strips, in_strip, _ = weights.masks.shape
    units = layout.sections(in_strip) * pl.cdiv(strips, config.warps)
    return Work(
        strips=strips,
        blocks=in_strip,
        tiles=tiles(n),
        config=config,
        units=pl.cdiv(units, blocks),
        dtype=weights.values.dtype.name,
    )


@lowered_once()
def mosaic(
    weights: UnstructuredWeights, x: Float[Array, "in n"], config: Config, interpret: bool
) -> Float32[Array, "out n"]:
    """Launches the kernels; `interpret` runs them on CPU under the race detector."""
    n = x.shape[1]
    if n > EXPAND_N:
        return product(expand(weights, config, interpret), x)
    parts = [multiply(weights, x[:, i : i + MAX_N], config, interpret) for i in range(0, n, MAX_N)]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def multiply(
    weights: UnstructuredWeights, x: Float[Array, "in n"], config: Config, interpret: bool
) -> Float32[Array, "out n"]:
    """The product with `MAX_N` columns at most: what the blocks found, added up."""
    work = divide(weights, x.shape[1], config, _blocks(interpret))
    shape = (work.slots, work.strips * layout.STRIP, work.tiles * TILE_N)
    slots = _launch(
        "unstructured_matmul",
        work,
        weights,
        [for_wgmma(x, work.padded_blocks)],
        jax.ShapeDtypeStruct(shape, jnp.float32),
        (device.multiply, jnp.float32, _multiply_interpreted),
        interpret,
    )
    return functools.reduce(jnp.add, slots)[: weights.shape[0], : x.shape[1]]


@lowered_once()
def expand(weights: UnstructuredWeights, config: Config, interpret: bool) -> Float[Array, "out in"]:
    """The dense matrix."""
    work = divide(weights, 0, config, _blocks(interpret))
    out = jax.ShapeDtypeStruct((work.strips * layout.STRIP, work.blocks * layout.BLOCK), weights.values.dtype)
    kernel = (device.expand, jnp.uint32, _expand_interpreted)
    dense = _launch("unstructured_expand", work, weights, [], out, kernel, interpret)
    return dense[: weights.shape[0], : weights.shape[1]]


def _blocks(interpret: bool) -> int:
    return INTERPRETED_BLOCKS if interpret else tile_device.sm_count()


def _launch(name: str, work: Work, weights, more: list, out: jax.ShapeDtypeStruct, kernel: tuple, interpret: bool):
    """What a kernel writes.

    Args:
        name: to profilers.
        work: how it is divided.
        weights: what is decoded.
        more: arrays that it reads beside them.
        out: what it writes.
        kernel: the device's function, the elements that it writes at a time, and what stands in for the interpreter.
        interpret: on CPU, under the race detector.
    """
    on_device, written, interpreted = kernel
    smem = pipelines.shared_memory(work)
    inputs = [weights.values, weights.masks, weights.rows, weights.lags, *more]

    def body(*refs):
        block = lax.axis_index("block")
        if interpret:
            inputs_outputs = refs[: len(inputs)], refs[len(inputs) :]
            write = functools.partial(interpreted, work, *inputs_outputs)
            _interpreted(work, block, lax.axis_index("warpgroup"), inputs_outputs[0], weights, write)
            return

        @plgpu.inline_mgpu(arg_types=(tuple(plgpu.RefType() for _ in refs), plgpu.Layout.WG_SPLAT))
        def run(ctx, refs, block):
            del ctx
            dtypes = [*(a.dtype for a in inputs), written]
            gmem = [lane.Array.of(ref, dtype, lane.GMEM) for ref, dtype in zip(refs, dtypes, strict=False)]
            scratch = [lane.Array.of(ref, jnp.int32, lane.SMEM) for ref in refs[len(dtypes) :]]
            own_block = lane.Int(block.registers.item())
            on_device(work, own_block, gmem[:-1], gmem[-1:], dict(zip(smem, scratch, strict=True)))

        run(refs, block)  # pyright: ignore[reportCallIssue]

    launch = plgpu.kernel(
        body,
        out_type=(out,),
        scratch_types=() if interpret else [plgpu.SMEM((size,), jnp.int32) for size in smem.values()],
        grid=(work.grid,),
        grid_names=("block",),
        num_threads=work.config.warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
        kernel_name=name,
    )
    return launch(*inputs)[0]
