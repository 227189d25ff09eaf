"""Widths by price: prices against least squares by numpy, allocations against every one that there is."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune.structured import (
    allocate_widths,
    count_macs,
    count_parameters,
    price_widths,
    select_channels,
    trace,
)
from tests.structured.test_losses import greedy
from tests.support.structured_zoo import normal


def layers(params: Any, x: Any) -> Any:
    for layer in params:
        x = x + jnp.tanh(x @ layer["up"]) @ layer["down"]
    return x


def three(*widths: int) -> Any:
    return [{"up": normal(4, width), "down": normal(width, 4)} for width in widths]


def squared(params: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.square(normal(*leaf.shape)), params)


def test_a_price_is_the_error_of_the_readers_times_the_mean_square_of_their_gradients():
    params, x = three(6, 5), normal(40, 4)
    squares = squared(params)
    grams, graph = jaxprune.calibrate_grams(layers, params, [x]), trace(layers, params, x)
    found = price_widths(graph, params, grams=grams, squares=squares)
    assert {name: list(prices) for name, prices in found.items()} == {
        "0/up[1]": [1, 2, 3, 4, 5, 6],
        "1/up[1]": [1, 2, 3, 4, 5],
    }
    stream = np.asarray(x, np.float64)
    for number, (layer, gradients) in enumerate(zip(params, squares, strict=True)):
        up, down = (np.asarray(layer[name], np.float64) for name in ("up", "down"))
        h = np.tanh(stream @ up)
        size = h.shape[1]
        _, losses = greedy([(h, down, 1)], size, size - 1)
        # E[(dL/dW_io)^2] = E[x_i^2] E[g_o^2], summed over the inputs i; the mean over the outputs o.
        weight = (np.asarray(gradients["down"]).sum(0) / np.square(h).sum()).mean()
        expected = weight * np.concatenate([[0.0], np.cumsum(losses)])
        prices = found[f"{number}/up[1]"]
        np.testing.assert_allclose([prices[size - gone] for gone in range(size)], expected, rtol=1e-4)
        stream = stream + h @ down


def test_gradients_of_independent_outputs_are_read_from_those_of_weights():
    # Of a linear reader with the loss sum(g * y), g of +-s and independent of the inputs, the price is s^2 times the error.
    params, x = {"up": normal(4, 5), "down": normal(5, 3)}, normal(2000, 4)

    def fn(params: Any, x: Any) -> Any:
        return jnp.tanh(x @ params["up"]) @ params["down"]

    signs = 0.7 * jnp.sign(normal(2000, 3))
    gradients = jax.vmap(jax.grad(lambda p, x, g: jnp.vdot(g, fn(p, x))), (None, 0, 0))(params, x, signs)
    squares = jax.tree.map(lambda leaf: jnp.square(leaf).mean(0), gradients)
    grams, graph = jaxprune.calibrate_grams(fn, params, [x]), trace(fn, params, x)
    found = price_widths(graph, params, grams=grams, squares=squares)["up[1]"]
    h = np.tanh(np.asarray(x, np.float64) @ np.asarray(params["up"], np.float64))
    _, losses = greedy([(h, np.asarray(params["down"], np.float64), 1)], 5, 4)
    np.testing.assert_allclose(found[1], 0.49 / 2000 * sum(losses), rtol=1e-3)


def test_prices_of_half_precision_are_those_of_the_weights_that_it_holds():
    wide, x = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), three(6, 5)), normal(40, 4)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), wide)
    grams, squares = jaxprune.calibrate_grams(layers, wide, [x]), squared(wide)
    found, expected = (
        price_widths(trace(layers, params, x.astype(params[0]["up"].dtype)), params, grams=grams, squares=squares)
        for params in (narrow, wide)
    )
    assert found.keys() == expected.keys()
    for name, prices in expected.items():
        assert found[name] == pytest.approx(prices, rel=1e-5)


def test_layers_of_a_scan_add_up():
    params, x = three(6, 6), normal(40, 4)
    squares = squared(params)
    stacked, of_squares = (jax.tree.map(lambda *leaves: jnp.stack(leaves), *tree) for tree in (params, squares))

    def scanned(params: Any, x: Any) -> Any:
        step = lambda x, layer: (x + jnp.tanh(x @ layer["up"]) @ layer["down"], None)  # noqa: E731
        return jax.lax.scan(step, x, params)[0]

    each = price_widths(
        trace(layers, params, x), params, grams=jaxprune.calibrate_grams(layers, params, [x]), squares=squares
    )
    (found,) = price_widths(
        trace(scanned, stacked, x), stacked, grams=jaxprune.calibrate_grams(scanned, stacked, [x]), squares=of_squares
    ).values()
    for width, price in found.items():
        np.testing.assert_allclose(price, sum(prices[width] for prices in each.values()), rtol=1e-4)


def test_widths_are_evenly_spaced_and_rounded():
    params, x = three(64), normal(80, 4)
    given = {"grams": jaxprune.calibrate_grams(layers, params, [x]), "squares": squared(params)}
    graph = trace(layers, params, x)
    assert list(price_widths(graph, params, **given, options=4)["0/up[1]"]) == [16, 32, 48, 64]
    assert list(price_widths(graph, params, **given, options=4, round_to=24)["0/up[1]"]) == [24, 48, 64]
    assert list(price_widths(graph, params, **given, options=4, min_kept=40)["0/up[1]"]) == [40, 48, 64]
    assert price_widths(graph, params, **given, among="0/up", options=1) == {"0/up[1]": {64: 0.0}}


def best(prices: Any, graph: Any, budget: float, cost: Any) -> float:
    """The least price of all allocations within a budget, one by one."""
    names = list(prices)
    found = np.inf
    for widths in itertools.product(*prices.values()):
        shares = {name: 1 - width / graph.group(name).size for name, width in zip(names, widths, strict=True)}
        if cost(select_channels(graph, zeros(graph), shares)) <= budget:
            found = min(found, sum(prices[name][width] for name, width in zip(names, widths, strict=True)))
    return found


def zeros(graph: Any) -> Any:
    tree: list[Any] = [{}, {}, {}]
    for path, shape in graph.by_path.items():
        layer, name = path.split("/")
        tree[int(layer)][name] = jnp.zeros(shape)
    return tree


@pytest.mark.parametrize("count", [count_macs, count_parameters])
def test_no_allocation_within_the_budget_is_cheaper(count):
    params = three(6, 4, 5)
    graph = trace(layers, params, normal(7, 4))
    cost = functools.partial(count, graph)
    random = np.random.default_rng(0)
    prices = {
        group.name: {width: float(price) for width, price in zip(range(group.size, 0, -2), sorted(random.exponential(size=9)), strict=False)}
        for group in graph.groups
        if group.name != "0/down[1]"
    }  # fmt: skip
    for share in (0.4, 0.55, 0.8, 1.0):
        budget = share * cost(select_channels(graph, params, 0.0))
        shares = allocate_widths(graph, prices, budget, cost=cost).k
        plan = select_channels(graph, params, shares)
        assert cost(plan) <= budget
        paid = sum(prices[name][round(graph.group(name).size * (1 - k))] for name, k in shares.items())
        np.testing.assert_allclose(paid, best(prices, graph, budget, cost), rtol=1e-6)


def test_what_a_channel_costs_counts_as_well_as_what_it_saves():
    # A channel of the second layer is worth half as much again, and costs twice as much, 80 and 40.
    params = [{"up": normal(4, 4), "down": normal(4, 4)}, {"up": normal(4, 4), "down": normal(4, 4)}]

    def fn(params: Any, x: Any) -> Any:
        first, second = params
        x = x + jnp.tanh(x @ first["up"]) @ first["down"]
        return x + jnp.tanh(jnp.concatenate([x, x, x]) @ second["up"]).reshape(3, -1, 4).mean(0) @ second["down"]

    graph = trace(fn, params, normal(5, 4))
    prices = {"0/up[1]": {n: 4.0 - n for n in range(1, 5)}, "1/up[1]": {n: 1.5 * (4 - n) for n in range(1, 5)}}
    whole = count_macs(graph)
    assert allocate_widths(graph, prices, whole).k == {"0/up[1]": 0.0, "1/up[1]": 0.0}
    assert allocate_widths(graph, prices, whole - 40).k == {"0/up[1]": 0.25, "1/up[1]": 0.0}
    assert allocate_widths(graph, prices, whole - 80).k == {"0/up[1]": 0.0, "1/up[1]": 0.25}
    assert allocate_widths(graph, prices, whole - 120).k == {"0/up[1]": 0.25, "1/up[1]": 0.25}


def test_groups_that_share_a_matrix_meet_the_budget():
    params = [normal(4, 8), normal(8, 8), normal(8, 8), normal(8, 2)]

    def fn(params: Any, x: Any) -> Any:
        return functools.reduce(lambda x, w: jnp.tanh(x @ w), params[:3], x) @ params[3]

    graph = trace(fn, params, normal(1, 4))
    prices = {group.name: {n: float((8 - n) ** 2) for n in range(1, 9)} for group in graph.groups}
    assert len(prices) == 3
    for budget in (30, 60, 90, 120):
        plan = select_channels(graph, params, allocate_widths(graph, prices, budget).k)
        assert 0.75 * budget <= count_macs(graph, plan) <= budget


def test_layers_that_are_to_be_alike():
    params = three(4, 4, 4)
    graph = trace(layers, params, normal(7, 4))
    free = {0: 9.0, 1: 1.0, 2: 0.1}
    prices = {f"{n}/up[1]": {1: 4 * price, 2: price, 4: 0.0} for n, price in free.items()}
    cost = functools.partial(count_parameters, graph)
    assert allocate_widths(graph, prices, 64, cost=cost).k == {"0/up[1]": 0.0, "1/up[1]": 0.5, "2/up[1]": 0.5}
    found = allocate_widths(graph, prices, 72, cost=cost, alike=["[02]/up"]).k
    assert found == {"0/up[1]": 0.0, "1/up[1]": 0.75, "2/up[1]": 0.0}
    assert set(allocate_widths(graph, prices, 48, cost=cost, alike="*/up").k.values()) == {0.5}


def test_mistakes_are_named():
    params, x = three(4, 4), normal(7, 4)
    graph = trace(layers, params, x)
    prices = {"0/up[1]": {2: 1.0, 4: 0.0}}
    with pytest.raises(ValueError, match=r"prices names 'up', which is no group"):
        allocate_widths(graph, {"up": {1: 1.0}}, 10)
    with pytest.raises(ValueError, match=r"\[2, 5\] for 0/up\[1\], which has 1 to 4 channels"):
        allocate_widths(graph, {"0/up[1]": {2: 1.0, 5: 0.0}}, 10)
    with pytest.raises(ValueError, match=r"prices names no group"):
        allocate_widths(graph, {}, 10)
    with pytest.raises(ValueError, match=r"price of 0/up\[1\] at 2 channels is nan"):
        allocate_widths(graph, {"0/up[1]": {2: float("nan"), 4: 0.0}}, 10)
    with pytest.raises(ValueError, match="A budget of 100 cannot be met: .* at the least 336, uncut 448"):
        allocate_widths(graph, prices, 100)
    narrow = {name: {1: 1.0, 2: 0.0} for name in ("0/up[1]", "1/up[1]")}  # neither of them may stay whole
    with pytest.raises(ValueError, match="A budget of 100 cannot be met: .* at the least 112, uncut 448"):
        allocate_widths(graph, narrow, 100)
    assert allocate_widths(graph, narrow, 448).k == {"0/up[1]": 0.5, "1/up[1]": 0.5}
    with pytest.raises(ValueError, match="above 0, not 0"):
        allocate_widths(graph, prices, 0)
    with pytest.raises(ValueError, match=r"one width of 0/up\[1\] and 1/up\[1\], which are priced at others"):
        allocate_widths(graph, prices | {"1/up[1]": {1: 1.0, 4: 0.0}}, 300, alike="*/up")
    short = [{"up": params[0]["up"][:, :2], "down": params[0]["down"]}, params[1]]
    grams = jaxprune.calibrate_grams(layers, params, [x])
    with pytest.raises(
        ValueError, match=r"0/up of shape \(4, 4\); in squares it has shape \(4, 2\). Make squares from"
    ):
        price_widths(graph, params, grams=grams, squares=short)
