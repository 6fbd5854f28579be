"""A jaxpr with some of its products replaced: a walk through the equations and the bodies inside them.

Only the equations of the replaced products change. Those around them, scan, remat and the others that hold bodies
included, keep their variables and parameters, so that differentiation, batching and compilation see what they saw. A
body in which nothing is replaced is left untouched, with its custom derivative, its name and its cache.

`jit`, `scan`, `while`, `cond`, `remat`, `custom_vjp` and `custom_jvp` are looked into. Of a custom_vjp the function and
its forward rule are rewritten, the backward rule is kept; of a custom_jvp only the function, which differentiation
replaces by the rule. Other bodies (shard_map, Pallas kernels, linear solves) are left alone: what is to be sparse
under shard_map is made so inside it, `jax.shard_map(sparsify(fn), ...)`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import linear_util
from jax.extend.core import Jaxpr, JaxprEqn, Literal, jaxprs_in_params, primitives

from sparsellm.sparsify.zeros import LIBRARIES, Fact, constant_fact, join, propagate, source


class Place(NamedTuple):
    """Where an equation is: the named scopes around it, and the line of code that it comes from."""

    scope: str = ""
    line: str = ""


TOP = Place()

# (equation, fact of its lhs, of its rhs, where it is) -> what computes it instead, or None.
type Replace = Callable[[JaxprEqn, Fact, Fact, Place], Callable[[jax.Array, jax.Array], jax.Array] | None]

CALLS = {
    primitives.jit_p: "jaxpr",
    primitives.remat_p: "jaxpr",
    primitives.closed_call_p: "call_jaxpr",
    primitives.custom_jvp_call_p: "call_jaxpr",
    primitives.custom_vjp_call_p: "call_jaxpr",
}
RANDOM = "_uniform"  # jax.random.uniform ends with max(minval, x), which is no ReLU


def rewrite(jaxpr: Jaxpr, facts: Sequence[Fact], replace: Replace, place: Place = TOP) -> tuple[Jaxpr, list[Fact]]:
    """Replaces the products of a jaxpr.

    Args:
        jaxpr: what to rewrite.
        facts: what is known of its inputs.
        replace: asked for every `dot_general`.
        place: where the jaxpr is called.

    Returns:
        The new jaxpr (the same object where nothing was replaced) and what is known of its outputs.
    """
    known = dict(zip(jaxpr.constvars, map(constant_fact, jaxpr.consts), strict=True))
    known |= zip(jaxpr.invars, facts, strict=True)

    def fact_of(atom) -> Fact:
        return constant_fact(atom.val) if isinstance(atom, Literal) else known[atom]

    eqns = []
    for eqn in jaxpr.eqns:
        new, out_facts = _rewrite_eqn(eqn, [fact_of(atom) for atom in eqn.invars], replace, place)
        known |= zip(eqn.outvars, out_facts, strict=True)
        eqns.append(new)
    added = [new.effects - old.effects for new, old in zip(eqns, jaxpr.eqns, strict=True) if new is not old]
    new = jaxpr.replace(eqns=eqns, effects=set(jaxpr.effects).union(*added)) if added else jaxpr
    return new, [fact_of(atom) for atom in jaxpr.outvars]


def _rewrite_eqn(eqn: JaxprEqn, facts: list[Fact], replace: Replace, place: Place) -> tuple[JaxprEqn, list[Fact]]:
    if eqn.primitive is not primitives.dot_general_p and not list(jaxprs_in_params(eqn.params)):
        return eqn, propagate(eqn, facts, place.line)
    scope = "/".join(filter(None, (place.scope, str(eqn.source_info.name_stack))))
    place = Place(scope, source(eqn) or place.line)
    if eqn.primitive is primitives.dot_general_p:
        function = replace(eqn, facts[0], facts[1], place)
        return _call(function, eqn) if function else eqn, propagate(eqn, facts, place.line)
    if eqn.primitive in CALLS and eqn.params.get("name") != RANDOM:
        params, out_facts = _in_call(eqn, facts, replace, place)
    elif eqn.primitive is primitives.cond_p:
        params, out_facts = _in_cond(eqn, facts, replace, place)
    elif eqn.primitive is primitives.scan_p:
        params, out_facts = _in_scan(eqn, facts, replace, place)
    elif eqn.primitive is primitives.while_p:
        params, out_facts = _in_while(eqn, facts, replace, place)
    else:
        return eqn, propagate(eqn, facts, place.line)
    bodies = {body for name in params for body in _bodies(params[name])}
    if bodies <= {body for value in eqn.params.values() for body in _bodies(value)}:
        return eqn, out_facts
    effects = set(eqn.effects).union(*(body.effects for body in bodies))
    return eqn.replace(params=eqn.params | params, effects=effects), out_facts


def _bodies(value: Any) -> list[Jaxpr]:
    return list(jaxprs_in_params({"value": value}))


def _call(function: Callable[..., jax.Array], eqn: JaxprEqn) -> JaxprEqn:
    """An equation that calls a function with an equation's operands, in its place."""
    with eqn.ctx.manager:  # mesh, compute type, ...
        (call,) = jax.make_jaxpr(jax.jit(function))(*(atom.aval for atom in eqn.invars)).eqns
    return eqn.replace(primitive=call.primitive, params=call.params, effects=call.effects)


def _in_call(eqn: JaxprEqn, facts: list[Fact], replace: Replace, place: Place) -> tuple[dict[str, Any], list[Fact]]:
    body = CALLS[eqn.primitive]
    jaxpr, out_facts = rewrite(eqn.params[body], facts, replace, place)
    params: dict[str, Any] = {body: jaxpr}
    if eqn.primitive is primitives.custom_vjp_call_p and jaxpr is not eqn.params[body]:
        params["fwd_jaxpr_thunk"] = _forward_rule(eqn, facts, replace, place)
    if eqn.primitive in (primitives.custom_jvp_call_p, primitives.custom_vjp_call_p):
        # A gradient of its own may want what the body's would not: all but jax.nn.relu's, which is 0 where the ReLU is.
        out_facts = [dataclasses.replace(fact, dead=_is_relu(eqn.params[body])) for fact in out_facts]
    return params, out_facts


def _is_relu(jaxpr: Jaxpr) -> bool:
    name, _, file = jaxpr.debug_info.func_src_info.partition(" at ")
    return name == "relu" and file.startswith(LIBRARIES)


def _forward_rule(eqn: JaxprEqn, facts: list[Fact], replace: Replace, place: Place):
    """The forward rule of a custom_vjp, which is traced when it is first differentiated, rewritten when it is."""
    thunk = eqn.params["fwd_jaxpr_thunk"]
    primals = facts[eqn.params["num_consts"] :]

    def rewritten(*which_are_differentiated):
        jaxpr, consts = thunk.call_wrapped(*which_are_differentiated)
        in_facts = [*map(constant_fact, consts), *primals]
        return rewrite(jaxpr, in_facts[len(in_facts) - len(jaxpr.invars) :], replace, place)[0], consts

    return linear_util.wrap_init(rewritten, debug_info=thunk.debug_info)


def _in_cond(eqn: JaxprEqn, facts: list[Fact], replace: Replace, place: Place) -> tuple[dict[str, Any], list[Fact]]:
    branches, out_facts = zip(
        *(rewrite(branch, facts[1:], replace, place) for branch in eqn.params["branches"]), strict=True
    )
    joined = list(out_facts[0])
    for other in out_facts[1:]:
        joined = list(map(join, joined, other))
    return {"branches": branches}, joined


def _in_scan(eqn: JaxprEqn, facts: list[Fact], replace: Replace, place: Place) -> tuple[dict[str, Any], list[Fact]]:
    body = eqn.params["jaxpr"]
    num_consts, num_carry, _ = map(len, eqn.params["ft_in"].unpack())
    consts, init, xs = facts[:num_consts], facts[num_consts:][:num_carry], facts[num_consts + num_carry :]
    carry = _carry_facts(body, lambda carry: [*consts, *carry, *xs], init)
    jaxpr, out_facts = rewrite(body, [*consts, *carry, *xs], replace, place)
    after = map(join, carry, out_facts)  # or what it began with, where there are no steps
    return {"jaxpr": jaxpr}, [*after, *out_facts[num_carry:]]


def _in_while(eqn: JaxprEqn, facts: list[Fact], replace: Replace, place: Place) -> tuple[dict[str, Any], list[Fact]]:
    of_cond, of_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond_consts, consts, init = facts[:of_cond], facts[of_cond:][:of_body], facts[of_cond + of_body :]
    carry = _carry_facts(eqn.params["body_jaxpr"], lambda carry: [*consts, *carry], init)
    cond, _ = rewrite(eqn.params["cond_jaxpr"], [*cond_consts, *carry], replace, place)
    body, out_facts = rewrite(eqn.params["body_jaxpr"], [*consts, *carry], replace, place)
    return {"cond_jaxpr": cond, "body_jaxpr": body}, list(map(join, carry, out_facts))


def _carry_facts(body: Jaxpr, in_facts: Callable[[list[Fact]], list[Fact]], carry: list[Fact]) -> list[Fact]:
    """What holds of a loop's carry at every step: before the first, and after any. Facts only get lost: it ends."""
    while True:
        _, out_facts = rewrite(body, in_facts(carry), lambda *_: None)
        after = list(map(join, carry, out_facts))
        if after == carry:
            return carry
        carry = after
