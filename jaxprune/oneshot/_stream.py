"""Activations between two blocks, a tree of arrays for each batch: in memory or on disk."""

from pathlib import Path
from typing import Any

import jax
import numpy as np


class Stream:
    """Trees of arrays by number, the latest that was put there.

    Args:
        folder: where to keep them, in a file for each array; None keeps the arrays themselves.
        name: tells the files of streams in one folder apart.
    """

    def __init__(self, folder: Path | None, name: str) -> None:
        self._folder = folder
        self._name = name
        self._held: dict[int, Any] = {}

    def put(self, number: int, tree: Any) -> None:
        """Keep a tree in place of the one before."""
        if self._folder is not None:
            for part, leaf in enumerate(jax.tree.leaves(tree)):
                np.asarray(leaf).tofile(self._file(number, part))
            tree = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
        self._held[number] = tree

    def get(self, number: int) -> Any:
        """Return a tree."""
        held = self._held[number]
        if self._folder is None:
            return held
        shapes, treedef = jax.tree.flatten(held)
        arrays = [
            np.fromfile(self._file(number, part), shape.dtype).reshape(shape.shape) for part, shape in enumerate(shapes)
        ]
        return jax.tree.unflatten(treedef, arrays)

    def _file(self, number: int, part: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{self._name}-{number}-{part}"
