"""Exact whole numbers beyond 2**31, as two 32-bit words, wherever JAX runs without 64-bit types."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float32, UInt32

from jaxprune._selection._fused import ADD, reduce_fused

_WORD = 32
_MANTISSA = 23  # stored bits of a float32's significand


class Count(NamedTuple):
    """The whole number `high * 2**32 + low`; both words are uint32 arrays of one shape."""

    high: UInt32[Array, "*shape"]
    low: UInt32[Array, "*shape"]


def from_int(value: int | Sequence[int] | np.ndarray) -> Count:
    """A Count of a non-negative Python int below 2**64, or of an array or sequence of them."""
    numbers = np.asarray(value, np.uint64)
    return Count(
        jnp.asarray((numbers >> np.uint64(_WORD)).astype(np.uint32)),
        jnp.asarray((numbers & np.uint64(0xFFFFFFFF)).astype(np.uint32)),
    )


def to_float(a: Count) -> Float32[Array, "..."]:
    """The nearest float32 or next to it: for estimates only."""
    return a.high.astype(jnp.float32) * jnp.float32(2.0**_WORD) + a.low.astype(jnp.float32)


def from_float(number: Float32[Array, "..."]) -> Count:
    """The whole part of a non-negative float32 below 2**64, exactly."""
    high = jnp.floor(number / jnp.float32(2.0**_WORD))
    return Count(high.astype(jnp.uint32), (number - high * jnp.float32(2.0**_WORD)).astype(jnp.uint32))


def less(a: Count, b: Count) -> Bool[Array, "..."]:
    """Whether `a < b`, elementwise."""
    return (a.high < b.high) | ((a.high == b.high) & (a.low < b.low))


def less_equal(a: Count, b: Count) -> Bool[Array, "..."]:
    """Whether `a <= b`, elementwise."""
    return ~less(b, a)


def equal(a: Count, b: Count) -> Bool[Array, "..."]:
    """Whether `a == b`, elementwise."""
    return (a.high == b.high) & (a.low == b.low)


def where(condition: Bool[Array, "..."], a: Count, b: Count) -> Count:
    """`a` where the condition holds, else `b`."""
    return Count(jnp.where(condition, a.high, b.high), jnp.where(condition, a.low, b.low))


def minimum(a: Count, b: Count) -> Count:
    """The smaller of the two, elementwise."""
    return where(less(a, b), a, b)


def maximum(a: Count, b: Count) -> Count:
    """The larger of the two, elementwise."""
    return where(less(a, b), b, a)


def add(a: Count, b: Count) -> Count:
    """`a + b`, below 2**64."""
    low = a.low + b.low
    return Count(a.high + b.high + (low < a.low).astype(jnp.uint32), low)


def subtract(a: Count, b: Count) -> Count:
    """`a - b`, for `a >= b`."""
    return Count(a.high - b.high - (a.low < b.low).astype(jnp.uint32), a.low - b.low)


def total(parts: Count, axes: tuple[int, ...], bound: int) -> Count:
    """The exact sum over `axes`, which is at most `bound` (a Python int below 2**44)."""
    if bound < 2**_WORD:
        low = jnp.sum(parts.low, axes, dtype=jnp.uint32)
        return Count(jnp.zeros_like(low), low)
    # Every low word is split at a bit that leaves room to add up all the lower pieces in one word.
    terms = math.prod(parts.low.shape[axis] for axis in axes)
    split = _WORD - (terms - 1).bit_length()
    lower = jnp.sum(parts.low & jnp.uint32((1 << split) - 1), axes, dtype=jnp.uint32)
    upper = jnp.sum(_down(parts.low, split), axes, dtype=jnp.uint32)
    high = jnp.sum(parts.high, axes, dtype=jnp.uint32) + _down(upper, _WORD - split)
    return add(Count(high, _up(upper, split)), Count(jnp.zeros_like(lower), lower))


def count_true(mask: Bool[Array, "..."], axes: tuple[int, ...]) -> Count:
    """How many entries of a mask are True along `axes`."""
    # The last axes fit one word, the sums over the others two.
    inner, size = len(axes), 1
    while inner and size * mask.shape[axes[inner - 1]] < 2**_WORD:
        inner -= 1
        size *= mask.shape[axes[inner]]
    [low] = reduce_fused([mask.astype(jnp.uint32)], [ADD], axes[inner:])
    low = jnp.squeeze(low, axes[inner:])
    outer = tuple(axis - sum(other < axis for other in axes[inner:]) for axis in axes[:inner])
    return total(Count(jnp.zeros_like(low), low), outer, math.prod(mask.shape[axis] for axis in axes))


def rounded(k: int | float | jax.Array, n: int) -> Count:
    """`round(k * n)`, half to even: how many of `n` entries a sparsity of `k` removes.

    A Python float gives exactly what Python's own `round(k * n)` gives. An array is taken at its word: the float32
    number it holds (bfloat16 and float16 are widened) times `n` in whole-number arithmetic, with one rounding at the
    end, so nothing is lost however large `n` is. The float32 next to 0.9 is not 0.9: at a thousand million entries
    the two differ by 24.

    Args:
        k: the fraction, in [0, 1]. A Python number, or a real array of any shape, which may be traced.
        n: the whole, a Python int below 2**62.

    Returns:
        A Count of the shape of `k`.
    """
    if isinstance(k, (int, float)):
        return from_int(round(k * n))
    if k.dtype == jnp.float64:
        return _from_float64(jnp.round(k * n))
    significand, shift = _scaled(k)
    # One more bit than asked for: it says on which side of one half the rest is.
    doubled = _shift_right(_product(significand, n), shift - 1)
    quotient = _halve(doubled)
    # The product's trailing zeros are those of its factors together; below one half lies nothing but zeros at a tie.
    zeros = _trailing_zeros(significand) + jnp.uint32((n & -n).bit_length() - 1 if n else 2 * _WORD)
    tie = zeros >= shift - 1
    up = (doubled.low & 1) & (~tie | ((quotient.low & 1) == 1)).astype(jnp.uint32)
    return add(quotient, Count(jnp.zeros_like(up), up))


def floored(k: int | float | jax.Array, n: int) -> Count:
    """`floor(k * n)`: how many of `n` entries may be removed under a cap of `k`.

    A Python float is read as the decimal it prints as, so a cap of 0.29 on 100 entries is 29, although the nearest
    double lies below 0.29. An array is taken at its word, as in `rounded`.

    Args:
        k: the fraction, in [0, 1]. A Python number, or a real array of any shape, which may be traced.
        n: the whole, a Python int below 2**62.

    Returns:
        A Count of the shape of `k`.
    """
    if isinstance(k, (int, float)):
        return from_int(math.floor(Fraction(repr(float(k))) * n))
    if k.dtype == jnp.float64:
        return _from_float64(jnp.floor(k * n))
    significand, shift = _scaled(k)
    return _shift_right(_product(significand, n), shift)


def _from_float64(number: jax.Array) -> Count:
    whole = number.astype(jnp.uint64)
    return Count((whole >> _WORD).astype(jnp.uint32), whole.astype(jnp.uint32))


def _scaled(k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Uint32 `(significand, shift)` with `k = significand / 2**shift` and `shift >= 23`, for k in [0, 1]."""
    bits = lax.bitcast_convert_type(k.astype(jnp.float32), jnp.uint32)
    exponent = (bits >> _MANTISSA) & 0xFF
    fraction = bits & ((1 << _MANTISSA) - 1)
    significand = jnp.where(exponent == 0, fraction, fraction | (1 << _MANTISSA))
    return significand, jnp.uint32(127 + _MANTISSA) - jnp.maximum(exponent, 1)


def _product(significand: jax.Array, n: int) -> tuple[jax.Array, ...]:
    """The three uint32 words, lowest first, of a 24-bit number times a Python int below 2**62."""
    # In digits of 16 bits every product and carry fits one word.
    half = 16
    left = [significand & 0xFFFF, significand >> half]
    right = [jnp.uint32((n >> (half * i)) & 0xFFFF) for i in range(4)]
    digits, carry = [], jnp.zeros_like(significand)
    for place in range(6):
        upper = jnp.zeros_like(significand)
        for i, digit in enumerate(left):
            if 0 <= place - i < len(right):
                partial = digit * right[place - i]
                carry += partial & 0xFFFF
                upper += partial >> half
        digits.append(carry & 0xFFFF)
        carry = (carry >> half) + upper
    return tuple(digits[i] | (digits[i + 1] << half) for i in (0, 2, 4))


def _shift_right(words: tuple[jax.Array, ...], shift: jax.Array) -> Count:
    """Three words, lowest first, shifted right by a traced number of bits; the result must fit two words."""
    skipped, bits = shift >> 5, shift & 31
    zero = jnp.zeros_like(words[0])
    padded = (*words, zero, zero)

    def word(i: int) -> jax.Array:
        return lax.select_n(jnp.minimum(skipped, 3).astype(jnp.int32), *(padded[min(i + j, 4)] for j in range(4)))

    first, second, third = word(0), word(1), word(2)
    # Shifting a word by all of its 32 bits is undefined, so the left shift goes in two steps.
    low = (first >> bits) | ((second << 1) << (31 - bits))
    high = (second >> bits) | ((third << 1) << (31 - bits))
    return Count(high, low)


def _up(word: jax.Array, bits: int) -> jax.Array:
    """Shift left by 0 to 32 bits; XLA leaves a shift by all bits undefined."""
    return word << bits if bits < _WORD else jnp.zeros_like(word)


def _down(word: jax.Array, bits: int) -> jax.Array:
    """Shift right by 0 to 32 bits."""
    return word >> bits if bits < _WORD else jnp.zeros_like(word)


def _halve(a: Count) -> Count:
    return Count(a.high >> 1, (a.low >> 1) | (a.high << 31))


def _trailing_zeros(word: jax.Array) -> jax.Array:
    """The number of zeros below the lowest set bit; 32 for zero."""
    return lax.population_count(~word & (word - 1))


def to_numpy(a: Count) -> np.ndarray:
    """The numbers as int64 of NumPy; not under jit.

    >>> to_numpy(count_true(jnp.array([[True, False], [True, True]]), (1,))).tolist()
    [1, 2]
    """
    return (np.asarray(a.high).astype(np.int64) << _WORD) + np.asarray(a.low).astype(np.int64)
