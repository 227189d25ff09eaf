"""Which axes of parameters make a group of channels, which stay, and which channels are parts of others."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from jaxprune._jaxpr._records import axes
from jaxprune.structured._axes._dims import (
    Cat,
    Dim,
    Prod,
    Var,
    describe,
    is_cut,
    leaves,
    positions,
    product,
    resolve,
    size,
)
from jaxprune.structured._axes._layered import layers_of
from jaxprune.structured._axes._program import Program, Value, walk
from jaxprune.structured._axes._reasons import Reason


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """An axis of a parameter along which a group's channels lie.

    Attributes:
        path: the parameter's normalised path.
        axis: its axis.
        channels: for each element along the axis the channel it belongs to, or -1.
        produces: whether the parameter computes these channels.
        reads: whether the parameter sums over these channels.
        layers: its axis of the scanned layers of which each may keep its own channels; None where there are none.
    """

    path: str
    axis: int
    channels: np.ndarray = dataclasses.field(repr=False)
    produces: bool
    reads: bool
    layers: int | None = None

    def elements(self, size: int) -> np.ndarray:
        """Return the elements along the axis by channel, ``[size, elements of each]``, of a group of this size."""
        order = np.argsort(self.channels, kind="stable")
        return order[np.searchsorted(self.channels[order], 0) :].reshape(size, -1)


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that are cut together, from all members.

    Attributes:
        name: the path and axis of the first parameter that computes the channels.
        size: how many channels there are.
        members: all axes of parameters along which they lie.
        outer: names of the groups of which these channels are a part: of a head, its dimensions.
        span: how many units of a layer one channel stands for at least; of a head, the head's dimensions.
        var: the axis in the function.
        layers: the axis of the scanned layers that the channels are in, where each layer may keep its own; None where
            what stays is one choice.
        least: how many must stay: so many as a top_k takes of them.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    outer: tuple[str, ...]
    span: int
    var: Var = dataclasses.field(repr=False)
    layers: Var | None = dataclasses.field(default=None, repr=False)
    least: int = 1


@dataclasses.dataclass(frozen=True)
class FrozenAxis:
    """An axis of a parameter that must stay, or a part of it.

    Attributes:
        path: the parameter's normalised path.
        axis: its axis.
        parts: how it is divided: ``8 x 2``, ``[4, 4, 8]``.
        reasons: what in the function does it, and how to free the axis; one for each part that stays, each once.
        places: where in the function, for each reason, as far as it is known: file, line, function.
    """

    path: str
    axis: int
    parts: str
    reasons: tuple[str, ...]
    places: tuple[str, ...]


def find_members(paths: Sequence[str], program: Program) -> dict[Var, list[Member]]:
    """Return what can be cut, in the order of the parameters, with the axes that it is cut from.

    Args:
        paths: of the parameters, which are the first arguments of the program.
        program: the function.
    """
    params = program.ins[: len(paths)]
    produced, read = _sides(program)
    found: dict[Var, list[Member]] = {}
    for number, (path, value) in enumerate(zip(paths, params, strict=True)):
        for axis, dim in enumerate(value.dims):
            for var in dict.fromkeys(leaf for leaf in leaves(dim) if leaf.reason is None):
                # A recurrent kernel reads and computes the same channels; its last axis is taken to compute them. A table
                # that is the output layer as well computes and reads them along one axis.
                last = not any(is_cut(later, {var: None}) for later in value.dims[axis + 1 :])
                first = not any(is_cut(earlier, {var: None}) for earlier in value.dims[:axis])
                computes, sums = last and (number, var) in produced, (first or not last) and (number, var) in read
                member = Member(path, axis, positions(dim, var), computes, sums)
                found.setdefault(var, []).append(member)
    return found


def find_groups(
    paths: Sequence[str], program: Program, found_members: Mapping[Var, Sequence[Member]]
) -> tuple[ChannelGroup, ...]:
    """Return the channels among what can be cut (`find_members`), in the order of the parameters that have them."""
    params = program.ins[: len(paths)]
    found = {var: members for var, members in found_members.items() if not var.depth}
    names = _names(found)
    widths = _widths(program, params)
    outer = _outer_groups(names, [*widths, *(dim for value in params for dim in value.dims)])
    spans: dict[Var, int] = {}
    for dim in widths:
        for var in leaves(dim):
            spans[var] = min(spans.get(var, size(dim)), _span(dim, var))
    layered, least = layers_of(program), _taken_of(program)
    dims = {path: list(map(resolve, value.dims)) for path, value in zip(paths, params, strict=True)}
    groups = []
    for var, members in found.items():
        own = [dim for dim in dims[members[0].path] if isinstance(dim, Var) and dim in layered.get(var, ())]
        layers = own[0] if own and all(dims[member.path].count(own[0]) == 1 for member in members) else None
        if layers is not None:
            members = [dataclasses.replace(m, layers=dims[m.path].index(layers)) for m in members]
        groups.append(
            ChannelGroup(
                names[var],
                var.size,
                tuple(members),
                tuple(outer[var]),
                spans.get(var, 1),
                var,
                layers,
                least.get(var, 1),
            )
        )
    return tuple(groups)


def _taken_of(program: Program) -> dict[Var, int]:
    """Return how many elements a top_k takes along an axis, at the most."""
    found: dict[Var, int] = {}
    for node in walk(program):
        if node.name == "top_k":
            (along,) = axes(node.equation)
            dim = node.ins[0].dims[along]
            for var in leaves(dim):
                taken = -(-node.shapes[0][along] * var.size // size(dim))
                found[var] = max(found.get(var, 1), taken)
    return found


def find_frozen(paths: Sequence[str], program: Program) -> tuple[FrozenAxis, ...]:
    """Return the axes of parameters that stay, in whole or in part."""
    frozen = []
    for path, value in zip(paths, program.ins, strict=False):
        for axis, dim in enumerate(value.dims):
            reasons = dict.fromkeys(leaf.reason for leaf in leaves(dim) if leaf.reason is not None)
            if reasons:
                places = (reason.place if isinstance(reason, Reason) else "" for reason in reasons)
                frozen.append(FrozenAxis(path, axis, describe(dim), tuple(map(str, reasons)), tuple(places)))
    return tuple(frozen)


def _layers(program: Program) -> Iterator[tuple[tuple[int, ...], Sequence[Dim], Sequence[Dim]]]:
    """Yield for each use of parameters in a layer their numbers, the axes of its units, and those it sums over."""
    for node in walk(program):
        for value, (units, summed) in zip(node.ins, node.notes.units, strict=False):
            if value.sources:
                yield value.sources, units, summed


def _sides(program: Program) -> tuple[set[tuple[int, Var]], set[tuple[int, Var]]]:
    """Return the channels that each parameter computes, and those that it sums over."""
    found: tuple[set[tuple[int, Var]], set[tuple[int, Var]]] = set(), set()
    for sources, *sides in _layers(program):
        for side, variables in zip(sides, found, strict=True):
            variables.update((number, leaf) for number in sources for dim in side for leaf in leaves(dim))
    return found


def _widths(program: Program, params: Sequence[Value]) -> list[Dim]:
    """Return the widths of layers: of their units, of their inputs."""
    return [_width(side, params[sources[0]]) for sources, *sides in _layers(program) for side in sides]


def _width(dims: Sequence[Dim], param: Value) -> Dim:
    """The product of axes in the order of the parameter; a contraction may list them in any."""
    order = {leaf: place for place, leaf in enumerate(leaf for dim in param.dims for leaf in leaves(dim))}
    return product(sorted(dims, key=lambda dim: min((order.get(leaf, -1) for leaf in leaves(dim)), default=-1)))


def _names(found: Mapping[Var, Sequence[Member]]) -> dict[Var, str]:
    firsts = [next((member for member in members if member.produces), members[0]) for members in found.values()]
    return dict(zip(found, unique([f"{first.path}[{first.axis}]" for first in firsts]), strict=True))


def unique(names: Sequence[str]) -> list[str]:
    """Number the names that occur before: ``a``, ``a#2``."""
    count: dict[str, int] = {}
    found = []
    for name in names:
        count[name] = count.get(name, 0) + 1
        found.append(name if count[name] == 1 else f"{name}#{count[name]}")
    return found


def _outer_groups(names: dict[Var, str], dims: Iterable[Dim]) -> dict[Var, dict[str, None]]:
    """Return for each group the names of those it is a part of, as keys."""
    outer: dict[Var, dict[str, None]] = {var: {} for var in names}
    for dim in dims:
        _find_outer(resolve(dim), names, outer)
    for var, above in outer.items():  # of two that are each other's outer factor, the first one is
        for other in [other for other in outer if names[other] in above and names[var] in outer[other]]:
            del above[names[other]]
    return outer


def _find_outer(dim: Dim, names: dict[Var, str], outer: dict[Var, dict[str, None]]) -> None:
    """In a product, whatever can be cut belongs to what can be cut of the outermost such factor."""
    if isinstance(dim, Var):
        return
    inner = dim.factors if isinstance(dim, Prod) else dim.parts
    for part in inner:
        _find_outer(resolve(part), names, outer)
    if isinstance(dim, Prod):
        free_leaves = [[leaf for leaf in leaves(factor) if leaf in names] for factor in inner]
        first, *rest = [found for found in free_leaves if found] or [[]]
        for leaf in (leaf for found in rest for leaf in found if leaf not in first):
            outer[leaf].update((names[above], None) for above in first)


def _span(dim: Dim, var: Var) -> int:
    """How many elements of an axis one element of a variable stands for."""
    dim = resolve(dim)
    if isinstance(dim, Var):
        return 1
    if isinstance(dim, Cat):
        return min(_span(part, var) for part in dim.parts if is_cut(part, {var: None}))
    return min(
        _span(factor, var) * (size(dim) // size(factor)) for factor in dim.factors if is_cut(factor, {var: None})
    )
