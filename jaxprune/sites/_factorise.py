"""Gram matrices made fit to be inverted: dead features, damping that escalates, and triangular roots."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

# A float32 factorisation whose pivots have a larger range of squares holds rounding errors only.
_MAX_CONDITION = 1e6
# Where no damping was asked for but some is needed; and what is enough for any matrix of finite numbers.
_FIRST, _LAST = 1e-6, 10.0
# Roots of up to so many rows are inverted by one call of a solver.
_SOLVED_WHOLE = 512


# The damping, the root found with it, its condition, and the condition of the first attempt (negative before it).
_State = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


class Factor(NamedTuple):
    """A damped Gram matrix, factorised.

    Attributes:
        gram: [inputs, inputs], scaled to a mean diagonal of 1 and damped; a dead feature has the row and the column of
            the identity.
        root: [inputs, inputs], the upper triangular R of ``gram = R R^T``.
        dead: [inputs], features that are zero in all samples.
        damping: (), the share of the mean diagonal that was added, at least what was asked for; NaN if `gram` is.
        condition: (), a lower bound of the condition number with the damping asked for, by its pivots.
    """

    gram: Float[Array, "inputs inputs"]
    root: Float[Array, "inputs inputs"]
    dead: Bool[Array, " inputs"]
    damping: Float[Array, ""]
    condition: Float[Array, ""]


def factorise(gram: Float[Array, "inputs inputs"], damping: Float[Array, ""]) -> Factor:
    """Factorise a Gram matrix, damped by ``damping * mean(diag)``.

    The damping grows tenfold for as long as float32 cannot factorise the sum.
    """
    diagonal = jnp.diagonal(gram)
    dead = diagonal <= 0
    mean = jnp.sum(jnp.where(dead, 0.0, diagonal)) / jnp.maximum(jnp.sum(~dead, dtype=gram.dtype), 1)
    gram = gram / jnp.where(dead.all(), 1.0, mean)
    lives = jnp.where(dead, 0.0, 1.0)
    on_diagonal = jnp.eye(len(gram), dtype=bool)

    def damped(share: jax.Array) -> jax.Array:
        return jnp.where(on_diagonal, gram + jnp.where(dead, 1.0, share)[:, None], gram * jnp.outer(lives, lives))

    def attempt(share: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        root = _reverse(jnp.linalg.cholesky(_reverse(damped(share)), symmetrize_input=False))
        pivots = jnp.square(jnp.diagonal(root))
        condition = jnp.max(pivots * lives) / jnp.min(jnp.where(dead, jnp.inf, pivots))
        # What is not finite anywhere in a row of the root is not in its pivot.
        return share, root, jnp.where(jnp.isfinite(pivots).all(), condition, jnp.inf)

    def unfit(state: _State) -> jax.Array:
        share, _, condition, _ = state
        return (condition > _MAX_CONDITION) & (share < _LAST)

    def attempt_more(state: _State) -> _State:
        share, _, _, first = state
        share = jnp.where(share < 0, damping, jnp.maximum(10 * share, _FIRST))
        share, root, condition = attempt(share)
        return share, root, condition, jnp.where(first < 0, condition, first)

    # The first attempt is made in the loop as well, so that the factorisation is compiled once.
    none, infinite = jnp.float32(-1.0), jnp.float32(jnp.inf)
    share, root, condition, first = lax.while_loop(unfit, attempt_more, (none, jnp.zeros_like(gram), infinite, none))
    share = jnp.where(jnp.isfinite(condition), share, jnp.nan)
    return Factor(damped(share), root, dead, share, first)


def inverse_root(root: Float[Array, "inputs inputs"]) -> Float[Array, "inputs inputs"]:
    """The upper triangular U of ``gram^-1 = U^T U``."""
    size = len(root)
    if size <= _SOLVED_WHOLE:
        identity = jnp.eye(size, dtype=root.dtype)
        return lax.linalg.triangular_solve(root, identity, left_side=True, lower=False)
    # A solver does not know that the right-hand side is a triangle, too; a third of its work is enough.
    half = size // 2
    first, last = inverse_root(root[:half, :half]), inverse_root(root[half:, half:])
    dot = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    between = -dot(first, dot(root[:half, half:], last))
    return jnp.block([[first, between], [jnp.zeros((size - half, half), root.dtype), last]])


def _reverse(matrix: Float[Array, "inputs inputs"]) -> Float[Array, "inputs inputs"]:
    """The matrix with its rows and columns in reverse order, which makes upper triangles of lower ones."""
    return matrix[::-1, ::-1]


def check_damping(damping: float, title: str) -> None:
    """Raise a ValueError unless damping is a finite number of at least 0."""
    if isinstance(damping, bool) or not isinstance(damping, int | float) or not 0 <= damping < math.inf:
        raise ValueError(f"{title} takes damping >= 0, a finite number; got {damping!r}.")
