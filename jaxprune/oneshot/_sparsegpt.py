"""SparseGPT: a matrix loses weights row by row, and the rows to come make up for each loss."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, UInt32

from jaxprune import rules
from jaxprune._tree._prunable import Prunable
from jaxprune.oneshot._eliminate import eliminate, nested
from jaxprune.oneshot._pattern import Pattern, read_pattern
from jaxprune.oneshot._solve import Solution, prune_sites, solve_each
from jaxprune.rules._rule import AnyRule
from jaxprune.sites._calibrate import Grams
from jaxprune.sites._factorise import Factor, check_damping, inverse_root
from jaxprune.sites._sites import Sites

# Rows whose masks are chosen together unless the caller says otherwise: few adapt best to what the rows before have lost.
_MASK_BLOCK = 32


def sparsegpt(
    params: Any,
    grams: Grams,
    k: Any,
    *,
    rule: AnyRule = rules.layer_sparsity,
    damping: float = 0.01,
    mask_block: int | None = None,
    block: int = 128,
    prunable: Prunable = None,
    sites: Sites | None = None,
) -> tuple[Any, Any]:
    """Prune by SparseGPT: choose weights by optimal brain surgery, and let those to the right make up for the loss.

    The inputs of every layer are gone through in order. When a weight goes, its unit's later weights move so that the
    layer's outputs on the calibration data change least. Counts are exact, those of the rule: ``round(k * n)`` of every
    matrix, or of every unit, or N of every M inputs. Weights of inputs that are zero in all samples go first; those of
    them that stay keep their values. A weight that is not finite counts as zero. Computed in float32 (the weights of a
    layer in another dtype are cast back), compiled once for each shape; works under ``jit`` and on sharded parameters,
    where layers sharded over their outputs need scalar collectives only.

    Args:
        params: a pytree of arrays.
        grams: from `calibrate_grams` of the function that uses them.
        k: the rule's strength: a number, a scalar array (may be traced) or a tree prefix of params; where a leaf holds N
            matrices (stacked layers, experts, groups of a convolution), each is pruned by itself and k may be ``[N]``.
        rule: `rules.layer_sparsity`, `rules.row_sparsity` or ``rules.n_m(m)`` (static).
        damping: the share of the mean diagonal that is added to a Gram matrix, >= 0; it grows tenfold, with a warning,
            where float32 cannot factorise the sum. It decides which weights go as well. `reconstruct` of the result's
            masks and the dense parameters chooses a damping of its own for the weights that stay, which serves unseen data
            better than the one given here does.
        mask_block: how many inputs have their masks chosen together, at most `block`; None takes 32, for
            `rules.row_sparsity` `block`, and for N:M rules the size of a group (static). The reference takes 128.
        block: after how many inputs, rounded down to whole mask blocks, the errors are handed on to all later ones;
            changes the speed only (static).
        prunable: which leaves to prune, as in `make_masks`: every matrix that multiplies data in layers, the head of a
            language model (``lm_head``) among them. Recipes as published keep the head dense; leave it out to do so.
        sites: as in `make_masks`.

    Returns:
        The pruned parameters and their masks, both of the treedef of params; True = keep.

    Raises:
        ValueError: a prunable leaf multiplies no calibrated data, or is of another shape; k, the rule or a block does
            not fit; a Gram matrix is not finite. The message names the leaf.
        TypeError: a leaf to prune is complex.

    Warns:
        DampingWarning: damping was raised.

    >>> import jax.numpy as jnp, jaxprune
    >>> params = {"kernel": jnp.array([[1.0], [2.0]])}
    >>> data = jnp.array([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    >>> grams = jaxprune.calibrate_grams(lambda params, x: x @ params["kernel"], params, [data])  # [[2, 1], [1, 2]]
    >>> pruned, masks = jaxprune.oneshot.sparsegpt(params, grams, 0.5, damping=0.0)
    >>> pruned["kernel"].ravel().tolist()  # the second makes up: 2 + 1 * 1/2
    [0.0, 2.5]

    Reference: Frantar, Alistarh, "SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot", 2023,
    algorithm 1. It removes ``floor(k * n) + 1`` of a block by its code, and chooses masks for 128 inputs at a time.
    """
    pattern = read_pattern(rule, "sparsegpt")
    check_damping(damping, "sparsegpt")
    mask_block = _checked_blocks(mask_block, block, pattern)

    def method(weights: jax.Array, grams: jax.Array, strength: jax.Array) -> Solution:
        return _prune(weights, grams, strength, damping, pattern=pattern, mask_block=mask_block, block=block)

    return prune_sites(
        params, grams, k, method, title="sparsegpt", pattern=pattern, damping=damping, prunable=prunable, sites=sites
    )


def _checked_blocks(mask_block: int | None, block: int, pattern: Pattern) -> int:
    if mask_block is None:
        mask_block = pattern.group if not pattern.counts else block if pattern.by_unit else min(_MASK_BLOCK, block)
    if not all(isinstance(size, int) and size >= 1 for size in (mask_block, block)) or mask_block > block:
        raise ValueError(f"sparsegpt takes whole numbers 1 <= mask_block <= block; got {mask_block!r} and {block!r}.")
    if mask_block % pattern.group:
        raise ValueError(
            f"sparsegpt chooses masks for whole groups of {pattern.title}; mask_block={mask_block} holds none."
        )
    return mask_block


@functools.partial(jax.jit, static_argnames=("pattern", "mask_block", "block"))
def _prune(
    weights: jax.Array,
    grams: jax.Array,
    strength: jax.Array,
    damping: float,
    *,
    pattern: Pattern,
    mask_block: int,
    block: int,
) -> Solution:
    inputs = weights.shape[1]
    # A layer with few inputs is one block.
    mask_block = min(mask_block, -(-inputs // pattern.group) * pattern.group)
    block = min(block // mask_block, -(-inputs // mask_block)) * mask_block

    def solve(weights: jax.Array, factor: Factor, strength: jax.Array) -> tuple[jax.Array, jax.Array]:
        root = inverse_root(factor.root)
        return prune_matrix(weights, root, strength, pattern=pattern, mask_block=mask_block, block=block)

    return solve_each(solve, weights, grams, strength, jnp.float32(damping))


def prune_matrix(
    weights: Float32[Array, "inputs outputs"],
    root: Float32[Array, "inputs inputs"],
    strength: UInt32[Array, ""],
    *,
    pattern: Pattern,
    mask_block: int,
    block: int,
) -> tuple[Float32[Array, "inputs outputs"], Bool[Array, "inputs outputs"]]:
    """Choose the weights of a matrix block by block, and spread the error of those that go over those still to come.

    Args:
        weights: W.
        root: the upper triangular U of ``H^-1 = U^T U``, with H the damped Gram matrix.
        strength: from `pattern.strength`.
        pattern: what to choose (static).
        mask_block: rows whose masks are chosen together, a divisor of `block` and a multiple of the pattern's group
            (static).
        block: rows after which errors are handed on to all later blocks by one product of matrices (static).

    Returns:
        The weights and their mask, True = keep.
    """
    inputs, _ = weights.shape
    padding = -inputs % block
    weights = jnp.pad(weights, ((0, padding), (0, 0)))
    # Rows of padding: a unit diagonal, and scores that no rule picks.
    pivots = jnp.pad(jnp.diagonal(root), (0, padding), constant_values=1.0)
    root = jnp.pad(root, (0, padding))

    def choose(rows: jax.Array, pivots: jax.Array, _: jax.Array, first: Any) -> jax.Array:
        real = (first + jnp.arange(rows.shape[0]) < inputs)[:, None]
        # The root of equation 3 of the paper, which ranks alike: squares of large and small weights may not be numbers.
        return pattern.choose(jnp.where(real, jnp.abs(rows / pivots[:, None]), jnp.inf), strength, first, inputs)

    pruned, _, mask = eliminate(
        weights,
        root,
        pivots,
        jnp.zeros_like(weights, dtype=bool),
        0,
        sizes=nested(len(pivots), block, mask_block),
        decide={mask_block: choose},
        settle=lambda rows, mask: (jnp.where(mask, rows, 0.0), mask),
    )
    return pruned[:inputs], mask[:inputs]
