"""What the parameters of an equation say, by kind of primitive: ``Dot.of(equation)``."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self, TypeAlias

import jax

from jaxprune._jaxpr._equations import Equation

_Axes: TypeAlias = tuple[int, ...]

# One of these says along which axes a primitive works.
_AXES = ("permutation", "broadcast_dimensions", "dimensions", "dimension", "axes", "axis")
# Where a primitive has the sizes that depend on how large its operands or its result are.
_SIZES = {
    "reshape": ("new_sizes",),
    "broadcast_in_dim": ("shape",),
    "split": ("sizes",),
    "slice": ("start_indices", "limit_indices"),
    "pad": ("padding_config",),
    "tile": ("reps",),
    "gather": ("slice_sizes",),
    "dynamic_slice": ("slice_sizes",),
    "conv_general_dilated": ("feature_group_count",),
    "iota": ("shape",),
    "random_bits": ("shape",),
    "random_split": ("shape",),
}


def axes(equation: Equation) -> _Axes:
    """Return the axes that an equation works along.

    Of a transposition they are those of the operand in their new order, of a broadcast those of the result that the
    operand's become, of a concatenation, a stack or a sort the one.
    """
    params = equation.eqn.params
    found = next((params[name] for name in _AXES if name in params), None)
    if found is None:  # top_k, before it had an axis
        return (len(equation.in_shapes[0]) - 1,)
    return _plain(found if isinstance(found, Sequence) else (found,))


def _plain(numbers: Any) -> Any:
    """Return integers in tuples, of any depth, as Python's own: where jax was given NumPy's, it keeps those."""
    return tuple(map(_plain, numbers)) if isinstance(numbers, Sequence) else int(numbers)


def resized(equation: Equation, *sizes: Any) -> Equation:
    """Return the equation for operands or a result of other sizes, of those kinds of primitives that have any.

    Args:
        equation: the equation.
        *sizes: the shape of the result (reshape, broadcast, what is generated), the sizes of the parts (split), starts
            and limits (slice), the edges of each axis (pad), the repeats (tile), the window (gather, dynamic slice),
            or the number of groups (convolution).
    """
    return equation.with_params(**dict(zip(_SIZES[equation.name], sizes, strict=True)))


class Dot(NamedTuple):
    """Of each operand of a contraction the axes that are summed over, and those that number the matrices."""

    contract: tuple[_Axes, _Axes]
    batch: tuple[_Axes, _Axes]

    @classmethod
    def of(cls, equation: Equation) -> Self:
        """Read a dot_general."""
        return cls(*_plain(equation.eqn.params["dimension_numbers"]))


class RaggedDot(NamedTuple):
    """A contraction whose rows are dealt out to groups: as a `Dot`, and the axes of rows and of groups."""

    contract: tuple[_Axes, _Axes]
    batch: tuple[_Axes, _Axes]
    rows: _Axes
    groups: _Axes

    @classmethod
    def of(cls, equation: Equation) -> Self:
        """Read a ragged_dot_general."""
        numbers = equation.eqn.params["ragged_dot_dimension_numbers"]
        (left, right), (left_batch, right_batch) = numbers.dot_dimension_numbers
        return cls(
            _plain((left, right)),
            _plain((left_batch, right_batch)),
            _plain(numbers.lhs_ragged_dimensions),
            _plain(numbers.rhs_group_dimensions),
        )


class Convolution(NamedTuple):
    """A convolution: the axes of images (samples, channels, space...), of kernels (outputs, inputs, window...), of results."""

    image: _Axes
    kernel: _Axes
    result: _Axes
    strides: _Axes
    padding: tuple[tuple[int, int], ...]
    image_dilation: _Axes
    kernel_dilation: _Axes
    groups: int
    image_groups: int

    @classmethod
    def of(cls, equation: Equation) -> Self:
        """Read a conv_general_dilated."""
        params = equation.eqn.params
        numbers = params["dimension_numbers"]
        return cls(
            _plain(numbers.lhs_spec),
            _plain(numbers.rhs_spec),
            _plain(numbers.out_spec),
            _plain(params["window_strides"]),
            _plain(params["padding"]),
            _plain(params["lhs_dilation"]),
            _plain(params["rhs_dilation"]),
            int(params["feature_group_count"]),
            int(params["batch_group_count"]),
        )


class Gather(NamedTuple):
    """A gather.

    Attributes:
        window: the size of a window along each axis of the operand.
        chosen: the axes of the operand that the entries of an index stand for.
        offset: the axes of the result that run through a window.
        collapsed: the axes of the operand along which a window is one element that has no axis in the result.
        batch: the axes of the operand, and of the indices, that number separate gathers.
        clip: whether indices out of range read the nearest entry.
        fill: whether indices out of range read a number that stands for no entry.
    """

    window: _Axes
    chosen: _Axes
    offset: _Axes
    collapsed: _Axes
    batch: tuple[_Axes, _Axes]
    clip: bool
    fill: bool

    @classmethod
    def of(cls, equation: Equation) -> Self:
        """Read a gather."""
        params = equation.eqn.params
        numbers = params["dimension_numbers"]
        return cls(
            _plain(params["slice_sizes"]),
            _plain(numbers.start_index_map),
            _plain(numbers.offset_dims),
            _plain(numbers.collapsed_slice_dims),
            (_plain(numbers.operand_batching_dims), _plain(numbers.start_indices_batching_dims)),
            params["mode"] == jax.lax.GatherScatterMode.CLIP,
            params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP,
        )


class Scatter(NamedTuple):
    """A scatter.

    Attributes:
        window: the axes of the updates that run through a window.
        chosen: the axes of the operand that the entries of an index stand for.
        inserted: the axes of the operand along which a window is one element that has no axis in the updates.
        batch: the axes of the operand, and of the indices, that number separate scatters.
    """

    window: _Axes
    chosen: _Axes
    inserted: _Axes
    batch: tuple[_Axes, _Axes]

    @classmethod
    def of(cls, equation: Equation) -> Self:
        """Read any scatter."""
        numbers = equation.eqn.params["dimension_numbers"]
        return cls(
            _plain(numbers.update_window_dims),
            _plain(numbers.scatter_dims_to_operand_dims),
            _plain(numbers.inserted_window_dims),
            (_plain(numbers.operand_batching_dims), _plain(numbers.scatter_indices_batching_dims)),
        )


class StaticSlice(NamedTuple):
    """Where a slice begins and ends along each axis, and its steps."""

    start: _Axes
    limit: _Axes
    stride: _Axes

    @classmethod
    def of(cls, equation: Equation) -> Self:
        """Read a slice."""
        params = equation.eqn.params
        start = _plain(params["start_indices"])
        return cls(start, _plain(params["limit_indices"]), _plain(params["strides"] or (1,) * len(start)))


class Windows(NamedTuple):
    """The window of a reduction along each axis, and how it moves."""

    size: _Axes
    stride: _Axes
    padding: tuple[tuple[int, int], ...]
    dilation: _Axes

    @classmethod
    def of(cls, equation: Equation) -> Self:
        """Read a reduce_window, or the scatter of its gradient."""
        params = equation.eqn.params
        size = _plain(params["window_dimensions"])
        ones = (1,) * len(size)
        return cls(
            size,
            _plain(params["window_strides"] or ones),
            _plain(params["padding"]),
            _plain(params.get("base_dilation") or ones),
        )


class Remat(NamedTuple):
    """How a body is rematerialised."""

    prevent_cse: Any
    policy: Any

    @classmethod
    def of(cls, equation: Equation) -> Self:
        """Read a checkpoint."""
        return cls(equation.eqn.params["prevent_cse"], equation.eqn.params["policy"])


def split_sizes(equation: Equation) -> _Axes:
    """Return the sizes of the parts of a split."""
    return _plain(equation.eqn.params["sizes"])


def window_sizes(equation: Equation) -> _Axes:
    """Return the sizes of a dynamic slice."""
    return _plain(equation.eqn.params["slice_sizes"])


def edges(equation: Equation) -> tuple[tuple[int, int, int], ...]:
    """Return for each axis how many elements a pad adds before, after and between."""
    return _plain(equation.eqn.params["padding_config"])


def repeats(equation: Equation) -> _Axes:
    """Return how often a tile repeats each axis."""
    return _plain(equation.eqn.params["reps"])


def sums_nothing(equation: Equation) -> bool:
    """Whether a contraction is an elementwise product: along no axis is it summed (``btd,d->btd``; a depthwise 1 x 1)."""
    if equation.name == "dot_general":
        return not Dot.of(equation).contract[0]
    if equation.name == "conv_general_dilated":
        conv = Convolution.of(equation)
        outs, *summed = (equation.in_shapes[1][axis] for axis in conv.kernel)
        return conv.image_groups == 1 and 1 < conv.groups == outs and all(n == 1 for n in summed)
    return False
