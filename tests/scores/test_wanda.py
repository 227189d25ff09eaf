"""Scores from norms and Gram matrices, and the allocation they give: by hand, and against NumPy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune import rules, scores
from jaxprune.choose._allocate_by_loss import allocate_by_loss
from jaxprune.oneshot._sparsegpt import sparsegpt
from jaxprune.sites._calibrate import calibrate_grams, calibrate_norms
from tests.support import oracles_oneshot as oracles
from tests.support.oneshot_problems import grams_of, one, params_of


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_wanda_multiplies_magnitudes_with_norms_of_inputs():
    """By hand: norms (5, 13) of the two inputs."""
    params = {"kernel": jnp.array([[1.0, -2.0], [0.5, jnp.nan]])}
    norms = calibrate_norms(lambda params, x: x @ params["kernel"], params, [jnp.array([[3.0, 5.0], [4.0, 12.0]])])
    np.testing.assert_allclose(scores.wanda(params, norms)["kernel"], [[5.0, 10.0], [6.5, -np.inf]], rtol=1e-6)


@pytest.mark.slow
def test_wanda_prefers_a_small_weight_on_a_large_input():
    """The planted outlier feature that magnitude does not see."""
    params = {"kernel": jnp.asarray(normal(16, 8))}
    params["kernel"] = params["kernel"].at[3].multiply(0.1)
    data = normal(64, 16, seed=1) * np.where(np.arange(16) == 3, 100, 1)
    norms = calibrate_norms(lambda params, x: x @ params["kernel"], params, [jnp.asarray(data, jnp.float32)])
    masks = jaxprune.make_masks(params, 0.5, rule=rules.row_sparsity, scores=scores.wanda(params, norms))
    assert masks["kernel"][3].all()
    assert not jaxprune.make_masks(params, 0.5, rule=rules.row_sparsity)["kernel"][3].all()
    errors = [
        np.linalg.norm(data @ np.where(found["kernel"], 0, params["kernel"]))
        for found in (masks, jaxprune.make_masks(params, 0.5, rule=rules.row_sparsity))
    ]
    assert errors[0] < 0.3 * errors[1]


def test_ria_is_the_formula_of_the_paper():
    weights, data = normal(6, 5), normal(20, 6, seed=1)
    params = {"kernel": jnp.asarray(weights)}
    norms = calibrate_norms(lambda params, x: x @ params["kernel"], params, [data])
    sizes = np.abs(weights.astype(np.float64))
    expected = (sizes / sizes.sum(0) + sizes / sizes.sum(1, keepdims=True)) * np.linalg.norm(data, axis=0)[
        :, None
    ] ** 0.3
    np.testing.assert_allclose(scores.ria(params, norms, power=0.3)["kernel"], expected, rtol=1e-5)


def test_ria_survives_units_without_weights_and_nan():
    weights = normal(4, 3)
    weights[:, 1], weights[2] = 0, 0
    weights[0, 0] = np.nan
    params = {"kernel": jnp.asarray(weights)}
    norms = calibrate_norms(lambda params, x: x @ params["kernel"], params, [normal(9, 4)])
    found = np.asarray(scores.ria(params, norms)["kernel"])
    assert found[0, 0] == -np.inf
    assert np.isfinite(np.delete(found.ravel(), 0)).all()


@pytest.mark.slow
def test_convolutions_attention_and_tables_are_scored_in_their_own_layout():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(11, 8, name="embed")(tokens)
            x = nn.MultiHeadDotProductAttention(2, name="attention")(x)
            return nn.Conv(4, (3,), name="conv")(x)

    model, tokens = Model(), jnp.array([[0, 3, 3, 5], [3, 1, 2, 0]])
    params = model.init(jax.random.key(0), tokens)
    norms = calibrate_norms(model.apply, params, [tokens])
    found = scores.wanda(params, norms)["params"]
    # A row that is read n times has the norm sqrt(n).
    times = np.sqrt(np.bincount(np.asarray(tokens).ravel(), minlength=11))
    embedding = np.abs(params["params"]["embed"]["embedding"])
    np.testing.assert_allclose(found["embed"]["embedding"], embedding * times[:, None], rtol=1e-5)
    assert found["conv"]["bias"] is None
    for name in ("query", "key", "value", "out"):
        kernel = params["params"]["attention"][name]["kernel"]
        assert found["attention"][name]["kernel"].shape == kernel.shape
    # q, k and v see the same input.
    ratios = [
        found["attention"][name]["kernel"] / np.abs(params["params"]["attention"][name]["kernel"])
        for name in ("query", "key")
    ]
    np.testing.assert_allclose(*ratios, rtol=1e-4)
    # Every input channel of the convolution is met three times, at the edges less.
    assert found["conv"]["kernel"].shape == (3, 8, 4)


def test_leaves_without_a_score_are_refused_by_name():
    params = {"used": {"kernel": jnp.ones((4, 4))}, "unused": {"kernel": jnp.ones((4, 4))}}
    norms = calibrate_norms(lambda params, x: x @ params["used"]["kernel"], params, [jnp.ones((5, 4))])
    found = scores.wanda(params, norms)
    with pytest.raises(ValueError, match=r"scores for params\['unused'\]\['kernel'\] are None"):
        jaxprune.make_masks(params, 0.5, rule=rules.layer_sparsity, scores=found)
    masks = jaxprune.make_masks(params, 0.5, rule=rules.layer_sparsity, scores=found, prunable={"used": True})
    assert masks["used"]["kernel"].sum() == 8
    with pytest.raises(ValueError, match=r"of another model: params\['used'\]"):
        scores.wanda({"used": {"kernel": jnp.ones((4, 3))}, "unused": params["unused"]}, norms)


def test_obs_scores_are_what_the_loss_becomes_when_one_weight_goes_and_the_others_make_up():
    weights, gram = oracles.problem(8, 3, 2)
    found = np.asarray(scores.obs(*one(weights, gram))["a"]["kernel"])
    damped = oracles.damped(gram, 0.01)
    for i, j in [(0, 0), (5, 2), (7, 1)]:
        mask = np.ones((8, 3), bool)
        mask[i, j] = False
        loss = oracles.loss(oracles.reconstruct(weights, mask, damped), weights, damped)
        assert found[i, j] == pytest.approx(loss, rel=1e-3)


@pytest.mark.slow
def test_allocation_removes_more_where_less_is_lost_and_the_exact_total():
    """The first layer's inputs are nearly copies of each other, so its weights can stand in for one another."""
    first, _ = oracles.problem(32, 16, 3)
    second, other = oracles.problem(24, 16, 4)
    data = normal(400, 4, seed=5) @ normal(4, 32, seed=6) + 0.1 * normal(400, 32, seed=7)
    params = params_of(a=first, b=second)
    params["b"]["bias"] = jnp.zeros(16)
    grams = grams_of({"a": first, "b": second}, {"a": data.T @ data, "b": other})
    k = allocate_by_loss(params, 0.5, scores=scores.obs(params, grams))
    assert "bias" not in k["b"]
    assert k["a"]["kernel"] > 0.6 > 0.4 > k["b"]["kernel"]
    _, masks = sparsegpt(params, grams, k)
    total = sum((~masks[name]["kernel"]).sum() for name in "ab")
    assert total == round(0.5 * (first.size + second.size))


@pytest.mark.slow
def test_allocation_gives_stacked_layers_their_own_and_stops_at_max_sparsity():
    losses = np.stack([np.linspace(1, 2, 16), np.linspace(3, 4, 16)]).reshape(2, 4, 4).astype(np.float32)
    params = {"layers": {"kernel": jnp.ones((2, 4, 4))}}
    found = {"layers": {"kernel": jnp.asarray(losses)}}
    k = allocate_by_loss(params, 0.5, scores=found, stacked="layers", max_sparsity=0.75)
    np.testing.assert_array_equal(k["layers"]["kernel"], [0.75, 0.25])

    @jax.jit
    def traced_allocation(k, found):
        return allocate_by_loss(params, k, scores=found, stacked="layers", max_sparsity=0.75)

    traced = traced_allocation(0.5, found)
    np.testing.assert_array_equal(traced["layers"]["kernel"], [0.75, 0.25])
    masks = jaxprune.make_masks(params, k, rule=rules.layer_sparsity, stacked="layers")
    np.testing.assert_array_equal((~masks["layers"]["kernel"]).sum((1, 2)), [12, 4])


@pytest.mark.slow
def test_methods_take_statistics_of_real_models_and_prune_every_layout():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=2, name="conv")(x))
            x = nn.MultiHeadDotProductAttention(2, name="attention")(x.reshape(len(x), -1, 8))
            return nn.Dense(3, name="dense")(x.reshape(len(x), -1))

    model, images = Model(), normal(64, 4, 4, 4)
    params = model.init(jax.random.key(1), images)
    grams = calibrate_grams(model.apply, params, [images, images[::-1] * 2])
    for k, rule in [(0.5, rules.layer_sparsity), (1, rules.n_m(2))]:
        pruned, masks = sparsegpt(params, grams, k, rule=rule)
        assert float(jaxprune.sparsity(masks)) == 0.5
        alone = jaxprune.apply_masks(params, jaxprune.make_masks(params, k, rule=rule))
        errors = [np.linalg.norm(model.apply(found, images) - model.apply(params, images)) for found in (pruned, alone)]
        assert errors[0] < 0.8 * errors[1]
    # N:M groups run along the input channels of a convolution, as those of make_masks do.
    kernel = np.asarray(masks["params"]["conv"]["kernel"])
    np.testing.assert_array_equal(kernel.sum(2), 1)
