"""Glob patterns of paths, or of modules above them."""

from fnmatch import fnmatchcase
from typing import Any

from jaxprune._tree._names import slashed
from jaxprune._tree._paths import Tree


def matches(pattern: str, path: str) -> bool:
    """Whether a glob pattern fits a path or a module above the leaf; dots are slashes, in both.

    >>> matches("layers", "layers/dense/kernel"), matches("*/kernel", "layers/dense/bias")
    (True, False)
    >>> matches("model/layers.*.weight", "model.layers.0.q_proj.weight")
    True
    """
    pattern, parts = slashed(pattern), slashed(path).split("/")
    return any(fnmatchcase("/".join(parts[: n + 1]), pattern) for n in range(len(parts)))


def as_patterns(given: Any) -> list[str] | None:
    """Return glob patterns as a list; None of anything else."""
    if isinstance(given, str):
        return [given]
    if isinstance(given, list | tuple) and given and all(isinstance(pattern, str) for pattern in given):
        return list(given)
    return None


def fitting(patterns: list[str], tree: Tree, what: str) -> list[bool]:
    """Say for each leaf whether a pattern fits; raise a ValueError where one fits none, given as the argument `what`."""
    for pattern in patterns:
        if not any(matches(pattern, path) for path in tree.paths):
            found = f"Paths look like {tree.paths[0]!r}" if tree.paths else "There is none"
            raise ValueError(
                f"{what}={pattern!r} matches no path. {found}; a pattern names a leaf or a module above it."
            )
    return [any(matches(pattern, path) for pattern in patterns) for path in tree.paths]
