"""Rules for what treats every element alike: the axes of all operands and results are the same."""

from jaxprune._jaxpr._primitives import COPIES, ELEMENTWISE
from jaxprune.structured._axes._dims import Dim
from jaxprune.structured._axes._program import Node, Rule, elementwise, opaque


def _each(node: Node) -> list[list[Dim]]:
    """Operands pass unchanged, each to the result of its place."""
    return [list(value.dims) for value in node.ins]


def _bitcast(node: Node) -> list[list[Dim]]:
    """Numbers of another width add or remove an axis, which is not followed."""
    return elementwise(node) if node.shapes[0] == node.ins[0].shape else opaque(node)


RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(COPIES, _each),
    "bitcast_convert_type": _bitcast,
}
