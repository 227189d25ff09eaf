"""What stays: by path and axis of each parameter, in plain numbers, so that it outlives the function."""

import dataclasses
import functools
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxprune._printing import Printable, many, some
from jaxprune._tree._given import require_instance
from jaxprune._tree._shapes import require_shapes
from jaxprune.structured._axes._dims import Var, leaves, resolve, split_kept
from jaxprune.structured._axes._layered import kept_of, layers_axis
from jaxprune.structured._axes._program import Node, Value
from jaxprune.structured._axes._reasons import only_renumbers
from jaxprune.structured._axes._residuals import without
from jaxprune.structured._blocks import Block
from jaxprune.structured._graph import Graph
from jaxprune.structured._indices import as_tuples, check_indices, is_nested
from jaxprune.structured._json import read_json
from jaxprune.structured._show import plan_table

if TYPE_CHECKING:
    from jaxprune._tables import Table


@dataclasses.dataclass(frozen=True, repr=False)
class Plan(Printable):
    """The elements that stay along each axis that is cut, and the parameters that go; what it does not name stays whole.

    Prints as a table.

    Attributes:
        kept: by parameter path and axis, the indices that stay, rising; where each layer of a scan keeps its own, so many of
            one number for each layer, ``[layers, n]``.
        shapes: of the parameters before they are cut: those that are, and those that must not be taken for them.
        dropped: paths of parameters that go as a whole, with the residual branch that reads them.
        to_repair: paths of parameters that the choice takes to be solved for anew without what goes: cut what
            `repair` returns.
        layers: by path of the parameters of which layers keep their own indices, the axis of the layers; all of them are
            counted, also those that the plan cuts.
        renumbered: by path of tables and heads of which rows go, by `select_rows`, their axis: what chooses rows by number has to
            use the new numbers (`new_ids`), and results along it have them.
        inputs: the same of the inputs that the function's graph calls prunable, as a cache of keys and values; None where
            there are none. Of its shapes the sizes of axes that are not cut are None: they may be any.

    >>> plan = Plan({"up": {1: (0, 2)}}, {"up": (3, 4)})
    >>> plan.shrunk_shape("up"), Plan.from_json(plan.to_json()) == plan
    ((3, 2), True)
    """

    kept: Mapping[str, Mapping[int, Sequence[int]]]
    shapes: Mapping[str, tuple[Any, ...]]
    dropped: tuple[str, ...] = ()
    to_repair: tuple[str, ...] = ()
    layers: Mapping[str, int] = dataclasses.field(default_factory=dict)
    renumbered: Mapping[str, int] = dataclasses.field(default_factory=dict)
    inputs: "Plan | None" = None

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
                rows: Sequence[Any] = kept if is_nested(kept) else [kept]
                for row in rows:
                    check_indices(row, path, axis, shape)
                if is_nested(kept):
                    self._check_layers(kept, path, axis)

    def _check_layers(self, rows: Any, path: str, axis: int) -> None:
        shape, along = self.shapes[path], self.layers.get(path)
        if along is None or not 0 <= along < len(shape) or along == axis or len(rows) != shape[along]:
            raise ValueError(
                f"The plan keeps other indices along axis {axis} of {path}, of shape {shape}, in each of {len(rows)} layers; "
                f"its axis of layers is {along}."
            )
        if len({len(row) for row in rows}) > 1:
            raise ValueError(
                f"The plan keeps {sorted({len(row) for row in rows})} indices along axis {axis} of {path}; layers of a stack keep "
                "equally many."
            )

    def shrunk_shape(self, path: str, shape: Sequence[int] | None = None) -> tuple[int, ...]:
        """Return the shape of a parameter that the plan names, after it was cut; or of an input of this shape."""
        axes = self.kept[path]
        whole = self.shapes[path] if shape is None else shape
        return tuple(np.shape(axes[axis])[-1] if axis in axes else n for axis, n in enumerate(whole))

    def fits(self, path: str, shape: Sequence[int]) -> bool:
        """Whether an array of this shape is one that the plan is for, by its path."""
        wanted = self.shapes[path]
        return len(wanted) == len(shape) and all(n in (None, found) for n, found in zip(wanted, shape, strict=True))

    def _stay(self) -> str:
        before = sum(math.prod(shape) for shape in self.shapes.values())
        gone = sum(math.prod(self.shapes[path]) for path in self.dropped)
        gone += sum(math.prod(self.shapes[path]) - math.prod(self.shrunk_shape(path)) for path in self.kept)
        return f"{before - gone:,} of {before:,}"

    def _in_short(self) -> str:
        arrays = f"{many(len(self.kept), 'array')} cut, {len(self.dropped):,} dropped, of {len(self.shapes):,}"
        if self.to_repair:
            arrays += f"; counts on repair of {some(self.to_repair)}"
        if any(None in shape for shape in self.shapes.values()):  # of inputs, of any batch and length
            return arrays
        return f"{self._stay()} parameters stay; {arrays}"

    def table(self, *, full: bool = False) -> "Table":
        """Return the table that is printed: how many stay of each axis that is cut; in full a row for each layer."""
        rows = [*self._rows(), *(() if self.inputs is None else self.inputs._rows("inputs/"))]
        return plan_table(f"What stays: {self._stay()} parameters", rows, full=full)

    def _rows(self, above: str = "") -> Iterator[tuple[str, str, str, str]]:
        for path in self.shapes:
            if path in self.dropped:
                yield above + path, "", "", "dropped"
            for axis, kept in self.kept.get(path, {}).items():
                said = [
                    f"in each of {len(kept)} layers its own" if is_nested(kept) else "",
                    "renumbered" if self.renumbered.get(path) == axis else "",
                    "to be repaired" if path in self.to_repair and axis == min(self.kept[path]) else "",
                ]
                size = str(self.shapes[path][axis])
                yield f"{above}{path}[{axis}]", str(np.shape(kept)[-1]), size, ", ".join(filter(None, said))

    def to_json(self) -> str:
        """Return the plan as JSON text."""
        parts = {"parameters": self._entries()}
        return json.dumps(parts if self.inputs is None else {**parts, "inputs": self.inputs._entries()})

    def _entries(self) -> dict[str, dict[str, Any]]:
        entries: dict[str, dict[str, Any]] = {
            path: {"kept": {str(axis): np.asarray(kept).tolist() for axis, kept in axes.items()}}
            for path, axes in self.kept.items()
        }
        for path in self.to_repair:
            entries[path]["to_repair"] = True
        for path, axis in self.layers.items():
            entries[path]["layers"] = axis
        for path, axis in self.renumbered.items():
            entries.setdefault(path, {})["renumbered"] = axis
        entries.update((path, {"dropped": True}) for path in self.dropped)
        return {path: {"shape": list(shape), **entries.get(path, {})} for path, shape in self.shapes.items()}

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read what `to_json` wrote.

        Raises:
            ValueError: it did not write that.
        """
        parts = read_json(text, ["parameters"], "Plan")
        found = cls._read(parts["parameters"])
        return dataclasses.replace(found, inputs=cls._read(parts["inputs"])) if "inputs" in parts else found

    @classmethod
    def _read(cls, entries: Mapping[str, Any]) -> "Plan":
        kept = {
            path: {int(axis): as_tuples(np.asarray(kept)) for axis, kept in entry["kept"].items()}
            for path, entry in entries.items()
            if "kept" in entry
        }
        dropped, to_repair = (
            tuple(path for path, entry in entries.items() if entry.get(what)) for what in ("dropped", "to_repair")
        )
        layers, renumbered = (
            {path: entry[what] for path, entry in entries.items() if what in entry} for what in ("layers", "renumbered")
        )
        shapes = {path: tuple(entry["shape"]) for path, entry in entries.items()}
        return cls(kept, shapes, dropped, to_repair, layers, renumbered)


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
    shapes: dict[str, tuple[Any, ...]] = {}
    for path in dict.fromkeys((*plan.shapes, *other.shapes)):
        first, second = (dict(each.kept.get(path, {})) for each in (plan, other))
        shapes[path] = _shape_in_both(path, *(each.shapes[path] for each in (plan, other) if path in each.shapes))
        for axis in first.keys() & second.keys():
            if path not in dropped and not np.array_equal(first[axis], second[axis]):
                raise ValueError(
                    f"The plans keep {first[axis]} and {second[axis]} along axis {axis} of {path}. "
                    "Let one of them leave it whole."
                )
        if path not in dropped and (first or second):
            kept[path] = first | second
    to_repair = tuple(path for path in dict.fromkeys((*plan.to_repair, *other.to_repair)) if path in kept)
    layers = {path: axis for path, axis in {**other.layers, **plan.layers}.items() if path in kept}
    given = [each.inputs for each in (plan, other) if each.inputs is not None]
    inputs = functools.reduce(combine, given) if given else None
    return Plan(kept, shapes, dropped, to_repair, layers, {**plan.renumbered, **other.renumbered}, inputs)


def _shape_in_both(path: str, shape: tuple[Any, ...], other: tuple[Any, ...] | None = None) -> tuple[Any, ...]:
    """Return a shape that two plans know, of inputs each only in part."""
    pairs = [(n, n) for n in shape] if other is None else list(zip(shape, other, strict=False))
    if len(pairs) < len(shape) or any(None not in pair and pair[0] != pair[1] for pair in pairs):
        raise ValueError(f"The plans are for {path} of shapes {shape} and {other}.")
    return tuple(b if a is None else a for a, b in pairs)


def plan_of(
    graph: Graph, kept: Mapping[Var, np.ndarray], branches: Sequence[Block] = (), to_repair: Collection[str] = ()
) -> Plan:
    """Return the plan that keeps these elements of some of a graph's axes, drops these branches, and needs these repairs."""
    _check_least(graph, kept)
    dropped = {path for block in branches for path in block.paths}
    found, layers = _taken(graph, dict(zip(graph.paths, graph.params, strict=True)), kept, dropped)
    gone = tuple(path for path in graph.paths if path in dropped)
    needed = tuple(path for path in found if path in to_repair)
    return Plan(found, graph.by_path, gone, needed, layers, inputs=inputs_of(graph, kept, branches))


def inputs_of(graph: Graph, kept: Mapping[Var, np.ndarray], branches: Sequence[Block]) -> Plan | None:
    """Return what stays of the inputs that may be cut."""
    values = graph.prunable_inputs
    if not values:
        return None
    dropped = {path for block in branches for path in block.inputs}
    found, layers = _taken(graph, values, kept, dropped)
    told = {path: {*axes, layers.get(path)} for path, axes in found.items()}
    shapes = {
        path: tuple(n if axis in told.get(path, ()) else None for axis, n in enumerate(value.shape))
        for path, value in values.items()
    }
    return Plan(found, shapes, tuple(path for path in values if path in dropped), (), layers)


def _taken(
    graph: Graph, values: Mapping[str, Value], kept: Mapping[Var, np.ndarray], dropped: Collection[str]
) -> tuple[dict[str, dict[int, tuple[Any, ...]]], dict[str, int]]:
    """Return the indices that stay by path and axis, and the axes of layers that keep their own."""
    own = layered_groups(graph, kept)
    found: dict[str, dict[int, tuple[Any, ...]]] = {}
    layers: dict[str, int] = {}
    for path, value in values.items():
        for axis, dim in enumerate(value.dims):
            indices = kept_of(dim, kept)
            if path not in dropped and indices.shape[-1] < value.shape[axis]:
                found.setdefault(path, {})[axis] = as_tuples(indices)
                if indices.ndim == 2:
                    layers[path] = layers_axis(value.dims, dim, own)
    return found, layers


def layered_groups(graph: Graph, kept: Mapping[Var, np.ndarray] | None = None) -> dict[Var, Var]:
    """Return for the channels that each layer may keep for itself, or of which each keeps its own, the axis of the layers."""
    found = {group.var: group.layers for group in graph.groups if group.layers is not None}
    return found if kept is None else {var: d for var, d in found.items() if var in kept and kept[var].ndim == 2}


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
    values = dict(zip(graph.paths, graph.params, strict=True))
    found = _split(graph, plan, values)
    kept_vars = {var: indices for var, indices in found.items() if indices.shape[-1] < var.size}
    for path, axes in plan.kept.items():
        for axis in axes:
            for var in leaves(values[path].dims[axis]):
                met = axis == plan.renumbered.get(path) and only_renumbers(var.reason)
                if var in kept_vars and var.reason is not None and not met:
                    raise ValueError(f"The plan cuts axis {axis} of {path}, which must stay: {var.reason}.")
    for path, value in values.items():
        if path in plan.dropped:
            continue
        for axis, dim in enumerate(value.dims):
            planned = plan.kept.get(path, {}).get(axis, range(value.shape[axis]))
            if not np.array_equal(kept_of(dim, kept_vars), np.asarray(planned)):
                raise ValueError(
                    f"The plan does not cut axis {axis} of {path} as it cuts what is coupled with it. "
                    "Select channels from this function's graph."
                )
    _check_least(graph, kept_vars)
    return kept_vars


def _check_least(graph: Graph, kept: Mapping[Var, np.ndarray]) -> None:
    """Raise a ValueError where fewer stay than a top_k takes."""
    for group in graph.groups:
        if group.var in kept and kept[group.var].shape[-1] < group.least:
            raise ValueError(
                f"Of {group.name} {kept[group.var].shape[-1]} would stay, but top_k takes {group.least} of them; keep as many, or "
                "let the function take fewer."
            )


def _split(graph: Graph, plan: Plan, values: Mapping[str, Value]) -> dict[Var, np.ndarray]:
    """Return what a plan keeps of each variable along the axes that it cuts: in a row for each layer, where layers differ."""
    own = layered_groups(graph)
    found: dict[Var, np.ndarray] = {}
    rows: dict[Var, list[dict[Var, np.ndarray]]] = {}  # by the axis of the layers, what each layer keeps
    for path, axes in plan.kept.items():
        dims = values[path].dims
        for axis, kept in axes.items():
            if not is_nested(kept):
                fits = split_kept(dims[axis], np.asarray(kept), found)
            else:
                along = resolve(dims[plan.layers[path]])
                fits = isinstance(along, Var) and any(own.get(var) is along for var in leaves(dims[axis]))
                each = rows.setdefault(along, [{} for _ in kept]) if isinstance(along, Var) else []
                fits = fits and all(
                    split_kept(dims[axis], np.asarray(row), layer) for row, layer in zip(kept, each, strict=True)
                )
            if not fits:
                raise ValueError(
                    f"What the plan keeps along axis {axis} of {path} contradicts another axis, or cuts a product of "
                    "axes along neither, or differs between layers that have one choice. Select channels from this "
                    "function's graph."
                )
    for along, layers in rows.items():
        for var in layers[0]:
            if own.get(var) is along:
                found[var] = np.stack([layer[var] for layer in layers])
            elif var not in found:
                found[var] = layers[0][var]
    return found


def cut_shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Return the shapes, before, of the parameters that a plan cuts or drops."""
    return {path: tuple(plan.shapes[path]) for path in (*plan.kept, *plan.dropped)}


def require_plan(plan: object, call: str) -> None:
    """Raise a TypeError unless this is a plan; `call` shows the arguments in their order."""
    require_instance(plan, Plan, call, "Make one by plan = select_channels(graph, params, k).")
