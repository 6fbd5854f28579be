"""What to check and time `decode_attention` on: caches of real models, its work, and XLA's attention under a mask."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case import Case, Work

ANYTHING = 2**30  # what entries behind the count hold


def work(q, keys, values, lengths, heads=None, counts=None) -> Work:
    """FLOPs and bytes of these very arguments (lengths and counts are read): listed slots once."""
    del values
    (_, slots, kv_heads, head_dim), group = keys.shape, q.shape[1] // keys.shape[2]
    of_row = np.full(len(lengths), kv_heads) if counts is None else np.asarray(counts)
    listed = int(np.sum(np.minimum(np.asarray(lengths), slots) * of_row))
    queries = int(np.sum(of_row)) * group
    values_read = 2 * listed * head_dim + queries * head_dim + q.size
    entries = len(lengths) + (0 if heads is None else int(np.sum(of_row)) + len(lengths))
    return Work(flops=4 * listed * group * head_dim, bytes=q.dtype.itemsize * values_read + 4 * entries)


def peers(q, keys, values, lengths, heads=None, counts=None):
    """XLA's attention to all slots of the cache, under a mask; cuDNN's, which reads the lengths."""
    del q, keys, values, lengths, heads, counts

    def dense(q, keys, values, lengths, *_):
        visible = jnp.arange(keys.shape[1])[None] < lengths[:, None]
        return jax.nn.dot_product_attention(q[:, None], keys, values, mask=visible[:, None, None])[:, 0]

    def cudnn(q, keys, values, lengths, *_):
        ones = jnp.ones_like(lengths)
        return jax.nn.dot_product_attention(
            q[:, None],
            keys,
            values,
            query_seq_lengths=ones,
            key_value_seq_lengths=jnp.maximum(lengths, 1),
            implementation="cudnn",
        )[:, 0]

    return {"dense": dense, "cudnn": cudnn}


SIXTEEN_BIT = ("bfloat16", "float16")


def _case(
    name: str,
    *,
    batch: int,
    slots: int,
    heads: int,
    head_dim: int,
    lengths: tuple[int, ...],
    group: int = 1,
    listed: tuple[int, ...] | None = None,
    capacity: int | None = None,
    dtypes: tuple[str, ...] = ("bfloat16",),
    **flags: bool,
) -> Case:
    """`lengths` and numbers of `listed` heads are repeated over the batch; heads are those of the keys."""

    def make(key: jax.Array, dtype: jnp.dtype):
        key_q, key_k, key_v = jax.random.split(key, 3)
        q = 2 * jax.random.normal(key_q, (batch, heads * group, head_dim), dtype)
        keys, values = (jax.random.normal(k, (batch, slots, heads, head_dim), dtype) for k in (key_k, key_v))
        in_use = jnp.asarray(np.resize(lengths, batch), jnp.int32)
        if listed is None:
            return q, keys, values, in_use
        counts, entries = np.resize(listed, batch), np.arange(capacity or heads)[None]
        chosen = np.random.default_rng(0).permuted(np.tile(np.arange(heads), (batch, 1)), axis=1)[:, :capacity]
        chosen = np.where(entries < counts[:, None], chosen, ANYTHING)
        return q, keys, values, in_use, jnp.asarray(chosen, jnp.int32), jnp.asarray(counts, jnp.int32)

    return Case(name=name, make=make, dtypes=dtypes, gradient=False, **flags)


def _bench(name: str, batch: int, length: int, percent: int = 100, heads: int = 56, group: int = 1) -> Case:
    listed = None if percent == 100 else (heads * percent // 100,)
    label = f"{name}, batch {batch}, {length} tokens" + (f", {percent}%" if listed else "")
    return _case(
        label, batch=batch, slots=2048, heads=heads, head_dim=128, group=group, lengths=(length,), listed=listed,
        bench=True,
    )  # fmt: skip


CASES = (
    _case("ragged", batch=3, slots=100, heads=2, head_dim=128, lengths=(77, 0, 100), dtypes=SIXTEEN_BIT, small=True),
    _case("lists", batch=2, slots=200, heads=3, head_dim=64, lengths=(200, 1), listed=(2, 3), small=True),
    _case("grouped", batch=1, slots=64, heads=2, head_dim=32, group=4, lengths=(50,), listed=(1,), small=True),
    _case("full", batch=2, slots=512, heads=5, head_dim=128, lengths=(512, 70), dtypes=(*SIXTEEN_BIT, "float32")),
    _case("head of 80", batch=2, slots=40, heads=4, head_dim=80, group=2, lengths=(3, 40), listed=(0, 2), capacity=2),
    *(_bench("opt-30b", batch, length) for batch in (1, 8, 32) for length in (256, 1024, 2048)),
    *(_bench("opt-30b", batch, 2048, 50) for batch in (1, 8, 32)),
    *(_bench("mixtral", batch, 2048, heads=8, group=4) for batch in (1, 8)),
)
