"""What the noise of a step depends on, and how loud it is: keys by step and path, temperatures and scales by step."""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._tree._given import described

# What a setting is from the first step to the last one, in a straight line; or the step's number to what it is there.
Course = tuple[float, float] | Callable[[Any], Any]


def key_of(key: jax.Array, path: str) -> jax.Array:
    """Return the key of one leaf: it depends on the leaf's own path alone, not on what else is in the tree."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def value_at(course: Course, step: Any, steps: int, what: str) -> jax.Array:
    """Return what a setting is at a step, float32 []; `what` begins messages."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps is the whole number of steps, >= 1; got {steps!r}.")
    if callable(course):
        return jnp.asarray(course(step), jnp.float32)
    if not (
        isinstance(course, tuple) and len(course) == 2 and all(isinstance(x, int | float) and x > 0 for x in course)
    ):
        raise ValueError(
            f"{what} is a pair of positive numbers, at the first step and at the last one, or a schedule; got "
            f"{course if isinstance(course, tuple) else described(course)}."
        )
    first, last = course
    return first + (last - first) * jnp.clip(jnp.asarray(step, jnp.float32) / steps, 0, 1)


def check_prior(std: float, strength: float, title: str) -> None:
    """Raise a ValueError unless the gates' spread and the prior's strength are numbers >= 0, the first one > 0."""
    if not (isinstance(std, int | float) and 0 < std < float("inf")):
        raise ValueError(f"{title} takes a positive std, the spread of the gates at first; got {std!r}.")
    if not (isinstance(strength, int | float) and 0 <= strength < float("inf")):
        raise ValueError(f"{title} takes a strength >= 0, how many std the prior is worth; got {strength!r}.")
