"""Train a CNN, prune it by k standard deviations, fine-tune it with its pruned weights held at zero (Flax Linen).

`python examples/cnn.py` trains on handwritten digits, prunes and fine-tunes once, and then prunes the trained network
again in steps of rising k, each followed by fine-tuning, as Han et al. (2015) do. The output folder receives

- `results.json`: every number that is printed, and the metrics of every epoch;
- `accuracy.png` and `histograms.png`: accuracy against sparsity, and the weights with their thresholds;
- `checkpoint/<phase>/<epochs>`: Orbax checkpoints of parameters, masks and optimizer state, for `--resume`.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from _support import options, report
from _support.experiment import Experiment, exit_code
from flax import linen as nn
from flax.training.train_state import TrainState

import jaxprune


class CNN(nn.Module):
    """Two convolutions and two dense layers."""

    classes: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the logits of a batch of images."""
        x = images
        for features in (32, 64):
            x = nn.relu(nn.Conv(features, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(len(x), -1)
        x = nn.relu(nn.Dense(100)(x))
        return nn.Dense(self.classes)(x)


def initialise(classes: int, images: jax.Array, seed: int, tx: optax.GradientTransformation) -> TrainState:
    """Initialise the network and an optimizer of any kind; weights that its masks do not keep are zero."""
    model = CNN(classes)
    params = jax.jit(model.init)(jax.random.key(seed), images)["params"]
    opt_state = jax.jit(tx.init)(params)
    params = jaxprune.apply_masks(params, jaxprune.masks_in(opt_state))
    return TrainState(step=jnp.int32(0), apply_fn=model.apply, params=params, tx=tx, opt_state=opt_state)


def create_state(classes: int, images: jax.Array, seed: int, sgd: optax.GradientTransformation) -> TrainState:
    """Initialise the network, and an optimizer whose masks keep all weights: each is at least 0 deviations large."""
    everything = functools.partial(jaxprune.make_masks, k=0.0)
    return initialise(classes, images, seed, optax.chain(sgd, jaxprune.keep_pruned(everything)))


@functools.partial(jax.jit, static_argnames="sgd")
def restart(state: TrainState, masks: Any, sgd: optax.GradientTransformation) -> TrainState:
    """Set to zero what masks do not keep; the fresh optimizer keeps it there."""
    params = jaxprune.apply_masks(state.params, masks)
    tx = optax.chain(sgd, jaxprune.keep_pruned(masks))
    # Masks are state. The transform itself, state.tx, does the same for all of them, so that it need not change,
    # and train_steps is compiled once for dense training and all masks.
    return state.replace(params=params, opt_state=tx.init(params))


def prune(state: TrainState, k: float, sgd: optax.GradientTransformation) -> TrainState:
    """Prune the weights below k standard deviations of their layer."""
    return restart(state, jax.jit(jaxprune.make_masks)(state.params, k), sgd)


def loss_and_accuracy(params: Any, state: TrainState, images: jax.Array, labels: jax.Array) -> Any:
    """Return the mean loss, and the share of right answers beside it."""
    logits = state.apply_fn({"params": params}, images)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, (logits.argmax(-1) == labels).mean()


@jax.jit
def train_steps(state: TrainState, images: jax.Array, labels: jax.Array, batches: jax.Array) -> Any:
    """Take a step for each row of indices; return the state, and metrics for each step."""

    def step(state: TrainState, batch: jax.Array) -> Any:
        gradient = jax.value_and_grad(loss_and_accuracy, has_aux=True)
        (loss, accuracy), grads = gradient(state.params, state, images[batch], labels[batch])
        metrics = {"loss": loss, "accuracy": accuracy, "gradient_norm": optax.tree.norm(grads)}
        return state.apply_gradients(grads=grads), metrics

    return jax.lax.scan(step, state, batches, unroll=True)  # why unrolled: see experiment.STEPS_PER_CALL


@jax.jit
def evaluate(state: TrainState, images: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """Return the mean loss and accuracy."""
    loss, accuracy = loss_and_accuracy(state.params, state, images, labels)
    return {"loss": loss, "accuracy": accuracy}


def run(
    experiment: Experiment,
    *,
    create_state: Callable[..., Any] = create_state,
    train_steps: Callable[..., Any] = train_steps,
    evaluate: Callable[..., Any] = evaluate,
    prune: Callable[..., Any] = prune,
) -> None:
    """Train, prune, validate, fine-tune, validate; then the same for rising k. The network's functions may be others'.

    What is trained is reported and saved by `experiment`, which skips what an interrupted run has done already.
    """
    settings = experiment.settings
    sgd = optax.sgd(settings.learning_rate, settings.momentum)
    dense = create_state(experiment.classes, experiment.sample_images, settings.seed, sgd)

    dense = experiment.train("dense", dense, train_steps, settings.epochs)
    experiment.note("dense", experiment.validate(dense, evaluate))

    pruned = prune(dense, settings.k, sgd)
    experiment.say(f"\nPruned below k = {settings.k:g} standard deviations of each layer:")
    experiment.note("pruned", experiment.validate(pruned, evaluate))
    tuned = experiment.train("fine-tuned", pruned, train_steps, settings.fine_tune_epochs)
    experiment.note("fine-tuned", experiment.validate(tuned, evaluate))
    masks = jaxprune.masks_in(tuned.opt_state)
    report.layers(experiment, dense.params, jaxprune.summarize(dense.params, masks))

    experiment.say("\nThe dense network again, pruned in steps of rising k:")
    state = dense
    for k in settings.ks:
        pruned = prune(state, k, sgd)
        before = experiment.validate(pruned, evaluate)
        state = experiment.train(f"k={k:g}", pruned, train_steps, settings.fine_tune_epochs)
        after = experiment.validate(state, evaluate)
        experiment.record("sweep", f"{k:g}", value={"before": before, "after": after})
    report.conclude(experiment)


def main(arguments: list[str] | None = None) -> int:
    """Run with the arguments of the command line; return the exit code."""
    return exit_code(lambda: run(Experiment(options.parse(__doc__, "runs/cnn", arguments))))


if __name__ == "__main__":
    sys.exit(main())
