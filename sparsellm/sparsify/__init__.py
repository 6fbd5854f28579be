"""The sparse compiler: a function, or a Flax model unchanged, runs its zero-rich products on sparse kernels.

    fast = sparsify(model)              # or any JAX function: sparsify(loss_fn), sparsify(jax.grad(loss_fn))
    y = fast(x)                         # what model(x) gives, within rounding
    print(explain(model, x))            # which products, why, how dense, how they run (sparsellm/explain.py)

`zeros.py` knows where zeros come from, `rewrite.py` walks the jaxpr, `products.py` turns a `dot_general` into a
`sparse_dot`, `observe.py` looks at how dense the operands are.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from flax.nnx.transforms.general import split_inputs
from jax.core import eval_jaxpr

from sparsellm.plan import DENSE, Plan
from sparsellm.sparsify.arguments import function_of, join_static, split_static, trace
from sparsellm.sparsify.observe import chosen_plans, observe
from sparsellm.sparsify.products import Product, Rule, describe, sparse_product
from sparsellm.sparsify.rewrite import Replace, rewrite

__all__ = ["Product", "Rule", "sparsify"]


def sparsify(
    fn: Callable[..., Any] | nnx.Module, *, rules: Sequence[Rule] = (), sample: tuple[Any, ...] | None = None
) -> Callable[..., Any]:
    """A function that computes what `fn` does, with its zero-rich products on `sparse_dot`.

    Replaced is every product (`dot_general`) of which an operand is rich in zeros by construction: behind a ReLU or
    another clamp at zero, a `where` with a zero branch, dropout, a 0/1 mask. Anything that keeps zeros may lie between;
    `zeros.py` says what does. Products inside jit, scan, while, cond, remat, custom_vjp and custom_jvp are found too;
    `rewrite.py` says what happens to custom rules. `explain` shows what was found and why the rest stays.

    The result is compiled and cached as by `jax.jit`: traced once for each shape and dtype of the arrays among the
    arguments and each value of everything else (numbers and strings are static). New values and new patterns of zeros
    compile nothing. It goes through `jax.grad`, `jax.vmap`, `jax.jit`, `lax.scan` and their NNX counterparts;
    differentiation is reverse-mode where `fn` holds such products. Gradients are those of `fn`: the sparse operand's is
    sparse as well behind jax.nn.relu, and a dense product where its zeros want a gradient too, as masked weights may
    that start at zero (unless a rule says that they are to stay). Modules among the arguments, and state that they
    change (random streams, batch statistics), behave as under `nnx.jit`.

    Args:
        fn: a JAX function, a bound method of a module, or a module, whose `__call__` is meant.
        rules: exceptions, by the place of a product; the first that matches counts.
        sample: arguments of `fn` as typical as can be, arrays concrete. `fn` runs on them once, now, to see how dense
            each product is, and runs each as is best there: another pattern may be slower, never wrong. Modules in
            it stay as they are. Without one, `sparse_dot` chooses.

    Returns:
        A function of the arguments of `fn` (without the module, where `fn` is one or a method).

    Raises:
        TypeError: `fn` cannot be called, or `rules` or `sample` is not what is asked for.

    Source: PIT (SOSP'23), section 3.
    """
    function, bound = function_of(fn)
    if not all(isinstance(rule, Rule) for rule in rules):
        raise TypeError(f"rules must be Rules; got {rules!r}")
    if sample is not None and not isinstance(sample, tuple):
        raise TypeError(f"sample must be a tuple, the arguments of fn; got {type(sample).__name__}")
    plans = {} if sample is None else chosen_plans(observe(fn, sample, {}, rules))
    replace = _replacement(rules, plans)

    @functools.partial(jax.jit, static_argnums=0)
    def run(static, *arrays):
        traced = trace(function, join_static(static, arrays))
        jaxpr, _ = rewrite(traced.jaxpr, traced.facts, replace)
        args_out, out = traced.out_tree.unflatten(eval_jaxpr(jaxpr, jaxpr.consts, *arrays))
        # A module that did not change is not written to: that would not do inside a jax.jit that closes over it.
        return args_out if traced.changes_modules else None, out

    @functools.wraps(function)
    def sparsified(*args, **kwargs):
        return split_inputs(lambda *pure_args: run(*split_static(pure_args)))(*bound, *args, kwargs)

    return sparsified


def _replacement(rules: Sequence[Rule], plans: Mapping[tuple, Plan]) -> Replace:
    """What takes the place of each product: its `sparse_dot`, where one is worth it."""

    def replace(eqn, lhs, rhs, place):
        product = describe(eqn, lhs, rhs, place, rules)
        if product.plan is None and product.density is None:
            product = dataclasses.replace(product, plan=plans.get(product.place))
        return None if product.sparse is None or product.plan == DENSE else sparse_product(eqn, product)

    return replace
