"""One exact threshold for all tensors of a model that is read one tensor at a time."""

import math
from collections.abc import Callable, Iterable

import numpy as np

# Reads a tensor by name.
Read = Callable[[str], np.ndarray]


class GlobalRanking:
    """Which weights `rules.global_sparsity` keeps, found in three passes over the tensors by counting.

    Exactly ``round(k * n)`` weights go, whatever the ties: among equals the earlier name, then the lower row-major index
    is kept; the largest weight of every tensor stays. Magnitudes are compared in float32. Memory: one tensor and a few
    copies of it.
    """

    def __init__(self, names: Iterable[str], read: Read, k: float) -> None:
        """Pass over the tensors for the upper half of the threshold's bits, for the lower half, and for its ties."""
        self._stay: dict[str, int] = {}
        names = sorted(names)
        upper = np.zeros(2**16, np.int64)
        for name in names:
            upper += np.bincount(_ranked_keys(read(name)) >> 16, minlength=2**16)
        ranked = int(upper.sum())
        self.removed = min(round(k * (ranked + len(names))), ranked)
        if not self.removed:
            return
        high, below = _find(upper, self.removed)
        lower = np.zeros(2**16, np.int64)
        for name in names:
            keys = _ranked_keys(read(name))
            lower += np.bincount(keys[keys >> 16 == high] & 0xFFFF, minlength=2**16)
        low, below_low = _find(lower, self.removed - below)
        self._threshold = np.uint32(high << 16 | low)
        # Of the weights at the threshold, the first ones stay.
        stay = int(lower[low]) - (self.removed - below - below_low)
        for name in names:
            here = int(np.count_nonzero(_ranked_keys(read(name)) == self._threshold))
            self._stay[name] = min(stay, here)
            stay -= self._stay[name]

    def mask(self, name: str, values: np.ndarray) -> np.ndarray:
        """Return the mask of a tensor, bool of its shape, True = keep."""
        if not self.removed:
            return np.ones(values.shape, bool)
        keys = _keys(values)
        protected = int(np.argmax(keys))
        mask = keys > self._threshold
        ties = np.flatnonzero(keys == self._threshold)
        ties = ties[ties != protected]
        mask[ties[: self._stay[name]]] = True
        mask[protected] = True
        return mask.reshape(values.shape)


def _keys(values: np.ndarray) -> np.ndarray:
    """Map magnitudes to integers of the same order; a NaN ranks below zero."""
    sizes = np.abs(values.astype(np.float32)).reshape(-1)
    keys = sizes.view(np.uint32) + np.uint32(1)
    keys[np.isnan(sizes)] = 0
    return keys


def _ranked_keys(values: np.ndarray) -> np.ndarray:
    """Leave out the largest weight, the first of equals: it always stays."""
    keys = _keys(values)
    return np.delete(keys, np.argmax(keys))


def _find(counts: np.ndarray, wanted: int) -> tuple[int, int]:
    """Return the bin in which the `wanted`-th smallest lies, and how many lie below that bin."""
    ends = np.cumsum(counts)
    place = int(np.searchsorted(ends, wanted))
    return place, int(ends[place] - counts[place])


def erk_removed(shapes: dict[str, tuple[int, ...]], k: float) -> dict[str, int]:
    """Return how many weights `rules.erk_sparsity` removes of each tensor; it depends on the shapes alone."""
    import jax

    from jaxprune._selection import _counts
    from jaxprune.rules import _erk
    from jaxprune.rules._layers import Layer

    names = sorted(shapes)
    layers = [Layer(name, name, jax.ShapeDtypeStruct(shapes[name], np.float32)) for name in names]  # type: ignore[arg-type]
    total = sum(math.prod(shapes[name]) for name in names)
    removed = min(round(k * total), total - len(names))
    found = _erk.allocate(layers, _counts.from_int(removed), [1] * len(names))
    return {name: (int(count.high) << 32) + int(count.low) for name, count in zip(names, found, strict=True)}
