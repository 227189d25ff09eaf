"""Exact selection by counting: masks of all but the smallest entries, without a sort and without a gather.

Under jit, with traced counts, on any sharding and platform; the searches are in `_pools` and `_jointly`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jaxtyping import Array, Bool, Inexact

from jaxprune._dtypes import common
from jaxprune._selection._alike import Kind, for_each, for_group, groups
from jaxprune._selection._counts import Count
from jaxprune._selection._fused import ADD, reduce_fused
from jaxprune._selection._jointly import Group, share_out
from jaxprune._selection._order import MOST, Order
from jaxprune._selection._pools import Pools, Sums


class Each(NamedTuple):
    """What is static of an array by itself: the axes that number its pools, how it is ranked, its kind."""

    batch: tuple[int, ...]
    magnitude: bool
    kind: Kind = None


class Joint(NamedTuple):
    """What is static of an array that is ranked with others: the axes that number its pools, what each may lose, its kind."""

    batch: tuple[int, ...]
    most: int
    kind: Kind


def keep_largest(
    values: Inexact[Array, "*shape"], removed: Count, *, batch: tuple[int, ...] = (), magnitude: bool
) -> Bool[Array, "*shape"]:
    """Mask the `removed` smallest entries of each pool.

    Exactly `removed` entries are masked, whatever the ties: among equals the lower row-major index is kept. A NaN ranks
    lowest, below minus infinity; minus zero equals zero. The mask is the same on every sharding, and sharded as
    `values`.

    Args:
        values: a floating-point array of any shape; complex numbers rank by magnitude only.
        removed: how many entries to mask, at most a pool's size; of shape `()`, or one for each pool. May be traced.
        batch: the axes that number the pools, in rising order; one pool consists of all other axes.
        magnitude: whether to rank by `|values|`, or else by the signed values.

    Returns:
        A bool array of the shape of `values`, `True` = keep.
    """
    return keep_largest_each([values], [removed], [Each(batch, magnitude)])[0]


def keep_largest_each(
    values: Sequence[Inexact[Array, "..."]], removed: Sequence[Count], each: Sequence[Each]
) -> list[Bool[Array, "..."]]:
    """Mask the smallest entries of each pool of many arrays, as `keep_largest` does of one; those of a kind by one program.

    Args:
        values: floating-point arrays of any shapes.
        removed: for each array how many entries of a pool to mask.
        each: for each array what is static of it.

    Returns:
        A list of bool arrays of the shapes of `values`, `True` = keep.
    """
    values = list(map(_moduli, values))
    filled = [i for i, array in enumerate(values) if array.size]
    masks = _keep_largest_each(
        [values[i] for i in filled],
        [Count(*map(jnp.asarray, removed[i])) for i in filled],
        each=tuple(each[i] for i in filled),
    )
    return _with_empty(values, masks)


def keep_largest_jointly(
    values: Sequence[Inexact[Array, "..."]],
    removed: Count,
    *,
    magnitude: bool,
    batches: Sequence[tuple[int, ...]] | None = None,
    most: Sequence[int] | None = None,
    kinds: Sequence[Kind] | None = None,
) -> list[Bool[Array, "..."]]:
    """Mask the `removed` smallest entries of all arrays together.

    As `keep_largest`; among equals the earlier array is kept, then the earlier pool, then the lower row-major index.
    Arrays of several dtypes are compared in the dtype they promote to.

    Args:
        values: floating-point arrays of any shapes; complex numbers rank by magnitude only.
        removed: how many entries to mask, at most what all pools may lose; of shape `()`. May be traced.
        magnitude: whether to rank by `|values|`, or else by the signed values.
        batches: for each array the axes that number its pools, in rising order; None where each is one pool.
        most: for each array how many entries of a pool may be masked: its largest others are left out of the ranking. None
            for all.
        kinds: of the arrays; None for arrays of which no two are alike.

    Returns:
        A list of bool arrays of the shapes of `values`, `True` = keep.
    """
    values = list(map(_moduli, values))
    filled = [i for i, array in enumerate(values) if array.size]
    if not filled:
        return _with_empty(values, [])
    each = [
        Joint(
            () if batches is None else batches[i],
            values[i].size if most is None else most[i],
            i if kinds is None else kinds[i],
        )
        for i in filled
    ]
    masks = _keep_largest_jointly(
        [values[i] for i in filled], Count(*map(jnp.asarray, removed)), magnitude=magnitude, each=tuple(each)
    )
    return _with_empty(values, masks)


def _moduli(values: jax.Array) -> jax.Array:
    return jnp.abs(values) if jnp.issubdtype(values.dtype, jnp.complexfloating) else values


def _with_empty(values: Sequence[jax.Array], masks: Sequence[jax.Array]) -> list[jax.Array]:
    """Fill in the masks of arrays without entries."""
    found = iter(masks)
    return [next(found) if array.size else jnp.ones_like(array, dtype=bool) for array in values]


@functools.partial(jax.jit, static_argnames="each")
def _keep_largest_each(values: list[jax.Array], removed: list[Count], *, each: tuple[Each, ...]) -> list[jax.Array]:
    return _by_platform(functools.partial(_select_each, each=each), values, removed)


@functools.partial(jax.jit, static_argnames=("magnitude", "each"))
def _keep_largest_jointly(
    values: list[jax.Array], removed: Count, *, magnitude: bool, each: tuple[Joint, ...]
) -> list[jax.Array]:
    return _by_platform(functools.partial(_select_jointly, magnitude=magnitude, each=each), values, removed)


def _by_platform(select: Callable[..., list[jax.Array]], *operands: Any) -> list[jax.Array]:
    """Select with the sums that suit the platform the program is compiled for.

    XLA's CPU compiler writes a condition down in full before it sums it up, unless several sums are one reduction, in
    parts where arrays may be sharded. An Explicit mesh, of one device too, refuses to regroup the entries without them.
    Other compilers fuse plain sums, and read their common operand once.
    """
    meshes = [jax.typeof(array).sharding.mesh for array in jax.tree.leaves(operands)]
    explicit = any(AxisType.Explicit in mesh.axis_types for mesh in meshes)
    try:
        cpu = _sum_in_one if len(jax.devices("cpu")) == 1 and not explicit else _sum_in_parts
    except RuntimeError:  # JAX has been told to do without its CPU backend.
        cpu = _sum_each
    return lax.platform_dependent(
        *lax.stop_gradient(operands),
        cpu=functools.partial(select, sums=cpu),
        default=functools.partial(select, sums=_sum_each),
    )


def _select_each(
    values: list[jax.Array], removed: list[Count], *, each: tuple[Each, ...], sums: Sums
) -> list[jax.Array]:
    kinds = [(one.kind if one.kind else i, n.low.shape) for i, (one, n) in enumerate(zip(each, removed, strict=True))]
    orders = [Order(array.dtype, one.magnitude) for array, one in zip(values, each, strict=True)]

    def cuts(i: int, array: jax.Array, removed: Count) -> jax.Array:
        pools, read = _reading(array, orders[i], sums, each[i].batch)
        return pools.find(read, pools.unknown(removed))

    return [
        Pools(array.shape, order, sums, batch=one.batch).keep(array, cut)
        for array, order, one, cut in zip(values, orders, each, for_each(cuts, values, removed, kinds), strict=True)
    ]


def _select_jointly(
    values: list[jax.Array], removed: Count, *, magnitude: bool, each: tuple[Joint, ...], sums: Sums
) -> list[jax.Array]:
    order = Order(common(array.dtype for array in values), magnitude)
    joint = []
    for ranks in groups([one.kind for one in each]):
        first = each[ranks[0]]
        pools, _ = _reading(values[ranks[0]], order, sums, first.batch)
        arrays = [_reading(values[i], order, sums, first.batch)[1] for i in ranks]
        joint.append(Group(pools, arrays, first.most, ranks))
    masks = {}
    for group, shares in zip(joint, share_out(joint, removed, order), strict=True):
        for i, cut in zip(
            group.ranks, for_group(group.pools.find, group.arrays, shares, group.pools.known), strict=True
        ):
            masks[i] = Pools(values[i].shape, order, sums, batch=each[i].batch).keep(values[i], cut)
    return [masks[i] for i in range(len(values))]


def _reading(array: jax.Array, order: Order, sums: Sums, batch: tuple[int, ...]) -> tuple[Pools, jax.Array]:
    """Return how one array is best read, and the array in the form for it."""
    if sums is not _sum_in_one:
        return Pools(array.shape, order, sums, batch=batch), array
    if batch:
        return Pools(array.shape, order, sums, batch=batch, blocks=array.ndim - 1 in batch), array
    rows = _in_rows(array)
    return Pools(rows.shape, order, sums, rows=True), rows


def _sum_in_one(conditions: list[jax.Array], axes: tuple[int, ...]) -> jax.Array:
    if not axes:
        return _sum_stacked(conditions, axes)
    ones = tuple(condition.astype(jnp.uint32) for condition in conditions)
    zeros = (jnp.uint32(0),) * len(ones)
    return jnp.stack(lax.reduce(ones, zeros, lambda a, b: tuple(map(lax.add, a, b)), axes))


def _sum_stacked(conditions: list[jax.Array], axes: tuple[int, ...]) -> jax.Array:
    return jnp.sum(jnp.stack(conditions), [axis + 1 for axis in axes], dtype=jnp.uint32)


def _sum_in_parts(conditions: list[jax.Array], axes: tuple[int, ...]) -> jax.Array:
    ones = [condition.astype(jnp.uint32) for condition in conditions]
    return jnp.stack([jnp.squeeze(found, axes) for found in reduce_fused(ones, [ADD] * len(ones), axes)])


def _sum_each(conditions: list[jax.Array], axes: tuple[int, ...]) -> jax.Array:
    return jnp.stack([jnp.sum(condition, axes, dtype=jnp.uint32) for condition in conditions])


def _in_rows(array: jax.Array) -> jax.Array:
    """The same entries in the same order as a matrix, whose rows XLA's CPU compiler shares out among threads."""
    return array.reshape(math.gcd(array.size, 32), -1) if array.size <= MOST else array
