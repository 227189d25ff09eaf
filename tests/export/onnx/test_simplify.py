"""Functions in fewer steps compute what they did; what is found again, what is folded, and what must not be."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxprune._jaxpr import _equations
from jaxprune.export._onnx import _patterns
from jaxprune.export._onnx._nodes import Value, known
from jaxprune.export._onnx._simplify import _expand, simplified
from jaxprune.structured import rebuild, select_channels, shrink, trace
from tests.support.graph_zoo import normal
from tests.support.slow import slow_but
from tests.support.structured_cases import CASES

PATTERNS = (_patterns.relu, _patterns.gelu, _patterns.softmax, _patterns.pooling)


def simple(fn: Any, params: Any, *inputs: Any) -> Any:
    """The function of its inputs alone, in fewer steps."""
    leaves, treedef = jax.tree.flatten(params)

    def of_inputs(*inputs: Any) -> Any:
        def of_leaves(leaves: Any, *inputs: Any) -> Any:
            return fn(treedef.unflatten(leaves), *inputs)

        body, shape = _equations.trace(of_leaves, leaves, *inputs)
        return jax.tree.unflatten(jax.tree.structure(shape), simplified(body, leaves, jax.tree.leaves(inputs)))

    return of_inputs


def steps(fn: Any, *inputs: Any) -> list[str]:
    """The names of the primitives that a function uses, those within calls too."""
    return [equation.name for equation in _equations.everywhere(jax.jit(fn).trace(*inputs).jaxpr)]


def found(fn: Any, *inputs: Any) -> list[str]:
    """What is found again in a function."""
    body, _ = _equations.trace(fn, *inputs)
    nodes: list[Any] = []
    _expand(body, [Value(x.shape, array=x) for x in inputs], nodes)
    return [larger.name for node in nodes for pattern in PATTERNS if (larger := pattern(node)) is not None]


def close(one: Any, other: Any, tolerance: float = 2e-6) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())


@pytest.mark.parametrize("name", slow_but(["resnet_eval", "transformer"], [name for name in CASES if name != "weird"]))
def test_what_is_cut_and_rebuilt_computes_the_same(name: str) -> None:
    case = CASES[name]()
    graph = trace(case.fn, case.params, *case.inputs, prunable_outputs=case.outputs)
    plan = select_channels(graph, case.params, {group.name: 0.5 for group in graph.groups})
    small, fn = shrink(plan, case.params), rebuild(graph, plan)
    close(simple(fn, small, *case.inputs)(*case.inputs), fn(small, *case.inputs))


def test_batch_norms_go_into_convolutions() -> None:
    case = CASES["resnet_eval"]()
    before = steps(lambda *inputs: case.fn(case.params, *inputs), *case.inputs)
    after = steps(simple(case.fn, case.params, *case.inputs), *case.inputs)
    convolutions = before.count("conv_general_dilated")
    assert after.count("conv_general_dilated") == convolutions == 6
    assert before.count("rsqrt") == 6
    assert not {"rsqrt", "sub", "mul"} & set(after)
    # One shift for each convolution, two shortcuts, the bias of the dense layer.
    assert after.count("add") == convolutions + 2 + 1


SCALED = {
    "shifted, then scaled": lambda y, c, d: (y - c) * d,
    "scaled, then shifted": lambda y, c, d: y * d + c,
    "subtracted from": lambda y, c, d: c - y / d,
    "by a number": lambda y, c, d: 2.0 - y * 0.5,
}
KERNELS = {
    "dense": ((5, 4), (3, 5), lambda x, w: x @ w),
    "dense, kernel first": ((4, 5), (5, 3), lambda x, w: (w @ x).T),
    "by heads": ((5, 2, 4), (3, 5), lambda x, w: jnp.einsum("bi,iho->bho", x, w)),
    "for each head": ((2, 5, 4), (3, 2, 5), lambda x, w: jnp.einsum("bhi,hio->hbo", x, w).transpose(1, 0, 2)),
    "convolution": (
        (3, 3, 5, 4),
        (2, 6, 6, 5),
        lambda x, w: lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
    ),
    "depthwise, channels first": (
        (4, 1, 3, 3),
        (2, 4, 6, 6),
        lambda x, w: lax.conv_general_dilated(x, w, (1, 1), "SAME", feature_group_count=4).transpose(0, 2, 3, 1),
    ),
}


@pytest.mark.parametrize("how", SCALED)
@pytest.mark.parametrize("kernel", KERNELS)
def test_scales_and_shifts_go_into_kernels(kernel: str, how: str) -> None:
    shape, data, product = KERNELS[kernel]
    w, x, c, d = normal(*shape), normal(*data), normal(4, salt=1), 1 + jnp.abs(normal(4, salt=2))

    def fn(params: Any, x: Any) -> Any:
        w, c, d = params
        y = product(x, w)
        wide = (1,) * (y.ndim - 1) + (4,)
        return SCALED[how](y, c.reshape(wide), d.reshape(wide))

    small = simple(fn, (w, c, d), x)
    close(small(x), fn((w, c, d), x))
    moved = "kernel first" in kernel or "each head" in kernel or "channels first" in kernel
    if not moved:  # behind a transpose a scale stays where it is
        assert not {"mul", "div", "sub"} & set(steps(small, x))


def test_a_product_that_is_used_twice_keeps_its_scale_outside() -> None:
    w, x, d = normal(5, 4), normal(3, 5), normal(4, salt=1)

    def fn(params: Any, x: Any) -> Any:
        y = x @ params[0]
        return y * params[1][None], y + 1

    small = simple(fn, (w, d), x)
    close(small(x), fn((w, d), x))
    assert steps(small, x).count("dot_general") == 1


def test_what_differs_from_place_to_place_stays_outside() -> None:
    w, x, places = normal(5, 4), normal(3, 5), normal(3, 4, salt=1)

    def fn(params: Any, x: Any) -> Any:
        return (x @ params[0]) * params[1]

    small = simple(fn, (w, places), x)
    close(small(x), fn((w, places), x))
    assert "mul" in steps(small, x)


def test_a_scale_that_is_not_finite_and_a_product_in_more_bits_stay_outside() -> None:
    w, x = jnp.array([[1.0, 2.0], [0.0, 3.0]]), jnp.array([[1.0, 1.0]])

    def divided(params: Any, x: Any) -> Any:
        return (x @ params) / jnp.array([0.0, 2.0])[None]

    np.testing.assert_array_equal(simple(divided, w, x)(x), divided(w, x))

    def widened(params: Any, x: Any) -> Any:
        return jnp.matmul(x.astype(jnp.float16), params, preferred_element_type=jnp.float32) * jnp.float32(1 / 3)

    half = w.astype(jnp.float16)
    assert "mul" in steps(simple(widened, half, x), x)
    np.testing.assert_array_equal(simple(widened, half, x)(x), widened(half, x))


def test_a_constant_that_x_is_spread_over_is_no_number() -> None:
    def fn(zeros: Any, x: Any) -> Any:
        return lax.max(x, zeros)

    for zeros in (jnp.zeros((3, 4)), jnp.zeros((1, 4))):
        x = jnp.broadcast_to(normal(1, 4), zeros.shape)
        close(simple(fn, zeros, x)(x), fn(zeros, x))
    one = normal(1, 4)
    spread = lambda zeros, x: jnp.maximum(x, zeros)  # noqa: E731
    close(simple(spread, jnp.zeros((3, 4)), one)(one), spread(jnp.zeros((3, 4)), one))


def test_large_constants_are_left_to_be_computed() -> None:
    x = jnp.ones((100_000, 4))
    small = simple(lambda w, x: x + jnp.broadcast_to(w[None], x.shape), normal(4), x)
    assert [np.size(constant) for constant in jax.make_jaxpr(small)(x).consts] == [4]


FOUND = {
    "relu": (lambda x: jnp.maximum(x, 0), ["relu"]),
    "relu, the other way round": (lambda x: jnp.maximum(0.0, x), ["relu"]),
    "a bound that is not zero": (lambda x: jnp.maximum(x, 0.1), []),
    "gelu by tanh": (jax.nn.gelu, ["gelu"]),
    "gelu by erf": (lambda x: jax.nn.gelu(x, approximate=False), ["gelu"]),
    "another cubic": (lambda x: 0.5 * x * (1 + jnp.tanh(0.8 * (x + 0.044715 * x**3))), []),
    "softmax": (jax.nn.softmax, ["softmax"]),
    "softmax of the first axis": (lambda x: jax.nn.softmax(x, 0), ["softmax"]),
    "softmax of two axes": (lambda x: jax.nn.softmax(x, (0, 1)), ["softmax"]),
    "softmax under vmap": (jax.vmap(jax.nn.softmax, 1, 1), ["softmax"]),
    "moved on the way": (lambda x: _moved(x), ["softmax"]),
    "divided by sums of the other axis": (lambda x: _crossed(x), []),
    "no maximum": (lambda x: jnp.exp(x) / jnp.exp(x).sum(1, keepdims=True), []),
}


def _moved(x: Any) -> Any:
    powers = jnp.exp(x.T - x.max(1)[None])
    return powers / powers.sum(0)[None]


def _crossed(x: Any) -> Any:
    powers = jnp.exp(x - x.max(1)[:, None])
    return powers / powers.sum(1)[None]


@pytest.mark.parametrize("name", FOUND)
def test_functions_are_found_again(name: str) -> None:
    fn, expected = FOUND[name]
    x = normal(4, 4)
    assert found(fn, x) == expected
    close(simple(lambda _, x: fn(x), (), x)(x), fn(x))


def test_poolings_under_vmap_have_one_axis_for_all_batches() -> None:
    def pool(x: Any) -> Any:
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 2, 2, 1), (1, 1, 2, 1, 1), "SAME")

    x = normal(2, 3, 5, 4, 2)
    assert found(pool, x) == ["pooling"]
    np.testing.assert_array_equal(simple(lambda _, x: pool(x), (), x)(x), pool(x))


def test_keys_that_are_closed_over_and_dead_steps() -> None:
    key = jax.random.key(0)

    def fn(w: Any, x: Any) -> Any:
        noise = jax.random.normal(key, x.shape)
        jnp.sin(x)
        return x * w + noise

    small = simple(fn, jnp.float32(2), normal(3, 4))
    close(small(normal(3, 4)), fn(jnp.float32(2), normal(3, 4)))
    assert set(steps(small, normal(3, 4))) <= {"mul", "add", "jit", "pjit"}


def test_constants_are_arrays_or_keys() -> None:
    assert isinstance(known(jnp.ones(2)).constant, np.ndarray)
    assert jnp.issubdtype(known(jax.random.key(0)).constant.dtype, jax.dtypes.prng_key)
