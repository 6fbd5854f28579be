"""The arguments of a function: arrays, which are traced and have names, and all else, which is static."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from flax.nnx.transforms.general import merge_inputs
from jax.extend.core import Jaxpr

from sparsellm.sparsify.zeros import Fact

_ARRAY = object()  # stands for an array among static leaves


class Traced(NamedTuple):
    """A function of arrays as a jaxpr.

    Attributes:
        jaxpr: its results are those of `merge_inputs`: modules among the arguments, then what the function returns.
        facts: what is known of its inputs.
        out_tree: the structure of its results.
        changes_modules: whether any module among the arguments is another afterwards.
    """

    jaxpr: Jaxpr
    facts: list[Fact]
    out_tree: Any
    changes_modules: bool


def function_of(fn: Callable[..., Any] | nnx.Module) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A plain function and its first arguments: the module where `fn` is one or a method of one.

    Raises:
        TypeError: it cannot be called.
    """
    if not callable(fn):
        raise TypeError(f"fn must be a function or a module with __call__; got {type(fn).__name__}")
    if isinstance(fn, nnx.Module):
        return type(fn).__call__, (fn,)  # pyright: ignore[reportAttributeAccessIssue]
    if inspect.ismethod(fn) and isinstance(fn.__self__, nnx.Module):
        return fn.__func__, (fn.__self__,)
    return fn, ()


def split_static(args: Any) -> tuple[Any, ...]:
    """What is static of a pytree, hashable, followed by its arrays."""
    leaves, treedef = jax.tree.flatten(args)
    static = tuple(_ARRAY if _is_array(leaf) else _distinct(leaf) for leaf in leaves)
    return (treedef, static), *filter(_is_array, leaves)


def join_static(static: Any, arrays: Sequence[Any]) -> Any:
    """The pytree that `split_static` took apart."""
    treedef, leaves = static
    remaining = iter(arrays)
    return treedef.unflatten([next(remaining) if leaf is _ARRAY else leaf[0] for leaf in leaves])


def _distinct(leaf: Any) -> tuple[Any, ...]:
    """A leaf, apart from those that are equal to it and yet not the same argument: True, 1 and 1.0; 0.0 and -0.0."""
    return leaf, type(leaf), repr(leaf) if isinstance(leaf, float | complex) else None


def trace(function: Callable[..., Any], pure_args: tuple[Any, ...]) -> Traced:
    """A function's jaxpr, over the arrays among its arguments.

    Args:
        function: any.
        pure_args: its positional arguments, then a dict of the others, as `split_inputs` gives them: modules taken
            apart.
    """
    static, *arrays = split_static(pure_args)
    pure_function = merge_inputs(lambda *args: function(*args[:-1], **args[-1]))

    def of_arrays(*arrays):
        return pure_function(*join_static(static, arrays))

    jaxpr, out = jax.make_jaxpr(of_arrays, return_shape=True)(*arrays)
    names = _parameter_names(function, len(pure_args) - 1)
    paths = [path for path, leaf in jax.tree.leaves_with_path(pure_args) if _is_array(leaf)]
    facts = [Fact(origin=_name(path, names)) for path in paths]
    changes = _changes_modules(jaxpr, join_static(static, jaxpr.invars), *out)
    return Traced(jaxpr, facts, jax.tree.structure(out), changes)


def _changes_modules(jaxpr: Jaxpr, args_in: Any, args_out: Any, out: Any) -> bool:
    """Whether any comes out with other variables (by the jaxpr's) or attributes than it went in, or is returned."""
    before, after = _modules(args_in), _modules(args_out)
    kept = [x.graphdef for x in before] == [x.graphdef.with_no_outer_index() for x in after]
    same = jax.tree.leaves(before) == jaxpr.outvars[: len(jax.tree.leaves(args_out))]
    return not (kept and same) or bool(_modules(out))


def _modules(tree: Any) -> list[nnx.NodeStates]:
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, nnx.NodeStates))
    return [leaf for leaf in leaves if isinstance(leaf, nnx.NodeStates)]


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def _parameter_names(function: Callable[..., Any], count: int) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # a builtin
        return [str(i) for i in range(count)]
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = next((p.name for p in parameters if p.kind == p.VAR_POSITIONAL), "args")
    return (names + [f"{rest}.{i}" for i in range(count)])[:count]


def _name(path: tuple[Any, ...], names: Sequence[str]) -> str:
    """The name of an argument's leaf: "params.w1", or "layers.0.fc2.kernel" of a module, whatever it is called."""
    parts = [jax.tree_util.keystr((key,), simple=True) for key in path]
    if "states" in parts:  # of nnx.NodeStates: states[0] holds a module's variables, each with its value
        parts = parts[parts.index("states") + 2 :]
        return ".".join(parts[:-1] if parts[-1] == "value" else parts)
    return ".".join([names[path[0].idx], *parts[1:]] if path[0].idx < len(names) else parts[1:])
