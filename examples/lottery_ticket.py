"""Find lottery tickets: prune in rounds, each time starting again from the weights of an early step.

`python examples/lottery_ticket.py` trains a CNN on handwritten digits and prunes it in rounds (Frankle & Carbin 2019):
masks keep the largest trained weights, and these start again from what they were after the first epoch (weight
rewinding, Frankle et al. 2020). Two controls are trained as long at every sparsity: the ticket's masks with other
first weights, and the early weights under random masks with as many weights in every layer. The output folder receives

- `results.json`: test accuracies and the metrics of every epoch;
- `tickets.png`: accuracy against sparsity;
- `checkpoint/`: for `--resume`.
"""

import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import Any

import cnn
import jax
import jax.numpy as jnp
import optax
from _support import curves, options
from _support.experiment import Experiment, run_program
from _support.figures import percent

import jaxprune
from jaxprune import rules

PRESETS = options.Presets(
    full={"epochs": 12, "sparsities": (0.5, 0.75, 0.9, 0.95, 0.98)}, small={"epochs": 3, "sparsities": (0.5, 0.9)}
)


@dataclasses.dataclass(frozen=True)
class Settings(options.Settings):
    """What the run depends on."""

    rewind_epochs: int
    sparsities: tuple[float, ...]


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """Read the command line.

    Raises:
      UsageError: the sparsities do not rise, or there is nothing left to train after the epochs rewound to.
    """
    parser = options.parser(__doc__, "runs/lottery_ticket", PRESETS)
    parser.set_defaults(learning_rate=0.05)  # the controls' first gradients are small
    add = parser.add_argument
    help_ = f"fraction removed in each round, rising {PRESETS.help('sparsities')}"
    add("--sparsities", type=options.number(high=1), nargs="+", metavar="SPARSITY", help=help_)
    add("--rewind-epochs", type=options.count(0), default=1, help="the epochs that rewinding keeps (default: 1)")
    settings = options.complete(Settings, parser.parse_args(arguments), PRESETS)
    options.require_rising("--sparsities", settings.sparsities)
    if settings.rewind_epochs >= settings.epochs:
        raise options.UsageError(f"--rewind-epochs must be fewer than the {settings.epochs} of --epochs")
    return settings


@jax.jit
def shuffled(masks: Any, key: jax.Array) -> Any:
    """Return random masks that keep as many weights of every layer as these."""
    leaves, treedef = jax.tree.flatten(masks)
    keys = jax.random.split(key, len(leaves))
    flat = [jax.random.permutation(key, leaf.ravel()) for key, leaf in zip(keys, leaves, strict=True)]
    return treedef.unflatten([jnp.reshape(mask, leaf.shape) for mask, leaf in zip(flat, leaves, strict=True)])


def run(experiment: Experiment, settings: Settings) -> None:
    """Train, prune in rounds with both controls, and show what a ticket is worth."""
    sgd = optax.sgd(settings.learning_rate, settings.momentum)
    first, other = (
        cnn.create_state(experiment.classes, experiment.sample_images, seed, sgd)
        for seed in (settings.seed, settings.seed + 1)
    )
    left = settings.epochs - settings.rewind_epochs
    early = experiment.train("early", first, cnn.train_steps, settings.rewind_epochs)
    dense = experiment.train("dense", early, cnn.train_steps, left)
    experiment.note("dense", experiment.validate(dense, cnn.evaluate))

    def fit(kind: str, params: Any, masks: Any, epochs: int) -> Any:
        """Train under masks, record what is found; return the parameters."""
        sparsity = f"{float(jaxprune.sparsity(masks)):.3f}"
        state = cnn.restart(first.replace(params=params), masks, sgd)
        state = experiment.train(f"{kind} {sparsity}", state, cnn.train_steps, epochs)
        found = experiment.validate(state, cnn.evaluate)
        experiment.record("tickets", kind, sparsity, value=found)
        experiment.say(f"{kind} on the test images: {percent(found['accuracy'])}; {percent(found['sparsity'])} sparse")
        return state.params

    make = jax.jit(functools.partial(jaxprune.make_masks, rule=rules.global_sparsity))
    train = functools.partial(fit, "ticket", epochs=left)
    for found in jaxprune.iterate(train, make, dense.params, settings.sparsities, rewind_to=early.params):
        fit("other weights", other.params, found.masks, settings.epochs)
        fit("random masks", early.params, shuffled(found.masks, jax.random.key(settings.seed)), left)
    draw(experiment, settings)
    experiment.say(f"Written to {settings.out}: results.json, tickets.png, checkpoint/")


def draw(experiment: Experiment, settings: Settings) -> None:
    """Draw accuracy against sparsity."""
    dense = experiment.results["validation"]["dense"]["accuracy"]
    curve = {
        kind: ([found["sparsity"] for found in rounds.values()], [100 * found["accuracy"] for found in rounds.values()])
        for kind, rounds in experiment.results["tickets"].items()
    }
    sparsities = next(iter(curve.values()))[0]
    curve[curves.DENSE] = sparsities, [100 * dense] * len(sparsities)
    ends = {kind: percent(accuracy[-1] / 100) for kind, (_, accuracy) in curve.items()}
    title = (
        f"{percent(sparsities[-1])} fewer weights: the ticket has {ends['ticket']} of the test images right,\n"
        f"with other first weights {ends['other weights']}, with random masks {ends['random masks']}; "
        f"dense {ends['dense']}"
    )
    panel = curves.Panel("test accuracy (%)", curve, height=4.0)
    curves.draw(title, "", [panel], by_sparsity=True).savefig(settings.out / "tickets.png")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with the arguments of the command line; return the exit code."""
    return run_program(parse, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
