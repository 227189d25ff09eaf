"""Which score and which rule keep the most accuracy at the same sparsity: one-shot, and after equal fine-tuning.

    python -m benchmarks.one_shot

For each seed the digits CNN is trained once, and every method prunes that same network. All methods at a given sparsity
remove the same total number of weights; the guard (no layer is emptied) holds for all. Evidence (gradients) comes from
the training images. Fine-tuning sees the same batches for every method and is compiled once: masks are arguments.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from _support import data
from _support.experiment import STEPS_PER_CALL
from cnn import CNN
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxprune
from benchmarks import timing
from jaxprune import rules, scores

BATCH_SIZE, EVIDENCE_BATCH_SIZE = 32, 128
MODEL = CNN(10)
SGD = optax.sgd(0.01, momentum=0.9)
TX = optax.chain(SGD, jaxprune.keep_pruned(None))

# Given the network, the training images with their labels, and a key: scores (None for magnitude) and a rule.
Method = Callable[[Any, Any, jax.Array], tuple[Any, Any]]


def loss_fn(params: Any, batch: Any) -> jax.Array:
    """Return the mean cross-entropy of a batch of images and labels."""
    images, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(MODEL.apply(params, images), labels).mean()


def squared_gradients(params: Any, batch: Any) -> Any:
    """Return the mean over a batch of the square of each image's gradient."""
    grads = jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))(params, jax.tree.map(lambda x: x[:, None], batch))
    return jax.tree.map(lambda g: jnp.mean(jnp.square(g), axis=0), grads)


def _saliency(params: Any, batches: Any, key: jax.Array) -> tuple[Any, Any]:
    del key
    grads = jaxprune.mean_over_batches(jax.grad(loss_fn), params, batches)
    return scores.saliency(params, grads), rules.global_sparsity


def _fisher(params: Any, batches: Any, key: jax.Array) -> tuple[Any, Any]:
    del key
    squares = jaxprune.mean_over_batches(squared_gradients, params, batches)
    return scores.fisher(params, squares), rules.global_sparsity


METHODS: dict[str, Method] = {
    "magnitude, layer": lambda params, batches, key: (None, rules.layer_sparsity),
    "magnitude, ERK": lambda params, batches, key: (None, rules.erk_sparsity),
    "magnitude, global": lambda params, batches, key: (None, rules.global_sparsity),
    "LAMP, global": lambda params, batches, key: (scores.lamp(params), rules.global_sparsity),
    "saliency, global": _saliency,
    "fisher, global": _fisher,
    "random, layer": lambda params, batches, key: (scores.random(params, key), rules.layer_sparsity),
}


@jax.jit
def train_steps(params: Any, opt_state: Any, images: jax.Array, labels: jax.Array, batches: jax.Array) -> Any:
    """Take a step for each row of indices; return parameters and optimizer state."""

    def step(carry: Any, batch: jax.Array) -> Any:
        params, opt_state = carry
        grads = jax.grad(loss_fn)(params, (images[batch], labels[batch]))
        updates, opt_state = TX.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    # Why unrolled: see _support.experiment.STEPS_PER_CALL.
    carry, _ = jax.lax.scan(step, (params, opt_state), batches, unroll=True)
    return carry


def train(params: Any, masks: Any, train_set: Any, epochs: range, seed: int) -> Any:
    """Train for some epochs with the weights outside the masks held at zero; return the parameters."""
    # TX holds the masks that are in its state, so that the compiled steps serve every mask.
    opt_state = optax.chain(SGD, jaxprune.keep_pruned(masks)).init(params)
    for epoch in epochs:
        batches = data.epoch_indices(len(train_set[0]), BATCH_SIZE, seed=seed, epoch=epoch)
        for start in range(0, len(batches) - STEPS_PER_CALL + 1, STEPS_PER_CALL):
            params, opt_state = train_steps(params, opt_state, *train_set, batches[start : start + STEPS_PER_CALL])
    return params


@jax.jit
def accuracy(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the fraction of images whose largest logit is their label's."""
    return (MODEL.apply(params, images).argmax(-1) == labels).mean()


def run_seed(
    dataset: data.Dataset,
    seed: int,
    methods: Sequence[str],
    sparsities: Sequence[float],
    epochs: int,
    fine_tune_epochs: int,
) -> dict[str, Any]:
    """Train one network, prune it in every way, fine-tune each; return accuracies on the test images."""
    train_set = jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels)
    test_set = jnp.asarray(dataset.test_images), jnp.asarray(dataset.test_labels)
    params = MODEL.init(jax.random.key(seed), train_set[0][:1])
    everything = jax.tree.map(lambda leaf: jnp.ones_like(leaf, dtype=bool), params)
    params = train(params, everything, train_set, range(epochs), seed)
    evidence = data.epoch_indices(len(train_set[0]), EVIDENCE_BATCH_SIZE, seed=seed, epoch=0)
    rows = []
    for name in methods:
        batches = ((train_set[0][indices], train_set[1][indices]) for indices in evidence)
        found, rule = METHODS[name](params, batches, jax.random.key(seed))
        for sparsity in sparsities:
            masks = jaxprune.make_masks(params, sparsity, rule=rule, scores=found)
            pruned = jaxprune.apply_masks(params, masks)
            tuned = train(pruned, masks, train_set, range(epochs, epochs + fine_tune_epochs), seed)
            rows.append(
                {
                    "method": name,
                    "sparsity": sparsity,
                    "removed": float(jaxprune.sparsity(masks)),
                    "zeros": float(jaxprune.sparsity(jax.tree.map(lambda w: w != 0, tuned))),
                    "one_shot": float(accuracy(pruned, *test_set)),
                    "fine_tuned": float(accuracy(tuned, *test_set)),
                }
            )
    return {"seed": seed, "dense": float(accuracy(params, *test_set)), "rows": rows}


def summary(runs: Sequence[dict[str, Any]], methods: Sequence[str], sparsities: Sequence[float]) -> list[list[str]]:
    """Return a table, headings first: mean and standard deviation over the seeds, in percent."""
    lines = [["method", "accuracy", *(f"{100 * sparsity:g} %" for sparsity in sparsities)]]
    rows = [row for run in runs for row in run["rows"]]
    for kind, title in (("one_shot", "one-shot"), ("fine_tuned", "fine-tuned")):
        for name in methods:
            found = [
                [row[kind] for row in rows if row["method"] == name and row["sparsity"] == sparsity]
                for sparsity in sparsities
            ]
            lines.append([name, title, *(_spread(values) for values in found)])
    return lines


def _spread(values: Sequence[float]) -> str:
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{deviation}"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, numbers to the right."""
    rule = ["---", "---"] + ["---:"] * (len(lines[0]) - 2)
    return "".join(f"| {' | '.join(line)} |\n" for line in [lines[0], rule, *lines[1:]])


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, run every seed, show the table, write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.8, 0.9, 0.95, 0.98])
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--epochs", type=int, default=30, help="of dense training")
    parser.add_argument("--fine-tune-epochs", type=int, default=15, help="after pruning")
    parser.add_argument("--data-dir", type=Path, help="folder of prepared data sets")
    parser.add_argument("--json", type=Path, help="write every number here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    options = parser.parse_args(arguments)
    console = Console()
    dataset = data.load("digits", options.data_dir)
    runs = [
        run_seed(dataset, seed, options.methods, options.sparsities, options.epochs, options.fine_tune_epochs)
        for seed in track(range(options.seeds), "seeds", console=console)
    ]
    timing.write_json(options.json, runs)
    headings, *lines = summary(runs, options.methods, options.sparsities)
    dense = _spread([run["dense"] for run in runs])
    shown = Table(*headings, title=f"accuracy on the digits, %; dense {dense}", title_justify="left")
    for line in lines:
        shown.add_row(*line, end_section=line[0] == options.methods[-1])
    console.print(shown)
    if options.markdown is not None:
        options.markdown.write_text(markdown([headings, *lines]))


if __name__ == "__main__":
    main()
