"""Drop and grow: which weights of a layer are replaced, and the optimizer's state of those that come."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._dtypes import with_infinities
from jaxprune._jaxpr._equations import evaluate_body, part, trace
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


class Moments:
    """The optimizer's state, and which of its arrays belong to which parameter weight by weight.

    An array belongs to a parameter when its path ends in the parameter's path and it has its shape: so the moments of
    Adam, the accumulators of MultiSteps and the branches of a partition are found alike. Statistics that weights share
    (the row and column sums of Adafactor) are nobody's. (Optax's own ``tree.map_params`` needs an ``init`` that runs on
    a placeholder, which labels made by a function do not allow.)
    """

    def __init__(self, state: Any, init: Callable[[Any], Any], params: Any):
        """Take the state of any optimizer, what makes a fresh one, and the parameters."""
        self._flat = flatten(state, "state")
        self._leaves = list(self._flat.leaves)
        tree = flatten(params, "params")
        self._own: dict[str, list[int]] = {}
        for i, (path, leaf) in enumerate(zip(self._flat.paths, self._leaves, strict=True)):
            owner = tree.owner_of(path)
            if owner is not None and jnp.shape(leaf) == tree.shapes[owner] and is_floating(leaf):
                self._own.setdefault(owner, []).append(i)
        self._arguments = jax.tree.leaves(params)
        self._fresh, shapes = trace(init, params)
        self._places = {path: i for i, path in enumerate(flatten(shapes, "the fresh state").paths)}

    @property
    def state(self) -> Any:
        """The state as it is now."""
        return self._flat.build(self._leaves)

    def of(self, path: str) -> list[jax.Array]:
        """The arrays of the parameter at a path."""
        return [self._leaves[i] for i in self._own.get(path, [])]

    def put(self, path: str, arrays: Sequence[jax.Array]) -> None:
        """Replace the arrays of the parameter at a path."""
        for i, array in zip(self._own.get(path, []), arrays, strict=True):
            self._leaves[i] = array

    def refreshed(self, path: str, arrays: Sequence[jax.Array], grown: jax.Array) -> list[jax.Array]:
        """Return the arrays of the parameter at a path with what a fresh state has where a weight has grown."""
        return [
            jnp.where(grown, self._start(i), array) for i, array in zip(self._own.get(path, []), arrays, strict=True)
        ]

    def _start(self, i: int) -> jax.Array:
        # Only what this one array needs, or a program for n leaves would hold n fresh states.
        only = part(self._fresh, self._places[self._flat.paths[i]])
        return evaluate_body(only, self._arguments)[0]
