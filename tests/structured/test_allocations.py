"""Allocations under several budgets and with branches that go, against every one that there is."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.structured import (
    allocate_widths,
    combine,
    count_bytes,
    count_macs,
    count_parameters,
    measure_blocks,
    select_blocks,
    select_channels,
    trace,
)
from jaxprune.structured._plan import plan_of
from tests.structured.test_widths import layers, three, zeros
from tests.support.structured_zoo import normal


def mixed(params: Any, x: Any) -> Any:
    """The second layer sees three times as many rows, so that its channels cost more to compute than to store."""
    first, second, third = params
    x = x + jnp.tanh(x @ first["up"]) @ first["down"]
    x = (
        x
        + jnp.tanh(jnp.concatenate([x, x, x]) @ second["up"]).reshape(3, -1, second["up"].shape[1]).mean(0)
        @ second["down"]
    )
    return x + jnp.tanh(x @ third["up"]) @ third["down"]


def drawn(seed: int, sizes: tuple[int, ...]) -> tuple[dict[str, dict[int, float]], dict[str, float]]:
    random = np.random.default_rng(seed)
    prices = {
        f"{n}/up[1]": dict(zip(range(size, 0, -2), [0.0, *np.sort(random.exponential(size=size))], strict=False))
        for n, size in enumerate(sizes)
    }
    return prices, {
        str(n): float(max(prices[f"{n}/up[1]"].values()) * random.uniform(0.3, 1.5)) for n in range(len(sizes))
    }


def plan_for(graph: Any, params: Any, found: Any) -> Any:
    return combine(select_channels(graph, params, found.k), found.blocks)


def every(graph: Any, prices: Any, blocks: Any, costs: Any, alike: tuple[str, ...] = ()) -> Any:
    """Yield the price and the costs of each allocation, one by one."""
    options = [[*widths, *([0] if name.split("/")[0] in blocks else [])] for name, widths in prices.items()]
    for widths in itertools.product(*options):
        tied = {width for name, width in zip(prices, widths, strict=True) if name in alike and width}
        if len(tied) > 1:
            continue
        k = {n: 1 - w / graph.group(n).size for n, w in zip(prices, widths, strict=True) if w}
        gone = [name.split("/")[0] for name, width in zip(prices, widths, strict=True) if not width]
        price = sum(prices[n][w] if w else blocks[n.split("/")[0]] for n, w in zip(prices, widths, strict=True))
        plan = combine(select_channels(graph, zeros(graph), k), dropping(graph, gone))
        yield price, [cost(plan) for cost in costs]


def dropping(graph: Any, names: list[str]) -> Any:
    return plan_of(graph, {}, [block for block in graph.blocks if block.name in names])


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("tied", [False, True])
def test_no_allocation_within_all_budgets_is_cheaper(seed, tied):
    sizes = (4, 4, 6)
    params = three(*sizes)
    graph = trace(mixed, params, normal(7, 4))
    prices, blocks = drawn(seed, sizes)
    alike = ("0/up[1]", "1/up[1]") if tied else ()
    costs = [functools.partial(count, graph) for count in (count_macs, count_parameters, count_bytes)]
    whole = [cost(select_channels(graph, params, 0.0)) for cost in costs]
    assert whole[2] == 4 * whole[1]
    candidates = list(every(graph, prices, blocks, costs, alike))
    dropped = 0
    for shares in ((0.8, 0.5, 1.0), (0.35, 0.9, 0.6), (0.2, 0.2, 0.2), (1.0, 1.0, 0.7)):
        budgets = [share * each for share, each in zip(shares, whole, strict=True)]
        found = allocate_widths(graph, prices, budgets, cost=costs, alike=["[01]/up"] if tied else (), blocks=blocks)
        assert found.costs == tuple(cost(plan_for(graph, params, found)) for cost in costs)
        assert all(spent <= budget for spent, budget in zip(found.costs, budgets, strict=True))
        best = min(price for price, spent in candidates if all(np.array(spent) <= budgets))
        np.testing.assert_allclose(found.price, best, rtol=1e-6)
        dropped += len(found.blocks.dropped)
    assert dropped > 0


def test_a_branch_inside_a_branch_goes_with_it():
    params = {"a": normal(4, 4), "b": normal(4, 6), "c": normal(6, 4)}

    def fn(params: Any, x: Any) -> Any:
        inner = jnp.tanh(x @ params["a"])
        inner = inner + jnp.tanh(inner @ params["b"]) @ params["c"]
        return x + inner

    x = normal(1, 4)
    graph = trace(fn, params, x)
    assert [set(block.paths) for block in graph.blocks] == [{"b", "c"}, {"a", "b", "c"}]
    inner, outer = (block.name for block in graph.blocks)
    prices = {"b[1]": {6: 0.0, 3: 1.0}}
    found = {
        budget: allocate_widths(graph, prices, budget, blocks={inner: 3.0, outer: 5.0}) for budget in (64, 40, 16, 1)
    }
    assert {budget: (each.price, each.costs, each.blocks.dropped) for budget, each in found.items()} == {
        64: (0.0, (64,), ()),
        40: (1.0, (40,), ()),
        16: (3.0, (16,), ("b", "c")),
        1: (5.0, (0,), ("a", "b", "c")),
    }


def test_groups_that_share_matrices_come_near_the_best():
    params = [normal(4, 6), normal(6, 6), normal(6, 6), normal(6, 2)]

    def fn(params: Any, x: Any) -> Any:
        return functools.reduce(lambda x, w: jnp.tanh(x @ w), params[:3], x) @ params[3]

    graph = trace(fn, params, normal(1, 4))
    random = np.random.default_rng(0)
    prices = {
        group.name: dict(zip(range(6, 0, -1), [0.0, *np.sort(random.exponential(size=5))], strict=True))
        for group in graph.groups
    }
    ratios = []
    for budget in (30, 50, 70, 90):
        spent = {}
        for widths in itertools.product(range(1, 7), repeat=3):
            a, b, c = widths
            if 4 * a + a * b + b * c + 2 * c <= budget:
                spent[widths] = sum(prices[n][w] for n, w in zip(prices, widths, strict=True))
        found = allocate_widths(graph, prices, budget)
        assert found.costs[0] <= budget
        assert found.costs == (count_macs(graph, select_channels(graph, params, found.k)),)
        ratios.append(found.price / min(spent.values()))
    assert min(ratios) == pytest.approx(1.0)
    assert max(ratios) < 1.2


def test_mistakes_are_named():
    params, x = three(4, 4), normal(7, 4)
    graph = trace(layers, params, x)
    prices = {"0/up[1]": {2: 1.0, 4: 0.0}, "1/up[1]": {2: 1.0, 4: 0.0}}
    for blocks, words in (
        (
            {"2": 1.0},
            "blocks names '2', which is no residual branch of this function and no layer of a scan; there are 0, 1",
        ),
        ({"1": float("inf")}, "The price of dropping 1 is inf"),
    ):
        with pytest.raises(ValueError, match=words):
            allocate_widths(graph, prices, 300, blocks=blocks)
    with pytest.raises(ValueError, match="There are 2 budgets and 1 costs; give a cost for each budget"):
        allocate_widths(graph, prices, [300, 300])
    first, second = (lambda plan, name=name: 1 + len(plan.kept.get(name, {})) for name in ("0/up", "1/up"))
    either = [lambda plan: 2 - first(plan) + 1, second]
    assert allocate_widths(graph, prices, [1, 2], cost=either).k == {"0/up[1]": 0.5, "1/up[1]": 0.0}
    opposed = [first, lambda plan: 3 - first(plan)]
    with pytest.raises(ValueError, match="The budgets of 1, 1 cannot be met together"):
        allocate_widths(graph, prices, [1, 1], cost=opposed)
    with pytest.raises(ValueError, match="A budget of 0.5 cannot be met: .* at the least 1, uncut 1"):
        allocate_widths(graph, prices, [10, 0.5], cost=opposed[::-1])


def scanned(params: Any, x: Any) -> Any:
    def step(x: Any, layer: Any) -> Any:
        return x + jnp.tanh(x @ layer["up"]) @ layer["down"], None

    return jax.lax.scan(step, x, params["layers"])[0] @ params["head"]


STACKED = {"layers": {"up": normal(4, 4, 6), "down": normal(4, 6, 4)}, "head": normal(4, 2)}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_layers_of_a_scan_go_where_that_is_cheapest(seed):
    graph = trace(scanned, STACKED, normal(7, 4))
    random = np.random.default_rng(seed)
    (name,) = (group.name for group in graph.groups if group.size == 6)
    prices = {name: dict(zip(range(6, 0, -1), [0.0, *np.sort(random.exponential(size=5))], strict=True))}
    blocks = {f"layers[{layer}]": float(price) for layer, price in enumerate(random.exponential(size=4))}
    costs = [functools.partial(count, graph) for count in (count_macs, count_parameters)]
    every = [
        (prices[name][width] + sum(blocks[f"layers[{layer}]"] for layer in gone), 8 * width * (4 - len(gone)) + 8)
        for width in range(1, 7)
        for number in range(4)
        for gone in itertools.combinations(range(4), number)
    ]
    for share in (0.9, 0.6, 0.3, 0.1):
        budgets = [share * count_macs(graph), 0.8 * count_parameters(graph)]
        found = allocate_widths(graph, prices, budgets, cost=costs, blocks=blocks)
        fitting = [price for price, parameters in every if 7 * parameters <= budgets[0] and parameters <= budgets[1]]
        assert found.price == pytest.approx(min(fitting))
        plan = plan_for(graph, STACKED, found)
        assert found.costs == tuple(cost(plan) for cost in costs)
        assert all(cost <= budget for cost, budget in zip(found.costs, budgets, strict=True))
    few = {"layers[0]": 0.1, "layers[2]": 0.2}  # no others may go
    assert allocate_widths(graph, prices, 24 * 7, blocks=few).blocks.kept["layers/up"][0] == (1, 3)
    with pytest.raises(ValueError, match="at the least 168, uncut 1,400"):
        allocate_widths(graph, prices, 23 * 7, blocks=few)


def test_layers_of_a_scan_are_priced_by_the_loss_without_each():
    x = normal(7, 4)
    graph, whole = trace(scanned, STACKED, x), scanned(STACKED, x)

    def loss(fn: Any, params: Any) -> Any:
        return jnp.mean(jnp.abs(fn(params, x) - whole))

    found = measure_blocks(graph, STACKED, loss)
    assert list(found) == [f"layers[{layer}]" for layer in range(4)]
    for layer in range(4):
        left = jax.tree.map(lambda leaf: np.delete(leaf, layer, 0), STACKED["layers"])
        expected = loss(scanned, STACKED | {"layers": left}) - loss(scanned, STACKED)
        np.testing.assert_allclose(found[f"layers[{layer}]"], expected, rtol=1e-4)
    prices = {group.name: {1: 9.0, group.size: 0.0} for group in graph.groups if group.size == 6}
    gone = allocate_widths(graph, prices, 7 * (3 * 48 + 8), blocks=found).blocks
    assert gone.kept == select_blocks(graph, STACKED, 1, loss).kept
