"""Make a trained CNN really small: prune it in steps, quantise what is kept, compress the file (Han et al. 2016).

`python examples/deep_compression.py` trains a CNN on handwritten digits, prunes it by one threshold for all layers in
rising steps with fine-tuning after each, and stores the result in several ways. Each file is read back and validated, so
that the table shows what its bytes are worth. Quantised weights are not trained again. The output folder receives

- `results.json`: sizes, errors, accuracies;
- `*.safetensors`: the files, which `python -m jaxprune summarize` shows;
- `checkpoint/`: for `--resume`.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import cnn
import jax
import optax
from _support import options
from _support.experiment import Experiment, run_program
from rich.table import Table

import jaxprune
from jaxprune import load_sparse, rules, save_sparse

PRESETS = options.Presets(
    full={"epochs": 25, "fine_tune_epochs": 15, "sparsities": (0.6, 0.8, 0.9, 0.95)},
    small={"epochs": 2, "fine_tune_epochs": 1, "sparsities": (0.5, 0.9)},
)


class Way(NamedTuple):
    """A way to store a network: under its masks or dense, quantised or not, compressed or not."""

    title: str
    file: str
    masked: bool = True
    quantize: int | None = None
    compress: bool = False


WAYS = (
    Way("dense", "dense", masked=False),
    Way("dense, zstd", "dense-zstd", masked=False, compress=True),
    Way("bitmask", "sparse"),
    Way("bitmask, zstd", "sparse-zstd", compress=True),
    Way("bitmask, int8", "int8", quantize=8),
    Way("bitmask, int8, zstd", "int8-zstd", quantize=8, compress=True),
    Way("bitmask, int4, zstd", "int4-zstd", quantize=4, compress=True),
)


@dataclasses.dataclass(frozen=True)
class Settings(options.Settings):
    """What the run depends on."""

    fine_tune_epochs: int
    sparsities: tuple[float, ...]


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """Read the command line.

    Raises:
      UsageError: the sparsities do not rise, or what compresses the files is missing.
    """
    parser = options.parser(__doc__, "runs/deep_compression", PRESETS)
    add = parser.add_argument
    add("--fine-tune-epochs", type=options.count(1), help=f"after each pruning {PRESETS.help('fine_tune_epochs')}")
    add("--sparsities", type=options.number(1), nargs="+", help=f"the steps of pruning {PRESETS.help('sparsities')}")
    settings = options.complete(Settings, parser.parse_args(arguments), PRESETS)
    options.require_rising("--sparsities", settings.sparsities)
    options.require_package("zstandard", "a compressed file")
    return settings


def run(experiment: Experiment, settings: Settings) -> None:
    """Train, prune in steps, store in all ways, and show what each is worth."""
    sgd = optax.sgd(settings.learning_rate, settings.momentum)
    state = cnn.create_state(experiment.classes, experiment.sample_images, settings.seed, sgd)
    dense = experiment.train("dense", state, cnn.train_steps, settings.epochs)
    experiment.note("dense", experiment.validate(dense, cnn.evaluate))
    rows = [_store(experiment, settings, way, "0%", dense) for way in WAYS if not way.masked]
    tuned = dense
    for sparsity in settings.sparsities:
        masks = jaxprune.make_masks(tuned.params, sparsity, rule=rules.global_sparsity)
        phase = f"{100 * sparsity:g}%"
        tuned = experiment.train(phase, cnn.restart(tuned, masks, sgd), cnn.train_steps, settings.fine_tune_epochs)
        experiment.note(phase, experiment.validate(tuned, cnn.evaluate))
        rows += [_store(experiment, settings, way, phase, tuned) for way in WAYS if way.masked]
    experiment.record("files", value=rows)
    experiment.say(_table(rows))
    experiment.say(f"Written to {settings.out}: results.json, *.safetensors, checkpoint/")


def _store(experiment: Experiment, settings: Settings, way: Way, phase: str, state: Any) -> dict[str, Any]:
    """Store a network in one way, read it back, and validate what was read."""
    path = settings.out / f"{way.file}-{phase.removesuffix('%')}.safetensors"
    masks = jaxprune.masks_in(state.opt_state) if way.masked else None
    saved = save_sparse(path, state.params, masks, quantize=way.quantize, compress=way.compress, force=True)
    params, _ = load_sparse(path, like=state.params)
    found = experiment.validate(state.replace(params=params), cnn.evaluate)
    return {
        "way": way.title,
        "sparsity": phase,
        "bytes": saved.bytes,
        "compression": saved.compression,
        "relative_error": max(tensor.relative_error for tensor in saved.tensors),
        "accuracy": found["accuracy"],
        "bits": 8 * saved.bytes / sum(leaf.size for leaf in jax.tree.leaves(state.params)),
    }


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="The CNN in files", title_justify="left")
    table.add_column("pruned", justify="right")
    table.add_column("stored as", no_wrap=True)
    for heading in ("bytes", "times smaller", "bits a weight", "largest error", "images right"):
        table.add_column(heading, justify="right")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        error = f"{row['relative_error']:.2%}" if row["relative_error"] else ""
        figures = (
            f"{row['bytes']:,}",
            f"{row['compression']:.2f}",
            f"{row['bits']:.2f}",
            error,
            f"{row['accuracy']:.2%}",
        )
        last = following is None or following["sparsity"] != row["sparsity"]
        table.add_row(row["sparsity"], row["way"], *figures, end_section=last)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with the arguments of the command line; return the exit code."""
    return run_program(parse, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
