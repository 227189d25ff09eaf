"""One-shot pruning of a convolutional network, no fine-tuning: accuracy by method and sparsity.

    python -m benchmarks.oneshot_cnn

For each seed the digits CNN is trained once; every method prunes that network, each layer by the same share, with the
training images for calibration.
"""

import argparse
import functools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from _support import data
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxprune
from benchmarks import timing
from benchmarks.one_shot import MODEL, accuracy, train
from jaxprune import rules, scores

# (params, norms, grams, sparsity) -> pruned params
Method = Callable[[Any, Any, Any, float], Any]
CALIBRATION_BATCH_SIZE = 128


def magnitude(params: Any, norms: Any, grams: Any, sparsity: float) -> Any:
    """Remove the smallest weights."""
    return jaxprune.apply_masks(params, jaxprune.make_masks(params, sparsity, rule=rules.layer_sparsity))


def wanda(params: Any, norms: Any, grams: Any, sparsity: float) -> Any:
    """Remove the weights that contribute least to their unit's output."""
    found = scores.wanda(params, norms)
    return jaxprune.apply_masks(params, jaxprune.make_masks(params, sparsity, rule=rules.row_sparsity, scores=found))


def sparsegpt(params: Any, norms: Any, grams: Any, sparsity: float) -> Any:
    """SparseGPT."""
    return jaxprune.oneshot.sparsegpt(params, grams, sparsity)[0]


def reconstruct(params: Any, norms: Any, grams: Any, sparsity: float) -> Any:
    """Remove the smallest weights, and give those that stay their best values."""
    masks = jaxprune.make_masks(params, sparsity, rule=rules.layer_sparsity)
    return jaxprune.oneshot.reconstruct(params, masks, grams)


def admm(params: Any, norms: Any, grams: Any, sparsity: float) -> Any:
    """ADMM with a mask that tightens."""
    return jaxprune.oneshot.admm(params, grams, sparsity)[0]


METHODS: dict[str, Method] = {
    "magnitude": magnitude,
    "Wanda": wanda,
    "SparseGPT": sparsegpt,
    "magnitude, reconstruct": reconstruct,
    "ADMM": admm,
}


def run_seed(dataset: data.Dataset, seed: int, sparsities: Sequence[float], epochs: int) -> dict[str, Any]:
    """Train one network and prune it in every way; return accuracies on the test images."""
    images, labels = jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels)
    test_set = jnp.asarray(dataset.test_images), jnp.asarray(dataset.test_labels)
    params = MODEL.init(jax.random.key(seed), images[:1])
    everything = jax.tree.map(lambda leaf: jnp.ones_like(leaf, dtype=bool), params)
    params = train(params, everything, (images, labels), range(epochs), seed)
    batches = [images[i] for i in data.epoch_indices(len(images), CALIBRATION_BATCH_SIZE, seed=seed, epoch=0)]
    norms = jaxprune.calibrate_norms(MODEL.apply, params, batches)
    grams = jaxprune.calibrate_grams(MODEL.apply, params, batches)
    rows = []
    for name, method in METHODS.items():
        for sparsity in sparsities:
            found = float(accuracy(method(params, norms, grams, sparsity), *test_set))
            rows.append({"method": name, "sparsity": sparsity, "one_shot": found})
    return {"seed": seed, "dense": float(accuracy(params, *test_set)), "rows": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, run every seed, show means and standard deviations, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.7, 0.8, 0.9])
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--epochs", type=int, default=30, help="of training")
    parser.add_argument("--data-dir", type=Path, help="folder of prepared data sets")
    parser.add_argument("--json", type=Path, help="write every number here")
    options = parser.parse_args(arguments)
    console = Console()
    dataset = data.load("digits", options.data_dir)
    one = functools.partial(run_seed, dataset, sparsities=options.sparsities, epochs=options.epochs)
    runs = [one(seed) for seed in track(range(options.seeds), "seeds", console=console)]
    timing.write_json(options.json, runs)
    dense = 100 * statistics.mean(run["dense"] for run in runs)
    shown = Table("method", title=f"accuracy on the digits, %; dense {dense:.1f}", title_justify="left")
    for sparsity in options.sparsities:
        shown.add_column(f"{100 * sparsity:g} %", justify="right")
    rows = [row for run in runs for row in run["rows"]]
    for name in METHODS:
        found = [
            [100 * row["one_shot"] for row in rows if row["method"] == name and row["sparsity"] == sparsity]
            for sparsity in options.sparsities
        ]
        shown.add_row(name, *(f"{statistics.mean(values):.1f} ± {statistics.pstdev(values):.1f}" for values in found))
    console.print(shown)


if __name__ == "__main__":
    main()
