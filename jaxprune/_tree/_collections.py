"""Trees of which one is inside of the other: ``variables`` with their ``params``, and ``params`` alone."""

from collections.abc import Iterable, Mapping
from typing import Any

from jaxprune._tree._leaves import is_nothing
from jaxprune._tree._paths import Tree


def collections_of(paths: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return for each first word of paths the rest of those that have one, and the whole paths."""
    found: dict[str, dict[str, str]] = {}
    for path in paths:
        first, _, rest = path.partition("/")
        if rest:
            found.setdefault(first, {})[rest] = path
    return found


def collection_with(paths: Iterable[str], outer: Iterable[str], what: str) -> Mapping[str, str] | None:
    """Find the one collection of the outer paths in which all of these are; None where they share a path, or there is none.

    Args:
        paths: the inner ones: ``Dense_0/kernel``.
        outer: ``params/Dense_0/kernel``, ``batch_stats/BatchNorm_0/mean``.
        what: what the outer tree is called in messages.

    Returns:
        For each path of the collection, without its name, the outer one.

    Raises:
        ValueError: several collections have them all.
    """
    inner, outer = set(paths), list(outer)
    if not inner or not inner.isdisjoint(outer):
        return None
    found = {name: known for name, known in collections_of(outer).items() if inner <= known.keys()}
    if len(found) > 1:
        raise ValueError(
            f"{what} has the paths {sorted(inner)[0]!r}... in each of {sorted(found)}; pass the one that is meant."
        )
    return next(iter(found.values()), None)


def masks_beside(tree: Tree, masks: Tree) -> list[Any]:
    """Return for each leaf its mask, where one tree may be a collection of the other.

    Of masks of ``variables`` those of ``params`` are for parameters alone. Masks of parameters alone leave the other
    collections of ``variables`` whole.
    """
    within = collection_with(tree.paths, masks.paths, masks.what)
    if within is not None:
        return [masks.by_path[within[path]] for path in tree.paths]
    named = [path for path, leaf in zip(masks.paths, masks.leaves, strict=True) if not is_nothing(leaf)]
    around = collection_with(named, tree.paths, tree.what)
    if around is None or around.keys() != set(masks.paths):
        return tree.aligned(masks)
    inner = {outer: path for path, outer in around.items()}
    return [masks.by_path[inner[path]] if path in inner else None for path in tree.paths]
