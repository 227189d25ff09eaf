"""What calibration costs: norms and Gram matrices against a plain forward pass, in time and in memory.

One batch through a transformer and through a convolutional network, everything compiled beforehand:

    python -m benchmarks.capture
    python -m benchmarks.capture --width 256 --layers 8 --json capture.json

A forward pass returns the model's outputs; a calibration step returns statistics only. Memory is what the compiled
program needs besides its arguments and results, as XLA plans it: where activations are kept, it grows with the layers.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from rich.console import Console

from benchmarks import timing
from jaxprune.sites._accumulate import grams, sums_of_squares
from jaxprune.sites._find import read


class Transformer(nn.Module):
    """A decoder over bytes, pre-norm, MLPs four times as wide."""

    layers: int
    width: int
    heads: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return logits ``[batch, length, 256]``."""
        x = nn.Embed(256, self.width)(tokens)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, tokens.shape[1], self.width))
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.layers):
            x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x), mask=mask)
            x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
        return nn.Dense(256)(nn.LayerNorm()(x))


class Convolutions(nn.Module):
    """Four convolutions of 3 x 3, two of them with stride 2, and a dense layer."""

    width: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Return logits ``[batch, 10]``."""
        x = images
        for features, stride in ((1, 1), (1, 2), (2, 1), (2, 2)):
            x = nn.relu(nn.Conv(self.width * features, (3, 3), strides=stride)(x))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


def measure(title: str, model: nn.Module, x: jax.Array, repeats: int, console: Console) -> dict[str, Any]:
    """Time a forward pass and both calibrations, print the table, and return the figures."""
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]

    def fn(params: Any, x: jax.Array) -> jax.Array:
        return model.apply({"params": params}, x)

    reading = read(fn, params, (x,))
    norms = set(reading.groups.values())
    products = {group for site in reading.sites if site.operation != "gather" for group in site.groups}
    programs = {
        "forward": jax.jit(fn).lower(params, x).compile(),
        "norms": _step(reading, sums_of_squares, norms).lower(params, x).compile(),
        "grams": _step(reading, grams, products).lower(params, x).compile(),
    }
    variants = {name: _run(program, params, x) for name, program in programs.items()}
    rows = timing.compare(variants, repeats)
    console.print(timing.table(title, rows))
    memory = {name: program.memory_analysis().temp_size_in_bytes / 1e6 for name, program in programs.items()}
    console.print("temporary memory, MB: " + ", ".join(f"{name} {size:.1f}" for name, size in memory.items()))
    console.print(f"{len(reading.sites)} sites, {len(products)} Gram matrices\n")
    return {"title": title, "rows": [row._asdict() for row in rows], "memory_mb": memory}


def _step(reading: Any, statistic: Callable[..., Any], groups: set[int]) -> Any:
    return jax.jit(lambda params, x: reading.run(jax.tree.leaves(params), [x], statistic, groups)[1])


def _run(program: Callable[..., Any], params: Any, x: jax.Array) -> Callable[[], Any]:
    return lambda: jax.block_until_ready(program(params, x))


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, measure, show the tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="of the transformer")
    parser.add_argument("--width", type=int, default=128, help="of the transformer")
    parser.add_argument("--batch", type=int, default=32, help="sequences, and images")
    parser.add_argument("--length", type=int, default=128, help="of a sequence")
    parser.add_argument("--repeats", type=int, default=15, help="rounds")
    parser.add_argument("--json", type=Path, help="write every number here")
    options = parser.parse_args(arguments)
    console = Console()
    keys = jax.random.split(jax.random.key(1))
    tokens = jax.random.randint(keys[0], (options.batch, options.length), 0, 256)
    images = jax.random.normal(keys[1], (options.batch, 32, 32, 3), jnp.float32)
    transformer = Transformer(options.layers, options.width, max(1, options.width // 32))
    results = [
        measure("transformer", transformer, tokens, options.repeats, console),
        measure("convolutions", Convolutions(32), images, options.repeats, console),
    ]
    timing.write_json(options.json, results)


if __name__ == "__main__":
    main()
