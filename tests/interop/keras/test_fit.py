"""`model.fit` under the callbacks: exact zeros after every step, in files, and by a schedule."""

import os

os.environ["KERAS_BACKEND"] = "jax"

import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest

import jaxprune
from jaxprune import rules
from jaxprune.transforms import keep_pruned_in_keras, prune_in_keras

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 6)).astype(np.float32)
Y = np.stack([X[:, 0] * X[:, 1], X[:, 2]], 1)
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras' own
make = functools.partial(jaxprune.make_masks, rule=rules.layer_sparsity)


@pytest.fixture(autouse=True)
def _as_keras_needs_it() -> Iterator[None]:
    """Keras promotes ranks and dtypes."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        keras.utils.set_random_seed(0)
        yield


def build(optimizer: Any = "adam", **options: Any) -> Any:
    layers = keras.layers
    inputs = keras.Input((6,))
    hidden = layers.BatchNormalization(name="norm")(layers.Dense(16, "relu", name="one")(inputs))
    model = keras.Model(inputs, layers.Dense(2, kernel_initializer="zeros", name="two")(hidden))
    model.compile(optimizer, "mse", **options)
    return model


def params_of(model: Any) -> dict[str, Any]:
    return {
        variable.path: np.asarray(variable.value) for variable in model.trainable_variables
    }  # fit donates its arrays


class Watch(keras.callbacks.Callback):
    """Looks at the weights after each batch."""

    def __init__(self, look: Callable[[dict[str, np.ndarray]], None]) -> None:
        super().__init__()
        self.look = look

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.look(params_of(self.model))


def require_zeros(masks: Any, params: dict[str, np.ndarray]) -> None:
    for path, mask in masks.items():
        pruned = np.asarray(params[path])[~np.asarray(mask)]
        assert not pruned.any(), path
        assert not np.signbit(pruned).any(), path
        assert np.all(np.asarray(params[path])[np.asarray(mask)] != 0) or mask.all(), path


OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(0.01),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "momentum": lambda: keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
    "average": lambda: keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=3),
    "average at the end": lambda: keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.5),
    "accumulated": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)),
    "muon": lambda: keras.optimizers.Muon(0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_after_every_step(name: str):
    model = build(OPTIMIZERS[name]())
    before = params_of(model)
    masks = make(before, 0.5)
    seen = []
    watch = Watch(lambda params: seen.append(require_zeros(masks, params)))
    callback = keep_pruned_in_keras(masks)
    model.fit(X, Y, batch_size=8, epochs=2, verbose=0, callbacks=[callback, watch])
    assert len(seen) == 16
    after = params_of(model)
    require_zeros(masks, after)
    for path, value in after.items():  # what is kept is trained, biases and a layer that began at zero among it
        moved = (value != before[path])[np.asarray(masks[path])]
        assert moved.mean() > 0.4, path
    assert set(callback.masks) == set(masks)


@pytest.mark.parametrize("options", [{"run_eagerly": True}, {"steps_per_execution": 3}, {"jit_compile": False}])
def test_other_ways_to_run(options: Any):
    model = build(**options)
    masks = make(params_of(model), 0.5)
    model.fit(
        X,
        Y,
        batch_size=8,
        verbose=0,
        callbacks=[keep_pruned_in_keras(masks), Watch(functools.partial(require_zeros, masks))],
    )


def test_mixed_precision():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = build()
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        masks = make(params_of(model), 0.5)
        model.fit(X, Y, batch_size=8, verbose=0, callbacks=[keep_pruned_in_keras(lambda params: masks)])
        require_zeros(masks, params_of(model))
    finally:
        keras.config.set_dtype_policy("float32")


def test_files(tmp_path: Path):
    model = build()
    masks = make(params_of(model), 0.5)
    save = keras.callbacks.ModelCheckpoint(str(tmp_path / "{epoch}-{batch}.keras"), save_freq=3)
    model.fit(X, Y, batch_size=8, verbose=0, callbacks=[save, keep_pruned_in_keras(masks)])
    model.save(tmp_path / "whole.keras")
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3  # two in the middle of the epoch
    for file in files:
        loaded = keras.models.load_model(file)  # a warning would be an error: the optimizer's variables are all there
        require_zeros(masks, params_of(loaded))
        np.testing.assert_array_equal(jaxprune.algebra.masks_of(params_of(loaded))["one/kernel"], masks["one/kernel"])
        assert int(loaded.optimizer.iterations) > 0
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), model.predict(X, verbose=0))
    # The zeros are a mask to go on with.
    loaded.fit(X, Y, batch_size=8, verbose=0, callbacks=[keep_pruned_in_keras(jaxprune.algebra.masks_of)])
    require_zeros(masks, params_of(loaded))


def test_only_while_the_callback_is_there():
    model = build()
    model.fit(X, Y, batch_size=8, verbose=0)
    masks = make(params_of(model), 0.5)
    model.fit(X, Y, batch_size=8, verbose=0, callbacks=[keep_pruned_in_keras(masks)])
    require_zeros(masks, params_of(model))
    model.fit(X, Y, batch_size=8, verbose=0)
    assert np.all(params_of(model)["one/kernel"] != 0)
    assert "train_step" not in vars(model)


def sparsities(seen: list[float], params: dict[str, np.ndarray]) -> None:
    seen.append(float((params["one/kernel"] == 0).mean()))


def test_on_a_schedule(tmp_path: Path):
    schedule = optax.linear_schedule(0.0, 0.75, transition_steps=9, transition_begin=2)
    callback = prune_in_keras(make, schedule, every=3, begin=2, until=11)
    model, seen = build(), []
    history: list[np.ndarray] = []
    watch = Watch(lambda params: (sparsities(seen, params), history.append(params["one/kernel"] == 0)))
    model.fit(X, Y, batch_size=8, epochs=2, verbose=0, callbacks=[callback, watch])
    # Of the updates, from 0 on, those of number 2, 5, 8 and 11 change masks.
    steps = [0, 0, 0, 0, 0, 3, 3, 3, 6, 6, 6, *[9] * 5]
    np.testing.assert_allclose(seen, [round(96 * 0.75 * step / 9) / 96 for step in steps])
    assert all(np.all(later | ~earlier) for earlier, later in zip(history, history[1:], strict=False))
    np.testing.assert_array_equal(callback.masks["one/kernel"], ~history[-1])
    # A schedule goes on where the optimizer is.
    half, seen = build(), []
    half.fit(
        X, Y, batch_size=8, epochs=1, verbose=0, callbacks=[prune_in_keras(make, schedule, every=3, begin=2, until=11)]
    )
    half.save(tmp_path / "half.keras")
    loaded = keras.models.load_model(tmp_path / "half.keras")
    loaded.fit(X, Y, batch_size=8, epochs=1, verbose=0, callbacks=[prune_in_keras(make, schedule, every=3, begin=2, until=11), Watch(functools.partial(sparsities, seen))])  # fmt: skip
    np.testing.assert_allclose(seen, [round(96 * 0.75 * step / 9) / 96 for step in steps[8:]])


def test_a_schedule_under_a_moving_average():
    """Which still knows of weights from before they were pruned, and takes their place when training ends."""
    model = build(OPTIMIZERS["average at the end"]())
    callback = prune_in_keras(make, 0.5, begin=6, until=6)
    model.fit(X, Y, batch_size=8, verbose=0, callbacks=[callback])
    assert float(jnp.mean(callback.masks["one/kernel"])) == 0.5
    require_zeros(callback.masks, params_of(model))


def test_in_words():
    model = build()
    with pytest.raises(ValueError, match="masks has no entry for params"):
        model.fit(X, Y, verbose=0, callbacks=[keep_pruned_in_keras({"three/kernel": np.ones((2, 2), bool)})])
    with pytest.raises(
        ValueError, match=r"layer_sparsity takes 0 <= k <= 1, finite; got k = 75.0 for params\['one/kernel'\]"
    ):
        model.fit(X, Y, verbose=0, callbacks=[prune_in_keras(make, 75.0)])
    with pytest.raises(TypeError, match="schedule, which is a number or a function of the update's number alone"):
        prune_in_keras(make, make)
    with pytest.raises(ValueError, match="takes every >= 1"):
        prune_in_keras(make, 0.5, every=0)


def test_two_variables_of_one_path():
    class Twice(keras.Model):
        def __init__(self) -> None:
            super().__init__(name="twice")
            self.parts = [keras.layers.Dense(2, name="dense"), keras.layers.Dense(2, name="dense")]

        def call(self, x: Any) -> Any:
            return self.parts[1](self.parts[0](x))

    model = Twice()
    model.compile("sgd", "mse")
    with pytest.raises(
        ValueError, match="two variables of the model are called 'twice/dense/kernel'; give their layers other"
    ):
        model.fit(X, Y, verbose=0, callbacks=[prune_in_keras(make, 0.5)])


def test_on_another_backend():
    code = "import jaxprune; jaxprune.transforms.keep_pruned_in_keras({})"
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "KERAS_BACKEND": "numpy"}, capture_output=True, text=True
    )
    assert (
        "ValueError: Keras runs on numpy here, and only on JAX can steps be held: set KERAS_BACKEND=jax" in run.stderr
    )
