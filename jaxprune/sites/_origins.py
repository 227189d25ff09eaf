"""Where a value comes from: data, constants, or parameters, and then as which layout view of which leaf."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from jaxprune.sites._views import Axes, View

# Operations that change no value of a single operand; the first of each pair is not a no-op for its layout.
_COPIES = frozenset(
    {"convert_element_type", "stop_gradient", "copy", "copy_p", "optimization_barrier", "reduce_precision"}
    | {"sharding_constraint", "reshard", "mesh_cast", "layout_constraint", "name"}
)
_RESHAPES = frozenset({"reshape", "squeeze", "expand_dims", "broadcast_in_dim"})
LAYOUT = _COPIES | _RESHAPES | {"transpose", "slice", "split", "rev"}
# Results of the operands' shape, each entry from the operands' entries at the same place.
_ELEMENTWISE = frozenset(
    {"add", "sub", "mul", "div", "rem", "pow", "integer_pow", "square", "max", "min", "neg", "abs", "sign", "exp"}
    | {"exp2", "log", "log1p", "expm1", "tanh", "tan", "sin", "cos", "asin", "acos", "atan", "atan2", "sinh"}
    | {
        "cosh",
        "asinh",
        "acosh",
        "atanh",
        "logistic",
        "sqrt",
        "rsqrt",
        "cbrt",
        "erf",
        "erfc",
        "erf_inv",
        "floor",
        "ceil",
    }
    | {
        "round",
        "clamp",
        "select_n",
        "nextafter",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "and",
        "or",
        "xor",
        "not",
        "is_finite",
        "add_any",
    }
)
# Data and a parameter side by side in one array.
_JOINS = frozenset({"concatenate", "pad", "dynamic_update_slice", "scatter", "scatter_add", "scatter-add"})


@dataclasses.dataclass(frozen=True, eq=False)
class Frame:
    """One `Each` of a view at run time: the scan whose step it is, or an index (a scalar) into the leading axis."""

    size: int
    index: Any = None


@dataclasses.dataclass(frozen=True)
class Piece:
    """A value, or its part from `start` along `axis`, that is a view of a leaf; `frames` has one entry an `Each`."""

    view: View
    frames: tuple[Frame, ...] = ()
    axis: int | None = None
    start: int = 0


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a value comes from.

    Attributes:
        data: whether it depends on the function's inputs; False for constants and what is made of parameters only.
        pieces: the leaves it is a view of, where that is known.
        leaves: all leaves it is made of without having met data.
        lost: the first operation after which it was no view any more.
        rank: along how many axes a value without view varies, before it was broadcast.
        products: leaves with more than one axis of which it is the elementwise product with data.
        rows: leaves of which it holds rows that data chose.
    """

    data: bool = False
    pieces: tuple[Piece, ...] = ()
    leaves: frozenset[int] = frozenset()
    lost: str = ""
    rank: int | None = None
    products: frozenset[int] = frozenset()
    rows: frozenset[int] = frozenset()

    def without_view(self, operation: str) -> "Origin":
        """The origin after an operation that leaves no view."""
        return dataclasses.replace(self, pieces=(), lost=self.lost or operation)


CONSTANT = Origin()
DATA = Origin(data=True)


@dataclasses.dataclass
class Uses:
    """What became of the leaves besides sites; entries are kept in order and only once."""

    elementwise: dict[int, None] = dataclasses.field(default_factory=dict)
    unresolved: dict[tuple[int, str], None] = dataclasses.field(default_factory=dict)

    def modifies(self, leaves: frozenset[int]) -> None:
        """Note leaves that meet data, or other parameters, elementwise."""
        self.elementwise.update(dict.fromkeys(sorted(leaves)))

    def unknown(self, leaves: frozenset[int], reason: str) -> None:
        """Note leaves whose use is not understood."""
        self.unresolved.update(dict.fromkeys((leaf, reason) for leaf in sorted(leaves)))


def propagate(eqn: Any, origins: Sequence[Origin], values: Sequence[Any], uses: Uses) -> list[Origin]:
    """Return the origins of the results of an equation that is neither a site nor has a body.

    Args:
        eqn: the equation.
        origins: of its operands.
        values: its operands at run time; only indices are kept.
        uses: takes note of parameters that end here.
    """
    name = eqn.primitive.name
    leaves = frozenset[int]().union(*(origin.leaves for origin in origins))
    if name in LAYOUT:
        return _layout(eqn, origins)
    if name == "dynamic_slice" and not origins[0].data and origins[0].leaves:
        return [_indexed(eqn, origins[0], values[1:])]
    if name == "gather" and not origins[0].data and origins[0].leaves:
        picked = _one_layer(eqn, origins[0], values[1])
        return [picked] if picked is not None else [_rows(origins, uses)]
    if any(origin.data for origin in origins):
        return [_meet(eqn, origins, leaves, uses)] * len(eqn.outvars)
    if not leaves:
        return [CONSTANT] * len(eqn.outvars)
    if name == "concatenate":
        return [_joined(eqn, origins, leaves)]
    if name in _ELEMENTWISE:
        return [_modified(eqn, origins, leaves, uses)]
    made = Origin(leaves=leaves, lost=next((o.lost for o in origins if o.lost), "") or name)
    return [made] * len(eqn.outvars)


def _layout(eqn: Any, origins: Sequence[Origin]) -> list[Origin]:
    name, params = eqn.primitive.name, eqn.params
    if name == "optimization_barrier":
        return list(origins)
    origin, shape = origins[0], eqn.invars[0].aval.shape
    if origin.data:
        return [origin] * len(eqn.outvars)
    if name == "split":
        bounds = [sum(params["sizes"][:i]) for i in range(len(params["sizes"]) + 1)]
        axis = params["axis"]

        def part(low: int, high: int) -> Origin:
            start = [low if i == axis else 0 for i in range(len(shape))]
            limit = [high if i == axis else n for i, n in enumerate(shape)]
            return _mapped(origin, name, lambda view: view.slice(start, limit))

        return [part(low, high) for low, high in zip(bounds, bounds[1:], strict=False)]
    if name in _COPIES:
        return [origin]
    if name == "transpose":
        order = params["permutation"]
        moved = _mapped(origin, name, lambda view: view.transpose(order), order)
    elif name == "slice":
        moved = _mapped(
            origin, name, lambda v: v.slice(params["start_indices"], params["limit_indices"], params["strides"])
        )
    elif name == "rev":
        moved = _mapped(origin, name, lambda view: view.reverse(params["dimensions"]))
    else:
        result = eqn.outvars[0].aval.shape
        if math.prod(result) == math.prod(shape):
            moved = _mapped(origin, name, lambda view: view.reshape(result))
        else:
            rank = origin.rank if origin.rank is not None else sum(n > 1 for n in shape)
            moved = dataclasses.replace(origin.without_view("broadcast"), rank=rank)
    return [moved]


def _mapped(origin: Origin, name: str, change: Callable[[View], View], order: Axes | None = None) -> Origin:
    """Change the view of every piece; of pieces that are parts of the value only a transposition is understood."""
    pieces = []
    for piece in origin.pieces:
        if piece.axis is None:
            pieces.append(dataclasses.replace(piece, view=change(piece.view)))
        elif order is not None:
            pieces.append(dataclasses.replace(piece, view=change(piece.view), axis=order.index(piece.axis)))
        else:
            return origin.without_view(f"concatenate and {name}")
    return dataclasses.replace(origin, pieces=tuple(pieces))


def _indexed(eqn: Any, origin: Origin, indices: Sequence[Any]) -> Origin:
    """One entry of one axis, at an index known only at run time: a layer of a stack."""
    shape, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
    partial = [axis for axis, (size, n) in enumerate(zip(sizes, shape, strict=True)) if size != n]
    if len(partial) == 1 and sizes[partial[0]] == 1:
        return _entry(origin, partial[0], shape, indices[partial[0]], eqn.outvars[0].aval.shape, "dynamic_slice")
    # Of axes of one entry only, there is nothing to choose.
    return origin if not partial else origin.without_view("dynamic_slice")


def _one_layer(eqn: Any, origin: Origin, index: Any) -> Origin | None:
    """A gather with a single scalar index into one axis, which is `dynamic_slice` by another name; else None."""
    numbers, shape = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape
    if eqn.invars[1].aval.shape != (1,) or len(numbers.start_index_map) != 1:
        return None
    axis = numbers.start_index_map[0]
    if not _takes_one(eqn, axis) or numbers.operand_batching_dims:
        return None
    return _entry(origin, axis, shape, index[0], eqn.outvars[0].aval.shape, "gather")


def _takes_one(eqn: Any, axis: int) -> bool:
    sizes = zip(eqn.params["slice_sizes"], eqn.invars[0].aval.shape, strict=True)
    return all(size == (1 if i == axis else n) for i, (size, n) in enumerate(sizes))


def _entry(origin: Origin, axis: int, shape: Axes, index: Any, result: Axes, name: str) -> Origin:
    if any(piece.axis is not None for piece in origin.pieces):
        return origin.without_view(f"concatenate and {name}")
    frame = Frame(shape[axis], index)
    order = (axis, *(i for i in range(len(shape)) if i != axis))
    pieces = [
        Piece(piece.view.transpose(order).each().reshape(result), (*piece.frames, frame)) for piece in origin.pieces
    ]
    return dataclasses.replace(origin, pieces=tuple(pieces))


def _rows(origins: Sequence[Origin], uses: Uses) -> Origin:
    """A gather from a parameter that is no site: by constants, or along several axes at once."""
    table, indices = origins[:2]
    if not indices.data:
        return dataclasses.replace(table.without_view("gather"), leaves=table.leaves | indices.leaves)
    uses.unknown(table.leaves, "data chooses its entries in a way that is not understood (gather)")
    return dataclasses.replace(DATA, rows=table.leaves)


def _meet(eqn: Any, origins: Sequence[Origin], leaves: frozenset[int], uses: Uses) -> Origin:
    """The origin of what is made of data, and perhaps of parameters; notes what this means for the parameters."""
    name = eqn.primitive.name
    if name in _ELEMENTWISE or name in _JOINS:
        uses.modifies(leaves)
        wide = [
            origin.leaves
            for origin, atom in zip(origins, eqn.invars, strict=True)
            if not origin.data and (sum(n > 1 for n in atom.aval.shape) if origin.rank is None else origin.rank) > 1
        ]
        return dataclasses.replace(DATA, products=frozenset().union(*wide)) if name == "mul" else DATA
    products = frozenset[int]().union(*(origin.products for origin in origins))
    if name == "reduce_sum":
        uses.unknown(products, "it is multiplied with data elementwise and then summed; write that as a dot product")
    elif name in ("dot_general", "conv_general_dilated", "ragged_dot_general"):
        rows = frozenset[int]().union(*(origin.rows for origin in origins))
        if not leaves and all(origin.data for origin in origins):
            uses.unknown(rows, f"entries that data chose multiply data ({name})")
            uses.unknown(products, f"its elementwise product with data multiplies data ({name})")
        for origin in origins:
            before = f" after {origin.lost}" if origin.lost else ""
            uses.unknown(origin.leaves, f"it enters {name}{before}, which hides its layout")
    elif leaves:
        uses.unknown(leaves, f"it enters {name} together with data, which is not understood")
    return DATA


def _joined(eqn: Any, origins: Sequence[Origin], leaves: frozenset[int]) -> Origin:
    """Parameters concatenated with parameters: each is a part of the result."""
    axis, start, pieces = eqn.params["dimension"], 0, []
    for origin, atom in zip(origins, eqn.invars, strict=True):
        if any(piece.axis is not None for piece in origin.pieces) or (origin.leaves and not origin.pieces):
            return Origin(leaves=leaves, lost="concatenate")
        pieces += [dataclasses.replace(piece, axis=axis, start=start) for piece in origin.pieces]
        start += atom.aval.shape[axis]
    return Origin(pieces=tuple(pieces), leaves=leaves)


def _modified(eqn: Any, origins: Sequence[Origin], leaves: frozenset[int], uses: Uses) -> Origin:
    """Parameters changed elementwise by parameters and constants: still theirs, with other values."""
    name = eqn.primitive.name
    shape = eqn.outvars[0].aval.shape
    pieces = []
    for origin, atom in zip(origins, eqn.invars, strict=True):
        if origin.pieces and atom.aval.shape == shape:
            pieces += [dataclasses.replace(piece, view=piece.view.inexact()) for piece in origin.pieces]
    if not pieces:
        lost = next((origin.lost for origin in origins if origin.lost), "") or name
        ranks = [origin.rank for origin in origins if origin.rank is not None]
        return Origin(leaves=leaves, lost=lost, rank=max(ranks, default=None))
    seen = frozenset(piece.view.leaf for piece in pieces)
    uses.modifies(leaves - seen)
    return Origin(pieces=tuple(pieces), leaves=seen)
