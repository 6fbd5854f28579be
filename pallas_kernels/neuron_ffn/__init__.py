"""Decode over listed neurons: y = sum over listed f of act(x . w1[f] + b1[f]) * w2[f].

Layouts: both matrices are neuron-major, [d_ff, d_model] (w1 transposed, w2 as it is), so what a neuron needs is a row
of each; x and y are [batch, d_model]. Work: 4 * batch * count * d_model FLOPs. Bytes: the listed rows of both matrices
once, 2 * count * d_model values, and 4 an entry: at batch 1 and 5% of OPT-30B's 28672 neurons 41 MB, 9.6 us of an
H200 where the dense block takes 192.

One token is one launch and XLA's sum of what blocks found (`fused`); 2 to 32 share the rows that any of them needs, in
two launches on the tensor core (`batched`). Where tokens have lists of their own, rows are read once all the same, and
a byte for each token and entry says which activations are set to zero between the products. There are no atomics: equal
inputs give equal bits.

Sources: Deja Vu (ICML'23), section 4.4; PowerInfer (SOSP'24), neuron-aware operators.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels import tuning
from pallas_kernels.neuron_ffn.batched import batched
from pallas_kernels.neuron_ffn.cases import CASES, peers, work
from pallas_kernels.neuron_ffn.config import Config, candidates, check_config, check_fits, check_support
from pallas_kernels.neuron_ffn.fused import fused
from pallas_kernels.neuron_ffn.reference import ACTIVATIONS, reference, xla
from pallas_kernels.operands import check_implementation, vary_together

DEVICES = ("NVIDIA H100", "NVIDIA H200")

__all__ = ["CASES", "DEVICES", "Config", "candidates", "neuron_ffn", "peers", "reference", "work"]


@functools.partial(jax.custom_jvp, nondiff_argnums=(7, 8, 9))
def _neuron_ffn(x, w1, b1, w2, neurons, count, own, activation: str, config: Config | None, implementation: str | None):
    """The block by the Mosaic kernels, or by xla where there is no config."""
    if not x.size or not neurons.size or not w1.size:
        return jnp.zeros_like(x)
    with jax.enable_x64(False):  # under which a Python integer meets an int32 as one of its kind
        if config is None:
            return xla(x, w1, b1, w2, neurons, count, own, activation).astype(x.dtype)
        launch = fused if x.shape[0] == 1 else batched
        out = launch(x, w1, b1, w2, neurons, count, own, activation, config, implementation == "interpret")
        return vary_together(x, out.astype(x.dtype))[1]  # under shard_map a kernel's output does not say that it varies


@_neuron_ffn.defjvp
def _refuse(activation, config, implementation, primals, tangents):
    raise NotImplementedError("neuron_ffn is for decoding and has no gradient; differentiate the dense block instead")


def neuron_ffn(
    x: Float[Array, "batch d_model"],
    w1: Float[Array, "d_ff d_model"],
    b1: Float[Array, " d_ff"] | None,
    w2: Float[Array, "d_ff d_model"],
    neurons: Int32[Array, " capacity"],
    count: Int32[Array, ""],
    activation: str = "relu",
    own: Bool[Array, "batch d_ff"] | None = None,
    *,
    config: Config | None = None,
    implementation: str | None = None,
) -> Float[Array, "batch d_model"]:
    """A feed-forward block of which only the first `count` listed neurons are computed.

    Rows of `w1` and `w2` that are not listed are not read. Accumulates in float32; activations are rounded to the
    dtype of `x` before they meet `w2`, as in the dense block. All tokens share the list: where each has its own, give
    their union, which adds to a token only what the dense block would add too; or with `own` nothing, so that a token's
    result is, but for the order of sums, what it is alone. Has no gradient.

    What is not finite in a listed row of `w1` or in its bias is seen by the tokens whose own the neuron is; in a listed
    row of `w2` by all of them, as in the dense block, where 0 * NaN is NaN too.

    Args:
        x: the block's input, [batch, d_model]; bfloat16, float16 or float32.
        w1: a row for each neuron, of the same dtype, as all that follow.
        b1: of each neuron, or None.
        w2: a row for each neuron.
        neurons: distinct rows, in any order; what follows the first `count` may be anything.
        count: how many count, up to the list's length.
        activation: "relu", "gelu", "gelu_tanh" or "silu".
        own: which neurons are each token's own, by their rows: a listed one that is not counts as zero for it. None
            where the whole list is everybody's.
        config: tiling of the Mosaic kernels; None takes the tuned one, or a heuristic.
        implementation: "mosaic_gpu" (Hopper, 16-bit types, 32 tokens at most), "xla" (anywhere), "interpret" (the
            Mosaic kernels on CPU under the race detector, slow), or None: the Mosaic kernels where they can run, else
            xla.

    Raises:
        ValueError: shapes, dtypes, `activation` or config do not fit together.
        NotImplementedError: the asked implementation cannot take these arguments or this device; or a gradient is
            asked for.

    Source: Deja Vu (ICML'23), section 4.4.
    """
    x, w1, w2, neurons, count = (jnp.asarray(a) for a in (x, w1, w2, neurons, count))
    b1, own = (None if a is None else jnp.asarray(a) for a in (b1, own))
    _check_arguments(x, w1, b1, w2, neurons, count, activation, own)
    check_implementation(implementation)
    if config is not None:
        check_config(config)

    def check(config: Config | None) -> None:
        devices = None if implementation == "interpret" else DEVICES
        check_support(x, devices)
        if config is not None:
            check_fits(config, *x.shape)

    arguments = x, w1, b1, w2, neurons, count, activation, own
    config = tuning.choose_config(
        "neuron_ffn", Config, arguments, config, implementation, check=check, candidates=candidates
    )
    arrays = vary_together(x, w1, b1, w2, neurons, count, own)
    return _neuron_ffn(*arrays, activation, config, implementation)


def _check_arguments(x, w1, b1, w2, neurons, count, activation: str, own) -> None:
    if x.ndim != 2 or x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"x must be bfloat16, float16 or float32 [batch, d_model]; got {x.dtype}{list(x.shape)}")
    if w1.ndim != 2 or w1.shape[1] != x.shape[1] or w1.dtype != x.dtype:
        raise ValueError(f"w1 must be {x.dtype}[d_ff, {x.shape[1]}], neuron-major; got {w1.dtype}{list(w1.shape)}")
    if w2.shape != w1.shape or w2.dtype != x.dtype:
        raise ValueError(f"w2 must be as w1, {x.dtype}{list(w1.shape)}; got {w2.dtype}{list(w2.shape)}")
    if b1 is not None and (b1.shape != w1.shape[:1] or b1.dtype != x.dtype):
        raise ValueError(f"b1 must be {x.dtype}[{w1.shape[0]}]; got {b1.dtype}{list(b1.shape)}")
    for name, array, rank in (("neurons", neurons, 1), ("count", count, 0)):
        if array.ndim != rank or array.dtype != jnp.int32:
            raise ValueError(f"{name} must be int32 of rank {rank}; got {array.dtype}{list(array.shape)}")
    if own is not None and (own.shape != (x.shape[0], w1.shape[0]) or own.dtype != jnp.bool_):
        raise ValueError(f"own must be bool[{x.shape[0]}, {w1.shape[0]}]; got {own.dtype}{list(own.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
