"""Rows of a matrix settled one after the other, while the rows to come make up for the error of each."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32

# Rows whose errors are handed on one by one; more rows at a time leave the processor's nearest cache.
_ROWS = 16
# From so many rows on, products leave out rows that are zero, by choosing among so many sizes.
_SPLIT, _PRODUCTS = 512, 16

# (some rows as they are now, their pivots, what is known of them, the index of the first) -> what is known of them.
Decide = Callable[[jax.Array, jax.Array, Any, Any], Any]
# (rows, what is known of them) -> the rows as they are to be, and what is known of them.
Settle = Callable[[jax.Array, Any], tuple[jax.Array, Any]]


def nested(rows: int, block: int, within: int) -> tuple[int, ...]:
    """The sizes of blocks within blocks, each a divisor of the one before, down to single rows."""
    inner = max(_ROWS, within) if within < _ROWS and block % _ROWS == 0 else _ROWS
    sizes = {rows, block, within, 1}
    if within % inner == 0 or inner % within == 0:
        sizes.add(math.gcd(inner, block))
    return tuple(sorted(sizes, reverse=True))


def eliminate(
    weights: Float32[Array, "rows outputs"],
    root: Float32[Array, "all_before rows"],
    pivots: Float32[Array, " rows"],
    known: Any,
    first: Any,
    *,
    sizes: tuple[int, ...],
    decide: Mapping[int, Decide],
    settle: Settle,
) -> tuple[Float32[Array, "rows outputs"], Float32[Array, "rows outputs"], Any]:
    """Settle some rows in order, the errors of all rows before them having been handed on already.

    Args:
        weights: the rows.
        root: their columns of the upper triangular U of ``H^-1 = U^T U``, from the row on at which the block begins that is
            being worked on.
        pivots: their part of U's diagonal.
        known: a tree of arrays ``[rows, outputs]``: what is known of each weight, such as whether it stays.
        first: the index of the first row in the matrix; may be traced.
        sizes: from `nested` (static).
        decide: by size, what is found out about a block of so many rows when its turn comes (static).
        settle: what becomes of single rows (static).

    Returns:
        The rows, their errors and what is known of them.

    Reference: Frantar, Alistarh, "SparseGPT", 2023, algorithm 1; Frantar et al., "GPTQ", 2022, algorithm 1.
    """
    size, *smaller = sizes
    if size in decide:
        known = decide[size](weights, pivots, known, first)
    if size == 1:
        settled, known = settle(weights, known)
        return settled, (weights - settled) / pivots[:, None], known
    step = smaller[0]

    def next_rows(i: jax.Array, carry: Any) -> Any:
        weights, errors, known = carry
        start = i * step
        part = functools.partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=step)
        across = part(root, axis=1)
        found = eliminate(
            part(weights) - _product(across, errors, i, step),
            part(across),
            part(pivots),
            jax.tree.map(part, known),
            first + start,
            sizes=tuple(smaller),
            decide=decide,
            settle=settle,
        )
        return jax.tree.map(lambda a, b: lax.dynamic_update_slice_in_dim(a, b, start, 0), carry, found)

    return lax.fori_loop(0, size // step, next_rows, (weights, jnp.zeros_like(weights), known))


def _product(across: jax.Array, errors: jax.Array, i: jax.Array, step: int) -> jax.Array:
    """``across^T errors``, of which only the first ``i * step`` rows count: the errors of later rows are zero still."""

    def of_first(rows: int) -> Any:
        def multiply(across: jax.Array, errors: jax.Array) -> jax.Array:
            return lax.dot_general(
                across[:rows], errors[:rows], (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST
            )

        return multiply

    size = len(across)
    if size < _SPLIT:
        return of_first(size)(across, errors)
    # Shapes are fixed when the loop is compiled; a product for each of a few numbers of rows halves the work.
    blocks = -(-size // step // _PRODUCTS)
    branches = [of_first(min(n * blocks * step, size)) for n in range(-(-size // (blocks * step)) + 1)]
    return lax.switch(-(-i // blocks), branches, across, errors)
