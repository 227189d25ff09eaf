"""Layers that share a program get the masks that they get by themselves, on one device and on meshes, sharded as they are."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxprune
from jaxprune import rules

RULES = {
    "std": rules.std_threshold,
    "mean": rules.mean_threshold,
    "layer": rules.layer_sparsity,
    "row": rules.row_sparsity,
    "global": rules.global_sparsity,
}
MOVES = re.compile(r"= \S+ (sort|gather|scatter|all-gather|all-to-all|collective-permute)\(")


def layers(number: int) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    found = {f"layers_{i}": {"kernel": rng.normal(size=(64, 48)).astype(np.float32)} for i in range(number)}
    found["layers_3"]["kernel"][0, 0] = np.nan
    return found


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", RULES)
def test_twelve_layers_on_a_mesh(name, axis_type):
    params = layers(12)
    expected = jaxprune.make_masks(params, 0.5, rule=RULES[name])
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec("a", "b"))
        sharded = jax.tree.map(lambda leaf: jax.device_put(leaf, sharding), params)
        make = jax.jit(lambda params, k: jaxprune.make_masks(params, k, rule=RULES[name]))
        compiled = make.lower(sharded, jnp.float32(0.5)).compile()
        masks = compiled(sharded, jnp.float32(0.5))
    assert not MOVES.search(compiled.as_text())
    for mask, wanted in zip(jax.tree.leaves(masks), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(mask, wanted)
        assert mask.sharding.is_equivalent_to(sharding, 2)


def test_layers_by_themselves_and_together():
    """Under another name each a layer is of no kind but its own, and has a program of its own."""
    params = layers(12)
    alone = {chr(ord("a") + i): leaf for i, leaf in enumerate(params.values())}
    for rule in (rules.std_threshold, rules.layer_sparsity):
        together = jaxprune.make_masks(params, 0.75, rule=rule)
        apart = jaxprune.make_masks(alone, 0.75, rule=rule)
        for name, own in zip(params, alone, strict=True):
            np.testing.assert_array_equal(together[name]["kernel"], apart[own]["kernel"])


COLLECTIVE = re.compile(r"= (\S+) (all-gather|all-to-all|all-reduce|collective-permute)\(")


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_stack_sharded_by_layers_is_ranked_with_leaves_of_other_dtypes(axis_type):
    """One layer of the stack would go whole, and keeps its last weight; what moves are counts, seven for each layer."""
    rng = np.random.default_rng(0)
    stack = rng.normal(size=(8, 32, 16)).astype(np.float32)
    stack[3] *= 1e-3
    stack[0, 0, 0] = np.nan
    params = {
        "layers": {"kernel": stack},
        "[/]": {"kernel": jnp.asarray(rng.normal(size=(32, 32)), jnp.float8_e4m3fn)},
        "other": {"kernel": jnp.asarray(rng.normal(size=(64, 16)), jnp.bfloat16)},
    }
    specs = {"layers": ("a", None, "b"), "[/]": ("a", "b"), "other": (("a", "b"), None)}

    def make(params, k):
        return jaxprune.make_masks(params, k, rule=rules.global_sparsity, stacked="layers/*")

    expected = make(params, 0.7)
    assert sum(int((~mask).sum()) for mask in jax.tree.leaves(expected)) == round(
        0.7 * (8 * 32 * 16 + 32 * 32 + 64 * 16)
    )
    assert int(expected["layers"]["kernel"][3].sum()) == 1
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        sharded = {
            name: {"kernel": jax.device_put(leaf["kernel"], NamedSharding(mesh, PartitionSpec(*specs[name])))}
            for name, leaf in params.items()
        }
        compiled = jax.jit(make).lower(sharded, jnp.float32(0.7)).compile()
        masks = compiled(sharded, jnp.float32(0.7))
    moved = [found[0] for found in COLLECTIVE.findall(compiled.as_text())]
    sizes = [
        np.prod([int(n) for n in dims.split(",") if n]) for text in moved for dims in re.findall(r"\[([\d,]*)\]", text)
    ]
    assert 0 < max(sizes) <= 7 * 64
    for name, leaf in sharded.items():
        np.testing.assert_array_equal(masks[name]["kernel"], expected[name]["kernel"])
        assert masks[name]["kernel"].sharding.is_equivalent_to(leaf["kernel"].sharding, leaf["kernel"].ndim)
