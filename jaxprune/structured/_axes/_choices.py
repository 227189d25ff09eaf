"""Elements that are chosen by number: where the numbers do no more than choose, as those of experts, their axis can be cut.

`top_k` and `argmax` number what they choose among. A cut gives those that stay other numbers, in the same order; where a number is only
compared with all of them (one_hot), the comparison comes out as before. Whatever else is done with a number, it may not change.
"""

from collections.abc import Iterator

from jaxprune._jaxpr._primitives import ARG_REDUCTIONS, LAYOUT
from jaxprune._jaxpr._records import axes
from jaxprune.structured._axes._dims import freeze, size, unify
from jaxprune.structured._axes._program import Node, Program, Value
from jaxprune.structured._axes._reasons import COMPARED, numbers


def note_compared(node: Node) -> None:
    """Where all numbers of an axis are compared with chosen ones, the two axes are one; with something else, they stay."""
    left, right = node.ins
    if (left.numbering is None) == (right.numbering is None):
        return
    every, other = (right, left) if left.numbering is None else (left, right)
    assert every.numbering is not None
    if other.chosen is None or size(other.chosen[0]) != size(every.numbering):
        freeze(every.numbering, node.because(COMPARED))
        return
    unify(every.numbering, other.chosen[0], node.because(COMPARED))
    node.notes.compared = every.numbering


def note_choice(node: Node) -> None:
    """Follow chosen numbers: into other layouts and comparisons; what else reads them lets them stay."""
    if node.name == "top_k" or node.name in ARG_REDUCTIONS:
        (along,) = axes(node.equation)
        node.outs[-1].chosen = node.ins[0].dims[along], node.because(numbers(node.name), renumbers=True)
    elif node.name not in LAYOUT and node.notes.compared is None:
        for value in node.ins:
            _stay(value)


def settle_choices(program: Program) -> None:
    """Find the numbers that are compared with chosen ones and used for nothing else; all others stay, and so does what is returned."""
    for value in program.outs:
        _stay(value)
    readers: dict[int, list[Node]] = {}
    for node in program.nodes:
        for value in node.ins:
            readers.setdefault(id(value), []).append(node)
    returned = set(map(id, program.outs))
    met: set[int] = set()
    for node in program.nodes:
        if node.name != "iota":
            continue
        uses = list(_uses(node.outs[0], readers, returned))
        if uses and all(use is not None and use.notes.compared is not None for use in uses):
            node.notes.renumbered = True
            met.update(map(id, uses))
    for node in program.nodes:
        if node.notes.compared is not None and id(node) not in met:
            freeze(node.notes.compared, node.because(COMPARED))


def _uses(value: Value, readers: dict[int, list[Node]], returned: set[int]) -> Iterator[Node | None]:
    """Yield what reads a value in any layout, None where it is returned."""
    if id(value) in returned:
        yield None
    for node in readers.get(id(value), ()):
        if node.name in LAYOUT:
            for out in node.outs:
                yield from _uses(out, readers, returned)
        else:
            yield node


def _stay(value: Value) -> None:
    if value.chosen is not None:
        freeze(*value.chosen)
