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
# An interpolation assumes evenly spread numbers, which is fair within a few octaves (powers of two). Its thresholds
# surround its guess at these multiples of the error to be expected.
_MAX_OCTAVES = 2.8
_AROUND = (-2.5, -1.0, -0.4, 0.0, 0.4, 1.0, 2.5)
# Below this gain, the bracket's old width over its new one, an interpolation has failed and is not tried again.
_MIN_GAIN = 4


class Bracket(NamedTuple):
    """Bounds of the number sought: at most what is left to remove lies below `low`, more than that below `high`.

    The counts are of each pool where each pool seeks a number, and of every pool where all of them seek one.
    """

    low: jax.Array  # [*pools] or ()
    high: jax.Array  # [*pools] or ()
    below_low: Count  # [*pools], entries of each pool below low
    below_high: Count  # [*pools]
    smooth: jax.Array  # as low, whether interpolation has not failed yet
    thresholds: jax.Array  # [thresholds, ...], to count below next; state, lest XLA work them out for every entry


def narrow(before: Bracket, counts: Count, totals: Count, target: Count, octave: Any) -> Bracket:
    """Move the bracket's ends to the nearest of its thresholds, which rise.

    Args:
        before: the bracket, whose thresholds were counted below.
        counts: what lies below them of each pool, [thresholds, *pools].
        totals: what lies below them of those that seek the number together.
        target: how many shall lie below the number sought.
        octave: how many numbers there are from one power of two to the next.
    """

    def at(values: Any, i: int) -> Any:
        return jax.tree.map(lambda array: lax.index_in_dim(array, i, keepdims=False), values)

    fits = [_counts.less_equal(at(totals, i), target) for i in range(THRESHOLDS)]
    low, high, below_low, below_high = before[:4]
    for i in range(THRESHOLDS):
        low = jnp.where(fits[i], at(before.thresholds, i), low)
        below_low = _counts.where(fits[i], at(counts, i), below_low)
    for i in reversed(range(THRESHOLDS)):
        high = jnp.where(fits[i], high, at(before.thresholds, i))
        below_high = _counts.where(fits[i], below_high, at(counts, i))
    after = before._replace(low=low, high=high, below_low=below_low, below_high=below_high)
    failed = _guessing(before, octave) & (_width(after) > _width(before) // _MIN_GAIN)
    return after._replace(smooth=after.smooth & ~failed)


def place(bracket: Bracket, wanted: Count, between: Count, octave: Any) -> Bracket:
    """Count next around an interpolation if that may work, else evenly.

    Args:
        bracket: whose thresholds are to be placed.
        wanted: how many of the entries between its ends shall lie below the number sought.
        between: how many there are.
        octave: as in `narrow`.
    """
    width = _width(bracket)
    guessed = _guesses(_counts.to_float(wanted), _counts.to_float(between), width, _octaves(bracket, octave))
    steps = jnp.where(_guessing(bracket, octave)[None], guessed, _even_steps(width))
    steps = jnp.maximum(jnp.minimum(steps, width[None] - 1), 1)
    return bracket._replace(thresholds=bracket.low[None] + lax.bitcast_convert_type(steps, bracket.low.dtype))


def _even_steps(width: jax.Array) -> jax.Array:
    """Steps that cut the bracket into eight parts: [*batch] to [thresholds, *batch]."""
    numbers = along(np.arange(1, THRESHOLDS + 1, dtype=width.dtype), width.ndim)
    return (width[None] >> _BITS) * numbers + (((width[None] & THRESHOLDS) * numbers) >> _BITS)


def _guesses(wanted: jax.Array, between: jax.Array, width: jax.Array, octaves: jax.Array) -> jax.Array:
    """Steps around the place where, of the entries `between` the bracket's ends, `wanted` lie below."""
    between = jnp.maximum(between, 1)
    fraction = jnp.clip((wanted + 0.5) / between, 0, 1)
    # Errors by chance, by a density that differs from end to end, and by the distance from one number to the next.
    chance = 1.5 * jnp.sqrt(fraction * (1 - fraction) / between)
    error = jnp.maximum(jnp.maximum(chance, octaves / (3 + 3 * octaves)), 0.5 / width.astype(jnp.float32))
    places = fraction[None] + along(np.asarray(_AROUND, np.float32), width.ndim) * error[None]
    # A little below 1, to stay within the range of the integers.
    return (jnp.clip(places, 0, 1 - 2**-20) * width.astype(jnp.float32)[None]).astype(width.dtype)


def _guessing(bracket: Bracket, octave: Any) -> jax.Array:
    return bracket.smooth & (_octaves(bracket, octave) <= _MAX_OCTAVES)


def _octaves(bracket: Bracket, octave: Any) -> jax.Array:
    """The width in octaves."""
    return _width(bracket).astype(jnp.float32) / octave


def _width(bracket: Bracket) -> jax.Array:
    """How many numbers the bracket holds, unsigned, since they may be more than the largest signed one."""
    return lax.bitcast_convert_type(bracket.high - bracket.low, np.dtype(f"u{bracket.low.dtype.itemsize}"))


def along(table: np.ndarray, dims: int) -> np.ndarray:
    """A constant with `dims` axes of length 1 more, for the batch."""
    return table.reshape(*table.shape, *[1] * dims)
