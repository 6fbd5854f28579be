"""An index that names micro-tiles that there are not: found where its values are known, and never read elsewhere."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gather_matmul, micro_tile_index
from pallas_kernels.gather_matmul.reference import _xla_masked as gather_masked
from pallas_kernels.operands import listed_mask
from pallas_kernels.sampled_matmul import sampled_matmul
from pallas_kernels.sampled_matmul.reference import _xla_masked as sampled_masked
from pallas_kernels.scatter_matmul import scatter_matmul
from pallas_kernels.scatter_matmul.reference import _xla_masked as scatter_masked

LENGTH, WIDTH, ROWS = 70, 24, 8  # of the matrix with micro-tiles, lists along its LENGTH
PRODUCTS = {
    gather_matmul: ((LENGTH, WIDTH), (LENGTH, 5)),
    scatter_matmul: ((LENGTH, WIDTH), (WIDTH, 5)),
    sampled_matmul: ((LENGTH, 5), (WIDTH, 5)),
}
MASKED = {gather_matmul: gather_masked, scatter_matmul: scatter_masked, sampled_matmul: sampled_masked}
LOWEST, HIGHEST = -(2**31), 2**31 - 1


def problem(product, cols: int):
    """Operands, and an index of three lists of which the first two entries count."""
    rng = np.random.default_rng(0)
    operands = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in PRODUCTS[product]]
    index = micro_tile_index(jnp.zeros((LENGTH, WIDTH), bool).at[:2].set(True).at[-2:].set(True), ROWS, cols)
    return operands, dataclasses.replace(index, counts=jnp.full_like(index.counts, 2))


@pytest.mark.parametrize("cols", [1, 16])
@pytest.mark.parametrize("product", PRODUCTS, ids=lambda product: product.__name__)
@pytest.mark.parametrize("entry", [-1, LOWEST, "entries", HIGHEST])
def test_an_entry_that_names_nothing(product, cols, entry):
    operands, index = problem(product, cols)
    entry = index.indices.shape[1] if entry == "entries" else entry
    wrong = dataclasses.replace(index, indices=index.indices.at[1, 1].set(entry))
    with pytest.raises(ValueError, match=rf"entries of 0 to .* before them; got \[{entry}\] in list 1, counts\[1\]=2"):
        product(*operands, wrong)
    one_less = dataclasses.replace(index, counts=index.counts.at[1].set(1))
    right = product(*operands, one_less)
    np.testing.assert_array_equal(jax.jit(product)(*operands, wrong), right)
    np.testing.assert_allclose(MASKED[product](*operands, wrong), right, rtol=1e-5, atol=1e-5)
    assert listed_mask(one_less, LENGTH, WIDTH).tolist() == listed_mask(wrong, LENGTH, WIDTH).tolist()

    def gradients(index):
        loss = functools.partial(lambda index, *operands: jnp.sin(product(*operands, index)).sum(), index)
        return jax.grad(loss, (0, 1))(*operands)

    for grad, expected in zip(jax.jit(gradients)(wrong), gradients(one_less), strict=True):
        np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [-1, 71])
@pytest.mark.parametrize("product", PRODUCTS, ids=lambda product: product.__name__)
def test_a_count_that_no_list_has(product, count):
    operands, index = problem(product, 1)
    wrong = dataclasses.replace(index, counts=index.counts.at[2].set(count))
    with pytest.raises(ValueError, match=rf"counts of 0 to 70, .*; got \[\] in list 2, counts\[2\]={count}"):
        product(*operands, wrong)
    index = micro_tile_index(jnp.ones((LENGTH, WIDTH), bool), ROWS)
    clipped = dataclasses.replace(index, counts=index.counts.at[2].set(0 if count < 0 else LENGTH))
    wrong = dataclasses.replace(index, counts=index.counts.at[2].set(count))
    np.testing.assert_array_equal(jax.jit(product)(*operands, wrong), product(*operands, clipped))
