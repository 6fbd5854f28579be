"""C = A @ B, one tile of C a block: a small complete kernel to start from. Change it into yours, part by part.

Layouts: A [M, K], B [K, N] and C [M, N], rows contiguous. FLOPs: 2 * M * N * K. Bytes: (M*K + K*N + M*N) * itemsize,
each value once. The Mosaic kernel is a pipeline through shared memory: a producer warpgroup copies blocks of A and B
into `stages` buffers in turn (TMA), a consumer warpgroup multiplies them (wgmma), and barriers keep the two apart.
Check it with `python -m pallas_kernels check kernel_name`, on a GPU then `tune` and `bench`.

Source: name the paper and section that the operation comes from.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.case import Case, Work
from pallas_kernels.tile.device import require_device
from pallas_kernels.tile.launch import lowered_once
from pallas_kernels.tile.pipeline import swizzled
from pallas_kernels.tuning import tuned_config

DEVICES = ("NVIDIA H100", "NVIDIA H200")  # wgmma is Hopper's; `check` says what another GPU lacks
BLOCK_K = 64  # K a step of the pipeline: 64 values of 16 bits fill the 128 bytes that a swizzled row holds
PRODUCER, CONSUMER = 0, 1  # the two warpgroups (128 threads each) of a block


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What may be tuned.

    Attributes:
        block_m: rows of C a block, a multiple of 64 that divides M.
        block_n: columns of C a block, a multiple of 64 that divides N.
        stages: buffers of A and B in shared memory, at least 2.
    """

    block_m: int = 128
    block_n: int = 128
    stages: int = 4


def reference(a: Float[Array, "M K"], b: Float[Array, "K N"]) -> Float[Array, "M N"]:
    """Obviously right: float32 throughout. Everything else is measured against this."""
    product = jnp.dot(a.astype(jnp.float32), b.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    return product.astype(a.dtype)


def _xla(a, b):
    """The path for every other device and every shape the Mosaic kernel does not take."""
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32).astype(a.dtype)


def _kernel(a_gmem, b_gmem, c_gmem, *, a_smem, b_smem, c_smem, full, empty, config: Config):
    """The body. Each block runs it once, both warpgroups at the same time."""
    m0, n0 = lax.axis_index("m") * config.block_m, lax.axis_index("n") * config.block_n
    steps = a_gmem.shape[1] // BLOCK_K
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == PRODUCER)
    def _produce():
        def step(s, _):
            slot = lax.rem(s, config.stages)
            # From the second round on, a buffer must have been read before it is filled again.
            pl.when(s >= config.stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
            # SRead. A TMA copy runs by itself and arrives at the barrier when its bytes are there; two copies a stage
            # are why `full` expects two arrivals. A sparse kernel chooses here which rows come next.
            k0 = s * BLOCK_K
            a_block, b_block = pl.ds(m0, config.block_m), pl.ds(n0, config.block_n)
            plgpu.copy_gmem_to_smem(a_gmem.at[a_block, pl.ds(k0, BLOCK_K)], a_smem.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(b_gmem.at[pl.ds(k0, BLOCK_K), b_block], b_smem.at[slot], full.at[slot])

        lax.fori_loop(0, steps, step, None)

    @pl.when(warpgroup == CONSUMER)
    def _consume():
        def multiply(acc):
            def step(s, _):
                slot = lax.rem(s, config.stages)
                plgpu.barrier_wait(full.at[slot])
                plgpu.wgmma(acc, a_smem.at[slot], b_smem.at[slot])  # the tensor core: acc += a @ b, asynchronous
                plgpu.wgmma_wait(0)  # now the buffer has been read
                # Tell the producer, if it will come back to this buffer: an arrival nobody waits for is a mistake.
                pl.when(s + config.stages < steps)(lambda: plgpu.barrier_arrive(empty.at[slot]))

            lax.fori_loop(0, steps, step, None)
            return acc[...]

        # The accumulator lives in registers, in float32, and starts as zero.
        acc = pl.run_scoped(multiply, plgpu.ACC((config.block_m, config.block_n)))
        # SWrite: registers -> shared memory -> global memory. TMA sees shared memory only after commit_smem.
        c_smem[...] = acc.astype(c_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(c_smem, c_gmem.at[pl.ds(m0, config.block_m), pl.ds(n0, config.block_n)])
        plgpu.wait_smem_to_gmem(0)  # a block must not end while its copies run


@lowered_once()
def _mosaic(a, b, config: Config, interpret: bool):
    """The launch: one block a tile of C, its shared memory and its barriers."""
    m, n, dtype = a.shape[0], b.shape[1], a.dtype
    layout = swizzled(dtype)  # how shared memory must hold a matrix so that wgmma reads it without bank conflicts
    kernel = plgpu.kernel(
        functools.partial(_kernel, config=config),
        out_type=jax.ShapeDtypeStruct((m, n), dtype),
        grid=(m // config.block_m, n // config.block_n),
        grid_names=("m", "n"),
        num_threads=2,  # a Pallas thread is a warpgroup
        thread_name="warpgroup",
        scratch_types={
            "a_smem": plgpu.SMEM((config.stages, config.block_m, BLOCK_K), dtype, transforms=layout),
            "b_smem": plgpu.SMEM((config.stages, BLOCK_K, config.block_n), dtype, transforms=layout),
            "c_smem": plgpu.SMEM((config.block_m, config.block_n), dtype, transforms=layout),
            "full": plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
            "empty": plgpu.Barrier(num_arrivals=1, num_barriers=config.stages),
        },
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )
    return kernel(a, b)


def candidates(a, b) -> list[Config]:
    """Configs worth timing for these arguments (shapes are enough). The first one is the heuristic's choice."""
    return [
        Config(block_m=block_m, block_n=block_n, stages=stages)
        for block_m, block_n in ((128, 128), (128, 64), (64, 128), (64, 64))
        for stages in (4, 2)
        if a.shape[0] % block_m == 0 and b.shape[1] % block_n == 0
    ]


def work(a, b) -> Work:
    """FLOPs and bytes of these arguments: they give the bound that `bench` compares with."""
    (m, k), n = a.shape, b.shape[1]
    return Work(flops=2 * m * n * k, bytes=(m * k + k * n + m * n) * a.dtype.itemsize)


def peers(a, b):
    """What a user would run instead, timed beside the kernel."""
    del a, b
    return {"dense": jnp.dot}


def _normal(m: int, n: int, k: int):
    def make(key, dtype):
        key_a, key_b = jax.random.split(key)
        return jax.random.normal(key_a, (m, k), dtype), jax.random.normal(key_b, (k, n), dtype)

    return make


CASES = (
    Case(name="two_tiles", make=_normal(256, 128, 384), small=True),  # 6 steps through 4 stages: buffers are reused
    Case(name="ragged", make=_normal(100, 72, 50), small=True),  # no tile divides it: xla takes it
    Case(name="square_4096", make=_normal(4096, 4096, 4096), bench=True),
)


# `implementation` and `config` choose how, not what: custom_vjp must not trace them.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _matmul(a, b, config, implementation):
    return _xla(a, b) if implementation == "xla" else _mosaic(a, b, config, implementation == "interpret")


def _forward(a, b, config, implementation):
    return _matmul(a, b, config, implementation), (a, b)


def _backward(config, implementation, operands, dc):
    a, b = operands
    return _xla(dc, b.T), _xla(a.T, dc)


_matmul.defvjp(_forward, _backward)


def kernel_name(
    a: Float[Array, "M K"],
    b: Float[Array, "K N"],
    *,
    config: Config | None = None,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """C = A @ B, accumulated in float32.

    Args:
        a: [M, K]; bfloat16, float16 or float32.
        b: [K, N], of the same dtype.
        config: tiling of the Mosaic kernel; None takes the tuned one, or a heuristic.
        implementation: "mosaic_gpu", "xla", "interpret" (the Mosaic kernel on CPU, with race detection), or None: the
            Mosaic kernel where it can run, else xla.

    Returns:
        C, [M, N], in the operands' dtype.

    Raises:
        ValueError: the operands or the config do not fit together.
        NotImplementedError: the asked implementation cannot take these arguments or this device.
    """
    if a.shape[1] != b.shape[0] or a.dtype != b.dtype:
        raise ValueError(f"a [M, K] and b [K, N] must share K and dtype; got {a.shape} {a.dtype}, {b.shape} {b.dtype}")
    if implementation not in (None, "mosaic_gpu", "xla", "interpret"):
        raise ValueError(f'implementation must be None, "mosaic_gpu", "xla" or "interpret"; got {implementation!r}')
    if implementation is None:
        try:
            _check_mosaic(a, b, on_gpu=True)
            implementation = "mosaic_gpu"
        except NotImplementedError:
            implementation = "xla"
    elif implementation != "xla":
        _check_mosaic(a, b, on_gpu=implementation == "mosaic_gpu")
    if implementation != "xla":
        config = config or tuned_config("kernel_name", Config, a, b) or candidates(a, b)[0]
        _check_config(config, a, b)
    return _matmul(a, b, config, implementation)


def _check_mosaic(a, b, *, on_gpu: bool) -> None:
    """NotImplementedError means: right arguments, but not for this path."""
    (m, k), n = a.shape, b.shape[1]
    if m % 64 or n % 64 or k % BLOCK_K or 0 in (m, n, k):
        raise NotImplementedError(f"M, N and K must be multiples of 64, and not 0; got {m=}, {n=}, {k=}")
    if a.dtype.itemsize != 2:
        raise NotImplementedError(f"the Mosaic kernel takes bfloat16 and float16; got {a.dtype}")
    if on_gpu:
        require_device("kernel_name", DEVICES)


def _check_config(config: Config, a, b) -> None:
    """ValueError means: the caller is wrong, whatever the path."""
    (m, _), n = a.shape, b.shape[1]
    if config.block_m % 64 or config.block_n % 64 or m % config.block_m or n % config.block_n or config.stages < 2:
        raise ValueError(
            f"block_m, block_n must be multiples of 64 that divide M, N, and stages 2 or more; got {config}, {m=}, {n=}"
        )
