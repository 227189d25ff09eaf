"""What a plan cuts from the inputs of a function, as from the cache of a decoder; and what they were before."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxprune._tree._paths import flatten
from jaxprune.structured._axes._layered import kept_of
from jaxprune.structured._graph import Graph
from jaxprune.structured._plan import Plan, dropped_branches, inputs_of, solve


def with_inputs(plan: Plan, graph: Graph) -> Plan:
    """Return a plan that says as well what it cuts from the inputs of a function, as from the cache of a decoder.

    So a plan that was made from one function's graph serves for another one of the same parameters: channels chosen with the
    function that is trained, cut from the one that decodes and from its cache.

    Args:
        plan: what stays of the parameters.
        graph: of a function of these parameters, by `trace` with ``prunable_inputs=``.

    Returns:
        The plan, for `shrink` to cut inputs by.

    Raises:
        ValueError: the plan does not fit the graph.

    >>> from jaxprune.structured import shrink, trace
    >>> params = {"key": np.ones((3, 4)), "out": np.ones((4, 2))}
    >>> def step(params, x, memory):
    ...     memory = 0.5 * memory + x @ params["key"]
    ...     return memory @ params["out"], memory
    >>> graph = trace(step, params, np.ones((5, 3)), np.ones((5, 4)),
    ...               prunable_inputs=lambda path: path == "1", prunable_outputs=lambda path: path == "1")
    >>> plan = Plan({"key": {1: (0, 2)}, "out": {0: (0, 2)}}, {"key": (3, 4), "out": (4, 2)})
    >>> shrink(with_inputs(plan, graph), np.ones((5, 4))).shape
    (5, 2)
    """
    return dataclasses.replace(plan, inputs=inputs_of(graph, solve(graph, plan), dropped_branches(graph, plan)))


class Uncut:
    """The inputs of a function as they were before a plan cut them, of shapes alone.

    Args:
        graph: the function.
        plan: what stays.

    Attributes:
        gone: for each parameter and then for each input whether the plan drops it.
    """

    def __init__(self, graph: Graph, plan: Plan) -> None:
        kept, branches = solve(graph, plan), dropped_branches(graph, plan)
        dropped = {path for block in branches for path in block.inputs}
        self._traced = flatten(graph.inputs, "inputs")
        self._dropped = dropped
        # By path and axis, how many entries stay of how many.
        self._cut: dict[str, dict[int, tuple[int, int]]] = {
            path: {axis: (kept_of(dim, kept).shape[-1], value.shape[axis]) for axis, dim in enumerate(value.dims)}
            for path, value in graph.prunable_inputs.items()
            if path not in dropped
        }
        self.gone = [path in plan.dropped for path in graph.paths] + [path in dropped for path in self._traced.paths]

    def __call__(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the inputs with the shapes before they were cut; inputs of another structure as they are."""
        given = flatten(inputs, "inputs")
        if set(given.paths) != set(self._traced.paths) - self._dropped:
            return inputs
        names = dict(zip(given.paths, given.names, strict=True))
        whole = {path: self._whole(path, names[path], leaf) for path, leaf in given.by_path.items()}
        # Caches that go were like those that stay; nothing is computed of them.
        alike = {leaf.shape: whole[path] for path, leaf in self._traced.by_path.items() if path in whole}
        return self._traced.build(
            [whole.get(path, alike.get(leaf.shape, leaf)) for path, leaf in self._traced.by_path.items()]
        )

    def _whole(self, path: str, name: str, leaf: Any) -> Any:
        cut: Mapping[int, tuple[int, int]] = {axis: n for axis, n in self._cut.get(path, {}).items() if n[0] < n[1]}
        if not cut:
            return leaf
        shape = list(np.shape(leaf))
        if len(shape) != len(self._traced.by_path[path].shape):
            return leaf
        for axis, (stays, before) in cut.items():
            if shape[axis] != stays:
                raise ValueError(
                    f"{name} has shape {tuple(shape)}; along axis {axis} the plan keeps {stays} of {before} entries. Cut it: "
                    "shrink(with_inputs(plan, graph), ...), or make it anew in the smaller size."
                )
            shape[axis] = before
        return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)
