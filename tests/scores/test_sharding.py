"""Scores of sharded parameters: the same values, sharded as the parameters, on Auto and Explicit meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxprune import scores

pytestmark = pytest.mark.optimised

KEY = jax.random.key(0)


def meshes():
    kinds = (AxisType.Auto, AxisType.Explicit)
    return [jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind)) for kind in kinds]


# name, score of a tree given one tree of evidence
SHARDED = [
    ("random", lambda params, grads: scores.random(params, KEY)),
    ("lamp", lambda params, grads: scores.lamp(params)),
    ("stacked lamp", lambda params, grads: scores.lamp(params, stacked=lambda path, leaf: 1)),
    ("snip", scores.snip),
    ("grasp", lambda params, grads: scores.grasp(lambda p: jnp.sum(jnp.sin(p[0]) * grads[0]), params)),
    ("synflow", lambda params, grads: scores.synflow(lambda p, x: jnp.sum(p[0]) * x, params, jnp.ones(()))),
]
WITH_MESHES = pytest.mark.parametrize("mesh", meshes(), ids=["auto", "explicit"])


@pytest.mark.slow
@WITH_MESHES
@pytest.mark.parametrize("score", [row[1] for row in SHARDED], ids=[row[0] for row in SHARDED])
def test_scores_are_sharded_as_the_parameters(mesh, score):
    w, g = np.random.default_rng(0).normal(size=(2, 8, 12)).astype(np.float32)
    sharding = NamedSharding(mesh, PartitionSpec("a", "b"))
    found = jax.jit(score)([jax.device_put(w, sharding)], [jax.device_put(g, sharding)])[0]
    assert found.sharding == sharding
    np.testing.assert_allclose(found, score([w], [g])[0], rtol=1e-5)


@WITH_MESHES
@pytest.mark.parametrize("score", [scores.channel_norm, scores.fpgm])
def test_channel_scores_of_a_sharded_kernel(mesh, score):
    w = np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32)
    found = score(jax.device_put(w, NamedSharding(mesh, PartitionSpec("a", "b"))), 0)
    np.testing.assert_allclose(found, score(w, 0), rtol=1e-5)


@WITH_MESHES
def test_random_has_the_same_bits_sharded(mesh):
    w = np.ones((16, 64), np.float32)
    sharded = jax.device_put(w, NamedSharding(mesh, PartitionSpec("a", "b")))
    found = scores.random([sharded], KEY)[0]
    assert found.sharding == sharded.sharding
    np.testing.assert_array_equal(found, scores.random([w], KEY)[0])
