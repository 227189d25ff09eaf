"""What Torch-Pruning cuts from a perceptron, in NumPy, and what select_channels cuts."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import structured


def draw(hidden: int) -> dict[str, Any]:
    rng = np.random.default_rng(hidden)
    shapes = {"up": {"kernel": (6, hidden), "bias": (hidden,)}, "down": {"kernel": (hidden, 4), "bias": (4,)}}
    return jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def fn(p: Any, x: jax.Array) -> jax.Array:
    hidden = jax.nn.relu(x @ p["up"]["kernel"] + p["up"]["bias"][None])
    return hidden @ p["down"]["kernel"] + p["down"]["bias"][None]


def without_biases(params: Any, power: int) -> Any:
    """What the page writes: the powers that their group importance sums, of kernels alone."""
    return {name: {"kernel": np.abs(leaf["kernel"]) ** power, "bias": None} for name, leaf in params.items()}


def theirs(params: Any, ratio: float, power: int = 2) -> tuple[int, ...]:
    """Sum |w|^p over the rows that compute a channel and the columns that read it; int(n (1 - ratio)) stay."""
    up, down = params["up"]["kernel"], params["down"]["kernel"]
    importance = (np.abs(up) ** power).sum(0) + (np.abs(down) ** power).sum(1)
    stay = int(len(importance) * (1 - ratio))
    return tuple(sorted(np.argsort(importance, kind="stable")[len(importance) - stay :].tolist()))


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize(("hidden", "ratio"), [(10, 0.5), (10, 0.3), (16, 0.25), (24, 0.75)])
def test_the_same_channels(hidden: int, ratio: float, power: int) -> None:
    params = draw(hidden)
    graph = structured.trace(fn, params, np.ones((2, 6), np.float32))
    plan = structured.select_channels(graph, params, ratio, scores=without_biases(params, power))
    assert plan.kept["up/kernel"][1] == theirs(params, ratio, power)


def test_a_part_of_a_channel_goes_there_and_is_rounded_here() -> None:
    params = draw(7)
    graph = structured.trace(fn, params, np.ones((2, 6), np.float32))
    plan = structured.select_channels(graph, params, 0.3, scores=without_biases(params, 2))
    assert (len(plan.kept["up/kernel"][1]), len(theirs(params, 0.3))) == (5, 4)


@pytest.mark.parametrize(("ratio", "here"), [(0.4, 16), (0.5, 16), (0.75, 8)])
def test_round_to_is_to_the_nearest_multiple_here(ratio: float, here: int) -> None:
    """There it is down: 14, 12 and 6 of 24 become 8, 8 and 0, which is then not cut at all."""
    params = draw(24)
    graph = structured.trace(fn, params, np.ones((2, 6), np.float32))
    plan = structured.select_channels(graph, params, ratio, round_to=8)
    assert structured.shrink(plan, params)["up"]["kernel"].shape == (6, here)


def test_the_default_here_counts_biases_as_well() -> None:
    params = draw(4)
    params["up"]["bias"] = jnp.array([0.0, 0.0, 0.0, 99.0])
    params["up"]["kernel"] = np.ones((6, 4), np.float32) * np.array([4, 3, 2, 1], np.float32)
    params["down"]["kernel"] = np.ones((4, 4), np.float32)
    graph = structured.trace(fn, params, np.ones((2, 6), np.float32))
    assert structured.select_channels(graph, params, 0.5).kept["up/kernel"][1] == (0, 3)
    assert theirs(params, 0.5) == (0, 1)
