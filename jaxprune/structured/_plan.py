"""Which channels stay: by path and axis of each parameter, in plain numbers, so that it outlives the function."""

import dataclasses
import json
from collections.abc import Mapping, Sequence

import numpy as np

from jaxprune._paths import Flat
from jaxprune.graph._dims import Var, kept_indices, split_kept
from jaxprune.structured._graph import Graph


@dataclasses.dataclass(frozen=True)
class Plan:
    """The elements that stay along each axis that is cut; what it does not name stays whole.

    Attributes:
        kept: by parameter path and axis, the indices that stay, rising.
        shapes: of the same parameters before they are cut.

    >>> plan = Plan({"up": {1: (0, 2)}}, {"up": (3, 4)})
    >>> plan.shrunk_shape("up"), Plan.from_json(plan.to_json()) == plan
    ((3, 2), True)
    """

    kept: Mapping[str, Mapping[int, Sequence[int]]]
    shapes: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        """Check that the indices fit the shapes."""
        for path, axes in self.kept.items():
            if path not in self.shapes:
                raise ValueError(f"The plan cuts {path} but does not say its shape; make it by select_channels.")
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
        return json.dumps(
            {
                path: {
                    "shape": list(self.shapes[path]),
                    "kept": {str(axis): [int(i) for i in kept] for axis, kept in axes.items()},
                }
                for path, axes in self.kept.items()
            }
        )

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read what `to_json` wrote."""
        entries = json.loads(text)
        kept = {
            path: {int(axis): tuple(indices) for axis, indices in entry["kept"].items()}
            for path, entry in entries.items()
        }
        return cls(kept, {path: tuple(entry["shape"]) for path, entry in entries.items()})


def plan_of(graph: Graph, kept: Mapping[Var, np.ndarray]) -> Plan:
    """Return the plan that keeps these elements of some of a graph's axes."""
    found: dict[str, dict[int, tuple[int, ...]]] = {}
    for path, value in zip(graph.paths, graph.params, strict=True):
        for axis, dim in enumerate(value.dims):
            indices = kept_indices(dim, kept)
            if len(indices) < value.shape[axis]:
                found.setdefault(path, {})[axis] = tuple(indices.tolist())
    shapes = dict(zip(graph.paths, graph.shapes, strict=True))
    return Plan(found, {path: shapes[path] for path in found})


def solve(graph: Graph, plan: Plan) -> dict[Var, np.ndarray]:
    """Return what a plan keeps of a graph's axes, and raise a ValueError where it does not fit the graph."""
    shapes = dict(zip(graph.paths, graph.shapes, strict=True))
    found: dict[Var, np.ndarray] = {}
    values = dict(zip(graph.paths, graph.params, strict=True))
    for path, axes in plan.kept.items():
        if path not in shapes:
            raise ValueError(f"The plan cuts {path}, which the function does not have; it has {list(shapes)}.")
        if tuple(plan.shapes[path]) != shapes[path]:
            raise ValueError(
                f"The plan is for {path} of shape {plan.shapes[path]}, but it has shape {shapes[path]}. "
                "Select channels anew from this function's graph."
            )
        for axis, kept in axes.items():
            if not split_kept(values[path].dims[axis], np.asarray(kept), found):
                raise ValueError(
                    f"What the plan keeps along axis {axis} of {path} contradicts another axis, or cuts a product of "
                    "axes along neither. Select channels from this function's graph."
                )
    kept_vars = {var: indices for var, indices in found.items() if len(indices) < var.size}
    for var in kept_vars:
        if var.reason is not None:
            raise ValueError(f"The plan cuts an axis of {var.size} elements that must stay: {var.reason}.")
    for path, value in values.items():
        for axis, dim in enumerate(value.dims):
            planned = plan.kept.get(path, {}).get(axis, range(value.shape[axis]))
            if not np.array_equal(kept_indices(dim, kept_vars), np.asarray(planned)):
                raise ValueError(
                    f"The plan does not cut axis {axis} of {path} as it cuts what is coupled with it. "
                    "Select channels from this function's graph."
                )
    return kept_vars


def check_shapes(plan: Plan, flat: Flat, what: str) -> None:
    """Raise a ValueError unless the tree has all leaves that the plan cuts, in the shapes before."""
    shapes = dict(zip(flat.paths, (np.shape(leaf) for leaf in flat.leaves), strict=True))
    for path in plan.kept:
        if path not in shapes:
            raise ValueError(f"The plan cuts {path}, which {what} does not have; it has {list(shapes)}.")
        if shapes[path] != tuple(plan.shapes[path]):
            raise ValueError(f"The plan is for {path} of shape {plan.shapes[path]}; in {what} it is {shapes[path]}.")
