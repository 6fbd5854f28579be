"""What the kernels of a block see: the block runs with recorders in place of its products and its experts."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_outer import grouped_outer
from pallas_kernels.routing import Routing
from sparsellm.mixture_of_experts import MixtureOfExperts
from sparsellm.pruning.method import Inputs, Needs


class _RecordedLinear(nnx.Linear):
    def __call__(self, inputs: Array) -> Array:
        self.sow(nnx.Intermediate, "kernel", inputs)
        return super().__call__(inputs)


class _RecordedExperts(MixtureOfExperts):
    def apply_experts(self, x, router):
        """Records what wi reads, then what wo reads: wi's output."""
        tokens, routing = x.reshape(-1, self.d_model).astype(self.dtype), router.routing
        wi = self.wi[...].astype(self.dtype)
        bias = None if self.wi_bias is None else self.wi_bias[...].astype(self.dtype)
        options = {"activation": self.activation, "gated": self.gated, "implementation": self.implementation}
        hidden = grouped_matmul(tokens, wi, routing, bias, gather=True, **options)
        self.sow(nnx.Intermediate, "wi", (tokens, routing, True))
        self.sow(nnx.Intermediate, "wo", (hidden, routing, False))
        return super().apply_experts(x, router)


RECORDED = {nnx.Linear: _RecordedLinear, MixtureOfExperts: _RecordedExperts}
KERNELS = {nnx.Linear: ("kernel",), MixtureOfExperts: ("wi", "wo")}


def check_layout(model: nnx.Module) -> None:
    """Raises ValueError where a layer keeps its kernel as [out, in]: it would be passed over without a word."""
    for path, module in nnx.iter_modules(model):
        if isinstance(getattr(module, "weight", None), nnx.Param) and hasattr(type(module), "kernel"):
            rule = "kernels must be [in, out] here, as of models.opt.with_layout(model, neuron_major=False)"
            raise ValueError(f"{rule}; {'.'.join(map(str, path))} keeps its own neuron-major")


def find_kernels(block: nnx.Module, prefix: str, select: str) -> dict[str, nnx.Param]:
    """The kernels of a block by their path: those of `nnx.Linear` [in, out] and of experts [experts, in, out].

    Routers are left alone.

    Args:
        block: where to look.
        prefix: its own path, "layers.3".
        select: a regular expression that is found in the paths wanted.
    """
    found = {}
    for path, module in nnx.iter_modules(block):
        for kernel in _kernel_names(module):
            name = ".".join(map(str, (prefix, *path, kernel)))
            if re.search(select, name):
                found[name] = getattr(module, kernel)
    return found


def _kernel_names(module: nnx.Module) -> tuple[str, ...]:
    """Of what can be pruned: not of compressed experts."""
    names = KERNELS.get(type(module), ())
    return names if all(isinstance(getattr(module, name), nnx.Variable) for name in names) else ()


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def sum_inputs(
    graphdef: nnx.GraphDef, names: tuple[str, ...], needs: Needs, state: nnx.State, arguments: tuple[Any, ...]
) -> dict[str, Inputs]:
    """What the kernels `names`, by paths within the block, see in one call of it."""
    block = nnx.merge(graphdef, state)
    for _, module in list(nnx.iter_modules(block)):
        if _kernel_names(module):
            module.__class__ = RECORDED[type(module)]  # of a copy that lives for this trace
    _, captured = nnx.capture(block, nnx.Intermediate)(*arguments)
    seen = {".".join(map(str, path)): value for path, value in nnx.to_flat_state(captured)}
    if missing := [name for name in names if name not in seen]:
        raise ValueError(f"a kernel must be applied by its own module to be calibrated; {', '.join(missing)} are not")
    return {name: _sums(seen[name].get_value()[0], needs) for name in names}


@functools.partial(jax.jit, donate_argnums=0)
def add(totals: dict[str, Inputs], new: dict[str, Inputs]) -> dict[str, Inputs]:
    """The sums over both; `totals` are donated."""
    return jax.tree.map(jnp.add, totals, new)


def _sums(recorded: Any, needs: Needs) -> Inputs:
    """Of the inputs of a linear layer, or of all experts."""
    if isinstance(recorded, tuple):
        x, routing, gather = recorded
        return _expert_sums(x, routing, gather, needs)
    x = recorded.reshape(-1, recorded.shape[-1])
    tokens = jnp.float32(x.shape[0])
    if needs == "squares":
        return Inputs(tokens=tokens, squares=jnp.sum(jnp.square(x.astype(jnp.float32)), axis=0))
    contract = (((0,), (0,)), ((), ()))  # products of 16 bits are exact in the float32 they are summed in
    gram = lax.dot_general(x, x, contract, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    return Inputs(tokens=tokens, squares=jnp.diag(gram), gram=gram)


def _expert_sums(x: Float[Array, "rows d_in"], routing: Routing, gather: bool, needs: Needs) -> Inputs:
    """x has a row a token, to be gathered (wi's inputs), or one a slot (wo's)."""
    x, tokens = x.astype(jnp.float32), routing.counts.astype(jnp.float32)
    if needs == "gram":
        gram = grouped_outer(x, x, routing, gather, gather)
        return Inputs(tokens=tokens, squares=jnp.diagonal(gram, axis1=1, axis2=2), gram=gram)
    rows = x[routing.order // routing.top_k] if gather else x
    squares = jax.ops.segment_sum(jnp.square(rows), routing.slot_experts(), len(routing.counts) + 1)[:-1]
    return Inputs(tokens=tokens, squares=squares)
