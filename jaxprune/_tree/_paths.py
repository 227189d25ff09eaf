"""Leaves of any pytree by their normalised paths, so that trees of different classes can be aligned."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.tree_util import GetAttrKey, keystr

from jaxprune._tree._leaves import is_array, is_nothing

KeyPath = tuple[Any, ...]


class Flat(NamedTuple):
    """A flattened tree: for each leaf its normalised path, its name for messages, and the leaf."""

    paths: list[str]
    names: list[str]
    leaves: list[Any]
    treedef: jax.tree_util.PyTreeDef


def normalise(path: KeyPath) -> str:
    """Write a key path as ``block/dense/kernel``, alike for dicts, attributes and sequences.

    Frameworks box leaves (an NNX ``Param``, a Linen ``Partitioned``) behind an attribute ``value``; it is left
    out, so that boxed and bare trees have the same paths.
    """
    parts = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
    if path and isinstance(path[-1], GetAttrKey) and parts[-1] == "value":
        parts.pop()
    return "/".join(parts)


def flatten(tree: Any, what: str, is_leaf: Callable[[Any], bool] | None = None) -> Flat:
    """Flatten `tree`; `what` is what messages call it (``params``, ``masks``)."""
    entries, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf)
    paths = [normalise(path) for path, _ in entries]
    names = [what + keystr(path) for path, _ in entries]
    if len(set(paths)) < len(paths):
        twice = next(name for name, path in zip(names, paths, strict=True) if paths.count(path) > 1)
        raise ValueError(f"{twice} has the same path as another leaf of {what}; rename one of the two.")
    return Flat(paths, names, [leaf for _, leaf in entries], treedef)


def align(flat: Flat, like: Flat, what: str, like_what: str) -> list[Any]:
    """Return the leaves of `flat` in the order of `like`; a path that only one of them has is an error.

    Only an entry of `flat` that is None (or optax's empty MaskedNode) need have no leaf: `like` may have None there.
    """
    by_path = dict(zip(flat.paths, flat.leaves, strict=True))
    known = set(like.paths)
    for path, name in zip(like.paths, like.names, strict=True):
        if path not in by_path:
            raise ValueError(f"{what} has no entry for {name}. Make {what} from the same tree as {like_what}.")
    for path, name, leaf in zip(flat.paths, flat.names, flat.leaves, strict=True):
        if path not in known and not is_nothing(leaf):
            raise ValueError(f"{name} has no counterpart in {like_what}. Make {what} from the same tree.")
    return [by_path[path] for path in like.paths]


def spread(prefix: Any, paths: Sequence[str], what: str) -> list[Any]:
    """Give each path the entry of the tree `prefix` that stands at it or above it, or None."""
    found: list[Any] = [None] * len(paths)
    entries = flatten(prefix, what)
    for path, name, entry in zip(entries.paths, entries.names, entries.leaves, strict=True):
        below = [i for i, leaf in enumerate(paths) if not path or leaf == path or leaf.startswith(path + "/")]
        if not below:
            raise ValueError(f"{name} matches no leaf; {what} must be a tree prefix of the parameters.")
        for i in below:
            found[i] = entry
    return found


def require_arrays(flat: Flat) -> None:
    """Raise a TypeError that names the first leaf which is no array."""
    for name, leaf in zip(flat.names, flat.leaves, strict=True):
        if not is_array(leaf):
            raise TypeError(
                f"{name} is a {type(leaf).__name__}, not an array. Pass arrays only, for example "
                "eqx.filter(model, eqx.is_inexact_array) or nnx.state(model, nnx.Param)."
            )
