"""Models as a user would write them, with no thought of sparsity; the last two follow Flax's own examples."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx


class MLP(nnx.Module):
    """Two layers, ReLU and dropout."""

    def __init__(self, *, rngs: nnx.Rngs, activation=jax.nn.relu):
        self.up = nnx.Linear(12, 40, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.down = nnx.Linear(40, 6, rngs=rngs)
        self.activation = activation

    def __call__(self, x, *, train: bool = False):
        return self.down(self.dropout(self.activation(self.up(x)), deterministic=not train))


class MaskedAutoencoder(nnx.Module):
    """Reconstructs what is masked out of its input; a learned token stands for it in the decoder."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.encoder = nnx.Linear(12, 20, rngs=rngs)
        self.norm = nnx.BatchNorm(20, rngs=rngs)
        self.decoder = nnx.Linear(20, 12, rngs=rngs)

    def __call__(self, x, visible):
        return self.decoder(jax.nn.gelu(self.norm(self.encoder(jnp.where(visible, x, 0)))))


class CNN(nnx.Module):
    """flax/examples/mnist: convolutions, pooling, two dense layers."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 4, kernel_size=(3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(4, 8, kernel_size=(3, 3), rngs=rngs)
        self.avg_pool = functools.partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2))
        self.linear1 = nnx.Linear(8 * 4, 16, rngs=rngs)
        self.linear2 = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        x = self.avg_pool(nnx.relu(self.conv1(x)))
        x = self.avg_pool(nnx.relu(self.conv2(x)))
        x = x.reshape(x.shape[0], -1)
        x = nnx.relu(self.linear1(x))
        return self.linear2(x)


class MlpBlock(nnx.Module):
    """flax/examples/lm1b_nnx: the transformer's feed-forward block."""

    def __init__(self, d_model: int, d_ff: int, *, rngs: nnx.Rngs):
        self.linear1 = nnx.Linear(d_model, d_ff, rngs=rngs)
        self.linear2 = nnx.Linear(d_ff, d_model, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x, *, deterministic: bool):
        x = nnx.relu(self.linear1(x))
        x = self.dropout(x, deterministic=deterministic)
        return self.dropout(self.linear2(x), deterministic=deterministic)


class EncoderDecoderBlock(nnx.Module):
    """flax/examples/lm1b_nnx: self-attention, then the feed-forward block."""

    def __init__(self, d_model: int, d_ff: int, heads: int, *, rngs: nnx.Rngs):
        self.ln1 = nnx.LayerNorm(d_model, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, d_model, decode=False, use_bias=False, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.ln2 = nnx.LayerNorm(d_model, rngs=rngs)
        self.mlp = MlpBlock(d_model, d_ff, rngs=rngs)

    def __call__(self, inputs, mask, *, deterministic: bool):
        x = self.attention(self.ln1(inputs), mask=mask, deterministic=deterministic)
        x = self.dropout(x, deterministic=deterministic) + inputs
        return x + self.mlp(self.ln2(x), deterministic=deterministic)


class Transformer(nnx.Module):
    """flax/examples/lm1b_nnx: a small language model, its block rematerialised."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(31, 16, rngs=rngs)
        self.block = EncoderDecoderBlock(16, 32, 2, rngs=rngs)
        self.norm = nnx.LayerNorm(16, rngs=rngs)

    def __call__(self, tokens, *, deterministic: bool = True):
        x, mask = self.embed(tokens), nnx.make_causal_mask(tokens)
        x = nnx.remat(lambda block, x: block(x, mask, deterministic=deterministic))(self.block, x)
        return self.embed.attend(self.norm(x))
