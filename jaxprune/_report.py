"""What was pruned: a row for each layer, totals, and a table to read."""

import dataclasses
import functools
import io
import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _statistics
from jaxprune._masks import align_masks
from jaxprune._paths import flatten, require_arrays
from jaxprune._prunable import Predicate, Stacked, choose, stack_axes

if TYPE_CHECKING:
    from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer: `threshold` is the smallest magnitude kept (None where nothing is removed), `std` of the weights."""

    path: str
    shape: tuple[int, ...]
    size: int
    kept: int
    sparsity: float
    threshold: float | None
    std: float | None
    prunable: bool


@dataclasses.dataclass(frozen=True)
class Total:
    """Weights counted together; `compression` is size / kept."""

    size: int
    kept: int
    sparsity: float
    compression: float


@dataclasses.dataclass(frozen=True)
class Summary:
    """What `summarize` found; prints as a table."""

    rows: tuple[Row, ...]
    prunable: Total
    overall: Total

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists and numbers."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """Return `to_dict` as JSON text; JSON has no infinity and no NaN, they become null."""
        return json.dumps(_finite(self.to_dict()), indent=2, allow_nan=False)

    def __rich__(self) -> "Table":
        """Return the table for rich to print."""
        from rich.table import Table

        table = Table(title="Sparsity by layer")
        table.add_column("layer", overflow="fold")
        for column in ("shape", "threshold", "std", "kept", "size", "sparsity"):
            table.add_column(column, justify="right")
        for row in self.rows:
            table.add_row(
                row.path,
                " x ".join(map(str, row.shape)),
                _figure(row.threshold),
                _figure(row.std),
                f"{row.kept:,}",
                f"{row.size:,}",
                f"{row.sparsity:.2%}" if row.prunable else "dense",
                style=None if row.prunable else "dim",
            )
        for name, total in (("prunable weights", self.prunable), ("all weights", self.overall)):
            table.add_section()
            share = f"{total.sparsity:.2%}"
            table.add_row(name, "", "", f"{total.compression:.3g} x fewer", f"{total.kept:,}", f"{total.size:,}", share)
        return table

    def __str__(self) -> str:
        """Return the table as plain text."""
        from rich.console import Console

        console = Console(file=io.StringIO(), width=120, no_color=True)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def summarize(params: Any, masks: Any, *, prunable: Predicate | Any = None, stacked: Stacked | None = None) -> Summary:
    """Summarize what the masks keep of the parameters, layer by layer and in total.

    Counts are exact for any size. Reads values: not for use under jit.

    Args:
        params: the parameters, before or after `apply_masks`; statistics are of the values given.
        masks: their masks, True = keep.
        prunable: which leaves count as prunable, as in `make_masks`.
        stacked: as in `make_masks`; each layer of a stack has a row of its own.

    Returns:
        A `Summary`: rows, and totals of the prunable weights and of all.

    Raises:
        ValueError: the masks do not fit the parameters; the message names the leaf.

    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.array([[3.0, 1.0], [0.5, -2.0]])}
    >>> masks = {"kernel": jnp.array([[True, False], [False, True]])}
    >>> row = summarize(params, masks).rows[0]
    >>> row.path, row.kept, row.sparsity, row.threshold
    ('kernel', 2, 0.5, 2.0)
    """
    flat = flatten(params, "params")
    require_arrays(flat)
    stacks = stack_axes(stacked, flat)
    chosen = choose(prunable, params, flat, stacks)
    rows = [
        row
        for path, leaf, mask, fits, stack in zip(
            flat.paths, flat.leaves, align_masks(masks, flat), chosen, stacks, strict=True
        )
        for row in _rows(path, jnp.asarray(leaf), mask, fits, stack)
    ]
    return Summary(tuple(rows), _total(row for row in rows if row.prunable), _total(rows))


def _rows(path: str, leaf: jax.Array, mask: Any, prunable: bool, stack: int) -> Iterator[Row]:
    shape = leaf.shape[stack:]
    axes = tuple(range(stack, leaf.ndim))
    floating = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.size > 0
    counts = np.full(leaf.shape[:stack], math.prod(shape), np.int64) if mask is None else _count(mask, axes)
    if floating:
        cuts, stds = _measure(leaf, jnp.ones_like(leaf, dtype=bool) if mask is None else mask, axes=axes)
    for index in np.ndindex(leaf.shape[:stack]):
        size, kept = math.prod(shape), int(counts[index])
        yield Row(
            path=path + "".join(f"[{i}]" for i in index),
            shape=shape,
            size=size,
            kept=kept,
            sparsity=1 - kept / size if size else 0.0,
            threshold=float(cuts[index]) if floating and kept < size else None,
            std=float(stds[index]) if floating else None,
            prunable=prunable,
        )


@functools.partial(jax.jit, static_argnames="axes")
def _measure(leaf: jax.Array, mask: jax.Array, *, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    return (
        jnp.min(jnp.where(mask, jnp.abs(leaf), jnp.inf), axes),
        jnp.squeeze(_statistics.std(leaf, axes), axes),
    )


def _count(mask: jax.Array, axes: tuple[int, ...]) -> np.ndarray:
    """Count True exactly: modulo 2**32 in integers, with a float estimate to tell how often that wrapped."""
    low = np.asarray(jnp.sum(mask, axes, dtype=jnp.uint32), np.int64)
    near = np.asarray(jnp.sum(mask, axes, dtype=jnp.float32), np.float64)
    return low + 2**32 * np.round((near - low) / 2**32).astype(np.int64)


def _total(rows: Any) -> Total:
    pairs = [(row.size, row.kept) for row in rows]
    size, kept = sum(size for size, _ in pairs), sum(kept for _, kept in pairs)
    return Total(size, kept, 1 - kept / size if size else 0.0, size / kept if kept else math.inf)
