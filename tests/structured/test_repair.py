"""After the cut, without training: least squares for what reads the channels, batch norms measured anew."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune.structured import rebuild, repair, select_channels, shrink, trace
from tests.support.structured_cases import CASES
from tests.support.structured_zoo import normal


def mlp(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["up"] + params["bias"][None]) @ params["down"]


@pytest.mark.slow
def test_consumers_make_up_for_the_channels_they_lost():
    params = {"up": normal(6, 16), "bias": normal(16), "down": normal(16, 3)}
    x = normal(200, 6)
    graph = trace(mlp, params, x)
    plan = select_channels(graph, params, 0.5)
    grams = jaxprune.calibrate_grams(mlp, params, [x])
    repaired = shrink(plan, repair(plan, params, grams, damping=0.0))

    hidden = np.tanh(np.asarray(x, np.float64) @ np.asarray(params["up"]) + np.asarray(params["bias"]))
    expected = hidden @ np.asarray(params["down"])
    best = np.linalg.lstsq(hidden[:, plan.kept["down"][0]], expected)[0]
    np.testing.assert_allclose(repaired["down"], best, atol=1e-3)
    for name in ("up", "bias"):  # what computes the channels stays as it is
        np.testing.assert_array_equal(repaired[name], shrink(plan, params)[name])

    small_fn = rebuild(graph, plan)
    error = lambda found: float(jnp.square(small_fn(found, x) - expected).mean())  # noqa: E731
    assert error(repaired) < 0.5 * error(shrink(plan, params))


@pytest.mark.slow
def test_convolutions_are_repaired_too():
    case = CASES["cnn_linen"]()
    graph = trace(case.fn, case.params, *case.inputs)
    plan = select_channels(graph, case.params, 0.5)
    x = normal(64, *case.inputs[0].shape[1:])
    grams = jaxprune.calibrate_grams(case.fn, case.params, [x])
    repaired = shrink(plan, repair(plan, case.params, grams))
    small_fn, expected = rebuild(graph, plan), case.fn(case.params, x)
    error = lambda found: float(jnp.square(small_fn(found, x) - expected).mean())  # noqa: E731
    assert error(repaired) < 0.5 * error(shrink(plan, case.params))


@pytest.mark.slow
def test_batch_norms_of_the_smaller_function_are_measured_anew():
    case = CASES["resnet_train"]()
    graph = trace(case.fn, case.params, *case.inputs, prunable_outputs=case.outputs)
    plan = select_channels(graph, case.params, 0.5)
    small, small_fn = shrink(plan, case.params), rebuild(graph, plan)

    def update(statistics: Any, x: Any) -> Any:
        return small_fn({**small, "batch_stats": statistics}, x)["batch_stats"]

    x = normal(*case.inputs[0].shape)
    found = jaxprune.recalibrate(update, small["batch_stats"], [x, x])
    # Statistics of one batch are where its running average stands still.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), update(found, x), found)


@pytest.mark.slow
def test_a_tied_embedding_stays_as_it_is():
    params = {"embed": normal(13, 16), "up": normal(16, 32), "down": normal(32, 16)}

    def fn(params: Any, tokens: Any) -> Any:
        h = params["embed"][tokens]
        h = h + jnp.tanh(h @ params["up"]) @ params["down"]
        return h @ params["embed"].T

    tokens = jnp.arange(13 * 20) % 13
    graph, grams = trace(fn, params, tokens), jaxprune.calibrate_grams(fn, params, [tokens])
    plan = select_channels(graph, params, {"up": 0.5, "down[1]": 0.25})
    repaired = repair(plan, params, grams)
    np.testing.assert_array_equal(repaired["embed"], params["embed"])
    assert not np.array_equal(repaired["down"], params["down"])
    with pytest.raises(ValueError, match=r"params\['embed'\] is a table of which rows are read, and a matrix as well"):
        jaxprune.oneshot.sparsegpt(params, grams, 0.5, prunable=lambda path, leaf: path == "embed")
    assert jaxprune.scores.obs(params, grams)["embed"] is None
