"""What the models here have in common: products and embeddings whose parameters name their axes, and RMS norm.

`config` is any model's: its `dtype` is computed in, its `param_dtype` kept, its `init_std` the initial weights' spread.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from sparsellm.sharding import sharded, sum_over_shards


def linear(
    config: Any,
    in_out: tuple[int, int],
    axes: tuple[str, str],
    *,
    init: nnx.Initializer | None = None,
    bias: bool = False,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """x @ kernel (+ bias), whose dimensions are called `axes` (see `sparsellm.sharding`)."""
    return nnx.Linear(
        *in_out,
        use_bias=bias,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        kernel_init=init or nnx.initializers.normal(config.init_std),
        kernel_metadata=sharded(*axes),
        bias_metadata=sharded(axes[1]) if bias else {},
        rngs=rngs,
    )


def embed(
    config: Any,
    rows: int,
    features: int,
    axes: tuple[str, str],
    *,
    init: nnx.Initializer | None = None,
    dtype: str | None = None,
    rngs: nnx.Rngs,
) -> "Embed":
    """A table of vectors, which are given in `dtype` (None for what is computed in)."""
    return Embed(
        rows,
        features,
        dtype=jnp.dtype(dtype or config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        embedding_init=init or nnx.initializers.normal(config.init_std),
        embedding_metadata=sharded(*axes),
        rngs=rngs,
    )


@jax.custom_vjp
def vocabulary_logits(
    hidden: Float[Array, "*tokens d_model"], table: Float[Array, "vocab d_model"]
) -> Float[Array, "*tokens vocab"]:
    """hidden @ table.T in float32, of whose gradient the products are in bfloat16 if the operands are.

    Left to itself, JAX would multiply the float32 gradient of the logits, at half of the rate and twice the bytes: of
    OPT-125M's training step, with 50,272 tokens, on an H200, 8%.
    """
    return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)


def _logits_forward(hidden, table):
    return vocabulary_logits(hidden, table), (hidden, table)


def _logits_backward(operands, gradient):
    hidden, table = operands
    if hidden.dtype == jnp.bfloat16:  # float16 would lose what is small
        gradient = gradient.astype(hidden.dtype)
    to_hidden = jnp.einsum("...v,vd->...d", gradient, table, preferred_element_type=jnp.float32)
    to_table = jnp.einsum("...v,...d->vd", gradient, hidden, preferred_element_type=jnp.float32)
    return to_hidden.astype(hidden.dtype), to_table.astype(table.dtype)


vocabulary_logits.defvjp(_logits_forward, _logits_backward)


class Embed(nnx.Embed):
    """A table of vectors; a row outside it is NaN."""

    def __call__(self, inputs: Int[Array, "*ids"], out_sharding: Any = None) -> Float[Array, "*ids features"]:
        del out_sharding  # of nnx.Embed: what the table's axes are called says it
        (axis, _) = self.embedding.get_metadata()["out_sharding"]
        return _look_up(self.embedding[...], inputs.astype(jnp.int32), jnp.dtype(self.dtype), axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _look_up(table: Float[Array, "rows features"], ids: Int[Array, "*ids"], dtype: Any, axis: str):
    """Rows of a table, cast after they are read: casting first would copy the whole table.

    Of a table that is cut along its rows (`axis`), each device gives what it has, and zeros else. Left to itself, XLA
    gathers the whole table on every GPU: for a step of decoding OPT-30B on two H200s, a millisecond.

    The gradient adds up what belongs to equal ids (`sum_by_id`). Left to itself, JAX scatters it, with atomic sums that
    come out another way each time on a GPU, and which XLA, told to be deterministic, does one row after the other: some
    10 us each.
    """

    def held(rows, numbers, ids):
        place = ids - numbers[0]
        found = jnp.take(rows, place, axis=0, mode="clip").astype(dtype)
        return jnp.where(((place >= 0) & (place < len(rows)))[..., None], found, 0)

    numbers = jnp.arange(len(table), dtype=jnp.int32)
    found = sum_over_shards(held, axis, (0, 0, None), table, numbers, ids, kernels=False)
    return jnp.where(((ids >= 0) & (ids < len(table)))[..., None], found, jnp.nan)


def _look_up_forward(table, ids, dtype, axis):
    return _look_up(table, ids, dtype, axis), (table, ids)


def _look_up_backward(dtype, axis, residuals, g):
    del axis, dtype
    table, ids = residuals
    total = sum_by_id(jnp.asarray(ids).reshape(-1), g.reshape(-1, g.shape[-1]).astype(jnp.float32), len(table))
    return total.astype(table.dtype), np.zeros(ids.shape, jax.dtypes.float0)


def sum_by_id(ids: Int[Array, " n"], x: Float[Array, "n features"], rows: int) -> Float[Array, "rows features"]:
    """For each id below `rows`, the sum of its x: of those in order of their ids, a scan that starts anew at each id.

    So every sum has an order of its own, and each row is written once. A product with one-hot rows would do it too: of
    OPT-125M's training step, with 50,272 tokens, on an H200, 5%.
    """
    order = jnp.argsort(ids)
    ids = ids[order]

    def add(left, right):
        (sum_left, id_left), (sum_right, id_right) = left, right
        return sum_right + jnp.where(id_left == id_right, sum_left, 0), id_right

    sums, _ = lax.associative_scan(add, (x[order], ids[:, None]))
    last = jnp.append(ids[1:] != ids[:-1], jnp.ones(min(1, len(ids)), bool))
    nowhere = rows + jnp.arange(len(ids), dtype=jnp.int32)  # distinct there too
    row = jnp.where(last & (ids >= 0) & (ids < rows), ids, nowhere)
    return jnp.zeros((rows, x.shape[1]), x.dtype).at[row].set(sums, mode="drop", unique_indices=True)


_look_up.defvjp(_look_up_forward, _look_up_backward)


class RMSNorm(nnx.RMSNorm):
    """x / sqrt(mean(x^2) + epsilon) * scale in float32, whatever it is given and gives back."""

    def __init__(self, config: Any, *, epsilon: float, rngs: nnx.Rngs):
        super().__init__(
            config.d_model,
            epsilon=epsilon,
            dtype=jnp.float32,
            param_dtype=jnp.dtype(config.param_dtype),
            scale_metadata=sharded("embed"),
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "*tokens d_model"]) -> Float[Array, "*tokens d_model"]:
        return super().__call__(x).astype(x.dtype)
