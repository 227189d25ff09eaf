"""What was pruned: a row for each layer, totals, and a table to read."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._dtypes import widen
from jaxprune._printing import Printable, as_json, in_order, many
from jaxprune._rows import Row
from jaxprune._selection import _counts, _moments
from jaxprune._tree._axes import Axes, Stacked
from jaxprune._tree._leaves import is_complex, is_floating
from jaxprune._tree._masks import align_masks
from jaxprune._tree._params import read_params
from jaxprune._tree._prunable import Prunable
from jaxprune.sites._sites import Sites
from jaxprune.storage._sizes import leaf_bytes

if TYPE_CHECKING:
    from jaxprune._tables import Table


# A layer that loses more than this is said to be nearly empty.
NEARLY_EMPTY = 0.99


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerRow(Row):
    """One layer.

    Attributes:
        prunable: whether it counts as prunable.
        dead_units: output units of which no weight is kept; 0 where nobody knows which axes number them.
        unapplied: weights that the mask removes and that are not zero.
        int8_bytes: as `stored_bytes`, with values of one byte.
        macs: multiply-accumulates of one call with all weights; None where `summarize` was not told `uses`.
        macs_kept: those of the weights kept.
    """

    prunable: bool
    dead_units: int
    unapplied: int
    int8_bytes: int
    macs: int | None
    macs_kept: int | None


@dataclasses.dataclass(frozen=True)
class Total:
    """Weights counted together; `compression` is size / kept."""

    size: int
    kept: int
    sparsity: float
    compression: float


@dataclasses.dataclass(frozen=True, repr=False)
class Summary(Printable):
    """What `summarize` found; prints as a table.

    Attributes:
        rows: for each layer its path, shape, size, kept weights, sparsity, threshold, bytes, dead units and multiply-accumulates.
        prunable: size, kept, sparsity and compression of the prunable weights together.
        overall: the same of all parameters.
    """

    rows: tuple[LayerRow, ...]
    prunable: Total
    overall: Total

    @property
    def remarks(self) -> list[str]:
        """Say in words whether the masks are applied, and which layers are nearly empty, held by the guard, or have dead units."""
        rows = in_order(self.rows, lambda row: row.path)
        return [*_not_applied(rows), *(remark for row in rows for remark in _remarks(row))]

    def _in_short(self) -> str:
        total, layers = self.prunable, sum(row.prunable for row in self.rows)
        return f"{total.sparsity:.2%} of {total.size:,} prunable weights removed, in {many(layers, 'array')} of {len(self.rows):,}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists and numbers."""
        totals = {"prunable": dataclasses.asdict(self.prunable), "overall": dataclasses.asdict(self.overall)}
        return {"rows": [row.to_dict() for row in self.rows], **totals}

    def to_json(self) -> str:
        """Return `to_dict` as JSON text; JSON has no infinity and no NaN, they become null."""
        return as_json(self.to_dict())

    def table(self, *, full: bool = False) -> "Table":
        """Return the table that is printed; a row for each layer if it is to be `full`."""
        from jaxprune._tables import Table

        table = Table(
            full=full,
            title="Sparsity by layer",
            caption="\n".join(self.remarks) or None,
            caption_justify="left",
            padding=(0, 0, 0, 1),
        )
        table.add_column("layer", overflow="fold")
        told = any(row.macs is not None for row in self.rows)
        for column in ("shape", "threshold", "std", "kept", "sparsity", "bytes", *(["MACs"] if told else [])):
            table.add_column(column, justify="right")
        for row in in_order(self.rows, lambda row: row.path):
            table.add_row(
                row.path,
                " x ".join(map(str, row.shape)),
                _figure(row.threshold),
                _figure(row.std),
                f"{row.kept:,}",
                f"{row.sparsity:.2%}" if row.prunable else "dense",
                amount(row.stored_bytes),
                *([amount(row.macs_kept)] if told else []),
                style=None if row.prunable else "dim",
            )
        for name, total, rows in (
            ("prunable weights", self.prunable, [row for row in self.rows if row.prunable]),
            ("all weights", self.overall, self.rows),
        ):
            table.add_section()
            table.add_row(
                f"{name}: {total.compression:.3g} x fewer",
                f"{total.size:,}",
                "",
                "",
                f"{total.kept:,}",
                f"{total.sparsity:.2%}",
                amount(sum(row.stored_bytes for row in rows)),
                *([amount(sum(row.macs_kept or 0 for row in rows))] if told else []),
            )
        return table


def _not_applied(rows: Sequence[LayerRow]) -> Iterator[str]:
    left = [row for row in rows if row.unapplied]
    if left:
        total, removed = (
            sum(values) for values in zip(*((row.unapplied, row.size - row.kept) for row in rows), strict=True)
        )
        if total == removed:  # as of a table of what is to be pruned, too
            yield f"None of the {removed:,} pruned weights is zero: these are the weights before apply_masks."
        else:
            yield (
                f"{total:,} of {removed:,} pruned weights are not zero, in {len(left)} layer(s), {left[0].path} the first: "
                "did you call apply_masks?"
            )


def _remarks(row: LayerRow) -> Iterator[str]:
    if not row.prunable or row.kept == row.size:
        return
    if row.kept <= 1:
        yield f"{row.path} keeps only its last weight: the guard held it, the layer is lost."
    elif row.sparsity > NEARLY_EMPTY:
        yield f"{row.path} is nearly empty: {row.kept:,} of {row.size:,} weights stay."
    if row.dead_units:
        yield f"{row.path} has {row.dead_units:,} dead unit(s), all of whose weights are gone; channels could be cut."


def amount(value: int | None) -> str:
    """Write a number with three digits and a decimal prefix.

    >>> amount(999), amount(12_345), amount(None)
    ('999', '12.3 k', '')
    """
    if value is None:
        return ""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value}"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def summarize(
    params: Any,
    masks: Any,
    *,
    prunable: Prunable = None,
    stacked: Stacked = None,
    sites: Sites | None = None,
    uses: Mapping[str, int] | None = None,
) -> Summary:
    """Summarize what the masks keep of the parameters, layer by layer and in total.

    Counts are exact for any size. Reads values: not for use under jit.

    Args:
        params: the parameters; statistics are of the values given. Where pruned weights are not zero (before `apply_masks`,
            or where an optimizer has moved them) a remark says so.
        masks: their masks, True = keep.
        prunable: which leaves count as prunable, as in `make_masks`.
        stacked: as in `make_masks`; each layer of a stack has a row of its own.
        sites: as in `make_masks`.
        uses: by path, how often each weight multiplies in one call, to count multiply-accumulates: once in a dense
            layer, as often as there are output positions in a convolution; paths left out count none.

    Returns:
        A `Summary`: rows, totals of the prunable weights and of all, and remarks on layers that collapse.

    Raises:
        ValueError: the masks do not fit the parameters; the message names the leaf.

    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.array([[3.0, 1.0], [0.5, -2.0]])}
    >>> masks = {"kernel": jnp.array([[True, False], [False, True]])}
    >>> row = summarize(params, masks).rows[0]
    >>> row.path, row.kept, row.sparsity, row.threshold
    ('kernel', 2, 0.5, 2.0)
    """
    tree = read_params(params, prunable=prunable, stacked=stacked, sites=sites)
    rows = [
        row
        for path, leaf, mask, fits, axes in zip(
            tree.paths, tree.leaves, align_masks(masks, tree), tree.prunable, tree.axes, strict=True
        )
        for row in _rows(path, jnp.asarray(leaf), mask, fits, axes, None if uses is None else uses.get(path, 0))
    ]
    return Summary(tuple(rows), _total(row for row in rows if row.prunable), _total(rows))


def _rows(path: str, leaf: jax.Array, mask: Any, prunable: bool, roles: Axes, uses: int | None) -> Iterator[LayerRow]:
    axes = tuple(axis for axis in range(leaf.ndim) if axis not in roles.stack)
    shape, layers = tuple(leaf.shape[axis] for axis in axes), tuple(leaf.shape[axis] for axis in roles.stack)
    floating = is_floating(leaf) and leaf.size > 0
    counts = np.full(layers, math.prod(shape), np.int64) if mask is None else _counted(mask, axes)
    unapplied = np.zeros(layers, np.int64)
    if floating:
        mask = jnp.ones_like(leaf, dtype=bool) if mask is None else mask
        cuts, stds = _measure(leaf, mask, axes=axes)
        if (counts < math.prod(shape)).any():
            unapplied = _counted(~jnp.asarray(mask) & (leaf != 0), axes)
    dead = _dead_units(mask, axes, roles) if prunable and floating else np.int64(0)
    dead = np.broadcast_to(dead, layers)
    for index in np.ndindex(layers):
        size, kept = math.prod(shape), int(counts[index])
        yield LayerRow(
            path=path + "".join(f"[{i}]" for i in index),
            shape=shape,
            size=size,
            kept=kept,
            threshold=float(cuts[index]) if floating and kept < size else None,
            std=float(stds[index]) if floating else None,
            prunable=prunable,
            dead_units=int(dead[index]),
            unapplied=int(unapplied[index]),
            dense_bytes=size * leaf.dtype.itemsize,
            stored_bytes=leaf_bytes(shape, leaf.dtype.itemsize, kept),
            int8_bytes=leaf_bytes(shape, leaf.dtype.itemsize, kept, 8 if floating and not is_complex(leaf) else None),
            macs=None if uses is None else uses * size,
            macs_kept=None if uses is None else uses * kept,
        )


def _counted(mask: Any, axes: tuple[int, ...]) -> np.ndarray:
    return _counts.to_numpy(_counts.count_true(jnp.asarray(mask), axes))


def _dead_units(mask: Any, axes: tuple[int, ...], roles: Axes) -> np.ndarray:
    """Count for each layer the output units of which nothing is kept."""
    if roles.outputs is None:  # nobody knows what a unit is
        return np.zeros((), np.int64)
    alive = jnp.any(mask, tuple(axis for axis in axes if axis not in roles.outputs), keepdims=True)
    return _counted(~alive, axes)


@functools.partial(jax.jit, static_argnames="axes")
def _measure(leaf: jax.Array, mask: jax.Array, *, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    return (
        jnp.min(jnp.where(mask, jnp.abs(widen(leaf)), jnp.inf), axes),
        jnp.squeeze(_moments.std(leaf, axes), axes),
    )


def _total(rows: Any) -> Total:
    pairs = [(row.size, row.kept) for row in rows]
    size, kept = sum(size for size, _ in pairs), sum(kept for _, kept in pairs)
    return Total(size, kept, 1 - kept / size if size else 0.0, size / kept if kept else math.inf)
