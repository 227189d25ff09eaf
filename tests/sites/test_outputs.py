"""Products of inputs with outputs: by what defines them, and against numpy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxprune.sites._find import read
from jaxprune.sites._lanes import Lockstep, Weights
from jaxprune.sites._outputs import output_products
from tests.support.structured_zoo import normal

X = normal(3, 5, 4, 6)
CASES = {
    "dense": (normal(6, 7), lambda w, x: x @ w),
    "weights first": (normal(7, 6), lambda w, x: w @ x.reshape(-1, 6).T),
    "heads": (normal(4, 6, 7), lambda w, x: jnp.einsum("abhi,hio->abo", x, w)),
    "experts": (normal(4, 6, 7), lambda w, x: jnp.einsum("abhi,hio->hoab", x, w)),
    "half": (normal(6, 7), lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)),
    "convolution": (
        normal(3, 2, 6, 4),
        lambda w, x: lax.conv_general_dilated(x, w, (1, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
    ),
    "grouped": (
        normal(4, 3, 3, 2),
        lambda w, x: lax.conv_general_dilated(x.transpose(0, 3, 1, 2), w, (1, 1), "VALID", feature_group_count=2),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_which_the_inner_product_with_weights_is_that_of_outputs(name: str):
    """``<W, X^T Y> = <X W, Y>`` for every W."""
    weights, fn = CASES[name]
    reading = read(fn, weights, (X,))
    ((at, (site, use)),) = reading.in_order({""}).items()
    (stop,) = Lockstep(Weights([weights], [weights]), {at: use.operands}, dense=False).stops(reading.body, [[X]])
    wanted = normal(*jnp.shape(fn(weights, X)))
    found = output_products(stop.equation, use, [lane.current[0] for lane in stop.data], wanted)
    assert found.dtype == jnp.float32
    for salt in range(3):
        other = normal(*weights.shape, salt=salt + 1).astype(jnp.bfloat16).astype(jnp.float32)
        x = X.astype(jnp.bfloat16).astype(jnp.float32) if name == "half" else X
        expected = float(jnp.vdot(CASES["dense" if name == "half" else name][1](other, x), wanted))
        np.testing.assert_allclose(float(jnp.vdot(site.matrices(other), found)), expected, rtol=1e-3, atol=1e-2)


def test_products_by_hand():
    x, wanted = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[1.0], [-1.0]])
    reading = read(lambda w, x: x @ w, jnp.ones((2, 1)), (x,))
    ((at, (_, use)),) = reading.in_order({""}).items()
    w = jnp.ones((2, 1))
    (stop,) = Lockstep(Weights([w], [w]), {at: use.operands}, dense=False).stops(reading.body, [[x]])
    assert output_products(stop.equation, use, [x], wanted).tolist() == [[[-2.0], [-2.0]]]


def streams(fn: Any, params: Any, x: Any) -> list[tuple[Any, Any]]:
    """For each product with a parameter the stream that its result is added to, and the sum; None where there is none."""
    reading = read(fn, params, (x,))
    leaves = list(reading.flat.leaves)
    planned = dict.fromkeys(reading.in_order(reading.flat.paths), ())
    stops = list(Lockstep(Weights(leaves, leaves), planned, dense=False).stops(reading.body, [[x]]))
    return [tuple(None if lane is None else lane.current[0] for lane in (s.stream, s.total, s.result)) for s in stops]


@pytest.mark.parametrize(
    "around",
    [
        lambda p, x, y: x + y,
        lambda p, x, y: (y + p["bias"][None]).astype(x.dtype) + x,
        lambda p, x, y: x + (y.reshape(-1) + jnp.tile(jnp.tanh(p["bias"]), 4)).reshape(x.shape),
    ],
)
def test_the_stream_that_a_result_is_added_to(around: Any):
    params, x = {"w": normal(6, 6), "bias": normal(6)}, normal(4, 6)
    ((stream, total, result),) = streams(lambda p, x: around(p, x, jnp.tanh(x) @ p["w"]), params, x)
    np.testing.assert_array_equal(stream.reshape(x.shape), x)
    np.testing.assert_allclose(total, around(params, x, jnp.tanh(x) @ params["w"]), rtol=1e-5)
    np.testing.assert_allclose(result, jnp.tanh(x) @ params["w"], rtol=1e-5)


@pytest.mark.parametrize(
    "around",
    [
        lambda p, x, y: y + p["bias"][None],  # nothing but a bias
        lambda p, x, y: x + y * p["bias"][None],  # scaled
        lambda p, x, y: x + jnp.tanh(y),
        lambda p, x, y: y + jnp.sin(x),  # of data, but not known where the product is made
        lambda p, x, y: y.T + x.T,
    ],
)
def test_where_there_is_no_stream(around: Any):
    params, x = {"w": normal(6, 6), "bias": normal(6)}, normal(6, 6)
    ((stream, total, _),) = streams(lambda p, x: around(p, x, jnp.tanh(x) @ p["w"]), params, x)
    assert stream is None
    assert total is None


def test_streams_within_calls_and_scans_are_passed_on_as_they_are():
    params, x = {"w": normal(3, 6, 6)}, normal(4, 6)

    @jax.checkpoint
    def step(x: Any, w: Any) -> Any:
        return x + jnp.tanh(x) @ w

    fn = lambda p, x: lax.scan(lambda x, w: (step(x, w), None), x, p["w"])[0]  # noqa: E731
    found = streams(fn, params, x)
    assert len(found) == 3
    assert found[1][0] is found[0][1]
    assert found[2][0] is found[1][1]
    np.testing.assert_allclose(found[2][1], fn(params, x), rtol=1e-5)
