"""Real text that every machine with Python has: the sources of the standard library, as bytes, and its docstrings, in English."""

import ast
import sysconfig
import warnings
from collections.abc import Iterator
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
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_LEAST_PROSE = 500  # characters


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
    return Text(*(np.concatenate([np.frombuffer(path.read_bytes(), np.uint8) for path in part]) for part in _paths()))


def docstrings(part: str, *, seed: int) -> Iterator[str]:
    """Yield the docstrings of one module after the other, joined by empty lines; modules that say little are left out.

    Args:
      part: "train", "valid" or "test": no module is in two of them.
      seed: of the modules' order.

    Raises:
      DataError: this Python comes without sources.
    """
    paths = getattr(_paths(), part)
    for i in np.random.default_rng(seed).permutation(len(paths)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the sources themselves
            nodes = ast.walk(ast.parse(paths[i].read_bytes()))
        documented = (node for node in nodes if isinstance(node, _DOCUMENTED))
        found = "\n\n".join(filter(None, map(ast.get_docstring, documented)))
        if len(found) >= _LEAST_PROSE:
            yield found + "\n\n"


class _Paths(NamedTuple):
    train: list[Path]
    valid: list[Path]
    test: list[Path]


def _paths() -> _Paths:
    """The files of each part."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in root.rglob("*.py") if not _LEFT_OUT.intersection(path.relative_to(root).parts))
    if sum(path.stat().st_size for path in paths) < _LEAST:
        raise DataError(f"{root} holds less than {_LEAST:,} bytes of Python sources; use a Python with its library")
    order = np.random.default_rng(SPLIT_SEED).permutation(len(paths))
    held_out = len(paths) // HELD_OUT
    valid, test, train = np.split(order, [held_out, 2 * held_out])
    return _Paths(*([paths[i] for i in part] for part in (train, valid, test)))


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
