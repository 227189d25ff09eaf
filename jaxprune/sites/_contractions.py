"""Products of data and a parameter: how each becomes y = x W with x of shape [B, T, I] and W of shape [B, I, O]."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax

from jaxprune.sites._origins import Origin, Piece
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
        batch: the axes of the data that number matrices, in ascending order.
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


def recognise(eqn: Any, origins: Sequence[Origin]) -> list[Use]:
    """Return the uses of parameters in an equation that contracts them with data; none where it is not understood."""
    readers = {
        "dot_general": _dot,
        "conv_general_dilated": _conv,
        "gather": _gather,
        "ragged_dot_general": _ragged,
    }
    reader = readers.get(eqn.primitive.name)
    return [] if reader is None else reader(eqn, origins)


def _dot(eqn: Any, origins: Sequence[Origin]) -> list[Use]:
    (contracted, batched) = eqn.params["dimension_numbers"]
    for w, x in ((0, 1), (1, 0)):
        if origins[x].data and not origins[w].data and origins[w].pieces:
            axes = (contracted[w], contracted[x]), (batched[w], batched[x])
            return [_product(piece, eqn.invars[w].aval.ndim, *axes, x) for piece in origins[w].pieces]
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


def _conv(eqn: Any, origins: Sequence[Origin]) -> list[Use]:
    params = eqn.params
    groups, numbers = params["feature_group_count"], params["dimension_numbers"]
    out_axis, in_axis, *space = numbers.rhs_spec
    if not origins[0].data or origins[1].data or params["batch_group_count"] != 1:
        return []
    pieces = origins[1].pieces
    if any(piece.axis not in (None, out_axis) or (piece.axis is not None and groups > 1) for piece in pieces):
        return []
    kernel = eqn.invars[1].aval.shape
    window = Window(
        tuple(kernel[axis] for axis in space),
        tuple(params["window_strides"]),
        tuple(map(tuple, params["padding"])),
        tuple(params["lhs_dilation"]),
        tuple(params["rhs_dilation"]),
        tuple(numbers.lhs_spec),
        groups,
    )
    uses = []
    for piece in pieces:
        view = piece.view.transpose([out_axis, in_axis, *space])
        out, channels, *size = view.shape
        # The filters of one group are neighbours: [groups, filters, channels, window].
        view = view.reshape([groups, out // groups, channels * math.prod(size)]).transpose([0, 2, 1])
        b, i, o = view.shape
        uses.append(Use(piece, "conv", view, (b, i, o), in_axis, Contraction("conv", window=window), (0,)))
    return uses


def _gather(eqn: Any, origins: Sequence[Origin]) -> list[Use]:
    numbers = eqn.params["dimension_numbers"]
    table, indices = origins[:2]
    if table.data or not indices.data or numbers.operand_batching_dims:
        return []
    shape, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
    # An index into an axis that is taken whole is 0, as vmap of a dynamic slice writes it.
    chosen = [axis for axis in numbers.start_index_map if sizes[axis] != shape[axis]]
    axis = chosen[0] if chosen else numbers.start_index_map[0]
    if len(chosen) > 1 or sizes[axis] != 1 or any(piece.axis is not None for piece in table.pieces):
        return []
    contraction = Contraction(
        "gather",
        rows=shape[axis],
        column=numbers.start_index_map.index(axis),
        clip=eqn.params["mode"] == jax.lax.GatherScatterMode.CLIP,
    )
    free = [i for i in range(len(shape)) if i != axis]
    return [_as_matrices(piece, "gather", contraction, [], [axis], free, (1,)) for piece in table.pieces]


def _ragged(eqn: Any, origins: Sequence[Origin]) -> list[Use]:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    contracted, batched = numbers.dot_dimension_numbers
    plain = (
        tuple(map(tuple, contracted)) == ((1,), (1,))
        and tuple(map(tuple, batched)) == ((), ())
        and tuple(numbers.lhs_ragged_dimensions) == (0,)
        and tuple(numbers.rhs_group_dimensions) == (0,)
    )
    rows, table = origins[:2]
    if not plain or not rows.data or table.data or any(piece.axis is not None for piece in table.pieces):
        return []
    contraction = Contraction("ragged", rows=eqn.invars[1].aval.shape[0], contract=(1,))
    return [_as_matrices(piece, "dot", contraction, [0], [1], [2], (0, 2)) for piece in table.pieces]
