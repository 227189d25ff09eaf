"""What 2:4 masks cost beside one elementwise pass, top-k in torch and partitioning in NumPy.

    python -m benchmarks.n_m --sizes 1_000_000 10_000_000 100_000_000

The pass is the cheapest mask there is, `abs(w) >= threshold` under jit. Groups run along the inputs in ours and along
the last axis in torch and NumPy, which is the easier one for them.
"""

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import jaxprune
from benchmarks import timing
from jaxprune import rules

COLUMNS = 1_600


@jax.jit
def elementwise(weights: jax.Array, threshold: jax.Array) -> jax.Array:
    """Compare each magnitude with a threshold."""
    return jnp.abs(weights) >= threshold


def by_partitioning(weights: np.ndarray) -> np.ndarray:
    """Mask the two smaller of every four consecutive weights by NumPy's partition of their indices."""
    groups = np.abs(weights).reshape(-1, 4)
    mask = np.ones_like(groups, dtype=bool)
    np.put_along_axis(mask, np.argpartition(groups, 2, axis=1)[:, :2], False, axis=1)
    return mask.reshape(weights.shape)


def of_torch(weights: np.ndarray) -> dict[str, Callable[[], Any]]:
    """Return torch's way, if it is installed."""
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch

    tensor = torch.from_numpy(weights)

    def by_top_k() -> Any:
        groups = tensor.abs().reshape(-1, 4)
        kept = groups.topk(2, dim=1).indices
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, kept, True).reshape(tensor.shape)

    return {"torch reshape, topk": by_top_k}


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, measure, show tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000_000, 10_000_000], help="numbers of weights")
    parser.add_argument("--repeats", type=int, default=9, help="rounds")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(arguments)
    console, results = Console(), []
    for size in options.sizes:
        rows = -(-size // (4 * COLUMNS)) * 4
        weights = np.random.default_rng(0).normal(size=(rows, COLUMNS)).astype(np.float32)
        params = {"kernel": jnp.asarray(weights)}
        make = jax.jit(lambda params: jaxprune.make_masks(params, 2, rule=rules.n_m(4)))
        runs = {
            "elementwise pass": lambda params=params: jax.block_until_ready(elementwise(params["kernel"], 1.0)),
            "make_masks, n_m(4)": lambda params=params, make=make: jax.block_until_ready(make(params)),
            "NumPy argpartition": lambda weights=weights: by_partitioning(weights),
            **of_torch(weights),
        }
        found = timing.compare(runs, options.repeats)
        needed = make.lower(params).compile().memory_analysis().temp_size_in_bytes / weights.nbytes
        console.print(timing.table(f"2:4 masks of {weights.size:,} weights", found))
        console.print(f"temporary memory of n_m(4): {needed:.4f} times the weights")
        results.append({"size": weights.size, "rows": [row._asdict() for row in found], "memory": needed})
    timing.write_json(options.json, results)


if __name__ == "__main__":
    main()
