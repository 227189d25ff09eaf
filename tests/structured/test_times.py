"""Tables of times: their arithmetic, with a timer that is handed in, so that what must come out is known."""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxprune.structured import (
    Times,
    allocate_widths,
    check_times,
    combine,
    count_macs,
    count_parameters,
    measure_times,
    select_blocks,
    select_channels,
    trace,
)
from tests.structured.test_allocations import STACKED, plan_for, scanned
from tests.structured.test_widths import layers, three
from tests.support.structured_zoo import normal


class Scales:
    """A device that takes a second for each parameter, and ten for a call."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, fn: Any, params: Any, *inputs: Any) -> float:
        self.calls.append(sum(leaf.size for leaf in jax.tree.leaves(params)))
        return 10.0 + self.calls[-1]


def test_layers_that_are_alike_are_cut_at_once_and_share():
    params, x, scales = three(8, 8, 6, 8), normal(7, 4), Scales()
    graph = trace(layers, params, x)
    times = measure_times(graph, params, x, options=2, repeats=3, timer=scales)
    # Of three layers of 8 and one of 6: each cut to a half and to 1, then dropped.
    once = [240, 240 - 3 * 56, 240 - 3 * 32, 240 - 40, 240 - 24, 240 - 3 * 64, 240 - 48]
    assert scales.calls == 3 * once
    assert times.whole == 250
    eight, six = {1: 250 - 56, 4: 250 - 32, 8: 250}, {1: 250 - 40, 3: 250 - 24, 6: 250}
    assert times.widths == {"0/up[1]": eight, "1/up[1]": eight, "2/up[1]": six, "3/up[1]": eight}
    assert times.blocks == {"0": 186, "1": 186, "2": 202, "3": 186}
    # Between widths, in all together, and with branches dropped, whose widths save nothing more.
    k = {"0/up": 0.25, "1/up": 0.5, "2/up": 1 / 6, "3/up": 0.75}
    plan = select_channels(graph, params, k)
    assert times(plan) == pytest.approx(10 + count_parameters(graph, plan), rel=1e-6)
    gone = select_blocks(graph, params, 2, lambda fn, params: jnp.sum(fn(params, x)))
    assert times(combine(plan, gone)) == pytest.approx(10 + count_parameters(graph, combine(plan, gone)), rel=1e-6)
    assert check_times(times, combine(plan, gone), params, x, timer=scales, repeats=1).error == pytest.approx(0.0)
    # So an allocation by them is that by parameters.
    prices = {name: {width: float(8 - width) ** (2 + n) for width in range(1, max(table) + 1)} for n, (name, table) in enumerate(times.widths.items())}  # fmt: skip
    blocks = {"0": 30.0, "1": 200.0}
    for budget in (90, 130, 200):
        by_time = allocate_widths(graph, prices, budget, cost=times, blocks=blocks)
        cost = functools.partial(count_parameters, graph)
        by_size = allocate_widths(graph, prices, budget - 10, cost=cost, blocks=blocks)
        assert by_time.price == pytest.approx(by_size.price)
        assert 10 + count_parameters(graph, plan_for(graph, params, by_time)) <= budget


def test_groups_that_share_matrices_save_less_together():
    params = [normal(4, 8), normal(8, 8), normal(8, 8), normal(8, 2)]

    def fn(params: Any, x: Any) -> Any:
        return functools.reduce(lambda x, w: jnp.tanh(x @ w), params[:3], x) @ params[3]

    x = normal(3, 4)
    graph = trace(fn, params, x)
    macs = lambda fn, params, x: 5.0 + 3.0 * sum(leaf.size for leaf in params)  # noqa: E731
    times = measure_times(graph, params, x, timer=macs, repeats=1)
    for k in ({"0": 0.5}, {"0": 0.5, "1": 0.5}, {"0": 0.5, "1": 0.25, "2": 0.75}, 0.5):
        plan = select_channels(graph, params, k)
        assert times(plan) == pytest.approx(5 + count_macs(graph, plan), rel=1e-6)


def test_noise_does_not_choose():
    params, x = three(8), normal(7, 4)
    graph = trace(layers, params, x)
    by_width = {8: 10.0, 6: 12.0, 4: 7.0, 2: 8.0, 1: 3.0}
    times = measure_times(graph, params, x, timer=_by_width(by_width), repeats=1)
    assert times.widths == {"0/up[1]": {1: 3.0, 2: 7.5, 4: 7.5, 6: 10.0, 8: 10.0}}
    assert times.blocks == {"0": 10.0}  # slower without it cannot be
    taken = iter([9.0, 1.0, 1.0, 8.0, 2.0, 3.0, 8.5, 1.5, 0.5, 7.0, 2.5, 2.0])
    noisy = measure_times(graph, params, x, timer=lambda *_: next(taken), options=2, min_kept=4, repeats=4)
    assert (noisy.whole, noisy.widths["0/up[1]"], noisy.blocks) == (7.0, {4: 1.0, 8: 7.0}, {"0": 0.5})


def _by_width(table: dict[int, float]) -> Any:
    return lambda fn, params, x: 11.0 if params[0]["up"] is None else table[params[0]["up"].shape[1]]


def test_a_clock_runs_by_default(tmp_path):
    params, x = three(8, 8), normal(7, 4)
    graph = trace(layers, params, normal(2, 4))
    times = measure_times(graph, params, x, options=1, min_kept=8, repeats=2)
    assert list(times.widths) == ["0/up[1]", "1/up[1]"]
    assert times.whole > 0
    assert list(times.widths["0/up[1]"]) == [8]
    plan = select_channels(graph, params, 0.0)
    found = check_times(times, plan, params, x, repeats=2)
    assert found.predicted == times.whole
    assert found.measured > 0
    (tmp_path / "times.json").write_text(times.to_json())
    again = Times.from_json((tmp_path / "times.json").read_text(), graph)
    assert (again.whole, again.widths, again.blocks) == (times.whole, times.widths, times.blocks)
    assert json.loads(times.to_json())["jax"] == jax.__version__
    assert times.device == again.device == f"1 x {jax.devices()[0].device_kind}"


def test_mistakes_are_named():
    params, x = three(8, 4), normal(7, 4)
    graph, scales = trace(layers, params, x), Scales()
    times = measure_times(graph, params, x, among="0", repeats=1, timer=scales)
    assert list(times.widths) == ["0/up[1]"]
    with pytest.raises(ValueError, match=r"The plan cuts 1/up\[1\], of which no time is known"):
        times(select_channels(graph, params, 0.5))
    with pytest.raises(ValueError, match=r"times are of another function: this one has no 0/up\[1\]"):
        Times.from_json(times.to_json(), trace(layers, three(6, 4), x))
    with pytest.raises(ValueError, match=r"Times.from_json reads what Times.to_json wrote, .* whole, .*; got '\{\}'"):
        Times.from_json("{}", graph)
    with pytest.raises(ValueError, match="repeats is a whole number, at least 1, not 0"):
        measure_times(graph, params, x, repeats=0)
    assert "ms on" in repr(times)
    assert "dropped" in str(times)


def test_layers_of_a_scan_take_the_same_each():
    x, scales = normal(7, 4), Scales()
    graph = trace(scanned, STACKED, x)
    (group,) = graph.groups
    times = measure_times(graph, STACKED, x, options=2, repeats=1, timer=scales)
    assert scales.calls == [200, 200 - 4 * 40, 200 - 4 * 24, 200 - 2 * 48]  # 6 channels to 1 and 3, half of the layers
    assert times.widths == {group.name: {1: 50.0, 3: 114.0, 6: 210.0}}
    assert times.blocks == {"layers": 162.0}
    # Of two layers less, a narrower one saves half of what it saves of four.
    for gone, k in ((1, 0.0), (2, 0.5), (3, 5 / 6)):
        layers_left = select_blocks(graph, STACKED, gone, lambda fn, params: jnp.sum(fn(params, x)))
        plan = combine(select_channels(graph, STACKED, k), layers_left)
        assert times(plan) == pytest.approx(10 + count_parameters(graph, plan), rel=1e-6)
        assert check_times(times, plan, STACKED, x, timer=scales, repeats=1).error == pytest.approx(0.0)
    again = Times.from_json(times.to_json(), graph)
    assert again.blocks == times.blocks
    assert "1 layer dropped" in str(times)
    # So an allocation by them is that by parameters.
    prices = {group.name: {width: float(6 - width) ** 2 for width in range(1, 7)}}
    blocks = {f"layers[{n}]": 3.0 * n for n in range(4)}
    for budget in (40, 90, 150):
        found = allocate_widths(graph, prices, budget, cost=times, blocks=blocks)
        cost = functools.partial(count_parameters, graph)
        assert found.price == pytest.approx(allocate_widths(graph, prices, budget - 10, cost=cost, blocks=blocks).price)
        assert times(plan_for(graph, STACKED, found)) == found.costs[0] <= budget


def test_two_scans_and_a_branch_between_them():
    def step(x: Any, layer: Any) -> Any:
        return x + jnp.tanh(x @ layer["up"]) @ layer["down"], None

    def fn(params: Any, x: Any) -> Any:
        x = jax.lax.scan(step, x, params["a"])[0]
        x = x + jnp.tanh(x @ params["mid"]["up"]) @ params["mid"]["down"]
        return jax.lax.scan(step, x, params["b"])[0]

    params = {name: {"up": normal(*n, 4, m), "down": normal(*n, m, 4)} for name, n, m in (("a", (4,), 6), ("mid", (), 9), ("b", (3,), 8))}  # fmt: skip
    x = normal(7, 4)
    graph = trace(fn, params, x)
    times = measure_times(graph, params, x, options=2, repeats=1, timer=Scales())
    assert times.blocks == {"a": times.whole - 48, "mid": times.whole - 72, "b": times.whole - 64}
    seen = set()
    for n, k in ((1, 0.0), (2, 0.5), (3, 0.25), (4, 0.75)):
        gone = select_blocks(graph, params, n, lambda fn, params, n=n: jnp.sum(jnp.sin(n + fn(params, x))))
        plan = combine(select_channels(graph, params, k), gone)
        assert times(plan) == pytest.approx(10 + count_parameters(graph, plan), rel=1e-6)
        seen |= {"mid"} if gone.dropped else set()
        seen |= {path.split("/")[0] for path in gone.kept}
    assert seen >= {"a", "b"}


def test_plans_of_several_budgets():
    params, x = three(8, 8, 6), normal(7, 4)
    graph = trace(layers, params, x)
    times = measure_times(graph, params, x, repeats=1, timer=Scales())
    prices = {name: {width: float(n + 1) / width for width in (1, 2, 4, max(table))} for n, (name, table) in enumerate(times.widths.items())}  # fmt: skip
    found = allocate_widths(graph, prices, [110, 1e9, 90], cost=[times, functools.partial(count_macs, graph), functools.partial(count_parameters, graph)])  # fmt: skip
    plan = plan_for(graph, params, found)
    assert found.costs == (times(plan), count_macs(graph, plan), count_parameters(graph, plan))
    assert found.costs[0] <= 110
    assert found.costs[2] <= 90
