"""What experiments on OPT share: a model by size or by path, and the time of a step of decoding."""

import functools
import gc
import os
import statistics
import time
from pathlib import Path
from typing import Any

# Before JAX first asks for the GPU: it must leave room for a peer's process, and may use nearly all in the end.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh

from experiments import opt_peers
from experiments.language_models import model_folder
from experiments.runs import Row, Run
from models import OPT, PRESETS, OPTConfig, load_opt
from models.firing import Profile
from models.synthetic import random_tokens, synthetic_head_predictors, synthetic_opt, synthetic_predictors
from sparsellm.decoding import GREEDY, Rows, decode_program, on_mesh
from sparsellm.predictors import Predictor, load_predictors
from sparsellm.sharding import mesh_of

EVENLY = (np.float32(1e6), None, None)  # a temperature at which all tokens are about as likely
HEAD_RANK = 512  # of random predictors of heads, as trained ones have it (`sparsellm.predictors.training`)
WARM_UP = 2  # chunks that may compile: the first, and over several devices the second, as rows lie elsewhere by then
TINY: dict[str, Any] = {"vocab_size": 512, "layers": 1, "d_model": 16, "heads": 2, "d_ff": 64, "max_length": 256}


def config_of(size: str, dtype: str, **choices: Any) -> OPTConfig:
    """The published configuration of a size, or "tiny" for a model of seconds.

    Raises:
        ValueError: there is no such size.
    """
    dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": dtype}
    if size != "tiny" and size not in PRESETS:
        raise ValueError(f"size must be one of tiny, {', '.join(PRESETS)}; got {size!r}")
    return OPTConfig(**(TINY | dtypes | choices)) if size == "tiny" else OPTConfig.preset(size, **dtypes, **choices)


def read_profile(path: Path | None, d_ff: int) -> Profile:
    """How many neurons fire: of a CSV file, or a power law where there is none."""
    return Profile.power() if path is None else Profile.read(path, d_ff)


def make_model(
    size: str,
    dtype: str,
    *,
    source: str | None,
    profile: Path | None = None,
    seed: int = 0,
    neuron_major: bool = False,
    mesh: Mesh | None = None,
) -> tuple[OPT, str]:
    """The model, and what a row says of its weights.

    Args:
        size: a preset's name, or "tiny".
        dtype: of parameters and activations.
        source: a run's folder, a checkpoint's, or a hub id, in place of a synthetic model.
        profile: of the synthetic model's firing; None for a power law.
        seed: of its weights.
        neuron_major: the layout of fc1.
        mesh: devices to cut it over; None for the default one.
    """
    gc.collect()  # Flax leaves cycles behind that hold the parameters of the model before
    print(f"loading {source}" if source is not None else f"making opt-{size}", flush=True)
    if source is not None:
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": dtype, "neuron_major": neuron_major}
        return load_opt(model_folder(source), mesh=mesh, **options), source
    config = config_of(size, dtype, neuron_major=neuron_major)
    model = synthetic_opt(config, read_profile(profile, config.d_ff), key=jax.random.key(seed), mesh=mesh)
    return model, f"synthetic, {'power law' if profile is None else profile.name}"


def make_predictors(
    config: Any, model: OPT, batch: int, head_predictors: list[Predictor] | None = None
) -> list[Predictor]:
    """The checkpoint's, or for a synthetic model random ones that name as many neurons as fire for such a batch.

    Args:
        config: with the options predictors, predictor_bits, profile, rank and seed.
        model: whose they are.
        batch: sequences that decode together.
        head_predictors: of the heads that they compute; None for all.
    """
    if config.predictors is not None:
        return _loaded(config.predictors, config, model)
    profile = read_profile(config.profile, model.config.d_ff)
    key = jax.random.fold_in(jax.random.key(config.seed), 1)  # not the model's
    options = {"rank": config.rank, "in_8_bits": config.predictor_bits == 8}
    return synthetic_predictors(model, profile, batch=batch, key=key, head_predictors=head_predictors, **options)


def make_head_predictors(config: Any, model: OPT) -> list[Predictor] | None:
    """The checkpoint's, or for a synthetic model random ones that name a share of the heads; None to compute all.

    Args:
        config: with the options head_predictors, heads, predictor_bits and seed.
        model: whose they are.
    """
    if config.head_predictors is not None:
        return _loaded(config.head_predictors, config, model)
    key = jax.random.fold_in(jax.random.key(config.seed), 2)  # neither the model's nor the neurons'
    options = {"rank": HEAD_RANK, "in_8_bits": config.predictor_bits == 8}
    return None if config.heads is None else synthetic_head_predictors(model, config.heads, key=key, **options)


def _loaded(folder: Path, config: Any, model: OPT) -> list[Predictor]:
    loaded = load_predictors(folder, model)
    return [predictor.in_8_bits() if config.predictor_bits == 8 else predictor for predictor in loaded]


def mesh_over(devices: int) -> Mesh | None:
    """So many devices, to cut a model over; None for one.

    Raises:
        ValueError: there are fewer.
    """
    found = jax.devices()
    if devices > len(found):
        raise ValueError(f"devices must be at most the {len(found)} there are; got {devices}")
    axis_types = (AxisType.Auto,)
    return jax.make_mesh((devices,), ("model",), axis_types, devices=found[:devices]) if devices > 1 else None


def check_length(config: Any, name: str, sizes: OPTConfig) -> None:
    """Raises ValueError where the options `context` and `steps` do not fit into the positions of a model."""
    if config.context + config.steps > sizes.max_length:
        got = f"context={config.context}, steps={config.steps}"
        raise ValueError(f"context and steps must fit into the {sizes.max_length} positions of {name}; got {got}")


def measure_peers(config: Any, size: str, run: Run) -> dict[int, Row]:
    """For each of the option `batches`, what transformers takes for a token of this size: columns of a row.

    Args:
        config: with the options source, batches, context, steps, repeats, dtype and no_peers.
        size: of the model; for a source nothing is measured.
        run: remembers the times.
    """
    found: list[Row] = [{} for _ in config.batches]
    if config.source is None and not config.no_peers:
        asked = {"context": config.context, "steps": config.steps, "repeats": config.repeats}
        measure = functools.partial(opt_peers.measure_decode, config_of(size, config.dtype), config.batches, **asked)
        found = run.remembered(f"peers_{size}", measure)
    columns = {"transformers_time_ms": "time_ms", "transformers_memory_gib": "memory_gib"}
    return {
        batch: {column: row.get(name) for column, name in columns.items()}
        for batch, row in zip(config.batches, found, strict=True)
    }


def time_decode(
    model: OPT, batch: int, *, context: int, steps: int, repeats: int, sampling: tuple = GREEDY, seed: int = 0
) -> tuple[float, Rows]:
    """Milliseconds that a step takes of the compiled loop that `generate` runs.

    Args:
        model: on one device, or cut over several.
        batch: sequences at once.
        context: tokens that each has when a chunk begins. They were decoded by the same model: which neurons a
            predictor names follows from what attention finds.
        steps: of a chunk.
        repeats: timed chunks.
        sampling: how tokens are drawn, as of `sparsellm.decoding`.
        seed: of the first tokens, and of those that are drawn.

    Returns:
        The median over chunks; and the rows as they are when one begins.
    """
    program, key, slots = nnx.split(model), jax.random.key(seed), context + steps
    token = random_tokens(model.config, (batch, 1), key)[:, 0]
    left = jnp.full(batch, steps + 1, jnp.int32)  # no row ends
    rows, times = Rows(token, left, jnp.int32(0), model.init_cache(batch, slots)), []
    if mesh_of(program[1]) is None:  # where the loop leaves them: else its second call compiles as well
        rows = jax.device_put(rows, jax.tree.leaves(program[1])[0].sharding)

    def begin(rows: Rows, filled: int) -> Rows:
        cache = rows.cache._replace(filled=jnp.full(batch, filled, jnp.int32))
        return rows._replace(left=jnp.copy(left), cache=cache)

    fill = range(0, context, steps)
    with on_mesh(program[1]):
        for filled in [*fill, *[context] * (max(WARM_UP - len(fill), 0) + repeats)]:
            rows = begin(rows, filled)
            start = time.perf_counter()
            rows, tokens = decode_program()(*program, rows, key, sampling, np.int32(-1), None, steps=steps)
            np.asarray(tokens)  # waits
            times.append(1e3 * (time.perf_counter() - start) / steps)
    return round(statistics.median(times[-repeats:]), 3), begin(rows, context)
