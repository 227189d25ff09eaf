"""What pruning and rounding together cost, at what size of file: one pass beside two, in both orders.

    python -m benchmarks.pruned_and_rounded

Two networks: the digits CNN, and the byte-level transformer of `examples/language_model.py`. Each is pruned to several
sparsities, every layer by the same share, and rounded to several numbers of bits, without training afterwards:

- one pass: SparseGPT and GPTQ together, `oneshot.prune_and_quantize`;
- prune, round: SparseGPT, then GPTQ under its masks;
- round, prune: GPTQ, then the masks of Wanda, which leave every other weight on its grid;
- ADMM, round: ADMM, then GPTQ under its masks;
- in sequence: the same layer by layer, each behind those that were pruned and rounded before.

With 16 bits nothing is rounded by GPTQ. The size is that of the file that `save_sparse` writes: bfloat16 for what is not
rounded, 64 inputs to a scale, through zstd. At equal bytes: what is best among all that are no larger.
"""

import argparse
import functools
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import language_model
import numpy as np
from _support import data, text
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxprune
from benchmarks import one_shot, timing
from jaxprune import oneshot, rules, scores
from jaxprune.oneshot import Quantized
from jaxprune.plot.style import INK, LINES, frame

GROUP_SIZE, UNROUNDED = 64, 16
SHOWN = "in sequence"  # the way that the figure shows


class Subject(NamedTuple):
    """A trained network: what calibrates it, which leaves change, and how good it is."""

    name: str
    fn: Callable[[Any, jax.Array], jax.Array]
    params: Any
    batches: Sequence[jax.Array]
    prunable: Callable[[str, Any], bool]
    quality: Callable[[Any], float]


# (subject, its Grams, sparsity, bits) -> a Quantized; bits are None where nothing is rounded
Way = Callable[[Subject, Any, float, int | None], Quantized]


def one_pass(subject: Subject, grams: Any, sparsity: float, bits: int | None) -> Quantized:
    """Prune and round each weight when its turn comes."""
    if bits is None:
        return _unrounded(oneshot.sparsegpt(subject.params, grams, sparsity, prunable=subject.prunable))
    solve = functools.partial(oneshot.prune_and_quantize, group_size=GROUP_SIZE, prunable=subject.prunable)
    return solve(subject.params, grams, sparsity, bits=bits)


def prune_then_round(subject: Subject, grams: Any, sparsity: float, bits: int | None) -> Quantized:
    """SparseGPT, then GPTQ."""
    return _rounded(grams, bits, oneshot.sparsegpt(subject.params, grams, sparsity, prunable=subject.prunable), subject)


def round_then_prune(subject: Subject, grams: Any, sparsity: float, bits: int | None) -> Quantized:
    """GPTQ, then masks by weight and norm."""
    whole = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), subject.params)
    found = _rounded(grams, bits, (subject.params, whole), subject)
    choose = functools.partial(jaxprune.make_masks, rule=rules.row_sparsity, prunable=subject.prunable)
    masks = choose(found.params, sparsity, scores=scores.wanda(found.params, grams.norms()))
    kept = dict(zip(_paths(masks), jax.tree.leaves(masks), strict=True))
    # Symmetric codes: that of zero is 0.
    codes = {
        path: oneshot.Codes(jnp.where(kept[path], of.codes, 0), of.scale, of.zero_point, of.bits)
        for path, of in found.codes.items()
    }
    return Quantized(jaxprune.apply_masks(found.params, masks), masks, codes)


def admm_then_round(subject: Subject, grams: Any, sparsity: float, bits: int | None) -> Quantized:
    """ADMM, then GPTQ."""
    return _rounded(grams, bits, oneshot.admm(subject.params, grams, sparsity, prunable=subject.prunable), subject)


def in_sequence(subject: Subject, grams: Any, sparsity: float, bits: int | None) -> Quantized:
    """ADMM and GPTQ layer by layer."""
    del grams

    def method(params: Any, grams: Any, *, prunable: Any) -> Quantized:
        only = subject._replace(prunable=prunable)
        return _rounded(grams, bits, oneshot.admm(params, grams, sparsity, prunable=prunable), only)

    found = oneshot.sequential(subject.fn, subject.params, subject.batches, method, prunable=subject.prunable)
    return found if isinstance(found, Quantized) else _unrounded(found)


WAYS: dict[str, Way] = {
    "one pass": one_pass,
    "prune, round": prune_then_round,
    "round, prune": round_then_prune,
    "ADMM, round": admm_then_round,
    "in sequence": in_sequence,
}


def _unrounded(pruned: tuple[Any, Any]) -> Quantized:
    return Quantized(*pruned, {})


def _rounded(grams: Any, bits: int | None, pruned: tuple[Any, Any], subject: Subject) -> Quantized:
    if bits is None:
        return _unrounded(pruned)
    params, masks = pruned
    solve = functools.partial(oneshot.gptq, bits=bits, group_size=GROUP_SIZE, prunable=subject.prunable)
    return solve(params, grams, masks=masks)


def _paths(tree: Any) -> list[str]:
    return ["/".join(str(key.key) for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def digits(seed: int, options: argparse.Namespace) -> Subject:
    """Train the digits CNN; its quality is its accuracy in percent."""
    dataset = data.load("digits", options.data_dir)
    images, labels = jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels)
    test_set = jnp.asarray(dataset.test_images), jnp.asarray(dataset.test_labels)
    params = one_shot.MODEL.init(jax.random.key(seed), images[:1])
    everything = jax.tree.map(lambda leaf: jnp.ones_like(leaf, dtype=bool), params)
    params = one_shot.train(params, everything, (images, labels), range(options.epochs), seed)
    batches = [images[indices] for indices in data.epoch_indices(len(images), 128, seed=seed, epoch=0)]
    quality = lambda params: 100 * float(one_shot.accuracy(params, *test_set))  # noqa: E731
    return Subject("digits CNN, accuracy in %", one_shot.MODEL.apply, params, batches, jaxprune.is_kernel, quality)


def language(seed: int, options: argparse.Namespace) -> Subject:
    """Train the byte-level transformer, or load one; its quality is its bits per byte, the fewer the better."""
    network, sources = language_model.Transformer(), text.load()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"seed-{seed}-{options.steps}-steps.msgpack"
    params = language_model.trained(network, sources.train, options.steps, seed, path, Console(stderr=True))
    params = jax.tree.map(jnp.asarray, params)
    context, size = language_model.CONTEXT, language_model.BATCH_SIZE
    windows = text.windows(sources.train, 128, context, language_model.CALIBRATION_SEED)
    batches = [jnp.asarray(windows[start : start + size, :-1]) for start in range(0, len(windows), size)]
    fn = lambda params, tokens: network.apply({"params": params}, tokens)  # noqa: E731
    model = language_model.Model(fn, params, batches)
    held_out = text.windows(sources.test, options.windows, context, language_model.TEST_SEED)
    quality = lambda params: language_model.evaluate(model, params, held_out)  # noqa: E731
    return Subject("byte-level transformer, bits per byte", fn, params, batches, language_model.in_blocks, quality)


SUBJECTS = {"digits": digits, "language": language}


def run_seed(
    subject: Subject, ways: Sequence[str], sparsities: Sequence[float], bits: Sequence[int], console: Console
) -> dict[str, Any]:
    """Prune and round one network in every way; return what each is worth, and the bytes of its file."""
    grams = jaxprune.calibrate_grams(subject.fn, subject.params, subject.batches)
    runs = [(way, sparsity, b) for way in ways for sparsity in sparsities for b in bits]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for way, sparsity, b in track(runs, "pruning and rounding", console=console):
            found = WAYS[way](subject, grams, sparsity, None if b == UNROUNDED else b)
            path = Path(folder) / "model.safetensors.zst"
            store = functools.partial(jaxprune.save_sparse, dtype="bfloat16", compress=True, force=True)
            size = store(path, found.params, found.masks, codes=found.codes).bytes
            opened = jax.tree.map(
                lambda leaf, own: leaf.astype(own.dtype),
                jaxprune.load_sparse(path)[0],
                subject.params,
            )
            row = {"way": way, "sparsity": sparsity, "bits": b, "bytes": size, "quality": subject.quality(opened)}
            rows.append(row)
    return {"dense": subject.quality(subject.params), "rows": rows}


def means(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of all seeds as one: the means of their qualities and bytes."""
    return [
        rows[0] | {name: statistics.mean(row[name] for row in rows) for name in ("bytes", "quality")}
        for rows in zip(*(run["rows"] for run in runs), strict=True)
    ]


def table(name: str, runs: Sequence[dict[str, Any]]) -> Table:
    """Show every way at every sparsity and number of bits."""
    dense = statistics.mean(run["dense"] for run in runs)
    rows = means(runs)
    shown = Table("bits", "way", title=f"{name}; dense {dense:.3f}; in brackets kB", title_justify="left")
    sparsities = sorted({row["sparsity"] for row in rows})
    for sparsity in sparsities:
        shown.add_column(f"{100 * sparsity:g} %", justify="right")
    for bits in sorted({row["bits"] for row in rows}, reverse=True):
        for way in dict.fromkeys(row["way"] for row in rows):
            cells = [
                next(row for row in rows if (row["bits"], row["way"], row["sparsity"]) == (bits, way, sparsity))
                for sparsity in sparsities
            ]
            shown.add_row(str(bits), way, *(f"{cell['quality']:.3f} ({cell['bytes'] / 1e3:.0f})" for cell in cells))
    return shown


def best(name: str, runs: Sequence[dict[str, Any]], *, more_is_better: bool, sizes: int = 8) -> Table:
    """Show what is best among all files that are no larger than so many bytes."""
    rows = means(runs)
    most, least = max(row["bytes"] for row in rows), min(row["bytes"] for row in rows)
    shown = Table("at most, kB", "kB", "quality", "way", "sparsity", "bits", title=f"{name}: best at equal bytes")
    for size in np.geomspace(most, 1.02 * least, sizes):
        fitting = [row for row in rows if row["bytes"] <= size]
        row = (max if more_is_better else min)(fitting, key=lambda row: row["quality"])
        cells = (f"{size / 1e3:.0f}", f"{row['bytes'] / 1e3:.0f}", f"{row['quality']:.3f}")
        shown.add_row(*cells, row["way"], f"{100 * row['sparsity']:g} %", str(row["bits"]))
    return shown


def figure(results: dict[str, Sequence[dict[str, Any]]]) -> Figure:
    """Draw quality against bytes, a curve for each number of bits, a panel for each network."""
    drawn = Figure(figsize=(5.2 * len(results), 4.2), layout="constrained", dpi=150)
    for axes, (name, runs) in zip(drawn.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        rows = [row for row in means(runs) if row["way"] == SHOWN]
        for number, bits in enumerate(sorted({row["bits"] for row in rows}, reverse=True)):
            points = sorted((row["bytes"] / 1e3, row["quality"]) for row in rows if row["bits"] == bits)
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=LINES[number], label=f"{bits} bits")
        axes.axhline(statistics.mean(run["dense"] for run in runs), color=INK, linewidth=1, linestyle=":")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("kB of the file", color=INK)
        axes.set_title(name, loc="left", color=INK, fontsize="medium")
        frame(axes)
        axes.legend(frameon=False, fontsize="small", labelcolor=INK)
    drawn.suptitle("Pruned and rounded, without training", fontweight="bold", color=INK)
    return drawn


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, run every network and seed, show the tables, write JSON and a figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9])
    parser.add_argument("--bits", type=int, nargs="+", default=[UNROUNDED, 8, 4, 3], help="16 rounds nothing")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--epochs", type=int, default=30, help="of the CNN's training")
    parser.add_argument("--steps", type=int, default=1300, help="of the transformer's training")
    parser.add_argument("--windows", type=int, default=512, help="of text to measure the transformer with")
    parser.add_argument("--out", type=Path, default=Path("runs/language_model"), help="where transformers are kept")
    parser.add_argument("--data-dir", type=Path, help="folder of prepared data sets")
    parser.add_argument("--json", type=Path, help="write every number here")
    parser.add_argument("--figure", type=Path, help="write the figure here, as .png or .svg")
    options = parser.parse_args(arguments)
    console, results = Console(), {}
    for key in options.subjects:
        runs = []
        for seed in range(options.seeds):
            subject = SUBJECTS[key](seed, options)
            runs.append(run_seed(subject, options.ways, options.sparsities, options.bits, console))
        results[subject.name] = runs
        console.print(table(subject.name, runs))
        console.print(best(subject.name, runs, more_is_better=key == "digits"))
        timing.write_json(options.json, results)
    if options.figure:
        figure(results).savefig(options.figure)


if __name__ == "__main__":
    main()
