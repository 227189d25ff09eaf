"""Let a smaller language model learn from the one that it was made of; what is learnt so far outlives the process."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from rich.console import Console
from rich.progress import track

from jaxprune import distill

SAVE_EVERY = 25  # steps
Hidden = Callable[[Any, Any], jax.Array]  # (params, tokens) -> what the head reads


def distilled(
    student: tuple[Hidden, Any],
    teacher: tuple[Hidden, Any],
    lessons: np.ndarray,
    rate: float,
    folder: Path,
    console: Console,
) -> Any:
    """Let a model learn what another one foretells, by Adam, one step for each batch of windows.

    Goes on behind the last step that `folder` holds.

    Args:
      student: the function of the one that learns, and its parameters.
      teacher: those of the other one.
      lessons: int32 [steps, windows at once, length].
      rate: the highest learning rate; it rises over a tenth of the steps, and falls by a cosine to a tenth.
      folder: for checkpoints.
      console: to show the progress on.

    Returns:
      The parameters of the one that has learnt.
    """
    steps = len(lessons)
    schedule = optax.warmup_cosine_decay_schedule(rate / 10, rate, max(1, steps // 10), steps, rate / 10)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    (hidden, first), (known_hidden, known) = student, teacher

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, known: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
        target = known_hidden(known, tokens)

        def loss(params: Any) -> jax.Array:
            return distill.logit_loss(hidden(params, tokens), target, head(params), head(known))

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    params = jax.tree.map(jnp.copy, first)  # the first step takes these for its own
    state = tx.init(params)
    losses = np.zeros(steps)
    options = ocp.CheckpointManagerOptions(max_to_keep=1, create=True)
    with ocp.CheckpointManager(folder.resolve(), options=options) as manager:
        done = manager.latest_step() or 0
        if done:
            saved = manager.restore(done, args=ocp.args.StandardRestore((params, state, losses)))
            params, state, losses = saved[0], saved[1], np.array(saved[2])
        for number in track(range(done, steps), "distilling", console=console, transient=True):
            params, state, value = step(params, state, known, lessons[number])
            losses[number] = float(value)
            if (number + 1) % SAVE_EVERY == 0 and number + 1 < steps:
                manager.save(number + 1, args=ocp.args.StandardSave((params, state, losses)))
    console.print(f"  from the teacher: {losses[0]:.3f} nats at first, {losses[-10:].mean():.3f} in the last ten steps")
    return params


def head(params: Any) -> Callable[[jax.Array], jax.Array]:
    """Return what maps hidden states to logits, where the table of tokens is the head, too."""
    table = params["embed"]["embedding"]
    return lambda hidden: jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
