"""What a pruning method is: kernel, inputs, pattern, sparsity -> the pruned kernel. Most are no more than a score."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from sparsellm.pruning.patterns import Compare, Pattern, Sparsity

type Needs = Literal["nothing", "squares", "gram"]
"""What a method wants to know about the inputs X [tokens, d_in] of a kernel: sums of squares, or all of X^T X."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """Sums over the tokens that a kernel saw, in float32; experts have a leading dimension.

    Attributes:
        tokens: how many there were, [].
        squares: diagonal of X^T X, [d_in].
        gram: X^T X, [d_in, d_in], or None where it was not asked for.
    """

    tokens: Any
    squares: Any
    gram: Any = None

    def or_ones(self) -> "Inputs":
        """Where there was no token (an expert that none went to), what unit inputs would have given."""
        empty = self.tokens == 0
        squares = jnp.where(empty[..., None], 1.0, self.squares)
        if self.gram is None:
            return dataclasses.replace(self, squares=squares)
        eye = jnp.eye(self.gram.shape[-1], dtype=self.gram.dtype)[(None,) * empty.ndim]
        return dataclasses.replace(self, squares=squares, gram=jnp.where(empty[..., None, None], eye, self.gram))


def check_sparsity(sparsity: float) -> None:
    """Raises ValueError for what is no share of weights to remove: with all of them gone there is no model."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be at least 0 and less than 1; got sparsity={sparsity}")


@runtime_checkable
class Method(Protocol):
    """A pruning method: hashable, as it is static under jit."""

    @property
    def needs(self) -> Needs: ...

    def check(self, pattern: Pattern) -> None:
        """Raises ValueError if the method cannot make this pattern."""
        ...

    def __call__(
        self, kernel: Float[Array, "d_in d_out"], inputs: Inputs | None, pattern: Pattern, sparsity: Sparsity
    ) -> Float[Array, "d_in d_out"]:
        """The pruned kernel, both in float32; `sparsity` may be traced."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Scored:
    """A method that sets the weights of lowest score to zero, and leaves the others as they are.

    Attributes:
        score: (kernel [in, out], its inputs) -> a score for each weight.
        needs: what `score` looks at.
        compare: among which scores the lowest are found, where the pattern leaves the choice.
    """

    score: Callable[[Float[Array, "d_in d_out"], Any], Float[Array, "d_in d_out"]]
    needs: Needs = "nothing"
    compare: Compare = "kernel"

    def __repr__(self) -> str:
        """The same in every process, which a function's own is not: a pruning that goes on is known by it."""
        score = f"{self.score.__module__}.{self.score.__qualname__}"
        return f"{type(self).__name__}(score={score}, needs={self.needs!r}, compare={self.compare!r})"

    def check(self, pattern: Pattern) -> None:
        """Every pattern is made from scores."""

    def __call__(
        self, kernel: Float[Array, "d_in d_out"], inputs: Inputs | None, pattern: Pattern, sparsity: Sparsity
    ) -> Float[Array, "d_in d_out"]:
        return jnp.where(pattern.keep(self.score(kernel, inputs), sparsity, self.compare), kernel, 0)


def reconstruction_error(
    kernel: Float[Array, "d_in d_out"], pruned: Float[Array, "d_in d_out"], gram: Float[Array, "d_in d_in"]
) -> Float[Array, ""]:
    """|X W - X W'| / |X W|, Frobenius norms, from X^T X; 0 where the output is zero."""

    def square(w: Array) -> Array:
        return jnp.sum(w * jnp.dot(gram, w, precision=lax.Precision.HIGHEST))

    total = square(kernel)
    return jnp.sqrt(jnp.maximum(square(kernel - pruned), 0) / jnp.where(total > 0, total, 1))
