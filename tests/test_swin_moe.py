"""Swin-MoE against its definition, written down once more in float64: token by token, without windows or dispatch.

The dense model and the cosine router are compared with PyTorch's results in test_swin_moe_checkpoint.py.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.swin_moe import SwinMoE, SwinMoEConfig
from sparsellm.mixture_of_experts import RouterOutput, load_balance_loss

# Three stages: four windows that are shifted, one window, and one that is smaller than `window`.
CONFIG = SwinMoEConfig(
    image_size=24,
    patch_size=2,
    channels=3,
    classes=7,
    embed_dim=6,
    depths=(2, 1, 1),
    heads=(1, 2, 3),
    window=6,
    mlp_ratio=3,
    experts=3,
    moe_stages=(0,),
    top_k=2,
    capacity_factor=0.9,
)


def random_model(config: SwinMoEConfig, seed: int = 0) -> SwinMoE:
    """A model whose every parameter matters."""
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: SwinMoE(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)

    def value(path, variable):
        shape = variable.shape
        noise = rng.normal(size=shape)
        if path[-1] == "scale":
            noise = 1 + 0.3 * noise
        elif "bias" in str(path[-1]):
            noise = 0.3 * noise
        else:
            noise = noise / math.sqrt(math.prod(shape[:-1]) if path[-1] == "kernel" else shape[-2])
        return variable.replace(jnp.asarray(noise.astype(np.float32)))

    return nnx.merge(graphdef, nnx.from_flat_state([(p, value(p, v)) for p, v in nnx.to_flat_state(abstract)]))


class Reference:
    """The forward pass of one model."""

    def __init__(self, model: SwinMoE):
        self.config = model.config
        state = nnx.to_flat_state(nnx.state(model))
        self.dropped = 0
        self.w = {".".join(map(str, path)): np.asarray(v[...], np.float64) for path, v in state}

    def __call__(self, images: np.ndarray) -> np.ndarray:
        c, patch = self.config, self.config.patch_size
        b, size, _, channels = images.shape
        patches = images.reshape(b, size // patch, patch, size // patch, patch, channels).transpose(0, 1, 3, 2, 4, 5)
        kernel = self.w["patch_embed.proj.kernel"].reshape(-1, c.embed_dim)
        x = patches.reshape(b, size // patch, size // patch, -1) @ kernel + self.w["patch_embed.proj.bias"]
        x = self.norm("patch_embed.norm", x)
        for stage, depth in enumerate(c.depths):
            for block in range(depth):
                name = f"layers.{stage}.blocks.{block}"
                shifted = block % 2 == 1 and x.shape[1] > c.window
                x = x + self.attention(f"{name}.attn", self.norm(f"{name}.norm1", x), c.heads[stage], shifted)
                x = x + self.feed_forward(f"{name}.mlp", self.norm(f"{name}.norm2", x))
            if stage < len(c.depths) - 1:
                corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
                merged = self.norm(f"layers.{stage}.downsample.norm", np.concatenate(corners, axis=-1))
                x = merged @ self.w[f"layers.{stage}.downsample.reduction.kernel"]
        return self.linear("head", self.norm("norm", x).mean(axis=(1, 2)))

    def linear(self, name, x):
        return x @ self.w[f"{name}.kernel"] + self.w.get(f"{name}.bias", 0)

    def norm(self, name, x):
        x = x - x.mean(axis=-1, keepdims=True)
        return (
            x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * self.w[f"{name}.scale"] + self.w[f"{name}.bias"]
        )

    def attention(self, name, x, heads, shifted):
        """All tokens against all, of which most pairs do not see each other."""
        b, size, _, width = x.shape
        window = min(self.config.window, size)
        shift = self.config.window // 2 if shifted else 0
        rows, columns = (i.ravel() for i in np.indices((size, size)))
        # Where a token comes to lie, in which window, and whether it went around an edge.
        moved = np.stack([(rows - shift) % size, (columns - shift) % size])
        wrapped = np.stack([rows < shift, columns < shift])
        same_window = (moved[:, :, None] // window == moved[:, None] // window).all(axis=0)
        together = (wrapped[:, :, None] == wrapped[:, None]).all(axis=0)
        offset = (moved[:, :, None] - moved[:, None]).transpose(1, 2, 0) / (window - 1) * 8
        offset = np.sign(offset) * np.log2(np.abs(offset) + 1) / 3
        hidden = np.maximum(self.linear(f"{name}.cpb_mlp.layers.0", offset), 0)
        bias = self.linear(f"{name}.cpb_mlp.layers.2", hidden)
        q, k, v = np.moveaxis(self.linear(f"{name}.qkv", x).reshape(b, size**2, 3, heads, -1), 2, 0)
        logits = np.einsum("bqhd,bkhd->bqkh", q, k) / math.sqrt(width // heads) + bias
        weights = np.exp(logits) * (same_window & together)[:, :, None]
        mixed = np.einsum("bqkh,bkhd->bqhd", weights / weights.sum(axis=2, keepdims=True), v)
        return self.linear(f"{name}.proj", mixed.reshape(b, size, size, width))

    def feed_forward(self, name, x):
        if f"{name}.wi" not in self.w:
            return self.linear(f"{name}.fc2", gelu(self.linear(f"{name}.fc1", x)))
        tokens = x.reshape(-1, x.shape[-1])
        return self.experts(name, tokens, *self.route(name, tokens)).reshape(x.shape)

    def route(self, name, tokens):
        """Scores of all experts, best experts first, and how many tokens an expert takes."""
        c, logits = self.config, self.linear(f"{name}.router", tokens)
        scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        room = len(tokens)
        if c.capacity_factor is not None:
            room = c.top_k * int(c.capacity_factor * math.ceil(len(tokens) / scores.shape[1]))
        return scores, np.argsort(-scores, axis=1)[:, : c.top_k], room

    def experts(self, name, tokens, scores, chosen, room):
        wi, wi_bias, wo = (self.w[f"{name}.{part}"] for part in ("wi", "wi_bias", "wo"))
        out, taken = np.zeros_like(tokens), [0] * scores.shape[1]
        for choice in range(self.config.top_k):
            for t in np.argsort(-scores.max(axis=1)):
                e = chosen[t, choice]
                if taken[e] < room:
                    taken[e] += 1
                    out[t] += scores[t, e] * (gelu(tokens[t] @ wi[e] + wi_bias[e]) @ wo[e])
        self.dropped = chosen.size - sum(taken)
        return out


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def images_of(config: SwinMoEConfig, batch: int = 3, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batch, config.image_size, config.image_size, config.channels))


def quickly(function):
    """Jitted; most of the time here is the compiler's."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


run = quickly(lambda model, images: model(images))


DROPLESS = {"capacity_factor": None, "top_k": 1}


def changed(**changes) -> SwinMoEConfig:
    return dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize("changes", [{}, DROPLESS], ids=["capacity", "dropless"])
def test_logits(changes):
    config = changed(**changes)
    model, images = random_model(config), images_of(config)
    reference = Reference(model)
    expected = reference(images)
    assert (reference.dropped > 0) == (config.capacity_factor is not None)
    np.testing.assert_allclose(run(model, jnp.asarray(images, jnp.float32)), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.06), ("float16", 0.01)])
def test_half_precision(dtype, tolerance):
    """Without a capacity, for which a rounding may decide who is dropped."""
    config = changed(**DROPLESS, dtype=dtype)
    model, images = random_model(config), images_of(config)
    logits, expected = run(model, jnp.asarray(images, jnp.float32)), Reference(model)(images)
    assert logits.dtype == jnp.float32
    assert np.sqrt(np.mean((logits - expected) ** 2) / np.mean(expected**2)) < tolerance


def test_without_a_capacity_images_do_not_meet():
    config = changed(**DROPLESS)
    model, images = random_model(config), jnp.asarray(images_of(config), jnp.float32)
    logits, others_are_nan = run(model, images), run(model, images.at[1:].set(jnp.nan))
    np.testing.assert_allclose(others_are_nan[0], logits[0], atol=1e-5)
    assert jnp.isnan(others_are_nan[1:]).all()


def test_every_parameter_learns_and_routers_are_captured():
    """Even where tokens are dropped."""
    config = changed(depths=(2,), heads=(1,))
    model, images = random_model(config), jnp.asarray(images_of(config), jnp.float32)

    def loss(model, images):
        logits, captured = nnx.capture(model, nnx.Intermediate)(images)
        return -jax.nn.log_softmax(logits)[:, 0].mean() + 0.01 * load_balance_loss(captured), captured

    gradients, captured = quickly(nnx.grad(loss, has_aux=True))(model, images)
    for path, gradient in nnx.to_flat_state(nnx.state(gradients)):
        assert jnp.isfinite(gradient[...]).all() and jnp.abs(gradient[...]).max() > 0, path
    router = captured["layers"][0]["blocks"][1]["mlp"]["router"][0]
    assert len(jax.tree.leaves(captured, is_leaf=lambda leaf: isinstance(leaf, RouterOutput))) == 1
    tokens = 3 * 12 * 12
    assert router.logits.shape == (tokens, 3)
    assert router.counts.max() == 2 * int(0.9 * tokens / 3) and router.counts.sum() < 2 * tokens


@pytest.mark.parametrize(
    ("size", "millions"),
    [("small-dense", 65.8), ("small-8", 173.3), ("small-64", 1033.2), ("base-32", 955.3), ("small-32-cosine", 542.8)],
)
def test_presets(size, millions):
    """As large as Tutel's paper says (its table of SwinV2-MoE; the cosine router is larger by its projections)."""
    config = SwinMoEConfig.preset(size)
    state = nnx.state(nnx.eval_shape(lambda: SwinMoE(config, rngs=nnx.Rngs(0))))
    count = sum(math.prod(variable.shape) for _, variable in nnx.to_flat_state(state))
    assert round(count / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 0}, "embed_dim must be an integer of at least 1; got embed_dim=0"),
        ({"depths": (2, 1)}, r"depths and heads must hold .* for each stage; got depths=\(2, 1\), heads=\(1, 2, 3\)"),
        ({"depths": (), "heads": ()}, "depths and heads must hold"),
        ({"depths": (2, 0, 1)}, "depths and heads must hold"),
        ({"heads": (4, 2, 3)}, "heads must divide the width; got heads=4, width 6"),
        ({"image_size": 26}, r"patch_size \* 2\^2 must divide image_size; got patch_size=2, image_size=26"),
        ({"window": 5}, "windows of at least 2 must divide the tokens of each stage; got window=5 for 12 in stage 0"),
        ({"window": 1}, "windows of at least 2 must divide .*; got window=1"),
        ({"moe_stages": (3,)}, r"moe_stages must be of \[0, 3\); got moe_stages=\(3,\)"),
        ({"router": "hash"}, "router must be one of linear, cosine; got router='hash'"),
        ({"top_k": 4}, "top_k must be at most experts; got top_k=4, experts=3"),
        ({"capacity_factor": 0.0}, "capacity_factor must be positive, or None; got capacity_factor=0.0"),
        ({"dtype": "int8"}, "dtype must be one of .*; got 'int8'"),
    ],
)
def test_configurations_that_fit_nothing(changes, message):
    with pytest.raises(ValueError, match=message):
        changed(**changes)


def test_sizes_and_images_that_fit_nothing(unchecked):
    with pytest.raises(ValueError, match="size must be one of tiny, small-dense, .*; got 'small'"):
        SwinMoEConfig.preset("small")
    with pytest.raises(ValueError, match=r"images must be \[batch, 24, 24, 3\]; got \[1, 3, 24, 24\]"):
        random_model(CONFIG)(jnp.zeros((1, 3, 24, 24)))
