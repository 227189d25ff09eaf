"""Apply a plan to trees of arrays: masks that zero the channels, or smaller arrays without them."""

import warnings
from collections.abc import Iterator, Mapping, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._printing import some
from jaxprune._tree._collections import collection_with, collections_of
from jaxprune._tree._leaves import is_known, is_nothing, own
from jaxprune._tree._masks import all_true
from jaxprune._tree._paths import Tree, flatten, owner
from jaxprune._tree._shapes import require_shapes
from jaxprune._tree._sharding import without_explicit_axes
from jaxprune.structured._axes._layered import spread
from jaxprune.structured._graph import Graph
from jaxprune.structured._indices import is_nested
from jaxprune.structured._inputs import with_inputs
from jaxprune.structured._plan import Plan, cut_shapes, require_plan
from jaxprune.structured._quantized import of_shared, parts_of


class UnrepairedWarning(UserWarning):
    """Channels were chosen by what is lost after `repair`, and cut without it."""


def channel_masks(plan: Plan, params: Any) -> Any:
    """Return a plan as masks, to train with or to compare.

    Args:
        plan: which channels stay.
        params: the parameters before they are cut, of which shapes matter; also one collection alone of those that the plan is
            for (``params`` of ``variables``), or the whole of which they are one.

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
    require_plan(plan, "channel_masks(plan, params)")
    flat = flatten(params, "params")
    planned, wanted = _beside(plan, flat)
    found = {path: np.shape(leaf) for path, leaf in zip(planned, flat.leaves, strict=True) if path is not None}
    require_shapes("The plan", wanted, "params", found, "Take the parameters before they are cut.")
    masks = []
    for path, leaf in zip(planned, flat.leaves, strict=True):
        mask = _mask(plan, path, leaf)
        if path in plan.dropped:
            mask &= False
        masks.append(mask)
    return flat.build(masks)


def _mask(plan: Plan, path: str | None, leaf: Any) -> jax.Array:
    mask = all_true(leaf)
    for axis, kept in (plan.kept.get(path, {}) if path is not None else {}).items():
        if path is not None and is_nested(kept):
            stays = np.zeros((len(kept), mask.shape[axis]), bool)
            np.put_along_axis(stays, np.asarray(kept), True, 1)
            mask &= spread(stays, plan.layers[path], axis, mask.ndim)
        else:
            stays = np.isin(np.arange(mask.shape[axis]), kept)
            mask &= np.expand_dims(stays, [other for other in range(mask.ndim) if other != axis])
    return mask


def _beside(plan: Plan, flat: Tree) -> tuple[list[str | None], Mapping[str, tuple[int, ...]]]:
    """Return for each leaf its planned path, and what the plan cuts of them; one may be a collection of the other."""
    within = collection_with(flat.paths, plan.shapes, "The plan")
    if within is not None:
        whole = set(within.values())
        return [within[path] for path in flat.paths], {
            path: shape for path, shape in cut_shapes(plan).items() if path in whole
        }
    around = collection_with(plan.shapes, flat.paths, "params") or {path: path for path in flat.paths}
    inner = {outer: path for path, outer in around.items()}
    return [inner.get(path) for path in flat.paths], cut_shapes(plan)


def shrink(plan: Plan, tree: Any) -> Any:
    """Cut a plan's channels and layers out of parameters, or out of any tree that holds arrays like them.

    Of optimizer state and averages those arrays are cut whose path ends with a parameter's path and whose shape is the
    parameter's; step counts and the like stay as they are. Where the plan is for ``variables``, a tree that knows ``params``
    alone (or ``batch_stats``) is cut as that collection: all paths of the collection must be there, and not beside those that
    the plan names. What belongs to a parameter
    that the plan drops becomes None, so that the tree has no leaf there. Works under jit.

    A parameter may be quantised, an array of integers ``qvalue`` with ``scale`` and ``zero_point`` as in qwix: scales are cut
    along axes of which each entry has its own, and where neighbours share one, by whole groups.

    Inputs that the plan cuts (``plan.inputs``) are cut in the tuple of all of the function's inputs, or where a whole one of them
    stands, alone or in a tree: ``shrink(plan, caches)``, ``shrink(plan, (params, caches))`` (an input that is one array has no
    path to be told by: it is cut alone, or among all inputs). Their other axes may have any size: a cache may be longer than
    that which was traced.

    Args:
        plan: what stays.
        tree: parameters, batch statistics, optimizer state, an average of parameters, a cache; arrays or ShapeDtypeStructs.

    Returns:
        The same containers with smaller arrays, dtypes as before; all arrays are new, so that either tree may be donated.

    Raises:
        ValueError: nothing in the tree is of the plan; an array may be of either of two collections; or an array of a
            parameter's path has another shape, as where an optimizer keeps factored moments: make such state anew from the
            smaller parameters; or of some neighbours that share a scale a part stays.

    Warns:
        UnrepairedWarning: the plan was chosen by what is lost after `repair`, and parameters have not been repaired: what it
            cuts from them is not zero. Not under jit, nor of other trees than parameters.

    >>> plan = Plan({"up": {1: (1, 3)}}, {"up": (1, 4)})
    >>> state = {"count": jnp.int32(7), "mu": {"up": jnp.array([[1.0, 2.0, 3.0, 4.0]])}}
    >>> shrink(plan, state)["mu"]["up"].tolist()
    [[2.0, 4.0]]
    """
    require_plan(plan, "shrink(plan, params)")
    _warn_of_unrepaired(plan, flatten(tree, "tree").by_path)
    return cut_out(plan, tree)


def _warn_of_unrepaired(plan: Plan, leaves: Mapping[str, Any]) -> None:
    found = {path: leaves[path] for path in plan.to_repair if path in leaves}
    lost = [
        path
        for path, leaf in found.items()
        if plan.fits(path, np.shape(leaf)) and not isinstance(leaf, jax.ShapeDtypeStruct) and is_known(leaf)
        if bool(jnp.any((leaf != 0) & ~_mask(plan, path, leaf)))
    ]
    if lost:
        warnings.warn(
            f"The plan counts on repair: cut repair(plan, params, grams), not params. Not repaired: {some(lost)}.",
            UnrepairedWarning,
            stacklevel=3,
        )


def cut_out(plan: Plan, tree: Any) -> Any:
    """Cut as `shrink` does, of parameters that may wait for their repair."""
    flat = flatten(tree, "tree")
    leaves: list[Any] = []
    cut = False
    # With what optax hides of a collection, which belongs to it all the same.
    every = flatten(tree, "tree", is_leaf=is_nothing).by_path
    parts = parts_of(every)
    owners = _owners_of_parts(plan, every, parts)
    of_inputs = _inputs_among({path: leaf for path, leaf in every.items() if owners[path] is None}, plan.inputs)
    for path, name, leaf in zip(flat.paths, flat.names, flat.leaves, strict=True):
        shape, known = tuple(np.shape(leaf)), owners[path]
        if plan.inputs is not None and path in of_inputs:
            leaves.append(_cut_input(plan.inputs, of_inputs[path], leaf))
            cut = True
            continue
        if known is None or (known not in plan.kept and known not in plan.dropped):
            leaves.append(own(leaf))
            continue
        if known in plan.dropped and known != path:  # in whatever form an optimizer keeps it
            leaves.append(None)
            cut = True
            continue
        if known != path and int(np.prod(shape)) <= 1:
            leaves.append(own(leaf))
            continue
        if known != path and parts.get(path, ("", ""))[1] in ("scale", "zero_point"):
            leaves.append(_cut(of_shared(plan, known, shape, name), known, leaf))
            cut = True
            continue
        if not plan.fits(known, shape):
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


def cut_inputs(graph: Graph, plan: Plan, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cut from a function's inputs what a plan cuts, which need not say so itself."""
    flat, planned = flatten(inputs, "inputs"), with_inputs(plan, graph).inputs
    if planned is None:
        return inputs
    known = zip(flat.paths, flat.leaves, strict=True)
    return flat.build([_cut_input(planned, path, leaf) if path in planned.shapes else leaf for path, leaf in known])


def _owners_of_parts(
    plan: Plan, leaves: Mapping[str, Any], parts: Mapping[str, tuple[str, str]]
) -> dict[str, str | None]:
    """Return by path the planned one of which an array is, or is a part of what was quantised."""
    parts = {path: part for path, part in parts.items() if owner(path, plan.shapes) is None}
    whole = {path: leaf for path, leaf in leaves.items() if path not in parts}
    whole |= {parameter: leaves[path] for path, (parameter, part) in parts.items() if part == "qvalue"}
    found = _owners(plan, whole)
    return {path: found[parts[path][0] if path in parts else path] for path in leaves}


def _owners(plan: Plan, leaves: Mapping[str, Any]) -> dict[str, str | None]:
    """Return by path the planned one that it ends with, the longest one; else that of a collection left out."""
    found = {path: owner(path, plan.shapes) for path in leaves}
    rest = {path: leaf for path, leaf in leaves.items() if found[path] is None}
    # Beside what the plan names stand parameters that it does not know, as those of other layers: no copies of a collection.
    beside = {path.removesuffix(known) for path, known in found.items() if known is not None}
    copies = [copy for known in collections_of(plan.shapes).values() for copy in _copies(known, rest, beside)]
    for path in rest:
        able = [copy for copy in copies if path in copy]
        if len(able) > 1:  # identical but for shapes
            able = [copy for copy in able if all(_fits(plan, known, rest[at]) for at, known in copy.items())] or able
        if len(able) > 1:
            names = sorted(copy[path].split("/")[0] for copy in able)
            raise ValueError(
                f"The tree at {path!r} may be of {' or '.join(names)}: the plan is for both, and they have the same paths. "
                f"Say which is meant, as {{{names[0]!r}: tree}}."
            )
        if able:
            found[path] = able[0][path]
    return found


def _inputs_among(leaves: Mapping[str, Any], plan: Plan | None) -> dict[str, str]:
    """Return by path the planned inputs among leaves: whole arguments, or the tree of one, of shapes that fit."""
    if plan is None:
        return {}
    arguments = collections_of(plan.shapes)
    found: dict[str, str] = {}
    for copy in [
        {path: path for path in plan.shapes if path in leaves},
        *(copy for known in arguments.values() for copy in _copies(known, leaves, set())),
        *({"": path} for path in plan.shapes if "/" not in path and list(leaves) == [""]),
    ]:
        if not all(_fits(plan, known, leaves[path]) for path, known in copy.items()):
            continue
        for path, known in copy.items():
            other = found.setdefault(path, known)
            if plan.kept.get(other) != plan.kept.get(known) or (other in plan.dropped) != (known in plan.dropped):
                raise ValueError(
                    f"The tree at {path!r} may be input {other} or {known}, of which the plan keeps other entries. Say which "
                    "is meant: shrink(plan, inputs) with the tuple of all of the function's inputs."
                )
    return found


def _cut_input(plan: Plan, path: str, leaf: Any) -> Any:
    if path in plan.dropped:
        return None
    return _cut(plan, path, leaf) if path in plan.kept else own(leaf)


def _copies(known: Mapping[str, str], leaves: Mapping[str, Any], beside: Set[str]) -> Iterator[dict[str, str]]:
    """Yield each copy of a collection among the leaves, if it is whole, as the planned path for each of its paths.

    Args:
        known: the planned paths of the collection, by what they are without its name.
        leaves: by path.
        beside: beginnings of paths below which none is.
    """
    places: dict[str, dict[str, str]] = {}
    for path in leaves:
        end = owner(path, known)
        if end is not None:
            places.setdefault(path.removesuffix(end), {})[path] = known[end]
    hidden = [path for path, leaf in leaves.items() if is_nothing(leaf)]
    for place, copy in places.items():
        if place and place[: place.rstrip("/").rfind("/") + 1] in beside:
            continue
        missing = [place + end for end in known if place + end not in copy]
        if all(any(path.startswith(f"{above}/") for above in hidden) for path in missing):
            yield copy


def _fits(plan: Plan, known: str, leaf: Any) -> bool:
    return is_nothing(leaf) or plan.fits(known, np.shape(leaf))


def _cut(plan: Plan, path: str, leaf: Any) -> Any:
    shape = plan.shrunk_shape(path, np.shape(leaf))
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, leaf.dtype)
    leaf = jnp.asarray(leaf)

    def take(leaf: jax.Array) -> jax.Array:
        # What layers keep for themselves, before layers go.
        for axis, kept in sorted(plan.kept[path].items(), key=lambda entry: not is_nested(entry[1])):
            if is_nested(kept):
                rows = spread(np.asarray(kept), plan.layers[path], axis, leaf.ndim)
                leaf = jnp.take_along_axis(leaf, jnp.asarray(rows), axis)
            else:
                leaf = jnp.take(leaf, np.asarray(kept), axis)
        return leaf

    return without_explicit_axes(take, leaf, shape)(leaf)
