"""Hidden states of student and teacher at the same tokens, and means over those tokens that count."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_tokens(student: Any, teacher: Any, names: tuple[str, str]) -> tuple[int, ...]:
    """Return the shape of the tokens; raise a ValueError where the two are not hidden states of the same tokens."""
    for hidden, name in zip((student, teacher), names, strict=True):
        if np.ndim(hidden) < 2:
            raise ValueError(f"{name} is {list(np.shape(hidden))}; give hidden states [..., length, width].")
    if np.shape(student)[:-1] != np.shape(teacher)[:-1]:
        raise ValueError(
            f"{names[0]} is {list(np.shape(student))} and {names[1]} {list(np.shape(teacher))}; all axes but the last "
            "number the same tokens."
        )
    return np.shape(student)[:-1]


def read_mask(mask: Any, tokens: tuple[int, ...]) -> jax.Array:
    """Return the mask of tokens that count, all of them for None; raise a ValueError where its shape is another."""
    if mask is None:
        return jnp.ones(tokens, bool)
    if np.shape(mask) != tokens or jnp.asarray(mask).dtype != np.bool_:
        raise ValueError(
            f"mask is {jnp.asarray(mask).dtype}{list(np.shape(mask))}, not bool{list(tokens)}: True for each token that counts."
        )
    return jnp.asarray(mask)


def mean(total: jax.Array, mask: jax.Array) -> jax.Array:
    """Divide a sum over tokens by the number of those that count; zero where none does."""
    return total / jnp.maximum(jnp.sum(mask, dtype=total.dtype), 1)
