"""Masks beside the tree that they are for: aligned by path, checked, kept whole."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._tree._collections import masks_beside
from jaxprune._tree._leaves import is_floating, is_known, is_nothing
from jaxprune._tree._paths import Tree, flatten
from jaxprune._tree._sharding import sharded_as


def all_true(leaf: Any) -> jax.Array:
    """Return the mask that keeps a leaf whole, sharded as it is."""
    # ones_like keeps the sharding of an array; PRNG keys and numbers have none that matters.
    if not is_floating(leaf):
        return jnp.ones(np.shape(leaf), bool)
    leaf = jnp.asarray(leaf)
    return sharded_as(jnp.ones_like(leaf, dtype=bool), leaf)


def kept(leaf: Any, mask: Any) -> jax.Array:
    """Return a leaf where its mask keeps it and ``+0.0`` elsewhere, of its dtype and sharding."""
    # A zero without axes: under jit, zeros_like of an array from outside forgets axes that are explicit.
    return jnp.where(mask, leaf, jnp.zeros((), jnp.result_type(leaf)))


def keeps_all(mask: Any) -> bool:
    """Whether a mask is known to keep everything; not of a traced one."""
    if not is_known(mask):
        return False
    # A mask that a traced function closes over is known, but what is computed of it there is not.
    with jax.ensure_compile_time_eval():
        return bool(np.all(mask))


def check_mask(mask: Any, what: str, leaf: Any) -> None:
    """Raise a ValueError unless a mask is bool and of its leaf's shape; `what` begins the message."""
    dtype, shape = getattr(mask, "dtype", type(mask).__name__), np.shape(mask)
    if dtype != np.bool_ or shape != np.shape(leaf):
        swapped = getattr(leaf, "dtype", None) == np.bool_ and dtype != np.bool_
        hint = " The parameters come first, then their masks." if swapped else ""
        raise ValueError(
            f"{what} of {dtype}{list(shape)}; a mask is bool of its leaf's shape {list(np.shape(leaf))}.{hint}"
        )


def align_masks(masks: Any, tree: Tree) -> list[Any]:
    """Return for each leaf of `tree` its mask (None keeps the leaf whole), checked for dtype and shape.

    One tree may be a collection of the other: masks of ``variables``, and ``params``.
    """
    return check_masks(masks_beside(tree, flatten(masks, "masks", is_leaf=is_nothing)), tree)


def check_masks(masks: Sequence[Any], tree: Tree) -> list[Any]:
    """Check the masks of the leaves of `tree` for dtype and shape; None stands for one that keeps its leaf whole."""
    for mask, name, leaf in zip(masks, tree.names, tree.leaves, strict=True):
        if not is_nothing(mask):
            check_mask(mask, f"masks has for {name} an array", leaf)
    return [None if is_nothing(mask) else mask for mask in masks]
