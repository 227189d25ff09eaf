"""Kept and pruned weights of a unit change places while its outputs come nearer: the search within one matrix."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32

from jaxprune.oneshot._least_squares import reconstruct_matrix, times
from jaxprune.oneshot._solve import for_each
from jaxprune.sites._factorise import factorise

# What a swap must win at least, as a share of the unit's error and of its outputs' squares: less is rounding.
_OF_ERROR, _OF_OUTPUTS = 1e-6, 1e-9


class Exchanged(NamedTuple):
    """What became of the matrices of one site; errors are shares of the outputs' sum of squares."""

    weights: Float32[Array, "*n inputs outputs"]
    mask: Bool[Array, "*n inputs outputs"]
    before: Float32[Array, "*n"]
    after: Float32[Array, "*n"]
    damping: Float32[Array, "*n"]
    condition: Float32[Array, "*n"]


class _State(NamedTuple):
    """V, its mask, and ``H (W - V)``; and whether any unit has swapped in this sweep."""

    weights: jax.Array
    mask: jax.Array
    residual: jax.Array
    moved: jax.Array


@functools.partial(jax.jit, static_argnames=("within", "sweeps", "steps"))
def exchange(
    weights: Float32[Array, "n inputs outputs"],
    grams: Float32[Array, "n inputs inputs"],
    masks: Bool[Array, "n inputs outputs"],
    damping: Any,
    *,
    within: int | None,
    sweeps: int,
    steps: int,
) -> Exchanged:
    """Swap kept and pruned weights of each unit of N matrices, as long as that makes ``(V - W)^T H (V - W)`` smaller.

    Args:
        weights: W, the dense matrices.
        grams: their Gram matrices.
        masks: where to begin, True = keep.
        damping: a float, the share of the mean diagonal to add, where kept weights move; None lets none of them move: V is what the mask
            leaves of W.
        within: how many neighbouring inputs a swap stays among; None for all.
        sweeps: how often every weight is tried, at most.
        steps: of conjugate gradients behind each sweep, where kept weights move.
    """

    def of_one(weights: jax.Array, gram: jax.Array, mask: jax.Array) -> Exchanged:
        if damping is not None:
            factor = factorise(gram, jnp.float32(damping))
            gram, dead = factor.gram, factor.dead[:, None]
            used, condition = factor.damping, factor.condition
        else:
            mean = jnp.mean(jnp.diagonal(gram))
            gram, dead = gram / jnp.where(mean > 0, mean, 1.0), jnp.zeros((len(gram), 1), bool)
            used, condition = jnp.where(jnp.isfinite(mean), 0.0, jnp.nan), jnp.float32(1.0)
        dense = jnp.where(dead, 0.0, weights)

        def finish(mask: jax.Array, start: jax.Array) -> jax.Array:
            return reconstruct_matrix(dense, mask, gram, steps=steps, start=start) if damping is not None else start

        def error(values: jax.Array) -> jax.Array:
            change = dense - values
            return jnp.sum(change * times(gram, change, None), 0)

        def unfinished(state: Any) -> jax.Array:
            number, _, _, moved = state
            return (number < sweeps) & moved

        def sweep(state: Any) -> Any:
            number, values, mask, _ = state
            least = _OF_ERROR * jnp.maximum(error(values), 0.0) + _OF_OUTPUTS * outputs
            found = _sweep(dense, gram, values, mask, least, within=within, moves=damping is not None)
            return number + 1, finish(found.mask, found.weights), found.mask, found.moved

        outputs = jnp.maximum(error(jnp.zeros_like(dense)), 0.0)
        first = finish(mask, jnp.where(mask, dense, 0.0))
        _, found, kept, _ = lax.while_loop(unfinished, sweep, (jnp.int32(0), first, mask, jnp.bool_(True)))
        # Whatever rounding did, no unit is worse than it began.
        before, after = error(first), error(found)
        better = (after < before)[None]
        found, kept = jnp.where(better, found, first), jnp.where(better, kept, mask)
        total = jnp.maximum(jnp.sum(outputs), jnp.finfo(jnp.float32).tiny)
        first_share = jnp.sum(before) / total
        share = jnp.minimum(jnp.sum(jnp.minimum(before, after)) / total, first_share)
        return Exchanged(jnp.where(kept & dead, weights, found), kept, first_share, share, used, condition)

    sharded: Any = (True, True, False, False, False, False)
    return for_each(of_one, weights, grams, masks, out=Exchanged(*sharded))


def _sweep(
    dense: jax.Array,
    gram: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    least: jax.Array,
    *,
    within: int | None,
    moves: bool,
) -> _State:
    """Try every weight of every unit once: with the partner of the other kind by which its unit wins most.

    All units try the weights of the same input at a time, so that they share a column of H.

    Args:
        dense: W [inputs, outputs].
        gram: H [inputs, inputs].
        values: V, zero outside the mask.
        mask: True = keep.
        least: what a swap must win, for each unit.
        within: as in `exchange`.
        moves: whether the weight that comes in takes its best value, or that of W.
    """
    inputs, outputs = dense.shape
    count = inputs if within is None else within
    diagonal, units = jnp.diagonal(gram), jnp.arange(outputs)

    def step(j: jax.Array, state: _State) -> _State:
        values, mask, residual, _ = state
        start = j // count * count

        def near(array: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(array, start, count)

        column = gram[:, j]
        across, own = near(column)[:, None], near(diagonal)[:, None]
        v, r, w = near(values), near(residual), near(dense)
        leaves, v_j, r_j, w_j = (array[j][None] for array in (mask, values, residual, dense))
        # What changes when u goes and p comes with the value t: v_u^2 H_uu + 2 v_u r_u + t^2 H_pp - 2 t (r_p + v_u H_up).
        going, coming = jnp.square(v) * own + 2 * v * r, jnp.square(v_j) * diagonal[j] + 2 * v_j * r_j
        if moves:  # the best t is (r_p + v_u H_up) / H_pp
            going -= jnp.square(r_j + v * across) / diagonal[j]
            coming -= jnp.square(r + v_j * across) / own
        else:  # t is w_p
            going += jnp.square(w_j) * diagonal[j] - 2 * w_j * (r_j + v * across)
            coming += jnp.square(w) * own - 2 * w * (r + v_j * across)
        cost = jnp.where(near(mask) == leaves, jnp.inf, jnp.where(leaves, coming, going))
        best = jnp.argmin(cost, 0)
        wins = cost[best, units] < -least
        return lax.cond(jnp.any(wins), swap, lambda state, *_: state, state, j, column, start + best, wins)

    def swap(state: _State, j: jax.Array, column: jax.Array, other: jax.Array, wins: jax.Array) -> _State:
        values, mask, residual, _ = state
        leaves = mask[j]
        out, into = jnp.where(leaves, j, other), jnp.where(leaves, other, j)
        old, new = values[out, units], dense[into, units]
        if moves:
            new = (residual[into, units] + old * column[other]) / diagonal[into]
        old, new = jnp.where(wins, old, 0.0), jnp.where(wins, new, 0.0)
        at_j, at_other = jnp.where(leaves, -old, new), jnp.where(leaves, new, -old)
        values = values.at[out, units].add(-old).at[into, units].add(new)
        mask = mask.at[out, units].set(mask[out, units] & ~wins).at[into, units].set(mask[into, units] | wins)
        residual = residual - column[:, None] * at_j[None] - gram[:, other] * at_other[None]
        return _State(values, mask, residual, jnp.bool_(True))

    begin = _State(values, mask, times(gram, dense - values, None), jnp.bool_(False))
    return lax.fori_loop(0, inputs, step, begin)
