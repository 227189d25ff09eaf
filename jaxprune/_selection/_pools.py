"""The search for the place where the smallest entries of pools end, by counting below thresholds.

The entries of a pool are ordered by whole numbers: a key read from the bit pattern of the value and, among equal keys,
the position. How many entries lie below a threshold is one sum, however the data is sharded. So a bracket is narrowed
around the place sought, first of the key, then of the position. Every pass over the data counts below seven
thresholds: reading takes the time, comparing is nearly free.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune._selection import _counts
from jaxprune._selection._bracket import THRESHOLDS, Bracket, along, narrow, place
from jaxprune._selection._counts import Count
from jaxprune._selection._order import FIRST_POSITION, WORD, Order, from_end, keep, trailing, words

# Blocks that are read by columns: at most as many rows as a cache holds even if their length is a power of two, and at
# least as many entries as are worth a step of a loop.
_BLOCK_ROWS = 8
_MIN_BLOCK = 4096

# Sums conditions over some axes: a list of arrays [*shape] to [len(list), *kept].
Sums = Callable[[list[jax.Array], tuple[int, ...]], jax.Array]


class Share(NamedTuple):
    """How many of a pool's entries go, and what is known of the key before which they end: it lies in [low, high)."""

    removed: Count  # [*pools], as are the others
    low: jax.Array
    high: jax.Array
    below_low: Count  # at most what goes
    below_high: Count


class Border(NamedTuple):
    """Where the removed entries end, as far as it has been found: a key, then a position."""

    stage: jax.Array  # (), the number to find next: 0 the key, then the words of the position
    cuts: jax.Array  # [stages, *pools], the numbers found
    left: Count  # [*pools], entries still to be removed
    bracket: Bracket  # of the number to find next


class Pools:
    """How an array is read: as one pool of entries for each index of its `batch` axes.

    Two ways to read for a processor with caches and threads: by `rows`, the counts along the first axis one by one,
    then their sum; by `blocks`, for pools that lie across the rows of memory.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        order: Order,
        sums: Sums,
        *,
        batch: tuple[int, ...] = (),
        rows: bool = False,
        blocks: bool = False,
    ):
        self.shape = shape
        self.order = order
        self.sums = sums
        self.batch = batch
        self.rows = rows
        self.axes = tuple(axis for axis in range(len(shape)) if axis not in batch)
        self.words = words(shape, self.axes)
        self.stages = 1 + len(self.words)
        self.size = self._size(self.axes)
        self.block = self._block() if blocks else None

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The number of pools along each axis that counts them."""
        return tuple(self.shape[axis] for axis in self.batch)

    def unknown(self, removed: Count) -> Share:
        """Return what is known of pools before any search."""
        low, high = (jnp.asarray(end, self.order.key) for end in (self.order.lowest, self.order.infinity + 2))
        return Share(removed, low, high, _counts.from_int(0), _counts.from_int(self.size))

    def find(self, values: jax.Array, share: Share) -> jax.Array:
        """Find the numbers before which an entry is removed: [stages, *pools]."""

        def unfinished(border: Border) -> jax.Array:
            return (border.stage < self.stages) & jnp.any((border.left.high | border.left.low) > 0)

        return lax.while_loop(unfinished, functools.partial(self._take_pass, values), self._begin(values, share)).cuts

    def known(self, values: jax.Array, share: Share) -> tuple[jax.Array, jax.Array]:
        """Return whether the lower ends are what is sought, and what `find` would find in that case; reads nothing."""
        start = self._begin(values, share)
        return jnp.all(_counts.equal(start.bracket.below_low, start.left)), self._first_cut(start.bracket.low)

    def keep(self, values: jax.Array, cuts: jax.Array) -> jax.Array:
        """Mask the entries before the cuts, [stages, *pools]."""
        return keep(values, cuts, order=self.order, words=tuple(self.words), axes=self.axes)

    def count_keys(self, values: jax.Array, thresholds: jax.Array) -> Count:
        """Count the keys below thresholds that are the same for all pools: [thresholds] to [thresholds, *pools]."""
        return self._count(values, each_of(thresholds), lambda block, _: self.order.keys(block))

    # The state of the search and how it relates to the array.

    def _begin(self, values: jax.Array, share: Share) -> Border:
        # Made from the values, so that the loop's state is sharded as it will be.
        none = jnp.full_like(jnp.sum(values, self.axes), 0, self.order.key)
        low, high = none + share.low, none + share.high
        removed, below_low, below_high = (
            Count(*(word + none.astype(jnp.uint32) for word in count))
            for count in (share.removed, share.below_low, share.below_high)
        )
        first_look = along(np.asarray(self.order.first_look, self.order.key), low.ndim)
        return Border(
            stage=jnp.int32(0),
            cuts=self._first_cut(jnp.full_like(low, self.order.lowest)),
            left=removed,
            bracket=Bracket(
                low=low,
                high=high,
                below_low=below_low,
                below_high=below_high,
                smooth=jnp.ones_like(low, dtype=bool),
                thresholds=jnp.clip(first_look, low[None] + 1, high[None] - 1),
            ),
        )

    def _first_cut(self, key: jax.Array) -> jax.Array:
        return jnp.stack([key, *[jnp.full_like(key, FIRST_POSITION)] * len(self.words)])

    def _size(self, axes: tuple[int, ...]) -> int:
        return math.prod(self.shape[axis] for axis in axes)

    # A pass over the data.

    def _take_pass(self, values: jax.Array, border: Border) -> Border:
        """Narrow the bracket; when all to be removed lies below `low`, or the bracket holds nothing else, move on."""
        counts = self._count_below(values, border)
        border = border._replace(bracket=narrow(border.bracket, counts, counts, border.left, self._octave(border)))
        found = ~jnp.any(self._open(border))
        border = lax.cond(found, self._move_on, lambda border: border, border)
        bracket = border.bracket
        wanted = _counts.subtract(border.left, bracket.below_low)
        between = _counts.subtract(bracket.below_high, bracket.below_low)
        return border._replace(bracket=place(bracket, wanted, between, self._octave(border)))

    def _open(self, border: Border) -> jax.Array:
        """Whether the number is still to be found, for each pool."""
        bracket = border.bracket
        return ~_counts.equal(bracket.below_low, border.left) & (bracket.high - bracket.low != 1)

    def _octave(self, border: Border) -> jax.Array:
        """Positions are taken to be evenly spread over all their range."""
        return jnp.where(border.stage == 0, jnp.float32(self.order.octave), jnp.float32(WORD))

    def _count_below(self, values: jax.Array, border: Border) -> Count:
        """Count what lies below the thresholds: [thresholds, *pools]."""
        # Without the barrier XLA takes what does not change out of the loop, keys and positions, and writes it down in
        # full. The 1 makes positions depend on the barrier.
        values, thresholds, one = lax.optimization_barrier((values, border.bracket.thresholds, jnp.uint32(1)))
        spread = [jnp.expand_dims(threshold, self.axes) for threshold in each_of(thresholds)]
        return self._count(values, spread, functools.partial(self._numbers, border, one))

    def _count(
        self,
        values: jax.Array,
        thresholds: list[jax.Array],
        numbers: Callable[[jax.Array, Callable[[int], jax.Array]], jax.Array],
    ) -> Count:
        """Count the `numbers` below thresholds: [thresholds, *pools]."""
        # As much as one word counts, then the rest.
        inner = trailing(self.shape, self.axes[1:] if self.rows else self.axes)
        low = self._sum_below(values, thresholds, numbers, inner)
        kept = [axis for axis in range(len(self.shape)) if axis not in inner]
        outer = tuple(1 + kept.index(axis) for axis in self.axes if axis not in inner)
        return _counts.total(Count(jnp.zeros_like(low), low), outer, self.size)

    def _sum_below(
        self,
        values: jax.Array,
        thresholds: list[jax.Array],
        numbers: Callable[[jax.Array, Callable[[int], jax.Array]], jax.Array],
        inner: tuple[int, ...],
    ) -> jax.Array:
        """Count what lies below the thresholds along the axes `inner`: [thresholds, *kept]."""

        def count(block: jax.Array, index: Callable[[int], jax.Array]) -> jax.Array:
            found = numbers(block, index)
            return self.sums([found < threshold for threshold in thresholds], inner)

        if self.block is None:
            return count(values, functools.partial(lax.broadcasted_iota, jnp.uint32, self.shape))
        axis, length = self.block

        def add_block(step: jax.Array, counts: jax.Array) -> jax.Array:
            start = step * length
            block = lax.dynamic_slice_in_dim(values, start, length, axis)

            def index(along: int) -> jax.Array:
                within = lax.broadcasted_iota(jnp.uint32, block.shape, along)
                return within + start.astype(jnp.uint32) if along == axis else within

            return counts + count(block, index)

        kept = [n for axis, n in enumerate(self.shape) if axis not in inner]
        none = jnp.zeros((THRESHOLDS, *kept), jnp.uint32)
        return lax.fori_loop(0, self.shape[axis] // length, add_block, none)

    def _block(self) -> tuple[int, int] | None:
        """Find the axis and the length of blocks that can be read by columns from a cache."""
        if not self.axes:
            return None
        axis = max(self.axes, key=lambda axis: self.shape[axis])
        rows = self.size // self.shape[axis]
        lengths = [n for n in range(1, min(_BLOCK_ROWS, self.shape[axis]) + 1) if self.shape[axis] % n == 0]
        length = max((n for n in lengths if n * rows <= _BLOCK_ROWS), default=1)
        entries = length * math.prod(self.shape) // self.shape[axis]
        return (axis, length) if entries >= _MIN_BLOCK else None

    def _numbers(
        self, border: Border, one: jax.Array, values: jax.Array, index: Callable[[int], jax.Array]
    ) -> jax.Array:
        """What the stage compares: the keys, or a word of the position of the entries that are still undecided."""
        never = np.iinfo(self.order.key).max
        keys = self.order.keys(values)
        numbers = jnp.maximum(keys, jnp.where(border.stage == 0, np.iinfo(self.order.key).min, never))
        for stage, axes in enumerate(self.words, start=1):
            # Choices of one number for all entries are free; those for every entry cost.
            wanted = jnp.where(border.stage == stage, border.cuts[0], never)
            undecided = keys == jnp.expand_dims(wanted, self.axes)
            for major, cut in zip(self.words[: stage - 1], border.cuts[1:], strict=False):
                undecided &= self._position(major, one, index) == jnp.expand_dims(cut, self.axes)
            # Adding nothing gives the positions the sharding of the values, as explicit meshes demand.
            position = self._position(axes, one, index) + jnp.zeros_like(keys)
            numbers = jnp.where(undecided, position, numbers)
        return numbers

    def _position(self, axes: tuple[int, ...], one: jax.Array, index: Callable[[int], jax.Array]) -> jax.Array:
        return from_end(self.shape, axes, one, index).astype(self.order.key)

    # From one number to the next.

    def _move_on(self, border: Border) -> Border:
        """Note the number found. Of the entries that have it the last go."""
        found = border.bracket
        tied = _counts.subtract(found.below_high, found.below_low)
        low = jnp.full_like(found.low, FIRST_POSITION)
        stages = along(np.arange(self.stages, dtype=np.int32), found.low.ndim)
        return Border(
            stage=border.stage + 1,
            cuts=jnp.where(stages == border.stage, found.low[None], border.cuts),
            left=_counts.subtract(border.left, found.below_low),
            bracket=found._replace(
                low=low,
                high=low + (self._positions(border.stage + 1) + 1).astype(low.dtype),
                below_low=jax.tree.map(jnp.zeros_like, tied),
                below_high=tied,
                smooth=jnp.ones_like(found.smooth),
            ),
        )

    def _positions(self, stage: jax.Array) -> jax.Array:
        """How many values the stage's word of the position has, as uint32."""
        positions = jnp.uint32(0)
        for number, axes in enumerate(self.words, start=1):
            positions = jnp.where(stage == number, np.uint32(self._size(axes)), positions)
        return positions


def each_of(thresholds: jax.Array) -> list[jax.Array]:
    """The entries along the first axis."""
    return [lax.index_in_dim(thresholds, j, keepdims=False) for j in range(THRESHOLDS)]
