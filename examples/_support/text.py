"""Real text that every machine with Python has: the sources of the standard library, as bytes."""

import sysconfig
from pathlib import Path
from typing import NamedTuple

import numpy as np

from _support.data import DataError

# One in this many files is kept for validation, another one for the test; which, is decided by a seed.
HELD_OUT = 20
SPLIT_SEED = 0
# Not everywhere installed, or tables that a program wrote.
_LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data"}
)
_LEAST = 1_000_000


class Text(NamedTuple):
    """Text as uint8 arrays, from different files: to train on, to choose settings by, and to test with."""

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray


def load() -> Text:
    """Read the standard library's sources, about ten million bytes, split by file.

    Raises:
      DataError: this Python comes without sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in root.rglob("*.py") if not _LEFT_OUT.intersection(path.relative_to(root).parts))
    texts = [np.frombuffer(path.read_bytes(), np.uint8) for path in paths]
    if sum(map(len, texts)) < _LEAST:
        raise DataError(f"{root} holds less than {_LEAST:,} bytes of Python sources; use a Python with its library")
    order = np.random.default_rng(SPLIT_SEED).permutation(len(texts))
    held_out = len(texts) // HELD_OUT
    valid, test, train = np.split(order, [held_out, 2 * held_out])
    return Text(*(np.concatenate([texts[i] for i in part]) for part in (train, valid, test)))


def windows(text: np.ndarray, count: int, length: int, seed: int) -> np.ndarray:
    """Return windows that start anywhere, each of `length` bytes and the one that follows.

    Args:
      text: uint8 `[n]`.
      count: how many windows.
      length: the context's length.
      seed: of the places.

    Returns:
      int32 `[count, length + 1]`.

    >>> windows(np.arange(6, dtype=np.uint8), 2, 5, seed=0).tolist()
    [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
    """
    starts = np.random.default_rng(seed).integers(0, len(text) - length, count)
    return np.stack([text[start : start + length + 1] for start in starts]).astype(np.int32)
