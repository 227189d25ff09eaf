"""Trees of masks as they are given: each leaf a boolean array or None."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._tree._leaves import is_nothing
from jaxprune._tree._paths import Tree, flatten


def read(masks: Any, what: str) -> Tree:
    """Flatten a tree of masks, each a boolean array or None."""
    flat = flatten(masks, what, is_leaf=is_nothing)
    leaves = []
    for name, mask in zip(flat.names, flat.leaves, strict=True):
        if not is_nothing(mask) and getattr(mask, "dtype", None) != np.bool_:
            found = f"{getattr(mask, 'dtype', type(mask).__name__)}{list(np.shape(mask))}"
            raise ValueError(f"{name} is {found}, not a boolean mask (True = keep).")
        leaves.append(None if is_nothing(mask) else jnp.asarray(mask))
    return dataclasses.replace(flat, leaves=leaves)


def arrays_of(flat: Tree, verb: str) -> list[jax.Array]:
    """Return the masks; raise a ValueError where one is None, which cannot be `verb`."""
    for name, mask in zip(flat.names, flat.leaves, strict=True):
        if mask is None:
            raise ValueError(f"{name} is None, which has no shape and cannot be {verb}. Give a boolean array.")
    return flat.leaves
