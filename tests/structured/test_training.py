"""Channels that go while the network trains: masks are arguments, the lasso empties what is cut, the result is small."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune

# Adam raises a float to the count of steps, which is a whole number.
from tests.support.promotion import standard_promotion as standard_promotion
from tests.support.structured_zoo import normal


def mlp(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["up"] + params["bias"][None]) @ params["down"]


@pytest.mark.slow
def test_gradual_structured_pruning_ends_in_the_smaller_function():
    teacher = {"up": normal(6, 8), "bias": normal(8), "down": normal(8, 3)}
    x = normal(256, 6)
    y = mlp(teacher, x)
    params = {"up": 0.3 * normal(6, 32), "bias": 0.3 * normal(32), "down": 0.3 * normal(32, 3)}
    graph = jaxprune.structured.trace(mlp, params, x)
    masked_fn = jaxprune.structured.masked(graph)
    schedule = optax.polynomial_schedule(0.0, 0.5, power=3, transition_steps=150)
    tx = optax.adam(3e-2)

    @jax.jit
    def step(params: Any, state: Any, masks: Any) -> Any:
        def loss(params: Any) -> Any:
            error = jnp.square(masked_fn(params, masks, x) - y).mean()
            return error + 1e-5 * jaxprune.structured.group_lasso(graph, params)

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return jaxprune.apply_masks(optax.apply_updates(params, updates), masks), state

    state, removed = tx.init(params), []
    for i in range(400):
        if i % 10 == 0 and i <= 150:
            plan = jaxprune.structured.select_channels(graph, params, float(schedule(i)))
            masks = jaxprune.structured.channel_masks(plan, params)
            removed.append(32 - int(masks["bias"].sum()))
        params, state = step(params, state, masks)
    assert step._cache_size() == 1
    assert removed == sorted(removed)
    assert (removed[0], removed[-1]) == (0, 16)

    small_fn, small = jaxprune.structured.rebuild(graph, plan), jaxprune.structured.shrink(plan, params)
    assert small["up"].shape == (6, 16)
    np.testing.assert_allclose(small_fn(small, x), masked_fn(params, masks, x), rtol=1e-5, atol=1e-5)
    assert jnp.square(small_fn(small, x) - y).mean() < 0.02 * jnp.square(y).mean()
