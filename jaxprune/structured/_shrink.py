"""Apply a plan to trees of arrays: masks that zero the channels, or smaller arrays without them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._tree._masks import all_true
from jaxprune._tree._paths import flatten
from jaxprune._tree._shapes import require_shapes
from jaxprune._tree._sharding import without_explicit_axes
from jaxprune.structured._plan import Plan, cut_shapes


def channel_masks(plan: Plan, params: Any) -> Any:
    """Return a plan as masks, to train with or to compare.

    Args:
        plan: which channels stay.
        params: the parameters before they are cut, of which shapes matter.

    Returns:
        The treedef of `params` in bool, True = keep, sharded like `params`: an element goes if any of its axes loses it;
        of a parameter that the plan drops, every one.

    Raises:
        ValueError: the plan does not fit the parameters.

    >>> params = {"up": jnp.ones((1, 4)), "bias": jnp.ones(2)}
    >>> masks = channel_masks(Plan({"up": {1: (1, 3)}}, {"up": (1, 4)}), params)
    >>> masks["up"].tolist(), masks["bias"].tolist()
    ([[False, True, False, True]], [True, True])
    """
    flat = flatten(params, "params")
    remedy = "Take the parameters before they are cut."
    require_shapes("The plan", cut_shapes(plan), "params", flat.shapes, remedy)
    masks = []
    for path, leaf in zip(flat.paths, flat.leaves, strict=True):
        mask = all_true(leaf)
        for axis, kept in plan.kept.get(path, {}).items():
            stays = np.isin(np.arange(mask.shape[axis]), kept)
            mask &= np.expand_dims(stays, [other for other in range(mask.ndim) if other != axis])
        if path in plan.dropped:
            mask &= False
        masks.append(mask)
    return flat.build(masks)


def shrink(plan: Plan, tree: Any) -> Any:
    """Cut a plan's channels and layers out of parameters, or out of any tree that holds arrays like them.

    Of optimizer state and averages those arrays are cut whose path ends with a parameter's path and whose shape is the
    parameter's; step counts and the like stay as they are. What belongs to a parameter that the plan drops becomes None,
    so that the tree has no leaf there. Works under jit.

    Args:
        plan: what stays.
        tree: parameters, batch statistics, optimizer state, an average of parameters; arrays or ShapeDtypeStructs.

    Returns:
        The same containers with smaller arrays, dtypes as before.

    Raises:
        ValueError: nothing in the tree is of the plan, or an array of a parameter's path has another shape, as where
            an optimizer keeps factored moments; make such state anew from the smaller parameters.

    >>> plan = Plan({"up": {1: (1, 3)}}, {"up": (1, 4)})
    >>> state = {"count": jnp.int32(7), "mu": {"up": jnp.array([[1.0, 2.0, 3.0, 4.0]])}}
    >>> shrink(plan, state)["mu"]["up"].tolist()
    [[2.0, 4.0]]
    """
    flat = flatten(tree, "tree")
    leaves: list[Any] = []
    cut = False
    for path, name, leaf in zip(flat.paths, flat.names, flat.leaves, strict=True):
        known = _known(plan, path)
        shape = tuple(np.shape(leaf))
        if known in plan.dropped and known != path:  # in whatever form an optimizer keeps it
            leaves.append(None)
            cut = True
            continue
        if known is None or (known != path and int(np.prod(shape)) <= 1):
            leaves.append(leaf)
            continue
        if shape != tuple(plan.shapes[known]):
            raise ValueError(
                f"{name} belongs to {known} of shape {plan.shapes[known]} but has shape {shape}. "
                "If it is state that an optimizer keeps in another form, make it anew from the smaller parameters; "
                "if it was cut before, cut the original."
            )
        leaves.append(None if known in plan.dropped else _cut(plan, known, leaf))
        cut = True
    named = [*plan.kept, *plan.dropped]
    if named and not cut:
        raise ValueError(f"The tree has none of the parameters that the plan cuts: {named}.")
    return flat.build(leaves)


def _known(plan: Plan, path: str) -> str | None:
    """Return the longest parameter's path that a path ends with, if the plan cuts that parameter."""
    parts = path.split("/")
    suffixes = ("/".join(parts[start:]) for start in range(len(parts)))
    found = next((suffix for suffix in suffixes if suffix in plan.shapes), None)
    return found if found in plan.kept or found in plan.dropped else None


def _cut(plan: Plan, path: str, leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(plan.shrunk_shape(path), leaf.dtype)
    leaf = jnp.asarray(leaf)

    def take(leaf: jax.Array) -> jax.Array:
        for axis, kept in plan.kept[path].items():
            leaf = jnp.take(leaf, np.asarray(kept), axis)
        return leaf

    return without_explicit_axes(take, leaf, plan.shrunk_shape(path))(leaf)
