"""Masked least squares against its closed form, for any mask, and what it must not touch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune
from jaxprune import rules
from jaxprune.oneshot._reconstruct import reconstruct
from tests.support import oracles_oneshot as oracles
from tests.support.compilation import compiled_for_users
from tests.support.oneshot_problems import grams_of, one, params_of
from tests.support.sharding import operations

KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])


def solved(weights, mask, gram, **options):
    params, grams = one(weights, gram)
    return np.asarray(reconstruct(params, {"a": {"kernel": jnp.asarray(mask)}}, grams, **options)["a"]["kernel"])


def random_mask(shape, seed, kept=0.5):
    return np.random.default_rng(seed).random(shape) < kept


@pytest.mark.slow
@pytest.mark.parametrize("kept", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("damping", [0.0, 0.01, 0.3])
def test_it_equals_the_closed_form_of_every_unit(kept, damping):
    weights, gram = oracles.problem(40, 24, seed=0, samples=400)
    mask = random_mask((40, 24), 1, kept)
    found = solved(weights, mask, gram, damping=damping, steps=60)
    expected = oracles.reconstruct(weights, mask, oracles.damped(gram, damping))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert (found[~mask] == 0).all()
    assert not np.signbit(found[~mask]).any()


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), kept=st.floats(0, 1), steps=st.sampled_from([0, 5]))
def test_more_steps_never_lose_more_and_no_step_loses_more_than_the_mask_alone(seed, kept, steps):
    weights, gram = oracles.problem(16, 8, seed)
    mask = random_mask((16, 8), seed, kept)
    damped = oracles.damped(gram, 0.01)
    losses = [
        oracles.loss(solved(weights, mask, gram, steps=n, damping=0.01), weights, damped) for n in (steps, steps + 1)
    ]
    alone = oracles.loss(np.where(mask, weights, 0), weights, damped)
    assert losses[1] <= losses[0] * (1 + 1e-4) + 1e-9
    assert losses[0] <= alone * (1 + 1e-4) + 1e-9


def test_no_weight_gone_changes_nothing_and_all_gone_leaves_zeros():
    weights, gram = oracles.problem(12, 6, 3)
    np.testing.assert_array_equal(solved(weights, np.ones((12, 6), bool), gram), weights)
    np.testing.assert_array_equal(solved(weights, np.zeros((12, 6), bool), gram), 0)


def test_a_unit_that_lost_nothing_stays_as_it_was_beside_one_that_did():
    weights, gram = oracles.problem(12, 2, 4)
    mask = np.ones((12, 2), bool)
    mask[:6, 0] = False
    found = solved(weights, mask, gram)
    np.testing.assert_array_equal(found[:, 1], weights[:, 1])
    assert not np.allclose(found[6:, 0], weights[6:, 0])


def test_singular_gram_matrices_without_damping_still_give_least_squares():
    """Eight samples of twelve inputs: many minimisers, all with the same loss."""
    weights, gram = oracles.problem(12, 6, 5, samples=8)
    mask = random_mask((12, 6), 6, 0.4)
    with pytest.warns(UserWarning, match="singular"):
        found = solved(weights, mask, gram, damping=0.0, steps=200)
    values, vectors = np.linalg.eigh(gram)
    root = np.sqrt(np.maximum(values, 0))[:, None] * vectors.T
    best = np.zeros_like(weights)
    for unit in range(6):
        kept = mask[:, unit]
        best[kept, unit] = np.linalg.lstsq(root[:, kept], root @ weights[:, unit], rcond=None)[0]
    assert oracles.loss(found, weights, gram) == pytest.approx(oracles.loss(best, weights, gram), abs=1e-4)


def test_dead_inputs_keep_their_weights_and_bad_weights_count_as_zero():
    weights, gram = oracles.problem(12, 6, 7)
    gram[5] = gram[:, 5] = 0
    weights[3, 3] = np.nan
    mask = random_mask((12, 6), 8, 0.7)
    mask[3, 3], mask[5] = False, [True, False] * 3
    found = solved(weights, mask, gram)
    np.testing.assert_array_equal(found[5], np.where(mask[5], weights[5], 0))
    assert np.isfinite(found).all()


def test_every_matrix_of_a_stack_and_only_leaves_that_lost_weights_are_solved():
    problems = [oracles.problem(16, 8, seed) for seed in (9, 10)]
    weights, grams = (np.stack(arrays) for arrays in zip(*problems, strict=True))
    params = params_of(a=weights, b=weights[0])
    params["a"]["bias"] = jnp.ones(8)
    masks = jax.tree.map(lambda leaf: jnp.ones_like(leaf, dtype=bool), params)
    masks["a"]["kernel"] = jnp.asarray(random_mask(weights.shape, 11))
    found = reconstruct(params, masks, grams_of({"a": weights}, {"a": grams}), damping=0.0, steps=60)
    for n in range(2):
        expected = oracles.reconstruct(weights[n], np.asarray(masks["a"]["kernel"][n]), grams[n])
        np.testing.assert_allclose(found["a"]["kernel"][n], expected, atol=1e-4)
    np.testing.assert_array_equal(found["a"]["bias"], params["a"]["bias"])
    np.testing.assert_array_equal(found["b"]["kernel"], params["b"]["kernel"])


def test_under_jit_masks_of_all_leaves_are_taken_as_make_masks_gives_them():
    weights, gram = oracles.problem(12, 6, 9)
    params, grams = one(weights, gram)
    params["a"]["bias"] = jnp.ones(6)
    masks = jaxprune.make_masks(params, 0.5, rule=rules.layer_sparsity)
    expected = reconstruct(params, masks, grams)["a"]["kernel"]
    for found in (
        jax.jit(reconstruct)(params, masks, grams),
        jax.jit(lambda params: reconstruct(params, masks, grams))(params),  # known masks, traced parameters
    ):
        np.testing.assert_allclose(found["a"]["kernel"], expected, rtol=1e-5)
        np.testing.assert_array_equal(found["a"]["bias"], np.ones(6))


@pytest.mark.slow
def test_it_improves_every_rule_and_works_under_jit_and_in_bfloat16():
    weights, gram = oracles.problem(32, 16, 12)
    params, grams = one(jnp.asarray(weights, jnp.bfloat16), gram)
    dense = np.asarray(params["a"]["kernel"], np.float32)
    for rule, k in [(rules.layer_sparsity, 0.6), (rules.n_m(4), 2), (rules.std_threshold, 0.8)]:
        masks = jaxprune.make_masks(params, k, rule=rule)
        better = jax.jit(functools.partial(reconstruct))(params, masks, grams)["a"]["kernel"]
        assert better.dtype == jnp.bfloat16
        alone = np.where(masks["a"]["kernel"], dense, 0)
        losses = [oracles.loss(found, dense, gram) for found in (np.asarray(better, np.float32), alone)]
        assert losses[0] < 0.75 * losses[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": -1}, "a whole number of steps"),
        ({"damping": float("nan")}, "damping >= 0"),
        (
            {"masks": {"a": {"kernel": jnp.zeros((12, 6), bool)}, "b": jnp.zeros(3, bool)}},
            "No site multiplies data by 'b'",
        ),
        ({"masks": {"a": {"kernel": jnp.zeros((6, 12), bool)}, "b": None}}, r"masks has for params\['a'\]\['kernel'\]"),
    ],
)
def test_errors_say_what_was_asked_and_where(change, message):
    weights, gram = oracles.problem(12, 6, 13)
    params, grams = one(weights, gram)
    params["b"] = jnp.ones(3)
    given_ = {"masks": {"a": {"kernel": jnp.zeros((12, 6), bool)}, "b": jnp.ones(3, bool)}, **change}
    with pytest.raises(ValueError, match=message):
        reconstruct(params, given_.pop("masks"), grams, **given_)


@pytest.mark.slow
@KINDS
def test_sharded_over_outputs_devices_exchange_one_number_a_step(kind):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    weights, gram = oracles.problem(32, 64, 14)
    mask = random_mask((32, 64), 15)
    params, grams = one(weights, gram)
    params, masks = jax.device_put((params, {"a": {"kernel": mask}}), NamedSharding(mesh, P(None, "x")))
    grams = jax.device_put(grams, NamedSharding(mesh, P()))
    held = functools.partial(reconstruct, damping=0.01)
    found = held(params, masks, grams)["a"]["kernel"]
    np.testing.assert_allclose(found, solved(weights, mask, gram, damping=0.01), atol=1e-5)
    assert found.sharding.is_equivalent_to(params["a"]["kernel"].sharding, 2)
    compiled = compiled_for_users(jax.jit(held), params, masks, grams)
    exchanged = {operation: size for operation, size in operations(compiled) if operation.startswith("all-")}
    assert exchanged == {"all-reduce": 1}  # whether all units have converged
    # To choose the damping, the columns of sixteen units besides.
    np.testing.assert_allclose(reconstruct(params, masks, grams)["a"]["kernel"], solved(weights, mask, gram), atol=1e-5)
    compiled = compiled_for_users(jax.jit(reconstruct), params, masks, grams)
    assert max(size for operation, size in operations(compiled) if operation.startswith("all-")) <= 32 * 16


def calibrated(x, weights):
    params = {"kernel": jnp.asarray(weights, jnp.float32)}
    grams = jaxprune.calibrate_grams(lambda params, x: x @ params["kernel"], params, [jnp.asarray(x, jnp.float32)])
    return params, grams


def error(x, weights, found):
    return np.linalg.norm(x @ (np.asarray(found, np.float64) - weights)) / np.linalg.norm(x @ weights)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:These parameters have met fewer samples")
@pytest.mark.parametrize(
    ("samples", "spectrum", "noise"),
    [
        (512, 0.9 ** np.arange(64), 0.0),  # well known and ill-conditioned: no damping serves best
        (48, 0.9 ** np.arange(64), 0.0),  # fewer samples than inputs
        (48, np.ones(64), 0.0),  # nothing that the kept inputs know of the others: the weights had better stay
        (512, np.ones(64), 1.0),  # inputs with something in common
    ],
)
def test_the_damping_that_is_chosen_serves_data_not_seen_as_the_best_of_all_does(samples, spectrum, noise):
    rng = np.random.default_rng(0)
    turned = spectrum[:, None] * np.linalg.qr(rng.normal(size=(64, 64)))[0]
    seen, unseen = (rng.normal(size=(n, 64)) @ turned + noise * rng.normal(size=(n, 1)) for n in (samples, 10_000))
    weights = rng.normal(size=(64, 24))
    mask = random_mask((64, 24), 1)
    params, grams = calibrated(seen, weights)
    masks = {"kernel": jnp.asarray(mask)}
    chosen = error(unseen, weights, reconstruct(params, masks, grams, steps=100)["kernel"])
    gram = seen.T @ seen
    by_damping = {}
    for damping in 10.0 ** np.arange(-6, 1.5, 0.5):
        by_damping[damping] = error(unseen, weights, oracles.reconstruct(weights, mask, oracles.damped(gram, damping)))
    assert chosen <= 1.05 * min(by_damping.values())
    assert chosen <= 1.02 * error(unseen, weights, np.where(mask, weights, 0.0))
    # By lstsq, where samples suffice.
    if samples > 64:
        best = np.zeros_like(weights)
        for unit in range(24):
            kept = mask[:, unit]
            best[kept, unit] = np.linalg.lstsq(seen[:, kept], seen @ weights[:, unit], rcond=None)[0]
        assert chosen <= 1.01 * error(unseen, weights, best)
