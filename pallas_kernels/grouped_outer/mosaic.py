"""The Mosaic GPU kernel of `grouped_outer` for Hopper: the dense tile over an expert's slots.

Z[e] = X[e's]^T @ Y[e's] sums over slots, so what a stage holds is 64 slots' rows of both, gathered as in
`gather_matmul`; there a list names what is summed, here it is the expert's run of slots.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.routing import Routing
from pallas_kernels.tile import device, gathered, pipeline, rows, schedule, swrite
from pallas_kernels.tile.gathered import Gathered
from pallas_kernels.tile.launch import lowered_once
from pallas_kernels.tile.pipeline import BLOCK_K, PANEL

OUT_SLOTS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tiling of the Mosaic kernel.

    Attributes:
        block_n: columns of y a tile, 128 or 256; it takes 128 columns of x.
        stages: stages of shared memory in the pipeline, at least 2.
    """

    block_n: int
    stages: int

    @property
    def tile(self) -> pipeline.DenseTile:
        return pipeline.DenseTile(block_m=128, block_n=self.block_n, stages=self.stages, out_slots=OUT_SLOTS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Walk:
    """The tiles of a persistent block, expert by expert, in one order for producer and consumers.

    Attributes:
        shape: experts, K and N.
        starts_gmem: first slot of each expert, and where the last one's end.
    """

    config: Config
    shape: tuple[int, int, int]
    starts_gmem: Any

    @property
    def tiles(self) -> tuple[int, int]:
        """Of an expert."""
        return pl.cdiv(self.shape[1], 128), pl.cdiv(self.shape[2], self.config.block_n)

    @property
    def own_tiles(self) -> jax.Array:
        return schedule.own_tiles(self.shape[0] * self.tiles[0] * self.tiles[1])

    def tile(self, t) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
        """The t-th tile's expert, its first row and column, and that expert's first slot and how many it has."""
        of_expert = self.tiles[0] * self.tiles[1]
        number = schedule.tile_number(jnp.minimum(t, self.own_tiles - 1))
        expert, number = lax.div(number, of_expert), lax.rem(number, of_expert)
        i, j = schedule.row_and_column(number, *self.tiles, group=8)
        first = self.starts_gmem[expert]
        return expert, i * 128, j * self.config.block_n, first, self.starts_gmem[expert + 1] - first


def _produce(walk: _Walk, producer: pipeline.Producer, x, y, smem, *, interpret: bool):
    """The producer warpgroup; `x` and `y` are a matrix and the row of each slot."""
    a_smem, b_smem = smem
    load_rows, gather_rows, _ = rows.by_list(interpret)

    def load(first, left):
        return tuple(load_rows(reads, first, left, BLOCK_K) for _, reads in (x, y))

    def tile_body(t, g):
        _, m0, n0, slot0, count = walk.tile(t)

        def step(s, carry):
            g, (x_rows, y_rows) = carry

            def start(slot, _):
                for panel in range(128 // PANEL):
                    gather_rows(x[0], a_smem.at[slot, panel], x_rows, m0 + panel * PANEL)
                gather_rows(y[0], b_smem.at[slot, 0], y_rows, n0)
                return 0

            done = (s + 1) * BLOCK_K
            upcoming = load(slot0 + done, count - done)  # under way while this stage is copied
            return producer.gather(g, start), upcoming

        return lax.fori_loop(0, pl.cdiv(count, BLOCK_K), step, (g, load(slot0, count)))[0]

    producer.drain(lax.fori_loop(0, walk.own_tiles, tile_body, jnp.int32(0)))


def _consume(walk: _Walk, consumer, out_gmem, smem, barriers: dict[str, Any]):
    """A consumer warpgroup: multiplies 64 rows of each tile and stores them."""
    a_smem, b_smem, out_smem = smem
    tile = walk.config.tile
    operands = tile.operands(consumer, a_smem, b_smem)
    m1, n1 = tile.consumer_origin(consumer)

    def tile_body(t, g):
        expert, m0, n0, _, count = walk.tile(t)

        def add_stages(acc):
            steps = pl.cdiv(count, BLOCK_K)
            g_next = pipeline.consume(walk.config.stages, g, steps, [acc], operands, **barriers)
            return acc[...], g_next

        acc, g = pl.run_scoped(add_stages, plgpu.ACC(tile.consumer_shape))
        swrite.store(acc, out_gmem.at[expert], out_smem, m0 + m1, n0 + n1)
        return g

    lax.fori_loop(0, walk.own_tiles, tile_body, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _grouped_outer_kernel(
    *args, names: tuple[str, ...], a_smem, b_smem, out_smem, words_smem, full, empty, arrived, config: Config,
    shape: tuple[int, int, int], interpret: bool,
):  # fmt: skip
    refs, warpgroup = dict(zip(names, args, strict=True)), lax.axis_index("warpgroup")
    arrived = Gathered(memory=words_smem, interpreted=arrived if interpret else None, stages=config.stages)
    walk = _Walk(config=config, shape=shape, starts_gmem=refs["starts"])

    @pl.when(warpgroup == pipeline.CONSUMERS)
    def _producer():
        plgpu.set_max_registers(pipeline.PRODUCER_REGISTERS, action="decrease")
        arrived.begin()
        producer = pipeline.Producer(stages=config.stages, full=full, empty=empty, arrivals=1, gathered=arrived)
        x, y = ((refs[name], refs.get(f"{name}_reads")) for name in ("x", "y"))
        _produce(walk, producer, x, y, (a_smem, b_smem), interpret=interpret)

    @pl.when(warpgroup < pipeline.CONSUMERS)
    def _consumer():
        plgpu.set_max_registers(pipeline.CONSUMER_REGISTERS, action="increase")
        barriers = {"full": full, "empty": empty, "gathered": arrived}
        _consume(walk, warpgroup, refs["out"], (a_smem, b_smem, out_smem.at[warpgroup]), barriers)


@lowered_once("gather_x", "gather_y")
def mosaic(
    x: Float[Array, "x_rows K"],
    y: Float[Array, "y_rows N"],
    routing: Routing,
    *,
    gather_x: bool,
    gather_y: bool,
    config: Config,
    interpret: bool,
) -> Float[Array, "experts K N"]:
    """Launches the kernel; `interpret` runs it on CPU under the race detector."""
    (experts,), k, n, dtype = routing.counts.shape, x.shape[1], y.shape[1], x.dtype

    def reads(operand, gather):
        return routing.order // (routing.slots // operand.shape[0]) if gather else None

    operands = {
        "x": jnp.pad(x, ((0, 0), (0, -k % 8))),  # rows start on 16 bytes
        "y": jnp.pad(y, ((0, 0), (0, -n % 8))),
        "starts": jnp.pad(jnp.cumsum(routing.counts, dtype=jnp.int32), (1, 0)),
        "x_reads": reads(x, gather_x),
        "y_reads": reads(y, gather_y),
    }
    operands = {key: value for key, value in operands.items() if value is not None}
    tile = config.tile
    tiles = experts * pl.cdiv(k, 128) * pl.cdiv(n, config.block_n)
    kernel = plgpu.kernel(
        functools.partial(
            _grouped_outer_kernel, names=(*operands, "out"), config=config, shape=(experts, k, n), interpret=interpret
        ),
        # TMA clips at the matrix's end, but only in whole swizzle atoms: the slice below is free where they fit.
        out_type=jax.ShapeDtypeStruct((experts, k + -k % 8, swrite.stored_columns(n)), dtype),
        grid=(min(tiles, 2 if interpret else device.sm_count()),),
        grid_names=("sm",),
        num_threads=pipeline.WARPGROUPS,
        thread_name="warpgroup",
        scratch_types=tile.scratch(dtype)
        | pipeline.barriers(config.stages, arrivals=1)
        | {
            "out_smem": swrite.scratch(tile, dtype),
            "words_smem": plgpu.SMEM((gathered.words(config.stages),), jnp.int32),
            "arrived": plgpu.Barrier(num_arrivals=1, num_barriers=config.stages),  # of the interpreter
        },
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
        kernel_name="grouped_outer",
    )
    return kernel(*operands.values())[:, :k, :n]


def _most_stages(block_n: int) -> int:
    out_bytes = pipeline.CONSUMERS * OUT_SLOTS * 64 * swrite.COLUMNS * 2
    return min(8, (pipeline.SMEM_BYTES - out_bytes - 1024) // (BLOCK_K * (128 + block_n) * 2))


def candidates(x, y, routing, gather_x, gather_y) -> list[Config]:
    """Configs worth timing for these arguments (shapes are enough); the heuristic's choice comes first."""
    del routing, gather_x, gather_y
    block_ns = (256, 128) if y.shape[1] > 128 else (128,)
    return [Config(block_n=block_n, stages=_most_stages(block_n)) for block_n in block_ns]


def check_support(x, y, routing, gather_x, gather_y, *, devices: tuple[str, ...] | None) -> None:
    """Raises NotImplementedError where the kernel cannot take these arguments, or the device is none of `devices`."""
    del y, routing, gather_x, gather_y
    if x.dtype.itemsize != 2:
        raise NotImplementedError(f"the Mosaic kernel takes bfloat16 and float16; got {x.dtype}")
    if devices is not None:
        device.require_device("grouped_outer", devices)


def check_config(config: Config, x, y, routing, gather_x, gather_y) -> None:
    """Raises ValueError where a config does not fit the kernel or these arguments."""
    del x, y, routing, gather_x, gather_y
    if config.block_n not in (128, 256):
        raise ValueError(f"block_n must be 128 or 256; got block_n={config.block_n}")
    if not 2 <= config.stages <= _most_stages(config.block_n):
        raise ValueError(f"stages must be 2 to {_most_stages(config.block_n)}; got stages={config.stages}")
