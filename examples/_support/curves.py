"""A figure of curves in panels that share the horizontal axis, each named where it ends.

In the style of `figures.py`: plain NumPy arrays in, a matplotlib figure out. A name has one colour in all panels.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from jaxprune.plot.style import BLUE, INK, LINES, frame, sparsity_axis

DENSE = "dense"  # drawn dotted, in the colour of the text
LINE_HEIGHT = 0.15  # of a label, in inches


class Panel(NamedTuple):
    """One panel: what its vertical axis shows, and the curves by name, each as (x, y)."""

    label: str
    curves: Mapping[str, tuple[Any, Any]]
    log: bool = False
    stairs: bool = False  # y holds from its x to the next one
    height: float = 1.7


def draw(title: str, label: str, panels: Sequence[Panel], *, by_sparsity: bool = False) -> Figure:
    """Draw panels one above the other.

    Args:
      title: what the figure shows, the finding first.
      label: of the horizontal axis.
      panels: from the top. A curve without a name, alone in its panel, stands for the panel's label.
      by_sparsity: x is a fraction of weights removed; the axis is logarithmic in the weights left.

    Returns:
      The figure, with one axes object a panel; the lines of a panel are its curves, in order.
    """
    height = 1.2 + sum(panel.height for panel in panels)
    figure = Figure(figsize=(7.6, height), layout="constrained", dpi=150)
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=[panel.height for panel in panels])
    names = dict.fromkeys(name for panel in panels for name in panel.curves if name not in ("", DENSE))
    colors = {name: LINES[i % len(LINES)] for i, name in enumerate(names)} | {"": BLUE, DENSE: INK}
    for axes, panel in zip(rows[:, 0], panels, strict=True):
        _panel(axes, panel, colors, by_sparsity)
    last = rows[-1, 0]
    if by_sparsity:
        sparsity_axis(last, np.unique(np.concatenate([_times_fewer(x) for x, _ in _curves(panels)])))
    else:
        right = max(float(np.max(x)) for x, _ in _curves(panels))
        last.set_xlim(0, 1.22 * right if names else 1.02 * right)  # room for the names
        last.set_xticks([tick for tick in last.get_xticks() if 0 <= tick <= right])
        last.set_xlabel(label, color=INK)
    for axes, panel in zip(rows[:, 0], panels, strict=True):
        _name_ends(axes, panel, colors)
    figure.suptitle(title, fontsize="large", fontweight="bold", color=INK)
    return figure


def _curves(panels: Sequence[Panel]) -> list[tuple[Any, Any]]:
    return [curve for panel in panels for curve in panel.curves.values()]


def _times_fewer(sparsity: Any) -> np.ndarray:
    return 1 / (1 - np.asarray(sparsity, float))


def _panel(axes: Axes, panel: Panel, colors: Mapping[str, str], by_sparsity: bool) -> None:
    for name, (x, y) in panel.curves.items():
        axes.plot(
            _times_fewer(x) if by_sparsity else x, y, color=colors[name], linewidth=1.8,
            linestyle=":" if name == DENSE else "-", drawstyle="steps-post" if panel.stairs else "default",
            marker="o" if by_sparsity and name != DENSE else None, markersize=5,
        )  # fmt: skip
    axes.margins(y=0.1)
    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(FixedLocator(_log_ticks(*axes.get_ylim())))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    elif _are_counts(panel):
        low, high = (bound(np.concatenate([y for _, y in panel.curves.values()])) for bound in (np.min, np.max))
        if low == high:
            axes.set_ylim(low - 0.5, high + 0.5)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_ylabel(panel.label, color=INK)
    frame(axes)


def _log_ticks(low: float, high: float) -> list[float]:
    """Return a few round numbers within the limits of a logarithmic axis."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 2, 5), range(1, 10)):
        ticks = [float(f"{step}e{decade}") for decade in decades for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            break
    return ticks


def _are_counts(panel: Panel) -> bool:
    return all(np.all(np.asarray(y) == np.round(y)) for _, y in panel.curves.values())


def _name_ends(axes: Axes, panel: Panel, colors: Mapping[str, str]) -> None:
    """Write names to the right of the curves' last points, moved apart where they would touch."""
    named = [(line, name) for line, name in zip(axes.lines, panel.curves, strict=True) if name]
    ends = [(line.get_xdata()[-1], line.get_ydata()[-1], name) for line, name in named]
    gap = LINE_HEIGHT / (0.8 * panel.height)
    axes.set_ylim(axes.get_ylim())
    shares = axes.transAxes.inverted().transform(axes.transData.transform([(x, y) for x, y, _ in ends] or [(1, 1)]))
    floor = -np.inf
    for (_, share), (x, y, name) in sorted(zip(shares, ends, strict=False), key=lambda entry: entry[0][1]):
        floor = max(share, floor + gap)
        axes.annotate(
            name, (x, y), xytext=(9, 72 * 0.8 * panel.height * (floor - share)), textcoords="offset points",
            va="center", color=colors[name], fontweight="bold", fontsize="small", annotation_clip=False,
        )  # fmt: skip
