"""What exact selection by counting costs beside sorting, partitioning and one pass of counting.

    python -m benchmarks.selection --sizes 1_000_000 10_000_000 100_000_000

At 90 % sparsity, by magnitude: one array; 50 leaves, each by its own threshold; 50 leaves by one threshold. NumPy, the
sort and torch leave equal weights where they happen to lie; `keep_largest` keeps the lower index. The counting pass is
the cheapest there is on XLA's CPU backend: two counts as one reduction over rows (one sum takes ten times as long).
"""

import argparse
import functools
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.console import Console
from rich.table import Table

from benchmarks import timing
from jaxprune._selection import _counts
from jaxprune._selection._largest import keep_largest, keep_largest_jointly

LEAVES, COLUMNS, SPARSITY = 50, 1_600, 0.9
# As `make_masks` calls it: layers of one shape are alike.
select_jointly = functools.partial(keep_largest_jointly, magnitude=True, kinds=("layer",) * LEAVES)


@jax.jit
def counting_pass(weights: jax.Array, threshold: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Count the magnitudes below a threshold and the next number, by their bit patterns."""
    sizes, bits = (lax.bitcast_convert_type(x, jnp.int32) for x in (weights, threshold))
    sizes = (sizes & jnp.int32(2**31 - 1)).reshape(32, -1)
    ones = tuple((sizes < bound).astype(jnp.uint32) for bound in (bits, bits + 1))
    zero = jnp.uint32(0)
    rows = lax.reduce(ones, (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), (1,))
    return jnp.sum(rows[0]), jnp.sum(rows[1])


@jax.jit
def by_sorting(weights: jax.Array) -> jax.Array:
    """Mask by the threshold that a full sort finds."""
    sizes = jnp.abs(weights)
    return sizes >= jnp.sort(sizes.ravel())[round(SPARSITY * sizes.size)]


def by_partitioning(weights: np.ndarray) -> np.ndarray:
    """Mask by the threshold that NumPy's partition finds."""
    sizes = np.abs(weights)
    k = round(SPARSITY * sizes.size)
    return sizes >= np.partition(sizes.ravel(), k)[k]


def by_partitioning_jointly(leaves: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Mask by the threshold that NumPy's partition finds among all leaves, joined."""
    sizes = [np.abs(leaf) for leaf in leaves]
    joined = np.concatenate([leaf.ravel() for leaf in sizes])
    k = round(SPARSITY * joined.size)
    threshold = np.partition(joined, k)[k]
    return [leaf >= threshold for leaf in sizes]


def of_torch(weights: np.ndarray, leaves: Sequence[np.ndarray]) -> tuple[dict[str, Callable[[], Any]], ...]:
    """Return torch's ways, if it is installed: for one array, for each leaf, for all leaves."""
    if importlib.util.find_spec("torch") is None:
        return {}, {}, {}
    import torch
    from torch.nn.utils import prune

    def layer(array: np.ndarray) -> Any:
        module = torch.nn.Module()
        module.weight = torch.nn.Parameter(torch.from_numpy(array), requires_grad=False)
        return module

    def l1(arrays: Sequence[np.ndarray]) -> None:
        for array in arrays:
            prune.l1_unstructured(layer(array), "weight", SPARSITY)

    def jointly() -> None:
        modules = [(layer(leaf), "weight") for leaf in leaves]
        prune.global_unstructured(modules, pruning_method=prune.L1Unstructured, amount=SPARSITY)

    def kthvalue() -> Any:
        sizes = torch.from_numpy(weights).abs()
        return sizes > torch.kthvalue(sizes.ravel(), round(SPARSITY * sizes.numel())).values

    return (
        {"torch.kthvalue": kthvalue, "torch l1_unstructured": lambda: l1([weights])},
        {"torch l1_unstructured": lambda: l1(leaves)},
        {"torch global_unstructured": jointly},
    )


def variants(size: int, sort: bool) -> dict[str, dict[str, Callable[[], Any]]]:
    """Return the ways to select, by task; every task starts with the counting pass."""
    rows = -(-size // (LEAVES * COLUMNS))
    weights = np.random.default_rng(0).standard_normal((LEAVES * rows, COLUMNS), np.float32) * np.float32(0.02)
    leaves = np.split(weights, LEAVES)
    array, arrays = jnp.asarray(weights), [jnp.asarray(leaf) for leaf in leaves]
    whole, part = (_counts.rounded(SPARSITY, x.size) for x in (array, arrays[0]))
    one, each, joint = of_torch(weights, leaves)
    wait = jax.block_until_ready
    first = {"one counting pass": lambda: wait(counting_pass(array, jnp.float32(0.03)))}
    sorts = {"jnp.sort": lambda: wait(by_sorting(array))} if sort else {}
    return {
        "one array": {
            **first,
            "keep_largest": lambda: wait(keep_largest(array, whole, magnitude=True)),
            "np.partition": lambda: by_partitioning(weights),
            **sorts,
            **one,
        },
        f"each of {LEAVES} leaves": {
            **first,
            "keep_largest": lambda: wait([keep_largest(leaf, part, magnitude=True) for leaf in arrays]),
            "np.partition": lambda: [by_partitioning(leaf) for leaf in leaves],
            **each,
        },
        f"{LEAVES} leaves jointly": {
            **first,
            "keep_largest_jointly": lambda: wait(select_jointly(arrays, whole)),
            "np.partition": lambda: by_partitioning_jointly(leaves),
            **joint,
        },
    }


def memory(size: int) -> dict[str, float]:
    """Return what the compiled programs need besides weights and masks, in units of the weights' bytes."""
    rows = -(-size // (LEAVES * COLUMNS))
    leaf, array = (jax.ShapeDtypeStruct((n * rows, COLUMNS), jnp.float32) for n in (1, LEAVES))
    count = _counts.from_int(1)
    programs = {
        "one array": jax.jit(lambda x: keep_largest(x, count, magnitude=True)).lower(array),
        f"{LEAVES} leaves jointly": jax.jit(lambda x: select_jointly(x, count)).lower([leaf] * LEAVES),
        "jnp.sort": by_sorting.lower(array),
    }
    weights = 4 * array.size
    return {
        name: program.compile().memory_analysis().temp_size_in_bytes / weights for name, program in programs.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, measure, show tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000_000, 10_000_000], help="numbers of weights")
    parser.add_argument("--repeats", type=int, default=9, help="rounds")
    parser.add_argument("--sort-up-to", type=int, default=1_000_000, help="largest size for jnp.sort (10 M: a second)")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(arguments)
    console, results = Console(), []
    for size in options.sizes:
        for task, runs in variants(size, size <= options.sort_up_to).items():
            rows = timing.compare(runs, options.repeats)
            console.print(timing.table(f"{size:,} weights, {task}", rows))
            results.append({"size": size, "task": task, "rows": [row._asdict() for row in rows]})
        needed = memory(size)
        shown = Table("program", "temporary memory / weights", title=f"{size:,} weights", title_justify="left")
        for name, ratio in needed.items():
            shown.add_row(name, f"{ratio:.4f}")
        console.print(shown)
        results.append({"size": size, "task": "memory", "ratios": needed})
    timing.write_json(options.json, results)


if __name__ == "__main__":
    main()
