"""The one-shot methods in NumPy and float64, written from the papers' equations; matrices are [inputs, outputs]."""

from collections.abc import Callable

import numpy as np

# (scores [rows, outputs], index of the first row) -> mask, True = keep
Choose = Callable[[np.ndarray, int], np.ndarray]


def damped(gram: np.ndarray, damping: float) -> np.ndarray:
    gram = np.asarray(gram, np.float64)
    return gram + damping * np.mean(np.diagonal(gram)) * np.eye(len(gram))


def keep_largest(scores: np.ndarray, removed: int) -> np.ndarray:
    mask = np.ones(scores.size, bool)
    mask[np.argsort(scores, axis=None, kind="stable")[:removed]] = False
    return mask.reshape(scores.shape)


def layer(k: float, inputs: int, outputs: int) -> Choose:
    """Remove round(k * n) of the matrix; the first r inputs together the whole part of their share."""
    total = round(k * inputs * outputs)

    def choose(scores: np.ndarray, first: int) -> np.ndarray:
        last = min(first + len(scores), inputs)
        return keep_largest(scores, total * last // inputs - total * first // inputs)

    return choose


def units(k: float, inputs: int) -> Choose:
    """The same for each output."""
    of_one = layer(k, inputs, 1)
    return lambda scores, first: np.stack([of_one(column, first) for column in scores.T], axis=1)


def n_of_m(n: int, m: int) -> Choose:
    def choose(scores: np.ndarray, first: int) -> np.ndarray:
        groups = scores.reshape(-1, m, scores.shape[1])
        ranks = np.argsort(np.argsort(-groups, axis=1, kind="stable"), axis=1)
        return (ranks < n).reshape(scores.shape)

    return choose


def sparsegpt(weights: np.ndarray, gram: np.ndarray, choose: Choose, mask_block: int) -> tuple[np.ndarray, np.ndarray]:
    """Frantar & Alistarh 2023, algorithm 1 for the damped H; lazy updates change nothing and are left out."""
    weights = np.array(weights, np.float64)
    inverse = np.linalg.cholesky(np.linalg.inv(gram)).T  # upper
    mask = np.ones(weights.shape, bool)
    for j in range(len(weights)):
        if j % mask_block == 0:
            rows = slice(j, j + mask_block)
            mask[rows] = choose(weights[rows] ** 2 / np.diagonal(inverse)[rows, None] ** 2, j)
        error = np.where(mask[j], 0, weights[j]) / inverse[j, j]
        weights[j:] -= inverse[j, j:, None] * error
    return np.where(mask, weights, 0), mask


def fit(weights: np.ndarray, mask: np.ndarray, bits: int, *, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    """The scale, rounded up to 8 significant bits, and the code of zero for each output of a group."""
    kept = np.where(mask, np.asarray(weights, np.float64), 0)
    low, high = np.minimum(kept.min(0), 0), np.maximum(kept.max(0), 0)
    widest = (2 * np.maximum(-low, high) if symmetric else high - low) / (2**bits - 1)
    mantissa, exponent = np.frexp(widest)
    scale = np.where(widest > 0, np.ldexp(np.ceil(mantissa * 256) / 256, exponent), 1.0)
    return scale, np.zeros(scale.shape) if symmetric else -(2 ** (bits - 1)) - np.rint(low / scale)


def gptq(
    weights: np.ndarray,
    gram: np.ndarray,
    mask: np.ndarray,
    *,
    bits: int,
    group: int,
    symmetric: bool = True,
    choose: Choose | None = None,
    order: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frantar et al. 2022, algorithm 1 for the damped H, with 2023, section 3.5 where `choose` prunes group by group.

    Returns the weights, the mask and the codes. With an order of the inputs, scales are those of the weights given.
    """
    weights, mask = np.array(weights, np.float64), np.array(mask)
    found, codes = np.zeros(weights.shape), np.zeros(weights.shape, np.int8)
    static = [
        fit(weights[i : i + group], mask[i : i + group], bits, symmetric=symmetric)
        for i in range(0, len(weights), group)
    ]
    rows = np.arange(len(weights)) if order is None else order
    inverse = np.linalg.cholesky(np.linalg.inv(gram[np.ix_(rows, rows)])).T  # upper
    weights = weights[rows]
    for j, row in enumerate(rows):
        if order is not None:
            scale, zero = static[row // group]
        elif j % group == 0:
            block = slice(j, j + group)
            if choose is not None:
                mask[block] = choose(weights[block] ** 2 / np.diagonal(inverse)[block, None] ** 2, j)
            scale, zero = fit(weights[block], mask[block], bits, symmetric=symmetric)
        rounded = np.clip(np.rint(weights[j] / scale) + zero, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        codes[row] = np.where(mask[row], rounded, zero)
        found[row] = (codes[row] - zero) * scale
        weights[j:] -= inverse[j, j:, None] * (weights[j] - found[row]) / inverse[j, j]
    return found, mask, codes


def reconstruct(weights: np.ndarray, mask: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """For each unit the minimiser of (v - w)^T H (v - w) with v zero outside the mask."""
    found = np.zeros(weights.shape)
    for unit, kept in enumerate(mask.T):
        found[kept, unit] = np.linalg.solve(gram[np.ix_(kept, kept)], gram[kept] @ weights[:, unit])
    return found


def loss(found: np.ndarray, weights: np.ndarray, gram: np.ndarray) -> float:
    """The squared error of the layer's outputs, relative to the outputs."""
    weights, difference = np.asarray(weights, np.float64), np.asarray(found, np.float64) - weights
    return float(np.sum(difference * (gram @ difference)) / np.sum(weights * (gram @ weights)))


def problem(inputs: int, outputs: int, seed: int, samples: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Float32 weights, and the Gram matrix of inputs that depend on each other, in float64 of what float32 holds."""
    rng = np.random.default_rng(seed)
    mixing = np.eye(inputs) + rng.normal(size=(inputs, inputs)) / np.sqrt(inputs)
    data = rng.normal(size=(samples or 4 * inputs, inputs)) @ mixing * rng.uniform(0.5, 2, inputs)
    gram = (data.T @ data).astype(np.float32).astype(np.float64)
    return rng.normal(size=(inputs, outputs)).astype(np.float32), gram
