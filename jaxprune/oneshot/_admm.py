"""ADMM: weights that are free and weights that are sparse are drawn together while the mask tightens."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, UInt32

from jaxprune import rules
from jaxprune._selection import _counts
from jaxprune._selection._largest import keep_largest
from jaxprune._tree._prunable import Prunable
from jaxprune.oneshot._least_squares import reconstruct_matrix
from jaxprune.oneshot._pattern import Pattern, read_pattern
from jaxprune.oneshot._solve import Solution, prune_sites, solve_each
from jaxprune.rules._rule import AnyRule
from jaxprune.sites._calibrate import Grams
from jaxprune.sites._factorise import Factor, check_damping
from jaxprune.sites._sites import Sites

# The share of the steps in which the mask tightens; it is fixed in the others.
_GRADUAL = 0.75
# How strongly the two are drawn together, for inputs scaled to a squared norm of 1.
_PENALTY = 1.0
# Steps of conjugate gradients that the result is finished with.
_FINISH = 30


def admm(
    params: Any,
    grams: Grams,
    k: Any,
    *,
    rule: AnyRule = rules.layer_sparsity,
    steps: int = 30,
    damping: float = 0.01,
    prunable: Prunable = None,
    sites: Sites | None = None,
) -> tuple[Any, Any]:
    """Prune by ADMM with a mask that tightens step by step, and finish by masked least squares (`reconstruct`).

    All weights of a layer move in every step, and a weight that was to go may come back until the mask is full; so it
    finds better masks and weights than `sparsegpt`, at the cost of ``steps + 30`` products of a matrix with the weights.
    Counts, dead inputs, dtypes, sharding, arguments and errors as in `sparsegpt`.

    Args:
        params: a pytree of arrays.
        grams: from `calibrate_grams` of the function that uses them.
        k: as in `sparsegpt`.
        rule: as in `sparsegpt`.
        steps: of ADMM, >= 1; in the first three quarters of them the mask tightens (static).
        damping: as in `sparsegpt`, for masks and weights.
        prunable: as in `sparsegpt`.
        sites: as in `make_masks`.

    Returns:
        The pruned parameters and their masks, both of the treedef of params; True = keep.

    >>> import jax.numpy as jnp, jaxprune
    >>> params = {"kernel": jnp.array([[1.0], [2.0]])}
    >>> data = jnp.array([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    >>> grams = jaxprune.calibrate_grams(lambda params, x: x @ params["kernel"], params, [data])  # [[2, 1], [1, 2]]
    >>> pruned, masks = jaxprune.oneshot.admm(params, grams, 0.5, damping=0.0)
    >>> masks["kernel"].ravel().tolist(), round(float(pruned["kernel"][1, 0]), 5)
    ([False, True], 2.5)

    Reference: Boza, "Fast and Effective Weight Update for Pruned Large Language Models", 2024, algorithms 1 and 2;
    gradual masks for N:M and the finish: Meng, Behdin, Wang, Mazumder, "ALPS: Improved Optimization for Highly Sparse
    One-Shot Pruning for Large Language Models", 2024.
    """
    pattern = read_pattern(rule, "admm")
    check_damping(damping, "admm")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"admm takes a whole number of steps, >= 1; got {steps!r}.")

    def method(weights: jax.Array, grams: jax.Array, strength: jax.Array) -> Solution:
        return _prune(weights, grams, strength, damping, pattern=pattern, steps=steps)

    return prune_sites(
        params, grams, k, method, title="admm", pattern=pattern, damping=damping, prunable=prunable, sites=sites
    )


@functools.partial(jax.jit, static_argnames=("pattern", "steps"))
def _prune(
    weights: jax.Array, grams: jax.Array, strength: jax.Array, damping: float, *, pattern: Pattern, steps: int
) -> Solution:
    def solve(weights: jax.Array, factor: Factor, strength: jax.Array) -> tuple[jax.Array, jax.Array]:
        start, mask = admm_matrix(weights, factor.gram, strength, pattern=pattern, steps=steps)
        return reconstruct_matrix(weights, mask, factor.gram, steps=_FINISH, start=start), mask

    return solve_each(solve, weights, grams, strength, jnp.float32(damping))


def admm_matrix(
    weights: Float32[Array, "inputs outputs"],
    gram: Float32[Array, "inputs inputs"],
    strength: UInt32[Array, ""],
    *,
    pattern: Pattern,
    steps: int,
) -> tuple[Float32[Array, "inputs outputs"], Bool[Array, "inputs outputs"]]:
    """Minimise ``(V - W)^T H (V - W)`` over sparse matrices V, and choose their mask on the way.

    Args:
        weights: W.
        gram: H, positive definite.
        strength: from `pattern.strength`.
        pattern: which weights go (static).
        steps: how many (static).

    Returns:
        V and its mask, True = keep.
    """
    inputs = len(gram)
    # Inputs scaled to norm 1: magnitudes then rank as Wanda's scores do, and one penalty suits all layers.
    scale = jnp.sqrt(jnp.diagonal(gram))[:, None]
    unit = gram / (scale * scale.T)
    identity = jnp.eye(inputs, dtype=gram.dtype)
    root = jnp.linalg.cholesky(unit + _PENALTY * identity, symmetrize_input=False)
    inverse = jax.scipy.linalg.cho_solve((root, True), identity)
    target = jnp.matmul(unit, weights * scale, precision=lax.Precision.HIGHEST)
    gradual = max(1, round(_GRADUAL * steps))

    def tighten(scores: jax.Array, step: jax.Array) -> jax.Array:
        """Remove the smallest of what the rule would remove: more in every step, and at last all."""
        # The share is cubic in time, as in gradual pruning while training.
        share = jnp.where(step + 1 < gradual, 1 - (1 - (step + 1).astype(jnp.float32) / gradual) ** 3, 1.0)
        if pattern.counts:
            fewer = jnp.where(
                share < 1, jnp.floor(share * strength.astype(jnp.float32)).astype(strength.dtype), strength
            )
            return pattern.choose(scores, fewer, 0, inputs)
        mask = pattern.choose(scores, strength, 0, inputs)
        removed = jnp.floor(share * _counts.to_float(_counts.count_true(~mask, (0, 1))))
        some = keep_largest(jnp.where(mask, jnp.inf, scores), _counts.from_float(removed), magnitude=False)
        return mask | (some & (share < 1))

    def improve(step: Any, state: Any) -> Any:
        step = jnp.asarray(step, jnp.int32)  # a Python number where jit is disabled
        sparse, dual, mask = state
        free = jnp.matmul(inverse, target + _PENALTY * (sparse - dual), precision=lax.Precision.HIGHEST)
        pulled = free + dual
        mask = lax.cond(step < gradual, lambda: tighten(jnp.abs(pulled), step), lambda: mask)
        sparse = jnp.where(mask, pulled, 0.0)
        return sparse, pulled - sparse, mask

    start = (weights * scale, jnp.zeros_like(weights), jnp.ones_like(weights, dtype=bool))
    sparse, _, mask = lax.fori_loop(0, steps, improve, start)
    return sparse / scale, mask
