"""Exact selection by counting: masks of all but the smallest entries, without a sort and without a gather.

Under jit, with traced counts, on any sharding and platform; the search itself is in `_search`.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jaxtyping import Array, Bool, Float, Inexact

from jaxprune._selection._counts import Count
from jaxprune._selection._order import MOST
from jaxprune._selection._pools import Operand, Pools, Sums


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
    if values.size == 0:
        return jnp.ones_like(values, dtype=bool)
    return _keep_largest(_moduli(values), Count(*map(jnp.asarray, removed)), batch=batch, magnitude=magnitude)


def keep_largest_jointly(
    values: Sequence[Inexact[Array, "..."]],
    removed: Count,
    *,
    magnitude: bool,
    protected: Sequence[Bool[Array, "..."]] | None = None,
) -> list[Bool[Array, "..."]]:
    """Mask the `removed` smallest entries of the one pool that all arrays make up.

    As `keep_largest`; among equals the earlier array, then the lower row-major index is kept. Arrays of several dtypes
    are compared in the dtype they promote to.

    Args:
        values: floating-point arrays of any shapes; complex numbers rank by magnitude only.
        removed: how many entries to mask, at most the number of unprotected ones; of shape `()`. May be traced.
        magnitude: whether to rank by `|values|`, or else by the signed values.
        protected: bool arrays of the shapes of `values`: where `True`, the entry is never masked.

    Returns:
        A list of bool arrays of the shapes of `values`, `True` = keep.
    """
    values = list(map(_moduli, values))
    operands = [(array,) for array in values] if protected is None else list(zip(values, protected, strict=True))
    filled = [operand for operand in operands if operand[0].size]
    removed = Count(*map(jnp.asarray, removed))
    return _with_empty(values, _keep_largest_jointly(filled, removed, magnitude=magnitude) if filled else [])


def _moduli(values: jax.Array) -> jax.Array:
    return jnp.abs(values) if jnp.issubdtype(values.dtype, jnp.complexfloating) else values


def _with_empty(values: Sequence[jax.Array], masks: Sequence[jax.Array]) -> list[jax.Array]:
    """Fill in the masks of arrays without entries."""
    found = iter(masks)
    return [next(found) if array.size else jnp.ones_like(array, dtype=bool) for array in values]


@functools.partial(jax.jit, static_argnames=("batch", "magnitude"))
def _keep_largest(
    values: Float[Array, "*shape"], removed: Count, *, batch: tuple[int, ...], magnitude: bool
) -> Bool[Array, "*shape"]:
    return _by_platform([(values,)], removed, magnitude, batch=batch)[0]


@functools.partial(jax.jit, static_argnames="magnitude")
def _keep_largest_jointly(operands: list[Operand], removed: Count, *, magnitude: bool) -> list[jax.Array]:
    return _by_platform(operands, removed, magnitude)


def _by_platform(
    operands: list[Operand], removed: Count, magnitude: bool, *, batch: tuple[int, ...] = ()
) -> list[jax.Array]:
    """Select with the sums that suit the platform the program is compiled for.

    XLA's CPU compiler writes a condition down in full before it sums it up, unless several sums are one reduction. Such
    a reduction of a sharded array is partitioned by gathers, but where there is one CPU device nothing is sharded on
    CPU; only an Explicit mesh, of one device too, refuses to regroup the entries for it. Other compilers fuse plain sums,
    and read their common operand once.
    """
    meshes = [jax.typeof(array).sharding.mesh for operand in operands for array in operand]
    explicit = any(AxisType.Explicit in mesh.axis_types for mesh in meshes)
    try:
        cpu = _sum_in_one if len(jax.devices("cpu")) == 1 and not explicit else _sum_stacked
    except RuntimeError:  # JAX has been told to do without its CPU backend.
        cpu = _sum_each
    select = functools.partial(_select, magnitude=magnitude, batch=batch)
    return lax.platform_dependent(
        lax.stop_gradient(operands),
        removed,
        cpu=functools.partial(select, sums=cpu),
        default=functools.partial(select, sums=_sum_each),
    )


def _select(
    operands: list[Operand],
    removed: Count,
    *,
    magnitude: bool,
    sums: Sums,
    batch: tuple[int, ...] = (),
) -> list[jax.Array]:
    pools = Pools(operands, magnitude, sums, batch=batch)
    if sums is not _sum_in_one:
        return pools.keep(pools.find(removed))
    if batch:
        columns = operands[0][0].ndim - 1 in batch
        return pools.keep(Pools(operands, magnitude, sums, batch=batch, blocks=columns).find(removed))
    rows = [tuple(map(_in_rows, operand)) for operand in operands]
    return pools.keep(Pools(rows, magnitude, sums, rows=True).find(removed))


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
