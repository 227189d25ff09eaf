"""What learned masks are worth: gates trained on frozen weights, beside the one-shot masks that they began with.

    python -m benchmarks.learned_masks

A byte-level transformer (that of `examples/language_model.py`, trained once and kept) is pruned by ADMM and by Wanda. From either
one's masks gates are trained with the published schedules, while the weights stay; the best masks of exact counts are then
measured in bits per byte on text of other files, and as the share of what ADMM loses that they win back.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import language_model
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxprune
from benchmarks import timing
from benchmarks.language_subjects import Subject, transformer
from jaxprune import learned, oneshot, rules, scores

PATTERNS = {pattern.name: pattern for pattern in language_model.PATTERNS}
RATE = 1e-3  # of learning gates, at most


class Start(NamedTuple):
    """Weights that stay as they are, and the masks to begin with."""

    params: Any
    masks: Any


def wanda(subject: Subject, pattern: Any, admm: Start) -> Start:
    """Wanda's masks on the dense weights."""
    found = scores.wanda(subject.params, subject.grams.norms())
    make = functools.partial(jaxprune.make_masks, **subject.which)
    return Start(subject.params, make(subject.params, pattern.k, rule=pattern.by_unit, scores=found))


def admm_masks(subject: Subject, pattern: Any, admm: Start) -> Start:
    """ADMM's masks on the dense weights."""
    return Start(subject.params, admm.masks)


def admm_weights(subject: Subject, pattern: Any, admm: Start) -> Start:
    """ADMM's masks on its own weights; what it pruned has its dense value, should a mask take it back."""
    return Start(jax.tree.map(jnp.where, admm.masks, admm.params, subject.params), admm.masks)


STARTS: dict[str, Callable[..., Start]] = {
    "Wanda's masks, dense weights": wanda,
    "ADMM's masks, dense weights": admm_masks,
    "ADMM's masks, its weights": admm_weights,
}


def learn(subject: Subject, start: Start, pattern: Any, *, steps: int, rate: float, seed: int) -> Any:
    """Train gates on text, and return the best masks."""
    key = jax.random.key(seed)
    gates_of = {"prior": start.masks, **subject.which}
    if pattern.rule is rules.layer_sparsity:
        gates = learned.weight_gates(start.params, key, **gates_of)
        soften = lambda gates, params, key, step: learned.soft_masks(gates, key, step, steps=steps)  # noqa: E731
        harden = lambda gates: jaxprune.make_masks(  # noqa: E731
            start.params, pattern.k, rule=rules.global_sparsity, scores=gates, **subject.which
        )
    else:
        n, m = pattern.k, pattern.rule.m
        gates = learned.pattern_gates(start.params, n, m, key, **gates_of)
        soften = lambda gates, params, key, step: learned.soft_patterns(gates, params, n, key, step, steps=steps)  # noqa: E731
        harden = lambda gates: learned.pattern_masks(gates, start.params, n)  # noqa: E731
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, min(5, steps // 2), steps)
    tx = optax.adamw(schedule, b2=0.95, weight_decay=0.0)
    sites = subject.which.get("sites")

    def loss(gates: Any, params: Any, windows: jax.Array, step: jax.Array) -> jax.Array:
        soft = soften(gates, params, key, step)
        norm = 10 * (1 - step / steps) * learned.kept_norm(params, soft, sites=sites)
        off = 7 * learned.sparsity_loss(soft, pattern.k) if pattern.k < 1 else 0.0
        return subject.loss(learned.apply_soft_masks(params, soft), windows) + off - norm

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(gates: Any, state: Any, params: Any, windows: jax.Array, step: jax.Array) -> Any:
        updates, state = tx.update(jax.grad(loss)(gates, params, windows, step), state, gates)
        return optax.apply_updates(gates, updates), state

    state = tx.init(gates)
    for step, windows in enumerate(subject.lessons(steps, seed)):
        gates, state = update(gates, state, start.params, windows, step)
    return harden(gates)


Rows = list[dict[str, Any]]


def run_seeds(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    run_seed: Callable[[int, argparse.Namespace, Console], Iterator[dict[str, Any]]],
    table: Callable[[Rows], Table],
) -> None:
    """Read a command line that also says which networks, run every seed, show the table; JSON is written row by row."""
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the networks")
    parser.add_argument("--steps", type=int, default=1300, help="of the transformer's training")
    parser.add_argument("--windows", type=int, help="of text to measure with (default: 512; of SmolLM2's 28)")
    parser.add_argument("--valid", action="store_true", help="measure with the text kept for choosing settings")
    parser.add_argument("--out", type=Path, default=Path("runs/language_model"), help="where transformers are kept")
    parser.add_argument("--small", action="store_true", help="a tiny network, to see that everything runs")
    parser.add_argument("--json", type=Path, help="write every number here")
    options = parser.parse_args(arguments)
    console, rows = Console(width=120), Rows()
    for seed in options.seeds:
        for row in run_seed(seed, options, console):
            rows.append(row)
            timing.write_json(options.json, rows)
    console.print(table(rows))


def run_seed(seed: int, options: argparse.Namespace, console: Console) -> Iterator[dict[str, Any]]:
    """Learn masks of one network from every start, for every pattern."""
    subject = transformer(seed, options, console)
    dense = subject.quality(subject.params)
    for name in track(options.patterns, f"learning, seed {seed}", console=console):
        pattern = PATTERNS[name]
        solve = functools.partial(oneshot.admm, rule=pattern.rule, **subject.which)
        admm = Start(*solve(subject.params, subject.grams, pattern.k))
        reference = subject.quality(admm.params)
        for title in options.starts:
            start = STARTS[title](subject, pattern, admm)
            began = time.process_time()
            masks = learn(subject, start, pattern, steps=options.updates, rate=options.rate, seed=seed)
            cpu = time.process_time() - began
            found = subject.quality(jaxprune.apply_masks(start.params, masks))
            yield {
                "seed": seed,
                "pattern": name,
                "start": title,
                "dense": dense,
                "admm": reference,
                "before": subject.quality(jaxprune.apply_masks(start.params, start.masks)),
                "after": found,
                "won_back": (reference - found) / (reference - dense),
                "removed": float(jaxprune.sparsity(masks, **subject.which)),
                "tokens": options.updates * subject.tokens,
                "cpu": cpu,
            }


def table(rows: Rows) -> Table:
    """Show the means over the seeds."""
    seeds = len({row["seed"] for row in rows})
    shown = Table("pattern", "begins with", title=f"bits per byte, mean of {seeds} seed(s)", title_justify="left")
    columns = ("dense", "admm", "before", "after")
    for heading in (*columns, "won back", "removed", "CPU, s"):
        shown.add_column(heading, justify="right")
    for pattern, start in dict.fromkeys((row["pattern"], row["start"]) for row in rows):
        same = [row for row in rows if (row["pattern"], row["start"]) == (pattern, start)]
        mean = {name: statistics.mean(row[name] for row in same) for name in (*columns, "won_back", "removed", "cpu")}
        cells = (f"{100 * mean['won_back']:.0f} %", f"{100 * mean['removed']:.2f} %", f"{mean['cpu']:.0f}")
        shown.add_row(pattern, start, *(f"{mean[name]:.4f}" for name in columns), *cells)
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    """Learn masks of every network, and show the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=["60 %", "2:4"])
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--updates", type=int, default=2000, help="of the gates, each on 4,096 bytes")
    parser.add_argument("--rate", type=float, default=RATE, help="of learning, at most")
    run_seeds(parser, arguments, run_seed, table)


if __name__ == "__main__":
    main()
