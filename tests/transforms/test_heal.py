"""Healing against a loop by hand, and what it says of losses that go wrong."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxprune.transforms import heal
from tests.support.one_layer import KEEP, MASKS, assert_positive_zeros, dense_params

# Optax raises a float to the count of steps, which is a whole number (`tree.bias_correction`).
from tests.support.promotion import standard_promotion as standard_promotion

X, Y = np.random.default_rng(1).normal(size=(2, 30, 5, 4)).astype(np.float32)
BATCHES = [{"x": x, "y": y[:, :3]} for x, y in zip(X, Y, strict=True)]


def loss(params: Any, batch: Any) -> jax.Array:
    return jnp.mean((batch["x"] @ params["kernel"] + params["bias"][None] - batch["y"]) ** 2)


def test_against_numpy_with_clipping_that_knows_kept_weights_alone():
    params = dense_params()
    before = jax.tree.map(np.array, params)
    rate = optax.linear_schedule(0.1, 0.0, 30)
    found = heal(
        loss, params, MASKS, (batch for batch in BATCHES), optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(rate))
    )

    kernel, bias = np.where(KEEP, before["kernel"], 0).astype(float), before["bias"].astype(float)
    for t, batch in enumerate(BATCHES):
        wrong = batch["x"] @ kernel + bias - batch["y"]
        np.testing.assert_allclose(found.losses[t], np.mean(wrong**2), rtol=1e-5)
        to_kernel, to_bias = np.where(KEEP, 2 * batch["x"].T @ wrong / wrong.size, 0), 2 * wrong.sum(0) / wrong.size
        norm = np.sqrt((to_kernel**2).sum() + (to_bias**2).sum())
        step = 0.1 * (1 - t / 30) / max(1, norm / 0.5)
        kernel, bias = kernel - step * to_kernel, bias - step * to_bias
    np.testing.assert_allclose(found.params["kernel"], kernel, atol=1e-5)
    np.testing.assert_allclose(found.params["bias"], bias, atol=1e-5)
    assert_positive_zeros(np.asarray(found.params["kernel"])[~KEEP])
    # Nothing that was given is lost or changed.
    jax.tree.map(np.testing.assert_array_equal, params, before)
    assert np.asarray(MASKS["kernel"]).sum() == KEEP.sum()
    assert found.losses.dtype == np.float32
    assert repr(found) == f"<Healed: 30 steps, loss {found.losses[0]:.4g} to {found.losses[-1]:.4g}>"


def test_one_compilation_in_bfloat16_and_weights_that_were_nan():
    traces = []

    def counted(params: Any, batch: Any) -> jax.Array:
        traces.append(None)
        return loss(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), batch)

    params = dense_params(jnp.bfloat16)
    params["kernel"] = jnp.where(MASKS["kernel"], params["kernel"], jnp.nan)
    # An optimizer whose state begins as the parameters themselves, and one that reads the loss.
    optimizer = optax.chain(optax.contrib.schedule_free_sgd(0.05), optax.contrib.reduce_on_plateau())
    found = heal(counted, params, MASKS, BATCHES[:5], optimizer)
    assert len(traces) == 1
    assert found.params["kernel"].dtype == jnp.bfloat16
    assert_positive_zeros(np.asarray(found.params["kernel"])[~KEEP])


def test_a_loss_that_is_not_finite_is_told_with_its_batch():
    batches = [*BATCHES[:3], {"x": BATCHES[0]["x"], "y": BATCHES[0]["y"] * np.inf}, *BATCHES]
    with pytest.raises(ValueError, match="the loss of batch 3 is inf. Take a smaller learning rate"):
        heal(loss, dense_params(), MASKS, batches, optax.sgd(0.1))
    with pytest.raises(ValueError, match="the loss of batch 0 is inf"):
        heal(loss, dense_params(), MASKS, batches[3:4], optax.sgd(0.1))


def test_a_loss_that_rises_is_told():
    with pytest.warns(UserWarning, match=r"heal ended with a loss of .*, above .* \(means of 1 of 10 batches\)"):
        heal(loss, dense_params(), MASKS, BATCHES[:1] * 10, optax.sgd(8.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        heal(loss, dense_params(), MASKS, BATCHES[:1] * 10, optax.sgd(0.1))
        heal(loss, dense_params(), MASKS, BATCHES[:1], optax.sgd(8.0))
        # Other batches have other losses, and these rise by chance.
        heal(loss, dense_params(), MASKS, BATCHES[:5], optax.sgd(0.01))


def test_errors():
    with pytest.raises(ValueError, match="at least one batch"):
        heal(loss, dense_params(), MASKS, [], optax.sgd(0.1))
    with pytest.raises(TypeError, match=r"gave heal an array of shape \[3\]; it is to be one number"):
        heal(lambda params, batch: params["bias"], dense_params(), MASKS, BATCHES, optax.sgd(0.1))
    with pytest.raises(TypeError, match="gave heal a tuple"):
        heal(lambda params, batch: (loss(params, batch), 1), dense_params(), MASKS, BATCHES, optax.sgd(0.1))
    with pytest.raises(TypeError, match=r"params\['steps'\] is int32: give heal what is trained"):
        heal(loss, dense_params() | {"steps": jnp.int32(0)}, MASKS, BATCHES, optax.sgd(0.1))
    with pytest.raises(TypeError, match="given 0.1 where the optimizer belongs"):
        heal(loss, dense_params(), MASKS, BATCHES, 0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no entry for params"):
        heal(loss, dense_params(), {"kernel": MASKS["kernel"]}, BATCHES, optax.sgd(0.1))


def test_a_bar_on_stderr_alone(capsys):
    heal(loss, dense_params(), MASKS, BATCHES[:3], optax.sgd(0.1), progress=True)
    shown = capsys.readouterr()
    assert "healing" in shown.err
    assert not shown.out
