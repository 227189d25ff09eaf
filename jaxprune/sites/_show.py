"""Statistics to look at: how many samples were measured where, and never the arrays themselves."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxprune._printing import in_order, many
from jaxprune._tree._leaves import is_known
from jaxprune.sites._sites import Site

if TYPE_CHECKING:
    from jaxprune._tables import Table


def in_short(sites: Sequence[Site]) -> str:
    """Say of how many parameters and inputs there are statistics, and how wide these are."""
    inputs = {group: site.matrix_shape[1] for site in sites for group in site.groups}
    if not inputs:
        return "of no parameter"
    low, high = min(inputs.values()), max(inputs.values())
    wide = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    return f"of {many(len(sites), 'parameter')}, {many(len(inputs), 'input')} of {wide} features"


def statistics_table(title: str, sites: Sequence[Site], counts: Mapping[int, Any], *, full: bool) -> "Table":
    """Return a table of what was measured: for each site its matrices, their inputs, and the samples of these."""
    from jaxprune._tables import Table

    table = Table(full=full, title=title, title_justify="left")
    table.add_column("path", overflow="fold")
    table.add_column("operation")
    for column in ("matrices", "inputs", "samples"):
        table.add_column(column, justify="right")
    for site in in_order(sites, lambda site: site.path):
        matrices, inputs, _ = site.matrix_shape
        found = [counts[group] for group in site.groups if group in counts]
        style = None if found else "dim"
        table.add_row(site.path, site.operation, f"{matrices:,}", f"{inputs:,}", _samples(found), style=style)
    return table


def _samples(counts: Sequence[Any]) -> str:
    """Write how many samples some inputs had, each of one matrix or of several."""
    if not counts:
        return "left out"
    if not all(isinstance(count, np.ndarray) or (isinstance(count, jax.Array) and is_known(count)) for count in counts):
        return "not at hand"  # traced, on other processes, or shapes alone
    total = sum(np.asarray(count, np.float64) for count in counts)
    low, high = float(np.min(total)), float(np.max(total))
    return f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"
