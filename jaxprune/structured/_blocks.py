"""What can be dropped as a whole: a layer of a scan over stacked parameters, a residual branch."""

import collections
import dataclasses
import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence

from jaxprune.structured._axes._dims import Var
from jaxprune.structured._axes._program import Node, Program, Value
from jaxprune.structured._axes._residuals import find_branches
from jaxprune.structured._groups import Member, unique


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """Layers that a scan steps through, of which any but the last one left can be dropped; or a residual branch.

    Attributes:
        name: what the paths of its parameters have in common.
        size: the number of layers; of a branch, 1.
        paths: of its parameters: those stacked along the layers; those that the branch alone reads.
        place: the axis of the layers; the sum that the branch is added in.
        members: the axes of parameters that the layers lie along; a branch has none.
        outputs: the numbers of the function's results that go with a branch: state that is made in it.
        inputs: paths of the inputs that go with a branch: state that it alone reads.
    """

    name: str
    size: int
    paths: tuple[str, ...]
    place: Var | Node = dataclasses.field(repr=False)
    members: tuple[Member, ...] = dataclasses.field(default=(), repr=False)
    outputs: tuple[int, ...] = dataclasses.field(default=(), repr=False)
    inputs: tuple[str, ...] = dataclasses.field(default=(), repr=False)


def parts(block: Block) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield what can be dropped alone of a block, by name: each layer with its number, or the branch."""
    if block.members:
        yield from ((f"{block.name}[{layer}]", (layer,)) for layer in range(block.size))
    else:
        yield block.name, ()


def find_blocks(
    paths: Sequence[str],
    program: Program,
    found_members: Mapping[Var, Sequence[Member]],
    state: Collection[int],
    given: Mapping[str, Value],
) -> tuple[Block, ...]:
    """Return what can be dropped: scanned layers, then residual branches, in the order of the parameters and of the sums.

    Args:
        paths: of the parameters, which are the first arguments of the program.
        program: the function.
        found_members: what can be cut, by `find_members`.
        state: the numbers of results that may go: state that is passed on.
        given: by path, the inputs that may go: state that is passed in.
    """
    found = []
    for var, members in found_members.items():
        if var.depth:
            stacked = tuple(dict.fromkeys(member.path for member in members))
            found.append(Block(_common(stacked), var.size, stacked, var, tuple(members)))
    inputs = list(given)
    for branch in find_branches(program, program.ins[: len(paths)], state, list(given.values())):
        own = tuple(paths[number] for number in branch.params)
        ins = tuple(inputs[number] for number in branch.ins)
        found.append(Block(_common(own), 1, own, branch.node, outputs=branch.outs, inputs=ins))
    names = unique([block.name for block in found])
    return tuple(dataclasses.replace(block, name=name) for block, name in zip(found, names, strict=True))


def _common(paths: Sequence[str]) -> str:
    """Return the common beginning of those paths that begin as most of them do."""
    split = [re.split("([/.])", path) for path in paths]  # PyTorch's names have dots
    ((root, _),) = collections.Counter(parts[0] for parts in split).most_common(1)
    levels = zip(*(parts for parts in split if parts[0] == root), strict=False)
    return "".join(level[0] for level in itertools.takewhile(lambda level: len(set(level)) == 1, levels)).rstrip("/.")
