"""What storing a pruned model costs: time beside plain safetensors, bytes beside the entropy of masks and values.

    python -m benchmarks.storage --megabytes 256

The model is Gaussian matrices in float32, pruned by magnitude. Speeds are of dense bytes: how fast a model of that size
in memory is stored or read. `save_sparse` waits until the disk has the file; safetensors does not. The bound is what an
ideal code of independent bits and values would take: for each matrix the entropy of its mask, and that of its codes'
histogram for quantised values (float32 values are taken as incompressible); scales and biases count in full.
"""

import argparse
import functools
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from rich.console import Console
from rich.table import Table

import jaxprune
from benchmarks import timing
from jaxprune import rules
from jaxprune.storage._container import TensorFile

ROWS, COLUMNS = 1024, 2048
WAYS: dict[str, dict[str, Any]] = {
    "float32": {},
    "int8": {"quantize": 8},
    "int4": {"quantize": 4},
    "float32, zstd": {"compress": True},
    "int8, zstd": {"quantize": 8, "compress": True},
    "int4, zstd": {"quantize": 4, "compress": True},
}


def make_model(megabytes: int, sparsity: float, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make Gaussian matrices of about so many megabytes, and their masks."""
    rng = np.random.default_rng(seed)
    count = max(1, round(1e6 * megabytes / (4 * ROWS * COLUMNS)))
    params = {f"layer_{i}": {"kernel": rng.standard_normal((ROWS, COLUMNS), np.float32)} for i in range(count)}
    masks = jaxprune.make_masks(params, sparsity, rule=rules.layer_sparsity)
    return jaxprune.apply_masks(params, masks), masks


def entropy_bytes(counts: np.ndarray) -> float:
    """Return the bytes that an ideal code takes for independent symbols with these counts."""
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


def bound(path: Path) -> float:
    """Return the bytes that the masks and values in a file are worth, by their entropies."""
    total = 0.0
    with TensorFile(path) as file:
        for name, entry in file.entries.items():
            stem, _, part = name.rpartition(".")
            data = file.read(name).reshape(-1)
            if part == "bitmask":
                ones, size = int(np.bitwise_count(data).sum()), math.prod(file.read(f"{stem}.shape").tolist())
                total += entropy_bytes(np.array([ones, size - ones]))
            elif part == "compressed" and entry.dtype == np.int8:
                total += entropy_bytes(np.bincount(data.view(np.uint8), minlength=256))
            elif part == "compressed" and entry.dtype == np.uint8:
                total += entropy_bytes(np.bincount(np.concatenate([data & 15, data >> 4]), minlength=16))
            elif part not in ("shape", "row_offsets"):
                total += data.nbytes
    return total


def speeds(folder: Path, params: Any, masks: Any, repeats: int) -> dict[str, list[timing.Row]]:
    """Time saving and loading in every uncompressed way, beside safetensors with the dense arrays."""
    flat = {name: np.asarray(layer["kernel"]) for name, layer in params.items()}
    params, masks = jax.tree.map(np.asarray, (params, masks))
    saving: dict[str, Callable[[], Any]] = {
        "safetensors, dense": lambda: safetensors.numpy.save_file(flat, folder / "plain"),
        "save_sparse, dense": lambda: jaxprune.save_sparse(folder / "dense", params, force=True),
    }
    loading: dict[str, Callable[[], Any]] = {
        "safetensors, dense": lambda: safetensors.numpy.load_file(folder / "plain"),
        "load_sparse, dense": lambda: jax.block_until_ready(jaxprune.load_sparse(folder / "dense")),
    }
    for way, options in WAYS.items():
        if way in ("float32, zstd", "int4, zstd"):
            continue  # alike in time to "int8, zstd"
        path = folder / way
        saving[f"save_sparse, {way}"] = functools.partial(
            jaxprune.save_sparse, path, params, masks, **options, force=True
        )
        loading[f"load_sparse, {way}"] = lambda path=path: jax.block_until_ready(jaxprune.load_sparse(path))
    # A round of saving comes first: it writes what is loaded.
    return {
        "save": timing.compare(saving, repeats),
        "load": timing.compare(loading, repeats),
    }


def sizes(folder: Path, params: Any, masks: Any) -> list[dict[str, Any]]:
    """Return for every way the bytes of a file, and its bound."""
    found = []
    for way, options in WAYS.items():
        saved = jaxprune.save_sparse(folder / "m", params, masks, **options, force=True)
        least = bound(folder / "m")
        found.append(
            {
                "way": way,
                "bytes": saved.bytes,
                "bound": least,
                "excess": saved.bytes / least - 1,
                "compression": saved.compression,
                "bits": 8 * saved.bytes / sum(row.size for row in saved.tensors),
            }
        )
    return found


def _size_table(sparsity: float, rows: Sequence[dict[str, Any]]) -> Table:
    shown = Table(title=f"bytes, {sparsity:.0%} pruned", title_justify="left")
    shown.add_column("values")
    for heading in ("bytes", "times smaller", "bits a weight", "entropy bound", "above it"):
        shown.add_column(heading, justify="right")
    for row in rows:
        shown.add_row(
            row["way"],
            f"{row['bytes']:,}",
            f"{row['compression']:.2f}",
            f"{row['bits']:.3f}",
            f"{row['bound']:,.0f}",
            f"{row['excess']:.1%}",
        )
    return shown


def _speed_table(title: str, dense_bytes: int, rows: Sequence[timing.Row]) -> Table:
    shown = Table(title=f"{title}, {dense_bytes / 1e6:.0f} MB dense", title_justify="left")
    shown.add_column("variant")
    for heading in ("MB/s", "time ratio", "MB/s of CPU time", "CPU ratio"):
        shown.add_column(heading, justify="right")
    for row in rows:
        rates = (f"{dense_bytes / 1e6 / seconds:,.0f}" for seconds in (row.wall, row.cpu))
        wall, cpu = rates
        shown.add_row(row.variant, wall, f"{row.wall_ratio:.2f}", cpu, f"{row.cpu_ratio:.2f}")
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, measure, show tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=64, help="of dense weights")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.8, 0.9, 0.95])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write every number here")
    options = parser.parse_args(arguments)
    console = Console()
    results = []
    for sparsity in options.sparsities:
        params, masks = make_model(options.megabytes, sparsity)
        dense_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        with tempfile.TemporaryDirectory() as folder:
            found = sizes(Path(folder), params, masks)
            console.print(_size_table(sparsity, found))
            timed = speeds(Path(folder), params, masks, options.repeats)
        for title, rows in timed.items():
            console.print(_speed_table(f"{title}, {sparsity:.0%} pruned", dense_bytes, rows))
        results.append(
            {
                "sparsity": sparsity,
                "dense_bytes": dense_bytes,
                "sizes": found,
                **{title: [row._asdict() for row in rows] for title, rows in timed.items()},
            }
        )
    timing.write_json(options.json, results)


if __name__ == "__main__":
    main()
