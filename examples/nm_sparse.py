"""Train a CNN whose kernels keep N of every M weights, 2:4 by default: SR-STE against pruning at once.

`python examples/nm_sparse.py` compares three ways on handwritten digits, trained equally long. At once: a dense network
is trained, keeps the largest N of every M weights along the inputs, and is fine-tuned under these masks. STE: masks
are made anew from dense weights in every step, the loss sees masked weights, and every weight receives a gradient.
SR-STE (Zhou et al. 2021): the same with decay of the masked weights, which steadies the masks. A kernel whose inputs M
does not divide, such as the first one of one input channel, stays dense. The output folder receives

- `results.json`: test accuracies and the metrics of every epoch;
- `nm_sparse.png`: accuracy, and how much masks change, over the training;
- `checkpoint/`: for `--resume`.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import cnn
import jax
import numpy as np
import optax
from _support import curves, options
from _support.experiment import STEPS_PER_CALL, Experiment, run_program
from _support.figures import percent
from flax.training.train_state import TrainState

import jaxprune
from jaxprune import rules

PRESETS = options.Presets(full={"epochs": 20, "fine_tune_epochs": 10}, small={"epochs": 2, "fine_tune_epochs": 1})
Make = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Settings(options.Settings):
    """What the run depends on."""

    fine_tune_epochs: int
    n: int
    m: int
    decay: float


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """Read the command line.

    Raises:
      UsageError: n is larger than m.
    """
    parser = options.parser(__doc__, "runs/nm_sparse", PRESETS)
    add = parser.add_argument
    default = "(default: %(default)s)"
    add("--fine-tune-epochs", type=options.count(1), help=f"after pruning at once {PRESETS.help('fine_tune_epochs')}")
    add("--n", type=options.count(1), default=2, help=f"weights kept of every M {default}")
    add("--m", type=options.count(2), default=4, help=f"weights in a group {default}")
    add("--decay", type=options.number(), default=2e-4, help=f"of masked weights by SR-STE, the paper's {default}")
    settings = options.complete(Settings, parser.parse_args(arguments), PRESETS)
    if settings.n > settings.m:
        raise options.UsageError(f"--n {settings.n} cannot be kept of --m {settings.m}")
    return settings


def keep_of(m: int) -> Make:
    """Return the function of parameters and n that makes the masks of kernels with whole groups of m inputs."""

    def prunable(path: str, leaf: Any) -> bool:
        return jaxprune.is_kernel(path, leaf) and leaf.shape[-2] % m == 0

    return functools.partial(jaxprune.make_masks, rule=rules.n_m(m), prunable=prunable)


def sparse_refined(
    dense: TrainState, make: Make, n: int, decay: float, sgd: optax.GradientTransformation
) -> TrainState:
    """Return the dense weights with masks, made from them in every step, between them and the loss."""

    def apply_fn(variables: Any, images: jax.Array) -> jax.Array:
        params = variables["params"]
        return dense.apply_fn({"params": jaxprune.transforms.straight_through(params, make(params, n))}, images)

    everything = jaxprune.masks_in(dense.opt_state)
    tx = optax.chain(jaxprune.transforms.decay_pruned(make, n, rate=decay), sgd, jaxprune.keep_pruned(everything))
    return dense.replace(apply_fn=apply_fn, tx=tx, opt_state=tx.init(dense.params))


def run(experiment: Experiment, settings: Settings) -> None:
    """Train in all ways and show what each is worth."""
    sgd = optax.sgd(settings.learning_rate, settings.momentum)
    make, n = keep_of(settings.m), settings.n
    first = cnn.create_state(experiment.classes, experiment.sample_images, settings.seed, sgd)

    @jax.jit
    def train_steps(state: TrainState, images: jax.Array, labels: jax.Array, batches: jax.Array) -> Any:
        """Take steps, and tell besides how much their weights' masks have changed."""
        before = make(state.params, n)
        state, metrics = cnn.train_steps(state, images, labels, batches)
        return state, {**metrics, "masks_changed": 1 - jaxprune.algebra.overlap(before, make(state.params, n))}

    dense = experiment.train("dense", first, train_steps, settings.epochs)
    experiment.note("dense", experiment.validate(dense, cnn.evaluate))
    pruned = cnn.restart(dense, make(dense.params, n), sgd)
    experiment.note("pruned", experiment.validate(pruned, cnn.evaluate))
    tuned = experiment.train("fine-tuned", pruned, train_steps, settings.fine_tune_epochs)
    experiment.note("fine-tuned", experiment.validate(tuned, cnn.evaluate))
    for name, decay in (("STE", 0.0), ("SR-STE", settings.decay)):
        start = sparse_refined(first, make, n, decay, sgd)
        refined = experiment.train(name, start, train_steps, settings.epochs + settings.fine_tune_epochs)
        # What the loss saw in training is the network once its weights are really pruned.
        pruned = cnn.restart(first.replace(params=refined.params), make(refined.params, n), sgd)
        experiment.note(name, experiment.validate(pruned, cnn.evaluate))
    draw(experiment, settings)
    experiment.say(f"Written to {settings.out}: results.json, nm_sparse.png, checkpoint/")


def draw(experiment: Experiment, settings: Settings) -> None:
    """Draw accuracy, and the share of masks that change, against the updates."""
    training = experiment.results["training"]

    def over_time(metric: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        at_once = np.array(training["dense"][metric] + training["fine-tuned"][metric])
        found = {"at once": at_once, **{name: np.array(training[name][metric]) for name in ("STE", "SR-STE")}}
        updates = experiment.steps_per_epoch * np.arange(1, len(at_once) + 1)
        return {name: (updates, 100 * values) for name, values in found.items()}

    changed = {name: curve for name, curve in over_time("masks_changed").items() if name != "at once"}
    panels = [
        curves.Panel("training accuracy (%)", over_time("accuracy"), height=2.6),
        curves.Panel(f"masks changed in\n{STEPS_PER_CALL} updates (%)", changed, log=True, height=2.4),
    ]
    right = {name: percent(found["accuracy"]) for name, found in experiment.results["validation"].items()}
    title = (
        f"{settings.n} of every {settings.m} weights, test images right: SR-STE {right['SR-STE']}, STE {right['STE']},\n"
        f"at once {right['fine-tuned']} ({right['pruned']} before fine-tuning); dense {right['dense']}"
    )
    curves.draw(title, "updates", panels).savefig(settings.out / "nm_sparse.png")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with the arguments of the command line; return the exit code."""
    return run_program(parse, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
