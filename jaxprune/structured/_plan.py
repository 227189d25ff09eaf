"""What stays: by path and axis of each parameter, in plain numbers, so that it outlives the function."""

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxprune._tree._shapes import require_shapes
from jaxprune.structured._axes._dims import Var, kept_indices, leaves, split_kept
from jaxprune.structured._axes._program import Node
from jaxprune.structured._axes._residuals import without
from jaxprune.structured._blocks import Block
from jaxprune.structured._graph import Graph


@dataclasses.dataclass(frozen=True)
class Plan:
    """The elements that stay along each axis that is cut, and the parameters that go; what it does not name stays whole.

    Attributes:
        kept: by parameter path and axis, the indices that stay, rising.
        shapes: of the parameters before they are cut: those that are, and those that must not be taken for them.
        dropped: paths of parameters that go as a whole, with the residual branch that reads them.
        to_repair: paths of parameters that the choice takes to be solved for anew without what goes: cut what
            `repair` returns.

    >>> plan = Plan({"up": {1: (0, 2)}}, {"up": (3, 4)})
    >>> plan.shrunk_shape("up"), Plan.from_json(plan.to_json()) == plan
    ((3, 2), True)
    """

    kept: Mapping[str, Mapping[int, Sequence[int]]]
    shapes: Mapping[str, tuple[int, ...]]
    dropped: tuple[str, ...] = ()
    to_repair: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check that the indices fit the shapes."""
        for path in (*self.kept, *self.dropped):
            if path not in self.shapes:
                raise ValueError(f"The plan cuts {path} but does not say its shape; make it by select_channels.")
        for path in self.to_repair:
            if path not in self.kept:
                raise ValueError(f"The plan counts on {path} to be repaired, of which it cuts nothing.")
        for path in self.dropped:
            if path in self.kept:
                raise ValueError(f"The plan drops {path}, and says what it keeps of it; it can only do one of the two.")
        for path, axes in self.kept.items():
            shape = self.shapes[path]
            for axis, kept in axes.items():
                if not 0 <= axis < len(shape):
                    raise ValueError(f"The plan cuts axis {axis} of {path}, which has shape {shape}.")
                indices = np.asarray(kept)
                rising = len(indices) > 0 and bool(np.all(np.diff(indices) > 0))
                if not rising or indices[0] < 0 or indices[-1] >= shape[axis]:
                    raise ValueError(
                        f"The plan keeps {list(kept)!r} along axis {axis} of {path}, of shape {shape}; "
                        f"it must keep some of 0 to {shape[axis] - 1}, rising, each once."
                    )

    def shrunk_shape(self, path: str) -> tuple[int, ...]:
        """Return the shape of a parameter that the plan names, after it was cut."""
        axes = self.kept[path]
        return tuple(len(axes[axis]) if axis in axes else n for axis, n in enumerate(self.shapes[path]))

    def to_json(self) -> str:
        """Return the plan as JSON text."""
        entries: dict[str, dict[str, Any]] = {
            path: {"kept": {str(axis): [int(i) for i in kept] for axis, kept in axes.items()}}
            for path, axes in self.kept.items()
        }
        for path in self.to_repair:
            entries[path]["to_repair"] = True
        entries.update((path, {"dropped": True}) for path in self.dropped)
        return json.dumps(
            {path: {"shape": list(shape), **entries.get(path, {})} for path, shape in self.shapes.items()}
        )

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read what `to_json` wrote."""
        entries = json.loads(text)
        kept = {
            path: {int(axis): tuple(indices) for axis, indices in entry["kept"].items()}
            for path, entry in entries.items()
            if "kept" in entry
        }
        dropped, to_repair = (
            tuple(path for path, entry in entries.items() if entry.get(what)) for what in ("dropped", "to_repair")
        )
        return cls(kept, {path: tuple(entry["shape"]) for path, entry in entries.items()}, dropped, to_repair)


def combine(plan: Plan, other: Plan) -> Plan:
    """Return the plan that cuts what either cuts: channels and layers, say.

    Args:
        plan: a plan.
        other: another one for the same parameters.

    Returns:
        Both in one. A parameter that one of them drops is dropped; what one of them needs to be repaired stays so.

    Raises:
        ValueError: they cut the same axis differently, or are for parameters of other shapes.

    >>> width = Plan({"up": {1: (0, 2)}, "down": {0: (0, 2)}}, {"up": (3, 4), "down": (4, 2)})
    >>> depth = Plan({"up": {0: (1, 2)}}, {"up": (3, 4), "down": (4, 2)}, dropped=("down",))
    >>> combine(width, depth).kept, combine(width, depth).dropped
    ({'up': {1: (0, 2), 0: (1, 2)}}, ('down',))
    """
    dropped = tuple(dict.fromkeys((*plan.dropped, *other.dropped)))
    kept: dict[str, dict[int, Sequence[int]]] = {}
    for path in dict.fromkeys((*plan.shapes, *other.shapes)):
        first, second = (dict(each.kept.get(path, {})) for each in (plan, other))
        shapes = {tuple(each.shapes[path]) for each in (plan, other) if path in each.shapes}
        if len(shapes) > 1:
            raise ValueError(f"The plans are for {path} of shapes {plan.shapes[path]} and {other.shapes[path]}.")
        for axis in first.keys() & second.keys():
            if path not in dropped and tuple(first[axis]) != tuple(second[axis]):
                raise ValueError(
                    f"The plans keep {tuple(first[axis])} and {tuple(second[axis])} along axis {axis} of {path}. "
                    "Let one of them leave it whole."
                )
        if path not in dropped and (first or second):
            kept[path] = first | second
    to_repair = tuple(path for path in dict.fromkeys((*plan.to_repair, *other.to_repair)) if path in kept)
    return Plan(kept, {**other.shapes, **plan.shapes}, dropped, to_repair)


def plan_of(
    graph: Graph, kept: Mapping[Var, np.ndarray], branches: Sequence[Block] = (), to_repair: Collection[str] = ()
) -> Plan:
    """Return the plan that keeps these elements of some of a graph's axes, drops these branches, and needs these repairs."""
    dropped = {path for block in branches for path in block.paths}
    found: dict[str, dict[int, tuple[int, ...]]] = {}
    for path, value in zip(graph.paths, graph.params, strict=True):
        for axis, dim in enumerate(value.dims):
            indices = kept_indices(dim, kept)
            if path not in dropped and len(indices) < value.shape[axis]:
                found.setdefault(path, {})[axis] = tuple(indices.tolist())
    gone = tuple(path for path in graph.paths if path in dropped)
    return Plan(found, graph.by_path, gone, tuple(path for path in found if path in to_repair))


def dropped_branches(graph: Graph, plan: Plan) -> list[Block]:
    """Return the branches that a plan drops, and raise a ValueError where it drops anything else."""
    gone = set(plan.dropped)
    found = [block for block in graph.blocks if not block.members and gone.issuperset(block.paths)]
    for path in sorted(gone.difference(*(block.paths for block in found))):
        raise ValueError(
            f"The plan drops {path}, but no residual branch of which it drops all parameters. "
            "Select blocks from this function's graph."
        )
    return found


def shallower(graph: Graph, plan: Plan) -> Graph:
    """Return the graph of the function without the branches that a plan drops, and the results that go with them."""
    branches = dropped_branches(graph, plan)
    if not branches:
        return graph
    lost = {number for block in branches for number in block.outputs}
    leaves, treedef = jax.tree.flatten(graph.outputs)
    outputs = jax.tree.unflatten(treedef, [None if n in lost else leaf for n, leaf in enumerate(leaves)])
    outs = [value for n, value in enumerate(graph.program.outs) if n not in lost]
    nodes = [block.place for block in branches if isinstance(block.place, Node)]
    return dataclasses.replace(graph, program=without(graph.program, nodes, outs), outputs=outputs)


def solve(graph: Graph, plan: Plan) -> dict[Var, np.ndarray]:
    """Return what a plan keeps of a graph's axes, and raise a ValueError where it does not fit the graph."""
    require_shapes("The plan", cut_shapes(plan), "the function", graph.by_path, "Make it from this function's graph.")
    found: dict[Var, np.ndarray] = {}
    values = dict(zip(graph.paths, graph.params, strict=True))
    for path, axes in plan.kept.items():
        for axis, kept in axes.items():
            if not split_kept(values[path].dims[axis], np.asarray(kept), found):
                raise ValueError(
                    f"What the plan keeps along axis {axis} of {path} contradicts another axis, or cuts a product of "
                    "axes along neither. Select channels from this function's graph."
                )
    kept_vars = {var: indices for var, indices in found.items() if len(indices) < var.size}
    for path, axes in plan.kept.items():
        for axis in axes:
            for var in leaves(values[path].dims[axis]):
                if var in kept_vars and var.reason is not None:
                    raise ValueError(f"The plan cuts axis {axis} of {path}, which must stay: {var.reason}.")
    for path, value in values.items():
        if path in plan.dropped:
            continue
        for axis, dim in enumerate(value.dims):
            planned = plan.kept.get(path, {}).get(axis, range(value.shape[axis]))
            if not np.array_equal(kept_indices(dim, kept_vars), np.asarray(planned)):
                raise ValueError(
                    f"The plan does not cut axis {axis} of {path} as it cuts what is coupled with it. "
                    "Select channels from this function's graph."
                )
    return kept_vars


def cut_shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Return the shapes, before, of the parameters that a plan cuts or drops."""
    return {path: tuple(plan.shapes[path]) for path in (*plan.kept, *plan.dropped)}
