"""Rules for what reads or writes at places known only at run time: gather, scatter, dynamic slices."""

from typing import Any

from jaxprune._jaxpr import _records
from jaxprune._jaxpr._primitives import SCATTERS
from jaxprune._jaxpr._records import Gather, Scatter
from jaxprune.structured._axes._dims import Dim, freeze, fresh, unify
from jaxprune.structured._axes._program import Node, Rule, together

CHOSEN = "elements are chosen by an index"


def _gather(node: Node) -> list[list[Dim]]:
    operand, indices = node.ins
    gather = Gather.of(node.equation)
    batch, _ = gather.batch
    freeze(indices.dims[-1], CHOSEN)
    for axis, other in zip(*gather.batch, strict=True):
        unify(operand.dims[axis], indices.dims[other], "gather")
    windows: list[Dim] = []
    taken: list[Dim | None] = []  # for each axis of the operand: what a window of it is, where that may be cut
    for axis, (dim, width) in enumerate(zip(operand.dims, gather.window, strict=True)):
        whole = width == operand.shape[axis] and axis not in batch
        if axis in (*gather.collapsed, *batch):
            if axis in gather.collapsed:
                freeze(dim, CHOSEN)
            taken.append(None)
            continue
        if not whole:
            freeze(dim, CHOSEN)
        windows.append(dim if whole else fresh(width, CHOSEN))
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
    freeze(indices.dims[-1], CHOSEN)
    for axis, other in zip(*scatter.batch, strict=True):
        unify(operand.dims[axis], indices.dims[other], "scatter")
    for axis in scatter.inserted:
        freeze(operand.dims[axis], CHOSEN)
    hidden = (*scatter.inserted, *scatter.batch[0])
    shown = [axis for axis in range(len(operand.shape)) if axis not in hidden]
    for axis, window in zip(shown, scatter.window, strict=True):
        _whole_or_frozen(operand, axis, updates, window)
    others = [axis for axis in range(len(updates.shape)) if axis not in scatter.window]
    for axis, dim in zip(others, indices.dims[:-1], strict=True):
        together("scatter", [updates.dims[axis], dim])
    return [list(operand.dims)]


def _dynamic_slice(node: Node) -> list[list[Dim]]:
    operand = node.ins[0]
    out: list[Dim] = []
    taken: list[Dim | None] = []
    for axis, width in enumerate(_records.window_sizes(node.equation)):
        whole = width == operand.shape[axis]
        if not whole:
            freeze(operand.dims[axis], CHOSEN)
        out.append(operand.dims[axis] if whole else fresh(width, CHOSEN))
        taken.append(operand.dims[axis] if whole else None)
    node.notes.windows = taken
    return [out]


def _dynamic_update_slice(node: Node) -> list[list[Dim]]:
    operand, update = node.ins[:2]
    for axis in range(len(operand.shape)):
        _whole_or_frozen(operand, axis, update, axis)
    return [list(operand.dims)]


def _whole_or_frozen(operand: Any, axis: int, update: Any, other: int) -> None:
    """Where a window is the whole axis the two are one; else both stay."""
    if operand.shape[axis] == update.shape[other]:
        unify(operand.dims[axis], update.dims[other], "a window")
    else:
        freeze(operand.dims[axis], CHOSEN)
        freeze(update.dims[other], CHOSEN)


RULES: dict[str, Rule] = {
    "gather": _gather,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    **dict.fromkeys(SCATTERS, _scatter),
}
