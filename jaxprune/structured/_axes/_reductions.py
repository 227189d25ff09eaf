"""Rules for what sums over axes or looks along them: contractions, convolutions, reductions, windows, sorting."""

from typing import Any

from jaxprune._jaxpr._primitives import ARG_REDUCTIONS, CUMULATIVE, REDUCTIONS, WINDOWED
from jaxprune._jaxpr._records import Convolution, Dot, RaggedDot, Windows, axes
from jaxprune.structured._axes import _reasons
from jaxprune.structured._axes._dims import Dim, freeze, fresh, product, resolve, unify
from jaxprune.structured._axes._program import Node, Rule, free, opaque, together


def _dot_general(node: Node) -> list[list[Dim]]:
    left, right = node.ins
    (left_sum, right_sum), (left_batch, right_batch) = Dot.of(node.equation)
    for a, b in [*zip(left_sum, right_sum, strict=True), *zip(left_batch, right_batch, strict=True)]:
        unify(left.dims[a], right.dims[b], node.because("a contraction"))
    batch = [left.dims[axis] for axis in left_batch]
    free_left = [dim for axis, dim in enumerate(left.dims) if axis not in (*left_sum, *left_batch)]
    free_right = [dim for axis, dim in enumerate(right.dims) if axis not in (*right_sum, *right_batch)]
    summed = [left.dims[axis] for axis in left_sum]
    node.notes.macs = [*batch, *free_left, *free_right, *summed]
    # For each operand the axes that number the units of a layer, and those that a unit sums over.
    node.notes.units = [(free_left, summed), (free_right, [right.dims[axis] for axis in right_sum])]
    return [[*batch, *free_left, *free_right]]


def _ragged_dot(node: Node) -> list[list[Dim]]:
    """Rows dealt out to groups, one behind the other: a group that was not chosen has none, and can go."""
    left, right, *sizes = node.ins
    ragged = RaggedDot.of(node.equation)
    (left_sum, right_sum), (left_batch, _) = ragged.contract, ragged.batch
    if (
        left_batch
        or len(sizes) != 1
        or len(sizes[0].shape) != 1
        or len(ragged.groups) != 1
        or ragged.rows[0] in left_sum
    ):
        node.notes.opaque = True  # of vmap, or a gradient
        return opaque(node)
    for a, b in zip(left_sum, right_sum, strict=True):
        unify(left.dims[a], right.dims[b], node.because("a contraction"))
    (group,) = ragged.groups
    unify(right.dims[group], sizes[0].dims[0], node.because("ragged_dot"))
    if sizes[0].dealt is None or resolve(sizes[0].dealt) is not resolve(sizes[0].dims[0]):
        freeze(right.dims[group], node.because(_reasons.DEALT))
    rows = [dim for axis, dim in enumerate(left.dims) if axis not in left_sum]
    units = [dim for axis, dim in enumerate(right.dims) if axis not in (*right_sum, group)]
    summed = [left.dims[axis] for axis in left_sum]
    node.notes.macs = [*rows, *units, *summed]
    node.notes.units = [(rows, summed), (units, [right.dims[axis] for axis in right_sum]), ([], [])]
    return [[*rows, *units]]


def _convolution(node: Node) -> list[list[Dim]]:
    image, kernel = node.ins
    conv = Convolution.of(node.equation)
    (batch, features, *places), (outs, ins, *windows), groups = conv.image, conv.kernel, conv.groups
    if conv.image_groups > 1:
        return _frozen(node, node.because(_reasons.IMAGE_GROUPS))
    reason, convolved = node.because("a convolution"), node.because(_reasons.CONVOLVED)
    if groups > 1:
        group = fresh(groups)
        unify(image.dims[features], product([group, kernel.dims[ins]]), reason)
        unify(kernel.dims[outs], product([group, fresh(kernel.shape[outs] // groups)]), reason)
        node.notes.groups = group
    else:
        unify(image.dims[features], kernel.dims[ins], reason)
    out: list[Any] = [None] * len(image.shape)
    out_batch, out_features, *out_places = conv.result
    out[out_batch], out[out_features] = image.dims[batch], kernel.dims[outs]
    for axis, (place, window, target) in enumerate(zip(places, windows, out_places, strict=True)):
        freeze(kernel.dims[window], node.because(_reasons.WINDOW))
        plain = conv.strides[axis] == conv.image_dilation[axis] == 1
        if kernel.shape[window] == 1 and plain and conv.padding[axis] == (0, 0):
            out[target] = image.dims[place]
        else:
            freeze(image.dims[place], convolved)
            out[target] = fresh(node.shapes[0][target], convolved)
    node.notes.units = [([], []), ([kernel.dims[outs]], [kernel.dims[ins]])]
    node.notes.macs = [*out, *(kernel.dims[window] for window in windows), kernel.dims[ins]]
    return [out]


def _frozen(node: Node, reason: str) -> list[list[Dim]]:
    for value in node.ins:
        for dim in value.dims:
            freeze(dim, reason)
    return [free(shape, reason) for shape in node.shapes]


def _reduce(node: Node) -> list[list[Dim]]:
    gone = axes(node.equation)
    return [[dim for axis, dim in enumerate(node.ins[0].dims) if axis not in gone]]


def _along(node: Node) -> list[list[Dim]]:
    """Cumulative sums, sorting: a result of the same shape that depends on the order along one axis."""
    (along,) = axes(node.equation)
    for value in node.ins:
        freeze(value.dims[along], node.because(_reasons.runs_along(node.name)))
    dims = [
        together(node.because(node.name), [value.dims[i] for value in node.ins]) for i in range(len(node.ins[0].shape))
    ]
    return [list(dims) for _ in node.shapes]


def _top_k(node: Node) -> list[list[Dim]]:
    (value,), (axis,) = node.ins, axes(node.equation)
    dims = list(value.dims)
    dims[axis] = fresh(node.shapes[0][axis], node.because(_reasons.numbers("top_k")))
    return [list(dims) for _ in node.shapes]


def _windowed(node: Node) -> list[list[Dim]]:
    windows, shape = Windows.of(node.equation), node.shapes[0]
    rank = len(shape)
    (value, *rest) = (operand for operand in node.ins if len(operand.shape) == rank)
    dims = list(value.dims)
    for axis in range(rank):
        untouched = windows.size[axis] == windows.stride[axis] == windows.dilation[axis] == 1 and windows.padding[
            axis
        ] == (0, 0)
        for operand in rest:
            if untouched:
                unify(value.dims[axis], operand.dims[axis], node.because(node.name))
            else:
                freeze(operand.dims[axis], node.because(_reasons.POOLED))
        if not untouched:
            freeze(value.dims[axis], node.because(_reasons.POOLED))
            dims[axis] = fresh(shape[axis], node.because(_reasons.POOLED))
    return [dims]


def _scattered_windows(node: Node) -> list[list[Dim]]:
    """The gradient of the largest in each window: its result looks like the second operand."""
    _windowed(node)
    return [list(node.ins[1].dims)]


RULES: dict[str, Rule] = {
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _convolution,
    "sort": _along,
    "top_k": _top_k,
    **dict.fromkeys(REDUCTIONS, _reduce),
    **dict.fromkeys(ARG_REDUCTIONS, _reduce),
    **dict.fromkeys(CUMULATIVE, _along),
    **dict.fromkeys(WINDOWED, _windowed),
    "select_and_scatter_add": _scattered_windows,
}
