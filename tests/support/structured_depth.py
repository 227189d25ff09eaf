"""Functions with layers and branches to drop, and what the tests of dropping them share."""

import functools
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.structured import Graph, Plan, masked, trace
from jaxprune.structured._plan import plan_of
from tests.support.structured_cases import CASES
from tests.support.structured_zoo import Case, normal


@functools.cache
def traced(name: str) -> tuple[Case, Graph]:
    case = CASES[name]()
    return case, trace(case.fn, case.params, *case.inputs, prunable_outputs=case.outputs)


@functools.cache
def masked_function(name: str) -> Any:
    return masked(traced(name)[1])


def dropping(graph: Graph, names: Collection[str], kept: dict[str, tuple[int, ...]] | None = None) -> Plan:
    """The plan that drops branches by name, and keeps some of scanned layers."""
    blocks = {block.name: block for block in graph.blocks}
    stays = {blocks[name].place: np.asarray(layers) for name, layers in (kept or {}).items()}
    return plan_of(graph, stays, [blocks[name] for name in names])


def one_each(graph: Graph) -> list[Plan]:
    """For each block the plan that drops it, or its middle layer."""
    return [
        dropping(graph, (), {b.name: tuple(i for i in range(b.size) if i != b.size // 2)}) if b.members else dropping(graph, (b.name,))
        for b in graph.blocks
    ]  # fmt: skip


def close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())


def mlp() -> tuple[Any, dict[str, Any], jax.Array]:
    """Two branches, the second one with a branch inside."""
    params = {
        "in": normal(3, 4),
        "f": {"up": normal(4, 8) / 2, "bias": normal(8), "down": normal(8, 4) / 3},
        "g": {"kernel": normal(4, 4) / 2, "adapter": {"a": normal(4, 2), "b": normal(2, 4)}},
    }
    return functools.partial(mlp_without, ()), params, normal(5, 3)


def mlp_without(dropped: Collection[str], params: Any, x: Any) -> Any:
    x = x @ params["in"]
    if "f" not in dropped:
        x = x + jnp.tanh(x @ params["f"]["up"] + params["f"]["bias"][None]) @ params["f"]["down"]
    if "g" not in dropped:
        h = jax.nn.gelu(x @ params["g"]["kernel"])
        if "g/adapter" not in dropped:
            h = h + jnp.sin(h @ params["g"]["adapter"]["a"]) @ params["g"]["adapter"]["b"]
        x = x + h
    return x


def residual(w: Any, x: Any) -> Any:
    return x + jnp.tanh(x @ w)


STACK = {"in": normal(3, 4), "layers": normal(4, 4, 4) / 2, "out": normal(4, 2)}


def stack(params: Any, x: Any, **options: Any) -> Any:
    x = x @ params["in"]
    x, _ = lax.scan(lambda x, w: (residual(w, x), None), x, params["layers"], **options)
    return x @ params["out"]
