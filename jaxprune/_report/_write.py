"""Write one self-contained HTML page about a pruned model."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxprune._html import Line, table
from jaxprune._printing import FEW_LINES, folded, in_order
from jaxprune._report._answers import MAX_DROP, Cost, costs_alone, overview, what_it_costs, where, which_hurt
from jaxprune._report._page import box, figure, figures, heading, page, paragraph
from jaxprune._summary import LayerRow, Summary, amount, summarize
from jaxprune._tree._axes import Stacked, read_axes
from jaxprune._tree._paths import flatten, read_arrays
from jaxprune._tree._prunable import Prunable
from jaxprune.choose._sensitivity import Sensitivity
from jaxprune.sites._sites import Sites
from jaxprune.storage import _atomic

# So many layers get a histogram and an image of their mask, those with the most weights.
LARGEST = 12


def report(
    path: str | Path,
    params: Any,
    masks: Any,
    *,
    title: str = "Pruning report",
    sensitivity: Sensitivity | None = None,
    history: Sequence[Mapping[str, float]] | None = None,
    prunable: Prunable = None,
    stacked: Stacked = None,
    sites: Sites | None = None,
    uses: Mapping[str, int] | None = None,
) -> Summary:
    """Write one HTML page about a pruned model: where the weights went, which layers hurt, what it costs, and each layer.

    The page holds its figures and its style and loads nothing; it is light or dark as the reader's system, and fits a narrow window.
    It appears whole or not at all. Of many layers those that are numbered share a bar; a table has a row for each. Needs matplotlib.

    Args:
        path: the file to write.
        params: the parameters, before or after `apply_masks`; histograms are of the values given.
        masks: their masks, True = keep.
        title: of the page.
        sensitivity: what `sensitivity` found: the page then says what each layer costs alone at the share removed of it here.
        history: what a log hook was told while training, to be shown as a figure; see `jaxprune.plot.churn`.
        prunable: as in `make_masks`.
        stacked: as in `make_masks`.
        sites: as in `make_masks`.
        uses: as in `summarize`.

    Returns:
        The summary that the page shows.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
        OSError: the file cannot be written.
        ValueError: the masks do not fit the parameters; the message names the leaf. Or `path` is a device, a pipe or a
            folder.
    """
    summary = summarize(params, masks, prunable=prunable, stacked=stacked, sites=sites, uses=uses)
    tree = read_arrays(params, "params")
    outputs = {path: axes.outputs for path, axes in zip(tree.paths, read_axes(tree, stacked, sites), strict=True)}
    costs = [] if sensitivity is None else costs_alone(summary, sensitivity)
    parts = [
        *overview(summary, costs),
        *_remarks(summary.remarks),
        *where(summary),
        *_hurting(sensitivity, costs),
        *what_it_costs(summary),
        *_each(summary),
        *_pictures(params, masks, summary, outputs),
        *(_of_history(history) if history else ()),
    ]
    with _atomic.replacing(Path(path)) as file:
        file.write(page(title, parts).encode())
    return summary


def _each(summary: Summary) -> Iterator[str]:
    rows = in_order(summary.rows, lambda row: row.path)
    told = any(row.macs is not None for row in rows)
    heads = ["layer", "shape", "threshold", "std", "kept", "weights", "sparsity", "dead units", "bytes", "in 8 bits"]
    heads += ["MACs", "kept MACs"] if told else []
    yield heading("Layer by layer")
    yield box(table(heads, [_line(row, told) for row in rows], numbers=[False, *[True] * (len(heads) - 1)]))


def _line(row: LayerRow, told: bool) -> Line:
    cells = [
        row.path,
        " x ".join(map(str, row.shape)),
        "" if row.threshold is None else f"{row.threshold:.4g}",
        "" if row.std is None else f"{row.std:.4g}",
        f"{row.kept:,}",
        f"{row.size:,}",
        f"{row.sparsity:.2%}" if row.prunable else "dense",
        f"{row.dead_units:,}" if row.prunable else "",
        f"{row.stored_bytes:,}",
        f"{row.int8_bytes:,}",
        *([amount(row.macs), amount(row.macs_kept)] if told else []),
    ]
    return Line(cells, "" if row.prunable else "dim")


def _pictures(
    params: Any, masks: Any, summary: Summary, outputs: Mapping[str, tuple[int, ...] | None]
) -> Iterator[str]:
    from jaxprune import plot
    from jaxprune.plot._figures import thresholds_of

    weights = thresholds_of(params, summary)
    flat = flatten(masks, "masks")
    by_path = dict(zip(flat.paths, flat.leaves, strict=True))
    largest = sorted(weights, key=lambda path: -weights[path][0].size)[:LARGEST]
    if largest:
        yield heading("Weights and masks")
    if len(weights) > LARGEST:
        yield paragraph(f"Of the {LARGEST} largest of {len(weights):,} layers that lost weights.", "note")
    for path in in_order(largest):
        values, threshold = weights[path]
        yield heading(path, 3)
        histogram = figure(f"Weights of {path}", functools.partial(plot.weights, values, threshold))
        seen = functools.partial(plot.mask, by_path[path], outputs=outputs[path])
        yield figures([histogram, figure(f"Mask of {path}{_to_the_right(outputs[path])}", seen)])


def _to_the_right(outputs: tuple[int, ...] | None) -> str:
    return "" if outputs is None else f", outputs (axis {', '.join(map(str, outputs))}) to the right"


def _hurting(curves: Sensitivity | None, costs: Sequence[Cost]) -> Iterator[str]:
    from jaxprune import plot

    yield heading("Which layers hurt")
    if curves is None:
        yield paragraph("Unknown: report is told by sensitivity=, what jaxprune.sensitivity measured.", "note")
        return
    yield from which_hurt(costs, curves.dense)
    draw = functools.partial(plot.sensitivity_curves, curves)
    yield figures([figure("Metric against sparsity, each layer alone", draw, height=4.6)])
    yield from _remarks(curves.remarks(MAX_DROP))
    yield box(curves.table(full=True).to_html())


def _remarks(remarks: Sequence[str]) -> Iterator[str]:
    for _, (remark,) in folded((("", [remark]) for remark in remarks), FEW_LINES):
        yield paragraph(remark, "remark")


def _of_history(history: Sequence[Mapping[str, float]]) -> Iterator[str]:
    from jaxprune import plot

    yield heading("While training")
    yield figures([figure("Sparsity and churn of the masks while training", functools.partial(plot.churn, history))])
