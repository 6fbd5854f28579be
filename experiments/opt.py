"""What experiments on OPT share: a model by size or by path, and the time and memory of one of its programs."""

import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before JAX first asks for the GPU: it must leave room for a peer's process, and may use nearly all in the end.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")

import jax
from flax import nnx

from experiments import moe
from models import OPT, PRESETS, OPTConfig, load_opt
from models.firing import Profile
from models.synthetic import synthetic_opt
from pallas_kernels.workbench.timing import Timer
from sparsellm import huggingface

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
    size: str, dtype: str, *, source: str | None, profile: Path | None, seed: int, neuron_major: bool = False
) -> tuple[OPT, str]:
    """The model, and what a row says of its weights.

    Args:
        size: a preset's name, or "tiny".
        dtype: of parameters and activations.
        source: a checkpoint's folder or hub id, in place of a synthetic model.
        profile: of the synthetic model's firing; None for a power law.
        seed: of its weights.
        neuron_major: the layout of fc1.
    """
    if source is not None:
        model = load_opt(huggingface.find_folder(source), dtype=dtype, param_dtype=dtype, neuron_major=neuron_major)
        return model, source
    config = config_of(size, dtype, neuron_major=neuron_major)
    model = synthetic_opt(config, read_profile(profile, config.d_ff), key=jax.random.key(seed))
    return model, f"synthetic, {'power law' if profile is None else profile.name}"


def measure(
    function: Callable[..., Any], model: nnx.Module, arrays: tuple, repeats: int, timer: Timer = moe.wall_clock
) -> tuple[Any, float, float]:
    """Compiles `function(model, *arrays)`, and runs it.

    Returns:
        Its output; the median time in milliseconds; and GiB that the program holds at once, the weights among them.
    """
    graphdef, params = nnx.split(model)
    leaves, tree = jax.tree.flatten(params)  # a list is handed over quickly, a state in milliseconds
    call = jax.jit(lambda leaves, *arrays: function(nnx.merge(graphdef, jax.tree.unflatten(tree, leaves)), *arrays))
    compiled = call.lower(leaves, *arrays).compile()
    out, times = timer(compiled, [leaves, *arrays], repeats)
    found: Any = compiled.memory_analysis()
    buffers = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    gib = (buffers - found.alias_size_in_bytes) / 2**30
    return out, round(statistics.median(times) / 1e3, 3), round(gib, 3)
