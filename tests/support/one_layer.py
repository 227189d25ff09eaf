"""One small layer with its masks, and a training loop for it, shared by the tests of the transforms."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune import apply_masks

KEEP = np.arange(12).reshape(4, 3) % 3 != 1
MASKS = {"kernel": jnp.asarray(KEEP), "bias": jnp.ones(3, bool)}
KERNEL, TARGET = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)


def dense_params(dtype: Any = jnp.float32) -> Any:
    return {"kernel": jnp.asarray(KERNEL, dtype), "bias": jnp.ones(3, dtype)}


def loss(params: Any) -> jax.Array:
    return jnp.sum((params["kernel"] - TARGET.astype(params["kernel"].dtype)) ** 2) + jnp.sum(params["bias"] ** 2)


def masked_loss(params: Any) -> jax.Array:
    return loss(apply_masks(params, MASKS))


def assert_positive_zeros(values: Any) -> None:
    """Assert +0.0, sign bit clear, whatever the dtype."""
    values = np.asarray(values).astype(np.float32)
    np.testing.assert_array_equal(values, 0.0)
    assert not np.signbit(values).any()


def step(tx: Any, params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def train(tx: Any, params: Any, steps: int, objective: Any, state: Any = None) -> tuple[Any, Any]:
    """Take steps from the state given, or from a fresh one; lookahead's gradient is that of its fast weights."""

    @jax.jit
    def advance(params: Any, state: Any) -> tuple[Any, Any]:
        return step(tx, params, state, jax.grad(objective)(getattr(params, "fast", params)))

    state = tx.init(params) if state is None else state
    for _ in range(steps):
        params, state = advance(params, state)
    return params, state
