"""Compare a module that was made anew at smaller sizes with the rebuilt function."""

from collections.abc import Callable
from typing import Any

from jaxprune._tree._paths import flatten
from jaxprune.structured._graph import Graph
from jaxprune.structured._plan import Plan
from jaxprune.structured._rebuild import at_shapes, rebuild
from jaxprune.structured._rounding import tolerances
from jaxprune.structured._shrink import cut_inputs, cut_out
from jaxprune.structured._verify import OutputError, Verification, difference, numbers, of_outputs


def verify_module(
    graph: Graph,
    plan: Plan,
    fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    tolerance: float | None = None,
) -> Verification:
    """Run a module of the sizes that `recover` found beside the rebuilt function, and compare every output.

    Equal shapes are not yet equal functions. The rebuilt function is that of ``counts="rescaled"``, whose normalisation
    layers divide by the number of channels that stay, as the module does. Known to differ: attention of which heads'
    *dimensions* were cut, since a smaller module divides its scores by the square root of those that stay, the rebuilt
    function by that of those there were (cutting whole heads changes nothing of it); and whatever else the module
    computes from a size alone, as the groups of a normalisation layer.

    Args:
        graph: the original function, by `trace`.
        plan: the channels that stay.
        fn: the module's function, ``fn(small_params, *inputs)``.
        params: the parameters before they are cut.
        *inputs: the function's other arguments; caches before they are cut.
        tolerance: the largest difference that passes, relative to the largest magnitude of an output; measured when None,
            as in `verify`.

    Returns:
        The differences by output; infinite where shapes differ, or where only one of the two is finite.

    Raises:
        ValueError: the outputs of the two have other paths; the plan does not fit. What `fn` raises is passed on.

    >>> import jax.numpy as jnp
    >>> from jaxprune.structured import trace
    >>> def fn(params, x):
    ...     return (x @ params["up"]) @ params["down"]
    >>> params = {"up": jnp.array([[1.0, 2.0, 3.0]]), "down": jnp.array([[1.0], [1.0], [1.0]])}
    >>> graph = trace(fn, params, jnp.ones((2, 1)))
    >>> plan = Plan({"up": {1: (0, 2)}, "down": {0: (0, 2)}}, {"up": (1, 3), "down": (3, 1)})
    >>> verify_module(graph, plan, fn, params, jnp.ones((2, 1))).outputs
    (OutputError(path='', difference=0.0, tolerance=1e-05, zeroed=None),)
    """
    small, inputs = cut_out(plan, params), cut_inputs(at_shapes(graph, inputs), plan, inputs)
    rebuilt = rebuild(graph, plan, counts="rescaled")
    expected = flatten(rebuilt(small, *inputs), "the rebuilt function's outputs")
    found = flatten(fn(small, *inputs), "the module's outputs")
    leaves = expected.aligned(found)
    pairs = [(numbers(a), numbers(b)) for a, b in zip(leaves, expected.leaves, strict=True)]
    errors = [difference(a, b) if a.shape == b.shape else float("inf") for a, b in pairs]
    allowed = (
        dict.fromkeys(expected.paths, tolerance)
        if tolerance is not None
        else tolerances(lambda params: rebuilt(params, *inputs), small, graph.program, of_outputs)
    )
    outputs = tuple(OutputError(path, error, allowed[path]) for path, error in zip(expected.paths, errors, strict=True))
    return Verification("The module", "the rebuilt function", outputs)
