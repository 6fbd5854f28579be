"""Two launches, a product each, for 2 to 32 tokens on the tensor core: rows of both matrices are gathered by the list.

    up:    h[b, p] = act(x[b] . w1[neurons[p]] + b1[neurons[p]])      64 listed rows by `up_columns` a stage
    down:  y[b] = sum over p of h[b, p] * w2[neurons[p]]              64 listed rows by `down_columns` a stage

Weights are the side of 64 of a wgmma and tokens the side of 8 to 32, so that few products are wasted on padding. A
block of `up` has an equal run of the list, whatever its length, and 1 / `up_splits` of d_model: rows that a last stage
lacks are not read. A block of `down` has `down_columns` of d_model and 1 / `down_splits` of the list in steps of 64.
Both write float32 sums that XLA adds, in one fixed order, for `up` together with bias and activation, and with zeros
where a neuron is not a token's own: for each split 4 * batch * capacity and 4 * batch * d_model bytes.

Budget at d_model 7168, 8 tokens, 10% of 28672 listed, on an H200: 82 MB of weights are 19.1 us. `up` reads x
132 / up_splits times from L2: 15 MB for one split, 4 MB for 4; at 32 tokens four times that, which is why it is split.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.neuron_ffn.config import ROWS, Config
from pallas_kernels.neuron_ffn.reference import ACTIVATIONS, computed
from pallas_kernels.tile import device, gathered, pipeline, rows
from pallas_kernels.tile.gathered import Gathered
from pallas_kernels.tile.launch import lowered_once
from pallas_kernels.tile.swrite import store_transposed, store_transposed_interpreted

PANEL = pipeline.PANEL
PRODUCER = 1  # the warpgroup after the one that multiplies


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Product:
    """One of the two products, and how blocks share it.

    Attributes:
        down: sums over the list; else over d_model.
        d_model: columns of the matrix.
        columns: of it a stage.
        stages: stages of shared memory.
        splits: blocks that share a sum.
        others: blocks of a split: runs of the list for up, columns for down.
    """

    down: bool
    d_model: int
    columns: int
    stages: int
    splits: int
    others: int

    @property
    def panels(self) -> int:
        """Accumulators, of 64 results each."""
        return self.columns // PANEL if self.down else 1

    @property
    def operand_columns(self) -> int:
        """Of a stage of the small operand: what is summed over."""
        return ROWS if self.down else self.columns

    def block(self, count) -> "_Share":
        """This block's part, `count` entries being listed."""
        block = lax.axis_index("block")
        split, other = lax.rem(block, self.splits), lax.div(block, self.splits)
        if self.down:
            chunks = pl.cdiv(count, ROWS)
            first, last = (lax.div((split + i) * chunks, self.splits) * ROWS for i in (0, 1))
            return _Share(
                split=split, first=first, last=jnp.minimum(last, count), first_col=other * self.columns, steps=1
            )
        first, last = (lax.div((other + i) * count, self.others) for i in (0, 1))
        in_all = pl.cdiv(self.d_model, self.columns)
        first_step, last_step = (lax.div((split + i) * in_all, self.splits) for i in (0, 1))
        return _Share(
            split=split, first=first, last=last, first_col=first_step * self.columns, steps=last_step - first_step
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Share:
    """A block's part of a product: entries `first` to `last` of the list, and `steps` stages of columns for each 64."""

    split: jax.Array
    first: jax.Array
    last: jax.Array
    first_col: jax.Array
    steps: jax.Array | int

    @property
    def chunks(self) -> jax.Array:
        return pl.cdiv(self.last - self.first, ROWS)


def _produce(product: _Product, share: _Share, producer, small_gmem, w_gmem, neurons_gmem, smem, interpret: bool):
    """The producer warpgroup: 64 listed rows of the matrix a stage, and what they are multiplied with."""
    small_smem, w_smem = smem
    load_rows, gather_rows, _ = rows.by_list(interpret)

    def load(chunk):
        first = share.first + chunk * ROWS
        inside = jnp.minimum(first, neurons_gmem.shape[0] - 1)  # where none is left, an entry is looked at all the same
        return load_rows(neurons_gmem, inside, share.last - first, ROWS)

    def chunk_body(chunk, carry):
        g, numbers = carry

        def step(s, g):
            first_col = share.first_col + s * product.columns
            summed = share.first + chunk * ROWS if product.down else first_col

            def start(slot, barrier):
                operand = small_gmem.at[:, pl.ds(summed, product.operand_columns)]
                plgpu.copy_gmem_to_smem(operand, small_smem.at[slot], barrier)
                gather_rows(w_gmem, w_smem.at[slot], numbers, first_col)
                return 1

            return producer.gather(g, start)

        upcoming = load(chunk + 1)  # under way while this chunk is copied
        return lax.fori_loop(0, share.steps, step, g), upcoming

    g, _ = lax.fori_loop(0, share.chunks, chunk_body, (jnp.int32(0), load(0)))
    producer.drain(g)


def _consume(product: _Product, share: _Share, out_gmem, smem, barriers, store):
    """The warpgroup that multiplies: a sum for each chunk of the list, or one for all of them, stored transposed."""
    small_smem, w_smem = smem
    tokens = small_smem.shape[1]

    def operands(slot):
        small = small_smem.at[slot].transpose((1, 0))
        if not product.down:
            return [(w_smem.at[slot], small)]
        return [
            (w_smem.at[slot, :, pl.ds(panel * PANEL, PANEL)].transpose((1, 0)), small)
            for panel in range(product.panels)
        ]

    def multiply(g, steps, first, left):
        def add_stages(*accs):
            g_next = pipeline.consume(product.stages, g, steps, accs, operands, **barriers)
            return tuple(acc[...] for acc in accs), g_next

        accs, g_next = pl.run_scoped(add_stages, *[plgpu.ACC((PANEL, tokens))] * product.panels)
        for panel, acc in enumerate(accs):
            store(acc, out_gmem, share.split, first + panel * PANEL, left - panel * PANEL)
        return g_next

    if product.down:
        multiply(jnp.int32(0), share.chunks, share.first_col, product.d_model - share.first_col)
    else:

        def chunk_body(chunk, g):
            first = share.first + chunk * ROWS
            return multiply(g, share.steps, first, share.last - first)

        lax.fori_loop(0, share.chunks, chunk_body, jnp.int32(0))


def _product_kernel(
    small_gmem, w_gmem, neurons_gmem, count_gmem, out_gmem, *, small_smem, w_smem, words_smem, full, empty, arrived,
    product: _Product, interpret: bool,
):  # fmt: skip
    warpgroup, smem = lax.axis_index("warpgroup"), (small_smem, w_smem)
    arrived = Gathered(memory=words_smem, interpreted=arrived if interpret else None, stages=product.stages)
    share = product.block(jnp.clip(count_gmem[0], 0, neurons_gmem.shape[0]))

    @pl.when(warpgroup == PRODUCER)
    def _producer():
        arrived.begin()
        producer = pipeline.Producer(stages=product.stages, full=full, empty=empty, arrivals=1, gathered=arrived)
        _produce(product, share, producer, small_gmem, w_gmem, neurons_gmem, smem, interpret)

    @pl.when(warpgroup != PRODUCER)
    def _consumer():
        barriers = {"full": full, "empty": empty, "gathered": arrived}
        store = store_transposed_interpreted if interpret else store_transposed
        _consume(product, share, out_gmem, smem, barriers, store)


def _launch(product: _Product, small, w, neurons, count, interpret: bool) -> Float32[Array, "splits tokens results"]:
    """The sums of each split."""
    tokens, dtype = small.shape[0], w.dtype
    smem = functools.partial(plgpu.SMEM, dtype=dtype, transforms=pipeline.swizzled(dtype))
    scratch: dict[str, Any] = {
        "small_smem": smem((product.stages, tokens, product.operand_columns)),
        "w_smem": smem((product.stages, ROWS, product.columns)),
        "words_smem": plgpu.SMEM((gathered.words(product.stages),), jnp.int32),
        "full": plgpu.Barrier(num_barriers=product.stages),
        "empty": plgpu.Barrier(num_barriers=product.stages),
        "arrived": plgpu.Barrier(num_barriers=product.stages),  # of the interpreter
    }
    results = product.d_model if product.down else neurons.shape[0]
    kernel = plgpu.kernel(
        functools.partial(_product_kernel, product=product, interpret=interpret),
        out_type=jax.ShapeDtypeStruct((product.splits, tokens, results), jnp.float32),
        grid=(product.splits * product.others,),
        grid_names=("block",),
        num_threads=2,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
        kernel_name="neuron_ffn_down" if product.down else "neuron_ffn_up",
    )
    return kernel(small, w, neurons, count[None])


@lowered_once("activation")
def batched(
    x: Float[Array, "batch d_model"],
    w1: Float[Array, "d_ff d_model"],
    b1: Float[Array, " d_ff"] | None,
    w2: Float[Array, "d_ff d_model"],
    neurons: Int32[Array, " capacity"],
    count: Int32[Array, ""],
    own: Bool[Array, "batch d_ff"] | None,
    activation: str,
    config: Config,
    interpret: bool,
) -> Float32[Array, "batch d_model"]:
    """Launches both kernels and adds what their splits found; `interpret` runs them on CPU under the race detector."""
    (batch, d_model), capacity = x.shape, neurons.shape[0]
    padding = (0, -batch % 8), (0, 0)  # tokens of a wgmma
    x, own = jnp.pad(x, padding), None if own is None else jnp.pad(own, padding)
    runs = 2 if interpret else max(device.sm_count() // config.up_splits, 1)
    up = _Product(
        down=False, d_model=d_model, columns=config.up_columns, stages=config.up_stages(batch), splits=config.up_splits,
        others=runs,
    )  # fmt: skip
    down = _Product(
        down=True, d_model=d_model, columns=config.down_columns, stages=config.down_stages(batch),
        splits=config.down_splits, others=pl.cdiv(d_model, config.down_columns),
    )  # fmt: skip
    h = _launch(up, x, w1, neurons, count, interpret).sum(axis=0)
    if b1 is not None:
        h += b1.at[neurons].get(mode="clip").astype(jnp.float32)[None]
    listed = jnp.arange(capacity, dtype=jnp.int32) < count
    h = jnp.where(computed(neurons, own, listed), ACTIVATIONS[activation](h), 0)  # what is not listed was not written
    h = h.astype(x.dtype)
    h = jnp.pad(h, ((0, 0), (0, max(-capacity % ROWS, 2 * PANEL - capacity))))  # whole chunks, for TMA two panels
    return _launch(down, h, w2, neurons, count, interpret).sum(axis=0)[:batch]
