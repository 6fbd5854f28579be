"""Decoding over predicted neurons and heads, for `predictors`: its time, its quality, and whether it is right."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int32

from experiments.programs import wall_clock
from experiments.runs import Row
from models import OPT
from models.opt import with_layout, with_predictors
from sparsellm.generation import generate
from sparsellm.predictors import Predictor

ROUNDING = {"bfloat16": 2e-2, "float16": 5e-3, "float32": 1e-5}  # of logits, as a share of the largest


def measure_decoding(
    model: OPT,
    predictors: Sequence[Predictor],
    prompts: Int32[np.ndarray, "batch prompt"],
    new_tokens: int,
    *,
    per_sequence: bool = False,
) -> Row:
    """Wall-clock milliseconds a step of decoding, dense and over lists, and of predicting alone; and how many tokens
    of those that the lists write their simulation writes too.

    Those are written once more, untimed, without TF32: of float32 it would leave less than tells a wrong list. With
    `per_sequence`, each sequence's simulation computes its own neurons only, else those of all.

    Raises:
        RuntimeError: the simulation prefers another token to one of the lists' by more than rounding.
    """
    fast = with_layout(model, neuron_major=True)
    predicted = functools.partial(with_predictors, fast, predictors, per_sequence=per_sequence)
    models = {"dense": model, "lists": predicted("lists")}
    milliseconds = {}
    for name, variant in models.items():
        continued = functools.partial(generate, variant, prompts.tolist(), max_new_tokens=new_tokens, eos_id=-1)
        _, microseconds = wall_clock(continued, [], 3)
        milliseconds[name] = float(np.median(microseconds)) / 1e3 / new_tokens
    x = jnp.ones((len(prompts), model.config.d_model), model.config.dtype)
    graphdef, state = nnx.split(nnx.List(predictors))
    _, predicting = wall_clock(functools.partial(_predict, graphdef, new_tokens), [state, x], 3)
    with jax.default_matmul_precision("highest"):
        text = generate(models["lists"], prompts.tolist(), max_new_tokens=new_tokens, eos_id=-1)
        same, margin = agreement(predicted("mask"), prompts, np.array(text, np.int32))
    if not margin <= ROUNDING[fast.config.dtype]:
        raise RuntimeError(
            f"batch {len(prompts)}: lists write tokens that are behind by {margin:.1e} in their simulation"
        )
    return {
        "time_ms": milliseconds["lists"],
        "dense_ms": milliseconds["dense"],
        "predictor_ms": float(np.median(predicting)) / 1e3 / new_tokens,
        "new_tokens": len(prompts) * new_tokens,
        "same_tokens": same,
        "margin": margin,
    }


def agreement(
    model: OPT, prompts: Int32[np.ndarray, "batch prompt"], text: Int32[np.ndarray, "batch new"]
) -> tuple[int, float]:
    """Reads a text token by token, as it was written, and asks the model for each next one.

    So one token that falls otherwise, where two are as likely, counts as one, and not all that follow from it.

    Returns:
        How many tokens the model would have written too; and by how much its own ones are ahead of the others, at
        most, as a share of the largest logit.
    """
    tokens = np.concatenate([prompts, text], axis=1)
    logits = np.array(_read(*nnx.split(model), jnp.asarray(tokens[:, :-1]), prompts.shape[1]))
    written = np.take_along_axis(logits, text.T[:, :, None], axis=2)[..., 0]
    behind = (logits.max(axis=2) - written) / np.abs(logits).max()
    return int(np.sum(behind == 0)), float(behind.max())


def decoded_perplexity(model: OPT, windows: Int32[np.ndarray, "windows length_plus_1"], batch: int) -> float:
    """Of windows that are read a token at a time behind a cache: as heads are left out there alone.

    Args:
        model: the model.
        windows: of text.
        batch: windows at once, a divisor of their number.
    """
    split = nnx.split(model)
    losses = [float(_loss(*split, jnp.asarray(part))) for part in np.split(windows, len(windows) // batch)]
    return math.exp(math.fsum(losses) / len(losses))


@functools.partial(jax.jit, static_argnums=0)
def _loss(graphdef: nnx.GraphDef, state: nnx.State, windows: Int32[Array, "batch length_plus_1"]) -> Float[Array, ""]:
    model, tokens = nnx.merge(graphdef, state), windows.T

    def step(cache, pair):
        logits, cache = model(pair[0][:, None], cache=cache)
        return cache, optax.softmax_cross_entropy_with_integer_labels(logits[:, 0].astype(jnp.float32), pair[1])

    cache = model.init_cache(len(windows), len(tokens) - 1)
    return lax.scan(step, cache, (tokens[:-1], tokens[1:]))[1].mean()


@functools.partial(jax.jit, static_argnums=(0, 3))
def _read(graphdef: nnx.GraphDef, state: nnx.State, tokens: Int32[Array, "batch length"], prompt: int):
    """Logits behind the prompt and each token after it, one token at a time: [steps, batch, vocab]."""
    model = nnx.merge(graphdef, state)
    first, cache = model(tokens[:, :prompt], cache=model.init_cache(*tokens.shape))

    def step(cache, token):
        logits, cache = model(token[:, None], cache=cache)
        return cache, logits[:, 0]

    _, others = lax.scan(step, cache, tokens[:, prompt:].T)
    return jnp.concatenate([first[None, :, -1], others])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _predict(graphdef: nnx.GraphDef, steps: int, state: nnx.State, x: Float[Array, "batch d_model"]):
    """What the predictors of all layers take, `steps` times one after the other."""

    def step(x, _):
        for predictor in nnx.merge(graphdef, state):
            x = x + predictor(x).mean().astype(x.dtype)  # so that the next has to wait
        return x, None

    return lax.scan(step, x, length=steps)[0]
