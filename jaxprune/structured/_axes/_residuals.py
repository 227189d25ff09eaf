"""Residual branches: sums ``x + f(x)`` in a program, and the program without some of them.

Only what is evaluated once in a call is looked into: the program itself, and bodies that are rematerialised.
"""

import dataclasses
from collections.abc import Collection, Iterator, Sequence, Set

from jaxprune._jaxpr._primitives import REMAT, SUMS
from jaxprune.structured._axes._program import Node, Program, Value

_DATA = 1  # the bit of what depends on an argument that is no parameter


@dataclasses.dataclass(frozen=True, eq=False)
class Branch:
    """A sum ``x + f(x)`` of which ``f(x)`` can be left out.

    Attributes:
        node: the sum; it notes as `stream` which operand is x.
        params: the numbers of the parameters that f alone reads.
        outs: the numbers of the results that are made inside of f and go with it, as the new statistics of its norms.
    """

    node: Node
    params: tuple[int, ...]
    outs: tuple[int, ...]


def find_branches(program: Program, params: Sequence[Value], state: Collection[int] = ()) -> list[Branch]:
    """Return the residual branches that have parameters of their own, in the order of their evaluation.

    An operand of a sum is a branch if it depends on the other operand, and so on data, and if parameters are read for
    it alone. (In ``x + g(x) + h(x)`` it may depend on an operand of the other one.) Of branches inside each other, one
    that reads nothing beyond what others inside it read is left out.

    Args:
        program: the function.
        params: its parameters, the first of its arguments.
        state: the numbers of results that may go: state that is passed on.
    """
    above: dict[int, int] = {}
    for number, value in enumerate(program.ins):
        above[id(value)] = (1 << number + 1) | (_DATA if number >= len(params) else 0)
    anything = (1 << len(params) + 1) - 2  # the bits of the parameters
    _find_ancestors(program, above, len(program.ins) + 1)
    used = needed(program, (), program.outs)
    results = [value for number, value in enumerate(program.outs) if number not in state]
    before = needed(program, (), results)
    found = []
    for node in _sums(program, above):
        kept, branch = _sides(node)
        if not above[id(branch)] & ~above.get(id(kept), 0) & anything:
            continue  # it reads no parameter that the stream does not depend on
        after = needed(program, (node,), results)
        inside = before - after
        lost: tuple[int, ...] = ()
        if state:
            made = _made_from(program, inside, node)
            lost = tuple(number for number in state if id(program.outs[number]) in made)
            after |= needed(program, (node,), [program.outs[number] for number in state if number not in lost])
        own = tuple(n for n, value in enumerate(params) if id(value) in used and id(value) not in after)
        if inside and own:
            found.append(Branch(node, own, lost))
    return _with_something_of_their_own(found)


def _with_something_of_their_own(branches: list[Branch]) -> list[Branch]:
    # The parameters of two branches are disjoint, or those of one are among those of the other.
    chosen: list[Branch] = []
    for branch in sorted(branches, key=lambda branch: len(branch.params)):
        within = [other.params for other in chosen if set(other.params) <= set(branch.params)]
        if set(branch.params) > set().union(*within):
            chosen.append(branch)
    return [branch for branch in branches if branch in chosen]


def _find_ancestors(program: Program, above: dict[int, int], count: int) -> int:
    """Number all values, and give each the numbers of what it depends on as the bits of an integer, its own as well."""
    for node in program.nodes:
        if node.name in REMAT:
            count = _find_ancestors(node.bodies[0], above, count)
            below = [above.get(id(value), 0) for value in node.bodies[0].outs]
        else:
            bits = 0
            for value in node.ins:
                bits |= above.get(id(value), 0)
            below = [bits] * len(node.outs)
        for value, bits in zip(node.outs, below, strict=True):
            above[id(value)] = bits | (1 << count)
            count += 1
    return count


def _sums(program: Program, above: dict[int, int]) -> Iterator[Node]:
    """Yield sums of which one operand depends on the other, and take note of which."""
    addends: dict[int, list[Value]] = {}
    for node in program.nodes:
        if node.name in REMAT:
            yield from _sums(node.bodies[0], above)
        if node.name in SUMS and all(value.shape == node.shapes[0] for value in node.ins):
            first, second = node.ins
            near = [(0, [first], second), (1, [second], first)]
            far = [(stream, addends.get(id(kept), []), branch) for stream, (kept,), branch in near]
            stream = next((stream for stream, origins, branch in near + far if _depends(branch, origins, above)), None)
            addends[id(node.outs[0])] = node.ins
            if stream is not None:
                node.notes.stream = stream
                yield node


def _sides(node: Node) -> tuple[Value, Value]:
    """Return the operand of a sum that stays, and the one that is a branch."""
    stream = node.notes.stream
    assert stream is not None
    return node.ins[stream], node.ins[1 - stream]


def _depends(value: Value, origins: Sequence[Value], above: dict[int, int]) -> bool:
    """Whether a value depends on data, and on one of the others; the number of a value is the highest of its bits."""
    bits = above.get(id(value), 0)
    others = [above[id(other)] for other in origins if id(other) in above]
    return bool(bits & _DATA) and any(bits >> (other.bit_length() - 1) & 1 for other in others)


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


def _made_from(program: Program, start: Set[int], dropped: Node) -> set[int]:
    """Return the identities of all values that depend on some of these values otherwise than through a branch."""
    found = set(start)
    for node in program.nodes:
        if node.name in REMAT:
            found |= _made_from(node.bodies[0], found, dropped)
            reached = [id(value) in found for value in node.bodies[0].outs]
        else:
            ins = [_sides(node)[0]] if node is dropped else node.ins
            reached = [any(id(value) in found for value in ins)] * len(node.outs)
        found.update(id(value) for value, is_reached in zip(node.outs, reached, strict=True) if is_reached)
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
