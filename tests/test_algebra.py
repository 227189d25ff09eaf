"""Mask algebra: laws, values by hand, bits as NumPy packs them, and what a check of masks says."""

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune
from jaxprune.algebra import intersect, invert, masks_of, overlap, pack, require_pruned, union, unpack

A = {"dense": {"kernel": jnp.array([[True, True], [False, False]]), "bias": jnp.ones(2, bool)}, "head": jnp.array(True)}
B = {"dense": {"kernel": jnp.array([[True, False], [True, False]]), "bias": jnp.ones(2, bool)}, "head": jnp.array(True)}
BOOLS = hnp.arrays(bool, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5))


def kernel(masks):
    return masks["dense"]["kernel"].tolist()


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize(
    ("operation", "expected"),
    [(intersect, [[True, False], [False, False]]), (union, [[True, True], [True, False]])],
)
def test_two_masks_combine_weight_by_weight(operation, expected, jitted):
    found = (jax.jit(operation) if jitted else operation)(A, B)
    assert kernel(found) == expected
    assert found["dense"]["bias"].all()
    assert jax.tree.structure(found) == jax.tree.structure(A)


def test_invert_removes_what_was_kept():
    assert kernel(invert(A)) == [[False, False], [True, True]]
    assert not invert(A)["dense"]["bias"].any()


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_the_laws_of_sets_hold(data):
    a = data.draw(BOOLS)
    b = data.draw(hnp.arrays(bool, a.shape))
    np.testing.assert_array_equal(intersect([a], [b])[0], a & b)
    np.testing.assert_array_equal(invert(union([a], [b]))[0], intersect(invert([a]), invert([b]))[0])
    both, either = np.sum(a & b), np.sum(a | b)
    expected = 1.0 if either == 0 or both == a.size else both / either
    assert float(overlap([a], [b])) == pytest.approx(expected, rel=1e-6)
    assert float(overlap([a], [b])) == float(overlap([b], [a]))


def test_trees_of_other_classes_are_aligned_by_path():
    found = intersect(flax.core.freeze(A), B)
    assert isinstance(found, flax.core.FrozenDict)
    assert kernel(found) == [[True, False], [False, False]]
    assert kernel(union(B, flax.core.freeze(A))) == [[True, True], [True, False]]


def test_none_and_masked_node_keep_a_leaf_whole():
    whole = {"dense": {"kernel": None, "bias": None}, "head": optax.MaskedNode()}
    assert kernel(intersect(A, whole)) == kernel(intersect(whole, A)) == kernel(A)
    assert union(whole, whole) == {"dense": {"kernel": None, "bias": None}, "head": None}
    assert kernel(union(whole, A)) == [[True, True], [True, True]]
    assert float(overlap(A, whole)) == 0.5  # two of the four weights
    with pytest.raises(ValueError, match=r"masks\['dense'\]\['bias'\] is None.*cannot be inverted"):
        invert(whole)


def test_overlap_counts_only_leaves_that_are_pruned():
    assert float(jax.jit(overlap)(A, B)) == pytest.approx(1 / 3)
    assert float(overlap(A, A)) == 1.0
    assert float(overlap(A, invert(A))) == 0.0  # the whole bias of A is gone in the other
    nothing = jax.tree.map(jnp.ones_like, A)
    assert float(overlap(nothing, nothing)) == 1.0
    empty = {"kernel": jnp.zeros((2, 2), bool)}
    assert float(overlap(empty, empty)) == 1.0


def test_overlap_of_random_masks_is_what_chance_gives():
    a, b = (jax.random.bernoulli(jax.random.key(seed), 0.1, (400, 500)) for seed in (0, 1))
    assert float(overlap([a], [b])) == pytest.approx(0.1 / 1.9, abs=0.003)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ({"w": np.ones(2, bool)}, {"v": np.ones(2, bool)}, r"b has no entry for a\['w'\]"),
        ({"w": np.ones(2, bool)}, {"w": np.ones(2, bool), "v": np.ones(2, bool)}, r"b\['v'\] has no counterpart"),
        ({"w": np.ones(2, bool)}, {"w": np.ones(3, bool)}, r"a\['w'\] has shape \(2,\), but b has \(3,\)"),
        ({"w": np.ones(2)}, {"w": np.ones(2, bool)}, r"a\['w'\] is float64\[2\], not a boolean mask"),
        ({"w": np.ones(2, bool)}, {"w": 1.0}, r"b\['w'\] is float\[\], not a boolean mask"),
    ],
)
@pytest.mark.parametrize("operation", [intersect, union, overlap])
def test_masks_of_different_parameters_are_refused(operation, a, b, message):
    with pytest.raises(ValueError, match=message):
        operation(a, b)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(mask=BOOLS)
def test_bits_are_packed_as_numpy_packs_them_and_come_back(mask):
    [packed] = pack([mask])
    assert packed.dtype == jnp.uint8
    np.testing.assert_array_equal(packed, np.packbits(mask, bitorder="little"))
    np.testing.assert_array_equal(unpack([packed], [jax.ShapeDtypeStruct(mask.shape, jnp.bfloat16)])[0], mask)


def test_packing_works_under_jit_and_for_trees_of_other_classes():
    packed = jax.jit(pack)(A)
    assert packed["dense"]["kernel"].tolist() == [3]
    params = flax.core.freeze(jax.tree.map(lambda mask: jnp.zeros(mask.shape), A))
    found = jax.jit(unpack)(packed, params)
    assert isinstance(found, flax.core.FrozenDict)
    assert kernel(found) == kernel(A)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_the_algebra_of_sharded_masks_keeps_their_sharding(kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    mask = jax.random.bernoulli(jax.random.key(0), 0.4, (8, 6))
    sharded = jax.device_put(mask, NamedSharding(mesh, P("x", "y")))
    for found, expected in (
        (intersect([sharded], [sharded])[0], mask),
        (invert([sharded])[0], ~mask),
        (unpack(pack([sharded]), [sharded])[0], mask),
        (masks_of([sharded.astype(jnp.float32)])[0], mask),
    ):
        np.testing.assert_array_equal(found, expected)
        assert found.sharding.is_equivalent_to(sharded.sharding, 2)
    np.testing.assert_array_equal(pack([sharded])[0], np.packbits(mask, bitorder="little"))
    assert float(overlap([sharded], [sharded])) == 1.0
    require_pruned([jnp.where(sharded, 1.0, 0.0)], [sharded])


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        ({"w": np.zeros(1, np.uint8)}, r"packed has for like\['w'\] uint8\[1\].*shape \[3, 4\] takes uint8\[2\]"),
        ({"w": np.zeros(2, bool)}, r"bool\[2\].*takes uint8\[2\]"),
        ({"v": np.zeros(2, np.uint8)}, r"packed has no entry for like\['w'\]"),
    ],
)
def test_bits_of_another_shape_are_refused(packed, message):
    with pytest.raises(ValueError, match=message):
        unpack(packed, {"w": np.zeros((3, 4))})


def test_masks_of_reads_zeros_of_prunable_leaves():
    params = {
        "dense": {"kernel": jnp.array([[0.0, -0.0, jnp.nan, 1e-40]]), "bias": jnp.zeros(4)},
        "steps": jnp.zeros(2, jnp.int32),
        "key": jax.random.key(0),
    }
    masks = jax.jit(masks_of)(params)
    # A denormal number is not zero, but XLA may flush it to zero as it compares.
    assert kernel(masks)[0][:3] == [False, False, True]
    assert all(masks[name].all() and masks[name].shape == params[name].shape for name in ("steps", "key"))
    assert masks["dense"]["bias"].all()
    assert not masks_of(params, prunable=lambda path, leaf: True)["dense"]["bias"].any()
    stack = {"layers": {"bias": jnp.zeros((3, 4)), "kernel": jnp.zeros((3, 4, 4))}}
    found = masks_of(stack, stacked="layers")["layers"]
    assert (found["bias"].all(), found["kernel"].any()) == (True, False)


def test_masks_of_applied_masks_are_the_masks():
    params = {"kernel": jax.random.normal(jax.random.key(0), (20, 30))}
    masks = jaxprune.make_masks(params, 0.8, rule=jaxprune.rules.layer_sparsity)
    pruned = jaxprune.apply_masks(params, masks)
    np.testing.assert_array_equal(masks_of(pruned)["kernel"], masks["kernel"])
    require_pruned(pruned, masks)


KERNEL = {"kernel": jnp.array([[1.0, 2.0], [0.0, -0.0]])}
MASK = np.array([[True, True], [False, False]])


@pytest.mark.parametrize(
    ("params", "mask", "message"),
    [
        (KERNEL, {"weight": MASK}, r"masks has no entry for params\['kernel'\]"),
        (KERNEL, {"kernel": MASK.astype(np.int32)}, r"params\['kernel'\] an array of int32"),
        (KERNEL, {"kernel": MASK[:1]}, r"bool\[1, 2\]; a mask is bool of its leaf's shape \[2, 2\]"),
        (KERNEL, {"kernel": ~MASK}, r"params\['kernel'\] has 2 pruned weight\(s\) of 2 .* largest is 2\."),
        ({"kernel": jnp.full((2, 2), jnp.nan)}, {"kernel": MASK}, "2 pruned .* largest is nan"),
    ],
)
def test_validate_names_the_leaf_that_does_not_fit(params, mask, message):
    with pytest.raises(ValueError, match=message):
        require_pruned(params, mask)


def test_validate_accepts_what_fits():
    require_pruned(KERNEL, {"kernel": MASK})
    require_pruned(KERNEL | {"steps": jnp.ones(2, jnp.int32)}, {"kernel": MASK, "steps": None})
    with pytest.raises(ValueError, match=r"require_pruned reads the values of params\['kernel'\].*outside jit"):
        jax.jit(lambda params: require_pruned(params, {"kernel": MASK}))(KERNEL)
