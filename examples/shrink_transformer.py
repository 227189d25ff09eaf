"""Cut heads and hidden units out of a trained transformer (Flax Linen), and fine-tune what is left.

`python examples/shrink_transformer.py` trains a transformer that reads handwritten digits row by row, finds its channels
from its jaxpr, cuts half the heads of every attention and half the hidden units of every dense block, and fine-tunes the
smaller network; the stream between blocks stays. The output folder receives

- `results.json`: accuracies, multiply-accumulates, parameters, latencies, and the heads that stay;
- `plan.json`: the channels that stay;
- `checkpoint/`: for `--resume`.
"""

import dataclasses
import sys
from collections.abc import Sequence

import cnn
import jax
import jax.numpy as jnp
import optax
from _support import options
from _support.experiment import Experiment, run_program
from flax import linen as nn
from flax.training.train_state import TrainState
from shrink_cnn import TIMED_IMAGES, latency, smaller

import jaxprune
from jaxprune import structured

PRESETS = options.Presets(full={"epochs": 40, "fine_tune_epochs": 15}, small={"epochs": 2, "fine_tune_epochs": 1})
WIDTH, HEADS, LAYERS = 64, 4, 2


@dataclasses.dataclass(frozen=True)
class Settings(options.Settings):
    """What the run depends on."""

    fine_tune_epochs: int
    sparsity: float


class Transformer(nn.Module):
    """Rows of an image are tokens; blocks of attention and a dense block with four times the width."""

    classes: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the logits of a batch of images."""
        rows = images.reshape(*images.shape[:2], -1)
        x = nn.Dense(WIDTH)(rows) + self.param("position", nn.initializers.normal(0.02), (1, rows.shape[1], WIDTH))
        for _ in range(LAYERS):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(HEADS)(y, y)
            y = nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x)))
            x = x + nn.Dense(WIDTH)(y)
        return nn.Dense(self.classes)(nn.LayerNorm()(x).mean(1))


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """Read the command line."""
    parser = options.parser(__doc__, "runs/shrink_transformer", PRESETS)
    add = parser.add_argument
    add("--fine-tune-epochs", type=options.count(1), help=f"after the cut {PRESETS.help('fine_tune_epochs')}")
    add("--sparsity", type=options.number(high=0.99), default=0.5, help="of heads and hidden units (default: 0.5)")
    return options.complete(Settings, parser.parse_args(arguments), PRESETS)


def create_state(experiment: Experiment, sgd: optax.GradientTransformation) -> TrainState:
    """Initialise the network, and an optimizer whose masks keep all weights."""
    model = Transformer(experiment.classes)
    params = jax.jit(model.init)(jax.random.key(experiment.settings.seed), experiment.sample_images)["params"]
    tx = optax.chain(sgd, jaxprune.keep_pruned(lambda params: jaxprune.make_masks(params, 0.0)))
    return TrainState(step=jnp.int32(0), apply_fn=model.apply, params=params, tx=tx, opt_state=tx.init(params))


def inside_blocks(graph: structured.Graph) -> list[str]:
    """Return the names of the groups of heads and of hidden units: all but the stream, which many layers compute."""
    computed = {group.name: {member.path for member in group.members if member.produces} for group in graph.groups}
    heads = [group.name for group in graph.groups if "Attention" in group.name and not group.outer]
    hidden = [name for name, paths in computed.items() if len(paths) == 1 and "Attention" not in name]
    return heads + hidden


def run(experiment: Experiment, settings: Settings) -> None:
    """Train, cut, fine-tune, compare."""
    sgd = optax.sgd(settings.learning_rate, settings.momentum)
    images = experiment.sample_images.repeat(TIMED_IMAGES, 0)
    dense = experiment.fit("dense", create_state(experiment, sgd), cnn.train_steps, cnn.evaluate)
    apply = lambda params, images: dense.apply_fn({"params": params}, images)  # noqa: E731

    graph = structured.trace(apply, dense.params, images)
    experiment.say(graph)
    chosen = dict.fromkeys(inside_blocks(graph), settings.sparsity)
    plan = structured.select_channels(graph, dense.params, chosen)
    result = structured.verify(graph, plan, dense.params, images)
    experiment.say(result)
    small_fn = structured.rebuild(graph, plan)
    state = smaller(dense, structured.shrink(plan, dense.params), small_fn)
    experiment.note("cut", experiment.validate(state, cnn.evaluate))
    state = experiment.train("fine-tuned", state, cnn.train_steps, settings.fine_tune_epochs)
    experiment.note("fine-tuned", experiment.validate(state, cnn.evaluate))

    macs = [structured.count_macs(graph, cut) // TIMED_IMAGES for cut in (None, plan)]
    sizes = [structured.count_parameters(graph, cut) for cut in (None, plan)]
    milliseconds = latency(
        {"dense": (jax.jit(apply), dense.params, images), "smaller": (small_fn, state.params, images)}
    )
    heads = {path: list(axes[1]) for path, axes in plan.kept.items() if path.endswith("query/kernel") and 1 in axes}
    found = {"macs": macs, "parameters": sizes, "milliseconds": milliseconds, "heads": heads}
    experiment.record("cost", value={**found, "error": max(output.difference for output in result.outputs)})
    (settings.out / "plan.json").write_text(plan.to_json() + "\n")
    experiment.say(
        f"\n{macs[0] / macs[1]:.2f} x fewer multiply-accumulates, {sizes[0] / sizes[1]:.2f} x fewer parameters; "
        f"{TIMED_IMAGES} images take {milliseconds['dense']:.2f} ms, now {milliseconds['smaller']:.2f} ms\n"
        f"Written to {settings.out}: results.json, plan.json, checkpoint/"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with the arguments of the command line; return the exit code."""
    return run_program(parse, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
