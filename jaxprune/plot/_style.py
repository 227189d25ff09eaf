"""What the figures look like: colours, told apart without colour vision (Okabe and Ito, 2008), and plain axes.

Nothing asks what lies behind: text and lines can be read on white and on nearly black.
"""

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxprune._printing import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, PURPLE, SKY, YELLOW, RED = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442", "#D55E00",
)  # fmt: skip
GREY, INK = "#BBBBBB", "#787878"
# Of lines, and of the words beside them: SKY and ORANGE darker, since white swallows them.
LINES = (BLUE, RED, GREEN, PURPLE, "#2F8FCB", "#B87A00", "#8C8C2E", "#808080")

# What an axis of sparsities is labelled with.
SPARSITIES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)


_LONG = 30  # characters of a name beside an axis


def axes_of(ax: "Axes | None", width: float = 6.4, height: float = 4.0) -> "Axes":
    """Return the axes given, or those of a new figure of pyplot, of this size in inches."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def shortened(path: str) -> str:
    """Return a path that fits beside an axis: its numbers and its end stay, since they tell layers apart.

    >>> shortened("encoder/layers_12/self_attention/query/kernel")
    '…/layers_12/…/query/kernel'
    >>> shortened("model.transformer_decoder_layer_10.feedforward_projection_2")
    '….trans…_decod…_layer_10.feedf…_proje…_2'
    """
    pieces = re.split(r"([/.])", path)
    places = range(0, len(pieces) - 1, 2)
    for place in (place for place in places if not re.search(r"[0-9]", pieces[place])):
        if len("".join(pieces)) > _LONG:
            pieces[place] = "…"
    short = re.sub(r"…([/.]…)+", "…", "".join(pieces))
    for word in sorted(re.findall(r"[^\W\d_]{7,}", short), key=len, reverse=True):
        if len(short) > _LONG:
            short = short.replace(word, f"{word[:5]}…", 1)
    return short if len(short) <= 2 * _LONG else f"…{short[1 - _LONG :]}"


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
    """Draw the lower and the left edge only, and them and the marks at them in the colour of the text."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(INK)
    axes.tick_params(which="both", colors=INK)
    return axes
