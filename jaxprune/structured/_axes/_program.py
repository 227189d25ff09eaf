"""What the propagation rules work on: a jaxpr without calls, in which every axis of every value carries a term."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxprune._jaxpr._equations import Equation
from jaxprune.structured._axes._dims import Dim, freeze, fresh, size, unify
from jaxprune.structured._axes._reasons import Reason, no_rule

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
        uniform: the number that all its elements are, where that is known.
        chosen: where it holds numbers of elements that were chosen along an axis, as top_k does: the axis, and why it would stay.
        shifted: the same where something was added to the numbers, which what is read in the end must not depend on.
        never: whether it is known to be False everywhere.
        dealt: the axis along which it is 0 for all elements that were not chosen, as where those that were are counted.
    """

    shape: tuple[int, ...]
    dtype: Any
    dims: Dims
    const: Any = None
    summed: Dims | None = None
    sources: tuple[int, ...] = ()
    numbering: Dim | None = None
    uniform: Any = None
    chosen: tuple[Dim, Reason] | None = None
    shifted: tuple[Dim, Reason] | None = None
    never: bool = False
    dealt: Dim | None = None


@dataclasses.dataclass(eq=False)
class Program:
    """Nodes in the order of their evaluation."""

    ins: list[Value]
    nodes: list["Node"]
    outs: list[Value]


@dataclasses.dataclass(eq=False)
class Notes:
    """What was found out about an equation that counting, choosing and evaluating it again need.

    Attributes:
        opaque: whether no rule explains it, so that the sizes of its results are those that it happens to give.
        units: for each operand, of a layer, the axes that number its units, and those that a unit sums over.
        macs: of a contraction, the axes whose sizes multiply to its multiply-accumulates.
        groups: of a grouped convolution, the axis of the groups.
        windows: of a gather or a dynamic slice, for each axis of the operand what a window holds, or None where its
            width is fixed.
        before: of a slice, for each axis the elements before it, or None where their number is fixed.
        edges: of a pad, for each axis what is added before and after, or None where its width is fixed.
        repeats: of a tile, for each axis the repeats.
        count: of a mean's division, the axes that were summed over.
        steps: of a scan, the axis that it steps along.
        stream: of a sum ``x + f(x)``, which operand is x.
        compared: of an equality, the axis of which it compares chosen numbers with all (one_hot).
        looked_up: of a gather or a scatter, whether its index is a number of what was chosen along the axis that it stands for.
        renumbered: whether numbers are made that are compared so and used for nothing else: those after a cut.
    """

    opaque: bool = False
    units: Sequence[tuple[Sequence[Dim], Sequence[Dim]]] = ()
    macs: Sequence[Dim] | None = None
    groups: Dim | None = None
    windows: Sequence[Dim | None] = ()
    before: Sequence[Dim | None] = ()
    edges: Sequence[tuple[Dim | None, Dim | None]] = ()
    repeats: Sequence[Dim] = ()
    count: Dims | None = None
    steps: Dim | None = None
    stream: int | None = None
    compared: Dim | None = None
    looked_up: bool = False
    renumbered: bool = False


@dataclasses.dataclass(eq=False)
class Node:
    """An equation.

    Attributes:
        equation: the equation.
        ins: its operands.
        outs: its results.
        bodies: the programs inside: of a loop, of branches, of a function with a derivative of its own.
        derivative: the derivative's program, where the function brings its own.
        notes: what was found out about it.
    """

    equation: Equation
    ins: list[Value]
    outs: list[Value] = dataclasses.field(default_factory=list)
    bodies: list[Program] = dataclasses.field(default_factory=list)
    derivative: Program | None = None
    notes: Notes = dataclasses.field(default_factory=Notes)

    @property
    def name(self) -> str:
        """The name of its primitive."""
        return self.equation.name

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of its results."""
        return self.equation.out_shapes

    def because(self, text: str, *, renumbers: bool = False) -> Reason:
        """Return a reason that knows this equation's place in the function."""
        return Reason(text, lambda: self.equation.place, renumbers=renumbers)


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
    reason = node.because(no_rule(node.name))
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
    reason = node.because(node.name)
    dims = [together(reason, [value.dims[axis] for value in full]) for axis in range(rank)]
    return [list(dims) for _ in node.shapes]
