"""Strengths for each layer from what each bears alone."""

from typing import Any

import numpy as np

from jaxprune._tree._paths import as_prefix
from jaxprune.choose._sensitivity import Sensitivity


def allocate(sensitivity: Sensitivity, k: float) -> Any:
    """Choose a strength for each layer so that together they reach a sparsity at the least cost.

    The cost is the sum of what the layers cost alone, linear between the points of the sweep; of each curve the lower
    convex hull counts, a metric that rises counting as one that stays. Weights are taken where the next one costs least,
    so a small layer that bears little stays nearly dense. What layers cost together is not known from their curves:
    evaluate the result.

    Args:
        sensitivity: the curves.
        k: the sparsity wanted over all groups, in [0, 1].

    Returns:
        A tree prefix of the parameters, ``{"conv": {"kernel": 1.25}, ...}``: what `make_masks` takes as k, with the
        `rule` and `scores` of the sweep.

    Raises:
        ValueError: k is outside [0, 1], or more than the largest strength of the sweep removes.

    >>> curves = Sensitivity(
    ...     ks=(0.5, 1.0), groups=("a/kernel", "b/kernel"), paths=(("a/kernel",), ("b/kernel",)), sizes=(100, 100),
    ...     dense=1.0, metric=np.array([[1.0, 0.9], [0.9, 0.8]]), sparsity=np.array([[0.5, 1.0], [0.5, 1.0]]),
    ...     together=np.zeros(2), together_sparsity=np.array([0.5, 1.0]),
    ... )
    >>> allocate(curves, 0.4)  # the first half of a is free, b costs from the first weight on: 80 of a
    {'a': {'kernel': 0.8}, 'b': {'kernel': 0.0}}
    """
    if isinstance(k, bool) or not isinstance(k, int | float) or not 0 <= k <= 1:
        raise ValueError(f"allocate takes a sparsity, 0 <= k <= 1, a number; got {k!r}.")
    sizes = np.asarray(sensitivity.sizes, np.float64)
    ks = np.asarray([0.0, *sensitivity.ks])
    zero = np.zeros((len(sizes), 1))
    removed = sizes[:, None] * np.concatenate([zero, np.maximum.accumulate(sensitivity.sparsity, axis=1)], axis=1)
    cost = np.concatenate([zero, np.maximum.accumulate(np.maximum(sensitivity.drop, 0), axis=1)], axis=1)
    wanted, most = k * sizes.sum(), float(removed[:, -1].sum())
    if wanted > most * (1 + 1e-12):
        raise ValueError(
            f"allocate was asked for a sparsity of {k:g}, but the largest k of the sweep ({ks[-1]:g}) reaches "
            f"{most / sizes.sum():.4g}; sweep over larger ks."
        )

    steps = [
        (slope, group, weights) for group in range(len(sizes)) for slope, weights in _hull(removed[group], cost[group])
    ]
    taken = np.zeros(len(sizes))
    for _, group, weights in sorted(steps):
        taken[group] += min(weights, wanted - taken.sum())
    strengths = [_strength(weights, removed[group], ks) for group, weights in enumerate(taken)]
    pairs = zip(sensitivity.paths, strengths, strict=True)
    return as_prefix({path: strength for paths, strength in pairs for path in paths})


def _hull(removed: np.ndarray, cost: np.ndarray) -> list[tuple[float, float]]:
    """Return the lower convex hull of a curve from the origin as steps (cost of a weight, weights), rising in cost."""
    corners: list[tuple[float, float]] = []
    for x, y in zip(removed, cost, strict=True):
        while len(corners) > 1 and _slope(corners[-2], corners[-1]) >= _slope(corners[-2], (x, y)):
            corners.pop()
        if not corners or x > corners[-1][0]:
            corners.append((float(x), float(y)))
    return [(_slope(a, b), b[0] - a[0]) for a, b in zip(corners, corners[1:], strict=False)]


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0]) if b[0] > a[0] else np.inf


def _strength(weights: float, removed: np.ndarray, ks: np.ndarray) -> float:
    """The smallest strength that removes so many weights, linear between the points of the sweep."""
    rising = np.concatenate([[True], np.diff(removed) > 0])
    return round(float(np.interp(weights, removed[rising], ks[rising])), 12)
