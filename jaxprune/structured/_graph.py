"""The channels of a function: which axes of which parameters must be cut together, and which must stay."""

import dataclasses
from typing import TYPE_CHECKING, Any

from jaxprune._printing import Printable, some
from jaxprune.structured._axes._program import Program, Value
from jaxprune.structured._blocks import Block
from jaxprune.structured._groups import ChannelGroup, FrozenAxis
from jaxprune.structured._show import dot, tables

if TYPE_CHECKING:
    from rich.console import Group as RichGroup


@dataclasses.dataclass(frozen=True, eq=False)
class Graph(Printable):
    """What `trace` found; prints as tables of coupled groups, of blocks, and of frozen axes.

    Attributes:
        groups: channels that can be cut.
        blocks: scanned layers and residual branches that can be dropped.
        frozen: axes that must stay.
        paths: of the parameters, in the order of the program's arguments.
        shapes: of the parameters.
        program: the function.
        inputs: the tree of the shapes of its other arguments.
        outputs: the tree of the shapes of its results.
    """

    groups: tuple[ChannelGroup, ...]
    blocks: tuple[Block, ...]
    frozen: tuple[FrozenAxis, ...]
    paths: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    program: Program = dataclasses.field(repr=False)
    inputs: Any
    outputs: Any

    @property
    def params(self) -> list[Value]:
        """The parameters among the program's arguments."""
        return self.program.ins[: len(self.paths)]

    @property
    def by_path(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters by path."""
        return dict(zip(self.paths, self.shapes, strict=True))

    def group(self, name: str) -> ChannelGroup:
        """Return the group of a name."""
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(f"{name!r} is no group; there are {some(group.name for group in self.groups)}.")

    def __rich__(self) -> "RichGroup":
        """Return the tables for rich to print."""
        return tables(self.groups, self.blocks, self.frozen)

    def to_dot(self) -> str:
        """Return the groups and the parameters they tie together in the language of Graphviz."""
        return dot(self.groups)
