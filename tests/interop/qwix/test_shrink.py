"""Channels cut out of what is quantised already: as if they had been cut before, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx

from jaxprune import structured
from jaxprune.structured import Plan
from tests.interop.qwix.models import QTYPES, Linen, Nnx, X, dequantize, from_nnx, provider, pruned, quantize

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Flax, by qwix


def plan_of(params):
    graph = structured.trace(lambda params, x: Linen().apply({"params": params}, x), params, X)
    return structured.select_channels(graph, params, 0.5)


def same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.mark.parametrize("kind", [kind for kind in QTYPES if "tiled" not in kind])
def test_hidden_channels_are_cut_along_outputs_and_inputs(kind):
    params, _, _ = pruned()
    plan = plan_of(params)
    _, whole = quantize(params, **QTYPES[kind])
    small = structured.shrink(plan, whole)
    assert (small["a"]["kernel"].array.scale.shape, small["b"]["kernel"].array.scale.shape) == ((1, 32), (1, 16))
    same(dequantize(small), structured.shrink(plan, dequantize(whole)))
    model = qwix.quantize_model(Linen(32), provider(**QTYPES[kind]))
    expected = Linen(32).apply({"params": dequantize(small)}, X)
    np.testing.assert_allclose(model.apply({"params": small}, X), expected, rtol=1e-4, atol=1e-5)
    assert jax.tree.structure(jax.eval_shape(model.init, jax.random.key(0), X)["params"]) == jax.tree.structure(small)


@pytest.mark.parametrize("name", ["int4, tiled", "int4, asymmetric and tiled"])
def test_inputs_that_share_scales_go_by_whole_tiles(name):
    params, _, _ = pruned()
    _, whole = quantize(params, **QTYPES[name])
    kept = tuple(range(16, 32)) + tuple(range(48, 64))  # the second and the fourth tile of 16
    paths = {
        "a/kernel": {1: kept},
        "a/bias": {0: kept},
        "norm/scale": {0: kept},
        "norm/bias": {0: kept},
        "b/kernel": {0: kept},
    }
    shapes = {path: np.shape(params[path.split("/")[0]][path.split("/")[1]]) for path in paths}
    small = structured.shrink(Plan(paths, shapes), whole)
    assert (small["a"]["kernel"].array.scale.shape, small["b"]["kernel"].array.scale.shape) == ((2, 32), (2, 16))
    same(dequantize(small), structured.shrink(Plan(paths, shapes), dequantize(whole)))
    with pytest.raises(
        ValueError, match=r"params|tree.*\['b'\]\['kernel'\].*scale has a scale for each 16 neighbours along axis 0"
    ):
        structured.shrink(plan_of(params), whole)


def test_what_shares_scales_is_cut_as_numbers_and_rounded_again():
    params, _, _ = pruned()
    how = QTYPES["int4, tiled"]
    plan = plan_of(params)
    numbers = structured.shrink(plan, dequantize(quantize(params, **how)[1]))
    model, small = quantize(numbers, hidden=32, **how)
    again = dequantize(small)
    for name in ("a", "b"):
        scale = small[name]["kernel"].array.scale
        error = np.abs(again[name]["kernel"] - numbers[name]["kernel"])
        assert np.all(error <= np.repeat(scale, 16, axis=0) / 2 * 1.001)
    np.testing.assert_array_equal(np.shape(model.apply({"params": small}, X)), (16, 16))


def test_nnx_and_its_dicts():
    params = from_nnx(Nnx(nnx.Rngs(0)))
    plan = plan_of(params)
    found = qwix.quantize_model(Nnx(nnx.Rngs(0)), provider(weight_qtype="int8"), X)
    state = nnx.state(found, nnx.Param)
    small, dicts = structured.shrink(plan, state), structured.shrink(plan, from_nnx(found))
    same(nnx.to_pure_dict(small), dicts)
    kept = np.asarray(plan.kept["a/kernel"][1])
    np.testing.assert_array_equal(
        dicts["a"]["kernel"]["array"]["qvalue"], from_nnx(found)["a"]["kernel"]["array"]["qvalue"][:, kept]
    )
    np.testing.assert_array_equal(
        dicts["b"]["kernel"]["array"]["scale"], from_nnx(found)["b"]["kernel"]["array"]["scale"]
    )


def test_arrays_of_a_tree_of_your_own_and_states_that_hold_them():
    kernel = jax.random.normal(jax.random.key(0), (8, 6))
    whole = {"a": {"kernel": qwix.quantize(kernel, "int8", channelwise_axes=[0, 1])}}  # a scale for each
    plan = Plan({"a/kernel": {0: (1, 2, 5), 1: (0, 4)}}, {"a/kernel": (8, 6)})
    small = structured.shrink(plan, {"ema": whole, "step": jnp.int32(3)})
    expected = qwix.dequantize(whole["a"]["kernel"])[jnp.asarray([1, 2, 5])][:, jnp.asarray([0, 4])]
    np.testing.assert_array_equal(qwix.dequantize(small["ema"]["a"]["kernel"]), expected)
    assert small["step"] == 3
    gone = structured.shrink(Plan({}, {"a/kernel": (8, 6)}, dropped=("a/kernel",)), whole)
    assert jax.tree.leaves(gone) == []
