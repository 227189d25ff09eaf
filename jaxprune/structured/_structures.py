"""Which groups of channels are of one structure: of layers that do the same, whatever their sizes."""

from collections import Counter
from collections.abc import Hashable

from jaxprune.structured._axes._program import walk
from jaxprune.structured._graph import Graph
from jaxprune.structured._groups import ChannelGroup, Member


def structures(graph: Graph) -> dict[str, Hashable]:
    """Return for each group, by its name, a key that is equal for groups of the same structure.

    That is: how often parameters have the channels along an axis that they are computed along, summed over, or neither
    (biases, scales), each with the primitives that take the parameter, and as which operand. Sizes do not matter, nor which axis
    of the parameter it is.
    """
    uses: dict[str, Counter[tuple[str, int]]] = {path: Counter() for path in graph.paths}
    for node in walk(graph.program):
        for position, value in enumerate(node.ins):
            layout = {
                number for out in node.outs for number in out.sources
            }  # what only moves a parameter is no use of it
            for number in set(value.sources) - layout:
                uses[graph.paths[number]][node.name, position] += 1

    def key(group: ChannelGroup) -> Hashable:
        return frozenset(Counter((frozenset(uses[m.path].items()), *_role(m)) for m in group.members).items())

    return {group.name: key(group) for group in graph.groups}


def _role(member: Member) -> tuple[bool, bool, bool]:
    return member.produces, member.reads, member.layers is not None
