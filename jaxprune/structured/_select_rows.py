"""Choose the rows of tables that stay, as the words of a vocabulary, and give the others' numbers away."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._printing import some
from jaxprune._tree._names import slashed
from jaxprune._tree._patterns import matches
from jaxprune.structured._axes._dims import Var, leaves, size, split_kept
from jaxprune.structured._axes._reasons import only_renumbers
from jaxprune.structured._graph import Graph
from jaxprune.structured._naming import AXIS, as_list
from jaxprune.structured._plan import Plan, plan_of


def select_rows(
    graph: Graph,
    tables: str | Sequence[str],
    *,
    keep: Any = (),
    counts: Any = None,
    number: int | None = None,
    round_to: int = 1,
) -> Plan:
    """Choose the rows of a table that stay, as the tokens that a corpus uses, in the table and in the head alike.

    Rows keep their order and get new numbers: pass ``new_ids(plan, tokens)`` to the smaller function, and read its choices by
    ``old_ids``. What lies along the rows is cut with them: a tied table's logits, a head's bias. Logits of the rows that stay
    are those of before; probabilities are rescaled by what the others had.

    Args:
        graph: the function, by `trace`.
        tables: of the parameters that have a row for each number, the paths or glob patterns: ``"embed/embedding"``, and beside it
            ``"lm_head/kernel"`` if that is not the same. ``path[axis]`` where more than one axis could be meant.
        keep: numbers of rows that stay in any case, integers of any shape: those of the tokens of a corpus, of special tokens.
        counts: how often each row is used, ``[rows]``: of the others, those that are used stay as well, the most used first.
        number: how many stay at most, at least as many as `keep` has; all of them when None.
        round_to: how many stay is raised to a multiple; unused rows fill it up, the first ones first.

    Returns:
        The plan, whose `Plan.renumbered` says of which tables. Join it with others by `combine`.

    Raises:
        ValueError: no table of the name, or tables of other sizes; the function does with the rows what more than
            a number decides; a number is out of range; none stays.

    >>> from jaxprune.structured import shrink, trace
    >>> params = {"table": jnp.arange(10.0).reshape(5, 2)}
    >>> graph = trace(lambda p, ids: p["table"][ids] @ p["table"].T, params, jnp.array([0, 1]))
    >>> plan = select_rows(graph, "table", keep=[4, 1], counts=[0, 9, 0, 2, 0])
    >>> plan.kept, new_ids(plan, np.array([4, 1, 3])).tolist(), old_ids(plan, np.array([2, 0])).tolist()
    ({'table': {0: (1, 3, 4)}}, [2, 0, 1], [4, 1])
    >>> shrink(plan, params)["table"].tolist()
    [[2.0, 3.0], [6.0, 7.0], [8.0, 9.0]]
    """
    axes = [entry for table in as_list(tables) for entry in _axes(graph, table)]
    values = dict(zip(graph.paths, graph.params, strict=True))
    sizes = {f"{path}[{axis}]": values[path].shape[axis] for path, axis in axes}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"Tables of one vocabulary have equally many rows; those given have {sizes}.")
    stays = _stays(next(iter(sizes.values())), keep, counts, number, round_to)
    kept: dict[Var, np.ndarray] = {}
    for path, axis in axes:
        dim = values[path].dims[axis]
        if not split_kept(dim, stays, kept):
            raise ValueError(f"Axis {axis} of {path} is used in parts, of which rows cannot be cut one by one.")
        for var in leaves(dim):
            if var.reason is not None and not only_renumbers(var.reason):
                raise ValueError(f"Rows along axis {axis} of {path} must stay: {var.reason}.")
    renumbered = {
        path: axis
        for path, value in values.items()
        for axis, dim in enumerate(value.dims)
        if size(dim) > 1 and kept.keys() & set(leaves(dim))
    }
    cut = {var: indices for var, indices in kept.items() if len(indices) < var.size}
    return dataclasses.replace(plan_of(graph, cut), renumbered=renumbered)


def new_ids(plan: Plan, ids: Any, *, unknown: int | None = None, table: str | None = None) -> Any:
    """Return the numbers that rows have after `select_rows` for those that they had.

    Args:
        plan: which rows stay.
        ids: old numbers, integers of any shape; under jit `unknown` has to be given.
        unknown: the old number of the row to take for one that is gone, as that of an unknown token; None for an error.
        table: the path of a table, where the plan renumbers several that keep other rows.

    Returns:
        The new numbers, in the shape and dtype of `ids`; of an array of JAX one of JAX.

    Raises:
        ValueError: a row is gone, and so is `unknown`, or that is None; a number is no row's.

    >>> plan = Plan({"table": {0: (1, 3, 4)}}, {"table": (5, 2)}, renumbered={"table": 0})
    >>> new_ids(plan, np.array([[4, 1], [0, 3]]), unknown=3).tolist()
    [[2, 0], [1, 1]]
    """
    rows, kept = _renumbered(plan, table)
    found = np.full(rows, -1)
    found[kept] = np.arange(len(kept))
    if unknown is not None:
        if not 0 <= unknown < rows or found[unknown] < 0:
            raise ValueError(f"unknown={unknown} is the old number of a row that stays, and {unknown} does not.")
        found[found < 0] = found[unknown]
    if isinstance(ids, jax.core.Tracer):
        if unknown is None:
            raise ValueError("Under jit nothing can be raised of rows that are gone: give unknown=.")
    else:
        given = np.asarray(ids)
        outside = given[(given < 0) | (given >= rows)]
        lost = outside if outside.size else given[found[given] < 0]
        if lost.size:
            what = f"no row of {rows}" if outside.size else "of a row that is gone; unknown= says what stands for it"
            raise ValueError(f"The number {lost.flat[0]} is {what}.")
    return _look_up(found, ids)


def old_ids(plan: Plan, ids: Any, *, table: str | None = None) -> Any:
    """Return the numbers that rows had before `select_rows`, for those that they have: `new_ids` turned around.

    Args:
        plan: which rows stay.
        ids: new numbers, integers of any shape.
        table: as in `new_ids`.

    Returns:
        The old numbers, in the shape and dtype of `ids`; of an array of JAX one of JAX.

    >>> plan = Plan({"table": {0: (1, 3, 4)}}, {"table": (5, 2)}, renumbered={"table": 0})
    >>> old_ids(plan, np.array([2, 0])).tolist()
    [4, 1]
    """
    _, kept = _renumbered(plan, table)
    if not isinstance(ids, jax.core.Tracer):
        given = np.asarray(ids)
        outside = given[(given < 0) | (given >= len(kept))]
        if outside.size:
            raise ValueError(f"The number {outside.flat[0]} is no row of the {len(kept)} that stay.")
    return _look_up(kept, ids)


def _look_up(numbers: np.ndarray, ids: Any) -> Any:
    if isinstance(ids, jax.Array):
        return jnp.take(jnp.asarray(numbers, ids.dtype), ids)
    return numbers[np.asarray(ids)].astype(np.asarray(ids).dtype)


def _renumbered(plan: Plan, table: str | None) -> tuple[int, np.ndarray]:
    """Return how many rows there were, and which stay."""
    if table is not None and table not in plan.renumbered:
        raise ValueError(f"The plan renumbers no rows of {table!r}, but those of {some(plan.renumbered)}.")
    found = {}
    for path in plan.renumbered if table is None else [table]:
        axis = plan.renumbered[path]
        rows = plan.shapes[path][axis]
        found[rows, tuple(plan.kept.get(path, {}).get(axis, range(rows)))] = path
    if len(found) != 1:
        raise ValueError(
            f"The plan keeps other rows of {some(found.values())}: say which with table=."
            if found
            else "The plan renumbers no rows; make it by select_rows."
        )
    ((rows, kept),) = found
    return rows, np.asarray(kept)


def _axes(graph: Graph, table: str) -> list[tuple[str, int]]:
    """Return what a name means: paths, and the axes of their rows."""
    along = AXIS.fullmatch(table)
    pattern = along[1] if along else table
    paths = [path for path in graph.paths if matches(pattern, slashed(path))]
    if not paths:
        raise ValueError(f"tables names {table!r}, which is no parameter; there are {some(graph.paths)}.")
    found = []
    for path in paths:
        value = graph.params[graph.paths.index(path)]
        if along:
            axes = [int(along[2])]
            if axes[0] >= len(value.shape):
                raise ValueError(f"tables names {table!r}, but {path} has shape {value.shape}.")
        else:
            axes = [
                axis for axis, dim in enumerate(value.dims) if any(only_renumbers(var.reason) for var in leaves(dim))
            ]
            if len(axes) != 1:
                raise ValueError(
                    f"tables names {path} of shape {value.shape}, of which {len(axes) or 'no'} axes are chosen by number or read "
                    "by number in a result; write path[axis]."
                )
        found.append((path, axes[0]))
    return found


def _stays(rows: int, keep: Any, counts: Any, number: int | None, round_to: int) -> np.ndarray:
    """Return the rows that stay, in rising order."""
    for name, value in (("number", number), ("round_to", round_to)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} is a whole number, at least 1, not {value!r}.")
    needed = np.asarray(keep).reshape(-1)
    if needed.size and not np.issubdtype(needed.dtype, np.integer):
        raise ValueError(f"keep is the numbers of rows, integers, not {needed.dtype}.")
    outside = needed[(needed < 0) | (needed >= rows)]
    if outside.size:
        raise ValueError(f"keep has {outside[0]}, but the tables have {rows} rows, from 0 on.")
    needed = np.unique(needed.astype(np.int64))
    used = np.zeros(rows) if counts is None else np.asarray(counts)
    if used.shape != (rows,) or not np.all(used >= 0):
        raise ValueError(
            f"counts is a number, at least 0, for each of {rows} rows, not of shape {used.shape}, from {np.min(used)} on."
        )
    if number is not None and len(needed) > number:
        raise ValueError(f"number is {number}, but keep has {len(needed)} rows.")
    must = np.isin(np.arange(rows), needed)
    count = int(np.sum(must | (used > 0)))
    if not count:
        raise ValueError("No row would stay: keep names none, and counts, if given, none that is used.")
    count = count if number is None else min(count, number)
    count = min(-(-count // round_to) * round_to, rows)
    order = np.lexsort((np.arange(rows), -used, ~must))
    return np.sort(order[:count])
