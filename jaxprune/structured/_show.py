"""A graph to look at: tables, and a drawing in the language of Graphviz."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Group as RichGroup

    from jaxprune.structured._graph import Graph


def tables(graph: "Graph") -> "RichGroup":
    """Return a table of the coupled groups, one of what can be dropped, and one of the axes that stay."""
    from rich.console import Group as RichGroup
    from rich.markup import escape
    from rich.table import Table

    groups = Table(title="Channels that are cut together", title_justify="left", show_lines=True)
    groups.add_column("group", overflow="fold")
    groups.add_column("channels", justify="right")
    groups.add_column(escape("members: parameter[axis]"), overflow="fold")
    groups.add_column("part of", overflow="fold")
    for group in graph.groups:
        members = "\n".join(
            f"{member.path}[{member.axis}]" + (f" of {len(member.channels)}" * (len(member.channels) != group.size))
            for member in group.members
        )
        groups.add_row(group.name, str(group.size), members, "\n".join(group.outer))
    blocks = Table(title="What can be dropped as a whole", title_justify="left", show_lines=True)
    blocks.add_column("block", overflow="fold")
    blocks.add_column("layers", justify="right")
    blocks.add_column("parameters", overflow="fold")
    for block in graph.blocks:
        blocks.add_row(block.name, str(block.size) if block.members else "a branch", "\n".join(block.paths))
    frozen = Table(title="Axes that stay", title_justify="left")
    frozen.add_column(escape("parameter[axis]"), overflow="fold")
    frozen.add_column("size", justify="right")
    frozen.add_column("because", overflow="fold")
    for axis in graph.frozen:
        frozen.add_row(f"{axis.path}[{axis.axis}]", axis.parts, "; ".join(axis.reasons))
    return RichGroup(groups, *([blocks] if graph.blocks else []), frozen)


def dot(graph: "Graph") -> str:
    """Return an undirected graph: groups in boxes, tied to the parameters they are cut from."""
    lines = ["graph channels {", "  rankdir=LR;", "  node [fontname=sans];"]
    paths = dict.fromkeys(member.path for group in graph.groups for member in group.members)
    lines += [f"  {_quoted('param ' + path)} [label={_quoted(path)}, shape=plain];" for path in paths]
    for group in graph.groups:
        name = _quoted("group " + group.name)
        lines.append(f"  {name} [label={_quoted(f'{group.name}: {group.size}')}, shape=box];")
        for member in group.members:
            style = "" if member.produces else ", style=dashed"
            lines.append(f"  {name} -- {_quoted('param ' + member.path)} [label={_quoted(str(member.axis))}{style}];")
    return "\n".join([*lines, "}"]) + "\n"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
