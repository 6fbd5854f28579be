"""Mixtral against files made by the original implementation (golden/make_mixtral.py), and what they do not show."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import Mixtral, MixtralConfig, load_mixtral, save_hf, save_mixtral
from models.mixtral import rotate
from sparsellm.decoding import LanguageModel
from sparsellm.generation import generate
from sparsellm.mixture_of_experts import load_balance_loss, z_loss

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = ["mixtral", "mixtral_packed"]  # the second with a sliding window
SIZES: dict[str, Any] = {
    "vocab_size": 31,
    "layers": 1,
    "d_model": 8,
    "heads": 2,
    "kv_heads": 1,
    "d_ff": 5,
    "experts": 3,
}


@jax.jit
def run(model, tokens, mask=None, cache=None):
    with jax.default_matmul_precision("highest"):
        return model(tokens, mask=mask, cache=cache)


def errors(model, golden) -> np.ndarray:
    """Of the logits, where tokens are real."""
    logits = run(model, jnp.asarray(golden["tokens"]), jnp.asarray(golden["mask"]))
    return (np.asarray(logits) - golden["logits"])[golden["mask"]]


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request):
    return GOLDEN / request.param


@pytest.fixture(scope="module")
def golden(folder):
    return np.load(folder / "golden.npz")


def test_logits(folder, golden):
    """On left-padded, right-padded and unpadded batches."""
    assert np.abs(errors(load_mixtral(folder), golden)).max() < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", [None, "xla"])
def test_logits_on_a_gpu(folder, golden, implementation):
    assert np.abs(errors(load_mixtral(folder, implementation=implementation), golden)).max() < 1e-4


def test_greedy_tokens(folder, golden):
    model = load_mixtral(folder)
    assert isinstance(model, LanguageModel)
    real = golden["mask"][: len(golden["prompts"])]
    prompts = [row[mask].tolist() for row, mask in zip(golden["prompts"], real, strict=True)]
    new = golden["greedy"].shape[1]
    assert generate(model, prompts, max_new_tokens=new, eos_id=-1) == golden["greedy"].tolist()
    # With one of those tokens as end-of-text; transformers pads after it.
    eos = int(golden["eos"])
    expected = [row[: row.index(eos)] if eos in row else row for row in golden["greedy_eos"].tolist()]
    assert generate(model, prompts, max_new_tokens=new, eos_id=eos) == expected


def test_round_trips(folder, tmp_path):
    """Saved in both formats (one file, shards, Orbax) and loaded again, every bit is the same."""
    model = load_mixtral(folder)
    save_hf(model, tmp_path / "one")
    save_hf(model, tmp_path / "shards", max_shard_bytes=9_000)
    save_mixtral(model, tmp_path / "native")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    for name in ("one", "shards", "native"):
        again = load_mixtral(tmp_path / name)
        assert again.config.sliding_window == model.config.sliding_window
        assert again.config.rope_theta == model.config.rope_theta
        for (path, a), (_, b) in zip(*(nnx.to_flat_state(nnx.state(m)) for m in (model, again)), strict=True):
            np.testing.assert_array_equal(a[...], b[...], err_msg=str(path))


def test_bfloat16():
    """Weights rounded as they are loaded: near the float32 logits, relative to their size."""
    model, golden = load_mixtral(GOLDEN / "mixtral", dtype="bfloat16"), np.load(GOLDEN / "mixtral" / "golden.npz")
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("bfloat16")}
    # Where rounding turns a close choice of experts, a token's logits are others altogether: most are near.
    off = np.sqrt(np.mean(errors(model, golden) ** 2, axis=-1))
    assert np.isfinite(off).all() and np.median(off) < 0.03 * np.sqrt(np.mean(golden["logits"] ** 2))


def test_a_text_in_pieces_through_the_cache():
    """Padding before the text and in the middle of it: the logits of real tokens are the golden ones."""
    folder = GOLDEN / "mixtral_packed"  # whose sliding window reaches over the padding
    model, golden = load_mixtral(folder), np.load(folder / "golden.npz")
    assert golden["mask"][-1].all()
    cache, got = jax.device_put(model.init_cache(1, 20), jax.devices()[0]), []  # placed, so as to compile once
    for start, stop in ((0, 3), (3, 4), (4, 9)):
        padding = 5 - (stop - start)
        tokens = np.pad(golden["tokens"][-1:, start:stop], ((0, 0), (padding, 0)))
        logits, cache = run(model, jnp.asarray(tokens), jnp.asarray(np.arange(5)[None] >= padding), cache)
        got.append(np.asarray(logits)[0, padding:])
    np.testing.assert_allclose(np.concatenate(got), golden["logits"][-1, :9], atol=1e-4)


@pytest.fixture(scope="module")
def tiny() -> Mixtral:
    rng = np.random.default_rng(0)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Mixtral(MixtralConfig(**SIZES), rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), state))


def test_padding_goes_to_no_expert_and_losses_find_the_routers(tiny):
    mask = jnp.arange(7)[None] >= jnp.array([[0], [5]])

    @jax.jit
    def capture(model, tokens, mask):
        _, captured = nnx.capture(model, nnx.Intermediate)(tokens, mask=mask)
        router = captured["layers"][0]["block_sparse_moe"]["router"][0]
        return router, router.counts, load_balance_loss(captured), z_loss(captured)

    router, counts, balance, z = capture(tiny, jnp.ones((2, 7), jnp.int32), mask)
    assert int(counts.sum()) == 2 * 9
    np.testing.assert_array_equal(router.mask, mask.reshape(-1))
    np.testing.assert_allclose(np.asarray(router.weights).sum(axis=1)[np.asarray(router.mask)], 1, atol=1e-6)
    assert balance >= 2 * 0.99 and z > 0


def test_gradients_reach_every_parameter(tiny):
    """And none is NaN with padding in the batch."""
    tokens = jnp.arange(24).reshape(2, 12)
    mask = jnp.arange(12)[None] >= jnp.array([[0], [7]])
    graphdef, params = nnx.split(tiny)

    @jax.jit
    @jax.grad
    def gradient(params):
        logits = nnx.merge(graphdef, params)(tokens, mask=mask)
        return jnp.where(mask[..., None], jax.nn.log_softmax(logits), 0)[..., 3].sum()

    for path, x in nnx.to_flat_state(gradient(params)):
        gradients = np.asarray(x[...])
        assert np.isfinite(gradients).all() and gradients.any(), path


def test_rotation_is_by_the_position():
    """Against products of complex numbers in float64."""
    x, positions = np.random.default_rng(0).normal(size=(1, 5, 2, 6)), np.array([[0, 1, 5, 40, 4000]])
    angle = positions[..., None, None] * 100.0 ** (-np.arange(3) / 3)
    expected = (x[..., :3] + 1j * x[..., 3:]) * np.exp(1j * angle)
    got = jax.jit(rotate, static_argnums=2)(jnp.asarray(x, jnp.float32), jnp.asarray(positions), 100.0)
    np.testing.assert_allclose(got, np.concatenate([expected.real, expected.imag], axis=-1), atol=1e-3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": 0}, "layers must be an integer of at least 1; got layers=0"),
        ({"experts": 2.0}, r"experts must be an integer of at least 1; got experts=2\.0"),
        ({"sliding_window": 0}, "sliding_window must be an integer of at least 1; got sliding_window=0"),
        ({"kv_heads": 3, "heads": 4}, "kv_heads must divide heads; got kv_heads=3, heads=4"),
        ({"d_model": 9}, "heads must divide d_model; got heads=2, d_model=9"),
        ({"head_dim": 5}, "head_dim must be even, .*; got head_dim=5"),
        ({"top_k": 4}, "top_k must be at most experts; got top_k=4, experts=3"),
        ({"rope_theta": 0.0}, r"rope_theta must be positive and finite; got rope_theta=0\.0"),
        ({"norm_epsilon": float("nan")}, "norm_epsilon must be positive and finite; got norm_epsilon=nan"),
        ({"dtype": "float8"}, "dtype must be one of .*; got 'float8'"),
    ],
)
def test_impossible_configurations(unchecked, fields, message):
    with pytest.raises(ValueError, match=message):
        MixtralConfig(**(SIZES | fields))


@pytest.mark.parametrize(("size", "billions"), [("8x7b", 46.7), ("8x22b", 140.6)])
def test_presets(size, billions):
    """Parameters as published."""

    def parameters(layers: int) -> int:
        config = MixtralConfig.preset(size, layers=layers)
        return sum(x.size for x in jax.tree.leaves(nnx.eval_shape(lambda: Mixtral(config, rngs=nnx.Rngs(0)))))

    layer = parameters(2) - parameters(1)
    assert round((parameters(1) + (MixtralConfig.preset(size).layers - 1) * layer) / 1e9, 1) == billions


def test_a_size_that_was_not_published():
    with pytest.raises(ValueError, match="size must be one of tiny, 8x7b, 8x22b; got '7b'"):
        MixtralConfig.preset("7b")


def test_too_long_a_text():
    model = nnx.eval_shape(lambda: Mixtral(MixtralConfig(**SIZES, max_length=4), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="length must be at most max_length=4; got 5"):
        model(jnp.zeros((1, 5), jnp.int32))
