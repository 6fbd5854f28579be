"""How dense the operands of a function's products are: one run that shows the host where they are zero."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.nnx.transforms.general import split_inputs
from jax.core import eval_jaxpr

from sparsellm.plan import Plan, choose_plan
from sparsellm.sparsify.arguments import function_of, split_static, trace
from sparsellm.sparsify.products import Product, Rule, describe, observed_product
from sparsellm.sparsify.rewrite import rewrite

MASKS = 4  # of a product that is used often (a loop, a batch of matrices) only so many are kept

# Every product of a function, in order, and where its sparse operand was not zero, eight elements of k a byte.
type Observations = dict[Product, list[np.ndarray]]


def observe(
    fn: Callable[..., Any] | nnx.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], rules: Sequence[Rule]
) -> Observations:
    """Runs `fn(*args, **kwargs)` once, products as they are; modules in it do not change."""
    function, bound = function_of(fn)
    seen: Observations = {}

    def record(product: Product, live) -> None:
        masks = seen[product]
        masks.extend(np.packbits(mask, axis=1) for mask in np.asarray(live)[: MASKS - len(masks)])

    def replace(eqn, lhs, rhs, place):
        product = describe(eqn, lhs, rhs, place, rules)
        seen.setdefault(product, [])
        return observed_product(eqn, product, record)

    def run(*pure_args):
        traced = trace(function, pure_args)
        jaxpr, _ = rewrite(traced.jaxpr, traced.facts, replace)
        _, *arrays = split_static(pure_args)
        out = jax.jit(lambda *arrays: eval_jaxpr(jaxpr, jaxpr.consts, *arrays))(*arrays)
        return traced.out_tree.unflatten(out)

    split_inputs(run)(*nnx.clone((*bound, *args, dict(kwargs))))
    jax.effects_barrier()
    return seen


def unpacked(product: Product, masks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The masks of a product: boolean, [m, k] of `Product.shape`."""
    return [np.unpackbits(mask, axis=1, count=product.k).astype(bool) for mask in masks]


def chosen_plans(seen: Observations) -> dict[tuple, Plan]:
    """The best plan at each place, by what was seen there."""
    return {
        product.place: most_chosen(product, unpacked(product, masks))
        for product, masks in seen.items()
        if product.sparse and masks
    }


def most_chosen(product: Product, masks: Sequence[np.ndarray]) -> Plan:
    """The rule's plan, else the one that most of these masks ask for."""
    if product.plan is not None:
        return product.plan
    votes = Counter(choose_plan(*product.shape, product.dtype, sample=mask) for mask in masks)
    return votes.most_common(1)[0][0]
