"""LAMP against a float64 oracle of its equation, ties and stacks included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune
from jaxprune import rules, scores
from tests.support.score_checks import arrays, close, exact


def lamp_oracle(w):
    """Equation 3 for one layer, weights in rising order, among equals the lower index last."""
    squares = exact(w).ravel() ** 2
    order = np.lexsort((-np.arange(squares.size), squares))
    found = np.zeros_like(squares)
    for u, index in enumerate(order):
        total = squares[order[u:]].sum()
        found[index] = squares[index] / total if total else 0.0
    return found.reshape(np.shape(w))


@given(st.sampled_from([(7,), (3, 4), (2, 3, 2)]).flatmap(arrays))
@settings(deadline=None, max_examples=60)
def test_lamp_equation(w):
    np.testing.assert_allclose(scores.lamp([w])[0], lamp_oracle(w), rtol=1e-5, atol=1e-30)


@pytest.mark.slow
@given(arrays((5, 7)), st.integers(0, 34))
@settings(deadline=None, max_examples=20)
def test_lamp_ranks_a_layer_as_magnitude_does(w, removed):
    params, k = {"kernel": jnp.asarray(w)}, removed / 35
    of_lamp = jaxprune.make_masks(params, k, scores=scores.lamp(params), rule=rules.layer_sparsity)
    of_magnitude = jaxprune.make_masks(params, k, rule=rules.layer_sparsity)
    np.testing.assert_array_equal(of_lamp["kernel"], of_magnitude["kernel"])


def test_lamp_of_many_weights_is_accurate_and_in_order():
    w = np.random.default_rng(0).normal(size=(300, 1000)).astype(np.float32)
    found = np.asarray(scores.lamp([w])[0])
    order = np.argsort(-abs(w).ravel(), kind="stable")
    squares = exact(w).ravel()[order] ** 2
    np.testing.assert_allclose(found.ravel()[order], squares / np.cumsum(squares), rtol=3e-6)
    assert (np.diff(found.ravel()[order]) <= 0).all()


def test_lamp_of_many_ties_never_rises_from_a_weight_to_the_next_smaller_one():
    w = jnp.asarray(np.random.default_rng(0).normal(size=100_000), jnp.bfloat16)
    order = np.argsort(-abs(np.float32(w)), kind="stable")
    assert (np.diff(np.asarray(scores.lamp([w])[0])[order]) <= 0).all()


def test_lamp_by_hand():
    # weights, scores
    table = [
        ([0.0, 0.0], [0.0, 0.0]),
        ([3.0], [1.0]),
        ([0.0, 1.0], [0.0, 1.0]),
        ([1.0, 1.0, 1.0, 1.0], [1.0, 1 / 2, 1 / 3, 1 / 4]),
        ([1e30, 1e30], [1.0, 0.5]),
        ([1e-30, 1e-30], [1.0, 0.5]),
        ([np.nan, 1.0, np.inf, -1.0], [-np.inf, 1.0, np.inf, 0.5]),
        ([], []),
    ]
    for weights, expected in table:
        close(scores.lamp([jnp.array(weights, jnp.float32)])[0], np.float32(expected))
    assert float(scores.lamp(jnp.array(-2.0))) == 1.0


def test_lamp_of_stacked_layers():
    w = np.random.default_rng(0).integers(-3, 4, (3, 4, 5)).astype(np.float32)
    params = {"layers": {"kernel": w, "bias": w[:, 0]}, "head": w[0]}
    found = scores.lamp(params, stacked="layers")
    for i in range(3):
        close(found["layers"]["kernel"][i], lamp_oracle(w[i]), rtol=1e-5)
        close(found["layers"]["bias"][i], lamp_oracle(w[i, 0]), rtol=1e-5)
    close(found["head"], lamp_oracle(w[0]), rtol=1e-5)
    close(jax.vmap(lambda w: scores.lamp([w])[0])(jnp.asarray(w)), found["layers"]["kernel"])
    with pytest.raises(ValueError, match="stacked='blocks' matches no path"):
        scores.lamp(params, stacked="blocks")
