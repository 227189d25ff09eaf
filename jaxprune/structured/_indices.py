"""Which indices of an axis stay, in plain numbers."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def is_nested(kept: Sequence[Any]) -> bool:
    """Whether each layer keeps indices of its own."""
    return len(kept) > 0 and np.ndim(kept[0]) == 1


def as_tuples(kept: np.ndarray) -> tuple[Any, ...]:
    """Return indices as a plan has them."""
    return tuple(map(tuple, kept.tolist())) if kept.ndim == 2 else tuple(kept.tolist())


def check_indices(kept: Sequence[int], path: str, axis: int, shape: Sequence[int]) -> None:
    """Raise a ValueError unless they rise and lie on the axis."""
    indices = np.asarray(kept)
    rising = len(indices) > 0 and bool(np.all(np.diff(indices) > 0))
    if not rising or indices[0] < 0 or indices[-1] >= shape[axis]:
        raise ValueError(
            f"The plan keeps {list(kept)!r} along axis {axis} of {path}, of shape {shape}; "
            f"it must keep some of 0 to {shape[axis] - 1}, rising, each once."
        )
