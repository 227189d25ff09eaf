"""The search for the place where the smallest entries of pools end, by counting below thresholds.

The entries of a pool are ordered by whole numbers: a key read from the bit pattern of the value and, among equal keys,
the position. How many entries lie below a threshold is one sum, however the data is sharded. So a bracket is narrowed
around the place sought, first of the key, then of the position. Every pass over the data counts below seven
thresholds: reading takes the time, comparing is nearly free.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune import _counts
from jaxprune._counts import Count
from jaxprune._order import FIRST_POSITION, WORD, Order, from_end, trailing, words

# Seven thresholds cut a bracket into eight: a float32 takes at most eleven such passes, a bfloat16 six.
_BITS = 3
THRESHOLDS = (1 << _BITS) - 1
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
Operand = tuple[jax.Array, ...]
# Sums conditions over some axes: a list of arrays [*shape] to [len(list), *kept].
Sums = Callable[[list[jax.Array], tuple[int, ...]], jax.Array]


class _Bracket(NamedTuple):
    """Bounds of the number sought: at most what is left to remove lies below `low`, more than that below `high`."""

    low: jax.Array  # [*pools]
    high: jax.Array  # [*pools]
    below_low: Count  # [members, *pools], entries of each array of a pool below low
    below_high: Count  # [members, *pools]
    smooth: jax.Array  # [*pools], whether interpolation has not failed yet
    thresholds: jax.Array  # [thresholds, *pools], to count below next; state, lest XLA work them out for every entry


class Border(NamedTuple):
    """Where the removed entries end, as far as it has been found: a key, then an array, then a position."""

    stage: jax.Array  # (), the number to find next: 0 the key, then the words of the position
    cuts: jax.Array  # [stages, *pools], the numbers found
    member: (
        jax.Array
    )  # [*pools], the array: of the entries with the key found those of later ones go, of earlier ones stay
    left: Count  # [*pools], entries still to be removed
    bracket: _Bracket  # of the number to find next


class Pools:
    """Pools of entries: one for each index of the `batch` axes of a single array, one of all arrays, or one of each."""

    def __init__(
        self, operands: list[Operand], magnitude: bool, sums: Sums, *, batch: tuple[int, ...] = (), apart: bool = False
    ):
        self.operands = operands
        self.order = Order(jnp.result_type(*(operand[0].dtype for operand in operands)), magnitude)
        self.sums = sums
        self.batch = batch
        self.apart = apart
        self.shapes = [operand[0].shape for operand in operands]
        self.axes = [tuple(axis for axis in range(len(shape)) if axis not in batch) for shape in self.shapes]
        self.words = [words(shape, axes) for shape, axes in zip(self.shapes, self.axes, strict=True)]
        self.stages = 1 + max(map(len, self.words))
        self.members = 1 if apart else len(operands)
        self.size = sum(operand[0].size for operand in operands)

    def find(self, removed: Count) -> Border:
        """Find where the `removed` smallest entries end; one number for all pools, or one for each."""

        def unfinished(border: Border) -> jax.Array:
            return (border.stage < self.stages) & jnp.any((border.left.high | border.left.low) > 0)

        return lax.while_loop(unfinished, self._take_pass, self._all_open(removed))

    def keep(self, border: Border) -> list[jax.Array]:
        """Mask the entries before the border."""
        return [self._mask(i, border) for i in range(len(self.operands))]

    # The state of the search and how it relates to the arrays.

    def _all_open(self, removed: Count) -> Border:
        # Made from the values, so that the loop's state is sharded as it will be.
        sums = [jnp.sum(operand[0], axes) for operand, axes in zip(self.operands, self.axes, strict=True)]
        like = jnp.stack(sums) if self.apart else sums[0]
        low = jnp.full_like(like, self.order.lowest, self.order.key)
        sizes = self._table([self._size(i, axes) for i, axes in enumerate(self.axes)])
        none = jnp.zeros((self.members, *[1] * low.ndim), jnp.uint32) + jnp.zeros_like(low, jnp.uint32)[None]
        powers = [self.order.key_of(2.0**exponent) for exponent in _FIRST_EXPONENTS]
        first_look = [0, 1, *powers, self.order.infinity + 1]
        return Border(
            stage=jnp.int32(0),
            cuts=jnp.stack([low, *[jnp.full_like(low, FIRST_POSITION)] * (self.stages - 1)]),
            member=jnp.full_like(low, self.members, jnp.int32),
            left=Count(*(word + jnp.zeros_like(low, jnp.uint32) for word in removed)),
            bracket=_Bracket(
                low=low,
                high=jnp.full_like(low, self.order.infinity + 2),
                below_low=Count(none, none),
                below_high=Count(*(none + word.astype(np.uint32) for word in divmod(sizes, WORD))),
                smooth=jnp.ones_like(low, dtype=bool),
                thresholds=jnp.stack([jnp.full_like(low, number) for number in first_look]),
            ),
        )

    def _table(self, of_arrays: list[int]) -> np.ndarray:
        """A constant for every array, as [members, *pools]."""
        table = np.asarray(of_arrays, np.int64)
        return table[None] if self.apart else table.reshape(-1, *[1] * len(self.batch))

    def _size(self, i: int, axes: tuple[int, ...]) -> int:
        return math.prod(self.shapes[i][axis] for axis in axes)

    def _of(self, i: int, state: jax.Array) -> jax.Array:
        """What of the state belongs to an array: [..., *pools] to [..., *batch]."""
        return lax.index_in_dim(state, i, -1, keepdims=False) if self.apart else state

    def _spread(self, i: int, state: jax.Array) -> jax.Array:
        """What of the state belongs to an array, shaped to be combined with its entries."""
        return jnp.expand_dims(self._of(i, state), self.axes[i])

    def _of_pools(self, counts: Count, axis: int = 0) -> Count:
        """Add up over the arrays of each pool."""
        return _counts.total(counts, (axis,), self.size)

    # A pass over the data.

    def _take_pass(self, border: Border) -> Border:
        """Narrow the bracket; when all to be removed lies below `low`, or the bracket holds nothing else, move on."""
        before = border.bracket
        counts = self._count(border)
        bracket = _narrow(before, counts, self._of_pools(counts, axis=1), border.left)
        failed = self._guessing(border) & (_width(bracket) > _width(before) // _MIN_GAIN)
        border = border._replace(bracket=bracket._replace(smooth=bracket.smooth & ~failed))

        exact = _counts.equal(self._of_pools(bracket.below_low), border.left)
        found = jnp.all(exact | (bracket.high - bracket.low == 1))
        return self._place_thresholds(lax.cond(found, self._move_on, lambda border: border, border))

    def _count(self, border: Border) -> Count:
        """Count what lies below the thresholds: [thresholds, members, *pools]."""
        # Without the barrier XLA takes what does not change out of the loop, keys and positions, and writes it down in
        # full. The 1 makes positions depend on the barrier.
        operands, thresholds, one = lax.optimization_barrier((self.operands, border.bracket.thresholds, jnp.uint32(1)))
        counts = []
        for i, (shape, axes) in enumerate(zip(self.shapes, self.axes, strict=True)):
            numbers = self._numbers(i, operands[i], border, one)
            below = [
                numbers < self._spread(i, lax.index_in_dim(thresholds, j, keepdims=False)) for j in range(THRESHOLDS)
            ]
            # The minor axes in one word, then the others. Without a batch the first axis may be the one that is shared
            # out among threads.
            inner = trailing(shape, axes if self.batch else axes[1:] or axes)
            low = self.sums(below, inner)
            kept = [axis for axis in range(len(shape)) if axis not in inner]
            outer = tuple(1 + kept.index(axis) for axis in axes if axis not in inner)
            counts.append(_counts.total(Count(jnp.zeros_like(low), low), outer, self._size(i, axes)))
        if self.apart:
            return jax.tree.map(lambda *words: jnp.stack(words, axis=-1)[:, None], *counts)
        return jax.tree.map(lambda *words: jnp.stack(words, axis=1), *counts)
