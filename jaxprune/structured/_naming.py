"""Groups by the names that people give them: a parameter, its layer, a module, a glob pattern of any."""

import collections
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from jaxprune._printing import some
from jaxprune._tree._names import slashed
from jaxprune._tree._patterns import matches
from jaxprune.structured._graph import Graph
from jaxprune.structured._groups import ChannelGroup, Member

T = TypeVar("T")

AXIS = re.compile(r"(.*)\[(\d+)\]")


def groups_named(graph: Graph, pattern: str, what: str) -> list[ChannelGroup]:
    """Return the groups that a name means.

    In this order: the group of that name; of ``path[axis]``, those whose channels a parameter computes along that axis; of
    a parameter, or of the layer that holds no other, those whose channels it computes; of a module above, those whose
    channels are all computed within. Of groups and of others that are parts of them (heads, their dimensions), the former.

    Args:
        graph: has the groups.
        pattern: a name; all but the first kind may be glob patterns, with dots or slashes.
        what: what a message calls it: ``"k"``.

    Raises:
        ValueError: it means none.
    """
    exact = [group for group in graph.groups if group.name == pattern]
    along = AXIS.fullmatch(pattern)
    if not exact and along:
        path, axis = along[1], int(along[2])
        exact = [
            group
            for group in graph.groups
            if any(m.axis == axis and _fits(path, slashed(m.path)) for m in _producers(group))
        ]
    if exact:
        return exact
    layers = _layers(graph)
    found = [group for group in graph.groups if _computed_by(group, pattern, layers)]
    if not found:
        names = some(group.name for group in graph.groups)
        raise ValueError(f"{what} names {pattern!r}, which computes no channels; groups are {names}.")
    return [group for group in found if not group.outer] or found


def by_group(
    graph: Graph, given: T | Mapping[str, T], what: str, default: T, check: Callable[[object, str], None]
) -> dict[str, T]:
    """Return a value for each group by its name, from one for all or a mapping of patterns, of which the last that fits counts.

    Args:
        graph: has the groups.
        given: the value or the mapping.
        what: the argument's name.
        default: of groups that are not named.
        check: raises unless a value is fit, given what a message calls it.
    """
    if not isinstance(given, Mapping):
        check(given, what)
        return dict.fromkeys((group.name for group in graph.groups), given)
    found = dict.fromkeys((group.name for group in graph.groups), default)
    for pattern, value in given.items():
        check(value, f"{what}[{pattern!r}]")
        found.update((group.name, value) for group in groups_named(graph, pattern, what))
    return found


def as_list(patterns: str | Sequence[str]) -> list[str]:
    """Return one pattern or several as a list."""
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _producers(group: ChannelGroup) -> Sequence[Member]:
    return [member for member in group.members if member.produces] or group.members[:1]


def _layers(graph: Graph) -> set[str]:
    """Return the modules that hold one parameter alone that computes channels: kernels, with biases and the like."""
    paths = {slashed(member.path) for group in graph.groups for member in _producers(group)}
    held = collections.Counter(path.rpartition("/")[0] for path in paths)
    return {module for module, number in held.items() if number == 1}


def _computed_by(group: ChannelGroup, pattern: str, layers: set[str]) -> bool:
    paths = [slashed(member.path) for member in _producers(group)]
    modules = [path.rpartition("/")[0] for path in paths]
    if any(_fits(pattern, path) for path in [*paths, *layers.intersection(modules)]):
        return True
    return all(matches(pattern, path) for path in paths)


def _fits(pattern: str, path: str) -> bool:
    """Whether a pattern fits a path itself, and no module above it."""
    above = path.rpartition("/")[0]
    return matches(pattern, path) and not (above and matches(pattern, above))
