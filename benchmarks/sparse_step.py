"""What pruning while training adds to a training step: `prune` and `rigl` against plain optax.

    python -m benchmarks.sparse_step

Adam on a CNN at batch 128 of 32x32x3 and on an MLP of 20 million weights at batch 8, as in `benchmarks.training_step`;
masks change at no step, at every step, and at every tenth one..
"""

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import optax
from rich.console import Console

import jaxprune
from benchmarks import timing
from benchmarks.training_step import networks, stepper
from jaxprune import rules, scores

SPARSITY = 0.9
ADAM = optax.adam(1e-4)
# The rule that makes masks, and its k.
RULES: dict[str, tuple[Any, float]] = {
    "std": (rules.std_threshold, 1.0),
    "layer": (rules.layer_sparsity, SPARSITY),
    "global": (rules.global_sparsity, SPARSITY),
}
NEVER = 1_000_000  # apart from the update 0, which is the call that compiles
TENTH = 10
CASES = {NEVER: "masks stay", 1: "masks change", TENTH: "masks change at every tenth step"}


def optimizers(every: int) -> dict[str, optax.GradientTransformation]:
    """Return Adam, and with it each transform, changing masks so often."""

    def random_masks(params: Any) -> Any:
        noise = scores.random(params, jax.random.key(2))
        return jaxprune.make_masks(params, SPARSITY, scores=noise, rule=rules.layer_sparsity)

    pruning = {
        f"prune, {name}": jaxprune.prune(functools.partial(jaxprune.make_masks, rule=rule), k, every=every)
        for name, (rule, k) in RULES.items()
    }
    return {
        "adam": ADAM,
        **{name: optax.chain(ADAM, transform) for name, transform in pruning.items()},
        "rigl": jaxprune.rigl(ADAM, random_masks, every=every, until=10 * NEVER),
    }


def measure(title: str, model: nn.Module, batch: Any, steps: int, repeats: int, console: Console) -> dict[str, Any]:
    """Measure one network in all cases, show them, and return the results."""
    params = jax.jit(model.init)(jax.random.key(0), batch[0])
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    cases = []
    for every, case in CASES.items():
        sample = TENTH if every == TENTH else steps
        runs = {name: stepper(model, tx, params, batch, sample) for name, tx in optimizers(every).items()}
        rows = timing.compare(runs, repeats)
        rows = [row._replace(wall=row.wall / sample, cpu=row.cpu / sample) for row in rows]
        console.print(timing.table(f"a step of {title}, {size:,} parameters; {case}", rows))
        cases.append({"every": every, "rows": [row._asdict() for row in rows]})
    plain = _state_bytes(ADAM, params)
    added = {name: (_state_bytes(tx, params) - plain) / size for name, tx in optimizers(1).items()}
    console.print("state, bytes a weight: " + ", ".join(f"{name} {number:.3f}" for name, number in added.items()))
    return {"network": title, "parameters": size, "state_bytes_per_weight": added, "cases": cases}


def _state_bytes(tx: optax.GradientTransformation, params: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(tx.init, params)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, measure both networks, show tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=("cnn", "mlp"), default=["cnn", "mlp"], help="(default: both)")
    parser.add_argument("--batch-size", type=int, default=128, help="images for the CNN")
    parser.add_argument("--width", type=int, default=2_000, help="of the MLP's five square layers")
    parser.add_argument("--steps", type=int, default=2, help="steps a sample")
    parser.add_argument("--repeats", type=int, default=9, help="rounds")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(arguments)
    console = Console()
    cases = networks(options.batch_size, options.width)
    chosen = [cases[name] for name in options.networks]
    timing.write_json(options.json, [measure(*case, options.steps, options.repeats, console) for case in chosen])


if __name__ == "__main__":
    main()
