"""static_sparse, rigl and sparse_evolution against NumPy."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprune import apply_masks, masks_in, rigl
from jaxprune.transforms import sparse_evolution, static_sparse
from jaxprune.transforms._regrowth import drop_and_grow
from tests.support.one_layer import KEEP, MASKS, assert_positive_zeros, dense_params, loss, step, train

# Optax raises a float to the count of steps, which is a whole number (`tree.bias_correction`).
from tests.support.promotion import standard_promotion as standard_promotion

STEPS = 200
KEY = jax.random.key(7)


def draws(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def half_kept(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    keep = np.zeros(int(np.prod(shape)), bool)
    keep[: keep.size // 2] = True
    return np.random.default_rng(seed).permutation(keep).reshape(shape)


def steps_of(tx: Any, params: Any, grads: Any) -> tuple[Any, Any]:
    """Take a step for each gradient; return parameters and state after every one."""

    return jax.tree.map(np.asarray, jax.jit(functools.partial(states_of, tx))(params, grads))


def states_of(tx: Any, params: Any, grads: Any) -> tuple[Any, Any]:
    def body(carry: Any, grad: Any) -> Any:
        params, state = step(tx, *carry, grad)
        return (params, state), (params, state)

    return jax.lax.scan(body, (params, tx.init(params)), grads)[1]


# --- One layer: what is dropped and what grows. ---


def drop_and_grow_in_numpy(weight: Any, keep: Any, wanted: Any, fraction: float) -> np.ndarray:
    """Algorithm 1 of RigL for one layer: ArgTopK(-|theta|, k), then ArgTopK of the gradient among all others."""
    weight, keep, wanted = (np.asarray(array, np.float32).ravel() for array in (weight, keep, wanted))
    active = keep.astype(bool)
    k = int(np.floor(np.float32(fraction) * np.float32(active.sum())))
    # Among equals the lower index stays: the higher one is dropped first.
    smallest_first = sorted(np.flatnonzero(active), key=lambda i: (abs(weight[i]), -i))
    active[smallest_first[:k]] = False
    largest_first = sorted(np.flatnonzero(~active), key=lambda i: (-wanted[i], i))
    active[largest_first[:k]] = True
    return active


one_layer = jax.jit(drop_and_grow, static_argnames="stack")


@pytest.mark.slow
@settings(deadline=None, max_examples=60, derandomize=True)
@given(data=st.data(), fraction=st.floats(0, 1, width=32))
def test_drop_and_grow_against_numpy(data, fraction):
    # Whole numbers, so that there are ties; pruned weights need not be zero.
    weight, wanted = (
        data.draw(st.lists(st.integers(low, 4), min_size=12, max_size=12).map(lambda x: np.array(x, np.float32)))
        for low in (-4, 0)
    )
    keep = np.array(data.draw(st.lists(st.booleans(), min_size=12, max_size=12)))
    found = one_layer(*(x.reshape(3, 4) for x in (weight, keep, wanted)), jnp.float32(fraction))
    np.testing.assert_array_equal(found.ravel(), drop_and_grow_in_numpy(weight, keep, wanted, fraction))
    assert found.sum() == keep.sum()


@pytest.mark.parametrize(
    ("fraction", "weight", "keep", "wanted", "expected"),
    [
        # Nothing goes; three of six weights, half of which is one; all go, and the largest gradients come.
        (0.0, [3, 2, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 9, 9, 9], [1, 1, 1, 0, 0, 0]),
        (0.5, [3, 2, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 3, 2], [1, 1, 0, 0, 1, 0]),
        (1.0, [3, 2, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 9, 2, 8, 7, 3], [0, 1, 0, 1, 1, 0]),
        # A dropped weight that is wanted most stays; a NaN is not wanted; infinity displaces no survivor.
        (0.4, [3, 2, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0, 0, 9, 8, 7, 6], [1, 1, 1, 0, 0, 0]),
        (0.4, [3, 2, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, np.nan, 0.5, 0.1], [1, 1, 0, 0, 1, 0]),
        (0.4, [3, 2, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 5, np.inf, np.inf], [1, 1, 0, 0, 1, 0]),
        # A weight that is NaN goes first. Numbers outside [0, 1] count as the nearest one inside.
        (0.4, [3, np.nan, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 2, 3], [1, 0, 1, 0, 0, 1]),
        (7.0, [3, 2, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 9, 9, 9], [0, 0, 0, 1, 1, 1]),
        (-1.0, [3, 2, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 9, 9, 9], [1, 1, 1, 0, 0, 0]),
    ],
)
def test_drop_and_grow_by_hand(fraction, weight, keep, wanted, expected):
    weight, wanted = (jnp.array([x], jnp.float32) for x in (weight, wanted))
    found = one_layer(weight, jnp.array([keep], bool), wanted, jnp.float32(fraction))
    assert found.astype(int).ravel().tolist() == expected


@pytest.mark.slow
def test_layers_of_a_stack_are_treated_one_by_one():
    weight, wanted = draws(1, 3, 4, 5), np.abs(draws(2, 3, 4, 5))
    keep = np.stack([half_kept(3, (4, 5)), np.ones((4, 5), bool), np.arange(20).reshape(4, 5) % 4 == 0])
    found = one_layer(weight, keep, wanted, jnp.float32(0.3), stack=(0,))
    for i in range(3):
        expected = drop_and_grow_in_numpy(weight[i], keep[i], wanted[i], 0.3)
        np.testing.assert_array_equal(found[i].ravel(), expected)


# --- RigL, step by step. ---


@pytest.mark.slow
def test_rigl_against_numpy():
    """Algorithm 1 with momentum, whose state is zero for new weights, and a step at every update; equation 1."""
    shape, steps, until = (4, 5), 14, 10
    weights, grads, keep = draws(0, *shape), draws(1, steps, *shape), half_kept(2, shape)
    weights = np.where(keep, weights, 0)
    masks = {"kernel": jnp.asarray(keep), "bias": jnp.ones(5, bool)}
    tx = rigl(optax.sgd(0.1, momentum=0.9), masks, every=3, until=until)
    params = {"kernel": jnp.asarray(weights), "bias": jnp.zeros(5)}
    found, state = steps_of(tx, params, {"kernel": jnp.asarray(grads), "bias": jnp.ones((steps, 5))})

    momentum, bias, bias_momentum, changed = np.zeros(shape, np.float32), np.zeros(5), np.zeros(5), []
    for t, grad in enumerate(grads):
        if t in (0, 3, 6, 9, 10):
            fraction = 0.3 / 2 * (1 + np.cos(np.pi * t / until))
            new = drop_and_grow_in_numpy(weights, keep, np.abs(grad), fraction).reshape(shape)
            changed.append(int((new & ~keep).sum()))
            momentum = np.where(new & ~keep, 0, momentum)
            keep = new
        momentum = 0.9 * momentum + np.where(keep, grad, 0)
        weights = weights - 0.1 * momentum
        bias_momentum = 0.9 * bias_momentum + 1
        bias = bias - 0.1 * bias_momentum
        weights = np.where(keep, weights, 0)
        np.testing.assert_array_equal(state.masks["kernel"][t], keep, err_msg=f"step {t}")
        np.testing.assert_allclose(found["kernel"][t], weights, atol=1e-5)
        np.testing.assert_allclose(found["bias"][t], bias, atol=1e-5)
        np.testing.assert_allclose(state.inner_state[0].trace["kernel"][t], momentum, atol=1e-5)
    assert sum(changed) > 3
    assert changed[-1] == 0


PAIR_KEEP = {"a": half_kept(0, (4, 5)), "b": np.stack([np.arange(12).reshape(3, 4) % 3 == 0, half_kept(1, (3, 4))])}
PAIR = {
    "a": {"kernel": draws(3, 4, 5), "bias": np.ones(5, np.float32)},
    "b": {"kernel": draws(4, 2, 3, 4), "bias": np.ones((2, 4), np.float32)},
}


def pair(dtype: Any) -> tuple[Any, Any]:
    """Return two layers, one of them a stack of two, and masks of different sparsity."""
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), PAIR)
    masks = jax.tree.map(lambda leaf: jnp.ones_like(leaf, dtype=bool), params)
    for name, keep in PAIR_KEEP.items():
        masks[name]["kernel"] = jnp.asarray(keep)
    return apply_masks(params, masks), masks


GROWING = {
    "rigl": functools.partial(rigl, every=3, until=150, stacked="b"),
    "sparse_evolution": functools.partial(sparse_evolution, key=KEY, every=3, until=150, stacked="b"),
}
every_growing = pytest.mark.parametrize("name", GROWING)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), [("rigl", jnp.float32), ("sparse_evolution", jnp.bfloat16)])
def test_counts_are_exact_in_every_layer_and_zeros_hold_for_200_steps(name, dtype):
    params, masks = pair(dtype)
    grads = jax.tree.map(lambda leaf: jnp.asarray(draws(5, STEPS, *leaf.shape), dtype), params)
    found, state = steps_of(GROWING[name](optax.adam(0.05), masks), params, grads)
    for layer, keep in PAIR_KEEP.items():
        history, kernels = state.masks[layer]["kernel"], found[layer]["kernel"]
        axes = (-2, -1)
        np.testing.assert_array_equal(history.sum(axes), np.broadcast_to(keep.sum(axes), (STEPS, *keep.shape[:-2])))
        assert_positive_zeros(kernels[~history])
        moved = np.flatnonzero((history[1:] != history[:-1]).reshape(STEPS - 1, -1).any(1)) + 1
        assert len(moved) > 10
        assert (moved % 3 == 0).all()
        assert moved.max() <= 150
        assert state.masks[layer]["bias"].all()
    assert state.count[-1] == STEPS


@pytest.mark.slow
def test_set_drops_the_smallest_and_grows_the_same_ones_for_a_key():
    masks = {"kernel": jnp.asarray(half_kept(2, (4, 5)))}
    params = apply_masks({"kernel": jnp.asarray(draws(0, 4, 5))}, masks)
    grads = {"kernel": jnp.zeros((2, 4, 5))}

    @jax.jit
    def masks_for(key: jax.Array) -> jax.Array:
        tx = sparse_evolution(optax.sgd(0.1), masks, key, every=1, until=1, drop_fraction=0.5)
        return states_of(tx, params, grads)[1].masks["kernel"]

    def grown(key: jax.Array) -> np.ndarray:
        return np.asarray(masks_for(key))

    one, again, other = grown(KEY), grown(KEY), grown(jax.random.key(8))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    keep, size = np.asarray(masks["kernel"]), np.abs(np.asarray(params["kernel"]))
    survivors = keep & (size >= np.sort(size[keep])[5])
    assert (one[0] & survivors == survivors).all()
    assert one[0].sum() == one[1].sum() == 10
    assert (one[0] != one[1]).any()  # another update, other weights


@pytest.mark.slow
def test_set_grows_anywhere_in_bfloat16():
    """bfloat16 has few values between 0 and 1: were the noise so coarse, ties would fill the first rows."""
    masks = {"kernel": jnp.asarray(np.arange(40_000).reshape(200, 200) % 100 == 0)}
    tx = sparse_evolution(optax.sgd(0.1), masks, KEY, every=1, until=0, drop_fraction=1.0)
    params = {"kernel": jnp.ones((200, 200), jnp.bfloat16)}
    _, state = step(tx, params, tx.init(params), params)
    in_quarters = np.asarray(state.masks["kernel"]).reshape(4, -1).sum(1)
    assert in_quarters.sum() == 400
    assert (np.abs(in_quarters - 100) < 5 * np.sqrt(400 * 3 / 16)).all()


def test_a_leaf_that_takes_no_part():
    masks = {"a": jnp.asarray(KEEP), "b": jnp.asarray(KEEP)}
    params = {name: jnp.asarray(draws(i, 4, 3)) for i, name in enumerate("ab")}
    tx = rigl(optax.sgd(0.1), masks, every=1, until=5, drop_fraction=0.5, prunable={"a": True, "b": False})
    _, state = steps_of(tx, apply_masks(params, masks), {name: jnp.asarray(draws(9, 5, 4, 3)) for name in "ab"})
    assert (state.masks["a"][-1] != KEEP).any()
    np.testing.assert_array_equal(state.masks["b"], np.broadcast_to(KEEP, (5, 4, 3)))


# --- static_sparse. ---


def test_static_sparse_hides_pruned_weights_from_the_optimizer():
    masks = {"kernel": jnp.array([[True, False]])}
    tx = static_sparse(optax.chain(optax.clip_by_global_norm(1.0), optax.trace(0.5), optax.scale(-1.0)), masks)
    params = {"kernel": jnp.array([[3.0, 4.0]])}
    grads = {"kernel": jnp.array([[2.0, 100.0]])}
    state = tx.init(params)
    params, state = step(tx, params, state, grads)
    # The norm is that of the kept gradient, 2.
    assert params["kernel"].tolist() == [[2.0, 0.0]]
    params, state = step(tx, params, state, grads)
    assert params["kernel"].tolist() == [[0.5, 0.0]]
    assert state.inner_state[1].trace["kernel"].tolist() == [[1.5, 0.0]]
    assert int(state.count) == 2


def test_static_sparse_for_200_steps_with_weight_decay():
    params, state = dense_params(jnp.bfloat16), None
    tx = static_sparse(optax.adamw(0.05, weight_decay=0.1), lambda params: MASKS)
    params, state = train(tx, params, STEPS, loss)
    assert_positive_zeros(np.asarray(params["kernel"])[~KEEP])
    assert (np.asarray(params["kernel"])[KEEP] != 0).all()
    chex.assert_trees_all_equal(masks_in(state), MASKS)
    assert not np.asarray(state.inner_state[0].mu["kernel"], np.float32)[~KEEP].any()


# --- Bad input. ---

TRANSFORMS = {
    "static_sparse": static_sparse,
    "rigl": functools.partial(rigl, until=9),
    "sparse_evolution": functools.partial(sparse_evolution, key=KEY, until=9),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_masks_of_another_tree_and_updates_without_params(name):
    make = TRANSFORMS[name]
    with pytest.raises(ValueError, match=r"masks has no entry for params\['bias'\]"):
        make(optax.sgd(0.1), {"kernel": MASKS["kernel"]}).init(dense_params())
    with pytest.raises(ValueError, match=r"params\['kernel'\] an array of bool\[3, 4\]"):
        make(optax.sgd(0.1), MASKS | {"kernel": jnp.ones((3, 4), bool)}).init(dense_params())
    tx = make(optax.sgd(0.1), MASKS)
    with pytest.raises(ValueError, match=f"{name} needs the parameters"):
        tx.update(dense_params(), tx.init(dense_params()))


@every_growing
def test_bad_arguments(name):
    def make(**arguments: Any) -> Any:
        return GROWING[name](optax.sgd(0.1), MASKS, stacked=None, **arguments)

    with pytest.raises(ValueError, match=f"{name} takes every >= 1"):
        make(every=0)
    with pytest.raises(ValueError, match=f"{name} takes until >= 0"):
        make(until=-1)
    for number in -0.1, 1.1, float("nan"):
        with pytest.raises(ValueError, match=rf"{name} takes a drop_fraction in \[0, 1\]; got"):
            make(drop_fraction=number)
    for schedule in optax.linear_schedule(1.5, 0.0, 150), lambda count: 0.5 - count / 100:
        with pytest.raises(ValueError, match=rf"{name} takes a drop_fraction in \[0, 1\]; got"):
            make(drop_fraction=schedule).init(dense_params())
    with pytest.raises(ValueError, match=r"No leaf is prunable. Found params\['bias'\]"):
        GROWING[name](optax.sgd(0.1), {"bias": MASKS["bias"]}, stacked=None).init({"bias": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"stacked='b' matches no path"):
        GROWING[name](optax.sgd(0.1), MASKS, stacked="b").init(dense_params())


# --- The log. ---


@pytest.mark.slow
def test_log_of_rigl_by_hand():
    told = []
    masks = {"kernel": jnp.array([[True, True], [True, False], [True, False]])}
    params = apply_masks({"kernel": jnp.array([[4.0, 1.0], [3.0, 9.0], [2.0, 9.0]])}, masks)
    tx = rigl(optax.sgd(0.0), masks, every=2, until=2, drop_fraction=0.25, log=told.append)
    grads = {"kernel": jnp.array([[0.0, 0.0], [5.0, 0.0], [0.0, 7.0]])}
    state = tx.init(params)
    params, state = step(tx, params, state, grads)
    jax.effects_barrier()
    assert told == [
        {
            "step": 0,
            "drop_fraction": 0.25,
            "sparsity": 2 / 6,
            "churn": 2 / 6,
            "dead_units": 0,
            "escaped": 0,
            "threshold/kernel": 2.0,
        }
    ]
    assert params["kernel"].tolist() == [[4.0, 0.0], [3.0, 0.0], [2.0, 0.0]]


@pytest.mark.slow
def test_log_counts_dead_units_of_every_layer_of_a_stack():
    told = []
    masks = {"b": {"kernel": jnp.array([[[True, False], [True, False]], [[True, True], [False, False]]])}}
    params = apply_masks({"b": {"kernel": jnp.ones((2, 2, 2))}}, masks)
    tx = rigl(optax.sgd(0.0), masks, every=1, until=9, drop_fraction=0.0, stacked="b", log=told.append)
    step(tx, params, tx.init(params), params)
    jax.effects_barrier()
    assert [numbers["dead_units"] for numbers in told] == [1]  # the second unit of the first layer alone


@pytest.mark.slow
def test_rigl_changes_nothing_before_it_begins():
    masks = {"kernel": jnp.asarray(half_kept(2, (4, 5))), "bias": jnp.ones(5, bool)}
    params = {"kernel": jnp.asarray(draws(0, 4, 5)), "bias": jnp.zeros(5)}
    tx = rigl(optax.sgd(0.1), masks, every=2, begin=3, until=7, drop_fraction=0.5)
    state, changed = tx.init(params), []
    for count, grad in enumerate(draws(1, 9, 4, 5)):
        before = state.masks["kernel"]
        _, state = tx.update({"kernel": jnp.asarray(grad), "bias": jnp.ones(5)}, state, params)
        if (before != state.masks["kernel"]).any():
            changed.append(count)
    assert changed == [3, 5, 7]
    for begin, until in ((-1, 5), (6, 5)):
        with pytest.raises(ValueError, match="rigl takes (begin >= 0|until >= 6)"):
            rigl(optax.sgd(0.1), masks, begin=begin, until=until)
