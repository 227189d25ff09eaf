"""Make a trained CNN really smaller: cut coupled channels to a budget of multiply-accumulates, fine-tune, export.

`python examples/shrink_cnn.py` trains the CNN on handwritten digits, finds its channels from its jaxpr, cuts it to half
the multiply-accumulates by several measures of importance, and fine-tunes each smaller network for as long. A network
of the same small widths is trained from scratch, for as long in all, to compare with. The output folder receives

- `results.json`: accuracies before and after the least-squares repair of what reads the channels and after
  fine-tuning, multiply-accumulates, parameters, latencies;
- `plan.json`: the channels that stay by the first measure;
- `model.jax`: the smaller function for any batch, by `jax.export`, where the package flatbuffers is installed;
- `shrink.png`: accuracy by measure, and latency of the dense, the masked and the smaller network;
- `checkpoint/`: for `--resume`.
"""

import dataclasses
import functools
import importlib.util
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cnn
import jax
import jax.numpy as jnp
import optax
from _support import data, options
from _support.experiment import Experiment, run_program
from _support.figures import percent
from flax import linen as nn
from flax.training.train_state import TrainState
from matplotlib.figure import Figure

import jaxprune
from jaxprune import scores, structured
from jaxprune.plot.style import BLUE, GREY, INK, frame

PRESETS = options.Presets(
    full={
        "epochs": 25,
        "fine_tune_epochs": 10,
        "measures": ("lost", "l2", "l1", "taylor", "fpgm", "random", "scratch"),
    },
    small={"epochs": 2, "fine_tune_epochs": 1, "measures": ("l2", "scratch")},
)
SCRATCH = "scratch"
IMPORTANCE = {"l2": scores.channel_norm, "l1": functools.partial(scores.channel_norm, ord=1), "fpgm": scores.fpgm}
GRADIENT_IMAGES, CALIBRATION_IMAGES = 256, 1024
TIMED_IMAGES, ROUNDS = 64, 31


@dataclasses.dataclass(frozen=True)
class Settings(options.Settings):
    """What the run depends on."""

    fine_tune_epochs: int
    macs: float
    round_to: int
    measures: tuple[str, ...]


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """Read the command line."""
    parser = options.parser(__doc__, "runs/shrink_cnn", PRESETS)
    add = parser.add_argument
    add("--fine-tune-epochs", type=options.count(1), help=f"after the cut {PRESETS.help('fine_tune_epochs')}")
    add("--macs", type=options.number(high=1), default=0.5, help="fraction of them that may stay (default: 0.5)")
    add("--round-to", type=options.count(1), default=1, help="widths are multiples of it (default: 1)")
    add("--measures", nargs="+", choices=PRESETS.full["measures"], help=f"of importance {PRESETS.help('measures')}")
    return options.complete(Settings, parser.parse_args(arguments), PRESETS)


def evidence(measure: str, state: TrainState, sample: tuple[jax.Array, jax.Array], grams: Any) -> dict[str, Any]:
    """Return what `select_channels` is told to measure importance by."""
    if measure == "lost":
        return {"grams": grams}
    if measure == "taylor":
        grads = jax.grad(lambda params: cnn.loss_and_accuracy(params, state, *sample)[0])(state.params)
        return {"scores": scores.saliency(state.params, grads)}
    if measure == "random":
        return {"scores": scores.random(state.params, jax.random.key(0))}
    return {"importance": IMPORTANCE[measure]}


def smaller(state: TrainState, params: Any, small_fn: Callable[..., Any]) -> TrainState:
    """Return a state that trains a smaller function from these parameters, with a fresh optimizer."""
    apply = lambda variables, images: small_fn(variables["params"], images)  # noqa: E731
    return TrainState(step=jnp.int32(0), apply_fn=apply, params=params, tx=state.tx, opt_state=state.tx.init(params))


def initialise(params: Any, seed: int) -> Any:
    """Draw parameters of these shapes as Linen's layers do."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    draw = nn.initializers.lecun_normal()
    drawn = [
        draw(key, leaf.shape) if leaf.ndim > 1 else jnp.zeros_like(leaf) for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, drawn)


def run(experiment: Experiment, settings: Settings) -> None:
    """Train, cut, fine-tune, compare, export."""
    sgd = optax.sgd(settings.learning_rate, settings.momentum)
    images = experiment.sample_images.repeat(TIMED_IMAGES, 0)
    dense = cnn.create_state(experiment.classes, experiment.sample_images, settings.seed, sgd)
    apply = lambda params, images: dense.apply_fn({"params": params}, images)  # noqa: E731

    graph = structured.trace(apply, dense.params, images)
    try:
        budget = settings.macs * structured.count_macs(graph)
        sparsity = structured.sparsity_within(graph, budget, round_to=settings.round_to)
    except ValueError as error:
        raise options.UsageError(f"--macs {settings.macs:g} with --round-to {settings.round_to}: {error}") from error
    dense = experiment.fit("dense", dense, cnn.train_steps, cnn.evaluate)
    experiment.say(graph)
    dataset = data.load(settings.dataset, settings.data_dir)
    sample = tuple(jnp.asarray(part[:GRADIENT_IMAGES]) for part in (dataset.train_images, dataset.train_labels))
    grams = jaxprune.calibrate_grams(apply, dense.params, [jnp.asarray(dataset.train_images[:CALIBRATION_IMAGES])])
    plans: dict[str, structured.Plan] = {}
    for measure in (name for name in settings.measures if name != SCRATCH):
        told = evidence(measure, dense, sample, grams)
        plan = structured.select_channels(graph, dense.params, sparsity, round_to=settings.round_to, **told)
        result = structured.verify(graph, plan, dense.params, images)
        if not result.passed:
            raise RuntimeError(f"the smaller network differs from the masked one:\n{result}")
        small_fn = structured.rebuild(graph, plan)
        with warnings.catch_warnings():  # what repair is worth is to be seen
            warnings.simplefilter("ignore", structured.UnrepairedWarning)
            state = smaller(dense, structured.shrink(plan, dense.params), small_fn)
        experiment.record("before", measure, value=experiment.validate(state, cnn.evaluate))
        repaired = structured.shrink(plan, structured.repair(plan, dense.params, grams))
        experiment.record("repaired", measure, value=experiment.validate(state.replace(params=repaired), cnn.evaluate))
        state = experiment.train(measure, state, cnn.train_steps, settings.fine_tune_epochs)
        experiment.note(measure, experiment.validate(state, cnn.evaluate))
        plans[measure] = plan
        if len(plans) == 1:
            first, tuned, first_fn = plan, state, small_fn
    if not plans:
        raise options.UsageError("--measures names no way to choose channels; add l2")
    if SCRATCH in settings.measures:
        state = smaller(dense, initialise(tuned.params, settings.seed), first_fn)
        epochs = settings.epochs + settings.fine_tune_epochs
        state = experiment.train(SCRATCH, state, cnn.train_steps, epochs)
        experiment.note(SCRATCH, experiment.validate(state, cnn.evaluate))

    macs = [structured.count_macs(graph, plan) // TIMED_IMAGES for plan in (None, first)]
    sizes = [structured.count_parameters(graph, plan) for plan in (None, first)]
    masks = structured.channel_masks(first, dense.params)
    milliseconds = latency(
        {
            "dense": (jax.jit(apply), dense.params, images),
            "masked": (structured.masked(graph), dense.params, masks, images),
            "smaller": (first_fn, tuned.params, images),
        }
    )
    cost = {"sparsity": sparsity, "macs": macs, "parameters": sizes, "milliseconds": milliseconds}
    experiment.record("cost", value=cost)
    experiment.say(
        f"\n{percent(sparsity)} fewer channels: {macs[0] / macs[1]:.2f} x fewer multiply-accumulates, "
        f"{sizes[0] / sizes[1]:.2f} x fewer parameters; {TIMED_IMAGES} images take "
        + ", ".join(f"{name} {value:.2f} ms" for name, value in milliseconds.items())
    )
    (settings.out / "plan.json").write_text(first.to_json() + "\n")
    export(experiment, first_fn, tuned.params, images)
    draw(experiment, settings).savefig(settings.out / "shrink.png")
    experiment.say(f"Written to {settings.out}: results.json, plan.json, shrink.png, checkpoint/")


def latency(calls: Mapping[str, tuple[Any, ...]]) -> dict[str, float]:
    """Return the median milliseconds of calls, timed in turns."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(ROUNDS):
        for name, (fn, *arguments) in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(fn(*arguments))
            if number:  # the first call compiles
                taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in taken.items()}


def export(experiment: Experiment, small_fn: Callable[..., Any], params: Any, images: jax.Array) -> None:
    """Write the smaller function for batches of any size."""
    if importlib.util.find_spec("flatbuffers") is None:
        experiment.say("model.jax is not written: pip install flatbuffers")
        return
    (batch,) = jax.export.symbolic_shape("batch")
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    exported = jax.export.export(small_fn)(shapes, jax.ShapeDtypeStruct((batch, *images.shape[1:]), images.dtype))
    (experiment.settings.out / "model.jax").write_bytes(exported.serialize())


def draw(experiment: Experiment, settings: Settings) -> Figure:
    """Draw accuracy by measure, and latencies."""
    found = experiment.results["validation"]
    cost = experiment.results["cost"]
    names = [name for name in settings.measures if name in found]
    dense = 100 * found["dense"]["accuracy"]
    figure = Figure(figsize=(9, 3.6), layout="constrained", dpi=150)
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    values = [100 * found[name]["accuracy"] for name in names]
    left.plot(values, range(len(names)), "o", color=BLUE, markersize=8)
    left.axvline(dense, color=INK, linestyle=":")
    left.annotate(
        "dense", (dense, 1), xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points",
        color=INK, ha="center", va="bottom", fontsize="small",
    )  # fmt: skip
    left.set_yticks(range(len(names)), names)
    left.set_ylim(len(names) - 0.4, -0.7)
    left.set_xlabel("test images right, after fine-tuning (%)", color=INK)
    times = cost["milliseconds"]
    right.barh(list(times), list(times.values()), color=[GREY, GREY, BLUE])
    right.invert_yaxis()
    right.set_xlabel(f"milliseconds for {TIMED_IMAGES} images", color=INK)
    for axes in (left, right):
        frame(axes)
    best = max(
        ((name, value) for name, value in zip(names, values, strict=True) if name != SCRATCH), key=lambda pair: pair[1]
    )
    fewer = cost["macs"][0] / cost["macs"][1]
    figure.suptitle(
        f"{fewer:.2g} times fewer multiply-accumulates: {times['dense'] / times['smaller']:.2g} times as fast,\n"
        f"{best[1]:.2f} % of the test images right by {best[0]}; dense {dense:.2f} %",
        fontsize="large", fontweight="bold", color=INK,
    )  # fmt: skip
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with the arguments of the command line; return the exit code."""
    return run_program(parse, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
