"""prune, prune_and_regrow and ac_dc_schedule: when masks change, to what, and that they hold."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxprune import make_masks, masks_in, prune, rules
from jaxprune.transforms import ac_dc_schedule, prune_and_regrow
from jaxprune.transforms._steps import Steps
from tests.support.one_layer import assert_positive_zeros, step

exactly = functools.partial(make_masks, rule=rules.layer_sparsity)
KERNEL = np.random.default_rng(0).normal(size=(8, 10)).astype(np.float32)
STEPS = 200


def at_least(params: Any, k: Any) -> Any:
    """Make masks by a threshold, which compiles in no time."""
    return jax.tree.map(lambda leaf: jnp.abs(leaf) >= k, params)


def small_params(dtype: Any = jnp.float32) -> Any:
    return {"kernel": jnp.asarray(KERNEL, dtype), "bias": jnp.ones(10, dtype)}


def steps_of(tx: Any, params: Any, grads: Any) -> tuple[Any, Any, Any]:
    """Take a step for each gradient; return parameters and masks after every one, and the last state."""

    def body(carry: Any, grad: Any) -> Any:
        params, state = step(tx, *carry, grad)
        return (params, state), (params, masks_in(state))

    start = params, tx.init(params)
    (_, state), (history, masks) = jax.jit(lambda start, grads: jax.lax.scan(body, start, grads))(start, grads)
    return jax.tree.map(np.asarray, history), jax.tree.map(np.asarray, masks), state


def noise(steps: int, shape: tuple[int, ...] = (8, 10), dtype: Any = jnp.float32) -> Any:
    kernel = np.random.default_rng(1).normal(size=(steps, *shape)).astype(np.float32)
    return {"kernel": jnp.asarray(kernel, dtype), "bias": jnp.ones((steps, shape[-1]), dtype)}


def changes(masks: np.ndarray) -> list[int]:
    """Return the steps at which a history of masks differs from the step before."""
    flat = masks.reshape(len(masks), -1)
    return [step for step in range(1, len(flat)) if (flat[step] != flat[step - 1]).any()]


# --- When: at steps that can be told beforehand. ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("every", "begin", "until", "due"),
    [
        (1, 0, 3, [0, 1, 2, 3]),
        (3, 0, 6, [0, 3, 6]),
        (3, 0, 7, [0, 3, 6, 7]),
        (10, 0, 4, [0, 4]),
        (3, 0, 0, [0]),
        (4, 0, None, [0, 4, 8]),
        (4, 3, None, [3, 7, 11]),
        (3, 5, 9, [5, 8, 9]),
        (5, 4, 4, [4]),
    ],
)
def test_steps_at_which_masks_change(every, begin, until, due):
    assert [count for count in range(12) if Steps(every, begin, until).due(jnp.int32(count))] == due
    told = []
    tx = prune(at_least, 0.0, every=every, begin=begin, until=until, log=lambda numbers: told.append(numbers["step"]))
    steps_of(tx, small_params(), noise(12))
    jax.effects_barrier()
    assert sorted(told) == due


# --- What: the masks of gradual pruning, against NumPy. ---


@functools.cache
def gradual(dtype: str) -> Any:
    cubic = optax.polynomial_schedule(0.0, 0.9, power=3, transition_steps=100, transition_begin=10)
    # every does not divide until.
    tx = optax.chain(optax.sgd(0.05), prune(exactly, cubic, every=30, until=110))
    return cubic, *steps_of(tx, small_params(dtype), noise(STEPS, dtype=dtype))


@pytest.mark.slow
def test_gradual_pruning_against_numpy():
    cubic, history, masks, _ = gradual("float32")
    weights, keep = KERNEL.copy(), np.ones((8, 10), bool)
    for t, grad in enumerate(np.asarray(noise(STEPS)["kernel"])):
        if t in (0, 30, 60, 90, 110):
            size = np.where(keep, np.abs(weights), 0).ravel()
            keep = np.ones(80, bool)
            keep[np.argsort(size, kind="stable")[: round(float(cubic(t)) * 80)]] = False
            keep = keep.reshape(8, 10)
        weights = weights - np.float32(0.05) * grad
        weights = np.where(keep, weights, 0)
        np.testing.assert_array_equal(masks["kernel"][t], keep, err_msg=f"step {t}")
        np.testing.assert_allclose(history["kernel"][t], weights, atol=1e-5)
    assert masks["bias"].all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradual_pruning_keeps_exact_counts_nested_masks_and_zeros(dtype):
    _, history, masks, state = gradual(dtype)
    removed = (~masks["kernel"]).sum((1, 2))
    # round(80 * 0.9 * (1 - (1 - (step - 10) / 100) ** 3)); the last change hits the final value.
    np.testing.assert_array_equal(removed, np.repeat([0, 35, 63, 71, 72], [30, 30, 30, 20, 90]))
    assert changes(masks["kernel"]) == [30, 60, 90, 110]
    assert not (masks["kernel"][1:] & ~masks["kernel"][:-1]).any()
    assert_positive_zeros(history["kernel"][~masks["kernel"]])
    assert int(state[1].count) == STEPS


@pytest.mark.slow
def test_every_layer_of_a_stack_is_pruned_exactly():
    make = functools.partial(exactly, stacked="kernel")
    tx = prune(make, optax.linear_schedule(0.0, 0.75, 20), every=7, until=20)
    params = {"kernel": jnp.asarray(np.random.default_rng(2).normal(size=(2, 3, 4)), jnp.float32)}
    grads = {"kernel": noise(40, (2, 3, 4))["kernel"]}
    history, masks, _ = steps_of(tx, params, grads)
    removed = (~masks["kernel"]).sum((2, 3))
    # round(12 * 0.75 * step / 20) at 0, 7, 14 and 20
    expected = np.repeat([0, 3, 6, 9], [7, 7, 6, 20])
    np.testing.assert_array_equal(removed, np.stack([expected, expected], 1))
    assert_positive_zeros(history["kernel"][~masks["kernel"]])


# --- Small cases by hand. ---


def one_row(*values: float) -> Any:
    return {"kernel": jnp.array([values])}


def row(tree: Any) -> list[float]:
    return np.asarray(tree["kernel"]).ravel().tolist()


def take(tx: Any, params: Any, state: Any, *updates: float) -> tuple[Any, Any]:
    return jitted_step(tx, params, state, one_row(*updates))


@functools.partial(jax.jit, static_argnums=0)
def jitted_step(tx: Any, params: Any, state: Any, updates: Any) -> tuple[Any, Any]:
    return step(tx, params, state, updates)


def test_masks_are_made_from_the_weights_that_the_step_begins_with_or_from_those_it_would_make():
    results = []
    for transform in prune, prune_and_regrow:
        tx = transform(at_least, 2.0)
        params, state = take(tx, one_row(1.0, 3.0), tx.init(one_row(1.0, 3.0)), 4.0, -2.5)
        results.append((row(params), row(state.masks)))
    assert results == [([0.0, 0.5], [False, True]), ([5.0, 0.0], [True, False])]


def test_a_kept_weight_that_becomes_zero_is_not_taken_for_a_pruned_one():
    tx = prune(exactly, 0.25)
    params, state = take(tx, one_row(1.0, 2.0, 3.0, 4.0), tx.init(one_row(1.0, 2.0, 3.0, 4.0)), *[0.0] * 4)
    params, state = take(tx, params, state, 0.0, 0.0, -3.0, 0.0)
    params, state = take(tx, params, state, *[0.0] * 4)
    assert row(params) == [0.0, 2.0, 0.0, 4.0]
    assert row(state.masks) == [False, True, True, True]
    assert row(take(tx, params, state, 9.0, 0.0, 1.0, 0.0)[0]) == [0.0, 2.0, 1.0, 4.0]


def test_pruned_weights_come_back_under_prune_and_regrow_only():
    falling = optax.piecewise_constant_schedule(2.0, {1: 0.0})
    results = []
    for transform in prune, prune_and_regrow:
        tx = transform(at_least, lambda count: falling(count.astype(jnp.float32)))
        params, state = take(tx, one_row(1.0, 3.0), tx.init(one_row(1.0, 3.0)), 0.0, 0.0)
        assert row(params) == [0.0, 3.0]
        for _ in range(2):
            params, state = take(tx, params, state, 0.5, 0.5)
        results.append(row(params))
    assert results == [[0.0, 4.0], [1.0, 4.0]]


def test_a_pruned_weight_returns_when_its_update_is_large():
    tx = prune_and_regrow(at_least, 2.0)
    params, state = take(tx, one_row(1.0, 3.0), tx.init(one_row(1.0, 3.0)), 0.0, 0.0)
    params, state = take(tx, params, state, 1.5, 0.0)
    assert row(params) == [0.0, 3.0]
    assert row(take(tx, params, state, 2.5, -1.5)[0]) == [2.5, 0.0]


def test_phases_of_ac_dc():
    """Sparse and dense in turn, masks fixed within a phase, all weights trained in a dense one, sparse at the end."""
    schedule = ac_dc_schedule(0.5, every=2, begin=2, until=9)
    tx = optax.chain(optax.sgd(0.5), prune_and_regrow(exactly, schedule, every=2, until=9))
    history, masks, _ = steps_of(tx, small_params(), noise(14))
    removed = (~masks["kernel"]).sum((1, 2))
    np.testing.assert_array_equal(removed, [0, 0, 40, 40, 0, 0, 40, 40, 0, 40, 40, 40, 40, 40])
    assert changes(masks["kernel"]) == [2, 4, 6, 8, 9]
    assert_positive_zeros(history["kernel"][~masks["kernel"]])
    assert (history["kernel"][[1, 4, 5, 8]] != 0).all()
    # The masks of a phase are the largest of its first update; compare with those of a run that is dense just there.
    grads = np.asarray(noise(14)["kernel"])
    candidate = np.abs(KERNEL - np.float32(0.5) * grads[:3].sum(0)).ravel()
    np.testing.assert_array_equal(np.flatnonzero(masks["kernel"][2]), np.sort(np.argsort(candidate)[40:]))


@pytest.mark.parametrize(
    "bad",
    [
        {"k": 1.5},
        {"k": -0.5},
        {"every": 0},
        {"begin": -10},
        {"begin": 5},
        {"begin": 40},
    ],
)
def test_ac_dc_refuses(bad):
    arguments = {"k": 0.9, "every": 10, "begin": 10, "until": 40, **bad}
    with pytest.raises(ValueError, match=r"ac_dc_schedule takes .*got k="):
        ac_dc_schedule(**arguments)


# --- Bad input. ---

both = pytest.mark.parametrize("transform", [prune, prune_and_regrow])


@both
@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ({"every": 0}, "every >= 1.*got 0"),
        ({"until": -1}, "until >= 0.*got -1"),
    ],
)
def test_bad_steps(transform, steps, message):
    with pytest.raises(ValueError, match=f"{transform.__name__} takes {message}"):
        transform(exactly, 0.5, **steps)


LEAVING = {
    "number": (1.5, "k = 1.5"),
    "negative": (optax.linear_schedule(-0.1, 0.9, 100), "k = -0.1"),
    "too large at the end": (lambda count: count / 90, "k = 1.1"),
    "too large in between": (lambda count: jnp.where(count == 60, 2.0, 0.5), "k = 2"),
    "nan": (lambda count: jnp.where(count == 30, jnp.nan, 0.5), "k = nan"),
}


@both
@pytest.mark.parametrize("name", LEAVING)
def test_a_schedule_that_leaves_the_range_is_refused_by_init(transform, name):
    schedule, message = LEAVING[name]
    tx = transform(exactly, schedule, every=30, until=100)
    for init in tx.init, jax.jit(tx.init), functools.partial(jax.eval_shape, tx.init):
        with pytest.raises(ValueError, match=rf"layer_sparsity takes 0 <= k <= 1.*{message}.*params\['kernel'\]"):
            init(small_params())


def test_only_what_the_schedule_says_until_the_end_counts():
    prune(exactly, lambda count: count / 110, every=30, until=100).init(small_params())
    with pytest.raises(ValueError, match=r"takes 0 <= k <= 1"):
        prune(exactly, lambda count: count / 110, every=30).init(small_params())


def test_a_schedule_gives_one_number():
    with pytest.raises(ValueError, match=r"prune takes a schedule of one number; it gave an array of shape \(2,\)"):
        prune(exactly, lambda count: jnp.array([0.5, 0.5]), until=3).init(small_params())


@both
def test_masks_of_another_tree(transform):
    tx = transform(lambda params, k: {"kernel": params["kernel"] > k}, 0.5)
    with pytest.raises(ValueError, match=r"masks has no entry for params\['bias'\]"):
        tx.init(small_params())
    tx = transform(lambda params, k: jax.tree.map(lambda leaf: jnp.ones(2, bool), params), 0.5)
    with pytest.raises(ValueError, match=r"masks has for params\['bias'\] an array of bool\[2\]"):
        tx.init(small_params())


@both
def test_updates_without_params(transform):
    tx = transform(at_least, 0.5)
    with pytest.raises(ValueError, match=rf"{transform.__name__} needs the parameters"):
        tx.update(small_params(), tx.init(small_params()))


# --- Among other transforms. ---


def test_injected_schedule_and_strength():
    schedule = optax.linear_schedule(0.0, 1.0, 4)
    plain = prune(at_least, schedule, every=2, until=5)
    injected = optax.inject_hyperparams(prune, static_args=("make", "every", "begin", "until", "log"))
    (_, masks, _), (_, same, _) = (
        steps_of(tx, small_params(), noise(8)) for tx in (plain, injected(at_least, schedule, every=2, until=5))
    )
    np.testing.assert_array_equal(masks["kernel"], same["kernel"])
    assert changes(masks["kernel"]) == [2, 4, 5]
    # A strength that is traced is not checked.
    traced = optax.inject_hyperparams(lambda final: prune(exactly, optax.linear_schedule(0.0, final, 4), until=4))
    assert jax.jit(traced(final=0.5).init)(small_params()).inner_state.masks["kernel"].all()


@pytest.mark.parametrize(("inside", "counted"), [(True, 3), (False, 6)])
def test_steps_counted_with_multi_steps(inside, counted):
    pruning = prune(at_least, lambda count: jnp.float32(count), every=1)
    if inside:
        tx = optax.MultiSteps(optax.chain(optax.sgd(0.0), pruning), 2).gradient_transformation()
    else:
        tx = optax.chain(optax.MultiSteps(optax.sgd(0.0), 2).gradient_transformation(), pruning)
    params = one_row(0.5, 1.5, 2.5, 3.5, 4.5, 5.5)
    grads = {"kernel": jnp.ones((6, 1, 6))}
    with jax.numpy_dtype_promotion("standard"):  # MultiSteps divides by its count, a whole number
        history, _, state = steps_of(tx, params, grads)
    assert int(optax.tree.get(state, "PruneState").count) == counted
    # The last update that counted pruned what lies below its number.
    expected = [value if value > counted - 1 else 0.0 for value in row(params)]
    assert history["kernel"][-1].ravel().tolist() == expected


def test_a_training_step_exports_for_every_platform():
    tx = optax.chain(optax.adam(0.1), prune(at_least, optax.linear_schedule(0.0, 0.5, 2), until=2))
    params, state = small_params(), tx.init(small_params())
    with jax.numpy_dtype_promotion("standard"):  # Adam raises a float to its count, a whole number
        exported = jax.export.export(jax.jit(functools.partial(step, tx)), platforms=("cpu", "cuda", "tpu"))(
            params, state, params
        )
    call = jax.jit(exported.call)
    for _ in range(3):
        params, state = call(params, state, params)
    keep = np.asarray(masks_in(state)["kernel"])
    assert 0 < keep.sum() < 80
    assert_positive_zeros(np.asarray(params["kernel"])[~keep])


# --- The log. ---


def test_log_by_hand():
    told = []
    tx = prune(at_least, lambda count: 1.5 + jnp.float32(count), until=1, log=told.append)
    params = {"dense": {"kernel": jnp.array([[1.0, 2.0, 1.0], [3.0, 4.0, 1.0]])}, "whole": jnp.full(3, 9.0)}
    state = tx.init(params)
    for _ in range(3):
        updates, state = jax.jit(tx.update)(optax.tree.zeros_like(params), state, params)
        params = optax.apply_updates(params, updates)
    jax.effects_barrier()
    first, second = sorted(told, key=lambda numbers: numbers["step"])
    assert first == {
        "step": 0,
        "k": 1.5,
        "sparsity": 0.5,
        "churn": 0.5,
        "dead_units": 1,
        "escaped": 0,
        "threshold/dense/kernel": 2.0,
    }
    assert second == {
        "step": 1,
        "k": 2.5,
        "sparsity": 4 / 6,
        "churn": 1 / 6,
        "dead_units": 1,
        "escaped": 0,
        "threshold/dense/kernel": 3.0,
    }
    assert all(type(value) in (int, float) for numbers in told for value in numbers.values())


def test_log_tells_of_weights_that_escape():
    told = []
    tx = optax.chain(prune(at_least, 2.0, log=told.append), optax.scale(0.5))  # the wrong order
    params, state = one_row(1.0, 3.0), tx.init(one_row(1.0, 3.0))
    for _ in range(2):
        params, state = take(tx, params, state, 0.0, 0.0)
    jax.effects_barrier()
    assert [numbers["escaped"] for numbers in sorted(told, key=lambda numbers: numbers["step"])] == [0, 1]


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_log_on_eight_devices_is_called_once_each_time(axis_type):
    told = []
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(axis_type,))
    params = {"kernel": jax.device_put(jnp.arange(16.0).reshape(8, 2), NamedSharding(mesh, PartitionSpec("rows")))}
    with jax.set_mesh(mesh):
        tx = prune(at_least, 6.0, every=2, log=told.append)
        state = tx.init(params)
        for _ in range(3):
            _, state = jax.jit(tx.update)(params, state, params)
    jax.effects_barrier()
    # Below 6 lie 0 to 5.
    assert [(numbers["step"], numbers["sparsity"]) for numbers in told] == [(0, 6 / 16), (2, 6 / 16)]
