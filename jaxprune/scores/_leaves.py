"""Score every leaf of a tree of parameters: what all scores have in common."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._dtypes import wide
from jaxprune._tree._leaves import is_floating, require_real
from jaxprune._tree._paths import Tree


def widen(x: jax.typing.ArrayLike) -> jax.Array:
    """Return x in the dtype that scores are computed in: float32; float64 stays."""
    dtype = jnp.result_type(x)
    if dtype == jax.dtypes.float0:  # what jax.grad(..., allow_int=True) returns for integers
        return jnp.zeros(np.shape(x), jnp.float32)
    return jnp.asarray(x, wide(dtype))


def require_real_leaves(flat: Tree, title: str) -> None:
    """Raise a TypeError that names the first leaf of complex numbers."""
    for name, leaf in flat.named():
        require_real(leaf, name, title)


def nan_lowest(scores: jax.Array, *where: jax.Array) -> jax.Array:
    """Score minus infinity where the score, or one of the arrays it comes from, is NaN."""
    nan = functools.reduce(jnp.logical_or, map(jnp.isnan, where), jnp.isnan(scores))
    return jnp.where(nan, -jnp.inf, scores)


def leaf_score(score: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Compile the score of one leaf, ``(weights, *evidence) -> scores``, all in the dtype that `widen` gives.

    NaN weights and NaN scores become minus infinity.
    """

    @jax.jit
    @functools.wraps(score)
    def scored(weights: jax.Array, *evidence: jax.Array) -> jax.Array:
        weights = widen(weights)
        return nan_lowest(score(weights, *map(widen, evidence)), weights)

    return scored


def floats(flat: Tree) -> list[jax.Array]:
    """Return the floating-point leaves, which may be differentiated."""
    return [jnp.asarray(leaf) for leaf in flat.leaves if is_floating(leaf)]


def with_floats(flat: Tree, replacements: Sequence[jax.Array]) -> list[Any]:
    """Return all leaves, the floating-point ones replaced in order."""
    given = iter(replacements)
    return [next(given) if is_floating(leaf) else leaf for leaf in flat.leaves]


def map_leaves(score: Callable[..., jax.Array], flat: Tree, *columns: Sequence[Any]) -> Any:
    """Return the tree of ``score(leaf, *entries)``, the entries being the leaf's in each column.

    A leaf that is not floating-point has no score: None.
    """
    return flat.build(
        [
            score(jnp.asarray(leaf), *entries) if is_floating(leaf) else None
            for leaf, *entries in zip(flat.leaves, *columns, strict=True)
        ]
    )
