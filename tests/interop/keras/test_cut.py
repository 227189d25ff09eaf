"""`stateless_call` of Keras' own MobileNetV2, traced and cut: trainable variables and moving statistics by the same plan."""

import os

os.environ["KERAS_BACKEND"] = "jax"

from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from jaxprune.structured import count_macs, rebuild, select_channels, shrink, trace, verify

RNG = np.random.default_rng(0)


def test_mobile_net():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        keras.utils.set_random_seed(0)
        model = keras.applications.MobileNetV2(
            weights=None, input_shape=(32, 32, 3), classes=10, classifier_activation=None
        )
        trainable, fixed = model.trainable_variables, model.non_trainable_variables
        params = {variable.path: variable.value for variable in (*trainable, *fixed)}
        for path, value in params.items():  # statistics as of a network that was trained
            if path.endswith(("gamma", "moving_variance")):
                params[path] = jnp.asarray(RNG.uniform(0.5, 2.0, value.shape), jnp.float32)
            if path.endswith(("beta", "moving_mean")):
                params[path] = jnp.asarray(RNG.normal(size=value.shape), jnp.float32)

        def apply(params: dict[str, Any], x: Any) -> Any:
            return model.stateless_call([params[v.path] for v in trainable], [params[v.path] for v in fixed], x)[0]

        x = jnp.asarray(RNG.normal(size=(2, 32, 32, 3)), jnp.float32)
        graph = trace(apply, params, x)
        plan = select_channels(graph, params, 0.5, round_to=8)
        small = shrink(plan, params)
        assert small["block_3_expand/kernel"].shape == (1, 1, 16, 72)
        assert small["block_3_expand_BN/moving_mean"].shape == (72,)
        assert count_macs(graph) / count_macs(graph, plan) > 3
        assert float(jnp.std(apply(params, x))) > 0.01
        assert verify(graph, plan, params, x)
        assert rebuild(graph, plan)(small, x[:1]).shape == (1, 10)
