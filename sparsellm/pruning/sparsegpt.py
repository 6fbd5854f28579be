"""SparseGPT: inputs are pruned one after the other, and those still to come make up for the error.

    min |X W - X W'|^2 for each output, by Hessian H = X^T X, the same for all of them.

The upper Cholesky factor U of the inverse of H holds, row by row, what every step needs. A block of 128 inputs is
updated at once, and all later ones by one product for each block. Work: about 2 d_in^2 d_out FLOPs and d_in^3 for U.

The published weights are [out, in]: its columns are rows here. It differs in two points: exactly the share `sparsity`
of a block is pruned, where the published code takes one weight more; and where H has no Cholesky factor, and that code
ends, it is dampened more (`damped_factor`).

Source: Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot" (ICML'23),
algorithm 1, and its code.
"""

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float

from sparsellm.pruning.method import Inputs, Needs
from sparsellm.pruning.patterns import NM, Blocks, Pattern, Sparsity


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseGPT:
    """The method as a `Method`.

    Attributes:
        block_size: inputs whose mask is chosen, and whose errors are passed on, at once (n:m chooses every m).
        damping: what is added to the Hessian's diagonal, in means of it, at most 1; see `damped_factor`.
    """

    block_size: int = 128
    damping: float = 0.01
    needs: Needs = dataclasses.field(default="gram", init=False)

    def __post_init__(self):
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1; got block_size={self.block_size}")
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must be above 0, or H may have no inverse, to 1; got damping={self.damping}")

    def check(self, pattern: Pattern) -> None:
        """Raises ValueError unless a block holds whole groups of the pattern."""
        group = {NM: "m", Blocks: "rows"}.get(type(pattern))
        if group and self.block_size % getattr(pattern, group):
            raise ValueError(f"{group} of the pattern must divide block_size={self.block_size}; got {pattern}")

    def __call__(
        self, kernel: Float[Array, "d_in d_out"], inputs: Inputs | None, pattern: Pattern, sparsity: Sparsity
    ) -> Float[Array, "d_in d_out"]:
        if inputs is None or inputs.gram is None:
            raise ValueError(f"inputs must hold X^T X; got {inputs}")
        dead = jnp.diag(inputs.gram) == 0
        hessian = inputs.gram + jnp.diag(dead.astype(jnp.float32))
        factor = damped_factor(hessian, self.damping)
        step = functools.partial(_prune_block, factor=factor, pattern=pattern, sparsity=sparsity)
        whole, rest = divmod(kernel.shape[0], self.block_size)
        kernel = jnp.where(dead[:, None], 0, kernel)
        if whole:
            size = self.block_size
            kernel = lax.fori_loop(0, whole, lambda i, w: step(w, start=i * size, size=size), kernel)
        return step(kernel, start=whole * self.block_size, size=rest) if rest else kernel


def damped_factor(hessian: Float[Array, "n n"], damping: float) -> Float[Array, "n n"]:
    """`inverse_factor` with `damping` means of the diagonal added to it, and ten times as much as long as it has none.

    Where inputs are many and nearly parallel, as after a deep model's ReLU, the largest eigenvalue is n means, of which
    float32 rounds the published 0.01 away: Cholesky then ends in NaN. All NaN where one mean is not enough.
    """
    mean = jnp.mean(jnp.diag(hessian))

    def fails(carry):
        damping, factor = carry
        return ~jnp.isfinite(factor).all() & (damping < 2)

    def more(carry):
        damping, _ = carry
        return 10 * damping, inverse_factor(hessian + damping * mean * jnp.eye(len(hessian), dtype=hessian.dtype))

    return lax.while_loop(fails, more, (jnp.float32(damping), jnp.full_like(hessian, jnp.nan)))[1]


def inverse_factor(hessian: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """The upper triangular U with U^T U = H^-1.

    H = R R^T with R upper triangular gives U = R^-1 without ever forming H^-1; turned around, R is Cholesky's.
    """
    r = jnp.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1]
    return solve_triangular(r, jnp.eye(len(r), dtype=r.dtype), lower=False)


def _prune_block(
    kernel: Float[Array, "d_in d_out"],
    factor: Float[Array, "d_in d_in"],
    pattern: Pattern,
    sparsity: Sparsity,
    *,
    start: int | Array,
    size: int,
) -> Float[Array, "d_in d_out"]:
    """Prunes the inputs [start, start + size) and updates those after them."""
    rows = lax.dynamic_slice_in_dim(factor, start, size)
    u = lax.dynamic_slice_in_dim(rows, start, size, axis=1)
    w = lax.dynamic_slice_in_dim(kernel, start, size)
    stretch = pattern.m if isinstance(pattern, NM) else size  # inputs whose mask is chosen together

    def prune_stretch(index, carry):
        w, _ = carry
        first = index * stretch
        scores = lax.dynamic_slice_in_dim(w / jnp.diag(u)[:, None], first, stretch) ** 2
        keep = pattern.keep(scores, sparsity, "kernel")

        def prune_input(offset, carry):
            w, errors = carry
            i = first + offset
            kept = jnp.where(keep[offset], w[i], 0)
            error = (w[i] - kept) / u[i, i]
            w = w - u[i][:, None] * error[None]  # u[i] is zero before i
            return w.at[i].set(kept), errors.at[i].set(error)

        # From 0 on: of a loop whose bounds are values, a GPU asks the host before every step.
        return lax.fori_loop(0, stretch, prune_input, carry)

    w, errors = lax.fori_loop(0, size // stretch, prune_stretch, (w, jnp.zeros_like(w)))
    later = jnp.where((jnp.arange(rows.shape[1]) >= start + size)[None], rows, 0)
    kernel = kernel - jnp.dot(later.T, errors, precision=lax.Precision.HIGHEST)
    return lax.dynamic_update_slice_in_dim(kernel, w, start, axis=0)
