"""Which experts of a mixture to keep: REAP, frequency, chance, dropped or merged, without training afterwards.

    python -m benchmarks.experts

A byte-level transformer whose perceptrons are mixtures (8 experts, 2 for each byte) is trained on the sources of the standard library.
Then a share of the experts of every layer goes, by what `structured.expert_use` measures on text that it was trained on, and bits per
byte are measured on text of other files. Merged: an expert that stays becomes the mean of its own kernels and of those that go and
whose router is nearest to its own, weighted by the tokens that each was sent; the routers are those of the experts that stay.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _support import text
from rich.console import Console
from rich.table import Table

from benchmarks import timing
from jaxprune import structured

VOCABULARY, CONTEXT, BATCH_SIZE, TAKEN, HEADS = 256, 128, 16, 2, 4
CALIBRATION_SEED, TEST_SEED = 1, 2


def init(key: jax.Array, layers: int, width: int, experts: int) -> Any:
    """Make parameters; those of the layers are stacked."""
    shapes = {
        "attention": (layers, width, 3 * width),
        "out": (layers, width, width),
        "router": (layers, width, experts),
        "up": (layers, experts, width, width),
        "down": (layers, experts, width, width),
        "embed": (VOCABULARY, width),
        "position": (CONTEXT, width),
        "head": (width, VOCABULARY),
    }
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.normal(key, shape) / math.sqrt(shape[-2] if name not in ("embed", "position") else width)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def norm(x: jax.Array) -> jax.Array:
    """Divide by the root of the mean square."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)


def mixture(layer: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Send each byte to the best experts; return what they add, and how unevenly they are used."""
    scores = jax.nn.softmax(x @ layer["router"])
    weights, experts = jax.lax.top_k(scores, TAKEN)
    weights /= jnp.sum(weights, -1, keepdims=True)
    count = layer["router"].shape[1]
    routed = jnp.sum(jax.nn.one_hot(experts, count) * weights[..., None], -2)
    hidden = jax.nn.gelu(jnp.einsum("btd,edf->btef", x, layer["up"]))
    uneven = count * jnp.sum(jnp.mean(routed, (0, 1)) * jnp.mean(scores, (0, 1)))
    return jnp.einsum("bte,btef,efd->btd", routed, hidden, layer["down"]), uneven


def forward(params: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Map bytes [batch, time] to logits of the next ones, and the mean unevenness of the mixtures."""
    names = ("attention", "out", "router", "up", "down")
    x = params["embed"][tokens] + params["position"][None, : tokens.shape[1]]

    def layer(x: jax.Array, layer: Any) -> tuple[jax.Array, jax.Array]:
        parts = jnp.split(norm(x) @ layer["attention"], 3, -1)
        query, key, value = (part.reshape(*part.shape[:2], HEADS, -1) for part in parts)
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + mixed.reshape(x.shape) @ layer["out"]
        added, uneven = mixture(layer, norm(x))
        return x + added, uneven

    x, uneven = jax.lax.scan(layer, x, {name: params[name] for name in names})
    return norm(x) @ params["head"], jnp.mean(uneven)


def logits(params: Any, tokens: jax.Array) -> jax.Array:
    """The logits alone."""
    return forward(params, tokens)[0]


def cross_entropy(found: jax.Array, windows: jax.Array) -> jax.Array:
    """The mean cross-entropy of the windows' next bytes, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(found, windows[:, 1:]).mean()


def train(params: Any, data: np.ndarray, steps: int, seed: int) -> Any:
    """Train by Adam with a cosine schedule."""
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.warmup_cosine_decay_schedule(0.0, 3e-3, min(50, steps // 4), steps)),
    )

    def loss(params: Any, windows: jax.Array) -> jax.Array:
        found, uneven = forward(params, windows[:, :-1])
        return cross_entropy(found, windows) + 0.01 * uneven

    @jax.jit
    def step(params: Any, state: Any, windows: jax.Array) -> Any:
        updates, state = tx.update(jax.grad(loss)(params, windows), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for place in np.random.default_rng(seed).integers(2**31, size=steps):
        params, state = step(params, state, text.windows(data, BATCH_SIZE, CONTEXT, int(place)))
    return params


def merged(params: Any, plan: Any, use: Any) -> Any:
    """Take the mean of experts that stay and those that go and whose router is nearest."""
    kept = plan.kept["router"][2]
    params = dict(params)
    for name in ("up", "down"):
        leaf = np.array(params[name])
        for layer, stays in enumerate(kept):
            routers = np.array(params["router"][layer]).T
            routers /= np.linalg.norm(routers, axis=1, keepdims=True)
            home = np.asarray(stays)[np.argmax(routers @ routers[list(stays)].T, 1)]
            home[list(stays)] = stays
            tokens, old = np.array(use.tokens[layer]) + 1e-6, leaf[layer].copy()
            for expert in stays:
                leaf[layer, expert] = np.average(old[home == expert], axis=0, weights=tokens[home == expert])
        params[name] = jnp.asarray(leaf)
    return params


def run_seed(seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Train one network; drop and merge its experts."""
    sources, began = text.load(), time.process_time()
    params = train(
        init(jax.random.key(seed), options.layers, options.width, options.experts), sources.train, options.steps, seed
    )
    trained = time.process_time() - began
    windows = text.windows(sources.train, 4 * BATCH_SIZE, CONTEXT, CALIBRATION_SEED)
    batches = [jnp.asarray(windows[i : i + BATCH_SIZE, :-1]) for i in range(0, len(windows), BATCH_SIZE)]
    held_out = text.windows(sources.test, options.windows, CONTEXT, TEST_SEED)

    @jax.jit
    def loss(params: Any, windows: jax.Array) -> jax.Array:
        return cross_entropy(logits(params, windows[:, :-1]), windows)

    def quality(params: Any) -> float:
        parts = np.array_split(held_out, max(1, len(held_out) // BATCH_SIZE))
        return float(np.average([loss(params, part) for part in parts], weights=list(map(len, parts)))) / math.log(2)

    graph = structured.trace(logits, params, batches[0])
    ((name, use),) = structured.expert_use(graph, params, batches).items()
    chance = [jax.random.uniform(jax.random.key(n), use.tokens.shape) for n in range(3)]
    ways: dict[str, tuple[Sequence[Any], Callable[[Any, Any], Any]]] = {
        "random": (chance, lambda params, plan: params),
        "frequency": ([use.tokens], lambda params, plan: params),
        "frequency, merged": ([use.tokens], lambda params, plan: merged(params, plan, use)),
        "REAP": ([use.reap], lambda params, plan: params),
        "REAP, merged": ([use.reap], lambda params, plan: merged(params, plan, use)),
    }
    common = {"seed": seed, "dense": quality(params), "trained_cpu": trained}
    rows = []
    for k in options.sparsities:
        for way, (scores, change) in ways.items():
            plans = [structured.select_experts(graph, {name: score}, k) for score in scores]
            found = [quality(structured.shrink(plan, change(params, plan))) for plan in plans]
            rows.append({**common, "way": way, "k": k, "bits_per_byte": statistics.mean(found)})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Show the means over the seeds."""
    dense = statistics.mean({row["seed"]: row["dense"] for row in rows}.values())
    shown = Table("experts that stay by", title=f"bits per byte; all experts {dense:.3f}", title_justify="left")
    shares = sorted({row["k"] for row in rows})
    for k in shares:
        shown.add_column(f"{100 * k:g} % removed", justify="right")
    for way in dict.fromkeys(row["way"] for row in rows):
        means = [
            statistics.mean(row["bits_per_byte"] for row in rows if (row["way"], row["k"]) == (way, k)) for k in shares
        ]
        shown.add_row(way, *(f"{mean:.3f}" for mean in means))
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, run every seed, show the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=600, help="of training, each on 2,048 bytes")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--windows", type=int, default=256, help="of text to measure with")
    parser.add_argument("--json", type=Path, help="write every number here")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        rows += run_seed(seed, options)
        timing.write_json(options.json, rows)
    Console(width=100).print(table(rows))


if __name__ == "__main__":
    main()
