"""Scores from the norms of inputs: what a weight contributes to its unit's output, not only how large it is."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._tree._leaves import is_floating
from jaxprune._tree._paths import read_arrays
from jaxprune.scores._leaves import nan_lowest, require_real_leaves, widen
from jaxprune.sites._calibrate import Norms, require_norms
from jaxprune.sites._sites import Site


def wanda(params: Any, norms: Norms) -> Any:
    """Score weights by ``|w_ij| ||x_i||``: the magnitude times the norm of the input over the calibration data.

    Use it with `rules.row_sparsity` (as published), ``rules.n_m(m)`` or any other rule. A parameter that several products
    share is scored by the root of the sum of the squares. The published recipe keeps embeddings and the head (``lm_head``)
    dense; `make_masks` prunes the head like any other kernel unless ``prunable=`` leaves it out.

    Args:
        params: a pytree of arrays.
        norms: from `calibrate_norms` of the function that uses them.

    Returns:
        Scores of the shapes of params, float32; None for leaves that multiply no data (they have no score, and
        `make_masks` refuses to prune them).

    Raises:
        ValueError: norms are of other parameters; the message names the leaf.
        TypeError: a leaf of params is complex.

    >>> import jax.numpy as jnp, jaxprune
    >>> params = {"kernel": jnp.array([[3.0], [-2.0]])}
    >>> norms = jaxprune.calibrate_norms(lambda params, x: x @ params["kernel"], params, [jnp.array([[1.0, 2.0]])])
    >>> wanda(params, norms)["kernel"].ravel().tolist()
    [3.0, 4.0]

    Reference: Sun, Liu, Bair, Kolter, "A Simple and Effective Pruning Approach for Large Language Models", 2023,
    equation 1.
    """

    def squares(weights: jax.Array, norm: jax.Array) -> jax.Array:
        return jnp.square(weights * norm[..., None])

    return _score("wanda", params, norms, squares, jnp.sqrt)


def ria(params: Any, norms: Norms, *, power: float = 0.5) -> Any:
    """Score weights by relative importance times activations: their share of their unit's and of their input's weights.

    ``(|w_ij| / sum_i |w_ij| + |w_ij| / sum_j |w_ij|) ||x_i||^power``, so that no unit and no input loses all its weights
    early. Arguments, results and errors as in `wanda`.

    Args:
        params: a pytree of arrays.
        norms: from `calibrate_norms` of the function that uses them.
        power: how much the norm of the input counts; the reference recommends 0.5 (static).

    >>> import jax.numpy as jnp, jaxprune
    >>> params = {"kernel": jnp.array([[1.0, 1.0], [1.0, 3.0]])}  # rows are inputs
    >>> norms = jaxprune.calibrate_norms(lambda params, x: x @ params["kernel"], params, [jnp.array([[1.0, 16.0]])])
    >>> ria(params, norms)["kernel"].tolist()  # 1/2 + 1/2, 1/4 + 1/2; 4 (1/2 + 1/4), 4 (3/4 + 3/4)
    [[1.0, 0.75], [3.0, 6.0]]

    Reference: Zhang, Bai, Lin, Zhao, Hou, Cannistraci, "Plug-and-Play: An Efficient Post-training Pruning Method for
    Large Language Models", 2024, equations 2 and 3.
    """

    def importance(weights: jax.Array, norm: jax.Array) -> jax.Array:
        sizes = jnp.abs(weights)
        finite = jnp.where(jnp.isfinite(sizes), sizes, 0.0)
        shares = [sizes / jnp.maximum(jnp.sum(finite, axis, keepdims=True), _TINY) for axis in (1, 2)]
        return (shares[0] + shares[1]) * norm[..., None] ** power

    return _score("ria", params, norms, importance, lambda total: total)


# Sums of zeros divide zeros.
_TINY = 1e-30


def _score(
    title: str,
    params: Any,
    norms: Norms,
    of_site: Callable[[jax.Array, jax.Array], jax.Array],
    of_leaf: Callable[[jax.Array], jax.Array],
) -> Any:
    """Score every leaf by the sum over its sites of ``of_site(weights [N, I, O], norms [N, I])``."""
    require_real_leaves(read_arrays(params, "params"), "a score from norms")
    require_norms(norms, f"scores.{title}(params, norms)")
    flat = norms.sites.require_params(params)

    def score(leaf: Any, sites: list[Site]) -> jax.Array:
        weights = widen(leaf)
        total = jnp.zeros_like(weights)
        for site in sites:
            found = of_site(site.matrices(weights), norms.of(site).astype(weights.dtype))
            total = site.put(total, site.matrices(total) + found)
        return nan_lowest(of_leaf(total), weights)

    by_path: dict[str, list[Site]] = {path: [] for path in flat.paths}
    for site in norms.sites:
        by_path[site.path].append(site)
    return flat.build(
        [
            score(leaf, by_path[path]) if by_path[path] and is_floating(leaf) else None
            for path, leaf in zip(flat.paths, flat.leaves, strict=True)
        ]
    )
