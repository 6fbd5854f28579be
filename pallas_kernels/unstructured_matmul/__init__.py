"""Unstructured weights, loaded as sparse, computed as dense: y = act(W x + bias), W [out, in] mostly zeros.

Decode is bound by reading weights; `UnstructuredWeights` has 2 * density + 1/8 bytes an element of them where a dense
matrix has 2, 1.77 / 2.15 / 2.74 / 3.77 times fewer at 50 / 60 / 70 / 80% zeros. x is [in, n], y [out, n]: n tokens side
by side. Work: 2 * out * in * n FLOPs, as if dense, on the tensor core. Nothing is added atomically: equal inputs give
equal bits. `unstructured_matmuls` multiplies several matrices of one shape by one x in one launch.

On an H200, weights read from memory, of 28672 x 7168 times as quick as the dense product that XLA chooses: for 16
tokens 1.5 at 50% zeros, 1.7 at 70% and 2.1 at 80%; for 32, 1.4, 1.6 and 1.9. As the quickest of cuBLAS's algorithms:
1.4, 1.5 and 1.9; 1.3, 1.5 and 1.8.

At 80%, and at 70% for 32 tokens, those are `paired=True` of `UnstructuredWeights.from_dense`: elements stored two by
two, half as many places for the kernel to find and 1.5 times the bytes.

Values of 8 bits in pairs are widened as the kernel has them in its registers: 28672 x 7168 in float8 takes 56 us for 8
tokens at 50% zeros and 54 at 80%, where values of 16 bits take 66 and 48, and the dense product 96. Single ones take
the least memory, and XLA widens them before every product: 201 us and 110.

Sources: Flash-LLM (VLDB'24), section 3; SpInfer (EuroSys'25).
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import tuning
from pallas_kernels.operands import check_implementation, vary_together
from pallas_kernels.unstructured_matmul.cases import CASES, peers, work
from pallas_kernels.unstructured_matmul.config import (
    EXPAND_N,
    MAX_N,
    Config,
    candidates,
    check_config,
    check_support,
    step_blocks,
    tiles,
)
from pallas_kernels.unstructured_matmul.mosaic import expand as mosaic_expand
from pallas_kernels.unstructured_matmul.mosaic import mosaic
from pallas_kernels.unstructured_matmul.reference import ACTIVATIONS, finish, reference, xla
from pallas_kernels.unstructured_matmul.weights import UnstructuredWeights

DEVICES = ("NVIDIA H100", "NVIDIA H200")

__all__ = [
    "CASES",
    "DEVICES",
    "EXPAND_N",
    "Config",
    "UnstructuredWeights",
    "candidates",
    "expand",
    "peers",
    "reference",
    "unstructured_matmul",
    "unstructured_matmuls",
    "work",
]


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5))
def _unstructured_matmuls(weights, x, biases, activation: str | None, config: Config | None, implementation):
    """Each product, by the Mosaic kernel, or by xla where there is no config."""
    with jax.enable_x64(False):  # under which a Python integer meets an int32 as one of its kind
        if not weights[0].masks.size or not x.size:
            sums = [jnp.zeros((matrix.shape[0], x.shape[1]), jnp.float32) for matrix in weights]
        elif config is None:
            sums = [xla(matrix, x) for matrix in weights]
        else:
            sums = vary_together(x, _by_mosaic(weights, x, config, implementation == "interpret"))[1]
        each = zip(sums, weights, biases, strict=True)
        return tuple(finish(y, matrix.scales, bias, activation).astype(x.dtype) for y, matrix, bias in each)


def _by_mosaic(weights, x, config: Config, interpret: bool):
    """`mosaic`, also under vmap: TMA, which reads x, takes no mapped array."""

    @jax.custom_batching.custom_vmap
    def launch(weights, x):
        return mosaic(weights, x, config, interpret)

    @launch.def_vmap
    def _over_columns(size, mapped, weights, x):
        def spread(leaf, is_mapped):
            return leaf if is_mapped else jnp.broadcast_to(leaf, (size, *leaf.shape))

        x, all_mapped = spread(x, mapped[1]), [True] * len(weights)
        if any(jax.tree.leaves(mapped[0])):
            return lax.map(lambda one: launch(*one), (jax.tree.map(spread, weights, mapped[0]), x)), all_mapped
        wide = x.transpose(1, 0, 2).reshape(x.shape[1], -1)  # side by side: the weights are read once
        fits = step_blocks(config, tiles(min(wide.shape[1], MAX_N)))
        sums = _by_mosaic(weights, wide, config if fits else candidates(weights, wide)[0], interpret)
        return [y.reshape(len(y), size, -1).transpose(1, 0, 2) for y in sums], all_mapped

    return launch(weights, x)


@_unstructured_matmuls.defjvp
def _refuse(activation, config, implementation, primals, tangents):
    raise NotImplementedError(
        "unstructured_matmul has no gradient; differentiate the product with `to_dense()` instead"
    )


def unstructured_matmul(
    weights: UnstructuredWeights,
    x: Float[Array, "in n"],
    bias: Float[Array, " out"] | None = None,
    activation: str | None = None,
    *,
    config: Config | None = None,
    implementation: str | None = None,
) -> Float[Array, "out n"]:
    """act(weights @ x + bias), in the dtype of x, accumulated in float32.

    A NaN or an infinity in x meets the zeros of its column as in a dense product: 0 * inf is NaN there too.

    Args:
        weights: W [out, in]. Those from a file ask for their `check` first: here their offsets are believed.
        x: [in, n], of the dtype of W.
        bias: of each row of the result, of that dtype, or None.
        activation: None, "relu", "gelu", "gelu_tanh" or "silu".
        config: tiling of the Mosaic kernels; None takes the tuned one, or a heuristic.
        implementation: "mosaic_gpu" (Hopper), "xla" (anywhere), "interpret" (the Mosaic kernels on CPU
            under the race detector, slow), or None: the Mosaic kernels where they can run, else xla.

    Raises:
        ValueError: shapes, dtypes, `activation` or config do not fit together.
        NotImplementedError: the asked implementation cannot take these arguments or this device; or a gradient is
            asked for.

    Sources: Flash-LLM (VLDB'24), section 3; SpInfer (EuroSys'25).
    """
    return _multiply((weights,), x, (bias,), activation, config, implementation)[0]


def unstructured_matmuls(
    weights: Sequence[UnstructuredWeights],
    x: Float[Array, "in n"],
    biases: Sequence[Float[Array, " out"] | None] | None = None,
    activation: str | None = None,
    *,
    config: Config | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "out n"], ...]:
    """act(W @ x + bias) of several matrices that are alike, in one launch.

    As `unstructured_matmul` of each, but that the sums of a row may be rounded in another order. A launch begins with
    some 3 us of waiting and adds up what its blocks share, so small matrices gain by it.

    Args:
        weights: one matrix at least, all of one shape, dtype and dtype of values, all paired or none.
        x: [in, n], of that dtype, which all are multiplied with.
        biases: of each matrix, or None for it; None for none at all.
        activation: as of `unstructured_matmul`, as what follows.
        config: tiling.
        implementation: "mosaic_gpu", "xla", "interpret" or None.

    Raises:
        ValueError: the matrices differ, or as of `unstructured_matmul`.
        NotImplementedError: as there.
    """
    biases = (None,) * len(weights) if biases is None else tuple(biases)
    return _multiply(tuple(weights), x, biases, activation, config, implementation)


def _multiply(
    weights, x, biases, activation: str | None, config: Config | None, implementation: str | None
) -> tuple[Array, ...]:
    """The products of one matrix or more."""
    x = jnp.asarray(x)
    biases = tuple(None if bias is None else jnp.asarray(bias) for bias in biases)
    _check_arguments(weights, x, biases, activation)
    check_implementation(implementation)
    if config is not None:
        check_config(config, x.shape[1])

    def check(config: Config | None) -> None:
        del config
        check_support(x, None if implementation == "interpret" else DEVICES)

    # One matrix is looked up as it was tuned.
    arguments = (weights, x, biases, activation) if len(weights) > 1 else (weights[0], x, biases[0], activation)
    config = tuning.choose_config(
        "unstructured_matmul", Config, arguments, config, implementation, check=check, candidates=candidates
    )
    x, biases, rows = vary_together(x, biases, tuple(matrix.rows for matrix in weights))
    weights = tuple(dataclasses.replace(matrix, rows=own) for matrix, own in zip(weights, rows, strict=True))
    return _unstructured_matmuls(weights, x, biases, activation, config, implementation)


def expand(weights: UnstructuredWeights, *, implementation: str | None = None) -> Float[Array, "out in"]:
    """The matrix again, as `weights.to_dense()`, but quickly on a GPU.

    Args:
        weights: W [out, in].
        implementation: as of `unstructured_matmul`.

    Raises:
        NotImplementedError: the asked implementation cannot take these weights or this device.
    """
    check_implementation(implementation)
    x = jax.ShapeDtypeStruct((weights.shape[1], EXPAND_N + 1), weights.dtype)  # what would have them expanded

    def check(config: Config | None) -> None:
        del config
        check_support(x, None if implementation == "interpret" else DEVICES)

    config = tuning.choose_config(
        "unstructured_matmul",
        Config,
        (weights, x, None, None),
        None,
        implementation,
        check=check,
        candidates=candidates,
    )
    if config is None or not weights.masks.size:
        return weights.to_dense()
    with jax.enable_x64(False):  # as above
        w = mosaic_expand(weights, config, interpret=implementation == "interpret")
        return w if weights.scales is None else finish(w.astype(jnp.float32), weights.scales).astype(w.dtype)


def _check_arguments(weights, x, biases, activation: str | None) -> None:
    if not weights or len(biases) != len(weights):
        raise ValueError(f"weights must be one at least, with a bias or None each; got {len(weights)}, {len(biases)}")
    for matrix in weights:
        if not isinstance(matrix, UnstructuredWeights):
            raise ValueError(f"weights must be UnstructuredWeights; got {type(matrix).__name__}")
    kinds = [
        f"{matrix.dtype}{list(matrix.shape)} of {'paired ' * matrix.paired}{matrix.values.dtype}" for matrix in weights
    ]
    if len(set(kinds)) > 1:
        raise ValueError(f"weights must be of one shape, dtype and kind of values; got {', '.join(kinds)}")
    (rows, columns), dtype = weights[0].shape, weights[0].dtype
    if x.ndim != 2 or x.shape[0] != columns or x.dtype != dtype:
        raise ValueError(f"x must be {dtype}[{columns}, n]; got {x.dtype}{list(x.shape)}")
    for bias in biases:
        if bias is not None and (bias.shape != (rows,) or bias.dtype != x.dtype):
            raise ValueError(f"bias must be {x.dtype}[{rows}]; got {bias.dtype}{list(bias.shape)}")
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None or one of {', '.join(ACTIVATIONS)}; got {activation!r}")
