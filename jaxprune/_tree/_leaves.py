"""What a leaf is: nothing, an array, floating-point, known to this process."""

from typing import Any

import jax
import jax.numpy as jnp


def is_nothing(node: Any) -> bool:
    """Whether a node stands for "nothing here": None, or optax's empty MaskedNode."""
    return node is None or (isinstance(node, tuple) and not node)


def is_array(leaf: Any) -> bool:
    """Whether a leaf has a shape and a dtype, or is a number that JAX would turn into an array."""
    return (hasattr(leaf, "shape") and hasattr(leaf, "dtype")) or isinstance(leaf, bool | int | float | complex)


def is_floating(leaf: Any) -> bool:
    """Whether a leaf holds floating-point numbers, real or complex; integers, booleans and PRNG keys do not."""
    dtype = getattr(leaf, "dtype", None)
    return isinstance(leaf, float | complex) if dtype is None else bool(jnp.issubdtype(dtype, jnp.inexact))


def is_complex(leaf: Any) -> bool:
    """Whether a leaf holds complex numbers."""
    dtype = getattr(leaf, "dtype", None)
    return isinstance(leaf, complex) if dtype is None else bool(jnp.issubdtype(dtype, jnp.complexfloating))


def require_real(leaf: Any, name: str, title: str) -> None:
    """Raise a TypeError of a leaf of complex numbers, where what is computed is known of real ones only."""
    if is_complex(leaf):
        raise TypeError(
            f"{title} is of real weights, but {name} is {getattr(leaf, 'dtype', 'complex')}. Leave it out; by its modulus it is "
            "pruned by make_masks without scores=, or with scores.magnitude."
        )


def is_known(array: jax.Array | float) -> bool:
    """Whether this process can read the array's values now: neither traced nor spread over other hosts."""
    if isinstance(array, jax.core.Tracer):
        return False
    return not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated


def own(leaf: Any) -> Any:
    """Return a copy of an array of JAX, so that a result that is donated or deleted does not take its origin with it.

    Under jit results are new arrays anyway, and numbers and arrays of NumPy are not donated.
    """
    return leaf.copy() if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) else leaf


def is_function(x: Any) -> bool:
    """Whether something is called rather than read: a function, not a tree whose class has a method ``__call__``.

    An Equinox model is callable, and so are its masks; a tree whose leaves are arrays, numbers or bools is data.
    """
    if not callable(x) or isinstance(x, jax.tree_util.Partial):
        return callable(x)
    leaves = jax.tree.leaves(x)
    return not leaves or not all(map(is_array, leaves))
