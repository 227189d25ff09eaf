"""ADMM: exact counts, less loss than SparseGPT, the best weights under its mask, stacks and shardings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxprune import rules
from jaxprune.oneshot._admm import admm
from jaxprune.oneshot._sparsegpt import sparsegpt
from tests.support import oracles_oneshot as oracles
from tests.support.compilation import compiled_for_users
from tests.support.oneshot_problems import one
from tests.support.sharding import operations
from tests.support.slow import slow_but

KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])

# rule, k
PATTERNS = {
    "half": (rules.layer_sparsity, 0.5),
    "70 %": (rules.layer_sparsity, 0.7),
    "90 %": (rules.layer_sparsity, 0.9),
    "by unit": (rules.row_sparsity, 0.6),
    "2:4": (rules.n_m(4), 2),
    "4:8": (rules.n_m(8), 4),
    "1:4": (rules.n_m(4), 1),
}

QUICK = ("70 %", "2:4")
NAMES = slow_but(QUICK, PATTERNS)


def solved(method, weights, gram, k, **options):
    params, masks = method(*one(weights, gram), k, **options)
    return np.asarray(params["a"]["kernel"]), np.asarray(masks["a"]["kernel"])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_its_loss_is_never_above_that_of_sparsegpt(name):
    rule, k = PATTERNS[name]
    for seed in range(6):
        weights, gram = oracles.problem(48, 32, seed)
        losses = [
            oracles.loss(solved(method, weights, gram, k, rule=rule)[0], weights, oracles.damped(gram, 0.01))
            for method in (admm, sparsegpt)
        ]
        assert losses[0] <= losses[1], (seed, losses)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_counts_are_the_rules_and_the_weights_the_best_under_the_mask(name):
    rule, k = PATTERNS[name]
    weights, gram = oracles.problem(48, 32, 7, samples=600)
    found, mask = solved(admm, weights, gram, k, rule=rule)
    if rule is rules.layer_sparsity:
        assert (~mask).sum() == round(k * mask.size)
    elif rule is rules.row_sparsity:
        np.testing.assert_array_equal((~mask).sum(0), round(k * 48))
    else:
        m = {"2:4": 4, "4:8": 8, "1:4": 4}[name]
        np.testing.assert_array_equal(mask.reshape(-1, m, 32).sum(1), k)
    assert (found[~mask] == 0).all()
    expected = oracles.reconstruct(weights, mask, oracles.damped(gram, 0.01))
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.slow
def test_independent_inputs_leave_nothing_to_make_up_so_the_smallest_contributions_go():
    """With a diagonal Gram matrix the best mask is known: it keeps the largest ``|w| ||x||``."""
    weights, _ = oracles.problem(24, 16, 8)
    gram = np.diag(np.linspace(1, 9, 24))
    found, mask = solved(admm, weights, gram, 0.5, damping=0.0)
    scores = np.abs(weights) * np.sqrt(np.diagonal(gram))[:, None]
    np.testing.assert_array_equal(mask, oracles.keep_largest(scores, 192))
    np.testing.assert_allclose(found, np.where(mask, weights, 0), atol=1e-6)


@pytest.mark.slow
def test_more_steps_find_a_better_mask():
    weights, gram = oracles.problem(96, 48, 9)
    losses = [oracles.loss(solved(admm, weights, gram, 0.7, steps=steps)[0], weights, gram) for steps in (1, 8, 60)]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.slow
def test_stacks_traced_strengths_and_bad_entries():
    problems = [oracles.problem(16, 8, seed) for seed in (10, 11)]
    weights, grams = (np.stack(arrays) for arrays in zip(*problems, strict=True))
    weights[0, 2, 3] = np.nan
    grams[1, 5] = grams[1, :, 5] = 0
    params, statistics = one(weights, grams)
    found, masks = jax.jit(admm)(params, statistics, jnp.array([0.25, 0.5]))
    found, masks = np.asarray(found["a"]["kernel"]), np.asarray(masks["a"]["kernel"])
    np.testing.assert_array_equal((~masks).sum((1, 2)), [32, 64])
    assert np.isfinite(found).all()
    assert not masks[0, 2, 3]
    assert not masks[1, 5].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "a whole number of steps"),
        ({"damping": -0.1}, "admm takes damping >= 0"),
        ({"rule": rules.std_threshold}, "admm chooses weights within one matrix.*not by rules.std_threshold"),
        ({"k": jnp.nan}, "0 <= k <= 1"),
    ],
)
def test_errors_say_what_was_asked(options, message):
    params, grams = one(*oracles.problem(8, 4, 12))
    with pytest.raises(ValueError, match=message):
        admm(params, grams, **{"k": 0.5, **options})


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("name", ["half", "2:4"])
def test_sharded_over_outputs_the_masks_are_those_of_one_device(name, kind):
    rule, k = PATTERNS[name]
    weights, gram = oracles.problem(32, 64, 13)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    params, grams = one(weights, gram)
    params = jax.device_put(params, NamedSharding(mesh, P(None, "x")))
    grams = jax.device_put(grams, NamedSharding(mesh, P()))
    pruned, masks = admm(params, grams, k, rule=rule)
    expected, mask = solved(admm, weights, gram, k, rule=rule)
    np.testing.assert_array_equal(masks["a"]["kernel"], mask)
    np.testing.assert_allclose(pruned["a"]["kernel"], expected, atol=1e-4)
    for tree in (pruned, masks):
        assert tree["a"]["kernel"].sharding.is_equivalent_to(params["a"]["kernel"].sharding, 2)
    compiled = compiled_for_users(jax.jit(lambda params, grams: admm(params, grams, k, rule=rule)), params, grams)
    exchanged = [found for found in operations(compiled) if found[0].startswith("all-") or "permute" in found[0]]
    assert {operation for operation, _ in exchanged} == {"all-reduce"}
    assert max(size for _, size in exchanged) <= 16
