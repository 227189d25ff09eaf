"""Elements that are chosen by number: where the numbers do no more than choose, as those of experts, their axis can be cut.

`top_k` and `argmax` number what they choose among. A cut gives those that stay other numbers, in the same order. Where a number is compared
with all of them (one_hot), or takes or adds to an entry of an array that is cut with them (a lookup, a count), or is sorted, all comes
out as before. Whatever else is done with a number, it may not change.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune._jaxpr._primitives import ARG_REDUCTIONS, COPIES, LAYOUT
from jaxprune._jaxpr._records import Gather, axes
from jaxprune.structured._axes._dims import Dim, freeze, size, unify
from jaxprune.structured._axes._program import Node, Program, Value
from jaxprune.structured._axes._reasons import COMPARED, Reason, numbers


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
    node.notes.compared = node.outs[0].dealt = every.numbering


def known_number(value: Any) -> Any:
    """Return a constant that is one number; None where it is none."""
    return value if isinstance(value, (int, float, np.generic, np.ndarray)) and np.ndim(value) == 0 else None


def looks_up(node: Node, along: Sequence[int]) -> bool:
    """Whether a gather or a scatter is at the numbers of what was chosen; the axis that they stand for is then that of the choice."""
    operand, indices = node.ins[:2]
    if indices.chosen is None or indices.shape[-1] != 1 or len(along) != 1:
        return False
    dim = operand.dims[along[0]]
    if size(indices.chosen[0]) != size(dim):
        return False
    unify(dim, indices.chosen[0], node.because(node.name))
    node.notes.looked_up = True
    return True


def note_choice(node: Node) -> None:
    """Follow chosen numbers: into other layouts and comparisons; what else reads them lets them stay."""
    if node.name == "top_k" or node.name in ARG_REDUCTIONS:
        _stay(node.ins[0])
        (along,) = axes(node.equation)
        choice = node.ins[0].dims[along], node.because(numbers(node.name), renumbers=True)
        if jnp.issubdtype(node.ins[0].dtype, jnp.floating):
            _hand_on(node.outs[-1], choice)
        else:  # none may be the smallest number there is, and what is masked would be no less
            freeze(*choice)
    elif node.notes.compared is None:
        followed = _follow(node)
        for value in node.ins:
            if value not in followed:
                _stay(value)


def _follow(node: Node) -> Sequence[Value]:
    """Take note of results that are chosen numbers again; return the operands whose numbers do no more here than to choose."""
    ins, out = node.ins, node.outs[0] if node.outs else None
    if (node.name in LAYOUT and node.name != "reduce_precision") or node.name == "sort":
        origins = ins if node.name in COPIES or node.name == "sort" else ins[:1] * len(node.outs)
        for value, origin in zip(node.outs, origins, strict=True):
            _hand_on(value, origin.chosen)
        return [value for value in origins if value.shifted is None]
    if out is None:
        return ()
    if node.name == "gather":
        whole = not Gather.of(node.equation).fill
        if whole:
            _hand_on(out, ins[0].chosen)
        return ins[:1] * (whole and ins[0].shifted is None) + ins[1:] * node.notes.looked_up
    if node.notes.looked_up:
        out.dealt = ins[1].chosen[0] if ins[1].chosen is not None else None
        return ins[1:2]
    return _from_the_end(node, out)


def _from_the_end(node: Node, out: Value) -> Sequence[Value]:
    """Follow what indexing does to numbers below 0, which count from the end: no chosen one is."""
    if node.name == "select_n" and node.ins[0].never:
        _hand_on(out, node.ins[1].chosen)
        return [value for value in node.ins if value is not node.ins[1] or value.shifted is None]
    if node.name not in ("max", "lt", "add") or (node.ins[0].chosen is None) == (node.ins[1].chosen is None):
        return ()
    numbers, other = node.ins if node.ins[0].chosen is not None else reversed(node.ins)
    if node.name == "add":
        out.shifted = numbers.chosen
    elif other.uniform != 0 or (node.name == "lt" and numbers is not node.ins[0]):
        return ()
    elif node.name == "max":
        _hand_on(out, numbers.chosen)
    else:
        out.never = True
    return (numbers,)


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
    """Yield what reads the numbers of an axis in any layout, None where they are returned, or are rounded."""
    assert value.numbering is not None
    if id(value) in returned or not _holds(value.dtype, size(value.numbering)):
        yield None
    for node in readers.get(id(value), ()):
        if node.name in LAYOUT and node.name != "reduce_precision":
            for out in node.outs:
                yield from _uses(out, readers, returned)
        else:
            yield node


def _hand_on(value: Value, chosen: tuple[Dim, Reason] | None) -> None:
    if chosen is not None and not _holds(value.dtype, size(chosen[0])):
        freeze(*chosen)  # rounded, or modulo a power of two
        return
    value.chosen = chosen


def _holds(dtype: Any, count: int) -> bool:
    """Whether numbers below this one are all told apart."""
    if jnp.issubdtype(dtype, jnp.floating):
        return bool(count <= 2 ** (jnp.finfo(dtype).nmant + 1))
    return bool(jnp.issubdtype(dtype, jnp.integer)) and count - 1 <= int(jnp.iinfo(dtype).max)


def _stay(value: Value) -> None:
    for found in (value.chosen, value.shifted):
        if found is not None:
            freeze(*found)
