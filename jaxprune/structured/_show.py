"""A graph to look at: tables, and a drawing in the language of Graphviz."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxprune.structured._blocks import Block
from jaxprune.structured._groups import ChannelGroup, FrozenAxis

if TYPE_CHECKING:
    from rich.console import Group as RichGroup


def tables(groups: Sequence[ChannelGroup], blocks: Sequence[Block], frozen: Sequence[FrozenAxis]) -> "RichGroup":
    """Return a table of the coupled groups, one of what can be dropped, and one of the axes that stay."""
    from rich.console import Group as RichGroup

    from jaxprune._tables import Table

    coupled = Table(title="Channels that are cut together", title_justify="left", show_lines=True)
    coupled.add_column("group", overflow="fold")
    coupled.add_column("channels", justify="right")
    coupled.add_column("members: parameter[axis]", overflow="fold")
    coupled.add_column("part of", overflow="fold")
    for group in groups:
        members = "\n".join(
            f"{member.path}[{member.axis}]" + (f" of {len(member.channels)}" * (len(member.channels) != group.size))
            for member in group.members
        )
        size = str(group.size) if group.layers is None else f"{group.size} in each of {group.layers.size} layers"
        coupled.add_row(group.name, size, members, "\n".join(group.outer))
    dropped = Table(title="What can be dropped as a whole", title_justify="left", show_lines=True)
    dropped.add_column("block", overflow="fold")
    dropped.add_column("layers", justify="right")
    dropped.add_column("parameters", overflow="fold")
    for block in blocks:
        dropped.add_row(block.name, str(block.size) if block.members else "a branch", "\n".join(block.paths))
    stays = Table(title="Axes that stay", title_justify="left")
    stays.add_column("parameter[axis]", overflow="fold")
    stays.add_column("size", justify="right")
    stays.add_column("because", overflow="fold")
    for axis in frozen:
        why = [
            f"{reason} ({place})" if place else reason for reason, place in zip(axis.reasons, axis.places, strict=True)
        ]
        stays.add_row(f"{axis.path}[{axis.axis}]", axis.parts, "\n".join(why))
    return RichGroup(coupled, *([dropped] if blocks else []), stays)


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
