"""Train CNNs that are sparse from the start: RigL and SET, which move their weights, against fixed masks.

`python examples/rigl.py` trains on handwritten digits, for as long and from the same weights: a dense network, and at
one sparsity, under the same random masks (more of them in small layers: Erdos-Renyi-Kernel), one whose masks stay, one
that drops its smallest weights and grows others at random (SET, Mocanu et al. 2018), and one that grows those with the
largest gradients (RigL, Evci et al. 2020). The output folder receives

- `results.json`: test accuracies, the metrics of every epoch, and what each change of masks did;
- `rigl.png`: accuracy, and how many weights were replaced, over the training;
- `masks/`, and `tensorboard/` where tensorboardX is installed: the changes as they come;
- `checkpoint/`: for `--resume`.
"""

import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import Any

import cnn
import jax
import optax
from _support import curves, options
from _support.experiment import Experiment, run_program
from _support.figures import percent
from _support.mask_log import MaskLog

import jaxprune
from jaxprune import rules, scores

PRESETS = options.Presets(full={"epochs": 25, "every": 20}, small={"epochs": 4, "every": 4})
UNTIL = 0.75  # the share of the training in which masks change, the paper's
GROWING = "SET", "RigL"


@dataclasses.dataclass(frozen=True)
class Settings(options.Settings):
    """What the run depends on."""

    sparsity: float
    every: int
    drop_fraction: float


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """Read the command line."""
    parser = options.parser(__doc__, "runs/rigl", PRESETS)
    parser.set_defaults(learning_rate=0.05)  # a sparse network's first gradients are small
    add = parser.add_argument
    add("--sparsity", type=options.number(high=1), default=0.95, help="fraction removed (default: 0.95)")
    add("--every", type=options.count(1), help=f"updates from one change of masks to the next {PRESETS.help('every')}")
    add("--drop-fraction", type=options.number(high=1), default=0.3, help="replaced at the first change (default: 0.3)")
    return options.complete(Settings, parser.parse_args(arguments), PRESETS)


def run(experiment: Experiment, settings: Settings) -> None:
    """Train all networks and show what each way of choosing weights is worth."""
    sgd = optax.sgd(settings.learning_rate, settings.momentum)
    start = experiment.classes, experiment.sample_images, settings.seed
    masks_key, growth_key = jax.random.split(jax.random.key(settings.seed))
    experiment.fit("dense", cnn.create_state(*start, sgd), cnn.train_steps, cnn.evaluate)

    def masks(params: Any) -> Any:
        noise = scores.random(params, masks_key)
        return jaxprune.make_masks(params, settings.sparsity, scores=noise, rule=rules.erk_sparsity)

    until = round(UNTIL * settings.epochs * experiment.steps_per_epoch)
    fraction = optax.cosine_decay_schedule(settings.drop_fraction, until)
    logs = {name: MaskLog(settings, name) for name in GROWING}
    changing = {
        name: functools.partial(wrapper, every=settings.every, until=until, drop_fraction=fraction, log=logs[name])
        for name, wrapper in zip(GROWING, (jaxprune.transforms.sparse_evolution, jaxprune.rigl), strict=True)
    }
    optimizers = {
        "static": jaxprune.transforms.static_sparse(sgd, masks),
        "SET": changing["SET"](sgd, masks, growth_key),
        "RigL": changing["RigL"](sgd, masks),
    }
    for name, tx in optimizers.items():
        experiment.fit(name, cnn.initialise(*start, tx), cnn.train_steps, cnn.evaluate)
    experiment.record("masks", value={name: log.read() for name, log in logs.items()})
    draw(experiment, settings)
    experiment.say(f"Written to {settings.out}: results.json, rigl.png, masks/, checkpoint/")


def draw(experiment: Experiment, settings: Settings) -> None:
    """Draw accuracy, and the share of weights that were replaced, against the updates."""
    replaced = {}
    for name, changes in experiment.results["masks"].items():
        # Of all weights so many have changed sides; one that comes and one that goes make one replaced.
        shares = [100 * change["churn"] / 2 / (1 - change["sparsity"]) for change in changes]
        replaced[name] = [change["step"] for change in changes], shares
    phases = ("dense", "static", *GROWING)
    panels = [
        curves.Panel("training accuracy (%)", experiment.accuracy_by_update(*phases), height=3.2),
        curves.Panel("weights replaced\nat a change (%)", replaced),
    ]
    found = {phase: percent(experiment.results["validation"][phase]["accuracy"]) for phase in phases}
    title = (
        f"{percent(settings.sparsity)} sparse from the start, test images right:\n"
        f"RigL {found['RigL']}, SET {found['SET']}, fixed masks {found['static']}; dense {found['dense']}"
    )
    curves.draw(title, "updates", panels).savefig(settings.out / "rigl.png")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with the arguments of the command line; return the exit code."""
    return run_program(parse, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
