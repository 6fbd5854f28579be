"""The dense tile over groups of rows: out[to(s)] = epilogue(A[from(s)] @ B[e]) for every slot s of every group e.

`grouped_matmul`, `scatter_matmul` and `sampled_matmul` are this one kernel: a group is an expert's tokens, or a list
of a `MicroTileIndex`. Rows of A are gathered (SRead) 64 or 128 at a time, the tile of B comes by TMA, and what they
give is stored row by row where it belongs (SWrite). Persistent blocks walk the tiles of all groups, group by group; how
many each has lives on the device. Within a group tiles are walked down a few rows of tiles at a time and then across,
so that a tile of B is read from memory once and A stays in L2.

Measured on an H200 in bfloat16. Grouped: 16 groups of 16384x2048x8192 758 us (726 TFLOP/s; `group` 4: 775, 16: 770;
tiles of 128x128: 860), gathered and scattered 777; Mixtral at 4096 tokens 2766 and 1359 us (696 and 708 TFLOP/s;
`group` 12 to 16: 5% less); 4 tokens an expert, 256 experts of 768x3072: 282 to 290 us, 96% of the weights' bytes.
Tokens on the N side of wgmma were not needed for that: the products of 64 mostly absent rows hide behind the weights.
GELU by `lax.erf` costs about 15 us of 48 where K is 512 (4608 rows to 2048 columns), as in `epilogue` 11. A bias: 3.
One list of whole rows at 4096 cubed, 0 / 50 / 90 / 99%: 198 / 113 / 48 / 44 us, of which XLA's zeros take 21 (a plain
write would take 8); few rows then walk all of K in a handful of blocks: splitting K would help them.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.operands import result_dtype
from pallas_kernels.tile import device, epilogue, gathered, pipeline, rows, swrite
from pallas_kernels.tile.gathered import Gathered
from pallas_kernels.tile.row_tiling import STEP_BYTES, Geometry, is_promoted
from pallas_kernels.tile.split import split


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Groups:
    """Which rows a group takes and where its results go. Slots of a group are consecutive entries.

    Attributes:
        starts: the first slot of each group, int32 [groups].
        counts: how many it has, int32 [groups].
        reads: row of A of each slot, int32 [slots]; None: row s.
        writes: row of the result of each slot; None: row s.
        write_starts: slots of a group count from here on where results go; None: from `starts`.
        ends: rows of tiles, of `block_m` slots each, up to and with each group's; None: found from `counts`.
    """

    starts: Int32[Array, " groups"]
    counts: Int32[Array, " groups"]
    reads: Int32[Array, " slots"] | None
    writes: Int32[Array, " slots"] | None
    write_starts: Int32[Array, " groups"] | None = None
    ends: Int32[Array, " groups"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tile:
    """Where a tile lies.

    Attributes:
        group: its group.
        first, first_write: its first slot, and the same for where results go.
        left: slots of the group from there on.
        n0: its first column.
    """

    group: jax.Array
    first: jax.Array
    first_write: jax.Array
    left: jax.Array
    n0: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Walk:
    """The tiles of a persistent block, in one order for producer and consumers.

    Attributes:
        ends_gmem: rows of tiles up to and with each group's.
        starts_gmem, counts_gmem, write_starts_gmem: as in `Groups`.
    """

    geometry: Geometry
    ends_gmem: Any
    starts_gmem: Any
    counts_gmem: Any
    write_starts_gmem: Any

    def own_tiles(self) -> jax.Array:
        tiles = self.ends_gmem[self.ends_gmem.shape[0] - 1] * self.geometry.tiles_across
        return pl.cdiv(tiles - lax.axis_index("sm"), lax.axis_size("sm"))

    def _group(self, row: jax.Array) -> jax.Array:
        """The group of a row of tiles: how many groups end before it, by binary search."""
        groups = self.ends_gmem.shape[0]
        before = jnp.int32(0)
        for bit in reversed(range((groups - 1).bit_length())):
            more = before + (1 << bit)
            ends = self.ends_gmem[jnp.minimum(more, groups) - 1]
            before = jnp.where((more < groups) & (ends <= row), more, before)
        return before

    def tile(self, t: jax.Array) -> _Tile:
        """This block's t-th tile."""
        config, across = self.geometry.config, self.geometry.tiles_across
        number = lax.axis_index("sm") + t * lax.axis_size("sm")
        group = self._group(lax.div(number, across))
        begin = jnp.where(group > 0, self.ends_gmem[jnp.maximum(group - 1, 0)], 0)
        first = lax.div(number - begin * across, config.group * across) * config.group
        rows = jnp.minimum(config.group, self.ends_gmem[group] - begin - first)
        number -= (begin + first) * across
        i, j = first + lax.rem(number, rows), lax.div(number, rows)
        slot = i * config.block_m
        return _Tile(
            group=group,
            first=self.starts_gmem[group] + slot,
            first_write=self.write_starts_gmem[group] + slot,
            left=self.counts_gmem[group] - slot,
            n0=j * self.geometry.block_columns,
        )

    def steps(self, tile: _Tile) -> jax.Array:
        """Of `block_k`, of a tile."""
        geometry = self.geometry
        further = geometry.steps * geometry.matrices if geometry.summed else 0
        return jnp.where(tile.group < geometry.matrices, geometry.steps, further)

    def stages(self, tile: _Tile) -> jax.Array:
        """Of a tile: one for each product of a step."""
        return self.steps(tile) * len(self.geometry.products)

    def matrix(self, tile: _Tile, s: jax.Array) -> jax.Array:
        """Of B, at step s of a tile."""
        return jnp.where(tile.group < self.geometry.matrices, tile.group, lax.div(s, self.geometry.steps))

    def first_read(self, tile: _Tile, s: jax.Array) -> jax.Array:
        """Where the rows of A are named for step s of a tile."""
        geometry = self.geometry
        matrix = jnp.where(tile.group < geometry.matrices, 0, lax.div(s, geometry.steps))
        return tile.first + matrix * geometry.summed


def _produce(walk: _Walk, producer: pipeline.Producer, a_gmem, b_gmem, reads_gmem, smem, *, interpret: bool):
    """The producer warpgroup: gathers the rows of each tile and copies its part of B."""
    a_smem, b_smem = smem
    geometry, block_m = walk.geometry, walk.geometry.config.block_m
    load_rows, gather_rows, _ = rows.by_list(interpret)
    a_rows = a_gmem.shape[0] // (3 if geometry.split else 1)  # terms lie below each other
    own_tiles = walk.own_tiles()

    def load(tile, s):
        return load_rows(reads_gmem, walk.first_read(tile, s), tile.left, block_m)

    def copy_b(matrix, k0, n0, slot, barrier):
        for part, first in enumerate(geometry.parts):
            k, n = pl.ds(k0, geometry.block_k), pl.ds(n0 + first, geometry.consumer_columns)
            b_tile = b_gmem.at[matrix, n, k] if geometry.transposed else b_gmem.at[matrix, k, n]
            plgpu.copy_gmem_to_smem(b_tile, b_smem.at[slot, part], barrier)
        return len(geometry.parts)

    def tile_body(t, carry):
        g, numbers = carry
        tile = walk.tile(t)

        def step(s, carry):
            g, numbers = carry
            matrix, k0 = walk.matrix(tile, s), lax.rem(s, geometry.steps) * geometry.block_k
            for a_term, b_term in geometry.products:

                def start(slot, barrier, a_term=a_term, b_term=b_term):
                    copies = copy_b(b_term * geometry.matrices + matrix, k0, tile.n0, slot, barrier)
                    gather_rows(a_gmem, a_smem.at[slot], numbers, k0, a_term * a_rows)
                    return copies

                g = producer.gather(g, start)
            if geometry.summed:
                numbers = load(tile, jnp.minimum(s + 1, walk.steps(tile) - 1))
            return g, numbers

        # Under way while this tile is copied.
        next_numbers = load(walk.tile(jnp.minimum(t + 1, own_tiles - 1)), jnp.int32(0))
        g, _ = lax.fori_loop(0, walk.steps(tile), step, (g, numbers))
        return g, next_numbers

    @pl.when(own_tiles > 0)
    def _():
        numbers = load(walk.tile(jnp.int32(0)), jnp.int32(0))
        g, _ = lax.fori_loop(0, own_tiles, tile_body, (jnp.int32(0), numbers))
        producer.drain(g)


def _consume(walk: _Walk, consumer, out_gmem, writes_gmem, bias_gmem, scale_gmem, smem, barriers, *, interpret: bool):
    """A consumer warpgroup: multiplies its part of each tile, finishes it and stores its rows."""
    a_smem, b_smem, out_smem, bias_smem = smem
    geometry, config = walk.geometry, walk.geometry.config
    load_rows, _, scatter_rows = rows.by_list(interpret)
    columns = geometry.consumer_columns
    halves = 2 if geometry.gated else 1
    # Two consumers share a tile along its rows, or along its columns where it has 64 rows.
    m0, half = (consumer * 64, 0) if config.block_m == 128 else (0, consumer)

    def operands(slot):
        parts = [b_smem.at[slot, half * halves + i] for i in range(halves)]
        a = a_smem.at[slot, pl.ds(m0, 64)]
        return [(a, part.transpose((1, 0)) if geometry.transposed else part) for part in parts]

    def multiply(g, stages):
        """The sums of stages g to g + stages, and the number of the next."""

        def add_stages(*accs):
            g_next = pipeline.consume(config.stages, g, stages, accs, operands, **barriers)
            return tuple(acc[...] for acc in accs), g_next

        return pl.run_scoped(add_stages, *[plgpu.ACC((64, columns))] * halves)

    def multiply_promoted(g, steps):
        def step(_, carry):
            totals, g = carry
            sums, g = multiply(g, len(geometry.products))
            return tuple(total + x for total, x in zip(totals, sums, strict=True)), g

        zeros = plgpu.layout_cast(jnp.zeros((64, columns), jnp.float32), plgpu.Layout.WGMMA)
        return lax.fori_loop(0, steps, step, ((zeros,) * halves, g))

    def compute(tile: _Tile, g):
        numbers = load_rows(writes_gmem, tile.first_write + m0, tile.left - m0, 64)

        n0 = tile.n0 + half * columns
        biases = []
        if bias_gmem is not None:  # loaded while the products are made
            at = [bias_gmem.at[tile.group, pl.ds(n0 + i * geometry.columns, bias_smem.shape[1])] for i in range(halves)]
            biases = [plgpu.load(x, layout=epilogue.bias_layout(x.shape[0]), optimized=False) for x in at]
        accs, g_next = (multiply_promoted if is_promoted(geometry.dtype) else multiply)(g, walk.steps(tile))
        for i, bias in enumerate(biases):
            bias_smem[i] = bias
        plgpu.commit_smem()
        finished = epilogue.finish(
            accs, geometry.activation, bias_smem if biases else None, scale_gmem, tile.first + m0
        )
        first = tile.group * geometry.width if geometry.side_by_side else jnp.int32(0)

        def scatter(buffer, first_column):
            scatter_rows(buffer, out_gmem, numbers, first + n0 + first_column, first + geometry.columns)

        swrite.store_scattered(finished, columns, out_smem, geometry.columns - n0, scatter)
        return g_next

    def tile_body(t, g):
        tile = walk.tile(t)
        skip = functools.partial(pipeline.skip, config.stages, g, walk.stages(tile), **barriers)
        return lax.cond(tile.left > m0, lambda: compute(tile, g), skip)

    lax.fori_loop(0, walk.own_tiles(), tile_body, jnp.int32(0))


def _row_groups_kernel(
    *args, names: tuple[str, ...], a_smem, b_smem, out_smem, bias_smem, words_smem, full, empty, arrived,
    geometry: Geometry, interpret: bool,
):  # fmt: skip
    config, refs = geometry.config, dict(zip(names, args, strict=True))
    warpgroup = lax.axis_index("warpgroup")
    arrived = Gathered(memory=words_smem, interpreted=arrived if interpret else None, stages=config.stages)
    walk = _Walk(
        geometry=geometry,
        ends_gmem=refs["ends"],
        starts_gmem=refs["starts"],
        counts_gmem=refs["counts"],
        write_starts_gmem=refs.get("write_starts", refs["starts"]),
    )

    @pl.when(warpgroup == pipeline.CONSUMERS)
    def _producer():
        plgpu.set_max_registers(pipeline.PRODUCER_REGISTERS, action="decrease")
        arrived.begin()
        producer = pipeline.Producer(
            stages=config.stages, full=full, empty=empty, arrivals=len(geometry.parts), gathered=arrived
        )
        smem = a_smem, b_smem
        _produce(walk, producer, refs["a"], refs["b"], refs.get("reads"), smem, interpret=interpret)

    @pl.when(warpgroup < pipeline.CONSUMERS)
    def _consumer():
        plgpu.set_max_registers(pipeline.CONSUMER_REGISTERS, action="increase")
        barriers = {"full": full, "empty": empty, "gathered": arrived}
        smem = a_smem, b_smem, out_smem.at[warpgroup], bias_smem.at[warpgroup]
        vectors = refs.get("bias"), refs.get("scale")
        _consume(walk, warpgroup, refs["out"], refs.get("writes"), *vectors, smem, barriers, interpret=interpret)


def row_groups_matmul(
    name: str,
    a: Float[Array, "rows depth"],
    b: Float[Array, "matrices _ _"],
    groups: Groups,
    geometry: Geometry,
    *,
    out: tuple[int, int],
    zeros: bool = False,
    most_slots: int,
    bias: Float[Array, "matrices width"] | None = None,
    scale: Float32[Array, " slots"] | None = None,
    interpret: bool = False,
) -> Float[Array, "out_rows out_columns"]:
    """Launches the kernel.

    Args:
        name: of the kernel, for profiles.
        a: A, of the dtype of `geometry`; float8 gives bfloat16.
        b: a matrix for each group that has one, [matrices, depth, width], or as `geometry` says.
        groups: which rows go where.
        geometry: the tiling.
        out: shape of the result.
        zeros: rows that no slot writes are zeros; else each must be written.
        most_slots: what the counts add up to at most, for the number of blocks.
        bias: added to the product; none for slots without a matrix.
        scale: of each slot's result.
        interpret: runs it on CPU under the race detector.
    """
    config, out_dtype = geometry.config, result_dtype(a.dtype)
    a, b = _aligned(a, b, geometry)
    if geometry.split:
        a, b = split(a), split(b)
    ends = groups.ends
    if ends is None:
        ends = jnp.cumsum(pl.cdiv(groups.counts, config.block_m), dtype=jnp.int32)
    operands = {
        "a": a, "b": b, "ends": ends, "starts": groups.starts,
        "counts": groups.counts, "reads": groups.reads, "writes": groups.writes, "write_starts": groups.write_starts,
        # Slots without a matrix have a row of zeros; loads go on past the last column, and the last slot.
        "bias": None if bias is None else jnp.pad(bias, ((0, 1), (0, 256))),
        "scale": None if scale is None else jnp.pad(scale, (0, config.block_m)),
    }  # fmt: skip
    operands = {key: value for key, value in operands.items() if value is not None}
    most_tiles = (pl.cdiv(most_slots, config.block_m) + groups.counts.shape[0]) * geometry.tiles_across
    part = geometry.consumer_columns, geometry.block_k
    smem = functools.partial(plgpu.SMEM, dtype=a.dtype, transforms=pipeline.swizzled(a.dtype))
    out_shape = pipeline.CONSUMERS, swrite.SCATTER_SLOTS, 64, swrite.COLUMNS
    padded = jax.ShapeDtypeStruct((out[0], out[1] + -out[1] % swrite.COLUMNS), out_dtype)
    kernel = plgpu.kernel(
        functools.partial(_row_groups_kernel, names=(*operands, "out"), geometry=geometry, interpret=interpret),
        out_type=() if zeros else padded,
        grid=(min(most_tiles, 2 if interpret else device.sm_count()),),
        grid_names=("sm",),
        num_threads=pipeline.WARPGROUPS,
        thread_name="warpgroup",
        scratch_types={
            "a_smem": smem((config.stages, config.block_m, geometry.block_k)),
            "b_smem": smem((config.stages, len(geometry.parts), *(part if geometry.transposed else part[::-1]))),
            "out_smem": plgpu.SMEM(out_shape, out_dtype, transforms=pipeline.swizzled(out_dtype)),
            "bias_smem": plgpu.SMEM((pipeline.CONSUMERS, *geometry.bias_shape), out_dtype),
            "words_smem": plgpu.SMEM((gathered.words(config.stages),), jnp.int32),
            "arrived": plgpu.Barrier(num_arrivals=1, num_barriers=config.stages),  # of the interpreter
        }
        | pipeline.barriers(config.stages, arrivals=len(geometry.parts)),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane, approx_math=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
        kernel_name=name,
    )
    if not zeros:
        return kernel(*operands.values())[:, : out[1]]
    # Zeros that depend on nothing would be known where operands are not, and JAX cannot hand a reference from what it
    # computes first to the rest: differentiating a scan would fail. On an H200 the barrier takes no time.
    written, *values = lax.optimization_barrier((jnp.zeros_like(padded), *operands.values()))
    result = jax.new_ref(written)
    kernel(*values, result)
    return jax.freeze(result)[:, : out[1]]


def _aligned(a: jax.Array, b: jax.Array, geometry: Geometry) -> tuple[jax.Array, jax.Array]:
    """Both as the copies need them: rows of A start on 16 bytes, TMA takes whole swizzle atoms of B (8 x 128 bytes)."""
    line, atom = (size // min(a.dtype.itemsize, 2) for size in (16, STEP_BYTES))  # float32 comes as 16-bit terms
    a = jnp.pad(a, ((0, 0), (0, -a.shape[1] % line)))
    n_axis, k_axis = (1, 2) if geometry.transposed else (2, 1)
    pads = [(0, 0)] * 3
    pads[n_axis] = (0, -b.shape[n_axis] % (8 if geometry.transposed else atom))
    pads[k_axis] = (0, -b.shape[k_axis] % (atom if geometry.transposed else 8))
    return a, jnp.pad(b, pads)
