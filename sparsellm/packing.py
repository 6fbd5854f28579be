"""Packed batches: sequences of different lengths one after another on one axis, so that padding costs nothing.

    tokens, packing = pack(sequences)
    logits = model(tokens, packing=packing)  # [1, packed, vocab]
    padded = packing.unpack(logits)  # [batch, length, vocab], as of a padded batch

To products, norms and experts a packed batch is one row of tokens. Attention alone must know whose they are: it reads
them into the rows of a padded batch (SRead) and writes its result back (SWrite). Sizes are bucketed and lengths are
data: another batch compiles nothing while its buckets are the same.

Source: PIT (SOSP'23), dynamic sequence lengths as sparsity along m.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32, Shaped

PACKED_MULTIPLE = 128  # rows of a dense tile
LENGTH_MULTIPLE = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
    """Where the tokens of a packed batch belong.

    Attributes:
        lengths: tokens of each sequence, int32 [batch].
        segment_ids: the sequence of each packed token, from 0, and -1 for padding at the end, int32 [packed].
        positions: how many tokens of its sequence come before each, 0 at padding, int32 [packed].
        places: the inverse: where each token of the padded batch is packed, 0 where it has none, int32 [batch, length].
        length: columns of the padded batch; static under jit.
    """

    lengths: Any  # not typed as arrays: as a pytree it also carries shapes, shardings and cotangents
    segment_ids: Any
    positions: Any
    places: Any
    length: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(
        cls,
        lengths: Sequence[int] | Int[np.ndarray, " batch"],
        *,
        size: int | None = None,
        length: int | None = None,
        order: Int[np.ndarray, " tokens"] | None = None,
    ) -> "Packing":
        """That of sequences of these lengths, one after another or in any order of their tokens.

        Args:
            lengths: tokens of each sequence, known to the host; 0 for a row of the padded batch that has none.
            size: of the packed axis; None for the next of four sizes an octave, multiples of 128.
            length: columns of the padded batch; None for the next of four sizes an octave, multiples of 8.
            order: for each place on the packed axis, which token stands there of those one after another; None for
                these themselves.

        Raises:
            ValueError: there is no token, they do not fit into `size` or `length`, or `order` is none of them.
        """
        counts = np.asarray(lengths)
        if not counts.size:
            raise ValueError("lengths must name at least one sequence; got none")
        if counts.min() < 0 or not counts.any():
            raise ValueError(f"lengths must be at least 0, and one of them more; got {counts.tolist()}")
        total, longest = int(counts.sum()), int(counts.max())
        size = bucket(total, PACKED_MULTIPLE) if size is None else size
        length = bucket(longest, LENGTH_MULTIPLE) if length is None else length
        if total > size:
            raise ValueError(f"size must be at least the tokens of all sequences; got size={size}, {total} tokens")
        if longest > length:
            raise ValueError(f"length must be at least the longest sequence's; got length={length}, {longest} tokens")
        segment_ids, positions = np.full(size, -1, np.int32), np.zeros(size, np.int32)
        segment_ids[:total] = np.repeat(np.arange(counts.size), counts)
        positions[:total] = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
        if order is not None:
            if not np.array_equal(np.sort(order), np.arange(total)):
                raise ValueError(f"order must hold each of 0 to {total - 1} once; got {np.asarray(order)}")
            segment_ids[:total], positions[:total] = segment_ids[order], positions[order]
        places = np.zeros((counts.size, length), np.int32)
        places[segment_ids[:total], positions[:total]] = np.arange(total)
        arrays = {"lengths": counts, "segment_ids": segment_ids, "positions": positions, "places": places}
        return cls(**{name: jnp.asarray(array, jnp.int32) for name, array in arrays.items()}, length=length)

    @property
    def batch(self) -> int:
        """How many sequences there are."""
        return self.lengths.shape[0]

    @property
    def size(self) -> int:
        """Tokens that the packed axis has room for."""
        return self.segment_ids.shape[0]

    @property
    def last(self) -> Int32[Array, " batch"]:
        """Where on the packed axis the last token of each sequence is; means nothing for a sequence without tokens."""
        return jnp.take_along_axis(self.places, jnp.maximum(self.lengths - 1, 0)[:, None], axis=1)[:, 0]

    @property
    def mask(self) -> Bool[Array, "1 packed"]:
        """Which packed tokens are real."""
        return self.segment_ids[None] >= 0

    @property
    def padded_mask(self) -> Bool[Array, "batch length"]:
        """Which tokens of the padded batch are real: the first of each row."""
        return jnp.arange(self.length, dtype=jnp.int32)[None] < self.lengths[:, None]

    def pack(self, x: Shaped[Array, "batch length *features"]) -> Shaped[Array, "1 packed *features"]:
        """Takes the real tokens of a padded batch, zeros at padding. Whatever `x` holds there is not read."""
        _check_tokens("x", x, (self.batch, self.length))
        tokens = self.batch * self.length
        place = self.segment_ids * self.length + self.positions
        return _take(x.reshape(tokens, *x.shape[2:]), place, self.mask[0])[None]

    def unpack(self, x: Shaped[Array, "1 packed *features"]) -> Shaped[Array, "batch length *features"]:
        """The padded batch: sequences start at column 0 of their rows, and zeros follow them."""
        _check_tokens("x", x, (1, self.size))
        return _take(x[0], self.places, self.padded_mask)

    def check_tokens(self, tokens: Int[Array, "rows columns"]) -> None:
        """Raises ValueError unless these are packed tokens."""
        _check_tokens("packed tokens", tokens, (1, self.size))


def pack(
    sequences: Sequence[Sequence[int] | Int[np.ndarray, " _"]],
    *,
    size: int | None = None,
    length: int | None = None,
    by_token: bool = False,
) -> tuple[Int32[Array, "1 packed"], Packing]:
    """Puts sequences of token ids one after another; padding at the end is token 0.

    Args:
        sequences: token ids; of a padded batch, `[row[real] for row, real in zip(tokens, mask)]`.
        size: as for `Packing.of`.
        length: as for `Packing.of`.
        by_token: put all occurrences of a token side by side instead. To the model that is the same; but tokens that
            are alike activate more of the same neurons, so that fewer micro-tiles of their rows are live
            (experiments/token_order.py).

    Returns:
        The tokens, and where they belong.

    Raises:
        ValueError: there is no sequence, one is empty or no list of integers, or they do not fit.
    """
    arrays = [np.asarray(sequence) for sequence in sequences]
    for i, array in enumerate(arrays):
        if not array.size:
            raise ValueError(f"a sequence must hold at least one token; sequence {i} is empty")
    for i, array in enumerate(arrays):
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"a sequence must be a list of integers; sequence {i} is {array.dtype}{list(array.shape)}")
    ids = np.concatenate(arrays) if arrays else np.zeros(0, np.int32)
    order = np.argsort(ids, kind="stable") if by_token else np.arange(ids.size)
    packing = Packing.of([array.size for array in arrays], size=size, length=length, order=order)
    tokens = np.zeros(packing.size, np.int32)
    tokens[: ids.size] = ids[order]
    return jnp.asarray(tokens[None]), packing


def padding_share(packing: Packing) -> dict[str, float]:
    """The share of tokens that are padding: in a batch padded to its longest sequence, and packed. Waits for lengths.

    Products over a packed batch have (1 - padded) / (1 - packed) of the padded batch's work.
    """
    lengths = np.asarray(packing.lengths)
    real = int(lengths.sum())
    return {"padded": 1 - real / int(lengths.size * lengths.max()), "packed": 1 - real / packing.size}


def bucket(count: int, multiple: int) -> int:
    """The next of at most four sizes an octave, all of them multiples of `multiple`."""
    step = max(multiple, (1 << (count - 1).bit_length()) // 8)
    return -(-count // step) * step


def _take(x: Shaped[Array, "places ..."], place: Int[Array, "..."], real: Bool[Array, "..."]) -> Array:
    """x[place] where `real`, else zero. Places are distinct, outside `x` too, so that gradients need no atomics."""
    outside = x.shape[0] + jnp.arange(place.size, dtype=jnp.int32).reshape(place.shape)
    place = jnp.where(real, place, outside)
    return x.at[place].get(mode="fill", fill_value=0, unique_indices=True)


def _check_tokens(name: str, x: Array, shape: tuple[int, int]) -> None:
    if x.shape[:2] != shape:
        raise ValueError(f"{name} must be {[*shape, '...']}; got shape {x.shape}")
