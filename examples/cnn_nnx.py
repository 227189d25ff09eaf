"""The run of `cnn.py` with Flax NNX: the same network, and `nnx.Optimizer` with `keep_pruned` last in its chain.

`python examples/cnn_nnx.py` takes the same options and writes the same files.
"""

import sys
from typing import Any, NamedTuple, Self

import cnn
import jax
import optax
from _support import options
from _support.experiment import Experiment, exit_code
from flax import nnx

import jaxprune


class CNN(nnx.Module):
    """Two convolutions and two dense layers."""

    def __init__(self, classes: int, image_shape: tuple[int, int, int], *, rngs: nnx.Rngs) -> None:
        """Initialise for images of one shape, [height, width, channels]."""
        height, width, channels = image_shape
        self.conv_1 = nnx.Conv(channels, 32, (3, 3), rngs=rngs)
        self.conv_2 = nnx.Conv(32, 64, (3, 3), rngs=rngs)
        self.dense_1 = nnx.Linear((height // 4) * (width // 4) * 64, 100, rngs=rngs)
        self.dense_2 = nnx.Linear(100, classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the logits of a batch of images."""
        x = images
        for conv in (self.conv_1, self.conv_2):
            x = nnx.max_pool(nnx.relu(conv(x)), (2, 2), strides=(2, 2))
        x = x.reshape(len(x), -1)
        return self.dense_2(nnx.relu(self.dense_1(x)))


class State(NamedTuple):
    """The network and its optimizer, which training changes in place; as pure arrays for checkpoints and reports."""

    model: CNN
    optimizer: nnx.Optimizer[Any]

    @property
    def step(self) -> jax.Array:
        """The number of steps taken."""
        return self.optimizer.step[...]

    @property
    def params(self) -> Any:
        """The parameters, as arrays."""
        return nnx.as_pure(nnx.state(self.model, nnx.Param))

    @property
    def opt_state(self) -> Any:
        """The optimizer's state, as arrays; the masks are in it."""
        return nnx.as_pure(self.optimizer.opt_state)

    def replace(self, *, step: jax.Array, params: Any, opt_state: Any) -> Self:
        """Put these values in place."""
        nnx.update(self.model, params)
        self.optimizer.step[...] = step
        variables = jax.tree.structure(self.optimizer.opt_state)
        self.optimizer.opt_state = jax.tree.unflatten(variables, jax.tree.leaves(opt_state))
        return self


def create_state(classes: int, images: jax.Array, seed: int, sgd: optax.GradientTransformation) -> State:
    """Initialise the network, and an optimizer whose masks keep all weights: each is at least 0 deviations large."""
    model = nnx.jit(lambda rngs: CNN(classes, images.shape[1:], rngs=rngs))(nnx.Rngs(seed))
    masks, _ = pruned(nnx.state(model, nnx.Param), 0.0)
    tx = optax.chain(sgd, jaxprune.keep_pruned(masks))
    return State(model, nnx.Optimizer(model, tx, wrt=nnx.Param))


@jax.jit
def pruned(params: nnx.State, k: float) -> tuple[nnx.State, nnx.State]:
    """Return the masks of the weights of at least k standard deviations of their layer, and the weights they keep."""
    masks = jaxprune.make_masks(params, k)
    return masks, jaxprune.apply_masks(params, masks)


def prune(state: State, k: float, sgd: optax.GradientTransformation) -> State:
    """Return a pruned copy of the network, with a fresh optimizer that keeps its pruned weights at zero."""
    masks, params = pruned(nnx.state(state.model, nnx.Param), k)
    model = nnx.clone(state.model)
    nnx.update(model, params)
    optimizer = nnx.Optimizer(model, optax.chain(sgd, jaxprune.keep_pruned(masks)), wrt=nnx.Param)
    # Masks are state. The transform itself does the same for all of them, so that the old one can stand for the
    # new one, and train_steps is compiled once for dense training and every k.
    optimizer.tx = state.optimizer.tx
    return State(model, optimizer)


def loss_and_accuracy(model: CNN, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the mean loss, and the share of right answers beside it."""
    logits = model(images)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, (logits.argmax(-1) == labels).mean()


@nnx.jit
def update(
    model: CNN, optimizer: nnx.Optimizer[Any], images: jax.Array, labels: jax.Array, batches: jax.Array
) -> dict[str, jax.Array]:
    """Take a step for each row of indices, in place; return metrics for each step."""

    # Why unrolled: see experiment.STEPS_PER_CALL.
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0), unroll=True)
    def step(carry: State, batch: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        model, optimizer = carry
        gradient = nnx.value_and_grad(loss_and_accuracy, has_aux=True)
        (loss, accuracy), grads = gradient(model, images[batch], labels[batch])
        optimizer.update(model, grads)
        metrics = {"loss": loss, "accuracy": accuracy, "gradient_norm": optax.tree.norm(nnx.as_pure(grads))}
        return carry, metrics

    _, metrics = step(State(model, optimizer), batches)
    return metrics


def train_steps(
    state: State, images: jax.Array, labels: jax.Array, batches: jax.Array
) -> tuple[State, dict[str, jax.Array]]:
    """Take a step for each row of indices; return the state, and metrics for each step."""
    return state, update(state.model, state.optimizer, images, labels, batches)


@nnx.jit
def measure(model: CNN, images: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """Return the mean loss and accuracy."""
    loss, accuracy = loss_and_accuracy(model, images, labels)
    return {"loss": loss, "accuracy": accuracy}


def evaluate(state: State, images: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """Return the mean loss and accuracy."""
    return measure(state.model, images, labels)


def run(experiment: Experiment) -> None:
    """Take the steps of `cnn.run` with the functions above."""
    cnn.run(experiment, create_state=create_state, train_steps=train_steps, evaluate=evaluate, prune=prune)


def main(arguments: list[str] | None = None) -> int:
    """Run with the arguments of the command line; return the exit code."""
    return exit_code(lambda: run(Experiment(options.parse(__doc__, "runs/cnn_nnx", arguments))))


if __name__ == "__main__":
    sys.exit(main())
