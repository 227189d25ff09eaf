"""N:M, whole channels and blocks: counts, places and composition with other rules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune
from jaxprune import rules, scores

KEY = jax.random.key(0)


def n_m_oracle(weights, n, m, axis):
    moved = np.moveaxis(np.abs(np.asarray(weights, np.float64)), axis, -1)
    groups = moved.reshape(*moved.shape[:-1], -1, m)
    order = np.argsort(-groups, axis=-1, kind="stable")
    keep = np.zeros(groups.shape, bool)
    np.put_along_axis(keep, order[..., :n], True, -1)
    return np.moveaxis(keep.reshape(moved.shape), -1, axis)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 2), (4, 4)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(8, 6), (3, 3, 16, 4)])
def test_n_m_equals_a_stable_sort_of_every_group_along_the_inputs(n, m, dtype, shape):
    weights = jax.random.normal(KEY, shape, dtype)
    mask = jaxprune.make_masks({"kernel": weights}, n, rule=rules.n_m(m))["kernel"]
    np.testing.assert_array_equal(mask, n_m_oracle(weights, n, m, -2))


@settings(max_examples=20, deadline=None)
@given(values=st.lists(st.sampled_from([0.0, 1.0, -1.0, float("nan")]), min_size=24, max_size=24), n=st.integers(1, 4))
def test_every_group_keeps_n_whatever_the_ties(values, n):
    weights = jnp.asarray(values).reshape(8, 3)
    mask = jaxprune.make_masks({"kernel": weights}, n, rule=rules.n_m(4))["kernel"]
    assert mask.reshape(2, 4, 3).sum(1).tolist() == [[n] * 3] * 2


def test_n_m_axis_follows_the_framework():
    params = {
        "flax": {"kernel": jax.random.normal(KEY, (8, 6))},
        "query": {"kernel": jax.random.normal(KEY, (8, 3, 5))},
        "equinox": {"weight": jax.random.normal(KEY, (6, 8))},
        "stack": {"kernel": jax.random.normal(KEY, (2, 8, 5))},
    }
    masks = jaxprune.make_masks(params, 2, rule=rules.n_m(4), stacked="stack")
    for path, axis in (("flax", 0), ("query", 0), ("equinox", 1), ("stack", 1)):
        [(weights, mask)] = zip(params[path].values(), masks[path].values(), strict=True)
        np.testing.assert_array_equal(mask, n_m_oracle(weights, 2, 4, axis))
    other = jaxprune.make_masks({"kernel": params["equinox"]["weight"]}, 2, rule=rules.n_m(4, axis=-1))["kernel"]
    np.testing.assert_array_equal(other, n_m_oracle(params["equinox"]["weight"], 2, 4, 1))


def test_n_may_be_traced_and_differ_between_layers():
    params = {"a": {"kernel": jax.random.normal(KEY, (8, 6))}, "b": {"kernel": jax.random.normal(KEY, (4, 2))}}
    masks = jax.jit(lambda k: jaxprune.make_masks(params, {"a": k, "b": 3}, rule=rules.n_m(4)))(jnp.int32(1))
    assert (int(masks["a"]["kernel"].sum()), int(masks["b"]["kernel"].sum())) == (12, 6)


@pytest.mark.parametrize(
    ("m", "k", "message"),
    [
        (4, 5, "1 <= k <= 4"),
        (4, 0, "1 <= k <= 4"),
        (4, 1.5, "whole number"),
        (7, 2, r"params\['kernel'\] has shape \(8, 6\)"),
    ],
)
def test_n_m_bad_input(m, k, message):
    with pytest.raises(ValueError, match=message):
        jaxprune.make_masks({"kernel": jnp.ones((8, 6))}, k, rule=rules.n_m(m))


def test_bad_groups_are_refused_when_the_rule_is_made():
    with pytest.raises(ValueError, match="whole number >= 1"):
        rules.n_m(0)
    with pytest.raises(ValueError, match="block's shape"):
        rules.blocks(rules.layer_sparsity, (0, 2))
    with pytest.raises(ValueError, match="axis 3"):
        jaxprune.make_masks({"kernel": jnp.ones((8, 6))}, 2, rule=rules.n_m(4, axis=3))
    with pytest.raises(ValueError, match="axis 5"):
        jaxprune.make_masks({"kernel": jnp.ones((8, 6))}, 0.5, rule=rules.channels(rules.layer_sparsity, axis=5))
    with pytest.raises(ValueError, match=r"blocks of shape \(2, 2, 2\)"):
        jaxprune.make_masks({"kernel": jnp.ones((8, 6))}, 0.5, rule=rules.blocks(rules.layer_sparsity, (2, 2, 2)))


def test_one_leaf_that_does_not_divide_may_stay_dense():
    params = {"a": {"kernel": jnp.ones((8, 2))}, "b": {"kernel": jnp.ones((6, 2))}}
    masks = jaxprune.make_masks(params, 2, rule=rules.n_m(4), prunable=lambda path, leaf: leaf.shape[0] % 4 == 0)
    assert masks["b"]["kernel"].all()
    assert int(masks["a"]["kernel"].sum()) == 8


@pytest.mark.slow
def test_channels_go_whole_and_by_their_norm():
    weights = jax.random.normal(KEY, (3, 3, 4, 10))
    mask = jaxprune.make_masks({"kernel": weights}, 0.3, rule=rules.channels(rules.layer_sparsity))["kernel"]
    gone = np.argsort(np.square(np.asarray(weights, np.float64)).sum((0, 1, 2)))[:3]
    expected = ~np.isin(np.arange(10), gone)
    np.testing.assert_array_equal(mask, np.broadcast_to(expected, weights.shape))
    inputs = jaxprune.make_masks({"kernel": weights}, 0.5, rule=rules.channels(rules.layer_sparsity, axis=-2))["kernel"]
    assert inputs.all((0, 1, 3)).tolist() == inputs.any((0, 1, 3)).tolist()
    assert int(inputs.all((0, 1, 3)).sum()) == 2


def test_channels_by_geometric_median():
    rule = rules.channels(rules.layer_sparsity, norm=scores.fpgm)
    mask = jaxprune.make_masks({"kernel": jnp.array([[1.0, -0.5, 3.0]])}, 1 / 3, rule=rule)["kernel"]
    assert mask.tolist() == [[False, True, True]]  # sums of distances: 3.5, 5, 5.5


@pytest.mark.slow
def test_channels_of_stacked_layers_are_chosen_layer_by_layer():
    stack = jax.random.normal(KEY, (3, 4, 10))
    masks = jaxprune.make_masks({"kernel": stack}, 0.3, rule=rules.channels(rules.layer_sparsity), stacked="kernel")
    single = [
        jaxprune.make_masks({"kernel": layer}, 0.3, rule=rules.channels(rules.layer_sparsity))["kernel"]
        for layer in stack
    ]
    np.testing.assert_array_equal(masks["kernel"], jnp.stack(single))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(7, 9), (3, 3, 5, 6)])
@pytest.mark.parametrize("block", [(2, 2), (3, 1), (4, 16)])
def test_blocks_of_uneven_size_go_whole(shape, block):
    weights = jax.random.normal(KEY, shape)
    mask = np.asarray(
        jaxprune.make_masks({"kernel": weights}, 0.5, rule=rules.blocks(rules.layer_sparsity, block))["kernel"]
    )
    assert mask.shape == shape
    magnitudes = np.abs(np.asarray(weights, np.float64))
    means, verdicts = [], []
    for taps in np.ndindex(shape[:-2]):
        for i in range(0, shape[-2], block[0]):
            for j in range(0, shape[-1], block[1]):
                tile = (*taps, slice(i, i + block[0]), slice(j, j + block[1]))
                means.append(magnitudes[tile].mean())
                assert mask[tile].all() or not mask[tile].any()
                verdicts.append(mask[tile].all())
    order = np.argsort(means, kind="stable")
    expected = np.ones(len(means), bool)
    expected[order[: min(round(0.5 * len(means)), len(means) - 1)]] = False
    assert verdicts == expected.tolist()


def test_blocks_may_be_scored_by_their_largest_weight():
    weights = jnp.array([[1.0, 1.0, 0.0, 3.0, 2.0, 2.0]])
    rule = rules.blocks(rules.layer_sparsity, (1, 2), reduce=functools.partial(jnp.max, initial=0))
    assert jaxprune.make_masks({"kernel": weights}, 1 / 3, rule=rule)["kernel"].tolist() == [[False] * 2 + [True] * 4]


@pytest.mark.slow
@pytest.mark.parametrize(
    "inner",
    [rules.std_threshold, rules.global_sparsity, rules.erk_sparsity, rules.layer_sparsity],
    ids=lambda r: r.__name__,
)
def test_granularities_compose_with_any_rule(inner):
    params = {"a": {"kernel": jax.random.normal(KEY, (8, 12))}, "b": {"kernel": jax.random.normal(KEY, (12, 4))}}
    for rule, whole in ((rules.channels(inner), (1, 0)), (rules.blocks(inner, (4, 4)), None)):
        masks = jaxprune.make_masks(params, 0.5, rule=rule)
        for mask in jax.tree.leaves(masks):
            assert mask.any()
            if whole:
                assert (mask.all(0) | ~mask.any(0)).all()
