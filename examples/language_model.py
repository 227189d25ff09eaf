"""Prune a byte-level transformer by every one-shot method, and compare bits per byte.

    python examples/language_model.py

Trains a small transformer (Flax Linen) on the sources of the standard library, once; prunes the kernels of its blocks
with a few batches of training text for calibration, without retraining but for the method "ADMM, healed"; and measures bits
per byte on text of other files. Writes `results.json` and `bits_per_byte.png`, and keeps the trained models.
"""

import argparse
import functools
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _support import text
from _support.experiment import exit_code
from _support.language_figure import bits_per_byte
from _support.options import UsageError, add_names, count
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxprune
from jaxprune import rules, scores

CONTEXT, VOCABULARY = 128, 256
BATCH_SIZE, CALIBRATION_SEED, TEST_SEED, HEALING_SEED = 32, 1, 2, 3
HEALING_RATE = 1e-3


class Block(nn.Module):
    """Causal attention and a perceptron, each behind a norm and beside a shortcut."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [batch, time, width] to the same shape."""
        width = x.shape[-1]
        h = nn.LayerNorm(use_bias=False, name="attention_norm")(x)
        query, key, value = (
            nn.Dense(width, use_bias=False, name=name)(h).reshape(*h.shape[:-1], self.heads, -1)
            for name in ("query", "key", "value")
        )
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x += nn.Dense(width, use_bias=False, name="out")(mixed.reshape(h.shape))
        h = nn.LayerNorm(use_bias=False, name="mlp_norm")(x)
        h = nn.Dense(4 * width, use_bias=False, name="up")(h)
        return x + nn.Dense(width, use_bias=False, name="down")(jax.nn.gelu(h))


class Transformer(nn.Module):
    """A language model of bytes."""

    layers: int = 4
    width: int = 128
    heads: int = 4

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Map bytes [batch, time] to logits of the next ones, [batch, time, 256]."""
        x = nn.Embed(VOCABULARY, self.width, name="embed")(tokens)
        position = self.param("position", nn.initializers.normal(0.02), (CONTEXT, self.width))
        x += position[None, : x.shape[1]]
        for i in range(self.layers):
            x = Block(self.heads, name=f"block_{i}")(x)
        x = nn.LayerNorm(use_bias=False, name="norm")(x)
        return nn.Dense(VOCABULARY, use_bias=False, name="head")(x)


def in_blocks(path: str, leaf: Any) -> bool:
    """Say whether a leaf is pruned: the kernels of the blocks are, the embedding and the head stay dense."""
    return path.startswith("block_") and jaxprune.is_kernel(path, leaf)


class Model(NamedTuple):
    """A trained network with the text it is calibrated on, and the text that a pruned one may train on."""

    apply: Callable[[Any, jax.Array], jax.Array]
    params: Any
    batches: Sequence[jax.Array]  # int32 [batch, CONTEXT]
    healing: Sequence[np.ndarray] = ()  # int32 [batch, CONTEXT + 1]

    def loss(self, params: Any, window: jax.Array) -> jax.Array:
        """Return the mean cross-entropy of the windows' next bytes, in nats."""
        logits = self.apply(params, window[..., :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, window[..., 1:]).mean()


class Pattern(NamedTuple):
    """What to remove: a strength, and the rule that reads it."""

    name: str
    k: Any
    rule: Any
    by_unit: Any  # the same where every output unit is to lose as much


PATTERNS = (
    *(Pattern(f"{100 * k:g} %", k, rules.layer_sparsity, rules.row_sparsity) for k in (0.5, 0.6, 0.7)),
    *(Pattern(f"{n}:{m}", n, rules.n_m(m), rules.n_m(m)) for n, m in ((2, 4), (4, 8))),
)


class Evidence(NamedTuple):
    """What the methods know about the network's inputs and gradients, measured once."""

    norms: Any
    grams: Any
    squared_grads: Any


def measure(model: Model, windows: Sequence[jax.Array]) -> Evidence:
    """Calibrate on batches, and square the gradients of the windows' losses one by one."""

    def squared_grads(params: Any, batch: jax.Array) -> Any:
        grads = jax.lax.map(lambda window: jax.grad(model.loss)(params, window[None]), batch)
        return jax.tree.map(lambda g: jnp.mean(jnp.square(g), 0), grads)

    return Evidence(
        jaxprune.calibrate_norms(model.apply, model.params, model.batches),
        jaxprune.calibrate_grams(model.apply, model.params, model.batches),
        jaxprune.mean_over_batches(squared_grads, model.params, windows),
    )


Method = Callable[[Model, Evidence, Pattern], Any]


def magnitude(model: Model, evidence: Evidence, pattern: Pattern) -> Any:
    """Remove the smallest weights of every layer."""
    return jaxprune.apply_masks(model.params, _magnitude_masks(model, pattern))


def magnitude_reconstructed(model: Model, evidence: Evidence, pattern: Pattern) -> Any:
    """Remove the smallest weights, and give those that stay their best values."""
    return jaxprune.oneshot.reconstruct(model.params, _magnitude_masks(model, pattern), evidence.grams)


def _magnitude_masks(model: Model, pattern: Pattern) -> Any:
    return jaxprune.make_masks(model.params, pattern.k, rule=pattern.rule, prunable=in_blocks)


def wanda(model: Model, evidence: Evidence, pattern: Pattern) -> Any:
    """Remove the weights that contribute least to their unit's output."""
    found = scores.wanda(model.params, evidence.norms)
    masks = jaxprune.make_masks(model.params, pattern.k, rule=pattern.by_unit, scores=found, prunable=in_blocks)
    return jaxprune.apply_masks(model.params, masks)


def ria(model: Model, evidence: Evidence, pattern: Pattern) -> Any:
    """Remove the weights of the least relative importance."""
    found = scores.ria(model.params, evidence.norms)
    masks = jaxprune.make_masks(model.params, pattern.k, rule=pattern.by_unit, scores=found, prunable=in_blocks)
    return jaxprune.apply_masks(model.params, masks)


def published_sparsegpt(model: Model, evidence: Evidence, pattern: Pattern) -> Any:
    """SparseGPT with masks chosen for 128 inputs at a time."""
    block = None if pattern.rule is not rules.layer_sparsity else 128
    solve = functools.partial(jaxprune.oneshot.sparsegpt, rule=pattern.rule, mask_block=block, prunable=in_blocks)
    return solve(model.params, evidence.grams, pattern.k)[0]


def sparsegpt(model: Model, evidence: Evidence, pattern: Pattern) -> Any:
    """SparseGPT as jaxprune does it by default."""
    solve = functools.partial(jaxprune.oneshot.sparsegpt, rule=pattern.rule, prunable=in_blocks)
    return solve(model.params, evidence.grams, pattern.k)[0]


def admm(model: Model, evidence: Evidence, pattern: Pattern) -> Any:
    """ADMM with a mask that tightens."""
    return jaxprune.oneshot.admm(model.params, evidence.grams, pattern.k, rule=pattern.rule, prunable=in_blocks)[0]


def admm_swapped(model: Model, evidence: Evidence, pattern: Pattern) -> Any:
    """ADMM, then swaps of kept and pruned weights, priced with what makes up for them."""
    _, masks = jaxprune.oneshot.admm(model.params, evidence.grams, pattern.k, rule=pattern.rule, prunable=in_blocks)
    within = pattern.rule.m if pattern.rule.m > 1 else None
    return jaxprune.oneshot.swap_and_reconstruct(model.params, masks, evidence.grams, within=within).params


def admm_in_sequence(model: Model, evidence: Evidence, pattern: Pattern) -> Any:
    """ADMM layer by layer: each matches the dense network's outputs on the inputs that the pruned one gives it."""
    solve = functools.partial(jaxprune.oneshot.admm, k=pattern.k, rule=pattern.rule)
    return jaxprune.oneshot.sequential(model.apply, model.params, model.batches, solve, prunable=in_blocks)[0]


def admm_healed(model: Model, evidence: Evidence, pattern: Pattern) -> Any:
    """ADMM, then a few steps under its masks towards the dense network's predictions, on text that it was trained on."""
    solve = functools.partial(jaxprune.oneshot.admm, rule=pattern.rule, prunable=in_blocks)
    params, masks = solve(model.params, evidence.grams, pattern.k)
    steps = len(model.healing)
    rate = optax.warmup_cosine_decay_schedule(0.0, HEALING_RATE, steps // 10, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99))

    def distance(params: Any, window: jax.Array) -> jax.Array:
        student, teacher = (model.apply(weights, window[:, :-1]) for weights in (params, model.params))
        return jaxprune.distill.logit_loss(student, teacher, lambda logits: logits, lambda logits: logits)

    return jaxprune.transforms.heal(distance, params, masks, model.healing, optimizer).params


def admm_allocated(model: Model, evidence: Evidence, pattern: Pattern) -> Any:
    """ADMM in sequence, with the sparsity shared out among the layers by the diagonal of the Fisher information."""
    losses = scores.fisher(model.params, evidence.squared_grads)
    k = jaxprune.choose.allocate_by_loss(model.params, pattern.k, scores=losses, prunable=in_blocks)
    solve = functools.partial(jaxprune.oneshot.admm, k=k, rule=pattern.rule)
    return jaxprune.oneshot.sequential(model.apply, model.params, model.batches, solve, prunable=in_blocks)[0]


METHODS: dict[str, Method] = {
    "magnitude": magnitude,
    "Wanda": wanda,
    "RIA": ria,
    "SparseGPT, published": published_sparsegpt,
    "SparseGPT": sparsegpt,
    "magnitude, reconstructed": magnitude_reconstructed,
    "ADMM": admm,
    "ADMM, swapped": admm_swapped,
    "ADMM, sequential": admm_in_sequence,
    "ADMM, allocated": admm_allocated,
    "ADMM, healed": admm_healed,
}


def train(network: Transformer, data: np.ndarray, steps: int, seed: int, console: Console) -> Any:
    """Train from scratch with Adam and a cosine schedule; return the parameters."""
    model = Model(lambda params, tokens: network.apply({"params": params}, tokens), None, ())
    first = jnp.zeros((1, CONTEXT), jnp.int32)
    params = jax.jit(network.init)(jax.random.key(seed), first)["params"]
    rate = optax.warmup_cosine_decay_schedule(0.0, 3e-3, min(100, steps // 4), steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=0.01))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, windows: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(model.loss)(params, windows)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state = tx.init(params)
    places = np.random.default_rng(seed).integers(2**31, size=steps)
    for place in track(places, f"training, seed {seed}", console=console):
        params, state, _ = step(params, state, text.windows(data, BATCH_SIZE, CONTEXT, int(place)))
    return params


def trained(network: Transformer, data: np.ndarray, steps: int, seed: int, path: Path, console: Console) -> Any:
    """Return the parameters of an earlier run with the same settings, or train and keep them."""
    shape = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, CONTEXT), jnp.int32))["params"]
    if path.exists():
        try:
            return flax.serialization.from_bytes(shape, path.read_bytes())
        except ValueError as error:
            raise UsageError(f"{path} does not hold this network ({error}); choose another --out") from error
    params = train(network, data, steps, seed, console)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(flax.serialization.to_bytes(params))
    os.replace(temporary, path)
    return params


def evaluate(model: Model, params: Any, windows: np.ndarray) -> float:
    """Return bits per byte."""
    loss = jax.jit(model.loss)
    batches = [windows[start : start + BATCH_SIZE] for start in range(0, len(windows), BATCH_SIZE)]
    return float(np.average([loss(params, batch) for batch in batches], weights=list(map(len, batches)))) / math.log(2)


def run_seed(options: argparse.Namespace, data: text.Text, seed: int, console: Console) -> dict[str, Any]:
    """Train or load one network, prune it in every way, and return bits per byte by method and pattern."""
    network = Transformer(layers=1, width=32) if options.small else Transformer()
    name = f"seed-{seed}{'-small' if options.small else ''}-{options.steps}-steps.msgpack"
    params = trained(network, data.train, options.steps, seed, options.out / name, console)
    windows = text.windows(data.train, options.calibration, CONTEXT, CALIBRATION_SEED)
    chunks = [jnp.asarray(windows[start : start + BATCH_SIZE]) for start in range(0, len(windows), BATCH_SIZE)]
    places = np.random.default_rng(HEALING_SEED).integers(2**31, size=options.healing)
    model = Model(
        lambda params, tokens: network.apply({"params": params}, tokens),
        jax.tree.map(jnp.asarray, params),
        [chunk[:, :-1] for chunk in chunks],
        [text.windows(data.train, BATCH_SIZE, CONTEXT, int(place)) for place in places],
    )
    held_out = text.windows(data.valid if options.valid else data.test, options.windows, CONTEXT, TEST_SEED)
    evidence = measure(model, chunks)
    found: dict[str, Any] = {"seed": seed, "dense": evaluate(model, model.params, held_out), "methods": {}}
    runs = [(name, pattern) for name in options.methods for pattern in PATTERNS if pattern.name in options.patterns]
    for name, pattern in track(runs, f"pruning, seed {seed}", console=console):
        if name == "ADMM, allocated" and pattern.rule is not rules.layer_sparsity:
            continue
        pruned = METHODS[name](model, evidence, pattern)
        found["methods"].setdefault(name, {})[pattern.name] = evaluate(model, pruned, held_out)
    return found


def table(runs: Sequence[dict[str, Any]], patterns: Sequence[str]) -> Table:
    """Show bits per byte: the mean over the seeds."""
    dense = np.mean([run["dense"] for run in runs])
    shown = Table(
        "method", title=f"bits per byte, mean of {len(runs)} seed(s); dense {dense:.3f}", title_justify="left"
    )
    for pattern in patterns:
        shown.add_column(pattern, justify="right")
    for name, row in runs[0]["methods"].items():
        means = [np.mean([run["methods"][name][pattern] for run in runs]) for pattern in row]
        cells = dict(zip(row, (f"{mean:.3f}" for mean in means), strict=True))
        shown.add_row(name, *(cells.get(pattern, "") for pattern in patterns))
    return shown


def run(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, run every seed, show the table, write the results and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [pattern.name for pattern in PATTERNS]
    parser.add_argument("--out", type=Path, default=Path("runs/language_model"), help="(default: %(default)s)")
    parser.add_argument("--seeds", type=count(0), nargs="+", default=[0], help="of the trained networks (default: 0)")
    parser.add_argument("--steps", type=count(1), help="of training (default: 1300, with --small 20)")
    parser.add_argument("--calibration", type=count(1), help="windows of text (default: 128, with --small 32)")
    parser.add_argument("--healing", type=count(1), help="steps of ADMM, healed (default: 50, with --small 2)")
    parser.add_argument("--windows", type=count(1), help="to measure with (default: 512, with --small 32)")
    add_names(parser, "--methods", METHODS)
    add_names(parser, "--patterns", names)
    parser.add_argument("--valid", action="store_true", help="measure with the text kept for choosing settings")
    parser.add_argument("--small", action="store_true", help="a tiny network, to see that everything runs")
    options = parser.parse_args(arguments)
    presets = {"steps": (1300, 20), "calibration": (128, 32), "healing": (50, 2), "windows": (512, 32)}
    for name, values in presets.items():
        setattr(options, name, values[options.small] if getattr(options, name) is None else getattr(options, name))
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False)
    data = text.load()
    runs = [run_seed(options, data, seed, console) for seed in options.seeds]
    console.print(table(runs, options.patterns))
    (options.out / "results.json").write_text(json.dumps(runs, indent=2) + "\n")
    bits_per_byte(runs, options.patterns).savefig(options.out / "bits_per_byte.png")
    console.print(f"Written to {options.out}: results.json, bits_per_byte.png")


if __name__ == "__main__":
    sys.exit(exit_code(run))
