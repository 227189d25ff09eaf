"""Exact order statistics by counting: which entries are the smallest, without a sort and without a gather.

The entries of a pool are ordered by whole numbers: a key read from the bit pattern of the value and, among equal keys,
the position. How many entries lie below a threshold is one sum, however the data is sharded. So the place where the
removed entries end is found by narrowing a bracket, first of the key, then of the position. Every pass over the data
counts below seven thresholds: reading takes the time, comparing is nearly free.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune import _counts
from jaxprune._counts import Count
from jaxprune._order import FIRST_POSITION, MOST, WORD, Order, from_end, trailing, words

# Seven thresholds cut a bracket into eight: a float32 takes at most eleven such passes, a bfloat16 six.
_BITS = 3
_THRESHOLDS = (1 << _BITS) - 1
# The first look is at zero (a pruned layer is full of it), at the smallest number above it, at the end of all numbers,
# and at powers of two among which nearly all weights and scores lie.
_FIRST_EXPONENTS = (-20, -12, -7, -2)
# An interpolation assumes evenly spread numbers, which is fair within a few octaves (powers of two). Its thresholds
# surround its guess at these multiples of the error to be expected.
_MAX_OCTAVES = 2.8
_AROUND = (-2.5, -1.0, -0.4, 0.0, 0.4, 1.0, 2.5)
# Below this gain, the bracket's old width over its new one, an interpolation has failed and is not tried again.
_MIN_GAIN = 4

# What is read of an array: its values and, if some entries are protected, which.
_Operand = tuple[jax.Array, ...]
# Sums conditions over some axes: a list of arrays [*shape] to [len(list), *kept].
_Sums = Callable[[list[jax.Array], tuple[int, ...]], jax.Array]


class _Bracket(NamedTuple):
    """Bounds of the threshold sought: at most the target lies below `low`, more than it below `high`."""

    low: jax.Array  # [*batch]
    high: jax.Array  # [*batch]
    below_low: Count  # [arrays, *batch]
    below_high: Count  # [arrays, *batch]
    smooth: jax.Array  # [*batch], whether interpolation has not failed yet
    thresholds: jax.Array  # [thresholds, *batch], where to count next; state, lest XLA work them out for every entry


class _Border(NamedTuple):
    """Where the removed entries end, as far as it has been found: a key, then an array, then a position."""

    stage: jax.Array  # (), the number to find next: 0 the key, then the words of the position
    cuts: jax.Array  # [stages, *batch], the numbers found
    array: jax.Array  # [*batch], of the entries with the key found those of later arrays go, of earlier ones stay
    left: Count  # [*batch], entries still to be removed
    bracket: _Bracket  # of the number to find next


def keep_largest(values: jax.Array, removed: Count, *, batch: tuple[int, ...] = (), magnitude: bool) -> jax.Array:
    """Mask the `removed` smallest entries of each pool.

    Exactly `removed` entries are masked, whatever the ties: among equals the lower row-major index is kept. A NaN ranks
    lowest, below minus infinity; minus zero equals zero. The mask is the same on every sharding, and sharded as `values`.

    Args:
        values: a floating-point array of any shape.
        removed: how many entries to mask, at most a pool's size; of shape `()`, or one for each pool. May be traced.
        batch: the axes that number the pools, in rising order; one pool consists of all other axes.
        magnitude: whether to rank by `|values|`, or else by the signed values.

    Returns:
        A bool array of the shape of `values`, `True` = keep.
    """
    if values.size == 0:
        return jnp.ones_like(values, dtype=bool)
    return _keep_largest(values, Count(*map(jnp.asarray, removed)), batch=batch, magnitude=magnitude)


def keep_largest_jointly(
    values: Sequence[jax.Array],
    removed: Count,
    *,
    magnitude: bool,
    protected: Sequence[jax.Array] | None = None,
) -> list[jax.Array]:
    """Mask the `removed` smallest entries of the one pool that all arrays make up.

    As `keep_largest`; among equals the earlier array, then the lower row-major index is kept. Arrays of several dtypes
    are compared in the dtype they promote to.

    Args:
        values: floating-point arrays of any shapes.
        removed: how many entries to mask, at most the number of unprotected ones; of shape `()`. May be traced.
        magnitude: whether to rank by `|values|`, or else by the signed values.
        protected: bool arrays of the shapes of `values`: where `True`, the entry is never masked.

    Returns:
        A list of bool arrays of the shapes of `values`, `True` = keep.
    """
    operands = [(array,) for array in values] if protected is None else list(zip(values, protected, strict=True))
    filled = [operand for operand in operands if operand[0].size]
    removed = Count(*map(jnp.asarray, removed))
    found = iter(_keep_largest_jointly(filled, removed, magnitude=magnitude) if filled else [])
    return [next(found) if array.size else jnp.ones_like(array, dtype=bool) for array in values]


@functools.partial(jax.jit, static_argnames=("batch", "magnitude"))
def _keep_largest(values: jax.Array, removed: Count, *, batch: tuple[int, ...], magnitude: bool) -> jax.Array:
    return _by_platform([(lax.stop_gradient(values),)], removed, batch, magnitude)[0]


@functools.partial(jax.jit, static_argnames="magnitude")
def _keep_largest_jointly(operands: list[_Operand], removed: Count, *, magnitude: bool) -> list[jax.Array]:
    return _by_platform(lax.stop_gradient(operands), removed, (), magnitude)


def _by_platform(operands: list[_Operand], removed: Count, batch: tuple[int, ...], magnitude: bool) -> list[jax.Array]:
    """Select with the sums that suit the platform the program is compiled for.

    XLA's CPU compiler writes a condition down in full before it sums it up, unless several sums are one reduction. Such a
    reduction of a sharded array is partitioned by gathers, but where there is one CPU device nothing is sharded on CPU.
    Other compilers fuse plain sums, and read their common operand once.
    """
    try:
        cpu = _sum_in_one if len(jax.devices("cpu")) == 1 else _sum_stacked
    except RuntimeError:  # JAX has been told to do without its CPU backend.
        cpu = _sum_each
    select = functools.partial(_select, batch=batch, magnitude=magnitude)
    return lax.platform_dependent(
        operands,
        removed,
        cpu=functools.partial(select, sums=cpu),
        default=functools.partial(select, sums=_sum_each),
    )


def _select(
    operands: list[_Operand], removed: Count, *, batch: tuple[int, ...], magnitude: bool, sums: _Sums
) -> list[jax.Array]:
    searched = operands
    if sums is _sum_in_one and not batch:
        searched = [tuple(map(_in_rows, operand)) for operand in operands]
    border = _Pools(searched, batch, magnitude, sums).find(removed)
    return _Pools(operands, batch, magnitude, sums).keep(border)


def _sum_in_one(conditions: list[jax.Array], axes: tuple[int, ...]) -> jax.Array:
    if not axes:
        return _sum_stacked(conditions, axes)
    ones = tuple(condition.astype(jnp.uint32) for condition in conditions)
    zeros = (jnp.uint32(0),) * len(ones)
    return jnp.stack(lax.reduce(ones, zeros, lambda a, b: tuple(map(lax.add, a, b)), axes))


def _sum_stacked(conditions: list[jax.Array], axes: tuple[int, ...]) -> jax.Array:
    return jnp.sum(jnp.stack(conditions), [axis + 1 for axis in axes], dtype=jnp.uint32)


def _sum_each(conditions: list[jax.Array], axes: tuple[int, ...]) -> jax.Array:
    return jnp.stack([jnp.sum(condition, axes, dtype=jnp.uint32) for condition in conditions])


def _in_rows(array: jax.Array) -> jax.Array:
    """The same entries in the same order as a matrix, whose rows XLA's CPU compiler shares out among threads."""
    return array.reshape(math.gcd(array.size, 32), -1) if array.size <= MOST else array


class _Pools:
    """Pools of entries: one for each index of the `batch` axes of the only array, or one of all arrays."""

    def __init__(self, operands: list[_Operand], batch: tuple[int, ...], magnitude: bool, sums: _Sums):
        self.operands = operands
        self.shapes = [operand[0].shape for operand in operands]
        self.batch = batch
        self.axes = [tuple(axis for axis in range(len(shape)) if axis not in batch) for shape in self.shapes]
        self.size = sum(operand[0].size for operand in operands)
        self.order = Order(jnp.result_type(*(operand[0].dtype for operand in operands)), magnitude)
        self.words = [words(shape, axes) for shape, axes in zip(self.shapes, self.axes, strict=True)]
        self.sums = sums

    def find(self, removed: Count) -> _Border:
        """Find where the `removed` smallest entries end."""

        def unfinished(border: _Border) -> jax.Array:
            return (border.stage < border.cuts.shape[0]) & jnp.any((border.left.high | border.left.low) > 0)

        return lax.while_loop(unfinished, self._take_pass, self._all_open(removed))

    def keep(self, border: _Border) -> list[jax.Array]:
        """Mask the entries before the border."""
        return [self._mask(i, border) for i in range(len(self.operands))]

    def _all_open(self, removed: Count) -> _Border:
        # Made from the values, so that the loops' state is sharded as it will be.
        like = jnp.sum(self.operands[0][0], self.axes[0])
        stages = 1 + max(map(len, self.words))
        low = jnp.full_like(like, self.order.lowest, self.order.key)
        size = Count(
            *(
                jnp.stack([jnp.full_like(like, word, jnp.uint32) for word in sizes])
                for sizes in zip(*(divmod(self._pool_size(i), WORD) for i in range(len(self.operands))), strict=True)
            )
        )
        zero = jax.tree.map(jnp.zeros_like, size)
        return _Border(
            stage=jnp.int32(0),
            cuts=jnp.stack([low, *[jnp.full_like(low, FIRST_POSITION)] * (stages - 1)]),
            array=jnp.full_like(low, len(self.operands), jnp.int32),
            left=Count(*(word + jnp.zeros_like(like, jnp.uint32) for word in removed)),
            bracket=_Bracket(
                low=low,
                high=jnp.full_like(low, self.order.infinity + 2),
                below_low=zero,
                below_high=size,
                smooth=jnp.ones_like(low, dtype=bool),
                thresholds=jnp.stack([jnp.full_like(low, number) for number in self._first_thresholds()]),
            ),
        )

    def _first_thresholds(self) -> list[int]:
        powers = [self.order.key_of(2.0**exponent) for exponent in _FIRST_EXPONENTS]
        return [0, 1, *powers, self.order.infinity + 1]

    def _pool_size(self, i: int) -> int:
        return math.prod(self.shapes[i][axis] for axis in self.axes[i])

    def _take_pass(self, border: _Border) -> _Border:
        """Narrow the bracket; when all to be removed lies below `low`, or the bracket holds nothing else, move on."""
        before = border.bracket
        counts = self._count(before.thresholds, border)
        bracket = _narrow(before, counts, self._over_arrays(counts, axis=1), border.left)
        failed = self._guessing(before, border.stage) & (_width(bracket) > _width(before) // _MIN_GAIN)
        border = border._replace(bracket=bracket._replace(smooth=bracket.smooth & ~failed))

        exact = _counts.equal(self._over_arrays(bracket.below_low), border.left)
        found = jnp.all(exact | (bracket.high - bracket.low == 1))
        return self._place_thresholds(lax.cond(found, self._move_on, lambda border: border, border))

    def _octaves(self, bracket: _Bracket, stage: jax.Array) -> jax.Array:
        """The width in octaves. Positions are taken to be evenly spread over all their range."""
        octave = jnp.where(stage == 0, jnp.float32(self.order.octave), jnp.float32(WORD))
        return _width(bracket).astype(jnp.float32) / octave

    def _guessing(self, bracket: _Bracket, stage: jax.Array) -> jax.Array:
        return bracket.smooth & (self._octaves(bracket, stage) <= _MAX_OCTAVES)

    def _place_thresholds(self, border: _Border) -> _Border:
        """Choose where to count next: by interpolation if it may work, else evenly."""
        bracket = border.bracket
        below, above = self._over_arrays(bracket.below_low), self._over_arrays(bracket.below_high)
        wanted = _counts.to_float(_counts.subtract(border.left, below))
        between = _counts.to_float(_counts.subtract(above, below))
        width = _width(bracket)
        guesses = _guesses(wanted, between, width, self._octaves(bracket, border.stage))
        steps = jnp.where(self._guessing(bracket, border.stage)[None], guesses, _even_steps(width))
        steps = jnp.maximum(jnp.minimum(steps, width[None] - 1), 1)
        thresholds = bracket.low[None] + lax.bitcast_convert_type(steps, bracket.low.dtype)
        return border._replace(bracket=bracket._replace(thresholds=thresholds))

    def _over_arrays(self, counts: Count, axis: int = 0) -> Count:
        return _counts.total(counts, (axis,), self.size)

    def _count(self, thresholds: jax.Array, border: _Border) -> Count:
        """Count, in one pass, what lies below the thresholds: [thresholds, *batch] to [thresholds, arrays, *batch]."""
        # Without the barrier XLA takes what does not change out of the loop, keys and positions, and writes it down in
        # full. The 1 makes positions depend on the barrier.
        operands, thresholds, one = lax.optimization_barrier((self.operands, thresholds, jnp.uint32(1)))
        counts = []
        for i, (shape, axes) in enumerate(zip(self.shapes, self.axes, strict=True)):
            numbers = self._numbers(i, operands[i], border, one)
            below = [
                numbers < jnp.expand_dims(lax.index_in_dim(thresholds, j, keepdims=False), axes)
                for j in range(_THRESHOLDS)
            ]
            # The minor axes in one word, then the others; among them, in a reduction of several, the rows.
            inner = trailing(shape, axes[1:] if self.sums is _sum_in_one and not self.batch else axes)
            low = self.sums(below, inner)
            kept = [axis for axis in range(len(shape)) if axis not in inner]
            outer = tuple(1 + kept.index(axis) for axis in axes if axis not in inner)
            counts.append(_counts.total(Count(jnp.zeros_like(low), low), outer, self._pool_size(i)))
        return jax.tree.map(lambda *words: jnp.stack(words, axis=1), *counts)

    def _numbers(self, i: int, operand: _Operand, border: _Border, one: jax.Array) -> jax.Array:
        """What the stage compares: the keys, or a word of the position of the entries that are still undecided."""
        never = np.iinfo(self.order.key).max
        keys = self.order.keys(operand[0])
        numbers = jnp.maximum(keys, jnp.where(border.stage == 0, np.iinfo(self.order.key).min, never))
        for stage, axes in enumerate(self.words[i], start=1):
            # Choices of one number for all entries are free; those for every entry cost.
            wanted = jnp.where((border.stage == stage) & (border.array == i), border.cuts[0], never)
            undecided = keys == self._spread(i, wanted)
            for major, cut in zip(self.words[i][: stage - 1], border.cuts[1:], strict=False):
                undecided &= self._position(i, major, one) == self._spread(i, cut)
            # Adding nothing gives the positions the sharding of the values, as explicit meshes demand.
            position = self._position(i, axes, one) + jnp.zeros_like(keys)
            numbers = jnp.where(undecided, position, numbers)
        return jnp.where(operand[1], never, numbers) if len(operand) > 1 else numbers

    def _position(self, i: int, axes: tuple[int, ...], one: jax.Array) -> jax.Array:
        return from_end(self.shapes[i], axes, one).astype(self.order.key)

    def _spread(self, i: int, of_pools: jax.Array) -> jax.Array:
        """Shape what belongs to pools so that it combines with the entries of an array."""
        return jnp.expand_dims(of_pools, self.axes[i])

    def _move_on(self, border: _Border) -> _Border:
        """Note the number found. Of the entries that have it the last go, from the last array backwards."""
        found, dims = border.bracket, border.array.ndim
        left = _counts.subtract(border.left, self._over_arrays(found.below_low))
        tied = _counts.subtract(found.below_high, found.below_low)
        array = jnp.where(border.stage == 0, self._array_of_last(left, tied), border.array)
        index = _along(np.arange(len(self.operands)), dims)
        if len(self.operands) > 1:
            later = Count(*(jnp.where(index > array[None], word, 0) for word in tied))
            left = _counts.subtract(left, self._over_arrays(later))

        stages = np.arange(border.cuts.shape[0])
        sizes = np.zeros((len(stages), len(self.operands)), np.uint32)
        for i, (shape, groups) in enumerate(zip(self.shapes, self.words, strict=True)):
            sizes[: len(groups), i] = [math.prod(shape[axis] for axis in axes) for axes in groups]
        chosen = (_along(stages[:, None], dims) == border.stage) & (index[None] == array[None, None])
        size = jnp.sum(jnp.where(chosen, _along(sizes, dims), 0), (0, 1), dtype=jnp.uint32)
        low = jnp.full_like(found.low, FIRST_POSITION)
        return _Border(
            stage=border.stage + 1,
            cuts=jnp.where(_along(stages, dims) == border.stage, found.low[None], border.cuts),
            array=array,
            left=left,
            bracket=found._replace(
                low=low,
                high=low + (size + 1).astype(low.dtype),
                below_low=jax.tree.map(jnp.zeros_like, tied),
                below_high=Count(*(jnp.where(index == array[None], word, 0) for word in tied)),
                smooth=jnp.ones_like(found.smooth),
            ),
        )

    def _array_of_last(self, left: Count, tied: Count) -> jax.Array:
        """The last array from which on there are enough of the `tied` entries."""
        index, dims = np.arange(len(self.operands)), left.low.ndim
        if len(index) == 1:
            return jnp.zeros_like(left.low, jnp.int32)
        onwards = _along(index[None] >= index[:, None], dims)
        from_here = self._over_arrays(Count(*(jnp.where(onwards, word[None], 0) for word in tied)), axis=1)
        enough = _counts.less_equal(jax.tree.map(lambda word: word[None], left), from_here)
        return jnp.sum(enough, 0, dtype=jnp.int32) - 1

    def _mask(self, i: int, border: _Border) -> jax.Array:
        operand, array = self.operands[i], self._spread(i, border.array)
        cuts = [self._spread(i, cut) for cut in border.cuts]
        last = jnp.zeros_like(cuts[0], dtype=bool)
        for axes, cut in reversed(list(zip(self.words[i], cuts[1:], strict=False))):
            position = self._position(i, axes, jnp.uint32(1))
            last = (position < cut) | ((position == cut) & last)
        keys = self.order.keys(operand[0])
        removed = (keys < cuts[0]) | ((keys == cuts[0]) & ((i > array) | ((i == array) & last)))
        return ~removed | operand[1] if len(operand) > 1 else ~removed


def _narrow(bracket: _Bracket, counts: Count, totals: Count, target: Count) -> _Bracket:
    """Move the bracket's ends to the nearest of its thresholds, which rise, by what lies below them."""

    def at(values: Any, i: int) -> Any:
        return jax.tree.map(lambda array: lax.index_in_dim(array, i, keepdims=False), values)

    fits = [_counts.less_equal(at(totals, i), target) for i in range(_THRESHOLDS)]
    low, high, below_low, below_high = bracket[:4]
    for i in range(_THRESHOLDS):
        low = jnp.where(fits[i], at(bracket.thresholds, i), low)
        below_low = _counts.where(fits[i][None], at(counts, i), below_low)
    for i in reversed(range(_THRESHOLDS)):
        high = jnp.where(fits[i], high, at(bracket.thresholds, i))
        below_high = _counts.where(fits[i][None], below_high, at(counts, i))
    return bracket._replace(low=low, high=high, below_low=below_low, below_high=below_high)


def _even_steps(width: jax.Array) -> jax.Array:
    """Steps that cut the bracket into eight parts: [*batch] to [thresholds, *batch]."""
    numbers = _along(np.arange(1, _THRESHOLDS + 1, dtype=width.dtype), width.ndim)
    return (width[None] >> _BITS) * numbers + (((width[None] & _THRESHOLDS) * numbers) >> _BITS)


def _guesses(wanted: jax.Array, between: jax.Array, width: jax.Array, octaves: jax.Array) -> jax.Array:
    """Steps around the place where, of the entries `between` the bracket's ends, `wanted` lie below."""
    between = jnp.maximum(between, 1)
    fraction = jnp.clip((wanted + 0.5) / between, 0, 1)
    # Errors by chance, by a density that differs from end to end, and by the distance from one number to the next.
    chance = 1.5 * jnp.sqrt(fraction * (1 - fraction) / between)
    error = jnp.maximum(jnp.maximum(chance, octaves / (3 + 3 * octaves)), 0.5 / width.astype(jnp.float32))
    places = fraction[None] + _along(np.asarray(_AROUND, np.float32), width.ndim) * error[None]
    # A little below 1, to stay within the range of the integers.
    return (jnp.clip(places, 0, 1 - 2**-20) * width.astype(jnp.float32)[None]).astype(width.dtype)


def _width(bracket: _Bracket) -> jax.Array:
    """How many numbers the bracket holds, unsigned, since they may be more than the largest signed one."""
    return lax.bitcast_convert_type(bracket.high - bracket.low, np.dtype(f"u{bracket.low.dtype.itemsize}"))


def _along(table: np.ndarray, dims: int) -> np.ndarray:
    """A constant with `dims` axes of length 1 more, for the batch."""
    return table.reshape(*table.shape, *[1] * dims)
