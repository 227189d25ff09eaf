"""Integers with scales that many share, cut as the parameter that they stand for; without the library that makes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.structured import Plan, shrink


def quantized(shape, scales):
    """A parameter as qwix keeps it, and the numbers that it stands for."""
    rng = np.random.default_rng(0)
    parts = {"qvalue": rng.integers(-8, 8, shape, np.int8), "scale": rng.random(scales, np.float32)}
    parts["zero_point"] = rng.integers(-8, 8, scales, np.int8)
    return {"a": {"kernel": {"array": jax.tree.map(jnp.asarray, parts)}}}


def numbers(tree):
    parts = jax.tree.map(np.asarray, tree["a"]["kernel"]["array"])
    shape = parts["qvalue"].shape
    wide = lambda part: np.kron(part, np.ones([n // s for n, s in zip(shape, part.shape, strict=True)]))  # noqa: E731
    return (parts["qvalue"] - wide(parts["zero_point"])) * wide(parts["scale"])


INPUTS, OUTPUTS = (0, 1, 4, 5), (1, 2, 7)
# the scales of (6, 8) -> what is left of them
SCALES = {(1, 8): (1, 3), (6, 1): (4, 1), (6, 8): (4, 3), (3, 8): (2, 3), (1, 1): (1, 1)}


@pytest.mark.parametrize("scales", SCALES)
def test_scales_are_cut_along_the_axes_that_they_have(scales):
    tree = quantized((6, 8), scales)
    plan = Plan({"a/kernel": {0: INPUTS, 1: OUTPUTS}}, {"a/kernel": (6, 8)})
    small = jax.jit(lambda tree: shrink(plan, tree))(tree)
    assert (
        small["a"]["kernel"]["array"]["scale"].shape
        == small["a"]["kernel"]["array"]["zero_point"].shape
        == SCALES[scales]
    )
    assert [leaf.dtype for leaf in jax.tree.leaves(small)] == [leaf.dtype for leaf in jax.tree.leaves(tree)]
    np.testing.assert_array_equal(numbers(small), numbers(tree)[np.ix_(INPUTS, OUTPUTS)])


def test_each_layer_of_a_stack_keeps_its_own():
    kept = ((0, 1, 4, 5), (2, 3, 4, 5))
    plan = Plan({"a/kernel": {1: kept}}, {"a/kernel": (2, 6, 3)}, layers={"a/kernel": 0})
    tree = quantized((2, 6, 3), (2, 3, 3))  # two inputs share a scale
    expected = np.stack([layer[list(rows)] for layer, rows in zip(numbers(tree), kept, strict=True)])
    np.testing.assert_array_equal(numbers(shrink(plan, tree)), expected)


def test_a_part_of_a_group_is_refused():
    plan = Plan({"a/kernel": {0: (0, 1, 2)}}, {"a/kernel": (6, 8)})
    message = r"tree\['a'\]\['kernel'\]\['array'\]\['scale'\] has a scale for each 2 neighbours along axis 0 of a/kernel, and the plan"
    with pytest.raises(ValueError, match=message):
        shrink(plan, quantized((6, 8), (3, 8)))
    with pytest.raises(ValueError, match=r"of shape \(4, 8\), does not hold the scales of a/kernel, of shape \(6, 8\)"):
        shrink(plan, quantized((6, 8), (4, 8)))


def test_norms_and_collections_are_as_before():
    """The scale of a norm is a parameter of its own; a plan for variables cuts the collection alone."""
    plan = Plan(
        {"params/a/kernel": {1: OUTPUTS}, "params/norm/scale": {0: OUTPUTS}},
        {"params/a/kernel": (6, 8), "params/norm/scale": (8,)},
    )
    tree = quantized((6, 8), (1, 8)) | {"norm": {"scale": jnp.arange(8.0)}}
    for small in (shrink(plan, {"params": tree})["params"], shrink(plan, tree)):
        assert small["norm"]["scale"].tolist() == [1.0, 2.0, 7.0]
        np.testing.assert_array_equal(numbers(small), numbers(tree)[:, list(OUTPUTS)])
