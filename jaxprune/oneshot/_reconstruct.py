"""The best weights under a mask: masked least squares, layer by layer."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._tree._leaves import require_real
from jaxprune._tree._masks import align_masks, kept
from jaxprune._tree._paths import read_arrays
from jaxprune.oneshot._damping import choose_damping
from jaxprune.oneshot._least_squares import reconstruct_matrix
from jaxprune.oneshot._solve import Solution, report, solve_each
from jaxprune.sites._calibrate import Grams, require_grams
from jaxprune.sites._factorise import Factor, check_damping
from jaxprune.sites._matrices import as_masked, as_matrices, is_pruned, sites_of

# A damping that any is at most: what is chosen is no cause for a warning.
_ANY = float("inf")


def reconstruct(params: Any, masks: Any, grams: Grams, *, steps: int = 30, damping: float | None = None) -> Any:
    """Give the weights that masks keep the values that serve best: masked least squares, layer by layer.

    For every layer with a pruned weight, the kept weights move so that its outputs on the calibration data are as near
    to those of the dense layer as the mask allows. Any mask becomes better by it, at the cost of `steps` products of a
    Gram matrix with the weights. Pruned weights are exactly ``+0.0``. Weights of inputs that are zero in all samples
    keep their values. A weight that is not finite counts as zero. Computed in float32; works under ``jit`` and on
    sharded parameters; deterministic. Where masks cannot be read, as under ``jit``, leaves that multiply no calibrated data
    are put under theirs.

    Args:
        params: a pytree of arrays, the dense parameters: what the masks remove of them is what is made up for.
        masks: their masks, True = keep; None keeps a leaf whole.
        grams: from `calibrate_grams` of the function that uses them.
        steps: how many steps of conjugate gradients at most, >= 0; well-conditioned layers stop early (static).
        damping: the share of the mean diagonal that is added to a Gram matrix, >= 0: how strongly weights are held to
            where they were, as in `sparsegpt`. None chooses for each matrix, between 1e-6 and 10, the one of the least
            error on data not seen, by generalised cross-validation on a few units; well-known inputs need next to none,
            few samples a lot.

    Returns:
        The parameters, of the treedef of params.

    Raises:
        ValueError: a leaf with pruned weights multiplies no calibrated data, or is of another shape; masks do not fit; a
            Gram matrix is not finite. The message names the leaf.
        TypeError: a leaf with pruned weights is complex.

    Warns:
        DampingWarning: damping was given, and raised.

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
    if damping is not None:
        check_damping(damping, "reconstruct")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"reconstruct takes a whole number of steps, >= 0; got {steps!r}.")
    read_arrays(params, "params")
    require_grams(grams, "reconstruct(params, masks, grams)")
    flat = grams.sites.require_params(params)
    leaves = []
    for path, name, leaf, mask in zip(flat.paths, flat.names, flat.leaves, align_masks(masks, flat), strict=True):
        if is_pruned(mask, leaf, grams, path):
            require_real(leaf, name, "reconstruct")
            sites = sites_of(grams, path, "reconstruct")
            dense, leaf = leaf, kept(leaf, mask)
            for site in sites:
                weights = as_matrices(site, dense)
                gram, samples = grams.of(site).astype(jnp.float32), grams.count(site)
                found = _reconstruct(weights, gram, (site.matrices(mask), samples), damping, steps=steps)
                report(found, name, _ANY if damping is None else damping)
                leaf = site.put(leaf, found.weights)
        else:
            leaf = as_masked(leaf, mask)
        leaves.append(leaf)
    return flat.build(leaves)


@functools.partial(jax.jit, static_argnames="steps")
def _reconstruct(
    weights: jax.Array, grams: jax.Array, others: tuple[jax.Array, jax.Array], damping: float | None, *, steps: int
) -> Solution:
    def solve(weights: jax.Array, factor: Factor, other: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        mask, samples = other
        extra = None if damping is not None else choose_damping(weights, mask, factor, samples, steps=steps)
        return reconstruct_matrix(weights, mask, factor.gram, steps=steps, extra=extra), mask

    return solve_each(solve, weights, grams, others, jnp.float32(0.0 if damping is None else damping))
