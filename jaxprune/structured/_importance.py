"""How much each channel matters, from all weights that would be cut with it.

An importance is a function of a matrix ``[channels, weights]`` to a number for each channel, larger = keep. A row holds
the weights of a channel in all members of its group: its producer's, its bias's, its consumers'.
"""

from collections.abc import Callable

import numpy as np

Importance = Callable[[np.ndarray], np.ndarray]


def l1(weights: np.ndarray) -> np.ndarray:
    """Sum of magnitudes (Li et al., Pruning Filters for Efficient ConvNets, 2017).

    >>> l1(np.array([[1.0, -2.0], [0.0, 1.0]])).tolist()
    [3.0, 1.0]
    """
    return np.abs(weights).sum(1)


def l2(weights: np.ndarray) -> np.ndarray:
    """Euclidean norm (Fang et al., DepGraph, 2023, for a whole group).

    >>> l2(np.array([[3.0, -4.0], [0.0, 1.0]])).tolist()
    [5.0, 1.0]
    """
    return np.sqrt(np.square(weights).sum(1))


def total(weights: np.ndarray) -> np.ndarray:
    """Sum: for scores of weights, such as ``scores.saliency`` (Molchanov et al., Importance Estimation, 2019).

    >>> total(np.array([[3.0, 4.0], [0.0, 1.0]])).tolist()
    [7.0, 1.0]
    """
    return weights.sum(1)


def distance(weights: np.ndarray) -> np.ndarray:
    """Sum of distances to all other channels: what lies near the geometric median can be replaced by the others.

    He et al., Filter Pruning via Geometric Median, 2019, eq. 4.

    >>> distance(np.array([[0.0], [1.0], [5.0]])).tolist()
    [6.0, 5.0, 9.0]
    """
    return np.array([np.sqrt(np.square(weights - row).sum(1)).sum() for row in weights])
