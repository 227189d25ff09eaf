"""One exact threshold for all tensors of a model that is read one tensor at a time."""

import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from jaxprune._selection import _counts
from jaxprune._tree._leaves import is_complex
from jaxprune.rules import _erk
from jaxprune.rules._guard import most_removed

# Reads a tensor by name.
Read = Callable[[str], np.ndarray]


class GlobalRanking:
    """Which weights `rules.global_sparsity` keeps, found in three passes over the tensors by counting.

    Exactly ``round(k * n)`` weights go, whatever the ties: among equals the earlier name, then the lower row-major index
    is kept; so many of the largest weights of every tensor stay that no tensor loses more than it may, and never its
    last one. Magnitudes are compared in float32. Memory: one tensor and a few copies of it.
    """

    def __init__(self, names: Iterable[str], read: Read, k: float, max_sparsity: float = 1.0) -> None:
        """Pass over the tensors for the upper half of the threshold's bits, for the lower half, and for its ties."""
        self._stay: dict[str, int] = {}
        self._max_sparsity = max_sparsity
        names = sorted(names)
        upper, size = np.zeros(2**16, np.int64), 0
        for name in names:
            values = read(name)
            size += values.size
            upper += np.bincount(self._ranked(_keys(values)) >> 16, minlength=2**16)
        self.removed = checked_total(k, size, int(upper.sum()), max_sparsity, "rules.global_sparsity")
        if not self.removed:
            return
        high, below = _find(upper, self.removed)
        lower = np.zeros(2**16, np.int64)
        for name in names:
            keys = self._ranked(_keys(read(name)))
            lower += np.bincount(keys[keys >> 16 == high] & 0xFFFF, minlength=2**16)
        low, below_low = _find(lower, self.removed - below)
        self._threshold = np.uint32(high << 16 | low)
        # Of the weights at the threshold, the first ones stay.
        stay = int(lower[low]) - (self.removed - below - below_low)
        for name in names:
            here = int(np.count_nonzero(self._ranked(_keys(read(name))) == self._threshold))
            self._stay[name] = min(stay, here)
            stay -= self._stay[name]

    def mask(self, name: str, values: np.ndarray) -> np.ndarray:
        """Return the mask of a tensor, bool of its shape, True = keep."""
        if not self.removed:
            return np.ones(values.shape, bool)
        keys = _keys(values)
        mask = self._protected(keys)
        ties = np.flatnonzero((keys == self._threshold) & ~mask)
        mask |= keys > self._threshold
        mask[ties[: self._stay[name]]] = True
        return mask.reshape(values.shape)

    def _protected(self, keys: np.ndarray) -> np.ndarray:
        """Mark the largest weights that always stay, of equals the first ones."""
        stay = len(keys) - min(len(keys) - 1, most_removed(self._max_sparsity, len(keys)))
        least = np.partition(keys, len(keys) - stay)[len(keys) - stay]
        mask = keys > least
        mask[np.flatnonzero(keys == least)[: stay - int(np.count_nonzero(mask))]] = True
        return mask

    def _ranked(self, keys: np.ndarray) -> np.ndarray:
        """Leave out what always stays."""
        return keys[~self._protected(keys)]


def checked_total(k: float, size: int, most: int, max_sparsity: float, rule: str) -> int:
    """Return round(k * size), how many of all weights go; raise where a cap allows fewer, and never take the last ones."""
    removed = round(k * size)
    if removed > most and max_sparsity < 1:
        raise ValueError(
            f"{rule}: k = {k:g} asks for {removed:,} of {size:,} weights to go, but with max_sparsity={max_sparsity:g} only "
            f"{most:,} can (k <= {most / size:.6g})."
        )
    return min(removed, most)


def _keys(values: np.ndarray) -> np.ndarray:
    """Map magnitudes to integers of the same order; a NaN ranks below zero."""
    sizes = np.abs(values if is_complex(values) else values.astype(np.float32)).astype(np.float32).reshape(-1)
    keys = sizes.view(np.uint32) + np.uint32(1)
    keys[np.isnan(sizes)] = 0
    return keys


def _find(counts: np.ndarray, wanted: int) -> tuple[int, int]:
    """Return the bin in which the `wanted`-th smallest lies, and how many lie below that bin."""
    ends = np.cumsum(counts)
    place = int(np.searchsorted(ends, wanted))
    return place, int(ends[place] - counts[place])


def erk_removed(shapes: Mapping[str, tuple[int, ...]], k: float, max_sparsity: float = 1.0) -> dict[str, int]:
    """Return how many weights `rules.erk_sparsity` removes of each tensor; it depends on the shapes alone."""
    names = sorted(shapes)
    sizes = [math.prod(shapes[name]) for name in names]
    most = [min(size - 1, most_removed(max_sparsity, size)) for size in sizes]
    removed = checked_total(k, sum(sizes), sum(most), max_sparsity, "rules.erk_sparsity")
    least = [size - may_go for size, may_go in zip(sizes, most, strict=True)]
    dims = [sum(shapes[name]) for name in names]
    counts = _erk.allocate(sizes, dims, [()] * len(names), _counts.from_int(removed), least)
    return {name: int(_counts.to_numpy(count)) for name, count in zip(names, counts, strict=True)}
