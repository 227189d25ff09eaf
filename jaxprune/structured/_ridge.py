"""Least squares of one reader towards outputs that need not be its own, without the channels that go."""

import numpy as np

# Shares of the mean diagonal to choose the ridge from.
_SHARES = 10.0 ** np.arange(1.0, -6.5, -0.5)
# Nothing is learnt from a fit with more parameters than this share of the samples.
_MOST_PARAMETERS = 0.8


def aim(
    gram: np.ndarray, cross: np.ndarray, weights: np.ndarray, damping: float, stays: np.ndarray | None = None
) -> np.ndarray:
    """Return the weights ``(H + d I)^-1 (X^T T + d W)``: closest to outputs T on inputs X, near to where they were.

    Args:
        gram: ``H = X^T X``, [I, I], float64.
        cross: ``X^T T``, [I, O], float64.
        weights: W, [I, O], float64.
        damping: d, as a share of the mean diagonal of H.
        stays: bool [I], which rows stay, the others being zero; None for all.
    """
    rows = np.arange(len(gram)) if stays is None else np.flatnonzero(stays)
    square = gram[np.ix_(rows, rows)]
    d = damping * (np.diagonal(gram).mean() or 1.0)
    found = np.zeros_like(weights)
    found[rows] = weights[rows] + np.linalg.solve(square + d * np.eye(len(rows)), cross[rows] - square @ weights[rows])
    return found


def fit(
    gram: np.ndarray, cross: np.ndarray, weights: np.ndarray, stays: np.ndarray, energy: float, samples: float
) -> np.ndarray:
    """Return the weights of `aim` whose rows are zero but for those that stay, with the damping that suits them best.

    That is the one of the least error on data not seen, by generalised cross-validation: a fit of n samples with
    ``tr((H + d I)^-1 H)`` effective parameters leaves ``1 / (1 - parameters / n)^2`` times the squared error there.

    Args:
        gram: as in `aim`.
        cross: as in `aim`.
        weights: as in `aim`.
        stays: bool [I], which rows stay.
        energy: the sum of the squares of T.
        samples: how many rows X has.

    Reference: Golub, Heath, Wahba, "Generalized Cross-Validation as a Method for Choosing a Good Ridge Parameter", 1979,
    equation 1.4.
    """
    values, vectors = np.linalg.eigh(gram[np.ix_(stays, stays)])
    values = np.maximum(values, 0.0)
    before = weights[stays]
    missing = cross[stays] - gram[np.ix_(stays, stays)] @ before  # X^T of what is left of T
    turned = vectors.T @ missing
    ridges = _SHARES * (np.diagonal(gram).mean() or 1.0)
    shrunk = 1 / (values + ridges[:, None])  # [shares, rows]
    left = energy - np.vdot(before, cross[stays] + missing)
    gained = np.square(turned).sum(1) * (2 * shrunk - values * np.square(shrunk))
    free = 1 - (values * shrunk).sum(1) / max(samples, 1.0)
    errors = np.where(free > 1 - _MOST_PARAMETERS, np.maximum(left - gained.sum(1), 0.0) / np.square(free), np.inf)
    found = np.zeros_like(weights)
    found[stays] = before + vectors @ (shrunk[np.argmin(errors)][:, None] * turned)
    return found
