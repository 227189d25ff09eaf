"""One self-contained HTML page about a pruned model."""

import base64
import html
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxprune._printing import FEW_LINES, folded, printable
from jaxprune._summary import LayerRow, Summary, amount, summarize
from jaxprune._tree._axes import Stacked, read_axes
from jaxprune._tree._paths import flatten, read_arrays
from jaxprune._tree._prunable import Prunable
from jaxprune.choose._sensitivity import Sensitivity
from jaxprune.sites._sites import Sites
from jaxprune.storage import _atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# So many layers get a histogram and an image of their mask, those with the most weights.
LARGEST = 12
MAX_DROP = 0.01  # of the metric; what the page calls too high to survive

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #333; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .3rem .5rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
tr.dense { color: #777; } tr.total { font-weight: bold; border-top: 2px solid #333; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; }
.remark { border-left: 4px solid #d55e00; padding-left: .8rem; }
"""


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
    """Write one HTML page about a pruned model: what was removed where, what it costs to keep, figures and remarks.

    The page holds its figures and its style and loads nothing. It appears whole or not at all. Of many layers those that are
    numbered share a row. Needs matplotlib.

    Args:
        path: the file to write.
        params: the parameters, before or after `apply_masks`; histograms are of the values given.
        masks: their masks, True = keep.
        title: of the page.
        sensitivity: what `sensitivity` found, to be shown as a table and a figure.
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
    parts = [*_overview(summary), *_layers(params, masks, summary, outputs)]
    if sensitivity is not None:
        parts += _of_sensitivity(sensitivity)
    if history:
        parts += _of_history(history)
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(printable(title))}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n'
        f"<body><h1>{html.escape(printable(title))}</h1>\n{chr(10).join(parts)}\n</body></html>\n"
    )
    with _atomic.replacing(Path(path)) as file:
        file.write(page.encode())
    return summary


def _overview(summary: Summary) -> Iterator[str]:
    from jaxprune import plot
    from jaxprune.plot._figures import MAX_BARS

    total, rows = summary.prunable, summary.rows
    dense, sparse, small = (
        sum(getattr(row, name) for row in rows) for name in ("dense_bytes", "stored_bytes", "int8_bytes")
    )
    yield (
        f"<p>{total.sparsity:.2%} of the {total.size:,} prunable weights are removed, {total.kept:,} stay "
        f"({total.compression:.3g} times fewer); of all {summary.overall.size:,} weights {summary.overall.sparsity:.2%} "
        f"are. Stored as kept values with a bitmask they take {amount(sparse)}B, in eight bits {amount(small)}B, "
        f"against {amount(dense)}B dense.</p>"
    )
    yield from _remarks(summary.remarks)
    layers = min(sum(row.prunable for row in rows), MAX_BARS)
    yield _figure("Sparsity by layer", lambda axes: plot.sparsity_by_layer(summary, axes), height=1.2 + 0.32 * layers)
    yield "<h2>Layers</h2>"
    told = any(row.macs is not None for row in rows)
    heads = ["layer", "shape", "threshold", "std", "kept", "weights", "sparsity", "dead units", "bytes", "in 8 bits"]
    body = [_row(row, told) for row in rows]
    yield _table([*heads, *(["MACs", "kept MACs"] if told else [])], body)


def _row(row: LayerRow, told: bool) -> tuple[str, list[str]]:
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
    return ("" if row.prunable else "dense"), cells


def _layers(params: Any, masks: Any, summary: Summary, outputs: Mapping[str, tuple[int, ...] | None]) -> Iterator[str]:
    from jaxprune import plot
    from jaxprune.plot._figures import thresholds_of

    weights = thresholds_of(params, summary)
    flat = flatten(masks, "masks")
    by_path = dict(zip(flat.paths, flat.leaves, strict=True))
    largest = sorted(weights, key=lambda path: -weights[path][0].size)[:LARGEST]
    if largest:
        yield "<h2>Weights and masks</h2>"
    for path in (path for path in weights if path in largest):
        values, threshold = weights[path]

        def draw(left: "Axes", right: "Axes", values: Any = values, cut: float = threshold, path: str = path) -> None:
            plot.weights(values, cut, left)
            plot.mask(by_path[path], right, outputs=outputs[path])

        yield f"<h3>{html.escape(printable(path))}</h3>" + _figure(
            f"Weights and mask of {path}{_to_the_right(outputs[path])}", draw, columns=2, height=3.2
        )


def _to_the_right(outputs: tuple[int, ...] | None) -> str:
    return "" if outputs is None else f", outputs (axis {', '.join(map(str, outputs))}) to the right"


def _of_sensitivity(curves: Sensitivity) -> Iterator[str]:
    from jaxprune import plot

    yield "<h2>Sensitivity</h2>"
    yield _figure(
        "Metric against sparsity, each layer alone", lambda axes: plot.sensitivity_curves(curves, axes), width=7.5
    )
    heads = ["layer", *(f"k = {k:g}" for k in curves.ks)]
    names = [*curves.groups, "all together"]
    values = [*curves.metric, curves.together]
    shares = [*curves.sparsity, curves.together_sparsity]
    body = [
        ("", [name, *(f"{value:.4g} ({share:.0%})" for value, share in zip(row, gone, strict=True))])
        for name, row, gone in zip(names, values, shares, strict=True)
    ]
    yield f"<p>The metric (dense {curves.dense:.4g}) with one layer pruned, and the sparsity of that layer.</p>"
    yield _table(heads, [*body[:-1], ("total", body[-1][1])])
    yield from _remarks(curves.remarks(MAX_DROP))


def _remarks(remarks: Sequence[str]) -> Iterator[str]:
    for _, (remark,) in folded((("", [remark]) for remark in remarks), FEW_LINES):
        yield f'<p class="remark">{html.escape(printable(remark))}</p>'


def _of_history(history: Sequence[Mapping[str, float]]) -> Iterator[str]:
    from jaxprune import plot

    yield "<h2>While training</h2>"
    yield _figure("Sparsity and churn of the masks while training", lambda axes: plot.churn(history, axes), width=7.5)


def _table(heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    body = "\n".join(
        f'<tr class="{kind}">' + "".join(f"<td>{html.escape(printable(cell))}</td>" for cell in cells) + "</tr>"
        for kind, cells in folded(rows)
    )
    return f'<div class="table"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _figure(alt: str, draw: Callable[..., Any], *, columns: int = 1, width: float = 10.0, height: float = 4.5) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    draw(*figure.subplots(1, columns, squeeze=False)[0])
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    code = base64.b64encode(picture.getvalue()).decode()
    return f'<figure><img alt="{html.escape(printable(alt))}" src="data:image/png;base64,{code}"></figure>'
