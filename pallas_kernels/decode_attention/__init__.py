"""Attention of one new token a row: out = softmax(scale * q . keys[:length]) . values[:length], of all heads or listed.

Layouts: q and the result [batch, heads, head_dim]; keys and values as a cache has them, [batch, slots, kv_heads,
head_dim], each shared by heads / kv_heads queries that follow each other. Work: 4 * head_dim * heads / kv_heads FLOPs a
listed slot; bytes: 2 * itemsize * head_dim a listed slot, of which there are lengths * listed kv_heads, summed over the
rows. So it is bound by memory: at batch 1, 2048 tokens and OPT-30B's 56 heads of 128, 59 MB, 13.7 us of an H200.

Lists are of a row each (Polar Sparsity): keys and values of a head that is not listed are not read, and its result is
zero. Blocks share the slots of a head (flash-decoding), XLA adds up what they found: equal inputs give equal bits.

Sources: Dao et al., "Flash-Decoding for long-context inference" (2023); Shrestha et al., "Polar Sparsity" (2025),
section 4; Liu et al., "Deja Vu" (ICML'23), section 4.2.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import tuning
from pallas_kernels.decode_attention.cases import CASES, peers, work
from pallas_kernels.decode_attention.config import Config, candidates, check_config, check_fits, check_support
from pallas_kernels.decode_attention.mosaic import mosaic
from pallas_kernels.decode_attention.reference import reference, xla
from pallas_kernels.operands import check_implementation, vary_together

DEVICES = ("NVIDIA H100", "NVIDIA H200")

__all__ = ["CASES", "DEVICES", "Config", "candidates", "decode_attention", "peers", "reference", "work"]


@functools.partial(jax.custom_jvp, nondiff_argnums=(6, 7, 8))
def _decode_attention(
    q, keys, values, lengths, heads, counts, scale: float, config: Config | None, implementation: str | None
):
    """By the Mosaic kernel, or by xla where there is no config."""
    if not q.size or not keys.size or (heads is not None and not heads.size):
        return jnp.zeros_like(q)
    with jax.enable_x64(False):  # under which a Python integer meets an int32 as one of its kind
        if config is None:
            return xla(q, keys, values, lengths, heads, counts, scale).astype(q.dtype)
        interpret = implementation == "interpret"
        out = mosaic(q, keys, values, lengths, heads, counts, scale, config, interpret).astype(q.dtype)
        return vary_together(q, out)[1]  # under shard_map a kernel's output does not say that it varies


@_decode_attention.defjvp
def _refuse(scale, config, implementation, primals, tangents):
    raise NotImplementedError("decode_attention is for decoding and has no gradient; differentiate attention instead")


def decode_attention(
    q: Float[Array, "batch heads head_dim"],
    keys: Float[Array, "batch slots kv_heads head_dim"],
    values: Float[Array, "batch slots kv_heads head_dim"],
    lengths: Int32[Array, " batch"],
    heads: Int32[Array, "batch capacity"] | None = None,
    counts: Int32[Array, " batch"] | None = None,
    *,
    scale: float | None = None,
    config: Config | None = None,
    implementation: str | None = None,
) -> Float[Array, "batch heads head_dim"]:
    """Attention of one token a row to the slots of a cache in use, by all heads or by those that are listed.

    Slots past a row's length, and heads that are not listed, may hold anything. Accumulates in float32. Has no
    gradient. A head of which every score is -inf gives zeros on the Mosaic kernel, and NaN by xla.

    Args:
        q: queries; bfloat16, float16 or float32.
        keys: of all slots, of the same dtype, as the values.
        values: of all slots.
        lengths: slots in use of each row, the first ones; a row without any gives zeros.
        heads: of each row, distinct numbers of heads of the keys (kv_heads), in any order; what follows the row's count
            may be anything. Heads of q whose keys are not listed give zeros. None for all heads.
        counts: how many of them count, in each row; given if and only if `heads` are.
        scale: what scores are multiplied by; None for 1 / sqrt(head_dim).
        config: tiling of the Mosaic kernel; None takes the tuned one, or a heuristic.
        implementation: "mosaic_gpu" (Hopper, 16-bit types), "xla" (anywhere), "interpret" (the Mosaic kernel on CPU
            under the race detector, slow), or None: the Mosaic kernel where it can run, else xla.

    Raises:
        ValueError: shapes, dtypes or config do not fit together.
        NotImplementedError: the asked implementation cannot take these arguments or this device; or a gradient is
            asked for.

    Source: Flash-Decoding (2023); Polar Sparsity (2025), section 4.
    """
    q, keys, values, lengths = (jnp.asarray(a) for a in (q, keys, values, lengths))
    heads, counts = (None if a is None else jnp.asarray(a) for a in (heads, counts))
    _check_arguments(q, keys, values, lengths, heads, counts)
    check_implementation(implementation)
    if config is not None:
        check_config(config)

    def check(config: Config | None) -> None:
        check_support(q, keys, None if implementation == "interpret" else DEVICES)
        if config is not None:
            check_fits(config, keys)

    arguments = q, keys, values, lengths, heads, counts
    config = tuning.choose_config(
        "decode_attention", Config, arguments, config, implementation, check=check, candidates=candidates
    )
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return _decode_attention(*vary_together(*arguments), scale, config, implementation)


def _check_arguments(q, keys, values, lengths, heads, counts) -> None:
    if q.ndim != 3 or q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        rule = "q must be bfloat16, float16 or float32 [batch, heads, head_dim]"
        raise ValueError(f"{rule}; got {q.dtype}{list(q.shape)}")
    batch, _, head_dim = q.shape
    if keys.ndim != 4 or (keys.shape[0], keys.shape[3]) != (batch, head_dim) or keys.dtype != q.dtype:
        rule = f"keys must be {q.dtype}[{batch}, slots, kv_heads, {head_dim}]"
        raise ValueError(f"{rule}; got {keys.dtype}{list(keys.shape)}")
    if values.shape != keys.shape or values.dtype != keys.dtype:
        got = f"{values.dtype}{list(values.shape)}"
        raise ValueError(f"values must be as keys, {keys.dtype}{list(keys.shape)}; got {got}")
    if not keys.shape[2] or q.shape[1] % keys.shape[2]:
        raise ValueError(f"kv_heads must divide heads; got kv_heads={keys.shape[2]}, heads={q.shape[1]}")
    if (heads is None) != (counts is None):
        raise ValueError(f"heads and counts must be given together; got {'counts' if heads is None else 'heads'} alone")
    for name, array, rank in (("lengths", lengths, 1), ("heads", heads, 2), ("counts", counts, 1)):
        if array is not None and (array.ndim != rank or array.dtype != jnp.int32 or array.shape[0] != batch):
            shape = f"[{batch}]" if rank == 1 else f"[{batch}, capacity]"
            raise ValueError(f"{name} must be int32{shape}; got {array.dtype}{list(array.shape)}")
