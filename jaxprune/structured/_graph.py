"""The channels of a function: which axes of which parameters must be cut together, and which must stay."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxprune._printing import Printable, many, some
from jaxprune._tree._given import require_instance
from jaxprune.structured._axes._program import Program, Value
from jaxprune.structured._blocks import Block
from jaxprune.structured._groups import ChannelGroup, FrozenAxis
from jaxprune.structured._show import dot, tables

if TYPE_CHECKING:
    from jaxprune._tables import Tables


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
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
        prunable_inputs: those of them, by path, of which axes may be cut.
        outputs: the tree of the shapes of its results.
        retrace: what traces the function once more, with other inputs.
    """

    groups: tuple[ChannelGroup, ...]
    blocks: tuple[Block, ...]
    frozen: tuple[FrozenAxis, ...]
    paths: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    program: Program
    inputs: Any
    prunable_inputs: Mapping[str, Value]
    outputs: Any
    retrace: Callable[..., "Graph"]

    @property
    def params(self) -> list[Value]:
        """The parameters among the program's arguments."""
        return self.program.ins[: len(self.paths)]

    @property
    def by_path(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters by path."""
        return dict(zip(self.paths, self.shapes, strict=True))

    def at(self, *inputs: Any) -> "Graph":
        """Return the graph of the function with inputs of other shapes: longer sequences, another batch.

        What `count_macs` counts there, say. Functions that were made from a graph ask for it by themselves.

        Args:
            *inputs: examples, as for `trace`.

        Raises:
            ValueError: the function does not take such inputs, or has other channels or blocks then.

        >>> import jax.numpy as jnp
        >>> from jaxprune.structured import count_macs, trace
        >>> graph = trace(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}, jnp.ones((5, 3)))
        >>> count_macs(graph), count_macs(graph.at(jnp.ones((4, 10, 3))))
        (200, 1600)
        """
        shapes = f"inputs of shapes {some(str(jnp.shape(leaf)) for leaf in jax.tree.leaves(inputs))}"
        try:
            found = self.retrace(*inputs)
        except (TypeError, ValueError) as error:
            traced = some(str(leaf.shape) for leaf in jax.tree.leaves(self.inputs))
            raise ValueError(
                f"The function takes no {shapes}; it was traced with {traced}: {str(error).splitlines()[0]}"
            ) from error
        known = {_members(group) for group in found.groups}
        others = [group.name for group in self.groups if _members(group) not in known]
        blocks = [[(block.name, block.size, block.paths) for block in graph.blocks] for graph in (self, found)]
        if others or blocks[0] != blocks[1]:
            raise ValueError(
                f"With {shapes} the function has other {'channels' if others else 'blocks'} than as it was traced: "
                f"{some(others or [block.name for block in self.blocks])} are not the same. Trace it with such inputs."
            )
        return found

    def group(self, name: str) -> ChannelGroup:
        """Return the group of a name."""
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(f"{name!r} is no group; there are {some(group.name for group in self.groups)}.")

    def _in_short(self) -> str:
        found = {"parameter": self.paths, "group": self.groups, "block": self.blocks}
        counted = ", ".join(many(len(items), what) for what, items in found.items())
        return f"{counted}, {len(self.frozen):,} frozen axes"

    def table(self, *, full: bool = False) -> "Tables":
        """Return the tables that are printed; a row for each layer if they are to be `full`."""
        return tables(self.groups, self.prunable_inputs, self.blocks, self.frozen, full=full)

    def to_dot(self) -> str:
        """Return the groups and the parameters they tie together in the language of Graphviz."""
        return dot(self.groups)


def _members(group: ChannelGroup) -> frozenset[tuple[str, int, int | None, bytes]]:
    """What is cut with a group's channels."""
    return frozenset((m.path, m.axis, m.layers, m.channels.tobytes()) for m in group.members)


def require_graph(graph: object, call: str) -> None:
    """Raise a TypeError unless this is what `trace` returns; `call` shows the arguments in their order."""
    require_instance(graph, Graph, call, "Make one by graph = trace(fn, params, *inputs).")
