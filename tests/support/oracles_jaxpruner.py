"""JaxPruner's masks and schedule in NumPy, written from its definitions (its last commit is of April 2024)."""

from collections.abc import Mapping, Sequence

import numpy as np

Masks = dict[str, np.ndarray]


def top_k(scores: np.ndarray, sparsity: float) -> np.ndarray:
    """Keep max(1, round(n (1 - sparsity))) scores, computed in float32; among equals the lower row-major index."""
    share = np.float32(1) - np.float32(sparsity)
    number = max(1, int(np.round(np.float32(scores.size) * share)))
    mask = np.zeros(scores.size, bool)
    mask[np.argsort(-scores.ravel(), kind="stable")[:number]] = True
    return mask.reshape(scores.shape)


def n_of_m(scores: np.ndarray, n: int, m: int, axis: int = -1) -> np.ndarray:
    """Keep the n of every m that rank highest in ascending order: among equals the later index."""
    moved = np.moveaxis(scores, axis, -1)
    groups = moved.reshape(*moved.shape[:-1], -1, m)
    ranks = np.argsort(np.argsort(groups, -1, kind="stable"), -1, kind="stable")
    return np.moveaxis((ranks >= m - n).reshape(moved.shape), -1, axis)


def channels(scores: np.ndarray, sparsity: float, axis: int = -1) -> np.ndarray:
    """Keep whole slices along an axis, those of the largest sums of scores."""
    others = tuple(a for a in range(scores.ndim) if a != axis % scores.ndim)
    kept = top_k(scores.sum(others, keepdims=True), sparsity)
    return np.broadcast_to(kept, scores.shape)


def blocks(scores: np.ndarray, sparsity: float, shape: tuple[int, int]) -> np.ndarray:
    """Keep blocks of a matrix that they divide, those of the largest sums of scores."""
    (rows, columns), (height, width) = scores.shape, shape
    sums = scores.reshape(rows // height, height, columns // width, width).sum((1, 3))
    return np.kron(top_k(sums, sparsity), np.ones(shape, bool)).astype(bool)


def globally(scores: Mapping[str, np.ndarray], sparsity: float, *, normalized: bool = True) -> Masks:
    """One top-k over all leaves in the order of their names, each divided by its L2 norm unless told otherwise."""
    names = sorted(scores)
    scaled = [scores[n] / (np.linalg.norm(scores[n]) + np.float32(1e-8)) if normalized else scores[n] for n in names]
    flat = top_k(np.concatenate([x.ravel() for x in scaled]), sparsity)
    ends = np.cumsum([scores[n].size for n in names])[:-1]
    return {n: part.reshape(scores[n].shape) for n, part in zip(names, np.split(flat, ends), strict=True)}


def erk(shapes: Mapping[str, Sequence[int]], sparsity: float) -> dict[str, float]:
    """The sparsity of each leaf: its density is e * sum(shape) / prod(shape), those above 1 are kept whole, one at a time."""
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    raw = {name: sum(shape) / sizes[name] for name, shape in shapes.items()}
    zeros = {name: int(np.floor(sparsity * size)) for name, size in sizes.items()}
    dense: set[str] = set()
    while True:
        rest = [name for name in shapes if name not in dense]
        budget = sum(sizes[n] - zeros[n] for n in rest) - sum(zeros[n] for n in dense)
        e = budget / sum(raw[n] * sizes[n] for n in rest)
        highest = max(raw[n] for n in rest)
        if e * highest <= 1:
            return {name: 0.0 if name in dense else 1 - e * raw[name] for name in shapes}
        dense |= {n for n in rest if raw[n] == highest}


def sparsity_at(step: int, target: float, start: int, end: int) -> float:
    """The cubic, whose progress counts from step start - 1 on."""
    progress = np.clip(step + 1 - start, 0, end - start) / (end - start)
    return target * (1 - (1 - progress) ** 3)


def updates_at(step: int, freq: int, start: int, end: int) -> bool:
    """Whether masks change at a step: at multiples of freq from 0 on, not from start on."""
    return step % freq == 0 and start <= step <= end


def dropped_and_grown(mask: np.ndarray, drop: np.ndarray, grow: np.ndarray, fraction: float) -> np.ndarray:
    """RigL's and SET's new mask of a leaf: top-k by weights at a lower density, then by growth at the old one."""
    density = np.float32(mask.sum()) / np.float32(mask.size)
    fewer = density * (np.float32(1) - np.float32(fraction))
    survivors = top_k(np.where(mask, drop, drop.min() - np.float32(1e-5)), 1 - fewer)
    return top_k(np.where(survivors, grow.max() + np.float32(1e-5), grow), 1 - density)
