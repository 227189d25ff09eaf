"""Rules for what sums over axes or looks along them: contractions, convolutions, reductions, windows, sorting."""

from typing import Any

from jaxprune.structured._axes._dims import Dim, freeze, fresh, product, unify
from jaxprune.structured._axes._program import Node, Rule, free, together


def _dot_general(node: Node) -> list[list[Dim]]:
    left, right = node.ins
    (left_sum, right_sum), (left_batch, right_batch) = node.params["dimension_numbers"]
    for a, b in [*zip(left_sum, right_sum, strict=True), *zip(left_batch, right_batch, strict=True)]:
        unify(left.dims[a], right.dims[b], "a contraction")
    batch = [left.dims[axis] for axis in left_batch]
    free_left = [dim for axis, dim in enumerate(left.dims) if axis not in (*left_sum, *left_batch)]
    free_right = [dim for axis, dim in enumerate(right.dims) if axis not in (*right_sum, *right_batch)]
    summed = [left.dims[axis] for axis in left_sum]
    node.notes["macs"] = [*batch, *free_left, *free_right, *summed]
    # For each operand the axes that number the units of a layer, and those that a unit sums over.
    node.notes["units"] = [(free_left, summed), (free_right, [right.dims[axis] for axis in right_sum])]
    return [[*batch, *free_left, *free_right]]


def _convolution(node: Node) -> list[list[Dim]]:
    image, kernel = node.ins
    numbers, params = node.params["dimension_numbers"], node.params
    (batch, features, *places), (outs, ins, *windows) = numbers.lhs_spec, numbers.rhs_spec
    groups = params["feature_group_count"]
    if params["batch_group_count"] > 1:
        return _frozen(node, "a convolution with groups of images")
    if groups > 1:
        group = fresh(groups)
        unify(image.dims[features], product([group, kernel.dims[ins]]), "a grouped convolution")
        unify(kernel.dims[outs], product([group, fresh(kernel.shape[outs] // groups)]), "a grouped convolution")
        node.notes["groups"] = group
    else:
        unify(image.dims[features], kernel.dims[ins], "a convolution")
    out: list[Any] = [None] * len(image.shape)
    out_batch, out_features, *out_places = numbers.out_spec
    out[out_batch], out[out_features] = image.dims[batch], kernel.dims[outs]
    for axis, (place, window, target) in enumerate(zip(places, windows, out_places, strict=True)):
        freeze(kernel.dims[window], "the window of a convolution")
        plain = params["window_strides"][axis] == params["lhs_dilation"][axis] == 1
        if kernel.shape[window] == 1 and plain and tuple(params["padding"][axis]) == (0, 0):
            out[target] = image.dims[place]
        else:
            freeze(image.dims[place], "a convolution runs along it")
            out[target] = fresh(node.shapes[0][target], "a convolution runs along it")
    node.notes["units"] = [([], []), ([kernel.dims[outs]], [kernel.dims[ins]])]
    node.notes["macs"] = [*out, *(kernel.dims[window] for window in windows), kernel.dims[ins]]
    return [out]


def _frozen(node: Node, reason: str) -> list[list[Dim]]:
    for value in node.ins:
        for dim in value.dims:
            freeze(dim, reason)
    return [free(shape, reason) for shape in node.shapes]


def _reduce(node: Node) -> list[list[Dim]]:
    axes = node.params["axes"]
    return [[dim for axis, dim in enumerate(node.ins[0].dims) if axis not in axes]]


def _arg_reduce(node: Node) -> list[list[Dim]]:
    for axis in node.params["axes"]:
        freeze(node.ins[0].dims[axis], f"{node.name} numbers its elements")
    return _reduce(node)


def _along(node: Node, axis: int) -> list[list[Dim]]:
    """A result of the same shape that depends on the order along one axis."""
    for value in node.ins:
        freeze(value.dims[axis], f"{node.name} runs along it")
    dims = [together(node.name, [value.dims[i] for value in node.ins]) for i in range(len(node.ins[0].shape))]
    return [list(dims) for _ in node.shapes]


def _cumulative(node: Node) -> list[list[Dim]]:
    return _along(node, node.params["axis"])


def _sort(node: Node) -> list[list[Dim]]:
    return _along(node, node.params["dimension"])


def _top_k(node: Node) -> list[list[Dim]]:
    (value,) = node.ins
    axis = node.params.get("axis", len(value.shape) - 1)
    freeze(value.dims[axis], "top_k numbers its elements")
    dims = list(value.dims)
    dims[axis] = fresh(node.shapes[0][axis], "top_k numbers its elements")
    return [list(dims) for _ in node.shapes]


def _windowed(node: Node) -> list[list[Dim]]:
    params, shape = node.params, node.shapes[0]
    rank = len(shape)
    ones = (1,) * rank
    (value, *rest) = (operand for operand in node.ins if len(operand.shape) == rank)
    dims = list(value.dims)
    for axis in range(rank):
        untouched = (
            params["window_dimensions"][axis] == 1
            and (params["window_strides"] or ones)[axis] == 1
            and tuple(params["padding"][axis]) == (0, 0)
            and (params.get("base_dilation") or ones)[axis] == 1
        )
        for operand in rest:
            if untouched:
                unify(value.dims[axis], operand.dims[axis], node.name)
            else:
                freeze(operand.dims[axis], "a window runs along it")
        if not untouched:
            freeze(value.dims[axis], "a window runs along it")
            dims[axis] = fresh(shape[axis], "a window runs along it")
    return [dims]


def _scattered_windows(node: Node) -> list[list[Dim]]:
    """The gradient of the largest in each window: its result looks like the second operand."""
    _windowed(node)
    return [list(node.ins[1].dims)]


def _names(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "sort": _sort,
    "top_k": _top_k,
    **_names("reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor", _reduce),
    **_names("argmax argmin", _arg_reduce),
    **_names("cumsum cumprod cummax cummin cumlogsumexp", _cumulative),
    **_names("reduce_window_max reduce_window_min reduce_window_sum", _windowed),
    "select_and_scatter_add": _scattered_windows,
}
