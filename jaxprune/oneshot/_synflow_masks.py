"""Pruning by synaptic flow in many small rounds."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune import rules
from jaxprune._masks import apply_masks, make_masks
from jaxprune._tree._axes import Stacked
from jaxprune._tree._masks import all_true
from jaxprune._tree._prunable import Prunable
from jaxprune.scores._synflow import synflow
from jaxprune.sites._sites import Sites


def synflow_masks(
    fn: Callable[[Any, Any], Any],
    params: Any,
    x: Any,
    k: Any,
    *,
    rounds: int = 100,
    prunable: Prunable = None,
    stacked: Stacked = None,
    sites: Sites | None = None,
) -> Any:
    """Prune to a sparsity k by synaptic flow in many small rounds, without data and without losing a layer.

    In round r of n the remaining weights are scored anew, and all layers together are pruned to the sparsity
    ``1 - (1 - k)**(r/n)``. What is pruned stays pruned. Exactly ``round(k * size)`` weights are
    removed, by `rules.global_sparsity`. The rounds are one loop, compiled once; the whole works under jit.

    Args:
        fn: as in `synflow`.
        params: as in `synflow`.
        x: as in `synflow`.
        k: the sparsity, the fraction to remove of the prunable weights, in [0, 1], a number or a scalar array (may
            be traced).
        rounds: the number of rounds, at least 1 (static).
        prunable: as in `make_masks`.
        stacked: as in `make_masks`.
        sites: as in `make_masks`.

    Returns:
        Masks as `make_masks` returns them, True = keep.

    Raises:
        ValueError: rounds is less than 1, k outside [0, 1]; whatever `synflow` and `make_masks` raise.

    >>> import jax.numpy as jnp
    >>> params = {"w1": jnp.array([[1.0, -2.0]]), "w2": jnp.array([[3.0], [5.0]])}
    >>> fn = lambda params, x: x @ params["w1"] @ params["w2"]
    >>> masks = synflow_masks(fn, params, jnp.zeros((1, 1)), 0.5, rounds=2)
    >>> masks["w1"].tolist(), masks["w2"].tolist()  # the path over 2 and 5 is left
    ([[False, True]], [[False], [True]])

    Reference: Tanaka, Kunin, Yamins, Ganguli, "Pruning neural networks without any data by iteratively
    conserving synaptic flow", 2020, algorithm 1.
    """
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"synflow_masks takes rounds >= 1, a whole number; got {rounds!r}.")
    if isinstance(k, int | float) and not 0 <= k <= 1:
        raise ValueError(f"synflow_masks takes a sparsity k in [0, 1]; got {k!r}.")

    def score(masks: Any) -> Any:
        found = synflow(fn, apply_masks(params, masks), x)
        # A pruned weight ranks below a living one without any flow.
        return jax.tree.map(
            lambda score, mask: None if score is None else jnp.where(mask, score, -jnp.inf),
            found,
            masks,
            is_leaf=lambda leaf: leaf is None,
        )

    def prune(scores: Any, k: Any) -> Any:
        rule = rules.global_sparsity
        return make_masks(params, k, rule=rule, scores=scores, prunable=prunable, stacked=stacked, sites=sites)

    def so_far(r: jax.Array) -> jax.Array:
        return -jnp.expm1(jnp.log1p(-jnp.asarray(k, jnp.float32)) * r / rounds)

    synflow(fn, params, x)  # outside the loop, where an overflow is seen; the last round's sparsity is exact
    masks = jax.tree.map(all_true, params)
    masks = lax.fori_loop(1, rounds, lambda r, masks: prune(score(masks), so_far(r)), masks)
    return prune(score(masks), k)
