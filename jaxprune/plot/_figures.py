"""Pictures of pruning."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxprune._printing import in_order
from jaxprune._summary import Summary
from jaxprune._tree._leaves import is_complex
from jaxprune._tree._paths import flatten
from jaxprune.choose._sensitivity import Sensitivity
from jaxprune.plot._style import (
    BLUE,
    GREY,
    INK,
    LINES,
    RED,
    axes_of,
    frame,
    literal,
    shortened,
    sparsity_axis,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The most entries of a mask along an axis that are drawn one by one.
MAX_CELLS = 512
# The most layers that are named and written beside, and the most curves.
MAX_BARS, MAX_CURVES = 60, 16


def weights(values: Any, threshold: float, ax: "Axes | None" = None) -> "Axes":
    """Draw a histogram of weights, those below the threshold grey, the others blue.

    Args:
        values: weights of any shape, of complex ones their moduli; those that are not finite are left out.
        threshold: the magnitude below which weights are removed, >= 0.
        ax: where to draw, a new figure when None.

    Returns:
        The axes; their first patch holds the removed weights, their second one the kept ones.
    """
    axes = axes_of(ax)
    values, name = (np.abs(values), "modulus of the weight") if is_complex(values) else (values, "weight")
    flat = np.asarray(values, np.float64).ravel()
    flat = flat[np.isfinite(flat)]
    below = np.abs(flat) < float(threshold)
    # A bin holds its lower edge: without this a weight of exactly -threshold would stand among those below.
    flat = np.where(~below & (flat == -threshold) & (threshold > 0), np.nextafter(-threshold, -np.inf), flat)
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
    share = float(below.mean()) if flat.size else 0.0
    for x, align, text, color in (
        (0.03, "left", f"{100 * share:.1f} % removed", INK),
        (0.97, "right", f"{100 * (1 - share):.1f} % kept", BLUE),
    ):
        axes.text(x, 0.96, text, transform=axes.transAxes, ha=align, va="top", color=color, fontweight="bold")
    axes.set_xlabel(name, color=INK)
    axes.set_ylabel("number of weights", color=INK)
    return frame(axes)


def sparsity_by_layer(summary: Summary, ax: "Axes | None" = None) -> "Axes":
    """Draw a bar for each prunable layer, the kept share blue on grey, with the number of weights kept.

    Args:
        summary: what `summarize` found.
        ax: where to draw, a new figure when None; about a third of an inch of height a layer is readable. Of more layers
            than MAX_BARS some are named.

    Returns:
        The axes; their first container holds the bars of what is kept, from the first layer at the top.
    """
    rows = in_order((row for row in summary.rows if row.prunable), lambda row: row.path)
    axes = axes_of(ax, height=1.2 + 0.3 * min(len(rows), MAX_BARS))
    places = np.arange(len(rows))
    kept = np.asarray([1 - row.sparsity for row in rows])
    axes.barh(places, kept, color=BLUE, height=0.7)
    axes.barh(places, 1 - kept, left=kept, color=GREY, alpha=0.5, height=0.7)
    for place, row in zip(places, rows, strict=True) if len(rows) <= MAX_BARS else ():
        axes.annotate(
            f"{row.sparsity:.1%} removed, {row.kept:,} of {row.size:,} kept", (1, place), xytext=(6, 0),
            textcoords="offset points", va="center", color=INK, fontsize="small", annotation_clip=False,
        )  # fmt: skip
    named = places[:: math.ceil(len(rows) / MAX_BARS)] if rows else places
    axes.set_yticks(named, [literal(shortened(rows[place].path)) for place in named])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the layer's weights that is kept", color=INK)
    total = summary.prunable
    axes.set_title(f"{total.sparsity:.1%} of {total.size:,} prunable weights removed", color=INK, fontsize="medium")
    return frame(axes)


def sensitivity_curves(curves: Sensitivity, ax: "Axes | None" = None) -> "Axes":
    """Draw the metric against the sparsity of each layer pruned alone, and of all together.

    Args:
        curves: what `sensitivity` found.
        ax: where to draw, a new figure when None.

    Returns:
        The axes; their lines are those of the groups, in order, then of all together, then the unpruned metric. Of more
        groups than MAX_CURVES those that cost most at the last strength have colours and names.
    """
    axes = axes_of(ax)
    ends: list[tuple[float, float, str, str]] = []
    costly = set(np.argsort(curves.metric[:, -1], kind="stable")[:MAX_CURVES].tolist())
    for i, (name, share, metric) in enumerate(zip(curves.groups, curves.sparsity, curves.metric, strict=True)):
        if i not in costly:
            axes.plot(share, metric, color=GREY, linewidth=0.8, zorder=1)
            continue
        style = "-" if len(ends) < len(LINES) else "--"
        color = LINES[len(ends) % len(LINES)]
        axes.plot(share, metric, style, color=color, marker="o", markersize=4, linewidth=1.6)
        ends.append((float(metric[-1]), float(share[-1]), shortened(name), color))
    axes.plot(curves.together_sparsity, curves.together, color=INK, marker="s", markersize=4, linewidth=2.4)
    ends.append((float(curves.together[-1]), float(curves.together_sparsity[-1]), "all together", INK))
    axes.axhline(curves.dense, color=INK, linewidth=1, linestyle=":")
    axes.annotate(
        f"dense {curves.dense:.4g}", (0, curves.dense), xycoords=("axes fraction", "data"),
        xytext=(4, 4), textcoords="offset points", ha="left", va="bottom", color=INK, fontsize="small",
    )  # fmt: skip
    axes.set_xlim(0, max(1.03 * float(max(curves.sparsity.max(), curves.together_sparsity.max())), 0.1))
    _name_ends(axes, ends)
    axes.set_xlabel("sparsity of what is pruned", color=INK)
    axes.set_ylabel("metric", color=INK)
    return frame(axes)


def accuracy(
    sparsity: Any,
    curves: Mapping[str, Any],
    ax: "Axes | None" = None,
    *,
    dense: float | None = None,
    label: str = "accuracy",
) -> "Axes":
    """Draw a metric against sparsity, on an axis logarithmic in the weights left: 90 % and 99 % as far apart as 0 and 90.

    Args:
        sparsity: the fractions removed, in [0, 1), rising, ``[points]``.
        curves: by name, the metric of each point, ``[points]`` or ``[seeds, points]`` (then the mean, with bars of one
            standard deviation).
        ax: where to draw, a new figure when None.
        dense: the metric of the unpruned network.
        label: of the vertical axis.

    Returns:
        The axes.
    """
    fewer = 1 / (1 - np.asarray(sparsity, np.float64))
    axes, ends = axes_of(ax), []
    for (name, values), color in zip(curves.items(), LINES, strict=False):
        table = np.atleast_2d(np.asarray(values, np.float64))
        spread = table.std(axis=0) if len(table) > 1 else None
        mean = table.mean(axis=0)
        axes.errorbar(fewer, mean, spread, color=color, marker="o", markersize=5, linewidth=1.8, capsize=3)
        ends.append((float(mean[-1]), float(fewer[-1]), name, color))
    if dense is not None:
        axes.axhline(dense, color=INK, linewidth=1, linestyle=":")
        axes.annotate(
            f"dense {dense:.4g}", (1, dense), xycoords=("axes fraction", "data"),
            xytext=(-4, 4), textcoords="offset points", ha="right", va="bottom", color=INK, fontsize="small",
        )  # fmt: skip
    sparsity_axis(axes, fewer)
    _name_ends(axes, ends)
    axes.set_ylabel(literal(label), color=INK)
    return frame(axes)


def mask(values: Any, ax: "Axes | None" = None, *, outputs: Sequence[int] | None = (-1,)) -> "Axes":
    """Draw a mask as an image, kept weights blue, where others were what lies behind.

    Args:
        values: a mask of any shape, True = keep. The axes of its outputs run to the right, all others run down. Of a
            larger mask each cell shows the share kept of a block, so that it fits MAX_CELLS.
        ax: where to draw, a new figure when None.
        outputs: the axes that number the outputs: the last one in Flax, ``(0,)`` in PyTorch and Equinox; None where that is
            not known, and then the last axis runs to the right.

    Returns:
        The axes; their first image holds the shares.
    """
    axes = axes_of(ax)
    table = np.asarray(jax.device_get(values), np.float64)
    right = [axis % table.ndim for axis in ((-1,) if outputs is None else outputs)] if table.ndim else []
    down = [axis for axis in range(table.ndim) if axis not in right]
    table = np.transpose(table, [*down, *right]).reshape(math.prod(table.shape[axis] for axis in down), -1)
    shares = _shrunk(_shrunk(table, 0), 1)
    axes.imshow(
        shares, cmap=_blues(), vmin=0, vmax=1, interpolation="nearest", aspect="auto",
        extent=(0, table.shape[1], table.shape[0], 0),
    )  # fmt: skip
    along = "last axis" if right == [len(down)] else f"axis {', '.join(map(str, right))}"
    axes.set_xlabel(along if outputs is None else f"outputs ({along})", color=INK)
    axes.set_ylabel("all other axes" if outputs is None else "inputs (all other axes)", color=INK)
    axes.set_title(f"{table.mean():.1%} of {table.size:,} weights kept", color=INK, fontsize="medium")
    axes.spines[:].set_color(INK)
    axes.tick_params(colors=INK)
    return axes


def churn(history: Sequence[Mapping[str, float]], ax: "Axes | None" = None) -> "Axes":
    """Draw how masks changed while training: sparsity, and the share of mask bits that each change flipped.

    Args:
        history: what a log hook (`prune`, `rigl`, ...) was told, one mapping a change, with ``"step"``, ``"sparsity"``
            and ``"churn"``.
        ax: where to draw, a new figure when None.

    Returns:
        The axes; their two lines are the sparsity and the churn.
    """
    steps = [entry["step"] for entry in history]
    axes, ends = axes_of(ax), []
    for key, color, name in (("sparsity", INK, "sparsity"), ("churn", RED, "changed in one update")):
        values = [entry[key] for entry in history]
        axes.plot(steps, values, color=color, linewidth=1.8, drawstyle="steps-post" if key == "sparsity" else "default")
        ends.append((float(values[-1]), float(steps[-1]), name, color))
    axes.set_ylim(0, 1)
    _name_ends(axes, ends)
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("share of the masked weights", color=INK)
    return frame(axes)


def thresholds_of(params: Any, summary: Summary) -> dict[str, tuple[np.ndarray, float]]:
    """Return the weights and the threshold of each prunable layer that lost some, by path, for `weights`."""
    flat = flatten(params, "params")
    by_path = dict(zip(flat.paths, flat.leaves, strict=True))
    return {
        row.path: (_in_float32(by_path[row.path]), row.threshold)
        for row in summary.rows
        if row.prunable and row.threshold is not None and row.path in by_path
    }


def _in_float32(leaf: Any) -> np.ndarray:
    return np.asarray(leaf, np.complex64 if is_complex(leaf) else np.float32)


def _name_ends(axes: "Axes", ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Name the curves at the right edge, each at its height, moved apart where they would touch."""
    low, high = axes.get_ylim()
    gap = 0.055 * (high - low)
    ends = sorted(ends)
    heights = list(itertools.accumulate((y for y, *_ in ends), lambda below, y: max(y, below + gap)))
    # Those that this moved above the axes go down again, and what is below them, too.
    heights = list(itertools.accumulate(reversed(heights), lambda above, y: min(y, above - gap), initial=high + gap))[
        1:
    ]
    for (y, x, name, color), height in zip(ends, reversed(heights), strict=True):
        axes.annotate(
            literal(name), (x, y), (1.01, height), textcoords=("axes fraction", "data"), va="center", color=color,
            fontsize="small", fontweight="bold", annotation_clip=False,
        )  # fmt: skip


def _shrunk(table: np.ndarray, axis: int) -> np.ndarray:
    """Average blocks along an axis, so that it has at most MAX_CELLS cells."""
    edges = np.linspace(0, table.shape[axis], min(MAX_CELLS, table.shape[axis]) + 1).astype(int)
    sums = np.add.reduceat(table, edges[:-1], axis=axis)
    counts = np.diff(edges)
    return sums / (counts[:, None] if axis == 0 else counts[None])


def _blues() -> Any:
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    return LinearSegmentedColormap.from_list("kept", [(0.0, (*to_rgb(BLUE), 0.0)), (1.0, (*to_rgb(BLUE), 1.0))])
