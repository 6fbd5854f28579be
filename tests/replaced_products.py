"""Which products of a function run on sparse_dot, and whether its results are still the same."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        if eqn.params.get("name") != "sparse_dot_general":
            for body in jaxprs_in_params(eqn.params):
                yield from equations(body)


def replaced(fn, *args, **kwargs) -> int:
    """Products on sparse_dot in a function."""
    jaxpr = jax.make_jaxpr(lambda *args: fn(*args, **kwargs))(*args)
    return sum(eqn.params.get("name") == "sparse_dot_general" for eqn in equations(jaxpr))


def dense(fn, *args, **kwargs) -> int:
    jaxpr = jax.make_jaxpr(lambda *args: fn(*args, **kwargs))(*args)
    return sum(eqn.primitive.name == "dot_general" for eqn in equations(jaxpr))


def assert_same(actual, expected, tolerance=2e-5):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1, np.abs(b).max(initial=0)))
