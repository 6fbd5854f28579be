"""Predictors on disk: a folder with config.json and predictors.safetensors, there whole or not at all."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.flax import load_file, save_file

from sparsellm.activations import fingerprint
from sparsellm.checkpoint import CONFIG, check_tensors, load_config, whole_folder
from sparsellm.predictors.predictor import LowRankPredictor

ARRAYS = "predictors.safetensors"


def save_predictors(
    predictors: Sequence[LowRankPredictor], folder: str | Path, model: Any, *, overwrite: bool = False
) -> None:
    """Writes a model's predictors, with their thresholds.

    Args:
        predictors: of each layer.
        folder: where to; it appears when everything is written.
        model: the model that they are of: they are not loaded for another.
        overwrite: replace what is there.

    Raises:
        FileExistsError: the folder holds something already, and `overwrite` is False or it is something else.
        OSError: no space is left (`errno.ENOSPC`); what was there is unchanged.
        ValueError: there are more or fewer than layers, or they are in 8 bits, which is made of those that were loaded.
    """
    if len(predictors) != model.config.layers:
        raise ValueError(f"there must be a predictor for each of {model.config.layers} layers; got {len(predictors)}")
    if other := {type(p).__name__ for p in predictors} - {LowRankPredictor.__name__}:
        rule = "predictors are saved as LowRankPredictor (in_8_bits() makes small ones of those that are loaded)"
        raise ValueError(f"{rule}; got {', '.join(sorted(other))}")
    described = {
        "model": fingerprint(model),
        "predictors": [
            {"neurons": p.neurons, "rank": p.down.shape[1], "bias": p.bias is not None, "look_ahead": p.look_ahead}
            for p in predictors
        ],
    }
    tensors = {}
    for i, predictor in enumerate(predictors):
        tensors |= {f"{i}.down": predictor.down[...], f"{i}.up": predictor.up[...]}
        tensors |= {f"{i}.threshold": predictor.threshold[...]}
        tensors |= {} if predictor.bias is None else {f"{i}.bias": predictor.bias[...]}
    with whole_folder(folder, overwrite=overwrite) as temporary:
        (temporary / CONFIG).write_text(json.dumps(described, indent=2) + "\n")
        save_file(tensors, temporary / ARRAYS)


def load_predictors(folder: str | Path, model: Any) -> list[LowRankPredictor]:
    """Reads what `save_predictors` wrote.

    Args:
        folder: where from.
        model: the model that they are for.

    Raises:
        FileNotFoundError: the folder, or a file in it, is missing.
        ValueError: they are predictors of another model (what differs is named), are none, or are damaged.
    """
    described, path = load_config(folder), Path(folder) / ARRAYS
    if not {"model", "predictors"} <= described.keys():
        raise ValueError(f"a folder of predictors must describe them in {CONFIG}; {folder} does not")
    if not path.is_file():
        raise FileNotFoundError(f"a folder of predictors must hold {ARRAYS}; {folder} does not")
    ours, theirs = fingerprint(model), described["model"]
    if different := [f"{name} {theirs.get(name)}, not {ours[name]}" for name in ours if theirs.get(name) != ours[name]]:
        raise ValueError(f"predictors must be of the same model; {folder} is of one with {'; '.join(different)}")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    expected: dict[str, tuple[int, ...]] = {}
    for i, one in enumerate(described["predictors"]):
        expected |= {f"{i}.down": (ours["d_model"], one["rank"]), f"{i}.up": (one["rank"], one["neurons"])}
        expected |= {f"{i}.threshold": ()} | ({f"{i}.bias": (one["neurons"],)} if one["bias"] else {})
    check_tensors(path, expected=expected, found={name: tensor.shape for name, tensor in tensors.items()})
    return [
        LowRankPredictor.from_arrays(
            tensors[f"{i}.down"],
            tensors[f"{i}.up"],
            tensors.get(f"{i}.bias"),
            threshold=float(tensors[f"{i}.threshold"]),
            look_ahead=one["look_ahead"],
        )
        for i, one in enumerate(described["predictors"])
    ]
