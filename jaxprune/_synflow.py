"""Synaptic flow: scores without data, and the iterative loop that prunes by them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune import _guard, rules
from jaxprune._leaf_scores import floats, leaf_score, map_leaves, read_params, widen, with_floats
from jaxprune._masks import apply_masks, make_masks
from jaxprune._paths import flatten, is_floating
from jaxprune._prunable import Predicate, Stacked


@leaf_score
def _synflow(weights: jax.Array, slope: jax.Array) -> jax.Array:
    return jnp.abs(weights * slope)


def synflow(apply: Callable[[Any, Any], Any], params: Any, x: Any) -> Any:
    """Score weights by the synaptic flow through them, ``|w dR/d|w||``, without data.

    R is the sum of the outputs of the network with the magnitudes of its parameters, fed with ones. In a net
    of ReLUs and without biases it is the sum, over all paths from an input to an output, of the product of
    the weights on the path; a weight's score is what the paths through it contribute, and the scores of every
    layer add up to R.

    Computed in float32 (float64 stays). R grows exponentially with depth: where it overflows, enable x64 and
    pass float64 parameters. A NaN weight counts as zero and scores minus infinity. To prune by one such call
    is not the paper's method, which takes many rounds: see `synflow_masks`.

    Args:
        apply: ``(params, x) -> outputs``, a tree of arrays; as for inference (a batch norm should use its
            running averages).
        params: a pytree of arrays; leaves that are not floating-point are passed on as they are and score
            zeros.
        x: one input, of which only the structure, shapes and dtypes count (``jax.ShapeDtypeStruct`` will do);
            ones take its place. A batch of one is enough.

    Returns:
        Scores of the treedef of params, float32, larger = keep.

    Raises:
        TypeError: x holds integers: the ones belong behind the embedding.
        ValueError: outside jit, when R is not finite.

    >>> import jax.numpy as jnp
    >>> params = [jnp.array([[1.0, -2.0]]), jnp.array([[3.0], [5.0]])]
    >>> scores = synflow(lambda params, x: x @ params[0] @ params[1], params, jnp.zeros((1, 1)))
    >>> scores[0].tolist(), scores[1].tolist()  # R = 1 * 3 + 2 * 5
    ([[3.0, 10.0]], [[3.0], [10.0]])

    Reference: Tanaka, Kunin, Yamins, Ganguli, "Pruning neural networks without any data by iteratively
    conserving synaptic flow", 2020, section 6.
    """
    flat = read_params(params)
    inputs = flatten(x, "x")
    for name, leaf in zip(inputs.names, inputs.leaves, strict=True):
        if not is_floating(leaf):
            raise TypeError(
                f"synflow feeds ones, but {name} holds {jnp.result_type(leaf)}; pass an apply that begins behind "
                "the embedding, and an x for it."
            )
    ones = inputs.treedef.unflatten([jnp.ones(np.shape(leaf), jnp.result_type(leaf)) for leaf in inputs.leaves])

    def total(magnitudes: list[jax.Array]) -> jax.Array:
        outputs = jax.tree.leaves(apply(flat.treedef.unflatten(with_floats(flat, magnitudes)), ones))
        return sum((jnp.sum(widen(output)) for output in outputs), jnp.zeros(()))

    flow, slopes = jax.value_and_grad(total)([_magnitude(leaf) for leaf in floats(flat)])
    if _guard.is_known(flow) and not jnp.isfinite(flow):
        raise ValueError(
            f"the synaptic flow R is {flow}, not a finite number. Deep or wide networks overflow float32: enable "
            "x64 and pass float64 parameters; an infinite weight has the same effect."
        )
    return map_leaves(_synflow, flat, with_floats(flat, slopes))


@jax.jit
def _magnitude(leaf: jax.Array) -> jax.Array:
    weights = widen(leaf)
    return jnp.where(jnp.isnan(weights), 0.0, jnp.abs(weights))


def synflow_masks(
    apply: Callable[[Any, Any], Any],
    params: Any,
    x: Any,
    sparsity: Any,
    *,
    rounds: int = 100,
    prunable: Predicate | Any = None,
    stacked: Stacked | None = None,
) -> Any:
    """Prune to `sparsity` by synaptic flow in many small rounds, without data and without losing a layer.

    In round r of n the remaining weights are scored anew, and all layers together are pruned to the sparsity
    ``1 - (1 - sparsity)**(r/n)``. What is pruned stays pruned. Exactly ``round(sparsity * size)`` weights are
    removed, by `rules.global_sparsity`. The rounds are one loop, compiled once; the whole works under jit.

    Args:
        apply: as in `synflow`.
        params: as in `synflow`.
        x: as in `synflow`.
        sparsity: the fraction to remove of the prunable weights, in [0, 1], a number or a scalar array (may
            be traced).
        rounds: the number of rounds, at least 1 (static).
        prunable: as in `make_masks`.
        stacked: as in `make_masks`.

    Returns:
        Masks as `make_masks` returns them, True = keep.

    Raises:
        ValueError: rounds is less than 1, sparsity outside [0, 1]; whatever `synflow` and `make_masks` raise.

    >>> import jax.numpy as jnp
    >>> params = [jnp.array([[1.0, -2.0]]), jnp.array([[3.0], [5.0]])]
    >>> apply = lambda params, x: x @ params[0] @ params[1]
    >>> masks = synflow_masks(apply, params, jnp.zeros((1, 1)), 0.5, rounds=2)
    >>> masks[0].tolist(), masks[1].tolist()  # the path over 2 and 5 is left
    ([[False, True]], [[False], [True]])

    Reference: Tanaka, Kunin, Yamins, Ganguli, "Pruning neural networks without any data by iteratively
    conserving synaptic flow", 2020, algorithm 1.
    """
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"synflow_masks takes rounds >= 1, a whole number; got {rounds!r}.")
    if isinstance(sparsity, int | float) and not 0 <= sparsity <= 1:
        raise ValueError(f"synflow_masks takes a sparsity in [0, 1]; got {sparsity!r}.")

    def score(masks: Any) -> Any:
        found = synflow(apply, apply_masks(params, masks), x)
        # A pruned weight ranks below a living one without any flow.
        return jax.tree.map(lambda mask, score: jnp.where(mask, score, -jnp.inf), masks, found)

    def prune(scores: Any, k: Any) -> Any:
        rule = rules.global_sparsity
        return make_masks(params, k, rule=rule, scores=scores, prunable=prunable, stacked=stacked)

    def so_far(r: jax.Array) -> jax.Array:
        return -jnp.expm1(jnp.log1p(-jnp.asarray(sparsity, jnp.float32)) * r / rounds)

    # The dense network is scored outside the loop, where an overflow is seen; the last round's sparsity is exact.
    masks = jax.tree.map(lambda score: jnp.ones_like(score, dtype=bool), synflow(apply, params, x))
    masks = lax.fori_loop(1, rounds, lambda r, masks: prune(score(masks), so_far(r)), masks)
    return prune(score(masks), sparsity)
