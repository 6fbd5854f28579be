"""Pruning a model block by block, each fed with what the blocks before it make of the calibration set once pruned.

A model is anything whose blocks are `model.layers`, called one after the other with the hidden states first. Weights
stay where they are, and no more than one kernel is there twice. On top of them are the hidden states of the calibration
set and, for one block at a time, the sums over its kernels' inputs: `sparsellm.pruning.memory` says how much that is.
"""

import dataclasses
import functools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Int
from safetensors import safe_open
from safetensors.flax import save_file

from sparsellm.checksum import checksum
from sparsellm.pruning.calibrate import add, check_layout, find_kernels, sum_inputs
from sparsellm.pruning.method import Inputs, Method, Needs, check_sparsity, reconstruction_error
from sparsellm.pruning.patterns import NM, Pattern, Unstructured
from sparsellm.text import check_tokens
from sparsellm.unstructured.linear import UnstructuredLinear

type Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """One of a model's blocks, and what comes into it.

    Attributes:
        name: its path, "layers.3".
        module: the block itself.
        kernels: the selected ones by their path in the model.
        stream: its hidden states, for each batch of calibration windows; None without calibration.
        arguments: what it is called with besides, the same for every batch.
    """

    name: str
    module: Any
    kernels: dict[str, nnx.Param]
    stream: list[Array] | None
    arguments: tuple[Any, ...]

    def inputs(self, needs: Needs) -> dict[str, Inputs]:
        """Sums over the inputs of each kernel, by its path in the model, over the calibration set.

        Raises:
            ValueError: there is no calibration set, or an input is a NaN or an infinity.
        """
        if self.stream is None:
            raise ValueError(f"windows must be given, as the inputs' {needs} are needed; got windows=None")
        names = {name.removeprefix(self.name + "."): name for name in self.kernels}
        graphdef, state = nnx.split(self.module)
        sums = (sum_inputs(graphdef, tuple(names), needs, state, (x, *self.arguments)) for x in self.stream)
        totals = functools.reduce(add, sums)
        finite = jax.device_get({name: jnp.isfinite(total.squares).all() for name, total in totals.items()})
        if broken := [names[name] for name, good in finite.items() if not good]:
            raise ValueError(f"inputs must be finite; those of {broken[0]} are not (and of {len(broken) - 1} more)")
        return {names[name]: total.or_ones() for name, total in totals.items()}

    def forward(self) -> list[Array] | None:
        """The hidden states after it, with its weights as they are now."""
        if self.stream is None:
            return None
        graphdef, state = nnx.split(self.module)
        return [_forward(graphdef, state, x, self.arguments) for x in self.stream]


def walk(
    model: Any,
    windows: Int[np.ndarray, "windows length"] | None = None,
    *,
    batch: int = 1,
    select: str = "",
) -> Iterator[Block]:
    """The blocks of a model in order; what one gets is computed by those before, as they are once the walk goes on.

    Args:
        model: the model.
        windows: calibration tokens; None where no inputs are needed.
        batch: windows at once, a divisor of their number.
        select: as for `prune`.

    Raises:
        ValueError: no kernel is selected, `batch` does not divide the windows, or they hold unknown tokens; or
            predictors that look ahead mask every token.
    """
    blocks = {f"layers.{i}": block for i, block in enumerate(model.layers)}
    kernels = {name: find_kernels(block, name, select) for name, block in blocks.items()}
    if not any(kernels.values()):
        known = [path for name, block in blocks.items() for path in find_kernels(block, name, "")]
        raise ValueError(f"select must be found in the path of some kernel ({', '.join(known)}); got select={select!r}")
    stream, arguments = None, ()
    if windows is not None:
        if not len(windows) or batch < 1 or len(windows) % batch:
            raise ValueError(f"batch must divide the number of windows; got batch={batch}, {len(windows)} windows")
        check_tokens(windows, model)
        _check_predictors(model)
        graphdef, state = nnx.split(model)
        calls = (first_call(graphdef, state, jnp.asarray(part)) for part in np.split(windows, len(windows) // batch))
        first, *arguments = next(calls)
        stream = [first, *(call[0] for call in calls)]
    for name, module in blocks.items():
        block = Block(name=name, module=module, kernels=kernels[name], stream=stream, arguments=tuple(arguments))
        yield block
        stream = block.forward()


def prune(
    model: Any,
    method: Method,
    *,
    pattern: Pattern = Unstructured(),  # noqa: B008 - frozen
    sparsity: float | Mapping[str, float] | None = None,
    windows: Int[np.ndarray, "windows length"] | None = None,
    batch: int = 1,
    select: str = "",
    errors: bool = False,
    folder: str | Path | None = None,
    report: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Prunes a model in place, block by block. What is pruned is zero: the weights are their own mask.

    Example:
        prune(model, SparseGPT(), pattern=NM(2, 4), windows=windows)
        prune(model, WANDA, sparsity=owl_sparsities(model, windows, 0.7), windows=windows)
        prune(model, WANDA, pattern=NM(4, 8), sparsity=owl_sparsities(model, windows, 0.5), windows=windows)
        prune(model, MAGNITUDE, sparsity=global_sparsities(model, 0.5))

    Args:
        model: an OPT, a Mixtral, or anything whose blocks are `model.layers`, each called with the hidden states first
            and returning them, or a tuple that starts with them.
        method: how.
        pattern: where zeros may lie.
        sparsity: share of zeros in each kernel, or of zero blocks, less than 1; by the kernels' paths if they differ (a
            kernel that is not there is left alone, one may lose all). None for n:m, which says so itself; by path,
            each kernel gets an n of its own, and n:m says what they are on average (`NM.mixed`).
        windows: calibration tokens, whole windows without padding; None for a method that needs no inputs.
        batch: windows at once, a divisor of their number.
        select: a regular expression that is found in the paths of the kernels to prune, as in r"fc[12]"; "" for all
            linear layers and experts of the blocks. Embeddings, heads and routers are never pruned.
        errors: whether to report the error of each kernel's output on the calibration set, which needs X^T X of it.
        folder: where to leave each block once it is pruned, so that the same call, for the same model as it was before,
            goes on after a kill; None: nowhere.
        report: called with the row of every kernel.

    Returns:
        For each kernel its `layer` (path), the `sparsity` it has now, and with `errors` its relative `error`: the mean
        over experts.

    Raises:
        ValueError: arguments do not fit together; raised before anything is pruned. Or a kernel's inputs are not
            finite, or its weights would not be; what comes before it is pruned then.
    """
    sparsities = _sparsities(model, method, pattern, sparsity, windows, errors, select)
    needs: Needs = "gram" if errors else method.needs
    batch = int(batch)
    run: Row = {"method": repr(method), "pattern": str(pattern), "sparsities": sparsities, "errors": errors}
    if folder is not None:
        tokens = None if windows is None else [*windows.shape, zlib.crc32(np.ascontiguousarray(windows))]
        run |= {"model": checksum(nnx.state(model, nnx.Param)), "windows": tokens, "batch": batch}
    rows = []
    for block in walk(model, windows, batch=batch, select=select):
        path = None if folder is None else Path(folder) / f"{block.name}.safetensors"
        kernels = {name: kernel for name, kernel in block.kernels.items() if name in sparsities}
        if path is not None and path.exists():
            new = _load(path, kernels, run)
        else:
            new = []
            inputs = block.inputs(needs) if kernels and needs != "nothing" else {}
            for name, kernel in kernels.items():
                target = jnp.float32(sparsities[name])
                # Its inputs' sums are freed then, and so is what the kernel was: nothing else holds them.
                pruned, error = prune_kernel(method, pattern, errors, kernel[...], inputs.pop(name, None), target)
                zeros, finite = jax.device_get(_zeros_and_finite(pruned))
                if not finite:
                    why = "its own are not all finite, or the method has no answer for its inputs"
                    raise ValueError(f"weights must be finite, those of {name} pruned by {method} are not: {why}")
                kernel[...] = pruned
                new.append({"layer": name, "sparsity": float(zeros) / kernel.size})
                new[-1] |= {"error": float(error)} if errors else {}
            if path is not None:
                _save(path, kernels, run, new)
        for row in new:
            rows.append(row)
            if report:
                report(row)
    return rows


# Without autotuning: to try out float32 products of this size takes seconds, and each is needed once a kernel.
@functools.partial(jax.jit, static_argnums=(0, 1, 2), compiler_options={"xla_gpu_autotune_level": 0})
def prune_kernel(
    method: Method, pattern: Pattern, errors: bool, kernel: Array, inputs: Inputs | None, sparsity: Array
) -> tuple[Array, Array]:
    """A kernel [in, out], or one an expert [experts, in, out], pruned; and the relative error of its output."""

    def one(arguments):
        kernel, inputs = arguments
        wide = kernel.astype(jnp.float32)
        pruned = method(wide, inputs, pattern, sparsity)
        error = reconstruction_error(wide, pruned, inputs.gram) if errors else jnp.float32(0)
        return pruned.astype(kernel.dtype), error

    if kernel.ndim == 2:
        return one((kernel, inputs))
    pruned, error = lax.map(one, (kernel, inputs))  # one expert's work space at a time
    return pruned, error.mean()


@jax.jit
def _zeros_and_finite(kernel: Array) -> tuple[Array, Array]:
    return jnp.sum(kernel == 0, dtype=jnp.int32), jnp.isfinite(kernel).all()


@functools.partial(jax.jit, static_argnums=0)
def _forward(graphdef: nnx.GraphDef, state: nnx.State, x: Array, arguments: tuple[Any, ...]) -> Array:
    out = nnx.merge(graphdef, state)(x, *arguments)
    return out[0] if isinstance(out, tuple) else out


class _FirstCall(Exception):
    """Carries the arguments of the first block's call out of the model."""


class _Catch(nnx.Module):
    def __call__(self, *arguments):
        raise _FirstCall(arguments)


@functools.partial(jax.jit, static_argnums=0)
def first_call(graphdef: nnx.GraphDef, state: nnx.State, tokens: Int[Array, "batch length"]) -> tuple[Any, ...]:
    """What the first block is called with."""
    model = nnx.merge(graphdef, state)
    model.layers = nnx.List([_Catch()])
    try:
        model(tokens)
    except _FirstCall as call:
        return call.args[0]
    raise ValueError("a model must call its layers; got one that did not")


def _check_predictors(model: Any) -> None:
    """Raises ValueError where a block reads what no call of it alone has: what came into the block before."""
    for path, module in nnx.iter_modules(model):
        predictor, prediction = getattr(module, "predictor", None), getattr(module, "prediction", None)
        if prediction == "mask_everywhere" and getattr(predictor, "look_ahead", False):
            rule = "a model is calibrated without predictors that look ahead and mask everywhere"
            raise ValueError(f"{rule}; got one in {'.'.join(map(str, path))}")


def _sparsities(model, method, pattern, sparsity, windows, errors, select) -> dict[str, float]:
    """The sparsity of each kernel to prune, by its path; raises ValueError for what cannot be."""
    if not callable(getattr(method, "check", None)):
        raise ValueError(f"method must be a pruning method, such as METHODS['wanda']; got {method!r}")
    method.check(pattern)
    check_layout(model)
    check_uncompressed(model, select)
    if windows is None and (errors or method.needs != "nothing"):
        raise ValueError(f"windows must be given: errors={errors}, and the method needs {method.needs} of the inputs")
    kernels = {name: kernel for block in walk(model, select=select) for name, kernel in block.kernels.items()}
    for kernel in kernels.values():
        pattern.check(kernel.shape)
    if sparsity is None:
        if not isinstance(pattern, NM):
            raise ValueError(f"sparsity must be given for the pattern {pattern}; got None")
        sparsity = pattern.sparsity
    if not isinstance(sparsity, Mapping):
        if isinstance(pattern, NM) and sparsity != pattern.sparsity:
            rule = f"sparsity must be None for {pattern}, which is {pattern.sparsity}, or one for each kernel"
            raise ValueError(f"{rule}; got {sparsity}")
        check_sparsity(sparsity)
        sparsity = dict.fromkeys(kernels, sparsity)
    sparsity = {name: float(value) for name, value in sparsity.items()}
    if unknown := sparsity.keys() - kernels.keys():
        raise ValueError(f"sparsity must name selected kernels; {', '.join(sorted(unknown))} are none")
    for name, value in sparsity.items():
        if not 0 <= value <= 1:
            raise ValueError(f"sparsity must be 0 to 1; got {value} for {name}")
    if isinstance(pattern, NM):
        return pattern.mixed(sparsity, {name: kernels[name].size for name in sparsity})
    return sparsity


def check_uncompressed(model: nnx.Module, select: str = "") -> None:
    """Raises ValueError where a selected layer (see `find_kernels`) is compressed, whose zeros are no longer there."""
    for path, module in nnx.iter_modules(model):
        name = ".".join(map(str, path))
        if isinstance(module, UnstructuredLinear) and re.search(select, f"{name}.kernel"):
            raise ValueError(f"a model is pruned before it is compressed; got {name}, which is compressed")


def _save(path: Path, kernels: dict[str, nnx.Param], run: Row, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    metadata = {"run": json.dumps(run), "rows": json.dumps(rows)}
    save_file({name: kernel[...] for name, kernel in kernels.items()}, partial, metadata=metadata)
    partial.replace(path)


def _load(path: Path, kernels: dict[str, nnx.Param], run: Row) -> list[Row]:
    """Puts what `_save` wrote into the kernels; returns their rows."""
    with safe_open(path, framework="flax") as file:
        metadata = file.metadata() or {}
        if metadata.get("run") != json.dumps(run):
            raise ValueError(f"folder must be of the same pruning; {path} is of {metadata.get('run')}")
        for name, kernel in kernels.items():
            kernel[...] = file.get_tensor(name)
        return json.loads(metadata["rows"])
