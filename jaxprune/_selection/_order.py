"""Whole numbers that order the entries of arrays: a key by the value, then the position."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Int32, UInt32

WORD = 2**32
FIRST_POSITION = -(2**31)
# The most entries that one word numbers or counts; it leaves room for one number beyond the last.
MOST = WORD - 2
# Powers of two among which nearly all weights and scores lie.
_USUAL_EXPONENTS = (-20, -12, -7, -2)


class Order:
    """Keys that order the numbers of a float dtype.

    Keys are bit patterns, read so that larger numbers get larger keys.
    A NaN has the lowest key; minus zero has that of zero. From one power of two to the next there are `octave` keys.
    """

    def __init__(self, dtype: Any, magnitude: bool):
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"only floating-point numbers can be ranked, but these are {dtype}.")
        # The eight-bit formats are all contained in float32.
        self.dtype = np.dtype(dtype if np.dtype(dtype).itemsize > 1 else np.float32)
        self.bits = np.dtype(f"i{self.dtype.itemsize}")
        self.key = np.dtype(f"i{max(self.dtype.itemsize, 4)}")
        self.magnitude = magnitude
        self.infinity = self.key_of(np.inf)
        self.lowest = -1 if magnitude else -self.infinity - 1
        self.octave = self.key_of(2.0) - self.key_of(1.0)
        # Thresholds to count below first: zero (a pruned layer is full of it), the smallest number above it, usual ones, and
        # the end of all numbers.
        self.first_look = [0, 1, *(self.key_of(2.0**exponent) for exponent in _USUAL_EXPONENTS), self.infinity + 1]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Order) and (self.dtype, self.magnitude) == (other.dtype, other.magnitude)

    def __hash__(self) -> int:
        return hash((self.dtype, self.magnitude))

    def key_of(self, number: float) -> int:
        """The key of a number that is not negative."""
        return int(np.asarray(number, self.dtype).view(self.bits))

    def keys(self, values: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
        """The key of every entry."""
        bits = lax.bitcast_convert_type(values.astype(self.dtype), self.bits).astype(self.key)
        size = bits & np.iinfo(self.bits).max
        key = size if self.magnitude else jnp.where(bits < 0, -size, size)
        return jnp.where(size > self.infinity, self.lowest, key)


def trailing(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """The last of `axes` that have few enough entries together to number or count them in one word."""
    first, size = len(axes), 1
    while first > 0 and size * shape[axes[first - 1]] <= MOST:
        first -= 1
        size *= shape[axes[first]]
    if axes and first == len(axes):
        raise ValueError(
            f"entries are numbered in 32 bits along an axis, but axis {axes[-1]} of an array of shape {shape} is "
            "longer. Reshape it to two axes."
        )
    return axes[first:]


def words(shape: tuple[int, ...], axes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The groups of `axes`, major first, of which each is one word of a position; at least one, even of no axes."""
    groups = [trailing(shape, axes)]
    while rest := axes[: len(axes) - sum(map(len, groups))]:
        groups.insert(0, trailing(shape, rest))
    return groups


def from_end(
    shape: tuple[int, ...], axes: tuple[int, ...], one: UInt32[Array, ""], index: Callable[[int], jax.Array]
) -> Int32[Array, "..."]:
    """Return the row-major position along `axes` counted from the end, `FIRST_POSITION` for the last entry.

    Args:
        shape: of the array.
        axes: the axes of one word of the position.
        one: the uint32 1, by which everything is multiplied, so that it comes after whatever gave the 1.
        index: gives the uint32 index along an axis, for the entries whose position is wanted.
    """
    sizes = [shape[axis] for axis in axes]
    # Modulo 2**32, which makes signed numbers of unsigned ones, too.
    position = one * np.uint32((math.prod(sizes) - 1 + FIRST_POSITION) % WORD)
    for i, axis in enumerate(axes):
        position = position - index(axis) * (one * np.uint32(math.prod(sizes[i + 1 :])))
    return lax.bitcast_convert_type(position, jnp.int32)


# Traced once for all arrays of one shape.
@functools.partial(jax.jit, static_argnames=("order", "words", "axes"))
def keep(
    values: jax.Array,
    cuts: jax.Array,
    *,
    order: Order,
    words: tuple[tuple[int, ...], ...],
    axes: tuple[int, ...],
) -> jax.Array:
    """Mask the entries of an array before its cuts, [stages, *pools]: by the key, then by the words of the position."""
    # Behind the barrier positions depend on the values: in a loop around all this, such as a training loop, XLA would
    # take them out of it and write them down in full.
    values, one = lax.optimization_barrier((values, jnp.uint32(1)))
    shape = values.shape
    index = functools.partial(lax.broadcasted_iota, jnp.uint32, shape)
    key, *places = (jnp.expand_dims(lax.index_in_dim(cuts, i, keepdims=False), axes) for i in range(cuts.shape[0]))
    last = jnp.zeros_like(key, dtype=bool)
    for word, cut in reversed(list(zip(words, places, strict=False))):
        position = from_end(shape, word, one, index).astype(order.key)
        last = (position < cut) | ((position == cut) & last)
    keys = order.keys(values)
    return ~((keys < key) | ((keys == key) & last))
