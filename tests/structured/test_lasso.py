"""The group lasso: values and gradients by hand, on loops and meshes, and what training with it does."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxprune.structured import Graph, group_lasso, select_channels, trace
from tests.support.structured_cases import CASES
from tests.support.structured_zoo import normal


def mlp(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["up"] + params["bias"][None]) @ params["down"]


def by_hand() -> tuple[Graph, Any]:
    """Two channels, each of three inputs, a bias and two outputs; the second is zero."""
    params = {
        "up": jnp.array([[2.0, 0.0], [-4.0, 0.0], [0.0, 0.0]]),
        "bias": jnp.array([1.0, 0.0]),
        "down": jnp.array([[0.0, 2.0], [0.0, 0.0]]),
    }
    return trace(mlp, params, jnp.ones((5, 3))), params


def oracle(graph: Graph, params: Any) -> float:
    """Channel by channel, weight by weight."""
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf, np.float64)
              for path, leaf in jax.tree_util.tree_leaves_with_path(params)}  # fmt: skip
    total = 0.0
    for group in graph.groups:
        for channel in range(group.size if not group.outer else 0):
            weights = np.concatenate(
                [np.compress(m.channels == channel, leaves[m.path], m.axis).ravel() for m in group.members]
            )
            total += np.sqrt(len(weights)) * np.linalg.norm(weights)
    return total


def test_value_by_hand():
    graph, params = by_hand()
    found = group_lasso(graph, params)
    assert (found.shape, found.dtype) == ((), jnp.float32)
    np.testing.assert_allclose(found, np.sqrt(6) * 5, rtol=1e-6)  # 2, -4, 1, 2 have norm 5; six weights


def test_gradient_by_hand_is_zero_at_a_zero_channel():
    graph, params = by_hand()
    grads = jax.grad(lambda p: group_lasso(graph, p))(params)
    for name in params:
        np.testing.assert_allclose(grads[name], np.sqrt(6) * np.asarray(params[name]) / 5, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cnn_linen", "resnext", "shufflenet", "transformer", "gru"])
def test_every_weight_of_every_member_counts(name: str):
    case = CASES[name]()
    graph = trace(case.fn, case.params, *case.inputs)
    found, grads = jax.jit(jax.value_and_grad(functools.partial(group_lasso, graph)))(case.params)
    np.testing.assert_allclose(found, oracle(graph, case.params), rtol=1e-5)
    eps = 1e-2
    direction = jax.tree.map(lambda leaf: normal(*leaf.shape, salt=1), case.params)
    moved = [oracle(graph, jax.tree.map(lambda p, d, s=s: p + s * eps * d, case.params, direction)) for s in (1, -1)]
    slope = sum(float((g * d).sum()) for g, d in zip(*map(jax.tree.leaves, (grads, direction)), strict=True))
    np.testing.assert_allclose(slope, (moved[0] - moved[1]) / (2 * eps), rtol=1e-2)


def test_sums_are_in_float32_and_nan_shows():
    graph, params = by_hand()
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    np.testing.assert_allclose(group_lasso(graph, low), np.sqrt(6) * 5, rtol=1e-6)
    assert jax.grad(lambda p: group_lasso(graph, p))(low)["up"].dtype == jnp.bfloat16
    assert np.isnan(group_lasso(graph, {**params, "bias": jnp.array([jnp.nan, 0.0])}))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_parameters_give_the_same(kind: AxisType):
    params = {"up": normal(6, 24), "bias": normal(24), "down": normal(24, 8)}
    graph = trace(mlp, params, jnp.ones((5, 6)))
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    specs = {"up": PartitionSpec("y", "x"), "bias": PartitionSpec("x"), "down": PartitionSpec("x", "y")}
    sharded = {name: jax.device_put(leaf, NamedSharding(mesh, specs[name])) for name, leaf in params.items()}
    value_and_grad = jax.jit(jax.value_and_grad(functools.partial(group_lasso, graph)))
    expected, found = value_and_grad(params), value_and_grad(sharded)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)


@pytest.mark.slow
def test_training_empties_the_channels_that_are_of_no_use():
    """Three hidden units do the teacher's work; nine of like size do nothing that the labels need."""
    useful = jnp.array([1, 4, 9])
    x, teacher = normal(256, 4), {"up": normal(4, 3, salt=1), "bias": jnp.zeros(3), "down": normal(3, 2, salt=1)}
    y = mlp(teacher, x)
    start = {
        "up": normal(4, 12, salt=2).at[:, useful].set(teacher["up"]),
        "bias": jnp.zeros(12),
        "down": (0.1 * normal(12, 2, salt=2)).at[useful].set(teacher["down"]),
    }
    graph = trace(mlp, start, x)

    @jax.jit
    def train(params: Any, strength: Any) -> Any:
        def step(params: Any, _: Any) -> Any:
            loss = lambda p: jnp.square(mlp(p, x) - y).mean() + strength * group_lasso(graph, p)  # noqa: E731
            return jax.tree.map(lambda p, g: p - 0.05 * g, params, jax.grad(loss)(params)), None

        return jax.lax.scan(step, params, None, 3000)[0]

    def norms(params: Any) -> np.ndarray:
        squares = jnp.square(params["up"]).sum(0) + jnp.square(params["down"]).sum(1) + params["bias"] ** 2
        return np.sqrt(np.asarray(squares))

    trained = train(start, 0.015)
    others = np.delete(np.arange(12), useful)
    assert norms(trained)[others].max() < 0.02 < 0.5 < norms(trained)[useful].min()
    assert norms(train(start, 0.0))[others].min() > 0.5
    assert select_channels(graph, trained, 0.75).kept["bias"] == {0: (1, 4, 9)}
    error, scale = jnp.square(mlp(trained, x) - y).mean(), jnp.square(y).mean()
    assert error < 0.03 * scale


def test_what_is_refused():
    graph, params = by_hand()
    with pytest.raises(ValueError, match=r"function has up of shape \(3, 2\); in params it has shape \(3, 3\)"):
        group_lasso(graph, {**params, "up": jnp.ones((3, 3))})
    with pytest.raises(ValueError, match=r"function has down .*, which params does not have"):
        group_lasso(graph, {"up": params["up"], "bias": params["bias"]})
    frozen = trace(lambda p, x: x @ p["up"], params, jnp.ones((5, 3)))
    with pytest.raises(ValueError, match=r"no channels that can be cut"):
        group_lasso(frozen, params)
