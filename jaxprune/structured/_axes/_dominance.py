"""What reaches the results of a program through one operand of a sum alone, found in one pass over its nodes.

The flow is read from the results: a result leads to the node that computes it, a node to its operands. A vertex dominates
another if every way there passes it. Of a graph without cycles the immediate dominator of a vertex is where the dominators of
all that lead to it meet, so that a pass in which these come first finds a tree (Cooper, Harvey, Kennedy, "A Simple, Fast
Dominance Algorithm", 2001); the tree has pointers that jump up (Myers, "An Applicative Random-Access Stack", 1983), which
makes a meeting cost the logarithm of its depth.
"""

from collections.abc import Collection, Hashable, Iterator, Sequence

from jaxprune._jaxpr._primitives import REMAT
from jaxprune.structured._axes._program import Node, Program, Value

# An operand of a sum, by its number.
Edge = tuple[Node, int]
_ROOT = "the results"


class Dominance:
    """The tree of dominators of the values that some results depend on.

    Args:
        program: the function.
        outs: the results.
        sums: nodes of which each operand is told apart.
    """

    def __init__(self, program: Program, outs: Sequence[Value], sums: Collection[Node]) -> None:
        self._sums = frozenset(sums)
        self._parent: dict[Hashable, Hashable] = {_ROOT: _ROOT}
        self._jump: dict[Hashable, Hashable] = {_ROOT: _ROOT}
        self._depth: dict[Hashable, int] = {_ROOT: 0}
        self._edge: dict[Hashable, Edge | None] = {_ROOT: None}
        # Where all that has led to a vertex so far meets.
        self._meeting: dict[Hashable, Hashable] = {}
        for value in outs:
            self._lead(_ROOT, id(value))
        self._read(program)
        for vertex in [vertex for vertex in self._meeting if vertex not in self._parent]:
            self._settle(vertex)

    def knows(self, value: Value) -> bool:
        """Whether a result depends on a value."""
        return id(value) in self._parent

    def edges(self, value: Value) -> Iterator[Edge]:
        """Yield the operands of sums that every way from the results to a value passes, the nearest first."""
        edge = self._edge.get(id(value))
        while edge is not None:
            yield edge
            edge = self._edge[edge]

    def _read(self, program: Program) -> None:
        for node in reversed(program.nodes):
            results = [id(value) for value in node.outs if id(value) in self._meeting]
            for result in results:
                self._settle(result)
                self._lead(result, node)
            if not results:
                continue
            self._settle(node)
            if node.name in REMAT:
                for value in node.bodies[0].outs:
                    self._lead(node, id(value))
                self._read(node.bodies[0])
                continue
            for number, value in enumerate(node.ins):
                if node in self._sums:
                    self._lead(node, (node, number))
                    self._settle((node, number))
                self._lead((node, number) if node in self._sums else node, id(value))

    def _lead(self, above: Hashable, vertex: Hashable) -> None:
        known = self._meeting.get(vertex)
        self._meeting[vertex] = above if known is None else self._meet(known, above)

    def _settle(self, vertex: Hashable) -> None:
        above = self._meeting[vertex]
        depth, jump = self._depth, self._jump
        far = jump[above]
        self._parent[vertex] = above
        even = depth[above] - depth[far] == depth[far] - depth[jump[far]]
        jump[vertex] = jump[far] if even else above
        depth[vertex] = depth[above] + 1
        self._edge[vertex] = above if isinstance(above, tuple) else self._edge[above]

    def _meet(self, a: Hashable, b: Hashable) -> Hashable:
        depth, jump, parent = self._depth, self._jump, self._parent
        if depth[a] < depth[b]:
            a, b = b, a
        while depth[a] > depth[b]:
            a = jump[a] if depth[jump[a]] >= depth[b] else parent[a]
        while a != b:
            a, b = (jump[a], jump[b]) if jump[a] != jump[b] else (parent[a], parent[b])
        return a
