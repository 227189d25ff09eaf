"""A small training run with every transform, and a process that takes all of them along, saved after every step.

`python tests/support/resumable.py FOLDER`, with the root on the path, goes on from the newest checkpoint in the folder, if there is one.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

from jaxprune import apply_masks, keep_pruned, make_masks, prune, rigl
from jaxprune.transforms import (
    ac_dc_schedule,
    decay_pruned,
    elsa,
    keep_zeros,
    prune_and_regrow,
    prune_and_splice,
    prune_by_gradients,
    soft_threshold,
    sparse_evolution,
    static_sparse,
    straight_through,
)
from tests.support.one_layer import MASKS, dense_params, loss, step

STEPS = 12


class Run(NamedTuple):
    """What is trained: the optimizer, made anew by each process, what it minimises, and where it begins."""

    make: Callable[[], Any]
    objective: Callable[[Any], jax.Array] = loss
    start: Callable[[], Any] = lambda: apply_masks(dense_params(), MASKS)


def quantile(params: Any, k: Any) -> Any:
    """Make masks that compile fast: what is larger than the share k of all magnitudes."""
    return jax.tree.map(lambda leaf: jnp.abs(leaf) >= jnp.quantile(jnp.abs(leaf), k), params)


def half(params: Any) -> Any:
    return quantile(params, 0.5)


def behind_learnt_threshold(trained: Any) -> jax.Array:
    return loss(soft_threshold(trained["params"], trained["s"]))


CUBIC = optax.polynomial_schedule(0.0, 0.7, power=3, transition_steps=9)
# Powers of two, whose products are exact: added to a gradient they round alike in whatever program XLA fuses them.
HALVED = optax.piecewise_constant_schedule(0.25, {5: 0.5})
RUNS = {
    "keep_pruned": Run(lambda: optax.chain(optax.adam(0.05), keep_pruned(MASKS))),
    "keep_zeros": Run(lambda: optax.chain(optax.adam(0.05), keep_zeros())),
    "prune": Run(lambda: optax.chain(optax.adam(0.05), prune(quantile, CUBIC, every=4, until=9))),
    "prune_and_regrow": Run(
        lambda: optax.chain(
            optax.adam(0.05), prune_and_regrow(quantile, ac_dc_schedule(0.5, every=3, until=9), every=3, until=9)
        )
    ),
    "decay_pruned": Run(lambda: optax.chain(decay_pruned(make_masks, 1.0, rate=0.1), optax.adam(0.05))),
    "static_sparse": Run(lambda: static_sparse(optax.adam(0.05), MASKS)),
    "rigl": Run(lambda: rigl(optax.adam(0.05), MASKS, every=4, until=9)),
    "sparse_evolution": Run(lambda: sparse_evolution(optax.adam(0.05), MASKS, jax.random.key(3), every=4, until=9)),
    "prune_and_splice": Run(
        lambda: optax.chain(optax.adam(0.05), prune_and_splice(quantile, 0.4, back=0.5, every=3, until=9)),
        start=dense_params,
    ),
    "prune_by_gradients": Run(
        lambda: prune_by_gradients(
            optax.adam(0.05),
            lambda params, mean, k: quantile(mean, k),
            CUBIC,
            measure=lambda params, grads: jax.tree.map(jnp.square, grads),
            every=4,
            until=9,
        )
    ),
    "elsa": Run(lambda: elsa(optax.adam(0.05), quantile, 0.5, penalty=HALVED, every=3, until=9), start=dense_params),
    "straight_through": Run(
        lambda: optax.chain(decay_pruned(lambda params, k: half(params), 0.5, rate=0.1), optax.adam(0.05)),
        lambda params: loss(straight_through(params, half(params))),
        dense_params,
    ),
    "soft_threshold": Run(
        lambda: optax.adamw(0.05),
        behind_learnt_threshold,
        lambda: {"params": dense_params(), "s": jnp.float32(-2.0)},
    ),
}


def begin(run: Run) -> Any:
    """Return parameters and optimizer state, committed to a device, as what is restored will be."""
    params = run.start()
    return jax.device_put((params, run.make().init(params)), jax.devices()[0])


def advance(run: Run) -> Callable[[Any], Any]:
    """Return the function that takes a step."""
    tx = run.make()
    return lambda state: step(tx, *state, jax.grad(run.objective)(state[0]))


def train_all(folder: Path) -> None:
    """Take all runs through all steps, with a checkpoint after each."""
    state = {name: begin(run) for name, run in RUNS.items()}
    functions = {name: advance(run) for name, run in RUNS.items()}
    step_all = jax.jit(lambda state: {name: functions[name](state[name]) for name in state})
    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True)) as manager:
        done = manager.latest_step() or 0
        if done:
            shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            state = manager.restore(done, args=ocp.args.StandardRestore(shapes))
        for count in range(done + 1, STEPS + 1):
            state = step_all(state)
            manager.save(count, args=ocp.args.StandardSave(state))


if __name__ == "__main__":
    train_all(Path(sys.argv[1]).resolve())
