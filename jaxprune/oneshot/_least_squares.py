"""Masked least squares by conjugate gradients, for all units of a matrix at once."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32

# Residuals that small, relative to the first, are rounding errors.
_CONVERGED = 1e-6


def reconstruct_matrix(
    weights: Float32[Array, "inputs outputs"],
    mask: Bool[Array, "inputs outputs"],
    gram: Float32[Array, "inputs inputs"],
    *,
    steps: int,
    start: Float32[Array, "inputs outputs"] | None = None,
    extra: Float32[Array, "*one_outputs"] | None = None,
) -> Float32[Array, "inputs outputs"]:
    """Minimise ``(V - W)^T H (V - W)`` over matrices V with zeros where the mask says so.

    Args:
        weights: the dense W, whose outputs are to be matched.
        mask: True = keep.
        gram: H, positive definite.
        steps: how many steps at most (static).
        start: the V to start from; None starts from the kept weights of W.
        extra: what is added to the diagonal of H, one number or, ``[1, outputs]``, one for each unit; None adds nothing.

    Returns:
        V.
    """
    solution = jnp.where(mask, weights if start is None else start, 0.0)
    change = weights - solution
    return solve_kept(gram, mask, times(gram, change, extra), solution, steps=steps, extra=extra)


def solve_kept(
    gram: Float32[Array, "inputs inputs"],
    mask: Bool[Array, "inputs outputs"],
    residual: Float32[Array, "inputs outputs"],
    solution: Float32[Array, "inputs outputs"],
    *,
    steps: int,
    extra: Float32[Array, "*one_outputs"] | None = None,
) -> Float32[Array, "inputs outputs"]:
    """Solve ``H_SS x_S = b_S`` for each unit with its own S, of what its mask keeps.

    Conjugate gradients, preconditioned by the diagonal of H.

    Args:
        gram: H, positive definite.
        mask: S.
        residual: b - H x for the x to start from.
        solution: the x to start from, zero outside S.
        steps: how many steps at most (static).
        extra: as in `reconstruct_matrix`.

    Returns:
        x, zero outside S.
    """
    diagonal = jnp.diagonal(gram)[:, None]
    inverse_diagonal = 1 / (diagonal if extra is None else diagonal + extra)

    def multiply(matrix: jax.Array) -> jax.Array:
        return jnp.where(mask, times(gram, matrix, extra), 0.0)

    def of_units(products: jax.Array) -> jax.Array:
        return jnp.sum(products, 0, keepdims=True)

    def unfinished(state: Any) -> jax.Array:
        step, _, _, _, energy = state
        return (step < steps) & jnp.any(energy > threshold)

    def improve(state: Any) -> Any:
        step, solution, residual, direction, energy = state
        across = multiply(direction)
        length = _ratio(energy, of_units(direction * across))
        solution = solution + length * direction
        residual = residual - length * across
        scaled = inverse_diagonal * residual
        before, energy = energy, of_units(residual * scaled)
        return step + 1, solution, residual, scaled + _ratio(energy, before) * direction, energy

    residual = jnp.where(mask, residual, 0.0)
    direction = inverse_diagonal * residual
    energy = of_units(residual * direction)
    threshold = energy * _CONVERGED**2
    return lax.while_loop(unfinished, improve, (jnp.int32(0), solution, residual, direction, energy))[1]


def times(gram: jax.Array, matrix: jax.Array, extra: jax.Array | None) -> jax.Array:
    """Return ``(H + extra I) X`` at the highest precision."""
    product = jnp.matmul(gram, matrix, precision=lax.Precision.HIGHEST)
    return product if extra is None else product + extra * matrix


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    # A unit that has converged divides zero by zero.
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), 0.0)
