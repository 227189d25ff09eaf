"""Optimal brain surgery as a score, from Gram matrices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._tree._leaves import is_floating
from jaxprune._tree._paths import read_arrays
from jaxprune.scores._leaves import nan_lowest, require_real_leaves
from jaxprune.sites._calibrate import Grams, require_grams
from jaxprune.sites._factorise import check_damping, factorise, inverse_root
from jaxprune.sites._matrices import as_matrices, sites_of


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
        TypeError: a leaf of params is complex.

    >>> import jax.numpy as jnp, jaxprune
    >>> params = {"kernel": jnp.array([[1.0], [2.0]])}
    >>> grams = jaxprune.calibrate_grams(lambda params, x: x @ params["kernel"], params, [jnp.eye(2)])
    >>> [round(score, 6) for score in obs(params, grams, damping=0.0)["kernel"].ravel().tolist()]
    [0.2, 0.8]

    Reference: Hassibi, Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", 1993, equation 5.
    """
    check_damping(damping, "scores.obs")
    require_real_leaves(read_arrays(params, "params"), "scores.obs")
    require_grams(grams, "scores.obs(params, grams)")
    flat = grams.sites.require_params(params)
    known = {site.path for site in grams.sites} - set(grams.sites.tables)

    def score(path: str, leaf: Any) -> jax.Array:
        found = jnp.zeros(np.shape(leaf), jnp.float32)
        for site in sites_of(grams, path, "scores.obs"):
            found = site.put(
                found, _obs(as_matrices(site, leaf), grams.of(site).astype(jnp.float32), jnp.float32(damping))
            )
        return nan_lowest(found, leaf)

    return flat.build(
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
