"""What a reader asks of a pruned model, answered from its summary: where weights went, which layers hurt, what it costs."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxprune._html import Line, table
from jaxprune._printing import alike, some
from jaxprune._report._page import Bar, bars, heading, paragraph, tiles
from jaxprune._summary import LayerRow, Summary, amount
from jaxprune.choose._sensitivity import Sensitivity

# So many bars, and rows of a table that lists the most important ones, can be taken in at a glance.
FEW = 20
MAX_DROP = 0.01  # of the metric; what the page calls too much
_SAME = 0.005  # shares removed that differ by less are the same


class Cost(NamedTuple):
    """What a group of layers costs the metric alone: at the share that is removed of it here, and which share it bears."""

    name: str
    removed: float
    drop: float
    beyond: bool  # more is removed than was tried
    bears: float


def overview(summary: Summary, costs: Sequence[Cost]) -> Iterator[str]:
    """The answers in a few figures."""
    total, rows = summary.prunable, summary.rows
    dense, stored = (sum(getattr(row, name) for row in rows) for name in ("dense_bytes", "stored_bytes"))
    found = [
        (f"{total.sparsity:.2%}", f"of {total.size:,} prunable weights removed"),
        (f"{summary.overall.sparsity:.2%}", f"of all {summary.overall.size:,} weights removed"),
        (f"{amount(stored)}B", f"as kept values with a bitmask; dense {amount(dense)}B"),
    ]
    if _told(rows):
        macs, kept = (sum(getattr(row, name) or 0 for row in rows) for name in ("macs", "macs_kept"))
        found.append((amount(kept), f"multiply-accumulates of kept weights; dense {amount(macs)}"))
    if costs:
        worst = costs[0]
        found.append((f"{worst.drop:.4g}", f"of the metric by {worst.name} alone, the most of any layer"))
    yield tiles(found)


def where(summary: Summary) -> Iterator[str]:
    """Where the weights went."""
    rows = [row for row in summary.rows if row.prunable]
    if not rows:
        return
    yield heading("Where the weights went")
    low, high = (pick(rows, key=lambda row: row.sparsity) for pick in (min, max))
    if high.sparsity - low.sparsity < _SAME:
        yield paragraph(f"Every layer lost about the same share: {summary.prunable.sparsity:.2%}.")
    else:
        yield paragraph(
            f"Between {low.sparsity:.2%} ({low.path}) and {high.sparsity:.2%} ({high.path}) of a layer are removed."
        )
    ordered = sorted(rows, key=lambda row: -row.kept)
    so_far = list(itertools.accumulate(row.kept for row in ordered))
    half = next(i for i, kept in enumerate(so_far) if 2 * kept >= so_far[-1])
    names = some(row.path for row in ordered[: half + 1])
    yield paragraph(f"Half of what stays is in {half + 1:,} of {len(rows):,} layers: {names}.")
    yield paragraph("Each bar is as long as there are weights; in colour, what stays.", "note")
    found = []
    for name, members in _largest(rows, lambda row: row.size):
        size, kept = (sum(getattr(row, what) for row in members) for what in ("size", "kept"))
        gone = 1 - kept / size if size else 0.0
        found.append(Bar(name, size, kept, f"{amount(kept)} of {amount(size)} stay, {gone:.1%} removed"))
    yield bars(found)


def costs_alone(summary: Summary, curves: Sensitivity) -> list[Cost]:
    """Return what each group that was measured costs at the share removed here, the dearest first."""
    found = []
    for i, name in enumerate(curves.groups):
        own = [
            row
            for row in summary.rows
            for path in curves.paths[i]
            if row.path == path or row.path.startswith(path + "[")
        ]
        size, kept = sum(row.size for row in own), sum(row.kept for row in own)
        if not size:
            continue
        removed, tried = 1 - kept / size, curves.sparsity[i]
        drop = float(np.interp(removed, [0.0, *tried], [0.0, *curves.drop[i]]))
        borne = itertools.takewhile(lambda point: point[1] <= MAX_DROP, zip(tried, curves.drop[i], strict=True))
        bears = max((float(share) for share, _ in borne), default=0.0)
        found.append(Cost(name, removed, drop, removed > float(tried[-1]) + _SAME, bears))
    return sorted(found, key=lambda cost: -cost.drop)


def which_hurt(costs: Sequence[Cost], dense: float) -> Iterator[str]:
    """Which layers hurt."""
    hurting = [cost.name for cost in costs if cost.drop > MAX_DROP]
    verb = "costs" if len(hurting) == 1 else "cost"
    said = (
        f"{some(hurting)} {verb} more than {MAX_DROP:g} of the metric"
        if hurting
        else f"No layer costs more than {MAX_DROP:g} of the metric"
    )
    yield paragraph(
        f"{said} (dense {dense:.4g}), pruned alone to the share that is removed of it here. Between two shares that were "
        "tried a straight line is drawn."
    )
    lines = [
        Line(
            [
                cost.name,
                f"{cost.removed:.2%}",
                f"{'beyond what was tried: ' if cost.beyond else ''}{cost.drop:.4g}",
                f"{cost.bears:.2%}",
            ],
            "bold" if cost.drop > MAX_DROP else "",
        )
        for cost in costs[:FEW]
    ]
    heads = ["layer", "removed here", "costs alone", f"share it bears for {MAX_DROP:g}"]
    yield table(heads, lines, numbers=[False, True, True, True])
    if len(costs) > FEW:
        yield paragraph(f"{len(costs) - FEW:,} more cost less.", "note")


def what_it_costs(summary: Summary) -> Iterator[str]:
    """What it costs in bytes and in multiply-accumulates."""
    rows = summary.rows
    yield heading("What it costs")
    names = ("dense_bytes", "stored_bytes", "int8_bytes")
    dense, stored, small = (sum(getattr(row, name) for row in rows) for name in names)
    ways = (("dense arrays", dense), ("kept values with a bitmask", stored), ("the same in eight bits", small))
    lines = [Line([what, f"{size:,}", _times(dense, size)]) for what, size in ways]
    yield table(["in a file", "bytes", "times smaller"], lines, numbers=[False, True, True])
    if _told(rows):
        macs, kept = (sum(getattr(row, name) or 0 for row in rows) for name in ("macs", "macs_kept"))
        counts = (("with all weights", macs), ("with the weights kept", kept))
        lines = [Line([what, f"{count:,}", _times(macs, count)]) for what, count in counts]
        yield table(["one call", "multiply-accumulates", "times fewer"], lines, numbers=[False, True, True])
        yield paragraph("Only hardware that skips zeros saves those: zeros alone make nothing faster.", "note")
    else:
        yield paragraph("Multiply-accumulates are counted where report is told uses=.", "note")
    yield heading("What takes the most", 3)
    lines = []
    for name, members in _largest(rows, lambda row: row.stored_bytes):
        sizes = [sum(getattr(row, what) for row in members) for what in names]
        macs, kept = (sum(getattr(row, what) or 0 for row in members) for what in ("macs", "macs_kept"))
        share = f"{sizes[1] / stored:.1%}" if stored else ""
        counted = [amount(macs), amount(kept)] if _told(rows) else []
        lines.append(Line([name, *(f"{size:,}" for size in sizes), share, *counted]))
    heads = ["layer", "dense bytes", "stored", "in 8 bits", "share of stored"]
    heads += ["MACs", "kept MACs"] if _told(rows) else []
    yield table(heads, lines, numbers=[False, *[True] * (len(heads) - 1)])


def _largest(rows: Sequence[LayerRow], size: Callable[[LayerRow], int]) -> Iterator[tuple[str, list[LayerRow]]]:
    """Yield the largest layers with their names, numbered ones as one where there are many, and what is left."""
    found = [(row.path, [row]) for row in rows]
    if len(found) > FEW:
        found = [(name, [rows[i] for i in members]) for name, members in alike([row.path for row in rows])]
    found.sort(key=lambda group: -sum(map(size, group[1])))
    yield from found[:FEW]
    rest = [row for _, members in found[FEW:] for row in members]
    if rest:
        yield f"{len(rest):,} smaller ones", rest


def _told(rows: Iterable[LayerRow]) -> bool:
    return any(row.macs is not None for row in rows)


def _times(before: int, after: int) -> str:
    return f"{before / after:.2f}" if after else f"{math.inf:g}"
