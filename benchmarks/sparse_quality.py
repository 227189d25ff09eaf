"""What each way of pruning while training is worth: test accuracies at the same sparsity, after as many steps.

    python -m benchmarks.sparse_quality

A multilayer perceptron with 300 and 100 hidden units on the digits, and on MNIST-1D where the package mnist1d is
installed. Every network takes the same number of steps of Adam with the same batches:

- gradual: the cubic schedule from 10 % to 70 % of the steps; one-shot: dense for half of them, pruned, fine-tuned;
- RigL, SET and static masks: sparse from the same random masks (Erdos-Renyi) and the same first weights;
- ticket: masks of the trained network in rounds, weights rewound to 5 % of the steps; the controls have the ticket's
  masks and other first weights, or its first weights under random masks with as many weights in every layer;
- N:M: straight-through gradients with decay of masked weights (SR-STE), or one-shot as above.

A ticket's rounds before its own take steps that are not counted.
"""

import argparse
import functools
import importlib.util
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _support import data
from lottery_ticket import shuffled
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxprune
from benchmarks import timing
from benchmarks.one_shot import markdown
from jaxprune import rules, scores

BATCH_SIZE = 32
ADAM = optax.adam(1e-3)
GRADUAL, SPARSE, TICKETS = (0.9, 0.95, 0.98), (0.9, 0.95), (0.5, 0.75, 0.9, 0.95)
GROUPS = {"2:4": 2, "1:4": 1}
BEGIN, END, UNTIL, REWIND = 0.1, 0.7, 0.75, 0.05  # as shares of the steps
CHANGES = 50  # of masks, in a whole training

Optimizer = Callable[[Any, int, int], optax.GradientTransformation]


class Network(nn.Module):
    """Two hidden layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the logits of a batch of vectors."""
        for width in (300, 100):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


class Data(NamedTuple):
    """Vectors and their labels, to train and to test on."""

    train: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]


def load_digits() -> Data:
    """Return the digits, each image a vector."""
    found = data.load("digits")
    flat = [jnp.asarray(images.reshape(len(images), -1)) for images in (found.train_images, found.test_images)]
    return Data((flat[0], jnp.asarray(found.train_labels)), (flat[1], jnp.asarray(found.test_labels)))


def load_mnist1d() -> Data:
    """Return MNIST-1D (Greydanus 2020), made by its package."""
    from mnist1d.data import make_dataset

    found = make_dataset()
    pairs = ((found["x"], found["y"]), (found["x_test"], found["y_test"]))
    return Data(*((jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32)) for x, y in pairs))


DATA_SETS = {"digits": load_digits, "mnist1d": load_mnist1d}


# Optimizers: of a traced argument (masks or a strength), the number of steps and the seed.


def held(masks: Any, steps: int, seed: int) -> optax.GradientTransformation:
    """Train under masks that stay, pruned weights at zero."""
    del steps, seed
    return optax.chain(ADAM, jaxprune.keep_pruned(masks))


def gradual(sparsity: Any, steps: int, seed: int) -> optax.GradientTransformation:
    """Prune along the cubic schedule."""
    del seed
    begin, end = round(BEGIN * steps), round(END * steps)
    cubic = optax.polynomial_schedule(0.0, 1.0, 3, transition_steps=end - begin, transition_begin=begin)
    make = functools.partial(jaxprune.make_masks, rule=rules.global_sparsity)
    every = max(1, steps // CHANGES)
    return optax.chain(ADAM, jaxprune.prune(make, lambda count: sparsity * cubic(count), every=every, until=end))


def static(masks: Any, steps: int, seed: int) -> optax.GradientTransformation:
    """Train under random masks that stay."""
    del steps, seed
    return jaxprune.transforms.static_sparse(ADAM, masks)


def sparse_evolution(masks: Any, steps: int, seed: int) -> optax.GradientTransformation:
    """Drop the smallest weights, grow at random."""
    key, every = jax.random.key(seed), max(1, steps // CHANGES)
    return jaxprune.transforms.sparse_evolution(ADAM, masks, key, every=every, until=round(UNTIL * steps))


def rigl(masks: Any, steps: int, seed: int) -> optax.GradientTransformation:
    """Drop the smallest weights, grow by gradient."""
    del seed
    return jaxprune.rigl(ADAM, masks, every=max(1, steps // CHANGES), until=round(UNTIL * steps))


def n_of_four(params: Any, n: Any) -> Any:
    """Keep the n largest of every four weights along the inputs."""
    return jaxprune.make_masks(params, n, rule=rules.n_m(4))


def sr_ste(n: Any, steps: int, seed: int) -> optax.GradientTransformation:
    """Decay the weights that the forward masks hide, the paper's rate."""
    del steps, seed
    return optax.chain(jaxprune.transforms.decay_pruned(n_of_four, n, rate=2e-4), ADAM)


@functools.partial(jax.jit, static_argnames=("optimizer", "steps"))
def train(params: Any, optimizer: Optimizer, argument: Any, examples: Any, batches: Any, steps: int, seed: int) -> Any:
    """Take a step for each batch; return the parameters. SR-STE's loss sees them behind its masks."""
    tx = optimizer(argument, steps, seed)

    def loss(params: Any, batch: jax.Array) -> jax.Array:
        if optimizer is sr_ste:
            params = jaxprune.transforms.straight_through(params, n_of_four(params, argument))
        logits = Network().apply(params, examples[0][batch])
        return optax.softmax_cross_entropy_with_integer_labels(logits, examples[1][batch]).mean()

    def step(carry: Any, batch: jax.Array) -> Any:
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), batches)[0][0]


@jax.jit
def accuracy(params: Any, examples: Any) -> jax.Array:
    """Return the share of right answers."""
    return (Network().apply(params, examples[0]).argmax(-1) == examples[1]).mean()


class Row(NamedTuple):
    """What one network came to: `removed` is the share of its prunable weights that are zero."""

    method: str
    asked: str
    removed: float
    accuracy: float


def run_seed(found: Data, seed: int, steps: int) -> Iterator[Row]:
    """Train in every way; yield what came of it."""
    epochs = range(-(-steps * BATCH_SIZE // (len(found.train[0]) - BATCH_SIZE + 1)))
    batches = np.concatenate([data.epoch_indices(len(found.train[0]), BATCH_SIZE, seed=seed, epoch=i) for i in epochs])
    batches = batches[:steps]
    half, early = steps // 2, round(REWIND * steps)

    def fit(params: Any, optimizer: Optimizer, argument: Any, begin: int = 0, end: int = steps) -> Any:
        return train(params, optimizer, argument, found.train, batches[begin:end], steps, seed)

    def row(method: str, asked: Any, params: Any) -> Row:
        zeros = jax.tree.map(lambda leaf: leaf != 0, params)
        title = asked if isinstance(asked, str) else f"{100 * asked:g} %"
        return Row(method, title, float(jaxprune.sparsity(zeros)), float(accuracy(params, found.test)))

    first, other = (Network().init(jax.random.key(key), found.train[0][:1]) for key in (seed, seed + 1_000))
    everything = jax.tree.map(lambda leaf: jnp.ones_like(leaf, dtype=bool), first)
    make = jax.jit(functools.partial(jaxprune.make_masks, rule=rules.global_sparsity))
    dense_half = fit(first, held, everything, 0, half)
    yield row("dense", "", fit(dense_half, held, everything, half))

    def one_shot(masks: Any) -> Any:
        return fit(jaxprune.apply_masks(dense_half, masks), held, masks, half)

    for sparsity in GRADUAL:
        yield row("one-shot", sparsity, one_shot(make(dense_half, sparsity)))
        yield row("gradual", sparsity, fit(first, gradual, sparsity))
    for sparsity in SPARSE:
        noise = scores.random(first, jax.random.key(seed))
        masks = jaxprune.make_masks(first, sparsity, scores=noise, rule=rules.erk_sparsity)
        start = jaxprune.apply_masks(first, masks)
        for name, optimizer in (("static", static), ("SET", sparse_evolution), ("RigL", rigl)):
            yield row(name, sparsity, fit(start, optimizer, masks))

    rewound = fit(first, held, everything, 0, early)
    trained = fit(rewound, held, everything, early)
    for ticket in jaxprune.iterate(
        lambda params, masks: fit(params, held, masks, early), make, trained, TICKETS, rewind_to=rewound
    ):
        if ticket.k in SPARSE:
            yield row("ticket", ticket.k, ticket.params)
            start = fit(jaxprune.apply_masks(other, ticket.masks), held, ticket.masks, 0, early)
            yield row("other first weights", ticket.k, fit(start, held, ticket.masks, early))
            masks = shuffled(ticket.masks, jax.random.key(seed))
            yield row("random masks", ticket.k, fit(jaxprune.apply_masks(rewound, masks), held, masks, early))
    for title, n in GROUPS.items():
        yield row("one-shot N:M", title, one_shot(n_of_four(dense_half, n)))
        refined = fit(first, sr_ste, n)
        yield row("SR-STE", title, jaxprune.apply_masks(refined, n_of_four(refined, n)))


def summary(rows: Sequence[Row]) -> list[list[str]]:
    """Return a table, headings first: accuracy in percent, mean and standard deviation over the seeds."""
    asked = list(dict.fromkeys(row.asked for row in rows if row.asked))
    lines = [["method", "dense", *asked]]
    for method in dict.fromkeys(row.method for row in rows):
        found = [[row.accuracy for row in rows if (row.method, row.asked) == (method, title)] for title in ("", *asked)]
        lines.append([method, *(_spread(values) if values else "" for values in found)])
    return lines


def _spread(values: Sequence[float]) -> str:
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{deviation}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, run every data set and seed, show the tables, write JSON and Markdown."""
    installed = [name for name in DATA_SETS if name == "digits" or importlib.util.find_spec(name) is not None]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=installed, default=installed, metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--steps", type=int, default=2_000, help="of every training (default: 2000)")
    parser.add_argument("--json", type=Path, help="write every number here")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    options = parser.parse_args(arguments)
    console, results, tables = Console(width=None if sys.stdout.isatty() else 110), {}, []
    for name in options.data:
        found, rows = DATA_SETS[name](), []
        for seed in track(range(options.seeds), f"seeds on {name}", console=console):
            rows += [{"seed": seed, **row._asdict()} for row in run_seed(found, seed, options.steps)]
        results[name] = rows
        lines = summary([Row(**{field: row[field] for field in Row._fields}) for row in rows])
        shown = Table(*lines[0], title=f"accuracy on {name}, %, after {options.steps:,} steps", title_justify="left")
        for line in lines[1:]:
            shown.add_row(*line)
        console.print(shown)
        tables.append(f"{name}\n\n{markdown(lines)}")
    timing.write_json(options.json, results)
    if options.markdown is not None:
        options.markdown.write_text("\n".join(tables))


if __name__ == "__main__":
    main()
