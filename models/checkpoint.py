"""Models from and to disk: Hugging Face's folders both ways, and this project's own Orbax checkpoints.

What differs between models is an `Architecture`: how their parameters and their config.json correspond to what
transformers writes.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh

from sparsellm import huggingface
from sparsellm.checkpoint import CONFIG, is_checkpoint, load_checkpoint, load_config, save_checkpoint
from sparsellm.memory import check_parameters
from sparsellm.sharding import TENSOR_PARALLEL, Rules, abstract_model
from sparsellm.stored import Stored
from sparsellm.unstructured import CompressedArray, check_layers, layouts, with_layouts

COMPRESSED = "unstructured"  # what config.json calls the layouts of compressed layers
DENSE_ONLY = ("sparse_rows", "neuron_major")  # choices of how dense layers run
SAVED = nnx.Any(nnx.Param, CompressedArray)
TENSOR_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}

type ParameterPath = tuple[Any, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture[M: nnx.Module]:
    """A model and its original in transformers.

    Attributes:
        name: the original's class, as config.json names it.
        model_type: what config.json of either format calls it.
        model: the class here, made by `model(config, rngs=...)`.
        config: the class of its configuration, which has `dtype` and `param_dtype`.
        read_config: config.json of the original -> fields of the configuration, `param_dtype` among them.
        write_config: configuration -> config.json of the original, but for what every one has.
        stored: (path of a parameter, parameter, names of the tensors in the files) -> how it is stored there, by short
            names; without names of tensors, how to store it.
        short_name: a name in a file -> what `stored` calls it, the same for every way in which files name it.
        full_name: its inverse, as transformers names it.
        copies: configuration -> further tensors that transformers wants, and the one that each of them equals; short
            names.
        prepare: (folder, tensors) -> None; looks at the tensors, unread, by their short names, and may remove some.
    """

    name: str
    model_type: str
    model: type[M]
    config: type
    read_config: Callable[[dict[str, Any]], dict[str, Any]]
    write_config: Callable[[Any], dict[str, Any]]
    stored: Callable[[ParameterPath, Any, Collection[str]], Stored]
    short_name: Callable[[str], str]
    full_name: Callable[[str], str]
    copies: Callable[[Any], Mapping[str, str]] = lambda config: {}
    prepare: Callable[[Path, dict[str, Any]], None] = lambda folder, tensors: None


def load[M: nnx.Module](
    architecture: Architecture[M],
    path_or_hub_id: str | Path,
    *,
    dtype: str | None = None,
    param_dtype: str | None = None,
    mesh: Mesh | None = None,
    rules: Rules = TENSOR_PARALLEL,
    revision: str | None = None,
    **choices: Any,
) -> M:
    """Loads a model from either format, each tensor straight into its dtype and place on the devices.

    What was compressed (`sparsellm.unstructured`) comes back compressed, its counts and offsets checked.

    Args:
        architecture: what it must be.
        path_or_hub_id: a Hugging Face folder (config.json, one or several safetensors), a native checkpoint, or a hub
            id ("owner/name").
        dtype: what to compute in; None for `param_dtype`.
        param_dtype: what to keep parameters in; None for `dtype` or, without that either, what the checkpoint says.
        mesh: devices to spread the parameters over; None for the default device.
        rules: mesh axis for each axis name (see `sparsellm.sharding`).
        revision: as in `huggingface.find_folder`.
        choices: further fields of the configuration, which no checkpoint decides.

    Raises:
        FileNotFoundError: there is no such folder, or files are missing from it.
        ValueError: another architecture, pickles only, a damaged file, tensors that do not fit (all named), an unknown
            dtype, or another one than a compressed model's; a mesh or dense layers' choices for one; or more than the
            devices have room for.
    """
    folder = huggingface.find_folder(path_or_hub_id, revision=revision)
    native = is_checkpoint(folder)
    described = load_config(folder) if native else huggingface.read_config(folder, architecture=architecture.name)
    compressed = described.pop(COMPRESSED, {})
    if compressed and mesh is not None:
        raise ValueError(f"a compressed model is loaded onto one device; got {folder}, which is one, and a mesh")
    if compressed and (chosen := [name for name in DENSE_ONLY if choices.get(name)]):
        raise ValueError(f"{chosen[0]} is for dense layers; those of {folder} are compressed: leave it out")
    fields = _native_fields(architecture, folder, described) if native else architecture.read_config(described)
    param_dtype = param_dtype or dtype or fields["param_dtype"]
    config = architecture.config(**(fields | {"dtype": dtype or param_dtype, "param_dtype": param_dtype} | choices))
    make = cast(Callable[..., M], architecture.model)
    graphdef, abstract = abstract_model(
        lambda: with_layouts(make(config, rngs=nnx.Rngs(0)), compressed, folder), mesh, rules
    )
    check_parameters(abstract)
    parameters = {dotted(path): (path, variable) for path, variable in nnx.to_flat_state(abstract)}
    if native:
        wanted = {name: variable.get_value() for name, (_, variable) in parameters.items()}
        exact = [name for name, (_, variable) in parameters.items() if isinstance(variable, CompressedArray)]
        arrays = load_checkpoint(folder, wanted, exact=exact)
    else:
        dtypes = huggingface.DTYPES + (huggingface.INTEGERS if compressed else ())
        tensors = huggingface.open_tensors(folder, architecture.short_name, dtypes=dtypes)
        architecture.prepare(folder, tensors)
        stored = {
            name: _stored(architecture, path, variable, variable.get_value(), tensors.keys())
            for name, (path, variable) in parameters.items()
        }
        arrays = huggingface.load_tensors(folder, tensors, stored)
    for name, (_, variable) in parameters.items():
        if arrays[name].dtype != variable.get_value().dtype:  # of `_stored`
            arrays[name] = lax.bitcast_convert_type(arrays[name], variable.get_value().dtype)
    state = nnx.from_flat_state(
        [(path, variable.replace(arrays[name])) for name, (path, variable) in parameters.items()]
    )
    model = nnx.merge(graphdef, state)
    check_layers(model, compressed, folder)
    return model


def save(architecture: Architecture, model: Any, folder: str | Path, *, overwrite: bool = False) -> None:
    """Writes a native checkpoint (Orbax), which `load` reads; arguments and errors of `save_checkpoint`.

    Raises:
        ValueError: the model has other parameters than its config says, as where layers are wrapped: `load` could not
            read them.
    """
    compressed = _layouts(architecture, model)
    config = {"model_type": architecture.model_type, **dataclasses.asdict(model.config), **compressed}
    state = {dotted(path): variable[...] for path, variable in nnx.to_flat_state(nnx.state(model, SAVED))}
    save_checkpoint(folder, config, state, overwrite=overwrite)


def save_hf(architecture: Architecture, model: Any, folder: str | Path, **options: Any) -> None:
    """Writes a folder that transformers can load; options and errors of `huggingface.save_folder`, and of `save`.

    That of a compressed model is for `load` alone: its model_type is one that transformers refuses.
    """
    compressed = _layouts(architecture, model)
    config = {
        "architectures": [architecture.name],
        "model_type": architecture.model_type + (f"-{COMPRESSED}" if compressed else ""),
        "torch_dtype": model.config.param_dtype,
        **architecture.write_config(model.config),
        **compressed,
    }
    parameters = nnx.to_flat_state(nnx.state(model, SAVED))
    stored = [_stored(architecture, path, variable, variable[...], ()) for path, variable in parameters]
    originals = {parameter.names: parameter for parameter in stored if isinstance(parameter.names, str)}
    for copy, original in architecture.copies(model.config).items():
        stored.append(dataclasses.replace(originals[original], names=copy))
    huggingface.save_folder(folder, config, stored, rename=architecture.full_name, **options)


def read_fields(
    config: Mapping[str, Any],
    names: Mapping[str, str],
    *,
    required: Collection[str] = (),
    fixed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Fields of a configuration out of an original's config.json, `param_dtype` among them.

    Args:
        config: the contents of config.json.
        names: our field -> theirs; what is not there, or null, is left out.
        required: our fields that must be there.
        fixed: what the model here is; a checkpoint that says otherwise is of another model.

    Raises:
        ValueError: required entries are missing, or a fixed one differs.
    """
    missing = [names[name] for name in required if config.get(names[name]) is None]
    if missing:
        raise ValueError(f"{CONFIG} must say {', '.join(missing)}; got only {', '.join(config)}")
    for name, value in (fixed or {}).items():
        if config.get(name, value) != value:
            raise ValueError(f"{name} must be {value} in {CONFIG}; got {config[name]}")
    fields = {ours: config[theirs] for ours, theirs in names.items() if config.get(theirs) is not None}
    return fields | {"param_dtype": config.get("dtype") or config.get("torch_dtype") or "float32"}


def dotted(path: ParameterPath) -> str:
    """A parameter's path as one name."""
    return ".".join(map(str, path))


def tensor_name(path: ParameterPath) -> str:
    """The path with Hugging Face's last word in place of Flax's."""
    return dotted((*path[:-1], TENSOR_NAMES[path[-1]]))


def _layouts(architecture: Architecture, model: Any) -> dict[str, Any]:
    """What config.json says of compressed layers: nothing where there are none.

    Raises:
        ValueError: what is made of that and the model's config has other parameters.
    """
    found, make = layouts(model), cast(Callable[..., Any], architecture.model)
    described = nnx.eval_shape(lambda: with_layouts(make(model.config, rngs=nnx.Rngs(0)), found, "the model"))
    wanted, there = ({dotted(path) for path, _ in nnx.to_flat_state(nnx.state(m, SAVED))} for m in (described, model))
    if differing := sorted(wanted ^ there):
        named = ", ".join(differing[:4]) + (f" and {len(differing) - 4} more" if len(differing) > 4 else "")
        raise ValueError(f"a saved model must have the parameters that its config says; differs in {named}")
    return {COMPRESSED: found} if found else {}


def _stored(architecture: Architecture, path: ParameterPath, variable: nnx.Variable, array: Any, found) -> Stored:
    """How a parameter, or an array of a compressed layer, is stored in safetensors.

    float8 as the bytes that it is: the reader of safetensors for numpy knows no such dtype.
    """
    if isinstance(variable, CompressedArray):
        if array.dtype.name.startswith("float8"):
            there = isinstance(array, jax.Array)
            array = lax.bitcast_convert_type(array, jnp.uint8) if there else array.update(dtype=jnp.dtype("uint8"))
        return Stored(array, dotted(path), exact=True)
    return architecture.stored(path, array, found)


def _native_fields(architecture: Architecture, folder: Path, described: dict[str, Any]) -> dict[str, Any]:
    """Fields of the configuration out of the config.json of a checkpoint by `save`."""
    fields, model = dict(described), architecture.model.__name__
    if fields.pop("model_type", None) != architecture.model_type:
        article = "an" if model[0] in "AEIO" else "a"
        says = f"its {CONFIG} says no model_type {architecture.model_type}"
        raise ValueError(f"the checkpoint {folder} is not of {article} {model}: {says}")
    ours = dataclasses.fields(architecture.config)
    names = {field.name for field in ours}
    required = {field.name for field in ours if field.default is field.default_factory is dataclasses.MISSING}
    if not required <= fields.keys() <= names:  # a field that came later has a default
        differing = ", ".join(sorted((fields.keys() - names) | (required - fields.keys())))
        rule = f"must hold {architecture.config.__name__}'s fields"
        raise ValueError(f"{CONFIG} of {folder} {rule}; differs in {differing}")
    return fields
