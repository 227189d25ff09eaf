"""Where a value comes from: data, constants, or parameters, and then as which layout view of which leaf."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from jaxprune._jaxpr import _records
from jaxprune._jaxpr._equations import Equation, per_device
from jaxprune._jaxpr._primitives import CONTRACTIONS, COPIES, ELEMENTWISE, JOINS, LAYOUT
from jaxprune._jaxpr._records import Dot, Gather, StaticSlice
from jaxprune.sites._pieces import Frame, Piece
from jaxprune.sites._views import Axes


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
        given: whether it is made of parameters alone and yet an input of what follows: a learned query repeated for every
            sample, an entry that data chose.
        one_hot: whether it is data that only says which entry is chosen.
    """

    data: bool = False
    pieces: tuple[Piece, ...] = ()
    leaves: frozenset[int] = frozenset()
    lost: str = ""
    rank: int | None = None
    products: frozenset[int] = frozenset()
    rows: frozenset[int] = frozenset()
    given: bool = False
    one_hot: bool = False

    def without_view(self, operation: str) -> "Origin":
        """The origin after an operation that leaves no view."""
        return dataclasses.replace(self, pieces=(), lost=self.lost or operation)

    def laid_out(self, operation: str, change: Callable[[Piece], Piece | None]) -> "Origin":
        """The origin with every piece changed, and without a view where that makes one None."""
        pieces = list(map(change, self.pieces))
        found = tuple(piece for piece in pieces if piece is not None)
        return self.without_view(operation) if len(found) < len(pieces) else dataclasses.replace(self, pieces=found)


# What a product of two parameters may be, and what to do so that it is known.
_LEARNED = "a learned query; repeat a query for every sample before it is projected"

CONSTANT = Origin()
DATA = Origin(data=True)


@dataclasses.dataclass
class Uses:
    """What became of the leaves besides sites; entries are kept in order and only once."""

    elementwise: dict[int, None] = dataclasses.field(default_factory=dict)
    unresolved: dict[tuple[int, str], None] = dataclasses.field(default_factory=dict)
    tables: dict[int, None] = dataclasses.field(default_factory=dict)

    def modifies(self, leaves: frozenset[int]) -> None:
        """Note leaves that meet data, or other parameters, elementwise."""
        self.elementwise.update(dict.fromkeys(sorted(leaves)))

    def reads(self, leaves: frozenset[int]) -> None:
        """Note leaves of which data chooses rows."""
        self.tables.update(dict.fromkeys(sorted(leaves)))

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
    if name in ("dynamic_slice", "gather") and not origins[0].data and origins[0].leaves:
        chosen = any(origin.data for origin in origins[1:])
        if name == "dynamic_slice":
            picked: Origin | None = _indexed(equation, origins[0], values[1:])
        else:
            picked = _one_layer(equation, origins[0], values[1])
        return [_rows(origins, uses) if picked is None else dataclasses.replace(picked, given=picked.given or chosen)]
    if any(origin.data for origin in origins):
        return [_meet(equation, origins, leaves, uses)] * len(equation.out_shapes)
    if not leaves:
        return [CONSTANT] * len(equation.out_shapes)
    if name in ("concatenate", "stack", "pad"):
        return [_joined(equation, origins, leaves)]
    if name in ELEMENTWISE or _records.sums_nothing(equation):
        return [_modified(equation, origins, leaves, uses)] * len(equation.out_shapes)
    given = name == "tile" or any(origin.given for origin in origins)
    made = Origin(leaves=leaves, lost=next((o.lost for o in origins if o.lost), "") or name, given=given)
    return [made] * len(equation.out_shapes)


def as_data(equation: Equation, origins: Sequence[Origin], uses: Uses) -> Sequence[Origin]:
    """Take for data what stands in its place where parameters alone are multiplied: a learned query, projected."""
    if equation.name not in CONTRACTIONS or any(origin.data for origin in origins):
        return origins
    for origin in origins:
        if origin.given:
            uses.modifies(origin.leaves)
    return [DATA if origin.given else origin for origin in origins]


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
            taken = (*shape[:axis], size, *shape[axis + 1 :])
            start = tuple(low if i == axis else 0 for i in range(len(shape)))
            limit = tuple(low + n for low, n in zip(start, taken, strict=True))
            sliced = _sliced(origin, start, limit, (1,) * len(shape), taken)
            return sliced.laid_out(name, lambda piece: piece.reshape(taken, result))

        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return list(map(part, starts, sizes, equation.out_shapes))
    if name == "transpose":
        return [origin.laid_out(name, lambda piece: piece.transpose(_records.axes(equation)))]
    if name == "slice":
        return [_sliced(origin, *StaticSlice.of(equation), result)]
    if name == "rev":
        return [origin.laid_out(name, lambda piece: piece.reverse(_records.axes(equation), shape))]
    if math.prod(result) == math.prod(shape):
        before = "concatenate and " if any(piece.axis is not None for piece in origin.pieces) else ""
        return [origin.laid_out(before + name, lambda piece: piece.reshape(shape, result))]
    rank = origin.rank if origin.rank is not None else sum(n > 1 for n in shape)
    return [dataclasses.replace(origin.without_view("broadcast"), rank=rank, given=bool(origin.leaves))]


def _sliced(origin: Origin, start: Axes, limit: Axes, stride: Axes, shape: Axes) -> Origin:
    """A slice; of parameters side by side only those that it takes something of are left."""
    if not origin.pieces:
        return origin
    pieces = [piece.slice(start, limit, stride, shape) for piece in origin.pieces]
    found = tuple(piece for piece in pieces if piece is not None)
    return dataclasses.replace(origin, pieces=found, leaves=frozenset(piece.view.leaf for piece in found))


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
    frame = Frame(shape[axis], index)
    order = (axis, *(i for i in range(len(shape)) if i != axis))
    rest = tuple(shape[i] for i in order[1:])

    def entry(piece: Piece) -> Piece | None:
        one = piece.transpose(order).each(frame)
        return None if one is None else one.reshape(rest, result)

    before = "concatenate and " if any(piece.axis is not None for piece in origin.pieces) else ""
    return origin.laid_out(before + name, entry)


def _rows(origins: Sequence[Origin], uses: Uses) -> Origin:
    """A gather from a parameter that is no site: by constants, or along several axes at once."""
    table, indices = origins[:2]
    if not indices.data:
        return dataclasses.replace(table.without_view("gather"), leaves=table.leaves | indices.leaves)
    uses.unknown(table.leaves, "data chooses its entries in a way that is not understood (gather)")
    return dataclasses.replace(DATA, rows=table.leaves)


def _meet(equation: Equation, origins: Sequence[Origin], leaves: frozenset[int], uses: Uses) -> Origin:
    """The origin of what is made of data, and perhaps of parameters; notes what this means for the parameters."""
    name = "mul" if _records.sums_nothing(equation) else equation.name
    if name in ELEMENTWISE or name in JOINS:
        uses.modifies(leaves)
        wide = [
            origin.leaves
            for origin, shape in zip(origins, equation.in_shapes, strict=True)
            if not origin.data and (sum(n > 1 for n in shape) if origin.rank is None else origin.rank) > 1
        ]
        products = frozenset[int]().union(*wide) if name == "mul" else frozenset[int]()
        return dataclasses.replace(DATA, products=products, one_hot=name == "eq")
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
            hint = (
                f"; a product of parameters is a weight of low rank or {_LEARNED}"
                if origin.lost in CONTRACTIONS
                else ""
            )
            uses.unknown(origin.leaves, f"it enters {name}{before}, which hides its layout{hint}")
    elif leaves:
        uses.unknown(leaves, f"it enters {per_device(name) or f'{name} together with data, which is not understood'}")
    return DATA


def _joined(equation: Equation, origins: Sequence[Origin], leaves: frozenset[int]) -> Origin:
    """Parameters side by side with parameters and constants: each is a part of the result."""
    places = [] if equation.name == "pad" and origins[1].leaves else _places(equation)

    def placed(number: int, piece: Piece) -> Piece | None:
        shape, (axis, start) = equation.in_shapes[number], places[number]
        if equation.name == "stack":
            as_entry = piece.reshape(shape, (*shape[:axis], 1, *shape[axis:]))
            return None if as_entry is None else as_entry.within(axis, start)
        return piece.within(axis, start)

    if places:
        found = [origin.laid_out(equation.name, functools.partial(placed, i)) for i, origin in enumerate(origins)]
    else:
        found = [origin.without_view(equation.name) for origin in origins]
    if any(origin.leaves and not origin.pieces for origin in found):
        lost = next((origin.lost for origin in found if origin.lost), "")
        return Origin(leaves=leaves, lost=lost, given=any(origin.given for origin in origins))
    return Origin(pieces=tuple(piece for origin in found for piece in origin.pieces), leaves=leaves)


def _places(equation: Equation) -> list[tuple[int, int]]:
    """For each operand of a join the axis of the result that it is a part along, and where it begins; empty if unknown."""
    shapes = equation.in_shapes
    if equation.name == "pad":
        edges = _records.edges(equation)
        padded = [(axis, low) for axis, (low, high, _) in enumerate(edges) if low or high] or [(0, 0)]
        plain = len(padded) == 1 and all(min(low, high) >= 0 and not interior for low, high, interior in edges)
        return padded * 2 if plain else []
    (axis,) = _records.axes(equation)
    sizes = [1 if equation.name == "stack" else shape[axis] for shape in shapes]
    return [(axis, sum(sizes[:number])) for number in range(len(shapes))]


def _modified(equation: Equation, origins: Sequence[Origin], leaves: frozenset[int], uses: Uses) -> Origin:
    """Parameters changed elementwise by parameters and constants: still theirs, with other values."""
    filling = []
    for number, origin in enumerate(origins):
        order = _filling(equation, number)
        if origin.pieces and order is not None:
            filling.append(origin.laid_out(equation.name, functools.partial(_changed, order)))
    if not filling:
        lost = next((origin.lost for origin in origins if origin.lost), "") or equation.name
        ranks = [origin.rank for origin in origins if origin.rank is not None]
        whole = math.prod(equation.out_shapes[0])
        sizes = [math.prod(shape) for o, shape in zip(origins, equation.in_shapes, strict=True) if o.leaves]
        given = any(origin.given for origin in origins) or max(sizes) < whole
        return Origin(leaves=leaves, lost=lost, rank=max(ranks, default=None), given=given)
    pieces = tuple(piece for origin in filling for piece in origin.pieces)
    seen = frozenset(piece.view.leaf for piece in pieces)
    uses.modifies(leaves - seen)
    return Origin(pieces=pieces, leaves=seen, given=any(origin.given for origin in filling))


def _changed(order: Axes, piece: Piece) -> Piece:
    return piece.transpose(order).inexact()


def _filling(equation: Equation, number: int) -> Axes | None:
    """The order of an operand's axes in the result of an elementwise operation, where it has an element for each there."""
    shape, result = equation.in_shapes[number], equation.out_shapes[0]
    if equation.name != "dot_general":
        return tuple(range(len(shape))) if shape == result else None
    batch = Dot.of(equation).batch[number]
    order = (*batch, *(axis for axis in range(len(shape)) if axis not in batch))
    return order if math.prod(shape) == math.prod(result) and len(shape) == len(result) else None
