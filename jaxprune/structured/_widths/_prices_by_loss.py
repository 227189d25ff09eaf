"""What each width of each group, and each residual branch, costs the loss alone, measured: prices that `allocate_widths` takes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxprune._progress import tracked
from jaxprune.sites._calibrate import Grams
from jaxprune.structured._blocks import parts
from jaxprune.structured._gated import Loss, gated
from jaxprune.structured._graph import Graph, require_graph
from jaxprune.structured._importance import Importance, order_by
from jaxprune.structured._losses import repaired_readers
from jaxprune.structured._naming import by_group
from jaxprune.structured._plan import plan_of
from jaxprune.structured._repair import repair
from jaxprune.structured._select_channels import check_whole, groups_among, without
from jaxprune.structured._widths._price_widths import widths_of


def measure_widths(
    graph: Graph,
    params: Any,
    loss: Loss,
    *,
    grams: Grams | None = None,
    scores: Any = None,
    importance: Importance | None = None,
    among: str | Sequence[str] | None = None,
    options: int = 8,
    round_to: int | Mapping[str, int] = 1,
    min_kept: int = 1,
    progress: bool = False,
) -> dict[str, dict[int, float]]:
    """Return by how much the loss rises when a group alone is cut to a width, and repaired: measured, not estimated.

    What `price_widths` estimates from a gradient, at the cost of the loss of each width of each group. Which channels
    go is chosen as in `select_channels`; with `grams` what reads them is solved for anew, as by `repair`. Compiles the loss once:
    the function is masked, which computes what the smaller one does.

    Args:
        graph: the function's channels, by `trace`.
        params: its parameters. Values are read: not under jit.
        loss: ``loss(fn, params) -> scalar``, traceable by JAX, as in `select_blocks`.
        grams: as in `select_channels`; None repairs nothing.
        scores: as in `select_channels`.
        importance: as in `select_channels`.
        among: the groups, by names or patterns as in `select_channels`; None for all that are not part of others.
        options: widths of a group that are measured, evenly spaced, its own among them; fewer where it has fewer.
        round_to: all widths but a group's own are multiples of it, as in `select_channels`.
        min_kept: the least width.
        progress: whether to show a progress bar on stderr.

    Returns:
        By the name of each group its widths, rising, with the loss at each less the loss of the whole function: 0 at its own
        width; below 0 where the loss fell. A width at which the loss is not finite is left out.

    Raises:
        ValueError: as `select_channels`; the loss is no scalar, or is not finite of the whole function.

    >>> import jax.numpy as jnp
    >>> from jaxprune.structured import trace
    >>> fn = lambda p, x: x @ p["up"] @ p["down"]
    >>> params, x = {"up": jnp.array([[1.0, 2.0, 3.0]]), "down": jnp.ones((3, 1))}, jnp.ones((1, 1))
    >>> loss = lambda fn, params: jnp.square(fn(params, x) - 6).mean()
    >>> measure_widths(trace(fn, params, x), params, loss)  # 3, 3 + 2
    {'up[1]': {1: 9.0, 2: 1.0, 3: 0.0}}

    Reference: one alternative put into the whole model and measured, Bercovich et al., "Puzzle: Distillation-Based NAS for
    Inference-Optimized LLMs", 2024, section 2.
    """
    require_graph(graph, "measure_widths(graph, params, loss)")
    check_whole(options, "options")
    steps = by_group(graph, round_to, "round_to", 1, check_whole)
    order = order_by(graph, params, grams, scores, importance)
    groups = groups_among(graph, among)
    widths = {group.name: widths_of(group, options, steps[group.name], min_kept) for group in groups}
    orders = {group.name: order(group, group.size - widths[group.name][0])[0] for group in groups}
    whole = {name: np.ones((*gone.shape[:-1], graph.group(name).size), bool) for name, gone in orders.items()}
    measure, nothing = gated(graph, loss), _nothing_dropped(graph)
    before = _finite(float(measure(params, whole, nothing)))
    found: dict[str, dict[int, float]] = {group.name: {} for group in groups}
    every = [(group, width) for group in groups for width in widths[group.name]]
    for group, width in tracked(every, "widths", progress):
        gone = orders[group.name][..., : group.size - width]
        stays, cut = whole[group.name].copy(), params
        np.put_along_axis(stays, gone, False, -1)
        if grams is not None and width < group.size:
            kept = {group.var: without(group, gone)}
            cut = repair(plan_of(graph, kept, to_repair=set(repaired_readers(group, grams))), params, grams)
        value = float(measure(cut, whole | {group.name: stays}, nothing))
        if np.isfinite(value):
            found[group.name][width] = value - before
    return found


def measure_blocks(graph: Graph, params: Any, loss: Loss, *, progress: bool = False) -> dict[str, float]:
    """Return by how much the loss rises when a layer of a scan, or a residual branch, alone is left out: measured.

    Compiles the loss once.

    Args:
        graph: the function, by `trace`.
        params: its parameters. Values are read: not under jit.
        loss: ``loss(fn, params) -> scalar``, traceable by JAX, as in `select_blocks`.
        progress: whether to show a progress bar on stderr.

    Returns:
        By the name of each branch in ``graph.blocks``, and for layers of a scan by the scan's name and their number,
        ``"layers[0]"``, the loss without it less the loss of the whole function. One without which the loss is not finite is left
        out.

    Raises:
        ValueError: the loss is no scalar, or is not finite of the whole function.

    >>> import jax.numpy as jnp
    >>> from jaxprune.structured import trace
    >>> def fn(params, x):
    ...     x = x + jnp.tanh(x @ params["f"])
    ...     return x + jnp.tanh(x @ params["g"])
    >>> params, x = {"f": jnp.array([[2.0]]), "g": jnp.array([[0.5]])}, jnp.ones((3, 1))
    >>> graph, y = trace(fn, params, x), fn(params, x)
    >>> prices = measure_blocks(graph, params, lambda fn, params: jnp.square(fn(params, x) - y).mean())
    >>> {name: round(price, 3) for name, price in prices.items()}
    {'f': 1.577, 'g': 0.568}

    Reference: as `measure_widths`.
    """
    require_graph(graph, "measure_blocks(graph, params, loss)")
    measure, nothing = gated(graph, loss), _nothing_dropped(graph)
    before = _finite(float(measure(params, {}, nothing)))
    every = [(number, part) for number, block in enumerate(graph.blocks) for part in parts(block)]
    found = {}
    for number, (name, layer) in tracked(every, "blocks", progress):
        gate = nothing[number].copy()
        gate[layer] = False
        value = float(measure(params, {}, [*nothing[:number], gate, *nothing[number + 1 :]]))
        if np.isfinite(value):
            found[name] = value - before
    return found


def _nothing_dropped(graph: Graph) -> list[np.ndarray]:
    return [np.ones((block.size,) if block.members else (), bool) for block in graph.blocks]


def _finite(loss: float) -> float:
    if not np.isfinite(loss):
        raise ValueError(
            f"The loss of the whole function is {loss}, so that nothing can be said of what it costs to cut it."
        )
    return loss
