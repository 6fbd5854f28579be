"""Small models whose linear layers are to be compressed."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import OPT, Mixtral, MixtralConfig, OPTConfig, save_hf, save_mixtral, save_opt

OPT_TINY = OPTConfig(vocab_size=61, layers=2, d_model=24, heads=2, d_ff=24, max_length=64, init_std=0.3)
MIXTRAL_TINY = MixtralConfig(
    vocab_size=61, layers=2, d_model=24, heads=2, kv_heads=2, d_ff=16, experts=2, max_length=64, init_std=0.3
)
TOKENS = np.random.default_rng(0).integers(0, 61, (4, 12)).astype(np.int32)
SAVE = {"orbax": {"opt": save_opt, "mixtral": save_mixtral}, "safetensors": {"opt": save_hf, "mixtral": save_hf}}


def make(config: OPTConfig | MixtralConfig) -> Any:
    rng = np.random.default_rng(0)
    model: Any = OPT if isinstance(config, OPTConfig) else Mixtral
    graphdef, state = nnx.split(nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), state))


def zero_some(model: Any, density: float = 0.4) -> Any:
    """Random masks, without calibration."""
    rng = np.random.default_rng(1)
    for _, module in nnx.iter_modules(model):
        if type(module) is nnx.Linear:
            kernel = module.kernel[...]
            module.kernel[...] = jnp.where(rng.random(kernel.shape) < density, kernel, 0)
    return model


def outputs(model: Any) -> np.ndarray:
    return np.asarray(token_logits(*nnx.split(model), jnp.asarray(TOKENS)))


@partial(jax.jit, static_argnums=0)
def token_logits(graphdef, state, tokens):
    return nnx.merge(graphdef, state)(tokens)


def linear(w: np.ndarray, bias: bool = True, dtype: str = "float32") -> nnx.Linear:
    layer = nnx.Linear(*w.shape, use_bias=bias, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    layer.kernel[...] = jnp.asarray(w, jnp.float32)
    if layer.bias is not None:
        layer.bias[...] = jnp.linspace(-1, 1, w.shape[1])
    return layer
