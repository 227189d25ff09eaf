"""What `make_masks` costs by its default rule: time against the one-liner that promises less, and memory.

    python -m benchmarks.masks --sizes 1_000_000 10_000_000 100_000_000

Weights lie in 50 kernels, as in a network of some size. The one-liner, ``abs(w) >= k * std(w)`` for each leaf, has no
guard for layers that a threshold would empty, and loses a layer to one NaN.
"""

import argparse
import importlib.util
import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import jaxprune
from benchmarks import timing

LEAVES, COLUMNS = 50, 4_000
K = 1.0


def weights(size: int) -> dict[str, dict[str, np.ndarray]]:
    """Draw about `size` normal float32 weights as 50 kernels of up to 4,000 columns."""
    draw = np.random.default_rng(0).standard_normal
    columns = min(COLUMNS, size // LEAVES)
    shape = (size // LEAVES // columns, columns)
    return {f"dense_{i}": {"kernel": draw(shape, np.float32)} for i in range(LEAVES)}


def one_liner(params: Any, k: Any) -> Any:
    """Compare with k standard deviations, leaf by leaf, and promise nothing."""
    return jax.tree.map(lambda w: jnp.abs(w) >= k * jnp.std(w), params)


def variants(params: Any, k: float) -> dict[str, Callable[[], Any]]:
    """Return the ways to make masks of these weights; the one-liner under jit comes first."""
    arrays, strength = jax.tree.map(jnp.asarray, params), jnp.float32(k)
    plain, masks = jax.jit(one_liner), jax.jit(jaxprune.make_masks)
    found: dict[str, Callable[[], Any]] = {
        "one-liner, jit": lambda: jax.block_until_ready(plain(arrays, strength)),
        "make_masks, jit": lambda: jax.block_until_ready(masks(arrays, strength)),
        "make_masks, no jit": lambda: jax.block_until_ready(jaxprune.make_masks(arrays, k)),
        "one-liner, NumPy": lambda: jax.tree.map(lambda w: np.abs(w) >= k * np.std(w), params),
    }
    if importlib.util.find_spec("torch") is not None:
        import torch

        tensors = jax.tree.map(torch.from_numpy, params)
        found["one-liner, torch"] = lambda: jax.tree.map(lambda w: w.abs() >= k * w.std(correction=0), tensors)
    return found


def compiled_bytes(params: Any) -> tuple[int, int]:
    """Return the bytes of temporaries and of outputs of `make_masks` under jit, by XLA's account."""
    shapes = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), params)
    analysis = jax.jit(jaxprune.make_masks).lower(shapes, jnp.float32(K)).compile().memory_analysis()
    return analysis.temp_size_in_bytes, analysis.output_size_in_bytes


def resident_growth(size: int) -> int:
    """Return by how many bytes a fresh process grows at most while it makes masks without jit, the masks included."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_resident_growth, (size,))


def _resident_growth(size: int) -> int:
    params = jax.tree.map(jnp.asarray, weights(size))
    jax.block_until_ready(jaxprune.make_masks({"dense_0": params["dense_0"]}, K))  # compiles for all
    before = _memory("VmRSS")
    masks = jax.block_until_ready(jaxprune.make_masks(params, K))
    peak = _memory("VmHWM")
    del masks
    return peak - before


def _memory(field: str) -> int:
    # Not getrusage: its maximum is inherited from the parent process.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def measure(size: int, repeats: int, console: Console) -> dict[str, Any]:
    """Measure one size, show it, and return the results."""
    params = weights(size)
    count = sum(w.size for w in jax.tree.leaves(params))
    runs = variants(params, K)
    kept = {name: sum(int(mask.sum()) for mask in jax.tree.leaves(run())) for name, run in runs.items()}
    rows = timing.compare(runs, repeats)
    console.print(timing.table(f"masks of {count:,} float32 weights in {LEAVES} leaves", rows))
    temporaries, outputs = compiled_bytes(params)
    memory = {
        "jit, temporaries": temporaries / count,
        "jit, masks": outputs / count,
    }
    if Path("/proc/self/status").exists():
        memory["no jit, growth of the process"] = resident_growth(size) / count
    shown = Table("memory", "bytes per weight", title_justify="left")
    for name, value in memory.items():
        shown.add_row(name, f"{value:.4f}")
    console.print(shown)
    return {"weights": count, "kept": kept, "rows": [row._asdict() for row in rows], "memory": memory}


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, measure every size, show tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**6, 10**7, 10**8], help="numbers of weights")
    parser.add_argument("--repeats", type=int, default=15, help="rounds")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(arguments)
    if min(options.sizes) < LEAVES:
        parser.error(f"--sizes must be at least {LEAVES}, one weight a leaf")
    console = Console()
    timing.write_json(options.json, [measure(size, options.repeats, console) for size in options.sizes])


if __name__ == "__main__":
    main()
