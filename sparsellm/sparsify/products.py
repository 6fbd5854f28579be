"""A product of a jaxpr (`dot_general`) as matrices: what it multiplies, where, and which operand is worth a look."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn
from jaxtyping import Array, Shaped

from sparsellm.plan import DTYPES, Plan
from sparsellm.sparse_dot import sparse_dot
from sparsellm.sparsify.rewrite import Place
from sparsellm.sparsify.zeros import Fact

type Side = Literal["a", "b"]
SIDES: tuple[Side, ...] = ("a", "b")


@dataclasses.dataclass(frozen=True)
class Rule:
    """What to do with the products at some place. Of the rules that match a product, the first one counts.

    Attributes:
        path: regular expression, searched in the product's `path` and in its `source` ("model.py:12 (MLP.__call__)").
        action: "skip" leaves the product alone, "force" replaces it though nothing says that an operand has zeros, and
            a `Plan` is how it runs where it is replaced; with `sparse` it is replaced in any case, as for pruned
            weights (`pruning.Blocks.plan`), of which nothing says that they have zeros. None: as without a rule.
        density: expected share of non-zeros of the sparse operand, 0 to 1; None if not known.
        sparse: the operand to take for sparse: "a" (left) or "b" (right). None: the one that is zero-rich, the left
            one where both are, or neither is and `action` is "force".
        masked: a promise that the sparse operand's zeros are to stay, as those of pruned weights are while training:
            micro-tiles that are all zero get no gradient, and that product skips them too.

    Raises:
        ValueError: an attribute is not one of the above.
    """

    path: str
    action: Literal["skip", "force"] | Plan | None = None
    density: float | None = None
    sparse: Side | None = None
    masked: bool = False

    def __post_init__(self):
        try:
            re.compile(self.path)
        except re.error as error:
            raise ValueError(f"path must be a regular expression; got {self.path!r} ({error})") from None
        if self.action not in ("skip", "force", None) and not isinstance(self.action, Plan):
            raise ValueError(f'action must be "skip", "force", a Plan or None; got action={self.action!r}')
        if isinstance(self.action, Plan) and self.density is not None:
            raise ValueError(f"density must be None where action is a Plan; got {self.density} and {self.action}")
        if self.density is not None and not 0 <= self.density <= 1:
            raise ValueError(f"density must be 0 to 1; got density={self.density}")
        if self.sparse not in ("a", "b", None):
            raise ValueError(f'sparse must be "a", "b" or None; got sparse={self.sparse!r}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """One product of a function: [batch, m, k] @ [batch, k, n]. Equal ones (a line in a loop) are one.

    Attributes:
        path: the named scopes around it, and the argument that its dense operand is, moved or cast at most
            ("layers.0.fc2.kernel" of a module, "params.w2" of a pytree); else of the other operand, if any.
        source: the line of code that it is from.
        batch: how many products of matrices it is.
        m: rows.
        k: what is summed over.
        n: columns.
        dtype: of the operands.
        sparse: the operand to look for zeros in: "a" (left), "b" (right), or None where the product stays as it is.
        why: where the zeros come from, or why it stays.
        dead: whether the gradient of the sparse operand is needed only where it is not zero (`Fact.dead`, or a rule
            says so); else that gradient is a dense product.
        plan: how it runs; None leaves the choice to `sparse_dot`.
        density: the rule's.
    """

    path: str
    source: str
    batch: int
    m: int
    k: int
    n: int
    dtype: str
    sparse: Side | None
    why: str
    dead: bool = False
    plan: Plan | None = None
    density: float | None = None

    @property
    def place(self) -> tuple[str, str, str | None]:
        """Where it is, whatever its size."""
        return self.path, self.source, self.sparse

    @property
    def shape(self) -> tuple[int, int, int]:
        """(m, k, n) as `sparse_dot` sees them: of the transposed problem where the right operand is the sparse one."""
        return (self.n, self.k, self.m) if self.sparse == "b" else (self.m, self.k, self.n)


def describe(eqn: JaxprEqn, lhs: Fact, rhs: Fact, place: Place, rules: Sequence[Rule]) -> Product:
    """What a `dot_general` multiplies, and what the rules make of it."""
    (m, k, n), batch = _sizes(eqn)
    dense, other = (lhs, rhs) if rhs.zeros and not lhs.zeros else (rhs, lhs)
    path = "/".join(filter(None, (place.scope, dense.origin or other.origin)))
    rule = next((rule for rule in rules if re.search(rule.path, path) or re.search(rule.path, place.line)), Rule(""))
    sparse, why = _choose_operand(eqn, lhs, rhs, rule)
    return Product(
        path=path,
        source=place.line,
        batch=math.prod(batch),
        m=m,
        k=k,
        n=n,
        dtype=str(_avals(eqn)[0].dtype),
        sparse=sparse,
        why=why,
        dead=sparse is not None and (rule.masked or {"a": lhs, "b": rhs}[sparse].dead),
        plan=rule.action if isinstance(rule.action, Plan) else None,
        density=rule.density,
    )


def _choose_operand(eqn: JaxprEqn, lhs: Fact, rhs: Fact, rule: Rule) -> tuple[Side | None, str]:
    obstacle = _obstacle(eqn)
    if obstacle or rule.action == "skip":
        return None, obstacle or "a rule skips it"
    facts: dict[Side, Fact] = {"a": lhs, "b": rhs}
    if rule.action == "force" or (isinstance(rule.action, Plan) and rule.sparse):
        side = rule.sparse or ("b" if rhs.zeros and not lhs.zeros else "a")
        return side, str(facts[side]) if facts[side].zeros else "a rule forces it"
    for side in (rule.sparse,) if rule.sparse else SIDES:
        if facts[side].zeros:
            return side, str(facts[side])
    return None, f"not zero by construction: a is {lhs}, b is {rhs}"


def _obstacle(eqn: JaxprEqn) -> str | None:
    """Why `sparse_dot` cannot stand for this product, whatever its operands hold."""
    (lhs, rhs, out), precision = _avals(eqn), eqn.params["precision"]
    if lhs.dtype != rhs.dtype or lhs.dtype.name not in DTYPES:
        return f"dtypes {lhs.dtype} and {rhs.dtype}"
    if out.dtype != lhs.dtype:
        return f"{out.dtype} result of {lhs.dtype} operands"
    if not (precision is None or isinstance(precision, tuple) and isinstance(precision[0], lax.Precision)):
        return f"precision {precision}"
    if eqn.params.get("out_sharding") is not None or any(map(_is_cut, (lhs, rhs, out))):
        return "cut over the explicit axes of a mesh"
    return "empty" if 0 in (*lhs.shape, *rhs.shape) else None


def _is_cut(aval: Any) -> bool:
    return any(axis is not None for axis in aval.sharding.spec)


def _avals(eqn: JaxprEqn) -> tuple[Any, Any, Any]:
    """The types of the operands and of the result."""
    return eqn.invars[0].aval, eqn.invars[1].aval, eqn.outvars[0].aval


def _free_axes(eqn: JaxprEqn) -> tuple[list[int], list[int]]:
    """The axes of the operands that are neither contracted nor batched."""
    (of_lhs, of_rhs), (batch_of_lhs, batch_of_rhs) = eqn.params["dimension_numbers"]
    lhs, rhs, _ = _avals(eqn)
    free_of_lhs = [axis for axis in range(lhs.ndim) if axis not in (*of_lhs, *batch_of_lhs)]
    free_of_rhs = [axis for axis in range(rhs.ndim) if axis not in (*of_rhs, *batch_of_rhs)]
    return free_of_lhs, free_of_rhs


def _sizes(eqn: JaxprEqn) -> tuple[tuple[int, int, int], list[int]]:
    """(m, k, n) and the sizes of the batch axes."""
    (contracting, _), (batched, _) = eqn.params["dimension_numbers"]
    lhs, rhs, _ = _avals(eqn)
    of_lhs, of_rhs = _free_axes(eqn)
    m, k = (math.prod(lhs.shape[axis] for axis in axes) for axes in (of_lhs, contracting))
    return (m, k, math.prod(rhs.shape[axis] for axis in of_rhs)), [lhs.shape[axis] for axis in batched]


def as_matrices(
    eqn: JaxprEqn, lhs: Shaped[Array, "..."], rhs: Shaped[Array, "..."]
) -> tuple[Shaped[Array, "*batch m k"], Shaped[Array, "*batch k n"]]:
    """The operands of a `dot_general` as (stacks of) matrices: free and contracted axes flattened to one each."""
    contracting, batched = eqn.params["dimension_numbers"]
    of_lhs, of_rhs = _free_axes(eqn)
    (m, k, n), batch = _sizes(eqn)
    a = lhs.transpose(*batched[0], *of_lhs, *contracting[0]).reshape(*batch, m, k)
    b = rhs.transpose(*batched[1], *contracting[1], *of_rhs).reshape(*batch, k, n)
    return a, b


def sparse_product(eqn: JaxprEqn, product: Product) -> Callable[[Array, Array], Array]:
    """A function of an equation's operands that computes its result by `sparse_dot`."""
    precision, side = eqn.params["precision"], product.sparse or "a"
    multiply = functools.partial(sparse_dot, sparse=side, plan=product.plan, density=product.density)
    if not product.dead:
        multiply = _with_dense_gradient(multiply, side, precision)

    def sparse_dot_general(lhs, rhs):
        with jax.default_matmul_precision(precision[0].name.lower() if precision else None):
            return multiply(*as_matrices(eqn, lhs, rhs)).reshape(_avals(eqn)[2].shape)

    return sparse_dot_general


def _with_dense_gradient(multiply: Callable[[Array, Array], Array], sparse: Side, precision: Any):
    """`multiply`, whose sparse operand gets a gradient everywhere, at the price of a dense product."""
    dense = functools.partial(jnp.matmul, precision=precision)

    def forward(a, b):
        return multiply(a, b), (a, b)

    def backward(operands, g):
        a, b = operands
        if sparse == "a":
            _, pull_back = jax.vjp(lambda b: multiply(a, b), b)
            return dense(g, b.mT), *pull_back(g)
        _, pull_back = jax.vjp(lambda a: multiply(a, b), a)
        return *pull_back(g), dense(a.mT, g)

    function = jax.custom_vjp(multiply)
    function.defvjp(forward, backward)
    return function


def observed_product(
    eqn: JaxprEqn, product: Product, observe: Callable[[Product, Array], None]
) -> Callable[[Array, Array], Array]:
    """A function that computes an equation's result as it is, and shows the host where its sparse operand is not 0.

    `observe` gets a boolean [batch, m, k] of what `sparse_dot` sees as A: the left operand, or the right transposed.
    """

    def observed_dot_general(lhs, rhs):
        a, b = as_matrices(eqn, lhs, rhs)
        seen = b.mT if product.sparse == "b" else a
        live = seen.astype(bool).reshape(math.prod(seen.shape[:-2]), *seen.shape[-2:])
        jax.debug.callback(lambda live: observe(product, live), live)
        return lax.dot_general_p.bind(lhs, rhs, **eqn.params)

    return observed_dot_general
