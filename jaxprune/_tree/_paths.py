"""A pytree read once: its leaves by normalised paths, so that trees of different classes can be aligned."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.tree_util import GetAttrKey, keystr

from jaxprune._tree._given import described, instead_of
from jaxprune._tree._leaves import is_array, is_nothing
from jaxprune._tree._names import slashed

KeyPath = tuple[Any, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Tree:
    """A flattened tree.

    Attributes:
        what: what messages call it: ``params``, ``masks``.
        paths: of each leaf, normalised: ``block/dense/kernel``.
        names: of each leaf, for messages: ``params['block']['dense']['kernel']``.
        leaves: the leaves.
        treedef: the structure.
    """

    what: str
    paths: list[str]
    names: list[str]
    leaves: list[Any]
    treedef: jax.tree_util.PyTreeDef

    @functools.cached_property
    def by_path(self) -> dict[str, Any]:
        """The leaves by their paths."""
        return dict(zip(self.paths, self.leaves, strict=True))

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the leaves by their paths."""
        return {path: np.shape(leaf) for path, leaf in zip(self.paths, self.leaves, strict=True)}

    def named(self) -> list[tuple[str, Any]]:
        """Each leaf behind its name for messages."""
        return list(zip(self.names, self.leaves, strict=True))

    def build(self, leaves: Sequence[Any]) -> Any:
        """Make a tree of this structure."""
        return jax.tree.unflatten(self.treedef, leaves)

    def aligned(self, other: "Tree") -> list[Any]:
        """Return the leaves of `other` in the order of this tree; a path that only one of them has is an error.

        Only an entry of `other` that is None (or optax's empty MaskedNode) need have no leaf here.
        """
        known = set(self.paths)
        for path, name in zip(self.paths, self.names, strict=True):
            if path not in other.by_path:
                raise ValueError(
                    f"{other.what} has no entry for {name}. Make {other.what} from the same tree as {self.what}."
                )
        for path, name, leaf in zip(other.paths, other.names, other.leaves, strict=True):
            if path not in known and not is_nothing(leaf):
                raise ValueError(f"{name} has no counterpart in {self.what}. Make {other.what} from the same tree.")
        return [other.by_path[path] for path in self.paths]

    def spread(self, prefix: Any, what: str) -> list[Any]:
        """Give each leaf the entry of the tree `prefix`, called `what`, that stands at it or above it, or None."""
        return spread(prefix, self.paths, what)

    def owner_of(self, path: str) -> str | None:
        """Return the path here with which `path` ends, the longest one: of the moments of an optimizer, the parameter."""
        return owner(path, self.by_path)

    def require_arrays(self) -> None:
        """Raise a TypeError that names the first leaf which is no array."""
        for name, leaf in self.named():
            if not is_array(leaf):
                remedy = instead_of(leaf, alone=jax.tree_util.treedef_is_leaf(self.treedef))
                raise TypeError(f"{name} is {described(leaf)}, not an array. {remedy}")


def owner(path: str, known: Mapping[str, Any]) -> str | None:
    """Return the longest of the known paths with which a path ends."""
    parts = path.split("/")
    return next((end for end in ("/".join(parts[i:]) for i in range(len(parts) + 1)) if end in known), None)


def normalise(path: KeyPath) -> str:
    """Write a key path as ``block/dense/kernel``, alike for dicts, attributes and sequences.

    Frameworks box leaves (an NNX ``Param``, a Linen ``Partitioned``) behind an attribute ``value``; it is left
    out, so that boxed and bare trees have the same paths.
    """
    parts = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
    if path and isinstance(path[-1], GetAttrKey) and parts[-1] == "value":
        parts.pop()
    return "/".join(parts)


def flatten(tree: Any, what: str, is_leaf: Callable[[Any], bool] | None = None) -> Tree:
    """Read a tree; `what` is what messages call it (``params``, ``masks``)."""
    entries, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf)
    paths = [normalise(path) for path, _ in entries]
    names = [what + keystr(path) for path, _ in entries]
    if len(set(paths)) < len(paths):
        twice = next(name for name, path in zip(names, paths, strict=True) if paths.count(path) > 1)
        raise ValueError(f"{twice} has the same path as another leaf of {what}; rename one of the two.")
    return Tree(what, paths, names, [leaf for _, leaf in entries], treedef)


def read_arrays(tree: Any, what: str) -> Tree:
    """Read a tree, all leaves of which are to be arrays; raise a TypeError that names the first one which is none."""
    found = flatten(tree, what)
    found.require_arrays()
    return found


def spread(prefix: Any, paths: Sequence[str], what: str) -> list[Any]:
    """Give each path the entry of the tree `prefix`, called `what`, that stands at it or above it, or None."""
    entries = flatten(prefix, what)
    places = {slashed(path): place for place, path in enumerate(entries.paths)}
    found: list[Any] = [None] * len(paths)
    used: set[int] = set()
    for i, path in enumerate(paths):
        above = [
            places[start] for start in itertools.accumulate(slashed(path).split("/"), "{}/{}".format) if start in places
        ]
        above += [places[""]] if "" in places else []
        if above:
            found[i] = entries.leaves[max(above)]
            used.update(above)
    for place, name in enumerate(entries.names):
        if place not in used:
            raise ValueError(f"{name} matches no leaf; {what} must be a tree prefix of the parameters.")
    return found


def as_prefix(entries: Mapping[str, Any]) -> Any:
    """Return nested dicts with an entry at each path: a tree prefix of any parameters that have these paths.

    >>> as_prefix({"a/kernel": 0.5, "a/bias": 0.0})
    {'a': {'kernel': 0.5, 'bias': 0.0}}
    """
    if list(entries) == [""]:
        return entries[""]
    prefix: dict[str, Any] = {}
    for path, entry in entries.items():
        *modules, leaf = path.split("/")
        functools.reduce(lambda within, key: within.setdefault(key, {}), modules, prefix)[leaf] = entry
    return prefix
