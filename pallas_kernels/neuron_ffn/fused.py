"""One launch for both products of one token: a block takes its share of the list, a row of w1 and of w2 at a time.

A row of both is one stage of shared memory, filled by two TMA copies; nothing of the row of w2 depends on the
activation, so as many stages are under way as fit (6 of 28 kB at d_model 7168; 33 kB an SM would hide the latency of
memory at 4.3 TB/s). A warpgroup that multiplies has x and its own y in registers, float32, d_model / 128 values of
each a thread, and takes every `consumers`-th neuron of the block's: a dot product, a reduction over the warpgroup, and
a multiply-add to y. The y of all warpgroups of a block are added in shared memory, those of all blocks by XLA, in one
fixed order, where it fuses with what follows.

A block's neurons are those whose place in the list is its own number, its number and the number of blocks, and so on:
where they stand does not depend on how many count, so their numbers are loaded together with the count, `AHEAD` of them
before their rows are copied.

Budget at d_model 7168 on an H200, for each neuron of a block 28 kB: 880 ns of memory, 130 ns of shared memory, 4 * 56
instructions a thread. Beside the bytes: launch 1.3 us, list and first row 1.2 us, and the partial sums of 132 blocks,
3.8 MB written and read through L2, 0.7 us here and about 2 us in XLA's launch.

Measured there, 7168 x 28672 in bfloat16, in us (share of the bytes' time at 4.3 TB/s) at 5 / 10 / 20 / 50%, sorted
lists that change from call to call: 17.0 (56%) / 27.0 (71%) / 45.0 (85%) / 98.6 (97%), of which XLA's sum is 2.0 to
2.1; as it was before, each block with a run of the list whose numbers are loaded one by one behind the count, 17.4 /
28.0 / 46.7 / 102, and then with three consumers 17.5 / 27.6 / 46.4 / 102, with one 2 us more than with two; the two
launches of `batched` 4 to 6 us more; both products dense 191. With one neuron listed the kernel takes 4.05 us and XLA's
sum 1.9: these 6 us do not shrink with the list, and two launches of 1.3 us are nearly half of them.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref
from jaxlib.mlir.dialects import math as mlir_math
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.neuron_ffn.config import TMA_BOX, Config
from pallas_kernels.tile import device, epilogue
from pallas_kernels.tile.launch import lowered_once

WARPS = 4  # of a warpgroup
PRODUCER_REGISTERS = 40
AHEAD = 4  # neurons whose numbers are loaded before their rows are copied: each by itself would wait for memory
REGISTERS = {2: 224, 3: 152}  # a thread, by the warpgroups that compute; a single one has all that a thread can


def _strided(shape: tuple[int, ...]) -> Any:
    """A row spread over 128 threads, 16 bytes of 16-bit elements each where that divides it."""
    each = shape[0] * shape[1] // 128
    vector = next(v for v in (8, 4, 2, 1) if each % v == 0)
    return plgpu.Layout.WG_STRIDED(shape, vec_size=vector)


def dot(a: jax.Array, b: jax.Array, sums_smem) -> jax.Array:
    """The sum of a * b over the warpgroup, in an order of its own: `jnp.sum` of all elements has no lowering here.

    Args:
        a, b: float32, in the layout of `_strided`.
        sums_smem: float32 [4], another one than the call before this had, so that one barrier is enough.
    """
    layout = _strided(a.shape)

    @plgpu.inline_mgpu(
        arg_types=(layout, layout, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct((), jnp.float32, layout=plgpu.Layout.WG_SPLAT),
    )
    def multiply_and_add(ctx, a, b, sums):
        del ctx
        pairs = list(zip(a.registers.flat, b.registers.flat, strict=True))
        products = arith.mulf(*pairs[0])
        for x, y in pairs[1:]:
            products = mlir_math.fma(x, y, products)
        parts = [llvm.extractelement(products, _i32(i)) for i in range(ir.VectorType(products.type).shape[0])]
        total = functools.reduce(arith.addf, parts)
        for distance in (16, 8, 4, 2, 1):
            total = arith.addf(total, utils.shfl_bfly(total, distance))
        memref.store(total, sums, [arith.index_castui(ir.IndexType.get(), arith.remui(utils.warp_idx(), _i32(WARPS)))])
        utils.warpgroup_barrier()
        warps = [memref.load(sums, [arith.constant(ir.IndexType.get(), w)]) for w in range(WARPS)]
        return mgpu.FragmentedArray.splat(functools.reduce(arith.addf, warps), ())

    return multiply_and_add(a, b, sums_smem)  # pyright: ignore[reportCallIssue]


def dot_interpreted(a: jax.Array, b: jax.Array, sums_smem) -> jax.Array:
    """`dot`, for the interpreter."""
    del sums_smem
    return jnp.sum(a * b)


def _entry(t) -> jax.Array:
    """Where this block's t-th neuron stands in the list: known before the list's count is."""
    return lax.axis_index("sm") + t * lax.axis_size("sm")


def _neuron(neurons_gmem, t) -> jax.Array:
    """This block's t-th neuron, or another entry where it has none."""
    return neurons_gmem[jnp.minimum(_entry(t), neurons_gmem.shape[0] - 1)]


def _produce(w1_gmem, w2_gmem, neurons_gmem, number, w_smem, full, empty) -> None:
    """The producer warpgroup: the rows of both matrices, neuron by neuron."""
    stages = w_smem.shape[0]

    def copy(t, ahead):
        slot = lax.rem(t, stages)
        neuron, *ahead = (*ahead, _neuron(neurons_gmem, t + AHEAD))
        pl.when(t >= stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
        for matrix, w_gmem in enumerate((w1_gmem, w2_gmem)):
            plgpu.copy_gmem_to_smem(w_gmem.at[neuron], w_smem.at[slot, matrix], full.at[slot])
        return tuple(ahead)

    def wait_until_free(t, _):
        plgpu.barrier_wait(empty.at[lax.rem(t, stages)])

    lax.fori_loop(0, number, copy, tuple(_neuron(neurons_gmem, t) for t in range(AHEAD)))
    lax.fori_loop(jnp.maximum(number - stages, 0), number, wait_until_free, None)


def _consume(
    x_gmem, b1_gmem, own_gmem, neurons_gmem, number, w_smem, sums_smem, full, empty, *, dot, consumers, activation
):
    """A warpgroup that multiplies: its part of the block's y."""
    shape, stages = x_gmem.shape, w_smem.shape[0]
    layout = _strided(shape)
    load = functools.partial(plgpu.load, layout=layout)
    x = load(x_gmem).astype(jnp.float32)

    def of_neuron(t):
        """Of this block's t-th: the neuron's bias, and whether it is the token's own: 0 if not, None if all are."""
        if b1_gmem is None and own_gmem is None:
            return jnp.float32(0), None
        neuron = jnp.where(t < number, _neuron(neurons_gmem, t), 0)  # what follows the list may be anything
        bias = jnp.float32(0) if b1_gmem is None else b1_gmem[neuron].astype(jnp.float32)
        return bias, None if own_gmem is None else own_gmem[neuron]

    def add_neuron(step, carry):
        y, (bias, own) = carry
        t = own_first + step * consumers
        slot = lax.rem(t, stages)
        upcoming = of_neuron(t + consumers)  # under way while this neuron is computed
        plgpu.barrier_wait(full.at[slot])
        h = dot(load(w_smem.at[slot, 0]).astype(jnp.float32), x, sums_smem.at[lax.rem(step, 2)]) + bias
        h = epilogue.ACTIVATIONS[activation](h).astype(w_smem.dtype).astype(jnp.float32)
        h = h if own is None else jnp.where(own != 0, h, 0.0)
        y += h * load(w_smem.at[slot, 1]).astype(jnp.float32)
        plgpu.commit_smem()  # every thread has read the rows that copies will overwrite
        plgpu.barrier_arrive(empty.at[slot])
        return y, upcoming

    own_first = lax.axis_index("warpgroup")
    y = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)
    steps = pl.cdiv(jnp.maximum(number - own_first, 0), consumers)
    return lax.fori_loop(0, steps, add_neuron, (y, of_neuron(own_first)))[0]


def _combine(y: jax.Array, y_smem, out_gmem, combined) -> None:
    """Adds the y of the block's warpgroups, in order; the first one writes it."""
    warpgroup = lax.axis_index("warpgroup")
    if y_smem is None:
        out_gmem[lax.axis_index("sm")] = y
        return

    @pl.when(warpgroup > 0)
    def _hand_over():
        y_smem[warpgroup - 1] = y
        plgpu.barrier_arrive(combined)

    @pl.when(warpgroup == 0)
    def _add():
        plgpu.barrier_wait(combined)
        others = [plgpu.load(y_smem.at[i], layout=_strided(y.shape)) for i in range(y_smem.shape[0])]
        out_gmem[lax.axis_index("sm")] = sum(others, start=y)


def _fused_kernel(
    *args, names: tuple[str, ...], w_smem, sums_smem, full, empty, y_smem=None, combined=None, config: Config,
    activation: str, interpret: bool,
):  # fmt: skip
    refs = dict(zip(names, args, strict=True))
    warpgroup, consumers = lax.axis_index("warpgroup"), config.consumers
    left = jnp.clip(refs["count"][0], 0, refs["neurons"].shape[0]) - lax.axis_index("sm")
    number = pl.cdiv(jnp.maximum(left, 0), lax.axis_size("sm"))  # of the block's neurons

    @pl.when(warpgroup == consumers)
    def _producer():
        if consumers > 1:
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        _produce(refs["w1"], refs["w2"], refs["neurons"], number, w_smem, full, empty)

    @pl.when(warpgroup < consumers)
    def _consumer():
        if consumers > 1:
            plgpu.set_max_registers(REGISTERS[consumers], action="increase")
        y = _consume(
            refs["x"], refs.get("b1"), refs.get("own"), refs["neurons"], number, w_smem, sums_smem.at[warpgroup],
            full, empty, dot=dot_interpreted if interpret else dot, consumers=consumers, activation=activation,
        )  # fmt: skip
        _combine(y, y_smem, refs["out"], combined)


@lowered_once("activation")
def fused(
    x: Float[Array, "1 d_model"],
    w1: Float[Array, "d_ff d_model"],
    b1: Float[Array, " d_ff"] | None,
    w2: Float[Array, "d_ff d_model"],
    neurons: Int32[Array, " capacity"],
    count: Int32[Array, ""],
    own: Bool[Array, "1 d_ff"] | None,
    activation: str,
    config: Config,
    interpret: bool,
) -> Float32[Array, "1 d_model"]:
    """Launches the kernel and adds what its blocks found; `interpret` runs it on CPU under the race detector."""
    d_model = x.shape[1]
    box = math.gcd(d_model, TMA_BOX)
    row = (d_model // box, box)
    blocks = 2 if interpret else device.sm_count()
    inputs = {"x": x.reshape(row), "w1": w1.reshape(-1, *row), "b1": b1, "w2": w2.reshape(-1, *row)}
    inputs |= {"neurons": neurons, "count": count[None], "own": None if own is None else own[0].astype(jnp.int32)}
    inputs = {name: value for name, value in inputs.items() if value is not None}
    stages, others = config.fused_stages(d_model), config.consumers - 1
    scratch: dict[str, Any] = {
        "w_smem": plgpu.SMEM((stages, 2, *row), x.dtype),
        "sums_smem": plgpu.SMEM((config.consumers, 2, WARPS), jnp.float32),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "empty": plgpu.Barrier(num_barriers=stages),
    }
    if others:
        scratch |= {"y_smem": plgpu.SMEM((others, *row), jnp.float32), "combined": plgpu.Barrier(num_arrivals=others)}
    kernel = plgpu.kernel(
        functools.partial(
            _fused_kernel, names=(*inputs, "out"), config=config, activation=activation, interpret=interpret
        ),
        out_type=jax.ShapeDtypeStruct((blocks, *row), jnp.float32),
        grid=(blocks,),
        grid_names=("sm",),
        num_threads=config.consumers + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
        kernel_name="neuron_ffn",
    )
    return kernel(*inputs.values()).sum(axis=0).reshape(1, d_model)


def _i32(value: int) -> ir.Value:
    return arith.constant(ir.IntegerType.get_signless(32), value)
