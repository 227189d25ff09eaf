"""Find out what each layer of a trained CNN bears, and the k that costs no more than you allow.

`python examples/choose_k.py` trains the CNN on handwritten digits, prunes each layer alone and all together at every
strength of a sweep, searches for the largest k that costs at most `--max-drop` of the accuracy, and compares it with
strengths allocated to the layers by what each bears. The output folder receives

- `results.json`: the sweep, what the search tried, the accuracies;
- `sensitivity.png`: accuracy against sparsity, each layer alone and all together;
- `report.html`: a page about the pruned network;
- `checkpoint/`: for `--resume`.
"""

import dataclasses
import sys
from collections.abc import Sequence

import cnn
import jax
import numpy as np
import optax
from _support import options
from _support.experiment import Experiment, run_program
from matplotlib.figure import Figure

import jaxprune
from jaxprune import plot

PRESETS = options.Presets(
    full={"epochs": 25, "ks": (0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)}, small={"epochs": 2, "ks": (0.5, 1.0)}
)


@dataclasses.dataclass(frozen=True)
class Settings(options.Settings):
    """What the run depends on."""

    ks: tuple[float, ...]
    max_drop: float


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """Read the command line."""
    parser = options.parser(__doc__, "runs/choose_k", PRESETS)
    add = parser.add_argument
    add("--ks", type=options.number(), nargs="+", metavar="K", help=f"of the sweep, rising {PRESETS.help('ks')}")
    add("--max-drop", type=options.number(high=1), default=0.005, help="of the accuracy (default: 0.005)")
    settings = options.complete(Settings, parser.parse_args(arguments), PRESETS)
    options.require_rising("--ks", settings.ks)
    return settings


def run(experiment: Experiment, settings: Settings) -> None:
    """Train, sweep, search, allocate, and write what was found."""
    sgd = optax.sgd(settings.learning_rate, settings.momentum)
    state = cnn.create_state(experiment.classes, experiment.sample_images, settings.seed, sgd)
    state = experiment.fit("dense", state, cnn.train_steps, cnn.evaluate)
    params, evaluations = state.params, 0

    def accuracy(params: jax.Array) -> float:
        nonlocal evaluations
        evaluations += 1
        return experiment.validate(state.replace(params=params), cnn.evaluate)["accuracy"]

    curves = jaxprune.sensitivity(accuracy, params, settings.ks, progress=True)
    experiment.say(curves)
    experiment.say("\n".join(curves.remarks(settings.max_drop)))
    experiment.record("sensitivity", value=curves.to_dict())

    before = evaluations
    k = jaxprune.search_k(accuracy, params, max_drop=settings.max_drop)
    experiment.say(k)
    masks = jaxprune.make_masks(params, k)
    sparsity = float(jaxprune.sparsity(masks))
    found = {"k": float(k), "sparsity": sparsity, "tried": [trial._asdict() for trial in k.tried]}
    experiment.record("search", value={**found, "evaluations": evaluations - before, "remarks": k.remarks})

    shares = jaxprune.choose.allocate(curves, min(sparsity, float(curves.together_sparsity[-1])))
    allocated = jaxprune.make_masks(params, shares)
    for name, chosen in (("one k", masks), ("allocated", allocated)):
        value = accuracy(jaxprune.apply_masks(params, chosen))
        removed = float(jaxprune.sparsity(chosen))
        experiment.record("pruned", name, value={"sparsity": removed, "accuracy": value})
        experiment.say(f"{name:<10} accuracy {value:.2%}, {removed:.1%} sparse")

    figure = Figure(figsize=(9, 5), layout="constrained", dpi=150)
    axes = plot.sensitivity_curves(curves, figure.subplots())
    axes.set_ylabel("accuracy on the test images")
    axes.set_title(_finding(curves, k, sparsity, settings.max_drop), color=plot.style.INK, fontweight="bold")
    figure.savefig(settings.out / "sensitivity.png")
    jaxprune.report(settings.out / "report.html", params, masks, title="Digits CNN, pruned", sensitivity=curves)
    experiment.say(f"Written to {settings.out}: results.json, sensitivity.png, report.html, checkpoint/")


def _finding(curves: jaxprune.choose.Sensitivity, k: float, sparsity: float, max_drop: float) -> str:
    weakest = curves.groups[int(np.argmax(curves.drop[:, -1]))]
    return (
        f"k = {float(k):.3g} removes {sparsity:.1%} for at most {100 * max_drop:g} points of accuracy;\n"
        f"{weakest} bears the least"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with the arguments of the command line; return the exit code."""
    return run_program(parse, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
