"""Products of data and a parameter: how each becomes y = x W with x of shape [B, T, I] and W of shape [B, I, O]."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from jaxprune._jaxpr._equations import Equation
from jaxprune._jaxpr._records import Convolution, Dot, Gather, RaggedDot, sums_nothing
from jaxprune.sites._origins import Origin
from jaxprune.sites._pieces import Piece
from jaxprune.sites._sites import Operation
from jaxprune.sites._views import Axes, View


@dataclasses.dataclass(frozen=True)
class Window:
    """The window of a convolution and how it moves; axes of the data are (samples, channels, space...)."""

    size: Axes
    strides: Axes
    padding: tuple[tuple[int, int], ...]
    data_dilation: Axes
    window_dilation: Axes
    axes: Axes
    groups: int


@dataclasses.dataclass(frozen=True)
class Contraction:
    """How data is contracted, as plain data; sites with the same data and contraction share their statistics.

    Attributes:
        kind: a product, one whose rows are dealt out to groups (``ragged_dot``), a convolution, or rows of a table.
        batch: the axes of the data that number matrices, in the order of the matrices.
        contract: the axes of the data that are contracted, in ascending order.
        part: (axis, start, size) where only a part of the data meets this parameter.
        window: of a convolution.
        rows: how many rows a table has, or how many groups a ragged product.
        column: where in an index the row stands.
        clip: whether indices out of range read the nearest row of a table (else none).
    """

    kind: Literal["dot", "ragged", "conv", "gather"]
    batch: Axes = ()
    contract: Axes = ()
    part: tuple[int, int, int] | None = None
    window: Window | None = None
    rows: int = 0
    column: int = 0
    clip: bool = False


@dataclasses.dataclass(frozen=True)
class Use:
    """One parameter in one contraction.

    Attributes:
        piece: the parameter as it enters the equation.
        operation: what the equation does.
        view: the same parameter as ``[B, I, O]``.
        matrix_shape: (B, I, O).
        neighbours: the axis of the piece along which neighbouring inputs lie.
        contraction: what happens to the data.
        operands: which operands of the equation are the data.
    """

    piece: Piece
    operation: Operation
    view: View
    matrix_shape: tuple[int, int, int]
    neighbours: int
    contraction: Contraction
    operands: tuple[int, ...]


def recognise(equation: Equation, origins: Sequence[Origin]) -> list[Use]:
    """Return the uses of parameters in an equation that contracts them with data; none where it is not understood."""
    readers = {
        "dot_general": _dot,
        "conv_general_dilated": _conv,
        "gather": _gather,
        "ragged_dot_general": _ragged,
    }
    reader = readers.get(equation.name)
    return [] if reader is None or sums_nothing(equation) else reader(equation, origins)


def _dot(equation: Equation, origins: Sequence[Origin]) -> list[Use]:
    contracted, batched = Dot.of(equation)
    for w, x in ((0, 1), (1, 0)):
        if origins[x].data and not origins[w].data and origins[w].pieces:
            axes = (contracted[w], contracted[x]), (batched[w], batched[x])
            return [_product(piece, len(equation.in_shapes[w]), *axes, x) for piece in origins[w].pieces]
    return []


def _product(piece: Piece, ndim: int, contracted: tuple[Axes, Axes], batched: tuple[Axes, Axes], x: int) -> Use:
    # In the order of the data's axes, so that all parameters that share an input agree on the order of its features.
    contract = sorted(zip(contracted[1], contracted[0], strict=True))
    batch = sorted(zip(batched[1], batched[0], strict=True))
    free = [i for i in range(ndim) if i not in contracted[0] and i not in batched[0]]
    part = None
    if piece.axis is not None:
        axis = next((d for d, w in (*contract, *batch) if w == piece.axis), None)
        part = None if axis is None else (axis, piece.start, piece.view.shape[piece.axis])
    contraction = Contraction("dot", tuple(d for d, _ in batch), tuple(d for d, _ in contract), part)
    return _as_matrices(piece, "dot", contraction, [w for _, w in batch], [w for _, w in contract], free, (x,))


def _as_matrices(
    piece: Piece,
    operation: Operation,
    contraction: Contraction,
    batch: Sequence[int],
    contract: Sequence[int],
    free: Sequence[int],
    operands: tuple[int, ...],
) -> Use:
    sizes = piece.view.shape
    b, i, o = (math.prod(sizes[axis] for axis in axes) for axes in (batch, contract, free))
    view = piece.view.transpose([*batch, *contract, *free]).reshape([b, i, o])
    neighbours = contract[-1] if contract else 0
    return Use(piece, operation, view, (b, i, o), neighbours, contraction, operands)


def _conv(equation: Equation, origins: Sequence[Origin]) -> list[Use]:
    conv = Convolution.of(equation)
    groups, (out_axis, in_axis, *space) = conv.groups, conv.kernel
    if not origins[0].data or origins[1].data or conv.image_groups != 1:
        return []
    pieces = origins[1].pieces
    if any(piece.axis not in (None, out_axis) or (piece.axis is not None and groups > 1) for piece in pieces):
        return []
    size = tuple(equation.in_shapes[1][axis] for axis in space)
    window = Window(size, conv.strides, conv.padding, conv.image_dilation, conv.kernel_dilation, conv.image, groups)
    uses = []
    for piece in pieces:
        view = piece.view.transpose([out_axis, in_axis, *space])
        out, channels, *_ = view.shape
        # The filters of one group are neighbours: [groups, filters, channels, window].
        view = view.reshape([groups, out // groups, channels * math.prod(size)]).transpose([0, 2, 1])
        b, i, o = view.shape
        uses.append(Use(piece, "conv", view, (b, i, o), in_axis, Contraction("conv", window=window), (0,)))
    return uses


def _gather(equation: Equation, origins: Sequence[Origin]) -> list[Use]:
    gather = Gather.of(equation)
    table, indices = origins[:2]
    if table.data or not indices.data:
        return []
    shape = equation.in_shapes[0]
    # An index into an axis that is taken whole is 0, as vmap of a dynamic slice writes it.
    chosen = [axis for axis in gather.chosen if gather.window[axis] != shape[axis]]
    axis = chosen[0] if chosen else gather.chosen[0]
    if len(chosen) > 1 or gather.window[axis] != 1 or any(piece.axis is not None for piece in table.pieces):
        return []
    contraction = Contraction(
        "gather",
        batch=gather.batch[1],
        rows=shape[axis],
        column=gather.chosen.index(axis),
        clip=gather.clip,
    )
    free = [i for i in range(len(shape)) if i not in (axis, *gather.batch[0])]
    return [_as_matrices(piece, "gather", contraction, gather.batch[0], [axis], free, (1,)) for piece in table.pieces]


def _ragged(equation: Equation, origins: Sequence[Origin]) -> list[Use]:
    plain = RaggedDot.of(equation) == RaggedDot(((1,), (1,)), ((), ()), rows=(0,), groups=(0,))
    rows, table = origins[:2]
    if not plain or not rows.data or table.data or any(piece.axis is not None for piece in table.pieces):
        return []
    contraction = Contraction("ragged", rows=equation.in_shapes[1][0], contract=(1,))
    return [_as_matrices(piece, "dot", contraction, [0], [1], [2], (0, 2)) for piece in table.pieces]
