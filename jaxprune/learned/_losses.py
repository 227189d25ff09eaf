"""What is added to the loss of soft masks: how far they are from the sparsity that is wanted, and how large a norm they keep."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._dtypes import widen
from jaxprune._tree._axes import Stacked, read_axes
from jaxprune.learned._soft import read_gates, soft_beside, times
from jaxprune.sites._sites import Sites


def sparsity_loss(soft: Any, k: Any) -> jax.Array:
    """Return how far soft masks are from removing the fraction k: ``|mean(1 - mask) - k|``, of all their weights together.

    Patterns need none: they have theirs by construction.

    Args:
        soft: from `soft_masks`.
        k: the fraction to be removed, in [0, 1]; may be traced.

    Returns:
        A float32 scalar, >= 0. (The published weight is 7.)

    Raises:
        ValueError: soft holds no mask, or k is not within [0, 1].

    >>> import jax.numpy as jnp
    >>> float(sparsity_loss({"a": jnp.array([1.0, 0.5]), "b": jnp.array([0.0, 0.5]), "bias": None}, 0.75))  # |0.5 - 0.75|
    0.25

    Reference: LEAP, as in `weight_gates`.
    """
    if isinstance(k, int | float) and not 0 <= k <= 1:
        raise ValueError(f"sparsity_loss takes the fraction removed, within 0 to 1; got k = {k}.")
    leaves = read_gates(soft, "soft").leaves
    count = sum(leaf.size for leaf in leaves)
    # Axis by axis: one sum of a billion numbers in float32 would stop at the first sixteen million.
    kept = [functools.reduce(lambda x, _: jnp.mean(x, -1), range(leaf.ndim), leaf) for leaf in leaves]
    density = sum(leaf.size / count * mean for leaf, mean in zip(leaves, kept, strict=True))
    return jnp.abs(1 - density - k)


def kept_norm(params: Any, soft: Any, *, stacked: Stacked = None, sites: Sites | None = None) -> jax.Array:
    """Return the share of the weights' norms that soft masks keep, ``sum ||mask * W|| / sum ||W||``, the sums over layers.

    Taken from the loss while masks are soft, it keeps what passes through a layer, and the gradients behind it, from fading. The weights
    receive no gradient from it.

    Args:
        params: the parameters, whose gates these are.
        soft: from `soft_masks` or `soft_patterns`.
        stacked: which leaves stack layers, as in `make_masks` (static).
        sites: as in `make_masks`, for the stacks (static).

    Returns:
        A scalar in [0, 1], float32 (float64 stays). (The published weight is 10, falling to 0 in a straight line.)

    Raises:
        ValueError: a soft mask is missing or has another shape, or there is none; `stacked` matches nothing.

    >>> import jax.numpy as jnp
    >>> params = {"a": jnp.array([[3.0, 4.0]]), "b": jnp.array([[5.0]])}
    >>> float(kept_norm(params, {"a": jnp.array([[1.0, 0.0]]), "b": jnp.array([[0.4]])}))  # (3 + 2) / (5 + 5)
    0.5

    Reference: LEAP, as in `weight_gates`. (Fang et al., "MaskLLM: Learnable Semi-Structured Sparsity for Large Language Models", 2024,
    take the squares of the norms instead, times 1e-5.)
    """
    tree, masks = soft_beside(params, soft)
    kept, whole = [], []
    for leaf, mask, axes in zip(tree.leaves, masks, read_axes(tree, stacked, sites), strict=True):
        if mask is None:
            continue
        own = tuple(axis for axis in range(jnp.ndim(leaf)) if axis not in axes.stack)
        weights = jax.lax.stop_gradient(jnp.asarray(leaf))
        kept.append(jnp.sum(_norms(times(weights, mask), own)))
        whole.append(jnp.sum(_norms(widen(weights), own)))
    if not kept:
        raise ValueError("soft is empty. Make it by learned.soft_masks or learned.soft_patterns.")
    return sum(kept[1:], kept[0]) / sum(whole[1:], whole[0])


def _norms(values: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    squares = jnp.square(jnp.abs(values))
    for axis in sorted(axes, reverse=True):
        squares = jnp.sum(squares, axis)
    # The slope of a root at zero is infinite; a layer of zeros has none.
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)
