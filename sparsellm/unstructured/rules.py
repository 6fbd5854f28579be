"""Which layers of a model are compressed: rules from paths to treatments, and `compress`, which applies them."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from pallas_kernels.unstructured_matmul import UnstructuredWeights
from pallas_kernels.unstructured_matmul.weights import VALUE_DTYPES
from sparsellm.mixture_of_experts import MixtureOfExperts
from sparsellm.pruning.calibrate import check_layout
from sparsellm.unstructured.linear import UnstructuredLinear

# The largest share of non-zeros that was timed (experiments/unstructured_spmm.py). There, for 8 tokens, matrices from
# 21504 x 7168 on are 1.3 to 1.4 times as quick as dense ones, and 7168 x 7168 1.1 times; for 32 tokens 1.2 and 0.96.
BREAK_EVEN = 0.6
# The share of non-zeros below which pairs are quicker: between those timed, pallas_kernels/unstructured_matmul.
PAIRED_BELOW = 0.25

# How [experts, in, out] become weights [out, in] of one layer: all experts' neurons are its outputs, or its inputs.
STACKS: dict[str, Callable[[Array], Array]] = {
    "wi": lambda stack: stack.transpose(0, 2, 1).reshape(-1, stack.shape[1]),
    "wo": lambda stack: stack.reshape(-1, stack.shape[2]).T,
}

type Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Treatment:
    """What becomes of a linear layer.

    Attributes:
        max_density: it stays dense where the share of its weights that are not zero is above this; None for
            `BREAK_EVEN`.
        value_dtype: "int8" or "float8_e4m3fn" rounds what is left to 8 bits, with a scale for each output: the
            quickest up to two thirds of zeros. None does not round.
        paired: whether they are stored two by two (`UnstructuredWeights`): more bytes, fewer instructions. None stores
            so what the kernel is quicker for: in bfloat16 and float16, which it takes, values of 8 bits, and those of
            which a share below `PAIRED_BELOW` is not zero. False with 8 bits takes the least memory, but more time than
            a dense product.
    """

    max_density: float | None = None
    value_dtype: str | None = None
    paired: bool | None = None

    def __post_init__(self):
        if self.value_dtype not in (None, *VALUE_DTYPES):
            raise ValueError(f"value_dtype must be None or one of {', '.join(VALUE_DTYPES)}; got {self.value_dtype!r}")
        if not (self.max_density is None or 0 <= self.max_density <= 1):
            raise ValueError(f"max_density must be 0 to 1; got max_density={self.max_density}")

    def compresses(self, density: float) -> bool:
        """Whether a layer of this density is compressed."""
        return density <= (BREAK_EVEN if self.max_density is None else self.max_density)

    def pairs(self, density: float, dtype: jnp.dtype | str) -> bool:
        """Whether weights of this density, which compute in `dtype`, are stored in pairs."""
        if self.paired is not None:
            return self.paired
        return jnp.dtype(dtype).itemsize == 2 and (density < PAIRED_BELOW or self.value_dtype is not None)


type Rules = Sequence[tuple[str, Treatment | None]]

EVERYWHERE: Rules = (("", Treatment()),)


def compress[M: nnx.Module](
    model: M, rules: Rules = EVERYWHERE, *, experts: bool = False, report: Callable[[Row], None] | None = None
) -> M:
    """Compresses the linear layers of a model in place, one after the other; each frees its dense kernel.

    A kernel is freed once nobody else holds it. By the bytes of the format, OPT-30B in bfloat16 at 70% takes 56 GiB
    before and 22 after, and on the way a layer's transpose, its compressed form and 100 MB beside what is there.

    Example:
        prune(model, WANDA, sparsity=0.7, windows=windows)
        compress(model, [("layers.0.", None), ("fc[12]$", Treatment(max_density=0.5))])

    Args:
        model: any. `nnx.Linear` are compressed: those of its blocks, `model.layers`, if it has such. As for `prune`,
            embeddings, heads and routers are left alone.
        rules: for each layer the first rule counts whose regular expression is found in its path, as in "fc1$" for
            layers.0.fc1: how to treat it, or None to leave it alone, as a layer without any rule is.
        experts: whether the stacks of a `MixtureOfExperts` are compressed too, both under the path of the layer. All
            experts are read then, once, for up to 128 tokens together: that pays where most of them are chosen, as by
            8 texts of Mixtral, and not with hundreds of experts. For more tokens both are made dense for the while.
            Among so few, what is not finite in an expert's second stack reaches the tokens of other experts as well.
        report: called for every layer that has a treatment with its `layer` (path), `density`, `bytes` as it is now
            and `dense_bytes`.

    Returns:
        The model.

    Raises:
        ValueError: a rule fits no linear layer, or a layer that other code multiplies by, or a layer is neuron-major,
            or experts are cut over devices; raised before anything is changed. Or a kernel is cut along both
            dimensions.
    """
    for pattern, treatment in rules:
        if not _is_pattern(pattern) or not (treatment is None or isinstance(treatment, Treatment)):
            rule = "a rule must be a regular expression and a treatment or None"
            raise ValueError(f"{rule}; got {pattern!r}, {treatment!r}")
    check_layout(model)
    found = dict(linears(model)) | (dict(mixtures(model)) if experts else {})
    treatments = {name: _treatment(name, rules) for name in found}
    _check_rules(model, rules, treatments)
    del found
    for name, treatment in treatments.items():
        if treatment is None:
            continue
        kernels = _kernels(_get(model, name))
        density = sum(int(_count(kernel)) for kernel in kernels) / max(sum(kernel.size for kernel in kernels), 1)
        dense_bytes = sum(kernel.nbytes for kernel in kernels)
        del kernels
        row = {"layer": name, "density": density, "bytes": dense_bytes, "dense_bytes": dense_bytes}
        if treatment.compresses(density):
            row["bytes"] = _compress_one(model, name, treatment, density)
        if report:
            report(row)
    return model


def _kernels(layer: Any) -> list[Array]:
    """The kernel of a linear layer, or the stacks of a mixture."""
    return [layer.kernel[...]] if isinstance(layer, nnx.Linear) else [getattr(layer, part)[...] for part in STACKS]


def _compress_one(model: Any, name: str, treatment: Treatment, density: float) -> int:
    """Puts what is compressed in place of a layer, or of a mixture's stacks; its bytes."""
    layer = _get(model, name)
    dtype = jnp.dtype(layer.dtype or _kernels(layer)[0].dtype)
    how = treatment.value_dtype, treatment.pairs(density, dtype)
    if isinstance(layer, nnx.Linear):
        compressed = UnstructuredLinear.from_linear(layer, name, *how)
        replace(model, name, compressed)
        return compressed.weights.nbytes
    total = 0
    for part, into_rows in STACKS.items():
        stack = getattr(layer, part)[...].astype(dtype)
        weights = UnstructuredWeights.from_dense(into_rows(stack), *how)
        del stack
        setattr(layer, part, UnstructuredLinear(weights, None))
        total += weights.nbytes
    return total


def linears(model: nnx.Module) -> Iterator[tuple[str, nnx.Linear]]:
    """The layers that can be compressed, by their paths."""
    has_blocks = hasattr(model, "layers")
    for path, module in list(nnx.iter_modules(model)):
        if type(module) is nnx.Linear and (not has_blocks or path[0] == "layers"):
            yield ".".join(map(str, path)), module


def mixtures(model: nnx.Module) -> Iterator[tuple[str, MixtureOfExperts]]:
    """The mixtures of experts whose stacks can be compressed, by their paths."""
    for path, module in list(nnx.iter_modules(model)):
        if isinstance(module, MixtureOfExperts) and isinstance(module.wi, nnx.Variable):
            yield ".".join(map(str, path)), module


def stack_shapes(layer: MixtureOfExperts) -> dict[str, tuple[int, int]]:
    """Of the weights, [out, in], that the stacks of a mixture become."""
    (experts, d_model, hidden), d_ff = layer.wi.shape, layer.wo.shape[1]
    return {"wi": (experts * hidden, d_model), "wo": (d_model, experts * d_ff)}


def _get(model: Any, name: str) -> Any:
    return functools.reduce(getattr, name.split(".") if name else (), model)


def replace(model: Any, name: str, layer: nnx.Module) -> None:
    """Puts a layer in place of the one at this path."""
    parent, _, attribute = name.rpartition(".")
    setattr(_get(model, parent), attribute, layer)


def _treatment(name: str, rules: Rules) -> Treatment | None:
    return next((treatment for pattern, treatment in rules if re.search(pattern, name)), None)


def _is_pattern(text: Any) -> bool:
    try:
        re.compile(text)
    except (re.error, TypeError):
        return False
    return True


def _check_rules(model: Any, rules: Rules, treatments: dict[str, Treatment | None]) -> None:
    stacks = {f"{name}.{part}": layer for name, layer in mixtures(model) for part in STACKS}
    for pattern, treatment in rules:
        if treatment is None or any(re.search(pattern, name) for name in treatments):
            continue
        if named := [name for name in stacks if re.search(pattern, name)]:
            rule = "experts stay dense unless compress(experts=True) asks for them, and go by the path of their layer"
            raise ValueError(f"{rule}; got {pattern!r} for {named[0]}")
        known = ", ".join(treatments) or "none"
        raise ValueError(f"a rule must be found in the path of some linear layer ({known}); got {pattern!r}")
    for name, layer in stacks.items():
        stack = getattr(layer, name.rpartition(".")[2])[...]
        if treatments.get(name.rpartition(".")[0]) and not stack.sharding.is_fully_replicated:
            raise ValueError(f"experts that are cut over devices stay dense; got {stack.sharding} of {name}")
    for name, treatment in treatments.items():
        block = _get(model, name.rpartition(".")[0])
        own_kernels = [key for key in ("sparse_rows", "predictor") if getattr(block, key, None) is not None]
        if treatment is not None and own_kernels:
            rule = f"a block with {own_kernels[0]} multiplies by its kernels itself, and keeps them dense"
            raise ValueError(f"{rule}: make it None, or add a rule as ('fc[12]$', None); got {name}")


@jax.jit
def _count(kernel: Array) -> Array:
    return jnp.count_nonzero(kernel)
