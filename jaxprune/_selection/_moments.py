"""Statistics of a layer's weights: accurate at any size, blind to NaN and infinity, two passes over the array."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact

from jaxprune._dtypes import widen

# Squares of magnitudes above this, and of their inverses, are far from the ends of float32.
_SMALL = 1e-15


def _finite_mean(x: jax.Array, finite: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    # Counting what is missing keeps the count exact in float32 for any layer that is nearly finite.
    missing = jnp.sum(jnp.where(finite, 0.0, 1.0).astype(x.dtype), axes, keepdims=True)
    size = float(functools.reduce(lambda n, axis: n * x.shape[axis], axes, 1))
    return jnp.sum(jnp.where(finite, x, jnp.zeros_like(x)), axes, keepdims=True) / (size - missing)


def _scaled(x: jax.Array, axes: tuple[int, ...], statistic: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Take a statistic of numbers brought near to 1 by an exact power of two, so that no sum or square overflows or vanishes."""
    largest = jnp.max(jnp.where(jnp.isfinite(x), jnp.abs(x), 0.0), axes, keepdims=True)
    one = jnp.ones_like(largest)
    down = jnp.where(largest > 1 / _SMALL, 2.0**-100 * one, jnp.where(largest < _SMALL, 2.0**80 * one, one))
    back = jnp.where(largest > 1 / _SMALL, 2.0**100 * one, jnp.where(largest < _SMALL, 2.0**-80 * one, one))
    return back * statistic(x * down)


def _careful_variance(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    finite = jnp.isfinite(x)
    centred = x - _finite_mean(x, finite, axes)
    # The mean is rounded; what is left of it after centring counts where it is large.
    rest = _finite_mean(centred, finite, axes)
    return jnp.maximum(_finite_mean(jnp.square(centred), finite, axes) - jnp.square(rest), 0)


def std(x: Inexact[Array, "*shape"], axes: tuple[int, ...]) -> Float[Array, "*kept"]:
    """Population standard deviation of the finite entries along `axes`, kept as axes of size 1, in float32.

    A variance as the mean square less the squared mean is half a pass cheaper than the centred one and as good as
    long as the mean is small; layers where it is not, with a NaN or infinity, or of numbers whose squares leave the range
    of the dtype, take the centred way. Of complex numbers it is the root of the mean square distance from their mean.
    """
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.hypot(std(jnp.real(x), axes), std(jnp.imag(x), axes))
    mean = jnp.mean(widen(x), axes, keepdims=True)
    # Without the barrier XLA's CPU backend computes both sums in one loop that it cannot vectorise.
    square = jnp.mean(jnp.square(widen(lax.optimization_barrier(x))), axes, keepdims=True)
    variance = square - jnp.square(mean)
    sound = jnp.isfinite(variance) & (jnp.square(mean) <= variance) & (variance > _SMALL**2)

    def careful(x: jax.Array) -> jax.Array:
        return jnp.sqrt(_careful_variance(x, axes))

    return lax.cond(jnp.all(sound), lambda: jnp.sqrt(variance), lambda: _scaled(widen(x), axes, careful))


def mean(x: Inexact[Array, "*shape"], axes: tuple[int, ...], *, magnitude: bool = False) -> Float[Array, "*kept"]:
    """Mean of the finite entries, or of their magnitudes, along `axes`, kept as axes of size 1, in float32."""
    rough = jnp.mean(widen(_signless(x, magnitude)), axes, keepdims=True)
    # The rounding errors of a sum of equal signs do not cancel; those of its remainder are a million times smaller.
    plain = rough + jnp.mean(widen(_signless(x, magnitude)) - rough, axes, keepdims=True)

    def careful() -> jax.Array:
        values = widen(_signless(x, magnitude))
        return _scaled(values, axes, lambda scaled: _finite_mean(scaled, jnp.isfinite(scaled), axes))

    return lax.cond(jnp.all(jnp.isfinite(plain)), lambda: plain, careful)


def largest(x: Inexact[Array, "*shape"], axes: tuple[int, ...], *, magnitude: bool = False) -> Float[Array, "*kept"]:
    """Largest finite entry, or magnitude, along `axes`, kept as axes of size 1, in float32; NaN where none is finite."""
    plain = widen(jnp.max(_signless(lax.optimization_barrier(x), magnitude), axes, keepdims=True))

    def careful() -> jax.Array:
        values = widen(_signless(x, magnitude))
        found = jnp.max(jnp.where(jnp.isfinite(values), values, -jnp.inf), axes, keepdims=True)
        return jnp.where(found == -jnp.inf, jnp.nan, found)

    return lax.cond(jnp.all(jnp.isfinite(plain)), lambda: plain, careful)


def _signless(x: jax.Array, magnitude: bool) -> jax.Array:
    # For use within each branch of a cond: what a branch takes from outside is written out as a whole array.
    return jnp.abs(x) if magnitude else x
