"""What onnxruntime would not run in a graph that was converted from JAX: poolings along axes that they do not pool."""

import collections
from collections.abc import Iterator
from typing import Any, NamedTuple

# Pooling along more axes than these is not implemented in onnxruntime.
_MOST = 3


def move_pooled_axes_last(graph: Any) -> None:
    """Let poolings run along the axes that they pool alone; in the bodies of loops, too. Changes the graph in place.

    JAX pools along every axis of an array, most of them by windows of one. jax2onnx puts two axes in front, pools along all others,
    and takes the two away again.
    """
    for inner in _inside(graph):
        move_pooled_axes_last(inner)
    for pooling in [found for node in graph.node if (found := _read(graph, node)) is not None]:
        _replace(graph, pooling)


def nodes_of(graph: Any) -> Iterator[Any]:
    """Yield the nodes of a graph, those in the bodies of loops too."""
    yield from graph.node
    for inner in _inside(graph):
        yield from nodes_of(inner)


def drop_unused(graph: Any) -> None:
    """Leave out constants that no node reads, of which onnxruntime warns; those of loops too. Changes the graph in place."""
    for inner in _inside(graph):
        drop_unused(inner)
    read = {name for node in nodes_of(graph) for name in node.input} | {info.name for info in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _inside(graph: Any) -> list[Any]:
    """The bodies of a graph's loops and branches."""
    return [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]


class _Pooling(NamedTuple):
    """A pooling and what stands around it.

    Attributes:
        nodes: what puts axes in front, the pooling, and what takes them away.
        axes: of the array, those that it does not pool first.
        settings: of the pooling, without the axes that it does not pool.
    """

    nodes: list[Any]
    axes: list[int]
    settings: dict[str, Any]


def _read(graph: Any, node: Any) -> _Pooling | None:
    """Read a pooling that onnxruntime would refuse; None of any other node."""
    from onnx import helper

    settings = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    rank = len(settings.get("kernel_shape", ()))
    if node.op_type not in ("MaxPool", "AveragePool") or rank <= _MOST:
        return None
    made = {name: other for other in graph.node for name in other.output}
    users = collections.defaultdict(list)
    for other in graph.node:
        for name in other.input:
            users[name].append(other)
    second = made.get(node.input[0])
    first = made.get(second.input[0]) if second is not None else None
    after = users[node.output[0]]
    around = [first, second, *after]
    if [other.op_type for other in around if other is not None] != ["Unsqueeze", "Unsqueeze", "Squeeze"]:
        return None
    pads = settings.get("pads", [0] * (2 * rank))
    per_axis = {name: settings[name] for name in ("kernel_shape", "strides", "dilations") if name in settings}
    pooled = [
        axis for axis in range(rank) if any([pads[axis], pads[rank + axis], *(v[axis] != 1 for v in per_axis.values())])
    ]
    if rank - len(pooled) != 2:
        return None
    kept = {name: [values[axis] for axis in pooled] for name, values in per_axis.items()}
    kept["pads"] = [pads[start + axis] for start in (0, rank) for axis in pooled]
    axes = [axis for axis in range(rank) if axis not in pooled] + pooled
    return _Pooling([first, second, node, *after], axes, settings | kept)


def _replace(graph: Any, pooling: _Pooling) -> None:
    """Put the pooling along its own axes in the place of the four nodes."""
    from onnx import helper

    first, _, node, last = pooling.nodes
    result, back = last.output[0], [pooling.axes.index(axis) for axis in range(len(pooling.axes))]
    before, after = f"{result}_channels_first", f"{result}_pooled"
    new = [
        helper.make_node("Transpose", [first.input[0]], [before], perm=pooling.axes),
        helper.make_node(node.op_type, [before], [after], **pooling.settings),
        helper.make_node("Transpose", [after], [result], perm=back),
    ]
    gone = {name for other in pooling.nodes for name in other.output}
    nodes = []
    for other in graph.node:
        if other.output[0] == node.output[0]:
            nodes += new
        elif not gone.intersection(other.output):
            nodes.append(other)
    del graph.node[:]
    graph.node.extend(nodes)
    kept = [info for info in graph.value_info if info.name not in gone]
    del graph.value_info[:]
    graph.value_info.extend(kept)
