"""Gram matrices factorised: triangular roots, their inverses, damping where float32 needs it."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.sites._factorise import factorise, inverse_root


def drawn(size: int) -> np.ndarray:
    data = np.random.default_rng(size).normal(size=(2 * size, size))
    return data.T @ data


@pytest.mark.parametrize("size", [1, 7, 512, 513, 1027])
def test_roots_and_their_inverses(size):
    gram = drawn(size)
    factor = factorise(jnp.float32(gram), jnp.float32(0.01))
    expected = gram / np.diagonal(gram).mean() + 0.01 * np.eye(size)
    np.testing.assert_allclose(factor.gram, expected, atol=1e-5)
    root = np.float64(factor.root)
    np.testing.assert_array_equal(root, np.triu(root))
    np.testing.assert_allclose(root @ root.T, expected, atol=1e-5)
    inverse = np.float64(inverse_root(factor.root))
    np.testing.assert_array_equal(inverse, np.triu(inverse))
    np.testing.assert_allclose(
        inverse.T @ inverse, np.linalg.inv(expected), rtol=0, atol=1e-4 * np.linalg.inv(expected).max()
    )
    assert float(factor.damping) == np.float32(0.01)


def test_damping_grows_until_float32_can_factorise():
    rows = np.random.default_rng(0).normal(size=(3, 8))  # 8 inputs, 3 samples: singular
    factor = factorise(jnp.float32(rows.T @ rows), jnp.float32(0.0))
    assert np.float32(1e-6) <= float(factor.damping) <= 1e-3
    assert np.isfinite(factor.root).all()
    assert np.isinf(factor.condition) or float(factor.condition) > 1e6


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("place", [(0, 5), (5, 0), (2, 2)])
def test_what_is_not_finite_is_told(value, place):
    gram = drawn(6)
    gram[place] = gram[place[::-1]] = value
    assert np.isnan(factorise(jnp.float32(gram), jnp.float32(0.01)).damping)
