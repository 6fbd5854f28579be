"""The Mosaic GPU kernel of `relu_matmul` for Hopper: body and launch.

A tile is 128 neurons x 256 tokens of H.T = relu(W.T @ X.T + b): W is read as it lies, k-major, and X transposed. The
epilogue has a consumer's 64 neurons in registers anyway, so the largest value of each over the tokens of a micro-tile
says which of those are live: a maximum a value and two shuffles a micro-tile. A byte each goes to global memory, in
rows that `compact` turns into lists.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int8

from pallas_kernels.relu_matmul.config import NEURONS, Config
from pallas_kernels.tile import device, pipeline, schedule, swrite
from pallas_kernels.tile.launch import lowered_once
from pallas_kernels.tile.pipeline import BLOCK_K

ARRIVALS = NEURONS // pipeline.PANEL + 1  # TMA copies of a stage: the panels of W, and X
A_NEURON, A_TOKEN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Walk:
    """The tiles of a persistent block: one order for producer and consumers."""

    config: Config
    neurons: int
    tokens: int

    @property
    def tiles(self) -> tuple[int, int]:
        return pl.cdiv(self.neurons, NEURONS), pl.cdiv(self.tokens, self.config.block_n)

    def each_tile(self, body, init):
        """Loop over this block's tiles: `body(first neuron, first token, carry) -> carry`."""

        def step(t, carry):
            i, j = schedule.row_and_column(schedule.tile_number(t), *self.tiles, self.config.group)
            return body(i * NEURONS, j * self.config.block_n, carry)

        return lax.fori_loop(0, schedule.own_tiles(self.tiles[0] * self.tiles[1]), step, init)


def _produce(walk: _Walk, producer: pipeline.Producer, steps: int, x_gmem, w_gmem, x_smem, w_smem) -> None:
    """The producer warpgroup: all tiles of W and X by TMA."""

    def tile_body(m0, n0, g):
        def step(s, g):
            k = pl.ds(s * BLOCK_K, BLOCK_K)

            def start(slot, barrier):
                for panel in range(NEURONS // pipeline.PANEL):
                    w_tile = w_gmem.at[k, pl.ds(m0 + panel * pipeline.PANEL, pipeline.PANEL)]
                    plgpu.copy_gmem_to_smem(w_tile, w_smem.at[slot, panel], barrier)
                x_tile = x_gmem.at[pl.ds(n0, walk.config.block_n), k]
                plgpu.copy_gmem_to_smem(x_tile, x_smem.at[slot], barrier)
                return ARRIVALS

            return producer.copy(g, start)

        return lax.fori_loop(0, steps, step, g)

    producer.drain(walk.each_tile(tile_body, jnp.int32(0)))


def _consume(walk: _Walk, consumer, steps: int, rows: int, refs, out_smem, x_smem, w_smem, barriers) -> None:
    """A consumer warpgroup: multiplies its 64 neurons of each tile, stores them, and says which are live."""
    bias_gmem, mask_gmem, h_gmem, live_gmem = refs
    shape = walk.config.tile.consumer_shape

    def operands(slot):
        return [(w_smem.at[slot, consumer].transpose((1, 0)), x_smem.at[slot].transpose((1, 0)))]

    def tile_body(m0, n0, g):
        m0 += consumer * shape[0]
        bias = None
        if bias_gmem is not None:  # before the products, which hide its latency
            bias = plgpu.load(bias_gmem.at[pl.ds(m0, shape[0])], layout=A_NEURON, optimized=False)

        def multiply(acc):
            g_next = pipeline.consume(walk.config.stages, g, steps, [acc], operands, **barriers)
            return acc[...], g_next

        acc, g = pl.run_scoped(multiply, plgpu.ACC(shape))
        if bias is not None:
            acc += lax.broadcast_in_dim(bias.astype(jnp.float32), shape, (0,))
        h = jnp.maximum(acc.astype(h_gmem.dtype), 0)  # what is live is live as stored
        if mask_gmem is not None:
            mask = plgpu.load(mask_gmem.at[pl.ds(n0, shape[1])], layout=A_TOKEN, optimized=False)
            h = jnp.where(lax.broadcast_in_dim(mask != 0, shape, (1,)), h, jnp.zeros_like(h))
        swrite.store(h, h_gmem, out_smem, m0, n0)
        mark_live(h, m0, lax.div(n0, rows))
        return g

    def mark_live(h, m0, first_list):
        for part in range(shape[1] // rows):

            @pl.when(first_list + part < live_gmem.shape[0])
            def _(part=part):
                largest = jnp.max(h[:, part * rows : (part + 1) * rows], axis=1)  # NaN where there is one
                live_gmem[first_list + part, pl.ds(m0, shape[0])] = (largest != 0).astype(jnp.int8)

    walk.each_tile(tile_body, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _relu_matmul_kernel(
    x_gmem, w_gmem, bias_gmem, mask_gmem, h_gmem, live_gmem, *, x_smem, w_smem, out_smem, full, empty, walk: _Walk,
    rows: int,
):  # fmt: skip
    warpgroup, steps = lax.axis_index("warpgroup"), pl.cdiv(x_gmem.shape[1], BLOCK_K)

    @pl.when(warpgroup == pipeline.CONSUMERS)
    def _producer():
        plgpu.set_max_registers(pipeline.PRODUCER_REGISTERS, action="decrease")
        producer = pipeline.Producer(stages=walk.config.stages, full=full, empty=empty, arrivals=ARRIVALS)
        _produce(walk, producer, steps, x_gmem, w_gmem, x_smem, w_smem)

    @pl.when(warpgroup < pipeline.CONSUMERS)
    def _consumer():
        plgpu.set_max_registers(pipeline.CONSUMER_REGISTERS, action="increase")
        refs, barriers = (bias_gmem, mask_gmem, h_gmem, live_gmem), {"full": full, "empty": empty}
        _consume(walk, warpgroup, steps, rows, refs, out_smem.at[warpgroup], x_smem, w_smem, barriers)


@lowered_once("rows")
def mosaic(
    x: Float[Array, "tokens d_model"],
    w: Float[Array, "d_model d_ff"],
    bias: Float[Array, " d_ff"] | None,
    rows: int,
    mask: Bool[Array, " tokens"] | None,
    config: Config,
    interpret: bool,
) -> tuple[Float[Array, "d_ff tokens"], Int8[Array, "blocks padded"]]:
    """Launches the kernel; `interpret` runs it on CPU under the race detector.

    Returns:
        H.T, and 1 for each live micro-tile of it: one row a block of tokens, the first d_ff bytes of which count.
    """
    (tokens, _), d_ff, dtype = x.shape, w.shape[1], x.dtype
    if tokens % rows and mask is None:  # the bias would make tokens live that are not there
        mask = jnp.ones(tokens, bool)
    # TMA takes whole swizzle atoms of 8 x 64 (a copy, only where they do not divide a size), and plain loads must not
    # read past the end.
    x, w = (jnp.pad(a, ((0, -a.shape[0] % 8), (0, -a.shape[1] % pipeline.PANEL))) for a in (x, w))
    if bias is not None:
        bias = jnp.pad(bias, (0, -d_ff % NEURONS))
    if mask is not None:
        mask = jnp.pad(mask, (0, -tokens % config.block_n)).astype(jnp.int8)
    walk = _Walk(config=config, neurons=d_ff, tokens=tokens)
    smem = functools.partial(plgpu.SMEM, dtype=dtype, transforms=pipeline.swizzled(dtype))
    scratch: dict[str, Any] = {
        "x_smem": smem((config.stages, config.block_n, BLOCK_K)),
        "w_smem": smem((config.stages, NEURONS // pipeline.PANEL, BLOCK_K, pipeline.PANEL)),
        "out_smem": swrite.scratch(config.tile, dtype),
    }
    kernel = plgpu.kernel(
        functools.partial(_relu_matmul_kernel, walk=walk, rows=rows),
        out_type=(
            # In whole swizzle atoms, as TMA clips: the slice below is free where they fit.
            jax.ShapeDtypeStruct((d_ff + -d_ff % 8, swrite.stored_columns(tokens)), dtype),
            jax.ShapeDtypeStruct((pl.cdiv(tokens, rows), d_ff + -d_ff % NEURONS), jnp.int8),
        ),
        grid=(schedule.blocks(*walk.tiles, most=2 if interpret else device.sm_count()),),
        grid_names=("sm",),
        num_threads=pipeline.WARPGROUPS,
        thread_name="warpgroup",
        scratch_types=scratch | pipeline.barriers(config.stages, ARRIVALS),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
        kernel_name="relu_matmul",
    )
    h_t, live = kernel(x, w, bias, mask)
    return h_t[:d_ff, :tokens], live
