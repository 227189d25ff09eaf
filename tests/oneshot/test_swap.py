"""Swaps: against trying every pair in float64; counts that stay; what is never worse; groups, windows, stacks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxprune
from jaxprune import oneshot, rules
from jaxprune.oneshot._exchange import exchange
from tests.support import oracles_oneshot as oracles
from tests.support.oneshot_problems import one
from tests.support.slow import slow_but

INPUTS, OUTPUTS, DAMPING = 16, 8, 0.01


def problem(seed: int, inputs: int = INPUTS):
    weights, gram = oracles.problem(inputs, OUTPUTS, seed=seed)
    return weights.astype(np.float64), gram.astype(np.float64)


def random_masks(inputs: int, *, group: int | None, seed: int) -> np.ndarray:
    """Masks that keep half of every unit, or of every group."""
    rng, size = np.random.default_rng(seed), group or inputs
    order = rng.random((inputs // size, size, OUTPUTS)).argsort(1)
    return (order < size // 2).reshape(inputs, OUTPUTS)


def error(values, weights, gram) -> np.ndarray:
    change = values - weights
    return np.sum(change * (gram @ change), 0)


def wins_left(values, mask, weights, gram, group: int | None, *, moves: bool) -> float:
    """The most that any swap of a unit would win, as a share of its error: by trying all of them."""
    most, before = 0.0, error(values, weights, gram)
    size = group or len(weights)
    for unit in range(OUTPUTS):
        for out in np.flatnonzero(mask[:, unit]):
            for into in np.flatnonzero(~mask[:, unit]):
                if out // size != into // size:
                    continue
                tried = values[:, unit].copy()
                tried[out] = 0
                change = weights[:, unit] - tried
                tried[into] = (gram[into] @ change) / gram[into, into] if moves else weights[into, unit]
                change = weights[:, unit] - tried
                most = max(most, 1 - change @ gram @ change / before[unit])
    return most


@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_swap_is_left_that_wins(seed, group):
    weights, gram = problem(seed)
    mask = random_masks(INPUTS, group=group, seed=seed)
    found = oneshot.swap(*_given(weights, mask, gram), within=group, sweeps=50)
    kept, values = (np.asarray(tree["a"]["kernel"]) for tree in (found.masks, found.params))
    np.testing.assert_array_equal(values, np.where(kept, weights.astype(np.float32), 0))
    assert not np.signbit(values[~kept]).any()
    shape = (INPUTS // (group or INPUTS), group or INPUTS, OUTPUTS)
    np.testing.assert_array_equal(kept.reshape(shape).sum(1), mask.reshape(shape).sum(1))
    values = np.where(kept, weights, 0)
    assert wins_left(values, kept, weights, gram, group, moves=False) < 1e-4
    before, after = (error(np.where(m, weights, 0), weights, gram) for m in (mask, kept))
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.8 * before.sum()
    total = error(np.zeros_like(weights), weights, gram).sum()
    for mine, theirs in zip(found.errors["a/kernel"], (before, after), strict=True):
        np.testing.assert_allclose(mine, [theirs.sum() / total], rtol=1e-4)


@pytest.mark.parametrize("group", slow_but([None], [None, 4]))
def test_with_least_squares_none_is_left_either(group):
    weights, gram = problem(2)
    mask = random_masks(INPUTS, group=group, seed=2)
    params, masks, grams = _given(weights, mask, gram)
    found = oneshot.swap_and_reconstruct(params, masks, grams, within=group, sweeps=50, steps=100, damping=DAMPING)
    kept, values = (np.asarray(tree["a"]["kernel"], np.float64) for tree in (found.masks, found.params))
    kept = kept.astype(bool)
    assert (values[~kept] == 0).all()
    np.testing.assert_array_equal(kept.sum(0), mask.sum(0))
    damped = oracles.damped(gram, DAMPING)
    assert wins_left(values, kept, weights, damped, group, moves=True) < 1e-3
    alone = oneshot.reconstruct(params, masks, grams, damping=DAMPING, steps=100)["a"]["kernel"]
    before, after = error(np.asarray(alone, np.float64), weights, damped), error(values, weights, damped)
    assert (after <= before * (1 + 1e-4)).all()
    assert after.sum() < 0.8 * before.sum()
    np.testing.assert_allclose(found.errors["a/kernel"].before / found.errors["a/kernel"].after, before.sum() / after.sum(), rtol=1e-3)  # fmt: skip


def test_what_no_swap_betters_stays_as_it_is():
    weights, gram = problem(3)
    params, masks, grams = _given(weights, random_masks(INPUTS, group=None, seed=3), gram)
    once = oneshot.swap(params, masks, grams, sweeps=50)
    again = oneshot.swap(params, once.masks, grams, sweeps=50)
    np.testing.assert_array_equal(once.masks["a"]["kernel"], again.masks["a"]["kernel"])
    np.testing.assert_allclose(again.errors["a/kernel"].before, again.errors["a/kernel"].after, rtol=1e-6)


def test_dead_inputs_go_and_leaves_that_nothing_prunes_stay():
    weights, gram = problem(4)
    dead = [1, 5, 9]
    gram[dead] = gram[:, dead] = 0
    mask = np.zeros((INPUTS, OUTPUTS), bool)
    mask[: INPUTS // 2] = True
    params, masks, grams = _given(weights, mask, gram)
    params["b"], masks["b"] = {"bias": jnp.ones(3)}, {"bias": jnp.ones(3, bool)}
    for found in (oneshot.swap(params, masks, grams), oneshot.swap_and_reconstruct(params, masks, grams)):
        assert not np.asarray(found.masks["a"]["kernel"])[[1, 5]].any()
        np.testing.assert_array_equal(found.params["b"]["bias"], [1, 1, 1])
        assert found.errors.keys() == {"a/kernel"}


@pytest.mark.slow
def test_stacks_and_windows():
    key = jax.random.key(0)
    params = {"stack": jax.random.normal(key, (3, 8, 8)) / 3, "window": jax.random.normal(key, (3, 3, 4, 5))}

    def apply(params, x):
        h = lax.scan(lambda h, kernel: (jnp.tanh(h @ kernel), None), x, params["stack"])[0]
        images = h[:, :, None, None] * jnp.ones((1, 1, 5, 4))
        kinds = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(images, params["window"], (1, 1), "SAME", dimension_numbers=kinds)

    data = [jax.random.normal(jax.random.key(1), (64, 8))]
    grams = jaxprune.calibrate_grams(apply, params, data)
    masks = jaxprune.make_masks(params, 2, rule=rules.n_m(4), sites=grams.sites)
    for found in (
        oneshot.swap(params, masks, grams, within=4),
        oneshot.swap_and_reconstruct(params, masks, grams, within=4),
    ):
        assert (found.masks["stack"].reshape(3, 2, 4, 8).sum(2) == 2).all()
        assert (found.masks["window"].sum(2) == 2).all()
        assert found.errors["stack"].after.shape == (3,)
        for path in ("stack", "window"):
            assert (found.errors[path].after <= found.errors[path].before).all()
            assert found.errors[path].after.sum() < found.errors[path].before.sum()


@pytest.mark.slow
def test_it_betters_what_another_method_found_in_sequence():
    kernels = [jax.random.normal(jax.random.key(i), (24, 24)) / 5 for i in range(2)]

    def apply(params, x):
        return jnp.tanh(x @ params[0]) @ params[1]

    data = [jax.random.normal(jax.random.key(9), (256, 24)) @ jax.random.normal(jax.random.key(8), (24, 24))]

    def method(params, grams, *, prunable):
        _, masks = oneshot.admm(params, grams, 0.6, prunable=prunable)
        return oneshot.swap_and_reconstruct(params, masks, grams)[:2]

    def lost(found):
        return float(jnp.mean((apply(found[0], data[0]) - apply(kernels, data[0])) ** 2))

    alone = functools.partial(oneshot.admm, k=0.6)
    swapped = oneshot.sequential(apply, kernels, data, method, prunable=lambda path, leaf: True)
    assert lost(swapped) < lost(oneshot.sequential(apply, kernels, data, alone, prunable=lambda path, leaf: True))
    assert float(swapped[1][1].mean()) == pytest.approx(0.4, abs=0.002)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "function", slow_but([oneshot.swap_and_reconstruct], [oneshot.swap, oneshot.swap_and_reconstruct])
)
def test_jit_and_half_precision_find_the_same(function, dtype):
    weights, gram = problem(5)
    params, masks, grams = _given(weights, random_masks(INPUTS, group=None, seed=5), gram)
    params = {"a": {"kernel": params["a"]["kernel"].astype(dtype), "bias": jnp.ones(OUTPUTS, dtype)}}
    masks["a"]["bias"] = jnp.arange(OUTPUTS) > 0
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    expected = function(wide, {"a": masks["a"] | {"bias": None}}, grams)
    found = jax.jit(function)(params, masks, grams)
    np.testing.assert_array_equal(found.masks["a"]["kernel"], expected.masks["a"]["kernel"])
    kernel = found.params["a"]["kernel"]
    assert kernel.dtype == dtype
    np.testing.assert_allclose(kernel, expected.params["a"]["kernel"], rtol=2.0**-7 if dtype == jnp.bfloat16 else 1e-5)
    assert not np.signbit(np.asarray(kernel)[~np.asarray(found.masks["a"]["kernel"])]).any()
    # No data meets the bias, and its mask cannot be read: it is put under that.
    np.testing.assert_array_equal(found.params["a"]["bias"], [0] + [1] * (OUTPUTS - 1))
    assert found.errors.keys() == {"a/kernel"}
    np.testing.assert_allclose(found.errors["a/kernel"], expected.errors["a/kernel"], rtol=1e-4)


def test_behind_swaps_least_squares_leaves_less():
    weights, gram = problem(6)
    params, masks, grams = _given(weights, random_masks(INPUTS, group=None, seed=6), gram)
    losses = [
        error(np.asarray(oneshot.reconstruct(params, found, grams)["a"]["kernel"], np.float64), weights, gram).sum()
        for found in (masks, oneshot.swap(params, masks, grams).masks)
    ]
    assert losses[1] < 0.9 * losses[0]


@pytest.mark.parametrize("damping", [None, DAMPING])
def test_memory_is_that_of_a_few_matrices(damping):
    size = 64
    weights, grams = jnp.ones((1, size, size)), jnp.eye(size)[None]
    program = exchange.lower(weights, grams, weights > 0, damping, within=None, sweeps=2, steps=5).compile()
    assert program.memory_analysis().temp_size_in_bytes < size**3 * 4 / 2  # of rows x inputs x inputs


REFUSED = {
    "sweeps": ({"sweeps": 0}, "takes a whole number of sweeps, >= 1; got 0"),
    "within": ({"within": 1}, "takes a whole number of within, >= 2; got 1"),
    "groups": ({"within": 5}, r"Groups of 5 do not divide the 16 inputs of params\['a'\]\['kernel'\]"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("function", [oneshot.swap, oneshot.swap_and_reconstruct])
def test_errors_say_what_was_asked(name, function):
    options, message = REFUSED[name]
    weights, gram = problem(0)
    with pytest.raises(ValueError, match=message):
        function(*_given(weights, random_masks(INPUTS, group=None, seed=0), gram), **options)


def _given(weights, mask, gram):
    params, grams = one(weights.astype(np.float32), gram.astype(np.float32))
    return params, {"a": {"kernel": jnp.asarray(mask)}}, grams
