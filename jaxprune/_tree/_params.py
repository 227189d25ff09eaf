"""Parameters read once: which leaves are pruned, which axes count layers, where inputs and outputs lie."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxprune._tree._axes import Axes, Roles, Stacked, read_axes
from jaxprune._tree._cautions import caution_nameless, caution_optimizer
from jaxprune._tree._leaves import is_floating
from jaxprune._tree._paths import Tree, read_arrays
from jaxprune._tree._prunable import Prunable, kernels, verdicts


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

    Warns:
        UserWarning: names are all there is to go by, and the leaves have none, or are those of an optimizer.

    Raises:
        ValueError: nothing is prunable, a pattern fits nothing, or a leaf has fewer axes than it should have layers.
        TypeError: a leaf is no array.
    """
    tree = read_arrays(params, what)
    axes = read_axes(tree, stacked, sites)
    # A predicate is asked about one layer, so that a stack of biases does not look like a kernel.
    layers = [
        jax.ShapeDtypeStruct(_without(leaf.shape, known.stack), leaf.dtype) if known.stack else leaf
        for leaf, known in zip(tree.leaves, axes, strict=True)
    ]
    asked = sites if prunable is None else prunable
    chosen_by = kernels(params, tree, layers) if asked is None else verdicts(asked, tree, layers)
    chosen = [bool(verdict) and eligible(leaf) for verdict, leaf in zip(chosen_by, tree.leaves, strict=True)]
    if not any(chosen):
        shown = ", ".join(tree.names[:4]) + (", ..." if len(tree.names) > 4 else "")
        raise ValueError(f"No leaf is prunable. Found {shown or 'an empty tree'}. {_remedy(tree)}")
    if asked is None:
        caution_nameless(tree, chosen)
        caution_optimizer(tree, chosen)
    return Params(tree.what, tree.paths, tree.names, tree.leaves, tree.treedef, chosen, axes)


def _remedy(tree: Tree) -> str:
    if [np.ndim(leaf) for leaf in tree.leaves] == [0] and tree.paths == [""]:
        return f"{tree.what} is one number: the parameters come first, as in make_masks(params, k)."
    if tree.leaves and all(getattr(leaf, "dtype", None) == np.bool_ for leaf in tree.leaves):
        return "All are bool, as masks are: the parameters come first, then their masks."
    return "Pass prunable=, a function (path, leaf) -> bool, a glob pattern of paths or a tree of bools."


def _without(shape: tuple[int, ...], stack: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for axis, n in enumerate(shape) if axis not in stack)
