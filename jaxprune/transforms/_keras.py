"""Keras 3 on JAX: callbacks by which ``model.fit`` holds masks, or prunes on a schedule.

Keras' training step is a function of the weights, the optimizer's variables and the data, jitted anew for each model. It is
wrapped: what is zero before a step is zero after it, and what is not, is not. So zeros are their own masks, cost no memory in the
step and nothing in the model's file, and no other weight is taken for a pruned one, whatever an update does.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprune._tree._leaves import is_function
from jaxprune._tree._masks import align_masks, kept
from jaxprune._tree._paths import flatten
from jaxprune.transforms._prune import Make, require_scheduled, try_out
from jaxprune.transforms._steps import Steps

# (parameters by path, the number of the update) -> masks.
_Remask = Callable[[dict[str, jax.Array], int], Any]

_ONCE = Steps(every=1, begin=0, until=0)


def keep_pruned_in_keras(masks: Any) -> Any:
    """Return a callback of Keras by which ``model.fit`` keeps pruned weights at exactly ``+0.0``, as `keep_pruned` does elsewhere.

    It applies the masks when training begins. They hold after every step, whatever the optimizer, its momentum and its weight decay,
    under moving averages of the weights, gradient accumulation and mixed precision; so they hold in a model that is saved in the
    middle of an epoch. A kept weight that is exactly zero becomes the smallest normal number of its dtype. What trains in other ways
    than by ``fit`` (``train_on_batch``) is not held.

    Args:
        masks: by ``variable.path``, as ``make_masks({v.path: v.value for v in model.trainable_variables}, k)`` makes them, or a
            function of that dict that makes them when training begins.

    Returns:
        A ``keras.callbacks.Callback``; its ``masks`` are those that hold, by path.

    Raises:
        ModuleNotFoundError: Keras is missing.
        ValueError: Keras runs on another backend than JAX, or on Flax NNX; when training begins, masks that fit no variable.

    >>> model.fit(x, y, callbacks=[keep_pruned_in_keras(masks)])  # doctest: +SKIP
    """

    def remask(params: dict[str, jax.Array], count: int) -> Any:
        del count
        return masks(params) if is_function(masks) else masks

    return _callbacks()(remask, _ONCE, None)


def prune_in_keras(
    make: Make, schedule: optax.ScalarOrSchedule, *, every: int = 1, begin: int = 0, until: int | None = None
) -> Any:
    """Return a callback of Keras by which ``model.fit`` prunes gradually, as `prune` does elsewhere.

    Before the updates begin, begin + every, ... and `until`, the last one, masks become ``make(params, schedule(count))``, and hold
    as those of `keep_pruned_in_keras` do. A pruned weight stays pruned. Updates are counted by the optimizer from its first on, so that
    a model that is loaded and trained on goes on where the schedule was. The step is compiled anew when weights are pruned in
    parameters that had none before. With ``steps_per_execution`` masks change before the first execution that reaches the
    update; with ``gradient_accumulation_steps`` each batch counts.

    Args:
        make: ``(params, k) -> masks``, of the trainable variables by ``variable.path``.
        schedule: as in `prune`.
        every: as in `prune`.
        begin: as in `prune`.
        until: as in `prune`.

    Returns:
        A ``keras.callbacks.Callback``; its ``masks`` are the last ones, by path, or None.

    Raises:
        ModuleNotFoundError: Keras is missing.
        TypeError: as in `prune`.
        ValueError: as in `prune`, when training begins; or Keras runs on another backend than JAX, or on Flax NNX.

    >>> model.fit(x, y, callbacks=[prune_in_keras(make, schedule, every=100, until=10_000)])  # doctest: +SKIP
    """
    steps = Steps(every, begin, until)
    require_scheduled("prune_in_keras", make, schedule, steps)

    def remask(params: dict[str, jax.Array], count: int) -> Any:
        return make(params, schedule(jnp.int32(count)) if callable(schedule) else schedule)

    def check(params: dict[str, jax.Array]) -> None:
        try_out(make, params, steps.range_of("prune_in_keras", schedule))

    return _callbacks()(remask, steps, check)


@functools.cache
def _callbacks() -> Any:
    """Return the class of both callbacks, which needs Keras to be made."""
    keras = _library()

    class Pruning(keras.callbacks.Callback):  # type: ignore[misc, name-defined]
        """Holds masks while a model is fitted; `masks` are by path."""

        def __init__(self, remask: _Remask, steps: Steps, check: Callable[[dict[str, jax.Array]], None] | None) -> None:
            super().__init__()
            self._remask, self._steps, self._check = remask, steps, check
            self._last: int | None = None
            self._before = 0
            self.masks: dict[str, jax.Array] | None = None

        def on_train_begin(self, logs: Any = None) -> None:
            if self._check is not None:
                self._check({path: variable.value for path, variable in _variables(self.model).items()})
            if self.masks is not None:
                hold(self.model, self.masks)
            self._catch_up(_batches(self.model))

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self._before = _batches(self.model)

        # Batches are not counted at their ends: a callback that asks for these makes Keras wait for every step.
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            self._catch_up(self._before + batch)

        def on_train_end(self, logs: Any = None) -> None:
            if self.masks is not None:
                hold(self.model, self.masks)  # Keras may have put moving averages in place of the weights
            release(self.model)

        def _catch_up(self, count: int) -> None:
            """Change masks if they are to have been changed by this update."""
            latest = self._steps.latest(count)
            if latest is None or latest == self._last:
                return
            self._last = latest
            # Who asks for the model in the middle of an epoch finds the weights of the last step in its variables, and the next
            # step begins with what he leaves there.
            params = {path: variable.value for path, variable in _variables(self.model).items()}
            made = _by_path(params, self._remask(params, latest))
            old = self.masks
            self.masks = made if old is None else {path: mask & old[path] for path, mask in made.items()}
            hold(self.model, self.masks)

    return Pruning


def _by_path(params: Mapping[str, jax.Array], masks: Any) -> dict[str, jax.Array]:
    flat = flatten(params, "params")
    found = zip(flat.paths, flat.leaves, align_masks(masks, flat), strict=True)
    return {path: jnp.ones_like(leaf, bool) if mask is None else jnp.asarray(mask) for path, leaf, mask in found}


def _variables(model: Any) -> dict[str, Any]:
    found = {variable.path: variable for variable in model.trainable_variables}
    if len(found) < len(model.trainable_variables):
        paths = [variable.path for variable in model.trainable_variables]
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"two variables of the model are called {twice!r}; give their layers other names.")
    return found


def _batches(model: Any) -> int:
    """Return how many batches the optimizer has seen, before or between epochs."""
    return int(model.optimizer.iterations) * (model.optimizer.gradient_accumulation_steps or 1)


def hold(model: Any, masks: Mapping[str, jax.Array]) -> None:
    """Apply masks to a model's variables, and have its steps hold what they prune."""
    variables = _variables(model)
    pruned = frozenset(path for path, mask in masks.items() if not bool(jnp.all(mask)))
    for path in pruned:
        value = variables[path].value
        variables[path].assign(kept(_apart_from_zero(value), masks[path]))
    held = frozenset(place for place, path in enumerate(variables) if path in pruned)
    if held == getattr(model.train_step, "held", frozenset()):
        return
    step = getattr(model.train_step, "unpruned", model.train_step)

    def train_step(state: Any, data: Any) -> Any:
        logs, (after, *rest) = step(state, data)
        pairs = enumerate(zip(state[0], after, strict=True))
        return logs, ([_land(*pair) if place in held else pair[1] for place, pair in pairs], *rest)

    train_step.unpruned, train_step.held = step, held  # type: ignore[attr-defined]
    model.train_step = train_step
    model.make_train_function(force=True)


def release(model: Any) -> None:
    """Have a model's steps hold nothing any more."""
    if hasattr(model.train_step, "unpruned"):
        step = model.train_step.unpruned
        del model.train_step
        if model.train_step != step:  # not the class's, but the model's own
            model.train_step = step
        model.make_train_function(force=True)


def _land(before: jax.Array, after: jax.Array) -> jax.Array:
    """Return a variable after a step: zero where it was zero, and nowhere else."""
    return kept(_apart_from_zero(after), before != 0)


def _apart_from_zero(values: jax.Array) -> jax.Array:
    return jnp.where(values == 0, jnp.full((), jnp.finfo(values.dtype).tiny, values.dtype), values)


def _library() -> Any:
    try:
        import keras
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "callbacks of Keras need the library keras: pip install keras", name="keras"
        ) from error
    if keras.backend.backend() != "jax":
        raise ValueError(
            f"Keras runs on {keras.backend.backend()} here, and only on JAX can steps be held: set KERAS_BACKEND=jax in the "
            "environment before keras is imported."
        )
    if keras.config.is_nnx_enabled():
        raise ValueError("Keras runs on Flax NNX here, whose steps cannot be held; unset KERAS_NNX_ENABLED.")
    return keras
