"""Structures of groups, and channels that are ranked among groups of one structure."""

import collections
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.structured import count_macs, select_channels_globally, trace
from jaxprune.structured._structures import structures
from tests.support.structured_zoo import normal


def test_structures_know_neither_sizes_nor_layouts():
    def fn(params: Any, x: Any) -> Any:
        for p in params:
            up = p["up"].T if p["up"].shape[1] == 4 else p["up"]
            x = x + jnp.tanh(x @ up) @ p["down"]
        return jax.lax.conv(x[:, :, None], params[2]["k"], (1,), "SAME")[:, :, 0]

    params = [{"up": normal(4, 6), "down": normal(6, 4)}, {"up": normal(5, 4), "down": normal(5, 4)}]
    params = [*params, {"up": normal(4, 7), "down": normal(7, 4), "k": normal(3, 4, 1)}]
    found = structures(trace(fn, params, normal(3, 4)))
    assert len({found[name] for name in ("0/up[1]", "1/up[0]", "2/up[1]")}) == 1


def test_isomorphic_takes_the_same_share_of_each_structure():
    # Two blocks of heads and a perceptron each, the heads' weights a hundred times as small in relation to their mean's spread.
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)  # noqa: E731

    def fn(params: Any, x: Any) -> Any:
        for p in params:
            x = x + jnp.einsum("the,hed->td", jnp.tanh(jnp.einsum("td,dhe->the", x, p["v"])), p["o"])
            x = x + jnp.tanh(x @ p["up"] + p["b"][None]) @ p["down"]
        return x

    params = [
        {"v": draw(6, 8, 2), "o": draw(8, 2, 6), "up": draw(6, size), "b": draw(size), "down": draw(size, 6)}
        for size in (12, 20)
    ]
    graph = trace(fn, params, jnp.ones((5, 6)))
    heads = [group.name for group in graph.groups if group.size == 8 and not group.outer]
    hidden = [group.name for group in graph.groups if group.size in (12, 20)]
    found = structures(graph)
    assert len({found[name] for name in heads}) == len({found[name] for name in hidden}) == 1
    assert found[heads[0]] != found[hidden[0]]
    plan = select_channels_globally(graph, params, 0.5 * count_macs(graph), isomorphic=True)
    kept = {name: np.shape(plan.kept[path][axis])[-1] for name, path, axis in _own(heads + hidden) if path in plan.kept}
    gone = [16 - sum(kept[name] for name in heads), 32 - sum(kept[name] for name in hidden)]
    # The same share of both, up to one channel; within a class, wherever channels weigh least beside their group's mean.
    assert abs(gone[0] / 14 - gone[1] / 30) <= 1 / 14
    norms = {name: _norms(params, name) for name in heads + hidden}
    for names, number in ((heads, gone[0]), (hidden, gone[1])):
        every = sorted((value, name) for name in names for value in np.sort(norms[name] / norms[name].mean())[:-1])
        expected = collections.Counter(name for _, name in every[:number])
        assert {name: graph.group(name).size - kept[name] for name in names} == {name: expected[name] for name in names}
    assert count_macs(graph, plan) <= 0.5 * count_macs(graph)


def _own(names: list[str]) -> list[tuple[str, str, int]]:
    return [(name, name[:-3], int(name[-2])) for name in names]


def _norms(params: Any, name: str) -> np.ndarray:
    layer = {key: np.asarray(leaf, np.float64) for key, leaf in params[int(name[0])].items()}
    if "up" in name:
        return np.sqrt(np.square(layer["up"]).sum(0) + np.square(layer["b"]) + np.square(layer["down"]).sum(1))
    return np.sqrt(np.square(layer["v"]).sum((0, 2)) + np.square(layer["o"]).sum((1, 2)))
