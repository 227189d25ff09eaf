"""What each group of channels costs the loss at each of some widths, alone: the prices that widths are allocated by."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxprune._tree._paths import flatten
from jaxprune._tree._shapes import require_shapes
from jaxprune.sites._calibrate import Grams, require_grams
from jaxprune.structured._graph import Graph
from jaxprune.structured._groups import ChannelGroup
from jaxprune.structured._losses import removal_order
from jaxprune.structured._naming import by_group
from jaxprune.structured._select_channels import check_whole, groups_among, kept_count


def price_widths(
    graph: Graph,
    params: Any,
    *,
    grams: Grams,
    squares: Any,
    among: str | Sequence[str] | None = None,
    options: int = 32,
    round_to: int | Mapping[str, int] = 1,
    min_kept: int = 1,
) -> dict[str, dict[int, float]]:
    """Return by how much the loss rises when a group alone is cut to a width, and its readers make up for it.

    To second order, and with the gradient at a reader's outputs uncorrelated with its inputs, the loss rises by the squared
    error of those outputs times the mean square of that gradient. The error is what `select_channels` chooses by when it is
    given `grams`; where the outputs of a layer are far from the loss, or the loss does not mind them, the same error costs
    less. So prices of different layers and of heads and perceptrons can be compared, and `allocate_widths` shares a
    budget out by them.

    Where most of a group goes, no estimate of second order holds: the price is too low, several times. Leave more by ``min_kept``, or
    measure (`measure_widths`).

    Args:
        graph: the function's channels, by `trace`.
        params: its parameters.
        grams: from `calibrate_grams` of the function.
        squares: squared gradients of the loss with the paths and shapes of params, what `scores.fisher` takes: the mean over
            examples of each example's gradient squared, ``mean_over_batches(...)``.
        among: the groups, by names or patterns as in `select_channels`; None for all that are not part of others.
        options: widths of a group that are priced, evenly spaced, its own among them; fewer where it has fewer.
        round_to: all widths but a group's own are multiples of it, as in `select_channels`.
        min_kept: the least width.

    Returns:
        By the name of each group its widths, rising, with a price for each, falling to 0. Where each layer of a scan keeps
        its own channels, the sum of what all layers cost. Prices of one call are on one scale, that of `squares`.

    Raises:
        ValueError: as `select_channels` by grams; squares do not fit params.

    >>> import jax, jax.numpy as jnp, jaxprune
    >>> from jaxprune.structured import trace
    >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
    >>> params = {"up": jnp.array([[1.0, 4.0, 2.0, 3.0]]), "down": jnp.ones((4, 2))}
    >>> x = jnp.linspace(-3, 3, 50)[:, None]
    >>> grams, squares = jaxprune.calibrate_grams(fn, params, [x]), jax.tree.map(jnp.ones_like, params)
    >>> prices = price_widths(trace(fn, params, x), params, grams=grams, squares=squares)["up[1]"]
    >>> [round(prices[width] / prices[1], 3) for width in (1, 2, 3, 4)]
    [1.0, 0.207, 0.064, 0.0]

    Reference: the error, Meng et al., "OSSCAR", 2024, section 3; its weight, the Kronecker-factored second-order term of
    Martens, Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", 2015, section 3.1.
    """
    check_whole(options, "options")
    steps = by_group(graph, round_to, "round_to", 1, check_whole)
    flat, squared = flatten(params, "params"), flatten(squares, "squares")
    require_shapes("The function", graph.by_path, "params", flat.shapes, "Trace it with these parameters.")
    remedy = "Make squares from the parameters that were traced."
    require_shapes("The function", graph.by_path, "squares", squared.shapes, remedy)
    require_grams(grams, "price_widths(graph, params, grams=...)")
    grams.sites.require_params(params)
    found = {}
    for group in groups_among(graph, among):
        widths = widths_of(group, options, steps[group.name], min_kept)
        gone = group.size - widths[0]
        losses = removal_order(group, flat.by_path, grams, gone, squared.by_path).losses
        # Layers that choose for themselves add up; rounding can make an error fall by a hair.
        rises = np.maximum(losses.reshape(math.prod(losses.shape[:-1]), gone).sum(0), 0.0)
        so_far = np.concatenate([[0.0], np.cumsum(rises)])
        found[group.name] = {width: float(so_far[group.size - width]) for width in widths}
    return found


def widths_of(group: ChannelGroup, options: int, round_to: int, min_kept: int) -> list[int]:
    """Return widths of a group that are priced, rising: evenly spaced, its own among them."""
    shares = np.arange(options) / options
    return sorted({kept_count(group, float(share), round_to, min_kept) for share in shares} | {group.size})
