"""How much to remove of each layer: one sparsity for all layers together becomes one for each."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _guard, rules
from jaxprune._leaf_scores import nan_lowest, read_params
from jaxprune._masks import make_masks
from jaxprune._paths import flatten, is_floating
from jaxprune._prunable import Predicate, Stacked, choose, stack_axes
from jaxprune.oneshot._calibrate import Grams
from jaxprune.oneshot._damping import factorise, inverse_root
from jaxprune.oneshot._solve import as_matrices, check_damping, sites_of


def allocate_by_loss(
    params: Any,
    k: Any,
    *,
    scores: Any,
    max_sparsity: float = 0.95,
    prunable: Predicate | Any = None,
    stacked: Stacked | None = None,
) -> Any:
    """Share a sparsity out among layers by second-order loss: to each what one threshold for all would remove of it.

    Give the result to any method as its k: ``k = allocate_by_loss(params, 0.7, scores=scores.fisher(params, squares))``, then
    ``admm(params, grams, k)``. Together the layers lose as many weights as `rules.global_sparsity` removes, exactly.

    Args:
        params: a pytree of arrays.
        k: the sparsity of all prunable weights together, in [0, 1]; may be traced.
        scores: the loss that every weight's removal costs, comparable between layers: `scores.fisher` (the diagonal of
            the Fisher information), or `scores.obs` (from Gram matrices, without gradients).
        max_sparsity: the most that may be removed of any layer (static).
        prunable: as in `make_masks`.
        stacked: as in `make_masks`; a stack then has a sparsity for each of its layers.

    Returns:
        A tree prefix of sparsities: a float for each prunable leaf (an array for a stack, or where k is traced), None
        for the others.

    Raises:
        ValueError: as `make_masks`.

    >>> import jax.numpy as jnp
    >>> params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.full((2, 2), 3.0)}}
    >>> losses = {"a": {"kernel": jnp.array([[1.0, 2.0], [3.0, 8.0]])}, "b": {"kernel": jnp.array([[4.0, 5.0], [6.0, 7.0]])}}
    >>> allocate_by_loss(params, 0.5, scores=losses)
    {'a': {'kernel': 0.75}, 'b': {'kernel': 0.25}}
    """

    def rule(scores: Any, k: Any) -> Any:
        return rules.global_sparsity(scores, k, max_sparsity=max_sparsity)

    masks = flatten(make_masks(params, k, rule=rule, scores=scores, prunable=prunable, stacked=stacked), "masks")
    flat = read_params(params)
    stacks = stack_axes(stacked, flat)
    chosen = choose(prunable, params, flat, stacks)
    return flat.treedef.unflatten(
        [
            _removed(mask, stack) if fits else None
            for mask, stack, fits in zip(masks.leaves, stacks, chosen, strict=True)
        ]
    )


def _removed(mask: jax.Array, stack: int) -> Any:
    axes = tuple(range(stack, mask.ndim))
    if not _guard.is_known(mask):
        return jnp.mean(~mask, axes, dtype=jnp.float32)
    found = np.mean(~np.asarray(mask), axes, dtype=np.float64)
    return float(found) if found.ndim == 0 else jnp.asarray(found, jnp.float32)


def obs(params: Any, grams: Grams, *, damping: float = 0.01) -> Any:
    """Score weights by optimal brain surgery: the error a layer makes without the weight, the others making up for it.

    ``w_ij^2 / [H^-1]_ii / 2`` with H the damped Gram matrix, over the layer's energy ``tr(W^T H W) / 2``, so that scores
    are relative errors and compare between layers. Needs no gradients. What `sparsegpt` ranks by at its first input.

    Args:
        params: a pytree of arrays.
        grams: from `calibrate_grams` of the function that uses them.
        damping: as in `sparsegpt`.

    Returns:
        Scores of the shapes of params, float32; None for leaves that multiply no data, and for tables of which rows are
        read.

    Raises:
        ValueError: grams are of other parameters; the message names the leaf.

    >>> import jax.numpy as jnp, jaxprune
    >>> params = {"kernel": jnp.array([[1.0], [2.0]])}
    >>> grams = jaxprune.calibrate_grams(lambda params, x: x @ params["kernel"], params, [jnp.eye(2)])
    >>> [round(score, 6) for score in obs(params, grams, damping=0.0)["kernel"].ravel().tolist()]
    [0.2, 0.8]

    Reference: Hassibi, Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", 1993, equation 5.
    """
    check_damping(damping, "scores.obs")
    read_params(params)
    flat = grams.sites.check(params)
    known = {site.path for site in grams.sites} - set(grams.sites.tables)

    def score(path: str, leaf: Any) -> jax.Array:
        found = jnp.zeros(np.shape(leaf), jnp.float32)
        for site in sites_of(grams, path, "scores.obs"):
            found = site.put(found, _obs(as_matrices(site, leaf), grams.of(site), jnp.float32(damping)))
        return nan_lowest(found, leaf)

    return flat.treedef.unflatten(
        [
            score(path, leaf) if path in known and is_floating(leaf) else None
            for path, leaf in zip(flat.paths, flat.leaves, strict=True)
        ]
    )


@jax.jit
def _obs(weights: jax.Array, grams: jax.Array, damping: jax.Array) -> jax.Array:
    def of_one(weights: jax.Array, gram: jax.Array) -> jax.Array:
        factor = factorise(gram, damping)
        weights = jnp.where(factor.dead[:, None], 0.0, weights)
        energy = jnp.sum(weights * jnp.matmul(factor.gram, weights, precision=jax.lax.Precision.HIGHEST))
        # The diagonal of the inverse U^T U.
        inverse = jnp.sum(jnp.square(inverse_root(factor.root)), 0)
        return jnp.square(weights) / inverse[:, None] / jnp.where(energy > 0, energy, 1.0)

    return jax.lax.map(lambda each: of_one(*each), (weights, grams))
