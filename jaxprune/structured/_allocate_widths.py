"""A width for each group of channels, so that together they cost the loss least within a budget: a knapsack."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxprune.structured._count import count_macs
from jaxprune.structured._graph import Graph
from jaxprune.structured._plan import plan_of
from jaxprune.structured._select_channels import Cost, families, require_budget

# The share of the best price that is not searched for.
_GAP = 1e-6
# How often the aim is halved between what meets the budget and what does not, where costs do not add up.
_HALVINGS = 12


def allocate_widths(
    graph: Graph,
    prices: Mapping[str, Mapping[int, float]],
    budget: float,
    *,
    cost: Cost | None = None,
    alike: str | Sequence[str] = (),
) -> dict[str, float]:
    """Choose a width for each group, so that the sum of their prices is the least that a budget allows.

    One of each group's widths is taken (a multiple-choice knapsack, solved exactly as an integer program): no channel
    is spent where another layer needs it more, and what a channel costs in the budget counts as well as what it
    saves the loss. Exact where costs add up, as those of perceptrons and heads in a transformer do: multiply-accumulates,
    parameters. Where two groups share a matrix, as the channels of convolutions one after the other do, they
    are taken to add up, and what is found meets the budget, but need not be the best.

    Args:
        graph: the function's channels, by `trace`.
        prices: by the name of each group that may be cut its widths and what each costs the loss, from `price_widths`, or
            measured: the loss with that group alone cut and repaired. All other groups stay whole.
        budget: the most that the function may cost, above 0, in the cost's own unit: ``0.5 * count_macs(graph)``.
        cost: a plan to a number: ``functools.partial(count_parameters, graph)``, or your own, such as a table of measured
            times; None counts multiply-accumulates. It is called once for each group's each width, and need not rise evenly.
        alike: names or patterns, of which each means groups that get the same width, as in `select_channels_globally`: what a
            configuration with one width for all layers can express.

    Returns:
        The fraction removed of each group, by its name: k of `select_channels`.

    Raises:
        ValueError: the budget cannot be met by any of the widths; a name is not that of a group, a width is larger than the group
            or none; groups that are to be alike have not the same widths.

    >>> import jax.numpy as jnp
    >>> from jaxprune.structured import trace
    >>> def fn(params, x):
    ...     for layer in params:
    ...         x = x + jnp.tanh(x @ layer["up"]) @ layer["down"]
    ...     return x
    >>> params = [{"up": jnp.ones((2, 4)), "down": jnp.ones((4, 2))} for _ in range(2)]
    >>> graph = trace(fn, params, jnp.ones((1, 2)))  # a channel costs 4 multiply-accumulates
    >>> prices = {"0/up[1]": {1: 9.0, 2: 3.0, 4: 0.0}, "1/up[1]": {1: 1.0, 2: 0.9, 4: 0.0}}
    >>> allocate_widths(graph, prices, 20)  # 5 channels
    {'0/up[1]': 0.0, '1/up[1]': 0.75}

    Reference: one choice for each block under a budget, Bercovich et al., "Puzzle: Distillation-Based NAS for
    Inference-Optimized LLMs", 2024, section 3.
    """
    require_budget(budget)
    groups = {group.name: group for group in graph.groups}
    if not prices:
        raise ValueError("prices names no group, so that no width can be chosen; price_widths makes them.")
    for name, widths in prices.items():
        if name not in groups:
            raise ValueError(f"prices names {name!r}, which is no group of this function; price_widths names them.")
        if not widths or not all(1 <= width <= groups[name].size for width in widths):
            raise ValueError(f"prices has {list(widths)} for {name}, which has 1 to {groups[name].size} channels.")
        for width, price in widths.items():
            if not math.isfinite(price):
                raise ValueError(f"The price of {name} at {width} channels is {price}; leave out what cannot be had.")
    together = families(graph, [groups[name] for name in prices], alike, dict.fromkeys(groups, 1))
    for family in together:
        first = family[0].name
        for group in family:
            if set(prices[group.name]) != set(prices[first]):
                raise ValueError(f"alike asks for one width of {first} and {group.name}, which are priced at others.")
    options = [sorted(prices[family[0].name], reverse=True) for family in together]
    lost = [
        [sum(prices[group.name][width] for group in family) for width in widths]
        for family, widths in zip(together, options, strict=True)
    ]

    def costs(widths: Sequence[int]) -> float:
        pairs = [(group, width) for family, width in zip(together, widths, strict=True) for group in family]
        plan = plan_of(graph, {group.var: np.arange(width) for group, width in pairs if width < group.size})
        return cost(plan) if cost else count_macs(graph, plan)

    sizes = [family[0].size for family in together]
    whole = costs(sizes)
    # By how much the cost changes with one family alone: mostly it falls, so that this is below zero.
    alone = [
        [costs([*sizes[:n], width, *sizes[n + 1 :]]) - whole for width in widths] for n, widths in enumerate(options)
    ]
    chosen = _within(lost, alone, options, whole, budget, costs)
    return {
        group.name: 1 - width / group.size for family, width in zip(together, chosen, strict=True) for group in family
    }


def _within(
    lost: Sequence[Sequence[float]],
    alone: Sequence[Sequence[float]],
    options: Sequence[Sequence[int]],
    whole: float,
    budget: float,
    costs: Callable[[Sequence[int]], float],
) -> list[int]:
    """Return the widths of the least loss that cost no more than the budget: where costs add up, those found first."""

    def at(aim: float) -> list[int]:
        choices = _knapsack(lost, alone, aim - whole)
        return [widths[choice] for widths, choice in zip(options, choices, strict=True)]

    least = whole + sum(map(min, alone))
    low, high = least, max(least, budget)
    narrowest = at(low)
    if costs(narrowest) > budget:
        raise ValueError(
            f"A budget of {budget:,.6g} cannot be met: at the widths given the function costs at the least "
            f"{costs(narrowest):,.6g}, uncut {whole:,.6g}. Raise the budget, which is no fraction, or price less wide ones."
        )
    found = at(high)
    if costs(found) <= budget:
        return found
    found = narrowest
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        widths = at(middle)
        if costs(widths) <= budget:
            found, low = widths, middle
        else:
            high = middle
    return found


def _knapsack(lost: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], budget: float) -> list[int]:
    """Return of each family the number of the option taken: one of each, the least loss in all that the budget allows."""
    from scipy import optimize, sparse  # takes longer to import than all of this package

    owners = np.repeat(np.arange(len(lost)), [len(row) for row in lost])
    prices, weights = np.concatenate(lost), np.concatenate(costs)
    # The solver's tolerances are absolute.
    price, weight = (float(np.abs(values).max()) or 1.0 for values in (prices, weights))
    one_of_each = sparse.csr_array((np.ones(len(owners)), (owners, np.arange(len(owners)))))
    found = optimize.milp(
        prices / price,
        integrality=np.ones(len(owners)),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(one_of_each, 1, 1),
            optimize.LinearConstraint(weights[None] / weight, -np.inf, budget / weight),
        ],
        options={"mip_rel_gap": _GAP},
    )
    if found.x is None:
        raise RuntimeError(f"The integer program was not solved: {found.message}")
    return [int(np.argmax(found.x[owners == family])) for family in range(len(lost))]
