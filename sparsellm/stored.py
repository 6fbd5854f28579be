"""Parameters as files store them: maybe transposed, and maybe in many tensors where the model has one array.

Everything is a matter of blocks: a tensor is a block of a parameter, a device holds a block of it, and what they have
in common is what is read or written.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

type Block = tuple[tuple[int, int], ...]  # from and to along each axis of a parameter


@dataclasses.dataclass(frozen=True)
class Stored[A: (jax.Array, jax.ShapeDtypeStruct)]:
    """A parameter, and the tensors that it is stored in.

    Example:
        w [in, out], stored [out, in]: Stored(w, "proj.weight", transposed=True)
        wi [experts, in, 2 * out], stored as two [out, in] for each expert:
            Stored(wi, [[f"{e}.gate", f"{e}.up"] for e in range(experts)], transposed=True)

    Attributes:
        array: the parameter; to load it, its shape, dtype and sharding.
        names: the tensor's name; or rows of names, one row for each index of the parameter's first axis (an expert),
            where the tensors of a row lie side by side along its last axis, all equally wide.
        transposed: the tensors hold their last two axes the other way round.
        exact: the tensors are of the array's dtype, or not what they should be; else they are cast.
    """

    array: A
    names: str | Sequence[Sequence[str]]
    transposed: bool = False
    exact: bool = False

    def parts(self) -> Iterator["Part"]:
        """The tensors one by one.

        Raises:
            ValueError: the rows of names do not fit the parameter's shape.
        """
        shape = tuple(self.array.shape)
        if isinstance(self.names, str):
            yield Part(self.names, tuple((0, size) for size in shape), self.transposed, stacked=False)
            return
        widths = {len(row) for row in self.names}
        if len(self.names) != shape[0] or not all(width and shape[-1] % width == 0 for width in widths):
            raise ValueError(
                f"names of a parameter of shape {shape} must be {shape[0]} rows, each of a number of tensors that "
                f"divides {shape[-1]}; got {len(self.names)} rows of {', '.join(map(str, sorted(widths)))}"
            )
        for i, row in enumerate(self.names):
            width = shape[-1] // len(row)
            for j, name in enumerate(row):
                middle = tuple((0, size) for size in shape[1:-1])
                yield Part(name, ((i, i + 1), *middle, (j * width, (j + 1) * width)), self.transposed, stacked=True)


class Part(NamedTuple):
    """One tensor of a file.

    Attributes:
        name: in the file.
        block: where it lies in the parameter.
        transposed: it holds the last two axes of the block the other way round.
        stacked: it has no axis for the first of the block, which is one index wide.
    """

    name: str
    block: Block
    transposed: bool
    stacked: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """In the file."""
        return self.in_file(_sizes(self.block))

    def in_file[T](self, axes: tuple[T, ...]) -> tuple[T, ...]:
        """What belongs to each axis of the block, for each axis of the tensor."""
        axes = axes[1:] if self.stacked else axes
        return (*axes[:-2], axes[-1], axes[-2]) if self.transposed else axes

    def to_host(self, array: jax.Array) -> np.ndarray:
        """The tensor, put together from what the devices hold of a parameter."""
        values = np.empty(_sizes(self.block), array.dtype)
        for shard in array.addressable_shards:
            held = _block(shard.index, array.shape)
            common = _common(self.block, held)
            if common is not None and shard.replica_id == 0:
                piece = lax.dynamic_slice(shard.data, _starts(common, held), _sizes(common))
                values[_slices(common, self.block)] = np.asarray(piece)
        values = values[0] if self.stacked else values
        return np.ascontiguousarray(values.swapaxes(-1, -2) if self.transposed else values)


def dtype_code(dtype: Any) -> str:
    """A dtype as safetensors calls it: "BF16", "F32", "I8", "BOOL"."""
    name = jnp.dtype(dtype).name
    for ours, theirs in (("bfloat", "BF"), ("float", "F"), ("uint", "U"), ("int", "I")):
        name = name.replace(ours, theirs)
    return name.upper()


def read_parameter(stored: Stored[jax.ShapeDtypeStruct], tensors: Mapping[str, Any]) -> jax.Array:
    """Reads a parameter tensor by tensor, each device its own block; casts and transposes on the devices.

    Args:
        stored: the parameter, with a sharding.
        tensors: by name; sliced, never read whole where a device needs a part.
    """
    shape, dtype, sharding = stored.array.shape, stored.array.dtype, stored.array.sharding
    devices_by_block: dict[Block, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        devices_by_block.setdefault(_block(index, shape), []).append(device)
    shards: list[jax.Array] = []
    for block, devices in devices_by_block.items():
        copies = [jnp.zeros(_sizes(block), dtype, device=device) for device in devices]
        for part in stored.parts():
            copies = _read_part(part, tensors[part.name], block, copies)
        shards += copies
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _read_part(part: Part, tensor: Any, block: Block, copies: list[jax.Array]) -> list[jax.Array]:
    # A function of its own, so that the host lets go of what it has read before it reads on.
    common = _common(part.block, block)
    if common is None:
        return copies
    values, starts = tensor[part.in_file(_slices(common, part.block))], _starts(common, block)
    return [
        _write(copy, jax.device_put(values, copy.device), starts, part.transposed, part.stacked).block_until_ready()
        for copy in copies
    ]


@partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def _write(shard: jax.Array, values: jax.Array, starts: tuple, transposed: bool, stacked: bool) -> jax.Array:
    values = values.swapaxes(-1, -2) if transposed else values
    values = values[None] if stacked else values
    return lax.dynamic_update_slice(shard, values.astype(shard.dtype), starts)


def _block(index: Any, shape: Sequence[int]) -> Block:
    return tuple(axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True))


def _sizes(block: Block) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in block)


def _starts(block: Block, within: Block) -> tuple[int, ...]:
    return tuple(start - origin for (start, _), (origin, _) in zip(block, within, strict=True))


def _slices(block: Block, within: Block) -> tuple[slice, ...]:
    return tuple(slice(start - origin, stop - origin) for (start, stop), (origin, _) in zip(block, within, strict=True))


def _common(a: Block, b: Block) -> Block | None:
    common = tuple((max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b, strict=True))
    return common if all(start < stop for start, stop in common) else None
