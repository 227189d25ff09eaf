"""What the propagation rules work on: a jaxpr without calls, in which every axis of every value carries a term."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxprune.structured._axes._dims import Dim, freeze, fresh, size, unify

Dims = tuple[Dim, ...]


@dataclasses.dataclass(eq=False)
class Value:
    """A value: of a call of the function, not of a jaxpr, since calls of one function share a jaxpr.

    Attributes:
        shape: before anything is cut.
        dtype: its dtype.
        dims: a term for each axis.
        const: the array where it is a constant.
        summed: the axes that were summed over to obtain it, where that was the last thing done.
        sources: the numbers of the parameters that it is another layout of.
        numbering: the axis whose elements' numbers it holds, where it holds just these.
    """

    shape: tuple[int, ...]
    dtype: Any
    dims: Dims
    const: Any = None
    summed: Dims | None = None
    sources: tuple[int, ...] = ()
    numbering: Dim | None = None


@dataclasses.dataclass(eq=False)
class Program:
    """Nodes in the order of their evaluation."""

    ins: list[Value]
    nodes: list["Node"]
    outs: list[Value]


@dataclasses.dataclass(eq=False)
class Node:
    """An equation.

    Attributes:
        name: of its primitive.
        eqn: the equation.
        jaxpr: that it stands in.
        ins: its operands.
        outs: its results.
        bodies: the programs inside: of a loop, of branches, of a function with a derivative of its own.
        derivative: the derivative's program, where the function brings its own.
        notes: what the rule found out that evaluating the equation on smaller arrays needs.
    """

    name: str
    eqn: Any
    jaxpr: Any
    ins: list[Value]
    outs: list[Value] = dataclasses.field(default_factory=list)
    bodies: list[Program] = dataclasses.field(default_factory=list)
    derivative: Program | None = None
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def params(self) -> Any:
        """The parameters of the equation."""
        return self.eqn.params

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of its results."""
        return [tuple(var.aval.shape) for var in self.eqn.outvars]


def walk(program: Program) -> Iterator[Node]:
    """Yield all nodes, those inside others as well; not those of derivatives."""
    for node in program.nodes:
        yield node
        for body in node.bodies:
            yield from walk(body)


# A rule relates the axes of the operands and returns the terms of each result.
Rule = Callable[[Node], Sequence[Sequence[Dim]]]


def free(shape: Sequence[int], reason: str | None = None) -> list[Dim]:
    """Return new axes."""
    return [fresh(n, reason) for n in shape]


def opaque(node: Node) -> list[list[Dim]]:
    """Freeze all that an equation touches."""
    reason = f"{node.name} has no rule"
    for value in node.ins:
        for dim in value.dims:
            freeze(dim, reason)
    return [free(shape, reason) for shape in node.shapes]


def together(reason: str, dims: Sequence[Dim]) -> Dim:
    """Make axes of an elementwise operation one; those of one element are repeated and say nothing."""
    longer = [dim for dim in dims if size(dim) != 1]
    for dim in longer[1:]:
        unify(longer[0], dim, reason)
    return longer[0] if longer else dims[0]


def elementwise(node: Node) -> list[list[Dim]]:
    """Make the axes of all operands one, those of the result as well."""
    rank = max((len(value.shape) for value in node.ins), default=0)
    full = [value for value in node.ins if len(value.shape) == rank]
    dims = [together(node.name, [value.dims[axis] for value in full]) for axis in range(rank)]
    return [list(dims) for _ in node.shapes]
