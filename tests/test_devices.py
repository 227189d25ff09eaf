"""The same masks on one device and on eight, on Auto and Explicit meshes, and exported for cpu, cuda and tpu."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxprune import apply_masks, make_masks, rules, sparsity
from tests.support.compilation import compiled_for_users

pytestmark = [pytest.mark.optimised, pytest.mark.filterwarnings("ignore::jaxprune.rules.PruningWarning")]

RULES = [rules.std_threshold, rules.mean_threshold, rules.max_threshold, rules.absolute_threshold]
CAPPED = functools.partial(rules.std_threshold, max_sparsity=0.4)


def weights(mean: float = 0.0) -> dict:
    rng = np.random.default_rng(0)
    shapes = {"dense": (64, 48), "layers": (8, 16, 24)}
    return {
        name: {"kernel": jnp.asarray(rng.normal(mean, 1, shape), jnp.float32), "bias": jnp.ones(shape[-1])}
        for name, shape in shapes.items()
    }


def mesh(axis_type: AxisType) -> Mesh:
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type, axis_type))


SPECS = {
    "dense": {"kernel": PartitionSpec("x", "y"), "bias": PartitionSpec("y")},
    "layers": {"kernel": PartitionSpec("x", None, "y"), "bias": PartitionSpec()},
}


def shard(params: dict, axis_type: AxisType) -> dict:
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh(axis_type), spec), SPECS)
    return jax.tree.map(jax.device_put, params, shardings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axis_type", "run", "rule", "mean", "stacked"),
    [
        (AxisType.Auto, jax.jit, rules.std_threshold, 0.1, None),
        (AxisType.Explicit, jax.jit, rules.std_threshold, 0.1, None),
        (AxisType.Auto, lambda f: f, rules.std_threshold, 5.0, "layers"),
        (AxisType.Explicit, lambda f: f, rules.std_threshold, 5.0, "layers"),
        (AxisType.Auto, jax.jit, rules.mean_threshold, 0.1, None),
        (AxisType.Explicit, jax.jit, rules.max_threshold, 0.1, None),
        (AxisType.Explicit, jax.jit, rules.absolute_threshold, 0.1, None),
        (AxisType.Explicit, jax.jit, CAPPED, 0.1, "layers"),
    ],
)
def test_sharded_masks_equal_and_keep_their_sharding(
    axis_type: AxisType, run: Callable, rule: Callable, mean: float, stacked: str | None
) -> None:
    """Promise 10, and of promise 4 that masks keep the parameters' sharding."""
    make = functools.partial(make_masks, rule=rule, stacked=stacked)
    params = weights(mean)
    expected = make(params, 0.7)
    sharded = shard(params, axis_type)
    masks = run(make)(sharded, 0.7)
    # Sums of other orders differ in their last bits; no weight lies that close to the threshold here.
    chex.assert_trees_all_equal(jax.device_get(masks), jax.device_get(expected))
    pruned = run(apply_masks)(sharded, masks)
    chex.assert_trees_all_equal(jax.device_get(pruned), jax.device_get(apply_masks(params, expected)))
    for tree in (masks, pruned):
        for array, param in zip(jax.tree.leaves(tree), jax.tree.leaves(sharded), strict=True):
            assert array.sharding.is_equivalent_to(param.sharding, param.ndim), (array.sharding, param.sharding)
    assert float(sparsity(masks)) == pytest.approx(float(sparsity(expected)))


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_nan_on_one_device_leaves_the_others_alone(axis_type: AxisType) -> None:
    """Promise 8, where the statistics are sums over devices."""
    params = weights()
    params["dense"]["kernel"] = params["dense"]["kernel"].at[0, 0].set(jnp.nan)
    masks = make_masks(shard(params, axis_type), 0.7)
    chex.assert_trees_all_equal(jax.device_get(masks), jax.device_get(make_masks(params, 0.7)))
    assert not jax.device_get(masks["dense"]["kernel"])[0, 0]
    assert 0.3 < float(sparsity(masks)) < 0.7


@pytest.mark.slow
def test_no_gather_on_the_way_to_a_threshold() -> None:
    """Promise 4: devices exchange a few numbers each, never the weights."""
    text = compiled_for_users(jax.jit(make_masks), shard(weights(), AxisType.Auto), 0.7).as_text()
    assert "all-gather" not in text
    assert "all-reduce" in text


@pytest.mark.slow
def test_export_for_every_platform() -> None:
    """Promise 10: make_masks with a traced k, and apply_masks, lowered for cpu, cuda and tpu, saved and read again."""
    params = weights()

    def prune(params: dict, k: jax.Array) -> list[tuple[dict, dict]]:
        masks = [make_masks(params, k, rule=rule, stacked="layers") for rule in (*RULES, CAPPED)]
        return [(mask, apply_masks(params, mask)) for mask in masks]

    exported = jax.export.export(jax.jit(prune), platforms=("cpu", "cuda", "tpu"))(params, jnp.float32(0))
    assert set(exported.platforms) == {"cpu", "cuda", "tpu"}
    read = jax.export.deserialize(exported.serialize())
    for k in (0.3, 0.9):
        chex.assert_trees_all_equal(read.call(params, jnp.float32(k)), prune(params, jnp.float32(k)))


ON_ONE_DEVICE = """
import jax, jax.numpy as jnp, numpy as np
from jaxprune import make_masks, rules
assert len(jax.devices()) == 1
params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)}
for kind in jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit:
    mesh = jax.make_mesh((1,), ("x",), axis_types=(kind,))
    held = jax.device_put(params, jax.NamedSharding(mesh, jax.P("x")))
    for rule in rules.global_sparsity, rules.layer_sparsity, rules.row_sparsity, rules.erk_sparsity:
        expected = make_masks(params, 0.5, rule=rule)["w"]
        np.testing.assert_array_equal(make_masks(held, 0.5, rule=rule)["w"], expected)
        np.testing.assert_array_equal(jax.jit(lambda held: make_masks(held, 0.5, rule=rule))(held)["w"], expected)
"""


@pytest.mark.slow
def test_counts_on_a_mesh_of_the_only_device() -> None:
    """What a laptop has: programs for one device regroup entries, which an Explicit mesh refuses whatever its size."""
    subprocess.run([sys.executable, "-c", ON_ONE_DEVICE], check=True, env={**os.environ, "XLA_FLAGS": ""})
