"""Scores against float64 oracles from the papers' equations, on every container, dtype and sharding."""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxprune
from jaxprune import rules, scores

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


def arrays(shape):
    """Float32 arrays full of ties and zeros."""
    return hnp.arrays(np.float32, shape, elements=st.integers(-40, 40).map(lambda n: n / 8) | st.just(0.0))


def exact(x):
    return np.asarray(x, np.float64)


def close(found, expected, rtol=1e-6):
    np.testing.assert_allclose(np.asarray(found), expected, rtol=rtol, atol=1e-30)


def relu_net(params, x):
    *hidden, last = params
    for kernel in hidden:
        x = jax.nn.relu(x @ kernel)
    return x @ last


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
    for found in (scores.saliency(params, grads), scores.movement(params, grads, grads), scores.lamp(params)):
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


def test_leaves_that_are_no_floats_score_zeros_and_need_no_evidence():
    params = {"kernel": jnp.array([2.0, 3.0]), "step": jnp.array([7, 8]), "rng": KEY}
    grads = jax.grad(lambda p: p["kernel"].prod(), allow_int=True)({k: params[k] for k in ("kernel", "step")})
    for evidence in (grads, {"kernel": grads["kernel"]}, {**grads, "step": None, "rng": params["rng"]}):
        found = scores.saliency(params, evidence)
        assert found["kernel"].tolist() == [6.0, 6.0]
        assert found["step"].tolist() == [0.0, 0.0]
        assert found["rng"].shape == ()
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    for found in (scores.random(params, params["rng"]), scores.lamp(params), scores.movement(params, grads)):
        assert found["step"].tolist() == [0.0, 0.0]


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
        scores.movement(PARAMS, GRADS, {"second": GRADS["second"]})
    with pytest.raises(TypeError, match=r"params\['f'\] is a builtin_function"):
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
    found = scores.grasp(lambda p: jnp.sum(p["w"][...] ** 4) / 4 * p["n"][...] / 2, params)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    n, w = jax.tree.leaves(found)
    close(w, [2 * 12 * 8, 3 * 27 * 27])
    assert n == 0


# Movement.


def test_movement_is_the_running_sum():
    rng = np.random.default_rng(0)
    w, g = rng.normal(size=(2, 6, 4, 3)).astype(np.float32)
    moved = None
    for step in range(6):
        moved = scores.movement([w[step]], [g[step]], moved)
    close(moved[0], -np.sum(exact(w) * exact(g), axis=0), rtol=1e-4)

    def step(moved, wg):
        return scores.movement([wg[0]], [wg[1]], moved), None

    close(jax.lax.scan(step, [jnp.zeros((4, 3))], (w, g))[0][0], moved[0], rtol=1e-5)


def test_movement_is_positive_away_from_zero():
    loss = lambda w: jnp.sum((w - jnp.array([2.0, 0.0, -2.0])) ** 2)  # noqa: E731
    w = jnp.array([1.0, 1.0, -1.0])
    assert jnp.sign(scores.movement([w], [jax.grad(loss)(w)])[0]).tolist() == [1.0, -1.0, 1.0]


def test_movement_stays_lowest_after_a_nan():
    moved = None
    for grads in (1.0, jnp.nan, 1.0, -jnp.inf):
        moved = scores.movement([jnp.array([1.0])], [jnp.array([grads])], moved)
    assert moved[0].tolist() == [-jnp.inf]


# LAMP.


def lamp_oracle(w):
    """Equation 3 for one layer, weights in rising order, among equals the lower index last."""
    squares = exact(w).ravel() ** 2
    order = np.lexsort((-np.arange(squares.size), squares))
    found = np.zeros_like(squares)
    for u, index in enumerate(order):
        total = squares[order[u:]].sum()
        found[index] = squares[index] / total if total else 0.0
    return found.reshape(np.shape(w))


@given(st.sampled_from([(7,), (3, 4), (2, 3, 2)]).flatmap(arrays))
@settings(deadline=None, max_examples=60)
def test_lamp_equation(w):
    np.testing.assert_allclose(scores.lamp([w])[0], lamp_oracle(w), rtol=1e-5, atol=1e-30)


@given(arrays((5, 7)), st.integers(0, 34))
@settings(deadline=None, max_examples=20)
def test_lamp_ranks_a_layer_as_magnitude_does(w, removed):
    params, k = {"kernel": jnp.asarray(w)}, removed / 35
    of_lamp = jaxprune.make_masks(params, k, scores=scores.lamp(params), rule=rules.layer_sparsity)
    of_magnitude = jaxprune.make_masks(params, k, rule=rules.layer_sparsity)
    np.testing.assert_array_equal(of_lamp["kernel"], of_magnitude["kernel"])


def test_lamp_of_many_weights_is_accurate_and_in_order():
    w = np.random.default_rng(0).normal(size=(300, 1000)).astype(np.float32)
    found = np.asarray(scores.lamp([w])[0])
    order = np.argsort(-abs(w).ravel(), kind="stable")
    squares = exact(w).ravel()[order] ** 2
    np.testing.assert_allclose(found.ravel()[order], squares / np.cumsum(squares), rtol=3e-6)
    assert (np.diff(found.ravel()[order]) <= 0).all()


def test_lamp_of_many_ties_never_rises_from_a_weight_to_the_next_smaller_one():
    w = jnp.asarray(np.random.default_rng(0).normal(size=100_000), jnp.bfloat16)
    order = np.argsort(-abs(np.float32(w)), kind="stable")
    assert (np.diff(np.asarray(scores.lamp([w])[0])[order]) <= 0).all()


def test_lamp_by_hand():
    # weights, scores
    table = [
        ([0.0, 0.0], [0.0, 0.0]),
        ([3.0], [1.0]),
        ([0.0, 1.0], [0.0, 1.0]),
        ([1.0, 1.0, 1.0, 1.0], [1.0, 1 / 2, 1 / 3, 1 / 4]),
        ([1e30, 1e30], [1.0, 0.5]),
        ([1e-30, 1e-30], [1.0, 0.5]),
        ([np.nan, 1.0, np.inf, -1.0], [-np.inf, 1.0, np.inf, 0.5]),
        ([], []),
    ]
    for weights, expected in table:
        close(scores.lamp([jnp.array(weights, jnp.float32)])[0], np.float32(expected))
    assert float(scores.lamp(jnp.array(-2.0))) == 1.0


def test_lamp_of_stacked_layers():
    w = np.random.default_rng(0).integers(-3, 4, (3, 4, 5)).astype(np.float32)
    params = {"layers": {"kernel": w, "bias": w[:, 0]}, "head": w[0]}
    found = scores.lamp(params, stacked="layers")
    for i in range(3):
        close(found["layers"]["kernel"][i], lamp_oracle(w[i]), rtol=1e-5)
        close(found["layers"]["bias"][i], lamp_oracle(w[i, 0]), rtol=1e-5)
    close(found["head"], lamp_oracle(w[0]), rtol=1e-5)
    close(jax.vmap(lambda w: scores.lamp([w])[0])(jnp.asarray(w)), found["layers"]["kernel"])
    with pytest.raises(ValueError, match="stacked='blocks' matches no path"):
        scores.lamp(params, stacked="blocks")


# Channels.


@pytest.mark.parametrize("axes", [(0, 1, 2), (-1, 2, 1), 3, (0, 3), ()])
def test_channel_scores_against_numpy(axes):
    kernel = np.random.default_rng(0).normal(size=(3, 2, 4, 5)).astype(np.float32)
    reduced = (axes,) if isinstance(axes, int) else axes
    kept = [a for a in range(4) if a not in [b % 4 for b in reduced]]
    channels = np.transpose(exact(kernel), [*kept, *[b % 4 for b in reduced]])
    channels = channels.reshape(*[kernel.shape[a] for a in kept], -1)
    close(scores.channel_norm(kernel, axes, ord=1), abs(channels).sum(-1), rtol=1e-5)
    close(scores.channel_norm(kernel, axes), np.sqrt((channels**2).sum(-1)), rtol=1e-5)
    filters = channels.reshape(-1, channels.shape[-1])
    distances = np.sqrt(((filters[:, None] - filters[None]) ** 2).sum(-1)).sum(1)
    close(scores.fpgm(kernel, axes), distances.reshape(channels.shape[:-1]), rtol=1e-5)


def test_fpgm_finds_the_replaceable_filter_whatever_its_norm():
    filters = jnp.array([[10.0, 0.0], [0.0, 10.0], [10.0, 10.0], [7.0, 7.0], [0.1, 0.0], [7.0, 7.0]])
    found = scores.fpgm(filters, 1)
    assert found[3] == found[5] == found.min()
    assert scores.channel_norm(filters, 1).argmin() == 4


def test_channels_with_nan_rank_lowest():
    kernel = jnp.array([[jnp.nan, 0.0, 1.0, 5.0], [2.0, 0.0, 0.0, 0.0]])
    assert scores.channel_norm(kernel, 0).tolist() == [-jnp.inf, 0.0, 1.0, 5.0]
    assert scores.fpgm(kernel, 0).tolist() == [-jnp.inf, 6.0, 5.0, 9.0]
    assert scores.batch_norm_scale(jnp.array([jnp.nan, -1.0])).tolist() == [-jnp.inf, 1.0]


def test_a_channel_score_serves_the_channel_rule():
    params = {"kernel": jnp.array([[4.0, 7.0, 0.0], [4.0, 0.0, 0.0]])}
    l1, l2 = (functools.partial(scores.channel_norm, ord=ord) for ord in (1, 2))
    for norm, kept in ((l1, 0), (l2, 1), (scores.fpgm, 2)):
        masks = jaxprune.make_masks(params, 2 / 3, rule=rules.channels(rules.layer_sparsity, norm=norm))
        assert masks["kernel"].tolist() == [[channel == kept for channel in range(3)]] * 2


def test_channel_scores_refuse():
    with pytest.raises(ValueError, match=r"fpgm got axes \(2,\) for a kernel of shape \(2, 3\)"):
        scores.fpgm(jnp.ones((2, 3)), 2)
    with pytest.raises(ValueError, match=r"channel_norm got axes \(0, -2\)"):
        scores.channel_norm(jnp.ones((2, 3)), (0, -2))
    with pytest.raises(ValueError, match="ord=1 or ord=2; got 3"):
        scores.channel_norm(jnp.ones((2, 3)), 0, ord=3)
    for score in (scores.channel_norm, scores.fpgm):
        with pytest.raises(TypeError, match=r"floating-point numbers; got int32"):
            score(jnp.ones((2, 3), int), 0)
    with pytest.raises(TypeError, match="batch_norm_scale takes an array of floating-point numbers; got int32"):
        scores.batch_norm_scale(jnp.ones(3, int))


# Evidence over batches.


def test_mean_over_batches_is_the_gradient_of_the_whole():
    rng = np.random.default_rng(0)
    w, x, y = rng.normal(size=3), rng.normal(size=(12, 3)), rng.normal(size=12)

    def loss(params, batch):
        x, y = batch
        return jnp.mean((x @ params["w"] - y) ** 2)

    params = {"w": jnp.asarray(w, jnp.float32)}
    batches = ((np.float32(x[i : i + 3]), np.float32(y[i : i + 3])) for i in range(0, 12, 3))
    found = scores.mean_over_batches(jax.grad(loss), params, batches)
    close(found["w"], 2 * x.T @ (x @ w - y) / 12, rtol=1e-4)
    with pytest.raises(ValueError, match="got no batch"):
        scores.mean_over_batches(jax.grad(loss), params, batches)


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
    found = scores.fisher(params, scores.mean_over_batches(squared_grads, params, batches))
    each = 2 * (x @ w - y)[:, None] * x
    close(found["w"], w**2 * np.mean(each**2, axis=0) / 2, rtol=1e-4)


def test_mean_over_batches_adds_up_in_float32():
    one = jnp.ones((), jnp.bfloat16)
    found = scores.mean_over_batches(lambda params, batch: params * batch, one, [1.0] * 600)
    assert found.dtype == jnp.float32
    assert found == 1.0  # a bfloat16 sum stops growing at 256


def test_mean_over_batches_takes_gradients_of_integers():
    params = {"w": jnp.array(2.0), "n": jnp.array(3)}
    grads = jax.grad(lambda p, batch: p["w"] * batch, allow_int=True)
    found = scores.mean_over_batches(grads, params, [jnp.array(1.0), jnp.array(5.0)])
    assert jax.tree.map(float, found) == {"w": 3.0, "n": 0.0}


# Synaptic flow.


def random_net(widths, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in itertools.pairwise(widths)]


def flow_oracle(kernels):
    """R and the scores |theta dR/dtheta| of a ReLU net without biases, by the layers before and behind."""
    kernels = [abs(exact(kernel)) for kernel in kernels]
    before = [np.ones(len(kernels[0]))]
    for kernel in kernels:
        before.append(before[-1] @ kernel)
    behind = [np.ones(kernels[-1].shape[1])]
    for kernel in kernels[::-1]:
        behind.append(kernel @ behind[-1])
    behind = behind[::-1][1:]
    return before[-1].sum(), [b[:, None] * k * a for b, k, a in zip(before, kernels, behind, strict=False)]


def test_synflow_is_the_sum_over_paths():
    params = random_net((3, 4, 5, 2))
    total, expected = flow_oracle(params)
    found = scores.synflow(relu_net, params, jax.ShapeDtypeStruct((1, 3), jnp.float32))
    for leaf, oracle in zip(found, expected, strict=True):
        close(leaf, oracle, rtol=1e-5)
        assert abs(float(leaf.sum()) / total - 1) < 1e-5  # conserved from layer to layer


def test_synflow_takes_nan_for_zero_and_reads_no_data():
    params = random_net((3, 4, 2))
    broken = [params[0].at[1, 2].set(jnp.nan), params[1]]
    found = scores.synflow(relu_net, broken, jnp.full((1, 3), jnp.nan))
    expected = flow_oracle([np.nan_to_num(leaf) for leaf in broken])[1]
    assert found[0][1, 2] == -jnp.inf
    close(found[0].at[1, 2].set(0), expected[0], rtol=1e-5)
    close(found[1], expected[1], rtol=1e-5)


def test_synflow_refuses():
    with pytest.raises(TypeError, match=r"feeds ones, but x\['tokens'\] holds int32"):
        scores.synflow(relu_net, random_net((2, 2)), {"tokens": jnp.ones((1, 3), jnp.int32)})
    with pytest.raises(ValueError, match="R is inf"):
        scores.synflow(relu_net, [jnp.full((2, 2), 1e30)] * 3, jnp.ones((1, 2)))
    for rounds in (0, 2.0, True):
        with pytest.raises(ValueError, match="rounds >= 1"):
            scores.synflow_masks(relu_net, random_net((2, 2)), jnp.ones((1, 2)), 0.5, rounds=rounds)
    with pytest.raises(ValueError, match=r"sparsity in \[0, 1\]; got 1.5"):
        scores.synflow_masks(relu_net, random_net((2, 2)), jnp.ones((1, 2)), 1.5)


def pruned(kernels, masks):
    return [np.where(mask, kernel, 0) for kernel, mask in zip(kernels, masks, strict=True)]


def synflow_oracle(kernels, sparsity, rounds):
    """Algorithm 1 with exact counts."""
    size = sum(kernel.size for kernel in kernels)
    masks = [np.ones(kernel.shape, bool) for kernel in kernels]
    for r in range(1, rounds + 1):
        found = flow_oracle(pruned(kernels, masks))[1]
        flat = np.concatenate([np.where(m, s, -np.inf).ravel() for m, s in zip(masks, found, strict=True)])
        keep = np.ones(size, bool)
        removed = round((1 - (1 - sparsity) ** (r / rounds)) * size)
        keep[np.lexsort((-np.arange(size), flat))[:removed]] = False
        parts = np.split(keep, np.cumsum([kernel.size for kernel in kernels])[:-1])
        masks = [part.reshape(kernel.shape) for part, kernel in zip(parts, kernels, strict=True)]
    return masks


def test_one_round_of_synflow_is_one_shot():
    params = random_net((5, 4))
    [mask] = scores.synflow_masks(relu_net, params, jnp.ones((1, 5)), 0.3, rounds=1)
    np.testing.assert_array_equal(mask, synflow_oracle(params, 0.3, 1)[0])


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(6, 9, use_bias=False, rngs=rngs)
        self.second = nnx.Linear(9, 5, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


def test_synflow_masks_of_an_nnx_state_follow_the_algorithm_under_jit():
    graph, state = nnx.split(Net(nnx.Rngs(0)), nnx.Param)

    @jax.jit
    def prune(state, sparsity):
        apply = lambda state, x: nnx.merge(graph, state)(x)  # noqa: E731
        return scores.synflow_masks(apply, state, jnp.ones((1, 6)), sparsity, rounds=12)

    found = prune(state, 0.9)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    kernels, masks = jax.tree.leaves(state), jax.tree.leaves(found)
    for mask, oracle in zip(masks, synflow_oracle(kernels, 0.9, 12), strict=True):
        np.testing.assert_array_equal(mask, oracle)
    # A path from the inputs to the outputs is left.
    assert flow_oracle(pruned(kernels, masks))[0] > 0


# Sharded parameters.


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
