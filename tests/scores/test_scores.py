"""Scores against float64 oracles from the papers' equations, on every container, dtype and sharding."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune
from jaxprune import rules, scores
from tests.support.score_checks import arrays, close, exact

PARAMS = {
    "first": np.array([[0.5, -2.0, 0.25], [1.5, 3.0, -0.125]], np.float32),
    "second": np.array([[4.0], [-0.5], [1.0]], np.float32),
}
KEY = jax.random.key(0)
GRADS = {
    "first": np.array([[1.0, 0.5, -8.0], [-0.25, 0.0, 2.0]], np.float32),
    "second": np.array([[0.125], [3.0], [-5.0]], np.float32),
}
# name, score of a tree given one tree of evidence, the equation in NumPy for one leaf
ELEMENTWISE = [
    ("magnitude", lambda params, _: scores.magnitude(params), lambda w, g: abs(w)),
    ("gradient", scores.gradient, lambda w, g: abs(g)),
    ("saliency", scores.saliency, lambda w, g: abs(w * g)),
    ("fisher", scores.fisher, lambda w, g: w**2 * g / 2),
    ("movement", scores.movement, lambda w, g: -w * g),
]
WITH_NAMES = pytest.mark.parametrize(("name", "score", "equation"), ELEMENTWISE, ids=[row[0] for row in ELEMENTWISE])


# Elementwise scores.


@WITH_NAMES
def test_equation(name, score, equation):
    found = score(PARAMS, GRADS)
    for leaf in PARAMS:
        assert found[leaf].dtype == jnp.float32
        close(found[leaf], equation(exact(PARAMS[leaf]), exact(GRADS[leaf])))


@WITH_NAMES
def test_bfloat16_is_computed_in_float32(name, score, equation):
    w, g = (jnp.asarray(np.random.default_rng(seed).normal(size=100), jnp.bfloat16) for seed in (0, 1))
    found = score([w], [g])[0]
    assert found.dtype == jnp.float32
    close(found, equation(exact(w), exact(g)))


@WITH_NAMES
def test_float64_stays(name, score, equation):
    with jax.enable_x64(True):
        w, g = (jnp.asarray(np.random.default_rng(seed).normal(size=100)) for seed in (0, 1))
        found = score([w], [g])[0]
        assert found.dtype == jnp.float64
        close(found, equation(exact(w), exact(g)), rtol=1e-14)


@WITH_NAMES
def test_nan_ranks_lowest(name, score, equation):
    params = {"kernel": jnp.array([[jnp.nan, 1.0, -2.0, 3.0]])}
    grads = {"kernel": jnp.array([[1.0, 2.0, 1.0, 1.0]])}
    found = score(params, grads)
    assert found["kernel"][0, 0] == -jnp.inf
    assert jnp.isfinite(found["kernel"][0, 1:]).all()
    masks = jaxprune.make_masks(params, 0.25, scores=found, rule=rules.layer_sparsity)
    assert masks["kernel"].tolist() == [[False, True, True, True]]


@pytest.mark.parametrize("score", [scores.gradient, scores.saliency, scores.fisher, scores.snip, scores.movement])
def test_nan_evidence_ranks_lowest(score):
    found = score([jnp.array([1.0, 2.0])], [jnp.array([jnp.nan, 1.0])])[0]
    assert found[0] == -jnp.inf
    assert jnp.isfinite(found[1])


def test_infinity_times_zero_ranks_lowest():
    assert scores.saliency([jnp.array([jnp.inf])], [jnp.array([0.0])])[0].tolist() == [-jnp.inf]


@WITH_NAMES
def test_jit_and_vmap(name, score, equation):
    close(jax.jit(score)(PARAMS, GRADS)["first"], score(PARAMS, GRADS)["first"])
    stack = jnp.stack([PARAMS["first"], 2 * PARAMS["first"]]), jnp.stack([GRADS["first"], GRADS["first"]])
    found = jax.vmap(score)(*stack)
    for i in range(2):
        close(found[i], equation(exact(stack[0][i]), exact(stack[1][i])))


@given(arrays((3, 4)), arrays((3, 4)), st.lists(st.sampled_from([-1.0, 1.0]), min_size=12, max_size=12))
@settings(deadline=None, max_examples=50)
def test_saliency_does_not_depend_on_signs(w, g, signs):
    signs = np.reshape(signs, (3, 4)).astype(np.float32)
    np.testing.assert_array_equal(scores.saliency([w * signs], [g])[0], scores.saliency([w], [g * signs])[0])


# Containers and evidence of other containers.


class Pair(eqx.Module):
    first: jax.Array
    second: jax.Array
    name: str = eqx.field(static=True, default="pair")


def boxed(tree):
    return nnx.State({name: nnx.Param(jnp.asarray(leaf)) for name, leaf in tree.items()})


CONTAINERS = {
    "dict": dict,
    "FrozenDict": freeze,
    "State": boxed,
    "module": lambda tree: Pair(*map(jnp.asarray, tree.values())),
}


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("evidence_kind", CONTAINERS)
def test_evidence_is_aligned_by_path(kind, evidence_kind):
    params, grads = CONTAINERS[kind](PARAMS), CONTAINERS[evidence_kind](GRADS)
    for found in (scores.saliency(params, grads), scores.movement(params, grads, previous=grads), scores.lamp(params)):
        assert jax.tree.structure(found) == jax.tree.structure(params)
    for found, leaf in zip(jax.tree.leaves(scores.saliency(params, grads)), PARAMS, strict=True):
        close(found, abs(exact(PARAMS[leaf]) * exact(GRADS[leaf])))


def test_a_tuple_and_a_module_with_none():
    params, grads = tuple(PARAMS.values()), tuple(GRADS.values())
    assert isinstance(scores.snip(params, grads), tuple)
    model = eqx.nn.Sequential([eqx.nn.Linear(2, 1, key=KEY), eqx.nn.Lambda(jnp.square)])
    params = eqx.filter(model, eqx.is_inexact_array)
    grads = eqx.filter_grad(lambda model: model(jnp.ones(2))[0])(model)
    found = scores.saliency(params, grads)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    close(found.layers[0].weight, abs(exact(params.layers[0].weight) * exact(grads.layers[0].weight)))


def test_leaves_that_are_no_floats_have_no_score_and_need_no_evidence():
    params = {"kernel": jnp.array([2.0, 3.0]), "step": jnp.array([7, 8]), "rng": KEY}
    grads = jax.grad(lambda p: p["kernel"].prod(), allow_int=True)({k: params[k] for k in ("kernel", "step")})
    for evidence in (grads, {"kernel": grads["kernel"]}, {**grads, "step": None, "rng": params["rng"]}):
        found = scores.saliency(params, evidence)
        assert found["kernel"].tolist() == [6.0, 6.0]
        assert (found["step"], found["rng"]) == (None, None)
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    for found in (scores.random(params, params["rng"]), scores.lamp(params), scores.movement(params, grads)):
        assert found["step"] is None


# evidence, what the message says
BAD_EVIDENCE = [
    ({"first": GRADS["first"]}, r"grads has no entry for params\['second'\]"),
    ({**GRADS, "third": GRADS["first"]}, r"grads\['third'\] has no counterpart in params"),
    ({**GRADS, "second": GRADS["second"].T}, r"grads for params\['second'\] are float32\[1, 3\].* \[3, 1\]"),
    ({**GRADS, "second": np.ones((3, 1), int)}, r"grads for params\['second'\] are int64\[3, 1\], not"),
    ({**GRADS, "second": None}, r"grads has no entry for params\['second'\]"),
]


@pytest.mark.parametrize("score", [scores.gradient, scores.saliency, scores.snip, scores.movement])
@pytest.mark.parametrize(("grads", "message"), BAD_EVIDENCE)
def test_evidence_that_does_not_fit(score, grads, message):
    with pytest.raises(ValueError, match=message):
        score(PARAMS, grads)


def test_evidence_has_its_own_name_in_messages():
    with pytest.raises(ValueError, match=r"squared_grads has no entry for params\['first'\]"):
        scores.fisher(PARAMS, {"second": GRADS["second"]})
    with pytest.raises(ValueError, match=r"previous has no entry for params\['first'\]"):
        scores.movement(PARAMS, GRADS, previous={"second": GRADS["second"]})
    with pytest.raises(TypeError, match=r"params\['f'\] is the function len, not an array"):
        scores.magnitude({"f": len, "kernel": PARAMS["first"]})


# Random scores.


def test_random_bfloat16_is_spread_evenly():
    params = {"kernel": jnp.zeros((256, 1024), jnp.bfloat16)}
    masks = jaxprune.make_masks(params, 0.999, scores=scores.random(params, KEY), rule=rules.layer_sparsity)
    quarters = np.asarray(masks["kernel"]).reshape(4, -1).sum(axis=1)
    assert quarters.sum() == 262
    assert (abs(quarters - 262 / 4) < 4 * np.sqrt(262 / 4)).all()


def test_random_depends_on_key_and_leaf_only():
    key = jax.random.key(3)
    params = {"a": jnp.ones((40, 8)), "b": jnp.zeros((40, 8), jnp.bfloat16)}
    found = scores.random(params, key)
    again = jax.jit(scores.random)({"x": params["a"] - 5, "y": params["b"]}, key)
    np.testing.assert_array_equal(found["a"], again["x"])
    np.testing.assert_array_equal(found["b"], again["y"])
    assert not jnp.isclose(found["a"], found["b"]).any()
    assert not jnp.isclose(found["a"], scores.random(params, jax.random.key(4))["a"]).any()
    assert abs(found["a"].mean() - 0.5) < 0.1
    assert scores.random([jnp.array([1.0, jnp.nan])], key)[0][1] == -jnp.inf


# Second order, and shares.


def test_fisher_is_the_increase_of_a_quadratic_loss():
    # loss = sum h (w - w*)^2 / 2: removing w_q at the minimum costs h_q w*_q^2 / 2, exactly.
    w, h = np.array([1.0, -2.0, 0.5]), np.array([3.0, 0.25, 8.0])
    cost = [np.sum(h * (w * (np.arange(3) != q) - w) ** 2) / 2 for q in range(3)]
    close(scores.fisher([np.float32(w)], [np.float32(h)])[0], cost)


@given(arrays((2, 3)), arrays((4,)), arrays((2, 3)), arrays((4,)))
@settings(deadline=None, max_examples=50)
def test_snip_adds_up_to_one_and_ranks_as_saliency(w0, w1, g0, g1):
    params, grads = [w0, w1], [g0, g1]
    found = np.concatenate([leaf.ravel() for leaf in scores.snip(params, grads)])
    products = np.concatenate([abs(exact(w) * exact(g)).ravel() for w, g in zip(params, grads, strict=True)])
    if not products.any():
        assert not found.any()
    else:
        assert abs(found.sum(dtype=np.float64) - 1) < 1e-5
        close(found, products / products.sum(), rtol=1e-5)


def test_snip_leaves_nan_out_of_the_sum():
    found = scores.snip([jnp.array([jnp.nan, 1.0, 3.0])], [jnp.ones(3)])[0]
    assert found.tolist() == [-jnp.inf, 0.25, 0.75]


X = np.random.default_rng(2).normal(size=(5, 3))
Y = np.random.default_rng(3).normal(size=(5, 2))
NET = [np.random.default_rng(4).normal(size=(3, 4)), np.random.default_rng(5).normal(size=(4, 2))]


def net_loss(params):
    """Mean squared error of a tanh net."""
    error = jnp.tanh(np.float32(X) @ params[0]) @ params[1] - np.float32(Y)
    return 0.5 * jnp.mean(jnp.sum(error**2, axis=1))


def net_loss_and_grads(weights):
    """The same in NumPy, float64, with the gradient by hand."""
    hidden = np.tanh(X @ weights[0])
    error = (hidden @ weights[1] - Y) / len(X)
    grads = [X.T @ ((error @ weights[1].T) * (1 - hidden**2)), hidden.T @ error]
    return 0.5 * len(X) * np.sum(error**2), grads


def slope_in_gates(function, step=1e-5):
    """Central differences of function(gates * weights) with respect to each gate, at gates of one."""
    slopes = [np.zeros_like(w) for w in NET]
    for leaf, slope in enumerate(slopes):
        for index in np.ndindex(slope.shape):
            ends = []
            for sign in (1, -1):
                gated = [w.copy() for w in NET]
                gated[leaf][index] *= 1 + sign * step
                ends.append(function(gated))
            slope[index] = (ends[0] - ends[1]) / (2 * step)
    return slopes


def as_float32(leaves):
    return [jnp.asarray(leaf, jnp.float32) for leaf in leaves]


def test_snip_is_the_sensitivity_to_gates():
    slopes = slope_in_gates(lambda weights: net_loss_and_grads(weights)[0])
    total = sum(abs(slope).sum() for slope in slopes)
    params = as_float32(NET)
    for found, slope in zip(scores.snip(params, jax.grad(net_loss)(params)), slopes, strict=True):
        np.testing.assert_allclose(found, abs(slope) / total, rtol=1e-3, atol=1e-6)


def gradient_flow(weights):
    return sum(np.sum(g**2) for g in net_loss_and_grads(weights)[1])


@pytest.mark.slow
def test_grasp_is_half_the_slope_of_the_gradient_flow():
    slopes = slope_in_gates(gradient_flow)  # d(g.g)/d gate = 2 w (H g)
    for found, slope in zip(scores.grasp(net_loss, as_float32(NET)), slopes, strict=True):
        np.testing.assert_allclose(found, slope / 2, rtol=1e-3, atol=1e-5)


def test_grasp_keeps_what_the_gradient_flow_needs():
    found = scores.grasp(net_loss, as_float32(NET))
    fading = 1 - 1e-3  # a small step towards removal, where the first order holds
    best, worst = (
        gradient_flow([np.where(pick(exact(s)), fading, 1) * w for s, w in zip(found, NET, strict=True)])
        for pick in (lambda s: s < np.median(s), lambda s: s >= np.median(s))
    )
    assert best > worst


def test_grasp_ignores_integers_and_takes_boxes():
    params = boxed({"w": np.float32([2.0, 3.0]), "n": np.int32(2)})
    found = scores.grasp(lambda p: jnp.sum(p["w"][...] ** 4) / 4 * jnp.float32(p["n"][...]) / 2, params)
    (w,) = jax.tree.leaves(found)  # the integer has no score
    close(w, [2 * 12 * 8, 3 * 27 * 27])


# Movement.


def test_movement_is_the_running_sum():
    rng = np.random.default_rng(0)
    w, g = rng.normal(size=(2, 6, 4, 3)).astype(np.float32)
    moved = None
    for step in range(6):
        moved = scores.movement([w[step]], [g[step]], previous=moved)
    close(moved[0], -np.sum(exact(w) * exact(g), axis=0), rtol=1e-4)

    def step(moved, wg):
        return scores.movement([wg[0]], [wg[1]], previous=moved), None

    close(jax.lax.scan(step, [jnp.zeros((4, 3))], (w, g))[0][0], moved[0], rtol=1e-5)


def test_movement_is_positive_away_from_zero():
    loss = lambda w: jnp.sum((w - jnp.array([2.0, 0.0, -2.0])) ** 2)  # noqa: E731
    w = jnp.array([1.0, 1.0, -1.0])
    assert jnp.sign(scores.movement([w], [jax.grad(loss)(w)])[0]).tolist() == [1.0, -1.0, 1.0]


def test_movement_stays_lowest_after_a_nan():
    moved = None
    for grads in (1.0, jnp.nan, 1.0, -jnp.inf):
        moved = scores.movement([jnp.array([1.0])], [jnp.array([grads])], previous=moved)
    assert moved[0].tolist() == [-jnp.inf]


# Evidence over batches.


def test_mean_over_batches_is_the_gradient_of_the_whole():
    rng = np.random.default_rng(0)
    w, x, y = rng.normal(size=3), rng.normal(size=(12, 3)), rng.normal(size=12)

    def loss(params, batch):
        x, y = batch
        return jnp.mean((x @ params["w"] - y) ** 2)

    params = {"w": jnp.asarray(w, jnp.float32)}
    batches = ((np.float32(x[i : i + 3]), np.float32(y[i : i + 3])) for i in range(0, 12, 3))
    found = jaxprune.mean_over_batches(jax.grad(loss), params, batches)
    close(found["w"], 2 * x.T @ (x @ w - y) / 12, rtol=1e-4)
    with pytest.raises(ValueError, match="got no batch"):
        jaxprune.mean_over_batches(jax.grad(loss), params, batches)


def test_fisher_evidence_is_per_example():
    rng = np.random.default_rng(0)
    w, x, y = rng.normal(size=3), rng.normal(size=(12, 3)), rng.normal(size=12)

    def loss(params, example):
        x, y = example
        return (x @ params["w"] - y) ** 2

    def squared_grads(params, batch):
        grads = jax.vmap(jax.grad(loss), in_axes=(None, 0))(params, batch)
        return jax.tree.map(lambda g: jnp.mean(jnp.square(g), axis=0), grads)

    batches = [(np.float32(x[i : i + 4]), np.float32(y[i : i + 4])) for i in range(0, 12, 4)]
    params = {"w": jnp.asarray(w, jnp.float32)}
    found = scores.fisher(params, jaxprune.mean_over_batches(squared_grads, params, batches))
    each = 2 * (x @ w - y)[:, None] * x
    close(found["w"], w**2 * np.mean(each**2, axis=0) / 2, rtol=1e-4)


def test_mean_over_batches_adds_up_in_float32():
    one = jnp.ones((), jnp.bfloat16)
    found = jaxprune.mean_over_batches(lambda params, batch: params * batch, one, [1.0] * 600)
    assert found.dtype == jnp.float32
    assert found == 1.0  # a bfloat16 sum stops growing at 256


def test_mean_over_batches_takes_gradients_of_integers():
    params = {"w": jnp.array(2.0), "n": jnp.array(3)}
    grads = jax.grad(lambda p, batch: p["w"] * batch, allow_int=True)
    found = jaxprune.mean_over_batches(grads, params, [jnp.array(1.0), jnp.array(5.0)])
    assert jax.tree.map(float, found) == {"w": 3.0, "n": 0.0}
