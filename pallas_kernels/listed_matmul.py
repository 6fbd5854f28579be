"""y = x @ w, of which only the listed blocks of w's columns, or of its rows, are read: projections of listed heads.

    columns:  y[t, c] = sum over all k of x[t, k] * w[k, c]  where c is in a listed block, else 0      (into heads: q)
    rows:     y[t, c] = sum over the k in listed blocks of x[t, k] * w[k, c]                  (out of heads: the output)

Layouts: x [tokens, K], w [K, N] as a dense layer keeps it, listed [blocks]: of attention, a block is a head, 64 or 128
columns or rows that follow each other. So TMA copies it as it lies, 256 bytes of each row of q's matrix at a time, and
no weight is kept twice. Work: 2 * tokens * (listed part of w) FLOPs. Bytes: that part of w once, x and y.

Tokens share the list: with one for each sequence, it is their union that is read, of 8 that list half of the heads at
random all of them. So this is for small batches, or for heads that sequences have in common.

Measured on an H200 for OPT-30B (d_model 7168, 56 heads of 128: 103 MB, 24 us at 4.3 TB/s), with a quarter / half / all
of the heads listed, in us: rows at batch 1 10.4 / 17.8 / 32.2, at batch 8 8.8 / 15.4 / 29.9, at 32 9.8 / 18.3 / 32.6;
columns 12.1 / 18.1 / 33.4, 10.6 / 17.0 / 31.6, 12.6 / 20.9 / 35.2; the dense product 27, 27 and 31. So it pays below
about four fifths of the heads. OPT-13B's, with half of 40 heads, 10.8 for 14.2. Beside the bytes the kernel takes some
3 us (launch, list, first stage), XLA's sum of what its blocks found 1.5, and padding x 1.3 unless 8 divides the tokens.
Of smaller matrices the dense product takes hardly longer than two launches: they are left to XLA (`MIN_BYTES`). Taking
q out of the projections costs no launch: products of one operand are merged by XLA up to 32 MB only.

Sources: Shrestha et al., "Polar Sparsity" (2025), section 4; Liu et al., "Deja Vu" (ICML'23), section 4.2.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Float32

from pallas_kernels import tuning
from pallas_kernels.case import Case, Work
from pallas_kernels.micro_tile_index import compact
from pallas_kernels.operands import check_implementation, check_operands, vary_together
from pallas_kernels.tile import device, pipeline
from pallas_kernels.tile.launch import lowered_once
from pallas_kernels.tile.swrite import store_transposed, store_transposed_interpreted

type Axis = Literal["rows", "columns"]

AXES: tuple[Axis, ...] = ("rows", "columns")  # the dimensions of w
DEVICES = ("NVIDIA H100", "NVIDIA H200")
MAX_TOKENS = 32
MIN_BYTES = 48 * 2**20  # of w, from which on half of it takes longer to read than two launches
PANEL = pipeline.PANEL  # columns of an accumulator, and rows of w a stage: a side of wgmma
SMEM_BYTES = 112 * 1024 - 256  # of a block, two of which share an SM; less what barriers take
MAX_STAGES = 12
MAX_SPLITS = 16
RESIDENT = 2 * 132  # blocks that an H200 runs at once: what the heuristic counts with


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tiling of the Mosaic kernel. Stages are as many as let two blocks share an SM.

    Attributes:
        columns: of w that a block multiplies, 64, 128 or 256; they divide N, and what is listed of columns.
        splits: blocks that share the sum of a result.
    """

    columns: int = 128
    splits: int = 4

    def stages(self, tokens: int) -> int:
        """Of 64 rows of w each, and as many columns of x."""
        return min(MAX_STAGES, SMEM_BYTES // (2 * PANEL * (self.columns + tokens + -tokens % 8)))


def reference(x, w, listed, axis: Axis) -> Float[Array, "tokens N"]:
    """All of w in float32, zero where it is not listed."""
    mask = jnp.repeat(listed, w.shape[AXES.index(axis)] // len(listed))
    w = jnp.where(mask[None] if axis == "columns" else mask[:, None], w, 0)
    return jnp.dot(x, w, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32).astype(x.dtype)


@functools.partial(jax.jit, static_argnames="axis")
def _xla(x, w, listed, axis: Axis) -> Float32[Array, "tokens N"]:
    """The xla path: the dense product, under a mask; as precise as a dense layer is."""
    mask = jnp.repeat(listed, w.shape[AXES.index(axis)] // len(listed))[None]
    x = jnp.where(mask, x, 0) if axis == "rows" else x
    y = jnp.dot(x, w, preferred_element_type=jnp.float32)
    return jnp.where(mask, y, 0) if axis == "columns" else y


def _kernel(
    x_gmem, w_gmem, blocks_gmem, count_gmem, out_gmem, *, x_smem, w_smem, arrived, axis: Axis, width: int, splits: int,
    store,
):  # fmt: skip
    """One warpgroup: a tile of columns of w, and its share of the rows."""
    tile, split, columns = lax.axis_index("tile"), lax.axis_index("split"), w_smem.shape[2]
    parts = width // (columns if axis == "columns" else PANEL)  # of a listed block: tiles, or stages
    listed = count_gmem[0] * parts

    def listed_part(i):
        """Where one of them begins in w."""
        return blocks_gmem[lax.div(i, parts)] * width + lax.rem(i, parts) * (width // parts)

    def multiply(first_col, row_of, stages):
        first, last = (lax.div((split + i) * stages, splits) for i in (0, 1))
        refs = x_gmem, w_gmem, x_smem, w_smem, arrived
        add_stages = functools.partial(_add_stages, first, last, first_col, row_of, refs)
        accs = pl.run_scoped(add_stages, *[plgpu.ACC((PANEL, x_smem.shape[1]))] * (columns // PANEL))
        for panel, acc in enumerate(accs):
            store(acc, out_gmem, split, first_col + panel * PANEL, jnp.int32(PANEL))

    if axis == "rows":
        multiply(tile * columns, listed_part, listed)
    else:  # tiles behind the list have nothing to do
        pl.when(tile < listed)(lambda: multiply(listed_part(tile), lambda i: i * PANEL, w_gmem.shape[0] // PANEL))


def _add_stages(first, last, first_col, row_of, refs, *accs) -> tuple[Float32[Array, "64 tokens"], ...]:
    """The sum over stages `first` to `last`, transposed: 64 rows of w from `row_of(stage)` on, and those columns of x.

    As many copies are under way as there are stages, so one warpgroup is enough, which waits for each product.
    """
    x_gmem, w_gmem, x_smem, w_smem, arrived = refs
    stages, _, columns = w_smem.shape

    def copy(i):
        slot, rows = lax.rem(i - first, stages), pl.ds(row_of(i), PANEL)
        plgpu.copy_gmem_to_smem(x_gmem.at[:, rows], x_smem.at[slot], arrived.at[slot])
        plgpu.copy_gmem_to_smem(w_gmem.at[rows, pl.ds(first_col, columns)], w_smem.at[slot], arrived.at[slot])

    def step(i, _):
        slot = lax.rem(i - first, stages)
        plgpu.barrier_wait(arrived.at[slot])
        for panel, acc in enumerate(accs):
            weights = w_smem.at[slot, :, pl.ds(panel * PANEL, PANEL)].transpose((1, 0))
            plgpu.wgmma(acc, weights, x_smem.at[slot].transpose((1, 0)))
        plgpu.wgmma_wait(0)
        plgpu.commit_smem()  # every warp has read what the next copy overwrites
        pl.when(i + stages < last)(lambda: copy(i + stages))

    for i in range(stages):
        pl.when(first + i < last)(functools.partial(copy, first + i))
    lax.fori_loop(first, last, step, None)
    return tuple(acc[...] for acc in accs)


@lowered_once("axis")
def _mosaic(
    x: Float[Array, "tokens K"],
    w: Float[Array, "K N"],
    listed: Bool[Array, " blocks"],
    axis: Axis,
    config: Config,
    interpret: bool,
) -> Float32[Array, "tokens N"]:
    """Launches the kernel and adds what its splits found; `interpret` runs it on CPU under the race detector."""
    tokens, n = len(x), w.shape[1]
    width = w.shape[AXES.index(axis)] // len(listed)
    x = jnp.pad(x, ((0, -tokens % 8), (0, 0)))  # tokens of a wgmma
    blocks, count = compact(listed[None])
    stages, padded = config.stages(tokens), len(x)
    smem = functools.partial(plgpu.SMEM, dtype=w.dtype, transforms=pipeline.swizzled(w.dtype))
    store = store_transposed_interpreted if interpret else store_transposed
    kernel = plgpu.kernel(
        functools.partial(_kernel, axis=axis, width=width, splits=config.splits, store=store),
        out_type=jax.ShapeDtypeStruct((config.splits, padded, n), jnp.float32),
        grid=(n // config.columns, config.splits),
        grid_names=("tile", "split"),
        scratch_types={
            "x_smem": smem((stages, padded, PANEL)),
            "w_smem": smem((stages, PANEL, config.columns)),
            "arrived": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        },
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
        kernel_name=f"listed_matmul_{axis}",
    )
    y = kernel(x, w, blocks[0], count).sum(axis=0)[:tokens]
    return y if axis == "rows" else jnp.where(jnp.repeat(listed, width)[None], y, 0)  # others were not written


def candidates(x, w, listed, axis: Axis) -> list[Config]:
    """Configs worth timing for these arguments (shapes are enough); the heuristic's choice comes first.

    That has as many blocks as an H200 runs at once if half of w is listed, unless a block had too little to sum.
    """
    del x
    (k, n), by_columns = w.shape, axis == "columns"
    found = []
    for columns, times in ((128, 1.0), (128, 0.5), (64, 1.0), (64, 0.5), (256, 1.0), (256, 0.5)):
        if (n // len(listed) if by_columns else n) % columns == 0:
            tiles = n // columns / (2 if by_columns else 1)
            most = min(k // (4 * PANEL), MAX_SPLITS)
            found.append(Config(columns=columns, splits=max(min(int(times * RESIDENT / tiles), most), 1)))
    return list(dict.fromkeys(found))


def _check_support(x, w, width: int) -> None:
    """Raises NotImplementedError where the kernel cannot take these arguments."""
    if x.dtype.itemsize != 2:
        raise NotImplementedError(f"the Mosaic kernel takes bfloat16 and float16; got {x.dtype}")
    if len(x) > MAX_TOKENS:
        raise NotImplementedError(f"the Mosaic kernel takes {MAX_TOKENS} tokens at most; got tokens={len(x)}")
    if width % PANEL or any(size % PANEL or size < 2 * PANEL for size in w.shape):
        rule = f"the Mosaic kernel takes K, N and blocks in multiples of {PANEL}, K and N of {2 * PANEL} at least"
        raise NotImplementedError(f"{rule}; got K={w.shape[0]}, N={w.shape[1]} and blocks of {width}")


def _check_config(config: Config) -> None:
    if config.columns not in (64, 128, 256):
        raise ValueError(f"columns must be 64, 128 or 256; got columns={config.columns}")
    if not 1 <= config.splits <= MAX_SPLITS:
        raise ValueError(f"splits must be 1 to {MAX_SPLITS}; got splits={config.splits}")


def work(x, w, listed, axis: Axis) -> Work:
    """FLOPs and bytes of these very arguments (the list is read): what is listed of w once."""
    (tokens, k), n, count = x.shape, w.shape[1], int(jnp.sum(listed))
    read = w.size // len(listed) * count
    columns_of_x = read // n if axis == "rows" else k
    return Work(flops=2 * tokens * read, bytes=x.dtype.itemsize * (read + tokens * (columns_of_x + n)) + len(listed))


def peers(x, w, listed, axis: Axis):
    """The dense product."""
    del x, w, listed, axis
    return {"dense": lambda x, w, *_: jnp.dot(x, w)}


def _case(
    name: str,
    *,
    tokens: int,
    k: int,
    n: int,
    axis: Axis,
    blocks: int,
    listed: int,
    dtypes: tuple[str, ...] = ("bfloat16",),
    **flags: bool,
) -> Case:
    def make(key: jax.Array, dtype: jnp.dtype):
        key_x, key_w, key_listed = jax.random.split(key, 3)
        x, w = jax.random.normal(key_x, (tokens, k), dtype), jax.random.normal(key_w, (k, n), dtype)
        return x, w, jax.random.permutation(key_listed, blocks) < listed, axis

    return Case(name=name, make=make, dtypes=dtypes, gradient=False, **flags)


def _bench(name: str, tokens: int, heads: int, percent: int, axis: Axis) -> Case:
    return _case(
        f"{name}, {axis}, batch {tokens}, {percent}%", tokens=tokens, k=128 * heads, n=128 * heads, axis=axis,
        blocks=heads, listed=heads * percent // 100, bench=True,
    )  # fmt: skip


SIXTEEN_BIT = ("bfloat16", "float16")

CASES = (
    _case("columns", tokens=1, k=384, n=512, axis="columns", blocks=4, listed=2, dtypes=SIXTEEN_BIT, small=True),
    _case("columns of 64", tokens=3, k=128, n=192, axis="columns", blocks=3, listed=3, small=True),
    _case("rows", tokens=8, k=512, n=128, axis="rows", blocks=4, listed=3, dtypes=SIXTEEN_BIT, small=True),
    _case("rows of 64", tokens=1, k=192, n=256, axis="rows", blocks=3, listed=2, small=True),
    _case("no rows", tokens=1, k=128, n=128, axis="rows", blocks=2, listed=0, small=True),
    _case("heads of 80", tokens=2, k=100, n=320, axis="columns", blocks=4, listed=2, dtypes=(*SIXTEEN_BIT, "float32")),
    _case("40 tokens", tokens=40, k=320, n=100, axis="rows", blocks=4, listed=2, dtypes=(*SIXTEEN_BIT, "float32")),
    *(
        _bench("opt-30b", tokens, 56, percent, axis)
        for axis in AXES
        for tokens in (1, 8, 32)
        for percent in (25, 50, 100)
    ),
    *(_bench("opt-13b", tokens, 40, 50, axis) for axis in AXES for tokens in (1, 8)),
)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5))
def _listed_matmul(x, w, listed, axis: Axis, config: Config | None, implementation: str | None):
    """The product by the Mosaic kernel, or by xla where there is no config."""
    if not x.size or not w.size:
        return jnp.zeros((len(x), w.shape[1]), x.dtype)
    with jax.enable_x64(False):  # under which a Python integer meets an int32 as one of its kind
        if config is None:
            return _xla(x, w, listed, axis).astype(x.dtype)
        y = _mosaic(x, w, listed, axis, config, implementation == "interpret").astype(x.dtype)
        return vary_together(x, y)[1]  # under shard_map a kernel's output does not say that it varies


@_listed_matmul.defjvp
def _refuse(axis, config, implementation, primals, tangents):
    raise NotImplementedError(
        "listed_matmul is for decoding and has no gradient; differentiate the dense product instead"
    )


def listed_matmul(
    x: Float[Array, "tokens K"],
    w: Float[Array, "K N"],
    listed: Bool[Array, " blocks"],
    axis: Axis,
    *,
    config: Config | None = None,
    implementation: str | None = None,
) -> Float[Array, "tokens N"]:
    """x @ w of which only listed blocks of columns, or of rows, are computed; the others count as zero.

    The kernel does not read what is not listed; the xla path does, so it must be finite. Accumulates in float32. All
    tokens share the list: where each has its own, give their union. Has no gradient.

    Args:
        x: bfloat16, float16 or float32. With `axis` "rows", its columns that are not listed may be anything.
        w: of the same dtype.
        listed: which of the equal blocks count that `axis` is divided into.
        axis: "columns" or "rows" of w.
        config: tiling of the Mosaic kernel; None takes the tuned one, or a heuristic.
        implementation: "mosaic_gpu" (Hopper, 16-bit types, 32 tokens at most, blocks in multiples of 64), "xla"
            (anywhere), "interpret" (the Mosaic kernel on CPU under the race detector, slow), or None: the Mosaic
            kernel where it can run and w has `MIN_BYTES` or there is a config, else xla.

    Raises:
        ValueError: shapes, dtypes, `axis` or config do not fit together.
        NotImplementedError: the asked implementation cannot take these arguments or this device; or a gradient is
            asked for.

    Source: Polar Sparsity (2025), section 4.
    """
    x, w, listed = (jnp.asarray(a) for a in (x, w, listed))
    check_operands("mk,kn", x=x, w=w)
    if axis not in AXES:
        raise ValueError(f"axis must be rows or columns; got {axis!r}")
    size = w.shape[AXES.index(axis)]
    if listed.ndim != 1 or listed.dtype != bool or not len(listed) or size % len(listed):
        rule = f"listed must be bool [blocks], which divide the {size} {axis} of w"
        raise ValueError(f"{rule}; got {listed.dtype}{list(listed.shape)}")
    check_implementation(implementation)
    width = size // len(listed)
    if config is not None:
        _check_config(config)

    def check(config: Config | None) -> None:
        _check_support(x, w, width)
        if implementation != "interpret":
            device.require_device("listed_matmul", DEVICES)
        if implementation is None and config is None and w.nbytes < MIN_BYTES:
            raise NotImplementedError(f"the Mosaic kernel pays from {MIN_BYTES} bytes on; got {w.nbytes}")
        if config is not None and (divided := width if axis == "columns" else w.shape[1]) % config.columns:
            raise ValueError(f"columns must divide {divided}; got columns={config.columns}")

    arguments = x, w, listed, axis
    config = tuning.choose_config(
        "listed_matmul", Config, arguments, config, implementation, check=check, candidates=candidates
    )
    return _listed_matmul(*vary_together(x, w, listed), axis, config, implementation)
