"""Small models, tokens and calibration inputs for tests of pruning."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import OPT, OPTConfig
from sparsellm import pruning, training

LENGTH, VOCAB = 8, 19


def tiny_opt(**changes) -> OPT:
    return nnx.clone(initial_opt(**changes))


@functools.cache
def initial_opt(**changes) -> OPT:
    sizes: dict[str, Any] = {"layers": 3, "d_model": 16, "heads": 4, "d_ff": 16, "init_std": 0.3}  # one kernel shape
    return OPT(OPTConfig(vocab_size=VOCAB, max_length=16, **(sizes | changes)), rngs=nnx.Rngs(0))


def windows(count: int = 4, length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(1).integers(4, VOCAB, (count, length)).astype(np.int32)


def kernels(model: nnx.Module) -> dict[str, np.ndarray]:
    """Of linear layers, by path; numpy's own copies."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.array(v[...]) for path, v in flat if path[-1] in ("kernel", "wi", "wo")}


def calibration(tokens: int, d_in: int, *, seed: int = 0) -> np.ndarray:
    """Correlated inputs, one of them always zero, some far larger than others."""
    generator = np.random.default_rng(seed)
    x = (
        generator.normal(size=(tokens, d_in))
        @ generator.normal(size=(d_in, d_in))
        * np.exp(generator.normal(size=d_in))
    )
    x[:, 3] = 0
    return x


def inputs_of(x: np.ndarray) -> pruning.Inputs:
    x = x.astype(np.float64)
    sums = {"tokens": len(x), "squares": (x**2).sum(0), "gram": x.T @ x}
    return pruning.Inputs(**{name: jnp.asarray(value, jnp.float32) for name, value in sums.items()})


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef, state, tokens):
    return nnx.merge(graphdef, state)(tokens)


def logits(model: OPT) -> np.ndarray:
    return np.asarray(_logits(*nnx.split(model), jnp.asarray(windows())))


class Table(nnx.Module):
    """Logits are rows of a table, so that gradients are known."""

    def __init__(self):
        self.table = nnx.Param(jax.random.normal(jax.random.key(0), (VOCAB, VOCAB)))

    def __call__(self, tokens):
        return self.table[...][tokens]


def compilations() -> int:
    """Of the training step, in this process."""
    step: Any = training.train_step
    return step._cache_size()
