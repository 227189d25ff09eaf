"""Prices by loss: what masks measure is what the smaller, repaired function loses, and is compiled once."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune.structured import (
    channel_masks,
    masked,
    measure_blocks,
    measure_widths,
    rebuild,
    repair,
    select_blocks,
    select_channels,
    shrink,
    trace,
)
from tests.structured.test_widths import layers, three
from tests.support.structured_zoo import normal


def scanned(params: Any, x: Any) -> Any:
    step = lambda x, layer: (x + jnp.tanh(x @ layer["up"]) @ layer["down"], None)  # noqa: E731
    return jax.lax.scan(step, x, params)[0]


def stacked(params: Any) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)


@pytest.mark.parametrize("by_grams", [True, False])
@pytest.mark.parametrize("fn", [layers, scanned])
def test_a_price_is_what_the_smaller_function_loses(fn, by_grams):
    params, x = three(6, 6), normal(40, 4)
    params = stacked(params) if fn is scanned else params
    graph, y, calls = trace(fn, params, x), fn(params, x) + 0.1, []

    def loss(fn: Any, params: Any) -> Any:
        calls.append(fn)
        return jnp.mean(jnp.square(fn(params, x) - y))

    grams = jaxprune.calibrate_grams(fn, params, [x]) if by_grams else None
    found = measure_widths(graph, params, loss, grams=grams, among="*up", options=3)
    assert len(calls) == 1
    before = float(loss(fn, params))
    assert {name: list(prices) for name, prices in found.items()} == {
        group.name: [2, 4, 6] for group in graph.groups if "up" in group.name
    }
    for name, prices in found.items():
        for width, price in prices.items():
            plan = select_channels(graph, params, {name: 1 - width / 6}, grams=grams)
            small = shrink(plan, params if grams is None or width == 6 else repair(plan, params, grams))
            expected = float(loss(rebuild(graph, plan), small)) - before
            np.testing.assert_allclose(price, expected, rtol=1e-3, atol=1e-6)
            assert width == 6 or price > 0


def test_branches_are_left_out_one_at_a_time():
    params, x = three(6, 4, 5), normal(9, 4)
    graph = trace(layers, params, x)

    def loss(fn: Any, params: Any) -> Any:
        return jnp.mean(jnp.abs(fn(params, x)))

    found = measure_blocks(graph, params, loss)
    assert list(found) == [block.name for block in graph.blocks] == ["0", "1", "2"]
    for number in range(3):
        left = [layer for other, layer in enumerate(params) if other != number]
        np.testing.assert_allclose(found[str(number)], loss(layers, left) - loss(layers, params), rtol=1e-4)
    gone = select_blocks(graph, params, 1, loss).dropped
    assert gone == tuple(f"{min(found, key=found.__getitem__)}/{name}" for name in ("down", "up"))


def test_what_is_not_finite_has_no_price():
    params, x = [{"up": jnp.array([[1.0, 2.0]]), "down": jnp.array([[1.0], [2.0]])}], jnp.ones((3, 1))
    graph = trace(layers, params, x)
    whole = masked(graph)(params, channel_masks(select_channels(graph, params, 0.0), params), x).min()
    loss = lambda fn, params: jnp.log(jnp.min(fn(params, x)) / whole - 0.9)  # noqa: E731
    assert measure_widths(graph, params, loss) == {"0/up[1]": {2: 0.0}}
    assert measure_blocks(graph, params, loss) == {}
    for measure in (measure_widths, measure_blocks):
        with pytest.raises(ValueError, match="The loss of the whole function is nan"):
            measure(graph, params, lambda fn, params: jnp.log(-loss(fn, params) - 9.0))
        with pytest.raises(ValueError, match=r"return a scalar; it returned an array of shape \(3, 1\)"):
            measure(graph, params, lambda fn, params: fn(params, x))
