"""What a function costs, counted from its jaxpr, before and after channels and layers are cut."""

import math
from collections.abc import Sequence

import numpy as np

from jaxprune.structured._axes._dims import Var, kept_size
from jaxprune.structured._axes._program import Program
from jaxprune.structured._graph import Graph
from jaxprune.structured._plan import Plan, shallower, solve


def count_parameters(graph: Graph, plan: Plan | None = None) -> int:
    """Count the parameters that stay; without a plan, all of them.

    >>> import jax.numpy as jnp
    >>> from jaxprune.structured import trace
    >>> params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
    >>> graph = trace(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], params, jnp.ones((5, 3)))
    >>> plan = Plan({"up": {1: (0, 1)}, "down": {0: (0, 1)}}, {"up": (3, 8), "down": (8, 2)})
    >>> count_parameters(graph), count_parameters(graph, plan)
    (40, 10)
    """
    return _count(graph, plan, [1] * len(graph.paths))


def count_bytes(graph: Graph, plan: Plan | None = None) -> int:
    """Count the bytes of the parameters that stay, in their dtypes: what a file holds of them, its header aside.

    >>> import jax.numpy as jnp
    >>> from jaxprune.structured import trace
    >>> params = {"up": jnp.ones((3, 8), jnp.bfloat16), "down": jnp.ones((8, 2), jnp.bfloat16)}
    >>> graph = trace(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], params, jnp.ones((5, 3), jnp.bfloat16))
    >>> count_bytes(graph)
    80
    """
    return _count(graph, plan, [np.dtype(value.dtype).itemsize for value in graph.params])


def count_macs(graph: Graph, plan: Plan | None = None) -> int:
    """Count the multiply-accumulates of contractions and convolutions in one call at the traced shapes.

    A scan counts as often as it steps, a while loop as one step, a conditional as its dearest branch; attention's
    products of data with data count too. What has no rule (a fused kernel) counts nothing.

    >>> import jax.numpy as jnp
    >>> from jaxprune.structured import trace
    >>> params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
    >>> graph = trace(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], params, jnp.ones((5, 3)))
    >>> count_macs(graph)  # 5 (3 x 8 + 8 x 2)
    200
    """
    return _macs((graph if plan is None else shallower(graph, plan)).program, _sizes(graph, plan))


def _count(graph: Graph, plan: Plan | None, weights: Sequence[int]) -> int:
    """Count elements of the parameters that stay, each as much as an element of its parameter counts."""
    sizes = _sizes(graph, plan)
    dropped = () if plan is None else plan.dropped
    return sum(
        weight * math.prod(kept_size(dim, sizes) for dim in value.dims)
        for path, value, weight in zip(graph.paths, graph.params, weights, strict=True)
        if path not in dropped
    )


def _sizes(graph: Graph, plan: Plan | None) -> dict[Var, int]:
    return {} if plan is None else {var: kept.shape[-1] for var, kept in solve(graph, plan).items()}


def _macs(program: Program, sizes: dict[Var, int]) -> int:
    total = 0
    for node in program.nodes:
        if node.notes.macs is not None:
            total += math.prod(kept_size(dim, sizes) for dim in node.notes.macs)
        bodies = [_macs(body, sizes) for body in node.bodies]
        if node.name == "cond":
            total += max(bodies)
        elif node.notes.steps is not None:
            total += kept_size(node.notes.steps, sizes) * bodies[0]
        else:
            total += sum(bodies)
    return total
