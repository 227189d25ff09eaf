"""Prune a CNN gradually while it trains, along the cubic schedule of Zhu & Gupta (2017).

`python examples/gradual.py` trains a dense network on handwritten digits and, for as long and from the same weights,
one that loses its smallest weights step by step. The output folder receives

- `results.json`: test accuracies, the metrics of every epoch, and the masks' sparsity, churn, dead units and
  thresholds each time they change;
- `gradual.png`: accuracy, sparsity, the threshold and dead units over the training;
- `masks/`, and `tensorboard/` where tensorboardX is installed: the same numbers as they come;
- `checkpoint/`: for `--resume`.
"""

import dataclasses
import functools
import sys
from collections.abc import Sequence

import cnn
import optax
from _support import curves, options
from _support.experiment import Experiment, run_program
from _support.figures import percent
from _support.mask_log import MaskLog

import jaxprune
from jaxprune import rules

PRESETS = options.Presets(full={"epochs": 25, "every": 10}, small={"epochs": 6, "every": 4})
# The share of the training before pruning begins, and until it ends.
BEGIN, END = 0.1, 0.7


@dataclasses.dataclass(frozen=True)
class Settings(options.Settings):
    """What the run depends on."""

    sparsity: float
    every: int


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """Read the command line."""
    parser = options.parser(__doc__, "runs/gradual", PRESETS)
    add = parser.add_argument
    add("--sparsity", type=options.number(high=1), default=0.95, help="fraction removed at the end (default: 0.95)")
    add("--every", type=options.count(1), help=f"updates from one change of masks to the next {PRESETS.help('every')}")
    return options.complete(Settings, parser.parse_args(arguments), PRESETS)


def run(experiment: Experiment, settings: Settings) -> None:
    """Train both networks and show what pruning cost."""
    sgd = optax.sgd(settings.learning_rate, settings.momentum)
    start = experiment.classes, experiment.sample_images, settings.seed
    experiment.fit("dense", cnn.create_state(*start, sgd), cnn.train_steps, cnn.evaluate)

    updates = settings.epochs * experiment.steps_per_epoch
    begin, end = round(BEGIN * updates), round(END * updates)
    cubic = optax.polynomial_schedule(0.0, settings.sparsity, 3, transition_steps=end - begin, transition_begin=begin)
    make = functools.partial(jaxprune.make_masks, rule=rules.global_sparsity)
    log = MaskLog(settings, "gradual")
    tx = optax.chain(sgd, jaxprune.prune(make, cubic, every=settings.every, until=end, log=log))
    pruned = experiment.fit("gradual", cnn.initialise(*start, tx), cnn.train_steps, cnn.evaluate)

    experiment.record("masks", value={"gradual": log.read()})
    experiment.say(jaxprune.summarize(pruned.params, jaxprune.masks_in(pruned.opt_state)))
    draw(experiment, settings)
    experiment.say(f"Written to {settings.out}: results.json, gradual.png, masks/, checkpoint/")


def draw(experiment: Experiment, settings: Settings) -> None:
    """Draw accuracy, sparsity, the threshold and dead units against the updates."""
    changes = experiment.results["masks"]["gradual"]
    last = settings.epochs * experiment.steps_per_epoch

    def over_time(values: Sequence[float]) -> dict[str, tuple[list[float], list[float]]]:
        return {"": ([*(change["step"] for change in changes), last], [*values, values[-1]])}

    thresholds = [[value for name, value in change.items() if name.startswith("threshold/")] for change in changes]
    panels = [
        curves.Panel("training accuracy (%)", experiment.accuracy_by_update("dense", "gradual"), height=2.4),
        curves.Panel("weights removed (%)", over_time([100 * change["sparsity"] for change in changes]), stairs=True),
        curves.Panel("smallest weight kept", over_time([min(found, default=0.0) for found in thresholds]), stairs=True),
        curves.Panel("units without weights", over_time([change["dead_units"] for change in changes]), stairs=True),
    ]
    dense, pruned = (experiment.results["validation"][phase] for phase in ("dense", "gradual"))
    title = (
        f"{percent(pruned['sparsity'])} fewer weights, removed while training:\n"
        f"{percent(pruned['accuracy'])} of the test images right; dense {percent(dense['accuracy'])}"
    )
    curves.draw(title, "updates", panels).savefig(settings.out / "gradual.png")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with the arguments of the command line; return the exit code."""
    return run_program(parse, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
