"""Strengths for each layer from what each bears alone."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxprune._sensitivity import Sensitivity


def allocate(sensitivity: Sensitivity, total: float) -> dict[str, Any]:
    """Choose a strength for each layer, so that all cost the same alone and together reach a sparsity.

    For a tolerated drop of the metric each layer gets the largest strength that costs it no more alone, by
    interpolation in its curve (a drop that shrinks with k counts as constant); the tolerance is raised until the layers
    together lose `total` of their weights. What the layers cost together is not known from their curves: evaluate.

    Args:
        sensitivity: the curves.
        total: the sparsity wanted over all groups, in [0, 1].

    Returns:
        A tree prefix of the parameters, ``{"conv": {"kernel": 1.25}, ...}``: what `make_masks` takes as k, with the
        `rule` and `scores` of the sweep.

    Raises:
        ValueError: total is outside [0, 1], or more than the largest strength of the sweep removes.

    >>> curves = Sensitivity(
    ...     ks=(0.5, 1.0), groups=("a/kernel", "b/kernel"), paths=(("a/kernel",), ("b/kernel",)), sizes=(100, 100),
    ...     dense=1.0, metric=np.array([[1.0, 0.9], [0.9, 0.8]]), sparsity=np.array([[0.5, 1.0], [0.5, 1.0]]),
    ...     together=np.zeros(2), together_sparsity=np.array([0.5, 1.0]),
    ... )
    >>> allocate(curves, 0.5)  # alone, a at 0.75 and b at 0.25 both cost 0.05
    {'a': {'kernel': 0.75}, 'b': {'kernel': 0.25}}
    """
    if isinstance(total, bool) or not isinstance(total, int | float) or not 0 <= total <= 1:
        raise ValueError(f"allocate takes 0 <= total <= 1, a number; got {total!r}.")
    ks = np.asarray([0.0, *sensitivity.ks])
    zero = np.zeros((len(sensitivity.groups), 1))
    gone = np.concatenate([zero, np.maximum.accumulate(sensitivity.sparsity, axis=1)], axis=1)
    drop = np.concatenate([zero, np.maximum.accumulate(np.maximum(sensitivity.drop, 0), axis=1)], axis=1)
    sizes = np.asarray(sensitivity.sizes, np.float64)
    most = float(sizes @ gone[:, -1] / sizes.sum())
    if total > most:
        raise ValueError(
            f"allocate was asked for a sparsity of {total:g}, but the largest k of the sweep ({ks[-1]:g}) reaches "
            f"{most:.4g}; sweep over larger ks."
        )

    def strengths(tolerance: float) -> np.ndarray:
        return np.asarray([_largest_within(ks, costs, tolerance) for costs in drop])

    def removed(strengths: np.ndarray) -> float:
        shares = [np.interp(k, ks, share) for k, share in zip(strengths, gone, strict=True)]
        return float(sizes @ np.asarray(shares) / sizes.sum())

    low, high = 0.0, float(drop[:, -1].max())
    if removed(strengths(low)) >= total:
        return _as_prefix(sensitivity, _scaled(strengths(low), removed, total))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if removed(strengths(middle)) >= total else (middle, high)
    return _as_prefix(sensitivity, _between(strengths(low), strengths(high), removed, total))


def _largest_within(ks: np.ndarray, costs: np.ndarray, tolerance: float) -> float:
    """The largest k whose cost, rising and linear between the points, is within the tolerance."""
    inside = int(np.searchsorted(costs, tolerance, side="right")) - 1
    if inside == len(ks) - 1:
        return float(ks[-1])
    step = (tolerance - costs[inside]) / (costs[inside + 1] - costs[inside])
    return float(ks[inside] + step * (ks[inside + 1] - ks[inside]))


def _scaled(strengths: np.ndarray, removed: Callable[[np.ndarray], float], total: float) -> np.ndarray:
    return _between(np.zeros_like(strengths), strengths, removed, total)


def _between(low: np.ndarray, high: np.ndarray, removed: Callable[[np.ndarray], float], total: float) -> np.ndarray:
    """Strengths between two sets of them that remove the total: where a curve is flat, the tolerance alone jumps."""
    a, b = 0.0, 1.0
    for _ in range(60):
        middle = (a + b) / 2
        a, b = (a, middle) if removed(low + middle * (high - low)) >= total else (middle, b)
    return low + b * (high - low)


def _as_prefix(sensitivity: Sensitivity, strengths: np.ndarray) -> dict[str, Any]:
    prefix: dict[str, Any] = {}
    for paths, k in zip(sensitivity.paths, strengths, strict=True):
        for path in paths:
            *modules, leaf = path.split("/")
            place = functools.reduce(lambda within, key: within.setdefault(key, {}), modules, prefix)
            place[leaf] = round(float(k), 12)
    return prefix
