"""Masks and scores of sharded arrays: those of one device, sharded as the parameters, by small all-reduces only."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune
from jaxprune import rules, scores
from tests.support.compilation import compiled_for_users
from tests.support.sharding import operations
from tests.support.slow import slow_but

pytestmark = pytest.mark.optimised

_MOVES_DATA = {"all-gather", "sort", "all-to-all", "ragged-all-to-all", "collective-permute", "reduce-scatter"}
KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
SPECS = {"dense": {"kernel": P("x", "y"), "bias": P("y")}, "layers": {"kernel": P("y", "x", None)}}
RULES = {
    "std": (rules.std_threshold, 1.0),
    "mean": (rules.mean_threshold, 1.0),
    "max": (rules.max_threshold, 0.3),
    "absolute": (rules.absolute_threshold, 0.5),
    "layer": (rules.layer_sparsity, 0.7),
    "row": (rules.row_sparsity, 0.5),
    "global": (rules.global_sparsity, 0.7),
    "erk": (rules.erk_sparsity, 0.7),
    "n_m": (rules.n_m(4), 2),
    "channels": (rules.channels(rules.layer_sparsity), 0.5),
    "blocks": (rules.blocks(rules.mean_threshold, (2, 2)), 1.0),
}


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def quarters(*shape):
    """Many ties, and sums that are exact in any order: the statistics cannot depend on the sharding."""
    return np.round(4 * normal(*shape)) / 4


PARAMS = {
    "dense": {"kernel": quarters(16, 8), "bias": np.zeros(8, np.float32)},
    "layers": {"kernel": quarters(4, 8, 6)},
}


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))


def shard(tree, kind, specs=SPECS):
    return jax.device_put(tree, jax.tree.map(lambda spec: NamedSharding(mesh_of(kind), spec), specs))


def make(name):
    rule, k = RULES[name]
    return functools.partial(jaxprune.make_masks, k=k, rule=rule, stacked="layers")


@functools.cache
def masks_on_one_device(name):
    return jax.jit(make(name))(PARAMS)


def assert_sharded_as(found, like):
    for array, other in zip(jax.tree.leaves(found), jax.tree.leaves(like), strict=True):
        assert array.sharding.is_equivalent_to(other.sharding, array.ndim), (array.sharding, other.sharding)


@KINDS
@pytest.mark.parametrize("name", slow_but(("std", "n_m"), RULES))
def test_masks_are_bit_for_bit_those_of_one_device_and_sharded_as_the_parameters(name, kind):
    params = shard(PARAMS, kind)
    masks = jax.jit(make(name))(params)
    chex.assert_trees_all_equal(masks, masks_on_one_device(name))
    assert not all(mask.all() for mask in jax.tree.leaves(masks))
    assert_sharded_as(masks, params)


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("name", slow_but(("std", "n_m"), RULES))
def test_masks_are_the_same_without_jit(name, kind):
    params = shard(PARAMS, kind)
    masks = make(name)(params)
    chex.assert_trees_all_equal(masks, masks_on_one_device(name))
    assert_sharded_as(masks, params)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("std", P(None, "x", "y")),
        ("std", P("x", None, "y")),
        ("std", P(None, None, ("x", "y"))),
        ("layer", P(None, "x", "y")),
        pytest.param("layer", P("x", None, "y"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_stacked_layers_may_be_sharded_along_any_axis(name, spec):
    stack = quarters(4, 4, 8)
    sharded = shard(stack, AxisType.Explicit, spec)
    mask = jax.jit(make(name))({"layers": sharded})["layers"]
    for layer, found in zip(stack, np.asarray(mask), strict=True):
        np.testing.assert_array_equal(found, jaxprune.make_masks(layer, RULES[name][1], rule=RULES[name][0]))
    assert_sharded_as(mask, sharded)


@KINDS
def test_a_standard_deviation_added_up_in_another_order_moves_no_weight_but_those_at_the_threshold(kind):
    """Sums of any floats depend in their last bit on the order, which the sharding decides."""
    weights = normal(256, 128)
    mask = jaxprune.make_masks(shard(weights, kind, P("x", "y")), 1.0)
    threshold = np.std(weights.astype(np.float64))
    decided = np.abs(np.abs(weights) - threshold) > 1e-6 * threshold
    np.testing.assert_array_equal(np.asarray(mask)[decided], (np.abs(weights) >= threshold)[decided])
    assert np.mean(decided) > 0.999


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_scores_are_those_of_one_device_and_sharded_as_the_parameters(kind, jitted):
    def score(params, grads):
        return scores.magnitude(params), scores.random(params, jax.random.key(0)), scores.saliency(params, grads)

    grads = jax.tree.map(lambda leaf: leaf[::-1] + 1, PARAMS)
    params = shard(PARAMS, kind)
    found = (jax.jit(score) if jitted else score)(params, shard(grads, kind))
    chex.assert_trees_all_equal(found, score(PARAMS, grads))
    for tree in found if kind is AxisType.Explicit or not jitted else (found[0], found[2]):
        assert_sharded_as(tree, params)


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("name", ["layer", "global"])
def test_promise_4_no_gather_no_sort_and_only_small_all_reduces(name, kind):
    mesh = mesh_of(kind)
    abstract = {
        leaf: jax.ShapeDtypeStruct((4096, 1024), jnp.float32, sharding=NamedSharding(mesh, P("x", "y")))
        for leaf in ("a", "b")
    }
    found = list(operations(compiled_for_users(jax.jit(make_for_two(name)), abstract)))
    assert not _MOVES_DATA & {operation for operation, _ in found}
    reduced = [size for operation, size in found if operation == "all-reduce"]
    assert 0 < max(reduced) <= 16  # seven counts a pass


def make_for_two(name):
    rule, k = RULES[name]
    return functools.partial(jaxprune.make_masks, k=k, rule=rule)


def test_the_search_for_operations_finds_them():
    """The test above is worth something: a sort of the same array gathers, and is seen to."""
    abstract = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh_of(AxisType.Auto), P("x", "y")))
    found = dict(operations(compiled_for_users(jax.jit(lambda x: jnp.sort(x.ravel())), abstract)))
    assert {"all-gather", "sort"} & set(found)
    assert max(found.values()) >= 64 * 32 // 8


@KINDS
@pytest.mark.parametrize("name", ["std", pytest.param("global", marks=pytest.mark.slow), "n_m"])
def test_inside_shard_map_a_layer_is_what_the_device_holds(name, kind):
    """Thresholds and counts are then those of each shard; only rules whose groups lie in one shard agree with both."""
    weights = quarters(16, 8)
    spec = P("x", "y")
    inside = jax.shard_map(make_for_two(name), mesh=mesh_of(kind), in_specs=spec, out_specs=spec)
    found = np.asarray(jax.jit(inside)(shard(weights, kind, spec)))
    whole = np.asarray(make_for_two(name)(weights))
    for rows in range(0, 16, 4):
        for columns in range(0, 8, 4):
            tile = (slice(rows, rows + 4), slice(columns, columns + 4))
            np.testing.assert_array_equal(found[tile], make_for_two(name)(weights[tile]))
    assert (found == whole).all() == (name == "n_m")
