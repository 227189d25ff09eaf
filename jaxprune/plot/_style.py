"""What the figures look like: colours, told apart without colour vision (Okabe and Ito, 2008), and plain axes."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxprune._printing import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, PURPLE, SKY, YELLOW, RED = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442", "#D55E00",
)  # fmt: skip
GREY, INK = "#BBBBBB", "#333333"
LINES = (BLUE, RED, GREEN, PURPLE, SKY, ORANGE, "#999933", "#666666")

# What an axis of sparsities is labelled with.
SPARSITIES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)


def literal(name: str) -> str:
    """Return a name that matplotlib draws as it is, without reading formulas in it."""
    return printable(name).replace("$", r"\$")


def sparsity_axis(axes: "Axes", fewer: np.ndarray) -> None:
    """Make the horizontal axis logarithmic in how many times fewer weights there are, in rising order."""
    left = max(0.97, 0.85 * fewer[0])
    right = fewer[-1] * max(1.35, (fewer[-1] / left) ** 0.22)  # room for the labels at the curves' ends
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    places = [1 / (1 - tick) for tick in SPARSITIES if left <= 1 / (1 - tick) <= right]
    shown = [places[index] for index in apart(places, left, right, 0.065)]
    axes.set_xticks(shown, [f"{100 * (1 - 1 / place):.3g} %\n{place:,.3g}x" for place in shown])
    axes.minorticks_off()
    axes.set_xlabel("sparsity: weights removed (times fewer weights)", color=INK)


def apart(places: Sequence[float], left: float, right: float, gap: float) -> list[int]:
    """Choose, from the left, the places whose labels do not touch: `gap` is a share of the log axis."""
    chosen: list[int] = []
    for index, place in enumerate(places):
        if not chosen or math.log(place / places[chosen[-1]]) >= gap * math.log(right / left):
            chosen.append(index)
    return chosen


def frame(axes: "Axes") -> "Axes":
    """Draw the lower and the left edge only."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
    return axes
