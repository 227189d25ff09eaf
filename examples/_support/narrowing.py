"""Ways to choose the channels of a Llama: by what is lost with them, by norms, at random; one width or each layer its own."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune
from jaxprune import scores, structured

# What reads the channels of perceptrons and heads.
READERS = ("down_proj/kernel", "o_proj/kernel")
Fn = Callable[[Any, Any], jax.Array]


class Cut(NamedTuple):
    """What stays of a function: `before` are the parameters that the plan is for, `repaired` those to be cut."""

    graph: structured.Graph
    plan: structured.Plan
    before: Any
    repaired: Any


class Shallow(NamedTuple):
    """A function without the layers that went, with parameters of its own."""

    fn: Fn
    graph: structured.Graph
    params: Any


def shallow(graph: structured.Graph, layers: structured.Plan | None, params: Any, tokens: np.ndarray) -> Shallow:
    """Return the function without the layers that a plan drops."""
    layers = layers or structured.Plan({}, graph.by_path)
    params, fn = structured.shrink(layers, params), structured.rebuild(graph, layers)
    return Shallow(fn, structured.trace(fn, params, tokens), params)


def own_widths(
    small: Shallow, shares: Mapping[str, float], batches: np.ndarray, loss: Callable[[Fn, Any, Any], jax.Array]
) -> dict[str, float]:
    """Return for each group the share that goes: together as many parameters as with these shares, at the least price.

    Args:
      small: the function.
      shares: what goes of each group where all have one width.
      batches: int32 [batches, windows, length].
      loss: (fn, params, windows) -> their mean loss.
    """

    @jax.jit
    def squares(params: Any, windows: Any) -> Any:
        grads = jax.lax.map(lambda window: jax.grad(loss, 1)(small.fn, params, window[None]), windows)
        return jax.tree.map(lambda leaf: jnp.mean(jnp.square(leaf), 0), grads)

    prices = structured.price_widths(
        small.graph,
        small.params,
        grams=_grams(small, batches),
        squares=jaxprune.mean_over_batches(squares, small.params, batches),
        among=list(shares),
    )
    cost = functools.partial(structured.count_parameters, small.graph)
    budget = cost(structured.select_channels(small.graph, small.params, shares))
    return structured.allocate_widths(small.graph, prices, budget, cost=cost).k


def by_scores(small: Shallow, shares: Mapping[str, float], batches: np.ndarray, seed: int | None) -> Cut:
    """Choose by the norm of the weights, or at random by a seed; what reads the channels is repaired all the same."""
    found = None if seed is None else scores.random(small.params, jax.random.key(seed))
    plan = structured.select_channels(small.graph, small.params, shares, scores=found)
    repaired = structured.repair(plan, small.params, _grams(small, batches))
    return Cut(small.graph, plan, small.params, repaired)


def _grams(small: Shallow, batches: np.ndarray) -> Any:
    return jaxprune.calibrate_grams(
        small.fn, small.params, batches, where=lambda site: site.path.endswith(READERS), progress=True
    )
