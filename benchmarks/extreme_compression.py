"""How far a network can be compressed: its test error against the weights that are left, on MNIST's pixels.

    python -m benchmarks.extreme_compression --data FOLDER

FOLDER holds `t10k-images-idx3-ubyte.gz` and `t10k-labels-idx1-ubyte.gz`: MNIST's 10,000 test images. Of these each seed
draws 6,000 to train on, 2,000 that settings are chosen on (the default; `--test` measures on the others), and 2,000 to
test on. Two networks: LeNet-300-100 (two hidden layers) and LeNet-5 (20 and 50 filters, 500 hidden units).

Compression is the number of all parameters, biases included, divided by those that are not zero. Kernels are pruned, all
by one threshold, but for "surgery". As in the papers, every method begins with the trained dense network, and takes as many steps again,
with the same batches; one network takes them and stays dense ("dense again"). The papers train on 60,000 images: their errors are
lower than any here, so that what can be compared is what compression adds to the error of the dense network.
"""

import argparse
import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxprune
from benchmarks import mnist, timing
from jaxprune import rules, scores, transforms
from jaxprune.plot.style import INK, LINES, frame

TRAIN, CHOOSE = 0.6, 0.2  # of the images; the others test
BATCH_SIZE, LEARNING_RATE, SGD_RATE = 100, 3e-3, 3e-2
WARM_UP = 0.05  # of the training that follows, as a share of the steps
BEGIN, END = 0.1, 0.5  # of gradual pruning, as shares of the steps
CHANGES = 100  # of masks, in a training
AGAIN = 1000  # is added to the seed of the order of images, in the training that follows
ELSA_END, ELSA_EVERY, PENALTY = 0.6, 20, 0.02


class LeNet300(nn.Module):
    """Two hidden layers: 266,610 parameters."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map images to logits."""
        x = x.reshape(len(x), -1)
        for width in (300, 100):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


class LeNet5(nn.Module):
    """Two convolutions and a hidden layer, of the sizes that pruning's papers use: 431,080 parameters.

    Convolutions are products with patches, whose kernels have the same weights: inside a scan, XLA's own are many times
    slower on CPUs.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map images to logits."""
        for filters in (20, 50):
            x = nn.Dense(filters)(patches(x, 5))
            batch, rows, columns, _ = x.shape
            x = x.reshape(batch, rows // 2, 2, columns // 2, 2, filters).max((2, 4))
        return nn.Dense(10)(nn.relu(nn.Dense(500)(x.reshape(len(x), -1))))


def patches(x: jax.Array, size: int) -> jax.Array:
    """What a kernel of that size sees, position by position: [b, h, w, c] to [b, h - size + 1, w - size + 1, size * size * c]."""
    rows, columns = x.shape[1] - size + 1, x.shape[2] - size + 1
    corners = [(i, j) for i in range(size) for j in range(size)]
    return jnp.concatenate([x[:, i : i + rows, j : j + columns] for i, j in corners], -1)


class Case(NamedTuple):
    """A network, for how long it trains, and how small it is to become."""

    network: nn.Module
    epochs: int
    compressions: tuple[int, ...]


CASES = {
    "LeNet-300-100": Case(LeNet300(), 100, (12, 30, 56, 100, 200)),
    "LeNet-5": Case(LeNet5(), 40, (12, 30, 56, 111, 200)),
}

# What papers report: method, test error in percent, compression, on networks trained on 60,000 images.
PUBLISHED = {
    "LeNet-300-100": (
        ("Han et al. 2015", 1.59, 12),
        ("network surgery, Guo et al. 2016", 1.99, 56),
        ("soft weight sharing, Ullrich et al. 2017", 1.94, 23),
        ("variational dropout, Molchanov et al. 2017", 1.92, 68),
    ),
    "LeNet-5": (
        ("Han et al. 2015", 0.77, 12),
        ("network surgery, Guo et al. 2016", 0.91, 111),
        ("soft weight sharing, Ullrich et al. 2017", 0.97, 200),
        ("variational dropout, Molchanov et al. 2017", 0.75, 280),
    ),
}


class Way(NamedTuple):
    """What a method is told: the sparsity of kernels, the steps of the training, and how masks are made."""

    sparsity: float
    steps: int
    make: Callable[[Any, Any], Any]

    def rate(self, highest: float) -> optax.Schedule:
        """A cosine with a warm-up."""
        return optax.warmup_cosine_decay_schedule(0.0, highest, round(WARM_UP * self.steps), self.steps)

    def adam(self) -> optax.GradientTransformation:
        """The optimizer of all methods but one."""
        return optax.adam(self.rate(LEARNING_RATE))

    def cubic(self) -> optax.Schedule:
        """The sparsity of gradual pruning."""
        begin, end = round(BEGIN * self.steps), round(END * self.steps)
        return optax.polynomial_schedule(0.0, self.sparsity, 3, transition_steps=end - begin, transition_begin=begin)

    def changes(self) -> dict[str, int]:
        """When masks change."""
        return {"every": max(1, self.steps // CHANGES), "until": round(END * self.steps)}


def dense_again(way: Way) -> optax.GradientTransformation:
    """Nothing is pruned."""
    return way.adam()


def prune(way: Way) -> optax.GradientTransformation:
    """Magnitude, along the cubic schedule."""
    return optax.chain(way.adam(), jaxprune.prune(way.make, way.cubic(), **way.changes()))


def surgery(way: Way) -> optax.GradientTransformation:
    """The same, where pruned weights go on learning behind their mask, and come back when they have grown.

    By SGD, and with a number of weights for each layer: Adam moves pruned weights as far as any, however small their gradients, and
    under one threshold most weights of the last layer went.
    """
    sgd = optax.sgd(way.rate(SGD_RATE), momentum=0.9)
    make = functools.partial(jaxprune.make_masks, rule=rules.erk_sparsity)
    return optax.chain(sgd, transforms.prune_and_splice(make, way.cubic(), **way.changes()))


def saliency(way: Way) -> optax.GradientTransformation:
    """The same by ``|w g|``, the mean over the steps between two changes, in place of ``|w|``."""

    def make(params: Any, mean: Any, k: Any) -> Any:
        return jaxprune.make_masks(params, k, rule=rules.global_sparsity, scores=mean)

    measured = {"measure": scores.saliency, **way.changes()}
    return transforms.prune_by_gradients(way.adam(), make, way.cubic(), **measured)


def elsa(way: Way) -> optax.GradientTransformation:
    """ADMM over the training steps, the penalty rising in a straight line; ranked by magnitude, as gradients fade here."""
    until = round(ELSA_END * way.steps)
    penalty = optax.linear_schedule(0.0, PENALTY, until)
    every = max(1, min(ELSA_EVERY, until))
    return transforms.elsa(way.adam(), way.make, way.sparsity, penalty=penalty, every=every, until=until, metric=None)


METHODS = {"dense again": dense_again, "prune": prune, "saliency": saliency, "surgery": surgery, "ELSA": elsa}


class Data(NamedTuple):
    """Images [n, 28, 28, 1] with labels [n]: to train on, and to measure on."""

    train: tuple[jax.Array, jax.Array]
    held_out: tuple[jax.Array, jax.Array]


def load(folder: Path, seed: int, *, test: bool) -> Data:
    """Read the images and split them by the seed; measure on those that test, or on those that settings are chosen on."""
    pixels, labels = mnist.read(folder)
    order = np.random.default_rng(seed).permutation(len(labels))
    train, choose, others = np.split(order, [round(share * len(order)) for share in (TRAIN, TRAIN + CHOOSE)])

    def of(numbers: np.ndarray) -> tuple[jax.Array, jax.Array]:
        return jnp.asarray(pixels[numbers] / np.float32(255)), jnp.asarray(labels[numbers])

    return Data(of(train), of(others if test else choose))


def sparsity_for(params: Any, compression: float) -> float:
    """The sparsity of kernels at which a network has so many times fewer parameters, where its biases all stay."""
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    kernels = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim > 1)
    return 1 - (total / compression - (total - kernels)) / kernels


def train(
    network: nn.Module,
    params: Any,
    tx: optax.GradientTransformation,
    found: Data,
    epochs: int,
    seed: int,
    *,
    behind: bool = False,
) -> Any:
    """Return the parameters after so many epochs, each in an order of its own; weights may learn `behind` the masks of the state."""
    images, labels = found.train

    def loss(params: Any, state: Any, batch: jax.Array) -> jax.Array:
        seen = transforms.straight_through(params, jaxprune.masks_in(state)) if behind else params
        logits = network.apply(seen, images[batch])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]).mean()

    def step(carry: Any, batch: jax.Array) -> Any:
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, state, batch), state, params)
        return (optax.apply_updates(params, updates), state), None

    epoch = jax.jit(lambda carry, batches: jax.lax.scan(step, carry, batches)[0], donate_argnums=0)
    carry = jax.tree.map(jnp.copy, (params, tx.init(params)))
    orders = np.random.default_rng(seed)
    for _ in range(epochs):
        kept = len(labels) // BATCH_SIZE * BATCH_SIZE
        carry = epoch(carry, orders.permutation(len(labels))[:kept].reshape(-1, BATCH_SIZE))
    return carry[0]


class Row(NamedTuple):
    """What one network came to; the error in percent, and the factor by which it has fewer parameters."""

    seed: int
    method: str
    asked: int
    compression: float
    error: float


def run_seed(case: Case, folder: Path, seed: int, options: argparse.Namespace, console: Console) -> list[Row]:
    """Train one network, and go on from it by each method to each compression."""
    found = load(folder, seed, test=options.test)
    first = case.network.init(jax.random.key(seed), found.train[0][:1])
    epochs = case.epochs if options.epochs is None else options.epochs
    steps = epochs * (len(found.train[1]) // BATCH_SIZE)
    total = sum(leaf.size for leaf in jax.tree.leaves(first))
    images, labels = found.held_out
    rows: list[Row] = []

    def measure(method: str, times: int, params: Any) -> None:
        left = sum(int((leaf != 0).sum()) for leaf in jax.tree.leaves(params))
        error = 100 * float((case.network.apply(params, images).argmax(-1) != labels).mean())
        rows.append(Row(seed, method, times, total / left, error))

    adam = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))
    trained = train(case.network, first, adam, found, epochs, seed)
    measure("dense", 1, trained)
    make = functools.partial(jaxprune.make_masks, rule=rules.global_sparsity)
    every = options.compressions or case.compressions
    asked = [
        (method, times) for method in options.methods for times in ((1,) if METHODS[method] is dense_again else every)
    ]
    for method, times in track(asked, f"seed {seed}", console=console):
        tx, behind = METHODS[method](Way(sparsity_for(first, times), steps, make)), METHODS[method] is surgery
        measure(method, times, train(case.network, trained, tx, found, epochs, seed + AGAIN, behind=behind))
    return rows


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; zero where there is one value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def spread(values: Sequence[float], sign: str = "") -> str:
    """A mean and its standard error."""
    error = f" ± {standard_error(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.2f}{error}"


def table(name: str, rows: Sequence[Row]) -> Table:
    """Show errors, and what compression adds to them: the differences to the dense network of the same seed."""
    dense = {row.seed: row.error for row in rows if row.method == "dense"}
    title = f"{name}: error in %, dense {spread(list(dense.values()))} ({len(dense)} seeds, ± standard error)"
    shown = Table("method", "times smaller", "error", "more than dense", title=title, title_justify="left")
    for method, times in dict.fromkeys((row.method, row.asked) for row in rows if row.method != "dense"):
        found = [row for row in rows if (row.method, row.asked) == (method, times)]
        more = spread([row.error - dense[row.seed] for row in found], "+")
        shown.add_row(method, f"{times}", spread([row.error for row in found]), more)
    shown.add_section()
    for method, error, times in PUBLISHED[name]:
        shown.add_row(f"{method} (published)", f"{times}", f"{error}", "")
    return shown


def figure(results: Mapping[str, Sequence[Row]]) -> Figure:
    """Draw the error against compression, a curve for each method, a panel for each network; bars are standard errors."""
    colors = dict(zip(METHODS, (INK, *LINES), strict=False))
    drawn = Figure(figsize=(5.2 * len(results), 4.2), layout="constrained", dpi=150)
    for axes, (name, rows) in zip(drawn.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        for method in dict.fromkeys(row.method for row in rows if row.asked > 1):
            every = sorted({row.asked for row in rows if row.method == method})
            errors = [[row.error for row in rows if (row.method, row.asked) == (method, times)] for times in every]
            means, bars = map(statistics.mean, errors), map(standard_error, errors)
            axes.errorbar(
                every, list(means), list(bars), marker="o", markersize=4, color=colors[method], capsize=2, label=method
            )
        dense = statistics.mean(row.error for row in rows if row.method == "dense")
        axes.axhline(dense, color=INK, linewidth=1, linestyle=":", label="dense")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(sorted({row.asked for row in rows if row.asked > 1})))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}x")
        axes.set_xlabel("fewer parameters", color=INK)
        axes.set_ylabel("error, %", color=INK)
        axes.set_title(name, loc="left", color=INK, fontsize="medium")
        frame(axes)
        axes.legend(frameon=False, fontsize="small", labelcolor=INK)
    return drawn


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, run every network and seed, show the tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="where the two files of MNIST lie")
    parser.add_argument("--networks", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--compressions", type=int, nargs="+", metavar="TIMES", help="instead of each network's own")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)), help="(default: 0 to 4)")
    parser.add_argument("--epochs", type=int, help="instead of each network's own")
    parser.add_argument("--test", action="store_true", help="measure on the images that nothing was chosen on")
    parser.add_argument("--json", type=Path, help="write every number here")
    parser.add_argument("--figure", type=Path, help="write the figure here, as .png or .svg")
    options = parser.parse_args(arguments)
    console, results = Console(), dict[str, list[Row]]()
    for name in options.networks:
        results[name] = []
        for seed in options.seeds:
            results[name] += run_seed(CASES[name], options.data, seed, options, console)
            timing.write_json(options.json, {name: [row._asdict() for row in rows] for name, rows in results.items()})
        console.print(table(name, results[name]))
    if options.figure:
        figure(results).savefig(options.figure)


if __name__ == "__main__":
    main()
