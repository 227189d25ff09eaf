"""Rules for what moves elements about and computes nothing: reshapes, transposes, concatenations, slices, padding."""

from collections.abc import Sequence

from jaxprune._jaxpr import _records
from jaxprune._jaxpr._records import StaticSlice, axes
from jaxprune.structured._axes import _reasons
from jaxprune.structured._axes._dims import Dim, concatenation, freeze, fresh, product, size, unify
from jaxprune.structured._axes._program import Node, Rule, free, together
from jaxprune.structured._axes._reasons import Reason


def _transpose(node: Node) -> list[list[Dim]]:
    return [[node.ins[0].dims[axis] for axis in axes(node.equation)]]


def _squeeze(node: Node) -> list[list[Dim]]:
    gone = axes(node.equation)
    return [[dim for axis, dim in enumerate(node.ins[0].dims) if axis not in gone]]


def _broadcast_in_dim(node: Node) -> list[list[Dim]]:
    (value, *_), (shape,) = node.ins, node.shapes
    dims = free(shape)
    for axis, target in enumerate(axes(node.equation)):
        if value.shape[axis] == shape[target]:
            dims[target] = value.dims[axis]
    return [dims]


def reshaped(dims: Sequence[Dim], shape: Sequence[int], reason: Reason) -> list[Dim]:
    """Return the terms of an array's axes in another shape of as many elements, row-major.

    Axes fall into the smallest blocks that have as many elements before and after; within a block, the product of the
    axes before is the product of the axes after.
    """
    new = free(shape)
    before = [dim for dim in dims if size(dim) != 1]
    after = [dim for dim in new if size(dim) != 1]
    if any(size(dim) == 0 for dim in (*before, *after)):
        for dim in before:
            freeze(dim, reason + f": {_reasons.EMPTY}")
        return free(shape, reason + f": {_reasons.EMPTY}")
    while before and after:
        left, right = [before.pop(0)], [after.pop(0)]
        while (a := size(product(left))) != (b := size(product(right))):
            if a < b:
                left.append(before.pop(0))
            else:
                right.append(after.pop(0))
        unify(product(left), product(right), reason)
    return new


def _reshape(node: Node) -> list[list[Dim]]:
    return [reshaped(node.ins[0].dims, node.shapes[0], node.because("reshape"))]


def _concatenate(node: Node) -> list[list[Dim]]:
    (along,), ranks = axes(node.equation), range(len(node.ins[0].shape))
    return [
        [
            concatenation([value.dims[axis] for value in node.ins])
            if axis == along
            else together(node.because("concatenate"), [value.dims[axis] for value in node.ins])
            for axis in ranks
        ]
    ]


def _split(node: Node) -> list[list[Dim]]:
    (value,), (along,) = node.ins, axes(node.equation)
    parts = free(_records.split_sizes(node.equation))
    unify(value.dims[along], concatenation(parts), node.because("split"))
    return [[part if axis == along else dim for axis, dim in enumerate(value.dims)] for part in parts]


def _stack(node: Node) -> list[list[Dim]]:
    (along,) = axes(node.equation)
    dims = [together(node.because("stack"), pair) for pair in zip(*(value.dims for value in node.ins), strict=True)]
    dims.insert(along, fresh(len(node.ins), node.because(_reasons.STACKED)))
    return [dims]


def _unstack(node: Node) -> list[list[Dim]]:
    (along,), dims = axes(node.equation), list(node.ins[0].dims)
    freeze(dims.pop(along), node.because(_reasons.UNSTACKED))
    return [list(dims) for _ in node.shapes]


def _slice(node: Node) -> list[list[Dim]]:
    (value,) = node.ins
    along = zip(value.dims, *StaticSlice.of(node.equation), node.shapes[0], strict=True)
    pieces = [_piece(node, *axis) for axis in along]
    node.notes.before = [before for before, _ in pieces]
    return [[piece for _, piece in pieces]]


def _piece(node: Node, dim: Dim, start: int, limit: int, stride: int, length: int) -> tuple[Dim | None, Dim]:
    """Return the elements before a slice of an axis, where they are known as an axis, and the slice."""
    whole = size(dim)
    if length == whole:
        return None, dim
    if stride == 1 and length:
        before, piece, after = (fresh(n) if n else None for n in (start, length, whole - limit))
        assert piece is not None
        unify(dim, concatenation([part for part in (before, piece, after) if part is not None]), node.because("slice"))
        return before, piece
    if stride > 1 and whole % stride == 0 and length == whole // stride and start < stride:
        outer = fresh(length)
        unify(dim, product([outer, fresh(stride, node.because(_reasons.ONE_IN))]), node.because("a strided slice"))
        return None, outer
    reason = node.because(_reasons.STRIDED if stride > 1 else _reasons.EMPTY_SLICE)
    freeze(dim, reason)
    return None, fresh(length, reason)


def _pad(node: Node) -> list[list[Dim]]:
    value, fill = node.ins
    assert not fill.shape
    new: list[Dim] = []
    edges: list[tuple[Dim | None, Dim | None]] = []
    added = _records.edges(node.equation)
    for dim, (low, high, interior), length in zip(value.dims, added, node.shapes[0], strict=True):
        before, after = (fresh(n) if n > 0 else None for n in (low, high))
        if low < 0 or high < 0 or interior > 0 or size(dim) == 0:
            freeze(dim, node.because(_reasons.PADDED))
            before = after = None
            new.append(fresh(length, node.because(_reasons.PADDED)))
        else:
            new.append(concatenation([part for part in (before, dim, after) if part is not None]))
        edges.append((before, after))
    node.notes.edges = edges
    return [new]


def _tile(node: Node) -> list[list[Dim]]:
    repeats = free(_records.repeats(node.equation))
    node.notes.repeats = repeats
    return [[product(pair) for pair in zip(repeats, node.ins[0].dims, strict=True)]]


def _rev(node: Node) -> list[list[Dim]]:
    for axis in axes(node.equation):
        freeze(node.ins[0].dims[axis], node.because(_reasons.REVERSED))
    return [list(node.ins[0].dims)]


def _generated(node: Node) -> list[list[Dim]]:
    """Iota and random bits: their values belong to places, so that they are made whole and then cut."""
    return [free(shape) for shape in node.shapes]


def _drawn(node: Node) -> list[list[Dim]]:
    keys = len(node.ins[0].shape)
    (shape,) = node.shapes
    return [[*node.ins[0].dims, *free(shape[keys:])]]


def _random_wrap(node: Node) -> list[list[Dim]]:
    *dims, words = node.ins[0].dims
    freeze(words, node.because(_reasons.KEY_WORDS))
    return [dims]


def _random_unwrap(node: Node) -> list[list[Dim]]:
    return [[*node.ins[0].dims, fresh(node.shapes[0][-1], node.because(_reasons.KEY_WORDS))]]


RULES: dict[str, Rule] = {
    "transpose": _transpose,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast_in_dim,
    "reshape": _reshape,
    "concatenate": _concatenate,
    "split": _split,
    "stack": _stack,
    "unstack": _unstack,
    "slice": _slice,
    "pad": _pad,
    "tile": _tile,
    "rev": _rev,
    "iota": _generated,
    "random_bits": _drawn,
    "random_split": _drawn,
    "random_wrap": _random_wrap,
    "random_unwrap": _random_unwrap,
}
