"""Which values are rich in zeros by construction: what is known of each value of a jaxpr, equation by equation.

Zeros come from where code writes them: max(x, 0) and the other clamps at zero, select with a zero branch (masks,
dropout, a ReLU's own gradient), and a boolean turned into a number (0/1 masks, one-hot). They survive what maps zero to
zero (a product with anything, neg, abs, sqrt, tanh, casts, ...) and what only moves values (reshape, transpose, slice,
gather, ...). They end elsewhere. A sum of two zero-rich values is zero only where both are, so it ends there as well.

Nothing here decides what is computed, only where looking for zeros may pay: `sparse_dot` is exact for every pattern.
Its gradient is another matter: where zeros are found in values, what is skipped gets none. That is right behind a ReLU,
whose own gradient is zero there, and wrong for masked weights that start at zero. So a fact says whether a value's
zeros are `dead`: whether the function would have no use for their gradient.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import JaxprEqn

LIBRARIES = tuple(str(Path(str(package.__file__)).parent) for package in (jax, flax))

MOVES = {
    *("reshape", "transpose", "broadcast_in_dim", "slice", "squeeze", "dynamic_slice", "rev", "copy", "copy_p"),
    *("split", "optimization_barrier", "sharding_constraint", "device_put", "stop_gradient", "name", "pvary"),
    *("convert_element_type", "reduce_precision"),
}
ZERO_TO_ZERO = {
    *("neg", "abs", "sign", "sqrt", "cbrt", "square", "sin", "tan", "asin", "atan", "sinh", "tanh", "asinh", "atanh"),
    *("erf", "expm1", "log1p", "floor", "ceil", "round", "div", "gather"),
}
ELEMENT_BY_ELEMENT = {"optimization_barrier", "device_put"}  # as many results as operands, in order


@dataclasses.dataclass(frozen=True)
class Fact:
    """What is known of a value before it is computed.

    Attributes:
        zeros: whether it is rich in zeros by construction.
        dead: whether its cotangent is of no consequence wherever it is zero: so behind jax.nn.relu, and for masks and
            numbers, which have no gradient.
        constant: the number that every element is, where that is known.
        origin: name of the argument that it is, moved or cast at most ("layers.0.fc2.kernel").
        made_by: the equation that made its zeros, or the value itself; None for an argument.
        called_at: the line that calls the body which holds `made_by`, where that is a library's (jax.nn.relu's).
    """

    zeros: bool = False
    dead: bool = False
    constant: float | None = None
    origin: str | None = None
    made_by: JaxprEqn | None = dataclasses.field(default=None, compare=False)
    called_at: str = dataclasses.field(default="", compare=False)

    def __str__(self) -> str:
        if self.made_by is None:
            return f"argument {self.origin}" if self.origin else "a constant"
        name = self.made_by.primitive.name
        return f"{_ZERO_SOURCES.get(name, name) if self.zeros else name} at {source(self.made_by) or self.called_at}"


_ZERO_SOURCES = {"max": "max(x, 0)", "min": "min(x, 0)", "clamp": "clip at 0", "select_n": "where(..., 0)"}
_ZERO_SOURCES |= {"convert_element_type": "0/1 mask"}


def constant_fact(value: Any) -> Fact:
    """The fact of a literal, or of an array that a jaxpr closes over."""
    concrete = not isinstance(value, Tracer)
    if concrete and np.ndim(value) == 0 and jnp.issubdtype(jnp.result_type(value), jnp.number):
        number = complex(value)
        return Fact(zeros=number == 0, dead=True, constant=number.real if number.imag == 0 else None)
    return Fact()


def join(one: Fact, other: Fact) -> Fact:
    """What holds of a value that is either of two."""
    one, other = (one, other) if other.zeros or not one.zeros else (other, one)  # the one that says why not
    return dataclasses.replace(
        one if one.made_by is not None else other,
        zeros=one.zeros and other.zeros,
        dead=one.dead and other.dead,
        constant=one.constant if one.constant == other.constant else None,
        origin=one.origin if one.origin == other.origin else None,
    )


UNDERFLOWING = {"mul", "div", "integer_pow", "pow", "square"}  # in float16, below 6e-8


def propagate(eqn: JaxprEqn, facts: Sequence[Fact], called_at: str = "") -> list[Fact]:
    """The facts of an equation's results from those of its operands; `called_at` is the line that calls its body."""
    name = eqn.primitive.name
    if name in ELEMENT_BY_ELEMENT:
        return list(facts)
    rule = _RULES.get(name) or (_first_operand if name in ZERO_TO_ZERO else None)
    fact = (_moved if name in MOVES else rule or _nothing)(eqn, facts) or Fact(made_by=eqn)
    if fact.dead and _underflows(eqn, facts):
        fact = dataclasses.replace(fact, dead=False)
    if fact.made_by is eqn:
        fact = dataclasses.replace(fact, called_at=called_at)
    return [fact] * len(eqn.outvars)


def source(eqn: JaxprEqn) -> str:
    """The line of code, outside jax and flax, that an equation comes from, "model.py:12 (MLP.__call__)", if any."""
    traceback = eqn.source_info.traceback
    frames = traceback.frames if traceback else []
    frame = next((frame for frame in frames if not frame.file_name.startswith(LIBRARIES)), None)
    return f"{Path(frame.file_name).name}:{frame.line_num} ({frame.function_name})" if frame else ""


def _nothing(eqn: JaxprEqn, facts: Sequence[Fact]) -> None:
    del eqn, facts


def _makes_mask(eqn: JaxprEqn) -> bool:
    return eqn.primitive.name == "convert_element_type" and eqn.invars[0].aval.dtype == np.bool_  # pyright: ignore


def _moved(eqn: JaxprEqn, facts: Sequence[Fact]) -> Fact:
    if _makes_mask(eqn):
        return Fact(zeros=True, dead=True, made_by=eqn)
    before, after = (x.aval.dtype for x in (eqn.invars[0], eqn.outvars[0]))  # pyright: ignore
    if jnp.issubdtype(before, jnp.floating) and jnp.issubdtype(after, jnp.floating):
        exponent_bits = eqn.params.get("exponent_bits", jnp.finfo(after).nexp)
        if exponent_bits < jnp.finfo(before).nexp:  # small numbers become zeros that want their gradient
            return dataclasses.replace(facts[0], dead=False)
    return facts[0]


def _underflows(eqn: JaxprEqn, facts: Sequence[Fact]) -> bool:
    """Whether an operation on float16 may turn small numbers into zeros; a factor that is a 0/1 mask does not."""
    if eqn.primitive.name not in UNDERFLOWING or eqn.outvars[0].aval.dtype != jnp.float16:  # pyright: ignore
        return False
    return not any(fact.made_by is not None and _makes_mask(fact.made_by) for fact in facts)


def _kept(fact: Fact, *with_it: Fact) -> Fact | None:
    """Zeros that survive an operation on the values, and stay dead with those of other operands that are."""
    dead = all(one.dead for one in (fact, *with_it))
    return dataclasses.replace(fact, dead=dead, constant=None, origin=None) if fact.zeros else None


def _first_operand(eqn: JaxprEqn, facts: Sequence[Fact]) -> Fact | None:
    del eqn
    return _kept(facts[0])


def _mul(eqn: JaxprEqn, facts: Sequence[Fact]) -> Fact | None:
    del eqn
    rich, other = facts if facts[0].zeros else reversed(facts)
    fact = _kept(rich, other)  # a zero of `other`, like a gate that starts at 0, wants its gradient
    if fact and rich.made_by is not None and _makes_mask(rich.made_by):
        return dataclasses.replace(fact, origin=other.origin)  # masked weights are still those weights
    return fact


def _power(eqn: JaxprEqn, facts: Sequence[Fact]) -> Fact | None:
    exponent = eqn.params["y"] if eqn.primitive.name == "integer_pow" else facts[1].constant
    return _kept(facts[0]) if exponent is not None and exponent > 0 else None


def _clamp_at(low: float | None, high: float | None, x: Fact, eqn: JaxprEqn) -> Fact | None:
    """x held between two numbers (None: not known): zeros are made where one is 0, and kept where 0 lies between."""
    if low == 0 or high == 0:
        return Fact(zeros=True, made_by=eqn)
    return _kept(x) if low is not None and high is not None and low < 0 < high else None


def _extremum(low_or_high: Callable[[float | None], tuple[float | None, float | None]]):
    def rule(eqn: JaxprEqn, facts: Sequence[Fact]) -> Fact | None:
        x, bound = facts if facts[1].constant is not None else reversed(facts)
        return _clamp_at(*low_or_high(bound.constant), x, eqn)

    return rule


def _clamp(eqn: JaxprEqn, facts: Sequence[Fact]) -> Fact | None:
    low, x, high = facts
    return _clamp_at(low.constant, high.constant, x, eqn)


def _select(eqn: JaxprEqn, facts: Sequence[Fact]) -> Fact | None:
    cases = facts[1:]
    values = [fact for fact in cases if fact.constant is None]
    if all(fact.zeros for fact in cases):
        return _kept(*(values or cases))
    if all(fact.constant != 0 for fact in cases):
        return None
    return Fact(zeros=True, origin=values[0].origin if len(values) == 1 else None, made_by=eqn)


def _all_operands(eqn: JaxprEqn, facts: Sequence[Fact]) -> Fact | None:
    """Values side by side."""
    values = facts[:2] if eqn.primitive.name == "dynamic_update_slice" else facts
    return _kept(*values) if all(fact.zeros for fact in values) else None


_RULES: dict[str, Callable[[JaxprEqn, Sequence[Fact]], Fact | None]] = {
    "mul": _mul,
    "integer_pow": _power,
    "pow": _power,
    "max": _extremum(lambda bound: (bound, math.inf)),
    "min": _extremum(lambda bound: (-math.inf, bound)),
    "clamp": _clamp,
    "select_n": _select,
    "concatenate": _all_operands,
    "pad": _all_operands,
    "dynamic_update_slice": _all_operands,
}
