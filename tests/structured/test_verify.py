"""What `verify` takes for rounding, and what it does not."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.structured import Graph, select_channels, trace, verify, verify_module
from jaxprune.structured._axes import _reasons
from jaxprune.structured._axes._dims import leaves
from jaxprune.structured._groups import find_groups, find_members
from jaxprune.structured._rounding import tolerances
from jaxprune.structured._verify import of_outputs
from tests.support.structured_zoo import normal


def perceptron(depth: int, width: int, dtype: Any, gain: float = 1.0, flipped: int | None = None) -> Any:
    """A function of so many hidden layers, one of which may turn its channels around; its parameters and an input."""
    sizes = [8, *[width] * depth, 4]
    params = {
        f"{i:02}": (gain * normal(a, b, salt=i) / a**0.5).astype(dtype)
        for i, (a, b) in enumerate(itertools.pairwise(sizes))
    }

    def fn(params: Any, x: Any) -> Any:
        *hidden, out = params.values()
        for i, w in enumerate(hidden):
            x = jnp.tanh(x @ w)
            x = x[:, ::-1] if i == flipped else x
        return x @ out

    return fn, params, normal(16, 8).astype(dtype)


def forgetful(graph: Graph) -> Graph:
    """The graph of a reader that takes reversed channels for free ones: what is cut of them is cut at the wrong place."""
    for value in graph.params:
        for leaf in (leaf for dim in value.dims for leaf in leaves(dim)):
            leaf.reason = None if leaf.reason == _reasons.REVERSED else leaf.reason
    members = find_members(graph.paths, graph.program)
    return dataclasses.replace(graph, groups=find_groups(graph.paths, graph.program, members))


# depth, width, dtype, gain: in the deep ones rounding grows from layer to layer
NETWORKS = [
    pytest.param(2, 128, jnp.bfloat16, 1.0, id="bfloat16"),
    pytest.param(2, 128, jnp.float16, 1.0, id="float16"),
    pytest.param(30, 128, jnp.float32, 2.0, id="deep float32", marks=pytest.mark.slow),
    pytest.param(30, 128, jnp.bfloat16, 1.0, id="deep bfloat16", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("depth", "width", "dtype", "gain"), NETWORKS)
def test_rounding_passes_and_a_wrong_cut_does_not(depth: int, width: int, dtype: Any, gain: float) -> None:
    fn, params, x = perceptron(depth, width, dtype, gain)
    graph = trace(fn, params, x)
    result = verify(graph, select_channels(graph, params, 0.3), params, x)
    assert result
    fn, params, x = perceptron(depth, width, dtype, gain, flipped=depth // 2)
    graph = trace(fn, params, x)
    honest = len(graph.groups)
    graph = forgetful(graph)
    assert len(graph.groups) > honest
    wrong = verify(graph, select_channels(graph, params, 0.3), params, x)
    assert not wrong
    assert "does NOT equal" in str(wrong)
    (output,) = wrong.outputs
    assert output.difference > 1.2 * output.tolerance


@pytest.mark.parametrize(("depth", "width", "dtype", "gain"), NETWORKS)
def test_the_tolerance_is_of_the_size_of_the_rounding(depth: int, width: int, dtype: Any, gain: float) -> None:
    """Beside the same function of the same numbers in NumPy's double precision."""
    fn, params, x = perceptron(depth, width, dtype, gain)
    precise = np.asarray(x, np.float64)
    *hidden, out = (np.asarray(w, np.float64) for w in params.values())
    for w in hidden:
        precise = np.tanh(precise @ w)
    precise = precise @ out
    error = np.abs(np.asarray(fn(params, x), np.float64) - precise).max() / np.abs(precise).max()
    program = trace(fn, params, x).program
    (tolerance,) = tolerances(jax.jit(lambda params: fn(params, x)), params, program, of_outputs).values()
    assert error < tolerance < 30 * error


def test_a_module_is_held_to_the_same() -> None:
    fn, params, x = perceptron(2, 24, jnp.bfloat16)
    graph = trace(fn, params, x)
    plan = select_channels(graph, params, 0.5)
    assert verify_module(graph, plan, fn, params, x)
    softer = lambda params, x: 0.95 * fn(params, x)  # noqa: E731
    result = verify_module(graph, plan, softer, params, x)
    assert not result
    assert 0.04 < result.outputs[0].difference < 0.06
    assert 2**-6 <= result.outputs[0].tolerance < 0.04
    assert not verify_module(graph, plan, softer, params, x, tolerance=1e-5)
    assert verify_module(graph, plan, softer, params, x, tolerance=0.06)


def test_the_coarsest_dtype_counts_and_nothing_passes_for_all() -> None:
    params = {"a": normal(3, 8), "b": normal(8, 2)}

    def mixed(params: Any, x: Any) -> Any:
        h = jax.jit(lambda x, w: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16))(x, params["a"])
        return {"y": h.astype(jnp.float32) @ params["b"], "which": jnp.argmax(h, 1), "nothing": jnp.zeros((0,))}

    x = normal(4, 3)
    program = trace(mixed, params, x).program
    found = tolerances(jax.jit(lambda params: mixed(params, x)), params, program, of_outputs)
    assert 2**-6 <= found["y"] < 0.2
    assert found["nothing"] == 2**-6
    # What jumps as far as it can is never let pass as a whole.
    steep = lambda params: jnp.sign(jnp.sin(1e9 * params["a"] @ params["b"]))  # noqa: E731
    assert tolerances(jax.jit(steep), params, program, of_outputs)[""] == 0.5
    plain = trace(lambda p, x: x @ p["a"] @ p["b"], params, x).program
    assert tolerances(jax.jit(lambda params: x @ params["a"] @ params["b"]), params, plain, of_outputs)[""] == 1e-5
