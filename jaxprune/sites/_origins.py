"""Where a value comes from: data, constants, or parameters, and then as which layout view of which leaf."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from jaxprune._jaxpr import _records
from jaxprune._jaxpr._equations import Equation
from jaxprune._jaxpr._primitives import CONTRACTIONS, COPIES, ELEMENTWISE, JOINS, LAYOUT
from jaxprune._jaxpr._records import Gather, StaticSlice
from jaxprune.sites._views import Axes, View


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


def propagate(equation: Equation, origins: Sequence[Origin], values: Sequence[Any], uses: Uses) -> list[Origin]:
    """Return the origins of the results of an equation that is neither a site nor has a body.

    Args:
        equation: the equation.
        origins: of its operands.
        values: its operands at run time; only indices are kept.
        uses: takes note of parameters that end here.
    """
    name = equation.name
    leaves = frozenset[int]().union(*(origin.leaves for origin in origins))
    if name in LAYOUT:
        return _layout(equation, origins)
    if name == "dynamic_slice" and not origins[0].data and origins[0].leaves:
        return [_indexed(equation, origins[0], values[1:])]
    if name == "gather" and not origins[0].data and origins[0].leaves:
        picked = _one_layer(equation, origins[0], values[1])
        return [picked] if picked is not None else [_rows(origins, uses)]
    if any(origin.data for origin in origins):
        return [_meet(equation, origins, leaves, uses)] * len(equation.out_shapes)
    if not leaves:
        return [CONSTANT] * len(equation.out_shapes)
    if name == "concatenate":
        return [_joined(equation, origins, leaves)]
    if name in ELEMENTWISE:
        return [_modified(equation, origins, leaves, uses)] * len(equation.out_shapes)
    made = Origin(leaves=leaves, lost=next((o.lost for o in origins if o.lost), "") or name)
    return [made] * len(equation.out_shapes)


def _layout(equation: Equation, origins: Sequence[Origin]) -> list[Origin]:
    name = equation.name
    if name in COPIES:
        return list(origins)
    origin, shape, result = origins[0], equation.in_shapes[0], equation.out_shapes[0]
    if origin.data:
        return [origin] * len(equation.out_shapes)
    if name in ("split", "unstack"):
        (axis,) = _records.axes(equation)
        sizes = _records.split_sizes(equation) if name == "split" else (1,) * shape[axis]

        def part(low: int, size: int, result: Axes) -> Origin:
            start = [low if i == axis else 0 for i in range(len(shape))]
            limit = [low + size if i == axis else n for i, n in enumerate(shape)]
            return _mapped(origin, name, lambda view: view.slice(start, limit).reshape(result))

        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return list(map(part, starts, sizes, equation.out_shapes))
    if name == "transpose":
        order = _records.axes(equation)
        return [_mapped(origin, name, lambda view: view.transpose(order), order)]
    if name == "slice":
        return [_mapped(origin, name, lambda view: view.slice(*StaticSlice.of(equation)))]
    if name == "rev":
        return [_mapped(origin, name, lambda view: view.reverse(_records.axes(equation)))]
    if math.prod(result) == math.prod(shape):
        return [_mapped(origin, name, lambda view: view.reshape(result))]
    rank = origin.rank if origin.rank is not None else sum(n > 1 for n in shape)
    return [dataclasses.replace(origin.without_view("broadcast"), rank=rank)]


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


def _indexed(equation: Equation, origin: Origin, indices: Sequence[Any]) -> Origin:
    """One entry of one axis, at an index known only at run time: a layer of a stack."""
    shape, sizes = equation.in_shapes[0], _records.window_sizes(equation)
    partial = [axis for axis, (size, n) in enumerate(zip(sizes, shape, strict=True)) if size != n]
    if len(partial) == 1 and sizes[partial[0]] == 1:
        return _entry(origin, partial[0], shape, indices[partial[0]], equation.out_shapes[0], "dynamic_slice")
    # Of axes of one entry only, there is nothing to choose.
    return origin if not partial else origin.without_view("dynamic_slice")


def _one_layer(equation: Equation, origin: Origin, index: Any) -> Origin | None:
    """A gather with a single scalar index into one axis, which is `dynamic_slice` by another name; else None."""
    gather, (shape, indices, *_) = Gather.of(equation), equation.in_shapes
    if indices != (1,) or len(gather.chosen) != 1 or gather.batch[0]:
        return None
    (axis,) = gather.chosen
    if any(size != (1 if i == axis else n) for i, (size, n) in enumerate(zip(gather.window, shape, strict=True))):
        return None
    return _entry(origin, axis, shape, index[0], equation.out_shapes[0], "gather")


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


def _meet(equation: Equation, origins: Sequence[Origin], leaves: frozenset[int], uses: Uses) -> Origin:
    """The origin of what is made of data, and perhaps of parameters; notes what this means for the parameters."""
    name = equation.name
    if name in ELEMENTWISE or name in JOINS:
        uses.modifies(leaves)
        wide = [
            origin.leaves
            for origin, shape in zip(origins, equation.in_shapes, strict=True)
            if not origin.data and (sum(n > 1 for n in shape) if origin.rank is None else origin.rank) > 1
        ]
        return dataclasses.replace(DATA, products=frozenset().union(*wide)) if name == "mul" else DATA
    products = frozenset[int]().union(*(origin.products for origin in origins))
    if name == "reduce_sum":
        uses.unknown(products, "it is multiplied with data elementwise and then summed; write that as a dot product")
    elif name in CONTRACTIONS:
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


def _joined(equation: Equation, origins: Sequence[Origin], leaves: frozenset[int]) -> Origin:
    """Parameters concatenated with parameters: each is a part of the result."""
    (axis,), start, pieces = _records.axes(equation), 0, []
    for origin, shape in zip(origins, equation.in_shapes, strict=True):
        if any(piece.axis is not None for piece in origin.pieces) or (origin.leaves and not origin.pieces):
            return Origin(leaves=leaves, lost="concatenate")
        pieces += [dataclasses.replace(piece, axis=axis, start=start) for piece in origin.pieces]
        start += shape[axis]
    return Origin(pieces=tuple(pieces), leaves=leaves)


def _modified(equation: Equation, origins: Sequence[Origin], leaves: frozenset[int], uses: Uses) -> Origin:
    """Parameters changed elementwise by parameters and constants: still theirs, with other values."""
    name = equation.name
    shape = equation.out_shapes[0]
    pieces = []
    for origin, operand in zip(origins, equation.in_shapes, strict=True):
        if origin.pieces and operand == shape:
            pieces += [dataclasses.replace(piece, view=piece.view.inexact()) for piece in origin.pieces]
    if not pieces:
        lost = next((origin.lost for origin in origins if origin.lost), "") or name
        ranks = [origin.rank for origin in origins if origin.rank is not None]
        return Origin(leaves=leaves, lost=lost, rank=max(ranks, default=None))
    seen = frozenset(piece.view.leaf for piece in pieces)
    uses.modifies(leaves - seen)
    return Origin(pieces=tuple(pieces), leaves=seen)
