"""Compressed layers on their way to disk and back: what config.json says of them, and the checks of what is read."""

import operator
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from flax import nnx

from pallas_kernels.unstructured_matmul import UnstructuredWeights
from sparsellm.checksum import checksum
from sparsellm.unstructured.linear import PARTS, UnstructuredLinear
from sparsellm.unstructured.rules import Row, linears, mixtures, replace, stack_shapes


def layouts(model: nnx.Module) -> dict[str, Row]:
    """What `with_layouts` needs to know of each compressed layer, by its path, as JSON.

    Raises:
        ValueError: a layer is cut over devices, whose parts fit no other number of them.
    """
    found = {}
    for name, layer in compressed_layers(model):
        if layer.cut is not None:
            rule = "a model over several devices must be saved before it is compressed"
            raise ValueError(f"{rule}; got {name} cut over {layer.cut.parts}")
        arrays = {key: [part.dtype.name, list(part.shape)] for key, part in layer.named_parts().items()}
        found[name] = {"shape": list(layer.weights.shape), "dtype": layer.dtype.name, "arrays": arrays}
        found[name] |= {"paired": True} if layer.paired else {}
        found[name]["checksum"] = checksum(layer.named_parts())
    return found


def with_layouts[M: nnx.Module](model: M, found: Any, where: Any) -> M:
    """Puts an empty compressed layer, to be filled, in place of each linear layer that `layouts` has described.

    Args:
        model: is changed in place; traced, so that no empty layer is allocated.
        found: what `layouts` returned.
        where: they came from, for messages.

    Raises:
        ValueError: they are not those of this model, or damaged.
    """
    if not isinstance(found, dict):
        raise ValueError(f"layouts of compressed layers in {where} must be an object by layer; got {found!r}")
    known: dict[str, tuple[tuple[int, int], Any, Any]] = {  # shape [out, in], dtype, bias
        name: ((linear.out_features, linear.in_features), linear.dtype, linear.bias) for name, linear in linears(model)
    }
    for name, layer in mixtures(model):
        shapes = stack_shapes(layer)
        known |= {f"{name}.{part}": (shape, layer.dtype, None) for part, shape in shapes.items()}
        if len({f"{name}.{part}" in found for part in shapes}) > 1:
            raise ValueError(f"both stacks of experts in {where} must be compressed, or none; got one of {name}")
    for name, layout in found.items():
        if name not in known:
            raise ValueError(f"compressed layers in {where} must be linear layers of the model; got {name}")
        (wanted, dtype, bias), what = known[name], f"layout of compressed layer {name} in {where}"
        weights = _empty_weights(layout, what)
        if tuple(weights.shape) != wanted:
            raise ValueError(f"compressed layer {name} in {where} must be of shape {wanted}; got {weights.shape}")
        if weights.dtype != dtype:
            rule = f"compressed weights stay in the dtype they were saved in: load {where} with dtype={weights.dtype}"
            raise ValueError(f"{rule}; got {dtype}")
        replace(model, name, UnstructuredLinear(weights, bias))
    return model


def _empty_weights(layout: Any, what: str) -> UnstructuredWeights:
    try:
        rows, columns = map(operator.index, layout["shape"])
        arrays: dict[str, Any] = dict.fromkeys(PARTS)
        arrays |= {key: jnp.zeros(shape, dtype) for key, (dtype, shape) in layout["arrays"].items()}
        dtype, paired = jnp.dtype(layout["dtype"]), layout.get("paired", False)
        if not isinstance(paired, bool):
            raise ValueError(f"paired must be true or false; got {paired!r}")
        return UnstructuredWeights(**arrays, shape=(rows, columns), dtype=dtype, paired=paired)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"the {what} is damaged: {error!r}") from error


def check_layers(model: nnx.Module, found: dict[str, Row], where: Any) -> None:
    """Raises ValueError unless counts, offsets and sizes of every compressed layer fit: no kernel looks at that.

    And unless its arrays are those that were saved, where the layout has their checksum.

    Args:
        model: its arrays are read.
        found: what `layouts` said of it.
        where: it came from, for the message.
    """
    for name, layer in compressed_layers(model):
        try:
            layer.weights.check()
            written = found.get(name, {}).get("checksum")
            if written is not None and written != (read := checksum(layer.named_parts())):
                raise ValueError(f"its arrays have the checksum {read}; got {written} beside them")
        except ValueError as error:
            raise ValueError(f"compressed layer {name} in {where} is damaged: {error}") from error


def compressed_layers(model: nnx.Module) -> Iterator[tuple[str, UnstructuredLinear]]:
    """Those of a model, by their paths."""
    for path, module in list(nnx.iter_modules(model)):
        if isinstance(module, UnstructuredLinear):
            yield ".".join(map(str, path)), module
