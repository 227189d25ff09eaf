"""Layout views of an array, as data: which entries of a parameter stand where in the matrix that is multiplied."""

import dataclasses
import math
from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp

Axes: TypeAlias = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transpose:
    """Put the axes in another order, as ``jnp.transpose``."""

    order: Axes

    def apply(self, x: jax.Array) -> jax.Array:
        """Return the view of x."""
        return jnp.transpose(x, self.order)

    def restore(self, x: jax.Array, new: jax.Array) -> jax.Array:
        """Return x with the entries of its view replaced."""
        del x
        return jnp.transpose(new, [self.order.index(i) for i in range(len(self.order))])


@dataclasses.dataclass(frozen=True)
class Reshape:
    """Regroup the axes in row-major order."""

    shape: Axes

    def apply(self, x: jax.Array) -> jax.Array:
        """Return the view of x."""
        return jnp.reshape(x, self.shape)

    def restore(self, x: jax.Array, new: jax.Array) -> jax.Array:
        """Return x with the entries of its view replaced."""
        return jnp.reshape(new, x.shape)


@dataclasses.dataclass(frozen=True)
class Slice:
    """Take every `stride`-th entry from `start` up to `limit` along each axis."""

    start: Axes
    limit: Axes
    stride: Axes

    def _index(self) -> tuple[slice, ...]:
        return tuple(slice(*bounds) for bounds in zip(self.start, self.limit, self.stride, strict=True))

    def apply(self, x: jax.Array) -> jax.Array:
        """Return the view of x."""
        return jax.lax.slice(x, self.start, self.limit, self.stride)

    def restore(self, x: jax.Array, new: jax.Array) -> jax.Array:
        """Return x with the entries of its view replaced."""
        return x.at[self._index()].set(new)


@dataclasses.dataclass(frozen=True)
class Reverse:
    """Turn axes around."""

    axes: Axes

    def apply(self, x: jax.Array) -> jax.Array:
        """Return the view of x."""
        return jax.lax.rev(x, self.axes)

    def restore(self, x: jax.Array, new: jax.Array) -> jax.Array:
        """Return x with the entries of its view replaced."""
        del x
        return jax.lax.rev(new, self.axes)


@dataclasses.dataclass(frozen=True)
class Entry:
    """Take one entry of the leading axis."""

    index: int

    def apply(self, x: jax.Array) -> jax.Array:
        """Return the view of x."""
        return x[self.index]

    def restore(self, x: jax.Array, new: jax.Array) -> jax.Array:
        """Return x with the entries of its view replaced."""
        return x.at[self.index].set(new)


@dataclasses.dataclass(frozen=True)
class Each:
    """Apply the steps that follow to every entry of the leading axis (of `size`): one layer of a stack at a time."""

    size: int


Step: TypeAlias = Transpose | Reshape | Slice | Reverse | Entry | Each


def apply_steps(steps: Sequence[Step], x: jax.Array) -> jax.Array:
    """Return the view of x that the steps describe."""
    for i, step in enumerate(steps):
        if isinstance(step, Each):
            rest = steps[i + 1 :]
            return jax.vmap(lambda entry, rest=rest: apply_steps(rest, entry))(x)
        x = step.apply(x)
    return x


def restore_steps(steps: Sequence[Step], x: jax.Array, new: jax.Array) -> jax.Array:
    """Return x with the entries of the view that the steps describe replaced by `new`; all others stay."""
    if not steps:
        return new
    step, *rest = steps
    if isinstance(step, Each):
        return jax.vmap(lambda entry, values: restore_steps(rest, entry, values))(x, new)
    return step.restore(x, restore_steps(rest, step.apply(x), new))


@dataclasses.dataclass(frozen=True)
class View:
    """A layout view of one leaf of the parameters: plain data, hashable and comparable.

    Attributes:
        leaf: the position of the leaf among the leaves.
        shape: the shape of the view, within the innermost `Each`.
        steps: what leads from the leaf to the view.
        exact: whether the values are the leaf's own (but for casts); False where elementwise operations with other
            parameters or constants (a mask, a norm, fake quantisation) lie between.
    """

    leaf: int
    shape: Axes
    steps: tuple[Step, ...] = ()
    exact: bool = True

    def transpose(self, order: Sequence[int]) -> "View":
        """Put the axes in another order."""
        order = tuple(order)
        if order == tuple(range(len(order))):
            return self
        shape = tuple(self.shape[i] for i in order)
        if self.steps and isinstance(self.steps[-1], Transpose):
            before = dataclasses.replace(self, shape=shape, steps=self.steps[:-1])
            order = tuple(self.steps[-1].order[i] for i in order)
            identity = order == tuple(range(len(order)))
            return before if identity else before._then(shape, Transpose(order))
        return self._then(shape, Transpose(order))

    def reshape(self, shape: Sequence[int]) -> "View":
        """Regroup the axes in row-major order."""
        shape = tuple(map(int, shape))
        if shape == self.shape:
            return self
        if math.prod(shape) != math.prod(self.shape):
            raise ValueError(f"A view of shape {self.shape} cannot be reshaped to {shape}.")
        if self.steps and isinstance(self.steps[-1], Reshape):
            return dataclasses.replace(self, steps=self.steps[:-1])._then(shape, Reshape(shape))
        return self._then(shape, Reshape(shape))

    def slice(self, start: Sequence[int], limit: Sequence[int], stride: Sequence[int] | None = None) -> "View":
        """Take a part of each axis."""
        start, limit = tuple(map(int, start)), tuple(map(int, limit))
        stride = tuple(map(int, stride)) if stride is not None else (1,) * len(start)
        shape = tuple(len(range(*bounds)) for bounds in zip(start, limit, stride, strict=True))
        return self if shape == self.shape else self._then(shape, Slice(start, limit, stride))

    def reverse(self, axes: Sequence[int]) -> "View":
        """Turn axes around."""
        return self._then(self.shape, Reverse(tuple(axes)))

    def each(self) -> "View":
        """Go on with one entry of the leading axis."""
        return self._then(self.shape[1:], Each(self.shape[0]))

    def inexact(self) -> "View":
        """The same view with values that differ from the leaf's."""
        return dataclasses.replace(self, exact=False)

    def _then(self, shape: Axes, step: Step) -> "View":
        return dataclasses.replace(self, shape=shape, steps=(*self.steps, step))


@dataclasses.dataclass(frozen=True)
class _Factor:
    """A part of an axis: of which axes of the leaf it is made, and its size."""

    axes: frozenset[int]
    size: int


def source_axes(steps: Sequence[Step], shape: Axes) -> list[frozenset[int]]:
    """Say for each axis of a view (those of `Each` first) which axes of the leaf, of the given shape, it runs along.

    >>> source_axes([Transpose((1, 0, 2)), Reshape((12, 5))], (3, 4, 5)) == [{0, 1}, {2}]
    True
    """
    done: list[frozenset[int]] = []
    current = [[_Factor(frozenset([axis]), size)] for axis, size in enumerate(shape)]
    for step in steps:
        if isinstance(step, Each):
            done.append(_union(current.pop(0)))
        elif isinstance(step, Entry):
            current.pop(0)
        elif isinstance(step, Transpose):
            current = [current[i] for i in step.order]
        elif isinstance(step, Reshape):
            current = _regroup([factor for axis in current for factor in axis], step.shape)
        elif isinstance(step, Slice):
            sizes = [len(range(*bounds)) for bounds in zip(step.start, step.limit, step.stride, strict=True)]
            current = [
                axis if math.prod(factor.size for factor in axis) == size else [_Factor(_union(axis), size)]
                for axis, size in zip(current, sizes, strict=True)
            ]
    return done + [_union(axis) for axis in current]


def _union(factors: Sequence[_Factor]) -> frozenset[int]:
    return frozenset().union(*(factor.axes for factor in factors if factor.size > 1))


def _regroup(factors: Sequence[_Factor], shape: Axes) -> list[list[_Factor]]:
    """Deal factors out to axes of the given sizes, splitting them where the sizes say so."""
    left = [factor for factor in factors if factor.size > 1]
    axes: list[list[_Factor]] = []
    for i, size in enumerate(shape):
        taken: list[_Factor] = []
        while size > 1 and left:
            factor = left.pop(0)
            if size % factor.size == 0:
                taken.append(factor)
                size //= factor.size
            elif factor.size % size == 0:
                taken.append(_Factor(factor.axes, size))
                left.insert(0, _Factor(factor.axes, factor.size // size))
                size = 1
            else:
                # The boundaries do not nest: from here on, an axis may run along any of what is left.
                mixed = _union([*taken, factor, *left])
                return axes + [[_Factor(mixed, size)] for size in shape[i:]]
        axes.append(taken)
    return axes
