"""Parameters read once: which leaves are pruned, which axes count layers, where inputs and outputs lie."""

import dataclasses
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from jaxprune._tree._axes import Axes, conventional
from jaxprune._tree._leaves import is_floating, is_function
from jaxprune._tree._paths import Tree, flatten
from jaxprune._tree._prunable import Predicate, in_tables_or_norms, is_kernel


@runtime_checkable
class Roles(Protocol):
    """What knows how a function uses its parameters: `jaxprune.sites.Sites`."""

    def prunable(self, path: str, leaf: Any) -> bool:
        """Whether the leaf multiplies data."""

    def axes(self, path: str) -> Axes | None:
        """The roles of the leaf's axes; None where the leaf multiplies no data."""


# A predicate of path and leaf, glob patterns of paths or of modules above them, a tree (prefix) of bools, or sites.
Prunable = Predicate | str | Sequence[str] | Any
# A function of path and leaf to a number of leading axes, glob patterns (one axis), a tree (prefix) of numbers, or sites.
Stacked = Callable[[str, Any], int] | str | Sequence[str] | Any


@dataclasses.dataclass(frozen=True, eq=False)
class Params(Tree):
    """Parameters, or masks of them.

    Attributes:
        prunable: for each leaf whether it is pruned.
        axes: for each leaf the roles of its axes.
    """

    prunable: list[bool]
    axes: list[Axes]

    @property
    def stacks(self) -> list[tuple[int, ...]]:
        """For each leaf the axes that count layers."""
        return [axes.stack for axes in self.axes]


def read_params(
    params: Any,
    *,
    what: str = "params",
    prunable: Prunable = None,
    stacked: Stacked = None,
    sites: Roles | None = None,
    eligible: Callable[[Any], bool] = is_floating,
) -> Params:
    """Read a tree of parameters.

    Args:
        params: the tree.
        what: what messages call it.
        prunable: which leaves are pruned; None takes `sites`, or else kernels, by `is_kernel` and the class that holds them.
        stacked: which leaves are stacks of layers; None takes `sites`, or else none is.
        sites: what the function does with them; None goes by names.
        eligible: what a leaf must be to be pruned; of masks something else than of parameters.

    Returns:
        The parameters.

    Raises:
        ValueError: nothing is prunable, a pattern fits nothing, or a leaf has fewer axes than it should have layers.
        TypeError: a leaf is no array.
    """
    tree = flatten(params, what)
    tree.require_arrays()
    axes = read_axes(tree, stacked, sites)
    # A predicate is asked about one layer, so that a stack of biases does not look like a kernel.
    layers = [
        jax.ShapeDtypeStruct(_without(leaf.shape, known.stack), leaf.dtype) if known.stack else leaf
        for leaf, known in zip(tree.leaves, axes, strict=True)
    ]
    asked = sites if prunable is None else prunable
    verdicts = _kernels(params, tree, layers) if asked is None else _verdicts(asked, tree, layers)
    chosen = [bool(verdict) and eligible(leaf) for verdict, leaf in zip(verdicts, tree.leaves, strict=True)]
    if not any(chosen):
        shown = ", ".join(tree.names[:4]) + (", ..." if len(tree.names) > 4 else "")
        raise ValueError(
            f"No leaf is prunable. Found {shown or 'an empty tree'}. "
            "Pass prunable=, a function (path, leaf) -> bool, a glob pattern of paths or a tree of bools."
        )
    return Params(tree.what, tree.paths, tree.names, tree.leaves, tree.treedef, chosen, axes)


def read_axes(tree: Tree, stacked: Stacked = None, sites: Roles | None = None) -> list[Axes]:
    """Return for each leaf the roles of its axes; raise where `stacked` matches nothing."""
    known = [None if sites is None else sites.axes(path) for path in tree.paths]
    layers = _stacks(tree, stacked, known)
    return [
        conventional(path, np.shape(leaf), stack) if axes is None else axes._replace(stack=stack)
        for path, leaf, stack, axes in zip(tree.paths, tree.leaves, layers, known, strict=True)
    ]


def matches(pattern: str, path: str) -> bool:
    """Whether a glob pattern fits a path or a module above the leaf.

    >>> matches("layers", "layers/dense/kernel"), matches("*/kernel", "layers/dense/bias")
    (True, False)
    """
    parts = path.split("/")
    return any(fnmatchcase("/".join(parts[: n + 1]), pattern) for n in range(len(parts)))


def _without(shape: tuple[int, ...], stack: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for axis, n in enumerate(shape) if axis not in stack)


def _patterns(given: Any) -> list[str] | None:
    """Return glob patterns as a list; None of anything else."""
    if isinstance(given, str):
        return [given]
    if isinstance(given, list | tuple) and given and all(isinstance(pattern, str) for pattern in given):
        return list(given)
    return None


def _by_patterns(patterns: list[str], tree: Tree, what: str) -> list[bool]:
    for pattern in patterns:
        if not any(matches(pattern, path) for path in tree.paths):
            found = f"Paths look like {tree.paths[0]!r}" if tree.paths else "There is none"
            raise ValueError(
                f"{what}={pattern!r} matches no path. {found}; a pattern names a leaf or a module above it."
            )
    return [any(matches(pattern, path) for pattern in patterns) for path in tree.paths]


def _stacks(tree: Tree, stacked: Any, known: list[Axes | None]) -> list[tuple[int, ...]]:
    if stacked is None:
        return [() if axes is None else axes.stack for axes in known]
    if isinstance(stacked, Roles):
        found = [stacked.axes(path) for path in tree.paths]
        return [() if axes is None else axes.stack for axes in found]
    patterns = _patterns(stacked)
    if patterns is not None:
        counts = [int(named) for named in _by_patterns(patterns, tree, "stacked")]
    elif is_function(stacked):
        counts = [int(stacked(path, leaf)) for path, leaf in zip(tree.paths, tree.leaves, strict=True)]
    else:
        counts = [0 if count is None else int(count) for count in tree.spread(stacked, "stacked")]
    asked = "the predicate" if is_function(stacked) else repr(stacked)
    for count, name, leaf in zip(counts, tree.names, tree.leaves, strict=True):
        if not 0 <= count <= np.ndim(leaf):
            raise ValueError(f"stacked={asked} gives {count} layer axes to {name} of shape {np.shape(leaf)}.")
    return [tuple(range(count)) for count in counts]


def _kernels(params: Any, tree: Tree, layers: Sequence[Any]) -> list[bool]:
    excluded = in_tables_or_norms(params)
    return [not out and is_kernel(path, layer) for out, path, layer in zip(excluded, tree.paths, layers, strict=True)]


def _verdicts(prunable: Any, tree: Tree, layers: Sequence[Any]) -> list[Any]:
    """Ask a predicate, patterns, sites, or read a tree of bools; what that does not cover is not pruned."""
    if isinstance(prunable, Roles):
        prunable = prunable.prunable
    patterns = _patterns(prunable)
    if patterns is not None:
        return list(_by_patterns(patterns, tree, "prunable"))
    if is_function(prunable):
        return [prunable(path, layer) for path, layer in zip(tree.paths, layers, strict=True)]
    verdicts = tree.spread(prunable, "prunable")
    for verdict, name in zip(verdicts, tree.names, strict=True):
        if not (verdict is None or isinstance(verdict, bool | np.bool_)):
            raise TypeError(
                f"prunable is a function (path, leaf) -> bool, a glob pattern, sites or a tree of bools; for {name} it "
                f"says {verdict!r}."
            )
    return verdicts
