"""Residual branches: sums ``x + f(x)`` in a program, and the program without some of them.

Only what is evaluated once in a call is looked into: the program itself, and bodies that are rematerialised.
"""

import dataclasses
import heapq
from collections.abc import Collection, Iterator, Mapping, Sequence

from jaxprune._jaxpr._primitives import REMAT, SUMS
from jaxprune.structured._axes._dominance import Dominance, Edge
from jaxprune.structured._axes._program import Node, Program, Value


@dataclasses.dataclass(frozen=True, eq=False)
class Branch:
    """A sum ``x + f(x)`` of which ``f(x)`` can be left out.

    Attributes:
        node: the sum; it notes as `stream` which operand is x.
        params: the numbers of the parameters that f alone reads.
        outs: the numbers of the results that are made inside of f and go with it, as the new statistics of its norms.
        ins: the numbers of the state passed in that f alone reads.
    """

    node: Node
    params: tuple[int, ...]
    outs: tuple[int, ...]
    ins: tuple[int, ...] = ()


def find_branches(
    program: Program, params: Sequence[Value], state: Collection[int] = (), given: Sequence[Value] = ()
) -> list[Branch]:
    """Return the residual branches that have parameters of their own, in the order of their evaluation.

    An operand of a sum is a branch if it depends on the other operand, and so on data, and if parameters are read for
    it alone. (In ``x + g(x) + h(x)`` it may depend on an operand of the other one.) Of branches inside each other, one
    that reads nothing beyond what others inside it read is left out; so is one of which a result holds a part beside parts of
    others, as the stacked caches of all layers.

    Args:
        program: the function.
        params: its parameters, the first of its arguments.
        state: the numbers of results that may go: state that is passed on.
        given: state that is passed in, and may go.
    """
    sums = list(_sums(program, _Flow(program, len(params))))
    inside = Dominance(program, [value for number, value in enumerate(program.outs) if number not in state], sums)
    reached = _reached(program, inside) if state else {}
    alone = _alone(program, state, reached)
    own, own_state = (_owned(values, inside, alone) for values in (params, given))
    edges: list[Edge] = [(node, 1 - node.notes.stream) for node in sums if node.notes.stream is not None]
    edges = [edge for edge in edges if any(inside.knows(params[number]) for number in own.get(edge, []))]
    found = []
    for edge in edges:
        lost = tuple(number for number in state if edge in reached[id(program.outs[number])])
        made_in = {other for number in lost for other in reached[id(program.outs[number])]}
        if not any(_apart(edge, other, inside) for other in made_in.intersection(edges)):
            found.append(Branch(edge[0], tuple(own[edge]), lost, tuple(own_state.get(edge, ()))))
    return _with_something_of_their_own(found)


def _apart(edge: Edge, other: Edge, inside: Dominance) -> bool:
    """Whether two operands of sums lie side by side, neither inside of the other."""
    (node, _), (another, _) = edge, other
    return edge != other and edge not in inside.edges(another.outs[0]) and other not in inside.edges(node.outs[0])


def _owned(values: Sequence[Value], inside: Dominance, alone: Mapping[int, frozenset[Edge]]) -> dict[Edge, list[int]]:
    """Return for operands of sums the numbers of the values that are read for them alone."""
    own: dict[Edge, list[int]] = {}
    for number, value in enumerate(values):
        for edge in inside.edges(value) if inside.knows(value) else alone.get(id(value), frozenset()):
            own.setdefault(edge, []).append(number)
    return own


def _with_something_of_their_own(branches: list[Branch]) -> list[Branch]:
    # The parameters of two branches are disjoint, or those of one are among those of the other.
    covered: set[int] = set()
    chosen = set()
    for branch in sorted(branches, key=lambda branch: len(branch.params)):
        if not covered.issuperset(branch.params):
            chosen.add(branch)
            covered.update(branch.params)
    return [branch for branch in branches if branch in chosen]


class _Flow:
    """What each value is made of; values are numbered in the order of their evaluation.

    Args:
        program: the function.
        params: how many of its first arguments are parameters and no data.
    """

    def __init__(self, program: Program, params: int) -> None:
        self._operands: dict[int, Sequence[Value]] = {}
        self._data: set[int] = set(map(id, program.ins[params:]))
        self._number: dict[int, int] = {id(value): 0 for value in program.ins}
        self._read(program)

    def _read(self, program: Program) -> None:
        for node in program.nodes:
            made: list[Sequence[Value]] = [node.ins] * len(node.outs)
            if node.name in REMAT:
                self._read(node.bodies[0])
                made = [[value] for value in node.bodies[0].outs]
            for value, operands in zip(node.outs, made, strict=True):
                self._operands[id(value)] = operands
                self._number[id(value)] = len(self._number)
                if any(id(operand) in self._data for operand in operands):
                    self._data.add(id(value))

    def depends(self, value: Value, origins: Sequence[Value]) -> bool:
        """Whether a value depends on data, and on one of the others."""
        wanted = {id(origin) for origin in origins if id(origin) in self._number}
        if not wanted or id(value) not in self._data:
            return False
        # The latest first, and none before the first of those wanted: not further back than it has to be.
        first = min(self._number[origin] for origin in wanted)
        seen, waiting = {id(value)}, [(-self._number[id(value)], id(value))]
        while waiting:
            _, latest = heapq.heappop(waiting)
            if latest in wanted:
                return True
            for operand in map(id, self._operands.get(latest, ())):
                if operand not in seen and self._number.get(operand, -1) >= first:
                    seen.add(operand)
                    heapq.heappush(waiting, (-self._number[operand], operand))
        return False


def _sums(program: Program, flow: _Flow) -> Iterator[Node]:
    """Yield sums of which one operand depends on the other, and take note of which."""
    addends: dict[int, list[Value]] = {}
    for node in program.nodes:
        if node.name in REMAT:
            yield from _sums(node.bodies[0], flow)
        if node.name in SUMS and all(value.shape == node.shapes[0] for value in node.ins):
            first, second = node.ins
            near = [(0, [first], second), (1, [second], first)]
            far = [(stream, addends.get(id(kept), []), branch) for stream, (kept,), branch in near]
            stream = next((stream for stream, origins, branch in near + far if flow.depends(branch, origins)), None)
            addends[id(node.outs[0])] = node.ins
            if stream is not None:
                node.notes.stream = stream
                yield node


def _reached(program: Program, inside: Dominance) -> dict[int, frozenset[Edge]]:
    """Return for each value the operands of sums that it depends on the inside of, otherwise than through them."""
    found: dict[int, frozenset[Edge]] = {id(value): frozenset(inside.edges(value)) for value in program.ins}
    none: frozenset[Edge] = frozenset()

    def read(program: Program) -> None:
        for node in program.nodes:
            if node.name in REMAT:
                read(node.bodies[0])
                below = [found.get(id(value), none) for value in node.bodies[0].outs]
            else:
                each = (found.get(id(value), none) - {(node, number)} for number, value in enumerate(node.ins))
                below = [none.union(*each)] * len(node.outs)
            for value, edges in zip(node.outs, below, strict=True):
                found[id(value)] = edges.union(inside.edges(value))

    read(program)
    return found


def _alone(
    program: Program, state: Collection[int], reached: Mapping[int, frozenset[Edge]]
) -> dict[int, frozenset[Edge]]:
    """Return for each value that state depends on the operands of sums with which all that state goes."""
    found: dict[int, frozenset[Edge]] = {}

    def meet(value: Value, edges: frozenset[Edge]) -> None:
        found[id(value)] = found[id(value)] & edges if id(value) in found else edges

    def read(program: Program) -> None:
        for node in reversed(program.nodes):
            above = [found[id(value)] for value in node.outs if id(value) in found]
            if above:
                body = node.bodies[0] if node.name in REMAT else None
                for value in node.ins if body is None else body.outs:
                    meet(value, frozenset.intersection(*above))
                if body is not None:
                    read(body)

    for number in state:
        meet(program.outs[number], reached[id(program.outs[number])])
    read(program)
    return found


def _sides(node: Node) -> tuple[Value, Value]:
    """Return the operand of a sum that stays, and the one that is a branch."""
    stream = node.notes.stream
    assert stream is not None
    return node.ins[stream], node.ins[1 - stream]


def needed(program: Program, dropped: Collection[Node], outs: Sequence[Value]) -> set[int]:
    """Return the identities of all values that some of a program's results depend on, without the dropped branches."""
    found = set(map(id, outs))
    for node in reversed(program.nodes):
        if not any(id(value) in found for value in node.outs):
            continue
        if node in dropped:
            found.add(id(_sides(node)[0]))
        elif node.name in REMAT:
            found |= needed(node.bodies[0], dropped, node.bodies[0].outs)
        else:
            found.update(map(id, node.ins))
    return found


def without(program: Program, dropped: Collection[Node], outs: Sequence[Value]) -> Program:
    """Return a program of some of the results, without the dropped branches and what only they need."""
    alive = needed(program, dropped, outs)
    same_as: dict[int, Value] = {}
    nodes = []
    for node in program.nodes:
        if not any(id(value) in alive for value in node.outs):
            continue
        ins = [same_as.get(id(value), value) for value in node.ins]
        if node in dropped:
            kept, _ = _sides(node)
            same_as[id(node.outs[0])] = same_as.get(id(kept), kept)
        elif node.name in REMAT:
            body = without(node.bodies[0], dropped, node.bodies[0].outs)
            read = [id(value) in alive for value in body.ins]
            body.ins = [value for value, stays in zip(body.ins, read, strict=True) if stays]
            ins = [value for value, stays in zip(ins, read, strict=True) if stays]
            nodes.append(dataclasses.replace(node, ins=ins, bodies=[body]))
        else:
            nodes.append(dataclasses.replace(node, ins=ins))
    return Program(list(program.ins), nodes, [same_as.get(id(value), value) for value in outs])
