"""Erdos-Renyi-Kernel allocation: how many weights each layer loses, exact in total, also when the total is traced."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._selection import _counts
from jaxprune._selection._alike import apart, hidden_zero
from jaxprune._selection._counts import Count


def allocate(
    sizes: Sequence[int],
    dims: Sequence[int],
    stacks: Sequence[tuple[int, ...]],
    removed: Count,
    least: Sequence[int],
) -> list[Count]:
    """Share out a total number of removed weights.

    A layer of size n and dimensions d keeps ``min(n, e * sum(d))`` weights, with the one e that gives the total. The
    breakpoints of that sum in e are known from the shapes, so e is found in closed form between two of them. Shares are
    rounded down, raised to `least`, and the difference to the total goes to the largest layers.

    Args:
        sizes: of one layer of each leaf.
        dims: the sum of the dimensions of one layer of each leaf.
        stacks: the shape of each leaf's stack of layers; each layer has a share of its own.
        removed: the total to remove, at most what `least` leaves.
        least: how many weights one layer of each leaf keeps at least.

    Returns:
        For each leaf the number removed, of the shape of its stack.
    """
    depths = [math.prod(stack) for stack in stacks]
    return _allocate(
        np.repeat(np.asarray(sizes), depths),
        np.repeat(np.asarray(dims, float), depths),
        np.repeat(np.asarray(least), depths),
        removed,
        stacks,
    )


def _allocate(
    sizes: np.ndarray, dims: np.ndarray, floors: np.ndarray, removed: Count, stacks: Sequence[tuple[int, ...]]
) -> list[Count]:
    total = int(sizes.sum())
    keep = _counts.subtract(_counts.from_int(total), removed)
    shares = _shares(sizes, dims, _counts.to_float(keep))
    most, fewest = _counts.from_int(sizes.tolist()), _counts.from_int(floors.tolist())
    kept = _counts.maximum(_counts.minimum(_counts.from_float(shares), most), fewest)
    lost = _counts.subtract(most, _settle(kept, keep, sizes, floors))
    return _split(lost, tuple(stacks))


@functools.partial(jax.jit, static_argnames="stacks")
def _split(lost: Count, stacks: tuple[tuple[int, ...], ...]) -> list[Count]:
    depths = [math.prod(stack) for stack in stacks]
    # Places that the compiler does not know, lest it write a program for each slice.
    starts = apart(jnp.asarray(np.cumsum([0, *depths[:-1]]), jnp.int32) + hidden_zero(lost.low))
    return [
        Count(*(jnp.reshape(jax.lax.dynamic_slice_in_dim(word, start, depth), stack) for word in lost))
        for stack, start, depth in zip(stacks, starts, depths, strict=True)
    ]


def _shares(sizes: np.ndarray, dims: np.ndarray, keep: jax.Array) -> jax.Array:
    """Solve sum(min(sizes, e * dims)) = keep for e; return the shares as float32."""
    saturation = sizes / dims  # the e at which a layer is kept whole
    order = np.argsort(saturation, kind="stable")
    full = np.concatenate([[0.0], np.cumsum(sizes[order])])  # kept by the layers saturated so far
    open_dims = np.concatenate([np.cumsum(dims[order][::-1])[::-1], [0.0]])
    # What is kept when e reaches each saturation point, in rising order.
    reached = full[:-1] + saturation[order] * open_dims[:-1]
    saturated = jnp.sum(keep >= jnp.asarray(reached, jnp.float32), dtype=jnp.int32)
    e = (keep - jnp.asarray(full, jnp.float32)[saturated]) / jnp.maximum(
        jnp.asarray(open_dims, jnp.float32)[saturated], 1.0
    )
    e = jnp.where(saturated == len(sizes), jnp.float32(saturation.max()), e)
    return jnp.minimum(jnp.asarray(sizes, jnp.float32), e * jnp.asarray(dims, jnp.float32))


def _settle(kept: Count, keep: Count, sizes: np.ndarray, floors: np.ndarray) -> Count:
    """Move each layer within [floor, size], the largest layers first, until the sum is exactly `keep`."""
    order = np.argsort(-sizes, kind="stable")
    high, low = (word[order] for word in kept)

    def add_up(carry: Count, item: Count) -> tuple[Count, None]:
        return _counts.add(carry, item), None

    total, _ = jax.lax.scan(add_up, _counts.from_int(0), Count(high, low))
    missing = _counts.where(_counts.less(total, keep), _counts.subtract(keep, total), _counts.from_int(0))
    excess = _counts.where(_counts.less(keep, total), _counts.subtract(total, keep), _counts.from_int(0))

    def move(carry: tuple[Count, Count], item: tuple[Count, Count, Count]) -> tuple[tuple[Count, Count], Count]:
        (missing, excess), (now, size, floor) = carry, item
        more = _counts.minimum(missing, _counts.subtract(size, now))
        fewer = _counts.minimum(excess, _counts.subtract(now, floor))
        carry = (_counts.subtract(missing, more), _counts.subtract(excess, fewer))
        return carry, _counts.subtract(_counts.add(now, more), fewer)

    items = (Count(high, low), _counts.from_int(sizes[order].tolist()), _counts.from_int(floors[order].tolist()))
    _, moved = jax.lax.scan(move, (missing, excess), items)
    back = np.argsort(order, kind="stable")
    return Count(moved.high[back], moved.low[back])
