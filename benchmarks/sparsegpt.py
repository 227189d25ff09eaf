"""What SparseGPT costs beside a plain implementation in torch, on the same cores, and the two steps around it.

    python -m benchmarks.sparsegpt
    python -m benchmarks.sparsegpt --smollm2      # two matrices of a real language model; needs its packages

Square layers of correlated inputs, masks chosen for 128 inputs at a time as published, the damped Gram matrix
factorised each time. torch follows the paper's algorithm 1: an upper Cholesky factor of the inverse, columns one by one,
errors handed on lazily after 128 of them. Both lose the same number of weights; the losses are reported.
"""

import argparse
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import jaxprune
from benchmarks import timing
from jaxprune import rules
from jaxprune.oneshot import _admm, _reconstruct, _sparsegpt
from jaxprune.oneshot._pattern import read_pattern
from jaxprune.rules._rule import Rule

BLOCK, DAMPING = 128, 0.01
# rule, strength
PATTERNS: dict[str, tuple[Rule, Any]] = {"50 %": (rules.layer_sparsity, 0.5), "2:4": (rules.n_m(4), 2)}


def problem(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return weights and the Gram matrix of inputs that depend on each other."""
    rng = np.random.default_rng(0)
    mixing = np.eye(size) + 0.5 * rng.standard_normal((size, size)) / np.sqrt(size)
    data = (rng.standard_normal((2 * size, size)) @ mixing).astype(np.float32)
    return rng.standard_normal((size, size)).astype(np.float32), data.T @ data


def of_smollm2() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield weights of SmolLM2-135M with the Gram matrices of their inputs on 32 windows of text."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    from smollm2 import load

    model = load(scan=True)
    windows = model.windows("train", 32, 256, seed=0)
    grams = jaxprune.calibrate_grams(model.hidden, model.params, windows.reshape(-1, 4, 256))
    for name in ("q_proj", "down_proj"):
        (site,) = grams.sites.at(f"layers/{name}/kernel")
        weights = np.array(model.params["layers"][name]["kernel"][15])
        yield (
            f"layer 15 of SmolLM2, {name}, {weights.shape[0]} x {weights.shape[1]}",
            weights,
            np.array(grams.of(site)[15]),
        )


def loss(found: np.ndarray, weights: np.ndarray, gram: np.ndarray) -> float:
    """Return the squared error of the layer's outputs, relative to the outputs."""
    difference = (found - weights).astype(np.float64)
    return float(np.sum(difference * (gram @ difference)) / np.sum(weights * (gram @ weights)))


def of_torch(weights: Any, gram: Any, pattern: str) -> Any:
    """Prune torch weights [outputs, inputs] by the paper's algorithm."""
    import torch

    weights, gram = weights.clone(), gram.clone()
    size = len(gram)
    gram.diagonal().add_(DAMPING * gram.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    root = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, size, BLOCK):
        end = min(start + BLOCK, size)
        block, corner = weights[:, start:end].clone(), root[start:end, start:end]
        errors = torch.zeros_like(block)
        pivots = corner.diagonal()
        if pattern == "2:4":
            mask = torch.ones_like(block, dtype=torch.bool)
        else:
            scores = (block / pivots) ** 2
            threshold = scores.flatten().sort().values[scores.numel() // 2]
            mask = scores >= threshold
        for j in range(end - start):
            if pattern == "2:4" and j % 4 == 0:
                scores = (block[:, j : j + 4] / pivots[j : j + 4]) ** 2
                mask[:, j : j + 4].scatter_(1, scores.topk(2, dim=1, largest=False).indices, False)
            error = torch.where(mask[:, j], 0.0, block[:, j]) / pivots[j]
            block[:, j:] -= error[:, None] * corner[j, j:]
            errors[:, j] = error
        weights[:, start:end] = block * mask
        weights[:, end:] -= errors @ root[start:end, end:]
    return weights


def variants(
    weights: np.ndarray, gram: np.ndarray, pattern: str
) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """Return the ways to prune a layer, and the loss of each."""
    rule, k = PATTERNS[pattern]
    chosen = read_pattern(rule, "sparsegpt")
    strength = chosen.strength(k, "kernel", jnp.asarray(weights)[None])
    operands = jnp.asarray(weights)[None], jnp.asarray(gram)[None], strength, DAMPING
    sparsegpt = functools.partial(
        _sparsegpt._prune, pattern=chosen, mask_block=BLOCK if chosen.counts else chosen.group, block=BLOCK
    )
    admm = functools.partial(_admm._prune, pattern=chosen, steps=30)
    reconstruct = functools.partial(_reconstruct._reconstruct, steps=30)
    masks = sparsegpt(*operands).mask
    runs = {
        "jaxprune sparsegpt": lambda: jax.block_until_ready(sparsegpt(*operands).weights),
        "jaxprune reconstruct, 30 steps": lambda: jax.block_until_ready(
            reconstruct(*operands[:2], (masks, jnp.full(1, 2.0 * len(gram))), DAMPING).weights
        ),
        "jaxprune admm, 30 + 30 steps": lambda: jax.block_until_ready(admm(*operands).weights),
    }
    losses = {name: loss(np.asarray(run()[0]), weights, gram) for name, run in runs.items()}
    if importlib.util.find_spec("torch") is not None:
        import torch

        there = torch.from_numpy(weights.T.copy()), torch.from_numpy(gram)
        torch_run = functools.partial(of_torch, *there, pattern)
        losses["torch"] = loss(torch_run().numpy().T, weights, gram)
        runs["torch"] = torch_run
    return runs, losses


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, measure, show tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048], help="inputs and outputs of the layer")
    parser.add_argument("--smollm2", action="store_true", help="two matrices of SmolLM2-135M in place of --sizes")
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=list(PATTERNS), metavar="PATTERN")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--torch-threads", type=int, help="all cores unless given; on busy cores its threads wait")
    parser.add_argument("--only-sparsegpt", action="store_true", help="leave out reconstruct and admm")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(arguments)
    if options.torch_threads is not None:
        import torch

        torch.set_num_threads(options.torch_threads)
    console, results = Console(), []
    problems = of_smollm2() if options.smollm2 else ((f"{n} x {n}", *problem(n)) for n in options.sizes)
    for title, weights, gram in problems:
        for pattern in options.patterns:
            runs, losses = variants(weights, gram, pattern)
            if options.only_sparsegpt:
                runs = {name: run for name, run in runs.items() if name in ("jaxprune sparsegpt", "torch")}
            rows = timing.compare(runs, options.repeats)
            console.print(timing.table(f"{title}, {pattern}", rows))
            console.print("relative loss: " + ", ".join(f"{name} {losses[name]:.5f}" for name in runs))
            results.append(
                {"matrix": title, "pattern": pattern, "losses": losses, "rows": [row._asdict() for row in rows]}
            )
    timing.write_json(options.json, results)


if __name__ == "__main__":
    main()
