"""The bracket around a number that is sought, and where in it to count next."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune._selection import _counts
from jaxprune._selection._counts import Count

# Seven thresholds cut a bracket into eight: a float32 takes at most eleven such passes, a bfloat16 six.
_BITS = 3
THRESHOLDS = (1 << _BITS) - 1
# The first look is at zero (a pruned layer is full of it), at the smallest number above it, at the end of all numbers,
# and at powers of two among which nearly all weights and scores lie.
FIRST_EXPONENTS = (-20, -12, -7, -2)
# An interpolation assumes evenly spread numbers, which is fair within a few octaves (powers of two). Its thresholds
# surround its guess at these multiples of the error to be expected.
MAX_OCTAVES = 2.8
_AROUND = (-2.5, -1.0, -0.4, 0.0, 0.4, 1.0, 2.5)
# Below this gain, the bracket's old width over its new one, an interpolation has failed and is not tried again.
MIN_GAIN = 4


class Bracket(NamedTuple):
    """Bounds of the number sought: at most what is left to remove lies below `low`, more than that below `high`."""

    low: jax.Array  # [*pools]
    high: jax.Array  # [*pools]
    below_low: Count  # [members, *pools], entries of each array of a pool below low
    below_high: Count  # [members, *pools]
    smooth: jax.Array  # [*pools], whether interpolation has not failed yet
    thresholds: jax.Array  # [thresholds, *pools], to count below next; state, lest XLA work them out for every entry


def narrow(bracket: Bracket, counts: Count, totals: Count, target: Count) -> Bracket:
    """Move the bracket's ends to the nearest of its thresholds, which rise, by what lies below them."""

    def at(values: Any, i: int) -> Any:
        return jax.tree.map(lambda array: lax.index_in_dim(array, i, keepdims=False), values)

    fits = [_counts.less_equal(at(totals, i), target) for i in range(THRESHOLDS)]
    low, high, below_low, below_high = bracket[:4]
    for i in range(THRESHOLDS):
        low = jnp.where(fits[i], at(bracket.thresholds, i), low)
        below_low = _counts.where(fits[i][None], at(counts, i), below_low)
    for i in reversed(range(THRESHOLDS)):
        high = jnp.where(fits[i], high, at(bracket.thresholds, i))
        below_high = _counts.where(fits[i][None], below_high, at(counts, i))
    return bracket._replace(low=low, high=high, below_low=below_low, below_high=below_high)


def even_steps(width: jax.Array) -> jax.Array:
    """Steps that cut the bracket into eight parts: [*batch] to [thresholds, *batch]."""
    numbers = along(np.arange(1, THRESHOLDS + 1, dtype=width.dtype), width.ndim)
    return (width[None] >> _BITS) * numbers + (((width[None] & THRESHOLDS) * numbers) >> _BITS)


def guesses(wanted: jax.Array, between: jax.Array, width: jax.Array, octaves: jax.Array) -> jax.Array:
    """Steps around the place where, of the entries `between` the bracket's ends, `wanted` lie below."""
    between = jnp.maximum(between, 1)
    fraction = jnp.clip((wanted + 0.5) / between, 0, 1)
    # Errors by chance, by a density that differs from end to end, and by the distance from one number to the next.
    chance = 1.5 * jnp.sqrt(fraction * (1 - fraction) / between)
    error = jnp.maximum(jnp.maximum(chance, octaves / (3 + 3 * octaves)), 0.5 / width.astype(jnp.float32))
    places = fraction[None] + along(np.asarray(_AROUND, np.float32), width.ndim) * error[None]
    # A little below 1, to stay within the range of the integers.
    return (jnp.clip(places, 0, 1 - 2**-20) * width.astype(jnp.float32)[None]).astype(width.dtype)


def width_of(bracket: Bracket) -> jax.Array:
    """How many numbers the bracket holds, unsigned, since they may be more than the largest signed one."""
    return lax.bitcast_convert_type(bracket.high - bracket.low, np.dtype(f"u{bracket.low.dtype.itemsize}"))


def along(table: np.ndarray, dims: int) -> np.ndarray:
    """A constant with `dims` axes of length 1 more, for the batch."""
    return table.reshape(*table.shape, *[1] * dims)
