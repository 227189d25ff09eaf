"""The figure of `language_model.py`: bits per byte of every method at every pattern, from plain numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from jaxprune.plot.style import GREY, INK, LINES, frame

COLOURS = (*LINES, "#A0654A")


def bits_per_byte(runs: Sequence[Mapping[str, Any]], patterns: Sequence[str]) -> Figure:
    """Draw a dot for every method at every pattern, and the dense network as a line.

    Args:
      runs: of each seed `dense` and `methods`, bits per byte by method and pattern.
      patterns: from left to right.

    Returns:
      A figure of one panel; with several seeds a dot is their mean, and bars reach one standard deviation.
    """
    figure = Figure(figsize=(2.5 + 1.5 * len(patterns), 5.0), layout="constrained", dpi=150)
    axes = figure.subplots()
    dense = float(np.mean([run["dense"] for run in runs]))
    axes.axhline(dense, color=INK, linewidth=1, linestyle=":")
    axes.text(-0.45, dense, f"dense {dense:.2f}", color=INK, va="bottom", fontsize="small")
    methods = list(runs[0]["methods"])
    for number, method in enumerate(methods):
        found = [pattern for pattern in patterns if pattern in runs[0]["methods"][method]]
        values = np.array([[run["methods"][method][pattern] for pattern in found] for run in runs])
        places = [patterns.index(pattern) + 0.7 * (number / max(1, len(methods) - 1) - 0.5) for pattern in found]
        axes.errorbar(
            places, values.mean(0), values.std(0) if len(runs) > 1 else None,
            fmt="o", markersize=6, color=COLOURS[number % len(COLOURS)], label=method,
        )  # fmt: skip
    axes.set_xticks(range(len(patterns)), patterns)
    axes.set_xlim(-0.5, len(patterns) - 0.5)
    for between in range(1, len(patterns)):
        axes.axvline(between - 0.5, color=GREY, linewidth=0.5)
    axes.set_ylabel("bits per byte on text of other files", color=INK)
    axes.set_title("Pruned without retraining", loc="left", color=INK, fontweight="bold")
    frame(axes)
    axes.legend(frameon=False, fontsize="small", labelcolor=INK)
    return figure
