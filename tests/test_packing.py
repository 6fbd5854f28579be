"""Packed batches: models against the files of their original implementations, attention against numpy in float64."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st

from models import OPT, OPTConfig, attention, load_mixtral, load_opt, load_switch
from models.attention import attend, place_tokens
from sparsellm.objectives import next_token_loss
from sparsellm.packing import Packing, bucket, pack, padding_share

GOLDEN = Path(__file__).parent / "golden"
LENGTHS = [3, 16, 1, 7]  # of a bucket of 16
TINY = OPTConfig(vocab_size=37, layers=1, d_model=8, heads=2, d_ff=19, max_length=31)


@jax.jit
def run(model, tokens, mask=None, packing=None):
    """Logits, and what was captured."""
    with jax.default_matmul_precision("highest"):
        return nnx.capture(model, nnx.Intermediate)(tokens, mask=mask, packing=packing)


def rows_of(values, mask):
    return [row[real] for row, real in zip(np.asarray(values), np.asarray(mask), strict=True)]


# The maps between a packed batch and a padded one.


@jax.jit
def both_ways(packing, packed, padded):
    return packing.pack(padded), packing.unpack(packed), packing.mask, packing.padded_mask


@given(
    lengths=st.lists(st.integers(1, 11), min_size=3, max_size=3),
    features_dtype=st.sampled_from([((), bool), ((2, 3), np.int32)]),
)
@example(lengths=[11, 11, 11], features_dtype=((), bool))
@example(lengths=[1, 1, 1], features_dtype=((2, 3), np.int32))
def test_pack_and_unpack(lengths, features_dtype):
    """Against numpy's slices."""
    features, dtype = features_dtype
    packing = Packing.of(lengths, size=33, length=11)
    rng = np.random.default_rng(sum(lengths))
    packed = rng.integers(0, 9, (1, 33, *features)).astype(dtype)
    padded = rng.integers(0, 9, (3, 11, *features)).astype(dtype)
    expected_packed, expected_padded, start = np.zeros_like(packed), np.zeros_like(padded), 0
    segment_ids, positions = [-1] * 33, [0] * 33
    for row, length in enumerate(lengths):
        expected_packed[0, start : start + length] = padded[row, :length]
        expected_padded[row, :length] = packed[0, start : start + length]
        segment_ids[start : start + length] = [row] * length
        positions[start : start + length] = range(length)
        start += length
    assert packing.segment_ids.tolist() == segment_ids and packing.positions.tolist() == positions
    got_packed, got_padded, mask, padded_mask = both_ways(packing, jnp.asarray(packed), jnp.asarray(padded))
    np.testing.assert_array_equal(got_packed, expected_packed)
    np.testing.assert_array_equal(got_padded, expected_padded)
    assert mask.tolist() == [[row >= 0 for row in segment_ids]]
    assert padded_mask.tolist() == [[column < length for column in range(11)] for length in lengths]


def test_padding_is_not_read():
    """Nor has it a gradient."""
    packing, nan = Packing.of([2, 1], size=5, length=3), np.nan
    packed = np.array([[1, 2, 3, nan, nan]], np.float32)
    padded = np.array([[1, 2, nan], [3, nan, nan]], np.float32)

    @jax.jit
    @jax.value_and_grad
    def squares(inputs):
        return jnp.sum(packing.unpack(inputs[0]) ** 2) + jnp.sum(packing.pack(inputs[1]) ** 2)

    value, gradients = squares((jnp.asarray(packed), jnp.asarray(padded)))
    assert value == 2 * 14
    for got, x in zip(gradients, (packed, padded), strict=True):
        np.testing.assert_array_equal(got, np.nan_to_num(2 * x))


def test_tokens_of_sequences():
    tokens, packing = pack([[5, 6, 7], np.array([8]), (9, 10)])
    assert tokens.shape == (1, 128) and tokens.dtype == jnp.int32
    assert tokens[0, :7].tolist() == [5, 6, 7, 8, 9, 10, 0] and not tokens[0, 6:].any()
    assert (packing.batch, packing.size, packing.length, packing.lengths.tolist()) == (3, 128, 8, [3, 1, 2])


def test_tokens_side_by_side_that_are_alike():
    tokens, packing = pack([[5, 6, 5], [6, 9, 5]], size=8, length=4, by_token=True)
    assert tokens.tolist() == [[5, 5, 5, 6, 6, 9, 0, 0]]
    assert packing.segment_ids.tolist() == [0, 0, 1, 0, 1, 1, -1, -1]
    assert packing.positions.tolist() == [0, 2, 2, 1, 0, 1, 0, 0]
    assert packing.unpack(tokens).tolist() == [[5, 6, 5, 0], [6, 9, 5, 0]]
    assert packing.pack(packing.unpack(tokens)).tolist() == tokens.tolist() and packing.last.tolist() == [1, 2]


@given(st.permutations(range(9)))
def test_any_order_of_tokens_is_put_right_by_unpacking(order):
    one_after_another = Packing.of([4, 2, 3], size=12, length=5)
    packing = Packing.of([4, 2, 3], size=12, length=5, order=np.array(order))
    values = 1 + jnp.arange(15).reshape(3, 5)
    packed = packing.pack(values)
    np.testing.assert_array_equal(packed[0, :9], one_after_another.pack(values)[0, np.array(order)])
    np.testing.assert_array_equal(packing.unpack(packed), jnp.where(packing.padded_mask, values, 0))


def test_an_order_names_every_token_once():
    for order in ([0, 1, 1], [0, 1], [1, 2, 3]):
        with pytest.raises(ValueError, match="order must hold each of 0 to 2 once"):
            Packing.of([2, 1], order=np.array(order))


def test_rows_without_tokens():
    """Are rows of the padded batch all the same."""
    packing = Packing.of([0, 2, 0, 1], size=4, length=2)
    assert packing.segment_ids.tolist() == [1, 1, 3, -1] and packing.positions.tolist() == [0, 1, 0, 0]
    padded = packing.unpack(jnp.array([[5, 6, 7, 8]]))
    assert padded.tolist() == [[0, 0], [5, 6], [0, 0], [7, 0]]
    assert packing.pack(padded).tolist() == [[5, 6, 7, 0]]
    assert packing.last[jnp.array([1, 3])].tolist() == [1, 2]
    for lengths in ([0, 0], [3, -1]):
        with pytest.raises(ValueError, match=r"lengths must be at least 0, and one of them more; got \["):
            Packing.of(lengths)


def test_four_sizes_an_octave():
    sizes = sorted({bucket(count, 128) for count in range(1, 4097)})
    assert sizes == [128, 256, 384, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096]
    assert all(count <= bucket(count, 8) <= max(count + 7, 1.25 * count) for count in range(1, 5000))


def test_what_padding_would_have_cost():
    share = padding_share(Packing.of([100, 20, 40]))
    assert share == pytest.approx({"padded": 1 - 160 / 300, "packed": 1 - 160 / 256})


@pytest.mark.parametrize(
    ("sequences", "sizes", "message"),
    [
        ([], {}, "lengths must name at least one sequence; got none"),
        ([[1], []], {}, "a sequence must hold at least one token; sequence 1 is empty"),
        ([[1], [2, 3]], {"size": 2}, "size must be at least the tokens of all sequences; got size=2, 3 tokens"),
        ([[1], [2, 3]], {"length": 1}, "length must be at least the longest sequence's; got length=1, 2 tokens"),
        ([[1], [2.5]], {}, r"a sequence must be a list of integers; sequence 1 is float64\[1\]"),
        ([[1], [[2, 3]]], {}, r"a sequence must be a list of integers; sequence 1 is int64\[1, 2\]"),
    ],
)
def test_sequences_that_cannot_be_packed(unchecked, sequences, sizes, message):
    with pytest.raises(ValueError, match=message):
        pack(sequences, **sizes)


def test_what_is_not_packed_like_this(unchecked):
    packing = Packing.of([2, 1])
    with pytest.raises(ValueError, match=r"x must be \[1, 128, '...'\]; got shape \(2, 8\)"):
        packing.unpack(jnp.ones((2, 8)))
    with pytest.raises(ValueError, match=r"x must be \[2, 8, '...'\]; got shape \(1, 128\)"):
        packing.pack(jnp.ones((1, 128)))
    with pytest.raises(ValueError, match=r"packed tokens must be \[1, 128, '...'\]; got shape \(2, 8\)"):
        place_tokens(jnp.ones((2, 8), jnp.int32), packing=packing)
    with pytest.raises(ValueError, match="at most one of mask and packing must be given; got both"):
        place_tokens(jnp.ones((1, 128), jnp.int32), jnp.ones((1, 128), bool), packing)
    cache = attention.KVCache.empty(3, 8, layers=1, heads=1, head_dim=1, dtype="float32")
    with pytest.raises(ValueError, match="there must be a sequence for each of the cache's 3 rows; got 2"):
        place_tokens(jnp.ones((1, 128), jnp.int32), packing=packing, cache=cache)


# Attention.


def softmax_attention(q, k, v, lengths, *, left: int | None = None):
    """Causal, sequence by sequence, of which each sees `left` tokens before itself; in float64."""
    q, k, v = (np.asarray(x.astype(jnp.float32), np.float64)[0] for x in (q, k, v))
    out, start, group = np.zeros_like(q), 0, q.shape[1] // k.shape[1]
    for length in lengths:
        rows = slice(start, start + length)
        scores = np.einsum("thd,shd->hts", q[rows], k[rows].repeat(group, 1)) / q.shape[-1] ** 0.5
        seen = np.tri(length, dtype=bool) & ~np.tri(length, k=-(left or length) - 1, dtype=bool)
        scores = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True)), 0)
        weights = scores / scores.sum(-1, keepdims=True)
        out[rows] = np.einsum("hts,shd->thd", weights, v[rows].repeat(group, 1))
        start += length
    return out[None]


def random_qkv(size: int, heads: int, kv_heads: int, head_dim: int, dtype):
    keys = jax.random.split(jax.random.key(size), 3)
    shapes = ((1, size, n, head_dim) for n in (heads, kv_heads, kv_heads))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def packed_attention(q, k, v, packing: Packing, window: int | None = None):
    places = place_tokens(jnp.zeros(packing.mask.shape, jnp.int32), packing=packing, window=window)
    (k, v), _ = attention.write_slots(None, k, v, places)
    return attend(q, k, v, places)


attend_jitted = jax.jit(packed_attention, static_argnames="window")


@settings(max_examples=25)
@given(lengths=st.lists(st.integers(1, 16), min_size=3, max_size=3), window=st.sampled_from([None, 2]))
@example(lengths=[16, 16, 16], window=None)
@example(lengths=[1, 1, 1], window=None)
def test_attention(lengths, window):
    """One compilation a window: all batches are of one bucket."""
    q, k, v = random_qkv(48, 4, 2, 6, jnp.float32)
    packing = Packing.of(lengths, size=48, length=16)
    expected = softmax_attention(q, k, v, lengths, left=window and window - 1)
    np.testing.assert_allclose(attend_jitted(q, k, v, packing, window=window), expected, atol=2e-6)


def test_cudnn_is_asked_for_what_it_takes(monkeypatch):
    """In its place, the library's own reading of the lengths: as right as the mask that cuDNN never sees."""
    library, asked = jax.nn.dot_product_attention, []

    def stand_in(q, k, v, *, mask=None, implementation=None, **options):
        asked.append(implementation)
        assert (mask is None) == (implementation == "cudnn")
        with jax.numpy_dtype_promotion("standard"):
            return library(q, k, v, mask=mask, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    monkeypatch.setattr(attention, "device_kind", lambda: "NVIDIA H200")
    q, k, v = random_qkv(30, 2, 1, 8, jnp.bfloat16)
    packing, expected = Packing.of(LENGTHS, size=30, length=16), softmax_attention(q, k, v, LENGTHS)
    got = jax.jit(packed_attention)(q, k, v, packing)
    np.testing.assert_allclose(got.astype(jnp.float32), expected, atol=2e-2)
    tokens = jnp.zeros((1, 30), jnp.int32)
    whole = jax.jit(lambda q, k, v: attend(q, k, v, place_tokens(tokens)))(q, k, v)
    np.testing.assert_allclose(whole.astype(jnp.float32), softmax_attention(q, k, v, [30]), atol=2e-2)
    assert asked == ["cudnn"] * 2

    def trace(dtype=jnp.bfloat16, head_dim=8, **choices):
        shapes = [jax.ShapeDtypeStruct((1, 30, heads, head_dim), dtype) for heads in (2, 1, 1)]
        jax.eval_shape(lambda q, k, v: attend(q, k, v, place_tokens(tokens, **choices)), *shapes)

    trace(window=3)
    trace(causal=False)
    trace(mask=jnp.ones((1, 30), bool))  # padding may be anywhere
    trace(dtype=jnp.float32)
    trace(head_dim=12)
    trace(head_dim=264)
    assert asked[2:] == [None] * 6


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_attention_by_cudnn(head_dim, kv_heads):
    """Forward against numpy, gradients against XLA's in float32."""
    lengths = [1, 128, 77, 200, 5]
    packing = Packing.of(lengths)
    q, k, v = random_qkv(packing.size, 4, kv_heads, head_dim, jnp.bfloat16)
    assert "cudnn" in attend_jitted.lower(q, k, v, packing).as_text()
    out = attend_jitted(q, k, v, packing).astype(jnp.float32)
    np.testing.assert_allclose(out, softmax_attention(q, k, v, lengths), atol=2e-2)
    weights = packing.mask[..., None, None] * jax.random.normal(jax.random.key(3), q.shape)

    @jax.jit
    @jax.grad
    def gradients(qkv):
        q, k, v = qkv
        return jnp.sum(weights * packed_attention(q, k, v, packing).astype(jnp.float32))

    in_float32 = gradients([x.astype(jnp.float32) for x in (q, k, v)])
    for got, expected in zip(gradients([q, k, v]), in_float32, strict=True):
        error = np.linalg.norm(got.astype(jnp.float32) - expected) / np.linalg.norm(expected)
        assert error < 2e-2


# Models.


@pytest.fixture(scope="module", params=["opt_pre_norm", "opt_post_norm"])
def opt(request):
    return GOLDEN / request.param


def check_golden(model, folder: Path):
    """Packed logits of the real tokens against those of the original on the padded batch; what was captured.

    Those of tokens that are packed side by side by what they are too.
    """
    golden = np.load(folder / "golden.npz")
    sequences = rows_of(golden["tokens"], golden["mask"])
    tokens, packing = pack(sequences, by_token=True)
    padded, real = packing.unpack(run(model, tokens, packing=packing)[0]), packing.padded_mask
    expected = np.concatenate(rows_of(golden["logits"], golden["mask"]))
    np.testing.assert_allclose(np.asarray(padded)[np.asarray(real)], expected, atol=1e-4)
    tokens, packing = pack(sequences)
    logits, captured = run(model, tokens, packing=packing)
    np.testing.assert_allclose(np.asarray(logits)[0, : len(expected)], expected, atol=1e-4)
    assert np.isfinite(logits).all()
    return captured, packing


def test_opt(opt):
    captured, packing = check_golden(load_opt(opt), opt)
    activation, real = np.asarray(captured["layers"][0]["ffn_activation"][0]), packing.lengths.sum()
    assert not activation[real:].any() and activation[:real].any(axis=1).all()


def test_sparse_opt():
    check_golden(load_opt(GOLDEN / "opt_pre_norm", sparse_rows=8), GOLDEN / "opt_pre_norm")


@pytest.mark.parametrize("name", ["mixtral", "mixtral_packed"])
def test_mixtral(name):
    """The second has a sliding window. Padding goes to no expert, and no loss counts it: it is masked."""
    model = load_mixtral(GOLDEN / name)
    captured, packing = check_golden(model, GOLDEN / name)
    router = captured["layers"][0]["block_sparse_moe"]["router"][0]
    assert router.counts.sum() == packing.lengths.sum() * model.config.top_k
    assert router.mask.tolist() == packing.mask[0].tolist()


@pytest.mark.parametrize("capacity", ["none", "per_sequence"])
def test_switch(capacity):
    """Both stacks packed; with a capacity, the same tokens of a sequence are dropped."""
    name, file = {"none": ("switch", "golden.npz"), "per_sequence": ("switch_untied", "golden_capacity.npz")}[capacity]
    golden = np.load(GOLDEN / name / file)
    model = load_switch(GOLDEN / name, capacity=capacity)
    tokens, packing = pack(rows_of(golden["tokens"], golden["mask"]))
    decoder_tokens, decoder_packing = pack(rows_of(golden["decoder_tokens"], golden["decoder_mask"]))

    @jax.jit
    def logits(model, *tokens, **packings):
        with jax.default_matmul_precision("highest"):
            return model(*tokens, **packings)

    got = logits(model, tokens, decoder_tokens, packing=packing, decoder_packing=decoder_packing)
    expected = np.concatenate(rows_of(golden["logits"], golden["decoder_mask"]))
    np.testing.assert_allclose(np.asarray(got)[0, : len(expected)], expected, atol=1e-4)
    if capacity == "per_sequence":
        assert golden["dropped"] > 0


@pytest.fixture(scope="module")
def tiny():
    """A graph and a state; numpy makes it, since the initialiser takes longer to compile."""
    rng = np.random.default_rng(0)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: OPT(TINY, rngs=nnx.Rngs(0))))
    return graphdef, jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), state)


@pytest.fixture(scope="module")
def sequences():
    """One token longer than LENGTHS."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, TINY.vocab_size, length + 1) for length in LENGTHS]


def test_gradients(tiny, sequences):
    """Of a loss over packed targets, against the padded batch's."""
    graphdef, state = tiny
    (tokens, packing), (targets, _) = (pack([s[part] for s in sequences]) for part in (slice(-1), slice(1, None)))

    @jax.jit
    @jax.grad
    def gradient(state, tokens, targets, mask, given):
        model: Any = nnx.merge(graphdef, state)
        return next_token_loss(model(tokens, **given), targets, mask)

    packed = gradient(state, tokens, targets, packing.mask, {"packing": packing})
    mask = packing.padded_mask
    padded = gradient(state, packing.unpack(tokens), packing.unpack(targets), mask, {"mask": mask})
    for (path, got), (_, expected) in zip(*map(nnx.to_flat_state, (packed, padded)), strict=True):
        largest = np.abs(np.asarray(expected[...])).max()
        assert largest > 0, path
        np.testing.assert_allclose(got[...], expected[...], atol=2e-5 * (largest + 1))


def test_packed_prefill_and_then_one_token_each(tiny, sequences):
    model = nnx.merge(*tiny)
    tokens, packing = pack([sequence[:-1] for sequence in sequences])
    new = jnp.asarray([sequence[-1:] for sequence in sequences], jnp.int32)

    @jax.jit
    def both(model, tokens, new):
        prefill, cache = model(tokens, packing=packing, cache=model.init_cache(4, packing.length + 1))
        return prefill, *model(new, cache=cache)

    prefill, last, cache = both(model, tokens, new)
    assert cache.filled.tolist() == [length + 1 for length in LENGTHS]
    whole = Packing.of([len(sequence) for sequence in sequences])
    padded, _ = run(model, whole.unpack(pack(sequences)[0]), mask=whole.padded_mask)
    start = 0
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(prefill[0, start : start + length], padded[row, :length], atol=2e-5)
        np.testing.assert_allclose(last[row, 0], padded[row, length], atol=2e-5)
        start += length


def test_another_batch_compiles_nothing(tiny):
    model, traces = nnx.merge(*tiny), []

    @jax.jit
    def logits(model, tokens, packing):
        traces.append(packing.size)
        return model(tokens, packing=packing)

    for lengths in (LENGTHS, [9, 9, 9, 9], [16, 1, 1, 1]):
        logits(model, *pack([np.arange(length) for length in lengths]))
    assert traces == [128]
    logits(model, *pack([np.arange(17)] * 4))  # the next bucket of lengths
    assert traces == [128, 128]
