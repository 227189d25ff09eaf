"""Layers of more than 2**32 weights: programs that trace, counts that are exact, positions of several words."""

import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune
from jaxprune import rules
from jaxprune._selection import _counts, _pools
from jaxprune._selection._largest import keep_largest

SIDE = 70_000  # SIDE**2 is 4.9e9, beyond any 32-bit count
SEVEN = 7_000_000_000
FRACTIONS = [0.0, 1.0, 0.5, 0.9, 0.99, 1 / 3, 1e-9, 1e-40, 0.25 + 2**-24, 1 - 2**-24]


def value(count):
    return np.asarray(count.high).astype(object) * 2**32 + np.asarray(count.low).astype(object)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule",
    [rules.layer_sparsity, rules.global_sparsity, rules.erk_sparsity, rules.row_sparsity, rules.std_threshold],
    ids=lambda rule: rule.__name__,
)
def test_make_masks_traces_for_more_weights_than_a_word_can_count(rule):
    kernel = jax.ShapeDtypeStruct((SIDE, SIDE), jnp.float32)
    params = {"a": {"kernel": kernel}, "b": {"kernel": jax.ShapeDtypeStruct((3, 3, SIDE, 700), jnp.bfloat16)}}
    make = functools.partial(jaxprune.make_masks, rule=rule)
    known = jax.eval_shape(lambda params: make(params, 0.9), params)
    traced = jax.eval_shape(make, params, jax.ShapeDtypeStruct((), jnp.float32))
    assert known == traced == jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, bool), params)


def test_an_axis_that_cannot_be_numbered_is_refused():
    with pytest.raises(ValueError, match="axis 0 of an array of shape"):
        jax.eval_shape(
            lambda w: jaxprune.make_masks(w, 0.5, rule=rules.layer_sparsity, prunable=lambda path, leaf: True),
            jax.ShapeDtypeStruct((2**32,), jnp.float32),
        )


@pytest.mark.parametrize("n", [SEVEN, SEVEN + 1, 2**32, 2**33 - 1, SIDE**2, 2**40 + 12345])
def test_counts_to_remove_are_exact_beyond_32_bits(n):
    for k in FRACTIONS:
        assert value(_counts.rounded(k, n)) == round(k * n)
    traced = np.asarray(FRACTIONS, np.float32)
    expected = [round(Fraction(float(k)) * n) for k in traced]
    assert value(jax.jit(_counts.rounded, static_argnums=1)(jnp.asarray(traced), n)).tolist() == expected


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(k=st.floats(0, 1, width=32), n=st.integers(2**31, 2**44))
def test_a_traced_sparsity_is_taken_at_its_word(k, n):
    assert value(_counts.rounded(jnp.float32(k), n)) == round(Fraction(k) * n)


@pytest.mark.parametrize("terms", [(7, 1000), (70_000, 1)])
def test_sums_of_counts_are_exact_beyond_32_bits(terms):
    low = np.random.default_rng(0).integers(2**27, 2**28, terms, np.uint32)
    total = _counts.total(_counts.Count(jnp.zeros(terms, jnp.uint32), jnp.asarray(low)), (0, 1), 2**44 - 1)
    assert value(total) == int(low.astype(np.uint64).sum())
    assert int(total.high) > 0


def test_a_mask_is_counted_exactly_beyond_32_bits():
    mask = jax.ShapeDtypeStruct((SIDE, SIDE), bool)
    count = jax.eval_shape(lambda mask: _counts.count_true(mask, (0, 1)), mask)
    assert (count.high.shape, count.low.dtype) == ((), jnp.uint32)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [(), (0,)])
def test_positions_of_several_words_break_ties_by_row_major_index(monkeypatch, batch):
    """As for arrays with more entries than a word can number: here every axis has a word of its own."""
    monkeypatch.setattr(_pools, "words", lambda shape, axes: [(axis,) for axis in axes])
    values = jnp.asarray(np.random.default_rng(1).integers(0, 3, (3, 5, 7, 11)), jnp.float32)
    pools = values.reshape(3 if batch else 1, -1)
    for removed in (1, 100, 200, pools.shape[1] - 1):
        mask = keep_largest(values, _counts.from_int(removed), batch=batch, magnitude=True)
        expected = np.ones(pools.shape, bool)
        for pool, keep in zip(np.asarray(pools), expected, strict=True):
            keep[np.lexsort((-np.arange(pool.size), pool))[:removed]] = False
        np.testing.assert_array_equal(np.asarray(mask).reshape(pools.shape), expected)
