"""Which axes of a leaf count layers, which number its inputs and which its outputs."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from jaxprune._tree._leaves import is_function
from jaxprune._tree._paths import Tree
from jaxprune._tree._patterns import as_patterns, fitting

_ATTENTION_INPUTS = ("query", "key", "value")


class Axes(NamedTuple):
    """The roles of a leaf's axes, counted from its first axis on.

    Attributes:
        stack: the axes that count layers, rising.
        inputs: the axis along which neighbouring inputs of a unit lie: of a dense layer the contraction, of a convolution the
            input channels; None where they do not lie along one axis.
        outputs: the axes that number the output units, rising; None where that is not known.
        why: why `inputs` or `outputs` is None, the end of a sentence that begins with the leaf.
    """

    stack: tuple[int, ...]
    inputs: int | None
    outputs: tuple[int, ...] | None
    why: str = ""


@runtime_checkable
class Roles(Protocol):
    """What knows how a function uses its parameters: `jaxprune.sites.Sites`."""

    def prunable(self, path: str, leaf: Any) -> bool:
        """Whether the leaf multiplies data."""

    def axes(self, path: str) -> Axes | None:
        """The roles of the leaf's axes; None where the leaf multiplies no data."""


# A function of path and leaf to a number of leading axes, glob patterns (one axis), a tree (prefix) of numbers, or sites.
Stacked = Callable[[str, Any], int] | str | Sequence[str] | Any


def conventional(path: str, shape: tuple[int, ...], stack: tuple[int, ...] = ()) -> Axes:
    """Go by the conventions of frameworks: a leaf's name, its module's, and how many axes it has.

    Flax and Haiku keep kernels as ``(..., in, out)``, attention projections as ``(in, heads, head_dim)``; Equinox, as
    PyTorch, calls them ``weight`` and keeps ``(out, in, ...)``.
    """
    own = [axis for axis in range(len(shape)) if axis not in stack]
    if len(own) < 2:
        return Axes(stack, None, tuple(own), f"has shape {shape}, which has no axis of inputs")
    *_, module, name = ["", *path.split("/")]
    if name.startswith("weight"):
        return Axes(stack, own[1], (own[0],))
    if module in _ATTENTION_INPUTS and len(own) == 3:
        return Axes(stack, own[0], (own[1], own[2]))
    return Axes(stack, own[-2], (own[-1],))


def read_axes(tree: Tree, stacked: Stacked = None, sites: Roles | None = None) -> list[Axes]:
    """Return for each leaf the roles of its axes; raise where `stacked` matches nothing."""
    known = [None if sites is None else sites.axes(path) for path in tree.paths]
    layers = _stacks(tree, stacked, known)
    return [
        conventional(path, np.shape(leaf), stack) if axes is None else axes._replace(stack=stack)
        for path, leaf, stack, axes in zip(tree.paths, tree.leaves, layers, known, strict=True)
    ]


def _stacks(tree: Tree, stacked: Any, known: list[Axes | None]) -> list[tuple[int, ...]]:
    if stacked is None:
        return [() if axes is None else axes.stack for axes in known]
    if isinstance(stacked, Roles):
        found = [stacked.axes(path) for path in tree.paths]
        return [() if axes is None else axes.stack for axes in found]
    patterns = as_patterns(stacked)
    if patterns is not None:
        counts = [int(named) for named in fitting(patterns, tree, "stacked")]
    elif is_function(stacked):
        counts = [int(stacked(path, leaf)) for path, leaf in zip(tree.paths, tree.leaves, strict=True)]
    else:
        counts = [0 if count is None else int(count) for count in tree.spread(stacked, "stacked")]
    asked = "the predicate" if is_function(stacked) else repr(stacked)
    for count, name, leaf in zip(counts, tree.names, tree.leaves, strict=True):
        if not 0 <= count <= np.ndim(leaf):
            raise ValueError(f"stacked={asked} gives {count} layer axes to {name} of shape {np.shape(leaf)}.")
    return [tuple(range(count)) for count in counts]
