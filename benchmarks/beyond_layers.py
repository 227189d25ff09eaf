"""Masks chosen beyond one pass over a layer: bits per byte of a language model, by method and sparsity.

    python -m benchmarks.beyond_layers

The model is the byte-level transformer of `examples/language_model.py`, trained once and kept, or SmolLM2 (`--smollm2`).
Layer by layer, without training: ADMM; the masks of it swapped, and the weights reconstructed; ADMM in sequence. With
training, every method on the same windows of text in the same order:

- healed: what ADMM in sequence left is trained under its masks (`transforms.heal`);
- gradual: from the dense network, masks by magnitude tighten along the cubic schedule in the first half (`prune`);
- ELSA: from the dense network, and from what ADMM in sequence left, the weights stay dense for the first half, and a sparse copy
  pulls at them (`transforms.elsa`);
- learned masks: gates on ADMM's weights, which stay as they are (`learned`), with the published schedules.

What trains weights is Adam under a cosine, with the same highest rate. Such training is worth something by itself,
all the more on text of another kind than a network has learnt from: "dense again" is the dense network after it. `--valid`
measures on the text that settings are chosen on; without it, on text that nothing was chosen on.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from language_model import Pattern
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxprune
from benchmarks import learned_masks
from benchmarks.language_subjects import Subject, smollm2_135m, transformer
from benchmarks.learned_masks import Rows
from jaxprune import oneshot, rules, transforms

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9)
PATTERNS = {
    **{f"{100 * k:g} %": Pattern(f"{100 * k:g} %", k, rules.layer_sparsity, rules.row_sparsity) for k in SPARSITIES},
    "2:4": Pattern("2:4", 2, rules.n_m(4), rules.n_m(4)),
}
END = 0.5  # of the steps: there gradual pruning ends, and ELSA prunes
# ELSA's penalty from weights that are sparse already, and the highest, in a straight line from zero, from dense ones. The best
# of the few that were tried with `--valid` at 80 % and 250 updates of the byte-level transformer: four and two.
SPARSE_PENALTY, DENSE_PENALTY = 0.02, 0.3


class Found(NamedTuple):
    """Parameters whose pruned weights are zero, and the masks."""

    params: Any
    masks: Any


class Training(NamedTuple):
    """How whatever is trained is trained; the seed chooses the text, the same for every method."""

    updates: int
    rate: float
    seed: int

    def adam(self) -> optax.GradientTransformation:
        """Adam, with a short warm-up, then a cosine to zero."""
        return optax.adam(optax.warmup_cosine_decay_schedule(0.0, self.rate, self.updates // 20, self.updates))


# (network, pattern, training, what came before by name) -> what it leaves
Way = Callable[[Subject, Pattern, Training, dict[str, Found]], Found]


def admm(subject: Subject, pattern: Pattern, training: Training, before: dict[str, Found]) -> Found:
    """ADMM, all layers at once."""
    return Found(*oneshot.admm(subject.params, subject.grams, pattern.k, rule=pattern.rule, **subject.which))


def swapped(subject: Subject, pattern: Pattern, training: Training, before: dict[str, Found]) -> Found:
    """ADMM's masks after swaps priced with what makes up for them."""
    within = pattern.rule.m if pattern.rule.m > 1 else None
    found = oneshot.swap_and_reconstruct(subject.params, before["ADMM"].masks, subject.grams, within=within)
    return Found(found.params, found.masks)


def in_sequence(subject: Subject, pattern: Pattern, training: Training, before: dict[str, Found]) -> Found:
    """ADMM, each layer behind those that were pruned before it."""
    solve = functools.partial(oneshot.admm, k=pattern.k, rule=pattern.rule)
    return Found(*oneshot.sequential(subject.apply, subject.params, subject.batches, solve, **subject.which))


def healed(subject: Subject, pattern: Pattern, training: Training, before: dict[str, Found]) -> Found:
    """ADMM in sequence, then trained under its masks."""
    params, masks = before["ADMM, in sequence"]
    lessons = subject.lessons(training.updates, training.seed)
    return Found(transforms.heal(subject.loss, params, masks, lessons, training.adam()).params, masks)


def dense_again(subject: Subject, training: Training) -> Any:
    """Nothing is pruned, and the network is trained as long."""
    everything = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), subject.params)
    lessons = subject.lessons(training.updates, training.seed)
    return transforms.heal(subject.loss, subject.params, everything, lessons, training.adam()).params


def gradual(subject: Subject, pattern: Pattern, training: Training, before: dict[str, Found]) -> Found:
    """Magnitude, tightening while the network trains; N:M at once."""
    make = functools.partial(jaxprune.make_masks, rule=pattern.rule, **subject.which)
    end = round(END * training.updates)
    cubic = optax.polynomial_schedule(0.0, pattern.k, 3, transition_steps=end) if pattern.k < 1 else pattern.k
    every = max(1, training.updates // 64)
    tx = optax.chain(training.adam(), jaxprune.prune(make, cubic, every=every, until=end))
    return _trained(subject, subject.params, tx, training)


def elsa(subject: Subject, pattern: Pattern, training: Training, before: dict[str, Found]) -> Found:
    """The loss itself under the constraint, by ADMM over the training steps, from the dense network."""
    penalty = optax.linear_schedule(0.0, DENSE_PENALTY, round(END * training.updates))
    return _constrained(subject, subject.params, pattern, training, penalty, 8)


def elsa_from_sparse(subject: Subject, pattern: Pattern, training: Training, before: dict[str, Found]) -> Found:
    """The same from what ADMM in sequence left, so that masks may move while it heals."""
    return _constrained(subject, before["ADMM, in sequence"].params, pattern, training, SPARSE_PENALTY, 16)


def learned(subject: Subject, pattern: Pattern, training: Training, before: dict[str, Found]) -> Found:
    """Gates on ADMM's weights; what it pruned has its dense value, should a mask take it back."""
    start = learned_masks.admm_weights(subject, pattern, learned_masks.Start(*before["ADMM"]))
    settings = {"steps": training.updates, "rate": learned_masks.RATE, "seed": training.seed}
    masks = learned_masks.learn(subject, start, pattern, **settings)
    return Found(jaxprune.apply_masks(start.params, masks), masks)


WAYS: dict[str, Way] = {
    "ADMM": admm,
    "ADMM, swapped": swapped,
    "ADMM, in sequence": in_sequence,
    "ADMM in sequence, healed": healed,
    "gradual": gradual,
    "ELSA": elsa,
    "ADMM in sequence, ELSA": elsa_from_sparse,
    "learned masks": learned,
}
TRAINED = ("ADMM in sequence, healed", "gradual", "ELSA", "ADMM in sequence, ELSA", "learned masks")


def _constrained(
    subject: Subject, start: Any, pattern: Pattern, training: Training, penalty: optax.ScalarOrSchedule, every: int
) -> Found:
    """Train by ELSA; ranked by magnitude, which `--valid` found better than Adam's moments in so few steps."""
    make = functools.partial(jaxprune.make_masks, rule=pattern.rule, **subject.which)
    until = round(END * training.updates)
    settings = {"penalty": penalty, "every": min(every, until), "until": until, "metric": None}
    tx = transforms.elsa(training.adam(), make, pattern.k, **settings, **subject.which)
    return _trained(subject, start, tx, training)


def _trained(subject: Subject, start: Any, tx: optax.GradientTransformation, training: Training) -> Found:
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, windows: jax.Array) -> Any:
        updates, state = tx.update(jax.grad(subject.loss)(params, windows), state, params)
        return optax.apply_updates(params, updates), state

    params, state = jax.tree.map(jnp.copy, (start, tx.init(start)))
    for windows in subject.lessons(training.updates, training.seed):
        params, state = step(params, state, windows)
    return Found(params, jaxprune.masks_in(state))


def run_seed(seed: int, options: argparse.Namespace, console: Console) -> Iterator[dict[str, Any]]:
    """Load or train one network; prune it in every way to every pattern."""
    subject = (smollm2_135m if options.smollm2 else transformer)(seed, options, console)
    dense = subject.quality(subject.params)
    training = Training(options.updates, options.rate, seed)
    trained = not set(TRAINED).isdisjoint(options.ways)
    again = subject.quality(dense_again(subject, training)) if trained else None
    for pattern in track(options.patterns, f"pruning, seed {seed}", console=console):
        done: dict[str, Found] = {}
        for way in options.ways:
            began, cpu_began = time.perf_counter(), time.process_time()
            done[way] = found = jax.block_until_ready(WAYS[way](subject, PATTERNS[pattern], training, done))
            spent = {"cpu": time.process_time() - cpu_began, "seconds": time.perf_counter() - began}
            removed = float(jaxprune.sparsity(found.masks, **subject.which))
            tokens = options.updates * subject.tokens if way in TRAINED else 0
            row = {"seed": seed, "pattern": pattern, "way": way, "dense": dense, "dense_again": again}
            yield row | spent | {"removed": removed, "quality": subject.quality(found.params), "tokens": tokens}


def table(rows: Rows) -> Table:
    """Show the means over the seeds, and what a way costs by itself, beside what it begins with."""
    seeds = len({row["seed"] for row in rows})
    dense = statistics.mean(row["dense"] for row in rows)
    patterns = list(dict.fromkeys(row["pattern"] for row in rows))
    title = f"bits per byte, mean of {seeds} seed(s); dense {dense:.3f}"
    if rows[0]["dense_again"] is not None:
        title += f", dense again {statistics.mean(row['dense_again'] for row in rows):.3f}"
    shown = Table("method", *patterns, "tokens", "CPU, s", "wall, s", title=title, title_justify="left")
    for way in dict.fromkeys(row["way"] for row in rows):
        same = [row for row in rows if row["way"] == way]
        means = [statistics.mean(row["quality"] for row in same if row["pattern"] == pattern) for pattern in patterns]
        spent = [f"{statistics.mean(row[name] for row in same):.0f}" for name in ("cpu", "seconds")]
        shown.add_row(way, *(f"{mean:.3f}" for mean in means), f"{same[0]['tokens']:,}", *spent)
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    """Prune every network in every way, and show the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=list(PATTERNS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="each behind what it begins with")
    parser.add_argument(
        "--updates",
        type=int,
        default=250,
        help="of whatever is trained, each on 4,096 bytes, or 512 of SmolLM2's tokens",
    )
    parser.add_argument("--rate", type=float, default=1e-3, help="the highest of learning, where weights are trained")
    parser.add_argument("--smollm2", action="store_true", help="in place of the byte-level transformer")
    learned_masks.run_seeds(parser, arguments, run_seed, table)


if __name__ == "__main__":
    main()
