"""The Switch Transformer, most of it against files made by the original implementation (golden/make_switch.py)."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.switch_checkpoint import load_switch
from models.switch_config import PRESETS, SwitchConfig
from models.switch_transformer import Attention, Experts, SwitchTransformer, relative_position_buckets
from sparsellm.generation import generate
from sparsellm.mixture_of_experts import load_balance_loss, z_loss

GOLDEN = Path(__file__).parent / "golden"
FILES = {"none": "golden.npz", "per_sequence": "golden_capacity.npz"}

TINY = SwitchConfig(
    vocab_size=53,
    encoder_layers=2,
    decoder_layers=1,
    d_model=18,
    heads=2,
    head_dim=7,
    d_ff=23,
    experts=3,
    max_distance=19,
)

# Counted by transformers on its meta device (SwitchTransformersForConditionalGeneration, embeddings tied).
PARAMETERS = {
    "base-8": 619_339_008,
    "base-16": 1_072_397_568,
    "base-32": 1_978_514_688,
    "base-64": 3_790_748_928,
    "base-128": 7_415_217_408,
    "base-256": 14_664_154_368,
}


@jax.jit
def _run(model, tokens, decoder_tokens, mask, decoder_mask):
    return nnx.capture(model, nnx.Intermediate)(tokens, decoder_tokens, mask=mask, decoder_mask=decoder_mask)


def run(model, *inputs):
    """Logits, and what was captured."""
    with jax.default_matmul_precision("highest"):
        return _run(model, *map(jnp.asarray, inputs))


def make(config: SwitchConfig) -> SwitchTransformer:
    """A model with random norms too; numpy makes it, since the initialiser takes longer to compile."""
    rng = np.random.default_rng(0)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: SwitchTransformer(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), state))


def test_presets_have_the_published_sizes():
    """Those in between differ in nothing but their experts."""
    assert PRESETS.keys() - {"tiny"} == PARAMETERS.keys()
    shapes = nnx.eval_shape(lambda: SwitchTransformer(SwitchConfig.preset("base-8"), rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(shapes))) == PARAMETERS["base-8"]
    expert = 12 * (2 * 768 * 3072 + 768)  # of twelve layers: wi, wo and a column of the router
    for size, parameters in PARAMETERS.items():
        experts = int(size.removeprefix("base-"))
        assert PRESETS[size] == PRESETS["base-8"] | {"experts": experts}
        assert parameters == PARAMETERS["base-8"] + (experts - 8) * expert


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_position_buckets(stack):
    """Every distance, with the published sizes."""
    golden = np.load(GOLDEN / "switch" / "golden.npz")[f"{stack}_buckets"]
    distances = jnp.arange(-300, 301)[None]
    buckets = relative_position_buckets(distances, buckets=32, max_distance=128, bidirectional=stack == "encoder")
    np.testing.assert_array_equal(buckets[0], golden)


def check_golden(name: str, capacity: str, atol: float) -> None:
    """Logits on padded batches, and what the last router of the encoder saw and decided."""
    golden = np.load(GOLDEN / name / FILES[capacity])
    model = load_switch(GOLDEN / name, capacity=capacity)
    logits, captured = run(model, *(golden[key] for key in ("tokens", "decoder_tokens", "mask", "decoder_mask")))
    real = golden["mask"]
    np.testing.assert_allclose(logits[golden["decoder_mask"]], golden["logits"][golden["decoder_mask"]], atol=atol)
    last = captured["encoder"]["block"][1]
    router = last["mlp"]["router"][0]
    np.testing.assert_allclose(router.logits[real.ravel()], golden["router_logits"][real], atol=atol)
    taken = np.asarray(router.kept).reshape(real.shape)
    assert not taken[~real].any()
    assert (~taken & real).sum() == golden.get("dropped", 0)
    expected = np.asarray(golden["router_logits"][real], np.float64)
    shares = np.bincount(expected.argmax(1), minlength=expected.shape[1]) / len(expected)
    probabilities = np.exp(expected) / np.exp(expected).sum(1, keepdims=True)
    balance = expected.shape[1] * shares @ probabilities.mean(0)
    np.testing.assert_allclose(load_balance_loss(last), balance, rtol=1e-4)
    np.testing.assert_allclose(z_loss(last), np.square(np.log(np.exp(expected).sum(1))).mean(), rtol=1e-4)


CASES = [("switch", "none"), ("switch_untied", "per_sequence")]
OTHER_CASES = [("switch_untied", "none"), ("switch", "per_sequence")]


@pytest.mark.parametrize(("name", "capacity"), CASES)
def test_golden(name, capacity):
    check_golden(name, capacity, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "capacity"), CASES + OTHER_CASES)
def test_golden_on_a_gpu(name, capacity):
    check_golden(name, capacity, atol=1e-4)


@pytest.mark.parametrize(("name", "capacity"), CASES)
def test_greedy_tokens(name, capacity):
    """Of prompts of different lengths; then with one of those tokens as end-of-text, after which transformers pads."""
    golden = np.load(GOLDEN / name / FILES[capacity])
    model = load_switch(GOLDEN / name, capacity=capacity)
    prompts = [row[mask].tolist() for row, mask in zip(golden["prompts"], golden["prompt_mask"], strict=True)]
    new = golden["greedy"].shape[1]
    assert generate(model, prompts, max_new_tokens=new, eos_id=-1) == golden["greedy"].tolist()
    eos = int(golden["eos"])
    expected = [row[: row.index(eos)] if eos in row else row for row in golden["greedy_eos"].tolist()]
    assert generate(model, prompts, max_new_tokens=new, eos_id=eos) == expected


@pytest.fixture(scope="module")
def model():
    """One whose experts take two tokens of a sequence; used in its golden files' shapes, it compiles nothing new."""
    return load_switch(GOLDEN / "switch_untied", capacity="per_sequence")


def batch(rows, starts, length):
    """Rows of tokens, each at its start, and which tokens are real."""
    tokens, mask = np.ones((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        tokens[i, start : start + len(row)] = row
        mask[i, start : start + len(row)] = True
    return tokens, mask


def test_padding_changes_nothing(model):
    """The same sequence wherever it lies in its row, next to an empty one and one with a token of no vocabulary."""
    rng = np.random.default_rng(1)
    row, text = rng.integers(2, 61, 17).tolist(), rng.integers(2, 61, 5).tolist()
    tokens, mask = batch([row, row, row, [], [999, *row[1:]], row], (0, 6, 2, 0, 3, 1), 23)
    decoder_tokens, decoder_mask = batch([text] * 6, (0, 1, 4, 1, 0, 4), 9)
    logits = np.asarray(run(model, tokens, decoder_tokens, mask, decoder_mask)[0])
    real = logits[decoder_mask].reshape(6, 5, -1)
    for i in (1, 2, 5):
        np.testing.assert_allclose(real[i], real[0], atol=1e-4)
    assert np.isfinite(real[3]).all()
    assert np.isnan(real[4]).all()


def test_full_experts_take_no_more(model):
    """Counted by hand, token by token: the first two of a sequence that choose an expert, whatever other rows do."""
    tokens = np.random.default_rng(2).integers(2, 61, (6, 23), np.int32)
    mask = np.ones((6, 23), bool)
    mask[1, 6:], mask[2, :4], mask[3, ::2], mask[4] = False, False, False, False
    _, captured = run(model, tokens, tokens[:, :9], mask, mask[:, :9])
    router = captured["encoder"]["block"][1]["mlp"]["router"][0]
    expected = np.zeros(mask.shape, bool)
    for i, row in enumerate(np.asarray(router.logits).argmax(1).reshape(mask.shape)):
        places = [2] * model.config.experts
        for j, expert in enumerate(row):
            if mask[i, j] and places[expert]:
                places[expert] -= 1
                expected[i, j] = True
    np.testing.assert_array_equal(np.asarray(router.kept).reshape(mask.shape), expected)
    assert 10 < expected.sum() < mask.sum() - 10


def test_cache_gives_the_same_hidden_states():
    """Two tokens and two, against all four at once, padded on the left."""
    model = make(TINY)
    rng = np.random.default_rng(3)
    encoded = jnp.asarray(rng.normal(size=(3, 4, 18)), jnp.float32)
    tokens = jnp.asarray(rng.integers(2, 53, (3, 4)))
    mask, encoder_mask = jnp.ones((3, 4), bool).at[1, 0].set(False), jnp.ones((3, 4), bool).at[0, 3:].set(False)
    memory = model.memory(encoded, mask=encoder_mask)
    decode = jax.jit(lambda model, *args, cache=None: model.decode(args[0], memory, mask=args[1], cache=cache))
    full, _ = decode(model, tokens, mask)
    first, cache = decode(model, tokens[:, :2], mask[:, :2], cache=model.init_decoder_cache(3, 5))
    second, cache = decode(model, tokens[:, 2:], mask[:, 2:], cache=cache)
    np.testing.assert_allclose(np.concatenate([first, second], axis=1)[mask], full[mask], atol=2e-5)
    assert cache.filled.tolist() == [4, 3, 4]


def test_initialisation_follows_the_paper():
    """Square weights, so that few shapes are compiled."""
    config = dataclasses.replace(TINY, d_model=96, d_ff=96, heads=4, head_dim=24)
    attention, experts = Attention(config, rngs=nnx.Rngs(0)), Experts(config, rngs=nnx.Rngs(1))
    std = (0.1 / 96) ** 0.5
    for weights in (attention.k.kernel, attention.v.kernel, attention.o.kernel, experts.wi, experts.wo):
        assert np.std(weights[...]) == pytest.approx(std, rel=0.05)
    assert np.std(attention.q.kernel[...]) == pytest.approx(std / 24**0.5, rel=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_layers": 0}, "encoder_layers must be an integer of at least 1; got encoder_layers=0"),
        ({"d_ff": "96"}, "d_ff must be an integer of at least 1; got d_ff='96'"),
        ({"decoder_sparse_step": -1}, "decoder_sparse_step must be an integer of at least 0"),
        ({"expert_capacity": 0}, "expert_capacity must be an integer of at least 1"),
        ({"capacity": "batch"}, "capacity must be one of none, per_sequence; got 'batch'"),
        ({"position_buckets": 3}, "position_buckets must be an integer of at least 4"),
        ({"max_distance": 16}, "max_distance must be above half of position_buckets=32; got max_distance=16"),
        ({"start_id": 53}, r"start_id must be in \[0, 53\); got start_id=53"),
        ({"dtype": "float16"}, "dtype must be one of bfloat16, float32; got 'float16'"),
        ({"param_dtype": "int8"}, "param_dtype must be one of"),
    ],
)
def test_wrong_configurations(unchecked, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_unknown_preset():
    with pytest.raises(ValueError, match="size must be one of tiny, base-8, .*; got '8'"):
        SwitchConfig.preset("8")
