"""Parameters over several devices: each is cut as it is made, so that no device ever holds the whole model.

A model names the axes of its parameters (`out_sharding=("embed", "ffn")` on an `nnx.Param`) and knows nothing of
meshes. `Rules` say which mesh axis each name is cut along; what they leave out is kept whole on every device.

XLA cuts the computation likewise, all but Pallas kernels, for which it would gather the weights on every device. Where
a mesh is set (`with jax.set_mesh(mesh): model(tokens)`; `generate` and `serve` do it by themselves), models run these
kernels under `shard_map` instead, each device on its own part: see `sum_over_shards`.

On several hosts, each runs the same program: `jax.distributed.initialize()` first, then a mesh over `jax.devices()`,
which are those of all hosts. Each host reads its own shards of a checkpoint, and what a program returns to Python (the
tokens of a text, a loss) must be whole on every device, as it is here.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from flax.core.spmd import get_logical_axis_rules
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array

from sparsellm.memory import check_parameters

type Rules = Mapping[str, str | tuple[str, ...] | None]

# Source: Megatron-LM (Shoeybi et al., 2019), section 3: columns of the first product, rows of the second.
TENSOR_PARALLEL: Rules = {"vocab": "model", "heads": "model", "ffn": "model"}
EXPERT_PARALLEL: Rules = {"expert": "model"}  # whole experts on each device


def sharded(*axes: str) -> dict[str, Any]:
    """Metadata of a parameter with these axes: inside `create_model` it is cut as it is made."""
    return {"out_sharding": axes, "eager_sharding": bool(get_logical_axis_rules())}


def parameter_sharding(variable: nnx.Variable, mesh: Mesh | None, rules: Rules = TENSOR_PARALLEL) -> Sharding:
    """Where one parameter lives: cut over `mesh` by `rules`, or on the default device if there is no mesh.

    Raises:
        ValueError: a mesh axis that `rules` name is not one of the mesh's, or does not divide the parameter.
    """
    if mesh is None:
        return SingleDeviceSharding(jax.devices()[0])
    axes = tuple(rules.get(name) for name in variable.get_metadata().get("out_sharding", ()))
    for size, axis in zip(variable.shape, axes, strict=False):
        for name in (axis,) if isinstance(axis, str) else axis or ():
            if name not in mesh.shape:
                raise ValueError(f"a rule must name an axis of the mesh; got {name!r}, the mesh has {mesh.axis_names}")
            if size % mesh.shape[name]:
                raise ValueError(
                    f"mesh axis {name!r} must divide the dimension it cuts; got {mesh.shape[name]} devices for a "
                    f"dimension of {size} (shape {variable.shape}): leave its name out of the rules"
                )
    return NamedSharding(mesh, PartitionSpec(*axes))


def abstract_model(
    make: Callable[[], nnx.Module], mesh: Mesh | None = None, rules: Rules = TENSOR_PARALLEL
) -> tuple[nnx.GraphDef, Any]:
    """Structure, shapes, dtypes and shardings of a model, without allocating it.

    Args:
        make: builds the model, e.g. `lambda: OPT(config, rngs=nnx.Rngs(0))`.
        mesh: the devices; None for the default one.
        rules: mesh axis for each axis name.

    Returns:
        What `nnx.split` returns, with a `jax.ShapeDtypeStruct` in place of each array.
    """
    if mesh is not None and any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(
            f"the axes of the mesh must be Auto; got {mesh.axis_types}: "
            "jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,) * dimensions)"
        )
    graphdef, state = nnx.split(nnx.eval_shape(make))

    def place(variable: nnx.Variable) -> nnx.Variable:
        sharding = parameter_sharding(variable, mesh, rules)
        return variable.replace(jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=sharding))

    return graphdef, jax.tree.map(place, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def create_model[M: nnx.Module](make: Callable[[], M], mesh: Mesh | None = None, rules: Rules = TENSOR_PARALLEL) -> M:
    """Initialises a model straight into its sharding, parameter by parameter; the values do not depend on the mesh.

    One jitted program for all parameters would not need to hold even one of them whole, but a GPU takes minutes to
    compile it: every parameter is a kernel of its own there, while one after the other they share a few.

    Example:
        mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
        model = create_model(lambda: OPT(config, rngs=nnx.Rngs(0)), mesh)

    Args:
        make: builds the model.
        mesh: the devices; None for the default one.
        rules: mesh axis for each axis name.

    Raises:
        ValueError: the rules do not fit the mesh or the model, or the parameters the devices; raised before anything is
            allocated.
    """
    _, abstract = abstract_model(make, mesh, rules)
    check_parameters(abstract)
    if mesh is None:
        return make()
    variables = jax.tree.leaves(abstract, is_leaf=lambda x: isinstance(x, nnx.Variable))
    names = {name for variable in variables for name in variable.get_metadata().get("out_sharding", ())}
    with jax.set_mesh(mesh), nnx.logical_axis_rules([(name, rules.get(name)) for name in names]):
        return make()


def mesh_of(state: Any) -> Mesh | None:
    """The mesh that arrays are spread over; None if they are not."""
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(state))
    found = (s.mesh for s in shardings if isinstance(s, NamedSharding) and s.mesh.size > 1)
    return next((mesh for mesh in found if isinstance(mesh, Mesh)), None)


def sum_over_shards(
    fn: Callable[..., Array],
    name: str,
    axes: Sequence[int | None],
    *arrays: Array,
    rules: Rules = TENSOR_PARALLEL,
    kernels: bool = True,
) -> Array:
    """fn(*arrays), a sum over an axis of arrays that are cut along it: each device sums up its part.

    Where no mesh is set, or the rules do not cut this axis, or the mesh does not divide it, it is `fn` of the whole
    arrays. (A model made by other rules than these, whole along the axis, still has each device sum up a part.)

    Args:
        fn: gives, of the parts, the part of the sum.
        name: of the axis: "ffn".
        axes: which dimension of each array it is; None for an array that every device reads whole.
        *arrays: what `fn` takes.
        rules: mesh axis for each axis name.
        kernels: whether `fn` calls Pallas kernels, which XLA cannot cut along other axes of the mesh.
    """
    mesh, axis = jax.sharding.get_abstract_mesh(), rules.get(name)
    if not isinstance(axis, str) or axis not in mesh.axis_names or mesh.shape[axis] == 1:
        return fn(*arrays)
    if any(i is not None and array.shape[i] % mesh.shape[axis] for i, array in zip(axes, arrays, strict=True)):
        return fn(*arrays)
    specs = tuple(PartitionSpec() if i is None else PartitionSpec(*[None] * i, axis) for i in axes)
    mapped = jax.shard_map(
        lambda *parts: lax.psum(fn(*parts), axis),
        mesh=mesh,
        in_specs=specs,
        out_specs=PartitionSpec(),
        axis_names=set(mesh.axis_names) if kernels else {axis},
    )
    return mapped(*arrays)
