"""Statistics of a layer's weights: accurate at any size, blind to NaN and infinity, two passes over the array."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact

from jaxprune._dtypes import widen
from jaxprune._selection._fused import ADD, MAX, reduce_fused

# Squares of magnitudes above this, and of their inverses, are far from the ends of float32.
_SMALL = 1e-15


def _size(x: jax.Array, axes: tuple[int, ...]) -> float:
    return float(math.prod(x.shape[axis] for axis in axes))


def _finite_means(x: jax.Array, terms: Sequence[jax.Array], axes: tuple[int, ...]) -> list[jax.Array]:
    """Means of terms over the entries where x is finite."""
    finite = jnp.isfinite(x)
    # Counting what is missing keeps the count exact in float32 for any layer that is nearly finite.
    missing = jnp.where(finite, 0.0, 1.0).astype(x.dtype)
    known = [jnp.where(finite, term, jnp.zeros_like(term)) for term in terms]
    gone, *sums = reduce_fused([missing, *known], [ADD] * (1 + len(known)), axes)
    return [total / (_size(x, axes) - gone) for total in sums]


def _scaled(x: jax.Array, axes: tuple[int, ...], statistic: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Take a statistic of numbers brought near to 1 by an exact power of two, so that no sum or square overflows or vanishes."""
    [largest] = reduce_fused([jnp.where(jnp.isfinite(x), jnp.abs(x), 0.0)], [MAX], axes)
    one = jnp.ones_like(largest)
    down = jnp.where(largest > 1 / _SMALL, 2.0**-100 * one, jnp.where(largest < _SMALL, 2.0**80 * one, one))
    back = jnp.where(largest > 1 / _SMALL, 2.0**100 * one, jnp.where(largest < _SMALL, 2.0**-80 * one, one))
    return back * statistic(x * down)


def _careful_variance(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    [mean] = _finite_means(x, [x], axes)
    centred = x - mean
    # The mean is rounded; what is left of it after centring counts where it is large.
    rest, square = _finite_means(x, [centred, jnp.square(centred)], axes)
    return jnp.maximum(square - jnp.square(rest), 0)


def _is_narrow(x: jax.Array) -> bool:
    # Converted on the way: XLA's CPU compiler would write a float32 copy down for each sum.
    return x.dtype.itemsize < 4


def std(x: Inexact[Array, "*shape"], axes: tuple[int, ...]) -> Float[Array, "*kept"]:
    """Population standard deviation of the finite entries along `axes`, kept as axes of size 1, in float32.

    A variance as the mean square less the squared mean is half a pass cheaper than the centred one and as good as
    long as the mean is small; layers where it is not, with a NaN or infinity, or of numbers whose squares leave the range
    of the dtype, take the centred way. Of complex numbers it is the root of the mean square distance from their mean.
    """
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.hypot(std(jnp.real(x), axes), std(jnp.imag(x), axes))
    if _is_narrow(x):
        sums = reduce_fused([widen(x), jnp.square(widen(x))], [ADD, ADD], axes)
        mean, square = (total / _size(x, axes) for total in sums)
    else:
        mean = jnp.mean(x, axes, keepdims=True)
        # Without the barrier XLA's CPU backend computes both sums in one loop that it cannot vectorise.
        square = jnp.mean(jnp.square(lax.optimization_barrier(x)), axes, keepdims=True)
    variance = square - jnp.square(mean)
    sound = jnp.isfinite(variance) & (jnp.square(mean) <= variance) & (variance > _SMALL**2)

    def careful(x: jax.Array) -> jax.Array:
        return jnp.sqrt(_careful_variance(x, axes))

    return lax.cond(jnp.all(sound), lambda: jnp.sqrt(variance), lambda: _scaled(widen(x), axes, careful))


def mean(x: Inexact[Array, "*shape"], axes: tuple[int, ...], *, magnitude: bool = False) -> Float[Array, "*kept"]:
    """Mean of the finite entries, or of their magnitudes, along `axes`, kept as axes of size 1, in float32."""
    [total] = reduce_fused([widen(_signless(x, magnitude))], [ADD], axes)
    rough = total / _size(x, axes)
    # The rounding errors of a sum of equal signs do not cancel; those of its remainder are a million times smaller.
    [total] = reduce_fused([widen(_signless(x, magnitude)) - rough], [ADD], axes)
    plain = rough + total / _size(x, axes)

    def careful() -> jax.Array:
        values = widen(_signless(x, magnitude))
        return _scaled(values, axes, lambda scaled: _finite_means(scaled, [scaled], axes)[0])

    return lax.cond(jnp.all(jnp.isfinite(plain)), lambda: plain, careful)


def largest(x: Inexact[Array, "*shape"], axes: tuple[int, ...], *, magnitude: bool = False) -> Float[Array, "*kept"]:
    """Largest finite entry, or magnitude, along `axes`, kept as axes of size 1, in float32; NaN where none is finite."""
    if _is_narrow(x):
        [plain] = reduce_fused([widen(_signless(x, magnitude))], [MAX], axes)
    else:
        plain = jnp.max(_signless(lax.optimization_barrier(x), magnitude), axes, keepdims=True)

    def careful() -> jax.Array:
        values = widen(_signless(x, magnitude))
        [found] = reduce_fused([jnp.where(jnp.isfinite(values), values, -jnp.inf)], [MAX], axes)
        return jnp.where(found == -jnp.inf, jnp.nan, found)

    return lax.cond(jnp.all(jnp.isfinite(plain)), lambda: plain, careful)


def _signless(x: jax.Array, magnitude: bool) -> jax.Array:
    # For use within each branch of a cond: what a branch takes from outside is written out as a whole array.
    return jnp.abs(x) if magnitude else x
