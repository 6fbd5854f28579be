"""Swin-MoE: a Swin Transformer with a mixture of experts in every second block of its deeper stages.

Kept short on purpose; checkpoints: swin_moe_checkpoint.py. Parameters carry the original's names. There is no dropout,
no stochastic depth and no router noise. Sources: Liu et al., "Swin Transformer: Hierarchical Vision Transformer using
Shifted Windows" (2021), section 3; Hwang et al., "Tutel: Adaptive Mixture-of-Experts at Scale" (2022), section 5.3;
microsoft/Swin-Transformer, `models/swin_transformer_moe.py` and `configs/swinmoe`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from models.config import check_dtypes, check_sizes, normalise
from models.layers import linear
from sparsellm.mixture_of_experts import CosineRouter, LinearRouter, MixtureOfExperts, RouterRule

ROUTERS = {"linear": LinearRouter, "cosine": CosineRouter}
POSITION_NEURONS = 512  # hidden neurons between a relative position and its bias
HIDDEN_WINDOW = -100.0  # added to the logits of tokens that a cyclic shift put into the same window from afar


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwinMoEConfig:
    """Sizes and choices of one Swin-MoE.

    Attributes:
        image_size: height and width of an image in pixels.
        patch_size: height and width of a patch, which becomes one token.
        channels: colours of a pixel.
        classes: what an image may show.
        embed_dim: width of the first stage; each later one is twice as wide, and half as high and wide.
        depths: blocks of each stage.
        heads: attention heads of each stage.
        window: height and width in tokens of an attention window; a stage that is no larger is one window.
        mlp_ratio: neurons of a feed-forward block, and of an expert, over the width.
        experts: experts of a sparse block; None: no block is sparse.
        moe_stages: in these stages (the first one is 0) blocks 1, 3, 5, ... are sparse.
        router: "linear" or "cosine".
        top_k: experts a token goes to.
        capacity_factor: an expert takes at most top_k * floor(capacity_factor * ceil(tokens / experts)) of the whole
            batch's tokens, those whose router is the surest; the others pass by. 1.25 is published, for training and
            evaluation alike. It makes the logits of an image depend on the others in its batch: with None no token is
            dropped, and they do not.
        dtype: what is computed in: "bfloat16", "float16" or "float32". Logits are float32; so are routers, norms and
            the softmax of attention.
        param_dtype: what parameters are kept in.
        init_std: standard deviation of the initial weights.
    """

    image_size: int = 192
    patch_size: int = 4
    channels: int = 3
    classes: int = 21841
    embed_dim: int
    depths: tuple[int, ...] = (2, 2, 18, 2)
    heads: tuple[int, ...]
    window: int = 12
    mlp_ratio: int = 4
    experts: int | None
    moe_stages: tuple[int, ...] = (2, 3)
    router: str = "linear"
    top_k: int = 1
    capacity_factor: float | None = 1.25
    dtype: str = "float32"
    param_dtype: str = "float32"
    init_std: float = 0.005

    def __post_init__(self):
        normalise(self)
        check_sizes(
            self, "image_size", "patch_size", "channels", "classes", "embed_dim", "window", "mlp_ratio", "top_k"
        )
        check_dtypes(self)
        _ = self.rule  # which checks capacity_factor
        if len(self.depths) != len(self.heads) or min((*self.depths, *self.heads), default=0) < 1:
            rule = "depths and heads must hold an integer of at least 1 for each stage"
            raise ValueError(f"{rule}; got depths={self.depths}, heads={self.heads}")
        if self.router not in ROUTERS:
            raise ValueError(f"router must be one of {', '.join(ROUTERS)}; got router={self.router!r}")
        if not set(self.moe_stages) <= set(range(len(self.depths))):
            raise ValueError(f"moe_stages must be of [0, {len(self.depths)}); got moe_stages={self.moe_stages}")
        if self.experts is not None and self.experts < self.top_k:
            raise ValueError(f"top_k must be at most experts; got top_k={self.top_k}, experts={self.experts}")
        if self.image_size % (self.patch_size * 2 ** (len(self.depths) - 1)):
            rule = f"patch_size * 2^{len(self.depths) - 1} must divide image_size"
            raise ValueError(f"{rule}; got patch_size={self.patch_size}, image_size={self.image_size}")
        for stage, heads in enumerate(self.heads):
            if self.width(stage) % heads:
                raise ValueError(f"heads must divide the width; got heads={heads}, width {self.width(stage)}")
            if self.resolution(stage) % self.stage_window(stage) or self.stage_window(stage) < 2:
                rule = "windows of at least 2 must divide the tokens of each stage"
                raise ValueError(f"{rule}; got window={self.window} for {self.resolution(stage)} in stage {stage}")

    @property
    def rule(self) -> RouterRule:
        """What a sparse block's router does."""
        return RouterRule(top_k=self.top_k, capacity_factor=self.capacity_factor, drop="priority")

    def width(self, stage: int) -> int:
        """Features of a token."""
        return self.embed_dim * 2**stage

    def resolution(self, stage: int) -> int:
        """Tokens from top to bottom, and from left to right."""
        return self.image_size // self.patch_size // 2**stage

    def stage_window(self, stage: int) -> int:
        """Tokens from end to end of a window."""
        return min(self.window, self.resolution(stage))

    def is_sparse(self, stage: int, block: int) -> bool:
        """Whether a block has experts."""
        return self.experts is not None and stage in self.moe_stages and block % 2 == 1

    @classmethod
    def preset(cls, size: str, **overrides: Any) -> "SwinMoEConfig":
        """The published configuration of a size ("small-8", ..., "base-32-cosine", see `PRESETS`; "tiny" for trying
        out), with fields replaced.

        Raises:
            ValueError: there is no such size.
        """
        if size not in PRESETS:
            raise ValueError(f"size must be one of {', '.join(PRESETS)}; got {size!r}")
        return cls(**(PRESETS[size] | overrides))


_SMALL = {"embed_dim": 96, "heads": (3, 6, 12, 24)}
_BASE = {"embed_dim": 128, "heads": (4, 8, 16, 32)}
_TINY = {"image_size": 32, "classes": 10, "window": 4, "embed_dim": 16, "depths": (2, 2), "heads": (2, 4)}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {**_TINY, "experts": 4, "moe_stages": (1,)},
    "small-dense": {**_SMALL, "experts": None, "init_std": 0.02},
    **{f"small-{experts}": {**_SMALL, "experts": experts} for experts in (8, 16, 32, 64)},
    "small-32-cosine": {**_SMALL, "experts": 32, "router": "cosine"},
    "base-dense": {**_BASE, "experts": None, "init_std": 0.02},
    **{f"base-{experts}": {**_BASE, "experts": experts} for experts in (8, 16, 32)},
    "base-32-cosine": {**_BASE, "experts": 32, "router": "cosine"},
}


def relative_coordinates(window: int) -> np.ndarray:
    """Log-spaced offsets between two tokens of a window, [(2 * window - 1)^2, 2]; farthest: log2(9) / log2(8)."""
    offsets = np.arange(1 - window, window, dtype=np.float32) / np.float32(window - 1) * 8
    spaced = np.sign(offsets) * np.log2(np.abs(offsets) + 1) / np.float32(3)
    return np.stack(np.meshgrid(spaced, spaced, indexing="ij"), axis=-1).reshape(-1, 2)


def _offset_index(window: int) -> np.ndarray:
    """Which row of `relative_coordinates` is the offset from one token of a window to another, [tokens, tokens]."""
    offset = np.arange(window)[:, None] - np.arange(window) + window - 1
    down, right = offset[:, None, :, None], offset[None, :, None, :]
    return (down * (2 * window - 1) + right).reshape(window**2, window**2)


def _partition(x, window: int):
    """[batch, height, width, ...] -> [batch, windows, tokens, ...]."""
    batch, height, width, *rest = x.shape
    x = x.reshape(batch, height // window, window, width // window, window, *rest)
    return x.swapaxes(2, 3).reshape(batch, -1, window**2, *rest)


def _join(x: Array, resolution: int) -> Array:
    """What `_partition` took apart."""
    batch, _, tokens, features = x.shape
    window = int(tokens**0.5)
    x = x.reshape(batch, resolution // window, resolution // window, window, window, features)
    return x.swapaxes(2, 3).reshape(batch, resolution, resolution, features)


def _shift_bias(resolution: int, window: int, shift: int) -> np.ndarray:
    """Keeps tokens apart that a cyclic shift brought together, [windows, tokens, tokens]."""
    position = np.arange(resolution)
    band = (position >= resolution - window).astype(int) + (position >= resolution - shift)
    region = _partition((3 * band[:, None] + band)[None], window)[0]
    return np.where(region[:, :, None] == region[:, None, :], np.float32(0), np.float32(HIDDEN_WINDOW))


def _linear(
    config: SwinMoEConfig, in_out: tuple[int, int], axes: tuple[str, str], *, bias: bool = True, rngs: nnx.Rngs
):
    init = nnx.initializers.truncated_normal(config.init_std)
    return linear(config, in_out, axes, init=init, bias=bias, rngs=rngs)


class LayerNorm(nnx.LayerNorm):
    """Layer norm in float32, whatever it is given and gives back."""

    def __init__(self, config: SwinMoEConfig, features: int, *, rngs: nnx.Rngs):
        super().__init__(
            features,
            epsilon=1e-5,
            dtype=jnp.float32,
            param_dtype=jnp.dtype(config.param_dtype),
            use_fast_variance=False,
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "*tokens features"]) -> Float[Array, "*tokens features"]:
        return super().__call__(x).astype(x.dtype)


class PatchEmbed(nnx.Module):
    """Each patch as one token."""

    def __init__(self, config: SwinMoEConfig, *, rngs: nnx.Rngs):
        patch = (config.patch_size, config.patch_size)
        self.proj = nnx.Conv(
            config.channels,
            config.embed_dim,
            kernel_size=patch,
            strides=patch,
            padding="VALID",
            dtype=jnp.dtype(config.dtype),
            param_dtype=jnp.dtype(config.param_dtype),
            rngs=rngs,
        )
        self.norm = LayerNorm(config, config.embed_dim, rngs=rngs)

    def __call__(self, images: Float[Array, "batch height width channels"]) -> Float[Array, "batch rows columns embed"]:
        return self.norm(self.proj(images))


class WindowAttention(nnx.Module):
    """Self-attention within each window, with a learned bias for each relative position."""

    def __init__(self, config: SwinMoEConfig, stage: int, *, rngs: nnx.Rngs):
        width, self.heads = config.width(stage), config.heads[stage]
        self.qkv = _linear(config, (width, 3 * width), ("embed", "heads"), rngs=rngs)
        self.proj = _linear(config, (width, width), ("heads", "embed"), rngs=rngs)
        exact = dataclasses.replace(config, dtype="float32")  # a few rows, which are the bias of every window
        self.cpb_mlp = nnx.Sequential(
            _linear(exact, (2, POSITION_NEURONS), ("position", "position_neurons"), rngs=rngs),
            jax.nn.relu,
            _linear(exact, (POSITION_NEURONS, self.heads), ("position_neurons", "bias"), bias=False, rngs=rngs),
        )

    def __call__(self, x: Float[Array, "batch windows tokens width"], shift_bias: np.ndarray | None):
        """Attends; `shift_bias`, [windows, tokens, tokens], is added to the logits."""
        *lead, width = x.shape
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(*lead, 3, self.heads, width // self.heads), 3, 0)
        scale = (width // self.heads) ** -0.5
        logits = jnp.einsum("bwqhd,bwkhd->bwhqk", q * scale, k, preferred_element_type=jnp.float32)
        logits += self.position_bias(x.shape[2])[None, None]
        if shift_bias is not None:
            logits += shift_bias[None, :, None]
        return self.proj(jnp.einsum("bwhqk,bwkhd->bwqhd", jax.nn.softmax(logits).astype(x.dtype), v).reshape(x.shape))

    def position_bias(self, tokens: int) -> Float[Array, "heads tokens tokens"]:
        """Of each pair of tokens of a window, from the offset between them."""
        window = int(tokens**0.5)
        of_offset = self.cpb_mlp(jnp.asarray(relative_coordinates(window)))
        return jnp.moveaxis(of_offset[_offset_index(window)], -1, 0)


class Mlp(nnx.Module):
    """A dense feed-forward block. Its second product has no bias, as in every published configuration."""

    def __init__(self, config: SwinMoEConfig, width: int, *, rngs: nnx.Rngs):
        neurons = config.mlp_ratio * width
        self.fc1 = _linear(config, (width, neurons), ("embed", "ffn"), rngs=rngs)
        self.fc2 = _linear(config, (neurons, width), ("ffn", "embed"), bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "*tokens width"]) -> Float[Array, "*tokens width"]:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


def _experts(config: SwinMoEConfig, width: int, *, rngs: nnx.Rngs) -> MixtureOfExperts:
    """A sparse feed-forward block: `Mlp` with experts."""
    param_dtype = jnp.dtype(config.param_dtype)
    experts = MixtureOfExperts(
        width,
        config.mlp_ratio * width,
        ROUTERS[config.router](width, config.experts, config.rule, param_dtype=param_dtype, rngs=rngs),
        activation="gelu",
        bias=True,
        dtype=jnp.dtype(config.dtype),
        param_dtype=param_dtype,
        kernel_init=nnx.initializers.truncated_normal(config.init_std),
        rngs=rngs,
    )
    experts.wo_bias = None
    return experts


class Block(nnx.Module):
    """Window attention, then a feed-forward block, each around a residual."""

    def __init__(self, config: SwinMoEConfig, stage: int, block: int, *, rngs: nnx.Rngs):
        width, resolution = config.width(stage), config.resolution(stage)
        self.window = config.stage_window(stage)
        self.shift = config.window // 2 if block % 2 and resolution > config.window else 0
        self.norm1 = LayerNorm(config, width, rngs=rngs)
        self.attn = WindowAttention(config, stage, rngs=rngs)
        self.norm2 = LayerNorm(config, width, rngs=rngs)
        self.mlp = (_experts if config.is_sparse(stage, block) else Mlp)(config, width, rngs=rngs)

    def __call__(self, x: Float[Array, "batch rows columns width"]) -> Float[Array, "batch rows columns width"]:
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def attend(self, x: Float[Array, "batch rows columns width"]) -> Float[Array, "batch rows columns width"]:
        """Attention within windows, which every second block shifts by half a window, around the edges."""
        resolution, shift_bias = x.shape[1], None
        if self.shift:
            x = jnp.roll(x, (-self.shift, -self.shift), axis=(1, 2))
            shift_bias = _shift_bias(resolution, self.window, self.shift)
        x = _join(self.attn(_partition(x, self.window), shift_bias), resolution)
        return jnp.roll(x, (self.shift, self.shift), axis=(1, 2)) if self.shift else x


class PatchMerging(nnx.Module):
    """Four neighbours become one token of twice the width."""

    def __init__(self, config: SwinMoEConfig, width: int, *, rngs: nnx.Rngs):
        self.norm = LayerNorm(config, 4 * width, rngs=rngs)
        self.reduction = _linear(config, (4 * width, 2 * width), ("neighbours", "embed"), bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "batch rows columns width"]) -> Float[Array, "batch rows/2 columns/2 2*width"]:
        batch, rows, columns, width = x.shape
        x = x.reshape(batch, rows // 2, 2, columns // 2, 2, width)
        x = x.transpose(0, 1, 3, 4, 2, 5).reshape(batch, rows // 2, columns // 2, 4 * width)  # left column first
        return self.reduction(self.norm(x))


class Stage(nnx.Module):
    """Blocks of one width and resolution, then a merging of patches unless it is the last one."""

    def __init__(self, config: SwinMoEConfig, stage: int, *, rngs: nnx.Rngs):
        self.blocks = nnx.List([Block(config, stage, block, rngs=rngs) for block in range(config.depths[stage])])
        last = stage == len(config.depths) - 1
        self.downsample = None if last else PatchMerging(config, config.width(stage), rngs=rngs)

    def __call__(self, x: Float[Array, "batch rows columns width"]) -> Float[Array, "batch rows2 columns2 width2"]:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class SwinMoE(nnx.Module):
    """The image classifier.

    What the router of block b of stage s decided, a `RouterOutput`, is captured as
    `captured["layers"][s]["blocks"][b]["mlp"]["router"][0]` by
    `logits, captured = nnx.capture(model, nnx.Intermediate)(images)`.
    """

    def __init__(self, config: SwinMoEConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, exact = config.width(len(config.depths) - 1), dataclasses.replace(config, dtype="float32")
        self.patch_embed = PatchEmbed(config, rngs=rngs)
        self.layers = nnx.List([Stage(config, stage, rngs=rngs) for stage in range(len(config.depths))])
        self.norm = LayerNorm(config, width, rngs=rngs)
        self.head = _linear(exact, (width, config.classes), ("embed", "classes"), rngs=rngs)

    def __call__(self, images: Float[Array, "batch height width channels"]) -> Float[Array, "batch classes"]:
        """Logits of each class, in float32.

        Args:
            images: normalised as in training: for the published models RGB in [0, 1], less (0.485, 0.456, 0.406), over
                (0.229, 0.224, 0.225).

        Raises:
            ValueError: images of another size; or, under no trace, router logits are NaN.
        """
        return self.head(self.features(images))

    def features(self, images: Float[Array, "batch height width channels"]) -> Float[Array, "batch features"]:
        """What the head reads: the mean over the last stage's tokens, in float32."""
        config = self.config
        size = (config.image_size, config.image_size, config.channels)
        if images.shape[1:] != size:
            raise ValueError(f"images must be [batch, {', '.join(map(str, size))}]; got {list(images.shape)}")
        x = self.patch_embed(images.astype(config.dtype))
        for stage in self.layers:
            x = stage(x)
        return self.norm(x.astype(jnp.float32)).mean(axis=(1, 2))
