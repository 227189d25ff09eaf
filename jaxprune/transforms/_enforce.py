"""What all transforms share: masks for a tree of parameters, and updates that land on zero."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprune._dtypes import common
from jaxprune._tree._collections import collection_with
from jaxprune._tree._leaves import is_floating, is_function, is_nothing
from jaxprune._tree._masks import align_masks, check_masks
from jaxprune._tree._paths import Tree, flatten


def require_params(params: Any, title: str) -> None:
    """Raise a ValueError when an update comes without the parameters."""
    if params is None:
        raise ValueError(
            f"{title} needs the parameters to set pruned weights to zero: call update(grads, state, params), "
            "as Linen's TrainState and nnx.Optimizer do."
        )


def masks_for(masks: Any, params: Any) -> Any:
    """Return a copy of the masks, or of what a function makes of the parameters, in the tree of the parameters.

    A copy, because an optimizer state is often donated, which would delete the caller's masks. Masks of more leaves
    than `params` has are right where `optax.masked` or `optax.partition` hides some; without that they are an error.
    """
    flat = flatten(params, "params")
    if not flat.leaves:  # optax.tree.map_params initialises with a placeholder that has no leaves
        return params
    masks = masks(params) if is_function(masks) else masks
    if any(isinstance(node, optax.MaskedNode) for node in _nodes(params)):
        given = flatten(masks, "masks", is_leaf=is_nothing)
        within = collection_with(flat.paths, given.paths, "masks") or {path: path for path in given.paths}
        masks = {path: given.by_path[within[path]] for path in flat.paths if path in within}
    return flat.build(
        [
            jnp.ones_like(leaf, dtype=bool) if mask is None else jnp.array(mask, copy=True)
            for leaf, mask in zip(flat.leaves, align_masks(masks, flat), strict=True)
        ]
    )


def masks_like(masks: Any, made: Any, params: Any) -> Any:
    """Return the masks that were made in the treedef of the ones in the state; all True where none was made."""
    flat, held = flatten(params, "params"), flatten(masks, "masks")
    by_path = dict(zip(flat.paths, align_masks(made, flat), strict=True))
    return held.treedef.unflatten(
        [
            jnp.ones_like(mask) if by_path[path] is None else by_path[path]
            for path, mask in zip(held.paths, held.leaves, strict=True)
        ]
    )


def _nodes(tree: Any) -> Sequence[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, optax.MaskedNode))


def enforce(updates: Any, params: Any, masks: Any) -> Any:
    """Replace the updates of pruned weights by what takes them to zero; trees are aligned by path."""
    flat = flatten(params, "params")
    return enforce_masks(updates, flat, check_masks(flat.aligned(flatten(masks, "masks")), flat))


def hide_pruned(updates: Any, masks: Any) -> Any:
    """Set the gradients of pruned weights to zero; trees are aligned by path."""
    flat = flatten(updates, "updates")
    held = align_masks(masks, flat)
    return flat.build(
        [
            leaf if mask is None else jnp.where(mask, leaf, jnp.zeros_like(leaf))
            for leaf, mask in zip(flat.leaves, held, strict=True)
        ]
    )


def enforce_masks(updates: Any, params: Tree, masks: Sequence[Any]) -> Any:
    flat = flatten(updates, "updates")
    held = dict(zip(params.paths, zip(params.leaves, masks, strict=True), strict=True))
    missing = [name for path, name in zip(flat.paths, flat.names, strict=True) if path not in held]
    if missing:
        raise ValueError(f"{missing[0]} has no counterpart in params; pass gradients of the same tree as params.")
    return flat.build(
        [_land_on_zero(update, *held[path]) for update, path in zip(flat.leaves, flat.paths, strict=True)]
    )


def _land_on_zero(update: Any, param: Any, mask: Any) -> Any:
    if mask is None or not is_floating(param):
        return update
    # Never narrower than the parameter: -param rounded would not cancel it.
    dtype = common((update.dtype, param.dtype))
    return jnp.where(mask, update.astype(dtype), -param.astype(dtype))
