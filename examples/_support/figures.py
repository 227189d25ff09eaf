"""The examples' two figures: weights with their thresholds, and accuracy against sparsity.

Both take plain NumPy arrays and return a matplotlib figure, to be written with `figure.savefig("name.png")`;
no display and no global state are involved. Colours and axes are those of `jaxprune.plot`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxprune import plot
from jaxprune.plot.style import BLUE, INK, RED


def histograms(weights: Mapping[str, np.ndarray], thresholds: Mapping[str, float]) -> Figure:
    """Draw a histogram of weights per layer: removed ones grey, kept ones blue, thresholds marked.

    Args:
      weights: the finite weights before pruning, of any shape, by layer; one panel each, in this order.
      thresholds: by layer, the magnitude below which weights are removed, at least 0.

    Returns:
      A figure of up to three panels a row. Every panel holds the removed weights as its first patch, the kept
      ones as its second, and its lines at `-threshold` and `threshold`.

    Raises:
      ValueError: no layer is given, or a layer has no threshold.
    """
    if not weights or weights.keys() - thresholds.keys():
        raise ValueError(
            f"every layer needs a threshold: got the layers {list(weights)} and thresholds for {list(thresholds)}."
        )
    columns = 2 if len(weights) == 4 else min(3, len(weights))
    rows = math.ceil(len(weights) / columns)
    figure = Figure(figsize=(1.2 + 3.2 * columns, 1.2 + 2.3 * rows), layout="constrained", dpi=150)
    panels = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for panel, (layer, values) in zip(panels, weights.items(), strict=False):
        _histogram(panel, layer, values, thresholds[layer])
    for panel in panels[len(weights) :]:
        panel.remove()
    total = sum(values.size for values in weights.values())
    removed = sum(int(_below(values, thresholds[layer]).sum()) for layer, values in weights.items())
    figure.suptitle(
        f"Pruning removes {percent(removed / total)} of {total:,} weights:\n"
        "those nearest to zero in their layer",
        fontsize="large", fontweight="bold", color=INK,
    )  # fmt: skip
    figure.supxlabel("weight before pruning", color=INK, fontsize="medium")
    figure.supylabel("number of weights", color=INK, fontsize="medium")
    return figure


def accuracy_against_sparsity(
    sparsity: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    dense: np.ndarray,
    *,
    ks: Sequence[float] | None = None,
    max_drop: float = 0.005,
) -> Figure:
    """Draw accuracy before and after fine-tuning against sparsity, and below it the change from dense.

    The horizontal axis is logarithmic in the weights left, so 90 % and 99 % are as far apart as 0 % and 90 %.
    Points are means over the seeds; with several seeds, bars reach one standard deviation to both sides.

    Args:
      sparsity: the fraction removed, in [0, 1), `[seeds, strengths]`.
      before: accuracy in [0, 1] right after pruning, `[seeds, strengths]`.
      after: accuracy in [0, 1] after fine-tuning, `[seeds, strengths]`.
      dense: accuracy in [0, 1] of the unpruned network, `[seeds]`.
      ks: the rule's strengths, written above their points, `[strengths]`.
      max_drop: the loss of accuracy that is still accepted, as a fraction; the title says what it buys.

    Returns:
      A figure of two panels: accuracy in per cent (lines: before, after, dense), and the change from dense
      after fine-tuning in points (its last line: after minus dense).

    Raises:
      ValueError: the shapes do not agree.
    """
    shapes = {
        "sparsity": np.shape(sparsity), "before": np.shape(before), "after": np.shape(after),
        "dense": np.shape(dense), "ks": np.shape(sparsity)[1:] if ks is None else np.shape(ks),
    }  # fmt: skip
    full = shapes["sparsity"]
    if len(full) != 2 or list(shapes.values()) != [full, full, full, full[:1], full[1:]]:
        raise ValueError(
            "sparsity, before and after must be [seeds, strengths], dense [seeds] and ks [strengths]; got "
            f"the shapes {shapes}."
        )
    order = np.argsort(np.mean(sparsity, axis=0))
    removed = np.mean(sparsity, axis=0)[order]
    times_fewer = 1 / (1 - removed)
    change = 100 * (after - dense[:, None])[:, order]
    figure = Figure(figsize=(7.6, 6.2), layout="constrained", dpi=150)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    _accuracies(top, times_fewer, 100 * before[:, order], 100 * after[:, order], 100 * float(np.mean(dense)))
    _changes(bottom, times_fewer, change, 100 * max_drop)
    plot.style.sparsity_axis(bottom, times_fewer)
    if ks is not None:
        _strength_axis(top, times_fewer, np.asarray(ks)[order])
    good = removed[change.mean(axis=0) >= -100 * max_drop]
    finding = f"Fine-tuned, {percent(good.max())} fewer weights cost" if good.size else "No sparsity tried costs"
    figure.suptitle(
        f"{finding} at most {_points(100 * max_drop)} of accuracy",
        fontsize="large", fontweight="bold", color=INK,
    )  # fmt: skip
    return figure


def _histogram(axes: Axes, layer: str, values: np.ndarray, threshold: float) -> None:
    plot.weights(values, threshold, axes)
    axes.set(xlabel="", ylabel="")  # the figure names them once
    name = layer if len(layer) <= 30 else f"…{layer[-29:]}"
    axes.set_title(f"{name}  ({values.size:,})", fontsize="medium", color=INK)


def _below(values: np.ndarray, threshold: float) -> np.ndarray:
    # In float64: NumPy would round the threshold to the type of low-precision weights.
    return np.abs(np.asarray(values, np.float64)) < float(threshold)


def _accuracies(axes: Axes, x: np.ndarray, before: np.ndarray, after: np.ndarray, dense: float) -> None:
    _curve(axes, x, before, color=RED, marker="s", linestyle="--")
    _curve(axes, x, after, color=BLUE, marker="o", linestyle="-")
    axes.axhline(dense, color=INK, linewidth=1, linestyle=":")
    low, high = min(before.min(), after.min(), dense), max(before.max(), after.max(), dense)
    span = max(high - low, 1.0)
    axes.set_ylim(low - 0.08 * span, high + 0.14 * span)
    axes.set_ylabel("accuracy (%)", color=INK)
    axes.annotate(
        f"dense {dense:.1f} %", (1, dense), xycoords=("axes fraction", "data"),
        xytext=(-4, 4), textcoords="offset points", ha="right", va="bottom", color=INK,
    )  # fmt: skip
    # The labels stand at the curves' ends, apart from each other and below the dense line.
    gap, ceiling = 0.07 * span, dense - 0.05 * span
    after_end = min(max(after[:, -1].mean(), before[:, -1].mean() + gap), ceiling)
    before_end = min(before[:, -1].mean(), after_end - gap)
    for text, y, color in (("fine-tuned", after_end, BLUE), ("only pruned", before_end, RED)):
        axes.annotate(
            text, (x[-1], y), xytext=(9, 0), textcoords="offset points",
            va="center", color=color, fontweight="bold",
        )  # fmt: skip
    plot.style.frame(axes)


def _changes(axes: Axes, x: np.ndarray, change: np.ndarray, max_drop: float) -> None:
    floor = -max(5.0, 3 * max_drop)
    beyond = change.mean(axis=0) < floor
    axes.axhspan(-max_drop, 0, color=BLUE, alpha=0.15, linewidth=0)
    axes.axhline(0, color=INK, linewidth=1, linestyle=":")
    axes.plot(x[beyond], np.full(beyond.sum(), floor), "v", color=BLUE, markersize=9, clip_on=False)
    _curve(axes, x, change, color=BLUE, marker="o", linestyle="-")
    axes.set_ylim(max(floor, min(change.min(), -max_drop) - 0.6), max(change.max(), 0) + 0.6)
    axes.set_ylabel("after fine-tuning,\npoints against dense", color=INK)
    axes.annotate(
        f"{_points(max_drop)} lost", (1, -max_drop), xycoords=("axes fraction", "data"),
        xytext=(-4, -3), textcoords="offset points", ha="right", va="top", color=BLUE,
    )  # fmt: skip
    plot.style.frame(axes)


def _curve(axes: Axes, x: np.ndarray, values: np.ndarray, **style: Any) -> None:
    spread = values.std(axis=0) if len(values) > 1 else None
    axes.errorbar(x, values.mean(axis=0), spread, capsize=3, linewidth=1.8, markersize=5, **style)


def _strength_axis(axes: Axes, x: np.ndarray, ks: np.ndarray) -> None:
    shown = plot.style.apart(x.tolist(), *axes.get_xlim(), 0.04)
    strengths = axes.secondary_xaxis("top")
    strengths.set_xticks(x[shown], [f"{k:g}" for k in ks[shown]], fontsize="small")
    strengths.minorticks_off()
    strengths.set_xlabel("strength k", color=INK)
    strengths.tick_params(colors=INK)
    strengths.spines["top"].set_visible(False)


def percent(fraction: float) -> str:
    """Write a fraction in percent."""
    return f"{100 * fraction:.1f} %"


def _points(number: float) -> str:
    return f"{number:g} point{'' if number == 1 else 's'}"
