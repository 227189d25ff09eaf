"""Which axes of parameters make a group of channels, which stay, and which channels are parts of others."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from jaxprune.graph._dims import Cat, Dim, Prod, Var, describe, is_cut, leaves, positions, product, resolve, size
from jaxprune.graph._program import Program, Value, walk


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """An axis of a parameter along which a group's channels lie.

    Attributes:
        path: the parameter's normalised path.
        axis: its axis.
        channels: for each element along the axis the channel it belongs to, or -1.
        produces: whether the parameter computes these channels, rather than reads or scales them.
    """

    path: str
    axis: int
    channels: np.ndarray = dataclasses.field(repr=False)
    produces: bool


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
    """

    name: str
    size: int
    members: tuple[Member, ...]
    outer: tuple[str, ...]
    span: int
    var: Var = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class FrozenAxis:
    """An axis of a parameter that must stay, or a part of it: how it is divided, and why."""

    path: str
    axis: int
    parts: str
    reasons: tuple[str, ...]


def find_groups(paths: Sequence[str], program: Program) -> tuple[ChannelGroup, ...]:
    """Return the channels that can be cut, in the order of the parameters that have them.

    Args:
        paths: of the parameters, which are the first arguments of the program.
        program: the function.
    """
    params = program.ins[: len(paths)]
    produced, widths = _layers(program, params)
    found: dict[Var, list[Member]] = {}
    for number, (path, value) in enumerate(zip(paths, params, strict=True)):
        for axis, dim in enumerate(value.dims):
            for var in dict.fromkeys(leaf for leaf in leaves(dim) if leaf.reason is None):
                # A recurrent kernel reads and computes the same channels; its last axis is taken to compute them.
                last = not any(is_cut(later, {var: None}) for later in value.dims[axis + 1 :])
                member = Member(path, axis, positions(dim, var), last and (number, var) in produced)
                found.setdefault(var, []).append(member)
    names = _names(found)
    outer = _outer_groups(names, [*widths, *(dim for value in params for dim in value.dims)])
    spans: dict[Var, int] = {}
    for dim in widths:
        for var in leaves(dim):
            spans[var] = min(spans.get(var, size(dim)), _span(dim, var))
    return tuple(
        ChannelGroup(names[var], var.size, tuple(members), tuple(outer[var]), spans.get(var, 1), var)
        for var, members in found.items()
    )


def find_frozen(paths: Sequence[str], program: Program) -> tuple[FrozenAxis, ...]:
    """Return the axes of parameters that stay, in whole or in part."""
    frozen = []
    for path, value in zip(paths, program.ins, strict=False):
        for axis, dim in enumerate(value.dims):
            reasons = dict.fromkeys(leaf.reason for leaf in leaves(dim) if leaf.reason is not None)
            if reasons:
                frozen.append(FrozenAxis(path, axis, describe(dim), tuple(reasons)))
    return tuple(frozen)


def _layers(program: Program, params: Sequence[Value]) -> tuple[set[tuple[int, Var]], list[Dim]]:
    """Return the channels that each parameter computes, and the widths of layers: of their units, of their inputs."""
    produced: set[tuple[int, Var]] = set()
    widths: list[Dim] = []
    for node in walk(program):
        for value, (units, summed) in zip(node.ins, node.notes.get("units", ()), strict=False):
            if value.sources:
                computed = [leaf for dim in units for leaf in leaves(dim)]
                produced.update(itertools.product(value.sources, computed))
                widths += [_width(side, params[value.sources[0]]) for side in (units, summed)]
    return produced, widths


def _width(dims: Sequence[Dim], param: Value) -> Dim:
    """The product of axes in the order of the parameter; a contraction may list them in any."""
    order = {leaf: place for place, leaf in enumerate(leaf for dim in param.dims for leaf in leaves(dim))}
    return product(sorted(dims, key=lambda dim: min((order.get(leaf, -1) for leaf in leaves(dim)), default=-1)))


def _names(found: dict[Var, list[Member]]) -> dict[Var, str]:
    names: dict[Var, str] = {}
    for var, members in found.items():
        first = next((member for member in members if member.produces), members[0])
        name = f"{first.path}[{first.axis}]"
        same = sum(other == name or other.startswith(name + "#") for other in names.values())
        names[var] = f"{name}#{same + 1}" if same else name
    return names


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
