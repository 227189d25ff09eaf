"""Drop and grow: which weights of a layer are replaced, and the optimizer's state of those that come."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._dtypes import with_infinities
from jaxprune._selection import _counts
from jaxprune._selection._largest import keep_largest
from jaxprune._tree._leaves import is_floating
from jaxprune._tree._paths import flatten


def drop_and_grow(
    weight: jax.Array, mask: jax.Array, wanted: jax.Array, fraction: jax.Array, stack: tuple[int, ...] = ()
) -> jax.Array:
    """Drop the smallest weights of a layer, and keep as many as before: the rest and the most wanted others.

    Exactly ``floor(fraction * kept)`` weights go, and as many come, whatever the ties: among equals the lower index
    stays or comes. A dropped weight may be wanted again.

    Args:
        weight: the layer, any floating dtype.
        mask: bool, True = keep.
        wanted: float32, >= 0, larger = grown first; NaN is not wanted.
        fraction: the share of kept weights to drop, in [0, 1]; may be traced.
        stack: the axes that count layers, each of which is treated by itself.

    Returns:
        The new mask, True = keep.
    """
    axes = tuple(axis for axis in range(weight.ndim) if axis not in stack)
    size = _counts.from_int(math.prod(weight.shape[axis] for axis in axes))
    kept = _counts.count_true(mask, axes)
    removed = _counts.subtract(size, kept)
    dropped = _counts.minimum(_counts.from_float(jnp.clip(fraction, 0, 1) * _counts.to_float(kept)), kept)
    # Pruned weights rank below all others (NaN), then the smallest ones go.
    standing = jnp.where(mask, with_infinities(weight), jnp.nan)
    survivors = mask & keep_largest(standing, _counts.add(removed, dropped), batch=stack, magnitude=True)
    # Survivors rank above all others, infinitely wanted ones included.
    finite = jnp.nan_to_num(wanted, posinf=jnp.finfo(jnp.float32).max)
    ranked = jnp.where(survivors, jnp.full_like(finite, jnp.inf), finite)
    return keep_largest(ranked, removed, batch=stack, magnitude=False)


def refresh(state: Any, init: Callable[[], Any], grown: Any) -> Any:
    """Give grown weights the optimizer state that they would have at the start, whatever the optimizer.

    A leaf of the state belongs to a parameter when its path ends in the parameter's path and it has its shape: so the
    moments of Adam, the accumulators of MultiSteps and the branches of a partition are found alike. Statistics that
    weights share (the row and column sums of Adafactor) stay. (Optax's own ``tree.map_params`` needs an ``init`` that
    runs on a placeholder, which labels made by a function do not allow.)

    Args:
        state: the state of any optimizer.
        init: makes a fresh state of the same tree.
        grown: for each parameter, by path, True where a weight has grown.

    Returns:
        The state, in the same treedef, shapes and dtypes.
    """
    masks = flatten(grown, "masks")
    flat = flatten(state, "state")
    fresh = flat.aligned(flatten(init(), "the fresh state"))

    def start_anew(path: str, leaf: Any, start: Any) -> Any:
        owner = masks.owner_of(path)
        mask = None if owner is None else masks.by_path[owner]
        if mask is None or jnp.shape(leaf) != mask.shape or not is_floating(leaf):
            return leaf
        return jnp.where(mask, start, leaf)

    return flat.build([start_anew(*entry) for entry in zip(flat.paths, flat.leaves, fresh, strict=True)])
