"""straight_through, decay_pruned, soft_threshold and merge_lora against the papers' equations."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxprune import apply_masks, make_masks, rules
from jaxprune.transforms import decay_pruned, merge_lora, soft_threshold, straight_through
from tests.support.one_layer import KEEP, KERNEL, MASKS, TARGET, assert_positive_zeros, dense_params, loss, step

SLOPE = np.random.default_rng(5).normal(size=(4, 3)).astype(np.float32)


def slanted(params: Any) -> jax.Array:
    """Have the gradient SLOPE, wherever the parameters are."""
    return jnp.sum(params["kernel"] * SLOPE) + jnp.sum(params["bias"])


# --- straight_through. ---


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_value_is_that_of_apply_masks(dtype):
    params = dense_params(dtype)
    params["kernel"] = params["kernel"].at[0].set(jnp.array([-0.0, jnp.nan, jnp.inf], dtype))
    found, expected = straight_through(params, MASKS), apply_masks(params, MASKS)
    for name in params:
        np.testing.assert_array_equal(found[name], expected[name])
        assert found[name].dtype == dtype
    np.testing.assert_array_equal(np.signbit(found["kernel"]), np.signbit(expected["kernel"]))


def test_every_weight_receives_the_gradient_at_the_masked_weights():
    grads = jax.jit(jax.grad(lambda params: loss(straight_through(params, MASKS))))(dense_params())
    at_masked = jax.grad(loss)(apply_masks(dense_params(), MASKS))
    for name in grads:
        np.testing.assert_array_equal(grads[name], at_masked[name])
    assert (np.asarray(grads["kernel"]) != 0).all()


def test_backward_masks_of_top_kast():
    """Equation 3: the gradient is that at the forward weights, for the larger set B of weights."""
    backward = KEEP | (np.arange(12).reshape(4, 3) < 6)
    masks = MASKS | {"kernel": jnp.asarray(backward)}
    value, grads = jax.value_and_grad(lambda params: slanted(straight_through(params, MASKS, backward=masks)))(
        dense_params()
    )
    assert value == slanted(apply_masks(dense_params(), MASKS))
    np.testing.assert_array_equal(grads["kernel"], np.where(backward, SLOPE, 0))
    np.testing.assert_array_equal(grads["bias"], np.ones(3))


def test_straight_through_under_vmap_and_forward_differentiation():
    params = dense_params()
    stack = jax.tree.map(lambda mask: jnp.stack([mask, ~mask]), MASKS)
    values = jax.vmap(lambda masks: slanted(straight_through(params, masks)))(stack)
    np.testing.assert_allclose(values[0], slanted(apply_masks(params, MASKS)), rtol=1e-6)
    tangent = jax.jvp(lambda params: straight_through(params, MASKS), (params,), (params,))[1]
    np.testing.assert_array_equal(tangent["kernel"], KERNEL)


def test_straight_through_refuses_other_masks():
    with pytest.raises(ValueError, match=r"masks has no entry for params\['bias'\]"):
        straight_through(dense_params(), {"kernel": MASKS["kernel"]})
    with pytest.raises(ValueError, match=r"params\['kernel'\] an array of bool\[3, 4\]"):
        straight_through(dense_params(), MASKS, backward=MASKS | {"kernel": jnp.ones((3, 4), bool)})


def test_masked_weights_stay_zero_through_quantisation():
    """A symmetric fake quantisation with a straight-through gradient, as in quantisation-aware training."""

    def fake_quantise(x: jax.Array) -> jax.Array:
        scale = jnp.max(jnp.abs(x)) / 127
        return x + jax.lax.stop_gradient(jnp.round(x / scale) * scale - x)

    def forward(params: Any) -> Any:
        return jax.tree.map(fake_quantise, straight_through(params, MASKS))

    kernel = forward(dense_params())["kernel"]
    assert_positive_zeros(np.asarray(kernel)[~KEEP])
    assert 0 < np.abs(kernel - np.where(KEEP, KERNEL, 0)).max() < np.abs(KERNEL).max() / 127
    np.testing.assert_allclose(jax.grad(lambda p: slanted(forward(p)))(dense_params())["kernel"], SLOPE, rtol=1e-6)


# qwix looks for a class by a name that Flax has given up.
@pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning")
def test_masked_weights_stay_zero_through_qwix():
    """The fake-quantised forward pass of qwix, on a layer that reads off its kernel row by row."""
    qwix = pytest.importorskip("qwix", reason="qwix is not installed")
    rule = qwix.QtRule(module_path=".*", weight_qtype=jnp.int8)
    layer = qwix.quantize_model(nn.Dense(3, use_bias=False), qwix.QtProvider([rule]))

    def forward(params: Any) -> jax.Array:
        kernel = straight_through(params, MASKS)["kernel"]
        return layer.apply({"params": {"kernel": kernel}}, jnp.eye(4))

    kernel = np.asarray(forward(dense_params()))
    np.testing.assert_array_equal(kernel[~KEEP], 0.0)
    assert 0 < np.abs(kernel - np.where(KEEP, KERNEL, 0)).max() < np.abs(KERNEL).max() / 127
    grads = jax.grad(lambda params: jnp.sum(forward(params) * SLOPE))(dense_params())
    assert (np.asarray(grads["kernel"]) != 0).all()


def test_top_kast_trains_a_superset_of_what_the_loss_sees():
    """Equation 3 with masks made anew in every step: A the largest quarter of the kernel, B the largest half."""
    exactly = functools.partial(make_masks, rule=rules.layer_sparsity, prunable={"kernel": True, "bias": False})
    grad = jax.jit(
        jax.grad(lambda params: loss(straight_through(params, exactly(params, 0.75), backward=exactly(params, 0.5))))
    )
    params, kernel, moved = dense_params(), KERNEL.astype(np.float64), np.zeros((4, 3), bool)
    for _ in range(10):
        params = jax.tree.map(lambda leaf, slope: leaf - 0.05 * slope, params, grad(params))
        rank = np.argsort(np.argsort(-np.abs(kernel).ravel())).reshape(4, 3)
        kernel = kernel - 0.05 * np.where(rank < 6, 2 * (np.where(rank < 3, kernel, 0) - TARGET), 0)
        moved |= rank < 6
        np.testing.assert_allclose(params["kernel"], kernel, atol=1e-5)
    assert (np.asarray(params["kernel"]) == KERNEL)[~moved].all()
    assert 6 <= moved.sum() < 12


# --- SR-STE. ---

two_of_four = functools.partial(make_masks, k=2, rule=rules.n_m(4), prunable={"kernel": True, "bias": False})


def keep_two_of_four(kernel: np.ndarray) -> np.ndarray:
    places = np.argsort(np.argsort(-np.abs(kernel), axis=0, kind="stable"), axis=0)
    return places < 2


def test_sr_ste_against_numpy():
    """Equation 8: W <- W - gamma (g(W~) + lambda (1 - E) W), with E the 2:4 mask of W and W~ = E W."""
    rate, gamma, steps = 0.3, 0.05, 12
    tx = optax.chain(decay_pruned(lambda params, k: two_of_four(params), 2, rate=rate), optax.sgd(gamma))
    grad = jax.grad(lambda params: loss(straight_through(params, two_of_four(params))))
    advance = jax.jit(lambda params, state: step(tx, params, state, grad(params)))
    params, state = dense_params(), tx.init(dense_params())
    kernel, target = KERNEL.astype(np.float64), KERNEL - np.asarray(jax.grad(loss)(dense_params())["kernel"]) / 2
    keeps = []
    for _ in range(steps):
        params, state = advance(params, state)
        keep = keep_two_of_four(kernel)
        keeps.append(keep)
        kernel = kernel - gamma * (2 * (np.where(keep, kernel, 0) - target) + rate * np.where(keep, 0, kernel))
        np.testing.assert_allclose(params["kernel"], kernel, atol=1e-5)
    assert any((keep != keeps[0]).any() for keep in keeps)
    np.testing.assert_allclose(params["bias"], (1 - 2 * gamma) ** steps, rtol=1e-5)


def test_decay_pruned_refuses():
    with pytest.raises(ValueError, match=r"decay_pruned takes rate >= 0; got -0.1"):
        decay_pruned(lambda params, k: two_of_four(params), 2, rate=-0.1)
    tx = decay_pruned(lambda params, k: two_of_four(params), 2, rate=0.1)
    with pytest.raises(ValueError, match="decay_pruned needs the parameters"):
        tx.update(dense_params(), tx.init(dense_params()))


def test_decay_keeps_the_dtype_of_the_updates():
    tx = decay_pruned(lambda params, k: MASKS, 0.5, rate=0.5)
    updates, _ = tx.update(optax.tree.zeros_like(dense_params(jnp.bfloat16)), tx.init(None), dense_params())
    assert updates["kernel"].dtype == jnp.bfloat16
    expected = np.where(KEEP, 0, 0.5 * KERNEL)
    np.testing.assert_allclose(np.asarray(updates["kernel"], np.float32), expected, rtol=2**-8)


# --- STR. ---


def sigmoid(s: Any) -> Any:
    return 1 / (1 + np.exp(-s))


@pytest.mark.slow
def test_soft_threshold_against_the_equations():
    """The value is that of equation 3, sign(W) relu(|W| - g(s)); so the derivatives are 1 and -g'(s) sign(W), or 0."""
    s = -0.4
    value, pull = jax.vjp(lambda kernel, s: soft_threshold(dense_params() | {"kernel": kernel}, s), KERNEL, s)
    survives = np.abs(KERNEL) > sigmoid(s)
    assert 0 < survives.sum() < 12
    np.testing.assert_allclose(value["kernel"], np.sign(KERNEL) * np.maximum(np.abs(KERNEL) - sigmoid(s), 0), atol=1e-6)
    assert_positive_zeros(np.asarray(value["kernel"])[~survives])
    np.testing.assert_array_equal(value["bias"], np.ones(3))
    by_weight, by_s = pull({"kernel": jnp.asarray(SLOPE), "bias": jnp.zeros(3)})
    np.testing.assert_allclose(by_weight, np.where(survives, SLOPE, 0))
    slope = -sigmoid(s) * (1 - sigmoid(s)) * (SLOPE * np.sign(KERNEL))[survives].sum()
    np.testing.assert_allclose(by_s, slope, rtol=1e-5)


def test_thresholds_by_layer_and_by_layer_of_a_stack():
    params = {"a": {"kernel": jnp.full((1, 2), 2.0)}, "b": {"kernel": jnp.full((2, 1, 2), -2.0), "bias": jnp.ones(2)}}
    found = soft_threshold(params, {"a": 0.0, "b": {"kernel": jnp.array([0.0, 99.0])}}, stacked="b/kernel")
    assert found["a"]["kernel"].tolist() == [[1.5, 1.5]]
    assert found["b"]["kernel"].tolist() == [[[-1.5, -1.5]], [[-1.0, -1.0]]]
    assert found["b"]["bias"].tolist() == [1.0, 1.0]


def test_soft_threshold_of_nan_and_bfloat16():
    found = soft_threshold({"kernel": jnp.array([[jnp.nan, -2.0]], jnp.bfloat16)}, 0.0)["kernel"]
    assert found.dtype == jnp.bfloat16
    assert found.tolist() == [[0.0, -1.5]]


def test_soft_threshold_learns_a_sparsity():
    """Decay of the weights and a growing threshold leave fewer and fewer."""

    def objective(trained: Any) -> jax.Array:
        return loss(soft_threshold(trained["params"], trained["s"])) / 10 - trained["s"]

    tx, trained = optax.sgd(0.05), {"params": dense_params(), "s": jnp.float32(-3.0)}
    state, counts = tx.init(trained), []
    advance = jax.jit(lambda trained, state: step(tx, trained, state, jax.grad(objective)(trained)))
    for _ in range(60):
        trained, state = advance(trained, state)
        counts.append(int((soft_threshold(trained["params"], trained["s"])["kernel"] != 0).sum()))
    assert counts[-1] < counts[0]


def test_soft_threshold_refuses():
    params = {"a": {"kernel": jnp.ones((1, 2))}, "b": {"kernel": jnp.ones((1, 2))}}
    with pytest.raises(ValueError, match=r"thresholds has no entry for params\['b'\]\['kernel'\]"):
        soft_threshold(params, {"a": 0.0})
    with pytest.raises(ValueError, match=r"threshold for params\['a'\]\['kernel'\] has shape \[2\].*a scalar\."):
        soft_threshold(params, {"a": jnp.zeros(2), "b": 0.0})
    with pytest.raises(ValueError, match=r"No leaf is prunable"):
        soft_threshold({"bias": jnp.ones(2)}, 0.0)


# --- merge_lora. ---


def test_merge_lora_keeps_zeros():
    a, b = np.random.default_rng(1).normal(size=(2, 4, 2)).astype(np.float32)
    b = b.T[:, :3]
    found = merge_lora(jnp.asarray(KERNEL), jnp.asarray(a), jnp.asarray(b), MASKS["kernel"], scale=0.5)
    np.testing.assert_allclose(found, np.where(KEEP, KERNEL + 0.5 * a @ b, 0), rtol=1e-5)
    assert_positive_zeros(np.asarray(found)[~KEEP])
    low = merge_lora(jnp.asarray(KERNEL, jnp.bfloat16), jnp.asarray(a), jnp.asarray(b), MASKS["kernel"])
    assert low.dtype == jnp.bfloat16


def test_merge_lora_refuses():
    with pytest.raises(ValueError, match=r"shapes \(4, 2\) and \(3, 3\) does not fit a kernel of .*\(4, 3\)"):
        merge_lora(jnp.ones((4, 3)), jnp.ones((4, 2)), jnp.ones((3, 3)), MASKS["kernel"])
    with pytest.raises(ValueError, match=r"a mask is bool"):
        merge_lora(jnp.ones((4, 3)), jnp.ones((4, 2)), jnp.ones((2, 3)), jnp.ones((4, 3)))
