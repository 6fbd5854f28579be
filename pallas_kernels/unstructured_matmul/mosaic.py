"""The Mosaic GPU kernels of `unstructured_matmul` for Hopper: what is launched; `device` says what a thread does.

A lane decodes the 32 elements of a block that are its own by their position among those stored: every element is looked
at, whatever the density, by one load of 16 bits from a bank that is the lane's own.

Instructions a warp and block of 16 x 64, 32 elements a lane (counted by ncu for 8 columns of x at 80% zeros, in a
variant with mma, one block a step and x by cp.async):

    dp4a (IDP.4A): 30 places, 16 selectors    46    at 64 lanes a clock and SM
    LDS.U16, a bank for each lane             32    at 32
    PRMT, LOP3, SHF                           40    at 64
    mask words, ring, waits, loop, uniform   ~64
    all                                      182    at 128: 38 us of 28672 x 7168, and 45 with the start and the end

Paired, a place is a word, and a word a register (`decode_pairs`): 16 loads a block, 16 dp4a, 32 instructions to
put zeros where nothing is stored, half of the mask words and of the popcounts: 150 with wgmma for 16 columns, where
single elements take 182, for 1.5 times their bytes at 70% and 80% zeros.

Paired values of 8 bits take half the bytes, half-words that two lanes find in one bank, and 4 instructions each to
widen: with 4 pieces, 8 / 16 / 32 columns and 50% / 70% / 80% zeros, float8 took 56 / 61 / 65, 55 / 59 / 64 and
54 / 58 / 63 us of 28672 x 7168, int8 1 to 4 more; the bytes take 40, 29 and 22. What is decoded costs that, not memory.

Microseconds of 28672 x 7168 with 8, 16 and 32 columns of x, by zeros, of one run (`unstructured_spmm`); cuBLAS took
93 to 102, 94 and 95 in it, XLA's choice 99, 103 and 103:

                        50%               60%               70%               80%
    single        64 / 66 / 71      60 / 63 / 70      56 / 61 / 65      56 / 61 / 65
    paired        82 / 84 / 87      72 / 74 / 77      61 / 63 / 65      48 / 49 / 54
    bytes         56, paired 77     47, paired 66     37, paired 54     27, paired 40
  x by cp.async, as it was before, dense 96 to 102, 104 to 109 and 102 to 105:
    single        66 / 70 / 88      63 / 67 / 82      59 / 65 / 80      60 / 65 / 80
    paired        84 / 87 / 92      74 / 77 / 82      62 / 65 / 75      52 / 55 / 69

cp.async writes memory that wgmma reads through another proxy, so every step of x had a fence.proxy.async, which is a
MEMBAR that waits for all that is in flight, mask words too. By a tensor map x comes swizzled, on a barrier, without it;
and fewer instructions a quad of blocks (531 -> about 490 in pairs, for 32 columns): copies by an elected lane, no loop
over lanes; rows of a part's first and last section at an address of each lane's own, else ptxas keeps them in registers
that all share and waits for them where a part begins; a word of a pair loaded only where one is stored, in place of
PRMT and LOP. Then the wgmmas of two blocks begun together, whose four warps wait for one another half as often: 56.5 us
of 80% zeros with 32 columns became 54.1, 74.4 of 50% 71.9, 70% and 64 columns within 1 us. Tried on top and not taken:

    before that, with 8 / 16 / 32 columns (49.1 / 49.9 / 56.9): the next wgmma begun before the last is waited for, two
        sums of a lone tile, barriers of values found earlier: 48.9 / 50.2 / 62.0
    mma for 32 columns: 60.2 with 5 pieces and 58.5 with 4, where wgmma took 56.5 and 58.4
    a look at the ring for two blocks, not for each: 55.4 for 56.5, with two wgmmas 55.7 for 54.1, at 50% 2 to 3 us more

What paired ones spent at 80% zeros, by cp.async and before the ring went on from part to part (below), by leaving out
values ("v": not copied, not waited for), x, the tensor core ("t") and decoding ("d"):

                       all    v     x     t    v, t   v, x   x, t   x, t, d   v, x, t
    8 columns (mma)     54    34    52    52    31     31     51       50        28
    32 (wgmma)          70    54    61    60    39     40      -        -        29

With 8 columns that is the stream of values, 40 us at 4.3 TB/s, and 10 us around it: 2 to add up the slots, and the
start (offsets, then first values), which then came once more where a block goes on to other strips. With 32 it is x and
the tensor core as well: every multiprocessor reads all of x, 52 MB together, and a wgmma begins when the last of its
four warps is there (21% of the warps' time by ncu, with 16 columns). So up to 16 columns each warp multiplies by mma, 3
to 8 us quicker; with 32, as ldmatrix reads x for each warp and mma has half the rate, it is no quicker. Tried beside
that, with 80% zeros where none are named:

    wgmma waited for one block later                       0 to 1 us less
    the first piece of a ring repeated behind its end by its lanes, not by a second copy: 0 to 3 us more (wgmma), so
        the fifth of L2's bytes that second copies take does not matter
    x in two stages with a barrier of the block between    2 to 6 us more with 16 and 32 columns
    ring and steps of x begun anew with each part          5 to 7 us more at 50%, 4 to 5 in pairs; single 0 to 2
    x by bulk copies into padded columns, and mma for every n, no wgmma: 0 us with 8 and 16 columns at 50%; with 32, and
        4 pieces a ring, 4 us less at 50%, 1 at 80%, 3 in pairs; with 5, 6 to 16 more, as a step is one block then. Not
        taken: 64 columns, of which mma and ldmatrix take twice as long, were not timed

Before mma for few columns and x in steps, single elements, with 8 and 32 columns at 50% and 80% zeros:

    wgmma, 5 pieces a ring                                 74 / 68      87 / 80
    wgmma, 4 pieces (no division by 5)                     80 / 64      90 / 74
    one block a step of the loop, mma, 4 pieces            79 / 66
        a mask word that is carried on is waited for in every block: the latency of L2
    20 warps, 4 pieces                                     82 / 68
    12 warps, 7 pieces                                     81 / 75      93 / 88
    8 warps of two strips, mma                             86 / 72     104 / 91
    two blocks decoded before they are multiplied          75 / 67      89 / 79
In CUDA C++ with one block a step: places by shift and add 6% slower, by IMAD prefix sums 10%, zeros by sign masks 3%,
pieces of 8 rows 9%; without any decoding 12% quicker.

Decoders that lost on paper: value + location, scattered by lane into a zeroed tile (at 80%, 11 steps, as the fullest of
32 lanes has 11 of its 32 elements, and 32 wavefronts to clear and read the tile: 48 a block where this takes 32); 2:4
mma.sp and an overflow of value + location (1.5 bytes an element at 50%, a roof of 1.33x where 1.77x is).

Small matrices gain least, as what is around the stream of values stays: 7168 x 7168 at 70% zeros took 26.7 us for 16
columns, cuBLAS 30.7. Against that:

- Matrices that are alike and share x are multiplied in one launch (`unstructured_matmuls`): of three 7168 x 7168 a
  block has 9 units, not 3 three times, and its groups are in 3 slots, not 6.
- x is read as its columns lie, by a tensor map, in four steps of at most four blocks; the warp whose turn it is begins
  the copies of a step, when all have read the one in its place.
- The first mask words are loaded with the offsets, not after the first values. Both are loaded a part ahead, where a
  block goes on to other strips, as 93 of 131 do with 28672 x 7168; and their first values and x are copied while the
  last blocks of the part are multiplied.
- Sums are written column by column, as models have activations: to add up the slots transposes nothing.

With more than 64 columns x is multiplied 64 at a time; with more than 128 a second kernel writes the dense matrix, and
cuBLAS multiplies it. Reckoned, not timed: it reads 0.12 and writes 0.41 GB of 28672 x 7168, 130 us of memory, where two
passes take 200 and the dense product of 256 columns 120.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Shaped

from pallas_kernels.tile import device as tile_device
from pallas_kernels.tile import lane
from pallas_kernels.tile.launch import lowered_once
from pallas_kernels.unstructured_matmul import device, layout, pipelines, warp
from pallas_kernels.unstructured_matmul.config import CHUNK, EXPAND_N, MAX_N, TILE_N, WARPS, Config
from pallas_kernels.unstructured_matmul.division import Work
from pallas_kernels.unstructured_matmul.reference import product
from pallas_kernels.unstructured_matmul.weights import UnstructuredWeights, block_starts, decode

INTERPRETED_BLOCKS = 2


def by_column(x: Shaped[Array, "in n"]) -> Shaped[Array, "n columns"]:
    """x as the kernel reads it: each column's elements side by side, in whole chunks."""
    return jnp.pad(x.T, ((0, 0), (0, -x.shape[0] % CHUNK)))


def _interpreted(work: Work, block, warpgroup, inputs, write) -> None:
    """What a warpgroup writes in `device`, for the interpreter: `write(part, strip, w)` for each of its strips, dense.

    A part is the matrix, its first and last section, and the block's slot of the group.
    """
    arrays = [ref[...] for ref in inputs[: 4 * work.matrices]]
    start = block * work.units
    end = jnp.minimum(start + work.units, work.sections * work.groups) - 1

    def write_part(group, _):
        first = jnp.where(group == start // work.sections, start % work.sections, 0)
        last = jnp.where(group == end // work.sections, end % work.sections, work.sections - 1)
        part = group // work.own_groups, first, last, block - group * work.sections // work.units
        for matrix in range(work.matrices):
            weights = _weights(work, arrays[matrix :: work.matrices])
            starts = block_starts(weights)
            for number in range(WARPS):
                strip = (group % work.own_groups) * work.config.warps + warpgroup * WARPS + number

                @pl.when((group // work.own_groups == matrix) & (strip < work.strips))
                def _write(strip=strip, matrix=matrix, weights=weights, starts=starts):
                    own = (lax.dynamic_slice_in_dim(a, strip, 1) for a in (weights.masks, starts))
                    write(part, strip, decode(weights, *own).astype(work.dtype))

    lax.fori_loop(start // work.sections, end // work.sections + 1, write_part, None)


def _weights(work: Work, arrays) -> UnstructuredWeights:
    """Of these arrays; as far as decoding needs it."""
    values, masks, rows, lags = arrays
    return UnstructuredWeights(
        values=values,
        masks=masks,
        rows=rows,
        lags=lags,
        scales=None,
        shape=(work.strips * layout.STRIP, work.blocks * layout.BLOCK),
        dtype=jnp.dtype(work.dtype),
        paired=work.paired,
    )


def _multiply_interpreted(work: Work, inputs, outputs, part, strip, w) -> None:
    """The sums of a strip, as `device.multiply` writes them."""
    matrix, first, last, slot = part
    x = inputs[-1][...].T.astype(jnp.float32)
    x = jnp.pad(x, ((0, work.blocks * layout.BLOCK - work.columns), (0, work.tiles * TILE_N - work.n)))
    section = jnp.arange(x.shape[0], dtype=jnp.int32) // (layout.SECTION * layout.BLOCK)
    y = product(w, jnp.where(((section >= first) & (section <= last))[:, None], x, jnp.zeros((), x.dtype)))
    place = pl.ds(strip * layout.STRIP, layout.STRIP)
    outputs[0][slot, matrix, :, place] = y.T
    for empty in range(1, work.slots):

        @pl.when((last == work.sections - 1) & (empty > slot))
        def _write_zeros(empty=empty):
            outputs[0][empty, matrix, :, place] = jnp.zeros_like(y.T)


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


def divide(weights: Sequence[UnstructuredWeights], n: int, config: Config, blocks: int) -> Work:
    """Equal runs of units for so many blocks; of x there are n columns, or none if a matrix is to be dense."""
    strips, in_strip = weights[0].strips, weights[0].blocks
    units = layout.sections(in_strip) * len(weights) * pl.cdiv(strips, config.warps)
    return Work(
        matrices=len(weights),
        strips=strips,
        blocks=in_strip,
        columns=pl.cdiv(weights[0].shape[1], CHUNK) * CHUNK,
        n=n,
        config=config,
        units=pl.cdiv(units, blocks),
        values=weights[0].values.dtype.name,
        dtype=weights[0].dtype.name,
        paired=weights[0].paired,
    )


@lowered_once()
def mosaic(
    weights: tuple[UnstructuredWeights, ...], x: Float[Array, "in n"], config: Config, interpret: bool
) -> list[Float32[Array, "out n"]]:
    """The products without scales, all matrices in one launch; `interpret` is on CPU under the race detector."""
    n = x.shape[1]
    weights = tuple(widened(matrix) for matrix in weights)
    if n > EXPAND_N:
        return [product(expand(matrix, config, interpret), x) for matrix in weights]
    parts = [multiply(weights, x[:, i : i + MAX_N], config, interpret) for i in range(0, n, MAX_N)]
    return [own[0] if len(own) == 1 else jnp.concatenate(own, axis=1) for own in zip(*parts, strict=True)]


def widened(weights: UnstructuredWeights) -> UnstructuredWeights:
    """Without scales; single values of 8 bits as what they are in the dtype of x, exactly: by XLA, before the launch.

    Paired ones the kernel widens itself, as it has them in its registers.
    """
    values = weights.values if weights.paired else weights.values.astype(weights.dtype)
    return dataclasses.replace(weights, values=values, scales=None)


def multiply(
    weights: Sequence[UnstructuredWeights], x: Float[Array, "in n"], config: Config, interpret: bool
) -> list[Float32[Array, "out n"]]:
    """Each product with `MAX_N` columns at most: what the blocks found, added up.

    Of tokens' activations both x and the results are transposes, which cancel out with those here.
    """
    work = divide(weights, x.shape[1], config, _blocks(interpret))
    shape = (work.slots, work.matrices, work.tiles * TILE_N, work.strips * layout.STRIP)
    slots = _launch(
        "unstructured_matmul",
        work,
        weights,
        [by_column(x)],
        jax.ShapeDtypeStruct(shape, jnp.float32),
        (device.multiply, jnp.float32, _multiply_interpreted),
        interpret,
    )
    sums = functools.reduce(jnp.add, slots)
    return [own[: x.shape[1], : matrix.shape[0]].T for own, matrix in zip(sums, weights, strict=True)]


@lowered_once()
def expand(weights: UnstructuredWeights, config: Config, interpret: bool) -> Float[Array, "out in"]:
    """The dense matrix, without its scales."""
    weights = widened(weights)
    work = divide([weights], 0, config, _blocks(interpret))
    out = jax.ShapeDtypeStruct((work.strips * layout.STRIP, work.blocks * layout.BLOCK), weights.dtype)
    kernel = (device.expand, jnp.uint32, _expand_interpreted)
    dense = _launch("unstructured_expand", work, [weights], [], out, kernel, interpret)
    return dense[: weights.shape[0], : weights.shape[1]]


def _blocks(interpret: bool) -> int:
    return INTERPRETED_BLOCKS if interpret else tile_device.sm_count()


def _launch(name: str, work: Work, weights, more: list, out: jax.ShapeDtypeStruct, kernel: tuple, interpret: bool):
    """What a kernel writes.

    Args:
        name: to profilers.
        work: how it is divided.
        weights: the matrices.
        more: arrays that it reads beside them.
        out: what it writes.
        kernel: the device's function, the elements that it writes at a time, and what stands in for the interpreter.
        interpret: on CPU, under the race detector.
    """
    on_device, written, interpreted = kernel
    smem = pipelines.shared_memory(work)
    arrays = [[w.values, w.masks, w.rows, w.lags] for w in weights]
    inputs = [*itertools.chain(*zip(*arrays, strict=True)), *more]  # all values, then all masks

    def body(*refs):
        block = lax.axis_index("block")
        if interpret:
            inputs_outputs = refs[: len(inputs)], refs[len(inputs) :]
            write = functools.partial(interpreted, work, *inputs_outputs)
            _interpreted(work, block, lax.axis_index("warpgroup"), inputs_outputs[0], write)
            return

        @plgpu.inline_mgpu(arg_types=(tuple(plgpu.RefType() for _ in refs), plgpu.Layout.WG_SPLAT))
        def run(ctx, refs, block):
            dtypes = [*(a.dtype for a in inputs), written]
            gmem = [lane.Array.of(ref, dtype, lane.GMEM) for ref, dtype in zip(refs, dtypes, strict=False)]
            scratch = [lane.Array.of(ref, jnp.int32, lane.SMEM) for ref in refs[len(dtypes) :]]
            own_block = lane.Int(block.registers.item())
            of_x = refs[len(inputs) - len(more) : len(inputs)]
            copies = [functools.partial(warp.copy_tile, ctx, ref, work.tiles * TILE_N) for ref in of_x]
            on_device(work, own_block, gmem[:-1], gmem[-1:], dict(zip(smem, scratch, strict=True)), *copies)

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
