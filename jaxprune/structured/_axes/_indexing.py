"""Rules for what reads or writes at places known only at run time: gather, scatter, dynamic slices."""

from typing import Any

from jaxprune._jaxpr import _records
from jaxprune._jaxpr._primitives import SCATTERS
from jaxprune._jaxpr._records import Gather, Scatter
from jaxprune.structured._axes._choices import looks_up
from jaxprune.structured._axes._dims import Dim, freeze, fresh, unify
from jaxprune.structured._axes._program import Node, Rule, together
from jaxprune.structured._axes._reasons import CHOSEN, Reason


def _gather(node: Node) -> list[list[Dim]]:
    operand, indices = node.ins
    gather = Gather.of(node.equation)
    batch, _ = gather.batch
    chosen = node.because(CHOSEN)
    freeze(indices.dims[-1], chosen)
    for axis, other in zip(*gather.batch, strict=True):
        unify(operand.dims[axis], indices.dims[other], node.because("gather"))
    windows: list[Dim] = []
    taken: list[Dim | None] = []  # for each axis of the operand: what a window of it is, where that may be cut
    looked_up = looks_up(node, gather.chosen)
    for axis, (dim, width) in enumerate(zip(operand.dims, gather.window, strict=True)):
        whole = width == operand.shape[axis] and axis not in batch
        if axis in (*gather.collapsed, *batch):
            if axis in gather.collapsed and not (looked_up and axis in gather.chosen):
                freeze(dim, node.because(CHOSEN, renumbers=True))
            taken.append(None)
            continue
        if not whole:
            freeze(dim, chosen)
        windows.append(dim if whole else fresh(width, chosen))
        taken.append(dim if whole else None)
    node.notes.windows = taken
    node.notes.units = [([dim for dim in taken if dim is not None], [])]  # a table computes its rows
    rest = iter(indices.dims[:-1])
    inner = iter(windows)
    rank = len(node.shapes[0])
    return [[next(inner) if axis in gather.offset else next(rest) for axis in range(rank)]]


def _scatter(node: Node) -> list[list[Dim]]:
    operand, indices, updates = node.ins
    scatter = Scatter.of(node.equation)
    chosen, reason = node.because(CHOSEN), node.because("scatter")
    freeze(indices.dims[-1], chosen)
    for axis, other in zip(*scatter.batch, strict=True):
        unify(operand.dims[axis], indices.dims[other], reason)
    # Where the sum of what is added begins with zeros, it stays zero for what was not chosen.
    counted = (
        node.name == "scatter-add"
        and operand.uniform == 0
        and scatter.chosen == scatter.inserted
        and looks_up(node, scatter.chosen)
    )
    for axis in () if counted else scatter.inserted:
        freeze(operand.dims[axis], chosen)
    hidden = (*scatter.inserted, *scatter.batch[0])
    shown = [axis for axis in range(len(operand.shape)) if axis not in hidden]
    for axis, window in zip(shown, scatter.window, strict=True):
        _whole_or_frozen(operand, axis, updates, window, chosen)
    others = [axis for axis in range(len(updates.shape)) if axis not in scatter.window]
    for axis, dim in zip(others, indices.dims[:-1], strict=True):
        together(reason, [updates.dims[axis], dim])
    return [list(operand.dims)]


def _dynamic_slice(node: Node) -> list[list[Dim]]:
    operand = node.ins[0]
    chosen = node.because(CHOSEN)
    out: list[Dim] = []
    taken: list[Dim | None] = []
    for axis, width in enumerate(_records.window_sizes(node.equation)):
        whole = width == operand.shape[axis]
        if not whole:
            freeze(operand.dims[axis], chosen)
        out.append(operand.dims[axis] if whole else fresh(width, chosen))
        taken.append(operand.dims[axis] if whole else None)
    node.notes.windows = taken
    return [out]


def _dynamic_update_slice(node: Node) -> list[list[Dim]]:
    operand, update = node.ins[:2]
    for axis in range(len(operand.shape)):
        _whole_or_frozen(operand, axis, update, axis, node.because(CHOSEN))
    return [list(operand.dims)]


def _whole_or_frozen(operand: Any, axis: int, update: Any, other: int, chosen: Reason) -> None:
    """Where a window is the whole axis the two are one; else both stay."""
    if operand.shape[axis] == update.shape[other]:
        unify(operand.dims[axis], update.dims[other], chosen)
    else:
        freeze(operand.dims[axis], chosen)
        freeze(update.dims[other], chosen)


RULES: dict[str, Rule] = {
    "gather": _gather,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    **dict.fromkeys(SCATTERS, _scatter),
}
