"""Integers that stand for the weights of a group: the scale, the code of zero, the nearest code of each weight."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int8


class Grid(NamedTuple):
    """Which integers there are.

    Attributes:
        bits: of a code, 2 to 8.
        symmetric: whether zero has the code 0, and the codes reach as far as the largest magnitude; otherwise they are spread
            between the smallest and the largest weight.
    """

    bits: int
    symmetric: bool

    @property
    def least(self) -> int:
        """The smallest code."""
        return -(2 ** (self.bits - 1))

    @property
    def most(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1

    def fit(
        self, weights: Float32[Array, "rows outputs"], keep: Bool[Array, "rows outputs"]
    ) -> tuple[Float32[Array, " outputs"], Int8[Array, " outputs"]]:
        """Find the scale and the code of zero by which the weights that stay have codes, for each output.

        The scale is rounded up to 8 significant bits, so that it is a number of bfloat16 and compresses well. Zero always has
        a code, whether or not a weight is near it. Symmetric codes are one more below zero than above: the largest magnitude lies
        half a step beyond the largest code, and all others are nearer to theirs than if it had one. A group of zeros has the scale 1.
        """
        kept = jnp.where(keep, weights, 0.0)
        low, high = jnp.min(kept, axis=0, initial=0.0), jnp.max(kept, axis=0, initial=0.0)
        span = self.most - self.least
        # Each bound by itself: the distance of two large numbers may not be a number.
        widest = jnp.maximum(-low, high) / (span / 2) if self.symmetric else high / span - low / span
        scale = jnp.where(widest > 0, _round_up(widest), 1.0)
        if self.symmetric:
            return scale, jnp.zeros(scale.shape, jnp.int8)
        return scale, (self.least - jnp.rint(low / scale)).astype(jnp.int8)

    def encode(
        self, weights: Float32[Array, "*shape"], scale: Float32[Array, "*shape"], zero: Int8[Array, "*shape"]
    ) -> Int8[Array, "*shape"]:
        """Return the code of each weight that stands for the nearest number."""
        codes = jnp.rint(weights / scale) + zero.astype(jnp.float32)
        return jnp.clip(codes, self.least, self.most).astype(jnp.int8)


def decode(codes: jax.Array, scale: jax.Array, zero: jax.Array) -> jax.Array:
    """Return the numbers that codes stand for."""
    return (codes.astype(jnp.float32) - zero.astype(jnp.float32)) * scale


def _round_up(numbers: jax.Array) -> jax.Array:
    mantissa, exponent = jnp.frexp(numbers)
    return jnp.ldexp(jnp.ceil(mantissa * 256) / 256, exponent)


def read_grid(bits: int, symmetric: bool, title: str) -> Grid:
    """Check what a user asks for; raise a ValueError for what there is not."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"{title} takes bits from 2 to 8; got {bits!r}.")
    return Grid(bits, bool(symmetric))
