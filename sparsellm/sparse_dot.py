"""The one sparse operator: a @ b, skipping micro-tiles that are zero.

A plan says how (`sparsellm.plan`): micro-tiles packed along k (`gather_matmul`), along m (`scatter_matmul`), or a dense
product. Which micro-tiles are live is found on the device from values or a mask, so a new pattern compiles nothing.
Source: PIT (SOSP'23), section 3.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Shaped

from pallas_kernels import MicroTileIndex, gather_matmul, micro_tile_index
from pallas_kernels.micro_tile_index import compact
from pallas_kernels.operands import check_implementation
from pallas_kernels.scatter_matmul import scatter_matmul
from sparsellm.micro_tiles import MicroTile, live_micro_tiles
from sparsellm.plan import DENSE, Plan, choose_plan

BLOCK = 128  # rows and columns of what `out_mask` wants or not
DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
BLOCKS = Plan("k", MicroTile(BLOCK, BLOCK))  # where both operands are sparse
DEFAULT = Plan("k", MicroTile(128, 1))  # what little it loses where nothing is zero is little beside what it may win


def sparse_dot(
    a: Shaped[Array, "*batch M K"],
    b: Shaped[Array, "*batch_b K N"],
    *,
    mask: Any = None,
    sparse: Literal["a", "b", "both"] = "a",
    plan: Plan | None = None,
    density: float | None = None,
    out_mask: Bool[Array, "*batch_out blocks_m blocks_n"] | None = None,
    implementation: str | None = None,
) -> Shaped[Array, "*batch M N"]:
    """The product a @ b of which one operand, or both, are mostly zero: exact for every pattern.

    Works under jit, vmap, scan and shard_map, and never asks the host which elements are zero. Float32 keeps full
    precision by the plans k and m, and by "dense" has what `jnp.dot` gives on this device.

    Gradients (reverse mode) are those of `where(mask, a, 0) @ b`, for all of `b` and all that the mask keeps of `a`.
    Without a mask the zeros are found in the values, and what is skipped is not a function of them: a micro-tile of `a`
    that is all zero gets no gradient, as behind a ReLU, while zeros inside a live one do. The dense plan skips nothing.
    Under shard_map micro-tiles are those of the shard: give a mask where the gradient must not depend on it.

    What is not finite in one operand may meet the other's zeros, which gives NaN as in a dense product, or be skipped
    with them: that depends on the plan, the implementation, and how much is live.

    Args:
        a: [..., M, K]; bfloat16, float16, float32, or float8_e4m3fn, which is widened to bfloat16.
        b: [K, N], or [..., K, N] with the leading dimensions of `a`; of the same dtype, once widened.
        mask: bool, of the sparse operand's shape: where it counts, elsewhere it is zero whatever its value. For "both"
            a pair of masks (of which one may be None). None finds the zeros in the values.
        sparse: which operand: "a", "b" (the transposed problem, in whose terms `plan` is), or "both", in blocks of
            128 x 128: a block of the result takes the k at which its row of `a` and its column of `b` both are live.
        plan: how it runs. None: chosen by `density` where that is given, else k 128x1. None for "both".
        density: expected share of non-zero elements of the sparse operand, lying at random.
        out_mask: bool [..., ceil(M / 128), ceil(N / 128)], which blocks of the result are wanted: others are zero.
            Where `b` is shared, M is all rows of `a`, leading dimensions included. Plan k skips what is not wanted.
        implementation: as for `gather_matmul`; None takes the best.

    Returns:
        [..., M, N], in the operands' (widened) dtype.

    Raises:
        ValueError: arguments do not fit together.
        NotImplementedError: the asked implementation cannot take the plan or this device.

    Source: PIT (SOSP'23), sections 3.1 to 3.4.
    """
    a, b = _operand("a", a), _operand("b", b)
    masks = _masks(mask, sparse)
    out_mask = None if out_mask is None else jnp.asarray(out_mask)
    check_implementation(implementation)
    _check(a, b, masks, sparse, plan, density, out_mask)
    shape = (*a.shape[:-1], b.shape[-1])
    # A shared b serves all rows of a at once; else there is a product for each entry of the leading dimensions.
    batch = a.shape[:-2] if b.ndim > 2 else ()
    one = (math.prod(batch),) if batch else ()
    a, mask_a = _reshape(a, (*one, math.prod(a.shape[len(batch) : -1]), a.shape[-1]), masks[0])
    b, mask_b = _reshape(b, (*one, *b.shape[-2:]), masks[1])
    if out_mask is not None:
        out_mask = out_mask.reshape(*one, *out_mask.shape[-2:])
    plan = plan or _chosen(a, b, sparse, density)

    def product(a, b, mask_a, mask_b, out_mask):
        if sparse == "both":
            c = _both_sparse(a, b, mask_a, mask_b, out_mask, implementation)
        elif sparse == "a":
            c = _one_sparse(a, b, mask_a, out_mask, plan, implementation)
        else:
            c = _one_sparse(b.T, a.T, _transposed(mask_b), _transposed(out_mask), plan, implementation).T
        if out_mask is None:
            return c
        # What is not wanted is zero already by plan k; this keeps its cotangent out of the gradients too.
        return jnp.where(_expand(out_mask, BLOCK, c.shape), c, 0)

    operands = (a, b, mask_a, mask_b, out_mask)
    if not batch:
        return product(*operands).reshape(shape)
    if plan == DENSE:
        return jax.vmap(product)(*operands).reshape(shape)
    return lax.map(lambda one: product(*one), operands).reshape(shape)  # each a kernel that fills the device by itself


def _one_sparse(a, b, mask, out_mask, plan: Plan, implementation: str | None) -> Shaped[Array, "M N"]:
    """a @ b for matrices, a sparse."""
    live = lax.stop_gradient(a) if mask is None else mask
    if mask is not None:
        a = jnp.where(mask, a, 0)
    if plan.micro_tile is None:  # dense
        return jnp.dot(a, b, preferred_element_type=jnp.float32).astype(a.dtype)
    rows, cols = plan.micro_tile.rows, plan.micro_tile.cols
    if plan.axis == "m":
        return scatter_matmul(a, b, micro_tile_index(live, cols), implementation=implementation)
    index = micro_tile_index(live.T, rows, cols)
    if out_mask is not None and BLOCK % rows == 0:
        index = _wanted(index, jnp.repeat(out_mask, BLOCK // rows, axis=0)[: index.counts.shape[0]])
    return gather_matmul(a.T, b, index, index.out_cols is None, implementation=implementation)


def _wanted(index: MicroTileIndex, out_mask: Bool[Array, "blocks across"]) -> MicroTileIndex:
    """A list for each block of C: that of its rows where the block is wanted, else an empty one."""
    across = out_mask.shape[1]
    counts = jnp.where(out_mask, index.counts[:, None], 0).reshape(-1)
    indices = jnp.repeat(index.indices, across, axis=0)
    return dataclasses.replace(index, indices=indices, counts=counts, out_cols=BLOCK)


def _both_sparse(a, b, mask_a, mask_b, out_mask, implementation: str | None) -> Shaped[Array, "M N"]:
    """a @ b for matrices, both sparse in blocks: each block of C lists the k where a's and b's are live."""
    tile = MicroTile(BLOCK, BLOCK)
    live_a = live_micro_tiles(lax.stop_gradient(a) if mask_a is None else mask_a, tile)
    live_b = live_micro_tiles(lax.stop_gradient(b) if mask_b is None else mask_b, tile)
    a = a if mask_a is None else jnp.where(mask_a, a, 0)
    # Without a mask this changes no value: a's lists alone would give zero blocks of b a gradient.
    b = jnp.where(_expand(live_b, BLOCK, b.shape) if mask_b is None else mask_b, b, 0)
    live = live_a[:, None, :] & live_b.T[None]
    if out_mask is not None:
        live &= out_mask[:, :, None]
    indices, counts = compact(live.reshape(live.shape[0] * live.shape[1], live.shape[2]))
    index = MicroTileIndex(indices=indices, counts=counts, rows=BLOCK, cols=BLOCK, out_cols=BLOCK)
    return gather_matmul(a.T, b, index, implementation=implementation)


def _chosen(a, b, sparse: str, density: float | None) -> Plan:
    if sparse == "both":
        return BLOCKS
    if density is None:
        return DEFAULT
    (m, k), n = a.shape[-2:], b.shape[-1]
    return choose_plan(*((m, k, n) if sparse == "a" else (n, k, m)), a.dtype, density=density)


def _expand(blocks: Bool[Array, "rows cols"], size: int, shape: tuple[int, ...]) -> Bool[Array, "M N"]:
    """Each entry of `blocks` as a block of `size` x `size`, cut to `shape`."""
    return jnp.repeat(jnp.repeat(blocks, size, axis=0), size, axis=1)[: shape[0], : shape[1]]


def _reshape(x: Array, shape: tuple[int, ...], mask: Array | None) -> tuple[Array, Array | None]:
    return x.reshape(shape), None if mask is None else mask.reshape(shape)


def _transposed(x: Array | None) -> Array | None:
    return None if x is None else x.T


def _operand(name: str, x: Any) -> Array:
    x = jnp.asarray(x)
    if x.dtype == jnp.float8_e4m3fn:
        x = x.astype(jnp.bfloat16)  # exact
    if x.dtype not in DTYPES or x.ndim < 2:
        rule = "must be a matrix, or several, of bfloat16, float16, float32 or float8_e4m3fn"
        raise ValueError(f"{name} {rule}; got {x.dtype}{list(x.shape)}")
    return x


def _masks(mask: Any, sparse: str) -> tuple[Array | None, Array | None]:
    """The mask of a and that of b."""
    if sparse not in ("a", "b", "both"):
        raise ValueError(f'sparse must be "a", "b" or "both"; got sparse={sparse!r}')
    if mask is None:
        return None, None
    if sparse == "both":
        if not isinstance(mask, tuple) or len(mask) != 2:
            raise ValueError(f'mask must be a pair of masks where sparse="both"; got {type(mask).__name__}')
        mask_a, mask_b = (None if one is None else jnp.asarray(one) for one in mask)
        return mask_a, mask_b
    return (jnp.asarray(mask), None) if sparse == "a" else (None, jnp.asarray(mask))


def _check(a, b, masks, sparse: str, plan: Plan | None, density: float | None, out_mask) -> None:
    if plan is not None and not isinstance(plan, Plan):
        raise ValueError(f"plan must be a Plan or None; got plan={plan!r}")
    if a.shape[-1] != b.shape[-2] or (b.ndim > 2 and a.shape[:-2] != b.shape[:-2]):
        rule = "a must be [..., M, K] and b [K, N], or [..., K, N] with the same leading dimensions"
        raise ValueError(f"{rule}; got shapes {a.shape} and {b.shape}")
    if a.dtype != b.dtype:
        raise ValueError(f"a and b must have one dtype; got {a.dtype} and {b.dtype}")
    for x, mask in zip((a, b), masks, strict=True):
        if mask is not None and (mask.shape != x.shape or mask.dtype != bool):
            raise ValueError(
                f"mask must be bool{list(x.shape)}, as the sparse operand; got {mask.dtype}{list(mask.shape)}"
            )
    if plan is not None and (density is not None or sparse == "both"):
        rule = 'plan must be None where density is given, or sparse is "both"'
        raise ValueError(f"{rule}; got plan={plan}, density={density}, sparse={sparse!r}")
    if density is not None and sparse == "both":
        raise ValueError(f'density must be None where sparse is "both", which has one plan; got density={density}')
    if out_mask is not None:
        batch, m = (a.shape[:-2], a.shape[-2]) if b.ndim > 2 else ((), math.prod(a.shape[:-1]))
        shape = (*batch, -(-m // BLOCK), -(-b.shape[-1] // BLOCK))
        if out_mask.shape != shape or out_mask.dtype != bool:
            rule = f"out_mask must be bool{list(shape)}, one for each {BLOCK} x {BLOCK} block of the result"
            raise ValueError(f"{rule}; got {out_mask.dtype}{list(out_mask.shape)}")
