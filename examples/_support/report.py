"""What a run shows of its findings: layers and their histograms, the sweep, its best point and its curve."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

import jaxprune
from _support import figures
from _support.experiment import Experiment
from jaxprune import plot

# The loss of accuracy that is still accepted when a sweep is read, as a fraction.
MAX_DROP = 0.005


def layers(experiment: Experiment, params: Any, summary: jaxprune.Summary) -> None:
    """Print and record what was pruned, layer by layer, and draw the layers' histograms.

    Args:
      experiment: the run.
      params: the weights before pruning.
      summary: of these weights and the masks.
    """
    experiment.say(summary)
    experiment.record("layers", value=summary.to_dict())
    weights, thresholds = {}, {}
    for row, leaf in zip(summary.rows, jax.tree.leaves(params), strict=True):
        if row.prunable:
            weights[row.path] = np.asarray(leaf)
            thresholds[row.path] = row.threshold or 0.0
    figures.histograms(weights, thresholds).savefig(experiment.settings.out / "histograms.png")


class Sweep(NamedTuple):
    """A sweep over k with one seed or several; accuracies and sparsities are fractions."""

    ks: list[str]
    sparsity: np.ndarray  # [seeds, strengths]
    before: np.ndarray  # accuracy after pruning, [seeds, strengths]
    after: np.ndarray  # accuracy after fine-tuning, [seeds, strengths]
    dense: np.ndarray  # accuracy before any pruning, [seeds]


def read_sweep(runs: Sequence[dict[str, Any]]) -> Sweep:
    """Collect the sweep from the results of runs that differ in the seed alone."""

    def gather(when: str, metric: str) -> np.ndarray:
        return np.array([[row[when][metric] for row in results["sweep"].values()] for results in runs])

    return Sweep(
        ks=list(runs[0]["sweep"]),
        sparsity=gather("after", "sparsity"),
        before=gather("before", "accuracy"),
        after=gather("after", "accuracy"),
        dense=np.array([results["validation"]["dense"]["accuracy"] for results in runs]),
    )


def sweep_table(sweep: Sweep) -> Table:
    """Return the sweep as a table to print, mean over the seeds."""
    dense = sweep.dense.mean()
    table = Table(title=f"The sweep (dense: {dense:.2%})")
    for column in ("k", "sparsity", "times fewer", "just pruned", "fine-tuned", "against dense"):
        table.add_column(column, justify="right")
    means = (sweep.sparsity.mean(0), sweep.before.mean(0), sweep.after.mean(0))
    for k, sparsity, before, after in zip(sweep.ks, *means, strict=True):
        change = f"{100 * (after - dense):+.2f} points"
        table.add_row(k, f"{sparsity:.1%}", f"{1 / (1 - sparsity):.1f}", f"{before:.2%}", f"{after:.2%}", change)
    return table


def best_point(sweep: Sweep) -> dict[str, float] | None:
    """Return the sparsest point whose mean loss of accuracy is at most MAX_DROP; None if all lose more."""
    sparsity, after = sweep.sparsity.mean(0), sweep.after.mean(0)
    # Accuracies are multiples of one image's share: a loss of exactly MAX_DROP must not fail by rounding.
    good = np.flatnonzero(sweep.dense.mean() - after <= MAX_DROP + 1e-9)
    if not good.size:
        return None
    index = good[np.argmax(sparsity[good])]
    return {"k": float(sweep.ks[index]), "sparsity": float(sparsity[index]), "accuracy": float(after[index])}


def best_sentence(sweep: Sweep) -> str:
    """Say which is the sparsest point that loses at most MAX_DROP."""
    best, limit = best_point(sweep), f"{100 * MAX_DROP:g} points"
    if best is None:
        return f"Every k of the sweep costs more than {limit} of accuracy."
    return (
        f"At no more than {limit} of loss: {best['sparsity']:.1%} of the weights removed, "
        f"{1 / (1 - best['sparsity']):.1f} times fewer (k = {best['k']:g}: {best['accuracy']:.2%})."
    )


def save_curve(sweep: Sweep, path: Path) -> None:
    """Draw accuracy against sparsity into a PNG file."""
    figure = figures.accuracy_against_sparsity(*sweep[1:], ks=[float(k) for k in sweep.ks], max_drop=MAX_DROP)
    figure.savefig(path)


def save_small_curve(sweep: Sweep, path: Path) -> None:
    """Draw the accuracy after fine-tuning alone into an SVG file that can be read on any background."""
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    removed, curves = sweep.sparsity.mean(0), {"fine-tuned": 100 * sweep.after}
    axes = plot.accuracy(
        removed, curves, figure.subplots(), dense=100 * float(sweep.dense.mean()), label="test images right (%)"
    )
    lowest = 100 * float((sweep.after.mean(0) - sweep.after.std(0)).min())
    axes.set_ylim(min(90.0, 10 * math.floor(lowest / 10)), 100)
    # The same numbers are the same file.
    with matplotlib.rc_context({"svg.hashsalt": "accuracy"}):
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None})


def conclude(experiment: Experiment) -> None:
    """Print the sweep and its best point, record that point, draw the curve, and say where everything lies."""
    out, sweep = experiment.settings.out, read_sweep([experiment.results])
    experiment.say(sweep_table(sweep))
    experiment.say(best_sentence(sweep))
    experiment.record("best", value=best_point(sweep))
    save_curve(sweep, out / "accuracy.png")
    experiment.say(f"Written to {out}: results.json, accuracy.png, histograms.png, checkpoint/")
