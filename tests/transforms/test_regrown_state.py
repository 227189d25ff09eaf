"""The optimizer's state of weights that have grown is fresh, whatever the optimizer, and all other state goes on."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from jaxprune import apply_masks, rigl
from jaxprune._tree._paths import flatten
from jaxprune.transforms import sparse_evolution
from jaxprune.transforms._regrowth import Moments
from tests.support.one_layer import KEEP, MASKS, assert_positive_zeros, dense_params, loss, step, train

# Optax raises a float to the count of steps, which is a whole number (`tree.bias_correction`).
from tests.support.promotion import standard_promotion as standard_promotion

GROWING = {
    "rigl": functools.partial(rigl, every=3, until=150),
    "sparse_evolution": functools.partial(sparse_evolution, key=jax.random.key(7), every=3, until=150),
}


def draws(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


BRANCHES = {"k": optax.adam(0.1), "b": optax.sgd(0.1)}
# name: (the optimizer, how many arrays of its state belong to the kernel weight by weight)
OPTIMIZERS = {
    "adam": (lambda: optax.adam(0.1), 2),
    "adamw": (lambda: optax.adamw(0.1), 2),
    "lion": (lambda: optax.lion(0.1), 1),
    "rmsprop": (lambda: optax.rmsprop(0.1, centered=True, momentum=0.9), 3),
    "adafactor": (lambda: optax.adafactor(0.1, min_dim_size_to_factor=2, momentum=0.9), 1),
    "adafactor unfactored": (lambda: optax.adafactor(0.1), 1),
    "muon": (lambda: contrib.muon(0.1), 1),
    "MultiSteps": (lambda: optax.MultiSteps(optax.adam(0.1), 2), 3),
    "partition": (lambda: optax.partition(BRANCHES, {"kernel": "k", "bias": "b"}), 2),
    "partition by a function": (
        lambda: optax.partition(BRANCHES, lambda params: {name: name[0] for name in params}),
        2,
    ),
    "masked": (lambda: optax.masked(optax.adam(0.1), {"kernel": True, "bias": False}), 2),
    "inject_hyperparams": (lambda: optax.inject_hyperparams(optax.adam)(0.1), 2),
    "schedule_free": (lambda: contrib.schedule_free(optax.adam(0.1, b1=0.0), 0.1), 3),
    "chain": (lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.trace(0.9), optax.scale(-0.1)), 1),
}


def optimizer(name: str) -> tuple[Any, int]:
    made, of_weights = OPTIMIZERS[name][0](), OPTIMIZERS[name][1]
    return (made.gradient_transformation() if isinstance(made, optax.MultiSteps) else made), of_weights


def refresh(state: Any, inner: Any, params: Any, grown: Any) -> Any:
    """Make the state of all weights that have grown fresh."""
    moments = Moments(state, inner.init, params)
    for path, mask in flatten(grown, "masks").by_path.items():
        moments.put(path, moments.refreshed(path, moments.of(path), mask))
    return moments.state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_grown_weights_have_fresh_state_and_nothing_else_changes(name):
    inner, of_weights = optimizer(name)
    params = {"kernel": jnp.asarray(draws(0, 4, 3)), "bias": jnp.ones(3)}
    fresh = inner.init(params)
    used = jax.tree.map(lambda leaf: leaf + jnp.asarray(7, leaf.dtype), fresh)
    grown = {"kernel": jnp.asarray(KEEP), "bias": jnp.zeros(3, bool)}
    found = refresh(used, inner, params, grown)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, used)
    seen = 0
    for new, old, start in zip(*map(jax.tree.leaves, (found, used, fresh)), strict=True):
        if new.shape == (4, 3):
            seen += 1
            np.testing.assert_array_equal(new, np.where(KEEP, start, old))
        else:
            np.testing.assert_array_equal(new, old)
    assert seen == of_weights


def test_a_bare_array_and_a_tuple_have_their_state_found():
    inner, grown = optax.adam(0.1), jnp.array([[True, False]])
    for params, masks in (jnp.ones((1, 2)), grown), ((jnp.ones((1, 2)),), (grown,)):
        used = jax.tree.map(lambda leaf: leaf + 7, inner.init(params))
        found = refresh(used, inner, params, masks)
        for moment in jax.tree.leaves((found[0].mu, found[0].nu)):
            assert moment.tolist() == [[0.0, 7.0]]
        assert int(found[0].count) == 7


@pytest.mark.slow
@pytest.mark.parametrize("name", GROWING)
@pytest.mark.parametrize("inner", OPTIMIZERS)
def test_a_step_keeps_all_types_with_every_optimizer(name, inner):
    """On a layer with a bias; both kinds of step have the same types, or this raises."""
    tx = GROWING[name](optimizer(inner)[0], MASKS)
    params, state = dense_params(), tx.init(dense_params())
    updates, after = jax.eval_shape(tx.update, params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["muon", "MultiSteps"])
def test_rigl_trains(name):
    tx = rigl(optimizer(name)[0], MASKS, every=4, until=12)
    params, state = train(tx, apply_masks(dense_params(), MASKS), 30, loss)
    assert loss(params) < loss(apply_masks(dense_params(), MASKS))
    keep = np.asarray(state.masks["kernel"])
    assert keep.sum() == KEEP.sum()
    assert (keep != KEEP).any()
    assert_positive_zeros(np.asarray(params["kernel"])[~keep])


def test_where_masks_change_the_optimizer_steps_under_the_new_ones():
    tx = rigl(optax.adam(0.1), MASKS, every=2, until=2, drop_fraction=0.5)
    grads = {"kernel": jnp.asarray(draws(1, 3, 4, 3)), "bias": jnp.ones((3, 3))}

    def body(carry: Any, grad: Any) -> Any:
        after = step(tx, *carry, grad)
        return after, after

    start = apply_masks(dense_params(), MASKS)
    params, state = jax.tree.map(np.asarray, jax.lax.scan(body, (start, tx.init(start)), grads)[1])
    old, new = state.masks["kernel"][1:]
    assert (new & ~old).any()
    adam = state.inner_state[0]
    assert adam.count.tolist() == [1, 2, 3]
    gradient = np.where(new, grads["kernel"][2], 0)
    first = 0.9 * np.where(new & ~old, 0, adam.mu["kernel"][1]) + 0.1 * gradient
    second = 0.999 * np.where(new & ~old, 0, adam.nu["kernel"][1]) + 0.001 * gradient**2
    np.testing.assert_allclose(adam.mu["kernel"][2], first, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(adam.nu["kernel"][2], second, rtol=1e-5, atol=1e-9)
    moved = params["kernel"][1] - 0.1 * first / (1 - 0.9**3) / (np.sqrt(second / (1 - 0.999**3)) + 1e-8)
    np.testing.assert_allclose(params["kernel"][2], np.where(new, moved, 0), rtol=1e-4, atol=1e-6)
    assert (params["bias"][2] != params["bias"][1]).all()


def test_a_fresh_state_that_depends_on_the_parameters():
    """Schedule-free keeps the weights themselves in its state: where one grows, the weight as it stands."""
    inner, params = optimizer("schedule_free")[0], {"kernel": jnp.asarray(draws(0, 4, 3)), "bias": jnp.ones(3)}
    used = jax.tree.map(lambda leaf: leaf + jnp.asarray(7, leaf.dtype), inner.init(params))
    grown = {"kernel": jnp.asarray(KEEP), "bias": jnp.zeros(3, bool)}
    found = jax.jit(lambda used, params: refresh(used, inner, params, grown))(used, params)
    np.testing.assert_array_equal(found.z["kernel"], np.where(KEEP, params["kernel"], used.z["kernel"]))
