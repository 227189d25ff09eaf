"""Several reductions of one array in one pass, without an array of what is reduced."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune._tree._sharding import without_explicit_axes

# An axis is reduced in as many parts as it may have shards: within them where they lie, then over them.
_MOST_SHARDS = 256

# Of two arrays to one, elementwise: one of the two.
Operation = Callable[[jax.Array, jax.Array], jax.Array]
ADD, MAX = lax.add, lax.max


def reduce_fused(
    arrays: Sequence[jax.Array], operations: Sequence[Operation], axes: tuple[int, ...]
) -> list[jax.Array]:
    """Reduce each array by its operation along `axes`, kept as axes of size 1.

    XLA's CPU compiler writes what a single reduction reduces down in full, a conversion or a comparison too; of several
    that are one reduction it computes it on the way. That it partitions by gathers where an axis is sharded, so sums
    within a shard come first. Other compilers fuse plain reductions.

    Args:
        arrays: of one shape, computed elementwise from others.
        operations: one for each.
        axes: to reduce, in rising order.

    Returns:
        An array for each.
    """
    alone = len(arrays) == 1

    def parts(*arrays: jax.Array) -> list[jax.Array]:
        shape, inner = [], []
        for axis, n in enumerate(arrays[0].shape):
            count = math.gcd(n, _MOST_SHARDS) if axis in axes else n
            shape += [count, n // count] if axis in axes else [n]
            inner += [len(shape) - 1] if axis in axes else []
        several = list(zip(arrays, operations, strict=True))
        if alone:
            several.append(((arrays[0] == 0).astype(jnp.int32), ADD))
        # The equation keeps this function, which is to keep no array that is being traced.
        combine = tuple(operation for _, operation in several)
        found = lax.reduce(
            tuple(array.reshape(shape) for array, _ in several),
            tuple(_start(array.dtype, operation) for array, operation in several),
            lambda a, b: tuple(together(x, y) for x, y, together in zip(a, b, combine, strict=True)),
            inner,
        )
        totals = plain(*found[: len(arrays)])
        # One reduction by itself would not be fused, nor beside one that nobody needs. No count is below zero, which only
        # we know.
        return (
            [totals[0] + jnp.minimum(jnp.sum(found[1], axes, keepdims=True), 0).astype(totals[0].dtype)]
            if alone
            else totals
        )

    def plain(*arrays: jax.Array) -> list[jax.Array]:
        return [
            (
                jnp.sum(array, axes, dtype=array.dtype, keepdims=True)
                if operation is ADD
                else jnp.max(array, axes, keepdims=True)
            )
            for array, operation in zip(arrays, operations, strict=True)
        ]

    if not axes:
        return list(arrays)
    fused = without_explicit_axes(parts, jax.eval_shape(plain, *arrays)[0])
    return lax.platform_dependent(*arrays, cpu=fused, default=plain)


def _start(dtype: np.dtype, operation: Operation) -> np.ndarray:
    """The number that changes nothing."""
    if operation is ADD:
        return np.zeros((), dtype)
    return np.asarray(-np.inf if jnp.issubdtype(dtype, jnp.inexact) else jnp.iinfo(dtype).min, dtype)
