"""The search for the place where the smallest entries of pools end, by counting below thresholds.

The entries of a pool are ordered by whole numbers: a key read from the bit pattern of the value and, among equal keys,
the position. How many entries lie below a threshold is one sum, however the data is sharded. So a bracket is narrowed
around the place sought, first of the key, then of the position. Every pass over the data counts below seven
thresholds: reading takes the time, comparing is nearly free.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune._dtypes import common
from jaxprune._selection import _counts
from jaxprune._selection._alike import pick
from jaxprune._selection._bracket import (
    FIRST_EXPONENTS,
    MAX_OCTAVES,
    MIN_GAIN,
    THRESHOLDS,
    Bracket,
    along,
    even_steps,
    guesses,
    narrow,
    width_of,
)
from jaxprune._selection._counts import Count
from jaxprune._selection._order import FIRST_POSITION, WORD, Order, from_end, keep, trailing, words

# Blocks that are read by columns: at most as many rows as a cache holds even if their length is a power of two, and at
# least as many entries as are worth a step of a loop.
_BLOCK_ROWS = 8
_MIN_BLOCK = 4096

# What is read of an array: its values and, if some entries are protected, which.
Operand = tuple[jax.Array, ...]
# Sums conditions over some axes: a list of arrays [*shape] to [len(list), *kept].
Sums = Callable[[list[jax.Array], tuple[int, ...]], jax.Array]


class Border(NamedTuple):
    """Where the removed entries end, as far as it has been found: a key, then an array, then a position."""

    stage: jax.Array  # (), the number to find next: 0 the key, then the words of the position
    cuts: jax.Array  # [stages, *pools], the numbers found
    # [*pools], an array's rank: of the entries with the key found, those of later arrays go and those of earlier ones stay
    member: jax.Array
    left: Count  # [*pools], entries still to be removed
    bracket: Bracket  # of the number to find next


class Pools:
    """Pools of entries: one for each index of one array's `batch` axes, or one of all arrays.

    Two ways to read for a processor with caches and threads: by `rows`, the counts along the first axis one by one,
    then their sum; by `blocks`, for pools that lie across the rows of memory.

    Arrays that are alike stand next to each other, in `runs`, each of which is counted by one program. Ties are broken
    by the `ranks` of the arrays, the order in which the caller gave them.
    """

    def __init__(
        self,
        operands: list[Operand],
        magnitude: bool,
        sums: Sums,
        *,
        batch: tuple[int, ...] = (),
        rows: bool = False,
        blocks: bool = False,
        runs: Sequence[int] | None = None,
        ranks: Sequence[int] | None = None,
    ):
        self.operands = operands
        self.order = Order(common(operand[0].dtype for operand in operands), magnitude)
        self.sums = sums
        self.batch = batch
        self.rows = rows
        self.blocks = blocks
        self.shapes = [operand[0].shape for operand in operands]
        self.axes = [tuple(axis for axis in range(len(shape)) if axis not in batch) for shape in self.shapes]
        self.words = [words(shape, axes) for shape, axes in zip(self.shapes, self.axes, strict=True)]
        self.stages = 1 + max(map(len, self.words))
        self.members = len(operands)
        self.runs = [1] * self.members if runs is None else runs
        self.ranks = np.arange(self.members, dtype=np.int32) if ranks is None else np.asarray(ranks, np.int32)
        self.size = sum(operand[0].size for operand in operands)

    def find(self, removed: Count) -> Border:
        """Find where the `removed` smallest entries end; one number for all pools, or one for each."""

        def unfinished(border: Border) -> jax.Array:
            return (border.stage < self.stages) & jnp.any((border.left.high | border.left.low) > 0)

        return lax.while_loop(unfinished, self._take_pass, self._all_open(removed))

    def cuts(self, border: Border) -> jax.Array:
        """Return for each array the numbers before which an entry is removed: [members, stages, *pools]."""
        if self.members == 1:
            return border.cuts[None]
        sizes = self._table([self._size(i, axes[0]) for i, axes in enumerate(self.words)])
        after, at = self._index(border.member), border.member[None]
        first, *others = (jnp.where(after == at, cut[None], FIRST_POSITION) for cut in border.cuts[1:])
        # Of arrays behind that member all entries with the key found go: their first word is past its end.
        first = jnp.where(after > at, (FIRST_POSITION + sizes).astype(first.dtype), first)
        key = jnp.broadcast_to(border.cuts[0][None], first.shape)
        return jnp.stack([key, first, *others], axis=1)

    def keep(self, i: int, cuts: jax.Array) -> jax.Array:
        """Mask the entries of an array before its cuts, [stages, *pools]."""
        return keep(self.operands[i], cuts, order=self.order, words=tuple(self.words[i]), axes=self.axes[i])

    # The state of the search and how it relates to the arrays.

    def _all_open(self, removed: Count) -> Border:
        # Made from the values, so that the loop's state is sharded as it will be.
        low = jnp.full_like(jnp.sum(self.operands[0][0], self.axes[0]), self.order.lowest, self.order.key)
        sizes = self._table([self._size(i, axes) for i, axes in enumerate(self.axes)])
        none = jnp.zeros((self.members, *[1] * low.ndim), jnp.uint32) + jnp.zeros_like(low, jnp.uint32)[None]
        powers = [self.order.key_of(2.0**exponent) for exponent in FIRST_EXPONENTS]
        first_look = [0, 1, *powers, self.order.infinity + 1]
        return Border(
            stage=jnp.int32(0),
            cuts=jnp.stack([low, *[jnp.full_like(low, FIRST_POSITION)] * (self.stages - 1)]),
            member=jnp.full_like(low, self.members, jnp.int32),
            left=Count(*(word + jnp.zeros_like(low, jnp.uint32) for word in removed)),
            bracket=Bracket(
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
        return np.asarray(of_arrays, np.int64).reshape(-1, *[1] * len(self.batch))

    def _size(self, i: int, axes: tuple[int, ...]) -> int:
        return math.prod(self.shapes[i][axis] for axis in axes)

    def _spread(self, i: int, state: jax.Array) -> jax.Array:
        """The state of the pools, shaped to be combined with an array's entries."""
        return jnp.expand_dims(state, self.axes[i])

    def _index(self, like: jax.Array) -> np.ndarray:
        """The ranks, to be compared with a member of each pool: [members, *pools]."""
        return along(self.ranks, like.ndim)

    def _of_pools(self, counts: Count, axis: int = 0) -> Count:
        """Add up over the arrays of each pool."""
        return _counts.total(counts, (axis,), self.size)

    # A pass over the data.

    def _take_pass(self, border: Border) -> Border:
        """Narrow the bracket; when all to be removed lies below `low`, or the bracket holds nothing else, move on."""
        before = border.bracket
        counts = self._count(border)
        bracket = narrow(before, counts, self._of_pools(counts, axis=1), border.left)
        failed = self._guessing(border) & (width_of(bracket) > width_of(before) // MIN_GAIN)
        border = border._replace(bracket=bracket._replace(smooth=bracket.smooth & ~failed))

        found = ~jnp.any(self._open(border))
        return self._place_thresholds(lax.cond(found, self._move_on, lambda border: border, border))

    def _open(self, border: Border) -> jax.Array:
        """Whether the number is still to be found, for each pool."""
        bracket = border.bracket
        exact = _counts.equal(self._of_pools(bracket.below_low), border.left)
        return ~exact & (bracket.high - bracket.low != 1)

    def _count(self, border: Border) -> Count:
        """Count what lies below the thresholds: [thresholds, members, *pools]."""
        # Without the barrier XLA takes what does not change out of the loop, keys and positions, and writes it down in
        # full. The 1 makes positions depend on the barrier.
        operands, thresholds, one = lax.optimization_barrier((self.operands, border.bracket.thresholds, jnp.uint32(1)))
        rows, start = [], 0
        for length in self.runs:
            stop = start + length
            rows.append(self._count_run(operands[start:stop], start, thresholds, border, one))
            start = stop
        return Count(*(jnp.concatenate(word, axis=1) for word in zip(*rows, strict=True)))

    def _count_run(
        self, operands: list[Operand], start: int, thresholds: jax.Array, border: Border, one: jax.Array
    ) -> Count:
        """Count what of arrays that are alike lies below the thresholds: [thresholds, arrays, *pools]."""
        below_high = jax.tree.map(lambda word: word[start : start + len(operands)], border.bracket.below_high)
        ranks = self.ranks[start : start + len(operands)]

        def count(operand: Callable[[], Operand], rank: jax.Array | np.int32, known: Count) -> Count:
            def counted() -> Count:
                return self._count_of(start, operand(), thresholds, border, one, rank)

            if not (self.rows and self.members > 1):
                return counted()
            # One device can leave out what is not needed; on many, all counts are one collective.
            needed = self._open(border) & ((border.stage == 0) | (border.member == rank))
            return lax.cond(needed, counted, lambda: jax.tree.map(lambda word: jnp.full((THRESHOLDS,), word), known))

        if len(operands) == 1:
            found = count(lambda: operands[0], ranks[0], jax.tree.map(lambda word: word[0], below_high))
            return Count(*(word[:, None] for word in found))

        def turn(carry: None, entry: tuple[jax.Array, jax.Array, Count]) -> tuple[None, Count]:
            place, rank, known = entry
            parts = list(zip(*operands, strict=True))
            return carry, count(lambda: tuple(pick(place, arrays) for arrays in parts), rank, known)

        _, found = lax.scan(turn, None, (jnp.arange(len(operands), dtype=jnp.int32), jnp.asarray(ranks), below_high))
        return Count(*(jnp.moveaxis(word, 0, 1) for word in found))

    def _count_of(
        self,
        i: int,
        operand: Operand,
        thresholds: jax.Array,
        border: Border,
        one: jax.Array,
        rank: jax.Array | np.int32,
    ) -> Count:
        """Count what of an array lies below the thresholds: [thresholds, *batch]."""
        shape, axes = self.shapes[i], self.axes[i]
        # As much as one word counts, then the rest.
        inner = trailing(shape, axes[1:] if self.rows else axes)
        low = self._sum_below(i, operand, thresholds, border, one, inner, rank)
        kept = [axis for axis in range(len(shape)) if axis not in inner]
        outer = tuple(1 + kept.index(axis) for axis in axes if axis not in inner)
        return _counts.total(Count(jnp.zeros_like(low), low), outer, self._size(i, axes))

    def _sum_below(
        self,
        i: int,
        operand: Operand,
        thresholds: jax.Array,
        border: Border,
        one: jax.Array,
        inner: tuple[int, ...],
        rank: jax.Array | np.int32,
    ) -> jax.Array:
        """Count what lies below the thresholds along the axes `inner`: [thresholds, *kept]."""
        spread = [self._spread(i, lax.index_in_dim(thresholds, j, keepdims=False)) for j in range(THRESHOLDS)]

        def count(operand: Operand, index: Callable[[int], jax.Array]) -> jax.Array:
            numbers = self._numbers(i, operand, border, one, index, rank)
            return self.sums([numbers < threshold for threshold in spread], inner)

        axis, length = self._block(i) or (0, 0)
        if not length:
            return count(operand, self._positions_along(i))

        def add_block(step: jax.Array, counts: jax.Array) -> jax.Array:
            start = step * length
            block = tuple(lax.dynamic_slice_in_dim(array, start, length, axis) for array in operand)

            def index(along: int) -> jax.Array:
                within = lax.broadcasted_iota(jnp.uint32, block[0].shape, along)
                return within + start.astype(jnp.uint32) if along == axis else within

            return counts + count(block, index)

        kept = [n for axis, n in enumerate(self.shapes[i]) if axis not in inner]
        none = jnp.zeros((THRESHOLDS, *kept), jnp.uint32)
        return lax.fori_loop(0, self.shapes[i][axis] // length, add_block, none)

    def _block(self, i: int) -> tuple[int, int] | None:
        """Find the axis and the length of blocks that can be read by columns from a cache."""
        shape, axes = self.shapes[i], self.axes[i]
        if not self.blocks or not axes:
            return None
        axis = max(axes, key=lambda axis: shape[axis])
        rows = self._size(i, axes) // shape[axis]
        lengths = [n for n in range(1, min(_BLOCK_ROWS, shape[axis]) + 1) if shape[axis] % n == 0]
        length = max((n for n in lengths if n * rows <= _BLOCK_ROWS), default=1)
        entries = length * self.size // shape[axis]
        return (axis, length) if entries >= _MIN_BLOCK else None

    def _numbers(
        self,
        i: int,
        operand: Operand,
        border: Border,
        one: jax.Array,
        index: Callable[[int], jax.Array],
        rank: jax.Array | np.int32,
    ) -> jax.Array:
        """What the stage compares: the keys, or a word of the position of the entries that are still undecided."""
        never = np.iinfo(self.order.key).max
        keys = self.order.keys(operand[0])
        numbers = jnp.maximum(keys, jnp.where(border.stage == 0, np.iinfo(self.order.key).min, never))
        mine = border.member == rank
        for stage, axes in enumerate(self.words[i], start=1):
            # Choices of one number for all entries are free; those for every entry cost.
            wanted = jnp.where((border.stage == stage) & mine, border.cuts[0], never)
            undecided = keys == self._spread(i, wanted)
            for major, cut in zip(self.words[i][: stage - 1], border.cuts[1:], strict=False):
                undecided &= self._position(i, major, one, index) == self._spread(i, cut)
            # Adding nothing gives the positions the sharding of the values, as explicit meshes demand.
            position = self._position(i, axes, one, index) + jnp.zeros_like(keys)
            numbers = jnp.where(undecided, position, numbers)
        return jnp.where(operand[1], never, numbers) if len(operand) > 1 else numbers

    def _position(self, i: int, axes: tuple[int, ...], one: jax.Array, index: Callable[[int], jax.Array]) -> jax.Array:
        return from_end(self.shapes[i], axes, one, index).astype(self.order.key)

    def _positions_along(self, i: int) -> Callable[[int], jax.Array]:
        return functools.partial(lax.broadcasted_iota, jnp.uint32, self.shapes[i])

    # From one number to the next.

    def _move_on(self, border: Border) -> Border:
        """Note the number found. Of the entries that have it the last go, from the last array of a pool backwards."""
        found, dims = border.bracket, border.member.ndim
        left = _counts.subtract(border.left, self._of_pools(found.below_low))
        tied = _counts.subtract(found.below_high, found.below_low)
        member = jnp.where(border.stage == 0, self._last_member(left, tied), border.member)
        index = self._index(border.member)
        if self.members > 1:
            later = Count(*(jnp.where(index > member[None], word, 0) for word in tied))
            left = _counts.subtract(left, self._of_pools(later))

        low = jnp.full_like(found.low, FIRST_POSITION)
        return Border(
            stage=border.stage + 1,
            cuts=jnp.where(
                along(np.arange(self.stages, dtype=np.int32), dims) == border.stage, found.low[None], border.cuts
            ),
            member=member,
            left=left,
            bracket=found._replace(
                low=low,
                high=low + (self._positions(border.stage + 1, member) + 1).astype(low.dtype),
                below_low=jax.tree.map(jnp.zeros_like, tied),
                below_high=Count(*(jnp.where(index == member[None], word, 0) for word in tied)),
                smooth=jnp.ones_like(found.smooth),
            ),
        )

    def _last_member(self, left: Count, tied: Count) -> jax.Array:
        """The last array of a pool from which on there are enough of the `tied` entries."""
        if self.members == 1:
            return jnp.zeros_like(left.low, jnp.int32)
        onwards = along(self.ranks[None] >= self.ranks[:, None], left.low.ndim)
        from_here = self._of_pools(Count(*(jnp.where(onwards, word[None], 0) for word in tied)), axis=1)
        enough = _counts.less_equal(jax.tree.map(lambda word: word[None], left), from_here)
        return jnp.sum(enough, 0, dtype=jnp.int32) - 1

    def _positions(self, stage: jax.Array, member: jax.Array) -> jax.Array:
        """How many values the stage's word of the position has, as uint32 [*pools]."""
        index = self._index(member)
        positions = jnp.zeros_like(member, jnp.uint32)
        for number in range(1, self.stages):
            table = self._table(
                [self._size(i, w[number - 1]) if number <= len(w) else 0 for i, w in enumerate(self.words)]
            )
            of_member = jnp.sum(jnp.where(index == member[None], table.astype(np.uint32), 0), 0, dtype=jnp.uint32)
            positions = jnp.where(stage == number, of_member, positions)
        return positions

    # Where to count next.

    def _place_thresholds(self, border: Border) -> Border:
        """Count next around an interpolation if that may work, else evenly."""
        bracket = border.bracket
        below, above = self._of_pools(bracket.below_low), self._of_pools(bracket.below_high)
        wanted = _counts.to_float(_counts.subtract(border.left, below))
        between = _counts.to_float(_counts.subtract(above, below))
        width = width_of(bracket)
        guessed = guesses(wanted, between, width, self._octaves(border))
        steps = jnp.where(self._guessing(border)[None], guessed, even_steps(width))
        steps = jnp.maximum(jnp.minimum(steps, width[None] - 1), 1)
        thresholds = bracket.low[None] + lax.bitcast_convert_type(steps, bracket.low.dtype)
        return border._replace(bracket=bracket._replace(thresholds=thresholds))

    def _guessing(self, border: Border) -> jax.Array:
        return border.bracket.smooth & (self._octaves(border) <= MAX_OCTAVES)

    def _octaves(self, border: Border) -> jax.Array:
        """The width in octaves. Positions are taken to be evenly spread over all their range."""
        octave = jnp.where(border.stage == 0, jnp.float32(self.order.octave), jnp.float32(WORD))
        return width_of(border.bracket).astype(jnp.float32) / octave
