"""SparseGPT against float64 NumPy, exact counts, stacks, singular and bad Gram matrices, shardings."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxprune import rules
from jaxprune.oneshot._solve import DampingWarning
from jaxprune.oneshot._sparsegpt import sparsegpt
from jaxprune.rules._guard import PruningWarning
from tests.support import oracles_oneshot as oracles
from tests.support.compilation import compiled_for_users
from tests.support.oneshot_problems import grams_of, one, params_of
from tests.support.sharding import operations
from tests.support.slow import slow_but

KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])


def solved(weights, gram, k, **options):
    params, masks = sparsegpt(*one(weights, gram), k, **options)
    return np.asarray(params["a"]["kernel"]), np.asarray(masks["a"]["kernel"])


# inputs, outputs, rule, k, the oracle's choice, mask_block, block
CASES = {
    "half": (64, 48, rules.layer_sparsity, 0.5, oracles.layer(0.5, 64, 48), 16, 32),
    "one block, as published": (96, 32, rules.layer_sparsity, 0.7, oracles.layer(0.7, 96, 32), 96, 96),
    "inputs that fill no block": (77, 30, rules.layer_sparsity, 0.6, oracles.layer(0.6, 77, 30), 16, 32),
    "fewer inputs than a block": (9, 20, rules.layer_sparsity, 0.5, oracles.layer(0.5, 9, 20), 32, 128),
    "more rows than go at a time": (192, 24, rules.layer_sparsity, 0.5, oracles.layer(0.5, 192, 24), 64, 128),
    "by unit": (64, 40, rules.row_sparsity, 0.5, oracles.units(0.5, 64), 64, 64),
    "by unit in blocks": (50, 40, rules.row_sparsity, 0.7, oracles.units(0.7, 50), 10, 20),
    "2:4": (64, 32, rules.n_m(4), 2, oracles.n_of_m(2, 4), 4, 32),
    "4:8": (40, 32, rules.n_m(8), 4, oracles.n_of_m(4, 8), 8, 128),
    "1:3": (33, 16, rules.n_m(3), 1, oracles.n_of_m(1, 3), 3, 9),
    "products of parts": (1040, 8, rules.layer_sparsity, 0.5, oracles.layer(0.5, 1040, 8), 16, 16),
}


QUICK = ("inputs that fill no block", "by unit in blocks", "2:4")


@pytest.mark.slow
@pytest.mark.parametrize("case", slow_but(QUICK, CASES))
def test_small_matrices_are_pruned_as_the_paper_says(case):
    inputs, outputs, rule, k, choose, mask_block, block = CASES[case]
    weights, gram = oracles.problem(inputs, outputs, seed=1)
    found, mask = solved(weights, gram, k, rule=rule, mask_block=mask_block, block=block)
    expected, expected_mask = oracles.sparsegpt(weights, oracles.damped(gram, 0.01), choose, mask_block)
    np.testing.assert_array_equal(mask, expected_mask)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert (found[~mask] == 0).all()


@pytest.mark.parametrize("rule", [rules.layer_sparsity, rules.n_m(4)], ids=["half", "2:4"])
@pytest.mark.slow
def test_large_matrices_lose_as_little_as_in_float64(rule):
    """Rounding decides between weights of nearly equal scores, and what follows; the loss hardly changes."""
    weights, gram = oracles.problem(768, 512, seed=2)
    k, choose, size = (
        (0.5, oracles.layer(0.5, 768, 512), 128) if rule is rules.layer_sparsity else (2, oracles.n_of_m(2, 4), 4)
    )
    found, mask = solved(weights, gram, k, rule=rule, mask_block=size)
    expected, expected_mask = oracles.sparsegpt(weights, oracles.damped(gram, 0.01), choose, size)
    assert oracles.loss(found, weights, gram) == pytest.approx(oracles.loss(expected, weights, gram), rel=1e-3)
    assert (mask != expected_mask).mean() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("k", [0.0, 0.333, 0.98])
def test_counts_are_exact_whatever_the_blocks(k):
    weights, gram = oracles.problem(70, 31, seed=3)
    for mask_block, block in [(1, 16), (32, 128), (128, 128)]:
        _, mask = solved(weights, gram, k, mask_block=mask_block, block=block)
        assert (~mask).sum() == round(k * 70 * 31)
    _, mask = solved(weights, gram, k, rule=rules.row_sparsity, mask_block=10, block=30)
    np.testing.assert_array_equal((~mask).sum(0), round(k * 70))


@pytest.mark.parametrize("size", [2.0**100, 2.0**-100])
def test_masks_do_not_depend_on_how_large_the_weights_are(size):
    weights, gram = oracles.problem(32, 16, seed=1)
    _, expected = solved(weights, gram, 0.5)
    found, mask = solved(weights * np.float32(size), gram, 0.5)
    np.testing.assert_array_equal(mask, expected)
    assert np.isfinite(found).all()


@pytest.mark.slow
def test_the_default_mask_block_loses_less_than_one_choice_for_all():
    weights, gram = oracles.problem(256, 64, seed=4)
    losses = [
        oracles.loss(solved(weights, gram, 0.6, **options)[0], weights, gram)
        for options in ({}, {"mask_block": 128}, {"mask_block": 256, "block": 256})
    ]
    assert losses == sorted(losses)


@pytest.mark.slow
def test_what_makes_up_beats_the_same_mask_alone():
    weights, gram = oracles.problem(128, 64, seed=5)
    found, mask = solved(weights, gram, 0.5)
    assert oracles.loss(found, weights, gram) < 0.8 * oracles.loss(np.where(mask, weights, 0), weights, gram)


@pytest.mark.slow
def test_each_matrix_of_a_stack_is_pruned_by_itself_with_its_own_strength():
    problems = [oracles.problem(24, 16, seed) for seed in range(3)]
    weights, grams = (np.stack(arrays) for arrays in zip(*problems, strict=True))
    ks = jnp.array([0.25, 0.5, 0.75])
    found, masks = solved(weights, grams, ks)
    np.testing.assert_array_equal((~masks).sum((1, 2)), [96, 192, 288])
    for n in range(3):
        alone, mask = solved(*problems[n], float(ks[n]))
        np.testing.assert_array_equal(masks[n], mask)
        np.testing.assert_allclose(found[n], alone, atol=1e-5)


@pytest.mark.slow
def test_large_stacks_go_one_by_one_and_come_out_the_same(monkeypatch):
    problems = [oracles.problem(24, 16, seed) for seed in range(3)]
    weights, grams = (np.stack(arrays) for arrays in zip(*problems, strict=True))
    side_by_side, masks = solved(weights, grams, 0.5)
    monkeypatch.setattr("jaxprune.oneshot._solve._SIDE_BY_SIDE", 0)
    jax.clear_caches()
    one_by_one, masks_again = solved(weights, grams, 0.5)
    np.testing.assert_array_equal(masks, masks_again)
    np.testing.assert_allclose(side_by_side, one_by_one, atol=1e-5)


@pytest.mark.slow
def test_strengths_may_be_a_tree_prefix_and_traced():
    (first, gram), (second, other) = oracles.problem(16, 8, 6), oracles.problem(8, 8, 7)
    params, grams = params_of(a=first, b=second), grams_of({"a": first, "b": second}, {"a": gram, "b": other})
    _, masks = sparsegpt(params, grams, {"a": 0.5, "b": {"kernel": 0.25}})
    assert [(~mask).sum() for mask in jax.tree.leaves(masks)] == [64, 16]
    traced = jax.jit(functools.partial(sparsegpt))(params, grams, 0.5)
    plain = sparsegpt(params, grams, 0.5)
    for found, expected in zip(jax.tree.leaves(traced), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_leaves_that_are_not_prunable_stay_as_they_are():
    weights, gram = oracles.problem(16, 8, 8)
    params, grams = one(weights, gram)
    params["a"]["bias"] = jnp.arange(8.0)
    params["step"] = jnp.int32(3)
    pruned, masks = sparsegpt(params, grams, 0.5)
    assert jax.tree.structure(masks) == jax.tree.structure(pruned) == jax.tree.structure(params)
    np.testing.assert_array_equal(pruned["a"]["bias"], np.arange(8.0))
    assert masks["a"]["bias"].all()
    assert pruned["step"] == 3
    assert masks["step"].dtype == bool


@pytest.mark.slow
def test_the_dtype_stays():
    weights, gram = oracles.problem(32, 16, 9)
    narrow = jnp.asarray(weights, jnp.bfloat16)
    params, masks = sparsegpt(*one(narrow, gram), 0.5)
    expected, mask = solved(np.asarray(narrow, np.float32), gram, 0.5)
    assert params["a"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(masks["a"]["kernel"], mask)
    np.testing.assert_array_equal(params["a"]["kernel"], jnp.asarray(expected, jnp.bfloat16))


def test_weights_of_dead_inputs_go_first_and_those_that_stay_keep_their_values():
    weights, gram = oracles.problem(20, 10, 10)
    dead = [3, 7, 15]
    gram[dead] = gram[:, dead] = 0
    found, mask = solved(weights, gram, 0.5, mask_block=20, block=20)
    assert not mask[dead].any()
    found, mask = solved(weights, gram, 0.1, mask_block=20, block=20)
    assert mask[dead].sum() == 10
    np.testing.assert_array_equal(found[dead], np.where(mask[dead], weights[dead], 0))
    others = np.delete(np.arange(20), dead)
    np.testing.assert_allclose(found[others], weights[others], atol=1e-5)


def test_weights_that_are_not_numbers_do_not_spread():
    weights, gram = oracles.problem(20, 10, 11)
    weights[4, 2], weights[9, 9] = np.nan, np.inf
    found, mask = solved(weights, gram, 0.5)
    assert np.isfinite(found).all()
    assert not mask[[4, 9], [2, 9]].any()


@pytest.mark.slow
def test_singular_gram_matrices_are_damped_until_they_are_not_and_it_is_said():
    weights, gram = oracles.problem(32, 16, 12, samples=8)
    with pytest.warns(DampingWarning, match=r"params\['a'\]\['kernel'\] is singular .* raised from 0 to"):
        found, mask = solved(weights, gram, 0.5, damping=0.0)
    assert np.isfinite(found).all()
    assert (~mask).sum() == 256
    # Damped as usual it is nothing to speak of.
    solved(weights, gram, 0.5)


def test_indefinite_gram_matrices_are_damped_too():
    weights, gram = oracles.problem(16, 8, 13)
    with pytest.warns(DampingWarning, match="is singular"):
        found, _ = solved(weights, gram - 1.1 * np.linalg.eigvalsh(gram)[4] * np.eye(16), 0.5)
    assert np.isfinite(found).all()


def test_a_gram_matrix_with_nan_is_an_error_that_names_the_leaf():
    weights, gram = oracles.problem(16, 8, 14)
    gram[2, 3] = np.nan
    with pytest.raises(ValueError, match=r"Gram matrix of params\['a'\]\['kernel'\] is not finite"):
        solved(weights, gram, 0.5)


def test_a_sparsity_of_one_keeps_a_weight_and_warns():
    weights, gram = oracles.problem(8, 4, 15)
    with pytest.warns(PruningWarning, match=r"params\['a'\]\['kernel'\]: k = 1"):
        _, mask = solved(weights, gram, 1.0)
    assert mask.sum() == 1


# options, what the message says
REFUSED = [
    ({"k": 1.5}, r"rules.layer_sparsity takes 0 <= k <= 1.*params\['a'\]\['kernel'\]"),
    ({"k": 5, "rule": rules.n_m(4)}, r"rules.n_m\(4\) takes 1 <= k <= 4.*params\['a'\]\['kernel'\]"),
    ({"k": 1.5, "rule": rules.n_m(4)}, r"rules.n_m\(4\) takes a whole number, not k = 1.5"),
    ({"k": 2, "rule": rules.n_m(5)}, r"groups weights by 5 along the inputs, but params\['a'\]\['kernel'\] has 16"),
    ({"k": 0.5, "rule": rules.global_sparsity}, "not by rules.global_sparsity"),
    ({"k": 0.5, "damping": -1.0}, "damping >= 0"),
    ({"k": 0.5, "mask_block": 256}, "1 <= mask_block <= block; got 256 and 128"),
    ({"k": 2, "rule": rules.n_m(4), "mask_block": 2}, "whole groups of rules.n_m"),
    ({"k": 0.5, "prunable": {"b": True}}, r"No site multiplies data by 'b/kernel'"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_errors_say_what_was_asked_and_where(options, message):
    weights, gram = oracles.problem(16, 8, 16)
    params, grams = one(weights, gram)
    params["b"] = {"kernel": jnp.ones((2, 2))}
    options = {"prunable": {"a": True}, **options}
    with pytest.raises(ValueError, match=message):
        sparsegpt(params, grams, **options)


def test_statistics_of_another_model_are_refused():
    weights, gram = oracles.problem(16, 8, 17)
    _, grams = one(weights, gram)
    with pytest.raises(ValueError, match=r"of another model: params\['a'\]\['kernel'\] had shape \(16, 8\)"):
        sparsegpt(params_of(a=weights.T), grams, 0.5)


def on_mesh(kind, weights, gram):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    params, grams = one(weights, gram)
    params = jax.device_put(params, NamedSharding(mesh, P(None, "x")))
    return params, jax.device_put(grams, NamedSharding(mesh, P()))


# rule, k
SHARDED = {"half": (rules.layer_sparsity, 0.5), "by unit": (rules.row_sparsity, 0.5), "2:4": (rules.n_m(4), 2)}


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("name", slow_but(["half"], SHARDED))
def test_sharded_over_outputs_the_masks_are_those_of_one_device(name, kind):
    rule, k = SHARDED[name]
    weights, gram = oracles.problem(32, 64, 18)
    params, grams = on_mesh(kind, weights, gram)
    pruned, masks = sparsegpt(params, grams, k, rule=rule)
    expected, mask = solved(weights, gram, k, rule=rule)
    np.testing.assert_array_equal(masks["a"]["kernel"], mask)
    np.testing.assert_allclose(pruned["a"]["kernel"], expected, atol=1e-5)
    for tree in (pruned, masks):
        assert tree["a"]["kernel"].sharding.is_equivalent_to(params["a"]["kernel"].sharding, 2)


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("name", SHARDED)
def test_sharded_over_outputs_devices_exchange_a_few_numbers_only(name, kind):
    rule, k = SHARDED[name]
    params, grams = on_mesh(kind, *oracles.problem(32, 64, 19))
    compiled = compiled_for_users(jax.jit(functools.partial(sparsegpt, k=k, rule=rule)), params, grams)
    sizes = {
        operation: size
        for operation, size in operations(compiled)
        if re.search("all-|permute|scatter$", operation) and not operation.startswith("dynamic")
    }
    assert not set(sizes) - {"all-reduce"}
    # Seven counts a pass; by unit only whether all devices are done.
    assert max(sizes.values(), default=0) <= {"half": 16, "by unit": 1, "2:4": 0}[name]
