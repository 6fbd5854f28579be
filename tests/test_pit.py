"""PIT axes against what permuting real operands does, by numpy in float64."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsellm.pit import COMMUTATIVE, micro_tile, pit_axes

SPECS = (
    "mk,kn->mn",
    "bmk,bkn->bmn",
    "bmk,kn->bmn",
    "emk,ekn->emn",
    "bhqd,bhkd->bhqk",
    "bhqk,bhkd->bhqd",
    "mk,k->m",
    "m,n->mn",
    "mk,kl,ln->mn",
    "mk->km",
    "mk->m",
    "mk->",
)

REDUCTIONS = {
    "sum": np.sum,
    "prod": np.prod,
    "max": np.max,
    "min": np.min,
    "any": lambda x, axis: np.any(x > 0, axis=axis),
    "all": lambda x, axis: np.all(x > 0, axis=axis),
    "logsumexp": lambda x, axis: np.log(np.sum(np.exp(x), axis=axis)),
}


def evaluate(spec: str, operands: list[np.ndarray], reduce=np.sum) -> np.ndarray:
    """The products of all operands at every point of the iteration space, reduced."""
    left, result = spec.split("->")
    reduced = "".join(dict.fromkeys(c for c in left if c.isalpha() and c not in result))
    points = np.einsum(f"{left}->{result}{reduced}", *operands)
    return reduce(points, axis=tuple(range(len(result), points.ndim))) if reduced else points


def random_operands(spec: str, rng: np.random.Generator) -> tuple[list[np.ndarray], dict[str, int]]:
    left = spec.split("->")[0]
    sizes = {c: int(rng.integers(3, 6)) for c in dict.fromkeys(left) if c.isalpha()}
    return [rng.normal(size=[sizes[c] for c in operand]) for operand in left.split(",")], sizes


def permuted(spec: str, name: str, operands: list[np.ndarray], gathered, order: np.ndarray) -> list[np.ndarray]:
    """SRead: the operands that `gathered` names, taken in another order along an axis (its first dimension there)."""
    letters = spec.split("->")[0].split(",")
    return [np.take(x, order, axis=letters[i].index(name)) if i in gathered else x for i, x in enumerate(operands)]


def assert_axes_do_what_they_say(spec: str, seed: int, reduce: str = "sum"):
    rng = np.random.default_rng(seed)
    operands, sizes = random_operands(spec, rng)
    expected = evaluate(spec, operands, REDUCTIONS[reduce])
    for name, axis in pit_axes(spec, reduce).items():
        assert axis.invariant and axis.name == name
        order = rng.permutation(sizes[name])
        out = evaluate(spec, permuted(spec, name, operands, axis.gathered, order), REDUCTIONS[reduce])
        if axis.swrite:
            scattered, position = np.empty_like(out), spec.split("->")[1].index(name)
            np.moveaxis(scattered, position, 0)[order] = np.moveaxis(out, position, 0)
            out = scattered
        np.testing.assert_allclose(out, expected, rtol=1e-9)


@pytest.mark.parametrize("spec", SPECS)
def test_permuting_an_axis_permutes_the_result_or_leaves_it(spec):
    assert_axes_do_what_they_say(spec, seed=0)


@pytest.mark.parametrize("reduce", COMMUTATIVE)
@pytest.mark.parametrize("spec", ["mk->m", "mk,kn->mn"])
def test_every_commutative_reduction(spec, reduce):
    assert_axes_do_what_they_say(spec, seed=1, reduce=reduce)


@st.composite
def einsums(draw) -> str:
    letter = st.permutations("abcde")
    operands = [draw(letter)[: draw(st.integers(1, 3))] for _ in range(draw(st.integers(1, 3)))]
    used = sorted({c for operand in operands for c in operand})
    result = draw(st.permutations(used))[: draw(st.integers(0, len(used)))]
    return f"{','.join(''.join(operand) for operand in operands)}->{''.join(result)}"


@settings(max_examples=80)
@given(spec=einsums(), seed=st.integers(0, 2**16))
def test_any_einsum_without_repeated_axes(spec, seed):
    assert_axes_do_what_they_say(spec, seed)


def test_gathering_one_operand_alone_is_not_enough():
    """`gathered` names all operands that must move together: with fewer, the result is another."""
    rng = np.random.default_rng(2)
    operands, sizes = random_operands("mk,kn->mn", rng)
    assert pit_axes("mk,kn->mn")["k"].gathered == (0, 1)
    order = np.roll(np.arange(sizes["k"]), 1)
    moved = evaluate("mk,kn->mn", permuted("mk,kn->mn", "k", operands, (0,), order))
    assert not np.allclose(moved, evaluate("mk,kn->mn", operands))


def test_roles_of_matmul_and_of_experts():
    axes = pit_axes("emk,ekn->emn")
    assert {name: axis.role for name, axis in axes.items()} == {
        "e": "batch",
        "m": "spatial",
        "k": "reduction",
        "n": "spatial",
    }
    assert [axes[name].gathered for name in "emkn"] == [(0, 1), (0,), (0, 1), (1,)]
    assert [axes[name].swrite for name in "emkn"] == [True, True, False, True]
    assert {axis.role for axis in pit_axes("mk->mk").values()} == {"spatial"}  # one operand: nothing is batched


def test_a_diagonal_is_refused_and_rightly():
    axis = pit_axes("mm->m")["m"]
    assert not axis.invariant and "operand 0" in str(axis.refusal)
    x = np.arange(9.0).reshape(3, 3)
    order = np.array([1, 2, 0])
    out = np.diagonal(x[order])  # SRead of rows
    scattered = np.empty(3)
    scattered[order] = out
    assert not np.allclose(scattered, np.diagonal(x))
    axes = pit_axes("mm,mk->mk")
    assert not axes["m"].invariant and axes["k"].invariant


def test_an_ordered_reduction_is_refused_and_only_along_what_it_reduces():
    x = np.random.default_rng(3).normal(size=(4, 5))
    order = np.roll(np.arange(5), 2)
    for reduce, ordered in (("argmax", np.argmax), ("cumsum", np.cumsum), ("first", lambda x, axis: x[:, 0])):
        assert not np.allclose(ordered(x[:, order], axis=1), ordered(x, axis=1))
        axes = pit_axes("mk->m", reduce=reduce)
        assert axes["m"].invariant
        assert not axes["k"].invariant and reduce in str(axes["k"].refusal)


@pytest.mark.parametrize("spec", ["mk,kn", "mk,kn->mz", "mk->mm", "...k,kn->...n", "m1->m", "mk,kn->mn->m", ""])
def test_specs_that_are_no_einsums(spec):
    with pytest.raises(ValueError, match="spec must|result of spec must"):
        pit_axes(spec)


def test_micro_tiles_are_one_wide_along_the_axis():
    tile = {"m": 128, "k": 64, "n": 256}
    assert micro_tile("mk,kn->mn", "k", tile) == ((128, 1), (1, 256))
    assert micro_tile("mk,kn->mn", "m", tile) == ((1, 64), (64, 256))
    assert micro_tile("mk,kn->mn", "n", tile) == ((128, 64), (64, 1))
    assert micro_tile("mk->m", "k", {"m": 32, "k": 8}) == ((32, 1),)


@given(spec=einsums(), seed=st.integers(0, 2**16))
def test_micro_tiles_of_any_einsum_fill_the_dense_tile(spec, seed):
    operands, sizes = random_operands(spec, np.random.default_rng(seed))
    for name, axis in pit_axes(spec).items():
        for i, (shape, operand) in enumerate(zip(micro_tile(spec, name, sizes), operands, strict=True)):
            assert math.prod(shape) * (sizes[name] if i in axis.gathered else 1) == operand.size


def test_micro_tile_says_what_is_wrong():
    tile = {"m": 4, "k": 2, "n": 8}
    with pytest.raises(ValueError, match="axis must be one of m, k, n; got axis='z'"):
        micro_tile("mk,kn->mn", "z", tile)
    with pytest.raises(ValueError, match="permutation-invariant; got axis='m'.*operand 0"):
        micro_tile("mm->m", "m", {"m": 4})
    for wrong in ({"m": 4, "k": 2}, tile | {"x": 1}, tile | {"k": 0}):
        with pytest.raises(ValueError, match="dense_tile must give a positive size"):
            micro_tile("mk,kn->mn", "k", wrong)
