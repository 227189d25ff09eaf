"""From which sparsity on compressed rows beat a dense matrix on this machine, for one vector and for several at once.

    python -m benchmarks.bcsr

Times are of ``x @ kernel`` under jit in float32: dense (zeros included), `multiply_bcsr`, and the BCSR of jax itself
without padding to several vectors. The break-even is the lowest of the measured sparsities from which on compressed rows
take less time than the dense product. It says nothing about other machines: measure yours.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxprune
from benchmarks import timing
from jaxprune import rules, storage

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)


def measure(size: int, batch: int, sparsity: float, repeats: int) -> dict[str, Any]:
    """Time the three products for one matrix, `size` by `size`."""
    rng = np.random.default_rng(0)
    params = {"kernel": rng.standard_normal((size, size), np.float32)}
    masks = jaxprune.make_masks(params, sparsity, rule=rules.layer_sparsity)
    dense = jaxprune.apply_masks(params, masks)["kernel"]
    sparse = storage.to_bcsr(params, masks)["kernel"]
    x = jnp.asarray(rng.standard_normal((batch, size), np.float32))
    products = {
        "dense": (jax.jit(jnp.matmul), dense),
        "multiply_bcsr": (jax.jit(storage.multiply_bcsr), sparse),
        "BCSR of jax": (jax.jit(lambda x, matrix: (matrix @ x.T).T), sparse),
    }
    calls = {
        name: lambda product=product, matrix=matrix: jax.block_until_ready(product(x, matrix))
        for name, (product, matrix) in products.items()
    }
    rows = timing.compare(calls, repeats)
    return {"size": size, "batch": batch, "sparsity": sparsity, "rows": [row._asdict() for row in rows]}


def break_even(results: Sequence[dict[str, Any]]) -> float | None:
    """Return the lowest sparsity from which on compressed rows are faster, of results in rising order; None if none."""
    lowest = None
    for result in reversed(results):
        (ratio,) = (row["cpu_ratio"] for row in result["rows"] if row["variant"] == "multiply_bcsr")
        if ratio >= 1:
            break
        lowest = result["sparsity"]
    return lowest


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, measure, show tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2048, help="inputs and outputs of the matrix")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128], help="vectors at once")
    parser.add_argument("--sparsities", type=float, nargs="+", default=list(SPARSITIES), help="rising")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write every number here")
    options = parser.parse_args(arguments)
    console, found = Console(), []
    for batch in options.batches:
        results = [
            measure(options.size, batch, sparsity, options.repeats)
            for sparsity in track(options.sparsities, f"batch {batch}", console=console, transient=True)
        ]
        lowest = break_even(results)
        verdict = "no break-even" if lowest is None else f"break-even at {lowest:.0%} or below"
        table = Table(title=f"{options.size} x {options.size}, {batch} vectors: {verdict}", title_justify="left")
        for heading in ("sparsity", *(row["variant"] for row in results[0]["rows"])):
            table.add_column(heading, justify="right")
        for result in results:
            times = (f"{1e3 * row['cpu']:.2f} ms ({row['cpu_ratio']:.2f})" for row in result["rows"])
            table.add_row(f"{result['sparsity']:.0%}", *times)
        console.print(table)
        found.append({"batch": batch, "break_even": lowest, "results": results})
    timing.write_json(options.json, found)


if __name__ == "__main__":
    main()
