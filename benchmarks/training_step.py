"""What keeping pruned weights at zero adds to a training step.

    python -m benchmarks.training_step

Adam on a CNN at batch 128 of 32x32x3, where convolutions take the time, and on an MLP of 20 million weights at batch 8,
where reading parameters and moments does: the worst case. Parameters and optimizer state are donated.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from cnn import CNN
from rich.console import Console

import jaxprune
from benchmarks import timing

K = 1.0


class MLP(nn.Module):
    """Five dense layers of one width with relu between: [N, width] to [N, width]."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the last layer's outputs."""
        for _ in range(4):
            x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(self.width)(x)


def stepper(
    model: nn.Module, tx: optax.GradientTransformation, params: Any, batch: Any, steps: int
) -> Callable[[], Any]:
    """Return a function that trains `steps` steps further each time and returns the parameters."""

    def loss_fn(params: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        logits = model.apply(params, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(state: Any, batch: Any) -> Any:
        params, opt_state = state
        updates, opt_state = tx.update(jax.grad(loss_fn)(params, *batch), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    train = jax.jit(step, donate_argnums=0)
    # A copy: donation deletes what it is given.
    state = (jax.tree.map(jnp.copy, params), tx.init(params))

    def run() -> Any:
        nonlocal state
        for _ in range(steps):
            state = train(state, batch)
        return jax.block_until_ready(state[0])

    return run


def measure(title: str, model: nn.Module, batch: Any, steps: int, repeats: int, console: Console) -> dict[str, Any]:
    """Measure one network, show it, and return the results."""
    dense = jax.jit(model.init)(jax.random.key(0), batch[0])
    masks = jaxprune.make_masks(dense, K)
    pruned = jaxprune.apply_masks(dense, masks)
    adam = optax.adam(1e-4)
    runs = {
        "adam": stepper(model, adam, pruned, batch, steps),
        "adam, keep_pruned": stepper(model, optax.chain(adam, jaxprune.keep_pruned(masks)), pruned, batch, steps),
        "adam, keep_zeros": stepper(model, optax.chain(adam, jaxprune.transforms.keep_zeros()), pruned, batch, steps),
    }
    rows = timing.compare(runs, repeats)
    per_step = [row._replace(wall=row.wall / steps, cpu=row.cpu / steps) for row in rows]
    size = sum(leaf.size for leaf in jax.tree.leaves(dense))
    console.print(timing.table(f"a step of {title}, {size:,} parameters", per_step))
    zeros = {name: _zeros(run()) for name, run in runs.items()}
    return {"network": title, "parameters": size, "zeros": zeros, "rows": [row._asdict() for row in per_step]}


def _zeros(params: Any) -> float:
    """Return the fraction of zeros among the prunable weights."""
    return float(jaxprune.sparsity(jax.tree.map(lambda leaf: leaf != 0, params)))


def networks(batch_size: int, width: int) -> dict[str, tuple[str, Any, tuple[jax.Array, jax.Array]]]:
    """Return by name each network's title, the network, and a batch of random inputs and labels."""

    def batch(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        key = jax.random.key(1)
        return jax.random.normal(key, shape), jax.random.randint(key, shape[:1], 0, 10)

    return {
        "cnn": (f"the CNN at batch {batch_size}", CNN(10), batch((batch_size, 32, 32, 3))),
        "mlp": ("the MLP at batch 8", MLP(width), batch((8, width))),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, measure both networks, show tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=128, help="images for the CNN")
    parser.add_argument("--width", type=int, default=2_000, help="of the MLP's five square layers")
    parser.add_argument("--steps", type=int, default=4, help="steps a sample")
    parser.add_argument("--repeats", type=int, default=15, help="rounds")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(arguments)
    console = Console()
    cases = networks(options.batch_size, options.width).values()
    timing.write_json(options.json, [measure(*case, options.steps, options.repeats, console) for case in cases])


if __name__ == "__main__":
    main()
