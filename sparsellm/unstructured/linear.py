"""The layer: a linear one whose kernel is `UnstructuredWeights`, whole or cut over devices.

Cut layers follow the kernel they are made of. Where its outputs are cut, each device computes its own ones; where its
inputs are, the devices' results are added up. Each device keeps its part alone, as its index along one more axis in
front of every array. Layers that are alike and read the same x are best applied by `apply_all`.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from pallas_kernels.unstructured_matmul import UnstructuredWeights, unstructured_matmuls

# Arrays that make up `UnstructuredWeights`; `scales` may be None.
PARTS = tuple(f.name for f in dataclasses.fields(UnstructuredWeights) if f.name not in ("shape", "dtype", "paired"))


type Dimension = Literal["in", "out"]

DIMENSIONS: tuple[Dimension, Dimension] = ("in", "out")  # of an `nnx.Linear`'s kernel


class CompressedArray(nnx.Variable):
    """One array of `UnstructuredWeights`. No `nnx.Param`: it is neither trained nor pruned."""


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a layer lies on several devices.

    Attributes:
        mesh: the devices.
        axis: of the mesh, along which the layer is cut.
        dimension: which one of the layer's is cut: each device has some of its outputs, or of its inputs.
    """

    mesh: Mesh
    axis: str
    dimension: Dimension

    @property
    def parts(self) -> int:
        """How many there are."""
        return self.mesh.shape[self.axis]


class _Parts(nnx.Module):
    """Arrays by name. (An `nnx.Dict` would take the name `values` for its method.)"""


class UnstructuredLinear(nnx.Module):
    """x @ kernel + bias as `nnx.Linear`, with the kernel, transposed, as `UnstructuredWeights`."""

    def __init__(self, weights: UnstructuredWeights, bias: nnx.Param | None, cut: Cut | None = None):
        """Takes weights and bias as they are.

        Args:
            weights: kernel.T, [out, in], in the dtype that is computed in. Where the layer is cut, those of a device's
                part of it, each array with one more axis in front, over the devices.
            bias: [out], or None.
            cut: over which devices; None if it is not.
        """
        self.shape, self.dtype, self.paired = weights.shape, np.dtype(weights.dtype), weights.paired
        self.bias, self.cut = bias, cut
        self.out_features = weights.shape[0] * (cut.parts if cut and cut.dimension == "out" else 1)
        self.in_features = weights.shape[1] * (cut.parts if cut and cut.dimension == "in" else 1)
        self.parts = _Parts()
        for name in PARTS:
            array = getattr(weights, name)
            setattr(self.parts, name, None if array is None else CompressedArray(array))

    @classmethod
    def from_linear(
        cls, linear: nnx.Linear, name: str = "", value_dtype: str | None = None, paired: bool = False
    ) -> "UnstructuredLinear":
        """The same function; `name` is for messages, `value_dtype` and `paired` as `from_dense` has them.

        Raises:
            ValueError: the kernel is cut along both dimensions, or lies on devices of other processes.
        """
        kernel = linear.kernel[...]
        cut = _cut(name, kernel)

        def convert(kernel: Float[Array, "d_in d_out"]) -> UnstructuredWeights:
            return UnstructuredWeights.from_dense(kernel.astype(linear.dtype or kernel.dtype).T, value_dtype, paired)

        if cut is None:
            return cls(convert(kernel), linear.bias)
        shards = [shard for shard in kernel.addressable_shards if shard.replica_id == 0]
        shards.sort(key=lambda shard: [along.start or 0 for along in shard.index])
        first = shards[0].device  # converts them all: another device would compile the conversion anew
        return cls(_stacked([convert(jax.device_put(shard.data, first)) for shard in shards], cut), linear.bias, cut)

    @property
    def weights(self) -> UnstructuredWeights:
        """The compressed kernel.T, or what all devices have of it (see `__init__`)."""
        absent: dict[str, Any] = dict.fromkeys(PARTS)
        arrays = {name: part[...] for name, part in self.named_parts().items()}
        return UnstructuredWeights(**absent | arrays, shape=self.shape, dtype=self.dtype, paired=self.paired)

    def named_parts(self) -> dict[str, CompressedArray]:
        """The arrays of the weights that are there, by name."""
        return {name: part for name in PARTS if (part := getattr(self.parts, name)) is not None}

    def to_dense(self) -> Float[Array, "d_in d_out"]:
        """The kernel again, whole."""
        if self.cut is None:
            return self.weights.to_dense().T
        parts = [jax.tree.map(lambda x: x[i], self.weights).to_dense().T for i in range(self.cut.parts)]  # noqa: B023
        return jnp.concatenate(parts, axis=DIMENSIONS.index(self.cut.dimension))

    @property
    def kernel(self) -> NoReturn:
        """There is none: for those that would multiply by it themselves."""
        raise TypeError("a compressed layer has no dense kernel: call the layer, or leave it dense (rules of compress)")

    def __call__(self, x: Float[Array, "*tokens d_in"]) -> Float[Array, "*tokens d_out"]:
        """The linear layer's output, in its dtype."""
        return _apply_alike([self], x)[0]


def apply_all(layers: Sequence[nnx.Module], x: Float[Array, "*tokens d_in"]) -> list[Float[Array, "*tokens d_out"]]:
    """`layer(x)` of each layer; those of compressed ones that are alike come from one launch.

    Alike are layers of one shape, cut, dtype and kind of values, such as the projections of an attention. Any other
    layer, compressed or not, is called by itself.
    """
    outputs: dict[int, Array] = {}
    alike: dict[Any, dict[int, UnstructuredLinear]] = {}
    for i, layer in enumerate(layers):
        if isinstance(layer, UnstructuredLinear):
            kind = layer.shape, layer.cut, layer.dtype, layer.weights.values.dtype, layer.paired
            alike.setdefault(kind, {})[i] = layer
        else:
            outputs[i] = layer(x)  # pyright: ignore[reportCallIssue]
    for group in alike.values():
        outputs |= zip(group, _apply_alike(list(group.values()), x), strict=True)
    return [outputs[i] for i in range(len(layers))]


def _apply_alike(layers: Sequence[UnstructuredLinear], x: Float[Array, "*tokens d_in"]) -> list[Array]:
    cut, dtype = layers[0].cut, layers[0].dtype
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).astype(dtype)
    weights = tuple(layer.weights for layer in layers)
    biases = tuple(None if layer.bias is None else layer.bias[...].astype(dtype) for layer in layers)
    outputs = _multiply(weights, rows, biases) if cut is None else _multiply_parts(cut, weights, rows, biases)
    return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in outputs]


def _multiply_parts(cut: Cut, weights, x: Float[Array, "tokens d_in"], biases) -> tuple[Array, ...]:
    """Each device its own part of each layer; parts of the inputs are summed up over the devices."""
    along = PartitionSpec(cut.axis)
    last = PartitionSpec(None, cut.axis)
    by_inputs = cut.dimension == "in"

    def part(weights, x, biases):
        return _multiply(jax.tree.map(lambda array: array[0], weights), x, biases)

    def summed(weights, x, biases):
        outputs = lax.psum(part(weights, x, [None] * len(biases)), cut.axis)
        return tuple(y if bias is None else y + bias[None] for y, bias in zip(outputs, biases, strict=True))

    options: dict[str, Any] = {"mesh": cut.mesh, "axis_names": {cut.axis}}
    if by_inputs:
        specs = {"in_specs": (along, last, PartitionSpec()), "out_specs": PartitionSpec()}
    else:
        specs = {"in_specs": (along, PartitionSpec(), along), "out_specs": last}
    return jax.shard_map(summed if by_inputs else part, **options, **specs)(weights, x, biases)


def _multiply(weights, x: Float[Array, "tokens d_in"], biases) -> tuple[Array, ...]:
    return tuple(y.T for y in unstructured_matmuls(weights, x.T, biases))


def _cut(name: str, kernel: Float[Array, "d_in d_out"]) -> Cut | None:
    """As the kernel is; None if it is whole on every device."""
    if not isinstance(kernel.sharding, NamedSharding):
        return None
    mesh, axes = kernel.sharding.mesh, (*kernel.sharding.spec, None, None)[:2]
    names = [((along,) if isinstance(along, str) else along or ()) for along in axes]
    cuts = [(name, i) for i in (0, 1) for name in names[i] if mesh.shape[name] > 1]
    if len(cuts) > 1 or not kernel.is_fully_addressable:
        rule = "a kernel must be cut along one axis of a mesh of this process's devices to be compressed"
        raise ValueError(f"{rule}; got {kernel.sharding} of {name}")
    return Cut(mesh, str(cuts[0][0]), DIMENSIONS[cuts[0][1]]) if cuts and isinstance(mesh, Mesh) else None


def _stacked(parts: Sequence[UnstructuredWeights], cut: Cut) -> UnstructuredWeights:
    """One of each device; shorter arrays get zeros at their end, so that all are of one shape."""

    def stack(*arrays: Array) -> Array:
        shape = tuple(map(max, zip(*(array.shape for array in arrays), strict=True)))
        padded = [jnp.pad(a, [(0, n - size) for size, n in zip(a.shape, shape, strict=True)]) for a in arrays]
        return jax.device_put(jnp.stack(padded), NamedSharding(cut.mesh, PartitionSpec(cut.axis)))

    return jax.tree.map(stack, *parts)
