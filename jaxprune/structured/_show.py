"""A graph and a plan to look at: tables, and a drawing in the language of Graphviz."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from jaxprune._printing import FEW_LINES, folded, in_order
from jaxprune.structured._axes._dims import is_cut
from jaxprune.structured._axes._program import Value
from jaxprune.structured._blocks import Block
from jaxprune.structured._groups import ChannelGroup, FrozenAxis

if TYPE_CHECKING:
    from jaxprune._tables import Table, Tables


def tables(
    groups: Sequence[ChannelGroup],
    inputs: Mapping[str, Value],
    blocks: Sequence[Block],
    frozen: Sequence[FrozenAxis],
    *,
    full: bool,
) -> "Tables":
    """Return a table of the coupled groups and inputs, one of what can be dropped, and one of the axes that stay."""
    from jaxprune._tables import Table, Tables

    coupled = Table(full=full, title="Channels that are cut together", title_justify="left")
    coupled.add_column("group", overflow="fold")
    coupled.add_column("channels", justify="right")
    coupled.add_column("members: parameter[axis]", overflow="fold")
    for group in in_order(groups, lambda group: group.name):
        members = [
            f"{member.path}[{member.axis}]" + (f" of {len(member.channels)}" * (len(member.channels) != group.size))
            for member in group.members
        ]
        members += [
            f"inputs/{path}[{axis}]"
            for path, value in inputs.items()
            for axis, dim in enumerate(value.dims)
            if is_cut(dim, {group.var})
        ]
        size = str(group.size) if group.layers is None else f"{group.size} in each of {group.layers.size} layers"
        name = "\n".join([group.name, *(f"  part of {name}" for name in group.outer)])
        coupled.add_row(name, size, "\n".join(in_order(members)))
    dropped = Table(full=full, legend=False, title="What can be dropped as a whole", title_justify="left")
    dropped.add_column("block", overflow="fold")
    dropped.add_column("layers", justify="right")
    dropped.add_column("parameters, below what they have in common", overflow="fold")
    for block in in_order(blocks, lambda block: block.name):
        common = block.name.partition("#")[0]
        below = [path.removeprefix(common).lstrip("/.") or path for path in block.paths]
        dropped.add_row(block.name, str(block.size) if block.members else "a branch", _listed(below, full=full))
    stays = Table(full=full, legend=False, title="Axes that stay", title_justify="left")
    stays.add_column("parameter[axis]", overflow="fold")
    stays.add_column("size", justify="right")
    stays.add_column("because", overflow="fold")
    for axis in in_order(frozen, lambda axis: axis.path):
        why = [
            f"{reason} ({place})" if place else reason for reason, place in zip(axis.reasons, axis.places, strict=True)
        ]
        stays.add_row(f"{axis.path}[{axis.axis}]", axis.parts, "\n".join(why))
    return Tables(coupled, *([dropped] if blocks else []), stays)


def _listed(names: Iterable[str], *, full: bool) -> str:
    """Write names one behind the other, numbered ones as one."""
    lines = [("", [name]) for name in in_order(names)]
    return ", ".join(cells[0] for _, cells in (lines if full else folded(lines, FEW_LINES)))


def plan_table(title: str, rows: Iterable[tuple[str, str, str, str]], *, full: bool) -> "Table":
    """Return a table of what a plan keeps: parameter and axis, how many stay, of how many, and what else is to be said."""
    from jaxprune._tables import Table

    table = Table(full=full, title=title, title_justify="left")
    table.add_column("parameter[axis]", overflow="fold")
    table.add_column("stay", justify="right")
    table.add_column("of", justify="right")
    listed = in_order(rows, lambda row: row[0])
    said = any(row[-1] for row in listed)
    if said:
        table.add_column("remarks", overflow="fold")
    for row in listed:
        table.add_row(*row[: 3 + said])
    return table


def dot(groups: Sequence[ChannelGroup]) -> str:
    """Return an undirected graph: groups in boxes, tied to the parameters they are cut from."""
    lines = ["graph channels {", "  rankdir=LR;", "  node [fontname=sans];"]
    paths = dict.fromkeys(member.path for group in groups for member in group.members)
    lines += [f"  {_quoted('param ' + path)} [label={_quoted(path)}, shape=plain];" for path in paths]
    for group in groups:
        name = _quoted("group " + group.name)
        lines.append(f"  {name} [label={_quoted(f'{group.name}: {group.size}')}, shape=box];")
        for member in group.members:
            style = "" if member.produces else ", style=dashed"
            lines.append(f"  {name} -- {_quoted('param ' + member.path)} [label={_quoted(str(member.axis))}{style}];")
    return "\n".join([*lines, "}"]) + "\n"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
