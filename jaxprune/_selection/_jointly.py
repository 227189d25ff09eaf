"""How many of the smallest entries of all pools together lie in each, by one search for the key that they share."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune._selection import _counts
from jaxprune._selection._alike import pick
from jaxprune._selection._bracket import Bracket, narrow, place
from jaxprune._selection._counts import Count
from jaxprune._selection._order import Order
from jaxprune._selection._pools import Pools, Share
from jaxprune._tree._sharding import whole


class Group(NamedTuple):
    """Arrays that are alike, which one program counts, one after the other."""

    pools: Pools
    arrays: Sequence[jax.Array]
    most: int  # how many entries each pool may lose
    ranks: Sequence[int]  # of the arrays among all

    @property
    def depth(self) -> int:
        """How many pools an array has."""
        return math.prod(self.pools.batch_shape)


def share_out(groups: Sequence[Group], removed: Count, order: Order) -> list[Share]:
    """Find how many of the `removed` smallest entries of all pools together lie in each.

    Of each pool at most so many go as it may lose, its smallest: below any threshold counts the lesser of the two.
    Among equals those of the last pool go first.

    Args:
        groups: the pools.
        removed: how many entries go in all, at most what all pools may lose.
        order: the order of the keys.

    Returns:
        For each group the shares of its pools, of shape [arrays, *pools].
    """
    pools = [len(group.arrays) * group.depth for group in groups]
    most = _counts.from_int(np.repeat(np.asarray([group.most for group in groups], np.uint64), pools))
    # An upper bound of all counts together.
    size = sum(group.pools.size * group.depth * len(group.arrays) for group in groups)
    octave = jnp.float32(order.octave)

    def go(counts: Count) -> Count:
        """Add up, over the last axis, what goes of the pools."""
        allowed = Count(*(jnp.broadcast_to(word, counts.low.shape) for word in most))
        return _counts.total(_counts.minimum(counts, allowed), (counts.low.ndim - 1,), size)

    def unfinished(bracket: Bracket) -> jax.Array:
        return ~_counts.equal(go(bracket.below_low), removed) & (bracket.high - bracket.low != 1)

    def take_pass(bracket: Bracket) -> Bracket:
        counts = _count(groups, bracket.thresholds)
        bracket = narrow(bracket, counts, go(counts), removed, octave)
        below, above = go(bracket.below_low), go(bracket.below_high)
        return place(bracket, _counts.subtract(removed, below), _counts.subtract(above, below), octave)

    found = lax.while_loop(unfinished, take_pass, _all_open(groups, order))
    return _split(groups, _shares(groups, found, most, _counts.subtract(removed, go(found.below_low)), order))


def _all_open(groups: Sequence[Group], order: Order) -> Bracket:
    # Made from the values, so that under a map over shards the loop's state varies as what it becomes.
    none = functools.reduce(
        jnp.add, [jnp.full_like(jnp.sum(array), 0, order.key) for group in groups for array in group.arrays]
    )
    pools = [len(group.arrays) * group.depth for group in groups]
    sizes = _counts.from_int(np.repeat(np.asarray([group.pools.size for group in groups], np.uint64), pools))
    full = Count(*(word + none.astype(jnp.uint32) for word in sizes))
    return Bracket(
        low=none + order.lowest,
        high=none + (order.infinity + 2),
        below_low=jax.tree.map(jnp.zeros_like, full),
        below_high=full,
        smooth=none == 0,
        thresholds=none + np.asarray(order.first_look, order.key),
    )


def _count(groups: Sequence[Group], thresholds: jax.Array) -> Count:
    """Count what lies below the thresholds: [thresholds, all pools]."""
    # Without the barrier XLA takes the keys, which do not change, out of the loop, and writes them down in full.
    arrays, thresholds = lax.optimization_barrier(([group.arrays for group in groups], thresholds))
    found = [_count_group(group._replace(arrays=own), thresholds) for group, own in zip(groups, arrays, strict=True)]
    return Count(*(jnp.concatenate(word, axis=1) for word in zip(*found, strict=True)))


def _count_group(group: Group, thresholds: jax.Array) -> Count:
    def count(values: jax.Array) -> Count:
        counts = group.pools.count_keys(values, thresholds)
        return Count(*(whole(word).reshape(word.shape[0], -1) for word in counts))

    if len(group.arrays) == 1:
        return count(group.arrays[0])

    def turn(carry: None, number: jax.Array) -> tuple[None, Count]:
        return carry, count(pick(number, group.arrays))

    _, found = lax.scan(turn, None, jnp.arange(len(group.arrays), dtype=jnp.int32))
    return Count(*(jnp.moveaxis(word, 0, 1).reshape(word.shape[1], -1) for word in found))


def _shares(groups: Sequence[Group], found: Bracket, most: Count, left: Count, order: Order) -> Share:
    """Give `left` entries with the key found to the last pools, and say what is known of each pool's own border."""
    below, with_key = (_counts.minimum(count, most) for count in (found.below_low, found.below_high))
    tied = _counts.subtract(with_key, below)

    def give(carry: tuple[Count, Count], pool: jax.Array) -> tuple[tuple[Count, Count], None]:
        left, removed = carry
        given = _counts.minimum(left, Count(*(lax.dynamic_index_in_dim(word, pool, keepdims=False) for word in tied)))
        now = _counts.add(Count(*(lax.dynamic_index_in_dim(word, pool, keepdims=False) for word in removed)), given)
        removed = Count(
            *(lax.dynamic_update_index_in_dim(all_, word, pool, 0) for all_, word in zip(removed, now, strict=True))
        )
        return (_counts.subtract(left, given), removed), None

    (_, removed), _ = lax.scan(give, (left, below), jnp.asarray(_last_first(groups), jnp.int32))
    # All with the key go, or not even all before it, or some with it.
    all_go = _counts.equal(removed, found.below_high)
    capped = _counts.less(removed, found.below_low)
    low = jnp.where(all_go, found.high, jnp.where(capped, jnp.asarray(order.lowest, order.key), found.low))
    high = jnp.where(all_go, found.high + 1, jnp.where(capped, found.low, found.high))
    none = jax.tree.map(jnp.zeros_like, removed)
    below_low = _counts.where(all_go, found.below_high, _counts.where(capped, none, found.below_low))
    below_high = _counts.where(capped, found.below_low, found.below_high)
    return Share(removed, low, high, below_low, below_high)


def _last_first(groups: Sequence[Group]) -> list[int]:
    """The places of the pools in the table of all, the last pool of the last array first."""
    starts: dict[int, range] = {}
    start = 0
    for group in groups:
        for rank in group.ranks:
            starts[rank] = range(start, start + group.depth)
            start += group.depth
    return [pool for rank in sorted(starts, reverse=True) for pool in reversed(starts[rank])]


def _split(groups: Sequence[Group], shares: Share) -> list[Share]:
    found, start = [], 0
    for group in groups:
        stop = start + len(group.arrays) * group.depth
        shape = (len(group.arrays), *group.pools.batch_shape)
        found.append(jax.tree.map(lambda word, a=start, b=stop, shape=shape: word[a:b].reshape(shape), shares))
        start = stop
    return found
