"""A width for each group of channels, so that together they cost the loss least within budgets: a knapsack."""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxprune._printing import some
from jaxprune.structured._axes._dims import Var
from jaxprune.structured._blocks import Block, parts
from jaxprune.structured._count import count_macs
from jaxprune.structured._graph import Graph, require_graph
from jaxprune.structured._groups import ChannelGroup
from jaxprune.structured._plan import Plan, plan_of
from jaxprune.structured._select_channels import Cost, families, require_budget
from jaxprune.structured._widths._knapsack import Choice, Drop, Taken, take

# How often the aim is halved between what meets the budgets and what does not, where costs do not add up.
_HALVINGS = 16
# How often, at most, costs are read off anew around what was found, where they do not add up.
_ROUNDS = 4


class Allocation(NamedTuple):
    """The widths that `allocate_widths` found, and what it expects of them.

    Attributes:
        k: the fraction removed of each group, by its name: k of `select_channels`.
        blocks: a plan that drops the residual branches and the layers of scans that go, and cuts nothing: for `combine`.
        price: the sum of the prices: by how much the loss is to rise.
        costs: what the smaller function costs, in the order of the budgets; none of them is above its budget.
    """

    k: dict[str, float]
    blocks: Plan
    price: float
    costs: tuple[float, ...]


def allocate_widths(
    graph: Graph,
    prices: Mapping[str, Mapping[int, float]],
    budget: float | Sequence[float],
    *,
    cost: Cost | Sequence[Cost] | None = None,
    alike: str | Sequence[str] = (),
    blocks: Mapping[str, float] | None = None,
) -> Allocation:
    """Choose a width for each group, so that the sum of their prices is the least that a budget allows, or several.

    One of each group's widths is taken (a multiple-choice knapsack, solved exactly as an integer program): no channel
    is spent where another layer needs it more, and what a channel costs in the budget counts as well as what it
    saves the loss. Residual branches may be dropped in the same choice, with all of their groups; so may layers of a scan, which cost the
    same each, so that those of the least price go, as many as is best (a width is priced as if all stayed). Exact where costs add up,
    as those of perceptrons and heads in a transformer do: multiply-accumulates, parameters. Where two groups share a matrix, as
    the channels of convolutions one after the other do, they are taken to add up around what was found before, a few times: what
    is found meets the budgets, but need not be the best.

    Args:
        graph: the function's channels, by `trace`.
        prices: by the name of each group that may be cut its widths and what each costs the loss, from `price_widths` or
            `measure_widths`. All other groups stay whole.
        budget: the most that the function may cost, above 0, in the cost's own unit: ``0.5 * count_macs(graph)``; or several,
            which all are to be met.
        cost: a plan to a number: ``functools.partial(count_parameters, graph)``, ``functools.partial(count_bytes, graph)``,
            `Times`, or your own; one for each budget. None counts multiply-accumulates. It is called once for each group's each
            width, and need not rise evenly.
        alike: names or patterns, of which each means groups that get the same width, as in `select_channels_globally`: what a
            configuration with one width for all layers can express.
        blocks: by the names of residual branches in ``graph.blocks``, and of layers as `measure_blocks` names them, what dropping
            each costs the same loss as that of the prices; None drops none. Of a scan at least one layer stays.

    Returns:
        The allocation: the fraction removed of each group, which branches go, the price and the costs expected.

    Raises:
        ValueError: the budgets cannot be met by any of the widths; a name is not that of a group or of a branch, a width is larger
            than the group or none; groups that are to be alike have not the same widths; budgets and costs are not equally many.

    >>> import jax.numpy as jnp
    >>> from jaxprune.structured import trace
    >>> def fn(params, x):
    ...     for layer in params:
    ...         x = x + jnp.tanh(x @ layer["up"]) @ layer["down"]
    ...     return x
    >>> params = [{"up": jnp.ones((2, 4)), "down": jnp.ones((4, 2))} for _ in range(2)]
    >>> graph = trace(fn, params, jnp.ones((1, 2)))  # a channel costs 4 multiply-accumulates
    >>> prices = {"0/up[1]": {1: 9.0, 2: 3.0, 4: 0.0}, "1/up[1]": {1: 1.0, 2: 0.9, 4: 0.0}}
    >>> found = allocate_widths(graph, prices, 20)  # 5 channels
    >>> found.k, found.price, found.costs
    ({'0/up[1]': 0.0, '1/up[1]': 0.75}, 1.0, (20,))
    >>> allocate_widths(graph, prices, 16, blocks={"1": 1.5}).blocks.dropped  # rather than 4.0 for 4 channels of both
    ('1/down', '1/up')

    Reference: one choice for each block under a budget, Bercovich et al., "Puzzle: Distillation-Based NAS for
    Inference-Optimized LLMs", 2024, section 3.
    """
    require_graph(graph, "allocate_widths(graph, prices, budget)")
    budgets = list(budget) if isinstance(budget, Sequence) else [budget]
    costs = [cost or functools.partial(count_macs, graph)] if cost is None or callable(cost) else list(cost)
    if not budgets or len(budgets) != len(costs):
        raise ValueError(f"There are {len(budgets)} budgets and {len(costs)} costs; give a cost for each budget.")
    for each in budgets:
        require_budget(each)
    _check_prices(graph, prices)
    together = families(graph, [graph.group(name) for name in prices], alike, {group.name: 1 for group in graph.groups})
    for family in together:
        first = family[0].name
        for group in family:
            if set(prices[group.name]) != set(prices[first]):
                raise ValueError(f"alike asks for one width of {first} and {group.name}, which are priced at others.")
    _check_blocks(graph, blocks or {})
    priced = [
        (block, blocks[block.name]) for block in graph.blocks if blocks and block.name in blocks and not block.members
    ]
    best = problem = None
    for price, kept in _fewer_layers(graph, blocks or {}):
        problem = _Problem(graph, prices, costs, together, priced, kept)
        if best is not None and price + problem.bound() >= best.price:
            break  # those that follow cost no less
        found = problem.within(budgets)
        if found is not None and (best is None or price + found.price < best.price):
            best = found._replace(price=price + found.price)
    if best is None:
        assert problem is not None
        raise problem.refusal(budgets)
    return best


def _check_prices(graph: Graph, prices: Mapping[str, Mapping[int, float]]) -> None:
    sizes = {group.name: group.size for group in graph.groups}
    if not prices:
        raise ValueError("prices names no group, so that no width can be chosen; price_widths makes them.")
    for name, widths in prices.items():
        if name not in sizes:
            raise ValueError(f"prices names {name!r}, which is no group of this function; price_widths names them.")
        if not widths or not all(1 <= width <= sizes[name] for width in widths):
            raise ValueError(f"prices has {list(widths)} for {name}, which has 1 to {sizes[name]} channels.")
        for width, price in widths.items():
            if not math.isfinite(price):
                raise ValueError(f"The price of {name} at {width} channels is {price}; leave out what cannot be had.")


def _check_blocks(graph: Graph, prices: Mapping[str, float]) -> None:
    known = [name for block in graph.blocks for name, _ in parts(block)]
    for name, price in prices.items():
        if name not in known:
            raise ValueError(
                f"blocks names {name!r}, which is no residual branch of this function and no layer of a scan; there are {some(known)}."
            )
        if not math.isfinite(price):
            raise ValueError(f"The price of dropping {name} is {price}; leave out what cannot be had.")


def _fewer_layers(graph: Graph, prices: Mapping[str, float]) -> list[tuple[float, dict[Var, np.ndarray]]]:
    """Return what may stay of each scan's layers, and what dropping the others costs; the least costly first.

    Layers of one scan cost the same of each budget, whatever their width: of so many that go, they are those of the least price.
    """
    scans = []
    for block in graph.blocks:
        layers = [(prices[name], place[0]) for name, place in parts(block) if place and name in prices]
        if layers:
            assert isinstance(block.place, Var)
            order = sorted(layers)[: block.size - 1]
            scans.append([(block.place, order[:number]) for number in range(len(order) + 1)])
    found = []
    for choice in itertools.product(*scans):
        price = sum(price for _, gone in choice for price, _ in gone)
        kept = {var: np.delete(np.arange(var.size), [layer for _, layer in gone]) for var, gone in choice if gone}
        found.append((price, kept))
    return sorted(found, key=lambda choice: choice[0])


class _Linear(NamedTuple):
    """What choices cost if costs add up: at a point, and by how much each changes that alone."""

    at: np.ndarray
    choices: list[Choice]
    drops: list[Drop]

    def costs(self, taken: Taken) -> np.ndarray:
        parts = [choice.costs[o] for choice, o in zip(self.choices, taken.options, strict=True) if o is not None]
        gone = [drop.costs for drop, is_gone in zip(self.drops, taken.dropped, strict=True) if is_gone]
        return self.at + sum(parts + gone, np.zeros_like(self.at))


class _Problem:
    """The widths, the branches and their costs.

    A choice is made for groups that keep one width together; where some of these may go with a branch, for each of them. Which layers of
    scans stay is given.
    """

    def __init__(
        self,
        graph: Graph,
        prices: Mapping[str, Mapping[int, float]],
        costs: Sequence[Cost],
        together: Sequence[Sequence[ChannelGroup]],
        branches: Sequence[tuple[Block, float]],
        layers: dict[Var, np.ndarray],
    ) -> None:
        self._graph, self._costs, self._branches, self._layers = graph, costs, branches, layers
        self._units: list[Sequence[ChannelGroup]] = []
        self._alike: list[list[int]] = []
        for family in together:
            if len(family) > 1 and any(_inside(group, block) for group in family for block, _ in branches):
                self._alike.append(list(range(len(self._units), len(self._units) + len(family))))
                self._units += [[group] for group in family]
            else:
                self._units.append(family)
        self._options = [sorted(prices[unit[0].name], reverse=True) for unit in self._units]
        self._lost = [
            np.array([sum(prices[group.name][width] for group in unit) for width in widths])
            for unit, widths in zip(self._units, self._options, strict=True)
        ]
        self._frees = [[n for n, unit in enumerate(self._units) if _inside(unit[0], block)] for block, _ in branches]

    def bound(self) -> float:
        """Return a price that none is below."""
        gone = sum(min(price, 0.0) for _, price in self._branches)
        freed = set(itertools.chain.from_iterable(self._frees))
        return gone + sum(min(lost.min(), 0.0 if n in freed else math.inf) for n, lost in enumerate(self._lost))

    def refusal(self, budgets: Sequence[float]) -> ValueError:
        """Return why the budgets cannot be met."""
        linear = self._around([unit[0].size for unit in self._units])
        for number, budget in enumerate(budgets):
            spent = self._allocation(self._cheapest(linear, number)).costs[number]
            if spent > budget:
                whole = self._costs[number](plan_of(self._graph, {}))
                return ValueError(
                    f"A budget of {budget:,.6g} cannot be met: at the widths given the function costs at the least "
                    f"{spent:,.6g}, uncut {whole:,.6g}. Raise the budget, which is no fraction, or price less wide ones."
                )
        return ValueError(
            f"The budgets of {', '.join(f'{each:,.6g}' for each in budgets)} cannot be met together. Raise one of them, "
            "or price less wide ones."
        )

    def within(self, budgets: Sequence[float]) -> Allocation | None:
        """Return the allocation of the least price that costs no more than the budgets; None where they allow none."""
        point, best = [unit[0].size for unit in self._units], None
        for _ in range(_ROUNDS):
            linear = self._around(point)
            found = self._search(linear, budgets)
            if found is None or (best is not None and found.price >= best.price):
                break
            best = found
            # Of what is dropped the width does not matter.
            point = [round(unit[0].size * (1 - best.k[unit[0].name])) for unit in self._units]
            narrowest = Taken([int(np.argmin(c.costs[:, 0])) for c in linear.choices], [False] * len(self._branches))
            if np.allclose(linear.costs(narrowest), self._allocation(narrowest).costs, rtol=1e-9, atol=0):
                break
        return best

    def _around(self, point: Sequence[int]) -> _Linear:
        """Return what everything costs alone, where all else has the widths of a point."""
        at = self._measure(point, [])
        choices = []
        for n, (widths, lost) in enumerate(zip(self._options, self._lost, strict=True)):
            costs = [self._measure([*point[:n], width, *point[n + 1 :]], []) - at for width in widths]
            choices.append(Choice(lost, np.stack(costs)))
        drops = []
        for (block, price), frees in zip(self._branches, self._frees, strict=True):
            within = [m for m, (other, _) in enumerate(self._branches) if set(other.paths) < set(block.paths)]
            drops.append(Drop(price, self._measure(point, [block]) - at, frees, within))
        return _Linear(at, choices, drops)

    def _search(self, linear: _Linear, budgets: Sequence[float]) -> Allocation | None:
        """Return what is best of all that meets the budgets, if costs add up; else of what is aimed at below them."""
        cheapest = [self._cheapest(linear, number) for number in range(len(budgets))]
        if any(self._allocation(taken).costs[n] > budgets[n] for n, taken in enumerate(cheapest)):
            return None
        least = np.array([linear.costs(taken)[n] for n, taken in enumerate(cheapest)])
        most = np.maximum(least, budgets)

        def at(share: float) -> tuple[bool, Allocation | None]:
            taken = take(linear.choices, linear.drops, self._alike, least + share * (most - least) - linear.at)
            found = None if taken is None else self._allocation(taken)
            return taken is not None, found if found is not None and np.all(np.array(found.costs) <= budgets) else None

        _, found = at(1.0)
        low, high = 0.0, 1.0
        if found is None:
            _, found = at(0.0)
            for _ in range(_HALVINGS):
                middle = (low + high) / 2
                any_taken, allocation = at(middle)
                if allocation is None and any_taken:
                    high = middle
                else:
                    low, found = middle, allocation or found
        return found

    def _cheapest(self, linear: _Linear, number: int) -> Taken:
        """Return what costs least of one budget."""
        choices = [choice._replace(prices=choice.costs[:, number]) for choice in linear.choices]
        drops = [drop._replace(price=drop.costs[number]) for drop in linear.drops]
        taken = take(choices, drops, self._alike, [math.inf] * len(self._costs))
        assert taken is not None
        return taken

    def _measure(self, widths: Sequence[int], gone: Sequence[Block]) -> np.ndarray:
        return np.array([cost(self._plan(widths, gone)) for cost in self._costs], float)

    def _plan(self, widths: Sequence[int], gone: Sequence[Block]) -> Plan:
        pairs = [(group, width) for unit, width in zip(self._units, widths, strict=True) for group in unit]
        kept = {group.var: np.arange(width) for group, width in pairs if width < group.size}
        return plan_of(self._graph, self._layers | kept, gone)

    def _allocation(self, taken: Taken) -> Allocation:
        gone = [(block, price) for (block, price), drop in zip(self._branches, taken.dropped, strict=True) if drop]
        blocks = [block for block, _ in gone]
        made = list(zip(self._units, self._options, self._lost, taken.options, strict=True))
        widths = [unit[0].size if option is None else widths[option] for unit, widths, _, option in made]
        paid = [float(lost[option]) for _, _, lost, option in made if option is not None]
        plan = self._plan(widths, blocks)
        return Allocation(
            {
                group.name: 1 - width / group.size
                for (unit, *_), width in zip(made, widths, strict=True)
                for group in unit
            },
            plan_of(self._graph, self._layers, blocks),
            sum(paid) + sum(price for _, price in gone),
            tuple(cost(plan) for cost in self._costs),
        )


def _inside(group: ChannelGroup, block: Block) -> bool:
    """Whether a group's channels go with a branch."""
    return {member.path for member in group.members} <= set(block.paths)
