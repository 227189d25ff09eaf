"""The examples' two figures: weights with their thresholds, and accuracy against sparsity.

Both take plain NumPy arrays and return a matplotlib figure, to be written with `figure.savefig("name.png")`;
no display and no global state are involved. The colours are those of Okabe and Ito (2008), told apart
without colour vision.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREY, INK = "#0072B2", "#D55E00", "#BBBBBB", "#333333"
SPARSITY_TICKS = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)


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
    sparsity_axis(bottom, times_fewer)
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
    flat = np.asarray(values, np.float64).ravel()
    below = _below(flat, threshold)
    limit = float(np.abs(flat).max(initial=threshold)) or 1.0
    # Whole bins between the two thresholds, so that no bar is partly grey.
    step = limit / 24
    inside = max(1, round(2 * threshold / step)) if threshold else 0
    step = max(2 * threshold / inside, step / 2) if threshold else step
    beyond = threshold + step * np.arange(1, math.ceil((limit - threshold) / step) + 1)
    edges = np.concatenate([-beyond[::-1], np.linspace(-threshold, threshold, inside + 1), beyond])
    for part, color in ((flat[below], GREY), (flat[~below], BLUE)):
        # Rounding must not put a weight that equals the limit outside the last edge.
        counts = np.histogram(np.clip(part, edges[0], edges[-1]), edges)[0]
        axes.stairs(counts, edges, fill=True, color=color)
    axes.margins(y=0.4)
    for sign in (-1, 1):
        axes.axvline(sign * threshold, ymax=0.74, color=INK, linewidth=1, linestyle="--")
    axes.annotate(
        f"±{threshold:.3g}", (threshold, 0.75), xycoords=("data", "axes fraction"),
        ha="center", va="bottom", color=INK, fontsize="small",
    )  # fmt: skip
    share = below.mean() if flat.size else 0.0
    for x, align, text, color in (
        (0.03, "left", f"{percent(share)} removed", "#666666"),
        (0.97, "right", f"{percent(1 - share)} kept", BLUE),
    ):
        axes.text(x, 0.96, text, transform=axes.transAxes, ha=align, va="top", color=color, fontweight="bold")
    name = layer if len(layer) <= 30 else f"…{layer[-29:]}"
    axes.set_title(f"{name}  ({flat.size:,})", fontsize="medium", color=INK)
    frame(axes)


def _below(values: np.ndarray, threshold: float) -> np.ndarray:
    # In float64: NumPy would round the threshold to the type of low-precision weights.
    return np.abs(np.asarray(values, np.float64)) < float(threshold)


def _accuracies(axes: Axes, x: np.ndarray, before: np.ndarray, after: np.ndarray, dense: float) -> None:
    _curve(axes, x, before, color=ORANGE, marker="s", linestyle="--")
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
    for text, y, color in (("fine-tuned", after_end, BLUE), ("only pruned", before_end, ORANGE)):
        axes.annotate(
            text, (x[-1], y), xytext=(9, 0), textcoords="offset points",
            va="center", color=color, fontweight="bold",
        )  # fmt: skip
    frame(axes)


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
    frame(axes)


def _curve(axes: Axes, x: np.ndarray, values: np.ndarray, **style: Any) -> None:
    spread = values.std(axis=0) if len(values) > 1 else None
    axes.errorbar(x, values.mean(axis=0), spread, capsize=3, linewidth=1.8, markersize=5, **style)


def sparsity_axis(axes: Axes, x: np.ndarray) -> None:
    """Make the horizontal axis logarithmic in how many times fewer weights there are, `x`, in rising order."""
    left = max(0.97, 0.85 * x[0])
    right = x[-1] * max(1.35, (x[-1] / left) ** 0.22)  # room for the labels at the curves' ends
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    places = [1 / (1 - tick) for tick in SPARSITY_TICKS if left <= 1 / (1 - tick) <= right]
    shown = [places[index] for index in _apart(places, left, right, 0.065)]
    axes.set_xticks(shown, [f"{100 * (1 - 1 / place):.3g} %\n{place:,.3g}x" for place in shown])
    axes.minorticks_off()
    axes.set_xlabel("sparsity: weights removed (times fewer weights)", color=INK)


def _strength_axis(axes: Axes, x: np.ndarray, ks: np.ndarray) -> None:
    shown = _apart(x.tolist(), *axes.get_xlim(), 0.04)
    strengths = axes.secondary_xaxis("top")
    strengths.set_xticks(x[shown], [f"{k:g}" for k in ks[shown]], fontsize="small")
    strengths.minorticks_off()
    strengths.set_xlabel("strength k", color=INK)
    strengths.tick_params(colors=INK)
    strengths.spines["top"].set_visible(False)


def _apart(places: Sequence[float], left: float, right: float, gap: float) -> list[int]:
    """Choose, from the left, the places whose labels do not touch: `gap` is a share of the log axis."""
    chosen: list[int] = []
    for index, place in enumerate(places):
        if not chosen or math.log(place / places[chosen[-1]]) >= gap * math.log(right / left):
            chosen.append(index)
    return chosen


def frame(axes: Axes) -> None:
    """Draw the lower and the left edge only."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)


def percent(fraction: float) -> str:
    """Write a fraction in percent."""
    return f"{100 * fraction:.1f} %"


def _points(number: float) -> str:
    return f"{number:g} point{'' if number == 1 else 's'}"
