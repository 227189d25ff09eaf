"""The best weights under a mask: masked least squares by conjugate gradients, for all units of a matrix at once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float32

from jaxprune._tree._leaves import is_floating, is_known
from jaxprune._tree._masks import align_masks, kept
from jaxprune._tree._paths import read_arrays
from jaxprune.oneshot._solve import Solution, report, solve_each
from jaxprune.sites._calibrate import Grams
from jaxprune.sites._factorise import Factor, check_damping
from jaxprune.sites._matrices import as_matrices, sites_of

# Residuals that small, relative to the first, are rounding errors.
_CONVERGED = 1e-6


def reconstruct(params: Any, masks: Any, grams: Grams, *, steps: int = 30, damping: float = 0.01) -> Any:
    """Give the weights that masks keep the values that serve best: masked least squares, layer by layer.

    For every layer with a pruned weight, the kept weights move so that its outputs on the calibration data are as near
    to those of the dense layer as the mask allows. Any mask becomes better by it, at the cost of `steps` products of a
    Gram matrix with the weights. Pruned weights are exactly ``+0.0``. Weights of inputs that are zero in all samples
    keep their values. A weight that is not finite counts as zero. Computed in float32; works under ``jit`` and on
    sharded parameters; deterministic.

    Args:
        params: a pytree of arrays, the dense parameters: what the masks remove of them is what is made up for.
        masks: their masks, True = keep; None keeps a leaf whole.
        grams: from `calibrate_grams` of the function that uses them.
        steps: how many steps of conjugate gradients at most, >= 0; well-conditioned layers stop early (static).
        damping: the share of the mean diagonal that is added to a Gram matrix, >= 0: how strongly weights are held to
            where they were; as in `sparsegpt`.

    Returns:
        The parameters, of the treedef of params.

    Raises:
        ValueError: a leaf with pruned weights multiplies no calibrated data, or is of another shape; masks do not fit; a
            Gram matrix is not finite. The message names the leaf.

    Warns:
        DampingWarning: damping was raised.

    >>> import jax.numpy as jnp, jaxprune
    >>> params = {"kernel": jnp.array([[1.0], [2.0]])}
    >>> data = jnp.array([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    >>> grams = jaxprune.calibrate_grams(lambda params, x: x @ params["kernel"], params, [data])  # [[2, 1], [1, 2]]
    >>> masks = {"kernel": jnp.array([[True], [False]])}
    >>> jaxprune.oneshot.reconstruct(params, masks, grams, damping=0.0)["kernel"].ravel().tolist()  # 1 + 2 * 1/2
    [2.0, 0.0]

    Reference: Boza, "Fast and Effective Weight Update for Pruned Large Language Models", 2024, equation 2, the problem;
    conjugate gradients for it: Meng, Behdin, Wang, Mazumder, "ALPS: Improved Optimization for Highly Sparse One-Shot
    Pruning for Large Language Models", 2024, section 3.3.
    """
    check_damping(damping, "reconstruct")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"reconstruct takes a whole number of steps, >= 0; got {steps!r}.")
    read_arrays(params, "params")
    flat = grams.sites.require_params(params)
    leaves = []
    for path, name, leaf, mask in zip(flat.paths, flat.names, flat.leaves, align_masks(masks, flat), strict=True):
        if mask is not None and is_floating(leaf) and not _keeps_all(mask):
            sites = sites_of(grams, path, "reconstruct")
            dense, leaf = leaf, kept(leaf, mask)
            for site in sites:
                weights = as_matrices(site, dense)
                found = _reconstruct(
                    weights, grams.of(site).astype(jnp.float32), site.matrices(mask), damping, steps=steps
                )
                report(found, name, damping)
                leaf = site.put(leaf, found.weights)
        leaves.append(leaf)
    return flat.build(leaves)


def _keeps_all(mask: jax.Array) -> bool:
    return is_known(mask) and bool(np.all(mask))


@functools.partial(jax.jit, static_argnames="steps")
def _reconstruct(weights: jax.Array, grams: jax.Array, masks: jax.Array, damping: float, *, steps: int) -> Solution:
    def solve(weights: jax.Array, factor: Factor, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        return reconstruct_matrix(weights, mask, factor.gram, steps=steps), mask

    return solve_each(solve, weights, grams, masks, jnp.float32(damping))


def reconstruct_matrix(
    weights: Float32[Array, "inputs outputs"],
    mask: Bool[Array, "inputs outputs"],
    gram: Float32[Array, "inputs inputs"],
    *,
    steps: int,
    start: Float32[Array, "inputs outputs"] | None = None,
) -> Float32[Array, "inputs outputs"]:
    """Minimise ``(V - W)^T H (V - W)`` over matrices V with zeros where the mask says so.

    Conjugate gradients on the equations of the kept weights, ``H_SS v_S = (H w)_S`` for each unit with its own S,
    preconditioned by the diagonal of H.

    Args:
        weights: the dense W, whose outputs are to be matched.
        mask: True = keep.
        gram: H, positive definite.
        steps: how many steps at most (static).
        start: the V to start from; None starts from the kept weights of W.

    Returns:
        V.
    """
    inverse_diagonal = 1 / jnp.diagonal(gram)[:, None]

    def multiply(matrix: jax.Array) -> jax.Array:
        return jnp.where(mask, jnp.matmul(gram, matrix, precision=lax.Precision.HIGHEST), 0.0)

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

    solution = jnp.where(mask, weights if start is None else start, 0.0)
    residual = multiply(weights - solution)
    direction = inverse_diagonal * residual
    energy = of_units(residual * direction)
    threshold = energy * _CONVERGED**2
    return lax.while_loop(unfinished, improve, (jnp.int32(0), solution, residual, direction, energy))[1]


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    # A unit that has converged divides zero by zero.
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), 0.0)
