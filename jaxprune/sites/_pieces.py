"""A leaf's view as a value, or as a part of one: what is left of it when the value is laid out anew."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

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

    def _as(self, view: View, axis: int | None, start: int, shape: Axes) -> "Piece":
        """The piece of a value of this shape; one that is all of it is no part."""
        whole = axis is None or view.shape == shape
        return dataclasses.replace(self, view=view, axis=None if whole else axis, start=0 if whole else start)

    def transpose(self, order: Sequence[int]) -> "Piece":
        """The piece of the transposed value."""
        axis = None if self.axis is None else list(order).index(self.axis)
        return dataclasses.replace(self, view=self.view.transpose(order), axis=axis)

    def reverse(self, axes: Sequence[int], shape: Axes) -> "Piece":
        """The piece of a value of this shape with axes turned around."""
        view = self.view.reverse(axes)
        if self.axis is None or self.axis not in axes:
            return dataclasses.replace(self, view=view)
        return dataclasses.replace(self, view=view, start=shape[self.axis] - self.start - view.shape[self.axis])

    def slice(self, start: Axes, limit: Axes, stride: Axes, shape: Axes) -> "Piece | None":
        """The piece of a slice, which has this shape; None where the slice takes nothing of it."""
        if self.axis is None:
            return dataclasses.replace(self, view=self.view.slice(start, limit, stride))
        a, step, size = self.axis, stride[self.axis], self.view.shape[self.axis]
        # The numbers, among those taken, of the first entry that lies in the piece, and of the first one behind it.
        first, behind = (max(0, -((start[a] - edge) // step)) for edge in (self.start, self.start + size))
        behind = min(behind, shape[a])
        if first >= behind:
            return None
        low = start[a] + step * first - self.start
        bounds = (
            (*start[:a], low, *start[a + 1 :]),
            (*limit[:a], low + step * (behind - first - 1) + 1, *limit[a + 1 :]),
        )
        return self._as(self.view.slice(*bounds, stride), a, first, shape)

    def reshape(self, before: Axes, shape: Axes) -> "Piece | None":
        """The piece of a value of this shape that had another one before; None where it is no part along one axis of it."""
        if self.axis is None:
            return dataclasses.replace(self, view=self.view.reshape(shape))
        outer = math.prod(before[: self.axis])
        axis = next((a for a, n in enumerate(shape) if n > 1 and math.prod(shape[:a]) == outer), None)
        if axis is None or 0 in shape:
            return None
        old, new = math.prod(before[self.axis + 1 :]), math.prod(shape[axis + 1 :])
        start, size = self.start * old, self.view.shape[self.axis] * old
        if start % new or size % new:
            return None
        view = self.view.reshape([*shape[:axis], size // new, *shape[axis + 1 :]])
        return self._as(view, axis, start // new, shape)

    def within(self, axis: int, start: int) -> "Piece | None":
        """The piece of a value in which its own is a part from `start` along `axis`; None where it is a part of a part."""
        if self.axis not in (None, axis):
            return None
        return dataclasses.replace(self, axis=axis, start=start + self.start)

    def each(self, frame: Frame) -> "Piece | None":
        """The piece of one entry along the leading axis; None where that is what it is a part along."""
        if self.axis == 0:
            return None
        axis = None if self.axis is None else self.axis - 1
        return Piece(self.view.each(), (*self.frames, frame), axis, self.start)

    def inexact(self) -> "Piece":
        """The same piece with values that differ from the leaf's."""
        return dataclasses.replace(self, view=self.view.inexact())
