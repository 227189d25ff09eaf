"""What readers lose with each channel, after least squares: against numpy's, subset by subset."""

import functools
import itertools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune._tree._paths import flatten
from jaxprune.structured import (
    Plan,
    UnrepairedWarning,
    combine,
    count_macs,
    rebuild,
    repair,
    select_channels,
    select_channels_globally,
    shrink,
    trace,
)
from jaxprune.structured._losses import removal_order
from tests.support.structured_cases import CASES
from tests.support.structured_zoo import normal

RIDGE = 0.01


def loss(x: np.ndarray, w: np.ndarray, kept: np.ndarray) -> float:
    """Half of the least ``|X V - X W|^2`` over V with the kept rows, and of the ridge, by numpy's least squares."""
    weight = np.sqrt(RIDGE * np.square(x).sum(0).mean())
    data = np.concatenate([x, weight * np.eye(x.shape[1])])
    v = np.linalg.lstsq(data[:, kept], data @ w)[0]
    return float(np.square(data[:, kept] @ v - data @ w).sum()) / 2


def whole(x: np.ndarray, w: np.ndarray) -> float:
    return float(np.square(x @ w).sum()) / 2


def greedy(readers: list[tuple[np.ndarray, np.ndarray, int]], size: int, number: int) -> tuple[list[int], list[float]]:
    """The channels that go when each time the subset of least loss is taken; readers have so many rows a channel."""
    gone: list[int] = []
    losses = [0.0]
    for _ in range(number):
        found = {}
        for channel in set(range(size)) - set(gone):
            stays = ~np.isin(np.arange(size), [*gone, channel])
            found[channel] = sum(loss(x, w, np.flatnonzero(np.repeat(stays, k))) for x, w, k in readers)
        gone.append(min(found, key=found.__getitem__))
        losses.append(found[gone[-1]])
    return gone, list(np.diff(losses))


def hidden(x: Any, up: Any) -> np.ndarray:
    return np.tanh(np.asarray(x, np.float64) @ np.asarray(up, np.float64))


def two_readers(params: Any, x: Any) -> Any:
    h = jnp.tanh(x @ params["up"])
    return h @ params["left"], jnp.square(h) @ params["right"]


def test_greedy_choices_are_those_of_least_squares_at_each_step():
    params = {"up": normal(4, 6), "left": normal(6, 3), "right": normal(6, 2)}
    x = normal(40, 4)
    (group,), grams = trace(two_readers, params, x).groups, jaxprune.calibrate_grams(two_readers, params, [x])
    h = hidden(x, params["up"])
    readers = [(h, np.asarray(params["left"]), 1), (h**2, np.asarray(params["right"]), 1)]
    gone, losses = greedy(readers, 6, 5)
    order, rises, computed = removal_order(group, params, grams, 5)
    assert order.tolist() == gone
    np.testing.assert_allclose(rises, losses, rtol=1e-4)
    np.testing.assert_allclose(computed, sum(whole(x, w) for x, w, _ in readers), rtol=1e-4)
    # The first one is the best of all; the greedy two are no better than the best two.
    pairs = {pair: sum(loss(x, w, np.setdiff1d(range(6), pair)) for x, w, _ in readers) for pair in itertools.combinations(range(6), 2)}  # fmt: skip
    assert min(pairs.values()) <= sum(losses[:2]) * (1 + 1e-9)


def test_channels_of_several_rows_go_as_blocks():
    params = {"up": normal(4, 5, 3), "down": normal(5, 3, 2)}

    def fn(params: Any, x: Any) -> Any:
        h = jnp.tanh(jnp.einsum("ti,ihd->thd", x, params["up"]))
        h = h / (1 + jnp.sqrt(jnp.square(h).sum(-1, keepdims=True)))  # of a head its dimensions belong together
        return jnp.einsum("thd,hdo->to", h, params["down"])

    x = normal(60, 4)
    graph, grams = trace(fn, params, x), jaxprune.calibrate_grams(fn, params, [x])
    heads = graph.group("up[1]")
    h = hidden(x, params["up"].reshape(4, 15)).reshape(60, 5, 3)
    h = (h / (1 + np.sqrt(np.square(h).sum(-1, keepdims=True)))).reshape(60, 15)
    down = np.asarray(params["down"]).reshape(15, 2)
    gone, losses = greedy([(h, down, 3)], 5, 4)
    order, rises, _ = removal_order(heads, params, grams, 4)
    assert order.tolist() == gone
    np.testing.assert_allclose(rises, losses, rtol=1e-4)
    plan = select_channels(graph, params, 0.4, grams=grams)
    assert plan.kept["down"] == {0: tuple(sorted(set(range(5)) - set(gone[:2])))}


@pytest.mark.slow
def test_updates_that_wait_for_each_other():
    params = {"up": normal(16, 90), "left": normal(90, 3), "right": normal(90, 2)}
    x = normal(400, 16)
    (group,), grams = trace(two_readers, params, x).groups, jaxprune.calibrate_grams(two_readers, params, [x])
    order, rises, _ = removal_order(group, params, grams, 80)
    h = hidden(x, params["up"])
    for number in (1, 63, 64, 65, 80):
        stays = np.setdiff1d(np.arange(90), order[:number])
        left, right = (loss(h**n, np.asarray(params[name]), stays) for n, name in ((1, "left"), (2, "right")))
        np.testing.assert_allclose(rises[:number].sum(), left + right, rtol=1e-3)


def test_layers_of_a_stack_lose_together():
    params = {"up": normal(4, 6), "down": normal(3, 6, 2)}

    def fn(params: Any, x: Any) -> Any:
        h = jnp.tanh(x @ params["up"])
        return jax.lax.scan(lambda c, w: (c, jnp.tanh(c * h) @ w), 0.5, params["down"])[1]

    x = normal(40, 4)
    graph, grams = trace(fn, params, x), jaxprune.calibrate_grams(fn, params, [x])
    h = np.tanh(0.5 * hidden(x, params["up"]))
    gone, _ = greedy([(h, np.asarray(w), 1) for w in params["down"]], 6, 3)
    assert removal_order(graph.group("up[1]"), params, grams, 3).order.tolist() == gone


def tied(params: Any, tokens: Any) -> Any:
    h = params["embed"][tokens]
    h = h + jnp.tanh(h @ params["up"]) @ params["down"]
    return h @ params["embed"].T


def test_weights_that_repair_leaves_alone_are_counted_as_they_are():
    params = {"embed": normal(13, 8), "up": 0.1 * normal(8, 6), "down": normal(6, 8)}
    tokens = jnp.arange(13 * 5) % 13
    graph, grams = trace(tied, params, tokens), jaxprune.calibrate_grams(tied, params, [tokens])
    group = next(group for group in graph.groups if group.size == 8)
    e, up, down = (np.asarray(params[name], np.float64) for name in ("embed", "up", "down"))
    before = e[tokens]
    after = before + np.tanh(before @ up) @ down

    def total(gone: list[int]) -> float:
        stays = np.setdiff1d(np.arange(8), gone)
        return loss(before, up, stays) + float(np.square(after[:, gone] @ e.T[gone]).sum()) / 2

    order, rises, _ = removal_order(group, params, grams, 4)
    for n in range(4):
        earlier, left = order[:n].tolist(), sorted(set(range(8)) - set(order[:n].tolist()))
        assert order[n] == min(left, key=lambda channel: total([*earlier, channel]))
        np.testing.assert_allclose(rises[: n + 1].sum(), total(order[: n + 1].tolist()), rtol=1e-4)
    assert select_channels(graph, params, {group.name: 0.5}, grams=grams).to_repair == ("up",)


def test_a_choice_that_counts_on_repair_says_so():
    params = {"up": normal(4, 6), "left": normal(6, 3), "right": normal(6, 2)}
    x = normal(40, 4)
    graph, grams = trace(two_readers, params, x), jaxprune.calibrate_grams(two_readers, params, [x])
    plan = select_channels(graph, params, 0.5, grams=grams)
    assert plan.to_repair == ("left", "right")
    assert repr(plan).endswith("; counts on repair of left, right>")
    assert Plan.from_json(plan.to_json()) == plan
    assert combine(Plan({}, plan.shapes), plan).to_repair == ("left", "right")
    assert combine(Plan({}, plan.shapes, dropped=("left",)), plan).to_repair == ("right",)
    assert select_channels(graph, params, 0.5).to_repair == ()
    with pytest.warns(
        UnrepairedWarning, match=r"cut repair\(plan, params, grams\), not params. Not repaired: left, right"
    ):
        shrink(plan, params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shrink(plan, repair(plan, params, grams))
        shrink(plan, {"mu": params})  # moments are not repaired
        shrink(plan, jax.eval_shape(lambda: params))
        jax.jit(functools.partial(shrink, plan))(params)
    with pytest.raises(ValueError, match="counts on up to be repaired, of which it cuts nothing"):
        Plan({}, {"up": (2, 2)}, to_repair=("up",))


def test_what_has_no_gram_matrix_is_said_by_group_and_reader():
    params = {"up": normal(4, 6), "left": normal(6, 3), "right": normal(6, 2)}
    x = normal(40, 4)
    graph = trace(two_readers, params, x)
    grams = jaxprune.calibrate_grams(two_readers, params, [x], where=lambda site: site.path != "right")
    with pytest.raises(ValueError, match=r"up\[1\] is read by right, .* has no Gram matrix; it has those of up, left"):
        select_channels(graph, params, 0.5, grams=grams)
    with pytest.raises(ValueError, match="give grams, or scores and importance, not both"):
        select_channels(graph, params, 0.5, grams=grams, scores=params)
    with pytest.raises(ValueError, match=r"params\['up'\] had shape"):
        select_channels(graph, params, 0.5, grams=jaxprune.calibrate_grams(lambda p, x: x @ p["up"], {"up": normal(4, 5)}, [x]))  # fmt: skip
    products = {"query": normal(4, 6), "key": normal(4, 6)}
    attend = lambda p, x: (x @ p["query"]) @ (x @ p["key"]).T  # noqa: E731
    with pytest.raises(ValueError, match=r"No parameter sums over the channels of key\[1\]"):
        select_channels(
            trace(attend, products, x), products, 0.5, grams=jaxprune.calibrate_grams(attend, products, [x])
        )


def error(graph: Any, plan: Plan, params: Any, grams: Any, x: Any, expected: Any) -> float:
    found = rebuild(graph, plan)(shrink(plan, repair(plan, params, grams)), x)
    return float(jnp.square(found - expected).sum() / jnp.square(expected).sum())


@pytest.mark.slow
def test_less_is_lost_than_by_norms_and_by_wanda():
    case = CASES["transformer"]()
    graph = trace(case.fn, case.params, *case.inputs)
    x = jax.random.randint(jax.random.key(0), (64, *case.inputs[0].shape[1:]), 0, 7)
    grams = jaxprune.calibrate_grams(case.fn, case.params, [x])
    expected = jax.jit(case.fn)(case.params, x)
    by_path = flatten(jaxprune.scores.wanda(case.params, grams.norms()), "scores").by_path
    readers = {path: scores for path, scores in by_path.items() if path.endswith("Dense_1/kernel")}
    ways: dict[str, dict[str, Any]] = {"lost": {"grams": grams}, "norm": {}, "wanda": {"scores": readers}}
    errors = {
        way: error(
            graph,
            select_channels(graph, case.params, {"_Transformer_*/Dense_0": 0.5}, **told),
            case.params,
            grams,
            x,
            expected,
        )
        for way, told in ways.items()
    }
    assert errors["lost"] < 0.6 * min(errors["norm"], errors["wanda"])


def test_layers_whose_channels_say_the_same_are_cut_first():
    """The second layer has four channels twice: norms see nothing of it, and least squares makes up for them."""
    few = normal(12, 4)
    params = {"one": normal(6, 12), "two": jnp.concatenate([few, few], 1), "three": normal(8, 3)}

    def fn(params: Any, x: Any) -> Any:
        return jnp.tanh(jnp.tanh(x @ params["one"]) @ params["two"]) @ params["three"]

    x = normal(100, 6)
    graph, grams = trace(fn, params, x), jaxprune.calibrate_grams(fn, params, [x])
    budget = count_macs(graph) - 100 * 4 * (12 + 3)
    plan = select_channels_globally(graph, params, budget, grams=grams)
    assert "one" not in plan.kept
    assert sorted(i % 4 for i in plan.kept["three"][0]) == [0, 1, 2, 3]
    assert plan.to_repair == ("three",)
    assert error(graph, plan, params, grams, x, fn(params, x)) < 1e-3
