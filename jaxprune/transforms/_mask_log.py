"""What a logging hook is told each time masks change."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._dtypes import widen
from jaxprune._selection import _counts
from jaxprune._selection._counts import Count
from jaxprune._tree._axes import Axes, Stacked, read_axes
from jaxprune._tree._leaves import is_floating
from jaxprune._tree._masks import align_masks
from jaxprune._tree._paths import flatten
from jaxprune.sites._sites import Sites

# Called with numbers by name.
Log = Callable[[dict[str, float]], None]


def tell(
    log: Log,
    scalars: dict[str, Any],
    params: Any,
    weights: Any,
    before: Any,
    after: Any,
    stacked: Stacked = None,
    sites: Sites | None = None,
) -> None:
    """Call `log` from inside a compiled program, with `scalars` and what has become of the masks.

    Leaves that were and stay whole do not count.

    Args:
        log: the hook.
        scalars: what else to say, scalar arrays by name.
        params: the parameters under the masks `before`.
        weights: the same tree, the values that the masks `after` were made from.
        before: the masks that held until now.
        after: the masks that hold from now on.
        stacked: as in `make_masks`.
        sites: as in `make_masks`.
    """
    flat = flatten(params, "params")
    figures, sizes = {}, {}
    for path, param, weight, old, new, roles in zip(
        flat.paths,
        flat.leaves,
        flatten(weights, "params").leaves,
        align_masks(before, flat),
        align_masks(after, flat),
        read_axes(flat, stacked, sites),
        strict=True,
    ):
        if old is not None and new is not None and is_floating(param):
            figures[path] = _of_leaf(roles, weight, param, old, new)
            sizes[path] = param.size

    def on_host(scalars: dict[str, Any], figures: dict[str, dict[str, Any]]) -> None:
        touched = {
            path: found
            for path, found in figures.items()
            if any(int(_counts.to_numpy(found[what])) for what in ("removed", "changed"))
        }
        size = max(1, sum(sizes[path] for path in touched))

        def total(what: str) -> int:
            return sum(int(_counts.to_numpy(found[what])) for found in touched.values())

        log(
            {
                **{name: np.asarray(value).item() for name, value in scalars.items()},
                "sparsity": total("removed") / size,
                "churn": total("changed") / size,
                "dead_units": total("dead_units"),
                "escaped": total("escaped"),
                **{f"threshold/{path}": float(found["threshold"]) for path, found in touched.items()},
            }
        )

    jax.debug.callback(on_host, scalars, figures)


def _of_leaf(roles: Axes, weight: jax.Array, param: jax.Array, old: jax.Array, new: jax.Array) -> dict[str, Any]:
    return {
        "removed": _count(~new),
        "changed": _count(old ^ new),
        "dead_units": _count(_dead_units(roles, new)),
        "escaped": _count(~old & (param != 0)),
        "threshold": jnp.min(jnp.where(old & new, jnp.abs(widen(weight)), jnp.inf)),
    }


def _dead_units(roles: Axes, mask: jax.Array) -> jax.Array:
    if roles.outputs is None:  # nobody knows what a unit is
        return jnp.zeros((), bool)
    return ~jnp.any(mask, tuple(axis for axis in range(mask.ndim) if axis not in (*roles.stack, *roles.outputs)))


def _count(condition: jax.Array) -> Count:
    return _counts.count_true(condition, tuple(range(condition.ndim)))
