"""The dense tile over groups of rows: out[to(s)] = epilogue(A[from(s)] @ B[e]) for every slot s of every group e.

`grouped_matmul`, `scatter_matmul` and `sampled_matmul` are this one kernel: a group is an expert's tokens, or a list
of a `MicroTileIndex`. Rows of A are gathered (SRead) 64 or 128 at a time, the tile of B comes by TMA, and what they
give is stored row by row where it belongs (SWrite). Persistent blocks walk the tiles of all groups, group by group; how
many each has lives on the device. Within a group tiles are walked down a few rows of tiles at a time and then across,
so that a tile of B is read from memory once and A stays in L2.
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

from pallas_kernels.tile import device, epilogue, gathered, pipeline, rows, swrite
from pallas_kernels.tile.gathered import Gathered
from pallas_kernels.tile.pipeline import BLOCK_K

SMS = 132  # of an H200: what the heuristic counts with


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tiling of the Mosaic kernel.

    Attributes:
        block_m: rows of a tile, 64 or 128.
        block_n: columns of B a tile, 64 (where block_m is 128), 128 or 256.
        stages: stages of shared memory in the pipeline, at least 2.
        group: how many rows of tiles are walked together before the next columns.
    """

    block_m: int = 128
    block_n: int = 256
    stages: int = 4
    group: int = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Groups:
    """Which rows a group takes and where its results go. Slots of a group are consecutive entries.

    Attributes:
        starts: the first slot of each group, int32 [groups].
        counts: how many it has, int32 [groups].
        reads: row of A of each slot, int32 [slots]; None: row s.
        writes: row of the result of each slot; None: row s.
    """

    starts: Int32[Array, " groups"]
    counts: Int32[Array, " groups"]
    reads: Int32[Array, " slots"] | None
    writes: Int32[Array, " slots"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """What is multiplied, and how it is tiled.

    Attributes:
        config: the tiling.
        matrices: how many groups have a matrix of B; slots of further ones give zeros.
        depth: columns of A: what is summed over.
        width: columns of a matrix of B.
        transposed: B is given as [matrices, width, depth].
        side_by_side: group e's results lie in columns e * width on, instead of all in the same.
        gated: the first half of the columns of B are the gate's.
        activation: one of `epilogue.ACTIVATIONS`.
    """

    config: Config
    matrices: int
    depth: int
    width: int
    transposed: bool
    side_by_side: bool = False
    gated: bool = False
    activation: str | None = None

    @property
    def columns(self) -> int:
        """Of a group's results."""
        return self.width // 2 if self.gated else self.width

    @property
    def block_columns(self) -> int:
        """Of a tile's results."""
        return self.config.block_n // 2 if self.gated else self.config.block_n

    @property
    def tiles_across(self) -> int:
        return pl.cdiv(self.columns, self.block_columns)

    @property
    def consumer_columns(self) -> int:
        """Of a consumer's part of a tile's results: both have all of them, or each its half where block_m is 64."""
        return self.block_columns if self.config.block_m == 128 else self.block_columns // 2

    @property
    def parts(self) -> list[int]:
        """A tile's columns of B as consumers multiply them: the first of each part, `consumer_columns` wide.

        For each consumer that has columns of its own: the gate's, and then those that it gates.
        """
        halves = range(0, self.block_columns, self.consumer_columns)
        return [first + up for first in halves for up in ((0, self.columns) if self.gated else (0,))]

    @property
    def bias_shape(self) -> tuple[int, int]:
        """Of a consumer's part of the bias: a row for each product, loaded by 128 threads."""
        return 2 if self.gated else 1, max(self.consumer_columns, 128)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tile:
    """Where a tile lies: its group, its first slot, the slots of the group from there on, its first column."""

    group: jax.Array
    first: jax.Array
    left: jax.Array
    n0: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Walk:
    """The tiles of a persistent block, in one order for producer and consumers.

    Attributes:
        ends_gmem: rows of tiles up to and with each group's.
        starts_gmem, counts_gmem: as in `Groups`.
    """

    geometry: Geometry
    ends_gmem: Any
    starts_gmem: Any
    counts_gmem: Any

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
        return _Tile(
            group=group,
            first=self.starts_gmem[group] + i * config.block_m,
            left=self.counts_gmem[group] - i * config.block_m,
            n0=j * self.geometry.block_columns,
        )

    def steps(self, tile: _Tile) -> jax.Array:
        """Stages of a tile."""
        return jnp.where(tile.group < self.geometry.matrices, pl.cdiv(self.geometry.depth, BLOCK_K), 0)


def _produce(walk: _Walk, producer: pipeline.Producer, a_gmem, b_gmem, reads_gmem, smem, *, interpret: bool):
    """The producer warpgroup: gathers the rows of each tile and copies its part of B."""
    a_smem, b_smem = smem
    geometry, block_m = walk.geometry, walk.geometry.config.block_m
    load_rows, gather_rows, _ = rows.by_list(interpret)
    own_tiles = walk.own_tiles()

    def load(t):
        tile = walk.tile(t)
        return load_rows(reads_gmem, tile.first, tile.left, block_m)

    def copy_b(tile: _Tile, k0, slot, barrier):
        matrix = jnp.minimum(tile.group, geometry.matrices - 1)
        for part, first in enumerate(geometry.parts):
            k, n = pl.ds(k0, BLOCK_K), pl.ds(tile.n0 + first, geometry.consumer_columns)
            b_tile = b_gmem.at[matrix, n, k] if geometry.transposed else b_gmem.at[matrix, k, n]
            plgpu.copy_gmem_to_smem(b_tile, b_smem.at[slot, part], barrier)
        return len(geometry.parts)

    def tile_body(t, carry):
        g, numbers = carry
        tile = walk.tile(t)

        def step(s, g):
            def start(slot, barrier):
                copies = copy_b(tile, s * BLOCK_K, slot, barrier)
                gather_rows(a_gmem, a_smem.at[slot], numbers, s * BLOCK_K)
                return copies

            return producer.gather(g, start)

        next_numbers = load(jnp.minimum(t + 1, own_tiles - 1))  # under way while this tile is copied
        return lax.fori_loop(0, walk.steps(tile), step, g), next_numbers

    @pl.when(own_tiles > 0)
    def _():
        g, _ = lax.fori_loop(0, own_tiles, tile_body, (jnp.int32(0), load(jnp.int32(0))))
        producer.drain(g)


def _consume(walk: _Walk, consumer, out_gmem, writes_gmem, bias_gmem, scale_gmem, smem, barriers, *, interpret: bool):
    """A consumer warpgroup: multiplies its part of each tile, finishes it and stores its rows."""
    a_smem, b_smem, out_smem, bias_smem = smem
    geometry, config = walk.geometry, walk.geometry.config
    load_rows, _, scatter_rows = rows.by_list(interpret)
    columns = geometry.consumer_columns
    products = 2 if geometry.gated else 1
    # Two consumers share a tile along its rows, or along its columns where it has 64 rows.
    m0, half = (consumer * 64, 0) if config.block_m == 128 else (0, consumer)

    def operands(slot):
        parts = [b_smem.at[slot, half * products + i] for i in range(products)]
        a = a_smem.at[slot, pl.ds(m0, 64)]
        return [(a, part.transpose((1, 0)) if geometry.transposed else part) for part in parts]

    def multiply(tile: _Tile, g):
        numbers = load_rows(writes_gmem, tile.first + m0, tile.left - m0, 64)

        n0 = tile.n0 + half * columns
        biases = []
        if bias_gmem is not None:  # loaded while the products are made
            at = [
                bias_gmem.at[tile.group, pl.ds(n0 + i * geometry.columns, bias_smem.shape[1])] for i in range(products)
            ]
            biases = [plgpu.load(x, layout=epilogue.bias_layout(x.shape[0]), optimized=False) for x in at]

        def add_stages(*accs):
            g_next = pipeline.consume(config.stages, g, walk.steps(tile), accs, operands, **barriers)
            return tuple(acc[...] for acc in accs), g_next

        accs, g_next = pl.run_scoped(add_stages, *[plgpu.ACC((64, columns))] * products)
        for i, bias in enumerate(biases):
            bias_smem[i] = bias
        plgpu.commit_smem()
        finished = epilogue.finish(
            accs, geometry.activation, bias_smem if biases else None, scale_gmem, tile.first + m0
        )
        out_n0 = n0 + tile.group * geometry.width if geometry.side_by_side else n0

        def scatter(buffer, first_column):
            scatter_rows(buffer, out_gmem, numbers, out_n0 + first_column)

        swrite.store_scattered(finished, columns, out_smem, geometry.columns - n0, scatter)
        return g_next

    def tile_body(t, g):
        tile = walk.tile(t)
        skip = functools.partial(pipeline.skip, config.stages, g, walk.steps(tile), **barriers)
        return lax.cond(tile.left > m0, lambda: multiply(tile, g), skip)

    lax.fori_loop(0, walk.own_tiles(), tile_body, jnp.int32(0))


def _row_groups_kernel(
    *args, names: tuple[str, ...], a_smem, b_smem, out_smem, bias_smem, words_smem, full, empty, arrived,
    geometry: Geometry, interpret: bool,
):  # fmt: skip
    config, refs = geometry.config, dict(zip(names, args, strict=True))
    warpgroup = lax.axis_index("warpgroup")
    arrived = Gathered(memory=words_smem, interpreted=arrived if interpret else None, stages=config.stages)
    walk = _Walk(geometry=geometry, ends_gmem=refs["ends"], starts_gmem=refs["starts"], counts_gmem=refs["counts"])

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


def most_stages(block_m: int, block_n: int) -> int:
    """As many as shared memory holds beside the output buffers, up to 8."""
    out_bytes = pipeline.CONSUMERS * swrite.SCATTER_SLOTS * 64 * swrite.COLUMNS * 2
    left = pipeline.SMEM_BYTES - out_bytes - 1024  # barriers
    return min(8, left // (BLOCK_K * (block_m + block_n) * 2))


def tilings(slots: int, groups: int, depth: int, width: int, *, gated: bool = False, divides: bool = False):
    """Configs worth timing, the one that the model expects to be the quickest first.

    Args:
        slots: rows in all, at most.
        groups: how many share them.
        depth, width: of a matrix of B.
        gated: as in `Geometry`.
        divides: block_n must divide `width`.
    """
    configs = []
    for block_m in (128, 64):
        least = 64 * (256 // (block_m * (1 if gated else 2)))  # 64 columns of results for each consumer
        for block_n in (256, 128, 64):
            if block_n >= least and (block_n <= max(least, width) if not divides else width % block_n == 0):
                stages = most_stages(block_m, block_n)
                configs.append(Config(block_m=block_m, block_n=block_n, stages=stages))
    return sorted(configs, key=functools.partial(_expected_us, slots=slots, groups=groups, depth=depth, width=width))


def _expected_us(config: Config, *, slots: int, groups: int, depth: int, width: int) -> float:
    """Time of evenly filled groups on an H200: waves of tiles, each held by its products, its copies or by HBM."""
    rows = min(slots, groups * pl.cdiv(slots, groups))
    busy = min(groups, rows)
    tiles = busy * pl.cdiv(pl.cdiv(rows, busy), config.block_m) * pl.cdiv(width, config.block_n)
    step = max(
        0.56 * config.block_m * config.block_n / (128 * 256),
        0.50 * (config.block_m + config.block_n) / 384,
        config.block_n * BLOCK_K * 2 / 4.3e6 * min(tiles, SMS) / pl.cdiv(pl.cdiv(rows, busy), config.block_m),
    )
    return pl.cdiv(tiles, SMS) * (pl.cdiv(depth, BLOCK_K) * step + 1.5)


def check_config(config: Config, width: int, *, gated: bool = False, divides: bool = False) -> None:
    """Raises ValueError where a config does not fit the kernel or these arguments; arguments as of `tilings`."""
    if config.block_m not in (64, 128):
        raise ValueError(f"block_m must be 64 or 128; got block_m={config.block_m}")
    least = 64 * (256 // (config.block_m * (1 if gated else 2)))
    if config.block_n not in (64, 128, 256) or config.block_n < least:
        rule = f"block_n must be 64, 128 or 256, at least {least} for block_m={config.block_m}"
        raise ValueError(f"{rule}{' and gated weights' if gated else ''}; got block_n={config.block_n}")
    if divides and width % config.block_n:
        raise ValueError(f"block_n must divide rows; got block_n={config.block_n}, rows={width}")
    most = most_stages(config.block_m, config.block_n)
    if not 2 <= config.stages <= most:
        raise ValueError(f"stages must be 2 to {most} for this tile; got stages={config.stages}")
    if config.group < 1:
        raise ValueError(f"group must be at least 1; got group={config.group}")


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
    """Launches the kernel. 16-bit operands.

    Args:
        name: of the kernel, for profiles.
        a: A.
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
    config, dtype = geometry.config, a.dtype
    a, b = _aligned(a, b, geometry)
    rows_of_tiles = pl.cdiv(groups.counts, config.block_m)
    operands = {
        "a": a, "b": b, "ends": jnp.cumsum(rows_of_tiles, dtype=jnp.int32), "starts": groups.starts,
        "counts": groups.counts, "reads": groups.reads, "writes": groups.writes,
        # Slots without a matrix have a row of zeros; loads go on past the last column, and the last slot.
        "bias": None if bias is None else jnp.pad(bias, ((0, 1), (0, 256))),
        "scale": None if scale is None else jnp.pad(scale, (0, config.block_m)),
    }  # fmt: skip
    operands = {key: value for key, value in operands.items() if value is not None}
    most_tiles = (pl.cdiv(most_slots, config.block_m) + groups.counts.shape[0]) * geometry.tiles_across
    part = geometry.consumer_columns, BLOCK_K
    smem = functools.partial(plgpu.SMEM, dtype=dtype, transforms=pipeline.swizzled(dtype))
    padded = jax.ShapeDtypeStruct((out[0], out[1] + -out[1] % swrite.COLUMNS), dtype)
    kernel = plgpu.kernel(
        functools.partial(_row_groups_kernel, names=(*operands, "out"), geometry=geometry, interpret=interpret),
        out_type=() if zeros else padded,
        grid=(min(most_tiles, 2 if interpret else device.sm_count()),),
        grid_names=("sm",),
        num_threads=pipeline.WARPGROUPS,
        thread_name="warpgroup",
        scratch_types={
            "a_smem": smem((config.stages, config.block_m, BLOCK_K)),
            "b_smem": smem((config.stages, len(geometry.parts), *(part if geometry.transposed else part[::-1]))),
            "out_smem": smem((pipeline.CONSUMERS, swrite.SCATTER_SLOTS, 64, swrite.COLUMNS)),
            "bias_smem": plgpu.SMEM((pipeline.CONSUMERS, *geometry.bias_shape), dtype),
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
    result = jax.new_ref(jnp.zeros_like(padded))
    kernel(*operands.values(), result)
    return result[...][:, : out[1]]


def _aligned(a: jax.Array, b: jax.Array, geometry: Geometry) -> tuple[jax.Array, jax.Array]:
    """Both as the copies need them: rows of A start on 16 bytes, TMA takes whole swizzle atoms of B (8 x 64)."""
    a = jnp.pad(a, ((0, 0), (0, -a.shape[1] % 8)))
    n_axis, k_axis = (1, 2) if geometry.transposed else (2, 1)
    pads = [(0, 0)] * 3
    pads[n_axis] = (0, -b.shape[n_axis] % (8 if geometry.transposed else 64))
    pads[k_axis] = (0, -b.shape[k_axis] % (64 if geometry.transposed else 8))
    return a, jnp.pad(b, pads)
